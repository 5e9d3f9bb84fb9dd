"""`attend` as kernels for GPUs, in Triton: forward and backward over intervals of keys.

    score(t, s) = (q_t . k_s + term(t, s)) * scale        for s in [lower_t, upper_t]
    term        = nothing | bias[h, farthest - distance] | p_t . table[h, farthest - distance]
    distance    = S - T + t - s

A program of a kernel owns a tile of queries (or of keys) and walks over the tiles of keys (of queries) that its
intervals touch: first those that an interval cuts, with a mask, then those that all of its queries see, without. The
bounds are reduced from the intervals on the device; nothing is read by the host, and nothing is added atomically: the
same input gives the same bits.

Both terms are read as a matrix over (t, s). A bias is one with query stride -1. For Transformer-XL's term the products
p_t . table are written once, with a stride of width + 1, so that (t, s) lies at t width + s: queries overlap where
no interval can see, and with width a multiple of 16 every query of a tile is aligned (the relative shift of Dai et al.
2019, appendix B, as an address).

Products of half types accumulate in float32, and the softmax is float32; float32 is multiplied in IEEE arithmetic, or
as three TF32 products where torch is allowed TF32. On a CPU the kernels run in Triton's interpreter,
TRITON_INTERPRET=1.

Letters: see spans.py; BLOCK_M and BLOCK_N queries and keys of a tile; GROUP heads of a group.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .attention_problem import Problem, check_distances
from .operators import attention_gradient, operator
from .spans import Spans, moved

try:
    import triton
    import triton.language as tl
    from triton import jit
except ImportError:  # machines without a GPU, where the tiles serve
    triton = tl = None

    def jit(function):
        return function


INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
KINDS = torch.float32, torch.bfloat16, torch.float16  # of tensors that kernels read
LARGEST_HEAD = 256
# Transformer-XL's products are held for as many rows and heads at a time as fit, at least for one.
SCRATCH_BYTES = 2**30

if triton is not None:
    _LOG2_E = tl.constexpr(math.log2(math.e))
    # The interpreter holds bfloat16 as uint16 and multiplies the bits, without an error.
    _UPCAST = tl.constexpr(INTERPRETED)


def why_not(problem: Problem) -> str | None:
    """The reason why these kernels cannot serve the problem, None if they can; reads no tensor."""
    query = problem.query
    if triton is None:
        return "needs the package triton"
    if query.device.type != "cuda" and not INTERPRETED:
        return f"runs on CUDA; query is on {query.device}"
    if query.device.type == "cuda" and not is_ampere(query.device):
        return "needs a GPU of compute capability 8.0 or later"
    if query.dtype not in KINDS:
        return f"computes in float32; query has type {query.dtype}"
    widest = max(query.shape[-1], problem.value.shape[-1])
    if widest > LARGEST_HEAD:
        return f"has heads of {LARGEST_HEAD} at most, got {widest}"
    return None


def attend_triton(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """out (B, H, T, Dv) and lse (B, H, T) of a problem that `why_not` has nothing against. Reads no value of a GPU."""
    problem.check_shapes()
    query, key, value, spans, position, scale, dropout = problem
    kind, s = query.dtype, key.shape[2]
    table = asked = None
    farthest = 0
    if position is not None:
        _check_distances(problem)
        table, farthest, asked = position
        asked, table = (None, table.float()) if asked is None else (asked.to(kind), table.to(kind))
    lower, upper = (x.contiguous() for x in spans.on(query.device))
    seed = torch.randint(2**31, (1,), device=query.device) if dropout > 0.0 else None
    plan = None
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in problem.tensors):
        plan = key_plan(spans, query.device, s, _tiles("keys", problem))
    return _forward_operator(
        query, key.to(kind), value.to(kind), asked, table, lower, upper, plan, seed, farthest, scale, dropout
    )


def _check_distances(problem: Problem):
    """Refuses visible distances without an entry in the table: at once where intervals are on the CPU, else by an
    assertion that the device makes in its own time."""
    spans, position = problem.spans, problem.position
    t, s = problem.query.shape[2], problem.key.shape[2]
    if spans.lower.device.type == "cpu" and not torch.compiler.is_compiling():
        check_distances(spans.clamp(s), position, s - t)
        return
    least = position.farthest - position.table.shape[1] + 1

    def work():
        at = s - t + torch.arange(t, device=spans.lower.device)
        lower, upper = spans.lower.clamp(min=0), spans.upper.clamp(max=s - 1)
        fits = (upper < lower) | ((at - lower <= position.farthest) & (at - upper >= least))
        torch._assert_async(fits.all(), f"keys are seen at distances outside of {least} to {position.farthest}")
        return True

    spans._once(("asserted", t, s, least, position.farthest), work)


def key_plan(spans: Spans, device: torch.device, columns: int, tiles: _Tiles) -> torch.Tensor:
    """Tiles of queries that see a tile of keys: int32 (B or 1, key tiles, 4), on the device, once a forward.

    They are worked out where the intervals were made: on the CPU it costs a GPU one copy.

    [first, end) of those that see some of its keys; within, [whole, whole end) of those whose queries all see all.
    """

    def work():
        lower, upper = spans.lower, spans.upper.clamp(max=columns - 1)
        empty = upper < lower
        lower, upper = lower.masked_fill(empty, columns), upper.masked_fill(empty, -1)
        pad = -lower.shape[1] % tiles.queries
        bounds = []
        for x, outside, reduce in (
            (lower, columns, torch.amin),
            (upper, -1, torch.amax),
            (lower, -1, torch.amax),
            (upper, columns, torch.amin),
        ):
            x = F.pad(x.to(torch.int32), (0, pad), value=outside)
            bounds.append(reduce(x.view(x.shape[0], 1, -1, tiles.queries), -1))  # (B or 1, 1, query tiles)
        first, last, full_first, full_last = bounds
        start = torch.arange(0, columns, tiles.keys, device=lower.device)[:, None]  # (key tiles, 1)
        touch = (first < start + tiles.keys) & (last >= start)  # (B or 1, key tiles, query tiles)
        whole = (full_first <= start) & (full_last >= (start + tiles.keys - 1))
        ranges = [*_range(touch), *_range(whole)]
        gap = ranges[3] - ranges[2] != whole.sum(-1)  # not one stretch: then mask them all
        ranges[2:] = (x.masked_fill(gap, 0) for x in ranges[2:])
        return moved(torch.stack(ranges, -1).to(torch.int32), device)

    return spans._once(("key plan", device, columns, tiles.queries, tiles.keys), work)


def _range(flags: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first True and the end of the last in the last dimension, 0 and 0 where there is none."""
    number = torch.arange(flags.shape[-1], device=flags.device, dtype=torch.int32)
    end = torch.where(flags, number + 1, 0).amax(-1)
    return torch.minimum(torch.where(flags, number, flags.shape[-1]).amin(-1), end), end


# ------------------------------------------------------------------------------------------- sizes of the programs


class _Tiles(NamedTuple):
    """Launch settings of a kernel."""

    queries: int
    keys: int
    warps: int
    stages: int


# By kernel, for heads up to a size: chosen by compiling for sm_90 and sm_80 with at most 256 spilled bytes and within
# the shared memory of H100 (227 KB) and of sm_89 (99 KB), see eval/compiled.py.
HALF_ON_HOPPER = {
    "forward": {64: _Tiles(128, 64, 8, 3), 128: _Tiles(128, 64, 8, 2), 256: _Tiles(64, 32, 8, 2)},
    "queries": {64: _Tiles(128, 32, 8, 2), 128: _Tiles(128, 32, 8, 2), 256: _Tiles(32, 32, 8, 1)},
    "keys": {64: _Tiles(64, 128, 8, 2), 128: _Tiles(32, 64, 8, 2), 256: _Tiles(32, 32, 8, 1)},
    "diagonals": {64: _Tiles(64, 64, 4, 2), 128: _Tiles(64, 64, 8, 1), 256: _Tiles(16, 16, 4, 1)},
    "products": {64: _Tiles(64, 64, 4, 1), 128: _Tiles(64, 64, 4, 1), 256: _Tiles(64, 64, 8, 1)},
}
HALF = {
    "forward": {64: _Tiles(64, 64, 4, 2), 128: _Tiles(64, 32, 8, 2), 256: _Tiles(32, 32, 8, 1)},
    "queries": {64: _Tiles(128, 32, 8, 2), 128: _Tiles(64, 32, 8, 1), 256: _Tiles(16, 32, 4, 1)},
    "keys": {64: _Tiles(64, 32, 4, 2), 128: _Tiles(32, 32, 8, 1), 256: _Tiles(32, 16, 4, 1)},
    "diagonals": {64: _Tiles(32, 32, 4, 1), 128: _Tiles(32, 32, 4, 1), 256: _Tiles(16, 16, 4, 1)},
    "products": {64: _Tiles(64, 64, 4, 1), 128: _Tiles(64, 64, 8, 1), 256: _Tiles(64, 64, 8, 1)},
}
FLOAT = {
    "forward": {64: _Tiles(32, 32, 4, 2), 128: _Tiles(16, 16, 4, 1), 256: _Tiles(16, 16, 4, 1)},
    "queries": {64: _Tiles(32, 32, 8, 1), 128: _Tiles(16, 16, 4, 1), 256: _Tiles(16, 16, 8, 1)},
    "keys": {64: _Tiles(32, 32, 4, 1), 128: _Tiles(16, 16, 4, 1), 256: _Tiles(16, 16, 8, 1)},
    "diagonals": {64: _Tiles(32, 32, 4, 1), 128: _Tiles(16, 16, 8, 1), 256: _Tiles(16, 16, 8, 1)},
    "products": {64: _Tiles(32, 32, 4, 1), 128: _Tiles(32, 32, 8, 1), 256: _Tiles(32, 32, 8, 1)},
}


def _tiles(kernel: str, problem: Problem) -> _Tiles:
    query, widest = problem.query, max(problem.query.shape[-1], problem.value.shape[-1])
    return tiles_of(kernel, query.dtype, widest, query.shape[2], is_hopper(query.device))


def tiles_of(kernel: str, kind: torch.dtype, widest: int, queries: int, hopper: bool) -> _Tiles:
    """The launch of a kernel for heads of `widest` and that many queries a row."""
    if INTERPRETED:
        return _Tiles(16, 16, 1, 1)  # several tiles a test, in seconds
    sizes = (FLOAT if kind == torch.float32 else HALF_ON_HOPPER if hopper else HALF)[kernel]
    tiles = sizes[next(size for size in sizes if widest <= size)]
    if kernel == "forward" and queries <= 16:  # decoding
        return tiles._replace(queries=16, warps=4)
    return tiles


def is_ampere(device: torch.device) -> bool:
    """Tells whether the device is a GPU of compute capability 8.0 or later, for which the kernels are made."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8


def is_hopper(device: torch.device) -> bool:
    """Tells whether the device has matrix instructions and shared memory of compute capability 9.0 or later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


# Sizes of heads up to which a kernel's products of float32 can be three of TF32: more would not fit into registers.
TF32 = {"forward": 128, "queries": 128, "keys": 128, "diagonals": 0, "products": 64, "numbers": 64}


def precision_of(kernel: str, widest: int) -> str:
    """Precision of a kernel's float32 products for heads of `widest`, by torch's setting for its own."""
    try:
        tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    except AttributeError:  # before torch 2.9
        tf32 = torch.backends.cuda.matmul.allow_tf32
    return "tf32x3" if tf32 and widest <= TF32[kernel] else "ieee"


# ------------------------------------------------------------------------------------------- pieces of the kernels


@jit
def _program(tiles):
    """The member of its group, or the row and head, that a program works on, in 64 bits for what is reached by it; and
    the tile. The grid has one dimension: the others of a GPU end at 65,535."""
    place = tl.program_id(0)
    return (place // tiles).to(tl.int64), place % tiles


@jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    """a @ b + acc in float32."""
    if _UPCAST:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@jit
def _load(base, at, stride, end, D: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr):
    """The vectors `at` of a matrix, (n, BLOCK_D), zeros from `end` on; WHOLE: none is beyond it."""
    d = tl.arange(0, BLOCK_D)
    where = base + at.to(tl.int64)[:, None] * stride + d[None, :]
    if WHOLE and BLOCK_D == D:
        x = tl.load(where)
    elif WHOLE:
        x = tl.load(where, mask=(d < D)[None, :], other=0.0)
    elif BLOCK_D == D:
        x = tl.load(where, mask=(at < end)[:, None], other=0.0)
    else:
        x = tl.load(where, mask=(at < end)[:, None] & (d < D)[None, :], other=0.0)
    return x


@jit
def _store(base, x, at, stride, end, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    where = base + at.to(tl.int64)[:, None] * stride + d[None, :]
    tl.store(where, x.to(base.dtype.element_ty), mask=(at < end)[:, None] & (d < D)[None, :])


@jit
def _intervals(lower, upper, t, T, S):
    """The intervals of queries t, [S, -1] where empty; queries beyond the last repeat it."""
    at = tl.minimum(t, T - 1)
    lo = tl.minimum(tl.maximum(tl.load(lower + at), 0), S).to(tl.int32)
    up = tl.maximum(tl.minimum(tl.load(upper + at), S - 1), -1).to(tl.int32)
    empty = up < lo
    return tl.where(empty, S, lo), tl.where(empty, -1, up)


@jit
def _bounds(lo, up, BLOCK_N: tl.constexpr):
    """Of a tile's intervals: the columns [start, stop) that some query sees, in tiles of BLOCK_N from start on;
    within, the tiles [whole, whole_stop) that all queries see all of, an empty range if there are none."""
    start = tl.min(lo, 0) // BLOCK_N * BLOCK_N
    stop = tl.max(up, 0) + 1
    whole = (tl.max(lo, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    whole_stop = (tl.min(up, 0) + 1) // BLOCK_N * BLOCK_N
    some = whole_stop > whole
    return start, stop, tl.where(some, whole, start), tl.where(some, whole_stop, start)


@jit
def _place(n, start, whole, whole_stop, BLOCK_N: tl.constexpr):
    """The first column of the n-th tile that an interval cuts: those before the whole tiles, then those after."""
    before = (whole - start) // BLOCK_N
    return tl.where(n < before, start + n * BLOCK_N, whole_stop + (n - before) * BLOCK_N)


@jit
def _queries_along(x, KEYS_FIRST: tl.constexpr):
    """A number for each query, along the queries of a tile (BLOCK_M, BLOCK_N), or (BLOCK_N, BLOCK_M) with
    KEYS_FIRST."""
    if KEYS_FIRST:
        x = x[None, :]
    else:
        x = x[:, None]
    return x


@jit
def _keys_along(x, KEYS_FIRST: tl.constexpr):
    if KEYS_FIRST:
        x = x[:, None]
    else:
        x = x[None, :]
    return x


@jit
def _scores(
    q, k, t0, t, T, s, lo, up, term, term_t, scale2,
    TERM: tl.constexpr, CUT: tl.constexpr, KEYS_FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of a tile in base 2, -inf outside of the intervals if they cut it."""
    if KEYS_FIRST:
        x = _dot(k, tl.trans(q), None, PRECISION)
    else:
        x = _dot(q, tl.trans(k), None, PRECISION)
    column = _keys_along(s, KEYS_FIRST)
    visible = (column >= _queries_along(lo, KEYS_FIRST)) & (column <= _queries_along(up, KEYS_FIRST))
    if TERM:
        # Queries beyond the last read its entries. Within a tile 32 bits reach far enough, and take half the
        # registers.
        t = tl.minimum(t, T - 1)
        where = term + t0.to(tl.int64) * term_t + (_queries_along((t - t0) * term_t, KEYS_FIRST) + column)
        if CUT:
            x += tl.load(where, mask=visible, other=0.0).to(tl.float32)
        else:
            x += tl.load(where).to(tl.float32)
    x *= scale2
    if CUT:
        x = tl.where(visible, x, float("-inf"))
    return x


@jit
def _kept(seed, pair, t, s, T, S, dropout, KEYS_FIRST: tl.constexpr):
    """Probabilities that dropout keeps: a counter for each (b, h, t, s), so all kernels draw alike."""
    counter = (pair.to(tl.int64) * T + _queries_along(t, KEYS_FIRST)) * S + _keys_along(s, KEYS_FIRST)
    return tl.rand(seed, counter) >= dropout


@jit
def _score_gradient(
    x, g, v, lse2, offset, pair, t, s, T, S, seed, dropout,
    DROPOUT: tl.constexpr, KEYS_FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From scores x in base 2: the probabilities as dropout left them, and the gradient of the scores."""
    probabilities = tl.exp2(x - _queries_along(lse2, KEYS_FIRST))
    if KEYS_FIRST:
        grad = _dot(v, tl.trans(g), None, PRECISION)
    else:
        grad = _dot(g, tl.trans(v), None, PRECISION)
    kept = probabilities
    if DROPOUT:
        mask = _kept(seed, pair, t, s, T, S, dropout, KEYS_FIRST)
        rise = 1.0 / (1.0 - dropout)
        kept = tl.where(mask, probabilities * rise, 0.0)
        grad = tl.where(mask, grad * rise, 0.0)
    return kept, probabilities * (grad - _queries_along(offset, KEYS_FIRST))


# ------------------------------------------------------------------------------------------------------ the kernels
# Strides end in the dimension that they step over. Outputs lie (B, T, H, D), as a model's projections, so a head's
# stride is D. A launch is for a group: rows from first_row on, and GROUP heads from first_head on; only `term` is the
# group's own.


@jit
def _forward(
    q_ptr, k_ptr, v_ptr, lower, upper, term, out_ptr, lse_ptr, seed_ptr,
    q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, spans_b, term_b, term_h, term_t, term_base,
    first_row, first_head, GROUP, H, T, S, scale2, dropout,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TERM: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of queries: the online softmax over its keys."""
    member, tile = _program(tl.cdiv(T, BLOCK_M))
    b, h = first_row + member // GROUP, first_head + member % GROUP
    pair = b * H + h
    t0 = tile * BLOCK_M
    t = t0 + tl.arange(0, BLOCK_M)
    lo, up = _intervals(lower + b * spans_b, upper + b * spans_b, t, T, S)
    q = _load(q_ptr + b * q_b + h * q_h, t, q_t, T, D, BLOCK_D, False)
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    term += member // GROUP * term_b + member % GROUP * term_h + term_base
    seed = tl.load(seed_ptr) if DROPOUT else 0
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    start, stop, whole, whole_stop = _bounds(lo, up, BLOCK_N)
    cuts = (whole - start) // BLOCK_N + tl.cdiv(tl.maximum(stop - whole_stop, 0), BLOCK_N)
    for n in range(0, cuts):
        s = tl.multiple_of(_place(n, start, whole, whole_stop, BLOCK_N), BLOCK_N) + tl.arange(0, BLOCK_N)
        k = _load(k_ptr, s, k_s, S, D, BLOCK_D, False)
        v = _load(v_ptr, s, v_s, S, DV, BLOCK_DV, False)
        x = _scores(q, k, t0, t, T, s, lo, up, term, term_t, scale2, TERM, True, False, PRECISION)
        new_top = tl.maximum(top, tl.max(x, 1))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)  # no key seen yet
        probabilities = tl.exp2(x - safe[:, None])
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(probabilities, 1)
        if DROPOUT:
            mask = _kept(seed, pair, t, s, T, S, dropout, False)
            probabilities = tl.where(mask, probabilities * (1.0 / (1.0 - dropout)), 0.0)
        acc = _dot(probabilities.to(v.dtype), v, acc * shrink[:, None], PRECISION)
        top = new_top
    for s0 in range(whole, whole_stop, BLOCK_N):
        s = tl.multiple_of(s0, BLOCK_N) + tl.arange(0, BLOCK_N)
        k = _load(k_ptr, s, k_s, S, D, BLOCK_D, True)
        v = _load(v_ptr, s, v_s, S, DV, BLOCK_DV, True)
        x = _scores(q, k, t0, t, T, s, lo, up, term, term_t, scale2, TERM, False, False, PRECISION)
        new_top = tl.maximum(top, tl.max(x, 1))
        probabilities = tl.exp2(x - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(probabilities, 1)
        if DROPOUT:
            mask = _kept(seed, pair, t, s, T, S, dropout, False)
            probabilities = tl.where(mask, probabilities * (1.0 / (1.0 - dropout)), 0.0)
        acc = _dot(probabilities.to(v.dtype), v, acc * shrink[:, None], PRECISION)
        top = new_top
    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    _store(out_ptr + b * T * H * DV + h * DV, acc / total[:, None], t, H * DV, T, DV, BLOCK_DV)
    lse = tl.where(nothing, float("-inf"), (top + tl.log2(total)) / _LOG2_E)
    tl.store(lse_ptr + pair * T + t, lse, mask=t < T)


@jit
def _offsets(
    out_ptr, g_ptr, lse_ptr, grad_lse_ptr, lse2_ptr, offset_ptr, H, T,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Terms subtracted in the backward: from scores lse in base 2, +inf for an empty interval whose probabilities are
    so 0; from the probabilities' gradients offset = grad_out . out - grad_lse."""
    pair, tile = _program(tl.cdiv(T, BLOCK_M))
    b, h = pair // H, pair % H
    t = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    base = b * T * H * DV + h * DV
    out = _load(out_ptr + base, t, H * DV, T, DV, BLOCK_DV, False).to(tl.float32)
    g = _load(g_ptr + base, t, H * DV, T, DV, BLOCK_DV, False).to(tl.float32)
    lse = tl.load(lse_ptr + pair * T + t, mask=t < T, other=0.0)
    nothing = lse == float("-inf")
    offset = tl.sum(out * g, 1)
    if HAS_LSE:
        offset -= tl.load(grad_lse_ptr + pair * T + t, mask=t < T, other=0.0)
    tl.store(offset_ptr + pair * T + t, tl.where(nothing, 0.0, offset), mask=t < T)
    tl.store(lse2_ptr + pair * T + t, tl.where(nothing, float("inf"), lse * _LOG2_E), mask=t < T)


@jit
def _backward_queries(
    q_ptr, k_ptr, v_ptr, lower, upper, term, g_ptr, lse2_ptr, offset_ptr, seed_ptr, dq_ptr, dterm_ptr,
    q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, spans_b, term_b, term_h, term_t, term_base,
    dterm_b, dterm_h, dterm_t, dterm_base, first_row, first_head, GROUP, H, T, S, scale, scale2, dropout,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TERM: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    PUT_TERM: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of queries; with PUT_TERM also that of the term, written where dterm has (t, s)."""
    member, tile = _program(tl.cdiv(T, BLOCK_M))
    b, h = first_row + member // GROUP, first_head + member % GROUP
    pair = b * H + h
    t0 = tile * BLOCK_M
    t = t0 + tl.arange(0, BLOCK_M)
    lo, up = _intervals(lower + b * spans_b, upper + b * spans_b, t, T, S)
    q = _load(q_ptr + b * q_b + h * q_h, t, q_t, T, D, BLOCK_D, False)
    g = _load(g_ptr + b * T * H * DV + h * DV, t, H * DV, T, DV, BLOCK_DV, False)
    lse2 = tl.load(lse2_ptr + pair * T + t, mask=t < T, other=float("inf"))
    offset = tl.load(offset_ptr + pair * T + t, mask=t < T, other=0.0)
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    term += member // GROUP * term_b + member % GROUP * term_h + term_base
    dterm_ptr += member // GROUP * dterm_b + member % GROUP * dterm_h + dterm_base
    seed = tl.load(seed_ptr) if DROPOUT else 0
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    start, stop, whole, whole_stop = _bounds(lo, up, BLOCK_N)
    cuts = (whole - start) // BLOCK_N + tl.cdiv(tl.maximum(stop - whole_stop, 0), BLOCK_N)
    for n in range(0, cuts):
        s = tl.multiple_of(_place(n, start, whole, whole_stop, BLOCK_N), BLOCK_N) + tl.arange(0, BLOCK_N)
        k = _load(k_ptr, s, k_s, S, D, BLOCK_D, False)
        v = _load(v_ptr, s, v_s, S, DV, BLOCK_DV, False)
        x = _scores(q, k, t0, t, T, s, lo, up, term, term_t, scale2, TERM, True, False, PRECISION)
        kept, grad = _score_gradient(x, g, v, lse2, offset, pair, t, s, T, S, seed, dropout, DROPOUT, False, PRECISION)
        dq = _dot(grad.to(k.dtype), k, dq, PRECISION)
        if PUT_TERM:
            visible = (s[None, :] >= lo[:, None]) & (s[None, :] <= up[:, None]) & (t < T)[:, None]
            where = dterm_ptr + t0.to(tl.int64) * dterm_t + ((t - t0)[:, None] * dterm_t + s[None, :])
            tl.store(where, (grad * scale).to(dterm_ptr.dtype.element_ty), mask=visible)
    for s0 in range(whole, whole_stop, BLOCK_N):
        s = tl.multiple_of(s0, BLOCK_N) + tl.arange(0, BLOCK_N)
        k = _load(k_ptr, s, k_s, S, D, BLOCK_D, True)
        v = _load(v_ptr, s, v_s, S, DV, BLOCK_DV, True)
        x = _scores(q, k, t0, t, T, s, lo, up, term, term_t, scale2, TERM, False, False, PRECISION)
        kept, grad = _score_gradient(x, g, v, lse2, offset, pair, t, s, T, S, seed, dropout, DROPOUT, False, PRECISION)
        dq = _dot(grad.to(k.dtype), k, dq, PRECISION)
        if PUT_TERM:
            where = dterm_ptr + t0.to(tl.int64) * dterm_t + ((t - t0)[:, None] * dterm_t + s[None, :])
            tl.store(where, (grad * scale).to(dterm_ptr.dtype.element_ty), mask=(t < T)[:, None])
    _store(dq_ptr + b * T * H * D + h * D, dq * scale, t, H * D, T, D, BLOCK_D)


@jit
def _backward_keys(
    q_ptr, k_ptr, v_ptr, lower, upper, term, g_ptr, lse2_ptr, offset_ptr, seed_ptr, plan, dk_ptr, dv_ptr,
    q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, spans_b, term_b, term_h, term_t, term_base, plan_b,
    first_row, first_head, GROUP, H, T, S, scale, scale2, dropout,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TERM: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of keys and of their values; scores are (BLOCK_N, BLOCK_M) here. plan: see key_plan."""
    member, tile = _program(tl.cdiv(S, BLOCK_N))
    b, h = first_row + member // GROUP, first_head + member % GROUP
    pair = b * H + h
    s = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = _load(k_ptr + b * k_b + h * k_h, s, k_s, S, D, BLOCK_D, False)
    v = _load(v_ptr + b * v_b + h * v_h, s, v_s, S, DV, BLOCK_DV, False)
    q_ptr += b * q_b + h * q_h
    g_ptr += b * T * H * DV + h * DV
    lse2_ptr += pair * T
    offset_ptr += pair * T
    lower += b * spans_b
    upper += b * spans_b
    term += member // GROUP * term_b + member % GROUP * term_h + term_base
    plan += b * plan_b + tile * 4
    first, end, whole, whole_end = tl.load(plan), tl.load(plan + 1), tl.load(plan + 2), tl.load(plan + 3)
    some = whole_end > whole
    whole = tl.where(some, whole, first)
    whole_end = tl.where(some, whole_end, first)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    for n in range(0, (whole - first) + (end - whole_end)):
        t0 = tl.multiple_of(_place(n, first, whole, whole_end, 1) * BLOCK_M, BLOCK_M)
        t = t0 + tl.arange(0, BLOCK_M)
        lo, up = _intervals(lower, upper, t, T, S)
        q = _load(q_ptr, t, q_t, T, D, BLOCK_D, False)
        g = _load(g_ptr, t, H * DV, T, DV, BLOCK_DV, False)
        lse2 = tl.load(lse2_ptr + t, mask=t < T, other=float("inf"))
        offset = tl.load(offset_ptr + t, mask=t < T, other=0.0)
        x = _scores(q, k, t0, t, T, s, lo, up, term, term_t, scale2, TERM, True, True, PRECISION)
        kept, grad = _score_gradient(x, g, v, lse2, offset, pair, t, s, T, S, seed, dropout, DROPOUT, True, PRECISION)
        dv = _dot(kept.to(g.dtype), g, dv, PRECISION)
        dk = _dot(grad.to(q.dtype), q, dk, PRECISION)
    for n in range(whole, whole_end):
        t0 = tl.multiple_of(n * BLOCK_M, BLOCK_M)
        t = t0 + tl.arange(0, BLOCK_M)
        q = _load(q_ptr, t, q_t, T, D, BLOCK_D, False)
        g = _load(g_ptr, t, H * DV, T, DV, BLOCK_DV, False)
        lse2 = tl.load(lse2_ptr + t, mask=t < T, other=float("inf"))
        offset = tl.load(offset_ptr + t, mask=t < T, other=0.0)
        x = _scores(
            q, k, t0, t, T, s, t, t, term, term_t, scale2, TERM, False, True, PRECISION
        )  # fmt: skip
        kept, grad = _score_gradient(x, g, v, lse2, offset, pair, t, s, T, S, seed, dropout, DROPOUT, True, PRECISION)
        dv = _dot(kept.to(g.dtype), g, dv, PRECISION)
        dk = _dot(grad.to(q.dtype), q, dk, PRECISION)
    _store(dk_ptr + b * S * H * D + h * D, dk * scale, s, H * D, S, D, BLOCK_D)
    _store(dv_ptr + b * S * H * DV + h * DV, dv, s, H * DV, S, DV, BLOCK_DV)


@jit
def _backward_diagonals(
    q_ptr, k_ptr, v_ptr, lower, upper, term, g_ptr, lse2_ptr, offset_ptr, seed_ptr, sums_ptr,
    q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, spans_b, term_b, term_h, term_t, term_base,
    first_shift, splits, B, H, T, S, scale2, dropout,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TERM: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds up the score gradients of square tiles whose key tile is `shift` tiles after their query tile.

    All of them have the same distances, so a bias's gradient is the sum along the diagonals of what comes out,
    (H, shifts, splits, BLOCK_M, BLOCK_M)."""
    shift = first_shift + tl.program_id(0)
    part = tl.program_id(1)
    h = tl.program_id(2).to(tl.int64)
    tiles = tl.cdiv(T, BLOCK_M)
    term += h * term_h + term_base
    seed = tl.load(seed_ptr) if DROPOUT else 0
    acc = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    for n in range(part, B * tiles, splits):
        b = (n // tiles).to(tl.int64)
        pair = b * H + h
        t0 = n % tiles * BLOCK_M
        s0 = t0 + shift * BLOCK_M
        t = t0 + tl.arange(0, BLOCK_M)
        s = s0 + tl.arange(0, BLOCK_M)
        lo, up = _intervals(lower + b * spans_b, upper + b * spans_b, t, T, S)
        if (tl.min(lo, 0) < s0 + BLOCK_M) & (tl.max(up, 0) >= s0):
            q = _load(q_ptr + b * q_b + h * q_h, t, q_t, T, D, BLOCK_D, False)
            g = _load(g_ptr + b * T * H * DV + h * DV, t, H * DV, T, DV, BLOCK_DV, False)
            k = _load(k_ptr + b * k_b + h * k_h, s, k_s, S, D, BLOCK_D, False)
            v = _load(v_ptr + b * v_b + h * v_h, s, v_s, S, DV, BLOCK_DV, False)
            lse2 = tl.load(lse2_ptr + pair * T + t, mask=t < T, other=float("inf"))
            offset = tl.load(offset_ptr + pair * T + t, mask=t < T, other=0.0)
            x = _scores(q, k, t0, t, T, s, lo, up, term, term_t, scale2, TERM, True, False, PRECISION)
            kept, grad = _score_gradient(
                x, g, v, lse2, offset, pair, t, s, T, S, seed, dropout, DROPOUT, False, PRECISION
            )
            acc += grad
    i = tl.arange(0, BLOCK_M)
    place = (h * tl.num_programs(0) + tl.program_id(0)) * splits + part
    tl.store(sums_ptr + place * BLOCK_M * BLOCK_M + i[:, None] * BLOCK_M + i[None, :], acc)


@jit
def _products(
    p_ptr, table, term, p_b, p_h, p_t, table_h, term_b, term_h, term_step, first_row, first_head, GROUP, T, R,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """term[t, r] = p_t . table_r for a tile; queries lie term_step apart."""
    across = tl.cdiv(R, BLOCK_N)
    member, tile = _program(tl.cdiv(T, BLOCK_M) * across)
    b, h = first_row + member // GROUP, first_head + member % GROUP
    t = tile // across * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tile % across * BLOCK_N + tl.arange(0, BLOCK_N)
    p = _load(p_ptr + b * p_b + h * p_h, t, p_t, T, D, BLOCK_D, False)
    entries = _load(table + h * table_h, r, D, R, D, BLOCK_D, False)
    x = _dot(p, tl.trans(entries), None, PRECISION)
    term += member // GROUP * term_b + member % GROUP * term_h
    where = term + t.to(tl.int64)[:, None] * term_step + r[None, :]
    tl.store(where, x.to(term.dtype.element_ty), mask=(t < T)[:, None] & (r < R)[None, :])


# ----------------------------------------------------------------------------------------------- from torch to kernels


class _Arguments(NamedTuple):
    """The tensors of a call, in the order of the operators."""

    query: torch.Tensor  # (B, H, T, D)
    key: torch.Tensor  # (B, H, S, D)
    value: torch.Tensor  # (B, H, S, Dv)
    asked: torch.Tensor | None  # (B, H, T, D)
    table: torch.Tensor | None  # (H, R[, D])
    lower: torch.Tensor  # (B or 1, T)
    upper: torch.Tensor
    plan: torch.Tensor | None
    seed: torch.Tensor | None  # (1,)
    farthest: int
    scale: float
    dropout: float


class _Term(NamedTuple):
    """A score term of a group, as a matrix over (t, s) for each of its rows and heads."""

    matrix: torch.Tensor
    strides: dict[str, int]  # term_b, term_h, term_t and term_base, the address of (0, 0)


class _Group(NamedTuple):
    """Rows and heads that one launch serves."""

    rows: range
    heads: range

    @property
    def numbers(self) -> dict[str, int]:
        return dict(first_row=self.rows.start, first_head=self.heads.start, GROUP=len(self.heads))

    def __len__(self) -> int:
        return len(self.rows) * len(self.heads)


class _Call:
    """Arguments shared by all launches of one call."""

    def __init__(self, arguments: _Arguments):
        # Elements of a head lie side by side in every tensor that a kernel reads.
        self.x = x = arguments._replace(
            **{
                name: y if y is None or y.stride(-1) == 1 else y.contiguous()
                for name, y in arguments._asdict().items()
                if name in ("query", "key", "value", "asked")
            }
        )
        self.b, self.h, self.t, self.d = x.query.shape
        self.s, self.dv = x.key.shape[2], x.value.shape[3]
        self.offset = self.s - self.t  # the column at which query 0 stands
        self.r = 0 if x.table is None else x.table.shape[1]
        self.shapes = dict(
            D=self.d, DV=self.dv, BLOCK_D=_block(self.d), BLOCK_DV=_block(self.dv), TERM=x.table is not None,
            DROPOUT=x.dropout > 0.0,
        )  # fmt: skip
        self.tensors = dict(
            q_ptr=x.query, k_ptr=x.key, v_ptr=x.value, lower=x.lower, upper=x.upper,
            seed_ptr=x.lower if x.seed is None else x.seed,
        )  # fmt: skip
        names = ("q_b", "q_h", "q_t", "k_b", "k_h", "k_s", "v_b", "v_h", "v_s")
        strides = (*x.query.stride()[:3], *x.key.stride()[:3], *x.value.stride()[:3])
        self.numbers = dict(zip(names, strides, strict=True)) | dict(
            spans_b=x.lower.stride(0) if x.lower.shape[0] > 1 else 0,
            H=self.h, T=self.t, S=self.s, scale2=x.scale * math.log2(math.e), dropout=x.dropout,
        )  # fmt: skip

    def launch(self, kernel: str, shapes: dict | None = None) -> dict:
        """BLOCK_M, BLOCK_N, PRECISION and options of a kernel, and the given shapes, by default all."""
        query, widest = self.x.query, max(self.d, self.dv)
        tiles = tiles_of(kernel, query.dtype, widest, self.t, is_hopper(query.device))
        options = dict(PRECISION=precision_of(kernel, widest), num_warps=tiles.warps, num_stages=tiles.stages)
        return (self.shapes if shapes is None else shapes) | dict(BLOCK_M=tiles.queries, BLOCK_N=tiles.keys) | options

    def groups(self) -> Iterator[_Group]:
        """Rows and heads whose products with a table of distances are held at a time; all, where there are none."""
        rows, heads = self.b, self.h
        if self.x.asked is not None:
            members = max(1, SCRATCH_BYTES // (self.t * self.r * self.x.query.element_size()))
            heads = min(self.h, members)
            rows = min(self.b, max(1, members // self.h))
        for row in range(0, self.b, rows):
            for head in range(0, self.h, heads):
                yield _Group(range(row, min(row + rows, self.b)), range(head, min(head + heads, self.h)))

    def term(self, group: _Group) -> _Term:
        """The score term of the group's rows and heads."""
        table, asked = self.x.table, self.x.asked
        if table is None:
            return _Term(self.x.query, dict(term_b=0, term_h=0, term_t=0, term_base=0))
        start = self.x.farthest - self.offset  # the table's entry for (0, 0)
        if asked is None:
            table = table.contiguous()
            return _Term(table, dict(term_b=0, term_h=self.r, term_t=-1, term_base=start))
        # (t, s) lies at base + t width + s, so entry r of the table at base - start + t (width + 1) + r.
        width = _ceil(max(self.r - 1, 1), 16)
        base = _ceil(start, 16)
        size = _ceil(self.t * (width + 1) + 16, 16)
        term = asked.new_empty(len(group.rows), len(group.heads), size)
        strides = dict(term_b=len(group.heads) * size, term_h=size)
        table = table.contiguous()
        shapes = {name: self.shapes[name] for name in ("D", "BLOCK_D")}
        launch = self.launch("products", shapes)
        tiles = triton.cdiv(self.r, launch["BLOCK_N"]) * triton.cdiv(self.t, launch["BLOCK_M"])
        _products[(tiles * len(group),)](
            p_ptr=asked, table=table, term=term[:, :, base - start :], p_b=asked.stride(0), p_h=asked.stride(1),
            p_t=asked.stride(2), table_h=table.stride(0), **strides, term_step=width + 1, **group.numbers, T=self.t,
            R=self.r, **launch,
        )  # fmt: skip
        return _Term(term, strides | dict(term_t=width, term_base=base))

    def out(self, like: torch.Tensor, width: int) -> torch.Tensor:
        """An empty (B, H, n, width), laid out (B, n, H, width)."""
        b, h, n, _ = like.shape
        return torch.empty(b, n, h, width, dtype=like.dtype, device=like.device).transpose(1, 2)


def _block(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _ceil(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _run_forward(arguments: _Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    call = _Call(arguments)
    out = call.out(call.x.query, call.dv)
    lse = torch.empty(call.b, call.h, call.t, dtype=torch.float32, device=out.device)
    launch = call.launch("forward")
    if not out.numel():
        return out, lse
    for group in call.groups():
        term = call.term(group)
        _forward[(triton.cdiv(call.t, launch["BLOCK_M"]) * len(group),)](
            **call.tensors, term=term.matrix, out_ptr=out, lse_ptr=lse, **call.numbers, **term.strides,
            **group.numbers, **launch,
        )  # fmt: skip
    return out, lse


def _run_backward(
    arguments: _Arguments,
    results: tuple[torch.Tensor, torch.Tensor],
    grads: tuple[torch.Tensor, torch.Tensor | None],
    wants: list[bool],
) -> list[torch.Tensor]:
    """Gradients of query, key, value, asked and table, an empty tensor for each that is not wanted."""
    if not results[0].numel():
        leaves = zip(arguments[:5], wants, strict=True)
        return [torch.zeros_like(y) if y is not None and wanted else results[0].new_empty(0) for y, wanted in leaves]
    call = _Call(arguments)
    x, (out, lse), (grad_out, grad_lse) = call.x, results, grads
    nothing = out.new_empty(0)  # never among the results: no two of an operator may be one tensor
    grad_out = grad_out.to(out.dtype).transpose(1, 2).contiguous()  # (B, T, H, Dv)
    lse2, offset = torch.empty_like(lse), torch.empty_like(lse)
    _offsets[(triton.cdiv(call.t, 32) * call.b * call.h,)](
        out, grad_out, lse, lse if grad_lse is None else grad_lse.contiguous(), lse2, offset, call.h, call.t,
        DV=call.dv, BLOCK_DV=call.shapes["BLOCK_DV"], BLOCK_M=32, HAS_LSE=grad_lse is not None,
    )  # fmt: skip
    tensors = call.tensors | dict(g_ptr=grad_out, lse2_ptr=lse2, offset_ptr=offset)
    want_query, want_key, want_value, want_asked, want_table = wants
    put_term = x.asked is not None and (want_asked or want_table)
    dq = call.out(x.query, call.d) if want_query or put_term else nothing
    dk, dv = (call.out(y, y.shape[3]) if want_key or want_value else nothing for y in (x.key, x.value))
    grad_asked = torch.empty(x.asked.shape, dtype=out.dtype, device=out.device) if put_term else nothing
    grad_table = torch.zeros(x.table.shape, dtype=torch.float32, device=out.device) if want_table else nothing
    for group in call.groups():
        term = call.term(group)
        common = tensors | dict(term=term.matrix) | call.numbers | term.strides | group.numbers | dict(scale=x.scale)
        if want_query or put_term:
            dterm, steps = _term_gradient(call, group) if put_term else (nothing, (0, 0, 0, 0))
            strides = dict(zip(("dterm_b", "dterm_h", "dterm_t", "dterm_base"), steps, strict=True))
            launch = call.launch("queries")
            _backward_queries[(triton.cdiv(call.t, launch["BLOCK_M"]) * len(group),)](
                **common, dq_ptr=dq, dterm_ptr=dterm, **strides, PUT_TERM=put_term, **launch
            )
            if put_term:
                _add_term_gradient(call, group, dterm, grad_asked, grad_table)
        if want_key or want_value:
            launch = call.launch("keys")
            _backward_keys[(triton.cdiv(call.s, launch["BLOCK_N"]) * len(group),)](
                **common, plan=x.plan, plan_b=x.plan.stride(0) if x.plan.shape[0] > 1 else 0, dk_ptr=dk, dv_ptr=dv,
                **launch,
            )  # fmt: skip
        if x.asked is None and want_table:
            grad_table = _bias_gradient(call, tensors, term)
    found = (dq, dk, dv, grad_asked, grad_table if x.table is None else grad_table.to(x.table.dtype))
    return [y if wanted else out.new_empty(0) for y, wanted in zip(found, wants, strict=True)]


def _term_gradient(call: _Call, group: _Group) -> tuple[torch.Tensor, tuple[int, int, int, int]]:
    """Zeros (GROUP, rows, T, R) for the gradient of the products, R rounded up, and strides that find (b, h, t, s)."""
    width = _ceil(call.r, 8)
    rows, heads = len(group.rows), len(group.heads)
    dterm = torch.zeros(heads, rows, call.t, width, dtype=call.x.query.dtype, device=call.x.query.device)
    return dterm, (call.t * width, rows * call.t * width, width - 1, call.x.farthest - call.offset)


def _add_term_gradient(call: _Call, group: _Group, dterm: torch.Tensor, grad_asked: torch.Tensor, grad_table):
    """The products' gradient (GROUP, rows, T, R) brought to their factors: two matrix products of torch."""
    assert call.x.asked is not None and call.x.table is not None  # else there are no products
    rows, heads = (slice(x.start, x.stop) for x in group)
    dterm = dterm.flatten(1, 2)[..., : call.r]  # (GROUP, rows T, R)
    asked = call.x.asked[rows, heads].transpose(0, 1).reshape(len(group.heads), -1, call.d)
    found = torch.bmm(dterm, call.x.table[heads])  # (GROUP, rows T, D)
    grad_asked[rows, heads] = found.unflatten(1, (len(group.rows), call.t)).transpose(0, 1)
    if grad_table.numel():
        grad_table[heads] += torch.bmm(dterm.mT, asked)


def _bias_gradient(call: _Call, tensors: dict, term: _Term) -> torch.Tensor:
    """The gradient (H, R) of a bias: score gradients summed along the diagonals."""
    launch = call.launch("diagonals")
    m = launch["BLOCK_M"]
    start = call.x.farthest - call.offset  # the table's entry of key 0 for query 0; of (t, s) it is start - t + s
    query_tiles, key_tiles = triton.cdiv(call.t, m), triton.cdiv(call.s, m)
    first = max(-(query_tiles - 1), -((start + m - 1) // m))
    last = min(key_tiles - 1, (call.r - 1 - start + m - 1) // m)
    shifts = last - first + 1
    if shifts <= 0:
        return torch.zeros(call.h, call.r, device=term.matrix.device)
    splits = min(call.b * query_tiles, max(1, 1024 // (shifts * call.h)))
    sums = torch.empty(call.h, shifts, splits, m, m, device=term.matrix.device)
    _backward_diagonals[shifts, splits, call.h](
        **tensors, term=term.matrix, sums_ptr=sums, **call.numbers, **term.strides, first_shift=first, splits=splits,
        B=call.b, **launch,
    )  # fmt: skip
    sums = sums.sum(2).flip(-2)  # (H, shifts, m, m): (i, c) is at distance c + i of its tile's 2 m - 1
    skew = F.pad(sums, (0, m)).flatten(-2)[..., :-m].unflatten(-1, (m, 2 * m - 1)).sum(-2)  # (H, shifts, 2 m - 1)
    low, high = F.pad(skew, (0, 1)).unflatten(-1, (2, m)).unbind(-2)  # (H, shifts, m): tiles share their halves
    found = F.pad(low.flatten(1), (0, m)) + F.pad(high.flatten(1), (m, 0))  # (H, (shifts + 1) m)
    begin = start + first * m - (m - 1)  # the table's entry that found[0] is
    return F.pad(found, (begin, call.r - begin - found.shape[1])) * call.x.scale  # negative pads cut


# ------------------------------------------------------------------------------------------------------- the operators


def _forward_kernels(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    asked: torch.Tensor | None,
    table: torch.Tensor | None,
    lower: torch.Tensor,
    upper: torch.Tensor,
    plan: torch.Tensor | None,
    seed: torch.Tensor | None,
    farthest: int,
    scale: float,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    arguments = _Arguments(query, key, value, asked, table, lower, upper, plan, seed, farthest, scale, dropout)
    with torch.autocast(query.device.type, enabled=False), torch.cuda.device_of(query):
        return _run_forward(arguments)


def _forward_shapes(query, key, value, *rest):
    b, h, t, _ = query.shape
    out = query.new_empty(b, t, h, value.shape[-1]).transpose(1, 2)
    return out, query.new_empty(b, h, t, dtype=torch.float32)


def _backward_kernels(
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
    plan: torch.Tensor | None,
    seed: torch.Tensor | None,
    farthest: int,
    scale: float,
    dropout: float,
) -> list[torch.Tensor]:
    arguments = _Arguments(query, key, value, asked, table, lower, upper, plan, seed, farthest, scale, dropout)
    with torch.autocast(query.device.type, enabled=False), torch.cuda.device_of(query):
        return _run_backward(arguments, (out, lse), (grad_out, grad_lse), wants)


def _backward_shapes(grad_out, grad_lse, out, lse, wants, query, key, value, asked, table, *rest):
    def like(x):
        return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)

    made = (like(query), like(key), like(value), asked, table)
    return [
        out.new_empty(0) if not wanted else y if i < 3 else torch.empty_like(y, memory_format=torch.contiguous_format)
        for i, (y, wanted) in enumerate(zip(made, wants, strict=True))
    ]


if triton is not None:
    _backward_operator = operator(__file__, "interval_attention_backward", _backward_kernels, _backward_shapes)
    _forward_operator = operator(
        __file__, "interval_attention", _forward_kernels, _forward_shapes, attention_gradient(_backward_operator)
    )
