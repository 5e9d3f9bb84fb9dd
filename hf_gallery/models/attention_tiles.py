"""`attend` in tiles, in torch alone: what runs on CPUs, in float64, and wherever no kernel of ours does.

An online softmax over tiles of keys (Milakov and Gimelshein 2018; Dao et al. 2022, FlashAttention, algorithm 1), and a
backward of its own that recomputes the scores of a tile from the saved log-sum-exp. Tiles that no interval touches are
skipped, so time is O(T x span) and memory O(T).

Scores, their gradients, softmax and sums over tiles are float32 at least. On CPUs with instructions for it, factors of
the other four products of bfloat16 tensors are rounded to it, as FlashAttention does on GPUs.

Letters: see spans.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .attention_problem import Position, Problem, compute_dtype, multiplies_bfloat16, without_autocast
from .exporting import outside_graphs
from .operators import attention_gradient, operator
from .spans import Spans

_NEVER = 1e30  # a masked score is -_NEVER: finite, so that no inf - inf arises; its exponential is exactly 0
# Scores of the tiles are in base 2. On CPUs torch's exp takes a slow path where results vanish, as they do for every
# masked key, and exp2 has none: 9 times faster on a tile of a band.
_LOG2_E = math.log2(math.e)


@outside_graphs  # its tiles depend on the intervals: every new length would be traced anew
def attend_tiles(problem: Problem, needs_lse: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
    """out (B, H, T, Dv) and lse (B, H, T) of a checked problem; lse may be None if it is not needed."""
    leaves = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in problem.tensors)
    if problem.query.shape[2] == 1 and problem.dropout == 0.0 and not leaves:
        with without_autocast(problem.query):
            return _attend_one(problem, needs_lse)
    # One draw from torch's generator a call: the tiles' own streams follow from it, the same in forward and backward.
    seed = int(torch.randint(2**62, ()).item()) if problem.dropout > 0.0 else 0
    return _TiledAttention.apply(problem, seed, *problem.tensors)


def _attend_one(problem: Problem, needs_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One query per row, as in decoding: there is nothing to tile, and keys and values are read where they lie."""
    query, key, value, spans, position, scale, _ = problem
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
        entries = slice(position.farthest - nearest - (last - first), position.farthest - nearest + 1)
        table = position.table[:, entries].to(dtype)  # (H, s) or (H, s, D)
        if position.query is None:
            scores += table[:, None] * scale
        else:
            asked = position.query.to(dtype).transpose(0, 1).reshape(h, b, d) * scale
            scores += torch.bmm(asked, table.mT).transpose(0, 1)[:, :, None]
    if first < full_first or last > full_last:
        lower, upper = (x[:, None, :, None] for x in spans.on(query.device))
        column = torch.arange(first, last + 1, device=query.device)
        scores.masked_fill_((column < lower) | (column > upper), -math.inf)
    elif not needs_lse:  # every row sees something
        return (scores.softmax(-1) @ value[:, :, seen].to(dtype)).to(query.dtype), None
    top = scores.amax(-1, keepdim=True).clamp_(min=-_NEVER)  # (B, H, 1, 1)
    probabilities = scores.sub_(top).exp_()
    total = probabilities.sum(-1, keepdim=True)  # 0 where nothing is seen, else at least the greatest score's 1
    out = (probabilities @ value[:, :, seen].to(dtype)).div_(total.clamp(min=1.0))
    return out.to(query.dtype), total.log_().add_(top).squeeze(-1)


def attend_tiles_in_graph(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend_tiles` as an operator, for a problem that is checked when the graph runs."""
    query, key, value, asked, table = problem.tensors
    farthest = 0 if problem.position is None else problem.position.farthest
    seed = torch.randint(2**62, ()) if problem.dropout > 0.0 else None
    ends = problem.spans.lower, problem.spans.upper
    return _tiles_forward(query, key, value, asked, table, *ends, seed, farthest, problem.scale, problem.dropout)


class _TiledAttention(torch.autograd.Function):
    """The tiles of `attend`. A batch group's tensors are heads-major, (H * rows, T, D), so that a table of positions
    serves all of its rows in one product."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, seed: int, *tensors: torch.Tensor | None):
        """tensors: those of the problem, by themselves, since autograd sees only what it is given directly."""
        out, lse = _forward(problem, seed)
        ctx.save_for_backward(*tensors, out, lse)
        ctx.spans, ctx.farthest, ctx.seed = problem.spans, problem.position and problem.position.farthest, seed
        ctx.scale, ctx.dropout = problem.scale, problem.dropout
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None):
        query, key, value, asked, table, out, lse = ctx.saved_tensors
        position = None if table is None else Position(table, ctx.farthest, asked)
        problem = Problem(query, key, value, ctx.spans, position, ctx.scale, ctx.dropout)
        wants = _Gradients(*ctx.needs_input_grad[2:])
        return None, None, *_backward(problem, ctx.seed, (out, lse), (grad_out, grad_lse), wants)


def _forward(problem: Problem, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """out (B, H, T, Dv) and lse (B, H, T)."""
    b, h, t, _ = problem.query.shape
    query, value = problem.query, problem.value
    out = torch.empty(b, h, t, value.shape[-1], dtype=query.dtype, device=query.device)
    lse = torch.empty(b, h, t, dtype=compute_dtype(query), device=query.device)
    with without_autocast(query):
        tiling = _Tiling(problem)
        for group in tiling.groups:
            scorer = _Scorer(problem, group, tiling)
            drop = _Dropout(problem.dropout, seed, group.start)
            group_value = _pack(value, group, lse.dtype)  # (H * rows, S, Dv)
            for tile in tiling.query_tiles(group):
                tile_out, tile_lse = _forward_tile(scorer, group_value, tile, drop)
                out[group, :, tile.queries] = _unpack(tile_out, h)
                lse[group, :, tile.queries] = _unpack(tile_lse, h)
    return out, lse


def _backward(
    problem: Problem,
    seed: int,
    results: tuple[torch.Tensor, torch.Tensor],
    given: tuple[torch.Tensor | None, torch.Tensor | None],
    wants: _Gradients,
) -> _Gradients:
    """Gradients of the problem's tensors. results: out, lse; given: their gradients, of which one may be None. wants:
    whether each tensor wants its own; keys from before a border want none, which saves two products."""
    query, key, value, asked, table = problem.tensors
    (out, lse), (grad_out, grad_lse) = results, given
    dtype, h, scale = lse.dtype, query.shape[1], problem.scale
    totals = _Gradients(
        *(
            torch.empty_like(x, memory_format=torch.contiguous_format) if x is not None and wanted else None
            for x, wanted in zip((query, key, value, asked), wants, strict=False)
        )
    )
    # The scorer's queries are scaled and in base 2.
    factors = _Gradients(scale, 1 / _LOG2_E, 1.0, scale, 1 / _LOG2_E if asked is not None else scale)
    grad_table = None
    with without_autocast(query):
        tiling = _Tiling(problem)
        if table is not None and (wants.asked or wants.table):
            grad_table = _TableGradient(table, dtype, tiling)
        for group in tiling.groups:
            scorer = _Scorer(problem, group, tiling)
            drop = _Dropout(problem.dropout, seed, group.start)
            group_grad = _pack(torch.zeros_like(out) if grad_out is None else grad_out, group, dtype)
            # The softmax's derivative subtracts sum_s p_s dp_s from dp; it equals grad_out . out, and the gradient of
            # lse, whose derivative is p itself, is one more constant of the row.
            offset = (group_grad * _pack(out, group, dtype)).sum(-1)  # (H * rows, T)
            if grad_lse is not None:
                offset = offset - _pack(grad_lse, group, dtype)
            group_lse = _pack(lse, group, dtype) * _LOG2_E
            group_lse = group_lse.masked_fill(group_lse == -math.inf, _NEVER)  # exp2(score - _NEVER) is 0
            of_group = _Given(_pack(value, group, dtype), group_grad, group_lse, offset)
            buffers = (
                torch.zeros_like(x) if x is not None and wanted else None
                for x, wanted in zip((scorer.query, scorer.key, of_group.value, scorer.asked), wants, strict=False)
            )
            grads = _Gradients(*buffers)._replace(table=grad_table)
            for tile in tiling.query_tiles(group):
                _backward_tile(scorer, of_group, tile, drop, grads)
            for total, found, factor in zip(totals[:4], grads[:4], factors[:4], strict=True):
                if total is not None:
                    total[group] = _unpack(found.mul_(factor), h)
    return totals._replace(table=None if grad_table is None else grad_table.result(factors.table))


class _Gradients(NamedTuple):
    """Something for each tensor that may want a gradient, in the order of `Problem.tensors`."""

    query: Any = None
    key: Any = None
    value: Any = None
    asked: Any = None  # the position's query
    table: Any = None


class _Given(NamedTuple):
    """Input of the backward of a batch group, heads-major."""

    value: torch.Tensor  # (H * rows, S, Dv)
    grad_out: torch.Tensor  # (H * rows, T, Dv)
    lse: torch.Tensor  # (H * rows, T), in base 2
    offset: torch.Tensor  # (H * rows, T)


class _Dropout(NamedTuple):
    """Dropout of a batch group: every tile has a stream of its own, so that the backward draws it again."""

    share: float
    seed: int
    group: int

    def mask(self, like: torch.Tensor, queries: slice, keys: slice) -> torch.Tensor:
        """0 or 1 / (1 - share) for every probability of a tile."""
        generator = torch.Generator(device=like.device)
        generator.manual_seed(hash((self.seed, self.group, queries.start, keys.start)) % 2**63)
        return torch.empty_like(like).bernoulli_(1.0 - self.share, generator=generator).div_(1.0 - self.share)


def _forward_tile(scorer: _Scorer, value: torch.Tensor, tile: _Tile, drop: _Dropout):
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
        if drop.share > 0.0:
            probabilities.mul_(drop.mask(probabilities, tile.queries, keys))
        weights = scorer.factor(probabilities)
        if out is None:
            out, total = torch.bmm(weights, value[:, keys].to(weights.dtype)).to(value.dtype), tile_total
        else:
            shrink = top.sub_(new_top).exp2_()
            out = _add_product(out.mul_(shrink), weights, value[:, keys])
            total = total.mul_(shrink).add_(tile_total)
        top = new_top
    out.div_(total)
    lse = total.log2_().add_(top).div_(_LOG2_E).squeeze(-1)
    nothing = top.squeeze(-1) <= -_NEVER / 2  # only masked keys so far: the interval is empty
    if tile.has_empty:
        out.masked_fill_(nothing[..., None], 0.0)
        lse.masked_fill_(nothing, -math.inf)
    return out, lse


def _backward_tile(scorer: _Scorer, given: _Given, tile: _Tile, drop: _Dropout, grads: _Gradients):
    """Adds the gradients that one tile of queries gives; all buffers are heads-major."""
    queries = tile.queries
    q, g = scorer.query[:, queries], given.grad_out[:, queries]  # (n, t, D), (n, t, Dv)
    offset = given.offset[:, queries, None]  # (n, t, 1)
    for keys, cut in tile.keys:
        probabilities = scorer.scores(queries, keys, cut, given.lse).exp2_()  # (n, t, s)
        if drop.share > 0.0:
            mask = drop.mask(probabilities, queries, keys)
            grad = torch.bmm(g, given.value[:, keys].mT).mul_(mask).sub_(offset)
            kept = mask.mul_(probabilities)
        else:
            grad = torch.baddbmm(-offset, g, given.value[:, keys].mT)
            kept = probabilities
        if grads.value is not None:
            _add_product(grads.value[:, keys], scorer.factor(kept).mT, g)
        grad.mul_(probabilities)  # of the scores
        factor = scorer.factor(grad)
        if grads.query is not None:
            _add_product(grads.query[:, queries], factor, scorer.key[:, keys])
        if grads.key is not None:
            _add_product(grads.key[:, keys], factor.mT, q)
        if grads.table is not None:
            grads.table.add(scorer, grad, queries, keys, grads.asked)


def _add_product(total: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """total + x @ y, written over total; y is rounded to the type of x."""
    return total.baddbmm_(x, y) if x.dtype == total.dtype else total.add_(torch.bmm(x, y.to(x.dtype)))


class _Tile(NamedTuple):
    """A tile of queries, and the tiles of keys that its intervals touch, each with whether an interval cuts it."""

    queries: slice
    keys: list[tuple[slice, bool]]
    has_empty: bool


class _Tiling:
    """Cuts the problem: batch rows into groups, queries and keys into tiles.

    A tile of scores should stay in the cores' caches and be large enough that the calls cost nothing: about
    `budget` scores in all heads of a group.
    """

    budget = 2**19
    queries, wide_queries, wide = 64, 128, 512  # where queries see much, a tile's corners outside of it cost little

    def __init__(self, problem: Problem):
        spans, (b, h, t, _), s = problem.spans, problem.query.shape, problem.key.shape[2]
        self.spans, self.columns, self.offset, self.t = spans, s, s - t, t
        self.query_size = max(1, min(t, self.wide_queries if spans.widest >= self.wide else self.queries))
        reach = max(1, min(s, spans.widest + self.query_size))
        rows = max(1, min(b, self.budget // (h * self.query_size * reach)))
        self.key_size = max(64, self.budget // (h * rows * self.query_size))
        self.table_pad = self.query_size + _ALIGNMENT
        self.groups = [slice(i, min(i + rows, b)) for i in range(0, b, rows)]

    def query_tiles(self, group: slice) -> Iterator[_Tile]:
        for i, (first, last, full_first, full_last) in enumerate(self.spans.tiles(group, self.query_size)):
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

    def __init__(self, problem: Problem, group: slice, tiling: _Tiling):
        query, key, _, spans, position, scale, _ = problem
        dtype = compute_dtype(query)
        scale = scale * _LOG2_E
        self.num_heads, self.query_size = query.shape[1], tiling.query_size
        self.rounds = all(x.dtype == torch.bfloat16 and x.device.type == "cpu" for x in problem[:3])
        self.rounds = self.rounds and multiplies_bfloat16()
        self.query = _pack(query, group, dtype) * scale  # (H * rows, T, D)
        self.key = _pack(key, group, dtype)  # (H * rows, S, D)
        self.offset = tiling.offset
        self.lower, self.upper = (x if x.shape[0] == 1 else x[group] for x in spans.on(query.device))
        self.band = spans.band(self.offset, key.shape[2])
        self.asked: Any = None
        self.table: Any = None
        self.bias: Any = None
        self.toeplitz: dict[tuple, torch.Tensor] = {}
        if position is not None:
            pad = tiling.table_pad
            # A tile's corners read distances that no interval holds; they are masked.
            self.farthest = position.farthest + pad
            self.table = _pad_table(position.table.to(dtype), pad)  # (H, R + 2 pad[, D])
            if position.query is None:
                self.bias = self.table * scale
            else:
                self.asked = _pack(position.query, group, dtype) * scale

    def scores(self, queries: slice, keys: slice, cut: bool, lse: torch.Tensor | None = None) -> torch.Tensor:
        """Scaled scores (H * rows, t, s) of a tile, in base 2, less lse (H * rows, T) if given; about -_NEVER where
        the key is outside the interval."""
        q, k = self.query[:, queries], self.key[:, keys].mT
        (n, t, _), s = q.shape, k.shape[2]
        terms = []  # of the scores besides q . k, each of a shape like (H, rows, t, s)
        if lse is not None:
            terms.append(-lse[:, queries].view(self.num_heads, -1, t, 1))
        if self.asked is not None:
            terms.append(self._position(queries, keys).unflatten(0, (self.num_heads, -1)))
        if self.bias is not None or (cut and self.band):
            terms.append(self._by_distance(queries, keys, cut)[:, None])
        if cut and not self.band:
            terms.append(self._mask(queries, keys))
        if not terms:
            return torch.bmm(q, k)
        start = terms[0]
        for term in terms[1:]:
            start = start + term
        start = start.expand(self.num_heads, n // self.num_heads, t, s)
        # One term alone may be kept for other tiles.
        start = start.clone(memory_format=torch.contiguous_format) if len(terms) == 1 else start.contiguous()
        return start.view(n, t, s).baddbmm_(q, k)

    def factor(self, x: torch.Tensor) -> torch.Tensor:
        """Probabilities or gradients of a tile, (n, t, s), as the factor of a product. They are rounded in tiles of
        even sizes alone: torch compiles, and keeps, code for every size of a product in bfloat16."""
        even = x.shape[1] == self.query_size and self.query_size % 64 == 0 and x.shape[2] % 64 == 0
        return x.to(torch.bfloat16) if self.rounds and even else x

    def _mask(self, queries, keys):
        column = torch.arange(keys.start, keys.stop, device=self.query.device)
        hidden = column < self.lower[:, queries, None]  # (rows or 1, t, s)
        hidden |= column > self.upper[:, queries, None]
        return torch.zeros(hidden.shape, dtype=self.query.dtype, device=hidden.device).masked_fill_(hidden, -_NEVER)

    def table_entries(self, queries: slice, keys: slice) -> slice:
        """Entries of the padded table for the tile, from its greatest distance to its least: t + s - 1 of them."""
        greatest = self.offset + queries.stop - 1 - keys.start
        count = (queries.stop - queries.start) + (keys.stop - keys.start) - 1
        return slice(self.farthest - greatest, self.farthest - greatest + count)

    def _position(self, queries, keys):
        q = self.asked[:, queries]
        n, t, d = q.shape
        term = torch.bmm(q.reshape(self.num_heads, -1, d), self.table[:, self.table_entries(queries, keys)].mT)
        return shear(term.view(n, t, -1))  # (n, t, s)

    def _by_distance(self, queries, keys, cut):
        """The bias, and a band's mask, of a tile: (H or 1, t, s). They depend on its distance from the diagonal only,
        so few tiles differ."""
        t, s = queries.stop - queries.start, keys.stop - keys.start
        greatest = self.offset + queries.stop - 1 - keys.start
        place = (greatest, t, s, cut)
        if place not in self.toeplitz:
            entries = self.query.new_zeros(1, t + s - 1)
            if self.bias is not None:
                entries = self.bias[:, self.table_entries(queries, keys)]
            if cut and self.band:
                distance = greatest - torch.arange(t + s - 1, device=entries.device)
                entries = entries.masked_fill((distance < self.band[0]) | (distance > self.band[1]), -_NEVER)
            self.toeplitz[place] = shear(entries[:, None].expand(-1, t, -1).contiguous()).contiguous()
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
        self.total = _pad_table(torch.zeros_like(table, dtype=dtype), self.pad).contiguous()  # (H, R + 2 pad[, D])
        self.entries = self.waiting = None  # a bias: the gradient (H, t, s) of the last tiles, all with these entries

    def add(self, scorer, grad, queries, keys, grad_position):
        """grad (n, t, s): of the tile's scores."""
        n, t, s = grad.shape
        entries = scorer.table_entries(queries, keys)
        if scorer.asked is None:
            grad = grad if n == scorer.num_heads else grad.view(scorer.num_heads, -1, t, s).sum(1)  # (H, t, s)
            if entries == self.entries and grad.shape == self.waiting.shape:
                self.waiting += grad
            else:
                self._add_waiting()
                self.entries, self.waiting = entries, grad
            return
        skew = _skew(grad)
        skew = skew.view(scorer.num_heads, -1, t + s - 1)  # (H, rows * t, t + s - 1)
        q = scorer.asked[:, queries]
        self.total[:, entries].baddbmm_(skew.mT, q.reshape(scorer.num_heads, -1, q.shape[-1]))
        if grad_position is not None:
            grad_position[:, queries] += torch.bmm(skew, scorer.table[:, entries]).view(n, t, -1)

    def _add_waiting(self):
        if self.waiting is not None:
            self.total[:, self.entries] += _skew(self.waiting).sum(1)

    def result(self, scale):
        self._add_waiting()
        return (self.total[:, self.pad : self.total.shape[1] - self.pad] * scale).to(self.dtype)


def _pack(x, group, dtype):
    """(B, H, T, ...) to the heads-major (H * rows, T, ...) of a batch group."""
    return x[group].transpose(0, 1).to(dtype).flatten(0, 1)


def _unpack(x, num_heads):
    """(H * rows, T, ...) back to (rows, H, T, ...)."""
    return x.unflatten(0, (num_heads, -1)).transpose(0, 1)


def _pad_table(table, pad):
    return F.pad(table, (pad, pad)) if table.dim() == 2 else F.pad(table, (0, 0, pad, pad))


# ------------------------------------------------------------------------------------------------------- the operators


def _problem_of(*parameters):
    """The problem of an operator's parameters, and the seed of its dropout."""
    query, key, value, asked, table, lower, upper, seed, farthest, scale, dropout = parameters
    position = None if table is None else Position(table, farthest, asked)
    problem = Problem(query, key, value, Spans(lower, upper), position, scale, dropout)
    return problem.check(), 0 if seed is None else int(seed)


def _operator_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    asked: torch.Tensor | None,
    table: torch.Tensor | None,
    lower: torch.Tensor,
    upper: torch.Tensor,
    seed: torch.Tensor | None,
    farthest: int,
    scale: float,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _forward(*_problem_of(query, key, value, asked, table, lower, upper, seed, farthest, scale, dropout))


def _forward_shapes(query, key, value, *rest):
    b, h, t, _ = query.shape
    return query.new_empty(b, h, t, value.shape[-1]), query.new_empty(b, h, t, dtype=compute_dtype(query))


def _operator_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    wants: list[bool],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    asked: torch.Tensor | None,
    table: torch.Tensor | None,
    lower: torch.Tensor,
    upper: torch.Tensor,
    seed: torch.Tensor | None,
    farthest: int,
    scale: float,
    dropout: float,
) -> list[torch.Tensor]:
    problem, drawn = _problem_of(query, key, value, asked, table, lower, upper, seed, farthest, scale, dropout)
    grads = _backward(problem, drawn, (out, lse), (grad_out, grad_lse), _Gradients(*wants))
    return [out.new_empty(0) if x is None else x for x in grads]


def _backward_shapes(grad_out, grad_lse, out, lse, wants, query, key, value, asked, table, *rest):
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format) if x is not None and wanted else out.new_empty(0)
        for x, wanted in zip((query, key, value, asked, table), wants, strict=True)
    ]


_tiles_backward = operator(__file__, "tiles_backward", _operator_backward, _backward_shapes)
_tiles_forward = operator(__file__, "tiles", _operator_forward, _forward_shapes, attention_gradient(_tiles_backward))
