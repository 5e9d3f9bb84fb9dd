"""The learning rate of each contestant on text: `python -m eval rates`.

Every contestant trains at half, once and twice the preset's rate, and the one that gives the fewest bits on validation
text is its own. Test text has no part in the choice. What is chosen stands in eval/presets.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from datasets import DatasetDict
from rich.console import Console

from . import text
from .benchmark import KNOWN, TASKS
from .cells import Cell
from .contestants import Contestant
from .presets import Preset
from .tables import terminal
from .task import Job
from .training import Tick

FACTORS = (0.5, 1.0, 2.0)  # of the preset's learning rate
VALIDATION = 131_072  # bytes, of the first documents


def tried(learning_rate: float) -> list[float]:
    """The learning rates that every contestant trains at, where a preset has this one."""
    return [factor * learning_rate for factor in FACTORS]


def plan(preset: Preset, names: list[str], corpus: str, device: torch.device) -> list[Cell]:
    """The cells: every contestant at every rate, at one seed."""
    task, cells, whole = TASKS["text"], [], Job(preset, corpus, device)
    for name in names:
        for rate in tried(preset.text.learning_rate):
            settings = dataclasses.replace(
                preset.text, learning_rate=rate, test_bytes=min(preset.text.test_bytes, VALIDATION)
            )
            job = dataclasses.replace(whole, preset=dataclasses.replace(preset, text=settings))  # of the same texts
            about = task.settings(job) | {"split": "validation"}
            measure = functools.partial(_measure, KNOWN[name], job)
            cells.append(Cell(f"rate_{rate:g}", name, 0, about, text.units(settings), measure, task.code))
    return cells


def _measure(contestant: Contestant, job: Job, tick: Tick) -> dict[str, Any]:
    """As the task `text` measures, with validation text in place of test text."""
    split = DatasetDict(train=job.text["train"], test=job.text["validation"])
    return text.measure(contestant, job.preset.text, split, 0, job.device, tick)


def collect(preset: Preset, cells: list[dict[str, Any]]) -> dict[str, Any]:
    """{preset, share, rates, bits_per_byte: {contestant: of each rate}, chosen: {contestant: rate}, cells}."""
    bits: dict[str, list[float]] = {}
    for cell in cells:
        bits.setdefault(cell["contestant"], []).append(cell["result"]["bits_per_byte"])
    rates = tried(preset.text.learning_rate)
    return {
        "preset": preset.name,
        "share": preset.share,
        "rates": rates,
        "bits_per_byte": bits,
        "chosen": {name: rates[found.index(min(found))] for name, found in bits.items()},
        "cells": [cell | {"result": {"bits_per_byte": cell["result"]["bits_per_byte"]}} for cell in cells],
    }


def told(results: dict[str, Any]) -> str:
    """Tells in a sentence at which learning rates the contestants of a result were trained on text; empty where none
    was."""
    summary, settings = results["summary"], results["settings"]
    rate_of = {
        cell["contestant"]: cell["settings"]["learning_rate"]
        for cell in results["cells"]
        if cell["task"] == "text" and cell["contestant"] in summary
    }
    if not rate_of:
        return ""

    def labels(names: Iterable[str]) -> str:
        return ", ".join(summary[name]["label"] for name in names)

    (most, _), *others = Counter(rate_of.values()).most_common()
    parts = [f"{rate:g} for {labels(n for n in rate_of if rate_of[n] == rate)}" for rate, _ in sorted(others)]
    sentence = "; ".join([*parts, f"{most:g} for all else" if parts else f"{most:g}"])
    own = settings.get("learning_rates", {})
    if not own.keys() & rate_of.keys():
        return sentence
    best = ", ".join(f"{rate:g}" for rate in tried(settings["text"]["learning_rate"]))
    rest = labels(name for name in summary if name in rate_of.keys() - own.keys())
    return f"{sentence}; the best of {best} on validation text{f', but for {rest}' if rest else ''}"


def table(results: dict[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """Title, headings and rows: bits per byte of validation text at each rate, * the one that is chosen."""
    rows = []
    for name, found in results["bits_per_byte"].items():
        marked = (" *" if rate == results["chosen"][name] else "" for rate in results["rates"])
        rows.append([KNOWN[name].label, *(f"{bits:.3f}{mark}" for bits, mark in zip(found, marked, strict=True))])
    title = f"Bits per byte of validation text by learning rate, preset {results['preset']}; * the one that is taken"
    return title, ["variant", *(f"{rate:g}" for rate in results["rates"])], rows


def show(results: dict[str, Any], console: Console) -> None:
    """Prints the table."""
    console.print(terminal(*table(results)))
