"""The table of what works says what the tests said, in one process and in several."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from works import parse, render, replaced, result

EMPTY = "before\n\n<!-- works -->\n<!-- /works -->\n\nafter\n"
COLUMNS = {
    "transformer": "Transformer",
    "transformer_xl": "Transformer-XL",
    "longformer": "Longformer",
    "memorizing": "Memorizing",
    "block_recurrent": "Block-Recurrent",
}
CONFTEST = """
from works import Works

COLUMNS = {columns}

def pytest_addoption(parser):
    parser.addoption("--works")
    parser.addoption("--check-works")

def pytest_configure(config):
    config.addinivalue_line("markers", "works(ability, *variants): of the table")
    config.addinivalue_line("markers", "slow: takes long")
    config.pluginmanager.register(Works(config, COLUMNS))
"""
TESTS = """
import pytest

@pytest.mark.works("flies")
@pytest.mark.parametrize("variant", ["transformer", "transformer_xl_adaptive", "longformer"])
def test_flies(variant):
    if variant == "longformer":
        pytest.skip("no wings")
    assert variant == "transformer"

@pytest.mark.works("swims", "transformer", "longformer")
@pytest.mark.works("flies", "longformer")
def test_swims():
    pass

@pytest.mark.slow
@pytest.mark.works("runs", "memorizing")
def test_runs():
    pass

@pytest.mark.works("runs", "block_recurrent")
@pytest.mark.xfail(strict=True)
def test_cannot_run():
    assert False

@pytest.mark.works("sleeps", "longformer")
@pytest.mark.skipif(True, reason="it is day")
def test_sleeps():
    pass
"""
TABLE = """before

<!-- works -->
| ability | Transformer | Transformer-XL | Longformer | Memorizing | Block-Recurrent |
|---|:---:|:---:|:---:|:---:|:---:|
| flies | yes | no | yes [1] | - | - |
| swims | yes | - | yes | - | - |
| runs | - | - | - | yes | no |
| sleeps | - | - | skipped [2] | - | - |

[1] no wings  
[2] it is day
<!-- /works -->

after
"""  # noqa: W291


@pytest.fixture
def suite(tmp_path):
    (tmp_path / "conftest.py").write_text(CONFTEST.replace("{columns}", repr(COLUMNS)))
    (tmp_path / "test_animals.py").write_text(TESTS)
    (tmp_path / "README.md").write_text(EMPTY)

    def run(*arguments, **environment):
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tmp_path, *arguments],
            cwd=tmp_path,
            env=os.environ
            | {"PYTHONPATH": str(Path(__file__).parents[1]), "PYTEST_ADDOPTS": "", "CI": ""}
            | environment,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr, (tmp_path / "README.md").read_text()

    return run


@pytest.mark.parametrize("processes", [0, 2])
def test_a_run_writes_what_its_tests_said(suite, processes):
    code, output, text = suite("-n", str(processes), "--works", "README.md")
    assert code == 1 and "1 failed" in output  # the failure of a test stays one
    assert parse(text, COLUMNS) == parse(TABLE, COLUMNS)
    if processes == 0:
        assert text == TABLE


def test_cells_that_did_not_run_stay_and_those_without_a_test_go(suite, tmp_path):
    gone = TABLE.replace("| runs |", "| hums | yes | - | - | - | - |\n| runs |")
    (tmp_path / "README.md").write_text(gone)
    assert suite("-n", "0", "-k", "swims", "--works", "README.md")[2].count("hums") == 1
    assert suite("-n", "0", "-m", "not slow", "--works", "README.md")[2] == TABLE


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["-k", "swims"], 0), (["-k", "swims or sleeps or runs"], 1), (["-k", "runs"], 1)],
    ids=["same", "other", "other-alone"],
)
def test_a_table_that_says_something_else_is_an_error(suite, tmp_path, arguments, code):
    (tmp_path / "README.md").write_text(TABLE.replace("| runs | - | - | - | yes |", "| runs | - | - | - | no |"))
    before = (tmp_path / "README.md").read_text()
    found, output, text = suite("-n", "0", *arguments, "--check-works", "README.md")
    assert found == code and text == before
    assert ("runs, Memorizing is 'no', tests say 'yes'" in output) == bool(code)


def test_a_yes_that_only_skips_is_an_error_in_ci(suite, tmp_path):
    """One that a skipped and a passing test stand behind is none, nor is a cell that says so."""
    (tmp_path / "README.md").write_text(TABLE.replace("skipped [2]", "yes"))
    chosen = "(flies or swims or sleeps) and not adaptive"  # which fails
    arguments = ("-n", "0", "-k", chosen, "--check-works", "README.md")
    assert suite(*arguments)[0] == 0
    code, output, _ = suite(*arguments, CI="true")
    assert code == 1 and output.count("tests say") == 1
    assert "sleeps, Longformer is 'yes', tests say 'skipped'" in output
    (tmp_path / "README.md").write_text(TABLE)
    assert suite(*arguments, CI="true")[0] == 0


def test_rows_stand_by_their_kind():
    """Whatever order tests ran in; rows of one kind, and rows of none, keep theirs."""
    abilities = ["swims", "TRL packing", "resume", "generate, beams", "TRL SFTTrainer", "flies", "generate"]
    cells = {(ability, "longformer"): ("yes", ()) for ability in abilities}
    cells["flies", "longformer"], cells["generate", "longformer"] = ("yes", ("day",)), ("yes", ("night",))
    table = render(cells, COLUMNS)
    rows = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if line.startswith("| ")][1:]
    assert rows == ["generate, beams", "generate", "resume", "TRL packing", "TRL SFTTrainer", "swims", "flies"]
    assert table.endswith("[1] night  \n[2] day")
    assert render(parse(f"<!-- works -->\n{table}\n<!-- /works -->", COLUMNS), COLUMNS) == table


@pytest.mark.parametrize("mark", ["works()", 'works("flies", "bert")'])
def test_a_mark_without_ability_or_variant_is_refused(suite, tmp_path, mark):
    (tmp_path / "test_animals.py").write_text(f"import pytest\n\n@pytest.mark.{mark}\ndef test_it(): pass\n")
    code, output, _ = suite("-n", "0")
    assert code == pytest.ExitCode.USAGE_ERROR and "works" in output and "INTERNALERROR" not in output


def test_a_cell_is_as_good_as_its_worst_test():
    assert result([("passed", ""), ("failed", "")]) == ("no", ())
    assert result([("skipped", "b"), ("passed", ""), ("skipped", "a")]) == ("yes", ("a", "b"))
    assert result([("skipped", "a")]) == ("skipped", ("a",))


def test_a_table_reads_as_it_was_written():
    assert replaced(EMPTY, render(parse(TABLE, COLUMNS), COLUMNS)) == TABLE
    for broken in ("", "<!-- works -->", "<!-- /works --><!-- works -->"):
        with pytest.raises(ValueError, match="must hold"):
            parse(broken, COLUMNS)
