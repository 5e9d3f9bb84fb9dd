"""The page of `hf-gallery look`: in a real browser, as wide as a phone and as a desk, by mouse and by keyboard."""

import json
import re
import shutil
import subprocess

import pytest
import torch
from typer.testing import CliRunner
from variants import VARIANTS, causal, words

from hf_gallery import GalleryMemorizingTransformerConfig, GalleryMemorizingTransformerForCausalLM, look
from hf_gallery.cli import app
from hf_gallery.data import byte_tokenizer
from hf_gallery.looking.page import page, words_of

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TEXT = "A tale </script><b>of</b> “two” cities.\n" * 6

WATCH = """<script>
window.problems = [];
addEventListener("error", e => problems.push(String(e.message)));
console.error = (...said) => problems.push(said.join(" "));
</script>"""
TELL = """<script>
const rgb = text => { const x = text.match(/[\\d.]+/g).map(Number); return x.length > 3 ? x : [...x, 1]; };
const behind = e => {  // the colour that stands behind an element's text
  if (!e) return rgb(getComputedStyle(document.documentElement).backgroundColor).slice(0, 3);
  const [r, g, b, a] = rgb(getComputedStyle(e).backgroundColor);
  if (a === 1) return [r, g, b];
  const under = behind(e.parentElement);
  return [r, g, b].map((x, i) => a * x + (1 - a) * under[i]);
};
const bright = c => { const [r, g, b] = c.map(x => (x /= 255) <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const contrast = e => { const two = [bright(rgb(getComputedStyle(e).color).slice(0, 3)), bright(behind(e))];
  return (Math.max(...two) + 0.05) / (Math.min(...two) + 0.05); };
const chosenNow = () => document.querySelector("#panel h3").textContent;
const press = key =>
  document.querySelector("#text").dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
addEventListener("load", () => setTimeout(() => {
  const said = { first: chosenNow() };
  document.querySelector("#t9").click();
  said.clicked = chosenNow();
  press("ArrowRight"); said.right = chosenNow();
  press("ArrowLeft"); press("ArrowLeft"); said.left = chosenNow();
  press("Home"); said.home = chosenNow();
  press("ArrowDown"); said.down = chosenNow();
  said.kept = document.querySelector("#text .chosen").classList.contains("full");
  said.keys = document.querySelectorAll("#panel tbody tr").length;
  said.bars = document.querySelectorAll("#panel .bar").length;
  const layer = document.querySelector("#layer"), head = document.querySelector("#head");
  layer.value = 1; layer.dispatchEvent(new Event("change"));
  head.value = 0; head.dispatchEvent(new Event("change"));
  said.barsOfOne = document.querySelectorAll("#panel .bar").length;
  said.shares = [...document.querySelectorAll("#panel .bar b")].reduce((sum, b) => sum + parseFloat(b.style.width), 0);
  const texts = [...document.querySelectorAll("body *")].filter(e => !e.closest("script, style, svg, option")
    && !e.disabled && e.getBoundingClientRect().height
    && [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()));
  parent.postMessage({ ...said, problems, texts: texts.length,
    small: texts.filter(e => parseFloat(getComputedStyle(e).fontSize) < 12).map(e => e.outerHTML).slice(0, 5),
    faint: texts.filter(e => contrast(e) < 4.5).map(e => contrast(e) + e.outerHTML.slice(0, 80)).slice(0, 5),
    overflow: document.documentElement.scrollWidth - innerWidth,
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    asked: performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:")).map(e => e.name),
  }, "*");
}, 200));
</script>"""


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = GalleryMemorizingTransformerConfig(
        hidden_size=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        intermediate_size=32,
        segment_length=8,
        mem_len=4,
        memory_layers=[1],
        memory_size=64,
        memory_topk=3,
    )
    return GalleryMemorizingTransformerForCausalLM(config).eval()


@pytest.fixture(scope="module")
def html(model):
    tokenizer = byte_tokenizer()
    found = look(model, tokenizer(TEXT, return_tensors="pt").input_ids, at=[20], most=4)
    return page(found, words_of(tokenizer, found.ids), "a model reads a tale", "hf-gallery look")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize(("width", "dark"), [(390, True), (1440, False)])
def test_the_page_in_a_browser(width, dark, html, tmp_path):
    """Nothing fails and nothing is fetched; tokens are chosen by mouse and by keyboard; nothing is wider than the
    screen, smaller than 12 pixels, or of less contrast than 4.5 to 1, in either scheme."""
    (tmp_path / "page.html").write_text(html.replace("<head>", "<head>" + WATCH).replace("</body>", TELL + "</body>"))
    # A frame, since a window cannot be as narrow as a phone.
    (tmp_path / "frame.html").write_text(
        f'<iframe src="page.html" width="{width}" height="2000" style="border: 0"></iframe><pre></pre><script>'
        'addEventListener("message", e => document.querySelector("pre").textContent = JSON.stringify(e.data))</script>'
    )
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    arguments += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--window-size=1600,2200"]
    arguments += [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    done = subprocess.run(
        [BROWSER, *arguments, "--dump-dom", (tmp_path / "frame.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    text = re.search(r"<pre>(\{.+\})</pre>", done.stdout, re.DOTALL).group(1)
    said = json.loads(text.replace("&quot;", '"').replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert said["problems"] == [] and said["asked"] == [] and said["dark"] == dark
    assert said["clicked"].startswith("Token 9: ") and said["right"].startswith("Token 10: ")
    assert said["left"].startswith("Token 8: ") and said["home"].startswith("Token 0: ")
    assert said["kept"] and said["down"] != said["home"] and said["keys"] > 0
    assert said["bars"] == 2 and said["barsOfOne"] == 1 and abs(said["shares"] - 100) < 1
    assert said["texts"] > 100 and said["small"] == [] and said["faint"] == []
    assert said["overflow"] <= 0, "the page is wider than the screen"


def test_the_page_holds_what_it_shows(html):
    """Every section of a model that retrieves; what is read is escaped; nothing is loaded."""
    for name in ("reading", "worth", "reach", "passages", "gates"):
        assert f'id="{name}"' in html
    assert "</script><b>" not in html and "<b>of</b>" not in html
    assert "http://" not in html and "https://" not in html and " src=" not in html
    assert "&lt;E2&gt;" in html or "\\u003cE2\\u003e" in html  # a byte that is no text by itself


@causal(lambda variant: variant.name in ("transformer", "longformer", "block_recurrent", "recurrent_memory"))
def test_every_kind_of_source_has_a_page(variant):
    model = variant.make("causal").eval()
    found = look(model, words(30), most=3)
    html = page(found, [f"<{i}>" for i in found.ids.tolist()], variant.name)
    for name in found.sources[:-1]:
        assert name in html
    assert found.period == variant.settings.get("block_length", variant.settings.get("segment_length"))


def test_an_encoder_has_a_page():
    model = {v.name: v for v in VARIANTS}["longformer"].make("masked").eval()
    found = look(model, words(21), most=3, global_attention_mask=(torch.arange(21) == 2).long()[None])
    html = page(found, list("abcdefghijklmnopqrstu"), "an encoder")
    assert "global tokens" in html and 'id="worth"' not in html and "bits each" not in html


@pytest.mark.parametrize("head", ["masked", "sequence"])
def test_the_command_shows_what_an_encoder_looks_at(head, tmp_path):
    """Under whichever head it was saved; global tokens are those that are asked for, else those of the head."""
    model = {v.name: v for v in VARIANTS}["longformer"].make(head, vocab_size=262, pad_token_id=256).eval()
    tokenizer, folder, out = byte_tokenizer(), tmp_path / "model", tmp_path / "page.html"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    run = ["look", str(folder), "a tale of two", "--out", str(out)]
    done = CliRunner().invoke(app, [*run, "--global", "2"])
    assert done.exit_code == 0, done.output
    html = out.read_text()
    assert "What each token looks at" in html and "predicted from" not in html
    shown = json.loads(re.search(r"const look = (\{.+\});", html).group(1))
    assert not shown["predicts"] and "global tokens" in shown["sources"] and len(shown["shown"]) == 13
    expected = look(model, tokenizer("a tale of two", return_tensors="pt").input_ids, global_attention_mask=mark(2))
    sums = [round(float(x), 3) for x in expected.weights[5, 1, 0]]
    assert shown["shown"]["5"]["sums"]["1,0"] == [sums[expected.sources.index(name)] for name in shown["sources"]]
    assert CliRunner().invoke(app, run).exit_code == 0
    names = json.loads(re.search(r'"sources": (\[.+?\])', out.read_text()).group(1))
    assert "global tokens" in names
    done = CliRunner().invoke(app, [*run, "--global", "13"])
    assert done.exit_code == 1 and "positions 0 to 12" in done.stderr


def mark(position):
    return (torch.arange(13) == position).long()[None]


def test_the_command_refuses_what_has_no_single_stack_or_no_global_tokens(model, tmp_path):
    for name, kind in (
        ("seq2seq", {v.name: v for v in VARIANTS}["transformer"].make("seq2seq", vocab_size=262)),
        ("causal", model),
    ):
        kind.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    done = CliRunner().invoke(app, ["look", str(tmp_path / "seq2seq"), "a tale"])
    assert done.exit_code == 1 and "an encoder-decoder; give a model of one stack of layers" in done.stderr
    done = CliRunner().invoke(app, ["look", str(tmp_path / "causal"), "a tale", "--global", "0"])
    assert done.exit_code == 1 and "has no global tokens" in done.stderr


def test_the_command_writes_the_page(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "tale.txt").write_text(TEXT)
    folder, out = str(tmp_path / "model"), tmp_path / "page.html"
    done = CliRunner().invoke(
        app, ["look", folder, "--file", str(tmp_path / "tale.txt"), "--out", str(out), "--at", "3"]
    )
    assert done.exit_code == 0, done.output
    assert "reads tale.txt" in out.read_text() and "reading" in done.stderr and str(out) in done.stdout
    short = ["look", folder, "ab", "--out", str(out), "--no-worth", "--no-reach"]
    assert CliRunner().invoke(app, short).exit_code == 0 and 'id="worth"' not in out.read_text()
    for arguments, message in (
        (["look", folder, "a", "--out", str(out)], "2 or more"),
        (["look", folder, "a tale", "--file", str(tmp_path / "tale.txt")], "leave one of them out"),
        (["look", folder, "a tale", "--out", str(tmp_path)], "cannot be written"),
        (["look", folder, "a tale", "--out", str(out), "--at", "99"], "positions 0 to 5"),
    ):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 1 and message in done.stderr
