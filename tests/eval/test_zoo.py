"""The zoo: models as `python -m eval zoo` makes them, and how they are shown. Tiny ones here."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_eval import CPU, TINY_SIZES
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from eval import zoo
from eval.contestants import CONTESTANTS
from hf_gallery.cli import app
from hf_gallery.data import load_corpus
from hf_gallery.zoo import ZOO, zoo_models

TINY = zoo.ZooSettings(
    sizes=TINY_SIZES, steps=4, lanes=2, length=16, memory_size=32, scored_bytes=80, save_steps=1, learning_rate=1e-2
)


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    """A folder of texts that says which are held out."""
    folder = tmp_path_factory.mktemp("books")
    for split, numbers in (("train", range(4)), ("validation", (4,)), ("test", (5, 6))):
        (folder / split).mkdir()
        for i in numbers:
            words = "".join(f"line {j} of book {i}\n" for j in range(20 + i))
            (folder / split / f"{i}.txt").write_text(words)
    return folder


def made(name, books, folder, tick=lambda units: None, settings=TINY):
    """Measures of a model that is trained in one folder and saved to another."""
    corpus = load_corpus(str(books))
    return zoo.make(CONTESTANTS[name], settings, corpus, folder / "work" / name, folder / "zoo" / name, CPU, tick)


@pytest.mark.parametrize("name", zoo.ANIMALS)
def test_a_model_is_what_its_card_says(tmp_path, books, name):
    """Without code, in half precision, opened in full; and its bits are those of whoever opens it."""
    about = made(name, books, tmp_path)
    folder = tmp_path / "zoo" / name
    assert not list(folder.glob("*.py")) and "auto_map" not in json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert {x.dtype for x in tensors.values()} == {torch.float16} and model.dtype == torch.float32
    assert sum(x.numel() for x in tensors.values()) == model.num_parameters()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bits = scored = 0
    for document in load_corpus(str(books))["test"]["text"]:
        ids = tokenizer(document, return_tensors="pt").input_ids[:, : TINY.scored_bytes]
        bits += model(ids, labels=ids).loss.item() / math.log(2) * (ids.shape[1] - 1)
        scored += ids.shape[1] - 1
    assert about["scored_bytes"] == scored and abs(bits / scored - about["bits_per_byte"]) < 1e-4
    card = (folder / "README.md").read_text()
    assert f"| all | {about['bits_per_byte']:.3f} |" in card and f"{TINY.trained_bytes:,} bytes" in card
    assert f"\n# {name}\n" in card and f'"zoo/{name}"' in card
    assert "| test/5.txt |" in card and "| test/6.txt |" in card
    if name == "memorizing_transformer":
        assert model.config.memory_size == TINY.memory_size != TINY.sizes.memory_size


def test_a_stopped_training_goes_on(tmp_path, books):
    """From its last checkpoint, and ends with the weights of one that was never stopped."""
    made("transformer_xl", books, tmp_path / "whole")
    seen = []

    def stop(units):
        seen.append(units)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made("transformer_xl", books, tmp_path / "cut", stop)
    assert not (tmp_path / "cut" / "zoo" / "transformer_xl").exists()
    kept = tmp_path / "cut/work/transformer_xl/checkpoint-2/trainer_state.json"
    state = json.loads(kept.read_text())
    attributes = state["stateful_callbacks"]["Stopwatch"]["attributes"]
    assert attributes["seconds"] > 0
    attributes["seconds"] += 1000  # as of a long first sitting
    kept.write_text(json.dumps(state))
    ticks = []
    about = made("transformer_xl", books, tmp_path / "cut", ticks.append)
    assert ticks[0] == 2 and sum(ticks) == TINY.steps + 1 and about["seconds"] > 1000
    whole, cut = (load_file(tmp_path / x / "zoo/transformer_xl/model.safetensors") for x in ("whole", "cut"))
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


def test_documents_of_one_byte_are_not_measured(tmp_path, books):
    """There is nothing before the byte to foretell it from."""
    shutil.copytree(books, tmp_path / "books")
    (tmp_path / "books/test/0.txt").write_text("x")
    about = made("transformer", tmp_path / "books", tmp_path)
    assert set(about["by_document"]) == {"test/5.txt", "test/6.txt"}


def test_a_model_that_is_there_is_replaced_whole(tmp_path, books):
    """The second training's files alone are left, also where the first one's folder held others."""
    made("transformer", books, tmp_path)
    (tmp_path / "zoo" / "transformer" / "old.txt").write_text("left")
    made("transformer", books, tmp_path, settings=dataclasses.replace(TINY, steps=5))
    assert not (tmp_path / "zoo" / "transformer" / "old.txt").exists()
    assert [path.name for path in (tmp_path / "zoo").iterdir()] == ["transformer"]


def test_a_cell_says_what_decides_it(tmp_path, books):
    """Its settings, and a hash of the books."""
    (cell,) = zoo.plan(["transformer"], TINY, str(books), tmp_path, tmp_path / "zoo", CPU)
    assert cell.settings["sizes"]["hidden"] == TINY_SIZES.hidden and str(books) in cell.settings["corpus"]
    assert cell.units == TINY.steps + 1


def test_the_zoo_is_shown(tmp_path, books, monkeypatch):
    """Best first, without half-made models; a folder of none is refused."""
    for name in ("transformer", "transformer_xl"):
        made(name, books, tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zoo" / ".half.new").mkdir()
    (tmp_path / "zoo" / ".half.new" / "config.json").write_text("{}")
    found = zoo_models(Path("zoo"))
    bits = [model.bits_per_byte for model in found]
    assert bits == sorted(bits) and {model.folder.name for model in found} == {"transformer", "transformer_xl"}
    assert all(model.trained_bytes == TINY.trained_bytes for model in found)
    for name in ("transformer", "transformer_xl"):
        (tmp_path / "zoo" / name).rename(tmp_path / "zoo" / f"{name:_<28}")  # as long as the longest name
    shown = CliRunner().invoke(app, ["zoo", "zoo"], env={"COLUMNS": "80"})
    assert shown.exit_code == 0 and "…" not in shown.output
    assert all(f"zoo/{name:_<28} " in shown.output for name in ("transformer", "transformer_xl"))
    assert f"{bits[0]:.3f}" in shown.output
    (tmp_path / "empty").mkdir()
    refused = CliRunner().invoke(app, ["zoo", "empty"])
    assert refused.exit_code == 1 and "holds no trained models" in refused.output


@pytest.mark.parametrize("folder", sorted(ZOO.glob("*/")), ids=lambda path: path.name)
def test_the_models_in_the_repository(folder):
    """Each is small, opens in three lines, and reads the beginning of a text as a trained model does."""
    assert (folder / "model.safetensors").stat().st_size <= 8_000_000 and not list(folder.glob("*.py"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("It was a fine evening, and the old man said that he would walk home. ", return_tensors="pt")
    bits = model(**ids, labels=ids.input_ids).loss.item() / math.log(2)
    assert bits < 3.5
    told = json.loads((folder / "eval_results.json").read_text())["eval_bits_per_byte"]
    assert f"{told:.3f}" in (folder / "README.md").read_text()
