"""The rows of a padded batch, as their own tokens and positions.

Padding has no position in the gallery. A forward therefore first packs each row's own tokens to the front (`pack`),
works on rows that start together and end where their tokens end, and puts the results back into the input's columns
at the end (`unpack`). A row computes what it would compute alone, wherever its padding stood.

With C cached columns, aligned to end at the row's last token, column c of [cache | new tokens] holds the row's
position seen - C + c. So the distance between query and key is the same in all rows, and only the ends of the
intervals differ between them.
"""

from __future__ import annotations

import torch

from .spans import Spans


class Rows:
    """The places of the tokens of a batch (B, T). Bookkeeping is on the CPU; `pack` and `unpack` work anywhere.

    mask: (B, T), True at tokens; None = no padding. seen: (B,), tokens that each row has behind it.
    """

    def __init__(self, batch: int, columns: int, mask: torch.Tensor | None, seen: torch.Tensor | None):
        self.columns = columns
        self.seen = torch.zeros(batch, dtype=torch.long) if seen is None else seen  # (B,)
        self.mask = None if mask is None or bool(mask.all()) else mask
        if self.mask is None:
            self.lengths = torch.full((batch,), columns)  # (B,)
            self.width = columns  # T of the packed batch
        else:
            self.lengths = self.mask.sum(1).cpu()
            self.width = max(1, int(self.lengths.max()))
            self.order = (~self.mask).to(torch.uint8).argsort(dim=1, stable=True)[:, : self.width]  # (B, T)
        # Rows that move together need one interval for all.
        self.uniform = self.mask is None and bool((self.seen == self.seen[0]).all())

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """(B, columns, ...) to (B, T, ...): the row's tokens first, then columns that hold nothing of use."""
        if self.mask is None:
            return x
        return x.gather(1, _like(self.order.to(x.device), x))

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, ...) back to (B, columns, ...), zeros at padding."""
        if self.mask is None:
            return x
        mask = self.mask.to(x.device)
        rank = (mask.cumsum(1) - 1).clamp(min=0)  # (B, columns)
        x = x.gather(1, _like(rank, x))
        return x.masked_fill(~_like(mask, x), 0)

    def unpack_attentions(self, x: torch.Tensor, keys_too: bool) -> torch.Tensor:
        """Probabilities (B, H, T, S) over the input's columns: queries, and with keys_too the new keys as well."""
        if self.mask is None:
            return x
        x = self.unpack(x.transpose(1, 2)).transpose(1, 2)  # (B, H, columns, S)
        if not keys_too:
            return x
        cached = x.shape[-1] - self.width
        return torch.cat(
            [x[..., :cached], self.unpack(x[..., cached:].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)], dim=-1
        )

    @property
    def first(self) -> torch.Tensor:
        """The position of each row's first packed token, (B or 1, 1)."""
        return (self.seen[:1] if self.uniform else self.seen)[:, None]

    @property
    def last(self) -> torch.Tensor:
        """The position of each row's last packed token, (B or 1, 1); first - 1 in a row without any."""
        return self.first + (self.lengths[:1] if self.uniform else self.lengths)[:, None] - 1

    @property
    def positions(self) -> torch.Tensor:
        """The positions of the packed tokens in their rows, (B or 1, T)."""
        return self.first + torch.arange(self.width)

    def spans(self, lower: torch.Tensor, upper: torch.Tensor, cached: int, least: int = 0) -> Spans:
        """Intervals of positions (B or 1, T) as intervals of the columns [cached | new tokens].

        Positions below `least` are cut off; columns after a row's last token see nothing.
        """
        first = self.first - cached  # the position in column 0
        lower, upper = lower.clamp(min=least) - first, upper - first
        if not self.uniform:
            beyond = torch.arange(self.width) >= self.lengths[:, None]
            upper = torch.where(beyond, lower - 1, upper)
        return Spans(lower, upper)

    def shift(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """x over [cached | new tokens] in `dim`, with each row moved so that its last token comes last."""
        if self.mask is None:
            return x
        late = (self.width - self.lengths).to(x.device)  # (B,)
        column = torch.arange(x.shape[dim], device=x.device) - late[:, None]  # (B, columns)
        shape = [1] * x.dim()
        shape[0], shape[dim] = column.shape
        return x.gather(dim, column.clamp(min=0).view(shape).expand_as(x))


def _like(index: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(B, T) as the shape of x (B, any, ...) after the second dimension."""
    return index.view(*index.shape, *[1] * (x.dim() - 2)).expand(*index.shape, *x.shape[2:])
