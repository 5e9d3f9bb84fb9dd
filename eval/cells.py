"""A run is a folder of cells, each measured once: runs/NAME/cells/TASK.CONTESTANT.SEED.json.

A cell is written as soon as it is done, with the settings that it was measured with, so that a run can be stopped at
any time and goes on where it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from transformers.utils import logging as transformers_logging

from hf_gallery.files import read_json, write_json

from .machine import provenance
from .processes import Process
from .training import Tick
from .workers import Workers

EVERYONE = "all"  # in place of a contestant's name where one cell measures all of them in turns


@contextlib.contextmanager
def interrupts() -> Iterator[Callable[[], None]]:
    """Ctrl-C raises KeyboardInterrupt at once, as ever; what this yields raises it again, for the case that some
    library's `except:` or callback has swallowed it."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler or not _in_main_thread():
        yield lambda: None  # whoever runs us has a handler of their own
        return
    came = threading.Event()

    def remember(number, frame):
        came.set()
        signal.default_int_handler(number, frame)

    def check():
        if came.is_set():
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, remember)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@dataclasses.dataclass(frozen=True)
class Cell:
    """One measurement. settings: everything that decides its result, as JSON has it. units: ticks of its work. code:
    the hash of the code that decides it, see code.fingerprint; none where several versions may decide it, as where a
    training goes on from checkpoints."""

    task: str
    contestant: str
    seed: int
    settings: dict[str, Any]
    units: int
    measure: Callable[[Tick], Any]
    code: str = ""

    @property
    def name(self) -> str:
        return f"{self.task}.{self.contestant}.{self.seed}"


class Step(enum.Enum):
    """Action of a process on a cell: measures it beside the others, waits until another has, or measures it when all
    others are done."""

    OWN = enum.auto()
    WAIT = enum.auto()
    TOGETHER = enum.auto()


def schedule(cells: list[Cell], missing: list[Cell], process: Process) -> list[tuple[Step, Cell]]:
    """Steps of one process, in order, so that no cell is measured twice and the main process ends with all.

    Splits all cells, not the missing ones: a process that starts later would see a different list.
    """
    shared = [cell for cell in cells if cell.contestant != EVERYONE]
    own = [cell for cell in shared[process.rank :: process.of] if cell in missing]
    if not process.is_main:
        return [(Step.OWN, cell) for cell in own]
    others = [cell for cell in shared if cell in missing and cell not in own]
    together = [cell for cell in missing if cell.contestant == EVERYONE]
    return [
        *((Step.OWN, cell) for cell in own),
        *((Step.WAIT, cell) for cell in others),
        *((Step.TOGETHER, cell) for cell in together),
    ]


class _Bars:
    """A bar of all cells, and one of the cell in work. check: raises if Ctrl-C came; every tick asks it."""

    def __init__(self, console: Console, check: Callable[[], None]):
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
        )
        self.progress, self.check = Progress(*columns, console=console, speed_estimate_period=120), check
        self.whole = self.progress.add_task("all cells", total=None)
        self.parts: dict[str, TaskID] = {}

    def __enter__(self) -> _Bars:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def expect(self, units: int) -> None:
        """Says how many ticks there will be."""
        self.progress.update(self.whole, total=units)

    def advance(self, units: int) -> None:
        """Moves the bar of all cells."""
        self.progress.advance(self.whole, units)

    def begin(self, cell: Cell) -> Tick:
        """A bar of one cell; gives what moves both."""
        part = self.progress.add_task(f"  {cell.task} {cell.contestant}, seed {cell.seed}", total=cell.units)
        self.parts[cell.name] = part

        def tick(units: int) -> None:
            self.check()
            self.progress.advance(part, units)
            self.advance(units)

        return tick

    def end(self, cell: Cell, seconds: float) -> None:
        """Takes a cell's bar away, and says that it is done."""
        self.progress.remove_task(self.parts.pop(cell.name))
        self.progress.console.print(Text.assemble(("done", "green"), f" {cell.name} ({seconds:.0f} s)"))


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps what transformers logs, and its progress bars, out of ours."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


class Run:
    """The folder of one run."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, cell: Cell) -> Path:
        return self.folder / "cells" / f"{cell.name}.json"

    def saved(self) -> list[dict[str, Any]]:
        """Every cell in the folder, but those whose files are damaged."""
        cells = (read_json(path) for path in sorted((self.folder / "cells").glob("*.json")))
        return [cell for cell in cells if _is_whole(cell)]

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """The saved cell; None if it was not measured yet, or its file is damaged.

        Raises ValueError if it was measured with other settings.
        """
        saved = read_json(self.path(cell))
        if not _is_whole(saved):
            return None
        if saved["settings"] != cell.settings:
            wrong = ", ".join(
                f"{key} {saved['settings'].get(key)!r}, now {value!r}"
                for key, value in cell.settings.items()
                if saved["settings"].get(key) != value
            )
            raise ValueError(
                f"{self.path(cell)} was measured with other settings ({wrong}); give this run another --name, or "
                "measure all of it anew with --fresh"
            )
        return saved

    def adopt(self, results: dict[str, Any], cells: list[Cell]) -> int:
        """Takes into the folder, of those cells that it has not, what results of another run hold of them, where it
        was measured with their settings. Returns how many these are.

        Raises ValueError before anything is taken if a saved cell was measured with other settings.
        """
        found = {(entry["task"], entry["contestant"], entry["seed"]): entry for entry in results["cells"]}
        missing = {(c.task, c.contestant, c.seed): c for c in cells if self.read(c) is None}
        alike = {
            self.path(missing[key]): entry
            for key, entry in found.items()
            if key in missing and _is_whole(entry) and entry["settings"] == missing[key].settings
        }
        for path, entry in alike.items():
            write_json(path, entry)
        return len(alike)

    def forget(self) -> None:
        """Removes every saved cell."""
        for path in (self.folder / "cells").glob("*.json"):
            path.unlink()

    def complete(
        self,
        cells: list[Cell],
        device: torch.device,
        command: str,
        console: Console,
        process: Process = Process(),  # noqa: B008, it is frozen
        workers: Workers | None = None,
        stale: bool = False,
    ) -> list[dict[str, Any]]:
        """All cells, measuring those that are missing, in their order, under a progress bar. Of several processes each
        measures its share (see `schedule`), and only the main one waits for all. Processes of one machine share its
        cores until then. With workers they measure side by side what one process has to do. Cells that other
        code has measured stay as they are, and it is said how many they are; with `stale` they are measured anew.

        Raises ValueError before anything is measured if a saved cell was measured with other settings.
        """
        saved = {cell.name: self.read(cell) for cell in cells}
        old = [cell for cell in cells if is_stale(cell, saved[cell.name])]
        missing = [cell for cell in cells if saved[cell.name] is None or (stale and cell in old)]
        if len(missing) < len(cells):
            console.print(f"{len(cells) - len(missing)} of {len(cells)} cells are in {self.folder} already")
        if old:
            doing = "and are measured anew" if stale else "and stay; --stale measures them anew"
            console.print(f"{len(old)} of {len(cells)} cells were measured by other code than this, {doing}")
        if missing:
            process.share_cores()
            with quiet_transformers(), interrupts() as check, _Bars(console, check) as bars:
                steps = schedule(cells, missing, process)
                bars.expect(sum(cell.units for _, cell in steps))
                if workers is not None:
                    beside = [cell for step, cell in steps if step is Step.OWN]
                    saved |= self._by_workers(workers, beside, bars)
                    steps = [(step, cell) for step, cell in steps if step is not Step.OWN]
                for step, cell in steps:
                    if step is Step.WAIT:
                        saved[cell.name] = self._wait_for(cell, stale)
                        bars.advance(cell.units)
                        continue
                    if step is Step.TOGETHER:
                        process.take_all_cores()
                    found = saved[cell.name] = self.measure_one(cell, bars.begin(cell), device, command)
                    bars.end(cell, found["seconds"])
        return [cell for cell in saved.values() if cell is not None]

    def measure_one(self, cell: Cell, tick: Tick, device: torch.device, command: str) -> dict[str, Any]:
        """Measures a cell and writes it, with its settings and where its numbers come from."""
        start = time.perf_counter()
        result = cell.measure(tick)
        saved = {
            "task": cell.task,
            "contestant": cell.contestant,
            "seed": cell.seed,
            "settings": cell.settings,
            **({"code": cell.code} if cell.code else {}),
            "result": result,
            "seconds": time.perf_counter() - start,
            "provenance": provenance(device, command),
        }
        write_json(self.path(cell), saved)
        return saved

    def _by_workers(self, workers: Workers, cells: list[Cell], bars: _Bars) -> dict[str, dict[str, Any]]:
        """Measures cells side by side."""
        by_name, ticks, saved = {cell.name: cell for cell in cells}, {}, {}
        # Of a seed the last first: they take longest, and when little is left the short ones share the cores better.
        order = sorted(reversed(by_name), key=lambda name: by_name[name].seed)
        with contextlib.closing(workers.measure(order)) as reports:
            for name, report in reports:
                if name not in ticks:
                    ticks[name] = bars.begin(by_name[name])
                if isinstance(report, int):
                    ticks[name](report)
                else:
                    saved[name] = report
                    bars.end(by_name[name], report["seconds"])
        return saved

    def _wait_for(self, cell: Cell, stale: bool) -> dict[str, Any]:
        """The cell as soon as another process has measured it, with `stale` by this code. A launcher ends all
        processes if one of them fails."""
        while (found := self.read(cell)) is None or (stale and is_stale(cell, found)):
            time.sleep(0.2)
        return found


def is_stale(cell: Cell, saved: dict[str, Any] | None) -> bool:
    """Tells whether a saved cell was measured by other code than the present one, or does not say by what code."""
    return bool(cell.code) and saved is not None and saved.get("code") != cell.code


def _is_whole(saved: Any) -> bool:
    return isinstance(saved, dict) and "result" in saved and "settings" in saved
