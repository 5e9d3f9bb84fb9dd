"""The one attention function of the gallery, over intervals of keys.

    score(t, s) = (q_t . k_s + position(t, s)) * scale        for s in [lower_t, upper_t]
    out_t       = sum_s softmax_s(score(t, s)) v_s            zeros where the interval is empty

`attend` computes it in tiles with an online softmax (Milakov and Gimelshein 2018; Dao et al. 2022, FlashAttention,
algorithm 1) and its own backward that recomputes the scores of a tile from the saved log-sum-exp. Tiles that no
interval touches are skipped, so time is O(T x span) and memory O(T). `attend_naive` is the definition, written
plainly: read it first.

Letters: see spans.py.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .spans import Spans


class Position(NamedTuple):
    """A score term that depends on the distance between query and key.

    Query t stands at key column S - T + t, so distance(t, s) = S - T + t - s, and the term of (t, s) reads row
    `far - distance` of the table: row 0 is the greatest distance, as in Transformer-XL's relative encoding.

    table: (H, R), a bias per head and distance; or (H, R, D) with `query` (B, H, T, D), the term query . row.
    far: the distance of row 0.
    """

    table: torch.Tensor
    far: int
    query: torch.Tensor | None = None


@torch.compiler.disable  # its tiles depend on the intervals: every new length would be traced anew
def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: Spans,
    *,
    position: Position | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    implementation: str = "eager",
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query over the keys in its interval.

    query (B, H, T, D), key (B, H, S, D), value (B, H, S, Dv), in any floating type; half types are computed in
    float32. spans: key columns that each query sees. scale: default 1 / sqrt(D). dropout: on the probabilities.
    implementation: "eager", the tiles of this file; "sdpa", torch's fused kernels on the same intervals.

    Returns out (B, H, T, Dv) in query's type, zeros where a query sees nothing; with return_lse also the logarithm
    of each query's softmax denominator, lse (B, H, T), -inf where it sees nothing. Two results over disjoint keys
    are joined by it, see `join`. Gradients reach every tensor argument, through lse too.

    Raises ValueError if shapes do not fit, a visible distance has no row in the table, or the implementation cannot
    do what is asked.
    """
    spans = _check(query, key, value, spans, position)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    if implementation == "sdpa":
        if return_lse:
            raise ValueError('implementation="sdpa" has no log-sum-exp to return; use implementation="eager"')
        if position is not None and position.query is not None:
            raise ValueError(
                'implementation="sdpa" has no position term that depends on the query; use implementation="eager"'
            )
        return _attend_sdpa(query, key, value, spans, position, scale, dropout)
    if implementation != "eager":
        raise ValueError(f'implementation is {implementation!r}; it must be "eager" or "sdpa"')
    table, far, position_query = (None, 0, None) if position is None else position
    leaves = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (query, key, value, position_query, table)
    )
    if query.shape[2] == 1 and dropout == 0.0 and not leaves:
        out, lse = _attend_one(query, key, value, spans, position, scale)
        return (out, lse) if return_lse else out
    # One draw from torch's generator a call: the tiles' own streams follow from it, the same in forward and backward.
    seed = int(torch.randint(2**62, ()).item()) if dropout > 0.0 else 0
    out, lse = _TiledAttention.apply(query, key, value, position_query, table, far, spans, scale, dropout, seed)
    return (out, lse) if return_lse else out


def join(
    first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention over two disjoint sets of keys from the (out, lse) over each: one softmax over their union."""
    (out1, lse1), (out2, lse2) = first, second  # (B, H, T, Dv), (B, H, T)
    top = torch.maximum(lse1, lse2).detach()
    top = top.masked_fill(top == -math.inf, 0.0)
    weight1, weight2 = (lse1 - top).exp(), (lse2 - top).exp()
    total = weight1 + weight2
    nothing = total == 0.0
    share = (weight1 / total.masked_fill(nothing, 1.0))[..., None].to(out1.dtype)
    out = out1 * share + out2 * (1 - share)  # zeros where both are empty, since both outs are
    return out, (total.masked_fill(nothing, 1.0).log() + top).masked_fill(nothing, -math.inf)


def attend_naive(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: Spans,
    *,
    position: Position | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`attend` by its definition, with the full T x S scores: for reading, for tests, and to look at attention maps.

    Arguments as in `attend`. Returns out (B, H, T, Dv), lse (B, H, T) and the probabilities (B, H, T, S).
    """
    spans = _check(query, key, value, spans, position)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    dtype = compute_dtype(query)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scores = query @ key.mT  # (B, H, T, S)
    if position is not None:
        t, s = scores.shape[-2:]
        distance = (s - t) + torch.arange(t, device=query.device)[:, None] - torch.arange(s, device=query.device)
        row = (position.far - distance).clamp(0, position.table.shape[1] - 1)  # (T, S); clamped rows are never seen
        if position.query is None:
            scores = scores + position.table.to(dtype)[:, row]
        else:
            term = position.query.to(dtype) @ position.table.to(dtype).mT  # (B, H, T, R)
            scores = scores + term.gather(-1, row.expand_as(scores))
    visible = spans.visible(key.shape[2]).to(query.device)[:, None]  # (B or 1, 1, T, S)
    scores = (scores * scale).masked_fill(~visible, -math.inf)
    lse = scores.logsumexp(-1)  # (B, H, T)
    seen = visible.any(-1)  # (B or 1, 1, T)
    probabilities = torch.exp(scores - lse.masked_fill(~seen, 0.0)[..., None])  # (B, H, T, S)
    return probabilities @ value, lse, probabilities


_NEVER = 1e30  # a masked score is -_NEVER: finite, so that no inf - inf arises; its exponential is exactly 0
# Scores of the tiles are in base 2. On CPUs torch's exp takes a slow path where results vanish, as they do for every
# masked key, and exp2 has none: 9 times faster on a tile of a band.
_LOG2_E = math.log2(math.e)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The type that scores are computed in: float32 at least."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check(query, key, value, spans, position):
    """Raises ValueError unless the shapes fit; returns the intervals cut to the keys that exist."""
    b, h, t, d = query.shape
    s = key.shape[2]
    if key.shape != (b, h, s, d) or value.shape[:3] != (b, h, s):
        raise ValueError(
            f"query is {tuple(query.shape)}, so key must be ({b}, {h}, S, {d}) and value ({b}, {h}, S, Dv); "
            f"got {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if spans.lower.shape not in ((b, t), (1, t)):
        raise ValueError(f"spans have shape {tuple(spans.lower.shape)}; {b} rows of {t} queries need ({b} or 1, {t})")
    spans = spans.clamp(s)
    if position is not None:
        table, far, position_query = position
        shape = (h, table.shape[1]) if position_query is None else (h, table.shape[1], d)
        if table.shape != shape or (position_query is not None and position_query.shape != query.shape):
            raise ValueError(
                f"position.table has shape {tuple(table.shape)}, must be {shape}; position.query, if given, "
                f"{tuple(query.shape)}, got {None if position_query is None else tuple(position_query.shape)}"
            )
        nearest, farthest = spans.distances(s - t)
        if nearest <= farthest and (farthest > far or nearest < far - table.shape[1] + 1):  # not all are empty
            raise ValueError(
                f"keys are seen at distances {nearest} to {farthest}, but position.table has rows for "
                f"{far - table.shape[1] + 1} to {far} only"
            )
    return spans


def _attend_one(query, key, value, spans, position, scale):
    """One query a row, as in decoding: there is nothing to tile, and keys and values are read where they lie."""
    b, h, _, d = query.shape
    dtype = compute_dtype(query)
    first, last, full_first, full_last = spans.tiles(slice(0, b), 1)[0]
    if first > last:
        out = query.new_zeros(b, h, 1, value.shape[-1])
        return out, out.new_full((b, h, 1), -math.inf, dtype=dtype)
    seen = slice(first, last + 1)
    scores = (query.to(dtype) * scale) @ key[:, :, seen].to(dtype).mT  # (B, H, 1, s)
    if position is not None:
        nearest = key.shape[2] - 1 - last
        rows = slice(position.far - nearest - (last - first), position.far - nearest + 1)
        table = position.table[:, rows].to(dtype)  # (H, s) or (H, s, D)
        if position.query is None:
            scores += table[:, None] * scale
        else:
            asked = position.query.to(dtype).transpose(0, 1).reshape(h, b, d) * scale
            scores += torch.bmm(asked, table.mT).transpose(0, 1)[:, :, None]
    if first < full_first or last > full_last:
        lower, upper = (x[:, None, :, None] for x in spans.on(query.device))
        column = torch.arange(first, last + 1, device=query.device)
        scores.masked_fill_((column < lower) | (column > upper), -math.inf)
    top = scores.amax(-1, keepdim=True).clamp_(min=-_NEVER)  # (B, H, 1, 1)
    probabilities = scores.sub_(top).exp_()
    total = probabilities.sum(-1, keepdim=True)  # 0 where nothing is seen, else at least the greatest score's 1
    out = (probabilities @ value[:, :, seen].to(dtype)).div_(total.clamp(min=1.0))
    return out.to(query.dtype), total.log_().add_(top).squeeze(-1)


# --------------------------------------------------------------------------------------------------- the tiles


class _TiledAttention(torch.autograd.Function):
    """The tiles of `attend`. A batch group's tensors are heads-major, (H * rows, T, D), so that a table of positions
    serves all of its rows in one product."""

    @staticmethod
    def forward(ctx, query, key, value, position_query, table, far, spans, scale, dropout, seed):
        b, h, t, _ = query.shape
        s = key.shape[2]
        out = torch.empty(b, h, t, value.shape[-1], dtype=query.dtype, device=query.device)
        lse = torch.empty(b, h, t, dtype=compute_dtype(query), device=query.device)
        with torch.autocast(query.device.type, enabled=False):
            tiling = _Tiling(spans, b, h, t, s)
            for rows in tiling.groups:
                scorer = _Scorer(query, key, position_query, table, far, spans, scale, rows, tiling)
                group_value = _pack(value, rows, lse.dtype)  # (H * rows, S, Dv)
                for tile in tiling.query_tiles(rows):
                    tile_out, tile_lse = _forward_tile(scorer, group_value, tile, dropout, seed)
                    out[rows, :, tile.queries] = _unpack(tile_out, h)
                    lse[rows, :, tile.queries] = _unpack(tile_lse, h)
        ctx.save_for_backward(query, key, value, position_query, table, out, lse)
        ctx.spans, ctx.far, ctx.scale, ctx.dropout, ctx.seed = spans, far, scale, dropout, seed
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, grad_lse):
        query, key, value, position_query, table, out, lse = ctx.saved_tensors
        dtype = lse.dtype
        b, h, t, _ = query.shape
        wants = ctx.needs_input_grad  # keys from before a border want none, and so cost two products less
        grad_query, grad_key, grad_value, grad_position_query = (
            torch.empty_like(x, memory_format=torch.contiguous_format) if x is not None and wanted else None
            for x, wanted in zip((query, key, value, position_query), wants, strict=False)
        )
        grad_table = None
        with torch.autocast(query.device.type, enabled=False):
            tiling = _Tiling(ctx.spans, b, h, t, key.shape[2])
            if table is not None and (wants[3] or wants[4]):
                grad_table = _TableGradient(table, dtype, tiling)
            for rows in tiling.groups:
                scorer = _Scorer(query, key, position_query, table, ctx.far, ctx.spans, ctx.scale, rows, tiling)
                group_value = _pack(value, rows, dtype)
                group_grad = _pack(torch.zeros_like(out) if grad_out is None else grad_out, rows, dtype)
                # The softmax's derivative subtracts sum_s p_s dp_s from dp; it equals grad_out . out, and the
                # gradient of lse, whose derivative is p itself, is one more constant of the row.
                offset = (group_grad * _pack(out, rows, dtype)).sum(-1)  # (H * rows, T)
                if grad_lse is not None:
                    offset = offset - _pack(grad_lse, rows, dtype)
                group_lse = _pack(lse, rows, dtype) * _LOG2_E
                group_lse = group_lse.masked_fill(group_lse == -math.inf, _NEVER)  # exp2(score - _NEVER) is 0
                gq, gk, gv, gp = (
                    torch.zeros_like(x) if x is not None and wanted else None
                    for x, wanted in zip(
                        (scorer.query, scorer.key, group_value, scorer.position_query), wants, strict=False
                    )
                )
                for tile in tiling.query_tiles(rows):
                    _backward_tile(
                        scorer, group_value, group_grad, group_lse, offset, tile, ctx.dropout, ctx.seed,
                        gq, gk, gv, gp, grad_table,
                    )  # fmt: skip
                # The scorer's queries are scaled and in base 2.
                for grad, found, factor in (
                    (grad_query, gq, ctx.scale),
                    (grad_key, gk, 1 / _LOG2_E),
                    (grad_value, gv, 1.0),
                    (grad_position_query, gp, ctx.scale),
                ):
                    if grad is not None:
                        grad[rows] = _unpack(found.mul_(factor), h)
        table_scale = 1 / _LOG2_E if position_query is not None else ctx.scale
        return (
            grad_query, grad_key, grad_value, grad_position_query,
            None if grad_table is None else grad_table.result(table_scale),
            None, None, None, None, None,
        )  # fmt: skip


def _forward_tile(scorer: _Scorer, value, tile: _Tile, dropout, seed):
    """Output (n, t, Dv) and log-sum-exp (n, t) of one tile of queries: an online softmax over its key tiles."""
    n, t = value.shape[0], tile.queries.stop - tile.queries.start
    if not tile.keys:
        return value.new_zeros(n, t, value.shape[-1]), value.new_full((n, t), -math.inf)
    top = total = out = None
    for keys, cut in tile.keys:
        scores = scorer.scores(tile.queries, keys, cut)  # (n, t, s)
        tile_top = scores.amax(-1, keepdim=True)  # (n, t, 1)
        new_top = tile_top if top is None else torch.maximum(top, tile_top)
        probabilities = scores.sub_(new_top).exp2_()
        tile_total = probabilities.sum(-1, keepdim=True)
        if dropout > 0.0:
            probabilities.mul_(_dropout_mask(probabilities, dropout, seed, scorer.group, tile, keys))
        if out is None:
            out, total = torch.bmm(probabilities, value[:, keys]), tile_total
        else:
            shrink = top.sub_(new_top).exp2_()
            out = torch.baddbmm(out.mul_(shrink), probabilities, value[:, keys])
            total = total.mul_(shrink).add_(tile_total)
        top = new_top
    out.div_(total)
    lse = total.log2_().add_(top).div_(_LOG2_E).squeeze(-1)
    nothing = top.squeeze(-1) <= -_NEVER / 2  # only masked keys so far: the interval is empty
    if tile.has_empty:
        out.masked_fill_(nothing[..., None], 0.0)
        lse.masked_fill_(nothing, -math.inf)
    return out, lse


def _backward_tile(
    scorer,
    value,
    grad_out,
    lse,
    offset,
    tile,
    dropout,
    seed,
    grad_query,
    grad_key,
    grad_value,
    grad_position,
    grad_table,
):
    """Adds the gradients that one tile of queries gives; all buffers are heads-major."""
    queries = tile.queries
    q, g = scorer.query[:, queries], grad_out[:, queries]  # (n, t, D), (n, t, Dv)
    for keys, cut in tile.keys:
        probabilities = scorer.scores(queries, keys, cut, lse).exp2_()  # (n, t, s)
        if dropout > 0.0:
            mask = _dropout_mask(probabilities, dropout, seed, scorer.group, tile, keys)
            grad = torch.bmm(g, value[:, keys].mT).mul_(mask).sub_(offset[:, queries, None])
            kept = mask.mul_(probabilities)
        else:
            grad = torch.baddbmm(-offset[:, queries, None], g, value[:, keys].mT)
            kept = probabilities
        if grad_value is not None:
            grad_value[:, keys].baddbmm_(kept.mT, g)
        grad.mul_(probabilities)  # of the scores
        if grad_query is not None:
            grad_query[:, queries].baddbmm_(grad, scorer.key[:, keys])
        if grad_key is not None:
            grad_key[:, keys].baddbmm_(grad.mT, q)
        if grad_table is not None:
            grad_table.add(scorer, grad, queries, keys, grad_position)


class _Tile(NamedTuple):
    """A tile of queries, and the tiles of keys that its intervals touch, each with whether an interval cuts it."""

    queries: slice
    keys: list[tuple[slice, bool]]
    has_empty: bool


class _Tiling:
    """How the problem is cut: batch rows into groups, queries and keys into tiles.

    A tile of scores should stay in the cores' caches and be large enough that the calls cost nothing: about
    `budget` scores in all heads of a group.
    """

    budget = 2**19
    queries, wide_queries, wide = 64, 128, 512  # where queries see much, a tile's corners outside of it cost little

    def __init__(self, spans, b, h, t, s):
        self.spans, self.columns, self.offset, self.t = spans, s, s - t, t
        self.query_size = max(1, min(t, self.wide_queries if spans.widest >= self.wide else self.queries))
        reach = max(1, min(s, spans.widest + self.query_size))
        rows = max(1, min(b, self.budget // (h * self.query_size * reach)))
        self.key_size = max(64, self.budget // (h * rows * self.query_size))
        self.table_pad = self.query_size + _ALIGNMENT
        self.groups = [slice(i, min(i + rows, b)) for i in range(0, b, rows)]

    def query_tiles(self, rows):
        for i, (first, last, full_first, full_last) in enumerate(self.spans.tiles(rows, self.query_size)):
            queries = slice(i * self.query_size, min((i + 1) * self.query_size, self.t))
            keys = []
            if first <= last:
                end = last + 1
                if first < full_first or last > full_last:  # there is a mask, so a few more keys cost nothing
                    end = min(_aligned(end - first) + first, self.columns)
                parts = -(-(end - first) // self.key_size)
                size = _aligned(-(-(end - first) // parts))
                for start in range(first, end, size):
                    stop = min(start + size, end)
                    keys.append((slice(start, stop), start < full_first or stop - 1 > full_last))
            yield _Tile(queries, keys, full_first > self.columns)


_ALIGNMENT = 16  # floats in a vector register: products of matrices whose rows are multiples of it are faster


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT


class _Scorer:
    """Scores of any tile of a batch group, masked: the part that forward and backward share."""

    def __init__(self, query, key, position_query, table, far, spans, scale, rows, tiling):
        dtype = compute_dtype(query)
        scale = scale * _LOG2_E
        self.heads, self.group = query.shape[1], rows.start
        self.query = _pack(query, rows, dtype) * scale  # (H * rows, T, D)
        self.key = _pack(key, rows, dtype)  # (H * rows, S, D)
        self.offset = tiling.offset
        self.lower, self.upper = (x if x.shape[0] == 1 else x[rows] for x in spans.on(query.device))
        self.band = spans.band(self.offset, key.shape[2])
        self.position_query = self.table = self.bias = None
        self.toeplitz: dict[tuple, torch.Tensor] = {}
        if table is not None:
            pad = tiling.table_pad
            self.far = far + pad  # rows of distances that no interval holds: a tile's corners read them, masked
            self.table = _pad_rows(table.to(dtype), pad)  # (H, R + 2 pad[, D])
            if position_query is None:
                self.bias = self.table * scale
            else:
                self.position_query = _pack(position_query, rows, dtype) * scale

    def scores(self, queries: slice, keys: slice, cut: bool, lse: torch.Tensor | None = None) -> torch.Tensor:
        """Scaled scores (H * rows, t, s) of a tile, in base 2, less lse (H * rows, T) if given; about -_NEVER where
        the key is outside the interval."""
        q, k = self.query[:, queries], self.key[:, keys].mT
        (n, t, _), s = q.shape, k.shape[2]
        terms = []  # of the scores besides q . k, each of a shape like (H, rows, t, s)
        if lse is not None:
            terms.append(-lse[:, queries].view(self.heads, -1, t, 1))
        if self.position_query is not None:
            terms.append(self._position(queries, keys).unflatten(0, (self.heads, -1)))
        if self.bias is not None or (cut and self.band):
            terms.append(self._by_distance(queries, keys, cut)[:, None])
        if cut and not self.band:
            terms.append(self._mask(queries, keys))
        if not terms:
            return torch.bmm(q, k)
        start = terms[0]
        for term in terms[1:]:
            start = start + term
        start = start.expand(self.heads, n // self.heads, t, s)
        # One term alone may be kept for other tiles.
        start = start.clone(memory_format=torch.contiguous_format) if len(terms) == 1 else start.contiguous()
        return start.view(n, t, s).baddbmm_(q, k)

    def _mask(self, queries, keys):
        column = torch.arange(keys.start, keys.stop, device=self.query.device)
        hidden = column < self.lower[:, queries, None]  # (rows or 1, t, s)
        hidden |= column > self.upper[:, queries, None]
        return torch.zeros(hidden.shape, dtype=self.query.dtype, device=hidden.device).masked_fill_(hidden, -_NEVER)

    def table_rows(self, queries: slice, keys: slice) -> slice:
        """Rows of the padded table for the tile, from its greatest distance to its least: t + s - 1 of them."""
        greatest = self.offset + queries.stop - 1 - keys.start
        count = (queries.stop - queries.start) + (keys.stop - keys.start) - 1
        return slice(self.far - greatest, self.far - greatest + count)

    def _position(self, queries, keys):
        q = self.position_query[:, queries]
        n, t, d = q.shape
        term = torch.bmm(q.reshape(self.heads, -1, d), self.table[:, self.table_rows(queries, keys)].mT)
        return shear(term.view(n, t, -1))  # (n, t, s)

    def _by_distance(self, queries, keys, cut):
        """The bias, and a band's mask, of a tile: (H or 1, t, s). They depend on its distance from the diagonal only,
        so few tiles differ."""
        t, s = queries.stop - queries.start, keys.stop - keys.start
        greatest = self.offset + queries.stop - 1 - keys.start
        place = (greatest, t, s, cut)
        if place not in self.toeplitz:
            row = self.query.new_zeros(1, t + s - 1)
            if self.bias is not None:
                row = self.bias[:, self.table_rows(queries, keys)]
            if cut and self.band:
                distance = greatest - torch.arange(t + s - 1, device=row.device)
                row = row.masked_fill((distance < self.band[0]) | (distance > self.band[1]), -_NEVER)
            self.toeplitz[place] = shear(row[:, None].expand(-1, t, -1).contiguous()).contiguous()
        return self.toeplitz[place]


def shear(x: torch.Tensor) -> torch.Tensor:
    """A view (n, t, s) of x (n, t, t + s - 1), contiguous: row i starts at column t - 1 - i.

    Columns of x are distances, falling by one; so row i of the result holds distances from its own query.
    This is the relative shift of Dai et al. 2019, appendix B, without a copy.
    """
    n, t, width = x.shape
    return x.as_strided((n, t, width - t + 1), (t * width, width - 1, 1), x.storage_offset() + t - 1)


def _skew(x: torch.Tensor) -> torch.Tensor:
    """x (n, t, s) with a column for each distance, (n, t, t + s - 1), zeros elsewhere: what `shear` undoes."""
    n, t, s = x.shape
    skew = x.new_zeros(n, t, t + s - 1)
    shear(skew).copy_(x)
    return skew


class _TableGradient:
    """Gathers the gradient of a position table, and of the queries that meet it."""

    def __init__(self, table, dtype, tiling):
        self.dtype, self.pad = table.dtype, tiling.table_pad
        self.total = _pad_rows(torch.zeros_like(table, dtype=dtype), self.pad).contiguous()  # (H, R + 2 pad[, D])
        self.rows = self.waiting = None  # a bias: the gradient (H, t, s) of the last tiles, all with these rows

    def add(self, scorer, grad, queries, keys, grad_position):
        """grad (n, t, s): of the tile's scores."""
        n, t, s = grad.shape
        rows = scorer.table_rows(queries, keys)
        if scorer.position_query is None:
            grad = grad if n == scorer.heads else grad.view(scorer.heads, -1, t, s).sum(1)  # (H, t, s)
            if rows == self.rows and grad.shape == self.waiting.shape:
                self.waiting += grad
            else:
                self._add_waiting()
                self.rows, self.waiting = rows, grad
            return
        skew = _skew(grad)
        skew = skew.view(scorer.heads, -1, t + s - 1)  # (H, rows * t, t + s - 1)
        q = scorer.position_query[:, queries]
        self.total[:, rows].baddbmm_(skew.mT, q.reshape(scorer.heads, -1, q.shape[-1]))
        if grad_position is not None:
            grad_position[:, queries] += torch.bmm(skew, scorer.table[:, rows]).view(n, t, -1)

    def _add_waiting(self):
        if self.waiting is not None:
            self.total[:, self.rows] += _skew(self.waiting).sum(1)

    def result(self, scale):
        self._add_waiting()
        return (self.total[:, self.pad : self.total.shape[1] - self.pad] * scale).to(self.dtype)


def _dropout_mask(like, dropout, seed, group, tile, keys):
    """0 or 1 / (1 - dropout) for every probability of a tile: a stream of its own, so backward draws it again."""
    generator = torch.Generator(device=like.device)
    generator.manual_seed(hash((seed, group, tile.queries.start, keys.start)) % 2**63)
    return torch.empty_like(like).bernoulli_(1.0 - dropout, generator=generator).div_(1.0 - dropout)


def _pack(x, rows, dtype):
    """(B, H, T, ...) to the heads-major (H * rows, T, ...) of a batch group."""
    return x[rows].transpose(0, 1).to(dtype).flatten(0, 1)


def _unpack(x, heads):
    """(H * rows, T, ...) back to (rows, H, T, ...)."""
    return x.unflatten(0, (heads, -1)).transpose(0, 1)


def _pad_rows(table, pad):
    return F.pad(table, (pad, pad)) if table.dim() == 2 else F.pad(table, (0, 0, pad, pad))


# ----------------------------------------------------------------------------------------------- fused kernels


def _attend_sdpa(query, key, value, spans, position, scale, dropout):
    """torch's fused kernels over the same intervals, one call for each tile of queries.

    Queries, keys and values are split once, and keys joined again for each tile, so that autograd's work stays linear
    in T as well.
    """
    b, h, t, _ = query.shape
    s = key.shape[2]
    if position is None and t > 1 and s == t and spans.is_causal:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=dropout, scale=scale)
    size = 256
    query_parts, key_parts, value_parts = (x.split(size, dim=2) for x in (query, key, value))
    outs = []
    for i, (first, last, full_first, full_last) in enumerate(spans.tiles(slice(0, b), size)):
        queries = slice(i * size, min((i + 1) * size, t))
        if first > last:
            outs.append(value.new_zeros(b, h, queries.stop - queries.start, value.shape[-1]))
            continue
        parts = slice(first // size, last // size + 1)
        start, stop = parts.start * size, min(parts.stop * size, s)
        k, v = torch.cat(key_parts[parts], dim=2), torch.cat(value_parts[parts], dim=2)
        bias = None
        nothing = None
        if position is not None:
            distance = (s - t) + torch.arange(queries.start, queries.stop, device=query.device)[:, None]
            distance = distance - torch.arange(start, stop, device=query.device)
            row = (position.far - distance).clamp(0, position.table.shape[1] - 1)
            bias = (position.table[:, row] * scale).to(query.dtype)[None]  # (1, H, t, s)
        if start < full_first or stop - 1 > full_last:
            lower, upper = (x[:, None, queries, None] for x in spans.on(query.device))
            column = torch.arange(start, stop, device=query.device)
            visible = (column >= lower) & (column <= upper)  # (B or 1, 1, t, s)
            nothing = upper < lower  # the kernels give NaN for these rows: let them see all, then drop it
            visible = visible | nothing
            hidden = torch.zeros_like(visible, dtype=query.dtype).masked_fill(~visible, -math.inf)
            bias = hidden if bias is None else bias + hidden
        out = F.scaled_dot_product_attention(
            query_parts[i], k, v, attn_mask=bias, dropout_p=dropout, scale=scale
        )  # (B, H, t, Dv)
        if nothing is not None:
            out = out.masked_fill(nothing, 0.0)
        outs.append(out)
    return torch.cat(outs, dim=2) if len(outs) != 1 else outs[0]
