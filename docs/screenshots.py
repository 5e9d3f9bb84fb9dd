"""Pictures of pages for the documents, made anew by `python docs/screenshots.py`: the report of the standard run, on a
desk and on a phone, and `hf-gallery look` on a small model that it trains for a minute first. Needs Chromium and
`pip install -e ".[test]"`.
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
TALE = ROOT / "CONTRIBUTING.md"  # the text that the model reads
STEPS, SEGMENT, LENGTH = 60, 64, 256


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
    """The page of a small Memorizing Transformer that reads a document of this repository."""
    import torch
    from transformers import set_seed

    from hf_gallery import GalleryMemorizingTransformerConfig, GalleryMemorizingTransformerForCausalLM, look
    from hf_gallery.data import byte_tokenizer, encode_bytes, load_corpus
    from hf_gallery.looking.page import page, words_of

    set_seed(0)
    tokenizer, corpus = byte_tokenizer(), load_corpus("stdlib")
    config = GalleryMemorizingTransformerConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=256,
        segment_length=SEGMENT,
        mem_len=SEGMENT,
        memory_layers=[1],
        memory_size=2048,
        memory_topk=16,
        initial_scale=24**0.5,
    )
    model = GalleryMemorizingTransformerForCausalLM(config)
    text = "".join(corpus["train"]["text"][:50])
    ids = torch.from_numpy(encode_bytes(text).astype("int64"))  # (bytes,)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(STEPS):
        starts = torch.randint(len(ids) - LENGTH, (8,)).tolist()
        rows = torch.stack([ids[start : start + LENGTH] for start in starts])  # (B, LENGTH)
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    print(f"trained to {loss.item() / 0.6931:.2f} bits per byte", file=sys.stderr)
    said = tokenizer(TALE.read_text(encoding="utf-8")[:1500], return_tensors="pt").input_ids
    found = look(model.eval(), said)
    return page(found, words_of(tokenizer, found.ids), f"A small Memorizing Transformer reads {TALE.name}")


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
