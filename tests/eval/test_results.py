"""The measured results in git: what the project says of itself holds in them, and each says where it comes from."""

import dataclasses
import datetime
import json
from pathlib import Path

import pytest

from eval import benchmark, claims, peers, rates, report
from eval.code import told
from eval.contestants import CONTESTANTS
from eval.presets import PRESETS
from eval.published import PAPERS
from eval.seeds import outcomes_by_seed
from eval.significance import SURE, two_proportions, wilson
from eval.task import plain

FOLDER = Path(__file__).parents[2] / "eval" / "results"
LATER = ("longformer_xl", "recurrent_memory_transformer", "recurrent_memory_transformer_few")  # not in long.json
BOUNDED = [c.name for c in CONTESTANTS.values() if c.carries in ("keys", "state") and c.name not in LATER]


def load(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def quick():
    return load("quick")


def recall(results, name, windows):
    """Right answers and questions of a contestant at a distance of that number of windows."""
    score = results["summary"][name]["recall"][str(round(windows * results["window"]["recall"]))]
    return score["correct"], score["asked"]


def surely_better(first, second):
    (a, m), (b, n) = first, second
    return a / m > b / n and two_proportions(a, m, b, n) < SURE


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_every_number_has_its_origin(path):
    results = json.loads(path.read_text())
    for measured in results.get("cells", [results]):
        origin = measured["provenance"]
        assert origin["command"].startswith("python -m eval") and "/" not in origin["command"]
        assert origin["commit"] and not origin["commit"].endswith("+"), "measured on code that no commit holds"
        assert {"torch", "transformers", "python"} <= origin["versions"].keys() and origin["machine"]["processor"]


@pytest.mark.parametrize("name", ["quick", "seeds", "outside", "torch_2.13", "standard", "books"])
def test_runs_are_of_this_code(name):
    """Of the settings that the preset has now, so that the same command would measure the same."""
    results = load(name)
    preset = PRESETS[results["preset"]].shortened(results["share"])
    if name == "books":  # measured at one learning rate for all
        text = dataclasses.replace(preset.text, learning_rate=2e-3)
        preset = dataclasses.replace(preset, learning_rates={}, text=text)
    collected = benchmark.collect(preset, results["cells"])
    assert collected == {key: value for key, value in results.items() if key != "peers"}  # peers are measured apart
    assert report.parts(results) and report.markdown(results)
    tasks = {"recall": "recall", "text": "text", "cost": "cost"}
    for cell in results["cells"]:
        settings = plain(preset.of(cell["contestant"]))[tasks.get(cell["task"], "abilities")]
        if cell["task"] in PAPERS:
            settings = {"trials": [plain(trial) for trial in PAPERS[cell["task"]].trials(preset)]}
        assert settings.items() <= cell["settings"].items(), cell["task"]
    for task in {cell["task"] for cell in results["cells"]} - {"cost"}:
        found = [cell["result"] for cell in results["cells"] if cell["task"] == task]
        parameters = [x["parameters"] for x in found if "parameters" in x]  # the baseline of text has none
        assert max(parameters) < 1.03 * min(parameters), task


@pytest.mark.parametrize("path", sorted(FOLDER.glob("rates_*.json")), ids=lambda path: path.stem)
def test_presets_train_text_at_the_rates_that_were_chosen(path):
    results = json.loads(path.read_text())
    preset = PRESETS[results["preset"]].shortened(results["share"])
    assert rates.collect(preset, results["cells"]) == results
    assert results["chosen"].items() <= preset.learning_rates.items()


def test_every_contestant_has_a_rate_that_was_chosen():
    """Of a preset that has any: each of the gallery's, and of those from outside the ones that were tried."""
    for preset in PRESETS.values():
        files = [load(path.stem) for path in FOLDER.glob("rates_*.json")]
        chosen = [name for results in files if results["preset"] == preset.name for name in results["chosen"]]
        assert sorted(chosen) == sorted(preset.learning_rates)
        assert not chosen or CONTESTANTS.keys() <= set(chosen)


def test_the_quick_run_takes_minutes(quick):
    """All contestants: the trained cells, from the beginning of the first to the end of the last, and the costs."""
    assert {c.name for c in CONTESTANTS.values()} == set(quick["summary"])
    trained = [cell for cell in quick["cells"] if cell["task"] != "cost"]
    ends = [datetime.datetime.fromisoformat(cell["provenance"]["date"]).timestamp() for cell in trained]
    begins = [end - cell["seconds"] for end, cell in zip(ends, trained, strict=True)]
    costs = sum(cell["seconds"] for cell in quick["cells"] if cell["task"] == "cost")
    assert max(ends) - min(begins) + costs < 12 * 60
    assert {cell["provenance"]["machine"]["cores"] for cell in quick["cells"]} == {2}


def test_the_quick_run_shows_what_each_architecture_is_for(quick):
    for windows in (2, 4, 8):
        correct, asked = recall(quick, "transformer", windows)
        low, high = wilson(correct, asked)
        assert low - 0.03 < quick["chance"] < high + 0.03  # a window and no more: it guesses
    windowed = recall(quick, "transformer", 2)
    assert recall(quick, "transformer_xl", 2)[0] > 0.5 * recall(quick, "transformer_xl", 2)[1]
    assert surely_better(recall(quick, "longformer", 2), windowed)  # through depth
    assert recall(quick, "memorizing_transformer", 8)[0] > 0.9 * recall(quick, "memorizing_transformer", 8)[1]
    for windows in (2, 4):
        assert surely_better(
            recall(quick, "block_recurrent_transformer", windows), recall(quick, "transformer", windows)
        )
    for name, entry in quick["summary"].items():
        assert max(entry["bits_per_byte"]) < quick["order0_bits_per_byte"] - 0.5, name


def test_what_is_said_of_recall_holds_with_every_seed():
    """Of the quick run, by itself; all of it was measured by one version of the code."""
    results = load("seeds")
    assert {cell["seed"] for cell in results["cells"] if cell["task"] == "recall"} == {0, 1, 2, 3}
    assert told(results["cells"]).endswith("by one version of the code that decides them")
    of_recall = {verdict.claim for verdict in claims.verdicts(results) if " right " in verdict.evidence}
    by_seed = outcomes_by_seed(results)
    assert len(of_recall) == 8 and all(by_seed[claim] == {"reproduced": 4} for claim in of_recall)


def test_the_standard_run_has_seeds_of_one_version():
    """Three of recall and text, one of some abilities, and the costs: of every contestant."""
    results = load("standard")
    cells = results["cells"]
    made = {(cell["task"], cell["contestant"], cell["seed"]) for cell in cells}
    expected = {(task, name, seed) for task in ("recall", "text") for name in CONTESTANTS for seed in range(3)}
    expected |= {(ability, name, 0) for ability in results["abilities"] for name in CONTESTANTS}
    assert made == expected | {("text", "order0", 0), ("cost", "all", 0)}
    assert all("cost" in results["summary"][name] for name in CONTESTANTS)
    assert told(cells).endswith("by one version of the code that decides them")
    assert cells[0]["provenance"]["commit"][:7] in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "windows"),
    [
        ("transformer_full", 8),
        ("transformer_xl", 2),
        ("longformer", 1),
        ("longformer_xl", 2),
        ("memorizing_transformer", 8),
        ("block_recurrent_transformer", 1),
        ("recurrent_memory_transformer", 4),
    ],
)
def test_recall_is_learned_with_every_seed_and_torch(name, windows):
    """As far as an architecture surely reaches, each point of the quick run agrees within five points."""
    runs = [load(file) for file in ("seeds", "torch_2.13")]
    assert len({cell["provenance"]["versions"]["torch"] for run in runs for cell in run["cells"]}) == 2
    cells = [cell for run in runs for cell in run["cells"] if (cell["task"], cell["contestant"]) == ("recall", name)]
    assert len(cells) == 7
    for distance in cells[0]["result"]["recall"]:
        if int(distance) <= windows * runs[0]["window"]["recall"]:
            scores = [cell["result"]["recall"][distance] for cell in cells]
            found = [score["correct"] / score["asked"] for score in scores]
            assert max(found) - min(found) <= 0.05 and min(found) > 0.95, (distance, found)


def test_every_claim_of_the_papers_is_judged():
    """By the standard run or the quick one."""
    judged = {verdict.claim for name in ("standard", "quick") for verdict in claims.verdicts(load(name))}
    assert judged == {claim for claim, _, _ in claims.CLAIMS}


def test_attention_keeps_up_with_fused_kernels():
    results = load("attention")
    assert (results["settings"]["length"], results["settings"]["span"]) == (4096, 256)
    assert results["ratio_to_best_fused"]["eager"] <= 1.3
    assert max(results["eager_growth_per_doubling"]) < 2.1  # of memory, from 2,048 tokens on


def test_memory_costs_little():
    results = load("memory")
    assert (results["settings"]["memory_size"], results["settings"]["topk"]) == (8192, 32)
    assert results["ratio_to_off"]["exact"] <= 1.5


def test_a_token_after_a_long_text_costs_what_it_costs_after_a_short_one():
    results = load("long")
    assert results["settings"]["long"] == 100_000
    for name in BOUNDED:
        variant = results["variants"][name]
        assert variant["decode_ratio"] <= 1.1, name
        assert variant["cache_bytes"]["long"] == variant["cache_bytes"]["short"], name
    assert results["variants"]["memorizing_transformer"]["decode_ratio"] > 0  # reported; it searches what it holds


def test_the_gallery_beside_its_peers():
    """Results that miss their aims are told, with their figures, in eval/results/README.md."""
    page = (FOLDER / "README.md").read_text()
    measured = load("peers")["peers"]
    assert list(measured) == list(peers.PEERS)
    for name, entry in measured.items():
        peer, numbers = peers.PEERS[name], peers.judged(name, entry)
        assert entry["target"] == peer.target
        ratio, now = numbers["ratio"], 100 * numbers["utilisation"]
        need = now * peer.target / ratio
        row = f"| {peer.label} | {ratio:.2f} | {peer.target:g} | {now:.0f} % | {need:.0f} % |"
        assert (row in page) == (ratio < peer.target), (name, row)
    reached = [name for name, entry in measured.items() if peers.judged(name, entry)["ratio"] >= entry["target"]]
    assert reached == ["transformer_xl_decode", "transformer_sdpa"]
    for name in ("longformer", "transformer_xl_train", "memorizing_transformer", "block_recurrent_transformer"):
        assert min(measured[name][time]["ratio"] for time in ("clock", "one_thread")) > 1, name
    for time in ("clock", "one_thread"):
        slowest, fastest = measured["transformer_sdpa"][time]["ratio_of_rounds"]
        assert slowest < 1 < fastest
