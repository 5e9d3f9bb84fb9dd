"""The rows of a padded batch, as their own tokens and positions.

Padding has no position in the gallery. A forward therefore first packs each row's own tokens to the front (`pack`),
works on rows that start together and end where their tokens end, and puts the results back into the input's columns
at the end (`unpack`). A row computes what it would compute alone, wherever its padding stood.

What follows from shapes and from the counts of a cache is known on the CPU. What follows from a mask lies where the
mask does, and nothing asks a GPU for it: such rows are as wide as the input. A growing cache counts on the CPU, so the
rows that go into one have their mask there (`GalleryCache.rows_of`).

With C cached columns, aligned to end at the row's last token, column c of [cache | new tokens] holds the row's
position seen - C + c. So the distance between query and key is the same in all rows, and only the ends of the
intervals differ between them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch

from .exporting import in_one_graph, readable, surely
from .spans import Spans


class Rows:
    """The places of the tokens of a batch (B, columns). `pack` and `unpack` work on any device.

    mask: (B, columns), True at the tokens of these rows; None = all columns. seen: (B,), on the device of the mask,
    tokens that each row has behind it; None = none. fresh: (B,), True where a row forgets in this forward what it had
    behind it; None = nowhere.
    """

    steps = False  # whether they are one column behind rings: see StepRows

    def __init__(
        self,
        batch: int,
        columns: int,
        mask: torch.Tensor | None,
        seen: torch.Tensor | None,
        fresh: torch.Tensor | None = None,
    ):
        self.batch, self.columns, self.fresh = batch, columns, fresh
        start = common_value(seen) if seen is not None else 0
        self.mask = None if mask is None or surely(mask) else mask
        if seen is None:
            seen = torch.zeros(batch, dtype=torch.long, device=None if self.mask is None else self.mask.device)
        if self.mask is None:
            self._lay(None, torch.full((batch,), columns), seen, columns, start)
        else:
            lengths = self.mask.sum(1)
            width = max(1, int(lengths.max())) if readable(lengths) else columns
            order = true_first(self.mask)[:, :width]  # (B, T)
            index = order + columns * torch.arange(batch, device=order.device)[:, None]
            self._lay(index, lengths, seen, width, start)

    def _lay(
        self,
        index: torch.Tensor | None,
        lengths: torch.Tensor,
        seen: torch.Tensor,
        width: int,
        start: int | None,
    ):
        """index: (B, T), the column of [0, B * columns) of each packed token, any behind a row's last; None where
        nothing moves. start: `seen` of all rows, None where they differ or cannot be asked."""
        self.index, self.lengths, self.seen, self.width = index, lengths, seen, width
        self.place: torch.Tensor | None = None  # see `unpack`
        # Whether all rows end with the last packed column.
        self.is_full = index is None or surely(lengths == width)
        # Where all rows start together their positions can be told without a look at tensors.
        self.start = start

    def asked(self) -> Rows:
        """The same with its counts on the CPU, for what must ask them. A GPU has to be waited for."""
        if self.device.type == "cpu" or in_one_graph():
            return self
        rows = copy.copy(self)
        rows.mask = self.mask.cpu()
        rows._lay(self.index.cpu(), self.lengths.cpu(), self.seen.cpu(), self.width, self.start)
        return rows

    @property
    def device(self) -> torch.device:
        """The device of `seen`, `lengths` and of all that follows from them."""
        return self.lengths.device

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, columns, ...) to (B, T, ...): each row's tokens first, then zeros."""
        if self.index is None:
            return x
        packed = _columns(x.flatten(0, 1), self.index)
        if self.is_full:
            return packed
        # Zeros and not what stands there: nobody sees it, but a sum over all columns meets it, and 0 * NaN is NaN.
        return packed.masked_fill(_like(self.beyond.to(x.device), packed), 0)

    @property
    def beyond(self) -> torch.Tensor:
        """Packed columns behind their row's last token, (B, T)."""
        return torch.arange(self.width, device=self.device) >= self.lengths[:, None]

    @property
    def recent(self) -> int:
        """Counts the last columns of the input that hold only what follows after all `fresh` rows began."""
        if self.fresh is None or self.mask is None:
            return self.columns
        first = self.mask.to(torch.uint8).argmax(dim=1)  # (B,)
        return self.columns - int(first[self.fresh].amax()) if bool(self.fresh.any()) else self.columns

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, ...) back to (batch, columns, ...), zeros at padding."""
        return unpack([self], [x])

    def unpack_attentions(self, x: torch.Tensor, keys_too: bool) -> torch.Tensor:
        """Probabilities (B, H, T, S) over the input's columns: queries, and with keys_too the new keys as well."""
        return x if self.index is None else _move_attentions(self.unpack, x, keys_too)

    def pack_attentions(self, x: torch.Tensor, keys_too: bool) -> torch.Tensor:
        """The inverse of `unpack_attentions`."""
        return x if self.index is None else _move_attentions(self.pack, x, keys_too)

    @property
    def uniform(self) -> bool:
        """Tells whether all rows have tokens at the same positions, and so need one interval for all."""
        return self.start is not None and self.is_full

    @property
    def longest(self) -> int:
        """Tokens that the longest row reaches; where that cannot be asked, that none without a past exceeds."""
        if not self.uniform and readable(self.lengths):
            return int((self.seen + self.lengths).amax())
        return (self.start or 0) + self.width

    @property
    def first(self) -> torch.Tensor:
        """The position of each row's first packed token, (B or 1, 1); on the CPU if all are the same."""
        return self.seen[:, None] if self.start is None else torch.full((1, 1), self.start)

    @property
    def last(self) -> torch.Tensor:
        """The position of each row's last packed token, (B or 1, 1); first - 1 in a row without any."""
        if not self.uniform:
            return (self.seen + self.lengths)[:, None] - 1
        return torch.full((1, 1), self.start + self.width - 1)

    @property
    def positions(self) -> torch.Tensor:
        """The positions of the packed tokens in their rows, (B or 1, T); on the CPU if all rows start together."""
        if self.start is None:
            return self.first + torch.arange(self.width, device=self.device)
        return torch.arange(self.start, self.start + self.width)[None]

    def column_positions(self, columns: int) -> torch.Tensor:
        """The positions of as many cached columns, below 0 before a row's first token: (B or 1, columns)."""
        first = self.first
        return first - columns + torch.arange(columns, device=first.device)

    def spans(self, lower: torch.Tensor, upper: torch.Tensor, cached: int, least: int = 0) -> Spans:
        """Intervals of positions (B or 1, T) as intervals of the columns [cached | new tokens].

        Positions below `least` are cut off; columns after a row's last token see nothing.
        """
        first = (self.first if self.start is None else self.start) - cached  # the position in column 0
        lower, upper = lower.clamp(min=least) - first, upper - first
        if self.is_full:
            return Spans(lower, upper)
        # Where a GPU holds the rows' ends, what all rows see in common is still known here.
        within = Spans(lower, upper) if readable(lower) and readable(upper) and not readable(self.lengths) else None
        lower = lower.to(self.device).expand(self.lengths.shape[0], -1).contiguous()
        return Spans(lower, torch.where(self.beyond, lower - 1, upper.to(self.device)), within)

    def shift(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """x over [cached | new tokens] in `dim`, with each row moved so that its last token comes last."""
        if self.is_full:
            return x
        late = (self.width - self.lengths).to(x.device)  # (B,)
        column = torch.arange(x.shape[dim], device=x.device) - late[:, None]  # (B, columns)
        shape = [1] * x.dim()
        shape[0], shape[dim] = column.shape
        return x.gather(dim, column.clamp(min=0).view(shape).expand_as(x))


class DocumentRows(Rows):
    """Rows that are documents: several may lie in one row of the input (batch, columns), one behind another.

    index: (documents, T), the column of [0, batch * columns) of each token, any behind a document's last. lengths,
    seen: (documents,).
    """

    def __init__(self, batch: int, columns: int, index: torch.Tensor, lengths: torch.Tensor, seen: torch.Tensor):
        self.batch, self.columns, self.mask, self.fresh = batch, columns, None, None
        self._lay(index, lengths, seen, index.shape[1], common_value(seen))


def common_value(x: torch.Tensor) -> int | None:
    """The number that all of x (B,) are; None where they differ, or where that cannot be asked."""
    if not readable(x):
        return None
    first, *others = x.tolist()
    return first if all(value == first for value in others) else None


def unpack(parts: Sequence[Rows], packed: Sequence[torch.Tensor]) -> torch.Tensor:
    """Puts results of parts, (B, T, ...) each, into the columns (batch, columns, ...) of their one input, zeros
    at padding."""
    first = parts[0]
    if first.index is None:
        return packed[0]
    if first.place is None:  # all layers' hidden states go the same way
        first.place = _places(parts) if len(parts) > 1 or first.mask is None else _places_by_mask(first)
    flat = torch.cat([x.flatten(0, 1) for x in packed]) if len(packed) > 1 else packed[0].flatten(0, 1)
    x = _columns(flat, first.place.clamp(min=0))  # (batch, columns, ...)
    return x.masked_fill(_like(first.place.to(x.device) < 0, x), 0)


def true_first(mask: torch.Tensor) -> torch.Tensor:
    """The columns of mask (B, N) in a new order, those that are True before the others, each as they stand: (B, N)."""
    hidden = ~mask
    place = torch.where(mask, mask.cumsum(1), mask.sum(1, keepdim=True) + hidden.cumsum(1)) - 1
    column = torch.arange(mask.shape[1], device=mask.device).expand_as(place)
    return torch.zeros_like(place).scatter(1, place, column)


def _places_by_mask(rows: Rows) -> torch.Tensor:
    """Places of the columns (batch, columns) among the packed columns of the input's own rows; -1 at padding."""
    row = torch.arange(rows.batch, device=rows.mask.device)[:, None]
    return (row * rows.width + rows.mask.cumsum(1) - 1).masked_fill(~rows.mask, -1)


def _places(parts: Sequence[Rows]) -> torch.Tensor:
    """Places of the columns (batch, columns) among the packed columns of all parts; -1 at padding."""
    batch, columns = parts[0].batch, parts[0].columns
    place, start = torch.full((batch * columns,), -1, dtype=torch.long), 0
    for rows in parts:
        here = ~rows.beyond
        number = start + torch.arange(here.numel()).view_as(here)
        place[rows.index.cpu()[here]] = number[here]
        start += here.numel()
    return place.view(batch, columns)


def _move_attentions(move: Callable, x: torch.Tensor, keys_too: bool) -> torch.Tensor:
    """Probabilities x (B, H, T, C + T) with their queries, and with keys_too their last T keys, moved."""
    cached = x.shape[-1] - x.shape[-2]
    x = move(x.transpose(1, 2)).transpose(1, 2)
    if not keys_too:
        return x
    new = move(x[..., cached:].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return torch.cat([x[..., :cached], new], dim=-1)


def _columns(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x (any, ...) at index (B, T): (B, T, ...)."""
    return x.index_select(0, index.to(x.device).flatten()).unflatten(0, index.shape)


def _like(index: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(B, T) as the shape of x (B, any, ...) after the second dimension."""
    return index.view(*index.shape, *[1] * (x.dim() - 2)).expand(*index.shape, *x.shape[2:])
