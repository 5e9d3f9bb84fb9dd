"""Dilated windows and global tokens of Longformer (Beltagy, Peters, Cohan 2020, section 3.1) as intervals of columns.

A window dilated by g holds every g-th key. Columns cut into g phases, of every g-th column each, make it a plain
window again:

    columns    0 1 2 3 4 5 6 7 8           phase 0   0 3 6
    g = 3                              ->  phase 1   1 4 7      a query in column 7 with a window of 2 sees 1, 4, 7:
                                           phase 2   2 5 8      the interval [0, 2] of phase 1

Global tokens that a query's window does not hold are seen through a second, short list of keys. Letters: see spans.py.
g dilation and phases, G global tokens, S and T' keys and queries of a phase.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .documents import Documents
from .exporting import asks_later, require
from .rows import Rows
from .spans import Spans


class Folding:
    """Columns [cached | new] cut into g phases of every g-th column, for a window dilated by g. g = 1 moves nothing.

    Columns are padded in front so that they end together; queries too, to a multiple of g.
    """

    def __init__(self, rows: Rows, cached: int, dilation: int):
        self.g, self.rows, self.cached = dilation, rows, cached
        columns = cached + rows.width
        self.front = -columns % dilation  # before the keys
        self.early = (self.front + cached) % dilation  # before the queries, within their first g

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, C + T, D) to (B * g, H, S, D)."""
        return self._fold(x, self.front)

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, T, D) to (B * g, H, T', D)."""
        return self._fold(x, self.early)

    def unfold(self, x: torch.Tensor) -> torch.Tensor:
        """Results of queries (B * g, H, T'[, D]) back to (B, H, T[, D])."""
        if self.g == 1:
            return x
        x = x.unflatten(0, (-1, self.g)).movedim(1, 3)  # (B, H, T', g[, D])
        return x.flatten(2, 3)[:, :, self.early :]

    def _fold(self, x, pad):
        if self.g == 1:
            return x
        x = F.pad(x, (0, 0, pad, 0)).unflatten(2, (-1, self.g))  # (B, H, S, g, D)
        return x.permute(0, 3, 1, 2, 4).flatten(0, 1)

    def positions(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions of the folded queries in their rows (B or 1, g, T'), and whether there is a token at all."""
        last = self.rows.last[..., None]
        first = self.rows.first[..., None].to(last.device)
        # Packed query, negative before the first.
        t = torch.arange(self.early + self.rows.width, device=last.device) - self.early
        p = first + t.view(-1, self.g).T  # (B or 1, g, T')
        return p, (p >= first) & (p <= last)

    def window(self, left: int, right: int) -> Spans:
        """The intervals of `left` keys before and `right` after every query, in folded columns."""
        p, real = self.positions()
        last = self.rows.last[..., None]
        # The query's own column.
        at = (self.front + self.cached - self.early) // self.g + torch.arange(p.shape[-1], device=p.device)
        lower = at - (p // self.g).clamp(max=left)
        upper = at + ((last - p) // self.g).clamp(max=right)
        return self._spans(lower, upper, real)

    def outside(self, globals_: GlobalTokens, left: int, right: int) -> tuple[torch.Tensor, list[Spans]]:
        """The global keys that a query sees and its window does not hold, as intervals of a list of global keys.

        The list of a row's phase holds first the keys of other phases, which no window of it holds, then those of
        its own phase, each by position. Returns the order (B * g, G) of each list, and disjoint intervals of it.
        """
        b = self.rows.seen.shape[0]
        p, real = (x.expand(b, -1, -1) for x in self.positions())  # (B, g, T')
        position = globals_.positions[:, None].expand(-1, self.g, -1)  # (B, g, G)
        missing = position < 0
        same = (position - p[..., :1]) % self.g == 0  # a key of the queries' own phase
        others = _sorted(position, ~same & ~missing)
        own = _sorted(position, same & ~missing)
        start = (~same & ~missing).sum(-1, keepdim=True)  # (B, g, 1): where the list's own phase begins
        before_window = start + _count_below(own, p - left * self.g)
        if globals_.causal:
            intervals = [(start.expand_as(p), before_window)]
            if self.g > 1:
                intervals.append((torch.zeros_like(p), _count_below(others, p)))
        else:
            behind_window = start + _count_below(own, p + right * self.g + 1)
            end = (~missing).sum(-1, keepdim=True).expand_as(p)
            intervals = [(torch.zeros_like(p), before_window), (behind_window, end)]
        by_position = position.argsort(dim=-1, stable=True)
        run = torch.where(missing, 2, same.long())  # other phases, own phase, those that a row has not
        order = by_position.gather(-1, run.gather(-1, by_position).argsort(dim=-1, stable=True))  # (B, g, G)
        return order.flatten(0, 1), [self._spans(first, end - 1, real) for first, end in intervals]

    def _spans(self, lower, upper, real) -> Spans:
        """Intervals (B or 1, g, T') of the phases, empty where there is no token."""
        upper = torch.where(real, upper, lower - 1)
        rows = self.rows.seen.shape[0] if self.g > 1 else upper.shape[0]
        lower, upper = (x.expand(rows, -1, -1) for x in (lower, upper))
        return Spans(lower.flatten(0, 1), upper.flatten(0, 1))


def _sorted(position, chosen):
    """The chosen positions in order; behind them what is greater than every position."""
    return position.masked_fill(~chosen, torch.iinfo(position.dtype).max).sort(dim=-1).values


def _count_below(positions, bound):
    """Counts the sorted positions (B, g, G) below bound (B, g, T')."""
    return torch.searchsorted(positions, bound.contiguous())


@dataclass
class GlobalTokens:
    """The global tokens of each row. positions (B, G): in their rows, -1 where a row has fewer."""

    positions: torch.Tensor
    index: torch.Tensor | None  # (B, Gn): the packed columns of those that are new, T where a row has fewer
    pick: torch.Tensor | None  # decoder: (B, G), which of [cached | new] global keys
    causal: bool

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """The new global tokens' part (B, H, Gn, D) of x (B, H, T, D); zeros where a row has fewer."""
        index = self.index.to(x.device)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        return F.pad(x, (0, 0, 0, 1)).gather(2, index)

    def put(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x (B, H, T, D) with the new global tokens' columns replaced by y (B, H, Gn, D)."""
        index = self.index.to(x.device)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        return F.pad(x, (0, 0, 0, 1)).scatter(2, index, y.to(x.dtype))[:, :, :-1]


def in_order(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """x (B, H, G, D) for each phase in its own order (B * g, G): (B * g, H, G, D)."""
    g = order.shape[0] // x.shape[0]
    order = order.to(x.device)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return x.repeat_interleave(g, dim=0).gather(2, order)


def first_token(x: torch.Tensor, attention_mask: torch.Tensor | None, documents: Documents | None) -> torch.Tensor:
    """A mask (B, T) of each row's first token; where documents are packed, of each document's."""
    if documents is not None:
        return documents.first_tokens(x.device)
    if attention_mask is None:
        mask = torch.ones(x.shape[:2], dtype=torch.long, device=x.device)
    else:
        mask = (attention_mask[:, -x.shape[1] :] != 0).long()
    return (mask.cumsum(1) == 1) & (mask == 1)


def question_tokens(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    documents: Documents | None,
    sep_token_id: int | None,
) -> torch.Tensor:
    """A mask (B, T) of the tokens before each row's first separator, as the released code chooses them; where
    documents are packed, before each document's."""
    if sep_token_id is None:
        raise ValueError(
            "config.sep_token_id is None, so the question's end is unknown; set it, or give global_attention_mask"
        )
    separator = input_ids == sep_token_id
    if documents is not None:
        return documents.before(separator, "input_ids", f"sep_token_id {sep_token_id}")
    if attention_mask is not None:
        separator = separator & (attention_mask != 0)
    without = ~separator.any(1)
    if asks_later(without):
        require(~without, f"input_ids has rows without a sep_token_id {sep_token_id}")
    elif bool(without.any()):
        raise ValueError(
            f"input_ids has no sep_token_id {sep_token_id} in rows {without.nonzero().flatten().tolist()}; put one "
            "after the question, or give global_attention_mask"
        )
    return separator.long().cumsum(1) == 0


def choice_tokens(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    documents: Documents | None,
    sep_token_id: int | None,
) -> torch.Tensor:
    """A mask (B, T) of the tokens behind the separator or separators that end each row's question, or where documents
    are packed each document's: what the released code marks behind RoBERTa's two. Its last token is one of them."""
    question = question_tokens(input_ids, attention_mask, documents, sep_token_id)
    text = ~question & (input_ids != sep_token_id)
    if documents is not None:
        text |= documents.last_tokens(text.device)
        return ~documents.before(text, "input_ids", "choice")
    mask = torch.ones_like(text) if attention_mask is None else attention_mask != 0
    last = (mask.flip(1).cumsum(1) == 1).flip(1) & mask
    return ((text & mask) | last).cumsum(1) > 0
