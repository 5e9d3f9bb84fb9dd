"""Tasks of papers by their own definitions, so that numbers can be laid beside the papers': multi-query associative
recall (Arora et al. 2023) and the six tasks of MAD (Poli et al. 2024).

As in both papers, each level is a model of its own, trained on a training set of fixed size and asked about others.
The preset `full` has the papers' vocabularies, lengths, widths, depths, training sets and numbers of epochs; the other
presets have a reduced form, whose easier levels a model of 64 units is to learn in as many steps as the preset gives
to abilities.

What is ours in both forms: the contestants, all of one size and with a feed-forward, which Zoology's figure leaves
out; the optimiser and its schedule (eval/training.py); one learning rate where the papers take the best of several;
and the plain share of right tokens, where MAD's code averages over the classes of the answers first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from hf_gallery.data import TASKS, chance

from .abilities import AbilitySettings, LearningCurve, OfAbility
from .asking import ask
from .compression import Compressor
from .contestants import Contestant, Sizes, build
from .presets import Preset
from .task import Job, plain
from .training import Tick, teach


@dataclasses.dataclass(frozen=True)
class Trial:
    """One level: what is asked, of which model, trained how.

    arguments: of the task; practice: of the training examples besides. rows: training examples, `batch` of them in
    each of `steps`, in epochs. examples: asked about.
    """

    label: str
    arguments: dict[str, Any]
    sizes: Sizes
    rows: int
    batch: int
    steps: int
    learning_rate: float
    examples: int
    practice: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Paper:
    """A task of a paper and its levels, from easy to hard. reduced: for a preset's abilities; published: for one that
    has all its training steps."""

    title: str
    task: str
    axis: str
    about: str
    reduced: Callable[[AbilitySettings], Iterator[Trial]]
    published: Callable[[], Iterator[Trial]]

    @property
    def in_place(self) -> bool:
        """Tells whether labels stand where their answers are asked for, see hf_gallery.data.mad_compression."""
        return self.task == "mad_compression"

    def trials(self, preset: Preset) -> list[Trial]:
        """The levels in that preset."""
        if not preset.published:
            return list(self.reduced(preset.abilities))
        return [
            dataclasses.replace(trial, steps=max(1, round(preset.share * trial.steps))) for trial in self.published()
        ]


# ---------------------------------------------------------------------------------------------------- the reduced form


def _reduced(settings: AbilitySettings, label: str, vocab_size: int, length: int, **arguments: Any) -> Trial:
    """A level in a preset's steps, on as many training examples as MAD has."""
    return Trial(
        label,
        {"length": length, "vocab_size": vocab_size, **arguments},
        dataclasses.replace(settings.sizes, vocabulary=vocab_size),
        rows=12800,
        batch=max(1, settings.tokens // length),
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        examples=settings.examples,
    )


def _pairs(settings: AbilitySettings) -> Iterator[Trial]:
    for pairs, length, vocab_size in ((2, 32, 40), (4, 32, 40), (8, 32, 40), (16, 64, 80)):
        yield _reduced(settings, str(pairs), vocab_size, length, num_kv_pairs=pairs, random_non_queries=False)


def _vocabularies(settings: AbilitySettings) -> Iterator[Trial]:
    for vocab_size, length in ((16, 64), (32, 64), (64, 64), (128, 128)):
        yield _reduced(settings, str(vocab_size), vocab_size, length)


def _noise(settings: AbilitySettings) -> Iterator[Trial]:
    for share in (0.2, 0.4, 0.6, 0.8):
        yield _reduced(settings, f"{share:.0%}", 36, 64, noise_vocab_size=4, frac_noise=share)


def _motifs(settings: AbilitySettings) -> Iterator[Trial]:
    for size in (1, 2, 3):
        yield _reduced(settings, str(size), 16, 65, key_size=size, value_size=size)


def _lengths(settings: AbilitySettings) -> Iterator[Trial]:
    for length in (4, 8, 16, 32):
        yield _reduced(settings, str(length), 16, length)


def _facts(settings: AbilitySettings) -> Iterator[Trial]:
    for vocab_size in (32, 256, 1024, 4096):
        trial = _reduced(settings, str((vocab_size - 1) // 2), vocab_size, 33)
        yield dataclasses.replace(trial, rows=256)  # MAD's, in which a seventh of 2,047 facts does not occur


def _copies(settings: AbilitySettings) -> Iterator[Trial]:
    for number, length in ((4, 65), (16, 65), (32, 129), (64, 257)):
        yield _reduced(settings, str(number), 16, length, num_tokens_to_copy=number)


# -------------------------------------------------------------------------------------------------- the published form


def _sizes(length: int, **sizes: Any) -> Sizes:
    """Those of a model that is asked about `length` tokens: what a contestant sees at once is a quarter of it."""
    window = max(4, length // 4)
    return Sizes(
        layers=2,
        window=window,
        context=2 * length,
        memory_size=2 * length,
        memory_topk=min(32, window),
        memory_layers=(1,),
        states=min(64, window),
        recurrent_layers=(1,),
        **sizes,
    )


def _figure_2() -> Iterator[Trial]:
    """Zoology's figure 2, by zoology/experiments/paper_configs/iclr24_zoology_figure2/configs.py at d88d6f5, and its
    fourth length, which stands there as a comment: 100,000 examples for 64 epochs, 3,000 to ask about."""
    for length, pairs, batch in ((64, 4, 512), (128, 8, 512), (256, 16, 256), (512, 64, 128)):
        for width in (64, 128, 256, 512):
            yield Trial(
                f"{pairs} pairs in {length}, width {width}",
                {"length": length, "vocab_size": 8192, "num_kv_pairs": pairs, "random_non_queries": False},
                _sizes(length, hidden=width, heads=1, intermediate=4 * width, vocabulary=8192),
                rows=100_000,
                batch=batch,
                steps=64 * -(-100_000 // batch),
                learning_rate=1e-3,
                examples=3000,
            )


def _mad(
    arguments: dict[str, Any], *changes: dict[str, Any], rows: int = 12800, more: int = 0, **practice: Any
) -> Iterator[Trial]:
    """MAD's baseline and each change of it alone, by configs/tasks and mad/configs.py at 0f49a45: 200 epochs in
    batches of 128, 1,280 examples to ask about. A change of `rows` is one of the training set. Lengths are the
    paper's, and an example has `more` columns besides."""
    for change in ({}, *changes):
        given = {"rows": rows, **arguments, **change}
        number = given.pop("rows")
        given["length"] += more
        label = ", ".join(f"{_NAMES.get(name, name)} {value}" for name, value in change.items()) or "baseline"
        sizes = _sizes(given["length"], hidden=128, heads=8, intermediate=512, vocabulary=given["vocab_size"])
        steps = 200 * -(-number // 128)
        yield Trial(label, given, sizes, number, 128, steps, learning_rate=5e-4, examples=1280, practice=practice)


_NAMES = {"vocab_size": "vocabulary", "rows": "examples", "frac_noise": "noise", "num_tokens_to_copy": "tokens"}


def _each(name: str, *values: Any) -> tuple[dict[str, Any], ...]:
    return tuple({name: value} for value in values)


_WORDS = _each("vocab_size", 32, 64, 128)
_FEWER = _each("rows", 6400, 3200, 1600, 800)


def _mad_recall() -> Iterator[Trial]:
    given = {"length": 128, "vocab_size": 16}
    return _mad(given, *_WORDS, *_each("length", 256, 512, 1024), *_FEWER, every_token=True)


def _mad_noisy_recall() -> Iterator[Trial]:
    given = {"length": 128, "vocab_size": 32, "noise_vocab_size": 16, "frac_noise": 0.2}
    changes = (*_each("vocab_size", 48, 80, 144), *_each("length", 256, 512, 1024), *_FEWER)
    return _mad(given, *changes, *_each("frac_noise", 0.4, 0.6, 0.8), every_token=True)


def _mad_fuzzy_recall() -> Iterator[Trial]:
    given = {"length": 128, "vocab_size": 16, "key_size": 3, "value_size": 3}
    return _mad(given, *_WORDS, *_each("length", 256, 512, 1024), *_FEWER, more=1, every_token=True)


def _mad_compression() -> Iterator[Trial]:
    return _mad({"length": 32, "vocab_size": 16}, *_WORDS, *_each("length", 64, 128, 256), *_FEWER)


def _mad_memorization() -> Iterator[Trial]:
    sizes = _each("vocab_size", 512, 1024, 2048, 4096, 8192)
    return _mad({"length": 32, "vocab_size": 256}, *sizes, rows=256, more=1)


def _mad_selective_copy() -> Iterator[Trial]:
    given = {"length": 256, "vocab_size": 16, "num_tokens_to_copy": 16}
    changes = (*_WORDS, *_each("length", 512, 1024), *_FEWER, *_each("num_tokens_to_copy", 32, 64, 96))
    return _mad(given, *changes, more=1)


PAPERS = {
    paper.task: paper
    for paper in (
        Paper(
            "MQAR",
            "mqar",
            "pairs of key and value",
            "Multi-query associative recall of Zoology: pairs, then each key once more, most of them soon.",
            _pairs,
            _figure_2,
        ),
        Paper(
            "MAD recall",
            "mad_recall",
            "size of the vocabulary",
            "In-context recall of MAD: pairs of key and value, each value asked for whenever its key comes again.",
            _vocabularies,
            _mad_recall,
        ),
        Paper(
            "MAD noisy recall",
            "mad_noisy_recall",
            "share of noise",
            "Noisy in-context recall of MAD: the same with pairs of noise tokens in between.",
            _noise,
            _mad_noisy_recall,
        ),
        Paper(
            "MAD fuzzy recall",
            "mad_fuzzy_recall",
            "tokens of a key and of a value, at most",
            "Fuzzy in-context recall of MAD: keys and values of several tokens.",
            _motifs,
            _mad_fuzzy_recall,
        ),
        Paper(
            "MAD compression",
            "mad_compression",
            "tokens that one state holds",
            "Compression of MAD: from the last state a decoder is to find all that was read.",
            _lengths,
            _mad_compression,
        ),
        Paper(
            "MAD memorization",
            "mad_memorization",
            "facts",
            "Memorization of MAD: values that nothing but training tells, each by its key.",
            _facts,
            _mad_memorization,
        ),
        Paper(
            "MAD selective copying",
            "mad_selective_copy",
            "tokens to be copied",
            "Selective copying of MAD: tokens among blanks, to be listed in their order at the end.",
            _copies,
            _mad_selective_copy,
        ),
    )
}


# ----------------------------------------------------------------------------------------------------------- measuring


class Epochs(IterableDataset):
    """Whole batches, as many as a trial has steps: {input_ids, labels}, (B, T) each. The training set comes in one
    random order after another; every contestant reads the same batches."""

    def __init__(self, task: str, trial: Trial, seed: int):
        self.task, self.trial, self.seed = task, trial, seed

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        trial = self.trial
        rows = min(trial.rows, trial.steps * trial.batch)  # the first epoch may be the last one
        made = TASKS[self.task](rows, **trial.arguments, **trial.practice, seed=self.seed).with_format("numpy")
        columns = {name: torch.from_numpy(made[name][:]) for name in ("input_ids", "labels")}
        random = np.random.default_rng([self.seed, 78])
        order = np.empty(0, dtype=np.int64)
        for _ in range(trial.steps):
            while len(order) < min(trial.batch, rows):
                order = np.concatenate([order, random.permutation(rows)])
            batch, order = torch.from_numpy(order[: trial.batch]), order[trial.batch :]
            yield {name: column[batch] for name, column in columns.items()}


def measure(
    paper: Paper, trials: list[Trial], contestant: Contestant, seed: int, device: torch.device, tick: Tick
) -> dict[str, Any]:
    """Trains a fresh model for each level and asks it about test examples, every scored token a question. Returns the
    size of the first; for each level how many questions were asked and how many answers were right, also of each
    example, how often a guess is, and the model's size; and its learning curve."""
    scores: dict[str, Any] = {}
    curves: dict[str, Any] = {}
    for trial in trials:
        make = TASKS[paper.task]
        held_out = make(min(trial.batch, 128), **trial.arguments, seed=seed, split="validation")
        curve = LearningCurve({trial.label: held_out}, device, in_place=paper.in_place)
        fresh: Any = build(contestant, trial.sizes, seed)
        if paper.in_place:
            fresh = Compressor(fresh)
        model = teach(fresh, trial, Epochs(paper.task, trial, seed), seed, device, tick, watch=curve)
        test = make(trial.examples, **trial.arguments, seed=seed, split="test")
        scores[trial.label] = ask(model, test, device, in_place=paper.in_place) | {
            "chance": chance(paper.task, **trial.arguments),
            "trained": True,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }
        curves |= curve.found
        tick(1)
    return {"parameters": scores[trials[0].label]["parameters"], "levels": scores, "learning_curve": curves}


class OfPaper(OfAbility):
    """The task of one paper."""

    modules = ("abilities", "asking", "compression", "published", "significance")

    def __init__(self, name: str):
        self.name, self.paper = name, PAPERS[name]

    def about(self, job: Job) -> dict[str, str]:
        axis = "change of the paper's baseline" if job.preset.published else self.paper.axis
        return {"title": self.paper.title, "group": "published", "axis": axis, "about": self.paper.about}

    def settings(self, job: Job) -> dict[str, Any]:
        return {"device": job.device.type, "trials": [plain(trial) for trial in self.paper.trials(job.preset)]}

    def units(self, job: Job) -> int:
        return sum(trial.steps + 1 for trial in self.paper.trials(job.preset))

    def measure(self, job: Job, contestant: Contestant, seed: int, tick: Tick) -> dict[str, Any]:
        return measure(self.paper, self.paper.trials(job.preset), contestant, seed, job.device, tick)
