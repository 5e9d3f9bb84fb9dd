"""Cells side by side on the cores of one machine: `python -m eval` without a GPU.

The models are so small that two threads hardly train one of them faster than one thread does. So as many cells are
measured at once as there are cores, each on one thread. The costs, which are times, wait until all else is done.
"""

from __future__ import annotations

import multiprocessing
import queue
import signal
import traceback
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import psutil
import torch

from .processes import cores

MEMORY = 2 * 2**30  # bytes that a worker may need


def count(device: torch.device, asked: int | None = None) -> int:
    """Workers to start: as many as asked; or one for each core that has memory enough, and one for a GPU, which the
    cells of one process fill."""
    if asked is not None:
        return asked
    if device.type != "cpu":
        return 1
    return max(1, min(cores(), psutil.virtual_memory().available // MEMORY))


class WorkerError(RuntimeError):
    """A cell that failed in a worker, or a worker that ended before its cell."""


class Workers:
    """Processes that each measure one cell after another, whichever is next.

    plan: makes the cells anew in a worker, since what measures them cannot be sent there; it must pickle. folder,
    device, command: as Run.measure_one takes them.
    """

    def __init__(self, count: int, plan: Callable[[], list[Any]], folder: Path, device: torch.device, command: str):
        self.count, self.arguments = count, (plan, folder, device, command)

    def measure(self, names: list[str]) -> Generator[tuple[str, Any], None, None]:
        """Measures the cells of these names and writes them. Yields, as it happens, (name, ticks of its work that are
        done now) and at its end (name, the saved cell).

        Raises WorkerError, with what it said, if a cell fails or its worker ends. All workers end with the iterator.
        """
        context = multiprocessing.get_context("spawn")  # a fork of a process with threads of torch's may hang
        wanted, reports = context.Queue(), context.Queue()
        for name in names:
            wanted.put(name)
        processes = [
            context.Process(target=_work, args=(wanted, reports, *self.arguments), daemon=True)
            for _ in range(min(self.count, len(names)))
        ]
        for process in processes:
            process.start()
        left = set(names)
        try:
            while left:
                if not all(process.is_alive() for process in processes):  # also while the others go on reporting
                    raise WorkerError(
                        "a process that measured cells has ended, maybe for want of memory; the same command goes "
                        "on where it was, with --workers 1 one cell at a time"
                    )
                try:
                    name, report, error = reports.get(timeout=1)
                except queue.Empty:
                    continue
                if error:
                    raise WorkerError(f"{name} failed:\n{error}")
                if not isinstance(report, int):
                    left.discard(name)
                yield name, report
            for _ in processes:
                wanted.put(None)
            for process in processes:
                process.join(timeout=10)  # one that is terminated leaves semaphores behind
        finally:
            for process in processes:
                process.terminate()


def _work(
    wanted: Any, reports: Any, plan: Callable[[], list[Any]], folder: Path, device: torch.device, command: str
) -> None:
    """The life of a worker: it measures what is wanted, and ends with the process that started it."""
    from .cells import Run, quiet_transformers

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C comes to all of them, and the first one ends the others
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    cells = {cell.name: cell for cell in plan()}
    with quiet_transformers():
        while (name := wanted.get()) is not None:

            def tick(units: int, name: str = name) -> None:
                if parent is not None and not parent.is_alive():
                    raise SystemExit(1)
                reports.put((name, units, None))

            tick(0)
            try:
                reports.put((name, Run(folder).measure_one(cells[name], tick, device, command), None))
            except Exception:  # whatever it is, the user reads it in the first process
                reports.put((name, None, traceback.format_exc()))
