"""Attention as layers call it: `attend`, or where output_attentions asks for them with its probabilities.

The output is then computed from the very map that is returned, as in transformers: a gradient can be retained on it,
and what is learned from it reaches the parameters. That takes all T x S probabilities; `attend` never has them.

Letters: see spans.py.
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .attention import Position, attend, attend_naive, attend_parts, join
from .attention_problem import without_autocast
from .context import ForwardContext
from .spans import Spans


class Keys(NamedTuple):
    """Keys (B, H, S, D) with their values, which of them each query sees, and the position term of `attend`.

    start: the column of the map, [cached | new], that the first key stands in.
    """

    key: torch.Tensor
    value: torch.Tensor
    spans: Spans
    position: Position | None = None
    start: int = 0

    def attend(self, query: torch.Tensor, **options):
        return attend(query, self.key, self.value, self.spans, position=self.position, **options)


def attend_shown(
    context: ForwardContext,
    query: torch.Tensor,
    *parts: Keys,
    scale: float | None = None,
    dropout: float = 0.0,
    keys_too: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`attend` over the disjoint keys of all parts, one softmax for all.

    Returns out (B, H, T, Dv), and if the context asks for attentions the probabilities before dropout, over the
    input's columns (see `show` for keys_too); else None.
    """
    if not context.output_attentions:
        options = dict(scale=scale, dropout=dropout, implementation=context.implementation)
        if len(parts) == 1:
            return parts[0].attend(query, **options), None
        return attend_parts(query, [part[:4] for part in parts], **options), None
    columns = max(part.start + part.key.shape[2] for part in parts)
    with without_autocast(query):
        if len(parts) == 1 and not parts[0].start and not dropout and context.rows.index is None:  # the map as it is
            key, value, spans, position, _ = parts[0]
            result, _, probabilities = attend_naive(query, key, value, spans, position=position, scale=scale)
            return result.to(query.dtype), probabilities
        maps = []
        for key, value, spans, position, start in parts:
            _, lse, probabilities = attend_naive(query, key, value, spans, position=position, scale=scale)
            maps.append((F.pad(probabilities, (start, columns - start - key.shape[2])), lse))
        shown, probabilities = show(context, reduce(join, maps)[0], keys_too)  # (B, H, T, columns)
        kept = F.dropout(probabilities, dropout)
        out = sum(_weighed(kept, part) for part in parts)
    return out.to(query.dtype), shown


def show(context: ForwardContext, probabilities: torch.Tensor, keys_too: bool = True):
    """A map of attention (B, H, T, S) as it is returned, over the input's columns, and the map that the output is to
    be computed from: the same as that given, made from the one returned.

    keys_too: the last T keys are the new tokens, in the input's columns too; else keys stay as they are.
    """
    shown = context.rows.unpack_attentions(probabilities, keys_too)
    return shown, context.rows.pack_attentions(shown, keys_too)


def _weighed(probabilities: torch.Tensor, part: Keys) -> torch.Tensor:
    """The sum of a part's values (B, H, T, Dv), by its share of the probabilities (B, H, T, columns)."""
    count = part.key.shape[2]
    visible = part.spans.visible(count).to(probabilities.device)[:, None]  # (B or 1, 1, T, S)
    share = probabilities[..., part.start : part.start + count].masked_fill(~visible, 0.0)
    return share @ part.value.to(probabilities.dtype)
