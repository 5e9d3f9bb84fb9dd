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
from datasets import Dataset
from torch.utils.data import IterableDataset

from hf_gallery.data import TASKS, chance
from hf_gallery.harness import score

from .asking import ask
from .contestants import Contestant, Sizes
from .task import Column, Family, Job, OfEach, add_up, plain
from .training import Tick, learn
from .winners import blind, leaders, total


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

    def chance(self, level: Level) -> float:
        """The share of guesses that are right; it stands with the task, in hf_gallery.data."""
        return chance(self.task, **level.arguments)


ABILITIES: dict[str, Callable[[int], Ability]] = {}  # by name, each for a window


def _ability(title: str, group: str, task: str, *, axis: str, about: str) -> Callable[..., Callable[[int], Ability]]:
    """Enters a generator in ABILITIES, under its name: for a window it yields its levels, from easy to hard. axis,
    about: what a plot says; the window and the first level's arguments may stand in them in braces."""

    def enter(levels: Callable[[int], Iterator[Level]]) -> Callable[[int], Ability]:
        def make(window: int) -> Ability:
            found = tuple(levels(window))
            known = {"window": window, **found[0].arguments}
            return Ability(title, group, task, axis.format(**known), about.format(**known), found)

        ABILITIES[levels.__name__] = make
        return make

    return enter


@_ability(
    "Passkey",
    "memory",
    "passkey",
    axis="distance, in windows of {window} tokens",
    about="A number of three digits in a text without meaning, asked for at its end. Right means all digits.",
)
def passkey(window: int) -> Iterator[Level]:
    """Distances that double, from one window on."""
    digits, longest = 3, 64 * window
    for distance in (window * 2**i for i in range(7)):
        if distance >= 40 + digits:  # the question's own length
            given = {"length": distance + digits + 20, "distances": [distance], "digits": digits}
            yield Level(f"{distance // window}x", given, trained=distance <= longest // 4)


@_ability(
    "Capacity",
    "memory",
    "associative_recall",
    axis="pairs held at once, in {length} tokens",
    about="Pairs of key and value; when a key comes again, its value is asked for. More pairs, more to hold at once.",
)
def capacity(window: int) -> Iterator[Level]:
    """Numbers of pairs that double, in a text of eight windows."""
    length = 8 * window
    near = list(range(2, length - 1, max(1, window // 8)))
    for n in (1, 2, 4, 8, 16, 32, 64):
        if 4 * n <= length:
            given = {"length": length, "distances": near, "num_pairs": n, "printable": True}
            yield Level(str(n), given, trained=n <= 16)


@_ability(
    "Verbatim copy",
    "memory",
    "verbatim_copy",
    axis="distance, in windows of {window} tokens",
    about="A string of {num_symbols} letters to be repeated word for word after a delay. Right means all letters.",
)
def verbatim_copy(window: int) -> Iterator[Level]:
    """Delays that double, from half a window on."""
    symbols = max(4, window // 4)
    for distance in (window * 2**i // 2 for i in range(8)):
        if distance >= symbols + 2:
            length = distance + symbols + 2
            given = {"length": length, "distances": [distance], "num_symbols": symbols, "alphabet": 8}
            yield Level(f"{distance / window:g}x", given, trained=distance <= 16 * window)


@_ability(
    "Selective copy",
    "memory",
    "selective_copy",
    axis="capitals to be listed, in {length} tokens",
    about="Capitals among other letters, to be listed in their order at the end. Right means all of them.",
)
def selective_copy(window: int) -> Iterator[Level]:
    """Numbers of capitals that double, in a text of eight windows."""
    length = 8 * window
    for n in (1, 2, 4, 8, 16):
        if 2 * n + 1 <= length:
            yield Level(str(n), {"length": length, "num_symbols": n, "alphabet": 8}, trained=n <= 8)


@_ability(
    "ListOps",
    "reasoning",
    "listops",
    axis="bytes of the expression, at most",
    about="Nested maxima, minima, medians and sums modulo 10, by the rules of Long Range Arena.",
)
def listops(window: int) -> Iterator[Level]:
    """Expressions whose length doubles, from three quarters of a window on."""
    for length in (window * 3 * 2**i // 4 for i in range(5)):
        if length >= 11:
            yield Level(str(length), {"length": length, "max_args": 5}, trained=length <= 8 * window)


@_ability(
    "Variable tracking",
    "reasoning",
    "variable_tracking",
    axis="chains + hops of each, in {length} tokens",
    about="Assignments among noise, followed from variable to variable to a digit, while others distract. No hop "
    "is plain recall.",
)
def variable_tracking(window: int) -> Iterator[Level]:
    """One to three chains of none to four hops."""
    length = max(4 * window, 64)  # room for three chains of five and a question
    for chains, hops in ((1, 0), (1, 2), (2, 0), (2, 1), (3, 1), (3, 2), (3, 4)):
        given = {"length": length, "hops": hops, "num_chains": chains}
        yield Level(f"{chains}+{hops}", given, trained=hops <= 2)


@_ability(
    "State tracking",
    "reasoning",
    "state_tracking",
    axis="events told / facts that an answer needs, in {length} bytes and more",
    about="Short stories of people, things and rooms among other sentences, in bAbI's manner. Right means the room.",
)
def state_tracking(window: int) -> Iterator[Level]:
    """Stories of one to four people, and answers that need one to three facts."""
    for events, people, facts in ((3, 1, 1), (6, 2, 1), (12, 4, 1), (12, 4, 2), (12, 4, 3)):
        length = max(8 * window, 26 * events + 49)
        given = {"length": length, "facts": facts, "events": events, "num_people": people}
        yield Level(f"{events}/{facts}", given)


@_ability(
    "Permutations",
    "reasoning",
    "permutation_composition",
    axis="bytes of the sequence",
    about="Five things swap places step by step; where is one of them in the end? Attention alone has no shortcut.",
)
def permutations(window: int) -> Iterator[Level]:
    """Sequences whose length doubles, from three eighths of a window on."""
    for length in (window * 3 * 2**i // 8 for i in range(6)):
        if length >= 6:
            given = {"length": length, "num_questions": max(1, length // 6)}
            yield Level(str(length), given, trained=length <= 4 * window)


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
    if each of its characters is the model's first choice after what stands before it. Returns its size; for each
    level, how many questions were asked, how many answers were right, and how often a guess is; and its learning
    curve."""
    found = ability(name, settings)
    curve = LearningCurve(_watched(found, settings, seed), device)
    model = learn(contestant, settings, Levels(name, settings, seed), seed, device, tick, watch=curve)
    scores = {}
    for level in found.levels:
        asked = score(model, {level.label: (found.task, level.arguments)}, examples=settings.examples, seed=seed)
        scores[level.label] = asked[level.label] | {"chance": found.chance(level), "trained": level.trained}
        tick(1)
    return {"parameters": model.num_parameters(), "levels": scores, "learning_curve": curve.found}


class LearningCurve:
    """A model's right answers while it trains, for `learn` to watch with: at each level the scored tokens of held-out
    examples, and how many of them were its first choice. Tokens, not whole answers, so that a beginning shows.

    examples: of each level, of the split "validation". found: {level: {step: {asked, correct}}}.
    """

    def __init__(self, examples: dict[str, Dataset], device: torch.device, *, in_place: bool = False):
        self.examples, self.device, self.in_place = examples, device, in_place
        self.found: dict[str, dict[str, dict[str, int]]] = {level: {} for level in examples}

    def __call__(self, model: Any, step: int) -> None:
        for level, rows in self.examples.items():
            score = ask(model, rows, self.device, in_place=self.in_place)
            self.found[level][str(step)] = {key: score[key] for key in ("asked", "correct")}


def _watched(found: Ability, settings: AbilitySettings, seed: int) -> dict[str, Dataset]:
    """Held-out examples of the practised levels: together about as many tokens as a training step has."""
    practised = [level for level in found.levels if level.trained]
    return {
        level.label: TASKS[found.task](
            max(1, settings.tokens // (len(practised) * level.arguments["length"])),
            **level.arguments,
            seed=seed,
            split="validation",
        )
        for level in practised
    }


FAMILY = Family(
    "Abilities: right answers over all levels; * the best, and who is not surely behind", "ability", "chance"
)


class OfAbility(OfEach):
    """A task whose results are right answers by level."""

    def add(self, results: dict[str, Any], cell: dict[str, Any]) -> None:
        entry = results["summary"][cell["contestant"]]
        add_up(entry.setdefault("abilities", {}).setdefault(self.name, {}), cell["result"]["levels"])
        for level, curve in cell["result"].get("learning_curve", {}).items():  # which older cells do not have
            curves = entry.setdefault("learning_curves", {}).setdefault(self.name, {})
            add_up(curves.setdefault(level, {}), curve)

    def columns(self, results: dict[str, Any]) -> list[Column]:
        """One, of all levels together."""
        if self.name not in results["abilities"]:
            return []
        totals = {name: total(entry, self.name) for name, entry in results["summary"].items()}
        guess = blind(results, self.name)
        best = leaders(totals, guess)

        def right(name: str, entry: dict[str, Any]) -> str:
            found = totals[name]
            return f"{100 * found.share:.0f} %{' *' if name in best else ''}" if found.asked else "-"

        return [Column(FAMILY, results["abilities"][self.name]["title"], right, f"{100 * guess:.0f} %")]


class LearnedAbility(OfAbility):
    """The task of one ability."""

    modules = ("abilities", "asking", "significance")

    def __init__(self, name: str):
        self.name = name

    def about(self, job: Job) -> dict[str, str]:
        found = ability(self.name, job.preset.abilities)
        return {key: getattr(found, key) for key in ("title", "group", "axis", "about")}

    def settings(self, job: Job) -> dict[str, Any]:
        levels = plain(ability(self.name, job.preset.abilities))["levels"]
        return plain(job.preset.abilities) | {"device": job.device.type, "levels": levels}

    def longest(self, job: Job) -> int:
        return max(level.arguments["length"] for level in ability(self.name, job.preset.abilities).levels)

    def units(self, job: Job) -> int:
        return units(self.name, job.preset.abilities)

    def measure(self, job: Job, contestant: Contestant, seed: int, tick: Tick) -> dict[str, Any]:
        return measure(self.name, contestant, job.preset.abilities, seed, job.device, tick)
