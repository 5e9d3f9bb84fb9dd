"""Memory and reasoning: what a model answers, level by level, after it has learned a synthetic task.

An ability is a task of hf_gallery.data and its levels, from easy to hard: distances, amounts, lengths or steps. A
model trains on the levels in rising order and is then asked at each, and at some that are harder than all it has seen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from hf_gallery.data import TASKS, chance
from hf_gallery.harness import score

from .contestants import Contestant, Sizes
from .training import Tick, learn


@dataclasses.dataclass(frozen=True)
class AbilitySettings:
    """Training and testing of abilities: `steps` of about `tokens` tokens, `examples` at each level."""

    sizes: Sizes
    steps: int
    tokens: int
    learning_rate: float
    examples: int
    growing_share: float = 0.6  # of the steps, while ever harder levels are added


@dataclasses.dataclass(frozen=True)
class Level:
    """One point of a curve: its label, and the task's arguments. trained: whether models practise it."""

    label: str
    arguments: dict[str, Any]
    trained: bool = True


@dataclasses.dataclass(frozen=True)
class Ability:
    """A curve: `task` of hf_gallery.data at each level."""

    title: str
    group: str  # memory or reasoning
    task: str
    axis: str
    about: str
    levels: tuple[Level, ...]


def _passkey(window: int) -> Ability:
    digits, longest = 3, 64 * window
    floor = 40 + digits  # the question's own length
    distances = [d for d in (window * 2**i for i in range(7)) if d >= floor]
    return Ability(
        "Passkey",
        "memory",
        "passkey",
        f"distance, in windows of {window} tokens",
        "A number of three digits in a text without meaning, asked for at its end. Right means all digits.",
        tuple(
            Level(
                f"{d // window}x",
                {"length": d + digits + 20, "distances": [d], "digits": digits},
                trained=d <= longest // 4,
            )
            for d in distances
        ),
    )


def _associative_recall(window: int) -> Ability:
    length = 8 * window
    near = list(range(2, length - 1, max(1, window // 8)))
    return Ability(
        "Capacity",
        "memory",
        "associative_recall",
        f"pairs held at once, in {length} tokens",
        "Pairs of key and value; when a key comes again, its value is asked for. More pairs, more to hold at once.",
        tuple(
            Level(str(n), {"length": length, "distances": near, "num_pairs": n, "printable": True}, trained=n <= 16)
            for n in (1, 2, 4, 8, 16, 32, 64)
            if 4 * n <= length
        ),
    )


def _verbatim_copy(window: int) -> Ability:
    symbols = max(4, window // 4)
    distances = [d for d in (window * 2**i // 2 for i in range(8)) if d >= symbols + 2]
    return Ability(
        "Verbatim copy",
        "memory",
        "verbatim_copy",
        f"distance, in windows of {window} tokens",
        f"A string of {symbols} letters to be repeated word for word after a delay. Right means all letters.",
        tuple(
            Level(
                f"{d / window:g}x",
                {"length": d + symbols + 2, "distances": [d], "num_symbols": symbols, "alphabet": 8},
                trained=d <= 16 * window,
            )
            for d in distances
        ),
    )


def _selective_copy(window: int) -> Ability:
    length = 8 * window
    return Ability(
        "Selective copy",
        "memory",
        "selective_copy",
        f"capitals to be listed, in {length} tokens",
        "Capitals among other letters, to be listed in their order at the end. Right means all of them.",
        tuple(
            Level(str(n), {"length": length, "num_symbols": n, "alphabet": 8}, trained=n <= 8)
            for n in (1, 2, 4, 8, 16)
            if 2 * n + 1 <= length
        ),
    )


def _listops(window: int) -> Ability:
    lengths = [window * 2**i for i in range(5)]
    return Ability(
        "ListOps",
        "reasoning",
        "listops",
        "bytes of the expression, at most",
        "Nested maxima, minima, medians and sums modulo 10, by the rules of Long Range Arena.",
        tuple(Level(str(n), {"length": n, "max_args": 5}, trained=n <= 8 * window) for n in lengths if n >= 11),
    )


def _variable_tracking(window: int) -> Ability:
    length = max(4 * window, 68)  # room for three chains of five and two questions
    return Ability(
        "Variable tracking",
        "reasoning",
        "variable_tracking",
        f"hops, in {length} tokens",
        "Assignments among noise, followed from variable to variable to a digit. No hop is plain recall.",
        tuple(
            Level(str(n), {"length": length, "hops": n, "num_chains": 3, "num_questions": 2}, trained=n <= 3)
            for n in range(5)
        ),
    )


def _state_tracking(window: int) -> Ability:
    events = 12
    length = max(16 * window, 26 * events + 49)
    return Ability(
        "State tracking",
        "reasoning",
        "state_tracking",
        f"facts that an answer needs, in {length} bytes",
        "Short stories of people, things and rooms among other sentences, in bAbI's manner. Right means the room.",
        tuple(Level(str(n), {"length": length, "facts": n, "events": events}) for n in (1, 2, 3)),
    )


def _permutation_composition(window: int) -> Ability:
    lengths = [window * 2**i // 4 for i in range(6)]
    return Ability(
        "Permutations",
        "reasoning",
        "permutation_composition",
        "bytes of the sequence",
        "Five things swap places step by step; where is one of them in the end? Attention alone has no shortcut.",
        tuple(
            Level(str(n), {"length": n, "num_questions": max(1, n // 6)}, trained=n <= 4 * window)
            for n in lengths
            if n >= 6
        ),
    )


ABILITIES: dict[str, Callable[[int], Ability]] = {
    "passkey": _passkey,
    "capacity": _associative_recall,
    "verbatim_copy": _verbatim_copy,
    "selective_copy": _selective_copy,
    "listops": _listops,
    "variable_tracking": _variable_tracking,
    "state_tracking": _state_tracking,
    "permutations": _permutation_composition,
}


def ability(name: str, settings: AbilitySettings) -> Ability:
    """The ability of that name with levels that fit the window of the contestants."""
    return ABILITIES[name](settings.sizes.window)


class Levels(IterableDataset):
    """Whole batches, as many as there are steps: {input_ids, labels}, (B, T) each, every batch of one level. Levels
    are added from easy to hard, and drawn alike from those that there are; every contestant reads the same batches."""

    def __init__(self, name: str, settings: AbilitySettings, seed: int):
        self.ability, self.settings, self.seed = ability(name, settings), settings, seed

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        s = self.settings
        practised = [level for level in self.ability.levels if level.trained]
        random = np.random.default_rng([self.seed, 77])
        for step in range(s.steps):
            share = min(1.0, step / (s.steps * s.growing_share))
            level = practised[random.integers(1 + int(share * (len(practised) - 1)))]
            examples = max(1, s.tokens // level.arguments["length"])
            rows = TASKS[self.ability.task](examples, **level.arguments, seed=self.seed * s.steps + step)
            yield {name: torch.tensor(rows[name][:]) for name in ("input_ids", "labels")}


def units(name: str, settings: AbilitySettings) -> int:
    """Ticks of one cell."""
    return settings.steps + len(ability(name, settings).levels)


def measure(
    name: str, contestant: Contestant, settings: AbilitySettings, seed: int, device: torch.device, tick: Tick
) -> dict[str, Any]:
    """Trains a fresh model and asks it at each level, through lm-eval (hf_gallery.harness.score): an answer is right
    if each of its characters is the model's first choice after what stands before it. Returns its size and, for each
    level, how many questions were asked, how many answers were right, and how often a guess is."""
    model = learn(contestant, settings, Levels(name, settings, seed), seed, device, tick)
    found = ability(name, settings)
    scores = {}
    for level in found.levels:
        asked = score(model, {level.label: (found.task, level.arguments)}, examples=settings.examples, seed=seed)
        guess = chance(found.task, **level.arguments)
        scores[level.label] = asked[level.label] | {"chance": guess, "trained": level.trained}
        tick(1)
    return {"parameters": model.num_parameters(), "levels": scores}
