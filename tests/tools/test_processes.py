"""One run by several processes: each measures its share alone, and together they find what one would."""

import dataclasses
import functools
import multiprocessing
import os
import subprocess
import sys
import time

import psutil
import pytest
import torch
from rich.console import Console
from test_eval import CPU, ROOT, TINY, measured, start_process, tiny  # noqa: F401, a fixture

from eval import benchmark, processes
from eval import workers as eval_workers
from eval.cells import EVERYONE, Cell, Run
from eval.processes import Process, this_process
from eval.workers import WorkerError, Workers


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    """The environment of a process that nobody launched, put back afterwards."""
    for name in (*processes.LAUNCHED, processes.USE_CPU, processes.DEVICES):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def launched(monkeypatch, rank, of, local):
    told = {"RANK": rank, "WORLD_SIZE": of, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "x"}
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize(("gpus", "own"), [(0, None), (1, "0"), (4, "0")])
def test_a_plain_start_is_alone(monkeypatch, gpus, own):
    """And keeps to one GPU, or a Trainer would split its batches over all of them."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert this_process() == Process(0, 1, 1) and os.environ.get(processes.DEVICES) == own


@pytest.mark.parametrize(
    ("visible", "gpus", "own"),
    [(None, 4, "1"), (None, 1, "0"), (None, 0, None), ("4,6", 2, "6"), ("4", 1, "4"), ("", 0, "")],
    ids=str,
)
def test_a_launched_process_has_its_own_device(monkeypatch, visible, gpus, own):
    launched(monkeypatch, 3, 4, local=1)
    if visible is not None:
        monkeypatch.setenv(processes.DEVICES, visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert this_process() == Process(3, 4, 2)
    assert os.environ.get(processes.DEVICES) == own and not set(processes.LAUNCHED) & set(os.environ)
    assert this_process() == Process(0, 1, 1)  # a Trainer that looks now finds nobody either


def test_what_accelerate_is_set_to_decides_nothing_but_the_device(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv(processes.USE_CPU, "True")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    this_process()
    assert os.environ[processes.DEVICES] == ""  # no GPU to be seen
    assert not [name for name in os.environ if name.startswith(processes.ACCELERATE)]


@pytest.mark.parametrize(("of", "here", "shared", "alone"), [(1, 1, 1, 1), (2, 2, 3, 6), (8, 8, 1, 6), (4, 2, 3, 6)])
def test_cores_are_shared_until_the_others_are_done(monkeypatch, tmp_path, _threads, of, here, shared, alone):
    """One process leaves torch's threads as they are, one here."""
    monkeypatch.setattr(processes, "cores", lambda: 6)
    threads = []
    cells = [
        Cell("recall", name, 0, {}, 1, lambda tick: threads.append(torch.get_num_threads()))
        for name in (EVERYONE, *"abcdefgh"[:of])
    ]
    for rank in reversed(range(of)):  # the main process last: it waits for the others
        torch.set_num_threads(1)
        Run(tmp_path).complete(cells, CPU, "python -m eval", Console(quiet=True), Process(rank, of, here))
    assert threads == [shared] * of + [alone]


@pytest.mark.slow
def test_two_processes_find_what_one_does(tmp_path, tiny):  # noqa: F811
    """Though they were killed in between, and started by torchrun before and by accelerate after."""
    arguments = ["--corpus", str(tmp_path / "corpus"), "--variants", "transformer,transformer_xl"]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = start_process(tmp_path / "one", 50, *arguments)
    output, errors = one.communicate(timeout=300)
    assert one.returncode == 0, (output, errors)
    program = tmp_path / "two" / "program.py"
    program.write_text(one.args[2].replace("command_line.app(", "processes.cores = lambda: 2; command_line.app("))
    program.write_text("from eval import processes\n" + program.read_text())

    def launch(*launcher):
        return subprocess.Popen(
            [sys.executable, "-m", *launcher, str(program), *arguments],
            cwd=tmp_path / "two",
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    killed = launch("torch.distributed.run", "--nproc_per_node", "2")
    cells, end = tmp_path / "two/runs/tiny/cells", time.monotonic() + 120
    while not list(cells.glob("*.json")) and killed.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    for process in [*psutil.Process(killed.pid).children(recursive=True), killed]:  # workers have their own sessions
        process.kill()
    killed.communicate()
    kept = {path.name: path.read_bytes() for path in cells.glob("*.json")}
    assert 0 < len(kept) < 8
    # multi_gpu is how accelerate starts several processes on one machine, with GPUs or without
    two = launch("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")
    output, errors = two.communicate(timeout=300)
    assert two.returncode == 0, (output, errors)
    assert output.count("results  ") == 1  # one of them tells
    assert all((cells / name).read_bytes() == content for name, content in kept.items())
    results = [measured(tmp_path / name / "runs/tiny/results.json") for name in ("one", "two")]
    assert results[0] == results[1]


# ---- workers of one command


def planned(tmp_path, preset, names=("transformer", "transformer_xl")):
    """Workers for the recall cells of a preset, and the cells' names."""
    arguments = (preset, list(names), ["recall"], 1, "stdlib", CPU)
    plan = functools.partial(benchmark.plan_by_names, *arguments)
    return Workers(2, plan, tmp_path, CPU, "python -m eval"), [cell.name for cell in plan()]


@pytest.mark.slow
def test_workers_find_what_one_process_does(tmp_path):
    """Each cell once, and their work as it is done."""
    preset = dataclasses.replace(TINY, recall=dataclasses.replace(TINY.recall, steps=4))
    workers, names = planned(tmp_path / "two", preset)
    ticks, found = dict.fromkeys(names, 0), {}
    for name, report in workers.measure(names):
        if isinstance(report, int):
            ticks[name] += report
        else:
            assert name not in found
            found[name] = report
    cells = benchmark.plan_by_names(preset, ["transformer", "transformer_xl"], ["recall"], 1, "stdlib", CPU)
    assert ticks == {cell.name: cell.units for cell in cells}
    for cell in cells:
        alone = Run(tmp_path / "one").measure_one(cell, lambda units: None, CPU, "python -m eval")
        assert alone["result"] == found[cell.name]["result"] and Run(tmp_path / "two").read(cell) == found[cell.name]


@pytest.mark.slow
def test_a_worker_that_fails_or_ends_is_told(tmp_path):
    """In the first process, which ends the others."""
    wrong = dataclasses.replace(TINY.recall, sizes=dataclasses.replace(TINY.recall.sizes, heads=7))
    workers, names = planned(tmp_path, dataclasses.replace(TINY, recall=wrong))
    with pytest.raises(WorkerError, match=r"recall\.transformer(_xl)?\.0 failed:\n(.|\n)*ValueError"):
        list(workers.measure(names))
    long = dataclasses.replace(TINY, recall=dataclasses.replace(TINY.recall, steps=100_000))
    workers, names = planned(tmp_path, long)
    reports = workers.measure(names)
    next(reports)
    children = multiprocessing.active_children()
    children[0].kill()
    with pytest.raises(WorkerError, match="has ended"):
        list(reports)
    for child in children:
        child.join(30)
        assert not child.is_alive()


@pytest.mark.parametrize(
    ("device", "asked", "free", "many"),
    [("cpu", None, 64, 4), ("cpu", None, 5, 2), ("cpu", None, 1, 1), ("cpu", 3, 1, 3), ("cuda", None, 64, 1)],
)
def test_how_many_workers(monkeypatch, device, asked, free, many):
    monkeypatch.setattr(eval_workers, "cores", lambda: 4)
    memory = psutil.virtual_memory()._replace(available=free * 2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert eval_workers.count(torch.device(device), asked) == many
