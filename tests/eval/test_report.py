"""`python -m eval report` reads and never destroys; what users type or files hold breaks neither tables nor errors."""

import copy
import dataclasses
import json
import re
from pathlib import Path

import pytest
from bs4 import BeautifulSoup
from matplotlib import pyplot
from typer.testing import CliRunner

from eval import figures, pictures, report, tables
from eval.cli import app

STANDARD = Path(__file__).parents[2] / "eval" / "results" / "standard.json"


def invoke(*arguments, width=80):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": str(width)})


@pytest.fixture(scope="module")
def results():
    return json.loads(STANDARD.read_text())


@pytest.fixture
def run(tmp_path, results):
    """A run that holds peers, in a folder where `peers` was never measured."""
    path = tmp_path / "runs" / "mine" / "results.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(results))
    return path


def test_a_report_leaves_the_results_as_they_are(run):
    before = run.read_bytes()
    said = invoke("report", "mine", "--runs", run.parents[1])
    assert said.exit_code == 0, said.output
    assert run.read_bytes() == before
    page = (run.parent / "report.html").read_text()
    assert "Speed-up" in page and "Speed-up" in said.output


def test_a_report_on_a_file_writes_a_page_beside_it(run):
    assert invoke("report", run).exit_code == 0 and (run.parent / "report.html").exists()
    other = run.rename(run.parent / "other.json")
    said = invoke("report", other)
    assert said.exit_code == 0 and "other.html" in said.output.replace("\n", "")
    assert (run.parent / "other.html").read_text().startswith("<!doctype html>")


def test_every_number_of_the_peers_can_be_read_at_80_columns(run, results):
    said = invoke("report", run).output
    _, rows = report.peers.table(results["peers"])
    assert max(map(len, said.splitlines())) <= 80
    for *_, time, ours, theirs, ratio, share, target in rows:
        numbers = f"{time.split(',')[0]} {ours} {theirs} {ratio} {share} {target}".split()
        assert any(line.split()[-len(numbers) :] == numbers for line in said.splitlines()), numbers


@pytest.mark.parametrize("said", ["[/]", "[red]", "x[/b]y"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["--variants"],
        ["--tasks"],
        ["--preset"],
        ["--device"],
        ["--tasks", "text", "--corpus"],
        ["report"],
        ["report", STANDARD, "--picture"],
        ["compare", STANDARD],
        ["peers", "--only"],
    ],
    ids=lambda arguments: arguments[-1],
)
def test_square_brackets_are_text(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused = invoke(*arguments, said, width=400)
    assert refused.exit_code == 2 and said in refused.output, refused.output
    assert refused.exception is None or isinstance(refused.exception, SystemExit)


def test_square_brackets_in_a_run_are_shown(run):
    strange = run.parent.rename(run.parent.with_name("[red]mine[b]"))
    said = invoke("report", strange.name, "--runs", strange.parent, width=400)
    assert said.exit_code == 0 and "[red]mine[b]" in said.output
    changed = json.loads((strange / "results.json").read_text())
    changed["summary"]["longformer"]["label"] = "Long[/]former"
    (strange / "results.json").write_text(json.dumps(changed))
    assert "Long[/]former" in invoke("report", strange.name, "--runs", strange.parent, width=200).output
    compared = invoke("compare", strange / "results.json", STANDARD, width=200)
    assert compared.exit_code == 0 and "Long[/]former" in compared.output


def test_what_results_hold_is_text_on_the_page(results):
    """No label, reach, setting or command of a file is taken for HTML, nor ends the script that draws."""
    strange = "<b>&amp;</b></script><script>alert('x')</script>"
    changed = copy.deepcopy(results)
    changed["summary"]["longformer"].update(label=strange, reach=strange)
    changed["settings"]["about"] = changed["cells"][0]["provenance"]["command"] = strange
    for ability in changed["abilities"].values():
        ability["title"] = ability["about"] = strange
    page = BeautifulSoup(report.page(changed), "html.parser")
    assert [script.get("id") for script in page.find_all("script")] == ["csv", "json", "data", None]
    scripts = "".join(script.string for script in page.find_all("script"))
    assert strange not in scripts and "\\u003cb\\u003e" in scripts
    for script in page.find_all("script"):
        script.extract()
    assert page.get_text().count(strange) > 20 and "&amp;amp;" not in page.find("main").text


CHANGES = {
    "no window": lambda r: r.pop("window"),
    "a list for the summary": lambda r: r.update(summary=[1, 2]),
    "a text for a number": lambda r: r["summary"]["longformer"]["recall"]["8"].update(correct="many"),
    "no label": lambda r: r["summary"]["longformer"].pop("label"),
    "no slopes": lambda r: r["summary"]["longformer"]["cost"].pop("slopes"),
    "half of the peers": lambda r: r["peers"].pop("settings"),
    "cells of nobody": lambda r: r.update(cells=[{}]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_results_that_a_hand_has_changed_are_refused_in_a_line(change, run, results):
    changed = copy.deepcopy(results)
    CHANGES[change](changed)
    run.write_text(json.dumps(changed))
    for arguments in (["report", run], ["report", run, "--markdown"], ["compare", run, STANDARD]):
        refused = invoke(*arguments, width=400)
        assert refused.exit_code == 2, refused.output
        assert re.fullmatch(r"error \S+ is not as `python -m eval` writes it \(.+\); .+", refused.output.strip())


@pytest.mark.parametrize(
    "arguments", [["--tasks", "recall", "--runs"], ["memory", "--runs"], ["peers", "--only", "transformer", "--runs"]]
)
def test_runs_that_cannot_be_made_are_refused_before_anything_is_measured(arguments, tmp_path):
    (tmp_path / "file").write_text("in the way")
    refused = invoke(*arguments, tmp_path / "file", width=400)
    assert refused.exit_code == 2 and isinstance(refused.exception, SystemExit)
    assert re.match(r"error no folder can be made at \S+ \(.+\); give another --runs", refused.output)


def test_a_page_that_cannot_be_written_is_refused(run):
    (run.parent / "report.html").mkdir()
    refused = invoke("report", run, width=400)
    assert refused.exit_code == 2 and isinstance(refused.exception, SystemExit)


def test_any_number_of_contestants_is_drawn(results, tmp_path):
    """Also those that this version does not know."""
    many = copy.deepcopy(results)
    for i in range(9):
        many["summary"][f"newcomer_{i}"] = results["summary"]["longformer"] | {"label": f"Newcomer {i}"}
    pictures.forgetting_curves(many, tmp_path / "many.svg")
    assert "Newcomer 8" in (tmp_path / "many.svg").read_text()
    assert (
        len(figures.figures(many)[0].series) == len(results["summary"]) + 9
        and report.page(many).count("Newcomer 8") > 5
    )
    pyplot.close("all")


def test_all_columns_belong_to_a_family_and_its_part(results):
    """The parts show every column, once, with the families' prefixes in their titles."""
    found = tables.parts(results)
    assert sum(len(heads) - 1 for _, heads, _ in found) == len(tables.columns(results))
    assert found[0][1][:2] == ["variant", "1/4x"]
    assert all(len(row) == len(heads) for _, heads, rows in found for row in rows)
    for column in tables.columns(results):
        assert dataclasses.is_dataclass(column) and column.heading in column.whole
