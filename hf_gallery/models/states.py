"""State of a layer: named tensors with the batch rows first, each of a kind that says what it allows.

A layer gets plain tensors, {name: tensor}, and returns its next state as {name: Kept}. The cache knows no layer's
names: it asks each `Kept` for what it wants to know.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from .columns import last_columns


@dataclass(frozen=True)
class Kept:
    """A tensor (B, ...) of a layer's state."""

    tensor: torch.Tensor

    kind: ClassVar[str]  # its name in files
    folds: ClassVar[bool] = False  # tokens went into it, and cannot be taken back
    columns: ClassVar[int | None] = None  # of time that it holds; None if it is not made of columns

    def ready(self) -> Kept | None:
        """Returns what the cache keeps, None for nothing: cut from its graph. All that may fail is done here, and
        nothing that a forward before this one left is changed."""
        return self.map(torch.Tensor.detach)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Kept:
        """The same kind with the tensor changed."""
        return type(self)(change(self.tensor))

    def take_back(self, removed: torch.Tensor, seen: torch.Tensor) -> Kept:
        """The same before its last tokens. removed (B,): how many of each row go; seen (B,): how many remain."""
        return self

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
        x, shortest = self.tensor, int(removed.min())
        remaining = x.shape[-2] - shortest
        # A row that loses more than others moves to the right, so that its last token comes last again.
        column = torch.arange(remaining) - (removed - shortest)[:, None]  # (B, remaining)
        shape = [len(removed), *[1] * (x.dim() - 3), remaining, 1]
        column = column.clamp(min=0).to(x.device).view(shape).expand(*x.shape[:-2], remaining, x.shape[-1])
        return type(self)(x.gather(-2, column))

    def last(self, count):
        return self.map(lambda x: last_columns(x, count))


class Fixed(Kept):
    """Belongs to the row as a whole: later tokens leave it as it is, an encoder's keys for example."""

    kind = "fixed"


class Folded(Kept):
    """Tokens were folded into it: a memory, a recurrent state."""

    kind = "folded"
    folds = True


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

KINDS: dict[str, type[Kept]] = {kind.kind: kind for kind in (Columns, Fixed, Folded, Derived, Places)}


def tensors_of(state: NextState) -> State:
    """A layer's next state as it reads it."""
    return {name: kept.tensor for name, kept in state.items()}
