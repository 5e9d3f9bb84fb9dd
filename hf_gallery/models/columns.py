"""Columns of time: how a layer's keys and values grow by the new tokens, and what of them a cache keeps.

A decode step must not copy the whole past, so the kept columns lie in memory with a few spare ones behind them. The
new ones are written there if nobody else has, which the memory itself knows (`columns_written`). Letters: spans.py.
"""

from __future__ import annotations

import torch

from .rows import Rows


def append_columns(past: torch.Tensor | None, new: torch.Tensor, limit: int | None = None) -> torch.Tensor:
    """[past | new] over the columns of time, (..., C + T, D).

    limit: how many of them `next_columns` will keep. If it is given, a decode step does not copy the past: memory for
    the limit has spare columns at its end, and the new ones are written there, behind what `past` itself holds.
    """
    if past is None:
        return new
    columns, width = past.shape[-2:]
    end = columns + new.shape[-2]
    if not limit or columns > limit or end > columns + _spare(limit) or not _may_share(past, new):
        return torch.cat([past, new], dim=-2)
    start = past.storage_offset() % past.stride(-3) // width  # the column of the memory where the past begins
    full = start + end > limit + _spare(limit)
    if not _is_roomy(past, limit) or full or _written(past) != start + columns:
        past, start = _with_room(past, limit), 0
    joined = past.as_strided((*past.shape[:-2], end, width), past.stride())
    joined[..., columns:, :] = new
    past.untyped_storage().columns_written = start + end
    return joined


def next_columns(x: torch.Tensor, rows: Rows, limit: int | None) -> torch.Tensor:
    """What a cache keeps of the columns x (B, ..., C + T, D): each row's last token in the last one, at most limit."""
    if limit == 0:
        return x[..., :0, :].clone()
    x = rows.shift(x, x.dim() - 2)
    if limit is None or x.shape[-2] <= limit or not _may_share(x, x):
        return last_columns(x, limit)
    kept = x[..., x.shape[-2] - limit :, :]
    return kept if _is_roomy(x, limit) else _with_room(kept, limit)


def _spare(limit: int) -> int:
    """Spare columns behind `limit`: the past is copied once in so many decode steps. Few, since they cost memory."""
    return max(2, limit // 8)


def _with_room(x: torch.Tensor, limit: int) -> torch.Tensor:
    """A copy of x (..., C, D), C <= limit, in memory with spare columns."""
    room = x.new_empty(*x.shape[:-2], limit + _spare(limit), x.shape[-1])
    copy = room[..., : x.shape[-2], :].copy_(x)
    room.untyped_storage().columns_written = x.shape[-2]
    return copy


def _is_roomy(x: torch.Tensor, limit: int) -> bool:
    """Whether x (..., C, D) lies in memory with spare columns, as _with_room makes it."""
    width = x.shape[-1]
    return x.stride()[-3:] == ((limit + _spare(limit)) * width, width, 1)


def _written(x: torch.Tensor) -> int:
    """How many columns of x's memory anyone has written. Copies of the memory do not know it, and are not written."""
    return getattr(x.untyped_storage(), "columns_written", 0)


def _may_share(past: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether new columns may be written into the memory of the past: no graph and no compiler follows it."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or past.requires_grad:
        return False
    return past.dtype == new.dtype and past.is_inference() == torch.is_inference_mode_enabled()


def last_columns(x: torch.Tensor, count: int | None) -> torch.Tensor:
    """The last `count` columns of x (..., C, D) in memory of their own; x itself if it has no more."""
    if count is None or x.shape[-2] <= count:
        return x
    return x[..., x.shape[-2] - count :, :].clone()
