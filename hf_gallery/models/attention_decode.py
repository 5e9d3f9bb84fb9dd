"""`attend` for one query a row, as in decoding: kernels for GPUs, in Triton, that split the keys.

One query is too little work for a GPU, and its keys are many: each row and head is given to as many programs as make
the device busy, and each of them reads one stretch of the keys and leaves (out, lse) over it. A second kernel joins
them by their lse (flash decoding: Dao et al. 2023, https://pytorch.org/blog/flash-decoding/).

Keys lie by position, or in a ring where position p lies in slot p mod N (rings.py). The interval, and how far a ring
has come, are read on the device, so a step is the same launches at every token. Scores are sums of products in
float32, without matrix instructions: the time goes into reading keys.

Letters: see spans.py; N slots of a ring.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from .attention_problem import Problem
from .attention_triton import INTERPRETED, _block, _check_distances, jit
from .attention_triton import why_not as why_no_kernel
from .operators import operator
from .rings import RingSpans

try:
    import triton
    import triton.language as tl
except ImportError:  # machines without a GPU, where torch's own operations serve
    triton = tl = None

if triton is not None:
    from .attention_triton import _LOG2_E

WARPS = 4
MOST_SPLITS = 64
PROGRAMS = 4  # for each processor of a GPU


def keys_of(head: int) -> int:
    """Keys of a tile, for a size of heads: as many as fit into registers."""
    return 16 if INTERPRETED else max(16, 4096 // _block(head))


def why_not(problem: Problem) -> str | None:
    """The reason why these kernels cannot serve the problem, None if they can; reads no tensor."""
    if problem.query.shape[2] != 1:
        return f"serves one query a row, got {problem.query.shape[2]}"
    if problem.dropout > 0.0:
        return "has no dropout"
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in problem.tensors):
        return "records no gradients"
    if problem.spans.of_ring and not isinstance(problem.spans, RingSpans):
        return "reads rings in which every position has its slot"
    return why_no_kernel(problem)


def attend_decode(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """out (B, H, 1, Dv) and lse (B, H, 1) of a problem that `why_not` has nothing against. Reads no value of a GPU."""
    problem.check_shapes()
    query, key, value, spans, position, scale, _ = problem
    kind = query.dtype
    table = asked = newest = None
    farthest, dilation = 0, 1
    if isinstance(spans, RingSpans):
        lower, upper = spans.lower, spans.seen_upper
        newest, dilation = spans.rows.last[:, 0], spans.dilation
    else:
        if position is not None:
            _check_distances(problem)
        lower, upper = spans.on(query.device)
    if position is not None:
        table, farthest, asked = position
        asked, table = (None, table.float()) if asked is None else (asked.to(kind), table.to(kind))
    ends = lower.contiguous(), upper.contiguous()
    return _operator(query, key.to(kind), value.to(kind), asked, table, *ends, newest, farthest, dilation, scale)


def splits_for(pairs: int, tiles: int, processors: int) -> int:
    """The number of programs that share the tiles of keys of a row and head, a power of 2; pairs: rows times heads."""
    wanted = triton.cdiv(PROGRAMS * processors, max(pairs, 1))
    return min(triton.next_power_of_2(min(wanted, max(tiles, 1))), MOST_SPLITS)


# --------------------------------------------------------------------------------------------------------- the kernels


@jit
def _vectors(base, at, stride, some, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The vectors `at` of a matrix, (n, BLOCK_D) in float32, zeros where not `some`."""
    d = tl.arange(0, BLOCK_D)
    where = base + at.to(tl.int64)[:, None] * stride + d[None, :]
    return tl.load(where, mask=some[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)


@jit
def _decode(
    q_ptr, k_ptr, v_ptr, lower, upper, newest_ptr, p_ptr, table, parts_ptr, lse2_ptr,
    q_b, q_h, k_b, k_h, k_s, v_b, v_h, v_s, p_b, p_h, table_h, lower_b, upper_b, H, S, R, farthest, dilation, scale2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    TERM: tl.constexpr, RING: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """A part (B, H, SPLITS, DV) of one query over one stretch of its keys, and its lse in base 2 (B, H, SPLITS)."""
    pair = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    b, h = pair // H, pair % H
    lo, up = tl.load(lower + b * lower_b), tl.load(upper + b * upper_b)  # of any size, as int64 holds them
    newest = S - 1
    first, stop = 0, S  # a ring is read from slot 0 on
    if RING:
        newest = tl.load(newest_ptr + b).to(tl.int32)
    else:
        first = tl.minimum(tl.maximum(lo, 0), S).to(tl.int32)
        stop = (tl.maximum(tl.minimum(up, S - 1), -1) + 1).to(tl.int32)
    share = tl.cdiv(tl.cdiv(tl.maximum(stop - first, 0), SPLITS), BLOCK_N) * BLOCK_N
    begin = first + split * share
    end = tl.minimum(begin + share, stop)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    q = tl.load(q_ptr + b * q_b + h * q_h + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    p = q
    if TERM == "relative":
        p = tl.load(p_ptr + b * p_b + h * p_h + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    table += h * table_h
    top = float("-inf")
    total = 0.0
    acc = tl.zeros((BLOCK_DV,), tl.float32)
    for s0 in range(begin, end, BLOCK_N):
        s = s0 + tl.arange(0, BLOCK_N)
        at = s
        if RING:
            at = newest - (newest - s + S) % S  # the last position that lies in the slot, below 0 where none has
        distance = newest - at
        visible = (s < end) & (at >= lo) & (at <= up)
        if RING:
            visible = visible & (distance % dilation == 0)
            distance = distance // dilation
        x = tl.sum(_vectors(k_ptr, s, k_s, visible, D, BLOCK_D) * q, 1)  # (BLOCK_N,)
        entry = tl.minimum(tl.maximum(farthest - distance, 0), R - 1)  # never beyond the table
        if TERM == "bias":
            x += tl.load(table + entry, mask=visible, other=0.0)
        if TERM == "relative":
            x += tl.sum(_vectors(table, entry, D, visible, D, BLOCK_D) * p, 1)
        x = tl.where(visible, x * scale2, float("-inf"))
        new_top = tl.maximum(top, tl.max(x, 0))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)  # no key seen yet
        probabilities = tl.exp2(x - safe)
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(probabilities, 0)
        acc = acc * shrink + tl.sum(_vectors(v_ptr, s, v_s, visible, DV, BLOCK_DV) * probabilities[:, None], 0)
        top = new_top
    place = pair * SPLITS + split
    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    tl.store(parts_ptr + place * DV + dv, acc / total, mask=dv < DV)
    tl.store(lse2_ptr + place, tl.where(nothing, float("-inf"), top + tl.log2(total)))


@jit
def _join(parts_ptr, lse2_ptr, out_ptr, lse_ptr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, SPLITS: tl.constexpr):
    """out (B, H, 1, DV) and lse (B, H, 1) from those over the stretches of keys."""
    pair = tl.program_id(0).to(tl.int64)
    n, dv = tl.arange(0, SPLITS), tl.arange(0, BLOCK_DV)
    lse2 = tl.load(lse2_ptr + pair * SPLITS + n)
    top = tl.max(lse2, 0)
    shares = tl.exp2(lse2 - tl.where(top == float("-inf"), 0.0, top))  # zeros where nothing is seen
    total = tl.sum(shares, 0)
    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    where = parts_ptr + (pair * SPLITS + n)[:, None] * DV + dv[None, :]
    parts = tl.load(where, mask=(dv < DV)[None, :], other=0.0)  # (SPLITS, BLOCK_DV)
    out = tl.sum(parts * (shares / total)[:, None], 0)
    tl.store(out_ptr + pair * DV + dv, out.to(out_ptr.dtype.element_ty), mask=dv < DV)
    tl.store(lse_ptr + pair, tl.where(nothing, float("-inf"), (top + tl.log2(total)) / _LOG2_E))


# -------------------------------------------------------------------------------------------------------- the operator


def _decode_kernels(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    asked: torch.Tensor | None,
    table: torch.Tensor | None,
    lower: torch.Tensor,
    upper: torch.Tensor,
    newest: torch.Tensor | None,
    farthest: int,
    dilation: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    # Elements of a head lie side by side in every tensor that a kernel reads.
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    asked = asked if asked is None or asked.stride(-1) == 1 else asked.contiguous()
    b, h, _, d = query.shape
    s, dv = key.shape[2], value.shape[3]
    keys = keys_of(max(d, dv))
    splits = splits_for(b * h, triton.cdiv(s, keys), _processors(query.device))
    parts = torch.empty(b, h, splits, dv, dtype=torch.float32, device=query.device)
    lse2 = torch.empty(b, h, splits, dtype=torch.float32, device=query.device)
    out = torch.empty(b, h, 1, dv, dtype=query.dtype, device=query.device)
    lse = torch.empty(b, h, 1, dtype=torch.float32, device=query.device)
    term = "none" if table is None else "bias" if asked is None else "relative"
    entries = 1 if table is None else table.shape[1]
    table = query if table is None else table.contiguous()
    lines = query if asked is None else asked
    if not out.numel():
        return out, lse
    blocks: dict[str, Any] = dict(DV=dv, BLOCK_DV=_block(dv), SPLITS=splits, num_warps=WARPS)
    with torch.cuda.device_of(query):
        _decode[b * h, splits](
            query, key, value, lower, upper, lower if newest is None else newest, lines, table, parts, lse2,
            *query.stride()[:2], *key.stride()[:3], *value.stride()[:3], *lines.stride()[:2], table.stride(0),
            *(x.stride(0) if x.shape[0] > 1 else 0 for x in (lower, upper)), h, s, entries, farthest, dilation,
            scale * math.log2(math.e), D=d, BLOCK_D=_block(d), BLOCK_N=keys, TERM=term, RING=newest is not None,
            **blocks,
        )  # fmt: skip
        _join[(b * h,)](parts, lse2, out, lse, **blocks)
    return out, lse


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _shapes(query, key, value, *rest):
    b, h, t, _ = query.shape
    return query.new_empty(b, h, t, value.shape[-1]), query.new_empty(b, h, t, dtype=torch.float32)


if triton is not None:
    _operator = operator(__file__, "decode_attention", _decode_kernels, _shapes)
