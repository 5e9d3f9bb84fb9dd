"""The page of `hf-gallery look`: in a real browser, as wide as a phone and as a desk, by mouse and by keyboard."""

import base64
import json
import math
import re

import pytest
import torch
from browser import Browser, needs_browser
from typer.testing import CliRunner
from variants import VARIANTS, causal, words

from hf_gallery import GalleryMemorizingTransformerConfig, GalleryMemorizingTransformerForCausalLM, look
from hf_gallery.cli import app
from hf_gallery.data import byte_tokenizer
from hf_gallery.looking.page import data, drawing, legible, page, words_of

TEXT = "A tale </script><b>of</b> “two” cities.\n" * 6


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


@pytest.fixture(scope="module")
def browser():
    with Browser() as found:
        yield found


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(390, True), (1440, False)])
def test_the_page_in_a_browser(width, dark, html, browser, tmp_path):
    """Nothing fails and nothing is fetched; tokens are chosen by mouse and by keyboard; nothing is wider than the
    screen, smaller than 12 pixels, or of less contrast than 4.5 to 1, in either scheme."""
    (tmp_path / "page.html").write_text(html)
    browser.open(tmp_path / "page.html", width, 900, dark)

    def chosen():
        return browser.evaluate("document.querySelector('#panel h3').textContent")

    def bars():
        return browser.evaluate("document.querySelectorAll('#panel .bar').length")

    browser.point("#t9", click=True)
    assert chosen().startswith("Token 9: ")
    browser.evaluate("document.querySelector('#text').focus()")
    for keys, token in ((["ArrowRight"], 10), (["ArrowLeft", "ArrowLeft"], 8), (["Home"], 0)):
        for key in keys:
            browser.press(key)
        assert chosen().startswith(f"Token {token}: ")
    browser.press("ArrowDown")
    assert not chosen().startswith("Token 0: ")
    assert browser.evaluate("document.querySelector('#text .chosen').classList.contains('full')")
    assert browser.evaluate("document.querySelectorAll('#panel tbody tr').length") > 0 and bars() == 2
    for name, value in (("layer", 1), ("head", 0)):
        script = (
            f"const e = document.querySelector('#{name}'); e.value = {value}; e.dispatchEvent(new Event('change'))"
        )
        browser.evaluate(f"{{ {script} }}")
    assert bars() == 1
    widths = "[...document.querySelectorAll('#panel .bar b')].map(b => parseFloat(b.style.width))"
    assert abs(sum(browser.evaluate(widths)) - 100) < 1
    said = browser.look()
    assert said["problems"] == [] and said["asked"] == [] and said["dark"] == dark
    assert said["texts"] > 100 and said["small"] == [] and said["faint"] == []
    assert said["overflow"] <= 0, "the page is wider than the screen"


def test_the_page_holds_what_it_shows(html):
    """Every section of a model that retrieves; what is read is escaped; nothing is loaded."""
    for name in ("reading", "worth", "reach", "passages", "gates"):
        assert f'id="{name}"' in html
    assert "</script><b>" not in html and "<b>of</b>" not in html
    assert "http://" not in html and "https://" not in html and " src=" not in html
    assert "&lt;E2&gt;" in html or "\\u003cE2\\u003e" in html  # a byte that is no text by itself


def test_a_token_is_told_with_all_its_bits(model):
    """Also a very surprising one, of more than a byte of tenths."""
    found = look(model, byte_tokenizer()(TEXT, return_tensors="pt").input_ids, worth=False, reach=False)
    found.surprise[3], found.surprise[4] = 28.34, math.inf
    packed = base64.b64decode(data(found, ["x"] * len(found.ids))["bits"])
    told = torch.frombuffer(bytearray(packed), dtype=torch.uint16)
    assert told[:5].tolist() == [0, *(round(10 * float(x)) for x in found.surprise[1:4]), 65535]


def test_parts_of_characters_are_shown_as_the_character():
    """A character in several tokens is shown where they complete it, with the text that a token has before it."""
    shown, parts = legible(["a", "<E2>", "<80>", "<9C>", "b", " <C3>", "<A9>", "<F0><9F>", "<98><80>"])
    assert shown == ["a", "·", "·", "“", "b", " ·", "é", "·", "😀"]
    assert parts == {1: "<E2>", 2: "<80>", 3: "<9C>", 5: " <C3>", 6: "<A9>", 7: "<F0><9F>", 8: "<98><80>"}
    for read in ("<E2>,<80>,x,<9C>", "<FF>,<80>", "<E2>,<80>,<8B>", "<E2>, <80>,<9C>"):
        assert legible(read.split(",")) == (read.split(","), {})


def test_a_drawing_that_goes_below_zero_marks_it():
    """Numbers beside its axis do not stand on one another."""
    for values, expected in (
        ((-0.5, 1), "-0.5 0 1"),
        ((-0.01, 1), "0 1"),
        ((0.2, 1), "0 0.5 1"),
        ((-1, -0.5), "-1 -0.5 0"),
    ):
        about = drawing({"a": [(0, values[0]), (1, values[1])]}, across="x", up="y")
        assert " ".join(text for _, text in about["ticks_y"]) == expected
    assert about["zero"] == about["ticks_y"][2][0]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["âĢ", "ľ", "ĠâĢ"], ["<E2><80>", "<9C>", " <E2><80>"]),  # GPT-2's, at whatever ids
        (["<0xE2>", "▁a", "<unk>"], ["<E2>", "\ufffd", "\ufffd"]),  # SentencePiece's
    ],
)
def test_bytes_are_those_of_the_vocabulary_not_the_ids(names, expected):
    class Tokenizer:
        def decode(self, ids, **options):
            return "\ufffd"

        def convert_ids_to_tokens(self, kind):
            return names[kind]

    assert words_of(Tokenizer(), torch.arange(3)) == expected


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
