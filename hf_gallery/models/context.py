"""Inputs shared by all layers of one forward. Each variant adds the intervals and tables that its layers need."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from .columns import append_columns, next_columns
from .exporting import once
from .rings import RingColumns
from .rows import Rows
from .spans import Spans
from .states import Columns, NextState, State

Wider = TypeVar("Wider", bound="ForwardContext")


@dataclass(kw_only=True)
class ForwardContext:
    """One forward, as every layer sees it.

    device: of the input; parameters may be elsewhere, offloaded. cached: columns of time that the cache holds,
    C. keeps_state: a cache wants the new state, `max_columns` columns of it (None = all). records: and what it was
    before each of its changes, so that tokens can be taken back. no_grad: no gradients are recorded. carries:
    they are, and reach what earlier forwards have left. facts: what the cache keeps of each row for the whole model.
    packed: several documents may lie in a row of the input. tables: of the layers, which follow from weights alone;
    None where no cache can keep them. memo: see `once`.
    """

    rows: Rows
    device: torch.device | None = None
    cached: int = 0
    keeps_state: bool = False
    max_columns: int | None = None
    records: bool = False
    no_grad: bool = False
    carries: bool = False
    output_attentions: bool = False
    output_hidden_states: bool = False
    packed: bool = False
    implementation: str = "eager"
    facts: NextState = field(default_factory=dict)
    tables: dict[int, torch.Tensor] | None = None
    memo: dict = field(default_factory=dict)

    def widened(self, kind: type[Wider], **own) -> Wider:
        """The same as a variant's Context, with its own fields."""
        return kind(**(vars(self) | own))

    def once(self, key: Hashable, work: Callable[[], Any]) -> Any:
        """Returns what several layers need alike, worked out by the first that asks for it."""
        return once(self.memo, key, work)

    def has_table(self, layer: int) -> bool:
        """Tells whether the cache holds the layer's table."""
        return self.tables is not None and layer in self.tables

    def table(self, layer: int, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """A layer's table, which follows from weights alone: the cache's, while the weights stay as they are."""
        if self.tables is None:
            return work()
        if layer not in self.tables:
            self.tables[layer] = work().contiguous()  # as a kernel wants it, at every token
        return self.tables[layer]

    def extend(self, state: State, max_columns: int | None = None, **new: torch.Tensor):
        """[cached | new] columns (B, ..., C + T, D) for each name, in order, and last the layer's next state.

        max_columns: of this layer's columns, where it keeps fewer than others do.
        """
        max_columns = self.max_columns if max_columns is None or self.max_columns is None else max_columns
        joined = {name: self.append(state.get(name), x, max_columns) for name, x in new.items()}
        kept = self.columns(max_columns, **joined) if self.keeps_state else {}
        return *joined.values(), kept

    def append(self, past: torch.Tensor | None, new: torch.Tensor, max_columns: int | None) -> torch.Tensor:
        """[cached | new] columns (B, ..., C + T, D), or the ring that they lie in."""
        if self.rows.steps:
            return self.rows.append(past, new)
        return append_columns(past, new, max_columns)

    def columns(self, max_columns: int | None, **joined: torch.Tensor) -> NextState:
        """Columns of [cached | new] that a cache keeps, `max_columns` of them."""
        if self.rows.steps:
            return {name: RingColumns(x) for name, x in joined.items()}
        return {name: Columns(next_columns(x, self.rows, max_columns)) for name, x in joined.items()}


@dataclass(kw_only=True)
class IntervalContext(ForwardContext):
    """One forward whose layers all see alike. spans: the [cached | new] columns that each query sees."""

    spans: Spans
