"""The examples, run as their first lines say, in sizes that take seconds."""

import math
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


def shown():
    """Rows of the guide's table of examples: what it shows, its command, time."""
    text = (ROOT / "docs" / "GUIDE.md").read_text(encoding="utf-8")
    return re.findall(r"^\| ([^|]+) \| `python examples/(\w+\.py) ([^`]+)` \| ([^|]+) \|$", text, re.MULTILINE)


def test_the_guide_shows_every_example():
    """Each once, with a command whose options the example has."""
    assert sorted(name for _, name, _, _ in shown()) == sorted(x.name for x in (ROOT / "examples").glob("*.py"))
    for _, name, arguments, time in shown():
        source = (ROOT / "examples" / name).read_text(encoding="utf-8")
        assert all(f'"{option}"' in source for option in re.findall(r"--[\w-]+", arguments)), name
        assert re.search(r"\d (s|min)\b", time), name


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
        yield f"\n{prompt}|{tokenizer.decode(said, skip_special_tokens=True)}".rstrip("\ufffd") + "\n"


@pytest.mark.slow
def test_ask_a_book(tmp_path, saved):
    """Each prompt is answered as if the book stood before it, from the cache of the first run too; another book or
    model is read anew."""
    prompts = ["I thought", "There is"]
    (tmp_path / "book.txt").write_text(BOOK)
    arguments = ["book.txt", *prompts, "--tokens", 6, "--temperature", 0]
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
def test_fine_tune_on_a_novel(tmp_path, saved):
    """A held-out byte costs what the model gives for it, before and after; the pages show the held-out text."""
    novel = (BOOK + "\n") * 3
    (tmp_path / "novel.txt").write_text(novel)
    arguments = ["novel.txt", "--steps", 20, "--lanes", 2, "--length", 64, "--shown", 60, "--learning-rate", 1e-2]
    said = example("fine_tune_on_a_novel.py", tmp_path, saved, *arguments)
    before, after = map(float, re.search(r"held out: ([\d.]+) bits per byte before, ([\d.]+) after", said).groups())
    held_out = torch.tensor([list(novel.encode())[2 * (len(BOOK) + 1) :]])
    for folder, told in ((saved, before), (tmp_path / "my_novel_model", after)):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            loss = float(model(held_out, labels=held_out).loss) / math.log(2)
        assert told == pytest.approx(loss, abs=2e-3)
    assert after < before - 0.5
    for page in ("before", "after"):
        html = (tmp_path / "my_novel_model" / f"{page}.html").read_text()
        assert f"novel.txt, {page} fine-tuning" in html and "60 tokens cost" in html


@pytest.mark.slow
def test_classify_documents(tmp_path):
    """A model of the zoo learns from a folder of one's own; says what a part of the documents is enough for."""
    for label, word in (("up", "rise "), ("down", "fall ")):
        (tmp_path / "texts" / label).mkdir(parents=True)
        for i in range(15):
            (tmp_path / "texts" / label / f"{i}.txt").write_text(word * (10 + i))
    arguments = ["--steps", 20, "--length", 256]
    said = example("classify_documents.py", tmp_path, ROOT / "zoo" / "longformer", "texts", *arguments)
    guess = float(re.search(r"labels: ([\d.]+) right by guessing", said).group(1))
    found = dict(re.findall(r"of the first (\d+) tokens ([\d.]+) right", said))
    assert [*found] == ["256", "64", "16"] and float(found["256"]) > guess + 0.4
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "my_document_classifier")
    assert sorted(model.config.label2id) == ["down", "up"]


@pytest.mark.slow
def test_pack_documents(tmp_path, saved):
    """Packed, a document gives the logits that it gives alone; read as one text with others it does not."""
    (tmp_path / "notes.txt").write_text("\n\n".join(f"{BOOK[i : i + 40]} {i}" for i in range(24)))
    said = example("pack_documents.py", tmp_path, saved, "notes.txt", "--steps", 4, "--length", 128, "--rows", 2)
    assert int(re.search(r"(\d+) documents in \d+ tokens", said).group(1)) >= 3
    alone, together = map(float, re.search(r"differ by (\S+) from those of each alone, by (\S+) if", said).groups())
    assert alone < 1e-4 < 1e-2 < together
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "my_packed_model").config.segment_length == 8


@pytest.mark.slow
def test_export_and_run_without_the_package(tmp_path):
    """The graph gives the model's numbers where hf_gallery and transformers cannot be imported at all; a process that
    has loaded them, or that finds other numbers, fails."""
    variant = VARIANTS["transformer_xl"]
    sizes = dict(hidden_size=16, num_attention_heads=2, intermediate_size=32, num_hidden_layers=1)
    variant.causal(variant.make_config(**sizes, segment_length=8, mem_len=8)).save_pretrained(tmp_path / "m")
    said = example("export_model.py", tmp_path, "m", "exported", "--length", 40)
    assert re.search(r"3 rows of 40 tokens without hf_gallery: logits differ by \S+ at most", said)
    (tmp_path / "none").mkdir()
    for name in ("hf_gallery", "transformers"):
        (tmp_path / "none" / f"{name}.py").write_text("raise SystemExit('imported')")
    about = {"PYTHONPATH": str(tmp_path / "none"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / "run_exported.py"), "exported"]
    options = dict(capture_output=True, text=True, cwd=tmp_path, env=os.environ | about)
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr
    assert done.stdout in said
    run = "import runpy, sys; sys.argv, sys.modules['hf_gallery'] = ['', 'exported'], sys; "
    run += f"runpy.run_path({command[1]!r}, run_name='__main__')"
    loaded = subprocess.run([sys.executable, "-c", run], **options)
    assert loaded.returncode == 1 and "loaded here: hf_gallery;" in loaded.stderr
    check = torch.load(tmp_path / "exported" / "check.pt")
    torch.save(check | {"logits": check["logits"] + 1e-3}, tmp_path / "exported" / "check.pt")
    wrong = subprocess.run(command, **options)
    assert wrong.returncode == 1 and "not close" in wrong.stderr


@pytest.mark.slow
def test_export_of_a_trained_model(tmp_path):
    """Logits of a trained model are large, and so are their roundings."""
    said = example("export_model.py", tmp_path, ROOT / "zoo" / "longformer", "exported")
    assert "3 rows of 256 tokens without hf_gallery" in said


@pytest.mark.slow
def test_export_of_one_length(tmp_path):
    """Architectures that read block after block."""
    variant = VARIANTS["block_recurrent_transformer"]
    sizes = dict(hidden_size=16, num_attention_heads=2, intermediate_size=32, num_hidden_layers=2, block_length=8)
    variant.causal(variant.make_config(**sizes, num_state_vectors=4, recurrent_layers=[1])).save_pretrained(
        tmp_path / "m"
    )
    said = example("export_model.py", tmp_path, "m", "exported", "--length", 20, "--fixed")
    assert "3 rows of 20 tokens" in said


@pytest.mark.slow
def test_evaluate_memory(tmp_path, saved):
    said = example("evaluate_memory.py", tmp_path, saved, "--distances", 8, 40, "--examples", 4)
    assert re.findall(r"^(\d+) tokens back: \d+% right of (\d+)", said, re.MULTILINE) == [("8", "4"), ("40", "4")]
