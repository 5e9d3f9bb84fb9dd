"""`python -m eval`: contestants of one size, cells that are measured once, results that add up, a page that opens."""

import contextlib
import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from bs4 import BeautifulSoup
from datasets import Dataset, DatasetDict
from rich.console import Console
from typer.testing import CliRunner

from eval import (
    abilities,
    attention,
    benchmark,
    cells,
    contestants,
    figures,
    presets,
    published,
    recall,
    report,
    tables,
    text,
)
from eval import cli as command_line
from eval.cells import Cell, Run
from eval.measure import interleaved, peak_bytes
from eval.significance import wilson
from hf_gallery.data import TASKS, load_corpus, slot_recall
from hf_gallery.files import read_json, write_json, write_text

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SECOND = ("longformer_xl", "recurrent_memory_transformer_few")  # of an architecture that another stands for here
NAMES = [name for name in contestants.CONTESTANTS if name not in SECOND]
TINY_SIZES = dataclasses.replace(
    presets.PRESETS["quick"].recall.sizes, hidden=16, layers=2, heads=2, window=4, context=16, intermediate=80,
    memory_size=64, memory_topk=4, states=4,
)  # fmt: skip
TINY = presets.Preset(
    "tiny",
    "seconds",
    seeds=1,
    ability_seeds=1,
    tasks=("recall", "permutations", "text", "cost"),
    recall=presets.RecallSettings(
        TINY_SIZES, steps=4, tokens=64, short=8, length=40, learning_rate=1e-2, multiples=(0.5, 2.0, 8.0), examples=9
    ),
    abilities=abilities.AbilitySettings(TINY_SIZES, steps=4, tokens=64, learning_rate=1e-2, examples=9),
    text=presets.TextSettings(
        TINY_SIZES, steps=3, lanes=2, length=16, learning_rate=1e-2, test_bytes=500, document_bytes=400
    ),
    classification=presets.ClassificationSettings(
        TINY_SIZES, steps=4, tokens=64, learning_rate=1e-2, lengths=(8, 16), examples=9, classes=3
    ),
    cost=presets.CostSettings(TINY_SIZES, lengths=(24, 48), tokens=48, repeats=1, contexts=(8, 24), decode_tokens=2),
)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The command with the tiny preset beside the others, in an empty folder, on a small corpus."""
    monkeypatch.setitem(presets.PRESETS, "tiny", TINY)
    monkeypatch.setattr(text, "FREQUENT", 1)  # of the few words there are
    monkeypatch.chdir(tmp_path)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(40):
        (corpus / f"{i}.txt").write_text("".join(f"line {j} of document {i}\n" for j in range(3 + i)))
    return ["--preset", "tiny", "--corpus", str(corpus)]


def invoke(*arguments):
    return CliRunner().invoke(command_line.app, list(arguments))


# ---- contestants


@pytest.mark.parametrize("task", ["text", "recall", "cost"])
@pytest.mark.parametrize("preset", list(presets.PRESETS))
def test_contestants_have_one_size(preset, task):
    sizes = getattr(presets.PRESETS[preset], task).sizes
    counts = {}
    for name, contestant in contestants.CONTESTANTS.items():
        with torch.device("meta"):
            counts[name] = contestants.build(contestant, sizes).num_parameters()
    assert max(counts.values()) / min(counts.values()) < 1.03, counts


def test_contestants_that_cannot_be_matched_are_refused():
    sizes = dataclasses.replace(TINY_SIZES, hidden=32, intermediate=4)
    with pytest.raises(ValueError, match=r"parameters.*raise"):
        contestants.build(contestants.CONTESTANTS["transformer_xl"], sizes)


def test_weights_come_from_the_seed():
    make = [contestants.build(contestants.CONTESTANTS["transformer_xl"], TINY_SIZES, seed) for seed in (1, 1, 2)]
    first, again, other = (m.get_input_embeddings().weight for m in make)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_windowed_transformer_sees_its_window_and_the_others_more():
    """The premise of the comparison, on random weights: whose last logits change with the first token?"""
    ids = torch.randint(0, 97, (1, 2 * TINY_SIZES.window))
    other = ids.clone()
    other[0, 0] += 1
    for name, contestant in contestants.CONTESTANTS.items():
        model = contestants.build(contestant, TINY_SIZES).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # louder than at the start of training
                parameter.add_(0.3 * torch.randn_like(parameter))
            change = (model(ids).logits[0, -1] - model(other).logits[0, -1]).abs().max()
        assert (change == 0) == (name == "transformer"), name


# ---- tasks


def test_the_curriculum_grows_and_is_the_same_for_all():
    settings = dataclasses.replace(TINY.recall, steps=40)
    batches = [list(recall.Curriculum(settings, seed)) for seed in (0, 0, 1)]
    lengths = [batch["input_ids"].shape[1] for batch in batches[0]]
    assert lengths == sorted(lengths) and lengths[0] == settings.short and lengths[-1] == settings.length
    assert len(lengths) == settings.steps
    for a, b, other in zip(*batches, strict=True):
        assert torch.equal(a["input_ids"], b["input_ids"]) and torch.equal(a["labels"], b["labels"])
        assert not torch.equal(a["input_ids"], other["input_ids"])
    assert len({str(batch["input_ids"]) for batch in batches[0]}) == settings.steps


def test_every_distance_is_practised():
    """Those that are asked for, too; about as often for each doubling, and none that does not fit."""
    counts = Counter(d for shift in np.linspace(0, 1, 400, endpoint=False) for d in recall.spread(158, shift))
    assert set(counts) == set(range(1, 159))
    doublings = [sum(counts[d] for d in range(2**i, 2 ** (i + 1))) for i in range(3, 7)]  # below, some fall together
    assert max(doublings) < 1.2 * min(doublings)
    for name in ("quick", "standard", "full"):
        settings = presets.PRESETS[name].recall
        drawn = np.random.default_rng(0).random(settings.steps // 3)  # as many as the steps of whole length
        assert set(settings.distances()) <= {d for shift in drawn for d in recall.spread(settings.length - 2, shift)}


class Oracle:
    """Answers slot recall by looking back at most `reach` tokens."""

    def __init__(self, reach):
        self.reach = reach

    def __call__(self, input_ids):
        from hf_gallery.data import tasks

        logits = torch.zeros(*input_ids.shape, 262)
        write = {int(b): divmod(i, tasks.SLOT_VALUES) for i, b in enumerate(tasks.WRITES)}
        read = {int(b): slot for slot, b in enumerate(tasks.READS)}
        for row, ids in enumerate(input_ids.tolist()):
            for t, token in enumerate(ids):
                if token in read:
                    for s in range(max(0, t - self.reach), t):
                        if write.get(ids[s], (None, None))[0] == read[token]:
                            logits[row, t, tasks.ANSWERS[write[ids[s]][1]]] = 1
        return type("Output", (), {"logits": logits})


def test_recall_counts_right_answers():
    """Whoever sees far enough gets everything, whoever does not gets nothing (no answer is given by default)."""
    settings = dataclasses.replace(TINY.recall, examples=30)
    for distance in (2, 8, 32):
        far = recall.ask(Oracle(distance), settings, distance, 0, CPU)
        near = recall.ask(Oracle(distance - 1), settings, distance, 0, CPU)
        assert far["asked"] == near["asked"] > 30
        assert far["correct"] == far["asked"] and near["correct"] == 0


def test_test_questions_were_not_trained_on():
    trained = {str(row) for batch in recall.Curriculum(TINY.recall, 0) for row in batch["input_ids"].tolist()}
    asked = slot_recall(50, TINY.recall.length, distances=[8], seed=0, split="test")
    assert not trained & {str(row) for row in asked["input_ids"]}


@pytest.mark.parametrize("preset", presets.PRESETS)
@pytest.mark.parametrize("name", abilities.ABILITIES)
def test_levels_of_abilities(name, preset):
    """Every level can be made, some are practised and the hardest is not the easiest."""
    settings = presets.PRESETS[preset].abilities
    found = abilities.ability(name, settings)
    assert found.group in ("memory", "reasoning") and len({level.label for level in found.levels}) >= 3
    assert found.levels[0].trained
    assert max(level.arguments["length"] for level in found.levels) <= settings.sizes.context * 1.1
    if preset != "full":
        for level in found.levels:
            assert len(TASKS[found.task](2, **level.arguments)) == 2


def test_abilities_are_learned_from_other_examples_than_asked():
    settings = dataclasses.replace(TINY.abilities, steps=30)
    batches = [list(abilities.Levels("permutations", settings, 0)) for _ in range(2)]
    for a, b in zip(*batches, strict=True):
        assert torch.equal(a["input_ids"], b["input_ids"]) and torch.equal(a["labels"], b["labels"])
    lengths = [batch["input_ids"].shape[1] for batch in batches[0]]
    practised = [v.arguments["length"] for v in abilities.ability("permutations", settings).levels if v.trained]
    assert set(lengths) == set(practised) and lengths[0] == practised[0] and lengths.index(practised[-1]) > 10
    trained = {str(row) for batch in batches[0] for row in batch["input_ids"].tolist()}
    asked = TASKS["permutation_composition"](50, length=practised[-1], num_questions=1, seed=0, split="test")
    assert not trained & {str(row) for row in asked["input_ids"]}


def test_order0_bits_by_hand(tmp_path):
    for split, content in (("train", "aab"), ("validation", "zz"), ("test", "aba")):
        (tmp_path / split).mkdir()
        (tmp_path / split / "x.txt").write_text(content)
    bits = text.order0_bits(load_corpus(tmp_path), TINY.text)
    total = 256 + 3  # add-one over 256 bytes; the first byte of a document is not predicted
    assert bits == pytest.approx(-(math.log2(2 / total) + math.log2(3 / total)) / 2)


@pytest.mark.parametrize("name", contestants.CONTESTANTS)
def test_documents_are_read_as_if_alone(name):
    """Side by side, in forwards of any length, with padding: each byte gets the bits of one forward over its
    document."""
    model = contestants.build(contestants.CONTESTANTS[name], TINY_SIZES).eval().double()
    random = np.random.default_rng(0)
    found = [random.integers(0, 256, size=n) for n in (2, 61, 30, 7, 44)]
    got = text.read(model, found, lanes=3, length=9, device=CPU)
    for ids, bits in zip(found, got, strict=True):
        ids = torch.from_numpy(ids)[None]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        expected = -torch.log_softmax(logits.double(), -1).gather(-1, ids[0, 1:, None])[:, 0] / math.log(2)
        np.testing.assert_allclose(bits, expected.numpy(), rtol=1e-4)  # the loss is taken in float32


def test_bits_by_position():
    bits = [np.arange(200.0), np.ones(70)]
    got = text.by_position(bits)
    assert {k: v["bytes"] for k, v in got.items()} == {"0": 128, "64": 70, "128": 72}
    assert got["0"]["bits"] == sum(range(64)) + 64 and got["128"]["bits"] == sum(range(128, 200))
    assert got["128"]["by_unit"] == {"unit": "document", "bits": "11772.000 0.000", "bytes": "72 0"}


def test_bits_of_rare_words_by_hand():
    """Each byte costs as many bits as its place, so that sums tell which bytes were counted."""
    said = b"Anna the Anna" + b" " * 60 + b"Anna. Bo Bob"
    ids = np.frombuffer(said, dtype=np.uint8)
    got = text.by_last_use([np.arange(1.0, len(said))], [ids], {b"the"})
    first, second, bob = 9, 73, said.index(b"Bob")
    units = {label: sums.pop("by_unit") for label, sums in got.items()}
    assert units["16"] == {"unit": "document", "bits": f"{sum(range(first, first + 4))}.000", "bytes": "4"}
    assert got == {
        "first use": {"bits": sum(range(bob, bob + 3)), "bytes": 3, "words": 1},  # Anna's stands at the very start
        "16": {"bits": sum(range(first, first + 4)), "bytes": 4, "words": 1},
        "64": {"bits": sum(range(second, second + 4)), "bytes": 4, "words": 1},
    }


def test_frequent_words(monkeypatch):
    said = Dataset.from_dict({"text": ["the cat the dog a an", "_x1 the cat"]})
    assert text.frequent_words(said) == {b"the", b"cat", b"dog", b"_x1"}
    monkeypatch.setattr(text, "FREQUENT", 2)
    assert text.frequent_words(said) == {b"the", b"cat"}


def test_documents_are_cut_at_the_limit(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text("0123456789" * 10)
    split = load_corpus(tmp_path)["train"]
    assert [len(d) for d in text.documents(split, 25)] == [25]
    whole = text.documents(split)
    assert sum(map(len, text.documents(split, 10**9))) == sum(map(len, whole)) > 100


# ---- statistics and clocks


def test_wilson():
    """Values of R's binom::binom.confint(methods = "wilson")."""
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775328), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


def test_interleaved_takes_turns():
    calls = []
    times = interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, 2)
    assert sorted(calls) == sorted("abc" * 3) and {calls[0], calls[3], calls[6]} == set("abc")
    assert all(len(values) == 2 and min(values) >= 0 for values in times.values())


def test_peak_bytes_counts_what_is_alive_at_once():
    def both():
        a = torch.ones(1000)
        return a + 1

    def one_after_the_other():
        for _ in range(5):
            torch.ones(1000)

    assert peak_bytes(both) == 8000
    assert peak_bytes(one_after_the_other) <= 8000


# ---- files and cells


def test_files_are_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "a" / "x.json"
    write_json(path, {"x": 1})

    def fail(*arguments):
        raise OSError("disk is gone")

    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", fail)
        with pytest.raises(OSError):
            write_text(path, "half")
    assert read_json(path) == {"x": 1} and [p.name for p in path.parent.iterdir()] == ["x.json"]
    with pytest.raises(ValueError):
        write_json(path, {"x": float("nan")})
    assert read_json(path) == {"x": 1}
    path.write_text("{")
    assert read_json(path) is None and read_json(tmp_path / "missing") is None


def cell(name, calls, settings=None, error=None):
    def measure(tick):
        if error is not None:
            raise error
        calls.append(name)
        tick(1)
        return {"value": name}

    return Cell("recall", name, 0, settings or {"steps": 1}, 1, measure)


def complete(run, planned):
    return run.complete(planned, CPU, "python -m eval", Console(quiet=True))


def test_a_cell_is_measured_once(tmp_path):
    run, calls = Run(tmp_path), []
    with pytest.raises(KeyboardInterrupt):
        complete(run, [cell("a", calls), cell("b", calls, error=KeyboardInterrupt()), cell("c", calls)])
    assert calls == ["a"]
    measured = complete(run, [cell(name, calls) for name in "abc"])
    assert calls == ["a", "b", "c"]
    assert [m["result"]["value"] for m in measured] == ["a", "b", "c"]  # in order, not as they were finished
    versions = measured[0]["provenance"]["versions"]
    assert versions["torch"] == torch.__version__  # with its build, which the distribution's version lacks
    assert versions["transformers"] == transformers.__version__
    again = complete(run, [cell(name, calls) for name in "abc"])
    assert again == measured and len(calls) == 3
    run.path(cell("b", calls)).write_text("{ damaged")
    complete(run, [cell(name, calls) for name in "abc"])
    assert calls == ["a", "b", "c", "b"]
    run.forget()
    complete(run, [cell("a", calls)])
    assert calls[-1] == "a"


def test_other_settings_are_refused_before_anything_is_measured(tmp_path):
    run, calls = Run(tmp_path), []
    complete(run, [cell("b", calls, {"steps": 1})])
    with pytest.raises(ValueError, match="steps 1, now 2.*--name.*--fresh"):
        complete(run, [cell("a", calls, {"steps": 2}), cell("b", calls, {"steps": 2})])
    assert calls == ["b"]


# ---- the command


def test_the_whole_run(tiny):
    """Every contestant on every task; then results, table and page; then again, where nothing is left to measure."""
    everyone = (*tiny, "--variants", ",".join(NAMES))
    first = invoke(*everyone)
    assert first.exit_code == 0, first.output
    folder = Path("runs/tiny")
    results = read_json(folder / report.RESULTS)
    assert list(results["summary"]) == NAMES
    for entry in results["summary"].values():
        assert set(entry["recall"]) == {"2", "8", "32"}
        assert all(0 <= s["correct"] <= s["asked"] > 0 for s in entry["recall"].values())
        assert 3 < entry["bits_per_byte"][0] < 12
        (scores,) = entry["abilities"].values()
        assert all(0 <= s["correct"] <= s["asked"] > 0 for s in scores.values())
    assert 3 < results["order0_bits_per_byte"] < 8
    assert len(list((folder / "cells").iterdir())) == 3 * len(NAMES) + 2
    page = BeautifulSoup((folder / report.PAGE).read_text(), "html.parser")
    rows = page.select_one(".panel table").select("tbody th[scope=row]")
    assert [row.text for row in rows][:-1] == [contestants.CONTESTANTS[name].label for name in NAMES]
    titles = [figure.h3.text for figure in page.select("figure.plot")]
    assert sorted(titles) == sorted(plot.title for plot in figures.figures(results))
    assert {"What each remembers", "Does a larger memory help with text?", "Bits per byte by training time"} < set(
        titles
    )
    assert "Claims of the papers" in page.text and "Who does best" in page.text
    bands = {plot.title: any(p.limits for s in plot.series for p in s.points) for plot in figures.figures(results)}
    documents = results["summary"]["transformer"]["by_document"][0]["bytes"]
    assert bands["What decoding costs: time"] and bands["Does more context help?"] == (len(documents) > 1)
    assert not page.select("script[src], link[href^=http]")  # nothing is fetched
    before = {path: path.stat().st_mtime_ns for path in (folder / "cells").iterdir()}
    second = invoke(*everyone)
    assert second.exit_code == 0 and f"{len(before)} of {len(before)} cells" in second.output
    assert {path: path.stat().st_mtime_ns for path in (folder / "cells").iterdir()} == before
    assert read_json(folder / report.RESULTS) == results
    another = invoke(*everyone, "--name", "another", "--reuse", str(folder / report.RESULTS))
    assert another.exit_code == 0 and f"{len(before)} of {len(before)} cells are taken from" in another.output
    assert read_json(Path("runs/another") / report.RESULTS) == results
    wrong = invoke(*everyone, "--name", "another", "--reuse", "nothing.json")
    assert wrong.exit_code == 2 and "nothing.json is missing or damaged" in wrong.output
    again = invoke("report", "tiny")
    assert again.exit_code == 0 and "Transformer-XL" in again.output
    blocks = invoke("report", "tiny", "--markdown").output.strip().split("\n\n")
    lengths = [len(block.splitlines()) for block in blocks][: 2 * len(tables.parts(results))]
    assert lengths == [1, 3 + len(NAMES)] * 3 + [1, 2 + len(NAMES)] * 3
    assert all(len({line.count("|") for line in block.splitlines()}) == 1 for block in blocks)
    for name in ("curves.png", "curves.svg"):
        assert invoke("report", str(folder / report.RESULTS), "--picture", name).exit_code == 0
    assert Path("curves.png").read_bytes().startswith(b"\x89PNG") and "Longformer" in Path("curves.svg").read_text()
    refused = invoke("report", "tiny", "--picture", "curves.pdf")
    assert refused.exit_code == 2 and "must end in .png or .svg" in refused.output


def test_the_same_run_gives_the_same_numbers(tiny):
    arguments = [
        *tiny,
        "--variants",
        "transformer_xl,memorizing_transformer",
        "--tasks",
        "recall,text",
        "--seeds",
        "2",
    ]
    found = []
    for name in ("one", "two"):
        result = invoke(*arguments, "--name", name)
        assert result.exit_code == 0, result.output
        found.append(read_json(Path("runs") / name / report.RESULTS)["summary"])
    assert found[0] == found[1]
    assert len(found[0]["transformer_xl"]["bits_per_byte"]) == 2
    assert len(set(found[0]["transformer_xl"]["bits_per_byte"])) == 2  # the seeds differ


def test_a_part_of_the_run(tiny):
    result = invoke(*tiny, "--variants", "longformer", "--tasks", "recall")
    assert result.exit_code == 0, result.output
    results = read_json(Path("runs/tiny") / report.RESULTS)
    assert list(results["summary"]) == ["longformer"] and "cost" not in results["summary"]["longformer"]
    ((_, heads, rows),) = tables.parts(results)
    assert heads == ["variant", "1/2x", "2x", "8x"] and len(rows) == 2


def test_parts_of_a_run_add_up(tiny):
    """Each command measures what it names; the results are all that the run has by these settings."""
    for part in (["longformer", "--tasks", "recall", "--seeds", "2"], ["transformer,longformer", "--tasks", "text"]):
        result = invoke(*tiny, "--variants", *part)
        assert result.exit_code == 0, result.output
    results = read_json(Path("runs/tiny") / report.RESULTS)
    summary = results["summary"]
    assert list(summary) == ["transformer", "longformer"] and "recall" not in summary["transformer"]
    asked = [cell["result"]["recall"]["2"]["asked"] for cell in results["cells"] if cell["task"] == "recall"]
    assert len(asked) == 2 and summary["longformer"]["recall"]["2"]["asked"] == sum(asked)
    assert all(len(entry["bits_per_byte"]) == 1 for entry in summary.values())
    other = invoke(*tiny, "--variants", "longformer", "--tasks", "permutations", "--share", "0.5")
    assert other.exit_code == 0, other.output
    cells = read_json(Path("runs/tiny") / report.RESULTS)["cells"]
    assert [cell["task"] for cell in cells] == ["permutations"]  # the rest was trained for longer


def test_a_share_of_the_training(tiny):
    result = invoke(*tiny, "--variants", "transformer", "--tasks", "recall,text", "--share", "0.5")
    assert result.exit_code == 0, result.output
    results = read_json(Path("runs/tiny") / report.RESULTS)
    steps = {cell["task"]: cell["settings"]["steps"] for cell in results["cells"]}
    assert steps == {"recall": TINY.recall.steps // 2, "text": round(TINY.text.steps / 2)}
    assert results["share"] == 0.5
    assert "50% of this preset's training steps" in (Path("runs/tiny") / report.PAGE).read_text()


def test_abilities_have_their_own_number_of_seeds(tiny, monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "tiny", dataclasses.replace(TINY, seeds=2))
    planned = [
        [(cell.task, cell.seed) for cell in benchmark.plan_by_names(preset, ["longformer"], tasks, seeds, "", CPU)]
        for preset, tasks, seeds in (
            (presets.PRESETS["tiny"], ["recall", "permutations"], None),
            (presets.PRESETS["tiny"], ["recall", "permutations"], 3),
        )
    ]
    assert planned[0] == [("recall", 0), ("permutations", 0), ("recall", 1)]
    assert sorted(planned[1]) == [(task, seed) for task in ("permutations", "recall") for seed in range(3)]


def test_learning_rates_are_chosen_on_validation_text(tiny, monkeypatch):
    """Each contestant's best of three; with it the run trains that contestant, and nobody else."""
    corpus, faster = load_corpus("corpus"), dataclasses.replace(TINY.text, learning_rate=2e-2)

    def bits_of_longformer(split):
        texts = DatasetDict(train=corpus["train"], test=corpus[split])
        chosen = contestants.CONTESTANTS["longformer"]
        return text.measure(chosen, faster, texts, 0, CPU, lambda units: None)["bits_per_byte"]

    command = ["rates", *tiny, "--variants", "transformer,longformer"]
    result = invoke(*command)
    assert result.exit_code == 0, result.output
    results = read_json(Path("runs/rates_tiny") / report.RESULTS)
    assert results["rates"] == [5e-3, 1e-2, 2e-2]
    for name, bits in results["bits_per_byte"].items():
        assert len(set(bits)) == 3 and results["chosen"][name] == results["rates"][bits.index(min(bits))]
    assert results["bits_per_byte"]["longformer"][2] == bits_of_longformer("validation")
    assert "6 of 6 cells are in" in invoke(*command).output

    monkeypatch.setitem(presets.PRESETS, "tiny", dataclasses.replace(TINY, learning_rates={"longformer": 2e-2}))
    result = invoke(*tiny, "--variants", "transformer,longformer", "--tasks", "recall,text")
    assert result.exit_code == 0, result.output
    cells = {(c["task"], c["contestant"]): c for c in read_json(Path("runs/tiny") / report.RESULTS)["cells"]}
    rates = {key: cell["settings"]["learning_rate"] for key, cell in cells.items()}
    assert rates.pop(("text", "longformer")) == 2e-2 and set(rates.values()) == {1e-2}
    assert cells["text", "longformer"]["result"]["bits_per_byte"] == bits_of_longformer("test")


def test_smaller_memories_are_asked_too(tiny):
    """Only of who has one, down to as many keys as are retrieved; the model's own size is back afterwards."""
    result = invoke(*tiny, "--variants", "transformer_xl,memorizing_transformer", "--tasks", "recall,text")
    assert result.exit_code == 0, result.output
    summary = read_json(Path("runs/tiny") / report.RESULTS)["summary"]
    assert "recall_by_memory_size" not in summary["transformer_xl"]
    entry = summary["memorizing_transformer"]
    assert list(entry["recall_by_memory_size"]) == ["4", "16"]
    assert set(entry["text_by_memory_size"]) == {"4", "16", "64"}
    whole = entry["text_by_memory_size"]["64"]
    assert whole["bits"] / whole["bytes"] == pytest.approx(entry["bits_per_byte"][0], rel=1e-6)
    stretches = entry["by_stretch_of_memory_size"]
    assert set(stretches) == {"4", "16", "64"} and stretches["64"] == entry["by_stretch"]
    assert len(stretches["4"][0]) == len(stretches["64"][0])
    model = contestants.build(contestants.CONTESTANTS["memorizing_transformer"], TINY_SIZES)
    sizes = [(size, model.config.memory_size) for size in contestants.smaller_memories(model)]
    assert sizes == [(4, 4), (16, 16)] and model.config.memory_size == 64


@pytest.mark.parametrize("change", [{"bf16": True}, pytest.param({"compile": True}, marks=pytest.mark.slow)], ids=str)
def test_mixed_precision_and_compiled(change, tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "x.txt").write_text("It was the best of times, it was the worst of times. " * 20)
    corpus, chosen = load_corpus(tmp_path), contestants.CONTESTANTS["transformer_xl"]
    plain, changed = (
        text.measure(chosen, dataclasses.replace(TINY.text, **settings), corpus, 0, CPU, lambda n: None)
        for settings in ({}, change)
    )
    assert changed["bits_per_byte"] == pytest.approx(plain["bits_per_byte"], rel=1e-2)
    if "bf16" in change:
        assert changed["bits_per_byte"] != plain["bits_per_byte"]  # it was in force


def test_stretches_hold_every_byte():
    bits = [np.arange(10.0), np.arange(2.0 * text.STRETCH + 5)]
    found = text.by_stretch(bits)
    assert len(found) == 3 and found[0] == 4.5
    assert np.mean(found[1:]) == pytest.approx(bits[1].mean(), rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "huge"], "--preset.*huge.*quick"),
        (["--variants", "transformer,lstm"], "--variants.*lstm.*transformer_xl"),
        (["--variants", ","], "--variants is empty"),
        (["--tasks", "chess"], "--tasks.*chess.*recall"),
        (["--device", "tpu"], "--device.*tpu.*auto"),
        (["--corpus", "nowhere", "--tasks", "text"], "nowhere.*does not exist"),
        (["report", "unknown"], "unknown.*python -m eval"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(presets.PRESETS, "quick", TINY)
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert re.search(message, result.output.replace("\n", " ")), result.output
    assert not list(tmp_path.rglob("*.json"))


def start_process(folder, steps, *arguments):
    """The command on the tiny preset in a process of its own."""
    program = (
        "import sys; sys.path.insert(0, {tests!r})\n"
        "from test_eval import TINY, presets, command_line, text\n"
        "import dataclasses, signal, torch\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell ignores it in what runs behind it
        "torch.set_num_threads(1)\n"
        "text.FREQUENT = 1\n"
        "slow = dataclasses.replace(TINY, recall=dataclasses.replace(TINY.recall, steps={steps}))\n"
        "presets.PRESETS['tiny'] = slow\n"
        "command_line.app(['--preset', 'tiny', *sys.argv[1:]])\n"
    ).format(tests=str(ROOT / "tests" / "eval"), steps=steps)
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_ctrl_c_keeps_what_is_done(tmp_path):
    """A real interrupt of a real process, after its first cell; then the run goes on."""
    process = start_process(tmp_path, 200, "--tasks", "recall", "--variants", "transformer,transformer_xl")
    done = tmp_path / "runs" / "tiny" / "cells" / "recall.transformer.0.json"
    end = time.monotonic() + 120
    while not done.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, (output, errors)
    assert "goes on from there" in " ".join(output.split()) and "Traceback" not in errors
    assert [path.name for path in done.parent.iterdir()] == [done.name]
    assert json.loads(done.read_text())["result"]["recall"]


@pytest.fixture
def interruptible():
    """Ctrl-C raises, also where a shell runs the suite in the background and has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_swallowed_interrupt_is_noticed(tmp_path, interruptible):
    """Some library catches everything: the cell in flight ends all the same, at its next tick."""

    def measure(tick):
        tick(1)
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGINT)
        tick(1)
        raise AssertionError("the tick did not raise")

    cell = Cell("recall", "transformer", 0, {}, 2, measure)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        Run(tmp_path).complete([cell], CPU, "test", Console(quiet=True))
    assert signal.getsignal(signal.SIGINT) is before and not list(tmp_path.rglob("*.json"))


def measured(path):
    """The results of a run but for what a clock, a date or a command line tells."""

    def strip(value):
        if isinstance(value, dict):
            told = {"seconds", "training_seconds", "provenance", "cost"}
            return {key: strip(entry) for key, entry in value.items() if key not in told}
        return [strip(entry) for entry in value] if isinstance(value, list) else value

    results = read_json(path)
    results["cells"] = [cell for cell in results["cells"] if cell["task"] != "cost"]
    return strip(results)


@pytest.mark.slow
def test_a_killed_run_ends_as_an_unbroken_one(tmp_path, tiny):
    """SIGKILL at random moments, which nothing can catch; the same command then ends with the same numbers."""
    arguments = ["--corpus", str(tmp_path / "corpus"), "--variants", "transformer_xl,memorizing_transformer"]
    names = ("unbroken", "killed")
    for name in names:
        (tmp_path / name).mkdir()
    output, errors = start_process(tmp_path / names[0], 30, *arguments).communicate(timeout=300)
    assert (tmp_path / names[0] / "runs/tiny/results.json").exists(), (output, errors)
    cells_folder = tmp_path / names[1] / "runs/tiny/cells"
    random, kills = np.random.default_rng(), 0
    while kills < 4:
        before = len(list(cells_folder.glob("*.json")))
        process = start_process(tmp_path / names[1], 30, *arguments)
        end = time.monotonic() + 120
        while len(list(cells_folder.glob("*.json"))) == before and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.5))
        process.kill()
        process.communicate(timeout=60)
        kills += 1
    output, errors = start_process(tmp_path / names[1], 30, *arguments).communicate(timeout=300)
    unbroken, killed = (measured(tmp_path / name / "runs/tiny/results.json") for name in names)
    assert unbroken["cells"] and unbroken == killed, (output, errors)


def test_the_attention_benchmark(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = attention.AttentionSettings(
        length=256, span=40, heads=2, head_dim=8, repeats=2, dense_repeats=1, memory_lengths=(256, 512)
    )
    monkeypatch.setattr(attention, "AttentionSettings", lambda **changes: small)
    result = invoke("attention")
    assert result.exit_code == 0, result.output
    saved = read_json(Path("runs/attention/results.json"))
    assert saved["largest_difference"] < 1e-4
    assert saved["largest_error_in_bfloat16"] < 0.02
    assert set(saved["milliseconds"]) >= {"eager", "eager, bfloat16", "sdpa", "dense"}
    assert saved["eager_growth_per_doubling"][0] < 2.3  # memory grows with T, not with its square


def test_who_takes_part():
    """All of them, or whoever is named."""
    assert benchmark.choose_contestants(None) == list(contestants.CONTESTANTS.values())
    assert [c.name for c in benchmark.choose_contestants("longformer_xl")] == ["longformer_xl"]


def test_nothing_but_benchmark_plans(tmp_path):
    """The plan is what is said: cells of every task, contestant and seed, each once."""
    chosen = benchmark.choose_contestants("transformer_xl,transformer")
    planned = benchmark.plan(TINY, chosen, list(benchmark.TASKS), 2, "stdlib", CPU)
    names = [c.name for c in planned]
    assert len(set(names)) == len(names) == 2 * 2 * (3 + len(abilities.ABILITIES) + len(published.PAPERS)) + 2
    assert names[:2] == ["recall.transformer.0", "recall.transformer_xl.0"]
    assert isinstance(planned[0], cells.Cell) and all(c.units > 0 for c in planned)
