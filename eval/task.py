"""A task of the benchmark: which cells it has, how one is measured, how its results add up, how they show."""

from __future__ import annotations

import abc
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from datasets import DatasetDict

from hf_gallery.data import load_corpus

from .cells import Cell
from .code import fingerprint
from .contestants import Contestant
from .significance import DOCUMENT
from .training import Tick

if TYPE_CHECKING:
    from .presets import Preset  # which needs the names of the abilities, and they are tasks


@dataclasses.dataclass(frozen=True)
class Job:
    """A command's request: how much work, on which text, where. texts: what was read of the corpus, see `text`."""

    preset: Preset
    corpus: str
    device: torch.device
    texts: dict[bool, DatasetDict] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def of(self, contestant: str) -> Job:
        """The same with what the preset has for one contestant; they share what is read of the corpus."""
        return dataclasses.replace(self, preset=self.preset.of(contestant))

    @property
    def text(self) -> DatasetDict:
        """The corpus, read once, and only if a cell that needs it is missing."""
        return self._read(labels=False)

    @property
    def labelled_text(self) -> DatasetDict:
        """The corpus with its labels, if it has any."""
        return self._read(labels=True)

    def _read(self, labels: bool) -> DatasetDict:
        if labels not in self.texts:
            self.texts[labels] = load_corpus(self.corpus, labels=labels)
        return self.texts[labels]


@dataclasses.dataclass(frozen=True)
class Family:
    """Columns that stand together. prefix: what their headings begin with where they stand beside other families'.
    baseline: what the last row of their own table is called, in which stands what knows nothing of the input."""

    title: str
    prefix: str = ""
    baseline: str = ""


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of the tables. cell: what it says of a contestant, from its name and its summary, "-" where nothing
    was measured. baseline: its cell in the last row. prefix: where it is not the family's own."""

    family: Family
    heading: str
    cell: Callable[[str, dict[str, Any]], str]
    baseline: str = "-"
    prefix: str | None = None

    @property
    def whole(self) -> str:
        """The heading where it must tell the family too."""
        prefix = self.family.prefix if self.prefix is None else self.prefix
        return f"{prefix} {self.heading}".strip()


class Task(abc.ABC):
    """A thing that the benchmark measures."""

    name: str
    modules: tuple[str, ...]  # of this package, in which stands what decides its numbers

    @abc.abstractmethod
    def settings(self, job: Job) -> dict[str, Any]:
        """Everything that decides a cell's result, as JSON has it."""

    @abc.abstractmethod
    def add(self, results: dict[str, Any], cell: dict[str, Any]) -> None:
        """Enters a measured cell in the results of its run."""

    @abc.abstractmethod
    def columns(self, results: dict[str, Any]) -> list[Column]:
        """The columns that tables show of it."""

    @property
    def code(self) -> str:
        """The hash of the code that decides its numbers."""
        return fingerprint(self.modules)

    def about(self, job: Job) -> dict[str, str] | None:
        """Title, group, axis and description of a task that is an ability; None for others."""
        return None

    def longest(self, job: Job) -> int:
        """Tokens that a model must be able to read at once; 0 where texts can be read in parts."""
        return 0

    def cells(self, job: Job, contestants: list[Contestant], seed: int) -> Iterator[Cell]:
        """Those of one seed, which processes share; none unless a task says so."""
        return iter(())

    def cells_of_all(self, job: Job, contestants: list[Contestant]) -> Iterator[Cell]:
        """Those that measure all contestants in turns, after everything else; none unless a task says so."""
        return iter(())


class OfEach(Task):
    """A task with a cell for each contestant at each seed."""

    @abc.abstractmethod
    def units(self, job: Job) -> int:
        """Ticks of one cell."""

    @abc.abstractmethod
    def measure(self, job: Job, contestant: Contestant, seed: int, tick: Tick) -> Any:
        """The result of one cell, as JSON has it."""

    def cells(self, job: Job, contestants: list[Contestant], seed: int) -> Iterator[Cell]:
        units = self.units(job)
        for c in contestants:
            own, given = job.of(c.name), {} if c.own is None else {"model": c.own}
            measure = functools.partial(self.measure, own, c, seed)
            yield Cell(self.name, c.name, seed, self.settings(own) | given, units, measure, self.code)


def plain(settings: Any) -> dict[str, Any]:
    """A dataclass as JSON would give it back, so that saved and present settings can be compared."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def add_up(totals: dict[str, Any], found: dict[str, Any]) -> None:
    """Adds up by label what can be counted, and lays units of answers one behind another, but for documents, which are
    the same for every seed, and are added up each; so is all else."""
    for label, counts in found.items():
        counted = [key for key in ("asked", "correct", "bits", "bytes", "words") if key in counts]
        known = totals.get(label)
        if known is None:
            totals[label] = dict(counts)
            continue
        for key in counted:
            known[key] += counts[key]
        if "by_unit" in known and "by_unit" in counts:
            own, more = known["by_unit"], counts["by_unit"]
            keys = [key for key in own if key != "unit"]
            known["by_unit"] = own | {key: _together(own["unit"], own[key], more[key]) for key in keys}


def _together(unit: str, counts: str, more: str) -> str:
    """The counts of units of two seeds, see `add_up`."""
    if unit != DOCUMENT:
        return f"{counts} {more}"
    return " ".join(f"{float(a) + float(b):.12g}" for a, b in zip(counts.split(), more.split(), strict=True))


def share(score: dict[str, Any] | None) -> str:
    """Right answers as the tables have them."""
    return f"{100 * score['correct'] / max(1, score['asked']):.0f} %" if score else "-"
