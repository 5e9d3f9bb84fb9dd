"""The examples, run as their first lines say, in sizes that take seconds."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import hf_gallery  # noqa: F401  # its models are known to AutoModel... from here on
from hf_gallery.data import byte_tokenizer
from hf_gallery.variants import VARIANTS

ROOT = Path(__file__).parents[2]
BOOK = "Call me Ishmael. Some years ago, never mind how long precisely. " * 12


def example(name, folder, *arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    variant = VARIANTS["memorizing_transformer"]
    config = variant.make_config(
        hidden_size=16, num_attention_heads=2, intermediate_size=32, segment_length=8, mem_len=8, memory_size=64,
        memory_topk=4,
    )  # fmt: skip
    variant.causal(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_the_guide_shows_every_example():
    shown = set(
        re.findall(
            r"^python examples/(\w+\.py) ", (ROOT / "docs" / "GUIDE.md").read_text(encoding="utf-8"), re.MULTILINE
        )
    )
    assert shown == {path.name for path in (ROOT / "examples").glob("*.py")}


def test_every_example_says_how_to_run_it():
    for path in (ROOT / "examples").glob("*.py"):
        assert f"python examples/{path.name} " in path.read_text(encoding="utf-8").split('"""')[1]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["transformer_xl", "longformer"])
def test_fine_tune(tmp_path, variant):
    said = example("fine_tune.py", tmp_path, "--variant", variant, "--steps", 60, "--hidden-size", 32)
    accuracy, guess = map(float, re.search(r"accuracy ([\d.]+), ([\d.]+) by guessing", said).groups())
    assert accuracy > guess + 0.2
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "my_classifier")
    assert model.config.num_labels == 3


@pytest.mark.slow
def test_train_on_folder(tmp_path):
    (tmp_path / "texts").mkdir()
    for i in range(24):
        (tmp_path / "texts" / f"{i}.txt").write_text(BOOK[i:])
    arguments = ["texts", "--steps", 30, "--lanes", 4, "--length", 64, "--hidden-size", 32]
    said = example("train_on_folder.py", tmp_path, *arguments)
    before, after = map(float, re.search(r"bits per byte ([\d.]+) before training, ([\d.]+) after", said).groups())
    assert after < before - 0.5
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "my_model").config.hidden_size == 32


def answers(folder, text, prompts):
    """The model's continuation of the text and each prompt, as the example prints it."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    for prompt in prompts:
        ids = tokenizer(text + prompt, return_tensors="pt")
        said = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids.input_ids.shape[1] :]
        yield f"{prompt}|{tokenizer.decode(said)}\n"


@pytest.mark.slow
def test_ask_a_book(tmp_path, saved):
    """Each prompt is answered as if the book stood before it, from the cache of the first run too; another book or
    model is read anew."""
    prompts = ["I thought", "There is"]
    (tmp_path / "book.txt").write_text(BOOK)
    arguments = ["book.txt", *prompts, "--tokens", 6]
    first = example("ask_a_book.py", tmp_path, saved, *arguments)
    assert first.endswith("".join(answers(saved, BOOK, prompts)))
    (kept,) = tmp_path.glob("book.*.cache")
    written = kept.stat().st_mtime_ns
    assert example("ask_a_book.py", tmp_path, saved, *arguments) == first
    assert [*tmp_path.glob("*.cache")] == [kept] and kept.stat().st_mtime_ns == written

    other = AutoModelForCausalLM.from_pretrained(saved)
    with torch.no_grad():
        other.get_input_embeddings().weight[ord("z")] += 1
    other.save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    said = example("ask_a_book.py", tmp_path, tmp_path / "other", *arguments)
    assert said.endswith("".join(answers(tmp_path / "other", BOOK, prompts)))
    (tmp_path / "book.txt").write_text(BOOK[9:])
    said = example("ask_a_book.py", tmp_path, saved, *arguments)
    assert said.endswith("".join(answers(saved, BOOK[9:], prompts)))
    assert len([*tmp_path.glob("book.*.cache")]) == 3 and kept.stat().st_mtime_ns == written


@pytest.mark.slow
def test_evaluate_memory(tmp_path, saved):
    said = example("evaluate_memory.py", tmp_path, saved, "--distances", 8, 40, "--examples", 4)
    assert re.findall(r"^(\d+) tokens back: \d+% right of (\d+)", said, re.MULTILINE) == [("8", "4"), ("40", "4")]
