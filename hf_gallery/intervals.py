"""Intervals as a layer is given them: which columns each query sees, read from the context of one call.

Drawings (roads.py) and `look` (looking/watch.py) both read them here. Contexts are told apart by what they have and
not by their classes, since a model with remote code has classes of its own. Letters: see models/spans.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Interval:
    """The columns [cached | new] that the queries of one call see, of one row without padding.

    mask (T, C + T): True where the query sees the column. queries (T,), keys (C + T,): their positions; below 0 for
    columns before the row's first token. border (T,): where the query's segment begins, before which keys are memory;
    None where a text is not cut, or segments carry nothing on.
    """

    mask: torch.Tensor
    queries: torch.Tensor
    keys: torch.Tensor
    border: torch.Tensor | None

    @property
    def remembered(self) -> torch.Tensor:
        """Keys before the query's segment, (T, C + T), or (1, C + T) where there is no memory."""
        if self.border is None:
            return torch.zeros(1, len(self.keys), dtype=torch.bool)
        return self.keys < self.border[:, None]

    @property
    def first(self) -> torch.Tensor:
        """The first position that each query sees, (T,); its own where it sees none."""
        found = self.keys[self.mask.byte().argmax(1)].clamp(min=0)
        return torch.where(self.mask.any(1), torch.minimum(found, self.queries), self.queries)


def interval_of(attention: Any, context: Any, cached: int, config: Any) -> Interval:
    """The interval of one call of a layer, from the model's own Spans. cached: columns before the new ones."""
    columns = cached + context.rows.width
    if hasattr(context, "window"):
        mask = context.window(cached).visible(columns)[0]
    elif getattr(context, "sizes", None) is not None:
        mask = context.segments(attention.left)[0].visible(columns)[0]
    elif hasattr(context, "folding"):
        mask = _unfolded(context.folding(attention.dilation), attention, context.rows.width, columns)
    else:
        mask = context.spans.visible(columns)[0]
    queries = context.rows.positions[0].cpu()
    length = getattr(config, "segment_length", None) if hasattr(config, "mem_len") else None
    border = None if length is None else queries - queries % length
    return Interval(mask.cpu(), queries, queries[0] - cached + torch.arange(columns), border)


def _unfolded(folding: Any, attention: Any, width: int, columns: int) -> torch.Tensor:
    """The mask (T, C + T) of a window that is dilated: of intervals in phases of columns."""
    query, key = _places(folding.queries, width), _places(folding.keys, columns)  # (g, T'), (g, S')
    seen = folding.window(attention.left, attention.right).visible(key.shape[1])
    seen = seen & (query >= 0)[..., None] & (key >= 0)[:, None]
    phase, t, s = seen.nonzero(as_tuple=True)
    mask = torch.zeros(width, columns, dtype=torch.bool)
    mask[query[phase, t], key[phase, s]] = True
    return mask


def _places(fold: Any, columns: int) -> torch.Tensor:
    """The column that stands at each folded place (phases, any), -1 where there is none."""
    return fold(1 + torch.arange(columns).view(1, 1, -1, 1))[:, 0, :, 0] - 1
