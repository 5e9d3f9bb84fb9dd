"""lm-eval on gallery models: its own `hf` and our `hf-gallery` give what the model itself gives, and the tasks in
eval/tasks ask what the generators make."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from variants import COLUMNS, VARIANTS, causal

import hf_gallery
import hf_gallery.variants
from eval import recall
from eval.presets import PRESETS
from eval.text import read as read_documents
from hf_gallery.data import TASKS, byte_tokenizer, load_corpus, questions, slot_recall

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from lm_eval.tasks._yaml_loader import load_yaml  # noqa: E402

from hf_gallery import harness  # noqa: E402

FOLDER = Path(__file__).parents[2] / "eval" / "tasks"
BYTES = dict(vocab_size=262, pad_token_id=256, bos_token_id=257, eos_token_id=258)
TEXTS = ["It was the best of times, it was the worst of times. " * 3, "e", "Déjà vu? " * 7, "", "x = 1\n" * 9]


def make(variant):
    return variant.make(dtype=torch.float64, **BYTES)


def wrapped(model, kind=harness.GalleryLM, **arguments):
    return kind(pretrained=model, tokenizer=byte_tokenizer(), **{"batch_size": 3} | arguments)


def requests(kind, arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=a, idx=i, metadata=("test", i, 1))
        for i, a in enumerate(arguments)
    ]


@torch.no_grad()
def directly(model, context, target):
    """Log-likelihood of the target's bytes after the context's ids, and whether each is the most likely one; from one
    forward over the whole."""
    ids = torch.tensor([*context, *target.encode()])
    logits = model(input_ids=ids[None]).logits[0, len(context) - 1 : -1]
    target = ids[len(context) :]
    scores = logits.log_softmax(-1).gather(-1, target[:, None])
    return float(scores.sum()), bool((logits.argmax(-1) == target).all())


def long_enough(variant):
    return variant.limit is None


# ------------------------------------------------------------------------------------------------------- rolling texts


@pytest.mark.works("lm-eval, cache carried on")
@causal(long_enough)
def test_rolling_equals_one_long_forward(variant):
    """However the text is cut into chunks, and whoever reads beside it."""
    model = make(variant)
    expected = [directly(model, [257], text)[0] for text in TEXTS]
    for chunk in (5, 64, 2048):
        lm = wrapped(model, prefill_chunk_size=chunk)
        found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(t,) for t in TEXTS]), disable_tqdm=True)
        np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_rolling_where_positions_end():
    """Learned positions reach 61 tokens: windows of as many, as lm-eval's own model makes them."""
    (variant,) = (v for v in VARIANTS if v.name == "transformer_pre")
    model = make(variant)
    asked = requests("loglikelihood_rolling", [(t,) for t in TEXTS if t])
    lm = wrapped(model)
    assert lm.max_length == 61
    found = lm.loglikelihood_rolling(asked, disable_tqdm=True)
    np.testing.assert_allclose(found, wrapped(model, HFLM).loglikelihood_rolling(asked, disable_tqdm=True))
    assert found[0] != pytest.approx(wrapped(model, max_length=30).loglikelihood_rolling(asked[:1])[0], rel=1e-9)


@causal(long_enough)
def test_rolling_equals_the_bits_of_the_benchmark(variant):
    """`python -m eval` reads a document from its first byte, lm-eval from <bos>: with <bos> first, the same bits."""
    model = make(variant)
    documents = [np.array([257, *x.encode()]) for x in TEXTS if x]
    bits = read_documents(model, documents, lanes=2, length=37, device=torch.device("cpu"))
    asked = requests("loglikelihood_rolling", [(x,) for x in TEXTS if x])
    found = wrapped(model, prefill_chunk_size=50).loglikelihood_rolling(asked, disable_tqdm=True)
    np.testing.assert_allclose([-x / np.log(2) for x in found], [x.sum() for x in bits], rtol=1e-5)


def test_stock_rolling_throws_the_past_away():
    """The model type hf-gallery is needed: with windows of 64, lm-eval's own forgets what its cache would hold."""
    (variant,) = (v for v in VARIANTS if v.name == "transformer_xl_long_memory")
    model = make(variant)
    asked = requests("loglikelihood_rolling", [(TEXTS[0],)])
    stock = wrapped(model, HFLM, max_length=64).loglikelihood_rolling(asked, disable_tqdm=True)
    ours = wrapped(model, prefill_chunk_size=64).loglikelihood_rolling(asked, disable_tqdm=True)
    whole = wrapped(model, HFLM, max_length=4096).loglikelihood_rolling(asked, disable_tqdm=True)
    np.testing.assert_allclose(ours, whole, rtol=1e-9)
    assert abs(stock[0] - whole[0]) > 1


# ------------------------------------------------------------------------------------------------------------- answers

CONTEXTS = ["a", "What is the pass key? It is:", "To be, or not to be, that is the question:" * 2, "[MAX 1 2]="]


@pytest.mark.works("lm-eval, both models")
@causal(long_enough)
def test_answers_equal_direct_ones_and_those_of_stock(variant):
    """Some continuations are the model's own, some are not; contexts are asked once, or several times."""
    model = make(variant)
    pairs = []
    for i, context in enumerate(CONTEXTS):
        ids = torch.tensor([list(context.encode())])
        said = model.generate(ids, max_new_tokens=3, do_sample=False, suppress_tokens=list(range(128, 262)))
        pairs.append((context, bytes(said[0, ids.shape[1] :].tolist()).decode()))
        pairs += [(context, text) for text in ("b", "hall", " long answer")[:i]]
    asked = requests("loglikelihood", pairs)
    expected = [directly(model, context.encode(), text) for context, text in pairs]
    for lm in (
        wrapped(model, HFLM, max_length=4096),
        wrapped(model, prefill_chunk_size=9),
        wrapped(model, prefill_chunk_size=1000, batch_size=1),
    ):
        found = lm.loglikelihood(asked, disable_tqdm=True)
        np.testing.assert_allclose([x for x, _ in found], [x for x, _ in expected], rtol=1e-9)
        assert [exact for _, exact in found] == [exact for _, exact in expected]


def test_a_context_is_read_once():
    model = make(VARIANTS[0])
    read = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    asked = requests("loglikelihood", [("x" * 50, letter) for letter in "abcdefgh"])
    wrapped(model).loglikelihood(asked, disable_tqdm=True)
    assert read == [50]


def test_nothing_is_cut_unless_asked_for():
    """A first letter 3,000 bytes back counts."""
    model = make(VARIANTS[0])
    asked = requests("loglikelihood", [(letter + "x" * 3000, "y") for letter in "ab"])
    (first, _), (second, _) = wrapped(model).loglikelihood(asked, disable_tqdm=True)
    assert first != second
    (first, _), (second, _) = wrapped(model, max_length=2048).loglikelihood(asked, disable_tqdm=True)
    assert first == second


@causal(long_enough)
def test_generation_equals_the_models_own(variant):
    """After reading the context in chunks, rows of different lengths side by side."""
    model = make(variant)
    arguments = {"until": [], "max_gen_toks": 5}
    asked = requests("generate_until", [(context, dict(arguments)) for context in CONTEXTS])
    found = wrapped(model, prefill_chunk_size=11).generate_until(asked, disable_tqdm=True)
    tokenizer = byte_tokenizer()
    for context, text in zip(CONTEXTS, found, strict=True):
        ids = torch.tensor([list(context.encode())])
        said = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        assert text == tokenizer.decode(said, skip_special_tokens=True).split("<eos>")[0]


@pytest.mark.works("lm-eval, beams")
@causal(long_enough)
def test_beams_equal_the_models_own(variant):
    """The context is read once, and each beam goes on from what it left."""
    model = make(variant)
    arguments = {"until": [], "max_gen_toks": 6, "num_beams": 2}
    asked = requests("generate_until", [(context, dict(arguments)) for context in CONTEXTS])
    found = wrapped(model, prefill_chunk_size=11).generate_until(asked, disable_tqdm=True)
    tokenizer = byte_tokenizer()
    for context, text in zip(CONTEXTS, found, strict=True):
        ids = torch.tensor([list(context.encode())])
        said = model.generate(ids, max_new_tokens=6, do_sample=False, num_beams=2)[0, ids.shape[1] :]
        assert text == tokenizer.decode(said, skip_special_tokens=True).split("<eos>")[0]


def everything(lm):
    """Texts, answers and continuations that a model gives to all kinds of requests."""
    rolling = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(t,) for t in TEXTS if t]), True)
    answers = lm.loglikelihood(requests("loglikelihood", [(c, " x") for c in CONTEXTS + CONTEXTS[:1]]), True)
    asked = [(context, {"until": [], "max_gen_toks": 3}) for context in CONTEXTS]
    return rolling, answers, lm.generate_until(requests("generate_until", asked), True)


def assert_same_answers(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-9)
    np.testing.assert_allclose([score for score, _ in found[1]], [score for score, _ in expected[1]], rtol=1e-9)
    assert found[2] == expected[2]


@pytest.mark.parametrize("kind", [harness.GalleryLM, HFLM])
@causal(lambda variant: long_enough(variant) and variant.name in COLUMNS)
def test_the_size_of_batches_can_be_left_to_lm_eval(variant, kind):
    """Also where a text has no longest length that a trial could be made with."""
    model = make(variant)
    few = {"max_batch_size": 4, "max_length": None}
    assert_same_answers(everything(wrapped(model, kind, batch_size="auto", **few)), everything(wrapped(model, kind)))


def test_a_batch_that_does_not_fit_is_halved():
    lm = wrapped(make(VARIANTS[0]), batch_size="auto", max_batch_size=8)
    forward, sizes = lm._forward, []

    def scarce(ids, *arguments, **more):
        sizes.append(len(ids))
        if len(ids) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")
        return forward(ids, *arguments, **more)

    lm._forward = scarce
    assert_same_answers(everything(lm), everything(wrapped(make(VARIANTS[0]))))
    assert sizes[:3] == [4, 2, 2] and max(sizes[2:]) == 2
    broken = wrapped(make(VARIANTS[0]), batch_size=3)
    broken._forward = scarce
    with pytest.raises(RuntimeError, match="out of memory"):  # a size that was given is not changed
        broken.loglikelihood_rolling(requests("loglikelihood_rolling", [(t,) for t in TEXTS]), True)


def test_arguments_that_do_not_fit():
    model = make(VARIANTS[0])
    with pytest.raises(ValueError, match=r"prefill_chunk_size is 0; it counts tokens, so give 1 or more"):
        wrapped(model, prefill_chunk_size=0)
    with pytest.raises(ValueError, match=r"prefix_token_id is 257, outside the model's vocabulary of 97; .* 10 "):
        wrapped(VARIANTS[0].make())
    wrapped(VARIANTS[0].make(), prefix_token_id=10)
    from transformers import GPT2Config, GPT2LMHeadModel

    other = GPT2LMHeadModel(GPT2Config(vocab_size=262, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(ValueError, match=r"model_type is 'gpt2'; hf-gallery is for models of the gallery"):
        wrapped(other)


# ------------------------------------------------------------------------------------------------- a model that learns

ARGUMENTS = dict(length=20, num_writes=3, num_values=4)
LEVELS = {f"{d} back": ("slot_recall", ARGUMENTS | {"distances": [d]}) for d in (1, 5, 12)}


@pytest.fixture(scope="module")
def learned():
    """A Transformer-XL after some seconds of slot recall: right more often than by chance, and not always."""
    torch.manual_seed(0)
    config = hf_gallery.GalleryTransformerXLConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, segment_length=8, mem_len=8,
        hidden_dropout=0.0, attention_dropout=0.0, **BYTES,
    )  # fmt: skip
    model = hf_gallery.GalleryTransformerXLForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(80):
        data = slot_recall(32, distances=range(1, 13), num_reads=3, seed=step, **ARGUMENTS).with_format("torch")
        model(input_ids=data["input_ids"][:], labels=data["labels"][:]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def right_by_argmax(model, examples):
    """Right answers among the scored columns, as `python -m eval` counts them."""
    data = examples.with_format("torch")
    labels = data["labels"][:][:, 1:]
    predicted = model(input_ids=data["input_ids"][:]).logits[:, :-1].argmax(-1)
    return (predicted == labels)[labels >= 0]


def test_scores_equal_the_argmax_of_the_model(learned):
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    found = harness.score(learned, LEVELS, examples=60, seed=3, batch_size=7)
    assert torch.equal(torch.get_rng_state(), before[0]) and np.random.get_state()[1].tolist() == before[1]
    for label, (_, arguments) in LEVELS.items():
        data = slot_recall(60, **arguments, seed=3, split="test")
        last = [max(i for i, y in enumerate(row) if y >= 0) for row in data["labels"]]
        scored = [(row, i) for row, labels in enumerate(data["labels"]) for i, y in enumerate(labels) if y >= 0]
        right = right_by_argmax(learned, data)
        correct = sum(bool(r) for (row, i), r in zip(scored, right, strict=True) if i == last[row])
        assert found[label] == {"asked": 60, "correct": correct}
    assert 15 < sum(level["correct"] for level in found.values()) < 165  # neither chance nor all


@pytest.mark.parametrize("kind", [harness.GalleryLM, HFLM])
def test_slot_recall_equals_the_score_of_the_benchmark(learned, kind):
    """The questions of gallery_slot_recall are those of `python -m eval`, every one; on the same model the right
    answers are as many."""
    settings = dataclasses.replace(PRESETS["quick"].recall, length=20, num_writes=3, num_values=4, examples=60)
    manager = TaskManager(include_defaults=False, metadata={"examples": 60, "seed": 3})
    config = load_yaml(FOLDER / "slot_recall.yaml")
    about = config["task"][0]["dataset_kwargs"]
    common = {name: x for name, x in config.items() if name not in ("group", "task", "aggregate_metric_list")}
    for distance in (1, 5, 12):
        expected = recall.ask(learned, settings, distance, seed=3, device=torch.device("cpu"))
        given = about | {"arguments": ARGUMENTS | {"distances": [distance]}}
        found = simple_evaluate(
            wrapped(learned, kind, max_length=4096), tasks=[common | {"task": "own", "dataset_kwargs": given}],
            task_manager=manager, bootstrap_iters=0, random_seed=None, numpy_random_seed=None, torch_random_seed=None,
        )  # fmt: skip
        answers = [sample["acc"] for sample in found["samples"]["own"]]
        assert (expected["asked"], expected["correct"]) == (len(answers), sum(answers))
        assert len(answers) > 100 and 0 < expected["correct"] < len(answers)


def test_scores_of_stock_are_the_same(learned):
    """The same questions through lm-eval's own model."""
    ours = harness.score(learned, LEVELS, examples=40)
    for label, (_, arguments) in LEVELS.items():
        data = questions(slot_recall(40, **arguments, split="test"), last=True)
        stock = simple_evaluate(
            wrapped(learned, HFLM, max_length=4096),
            tasks=[harness._question_task(label, data)],
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=0,
        )
        assert stock["results"][label]["acc,none"] == ours[label]["correct"] / 40


def test_answers_of_several_bytes_are_right_as_a_whole(learned):
    """A model that always says "aaa..." copies only where all letters are a."""
    biased = hf_gallery.GalleryTransformerXLForCausalLM(learned.config)
    biased.get_output_embeddings().weight.data.zero_()
    biased.get_output_embeddings().bias.data.copy_(torch.arange(262) == ord("a"))
    levels = {str(n): ("verbatim_copy", dict(length=30, distances=[12], num_symbols=n, alphabet=2)) for n in (1, 3)}
    found = harness.score(biased, levels, examples=80)
    for label, (task, arguments) in levels.items():
        expected = [directly(biased, row["context"].encode(), row["target"])[1]
                    for row in questions(TASKS[task](80, **arguments, split="test"))]  # fmt: skip
        assert found[label] == {"asked": 80, "correct": sum(expected)}
    assert 80 > found["1"]["correct"] > found["3"]["correct"] > 0


def test_score_of_no_task(learned):
    with pytest.raises(ValueError, match=r"task is 'copy' at level 'far'; it must be one of associative_recall"):
        harness.score(learned, {"far": ("copy", {})}, examples=3)


# ----------------------------------------------------------------------------------------------------- the task folder


@pytest.fixture(scope="module")
def manager():
    return TaskManager(
        include_path=str(FOLDER), include_defaults=False, metadata={"examples": 2, "seed": 5, "pretrained": "x"}
    )


def subtasks():
    for path in sorted(FOLDER.glob("*.yaml")):
        text = path.read_text()
        if "question_template" in text:
            config = yaml.safe_load(text)
            for task in config["task"]:
                yield config["group"], task["task"], task["dataset_kwargs"]


def test_questions_of_the_task_folder(manager):
    """All groups load; each subtask asks what the generator makes of its arguments, and its label says its length."""
    loaded = manager.load(["gallery_memory", "gallery_reasoning"])["tasks"]
    expected = {f"{group}::{label}": given for group, label, given in subtasks()}
    assert set(loaded) == set(expected)
    for name, given in expected.items():
        made = TASKS[given["generator"]](2, **given["arguments"], seed=5, split="test")
        docs = loaded[name].test_docs()
        assert docs.to_list() == questions(made, last=given.get("last", True)).to_list()
        assert len(docs) == 2 or not given["last"]
        length = given["arguments"]["length"]
        if "pairs" not in name:
            assert int(name.rpartition("_")[2].rpartition(":")[2]) == length
        for doc in docs:
            context = loaded[name].fewshot_context(doc, 0)
            assert (context, loaded[name].doc_to_target(doc)) == (doc["context"], doc["target"])
            request = loaded[name].construct_requests(doc, context, metadata=(name, 0, 1))
            assert request.args == (doc["context"], doc["target"])


def test_lengths_of_the_language_modelling_task(manager):
    """The same documents at every length; a byte that is part of a character at the cut is left out."""
    tasks = manager.load(["gallery_lm"])["tasks"]
    assert list(tasks) == ["gallery_lm::01024", "gallery_lm::04096", "gallery_lm::16384"]
    held_out = [text for text in load_corpus("stdlib")["test"]["text"] if len(text.encode()) >= 16384][:2]
    for name, task in tasks.items():
        for doc, text in zip(task.test_docs(), held_out, strict=True):
            read = task.doc_to_target(doc)
            assert text.startswith(read) and int(name[-5:]) - 3 <= len(read.encode()) <= int(name[-5:])


def test_bits_per_byte_of_the_language_modelling_task(learned, manager, tmp_path):
    """lm-eval's number is the log-likelihood of one long forward over all bytes."""
    folder = tmp_path / "texts"
    folder.mkdir()
    rng = np.random.default_rng(0)
    (folder / "a.txt").write_text("".join(rng.choice(list("ab é\n"), size=30_000)))
    config = load_yaml(FOLDER / "gallery_lm.yaml")
    config.pop("group")
    config |= {"task": "own", "dataset_kwargs": {"length": 1000, "corpus": str(folder)}}
    found = simple_evaluate(
        wrapped(learned, prefill_chunk_size=256), tasks=[config], task_manager=manager, bootstrap_iters=0
    )
    (doc,) = load_corpus(str(folder))["test"]["text"]
    text = doc.encode()[:1000].decode(errors="ignore")
    expected = -directly(learned, [257], text)[0] / np.log(2) / len(text.encode())
    assert found["results"]["own"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-5)


def test_a_corpus_without_long_documents(tmp_path):
    (tmp_path / "a.txt").write_text("short " * 100)
    documents = load_yaml(FOLDER / "gallery_lm.yaml")["custom_dataset"]
    with pytest.raises(ValueError, match=r"no held-out document of the corpus has 16384 bytes"):
        documents(1024, longest=16384, corpus=str(tmp_path))


# ------------------------------------------------------------------------------------------------------- command lines


@pytest.fixture(scope="module")
def saved(learned, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    learned.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def tiny(name):
    """A small model of an architecture, as the gallery's own command line makes them."""
    variant = hf_gallery.variants.VARIANTS[name]
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
    return variant.causal(variant.make_config(**sizes)).eval()


@pytest.mark.parametrize("name", hf_gallery.variants.VARIANTS)
def test_the_length_that_stock_finds(name):
    """A model whose positions have no end has no longest input there either."""
    assert wrapped(tiny(name), HFLM).max_length == wrapped(tiny(name)).max_length == harness.UNLIMITED


def test_the_length_that_stock_finds_where_positions_end():
    """Positions that no token takes, as RoBERTa's first two, are not counted."""
    config = hf_gallery.GalleryLongformerConfig(max_position_embeddings=50, position_offset=2, is_decoder=True)
    assert config.n_positions == config.longest_input == 48


def samples(folder):
    """{task: {number of the question: (log-likelihood, right)}} from the logs of a run; right is None for texts."""
    found = {}
    for path in folder.rglob("samples_*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found[re.sub(r"_\d{4}-.*", "", path.name).removeprefix("samples_")] = {
            row["doc_id"]: (float(np.ravel(row["filtered_resps"][0])[0]), row.get("acc")) for row in rows
        }
    return found


@pytest.mark.slow
def test_own_command_line(learned, saved, tmp_path, capsys):
    """Model and tasks are registered; the log-likelihoods are the model's."""
    code = harness.main(
        ["--model_args", f"pretrained={saved},prefill_chunk_size=100", "--tasks", "gallery_passkey", "--limit", "2",
         "--device", "cpu", "--output_path", str(tmp_path), "--log_samples", "--metadata", '{"examples": 2}']
    )  # fmt: skip
    assert code == 0
    assert "gallery_passkey::04096" in capsys.readouterr().out
    found = samples(tmp_path)
    assert set(found) == {f"gallery_passkey::{n:05}" for n in (256, 1024, 4096, 16384)}
    for n in (256, 16384):
        asked = questions(TASKS["passkey"](2, n, distances=[n - 22], split="test"))
        for i, row in enumerate(asked):
            score, right = found[f"gallery_passkey::{n:05}"][i]
            expected = directly(learned, row["context"].encode(), row["target"])
            assert score == pytest.approx(expected[0], rel=1e-4) and bool(right) == expected[1]


def test_own_command_line_refuses(saved, capsys):
    assert harness.main(["--model_args", f"pretrained={saved},batch_size=auto", "--tasks"]) == 2
    assert harness.main(["--help"]) == 0
    assert "lm-eval" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", hf_gallery.variants.VARIANTS)
def test_stock_command_line(learned, name, tmp_path):
    """lm_eval, installed and unchanged, on a saved folder: its answers are those of one forward, whatever the
    length. One question of each length, for lm_eval asks one at a time; where some answers are right, two."""
    model, each = (learned, 2) if name == "transformer_xl" else (tiny(name), 1)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    groups = ["gallery_memory", "gallery_reasoning", "gallery_lm"]
    arguments = f"pretrained={tmp_path / 'model'},trust_remote_code=True"
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "--model", "hf", "--include_path", str(FOLDER), "--tasks", ",".join(groups),
         "--model_args", arguments, "--limit", str(each), "--device", "cpu", "--output_path", str(tmp_path / "out"),
         "--log_samples"],
        capture_output=True, text=True, timeout=900, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = samples(tmp_path / "out")
    asked = {f"{group}::{label}": given for group, label, given in subtasks()}
    lengths = {f"gallery_lm::{n:05}": n for n in (1024, 4096, 16384)}
    assert set(found) == set(asked) | set(lengths)
    for name, given in asked.items():
        made = TASKS[given["generator"]](100, **given["arguments"], split="test")
        rows = questions(made, last=given.get("last", True))
        assert len(found[name]) == each
        for i in range(each):
            score, right = directly(model, rows[i]["context"].encode(), rows[i]["target"])
            assert found[name][i] == (pytest.approx(score, rel=1e-3), right)
    held_out = [x.encode() for x in load_corpus("stdlib")["test"]["text"] if len(x.encode()) >= 16384][:each]
    for name, length in lengths.items():
        for i, document in enumerate(held_out):
            score, _ = directly(model, [257], document[:length].decode(errors="ignore"))
            assert found[name][i] == (pytest.approx(score, rel=1e-4), None)


@pytest.mark.slow
def test_the_library_needs_no_lm_eval():
    """hf_gallery and its data are imported without it."""
    code = "import sys; sys.modules['lm_eval'] = None; import hf_gallery, hf_gallery.data, hf_gallery.training"
    assert subprocess.run([sys.executable, "-c", code], timeout=240).returncode == 0
