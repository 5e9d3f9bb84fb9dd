"""Columns of time: how a layer's keys and values grow by the new tokens, and what of them a cache keeps.

A decode step must not copy the whole past, so the kept columns lie in memory with a few spare ones behind them. The
new ones are written there if nobody else has. What the memory is, and how much of it anybody has written, is said by
a `Room` that goes with the storage itself: a copy of the tensor lies in other storage, and so has no room. Letters:
spans.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .rows import Rows


@dataclass
class Room:
    """Memory for `columns` columns of `width` numbers, in every row and head. `written`: how many of them anybody has
    written; whoever holds fewer shares the memory with a longer past, and must not write behind its own end. rows,
    strides: as the memory has them."""

    columns: int
    width: int
    written: int
    rows: torch.Size
    strides: tuple[int, ...]


def append_columns(past: torch.Tensor | None, new: torch.Tensor, max_columns: int | None = None) -> torch.Tensor:
    """[past | new] over the columns of time, (..., C + T, D).

    max_columns: columns that `next_columns` will keep, None for all. Spare columns are allocated, so that a decode
    step writes in place, behind what `past` itself holds, instead of copying the past.
    """
    if past is None:
        return new
    past = past.to(new.dtype)  # of a model that was then in another precision
    columns, width = past.shape[-2:]
    end = columns + new.shape[-2]
    kept = columns if max_columns is None else max_columns
    if not _may_share(past, new) or kept == 0 or columns > kept or end > columns + _spare(kept):
        return torch.cat([past, new], dim=-2)
    room = _room_of(past)
    start = 0 if room is None else past.storage_offset() // width % room.columns  # the room's column where past begins
    if room is None or start + end > room.columns or room.written != start + columns:
        past, start = _with_room(past, kept), 0
        room = _room_of(past)
    joined = past.as_strided((*past.shape[:-2], end, width), past.stride())
    joined[..., columns:, :] = new
    room.written = start + end
    return joined


def next_columns(x: torch.Tensor, rows: Rows, max_columns: int | None) -> torch.Tensor:
    """Columns of x (B, ..., C + T, D) that a cache keeps: each row's last token in the last one, at most
    max_columns."""
    if max_columns == 0:
        return x[..., :0, :].clone()
    x = rows.shift(x, x.dim() - 2)
    if max_columns is None or x.shape[-2] <= max_columns or not _may_share(x, x):
        return last_columns(x, max_columns)
    return _in_room(x[..., x.shape[-2] - max_columns :, :], max_columns)


def whole_columns(x: torch.Tensor, max_columns: int) -> torch.Tensor:
    """x (..., C, D), C <= max_columns, with zeros in front of it up to that; memory as `next_columns` has it."""
    if x.shape[-2] < max_columns:
        x = F.pad(x, (0, 0, max_columns - x.shape[-2], 0))
    return _in_room(x, max_columns) if _may_share(x, x) else x


def _in_room(x: torch.Tensor, max_columns: int) -> torch.Tensor:
    """x (..., C, D) itself where it lies in memory with as many spare columns as its size asks for, else a copy."""
    room = _room_of(x)
    return x if room is not None and room.columns == max_columns + _spare(max_columns) else _with_room(x, max_columns)


def _spare(max_columns: int) -> int:
    """Spare columns behind as many: decode steps between two copies of the past. Few, since they cost memory."""
    return max(2, max_columns // 8)


def _with_room(x: torch.Tensor, max_columns: int) -> torch.Tensor:
    """A copy of x (..., C, D), C <= max_columns, in memory with spare columns."""
    memory = x.new_empty(*x.shape[:-2], max_columns + _spare(max_columns), x.shape[-1])
    copy = memory[..., : x.shape[-2], :].copy_(x)
    *rows, columns, width = memory.shape
    memory.untyped_storage().room = Room(columns, width, x.shape[-2], torch.Size(rows), memory.stride())
    return copy


def _room_of(x: torch.Tensor) -> Room | None:
    """The room that x (..., C, D) lies in; None for other memory, and for what is not a stretch of its columns."""
    room = getattr(x.untyped_storage(), "room", None)
    if room is None or x.shape[-1] != room.width:
        return None
    if x.stride() == room.strides and x.shape[:-2] == room.rows:  # as a rule, and told at once
        return room
    if x.stride()[-2:] != (room.width, 1):
        return None
    rows, step = x.shape[:-2], room.columns * room.width
    for size, stride in zip(reversed(rows), reversed(x.stride()[:-2]), strict=True):
        if size > 1 and stride != step:
            return None
        step *= size
    return room


def _may_share(past: torch.Tensor, new: torch.Tensor) -> bool:
    """Tells whether new columns may be written into the memory of the past: no graph and no compiler follows it."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or past.requires_grad:
        return False
    return past.dtype == new.dtype and past.is_inference() == torch.is_inference_mode_enabled()


def alone(x: torch.Tensor) -> torch.Tensor:
    """x in memory that holds nothing else: what pickle writes is all of it, spare columns too."""
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone(memory_format=torch.contiguous_format)


def last_columns(x: torch.Tensor, count: int | None) -> torch.Tensor:
    """The last `count` columns of x (..., C, D) in memory of their own; x itself if it has no more."""
    if count is None or x.shape[-2] <= count:
        return x
    return x[..., x.shape[-2] - count :, :].clone()
