"""Claims seed by seed: how often each comes out as it did, where a single seed had been measured."""

from __future__ import annotations

from collections import Counter
from typing import Any

from .benchmark import collect
from .cells import EVERYONE
from .claims import verdicts
from .presets import PRESETS
from .text import ORDER0


def outcomes_by_seed(results: dict[str, Any]) -> dict[str, Counter[str]]:
    """{claim: number of seeds with each outcome}, each seed judged alone, by what it measured itself and by what has
    no seed; without claims that rest on the latter only. Empty where there are fewer than two seeds."""
    cells = results["cells"]
    seeds = sorted({cell["seed"] for cell in cells if not _seedless(cell)})
    if len(seeds) < 2:
        return {}
    preset = PRESETS[results["preset"]].shortened(results["share"])
    without = {verdict.claim for verdict in verdicts(collect(preset, [cell for cell in cells if _seedless(cell)]))}
    found = {verdict.claim: Counter[str]() for verdict in verdicts(results) if verdict.claim not in without}
    for seed in seeds:
        own = [cell for cell in cells if cell["seed"] == seed or _seedless(cell)]
        for verdict in verdicts(collect(preset, own)):
            if verdict.claim in found:
                found[verdict.claim][verdict.outcome] += 1
    return found


def _seedless(cell: dict[str, Any]) -> bool:
    return cell["contestant"] in (EVERYONE, ORDER0)
