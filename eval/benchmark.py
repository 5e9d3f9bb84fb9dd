"""The main job: every contestant, every task, every seed, then one table, one JSON file and one page."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from .abilities import ABILITIES, LearnedAbility
from .cells import Cell, Run
from .classification import Bytes
from .contestants import CONTESTANTS, Contestant
from .cost import Cost
from .presets import Preset
from .published import PAPERS, OfPaper
from .recall import Recall
from .task import Job, Task, plain
from .text import Text

TASKS: dict[str, Task] = {
    task.name: task
    for task in (Recall(), *map(LearnedAbility, ABILITIES), *map(OfPaper, PAPERS), Text(), Bytes(), Cost())
}


def plan(
    preset: Preset,
    contestants: list[Contestant],
    tasks: list[str],
    seeds: int,
    corpus: str,
    device: torch.device,
) -> list[Cell]:
    """The cells of a run, in the order in which they are measured: all contestants at one seed, then at the next."""
    job, chosen = Job(preset, corpus, device), [task for name, task in TASKS.items() if name in tasks]
    cells = [cell for seed in range(seeds) for task in chosen for cell in task.cells(job, contestants, seed)]
    return cells + [cell for task in chosen for cell in task.cells_of_all(job, contestants)]


def plan_by_names(
    preset: Preset, names: list[str], tasks: list[str], seeds: int, corpus: str, device: torch.device
) -> list[Cell]:
    """The same for contestants by name, as it can be asked of another process."""
    return plan(preset, [CONTESTANTS[name] for name in names], tasks, seeds, corpus, device)


def measured(run: Run, preset: Preset, corpus: str, device: torch.device) -> list[dict[str, Any]]:
    """The cells in a folder that these settings would give, in the order of a plan for everyone: what one command
    has measured stands beside what other commands have measured in the same run."""
    saved = {(cell["task"], cell["contestant"], cell["seed"]): cell for cell in run.saved()}
    seeds = 1 + max((seed for _, _, seed in saved), default=0)
    found = []
    for cell in plan(preset, list(CONTESTANTS.values()), list(TASKS), seeds, corpus, device):
        known = saved.get((cell.task, cell.contestant, cell.seed))
        # Costs are of some contestants or of all, in one cell.
        if known is not None and known["settings"] | {"contestants": None} == cell.settings | {"contestants": None}:
            found.append(known)
    return found


def collect(preset: Preset, cells: list[dict[str, Any]]) -> dict[str, Any]:
    """All of a run in one value: the cells as measured, and by contestant what the table and the page show.

    recall: distance -> asked and correct, added up over seeds, and by_unit, those of each example, seed after seed;
    the same for abilities, by name and level, and recall_by_memory_size by size. learning_curves: ability -> level ->
    steps -> asked and correct on held-out examples, added up over seeds; not of cells older than it. bits_per_byte,
    by_document, by_stretch and training_curve: by seed, and by_document_of_memory_size and by_stretch_of_memory_size
    by size and seed; by_position, by_last_use and text_by_memory_size: bits and bytes, added up over seeds. cost: as
    measured.
    """
    present = {name for cell in cells for name in (cell["contestant"], *cell["settings"].get("contestants", ()))}
    asked = {cell["task"] for cell in cells}
    # Neither text nor device says anything of what an ability is.
    abouts = {name: task.about(Job(preset, "", torch.device("cpu"))) for name, task in TASKS.items() if name in asked}
    results: dict[str, Any] = {
        "preset": preset.name,
        "share": preset.share,
        "settings": plain(preset),
        "window": {"recall": preset.recall.sizes.window, "text": preset.text.sizes.window},
        "chance": 1 / preset.recall.num_values,
        "order0_bits_per_byte": None,
        "abilities": {name: about for name, about in abouts.items() if about is not None},
        "summary": {c.name: {"label": c.label, "reach": c.reach} for c in CONTESTANTS.values() if c.name in present},
        "cells": cells,
    }
    for cell in cells:
        TASKS[cell["task"]].add(results, cell)
    return results


def choose(names: str | None, choices: Collection[str], argument: str) -> list[str]:
    """The names in a comma-separated list; all of them for None. Raises ValueError for one that is not known."""
    if names is None:
        return list(choices)
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    for name in chosen:
        if name not in choices:
            raise ValueError(f"{argument} names {name!r}; choose from {', '.join(choices)}")
    if not chosen:
        raise ValueError(f"{argument} is empty; choose from {', '.join(choices)}")
    return [name for name in choices if name in chosen]


def choose_contestants(names: str | None) -> list[Contestant]:
    """The contestants in a comma-separated list, in the table's order; all for None."""
    return [CONTESTANTS[name] for name in choose(names, CONTESTANTS, "--variants")]


def choose_device(name: str) -> torch.device:
    """auto: the GPU if there is one. Raises ValueError for a device that torch cannot reach."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, and torch finds no GPU here; leave it at auto, or say cpu")
    if name not in ("cpu", "cuda"):
        raise ValueError(f"--device is {name!r}; it must be auto, cpu or cuda")
    return torch.device(name)
