"""Segments with a memory of what came before: the intervals of Transformer-XL, Longformer-XL and the Memorizing
Transformer, and the layer of the first two.

Query p sees [seg(p) - mem_len, p], seg(p) = p - p mod segment_length; in Transformer-XL with same_length
[p - mem_len + 1, p], in Longformer-XL what its window shows of that. With gradients, these are two parts: the keys of
its own segment, and those before, which carry no gradient to the states they were made from. Of a segment that an
earlier forward began, the own part is that of this forward alone, unless the cache carries gradients over. Letters:
see spans.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .attention import Position
from .attention_maps import Keys, attend_shown
from .blocks import ResidualLayer
from .columns import append_columns
from .context import ForwardContext
from .exporting import possibly, records_gradients
from .rows import Rows
from .spans import Spans
from .states import LayerOutput, State


@dataclass
class Parts:
    """A forward with gradients: which keys each query sees with gradient, and which without."""

    own: Spans  # of the new columns, those of the query's own segment; of [cached | new] if gradients are carried over
    before: Spans | None  # those before, in the columns [cached] or [cached | new]; None if nobody sees any
    crosses: bool  # `before` is over [cached | new]: somebody sees new columns of an earlier segment, or `carries`
    carries: bool = False  # gradients reach the columns of the own segment that earlier forwards have made


def segment_spans(
    rows: Rows,
    cached: int,
    *,
    segment_length: int,
    mem_len: int,
    same_length: bool = False,
    window: int | None = None,
    period: int | None = None,
    least: int = 0,
    carries: bool = False,
) -> tuple[Spans, Parts | None]:
    """The intervals over the columns [cached | new], and where gradients are recorded their parts.

    same_length: [p - mem_len + 1, p] instead, mem_len keys for every query. window: of these no key that is farther.
    period: nobody sees keys from before the last multiple of it, since positions start anew there. least: the first
    position that there is, below 0 where columns stand before a row's first token. carries: see Parts.
    """
    p = rows.positions  # (B or 1, T)
    segment = p - p % segment_length
    lower = p - mem_len + 1 if same_length else segment - mem_len
    if window is not None:
        lower = torch.maximum(lower, p - window)
    if period is not None:
        lower = torch.maximum(lower, p - p % period)
    spans = rows.spans(lower, p, cached, least)
    if not records_gradients():
        return spans, None
    if carries:
        before = rows.spans(lower, segment - 1, cached, least) if mem_len > 0 else None
        return spans, Parts(rows.spans(torch.maximum(lower, segment), p, cached, least), before, True, True)
    # Gradients stop at the segment's border, and at the forward's, whichever is nearer.
    border = torch.maximum(segment, p[:, :1])
    crosses = mem_len > 0 and possibly(segment > p[:, :1])
    before = rows.spans(lower, border - 1, cached, least) if cached or crosses else None
    return spans, Parts(rows.spans(torch.maximum(lower, border), p, 0), before, crosses)


Pair = tuple[torch.Tensor, torch.Tensor]  # keys and values (B, H, S, D)


def attend_segments(
    context: ForwardContext,
    query: torch.Tensor,
    own: Pair,
    before: Pair | None,
    parts: Parts,
    position: Position | None,
    **options,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`attend_shown` whose gradient stops at the segment's border: over a segment's own keys and over those before it,
    one softmax for both. position: of [cached | new] columns."""
    own_keys = Keys(*own, parts.own, position if parts.carries else _own_position(position, parts.own))
    if parts.before is None:
        return attend_shown(context, query, own_keys, **options)
    key, value = before
    first = key.shape[2]  # the column of the first new key
    if parts.carries:
        first = 0  # all are in both parts
    elif parts.crosses:
        first -= query.shape[2]
    elif position is not None:
        # `attend` counts distances from the end of the keys that it gets: without the new ones that is T nearer.
        position = position._replace(farthest=position.farthest - query.shape[2])
    older = Keys(key, value, parts.before, position)
    return attend_shown(context, query, own_keys._replace(start=first), older, **options)


class SegmentLayer(ResidualLayer):
    """A layer over segments with a memory of its past input. State: keys, values (B, H, C, D); after a forward with
    gradients hidden (B, C, E), that input itself, of which keys and values are made anew so that W_k and W_v learn."""

    def forward(self, x: torch.Tensor, context: Any, state: State) -> LayerOutput:
        """x (B, T, E). Returns x, the next state, and probabilities (B, H, T, C + T) or None."""
        y = self._attention_input(x)
        own = self.self_attn.keys_values(y)
        past = self._past(state, context, x)
        joined = before = None
        if context.parts is None or context.carries or (context.keeps_state and "keys" in state):
            max_columns = context.max_columns if context.keeps_state else None
            joined = tuple(context.append(a, b, max_columns) for a, b in zip(past or (None, None), own, strict=True))
        if context.parts is not None:
            if context.carries:
                past = self._past({name: kept.detach() for name, kept in state.items()}, context, x)
            before = self._before(x, past, context.parts)
        y, probabilities = self.self_attn(y, joined if context.carries else own, joined, before, context)
        new = self._next_state(x, joined, state, context) if context.keeps_state else {}
        x = self.add(x, y, self.self_attn_norm)
        y = self.feed_forward(self.feed_forward_norm(x) if self.pre else x)
        return self.add(x, y, self.feed_forward_norm), new, probabilities

    def _past(self, state, context, x):
        """Keys and values (B, H, C, D) of the cached columns; None without any."""
        if "hidden" in state:
            return self.self_attn.keys_values(self._attention_input(state["hidden"]))
        return (state["keys"], state["values"]) if state else None

    def _before(self, x, past, parts):
        if parts.before is None:  # nobody sees any, though rows that were emptied may have left a cache of no columns
            return None
        if not parts.crosses:
            return past
        new = self.self_attn.keys_values(self._attention_input(x.detach()))
        return new if past is None else tuple(map(append_columns, past, new))

    def _next_state(self, x, joined, state, context):
        if context.parts is not None and "keys" not in state:
            return context.columns(context.max_columns, hidden=append_columns(state.get("hidden"), x))
        keys, values = joined
        return context.columns(context.max_columns, keys=keys, values=values)

    def _attention_input(self, x):
        return self.self_attn_norm(x) if self.pre else x


def _own_position(position: Position | None, own: Spans) -> Position | None:
    """The entries of the table that a segment's own keys read."""
    if position is None:
        return None
    reach = min(own.reach(0), position.farthest)
    return position._replace(table=position.table[:, position.farthest - reach :], farthest=reach)
