"""The main job: every contestant, every task, every seed, then one table, one JSON file and one page."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import torch

from hf_gallery.data import corpus_version, load_corpus

from . import abilities, classification, cost, recall, text
from .abilities import ABILITIES
from .cells import EVERYONE, Cell, Run
from .contestants import CONTESTANTS, Contestant
from .presets import Preset

TASKS = ("recall", *ABILITIES, "text", "bytes", "cost")


def plan(
    preset: Preset,
    contestants: list[Contestant],
    tasks: list[str],
    seeds: int,
    corpus: str,
    device: torch.device,
) -> list[Cell]:
    """The cells of a run, in the order in which they are measured: all contestants at one seed, then at the next."""
    cells: list[Cell] = []
    where = {"device": device.type}
    recall_settings, text_settings, cost_settings = preset.recall, preset.text, preset.cost
    load = functools.cache(load_corpus)  # read once, and only if a text cell is missing

    for seed in range(seeds):
        if "recall" in tasks:
            for c in contestants:

                def measure_recall(tick, c=c, recall_settings=recall_settings, seed=seed):
                    return recall.measure(c, recall_settings, seed, device, tick)

                settings = _plain(recall_settings) | where
                cells.append(Cell("recall", c.name, seed, settings, recall.units(recall_settings), measure_recall))
        for name in (task for task in tasks if task in ABILITIES):
            levels = _plain(abilities.ability(name, preset.abilities))["levels"]
            for c in contestants:

                def measure_ability(tick, name=name, c=c, seed=seed):
                    return abilities.measure(name, c, preset.abilities, seed, device, tick)

                settings = _plain(preset.abilities) | where | {"levels": levels}
                units = abilities.units(name, preset.abilities)
                cells.append(Cell(name, c.name, seed, settings, units, measure_ability))
        if "text" in tasks:
            settings = _plain(text_settings) | where | {"corpus": corpus_version(corpus)}
            if seed == 0:

                def measure_order0(tick):
                    bits = text.order0_bits(load(corpus), text_settings)
                    tick(1)
                    return {"bits_per_byte": bits}

                cells.append(Cell("text", "order0", 0, settings, 1, measure_order0))
            for c in contestants:

                def measure_text(tick, c=c, seed=seed):
                    return text.measure(c, text_settings, load(corpus), seed, device, tick)

                cells.append(Cell("text", c.name, seed, settings, text.units(text_settings), measure_text))
        if "bytes" in tasks:
            settings = _plain(preset.classification) | where | {"corpus": corpus_version(corpus)}
            for c in contestants:

                def measure_bytes(tick, c=c, seed=seed):
                    labelled = load(corpus, labels=True)
                    return classification.measure(c, preset.classification, labelled, seed, device, tick)

                units = classification.units(preset.classification)
                cells.append(Cell("bytes", c.name, seed, settings, units, measure_bytes))
    if "cost" in tasks:
        settings = _plain(cost_settings) | where | {"contestants": [c.name for c in contestants]}
        units = cost.units(cost_settings, contestants)
        cells.append(
            Cell(
                "cost",
                EVERYONE,
                0,
                settings,
                units,
                lambda tick: cost.measure(contestants, cost_settings, 0, device, tick),
            )
        )
    return cells


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

    recall: distance -> asked and correct, added up over seeds; the same for abilities, by name and level, and
    recall_by_memory_size by size. bits_per_byte, by_stretch and training_curve: by seed, and by_stretch_of_memory_size
    by size and seed; by_position, by_last_use and text_by_memory_size: bits and bytes, added up over seeds. cost: as
    measured.
    """
    summary: dict[str, Any] = {}
    present = {name for cell in cells for name in (cell["contestant"], *cell["settings"].get("contestants", ()))}
    for c in CONTESTANTS.values():
        if c.name in present:
            summary[c.name] = {"label": c.label, "reach": c.reach}
    order0 = None
    for cell in cells:
        result = cell["result"]
        entry = summary.get(cell["contestant"], {})
        if cell["contestant"] == "order0":
            order0 = result["bits_per_byte"]
        elif cell["task"] == "recall":
            _add(entry.setdefault("recall", {}), result["recall"])
            for size, scores in result["by_memory_size"].items():
                _add(entry.setdefault("recall_by_memory_size", {}).setdefault(size, {}), scores)
        elif cell["task"] == "bytes" or cell["task"] in ABILITIES:
            _add(entry.setdefault("abilities", {}).setdefault(cell["task"], {}), result["levels"])
        elif cell["task"] == "text":
            entry["parameters"] = result["parameters"]
            for name in ("bits_per_byte", "by_stretch", "training_curve"):
                entry.setdefault(name, []).append(result[name])
            for name in ("by_position", "by_last_use"):
                _add(entry.setdefault(name, {}), result[name])
            if result["by_memory_size"]:
                whole = {key: sum(s[key] for s in result["by_position"].values()) for key in ("bits", "bytes")}
                whole["by_stretch"] = result["by_stretch"]
                for size, score in (result["by_memory_size"] | {str(preset.text.sizes.memory_size): whole}).items():
                    stretches = entry.setdefault("by_stretch_of_memory_size", {}).setdefault(size, [])
                    stretches.append(score["by_stretch"])
                    sums = {key: score[key] for key in ("bits", "bytes")}
                    _add(entry.setdefault("text_by_memory_size", {}), {size: sums})
        elif cell["task"] == "cost":
            for name, measured in result.items():
                summary[name]["cost"] = measured
    settings = _plain(preset)
    return {
        "preset": preset.name,
        "share": preset.share,
        "settings": settings,
        "window": {"recall": preset.recall.sizes.window, "text": preset.text.sizes.window},
        "chance": 1 / preset.recall.num_values,
        "order0_bits_per_byte": order0,
        "abilities": {
            name: classification.ABOUT if name == "bytes" else _about(name, preset)
            for name in (*ABILITIES, "bytes")
            if any(name in entry.get("abilities", {}) for entry in summary.values())
        },
        "summary": summary,
        "cells": cells,
    }


def _about(name: str, preset: Preset) -> dict[str, str]:
    ability = abilities.ability(name, preset.abilities)
    return {key: getattr(ability, key) for key in classification.ABOUT}


def _add(totals: dict[str, Any], found: dict[str, Any]) -> None:
    """Adds up by label what can be counted; all else is the same for every seed."""
    for label, counts in found.items():
        counted = [key for key in ("asked", "correct", "bits", "bytes", "words") if key in counts]
        total = totals.setdefault(label, counts | dict.fromkeys(counted, 0))
        for key in counted:
            total[key] += counts[key]


def choose(names: str | None, choices: dict[str, Any] | tuple[str, ...], argument: str) -> list[str]:
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
    """The contestants in a comma-separated list, in the table's order."""
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


def _plain(settings: Any) -> dict[str, Any]:
    """A dataclass as JSON would give it back, so that saved and present settings can be compared."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))
