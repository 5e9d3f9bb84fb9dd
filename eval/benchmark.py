"""The main job: every contestant, every task, every seed, then one table, one JSON file and one page."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from . import outside
from .abilities import ABILITIES, LearnedAbility
from .cells import EVERYONE, Cell, Run
from .classification import Bytes
from .code import told
from .contestants import CONTESTANTS, Contestant, build
from .cost import Cost
from .presets import Preset
from .published import PAPERS, OfPaper
from .recall import Recall
from .task import Job, Task, plain
from .text import ORDER0, Text

KNOWN: dict[str, Contestant] = CONTESTANTS | outside.OUTSIDE
TASKS: dict[str, Task] = {
    task.name: task
    for task in (Recall(), *map(LearnedAbility, ABILITIES), *map(OfPaper, PAPERS), Text(), Bytes(), Cost())
}


def plan(
    preset: Preset,
    contestants: list[Contestant],
    tasks: list[str],
    seeds: int | None,
    corpus: str,
    device: torch.device,
) -> list[Cell]:
    """The cells of a run, in the order in which they are measured: all contestants at one seed, then at the next.
    seeds: of every task; None for the preset's own numbers."""
    job, chosen = Job(preset, corpus, device), [task for name, task in TASKS.items() if name in tasks]
    of = {task.name: seeds or preset.seeds_of(task.name) for task in chosen}
    turns = [(seed, task) for seed in range(max(of.values(), default=0)) for task in chosen if seed < of[task.name]]
    cells = [cell for seed, task in turns for cell in task.cells(job, contestants, seed)]
    return cells + [cell for task in chosen for cell in task.cells_of_all(job, contestants)]


def plan_by_names(
    preset: Preset,
    names: list[str],
    tasks: list[str],
    seeds: int | None,
    corpus: str,
    device: torch.device,
    *,
    own: dict[str, dict[str, Any]] | None = None,
) -> list[Cell]:
    """The same for contestants by name, as it can be asked of another process. own: arguments of the configurations of
    a user's own contestants.

    Raises ValueError for a contestant from outside that cannot do a task.
    """
    contestants = [KNOWN[name] for name in names] + [outside.own(name, found) for name, found in (own or {}).items()]
    job = Job(preset, corpus, device)
    for contestant in contestants:
        if contestant.name not in CONTESTANTS:
            _admit(contestant, [TASKS[name] for name in tasks], job)
    return plan(preset, contestants, tasks, seeds, corpus, device)


def _admit(contestant: Contestant, tasks: list[Task], job: Job) -> None:
    """Raises ValueError for a contestant from outside that cannot do a task."""
    for task in tasks:
        if isinstance(task, Bytes):
            raise ValueError(
                f"{contestant.name} is from outside the gallery and takes no part in the task bytes, for which it has "
                "no classifier that could be compared; name the others with --tasks"
            )
        if contestant.own is None:
            continue
        model = build(contestant, job.preset.text.sizes)  # refuses a vocabulary that is too small
        if outside.looks_ahead(model):
            raise ValueError(
                f"{contestant.name} sees tokens that come later, so it would be told what it is asked for; give the "
                "configuration of a causal model, for some types by is_decoder true"
            )
        reach = outside.positions(model.config) if outside.is_foreign(model.config) else None
        if reach is not None and reach < task.longest(job):
            raise ValueError(
                f"{contestant.name} reads {reach:,} tokens at most (max_position_embeddings), and the task "
                f"{task.name} asks about {task.longest(job):,}; raise that in its configuration, or name other --tasks"
            )


def measured(run: Run, preset: Preset, corpus: str, device: torch.device) -> list[dict[str, Any]]:
    """The cells in a folder that these settings would give, in the order of a plan for everyone: what one command
    has measured stands beside what other commands have measured in the same run."""
    saved = {(cell["task"], cell["contestant"], cell["seed"]): cell for cell in run.saved()}
    everyone = [*KNOWN.values(), *_own(list(saved.values())).values()]
    seeds = 1 + max((seed for _, _, seed in saved), default=0)
    found = []
    whoever = {"contestants": None, "models": None}  # costs are of some contestants or of all, in one cell
    for cell in plan(preset, everyone, list(TASKS), seeds, corpus, device):
        known = saved.get((cell.task, cell.contestant, cell.seed))
        if known is not None and known["settings"] | whoever == cell.settings | whoever:
            found.append(known)
    return found


def _own(cells: list[dict[str, Any]]) -> dict[str, Contestant]:
    """A user's own contestants of measured cells, by name."""
    found: dict[str, dict[str, Any]] = {}
    for cell in cells:
        settings = cell["settings"]
        found |= settings.get("models", {}) | ({cell["contestant"]: settings["model"]} if "model" in settings else {})
    return {name: outside.own(name, arguments) for name, arguments in found.items()}


def collect(preset: Preset, cells: list[dict[str, Any]]) -> dict[str, Any]:
    """All of a run in one value: the cells as measured, and by contestant what the table and the page show.

    recall: distance -> asked and correct, added up over seeds, and by_unit, those of each example, seed after seed;
    the same for abilities, by name and level, and recall_by_memory_size by size. learning_curves: ability -> level ->
    steps -> asked and correct on held-out examples, added up over seeds; not of cells older than it. bits_per_byte,
    by_document, by_stretch and training_curve: by seed, and by_document_of_memory_size and by_stretch_of_memory_size
    by size and seed; by_position, by_last_use and text_by_memory_size: bits and bytes, added up over seeds. cost: as
    measured.
    code: by how many versions of the code the cells were measured, in a sentence; missing where no cell says it.
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
        "summary": {c.name: _about(c, cells) for c in (KNOWN | _own(cells)).values() if c.name in present},
        "cells": cells,
    }
    if any("code" in cell for cell in cells):
        results["code"] = told(cells)
    for cell in cells:
        TASKS[cell["task"]].add(results, cell)
    return results


def _about(contestant: Contestant, cells: list[dict[str, Any]]) -> dict[str, str]:
    """Facts told of a contestant beside its results."""
    about = {"label": contestant.label, "reach": contestant.reach}
    if contestant.name in CONTESTANTS:
        return about
    results = [cell["result"] for cell in cells if cell["contestant"] == contestant.name]
    results += [cell["result"][contestant.name] for cell in cells if contestant.name in cell["result"]]
    size = max((found["parameters"] for found in results), default=0)
    read = {found["read"] for found in results if "read" in found}
    matched = "as many as the others" if contestant.own is None else "as its own configuration has them"
    of_gallery = contestant.own is not None and contestant.own["model_type"].startswith(outside.GALLERY)
    carried = "its cache" if of_gallery else "nothing"
    parts = [f"{size:,} parameters, {matched}", f"sees {contestant.reach}", f"trained with {carried} carried"]
    return about | {"outside": "; ".join([*parts, *(f"texts are read {how}" for how in read)])}


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
    """The contestants in a comma-separated list, in the table's order; for None all of the gallery."""
    return [KNOWN[name] for name in choose(names, CONTESTANTS if names is None else KNOWN, "--variants")]


def own_contestants(paths: list[Path]) -> dict[str, dict[str, Any]]:
    """The arguments of users' configurations by the names of their contestants. Raises ValueError for a file that is
    none, and for names that are alike or are another contestant's."""
    found: dict[str, dict[str, Any]] = {}
    for path in paths:
        name, arguments = outside.own_config(path)
        if name in KNOWN or name in found or name in (EVERYONE, ORDER0):
            raise ValueError(f"--contestant {path} would be called {name!r}, as another one is; rename it")
        found[name] = arguments
    return found


def choose_device(name: str) -> torch.device:
    """auto: the GPU if there is one. Raises ValueError for a device that torch cannot reach."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, and torch finds no GPU here; leave it at auto, or say cpu")
    if name not in ("cpu", "cuda"):
        raise ValueError(f"--device is {name!r}; it must be auto, cpu or cuda")
    return torch.device(name)
