"""The products of an exact search, as kernels for GPUs in Triton: between them stands torch's topk. And the attention
over what was found, where nobody wants its gradient.

    number(t, s) = [score(t, s), turn(t, s)]     score = q_t . k_s, in float32; -inf outside of the ring interval
    turn         = (s - upper_t) mod N           how recent a pair is: N - 1 at the newest that the query may find

Two words of one whole number, the score's in front, so that no two pairs of a query are equal: the largest numbers are
the result, whatever they hold, and nobody has to ask. NaN is larger than all scores, as torch's topk has it.

Letters: see memory.py and attention_triton.py.
"""

from __future__ import annotations

import torch

from .attention_triton import (
    INTERPRETED,
    KINDS,
    LARGEST_HEAD,
    _block,
    _dot,
    _load,
    _program,
    _Tiles,
    is_ampere,
    jit,
    precision_of,
)
from .operators import operator

try:
    import triton
    import triton.language as tl
except ImportError:  # machines without a GPU, where torch's own operations serve
    triton = tl = None

# Settings of the launch for heads up to a size, for half types and float32: see eval/compiled.py.
HALF = {64: _Tiles(64, 64, 4, 1), 128: _Tiles(64, 64, 4, 1), 256: _Tiles(32, 64, 4, 1)}
FLOAT = {64: _Tiles(32, 32, 4, 1), 128: _Tiles(32, 32, 8, 1), 256: _Tiles(16, 32, 8, 1)}
FOUND = _Tiles(256, 1, 4, 1)
PICKED = _Tiles(1, 16, 4, 1)  # values that a program reads at a time
MOST_FOUND = 1024  # whose weights a program holds at once


def serves(query: torch.Tensor) -> bool:
    """Tells whether the kernels serve a query; reads no tensor."""
    if triton is None or query.dtype not in KINDS:
        return False
    if query.shape[-1] > LARGEST_HEAD:
        return False
    return INTERPRETED or is_ampere(query.device)


def attends(query: torch.Tensor, values: torch.Tensor, topk: int) -> bool:
    """Tells whether `attend_found` serves what such a query has found; reads no tensor."""
    head = values.shape[-1]
    return serves(query) and values.dtype in KINDS and head <= LARGEST_HEAD and topk <= MOST_FOUND


def tiles_for(kind: torch.dtype, head: int) -> _Tiles:
    """The launch of `_numbers` for a type and a size of heads."""
    if INTERPRETED:
        return _Tiles(16, 16, 1, 1)
    sizes = FLOAT if kind == torch.float32 else HALF
    return sizes[next(size for size in sizes if head <= size)]


@jit
def _numbers(
    q_ptr, k_ptr, lower, upper, out_ptr, q_b, q_h, q_t, k_b, k_h, k_s, ends_b, start, H, T, S, N,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The numbers (B, H, T, S) of a tile of queries and one of keys, the columns [start, start + S) of N."""
    across = tl.cdiv(S, BLOCK_N)
    pair, tile = _program(tl.cdiv(T, BLOCK_M) * across)
    b, h = pair // H, pair % H
    t = tile // across * BLOCK_M + tl.arange(0, BLOCK_M)
    s = tile % across * BLOCK_N + tl.arange(0, BLOCK_N)
    q = _load(q_ptr + b * q_b + h * q_h, t, q_t, T, D, BLOCK_D, False)
    k = _load(k_ptr + b * k_b + h * k_h, s, k_s, S, D, BLOCK_D, False)
    at = b * ends_b + tl.minimum(t, T - 1)
    first, end = tl.load(lower + at), tl.load(upper + at)
    some = first < end  # an interval of nothing lies anywhere
    first, end = tl.where(some, first, 0).to(tl.int32), tl.where(some, end, 0).to(tl.int32)
    score = _dot(q, tl.trans(k), None, PRECISION)
    turn = (start + s)[None, :] - end[:, None]  # end is below 2 N
    turn += tl.where(turn < 0, N, 0)
    turn += tl.where(turn < 0, N, 0)
    score = tl.where(turn < (N - (end - first))[:, None], float("-inf"), score)
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # -0.0 + 0.0 is 0.0
    bits = tl.where(score != score, 0x7FC00000, bits)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # in the order of the scores
    number = (bits.to(tl.int64) << 32) + turn.to(tl.int64)
    where = out_ptr + pair * T * S + t.to(tl.int64)[:, None] * S + s[None, :]
    tl.store(where, number, mask=(t < T)[:, None] & (s < S)[None, :])


@jit
def _found(best_ptr, upper, scores_ptr, columns_ptr, ends_b, H, T, N, K, TOPK, BLOCK_M: tl.constexpr):
    """Scores and columns (B, H, T, TOPK) of the numbers found, -inf and 0 behind them."""
    pair, tile = _program(tl.cdiv(T * TOPK, BLOCK_M))
    place = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    t, i = place // TOPK, place % TOPK
    some = (t < T) & (i < K)
    number = tl.load(best_ptr + (pair * T + t) * K + i, mask=some, other=0)
    end = tl.maximum(tl.load(upper + pair // H * ends_b + tl.minimum(t, T - 1)).to(tl.int64), 0)
    bits = (number >> 32).to(tl.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    score = tl.where(some, bits.to(tl.float32, bitcast=True), float("-inf"))
    column = tl.where(some, (end + (number & 0x7FFFFFFF)) % N, 0)
    tl.store(scores_ptr + pair * T * TOPK + place, score, mask=t < T)
    tl.store(columns_ptr + pair * T * TOPK + place, column, mask=t < T)


@jit
def _attend(
    scores_ptr, columns_ptr, v_ptr, out_ptr, weights_ptr, v_b, v_h, v_s, H, T, K,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Weights (B, H, T, k) of the pairs that a query has found, zeros where there are none, and their sum of values
    (B, H, T, DV)."""
    place = tl.program_id(0).to(tl.int64)
    pair = place // T
    i, dv = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_DV)
    scores_ptr += place * K
    columns_ptr += place * K
    v_ptr += pair // H * v_b + pair % H * v_h
    scores = tl.load(scores_ptr + i, mask=i < K, other=float("-inf"))
    scores = tl.where(scores > float("-inf"), scores, float("-inf"))  # NaN is as if it were not found
    top = tl.max(scores, 0)
    top = tl.where(top == float("-inf"), 0.0, top)  # nothing was found
    weights = tl.exp(scores - top)
    total = tl.sum(weights, 0)
    total = tl.where(total == 0.0, 1.0, total)
    tl.store(weights_ptr + place * K + i, weights / total, mask=i < K)
    acc = tl.zeros((BLOCK_DV,), tl.float32)
    for k0 in range(0, K, BLOCK_N):
        k = k0 + tl.arange(0, BLOCK_N)
        score = tl.load(scores_ptr + k, mask=k < K, other=float("-inf"))
        some = score > float("-inf")  # what is not found lies anywhere
        weight = tl.where(some, tl.exp(score - top) / total, 0.0)
        at = tl.load(columns_ptr + k, mask=k < K, other=0)
        where = v_ptr + at[:, None] * v_s + dv[None, :]
        value = tl.load(where, mask=some[:, None] & (dv < DV)[None, :], other=0.0).to(tl.float32)
        acc += tl.sum(value * weight[:, None], 0)
    tl.store(out_ptr + place * DV + dv, acc.to(out_ptr.dtype.element_ty), mask=dv < DV)


def make_numbers(
    query: torch.Tensor, keys: torch.Tensor, lower: torch.Tensor, upper: torch.Tensor, start: int, n: int
) -> torch.Tensor:
    """The numbers (B, H, T, S) of query (B, H, T, D) and keys (B, H, S, D), the columns from `start` on of n."""
    kind = torch.promote_types(query.dtype, keys.dtype)
    query, keys = (x.to(kind) if x.stride(-1) == 1 else x.to(kind).contiguous() for x in (query, keys))
    (b, h, t, d), s = query.shape, keys.shape[2]
    lower, upper = lower.contiguous(), upper.contiguous()
    out = torch.empty(b, h, t, s, dtype=torch.int64, device=query.device)
    tiles = tiles_for(query.dtype, d)
    _numbers[(triton.cdiv(s, tiles.keys) * triton.cdiv(t, tiles.queries) * b * h,)](
        query, keys, lower, upper, out, *query.stride()[:3], *keys.stride()[:3], _stride(lower), start, h, t, s, n,
        D=d, BLOCK_D=_block(d), BLOCK_M=tiles.queries, BLOCK_N=tiles.keys, PRECISION=precision_of("numbers", d),
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out


def read_numbers(best: torch.Tensor, upper: torch.Tensor, n: int, topk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (B, H, T, topk) and columns of the best numbers (B, H, T, any), -inf and 0 where there are fewer."""
    b, h, t, k = best.shape
    scores = torch.empty(b, h, t, topk, dtype=torch.float32, device=best.device)
    columns = torch.empty(b, h, t, topk, dtype=torch.int64, device=best.device)
    upper = upper.contiguous()
    _found[(triton.cdiv(t * topk, FOUND.queries) * b * h,)](
        best, upper, scores, columns, _stride(upper), h, t, n, k, topk, BLOCK_M=FOUND.queries
    )
    return scores, columns


def attend_found(
    scores: torch.Tensor, columns: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over pairs that were found, by their scores (B, H, T, k), -inf where there are none, which are scaled
    already, and their columns of values (B, H, N, D): out (B, H, T, D), and the weights (B, H, T, k) in float32."""
    return _attend_operator(scores, columns, values)


def _attend_kernel(
    scores: torch.Tensor, columns: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    scores, columns = scores.contiguous(), columns.contiguous()
    values = values if values.stride(-1) == 1 else values.contiguous()
    (b, h, t, k), dv = scores.shape, values.shape[3]
    out = torch.empty(b, h, t, dv, dtype=values.dtype, device=values.device)
    weights = torch.empty_like(scores)
    if not scores.numel():
        return out, weights
    with torch.cuda.device_of(values):
        _attend[(b * h * t,)](
            scores, columns, values, out, weights, *values.stride()[:3], h, t, k, DV=dv, BLOCK_DV=_block(dv),
            BLOCK_K=triton.next_power_of_2(k), BLOCK_N=PICKED.keys, num_warps=PICKED.warps, num_stages=PICKED.stages,
        )  # fmt: skip
    return out, weights


def _attend_shapes(scores, columns, values):
    return values.new_empty(*scores.shape[:3], values.shape[-1]), scores.new_empty(scores.shape)


if triton is not None:
    _attend_operator = operator(__file__, "attend_found", _attend_kernel, _attend_shapes)


def _stride(x: torch.Tensor) -> int:
    """The step from row to row of x (B or 1, T)."""
    return x.stride(0) if x.shape[0] > 1 else 0
