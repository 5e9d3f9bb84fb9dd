"""State of a layer: named tensors with the batch rows first, each of a kind that says what it allows.

A layer gets plain tensors, {name: tensor}, and returns its next state as {name: Kept}. The cache knows no layer's
names: it asks each `Kept` for what it wants to know.

While a cache records, tokens can be taken back from every kind: columns of time are simply kept, and what tokens are
folded into comes with a `Record` of what it was before each of its changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from .columns import last_columns, whole_columns


@dataclass(frozen=True)
class Kept:
    """A tensor (B, ...) of a layer's state."""

    tensor: torch.Tensor

    kind: ClassVar[str]  # its name in files
    folds: ClassVar[bool] = False  # tokens went into it, and only a record can take them back
    columns: ClassVar[int | None] = None  # of time that it holds; None if it is not made of columns

    def ready(self, detaches: bool = True) -> Kept | None:
        """Returns what the cache keeps, None for nothing: cut from its graph if it detaches. All that may fail is done
        here, and nothing that a forward before this one left is changed."""
        return self.map(torch.Tensor.detach) if detaches else self

    def after(self, old: Kept | None) -> Kept:
        """The same with what `old`, the state before this forward, has recorded, if this one records too."""
        return self

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Kept:
        """The same kind with its tensors changed."""
        return type(self)(change(self.tensor))

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that it holds."""
        return [self.tensor]

    @property
    def can_take_back(self) -> bool:
        """Tells whether the tokens that were recorded can be taken back."""
        return True

    def take_back(self, removed: torch.Tensor, seen: torch.Tensor) -> Kept:
        """The same before its last tokens. removed (B,): how many of each row go; seen (B,): how many remain."""
        return self

    def settled(self, count: int | None) -> Kept:
        """The same with at most `count` columns of time, and nothing recorded: no token is taken back any more."""
        return self.last(count)

    def last(self, count: int | None) -> Kept:
        """The same with at most `count` columns of time; None leaves all."""
        return self


class Columns(Kept):
    """Columns of time, (B, H, C, D) or (B, C, E): each row's last token stands in the last one (see rows.py)."""

    kind = "columns"

    @property
    def columns(self) -> int:
        return self.tensor.shape[-2]

    def take_back(self, removed, seen):
        return self.map(lambda x: without_last(x, removed))

    def last(self, count):
        return self.map(lambda x: last_columns(x, count))


class Fixed(Kept):
    """Belongs to the row as a whole: later tokens leave it as it is, an encoder's keys for example."""

    kind = "fixed"


@dataclass(frozen=True)
class Record:
    """The earlier values of a state, one from before each of its changes, oldest first.

    earlier (B, V, ...): those values. until (B, V), on the CPU: how many tokens the row had read when it changed; 0
    where the row's state did not.
    """

    earlier: torch.Tensor
    until: torch.Tensor

    @classmethod
    def of(cls, changes: list[tuple[torch.Tensor, torch.Tensor]], now: torch.Tensor) -> Record:
        """Of the changes of one forward, as (earlier (B, ...), until (B,)). now (B, ...): the state after them."""
        if not changes:
            return cls(now[:, None][:, :0], torch.zeros(len(now), 0, dtype=torch.long))
        earlier, until = zip(*changes, strict=True)
        return cls(torch.stack(earlier, dim=1), torch.stack(until, dim=1))

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Record:
        """The same with its tensors changed."""
        return replace(self, **self.changed(change))

    def after(self, old: Record) -> Record:
        """Both, `old` first. A decode step that changes nothing copies nothing."""
        return replace(self, **self.behind(old)) if self.until.shape[1] else old

    def emptied(self) -> Record:
        """The same without a change, in memory of its own."""
        return self.map(lambda x: x[:, :0].clone())

    def changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> State:
        """Its fields, changed."""
        return {"earlier": change(self.earlier), "until": change(self.until).cpu()}

    def behind(self, old: Any) -> State:
        """Its fields, with those of `old` before them."""
        earlier = torch.cat([old.earlier.to(self.earlier), self.earlier], dim=1)
        return {"earlier": earlier, "until": torch.cat([old.until, self.until], dim=1)}


@dataclass(frozen=True)
class Folded(Kept):
    """Tokens were folded into it, a block at a time: a recurrent state (B, ...). record: where its cache records."""

    record: Record | None = None

    kind = "folded"
    folds = True

    def map(self, change):
        record = None if self.record is None else self.record.map(change)
        return replace(self, tensor=change(self.tensor), record=record)

    def after(self, old):
        past = getattr(old, "record", None)
        return self if self.record is None or past is None else replace(self, record=self.record.after(past))

    @property
    def tensors(self):
        return [self.tensor] if self.record is None else [self.tensor, self.record.earlier]

    @property
    def can_take_back(self):
        return self.record is not None

    def take_back(self, removed, seen):
        gone = self.record.until > seen[:, None]  # (B, V)
        if not bool(gone.any()):
            return self
        # The first change that goes was made from what the state was then.
        first, device = gone.to(torch.uint8).argmax(dim=1), self.tensor.device
        earlier = self.record.earlier[torch.arange(len(seen), device=device), first.to(device)]  # (B, ...)
        changes = gone.any(1).to(device).view(-1, *[1] * (self.tensor.dim() - 1))
        return replace(self, tensor=torch.where(changes, earlier.to(self.tensor), self.tensor))

    def settled(self, count):
        return self if self.record is None else replace(self, record=self.record.emptied())


@dataclass(frozen=True)
class SegmentColumns(Kept):
    """Columns (B, H, C, D) of a text's segments: each row's tokens, and other columns before and behind each segment.

    Made while a cache records, they are those of all tokens since, and say how long a segment is and how many `around`
    stand on each of its sides; else of the row's own segment, of which length 0 says nothing.
    """

    length: int = 0
    around: int = 0

    kind = "segment"
    folds = True

    def map(self, change):
        return replace(self, tensor=change(self.tensor))

    @property
    def can_take_back(self):
        return self.length > 0

    def take_back(self, removed, seen):
        gone = self._count(seen + removed) - self._count(seen)
        return self.map(lambda x: without_last(x, gone))

    def _count(self, seen: torch.Tensor) -> torch.Tensor:
        """The columns of as many tokens (B,): a segment has those behind it when it is complete, (B,)."""
        whole, rest = seen // self.length, seen % self.length
        return whole * (self.length + 2 * self.around) + torch.where(rest > 0, self.around + rest, 0)

    def settled(self, count):
        return self if count is None else SegmentColumns(whole_columns(last_columns(self.tensor, count), count))


class Derived(Kept):
    """Follows from the other state and from weights, and is made anew when either has changed. It is not saved."""

    kind = "derived"


class Places(Kept):
    """Places of some tokens in their rows, (B, any), counted from 1; 0 for none."""

    kind = "places"

    def take_back(self, removed, seen):
        return self.map(lambda x: x.masked_fill(x > seen[:, None], 0))


State = dict[str, torch.Tensor]  # as a layer reads it
NextState = dict[str, Kept]  # as a layer returns it
# Of a layer: x (B, T, E), its next state, and probabilities (B, H, T, C + T) where output_attentions asks for them.
LayerOutput = tuple[torch.Tensor, NextState, torch.Tensor | None]

KINDS: dict[str, type[Kept]] = {kind.kind: kind for kind in (Columns, Fixed, Folded, SegmentColumns, Derived, Places)}


def tensors_of(state: NextState) -> State:
    """A layer's next state as it reads it."""
    return {name: kept.tensor for name, kept in state.items()}


def without_last(x: torch.Tensor, removed: torch.Tensor) -> torch.Tensor:
    """Columns of time x (B, ..., C, D) without the last `removed` (B,) of each row."""
    shortest = int(removed.min())
    remaining = x.shape[-2] - shortest
    # A row that loses more than others moves to the right, so that its last token comes last again.
    column = torch.arange(remaining) - (removed - shortest)[:, None]  # (B, remaining)
    shape = [len(removed), *[1] * (x.dim() - 3), remaining, 1]
    column = column.clamp(min=0).to(x.device).view(shape).expand(*x.shape[:-2], remaining, x.shape[-1])
    return x.gather(-2, column)


def follow(new: NextState, old: NextState) -> NextState:
    """A layer's next state behind the one that it was made from, with what that one has recorded."""
    return {name: kept.after(old.get(name)) for name, kept in new.items()}


def taken_back(state: NextState, removed: torch.Tensor, seen: torch.Tensor) -> NextState:
    """A layer's state before its last tokens, see `Kept.take_back`; without what follows from a state that changed."""
    found = {name: kept.take_back(removed, seen) for name, kept in state.items()}
    changes = any(kept.folds and kept is not state[name] for name, kept in found.items())
    return {name: kept for name, kept in found.items() if not (changes and isinstance(kept, Derived))}
