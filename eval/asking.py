"""Asking a model the questions of examples in one forward each, without generating."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset

from .significance import EXAMPLE, by_unit

ROWS = 64  # examples read at once


@torch.no_grad()
def ask(
    model: Callable[..., Any], examples: Dataset, device: torch.device, *, in_place: bool = False
) -> dict[str, Any]:
    """{asked, correct, by_unit} over all scored columns of `examples`, a question each, answered by the likeliest
    token given all that stands before. in_place: labels[t] is what logits[t] are to say, as mad_compression has it,
    not logits[t - 1]."""
    asked, correct = [], []
    rows = examples.with_format("torch")
    for start in range(0, len(examples), ROWS):
        batch = rows[start : start + ROWS]
        logits = model(input_ids=batch["input_ids"].to(device)).logits  # (B, T, V)
        labels = batch["labels"].to(device)  # (B, T)
        if not in_place:
            logits, labels = logits[:, :-1], labels[:, 1:]
        scored = labels >= 0
        asked += scored.sum(1).tolist()
        correct += ((logits.argmax(-1) == labels) & scored).sum(1).tolist()
    return by_unit(EXAMPLE, correct, asked)
