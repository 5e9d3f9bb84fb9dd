"""Rows cut into blocks that run through all layers one after the other: see Backbone.run_in_blocks.

Blocks are counted by each row's own tokens, so a row's first block is shorter where its beginning came in an earlier
forward, and its last where the rest is yet to come. Letters: see spans.py. J blocks of a forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F

from .exporting import fixed_length, readable
from .rows import Rows


class BlockRows:
    """The rows of a forward, cut at multiples of `length` of their own tokens.

    agreed: given how many blocks there are, says how many to run; those behind the last have no tokens.
    """

    def __init__(self, rows: Rows, length: int, agreed: Callable[[int], int]):
        self.rows, self.length = rows, length
        self.phase = rows.seen % length  # (B,) tokens of the first block that are already behind
        self.known = readable(rows.lengths)  # else no row has a past, so all begin with a whole block
        most = int((self.phase + rows.lengths).max()) if self.known else fixed_length(rows.width)
        self.count = agreed(max(1, -(-most // length)))  # J
        ends = (torch.arange(self.count + 1, device=rows.device)[:, None] * length - self.phase).clamp(min=0)
        self.ends = torch.minimum(ends, rows.lengths)  # (J + 1, B), in packed tokens

    def split(self, x: torch.Tensor) -> Iterator[tuple[torch.Tensor, Rows]]:
        """The tokens of x (B, T, E) in each block, packed, and their rows."""
        if self.known:
            widths = [max(1, int(most)) for most in (self.ends[1:] - self.ends[:-1]).amax(1)]
        else:
            widths = [min(self.length, self.rows.width - j * self.length) for j in range(self.count)]
        counts = [torch.arange(width, device=self.rows.device) for width in widths]
        places = [start[:, None] + count for start, count in zip(self.ends, counts, strict=False)]
        # Picked once and split: a pick from all of x for each block would cost its whole gradient each time.
        pick = torch.cat(places, dim=1).clamp(max=self.rows.width - 1).to(x.device)
        parts = x.gather(1, pick[:, :, None].expand(-1, -1, x.shape[2])).split(widths, dim=1)
        seen = self.rows.seen
        for part, place, end in zip(parts, places, self.ends[1:], strict=True):
            rows = Rows(seen.shape[0], part.shape[1], place < end[:, None], seen)
            yield part, rows
            seen = seen + rows.lengths

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The blocks' results as one (B, T, E) of packed tokens: what `split` undoes."""
        padded = torch.cat([F.pad(part, (0, 0, 0, self.length - part.shape[1])) for part in parts], dim=1)
        token = torch.arange(self.rows.width, device=self.rows.device)
        place = self.phase[:, None] + token  # (B, T) of a token, from its first block's start
        # A first block whose beginning came earlier is packed to the front like all others.
        place = torch.where(place < self.length, place - self.phase[:, None], place)
        place = place.clamp(max=self.count * self.length - 1).to(padded.device)
        return padded.gather(1, place[:, :, None].expand(-1, -1, padded.shape[2]))
