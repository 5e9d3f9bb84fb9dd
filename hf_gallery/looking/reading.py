"""Reading a text in pieces, its cache carried along, and the bits that each of its tokens costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from ..models.cache import CACHE_NAME, GalleryCache
from .watch import period_of

Progress = Callable[[str, int, int], None]  # what is done, how much of how much


def quiet(what: str, done: int, of: int) -> None:
    """Tells nobody."""


def pieces(total: int, size: int) -> Iterator[tuple[int, int]]:
    """[start, end) of each piece of `size`, the last one shorter."""
    for start in range(0, total, size):
        yield start, min(start + size, total)


def bits(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The bits that each target (B, T) costs under logits (B, T, V)."""
    loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return loss.view_as(targets).cpu() / math.log(2)


def marked(marks: torch.Tensor | None, start: int, end: int, rows: int = 1) -> dict[str, torch.Tensor]:
    """The argument that says which of the tokens [start, end) are global, for as many rows; none where none are."""
    return {} if marks is None else {"global_attention_mask": marks[start:end].expand(rows, -1)}


def read(
    model: Any,
    ids: torch.Tensor,
    size: int = 1024,
    *,
    forget: tuple[str, ...] = (),
    marks: torch.Tensor | None = None,
    what: str = "reading",
    progress: Progress = quiet,
) -> torch.Tensor:
    """Bits of each token of ids (T,), NaN of the first, which nothing predicts. Read in pieces of `size`; before each
    the cache forgets what is named. marks (T,): 1 at global tokens."""
    cache, found = GalleryCache(model.config), [torch.full((1,), math.nan)]
    for start, end in pieces(len(ids), size):
        if forget and start:
            cache.forget(*forget)
        logits = model(ids[None, start:end], use_cache=True, **marked(marks, start, end), **{CACHE_NAME: cache}).logits
        targets = ids[None, start + 1 : end + 1]
        found.append(bits(logits[:, : targets.shape[1]], targets)[0])
        progress(what, end, len(ids))
    return torch.cat(found)


def read_apart(model: Any, ids: torch.Tensor, size: int, *, what: str, progress: Progress = quiet) -> torch.Tensor:
    """`read` where every piece of `size` begins as a text does, with an empty cache: pieces are rows of a batch."""
    found = [torch.full((1,), math.nan)]
    together = size * max(1, 2048 // size)
    for start, end in pieces(len(ids), together):
        whole = (end - start) // size * size
        for first, last, width in ((start, start + whole, size), (start + whole, end, end - start - whole)):
            if first == last:
                continue
            logits = model(ids[first:last].view(-1, width), use_cache=False).logits.flatten(0, 1)
            targets = ids[first + 1 : last + 1]
            found.append(bits(logits[None, : len(targets)], targets[None])[0])
        progress(what, end, len(ids))
    return torch.cat(found)


def piece_size(config: Any, layers: int, cached: int, most: int = 2**24) -> int:
    """Tokens of a piece whose maps, of all layers, hold at most about `most` numbers; whole segments where maps are
    those of segments."""
    period = period_of(config)
    if hasattr(config, "num_memory_tokens") and period is not None:
        return period * max(1, 512 // period)
    columns = cached if config.cache_capacity is None else min(cached, config.cache_capacity)
    # A map is of all columns, those of the piece among them, however few a query sees: short pieces cost least.
    return max(16, min(256, most // (layers * config.num_attention_heads * (columns + 256))))
