"""Tasks of papers in the benchmark: their published form is the papers', no preset measures them unasked, a small
model learns the easiest level, and what a model could do while it trained is kept with its result."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_eval import CPU, TINY, invoke

from eval import abilities, asking, benchmark, contestants, presets, published, report, training
from eval.compression import Compressor, sinusoids
from eval.task import Job
from hf_gallery.data import TASKS
from hf_gallery.files import read_json

FULL = contestants.CONTESTANTS["transformer_full"]
RESULTS = Path(__file__).parents[2] / "eval" / "results"
over_papers = pytest.mark.parametrize("name", published.PAPERS)


@over_papers
@pytest.mark.parametrize("preset", presets.PRESETS)
def test_levels_of_papers(name, preset):
    """Each can be made, in training and in tests, in a vocabulary that the model has, and shares no example."""
    paper, chosen = published.PAPERS[name], presets.PRESETS[preset]
    trials = paper.trials(chosen)
    assert len({trial.label for trial in trials}) == len(trials) >= 3
    for trial in trials:
        length = trial.arguments["length"]
        assert trial.sizes.vocabulary == trial.arguments["vocab_size"] and length <= trial.sizes.context
        if length <= 300:
            practised = TASKS[paper.task](8, **trial.arguments, **trial.practice, seed=1)
            asked = TASKS[paper.task](8, **trial.arguments, seed=1, split="test")
            assert max(map(max, practised["input_ids"])) < trial.sizes.vocabulary
            if length >= 8:
                assert not set(map(tuple, practised["input_ids"])) & set(map(tuple, asked["input_ids"]))


@pytest.mark.parametrize(("name", "preset"), [("mad_memorization", "quick"), ("mqar", "full"), ("mad_recall", "full")])
def test_contestants_of_papers_have_one_size(name, preset):
    trials = published.PAPERS[name].trials(presets.PRESETS[preset])
    for sizes in {
        json.dumps(dataclasses.asdict(trial.sizes)): trial.sizes for trial in (trials[0], trials[-1])
    }.values():
        with torch.device("meta"):
            counts = [contestants.build(c, sizes).num_parameters() for c in contestants.CONTESTANTS.values()]
        assert max(counts) / min(counts) < 1.03


def test_the_published_form():
    """Numbers of the papers' own configurations: Zoology's figure 2, MAD's configs/tasks."""
    full = presets.PRESETS["full"]
    points = published.PAPERS["mqar"].trials(full)
    grid = {(t.arguments["length"], t.arguments["num_kv_pairs"], t.sizes.hidden) for t in points}
    assert grid == {(n, k, w) for n, k in ((64, 4), (128, 8), (256, 16), (512, 64)) for w in (64, 128, 256, 512)}
    assert {(t.arguments["vocab_size"], t.rows, t.examples, t.sizes.layers) for t in points} == {
        (8192, 10**5, 3000, 2)
    }
    assert not any(t.arguments["random_non_queries"] for t in points)
    assert {t.steps * t.batch // t.rows for t in points} == {64}  # epochs
    changes = {"mad_recall": 11, "mad_noisy_recall": 14, "mad_fuzzy_recall": 11, "mad_compression": 11,
               "mad_memorization": 6, "mad_selective_copy": 13}  # fmt: skip
    for name, number in changes.items():
        first, *others = trials = published.PAPERS[name].trials(full)
        assert len(trials) == number and first.label == "baseline", name
        assert first.rows == (256 if name == "mad_memorization" else 12800) and first.examples == 1280
        assert {t.steps for t in others if t.rows == first.rows} | {first.steps} == {200 * first.rows // 128}
        assert all((t.sizes.hidden, t.sizes.layers, t.batch) == (128, 2, 128) for t in trials)
        for other in others:  # one thing at a time
            changed = [k for k in first.arguments if first.arguments[k] != other.arguments[k]]
            assert len(changed) + (first.rows != other.rows) == 1, other.label
        assert all(bool(t.practice.get("every_token")) == name.endswith("recall") for t in trials)
    noisy = published.PAPERS["mad_noisy_recall"].trials(full)[0].arguments
    assert noisy == {"length": 128, "vocab_size": 32, "noise_vocab_size": 16, "frac_noise": 0.2}
    short = published.PAPERS["mad_recall"].trials(full.shortened(0.5))
    assert short[0].steps == 10_000


def test_no_preset_measures_papers_unasked():
    """So that results in git stay what their commands would measure."""
    for preset in presets.PRESETS.values():
        assert not set(preset.tasks) & set(published.PAPERS)
    assert set(published.PAPERS) < set(benchmark.TASKS)


def test_epochs():
    """Every training example once before any comes again; the same batches for every contestant; fewer steps make
    fewer examples, which are the first of the many."""
    trial = next(published.PAPERS["mad_recall"].reduced(TINY.abilities))
    trial = dataclasses.replace(trial, rows=10, batch=4, steps=5)
    batches, again = (list(published.Epochs("mad_recall", trial, seed)) for seed in (3, 3))
    assert all(torch.equal(a[k], b[k]) for a, b in zip(batches, again, strict=True) for k in a)
    rows = [tuple(row) for batch in batches for row in batch["input_ids"].tolist()]
    made = [tuple(row) for row in TASKS["mad_recall"](10, **trial.arguments, seed=3)["input_ids"]]
    assert sorted(rows[:10]) == sorted(rows[10:]) == sorted(made)
    shorter = dataclasses.replace(trial, steps=1)
    (only,) = published.Epochs("mad_recall", shorter, 3)
    assert len(only["input_ids"]) == 4


# name: the easiest level, and steps enough; the model is a Transformer that sees everything
EASY = {
    "mqar": ({"length": 16, "vocab_size": 20, "num_kv_pairs": 2, "random_non_queries": False}, 350),
    "mad_recall": ({"length": 16, "vocab_size": 6}, 350),
    "mad_noisy_recall": ({"length": 16, "vocab_size": 8, "noise_vocab_size": 4}, 350),
    "mad_fuzzy_recall": ({"length": 15, "vocab_size": 6, "key_size": 1, "value_size": 2}, 350),
    "mad_compression": ({"length": 3, "vocab_size": 6}, 250),
    "mad_memorization": ({"length": 17, "vocab_size": 16}, 80),
    "mad_selective_copy": ({"length": 10, "vocab_size": 6, "num_tokens_to_copy": 2}, 300),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EASY)
def test_a_small_model_learns_the_easiest_level(name):
    """Above 90 % within seconds on one thread; its learning curve begins near a guess and ends near its score."""
    arguments, steps = EASY[name]
    sizes = dataclasses.replace(
        TINY.abilities.sizes, hidden=32, intermediate=64, context=64, vocabulary=arguments["vocab_size"]
    )
    trial = published.Trial("easy", arguments, sizes, 12800, 64, steps, learning_rate=5e-3, examples=100)
    found = published.measure(published.PAPERS[name], [trial], FULL, 0, CPU, lambda n: None)
    score, curve = found["levels"]["easy"], found["learning_curve"]["easy"]
    assert score["correct"] / score["asked"] > 0.9
    shares = [point["correct"] / point["asked"] for point in curve.values()]
    assert len(curve) == training.POINTS and list(curve)[-1] == str(steps)
    assert shares[0] < 0.8 and abs(shares[-1] - score["correct"] / score["asked"]) < 0.1


def test_a_cell_of_a_paper():
    """Every level is asked, and its result, curve among it, reaches the run's, added up over seeds."""
    job, task = Job(TINY, "", CPU), published.OfPaper("mad_compression")
    paper = task.paper
    task.paper = dataclasses.replace(paper, reduced=lambda settings: list(paper.reduced(settings))[:2])
    cells = []
    for seed in (0, 1):
        ticks: list[int] = []
        result = task.measure(job, contestants.CONTESTANTS["transformer"], seed, ticks.append)
        assert sum(ticks) == task.units(job)
        settings = task.settings(job)
        cells.append(dict(task=task.name, contestant="transformer", seed=seed, settings=settings, result=result))
    results = benchmark.collect(TINY, json.loads(json.dumps(cells)))
    entry = results["summary"]["transformer"]
    labels = [trial.label for trial in task.paper.trials(TINY)]
    assert list(entry["abilities"][task.name]) == list(entry["learning_curves"][task.name]) == labels
    for label in labels:
        parts = [cell["result"] for cell in cells]
        total = entry["abilities"][task.name][label]
        assert total["asked"] == sum(part["levels"][label]["asked"] for part in parts) > 0
        assert len(total["by_unit"]["asked"].split()) == 2 * TINY.abilities.examples
        for step, point in entry["learning_curves"][task.name][label].items():
            assert point["asked"] == sum(part["learning_curve"][label][step]["asked"] for part in parts) > 0
    assert results["abilities"][task.name]["title"] == paper.title
    assert task.columns(results)[0].cell("transformer", entry).endswith(("%", "% *"))


@pytest.mark.slow
def test_the_command_measures_papers(monkeypatch, tmp_path):
    """Those that are named; its table and page have them."""
    monkeypatch.setitem(presets.PRESETS, "tiny", TINY)
    monkeypatch.chdir(tmp_path)
    names = ["mqar", "mad_memorization"]
    result = invoke("--preset", "tiny", "--tasks", ",".join(names), "--variants", "transformer,transformer_xl")
    assert result.exit_code == 0, result.output
    results = read_json(Path("runs/tiny") / report.RESULTS)
    assert list(results["abilities"]) == names
    for entry in results["summary"].values():
        assert list(entry["abilities"]) == list(entry["learning_curves"]) == names
    page = (Path("runs/tiny") / report.PAGE).read_text()
    assert all(published.PAPERS[name].title in page for name in names)


# ---- learning curves


SLOW = [pytest.param(n, marks=pytest.mark.slow) for n in ("transformer_xl", "block_recurrent_transformer")]


@pytest.mark.parametrize("name", ["memorizing_transformer", *SLOW])
def test_watching_changes_nothing(name):
    """The weights are those of a model that trained unwatched, bit for bit."""
    settings = dataclasses.replace(TINY.abilities, steps=25)
    trained = []
    for watched in (True, False):
        examples = abilities._watched(abilities.ability("permutations", settings), settings, 0)
        curve = abilities.LearningCurve(examples, CPU) if watched else None
        batches = abilities.Levels("permutations", settings, 0)
        chosen = contestants.CONTESTANTS[name]
        trained.append(training.learn(chosen, settings, batches, 0, CPU, lambda n: None, watch=curve))
        if curve is not None:
            assert all(len(points) == training.POINTS for points in curve.found.values())
            assert {points.popitem()[0] for points in curve.found.values()} == {"25"}
    for first, second in zip(*(model.state_dict().values() for model in trained), strict=True):
        assert torch.equal(first, second)


def test_curves_are_of_held_out_examples():
    settings = dataclasses.replace(TINY.abilities, steps=12)
    found = abilities.ability("permutations", settings)
    trained = {
        str(row) for batch in abilities.Levels("permutations", settings, 0) for row in batch["input_ids"].tolist()
    }
    for level, rows in abilities._watched(found, settings, 0).items():
        arguments = next(x.arguments for x in found.levels if x.label == level)
        asked = TASKS[found.task](9, **arguments, seed=0, split="test")
        if arguments["length"] >= 12:
            assert not {str(row) for row in rows["input_ids"]} & (trained | {str(row) for row in asked["input_ids"]})


def test_a_run_without_curves_loads():
    """As all cells before them are."""
    cells = json.loads((RESULTS / "standard.json").read_text())["cells"]
    cells = [cell for cell in cells if cell["task"] == "permutations"]
    assert cells and all(cell["result"].pop("learning_curve") for cell in cells)
    results = benchmark.collect(presets.PRESETS["standard"], cells)
    assert all("learning_curves" not in entry for entry in results["summary"].values())


def test_asking_counts_every_scored_token():
    """Whoever knows the answers gets them all, in both places of labels, and a stubborn one its share."""
    rows = TASKS["mad_recall"](70, 24, vocab_size=6, seed=2)
    labels = np.array(rows["labels"])

    class Knows:
        def __init__(self, ahead):
            self.ahead, self.seen = ahead, 0

        def __call__(self, input_ids):
            said = torch.tensor(labels[self.seen : self.seen + len(input_ids)]).clamp(min=0)
            self.seen += len(input_ids)
            logits = torch.nn.functional.one_hot(said.roll(-self.ahead, 1), 6).float()
            return type("Output", (), {"logits": logits})

    asked = int((labels >= 0).sum())
    for in_place in (False, True):
        right, wrong = (asking.ask(Knows(ahead), rows, CPU, in_place=in_place) for ahead in (not in_place, in_place))
        assert right["asked"] == right["correct"] == wrong["asked"] == asked and wrong["correct"] < asked
        assert right["by_unit"]["asked"].split() == [str(n) for n in (labels >= 0).sum(axis=1)]


# ---- the decoder of compression


def test_compression_reads_one_state():
    """Whatever the decoder says follows from the last state alone, in which all columns have a part."""
    sizes = dataclasses.replace(TINY.abilities.sizes, vocabulary=8)
    model = Compressor(contestants.build(FULL, sizes)).double().eval()
    ids = torch.randint(0, 7, (3, 9))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        state = model.encoder(input_ids=ids).last_hidden_state[:, -1]
        logits = model(ids).logits
        for t in range(9):
            angles = [t / 10000 ** (i / (sizes.hidden // 2 - 1)) for i in range(sizes.hidden // 2)]
            place = torch.tensor([*map(np.sin, angles), *map(np.cos, angles)], dtype=torch.float64)
            torch.testing.assert_close(logits[:, t], model.decoder(state + place), rtol=1e-5, atol=1e-6)
        other = ids.clone()
        other[:, 0] = (other[:, 0] + 1) % 7
        assert ((model(other).logits - logits).abs().amax(-1) > 0).all()
    labels = ids.clone()
    labels[:, -1] = -100
    loss = model(ids, labels).loss
    expected = -torch.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, :-1, None]).mean()
    torch.testing.assert_close(loss, expected.to(loss.dtype), rtol=1e-5, atol=1e-6)
    assert sinusoids(5, torch.empty(2, 6)).shape == (5, 6)
