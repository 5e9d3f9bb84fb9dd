"""Claims seed by seed: each seed is judged as if it were the only one."""

import copy
import json
from pathlib import Path

import pytest

from eval.benchmark import collect
from eval.cells import EVERYONE
from eval.claims import REPRODUCED, UNDECIDED, verdicts
from eval.presets import PRESETS
from eval.report import markdown
from eval.seeds import outcomes_by_seed
from eval.text import ORDER0

QUICK = json.loads((Path(__file__).parents[2] / "eval" / "results" / "quick.json").read_text())
FAR = "Transformer-XL remembers beyond its segment"


@pytest.fixture
def second():
    """The cells of one seed again, as of another."""
    cells = [copy.deepcopy(cell) for cell in QUICK["cells"] if cell["contestant"] not in (EVERYONE, ORDER0)]
    for cell in cells:
        cell["seed"] = 1
    return cells


def test_one_seed_has_nothing_to_be_held_against():
    assert outcomes_by_seed(QUICK) == {} and "seed by seed" not in markdown(QUICK)


def test_a_seed_that_measured_the_same_says_the_same(second):
    results = collect(PRESETS["quick"], [*QUICK["cells"], *second])
    alone = {verdict.claim: {verdict.outcome: 2} for verdict in verdicts(QUICK)}
    del alone["Longformer's training cost is linear in length"]  # costs have no seed
    assert outcomes_by_seed(results) == alone


def test_each_seed_is_judged_alone(second):
    """One in which two contestants know the same decides nothing of them, whatever both seeds decide together."""
    windowed = next(c for c in second if (c["task"], c["contestant"]) == ("recall", "transformer"))
    reaching = next(c for c in second if (c["task"], c["contestant"]) == ("recall", "transformer_xl"))
    reaching["result"]["recall"] = windowed["result"]["recall"]
    results = collect(PRESETS["quick"], [*QUICK["cells"], *second])
    assert {v.claim: v.outcome for v in verdicts(results)}[FAR] == REPRODUCED
    assert outcomes_by_seed(results)[FAR] == {REPRODUCED: 1, UNDECIDED: 1}
    assert f"| {FAR} | 1 | 1 | - |" in markdown(results)
