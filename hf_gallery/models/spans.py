"""Intervals: the key columns that each query may see.

Every variant of the gallery is such an interval (plus at most one extra source), so masks never exist as T x S
matrices: two integers per query say everything, and tiles of scores outside all intervals are never computed.

Letters, for the whole package: B rows of the batch, T queries (the new tokens), S keys, C cached columns,
H heads, D size of a head, Dv of a head's values, E hidden size, V vocabulary, R entries of a table of positions.
A file that has others says so at its top; docs/ARCHITECTURE.md lists all, and words with two meanings.
"""

from __future__ import annotations

import torch

from .exporting import once, readable


class Spans:
    """The interval [lower, upper] of key columns that each query sees, both ends included.

    lower, upper: int64 (B or 1, T); one row serves all batch rows. `upper < lower` is an empty interval: the query
    sees nothing. The object is immutable, and remembers what was once worked out of it: a model makes it once for
    all of its layers.

    within: intervals on the CPU, if these lie on a GPU and follow from a mask: each of these is the same, or empty.
    """

    of_ring = False  # whether they are of positions in a ring: see RingSpans

    def __init__(self, lower: torch.Tensor, upper: torch.Tensor, within: Spans | None = None):
        if lower.shape != upper.shape or lower.dim() != 2:
            raise ValueError(
                f"lower has shape {tuple(lower.shape)} and upper {tuple(upper.shape)}; both must be "
                "(batch or 1, queries)"
            )
        self.lower = lower
        self.upper = upper
        self.within = within
        self._memo: dict = {}

    def _once(self, key, work):
        return once(self._memo, key, work)

    @property
    def _one(self) -> tuple[int, int] | None:
        """(lower, upper) where one interval is all there is, as in decoding: the rest then needs no tensors."""
        one = self.lower.numel() == 1
        return self._once("one", lambda: (int(self.lower), int(self.upper)) if one else None)

    def clamp(self, columns: int) -> Spans:
        """The same intervals cut to the columns [0, columns) that exist."""

        def work():
            if self._one is not None and 0 <= self._one[0] and self._one[1] < columns:
                return None
            if self.lower.numel() and (self.lower.amin() < 0 or self.upper.amax() >= columns):
                return Spans(self.lower.clamp(min=0), self.upper.clamp(max=columns - 1))
            return None  # not self: an object that holds itself would live until the cycle collector runs

        return self._once(("clamp", columns), work) or self

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(lower, upper) on a device. The planning above stays where the intervals were made, mostly the CPU."""

        def work():
            if self.lower.device == device:
                return self.lower, self.upper
            return moved(torch.stack((self.lower, self.upper)), device).unbind(0)  # one copy, not two

        return self._once(("on", device), work)

    @property
    def widest(self) -> int:
        """The number of keys in the largest interval."""
        if self._one is not None:
            return self._one[1] - self._one[0] + 1
        return self._once("widest", lambda: int((self.upper - self.lower).amax()) + 1 if self.lower.numel() else 0)

    def distances(self, offset: int) -> tuple[int, int]:
        """The least and greatest distance from a query to a key it sees; query t stands at column offset + t.

        (0, -1) if nobody sees anything.
        """
        if self._one is not None:
            lower, upper = self._one
            return (offset - upper, offset - lower) if lower <= upper else (0, -1)

        def work():
            at = offset + torch.arange(self.lower.shape[1], device=self.lower.device)
            empty = self.upper < self.lower
            if bool(empty.all()):
                return 0, -1
            nearest = (at - self.upper).masked_fill(empty, _FAR).amin()
            return int(nearest), int((at - self.lower).masked_fill(empty, -_FAR).amax())

        return self._once(("distances", offset), work)

    def reach(self, offset: int) -> int:
        """The greatest distance from a query to a key it sees, at least 0: a table of distances holds as many. Where
        that cannot be asked, one that is no less."""
        known = self.within or self
        return max(0, known.distances(offset)[1]) if readable(known.lower) else offset + self.lower.shape[1] - 1

    @property
    def is_causal(self) -> bool:
        """Tells whether query t sees exactly the columns [0, t], in every row."""

        def work():
            t = torch.arange(self.lower.shape[1], device=self.lower.device)
            return bool((self.lower == 0).all() and (self.upper == t).all())

        return self._once("causal", work)

    def band(self, offset: int, columns: int) -> tuple[int, int] | None:
        """`distances`, if all queries see all of the `columns` at these distances: then one mask serves many tiles."""

        def work():
            nearest, farthest = self.distances(offset)
            at = offset + torch.arange(self.lower.shape[1], device=self.lower.device)
            lower, upper = (at - farthest).clamp(min=0), (at - nearest).clamp(max=columns - 1)
            empty = (self.upper < self.lower) & (upper < lower)
            same = (self.lower == lower) & (self.upper == upper) | empty
            return (nearest, farthest) if bool(same.all()) else None

        return self._once(("band", offset, columns), work)

    def tiles(self, group: slice, size: int) -> list[tuple[int, int, int, int]]:
        """For each tile of `size` queries of a group of rows: (first, last, full_first, full_last).

        Every key that some query of the tile sees lies in [first, last]; all of its queries see all of
        [full_first, full_last]. first > last where the whole tile sees nothing.
        """
        if self._one is not None:
            lower, upper = self._one
            return [(lower, upper, lower, upper) if lower <= upper else (_FAR, -1, _FAR, -1)]

        def work():
            lower, upper = (x if x.shape[0] == 1 else x[group] for x in (self.lower, self.upper))
            empty = upper < lower
            bounds = []
            for x, fill, outside, reduce in (
                (lower, _FAR, _FAR, torch.amin),
                (upper, -1, -1, torch.amax),
                (lower, _FAR, -1, torch.amax),
                (upper, -1, _FAR, torch.amin),
            ):
                x = torch.nn.functional.pad(x.masked_fill(empty, fill), (0, -x.shape[1] % size), value=outside)
                bounds.append(reduce(x.view(x.shape[0], -1, size), dim=(0, 2)))  # (tiles,)
            return [tuple(tile) for tile in torch.stack(bounds, dim=1).tolist()]

        broadcast = self.lower.shape[0] == 1
        return self._once(("tiles", 0 if broadcast else (group.start, group.stop), size), work)

    def visible(self, columns: int) -> torch.Tensor:
        """The dense mask (B or 1, T, columns), True where the query sees the column. For small cases and tests."""
        column = torch.arange(columns, device=self.lower.device)
        return (column >= self.lower[..., None]) & (column <= self.upper[..., None])


def moved(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """x on a device, without waiting for what a GPU has still to do."""
    if device.type == "cuda" and x.device.type == "cpu" and not torch.compiler.is_compiling():
        return x.contiguous().pin_memory().to(device, non_blocking=True)  # it copies no expanded tensor
    return x.to(device)


_FAR = 2**40  # beyond every column, for intervals that are empty
