"""`hf-gallery` on the command line: what it prints where, and with which exit code it ends."""

import io
import json
import logging
import os
import re
import shlex
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from shutil import copytree

import pytest
import torch
from safetensors.torch import save
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LongformerConfig,
    LongformerForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)
from typer.testing import CliRunner

import hf_gallery
from hf_gallery import GalleryCache
from hf_gallery.cli import app
from hf_gallery.data import byte_tokenizer
from hf_gallery.variants import VARIANTS

ROOT = Path(__file__).parents[2]
SMALL = ["--set", "hidden_size=16", "--set", "num_attention_heads=2", "--set", "intermediate_size=32"]


def invoke(*arguments, **options):
    return CliRunner().invoke(app, [str(a) for a in arguments], **options)


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.txt").write_text("It was the best of times, it was the worst of times. " * (2 + i % 3))
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small Memorizing Transformer with its tokenizer."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    variant = VARIANTS["memorizing_transformer"]
    sizes = dict(hidden_size=16, num_attention_heads=2, intermediate_size=32, segment_length=8, mem_len=8)
    variant.causal(variant.make_config(**sizes, memory_size=64, memory_topk=4)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_list_names_every_head():
    shown = invoke("list", env={"COLUMNS": "100"})
    assert shown.exit_code == 0
    listed = json.loads(invoke("list", "--json").output)
    assert [entry["name"] for entry in listed] == list(VARIANTS)
    for entry in listed:
        assert entry["name"] in shown.output
        assert set(entry["heads"].values()) | {entry["config"]} <= set(hf_gallery.__all__)
    classes = {name for name in hf_gallery.__all__ if name.startswith("Gallery")}
    models = {name for name in classes if not name.endswith(("Config", "Cache"))}
    assert models == {head for entry in listed for head in entry["heads"].values()}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_small_configuration_is_one_that_runs(name):
    variant = VARIANTS[name]
    model = variant.causal(variant.make_config(hidden_size=16, num_attention_heads=2, intermediate_size=32)).eval()
    assert model(torch.zeros(1, 5, dtype=torch.long)).logits.shape == (1, 5, model.config.vocab_size)


@pytest.mark.parametrize("command", ["list", "train", "generate", "eval", "convert", "card", "push"])
def test_help_has_an_example_of_the_command_with_options_it_has(command):
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", invoke(command, "--help", env={"COLUMNS": "200"}).output).split())
    example = re.search(rf"Example: hf-gallery {command}(.*?)(?: Arguments| Options|$)", text).group(1)
    for option in re.findall(r" (--[\w-]+)", example):
        assert option == "--limit" or option in text.split("Options")[-1]  # --limit is lm-eval's


def test_train_generate_and_go_on(texts, tmp_path):
    out = tmp_path / "model"
    common = ["train", "transformer_xl", out, "--corpus", texts, "--lanes", 2, "--length", 32, "--device", "cpu"]
    common += ["--save-steps", 4, *SMALL]
    first = invoke(*common, "--steps", 4)
    assert first.exit_code == 0, first.output
    metrics = json.loads(first.stdout)
    assert metrics["folder"] == str(out) and 0 < metrics["eval_bits_per_byte"] < 9
    model = AutoModelForCausalLM.from_pretrained(out)
    assert type(model) is hf_gallery.GalleryTransformerXLForCausalLM and model.config.hidden_size == 16
    again = invoke(*common, "--steps", 8)
    assert again.exit_code == 1 and "go on with --resume" in again.stderr
    on = invoke(*common, "--steps", 8, "--resume")
    assert on.exit_code == 0 and (out / "checkpoints" / "checkpoint-8").is_dir()
    unbroken = tmp_path / "unbroken"
    whole = invoke(*[unbroken if a is out else a for a in common], "--steps", 8)
    assert whole.exit_code == 0
    from_it = invoke("train", out, tmp_path / "more", "--corpus", texts, "--steps", 2, "--lanes", 2, "--length", 32)
    assert from_it.exit_code == 0, from_it.output

    said = invoke("generate", out, "It was the", "--max-new-tokens", 7)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("It was the", return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(out)
    expected = model.generate(**ids, max_new_tokens=7, do_sample=False)[0, ids.input_ids.shape[1] :]
    assert said.stdout == tokenizer.decode(expected) + "\n"


def test_gradients_through_several_segments(texts, tmp_path):
    """A step reads them all, and learns what one segment of their length teaches."""
    common = ["--corpus", texts, "--lanes", 2, "--device", "cpu", "--steps", 3, "--learning-rate", 0.05]
    common += ["--set", "num_hidden_layers=1", "--set", "block_length=8", "--set", "recurrent_layers=[0]", *SMALL]
    common += ["--set", "hidden_dropout=0.0", "--set", "attention_dropout=0.0"]
    found = []
    for name, length, segments in (("parts", 16, 2), ("whole", 32, 1)):
        done = invoke(
            "train", "block_recurrent_transformer", tmp_path / name, *common, "--length", length,
            "--backpropagate-segments", segments,
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        found.append(json.loads(done.stdout)["eval_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)  # they would be 1e-3 apart without gradients between them


KILLED = """
import os, signal, sys
import transformers
from hf_gallery.cli import app

def state(self, path):
    if self.global_step == step:
        open(path, "w").write('{"global_step": ')
        os.kill(os.getpid(), signal.SIGKILL)
    save_state(self, path)

def optimizer(self, folder):
    if self.state.global_step == step:
        open(os.path.join(folder, "optimizer.pt"), "wb").write(b"PK")
        os.kill(os.getpid(), signal.SIGKILL)
    save_optimizer(self, folder)

where, step = sys.argv[1], int(sys.argv[2])
save_state, save_optimizer = transformers.TrainerState.save_to_json, transformers.Trainer._save_optimizer_and_scheduler
if where == "state":
    transformers.TrainerState.save_to_json = state
else:
    transformers.Trainer._save_optimizer_and_scheduler = optimizer
app(sys.argv[3:])
"""


@pytest.mark.works("resume", "transformer_xl")
@pytest.mark.parametrize(
    ("where", "step", "said"),
    [
        ("state", 8, "checkpoint-8 is passed over: it has a trainer_state.json that does not read"),
        pytest.param("optimizer", 4, "holds no whole checkpoint: the training begins anew", marks=pytest.mark.slow),
    ],
)
def test_a_training_killed_while_it_saves_goes_on(texts, tmp_path, where, step, said):
    """With --resume, from the last whole checkpoint or from the start, and ends as if nothing had been."""
    common = ["--corpus", texts, "--lanes", 2, "--length", 32, "--device", "cpu", "--steps", 9, "--save-steps", 4]
    common += ["--set", "num_hidden_layers=1", *SMALL]
    out = tmp_path / "out"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, where, str(step), *map(str, ["train", "transformer_xl", out, *common])],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert killed.returncode == -9, killed.stderr
    assert not (out / "model.safetensors").exists()
    refused = invoke("train", "transformer_xl", out, *common)
    assert refused.exit_code == 1 and "go on with --resume" in refused.stderr
    with told() as warnings:
        resumed = invoke("train", "transformer_xl", out, *common, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert said in " ".join((resumed.stderr + warnings.getvalue()).split())
    whole = invoke("train", "transformer_xl", tmp_path / "whole", *common)
    assert json.loads(resumed.stdout) | {"folder": ""} == json.loads(whole.stdout) | {"folder": ""}
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


@contextmanager
def told():
    """The package's warnings, in a string."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    logging.getLogger("hf_gallery").addHandler(handler)
    yield written
    logging.getLogger("hf_gallery").removeHandler(handler)


def test_generate_after_a_document_and_from_its_cache(saved, tmp_path):
    """Reading before the prompt is the same as having it all in the prompt; and it is read once."""
    document, cache = tmp_path / "book.txt", tmp_path / "book.cache"
    document.write_text("Call me Ishmael. " * 9)
    options = ["--max-new-tokens", 9]
    joined = invoke("generate", saved, document.read_text() + "Some years", *options)
    assert joined.exit_code == 0, joined.output
    read = invoke("generate", saved, "Some years", "--file", document, "--save-cache", cache, *options)
    assert read.exit_code == 0 and read.stdout == joined.stdout
    kept = cache.read_bytes()
    for prompt in ("Some years", "Some years"):
        assert invoke("generate", saved, prompt, "--cache", cache, *options).stdout == joined.stdout
    assert cache.read_bytes() == kept
    assert invoke("generate", saved, "-", *options, input=document.read_text() + "Some years").stdout == joined.stdout
    sampled = [
        invoke("generate", saved, "x", "--temperature", 1, "--seed", seed, *options).stdout for seed in (0, 0, 1)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "nothing", "out"], 1, "'nothing' is neither a variant"),
        (["train", "longfromer", "out"], 1, "did you mean longformer?"),
        (["train", "longformer", "out", "--revision", "x"], 1, "--revision is 'x', but longformer is a new model"),
        (["train", "SAVED", "out", "--revision", "x"], 1, "is a local folder"),
        (["train", "longformer", "out", "--set", "window=3"], 1, "has no argument 'window'"),
        (["train", "longformer", "out", "--set", "hiden_size=3"], 1, "'hiden_size'; did you mean hidden_size? It has"),
        (["train", "longformer", "out", "--set", "num_labls=3"], 1, "did you mean num_labels?"),
        (["train", "longformer", "out", "--set", "hidden_size=" + "[" * 10**5], 1, "hidden_size"),
        (["train", "longformer", "out", "--set", "hidden_size"], 1, "must be NAME=VALUE"),
        (["train", "longformer", "out", "--set", "hidden_size=30"], 1, "hidden_size is 30"),
        (["train", "longformer", "out", "--resume"], 1, "holds no checkpoint"),
        (["train", "longformer", "out", "--corpus", "no-such-folder"], 1, "no-such-folder"),
        (["train", "SAVED", "out", "--set", "hidden_size=8"], 1, "is for new models"),
        (["train", "longformer", "out", "--steps", "0"], 2, "--steps"),
        (
            ["generate", "no-such-folder", "x"],
            1,
            "'no-such-folder' is no folder here, and no model that the Hub could",
        ),
        (["generate", "no such/folder", "x"], 1, "'no such/folder' is no folder; give"),
        (["eval", "no-such-folder"], 1, "'no-such-folder' is no folder here, and no model that the Hub could give"),
        (["generate", "SAVED", "x", "--revision", "main"], 1, "--revision is 'main', but"),
        (["generate", "SAVED", ""], 1, "the prompt is empty"),
        (["generate", "SAVED", "x", "--save-cache", "c"], 1, "give --file"),
        (["generate", "SAVED", "x", "--device", "tpu9"], 1, "--device is 'tpu9'"),
        (["convert", "SAVED", "out"], 1, "is no checkpoint that can be converted"),
        (["convert", "SAVED", "SAVED"], 1, "holds something already"),
        (["card"], 1, "give a variant's name, or --all"),
        (["nothing"], 2, "No such command"),
    ],
)
def test_bad_arguments(saved, tmp_path, monkeypatch, arguments, code, message):
    """A line on stderr, nothing on stdout, nothing written."""
    monkeypatch.chdir(tmp_path)
    result = invoke(*[saved if a == "SAVED" else a for a in arguments], env={"COLUMNS": "300"})
    assert result.exit_code == code and message in result.stderr and not result.stdout, result.stderr
    assert "Traceback" not in result.stderr and not list(tmp_path.iterdir())


def one_line(result):
    """The result is an error, told in one line."""
    assert result.exit_code == 1 and not result.stdout, result.output
    assert re.fullmatch("error: .+\n", result.stderr) and "Traceback" not in result.stderr
    return result.stderr


def with_metadata(**metadata):
    return save({"seen": torch.zeros(1, dtype=torch.long)}, metadata)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nonsense" * 9,
        with_metadata(),
        with_metadata(gallery_cache="{"),
        with_metadata(gallery_cache="[]"),
        with_metadata(gallery_cache='{"identity": {}}'),
    ],
)
def test_what_is_no_cache(saved, tmp_path, content):
    (tmp_path / "cache").write_bytes(content)
    said = "which --save-cache did not write: " if content else "which is empty; write it anew"
    assert f"--cache is {tmp_path / 'cache'}, {said}" in one_line(
        invoke("generate", saved, "x", "--cache", tmp_path / "cache")
    )


def test_an_empty_cache(saved, tmp_path):
    (tmp_path / "cache").touch()
    error = one_line(invoke("generate", saved, "x", "--cache", tmp_path / "cache"))
    assert f"--cache is {tmp_path / 'cache'}, which is empty; write it anew" in error


def test_an_empty_file(saved, tmp_path):
    (tmp_path / "book.txt").touch()
    error = one_line(invoke("generate", saved, "x", "--file", tmp_path / "book.txt"))
    assert f"--file is {tmp_path / 'book.txt'}, which is empty; give a text" in error


def empty(folder):
    for path in folder.iterdir():
        path.unlink()


def unfinished(folder):
    empty(folder)
    (folder / "checkpoints").mkdir()


def changed(**fields):
    """Makes a function that sets fields of config.json."""

    def change(folder):
        about = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(about | fields))

    return change


@pytest.mark.parametrize("command", ["generate", "eval", "train"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (empty, "is empty; give the folder that `hf-gallery train` or save_pretrained wrote"),
        (unfinished, "holds a training that has not ended.*--resume"),
        (lambda folder: (folder / "config.json").unlink(), "holds no model: there is no config.json"),
        (lambda folder: (folder / "config.json").write_text(""), "config.json is no configuration of a model"),
        (lambda folder: (folder / "config.json").write_text("[" * 10**5), "config.json is no configuration of a"),
        (lambda folder: (folder / "config.json").write_text("[1]"), "config.json is no configuration of a model"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has a config.json, but no weights: model.safetens"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "model.safetensors is an empty file"),
        (changed(model_type="gpt2"), "holds a gpt2, which is no model of the gallery; .*hf-gallery convert"),
        (changed(architectures=["GalleryMemorizingTransformerForSequenceClassification"]), "ForCausalLM is needed"),
    ],
)
def test_a_folder_without_a_model(saved, tmp_path, command, change, said):
    """Says what is there instead, in one line, and writes nothing."""
    copytree(saved, tmp_path / "model")
    change(tmp_path / "model")
    more = {"generate": ["x"], "eval": [], "train": [tmp_path / "out"]}[command]
    assert re.search(said, one_line(invoke(command, tmp_path / "model", *more)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), "the weights of .* do not open: "),
        (
            lambda folder: (folder / "tokenizer.json").write_bytes(b""),
            "tokenizer.json is an empty file; save model and",
        ),
        (lambda folder: (folder / "tokenizer.json").write_bytes(b"{"), "has no tokenizer that opens: "),
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer that opens: "),
        (changed(hidden_size=18), "the weights of .* do not open: .*has the shape"),
        (changed(hidden_size=10**12), "the weights of .* do not open: hidden_size is 1000000000000"),
    ],
)
def test_a_model_that_does_not_open(saved, tmp_path, change, said):
    copytree(saved, tmp_path / "model")
    change(tmp_path / "model")
    assert re.search(said, one_line(invoke("generate", tmp_path / "model", "x")))


def test_version():
    result = invoke("--version")
    assert result.exit_code == 0 and result.stdout == f"hf-gallery {hf_gallery.__version__}\n"


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("hf-gallery tr", ["train"]),
        ("hf-gallery train transformer", ["transformer", "transformer_xl"]),
        ("hf-gallery card lo", ["longformer"]),
        ("hf-gallery push --pri", ["--private"]),
    ],
)
@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_shell_completes(words, found, shell):
    """Commands, options and names of variants, as the scripts of --install-completion ask for them."""
    asked = {"_HF_GALLERY_COMPLETE": f"complete_{shell}", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    asked["_TYPER_COMPLETE_ARGS"] = words
    result = CliRunner().invoke(app, [], env=asked, prog_name="hf-gallery")
    completed = re.findall(r'^"?([\w-]+)"?', result.stdout.replace("_arguments '*: :((", ""), re.MULTILINE)
    assert [name for name in completed if name in result.stdout] == found, result.output


TYPED = ["[/bold]", "[red]x", "[/]", "\\[b]", "{x}", "%s", "x\x1b[31mred", "a\nb"]


@pytest.mark.parametrize("text", TYPED)
@pytest.mark.parametrize(
    "line",
    [
        ["TEXT"], ["train", "TEXT", "out"], ["train", "longformer", "out", "--corpus", "TEXT"],
        ["train", "longformer", "out", "--set", "TEXT=1"], ["train", "longformer", "out", "--set", "TEXT"],
        ["train", "longformer", "out", "--steps", "TEXT"], ["train", "longformer", "out", "--device", "TEXT"],
        ["generate", "TEXT", "x"], ["generate", "SAVED", "x", "--device", "TEXT"],
        ["generate", "SAVED", "x", "--file", "TEXT"], ["generate", "SAVED", "x", "--revision", "TEXT"],
        ["eval", "TEXT"], ["convert", "TEXT", "out"], ["convert", "SAVED", "out", "--to", "TEXT"], ["card", "TEXT"],
        ["card", "longformer", "--repo-id", "TEXT"], ["card", "longformer", "--results", "TEXT"],
        ["push", "TEXT", "x"], ["push", "SAVED", "TEXT"], ["list", "--TEXT"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_users_type_is_text(saved, tmp_path, monkeypatch, text, line):
    """It marks up nothing, and commands no terminal: an error that names it, and no traceback."""
    monkeypatch.chdir(tmp_path)
    arguments = [str(saved) if word == "SAVED" else word.replace("TEXT", text) for word in line]
    result = invoke(*arguments, env={"COLUMNS": "500"})
    assert isinstance(result.exception, SystemExit) and result.exit_code in (1, 2), result.exception
    assert "Traceback" not in result.stderr and "\x1b[31m" not in result.stderr and not result.stdout
    # typer does not repeat what is no number, and a source that is none is told before what it shall become.
    if not set("\n\x1b") & set(text) and not {"--steps", "--to"} & set(line):
        assert text in result.stderr or repr(text)[1:-1] in result.stderr


def test_a_folder_in_place_of_a_cache(saved, tmp_path):
    assert f"--cache is {tmp_path}, which" in one_line(invoke("generate", saved, "x", "--cache", tmp_path))


def test_the_cache_of_other_weights(saved, tmp_path):
    """A model of the same configuration, trained otherwise, would misread it; who means it says so."""
    other, cache = tmp_path / "other", tmp_path / "cache"
    copytree(saved, other)
    model = AutoModelForCausalLM.from_pretrained(saved)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    model.save_pretrained(other)
    (tmp_path / "book.txt").write_text("a text that is long enough")
    assert not invoke("generate", saved, "x", "--file", tmp_path / "book.txt", "--save-cache", cache).exit_code
    result = invoke("generate", other, "x", "--cache", cache)
    error = result.stderr
    assert result.exit_code == 1 and "other weights" in error and "--any-weights" in error
    assert not invoke("generate", other, "x", "--cache", cache, "--any-weights").exit_code
    assert not invoke("generate", saved, "x", "--cache", cache).exit_code


def test_the_cache_of_another_model(saved, tmp_path):
    GalleryCache(VARIANTS["longformer"].make_config()).save(tmp_path / "cache")
    result = invoke("generate", saved, "x", "--cache", tmp_path / "cache")
    error = result.stderr.splitlines()[-1]
    assert result.exit_code == 1 and "made for another model" in error and not result.stdout
    assert f"--cache is {tmp_path / 'cache'}, which does not fit {saved}: " in error
    assert "Read the text again, by --file and --save-cache with this model; --any-weights takes" in error


@pytest.mark.parametrize("place", ["nodir/x", ".", "book.txt/x"])
def test_a_cache_that_could_not_be_saved(saved, tmp_path, monkeypatch, place):
    """Is refused before the text is read."""
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("Call me Ishmael. ")
    error = one_line(invoke("generate", saved, "x", "--file", "book.txt", "--save-cache", place))
    assert f"--save-cache is {place}, which cannot be written" in error
    assert [path.name for path in tmp_path.iterdir()] == ["book.txt"]


def test_a_file_that_is_no_text(saved, tmp_path):
    (tmp_path / "book").write_bytes(b"caf\xe9")
    result = invoke("generate", saved, "x", "--file", tmp_path / "book")
    assert result.exit_code == 1 and f"--file is {tmp_path / 'book'}, which is no text" in result.stderr


def test_errors_of_several_lines_are_told_in_one(saved, tmp_path):
    copytree(saved, tmp_path / "model")
    for name in ("tokenizer.json", "modeling_memorizing_transformer.py"):
        (tmp_path / "model" / name).unlink()
    error = one_line(invoke("push", tmp_path / "model", "user/name"))
    assert "there again: modeling_memorizing_transformer.py is missing, which auto_map needs; tokenizer_conf" in error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("a"), "KeyError: 'a'"),
        (TypeError("one\n\n  two."), "TypeError: one; two."),
        (ValueError("one:\n  two\n  three"), "one: two; three"),
        (ValueError(), "ValueError"),
    ],
)
def test_errors_of_any_kind_are_told(monkeypatch, error, said):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("hf_gallery.convert.convert", fail)
    assert one_line(invoke("convert", "a", "b")) == f"error: {said}\n"


def test_convert(tmp_path):
    torch.manual_seed(0)
    source = GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    ).eval()
    source.save_pretrained(tmp_path / "gpt2")
    options = ["--to", "memorizing_transformer", "--set", "memory_layers=[1]", "--set", "memory_size=64"]
    result = invoke("convert", tmp_path / "gpt2", tmp_path / "out", *options, "--set", "memory_topk=4")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.memory_layers == [1] and model.config.memory_size == 64


def test_settings_that_are_the_conversions_own_arguments(tmp_path):
    result = invoke("convert", tmp_path, tmp_path / "out", "--set", "revision=main")
    assert "revision" in one_line(result)


@pytest.mark.parametrize("code", [0, 1])
def test_eval_hands_over(saved, monkeypatch, code):
    """Arguments that lm-eval gets; its exit code is the command's."""
    asked = []
    monkeypatch.setattr("hf_gallery.harness.main", lambda argv: asked.append(argv) or code)
    result = invoke("eval", saved, "--tasks", "gallery_lm", "--model_args", "prefill_chunk_size=8", "--limit", "2")
    assert result.exit_code == code and not result.output
    own = ["--model_args", json.dumps({"pretrained": str(saved)})]  # without a revision, which a folder has not
    assert asked == [[*own, "--model_args", "prefill_chunk_size=8", "--tasks", "gallery_lm", "--limit", "2"]]
    assert invoke("eval", saved).exit_code == code
    assert asked[1] == [*own, "--tasks", "gallery_memory"]


def test_eval_that_fails(saved):
    arguments = ("--tasks", "gallery_permutations", "--model_args", "prefill_chunk_size=0", "--limit", "1")
    result = invoke("eval", saved, *arguments)
    assert result.exit_code == 1
    assert result.stderr.endswith("error: prefill_chunk_size is 0; it counts tokens, so give 1 or more\n")


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["--model_args", "prefill_chunk_size=8,dtype=float64"]])
def test_eval_for_real(saved, tmp_path, arguments):
    """In a folder whose name would be two arguments."""
    copytree(saved, tmp_path / "a,b=c" / "m")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    options = ["--tasks", "gallery_permutations", "--limit", "1", "--metadata", '{"examples": 2}', *arguments]
    command = [sys.executable, "-m", "hf_gallery", "eval", "a,b=c/m", *options, "--output_path", "out"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "gallery_permutations" in done.stdout
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results.read_text())["config"]["model_args"]["pretrained"] == "a,b=c/m"


def test_python_m(tmp_path):
    """The module runs as the command does, and only its result is on stdout."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "hf_gallery", "list", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0 and [v["name"] for v in json.loads(done.stdout)] == list(VARIANTS)


# --------------------------------------------------------------------------------------------------------- the guide


def shown_commands(name):
    """Those lines of the guide that run `hf-gallery name`."""
    text = (ROOT / "docs" / "GUIDE.md").read_text(encoding="utf-8")
    lines = re.findall(rf"^hf-gallery {name} .+$", text, re.MULTILINE)
    assert lines
    return [shlex.split(line, comments=True)[1:] for line in lines]


def test_the_readmes_lines_are_short_forms_of_the_guides():
    """Every line of the README is the beginning of one that runs below."""
    guide = (ROOT / "docs" / "GUIDE.md").read_text(encoding="utf-8").splitlines()
    for line in re.findall(r"^hf-gallery .+$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE):
        assert any(full.startswith(line) for full in guide), line


def test_train_generate_look_card_as_shown(tmp_path, monkeypatch):
    """The guide's lines in their order, with fewer and smaller steps, on texts as it makes them."""
    monkeypatch.chdir(tmp_path)
    Path("my_texts").mkdir()
    for name in ("tale", *map(str, range(20))):
        Path(f"my_texts/{name}.txt").write_text("It was the best of times, it was the worst of times. " * 5)
    (train,) = shown_commands("train")
    assert invoke(*train, "--steps", 2, "--lanes", 2, "--length", 32, *SMALL).exit_code == 0
    said = [invoke(*line, "--max-new-tokens", 3) for line in shown_commands("generate")]
    assert [result.exit_code for result in said] == [0, 0] and Path("tale.cache").exists()
    (seen,) = shown_commands("look")
    assert invoke(*seen, "--no-reach").exit_code == 0 and "reads tale.txt" in Path("tale.html").read_text()
    (card,) = shown_commands("card")
    done = invoke(*card)
    assert done.exit_code == 0, done.output
    assert "Transformer-XL" in Path("my_xl/README.md").read_text()


def test_list_spans_push_eval_as_shown(saved, tmp_path, monkeypatch):
    """What they hand over, where a Hub or hours would be needed."""
    monkeypatch.chdir(tmp_path)
    for line in (["list"], *shown_commands("spans")):
        assert invoke(*line).exit_code == 0
    assert Path("seen.svg").read_text().startswith("<svg")
    asked = []
    monkeypatch.setattr("hf_gallery.hub.push", lambda *given, **more: asked.append((given, more)) or "there")
    monkeypatch.setattr("hf_gallery.harness.main", lambda argv: asked.append(argv) or 0)
    copytree(saved, "my_xl")
    copytree(saved, "my_model")
    (push,), (measure,) = shown_commands("push"), shown_commands("eval")
    assert invoke(*push).exit_code == 0 and invoke(*measure).exit_code == 0
    given, more = asked[0]
    assert [*map(str, given)] == push[1:3] and more["private"]
    assert asked[1][2:] == measure[2:]


def test_every_block_of_the_guide_is_run():
    """Python, which test_package.py pastes, or commands that a test knows: those of `hf-gallery` here, of `python -m
    eval` in test_package.py, of lm_eval in tests/eval/test_harness.py, of a shell in test_spinning.py. The examples
    stand in a table, see test_examples.py."""
    text = (ROOT / "docs" / "GUIDE.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert {language for language, _ in blocks} == {"python", "bash"}
    assert not re.search(r"^    ", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    commands = "list|spans|train|generate|card|push|look|convert|eval"
    known = re.compile(rf"hf-gallery ({commands})\b|python -m eval\b|lm_eval |export GOMP_SPINCOUNT=")
    for language, block in blocks:
        assert language == "python" or all(known.match(line) for line in block.splitlines()), block


PUBLISHED = {
    "allenai/longformer-base-4096": lambda: LongformerForMaskedLM(
        LongformerConfig(**TINY, attention_window=8, max_position_embeddings=66, pad_token_id=1)
    ),
    "FacebookAI/roberta-base": lambda: RobertaForMaskedLM(
        RobertaConfig(**TINY, max_position_embeddings=514, pad_token_id=1)
    ),
    "FacebookAI/xlm-roberta-base": lambda: XLMRobertaForMaskedLM(
        XLMRobertaConfig(**TINY, max_position_embeddings=514, pad_token_id=1)
    ),
    "openai-community/gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=16, n_layer=12, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    ),
}
TINY = dict(
    vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, bos_token_id=0,
    eos_token_id=2,
)  # fmt: skip


@pytest.mark.parametrize("line", shown_commands("convert"), ids=lambda line: line[1])
def test_convert_as_shown(line, tmp_path, monkeypatch):
    """The guide's lines, with a small local checkpoint of the same kind in place of the published one."""
    monkeypatch.chdir(tmp_path)
    _, source, out, *options = line
    if source in PUBLISHED:
        PUBLISHED[source]().save_pretrained("source")
        source = "source"
    else:
        assert source == "transfo-xl/transfo-xl-wt103"
        source = ROOT / "tests" / "golden" / "transformer_xl" / "wt103"
    result = invoke("convert", source, out, *options)
    assert result.exit_code == 0, result.output
    wanted = options[options.index("--to") + 1] if "--to" in options else None
    model_type = json.loads(Path(out, "config.json").read_text())["model_type"]
    assert model_type.startswith("gallery_")
    assert wanted is None or model_type.removesuffix("_transformer") == f"gallery_{wanted}".removesuffix(
        "_transformer"
    )
