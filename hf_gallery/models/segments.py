"""Segments with a memory of what came before: the intervals of Transformer-XL and the Memorizing Transformer.

Query p sees [seg(p) - mem_len, p], seg(p) = p - p mod segment_length. With gradients, that is two parts: the keys of
its own segment, and those before, which carry no gradient to the states they were made from. Letters: see spans.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .rows import Rows
from .spans import Spans


@dataclass
class Parts:
    """A forward with gradients: which keys each query sees with gradient, and which without."""

    own: Spans  # of the new columns, those of the query's own segment
    before: Spans | None  # those before, in the columns [cached] or [cached | new]; None if nobody sees any
    crosses: bool  # somebody sees new columns of an earlier segment, so `before` is over [cached | new]


def segment_spans(
    rows: Rows,
    cached: int,
    segment_length: int,
    mem_len: int,
    same_length: bool = False,
    period: int | None = None,
    least: int = 0,
) -> tuple[Spans, Parts | None]:
    """The intervals over the columns [cached | new], and where gradients are recorded their parts.

    same_length: [p - mem_len + 1, p] instead, mem_len keys for every query. period: nobody sees keys from before the
    last multiple of it, since positions start anew there. least: the first position that there is, below 0 where
    columns stand before a row's first token.
    """
    p = rows.positions  # (B or 1, T)
    segment = p - p % segment_length
    lower = p - mem_len + 1 if same_length else segment - mem_len
    if period is not None:
        lower = torch.maximum(lower, p - p % period)
    spans = rows.spans(lower, p, cached, least)
    if not torch.is_grad_enabled():
        return spans, None
    # Gradients stop at the segment's border, and at the forward's, whichever is nearer.
    border = torch.maximum(segment, p[:, :1])
    crosses = mem_len > 0 and bool((segment > p[:, :1]).any())
    before = rows.spans(lower, border - 1, cached, least) if cached or crosses else None
    return spans, Parts(rows.spans(torch.maximum(lower, border), p, 0), before, crosses)
