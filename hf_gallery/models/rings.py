"""Rings: columns of time in memory of one size, for decode steps whose shapes never change.

A ring has N slots, and the column of position p lies in slot p mod N. One token joins it by a write to one slot, where
it takes the place of the column N positions before, which nobody sees any more. How far a row has come is a tensor on
the ring's device, so a step asks nothing and is the same graph at every token:

    growing    [cached | new]   columns by position, each row's last token in the last one      rows.py, columns.py
    ring       p mod N          the columns of the last N positions, the new token among them

`attend_ring` is the attention of one query over a ring. Letters: see spans.py. N slots.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .attention_problem import Position, compute_dtype, without_autocast
from .exporting import in_one_graph, once
from .rows import Rows
from .spans import Spans
from .states import Columns, Kept, NextState


def position_in(newest: torch.Tensor, slot: torch.Tensor, slots: int) -> torch.Tensor:
    """The last position up to the newest one that lies in a slot of a ring, below 0 where it has held none."""
    return newest - (newest - slot) % slots


class RingColumns(Kept):
    """Columns of time in a ring (B, H, N, D)."""

    kind = "ring"

    @property
    def columns(self) -> int:
        return self.tensor.shape[-2]


class StepRows(Rows):
    """One column of new tokens behind what rings hold. Its bookkeeping lies with the rings, and is asked nothing.

    seen: (B,), tokens that each row has behind it. mask: (B, 1), True where the column is the row's token; None =
    everywhere.
    """

    steps = True

    def __init__(self, seen: torch.Tensor, mask: torch.Tensor | None):
        batch = len(seen)
        self.batch, self.columns, self.fresh, self.mask = batch, 1, None, mask
        if mask is None:
            index, lengths = None, torch.ones_like(seen)
        else:
            index, lengths = torch.arange(batch, device=seen.device)[:, None], mask.sum(1)
        self._lay(index, lengths, seen, 1, None)
        self._memo: dict = {}

    @property
    def positions(self) -> torch.Tensor:
        return self.first  # of one column

    @property
    def last(self) -> torch.Tensor:
        # Not super().last, which torch.compile cannot follow.
        return self.first if self.mask is None else (self.seen + self.lengths)[:, None] - 1

    def spans(self, lower: torch.Tensor, upper: torch.Tensor, cached: int, least: int = 0) -> RingSpans:
        return RingSpans(lower.clamp(min=least), upper, self)

    def column_positions(self, columns: int) -> torch.Tensor:
        newest = self.last  # (B, 1)
        return position_in(newest, torch.arange(columns, device=newest.device), columns)

    def append(self, ring: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """The ring (B, H, N, D) with the column new (B, H, 1, D) in it: the given one, outside of graphs."""
        slots = ring.shape[2]
        return self.put(ring, new, once(self._memo, ("slot", slots), lambda: self.seen % slots))

    def put(self, ring: torch.Tensor, new: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        """`append` in the slot (B,), of the rows that have a token."""
        rows, heads = (once(self._memo, n, lambda n=n: torch.arange(n, device=slot.device)) for n in ring.shape[:2])
        at, column = (rows[:, None], heads[None], slot[:, None]), new[:, :, 0].to(ring.dtype)  # (B, H, D)
        if self.mask is not None:
            column = torch.where(self.mask[..., None], column, ring[at])
        if in_one_graph():
            return ring.index_put(at, column)  # which a compiler does in place, unlike scatter
        # In place: a copy would read all of the past. Nobody sees again what stood there, should this forward fail.
        return ring.index_put_(at, column)


class RingSpans(Spans):
    """The interval [lower, upper] of positions (B or 1, 1) that each row's one query sees, in whatever ring.

    dilation: it sees every such position of these, counted from its own."""

    of_ring = True

    def __init__(self, lower: torch.Tensor, upper: torch.Tensor, rows: StepRows, dilation: int = 1):
        super().__init__(lower, upper)
        self.rows, self.dilation = rows, dilation

    def dilated(self, dilation: int) -> RingSpans:
        return RingSpans(self.lower, self.upper, self.rows, dilation)

    def reach(self, offset: int) -> int:
        return offset

    @property
    def seen_upper(self) -> torch.Tensor:
        """`upper`, -1 in rows without a token, which see nothing."""
        mask = self.rows.mask
        return self._once("seen", lambda: self.upper if mask is None else torch.where(mask, self.upper, -1))

    def ring(self, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Distances from the query back to each of the slots, counted in dilations, and which of them it sees:
        (B, 1, N) both."""
        position = self.rows.column_positions(slots)
        visible = (position >= self.lower) & (position <= self.upper)
        if self.rows.mask is not None:
            visible = visible & self.rows.mask
        distance = self.rows.first - position
        if self.dilation > 1:
            distance, visible = distance // self.dilation, visible & (distance % self.dilation == 0)
        return distance[:, None], visible[:, None]


def attend_ring(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: RingSpans,
    *,
    position: Position | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend` of a step's query (B, H, T, D) over rings of keys (B, H, N, D) and values (B, H, N, Dv): out
    (B, H, T, Dv) and lse (B, H, T)."""
    dtype = compute_dtype(query)
    distance, visible = (x[:, None] for x in spans.ring(key.shape[2]))  # (B, 1, 1 or T, N)
    with without_autocast(query):
        scores = query.to(dtype) @ key.to(dtype).mT  # (B, H, T, N)
        if position is not None:
            entry = (position.farthest - distance).clamp(0, position.table.shape[1] - 1)  # what is clamped is not seen
            scores = scores + _term(position, entry, dtype)
        scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
        scores = scores.masked_fill(~visible, -math.inf)
        lse = scores.logsumexp(-1, keepdim=True)
        probabilities = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0))
        out = F.dropout(probabilities, dropout) @ value.to(dtype)
    return out.to(query.dtype), lse.squeeze(-1)


def _term(position: Position, entry: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The position's term (B, H, 1, N) of the entries (B, 1, 1, N) of its table."""
    if position.query is None:
        return position.table.to(dtype)[:, entry[:, 0, 0]].transpose(0, 1)[:, :, None]
    term = position.query.to(dtype) @ position.table.to(dtype).mT  # (B, H, 1, R)
    return term.gather(-1, entry.expand(-1, term.shape[1], -1, -1))


def lay(x: torch.Tensor, seen: torch.Tensor, slots: int) -> torch.Tensor:
    """Columns x (B, H, C, D), each row's last token in the last one, as a ring of as many slots; zeros where it is not
    filled. seen: (B,), tokens of each row."""
    newest = seen.to(x.device)[:, None] - 1
    age = (newest - torch.arange(slots, device=x.device)) % slots  # (B, N) of each slot, 0 for the newest
    x = F.pad(x, (0, 0, 1, 0))  # zeros in front, for what is not filled
    return _columns(x, (x.shape[2] - 1 - age).clamp(min=0))


def unlay(ring: torch.Tensor, seen: torch.Tensor, count: int) -> torch.Tensor:
    """The inverse of `lay`: the last `count` columns of a ring (B, H, N, D), each row's last token in the last one."""
    age = torch.arange(count - 1, -1, -1, device=ring.device)
    return _columns(ring, (seen.to(ring.device)[:, None] - 1 - age) % ring.shape[2])


def _columns(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Columns at (B, any) of x (B, H, C, D)."""
    return x.gather(2, at[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


@dataclass(frozen=True)
class RingLayout:
    """The way in which a static cache holds what a growing one has as columns of time. slots: of the ring."""

    slots: int

    def lay(self, name: str, state: NextState, seen: torch.Tensor) -> torch.Tensor:
        """The ring of a growing cache's state of that name; seen: (B,), tokens of each row."""
        return lay(state[name].tensor, seen, self.slots)

    def unlay(self, ring: torch.Tensor, seen: torch.Tensor) -> Kept | None:
        """The inverse of `lay`; None where a growing cache has nothing yet."""
        return Columns(unlay(ring, seen, min(int(seen.max()), self.slots)))
