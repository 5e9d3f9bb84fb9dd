"""Recall against distance: the value of a slot, asked for a distance later (hf_gallery.data.slot_recall)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel

from hf_gallery.data import slot_recall

from . import asking
from .contestants import Contestant, smaller_memories
from .figures import distances, times
from .presets import RecallSettings
from .task import Column, Family, Job, OfEach, add_up, plain, share
from .training import Tick, learn


class Curriculum(IterableDataset):
    """Whole batches of slot recall, as many as there are steps: {input_ids, labels}, (B, T) each.

    First short examples, in which all architectures find the rule; then longer and longer ones. Every contestant reads
    the same batches. Distances are spread evenly over their logarithm, and differ from step to step, so that each is
    practised: an architecture with a bias for each distance knows nothing of one that never came.
    """

    def __init__(self, settings: RecallSettings, seed: int):
        self.settings, self.seed = settings, seed

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        s, random = self.settings, np.random.default_rng([self.seed, 78])
        for step in range(s.steps):
            length = self.length_at(step / s.steps)
            rows = slot_recall(
                max(1, s.tokens // length),
                length,
                distances=spread(length - 2, random.random()),
                num_writes=s.num_writes,
                num_reads=max(2, length // 20),
                num_values=s.num_values,
                seed=self.seed * s.steps + step,
            )
            yield {name: torch.tensor(rows[name][:]) for name in ("input_ids", "labels")}

    def length_at(self, done: float) -> int:
        """Tokens of an example when a share `done` of the steps is done."""
        s = self.settings
        grown = min(1.0, max(0.0, (done - s.short_share) / s.growing_share))
        return round(s.short + (s.length - s.short) * grown)


def spread(longest: int, shift: float) -> list[int]:
    """Distances from 1 to `longest`, four to a doubling, moved up by a share `shift` of the step between two."""
    count = 1 + int(4 * math.log2(longest))
    return sorted({min(longest, round(2 ** ((i + shift) / 4))) for i in range(count)})


def units(settings: RecallSettings) -> int:
    """Ticks of one cell."""
    return settings.steps + len(settings.multiples)


def measure(
    contestant: Contestant, settings: RecallSettings, seed: int, device: torch.device, tick: Tick
) -> dict[str, Any]:
    """Trains a fresh model and asks it at each distance. Returns its size and, for each distance in tokens, how many
    questions were asked and how many answers were right, also of each example; and the same with smaller memories,
    where it has one."""
    model = learn(contestant, settings, Curriculum(settings, seed), seed, device, tick)
    distances = settings.distances()
    scores = {}
    for distance in distances:
        scores[str(distance)] = ask(model, settings, distance, seed, device)
        tick(1)
    by_memory_size = {
        str(size): {str(distance): ask(model, settings, distance, seed, device) for distance in distances}
        for size in smaller_memories(model)
    }
    return {
        "parameters": model.num_parameters(),
        "chance": 1 / settings.num_values,
        "recall": scores,
        "by_memory_size": by_memory_size,
    }


def ask(
    model: PreTrainedModel, settings: RecallSettings, distance: int, seed: int, device: torch.device
) -> dict[str, Any]:
    """{asked, correct, by_unit} over test examples whose questions all stand `distance` tokens after what they ask
    for."""
    rows = slot_recall(
        settings.examples,
        settings.length,
        distances=[distance],
        num_writes=settings.num_writes,
        num_values=settings.num_values,
        seed=seed,
        split="test",
    )
    return asking.ask(model, rows, device)


class Recall(OfEach):
    """The task `recall`."""

    name = "recall"
    modules = ("asking", "recall", "significance")

    def settings(self, job: Job) -> dict[str, Any]:
        return plain(job.preset.recall) | {"device": job.device.type}

    def longest(self, job: Job) -> int:
        return job.preset.recall.length

    def units(self, job: Job) -> int:
        return units(job.preset.recall)

    def measure(self, job: Job, contestant: Contestant, seed: int, tick: Tick) -> dict[str, Any]:
        return measure(contestant, job.preset.recall, seed, job.device, tick)

    def add(self, results: dict[str, Any], cell: dict[str, Any]) -> None:
        entry, result = results["summary"][cell["contestant"]], cell["result"]
        add_up(entry.setdefault("recall", {}), result["recall"])
        for size, scores in result["by_memory_size"].items():
            add_up(entry.setdefault("recall_by_memory_size", {}).setdefault(size, {}), scores)

    def columns(self, results: dict[str, Any]) -> list[Column]:
        window = results["window"]["recall"]
        family = Family(f"Recall by distance, in windows of {window} tokens", "recall", "chance")
        return [
            Column(
                family,
                times(distance / window),
                lambda name, entry, distance=distance: share(entry.get("recall", {}).get(str(distance))),
                f"{100 * results['chance']:.0f} %",
            )
            for distance in distances(results)
        ]
