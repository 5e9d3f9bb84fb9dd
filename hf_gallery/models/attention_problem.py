"""The input of the attention function, checked once: every implementation takes a `Problem`.

Letters: see spans.py.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

from .exporting import in_one_graph
from .spans import Spans


class Position(NamedTuple):
    """A score term that depends on the distance between query and key.

    Query t stands at key column S - T + t, so distance(t, s) = S - T + t - s, and the term of (t, s) reads entry
    `farthest - distance` of the table: entry 0 is the greatest distance, as in Transformer-XL's relative encoding.

    table: (H, R), a bias per head and distance; or (H, R, D) with `query` (B, H, T, D), the term query . entry.
    farthest: the distance of entry 0.
    """

    table: torch.Tensor
    farthest: int
    query: torch.Tensor | None = None


class Problem(NamedTuple):
    """One call of `attend`: query (B, H, T, D), key (B, H, S, D), value (B, H, S, Dv) and which keys each query sees.

    scale: of the scores, the position's term included. dropout: on the probabilities.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    spans: Spans
    position: Position | None
    scale: float
    dropout: float = 0.0

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """The tensors that may want a gradient: query, key, value, the position's query and its table."""
        table, _, asked = self.position or (None, 0, None)
        return self.query, self.key, self.value, asked, table

    def check(self) -> Problem:
        """The problem with its intervals cut to the keys that exist. Raises ValueError unless everything fits."""
        self.check_shapes()
        if in_one_graph():  # intervals of keys that do not exist show none, and tables are as long as their models
            return self
        spans = self.spans.clamp(self.key.shape[2])
        if self.position is not None:
            check_distances(spans, self.position, self.key.shape[2] - self.query.shape[2])
        return self if spans is self.spans else self._replace(spans=spans)

    def check_shapes(self):
        """Raises ValueError unless the tensors' shapes fit each other; reads no tensor."""
        b, h, t, d = self.query.shape
        s = self.key.shape[2]
        if self.key.shape != (b, h, s, d) or self.value.shape[:3] != (b, h, s):
            raise ValueError(
                f"query is {tuple(self.query.shape)}, so key must be ({b}, {h}, S, {d}) and value ({b}, {h}, S, Dv); "
                f"got {tuple(self.key.shape)} and {tuple(self.value.shape)}"
            )
        lower = self.spans.lower
        if lower.shape not in ((b, t), (1, t)):
            raise ValueError(f"spans have shape {tuple(lower.shape)}; {b} rows of {t} queries need ({b} or 1, {t})")
        if self.position is None:
            return
        table, _, asked = self.position
        shape = (h, table.shape[1]) if asked is None else (h, table.shape[1], d)
        if table.shape != shape or (asked is not None and asked.shape != self.query.shape):
            raise ValueError(
                f"position.table has shape {tuple(table.shape)}, must be {shape}; position.query, if given, "
                f"{tuple(self.query.shape)}, got {None if asked is None else tuple(asked.shape)}"
            )


def check_distances(spans: Spans, position: Position, offset: int):
    """Raises ValueError if a visible distance has no entry in the table; query t stands at column offset + t."""
    nearest, farthest = spans.distances(offset)
    least = position.farthest - position.table.shape[1] + 1
    if nearest <= farthest and (farthest > position.farthest or nearest < least):  # not all intervals are empty
        raise ValueError(
            f"keys are seen at distances {nearest} to {farthest}, but position.table has entries for "
            f"{least} to {position.farthest} only"
        )


def without_autocast(x: torch.Tensor) -> AbstractContextManager:
    """A block without autocast on the device of x: `attend` computes in float32 at least."""
    device = x.device.type
    # To enter and leave it costs as much as a small operation, and mostly there is nothing to switch off.
    return torch.autocast(device, enabled=False) if autocasts(device) else nullcontext()


def autocasts(device: str) -> bool:
    """Tells whether autocast is on for a type of device; "meta" knows none."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The type that scores are computed in: float32 at least."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@functools.cache
def multiplies_bfloat16() -> bool:
    """Tells whether this CPU has instructions for products of bfloat16: AVX-512 BF16 or AMX."""
    asked = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return any(supported is not None and supported() for supported in asked)
