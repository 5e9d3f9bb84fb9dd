"""All synthetic tasks by name, and how often a guess is right."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from datasets import Dataset

from .examples import questions
from .mad import (
    mad_compression,
    mad_fuzzy_recall,
    mad_memorization,
    mad_noisy_recall,
    mad_recall,
    mad_selective_copy,
)
from .mqar import mqar
from .reasoning import DIGITS, listops, permutation_composition, variable_tracking
from .stories import ROOMS, state_tracking
from .tasks import associative_recall, passkey, selective_copy, slot_recall, verbatim_copy

TASKS: dict[str, Callable[..., Dataset]] = {
    task.__name__: task
    for task in (
        associative_recall,
        slot_recall,
        passkey,
        verbatim_copy,
        selective_copy,
        listops,
        variable_tracking,
        state_tracking,
        permutation_composition,
        mqar,
        mad_recall,
        mad_noisy_recall,
        mad_fuzzy_recall,
        mad_compression,
        mad_memorization,
        mad_selective_copy,
    )
}
NO_TEXT = frozenset(name for name in TASKS if name.startswith(("mqar", "mad_")))  # their ids are no bytes

_CHANCE: dict[str, Callable[[dict[str, Any]], float]] = {
    "associative_recall": lambda given: 1 / given["num_values"],
    "slot_recall": lambda given: 1 / given["num_values"],
    "passkey": lambda given: len(DIGITS) ** -given["digits"],
    "verbatim_copy": lambda given: given["alphabet"] ** -given["num_symbols"],
    "selective_copy": lambda given: given["alphabet"] ** -given["num_symbols"],
    "variable_tracking": lambda given: 1 / len(DIGITS),
    "state_tracking": lambda given: 1 / (len(ROOMS) - (given["facts"] == 3)),
    "permutation_composition": lambda given: 1 / given["size"],
    "mqar": lambda given: 1 / _upper_half(given["vocab_size"]),
    "mad_recall": lambda given: 1 / _upper_half(given["vocab_size"]),
    "mad_noisy_recall": lambda given: 1 / _upper_half(given["vocab_size"] - given["noise_vocab_size"]),
    "mad_fuzzy_recall": lambda given: 1 / _upper_half(given["vocab_size"] - 1),
    "mad_compression": lambda given: 1 / (given["vocab_size"] - 1),
    "mad_memorization": lambda given: 1 / ((given["vocab_size"] - 1) // 2),
    "mad_selective_copy": lambda given: 1 / (given["vocab_size"] - 2),
}


def _upper_half(size: int) -> int:
    """The ids of a vocabulary that are values, where its lower half are keys."""
    return size - size // 2


def chance(task: str, **arguments: Any) -> float:
    """The share of right answers of the best guess made without reading: a whole answer, as hf_gallery.data.questions
    has them, of the task with that name and these arguments (the task's own defaults where left out).

    It is one over the number of answers, which all tasks but listops draw evenly; for listops the share of the most
    frequent answer among 4,096 examples.

    Raises ValueError for a task that there is none of.
    """
    if task not in TASKS:
        raise ValueError(f"task is {task!r}; it must be one of {', '.join(TASKS)}")
    if task == "listops":
        answers = questions(listops(4096, **arguments | {"seed": 0, "split": "train"}))["target"]
        return float(np.unique(answers, return_counts=True)[1].max() / len(answers))
    defaults = {name: p.default for name, p in inspect.signature(TASKS[task]).parameters.items()}
    return float(_CHANCE[task](defaults | arguments))
