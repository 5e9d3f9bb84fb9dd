"""One run by several processes: each measures its share alone, and together they find what one would."""

import os
import subprocess
import sys

import pytest
from test_eval import ROOT, measured, start_process, tiny  # noqa: F401, a fixture

from eval import processes
from eval.processes import Process, this_process


def test_a_plain_start_is_alone(monkeypatch):
    for name in processes.LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv(processes.DEVICES, raising=False)
    assert this_process() == Process(0, 1) and processes.DEVICES not in os.environ


@pytest.mark.parametrize(("visible", "own"), [("", "1"), ("4,6", "6"), ("4", "4")])
def test_a_launched_process_has_its_own_device(monkeypatch, visible, own):
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "x"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(processes.DEVICES, visible)
    assert this_process() == Process(3, 4)
    assert os.environ[processes.DEVICES] == own and not set(processes.LAUNCHED) & set(os.environ)
    assert this_process() == Process(0, 1)  # a Trainer that looks now finds nobody either


@pytest.mark.slow
def test_two_processes_find_what_one_does(tmp_path, tiny):  # noqa: F811
    arguments = ["--corpus", str(tmp_path / "corpus"), "--variants", "transformer,transformer_xl"]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = start_process(tmp_path / "one", 10, *arguments)
    output, errors = one.communicate(timeout=300)
    assert one.returncode == 0, (output, errors)
    program = tmp_path / "two" / "program.py"
    program.write_text(one.args[2])
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(program), *arguments]
    two = subprocess.run(
        launch,
        cwd=tmp_path / "two",
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert two.returncode == 0, two.stdout + two.stderr
    assert two.stdout.count("results  ") == 1  # one of them tells
    results = [measured(tmp_path / name / "runs/tiny/results.json") for name in ("one", "two")]
    assert results[0] == results[1]
