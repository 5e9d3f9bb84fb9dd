"""Pictures of pages for the documents, made anew by `python docs/screenshots.py`: the report of the standard run, on a
desk and on a phone, and `hf-gallery look` on a model of the zoo. Needs Chromium and `pip install -e ".[test]"`.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from browser import FOUND, Browser  # noqa: E402

PICTURES = ROOT / "docs" / "pictures"
MOST = 200_000  # bytes of a picture
COLOURS = 256  # of its palette
# Name, width and height of each picture of the report, and what stands at its top.
SHOWN = [
    ("report", 1440, 900, "header"),
    ("comparison", 1440, 900, "#comparison"),
    ("curves", 1440, 900, "#group0"),
    ("report-phone", 390, 700, "#comparison"),
]
MODEL = ROOT / "zoo" / "block_recurrent_transformer"
# The text that it reads, in which names come back.
TALE = """\
Mr. Wetherby had lived in the old house at Larkfield for more than thirty years, and in all that time he had never once
been known to leave it in the winter. "My dear Miss Ashcombe," he would say, when that lady came to beg that he would
dine with her on the Thursday, "you are very good, but the roads are not fit for a dog; and as for my horses, I would
not have them out on such a night for the world."

Miss Ashcombe, who was a lady of great good sense, and who had known him since they were children together, did not
think it worth her while to dispute with him. She only smiled, and said that Thursday would come again, and that Mr.
Wetherby would find her at home whenever the roads at Larkfield should be fit for a gentleman.

It was therefore with some surprise that the servants of Miss Ashcombe, upon a Thursday in the middle of January, with
the snow lying deep upon the ground, beheld the carriage of Mr. Wetherby coming slowly up to the door; and with still
greater surprise that they saw Mr. Wetherby himself get down from it, and stand in the hall with the snow upon his hat.
"I have come from Larkfield," said he, "to dine with Miss Ashcombe."
"""


def main() -> None:
    if FOUND is None:
        raise SystemExit("no Chromium here; install it (apt-get install chromium) and run this again")
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, Browser() as browser:
        report, look = Path(folder, "report.html"), Path(folder, "look.html")
        report.write_text(report_page(), encoding="utf-8")
        for name, width, height, place in SHOWN:
            browser.open(report, width, height)
            browser.evaluate(f"document.querySelector({place!r}).scrollIntoView()")
            save(browser.picture(), PICTURES / f"{name}.png")
        look.write_text(look_page(), encoding="utf-8")
        browser.open(look, 1440, 1000)
        save(browser.picture(), PICTURES / "look.png")


def report_page() -> str:
    """The page of the standard run."""
    from eval.page import page

    return page(json.loads((ROOT / "eval" / "results" / "standard.json").read_text(encoding="utf-8")))


def look_page() -> str:
    """The page of a model of the zoo that reads the tale."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_gallery import look
    from hf_gallery.looking.page import page, words_of

    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL).eval(), AutoTokenizer.from_pretrained(MODEL)
    found = look(model, tokenizer(TALE, return_tensors="pt").input_ids)
    return page(found, words_of(tokenizer, found.ids), "The Block-Recurrent Transformer of the zoo reads a tale")


def save(png: bytes, path: Path) -> None:
    """Writes a picture with a palette, which is a third of its size. Raises ValueError if that is still too much."""
    whole = Image.open(io.BytesIO(png)).convert("RGB")
    # Colours that are far apart, so that small symbols keep theirs.
    picture = whole.quantize(COLOURS, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    picture.save(path, optimize=True)
    if path.stat().st_size > MOST:
        raise ValueError(f"{path.name} has {path.stat().st_size:,} bytes, more than {MOST:,}; show less of the page")
    print(f"{path.relative_to(ROOT)}  {path.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
