"""`python -m eval compare`: what both runs measured, held side by side, and chance told from change."""

import copy
import json
import math
from pathlib import Path

import pytest
from scipy.stats import chi2_contingency, ttest_rel
from typer.testing import CliRunner

from eval.cli import app
from eval.compare import differences
from eval.significance import two_proportions

QUICK = Path(__file__).parents[2] / "eval" / "results" / "quick.json"


@pytest.fixture
def results():
    return json.loads(QUICK.read_text())


def test_a_run_differs_from_itself_nowhere(results):
    found = differences(results, results)
    assert {d.contestant for d in found} == {e["label"] for e in results["summary"].values()}
    assert all(d.before == d.after and not d.sure for d in found)


@pytest.mark.parametrize("counts", [(40, 100, 60, 100), (1, 512, 5, 500), (0, 10, 0, 20), (7, 7, 9, 9)])
def test_two_proportions_is_the_chi_square_test(counts):
    a, n, b, m = counts
    got = two_proportions(a, n, b, m)
    if 0 < a + b < n + m:
        assert math.isclose(got, chi2_contingency([[a, n - a], [b, m - b]], correction=False).pvalue, rel_tol=1e-9)
    else:
        assert got == 1.0
    assert two_proportions(0, 0, b, m) is None


def test_what_is_more_than_chance_is_marked(results):
    other = copy.deepcopy(results)
    entry = other["summary"]["longformer"]
    score = next(s for s in entry["recall"].values() if s["correct"] == s["asked"])
    score["correct"] //= 2
    label = entry["label"]
    assert [d.contestant for d in differences(results, other) if d.sure] == [label]


def test_seeds_are_paired_where_documents_are_not_known(results):
    for name in ("by_document", "by_stretch"):
        results["summary"]["longformer"].pop(name, None)
    first, second = copy.deepcopy(results), copy.deepcopy(results)
    before, after = [3.0, 3.5, 4.0], [2.9, 3.41, 3.88]
    first["summary"]["longformer"]["bits_per_byte"] = before
    second["summary"]["longformer"]["bits_per_byte"] = after
    (d,) = [d for d in differences(first, second) if d.what == "bits per byte" and d.contestant == "Longformer"]
    assert math.isclose(d.chance.probability, ttest_rel(before, after).pvalue, rel_tol=1e-9) and d.sure


def test_the_command(tmp_path, results):
    results["summary"].pop("longformer")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "results.json").write_text(json.dumps(results))
    run = CliRunner().invoke(app, ["compare", str(QUICK), "mine", "--runs", str(tmp_path)], env={"COLUMNS": "200"})
    assert run.exit_code == 0, run.output
    assert "│ Transformer-XL " in run.output and "│ Longformer " not in run.output
    (tmp_path / "mine").rename(tmp_path / "quick")  # of one name, they are told apart by what was typed
    run = CliRunner().invoke(app, ["compare", str(QUICK), "quick", "--runs", str(tmp_path)], env={"COLUMNS": "400"})
    assert f"{QUICK} and quick" in run.output
    (tmp_path / "quick").rename(tmp_path / "mine")
    missing = CliRunner().invoke(app, ["compare", str(QUICK), "nothing", "--runs", str(tmp_path)])
    assert missing.exit_code == 2 and "missing or damaged" in " ".join(missing.output.split())
    results["summary"].clear()
    (tmp_path / "mine" / "results.json").write_text(json.dumps(results))
    nothing = CliRunner().invoke(app, ["compare", str(QUICK), "mine", "--runs", str(tmp_path)])
    assert nothing.exit_code == 2 and "nothing that both have" in " ".join(nothing.output.split())
