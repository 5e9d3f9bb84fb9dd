"""`attend` by torch's FlashAttention: intervals that are one window over sequences, in half types, on CUDA.

FlashAttention (Dao 2023, arXiv 2307.08691) reads sequences of unequal lengths laid one behind another, and two numbers
for all of them: with a sequence's last query at its last key, a query at key c sees [c - left, c + right] of its
sequence's keys, without an end where a number is -1. Intervals that the host knows are cut into such sequences,
exactly or not at all:

    interval of query p                       sequences                               (left, right)
    [0, p], [p - w, p]                        a row each                              (-1, 0), (w, 0)
    [p - w/2, p + w/2], of padded rows        a row's own tokens each                 (w/2, w/2)
    [seg(p) - mem_len, p]                     a segment, and the keys of its memory   (-1, 0)
    [seg(p), p], packed documents             a segment, a document                   (-1, 0)
    [seg(p) - mem_len, seg(p) - 1]            a segment, and the keys before it       (-1, -1)

Its backward makes the probabilities exp(score - lse) and the row sums delta = sum(grad_out * out) of the out and lse
that it is given. Attention in several parts, one softmax over all of their keys, hands every part the joint out and
lse: each gives its share of the gradients, and none of lse is needed. A gradient of lse itself is to be taken off
delta. It enters by the zeros that heads are padded with: there out holds it, negative, in three terms of the half
type, and grad_out ones.

The kernels are called as torch.nn.attention.varlen calls them (torch 2.14): aten._flash_attention_forward and
_backward over (tokens, heads, head size), with int32 cu_seqlens and lse (heads, tokens). Their backward adds
atomically, so the same input may give other bits, unless torch.use_deterministic_algorithms is on.

Letters: see spans.py; n sequences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .attention_problem import Problem, compute_dtype
from .exporting import in_one_graph, outside_graphs, readable
from .operators import operator
from .spans import Spans, moved

KINDS = (torch.bfloat16, torch.float16)
LARGEST_HEAD = 248  # 8 less than the kernels take: a gradient of lse needs as many
# A segment's memory is copied for it, so a key is held once for each segment that sees it.
MOST_COPIES = 4


def why_not(problem: Problem) -> str | None:
    """The reason why these kernels cannot serve the problem, None if they can; reads no tensor of a GPU."""
    query = problem.query
    if (reason := lacks(query.device)) is not None:
        return reason
    if query.dtype not in KINDS:
        return f"computes half types, bfloat16 and float16; query has type {query.dtype}"
    widest = max(query.shape[-1], problem.value.shape[-1])
    if widest > LARGEST_HEAD:
        return f"has heads of {LARGEST_HEAD} at most, got {widest}"
    if problem.position is not None:
        return "has no term of positions"
    if problem.dropout > 0.0:
        return f"has no dropout; got {problem.dropout}"
    if in_one_graph():  # they are cut when the graph runs
        on_cpu = problem.spans.lower.device.type == "cpu"
        return None if on_cpu else "needs intervals on the CPU; in one graph those of padded rows are on the GPU"
    sequences = sequences_of(problem.spans, problem.key.shape[2])
    return sequences if isinstance(sequences, str) else None


def lacks(device: torch.device) -> str | None:
    """The reason why there are no such kernels on a device, None if there are."""
    if device.type != "cuda":
        return f"runs on CUDA; query is on {device}"
    if torch.version.hip is not None or not torch.backends.cuda.is_flash_attention_available():
        return "needs a torch for CUDA that was built with FlashAttention"
    if torch.cuda.get_device_capability(device)[0] < 8:
        return "needs a GPU of compute capability 8.0 or later"
    return None


@outside_graphs  # its cuts depend on the intervals
def attend_flash(*problems: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """out (B, H, T, Dv) and lse (B, H, T) of problems that `why_not` has nothing against: of one, or of several over
    disjoint keys with the same query and scale, one softmax for all. Reads no value of a GPU.

    Raises ValueError if shapes do not fit, and from one graph when it runs, if the intervals are no such sequences.
    """
    for problem in problems:
        problem.check_shapes()
    query, scale = problems[0].query, problems[0].scale
    keys, values = ([x.to(query.dtype) for x in some] for some in zip(*(p[1:3] for p in problems), strict=True))
    spans = [problem.spans for problem in problems]
    if in_one_graph():
        return _forward_operator(query, keys, values, [x.lower for x in spans], [x.upper for x in spans], scale)
    return _FlashAttention.apply(spans, scale, query, *keys, *values)


# ------------------------------------------------------------------------------------------- intervals as sequences


class Sequences(NamedTuple):
    """Intervals cut into sequences, (n,) on the CPU each: its row, its first query and their number, its first key and
    their number."""

    row: torch.Tensor
    query: torch.Tensor
    queries: torch.Tensor
    key: torch.Tensor
    keys: torch.Tensor
    left: int
    right: int


@outside_graphs
def sequences_of(spans: Spans, columns: int) -> Sequences | str:
    """The sequences that intervals over this number of columns are, or in words why they are none. Queries that see
    nothing are in none of them."""
    known = _known(spans)
    if known is None:
        return "needs intervals that the host knows; these follow from a mask on the GPU"

    def work():
        lower, upper = known.lower.clamp(min=0), known.upper.clamp(max=columns - 1)
        some = lower <= upper  # (B or 1, T)
        if not bool(some.any()):
            nothing = torch.zeros(0, dtype=torch.long)
            return Sequences(nothing, nothing, nothing, nothing, nothing, -1, -1)
        first = some & ~F.pad(some[:, :-1], (1, 0))
        low, up = (F.pad(x.diff(), (1, 0)) for x in (lower, upper))
        # Cuts where queries see nothing; besides where an interval does not go on as those of a window, of a segment.
        cuts = [first]
        for goes_on in ((low == 0) | (low == 1), low == 0):
            cuts += [first | (some & ~(goes_on & (up == steps))) for steps in (0, 1)]
        for begins in sorted(cuts, key=lambda x: int(x.sum())):
            found = _fitted(lower, upper, some, begins)
            if found is not None:
                if _copies(found, columns) <= MOST_COPIES:
                    return found
                break
        most = f"a key in {MOST_COPIES} of them at most"
        return f"has one window for all rows or segments, {most}; these intervals are others"

    return known._once(("sequences", columns), work)


def _known(spans: Spans) -> Spans | None:
    """Intervals on the CPU that are these, but for queries that see nothing."""
    return spans if readable(spans.lower) else spans.within


def _fitted(lower: torch.Tensor, upper: torch.Tensor, some: torch.Tensor, begins: torch.Tensor) -> Sequences | None:
    """The sequences that begin with the queries `begins` (B or 1, T), if one window is the interval of every query."""
    start = begins.flatten().nonzero().squeeze(1)  # (n,) queries of all rows, numbered
    at = some.flatten().nonzero().squeeze(1)  # (seeing,)
    number = begins.flatten().cumsum(0)[at] - 1  # (seeing,) the sequence of each
    count = torch.bincount(number, minlength=len(start))  # (n,)
    last = start + count - 1
    key, end = lower.flatten()[start], upper.flatten()[last] + 1  # (n,)
    low, up, column = lower.flatten()[at], upper.flatten()[at], at + (end - 1 - last)[number]  # (seeing,)
    left, right = int((column - low).amax()), int((up - column).amax())
    first, beyond = key[number], end[number]
    fits = (low == torch.maximum(first, column - left)) & (up == torch.minimum(beyond - 1, column + right))
    if not bool(fits.all()):
        return None
    left = -1 if bool((low == first).all()) else left
    right = -1 if bool((up == beyond - 1).all()) else right
    t = lower.shape[1]
    return Sequences(torch.div(start, t, rounding_mode="floor"), start % t, count, key, end - key, left, right)


def _copies(sequences: Sequences, columns: int) -> int:
    """Counts the sequences that hold a key, of the key that most of them hold."""
    row, _, _, key, count, _, _ = sequences
    begin = row * (columns + 1) + key  # a column more for each row, where its last sequence ends
    change = torch.zeros((int(row.amax()) + 1) * (columns + 1), dtype=torch.long)
    change.index_add_(0, begin, torch.ones_like(begin)).index_add_(0, begin + count, -torch.ones_like(begin))
    return int(change.cumsum(0).amax())


# -------------------------------------------------------------------------------------------------- packed tensors


class _Side(NamedTuple):
    """The way from (B, N) columns to the tokens of sequences one behind another, and back; on the device.

    take: (tokens,), the column of [0, B N) of each; None where that is its own number. back: (copies, B N), which
    tokens each column has become, `tokens` where none.
    """

    cu_seqlens: torch.Tensor  # (n + 1,)
    longest: int
    take: torch.Tensor | None
    back: torch.Tensor | None

    @classmethod
    def of(cls, first: torch.Tensor, count: torch.Tensor, columns: int, device: torch.device) -> _Side:
        """first, count: (n,) of each sequence its first column of [0, columns) and their number."""
        ends = F.pad(count.cumsum(0), (1, 0))
        tokens = int(ends[-1])
        number = torch.arange(tokens)
        take = torch.repeat_interleave(first - ends[:-1], count) + number
        cu_seqlens, longest = moved(ends.to(torch.int32), device), int(count.amax())
        if tokens == columns and bool((take == number).all()):
            return cls(cu_seqlens, longest, None, None)
        order = take.argsort(stable=True)
        column = take[order]
        times = torch.bincount(column, minlength=columns)
        turn = number - (times.cumsum(0) - times)[column]  # (tokens,) how often its column has come before
        back = torch.full((int(times.amax()), columns), tokens)
        back[turn, column] = order
        return cls(cu_seqlens, longest, moved(take, device), moved(back, device))

    def pack(self, x: torch.Tensor, width: int) -> torch.Tensor:
        """(B, H, N, D) to (tokens, H, width), zeros behind D."""
        x = x.transpose(1, 2).flatten(0, 1)  # (B N, H, D)
        x = x if self.take is None else x.index_select(0, self.take)
        x = F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x
        aligned = x.stride(-1) == 1 and all(n % 8 == 0 for n in (*x.stride()[:2], x.storage_offset()))
        return x if aligned else x.contiguous()  # the kernels read 16 bytes at a time

    def unpack(self, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """(tokens, H, width) to the shape of `like` (B, H, N, D), a sum over copies, zeros where there is none."""
        x = x[..., : like.shape[-1]]
        if self.back is not None:
            x = F.pad(x, (0, 0, 0, 0, 0, 1))
            copies = [x.index_select(0, some) for some in self.back]
            x = sum(y.to(compute_dtype(x)) for y in copies).to(x.dtype) if len(copies) > 1 else copies[0]
        return x.unflatten(0, (like.shape[0], -1)).transpose(1, 2)

    def unpack_lse(self, lse: torch.Tensor, rows: int) -> torch.Tensor:
        """(H, tokens) to (B, H, N), -inf where there is none."""
        if self.back is not None:
            lse = F.pad(lse, (0, 1), value=-math.inf).index_select(1, self.back[0])
        return lse.unflatten(1, (rows, -1)).transpose(0, 1)


class _Plan(NamedTuple):
    """A problem's intervals as the kernels are told of them."""

    queries: _Side
    keys: _Side
    left: int
    right: int

    def arguments(self) -> tuple:
        causal = (self.left, self.right) == (-1, 0)
        return self.queries.cu_seqlens, self.keys.cu_seqlens, self.queries.longest, self.keys.longest, 0.0, causal

    def window(self) -> dict[str, int]:
        return dict(window_size_left=self.left, window_size_right=self.right)


def _plan(problem: Problem) -> _Plan | None:
    """The plan of a problem, worked out once for all layers; None where nobody sees anything, or there is nobody.

    Raises ValueError if its intervals are no sequences.
    """
    b, _, t, _ = problem.query.shape
    s, device = problem.key.shape[2], problem.query.device
    known, sequences = _known(problem.spans), sequences_of(problem.spans, s)
    if isinstance(sequences, str):
        raise ValueError(f'implementation="flash" {sequences}; use implementation="auto"')

    def work():
        row, query, queries, key, keys, left, right = sequences
        if not len(row) or not b:
            return None
        if known.lower.shape[0] == 1:
            row = torch.arange(b).repeat_interleave(len(row))
            query, queries, key, keys = (x.repeat(b) for x in (query, queries, key, keys))
        of_queries = _Side.of(row * t + query, queries, b * t, device)
        return _Plan(of_queries, _Side.of(row * s + key, keys, b * s, device), left, right)

    return known._once(("flash", device, b, s), work)


def _unseeing(problem: Problem) -> torch.Tensor | None:
    """Queries that see nothing for a mask that the host does not know, (B or 1, 1, T) on the device; None: there are
    none."""
    if _known(problem.spans) is problem.spans:
        return None
    lower, upper = problem.spans.on(problem.query.device)
    return problem.spans._once("unseeing", lambda: (upper < lower)[:, None])


# --------------------------------------------------------------------------------------------- forward and backward


def _forward(problems: Sequence[Problem]) -> tuple[torch.Tensor, torch.Tensor]:
    """out (B, H, T, Dv) and lse (B, H, T), one softmax over the keys of all problems."""
    parts = [_forward_of(problem) for problem in problems]
    if len(parts) == 1:
        return parts[0]
    out, all_lse = parts[0][0], torch.stack([lse for _, lse in parts])
    lse = all_lse.logsumexp(0)  # (B, H, T)
    shares = torch.exp(all_lse - lse.masked_fill(lse == -math.inf, 0.0))  # (parts, B, H, T)
    total = sum(share[..., None] * part for share, (part, _) in zip(shares, parts, strict=True))
    return total.to(out.dtype), lse


def _forward_of(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    query, key, value = problem[:3]
    b, h, t, _ = query.shape
    like, plan = query[..., :1].expand(b, h, t, value.shape[-1]), _plan(problem)
    if plan is None:
        return query.new_zeros(like.shape), query.new_full((b, h, t), -math.inf, dtype=compute_dtype(query))
    width = _width(problem)
    tensors = plan.queries.pack(query, width), plan.keys.pack(key, width), plan.keys.pack(value, width)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *tensors, *plan.arguments(), False, scale=problem.scale, **plan.window()
    )
    out, lse = plan.queries.unpack(out, like), plan.queries.unpack_lse(lse, b)
    if (unseeing := _unseeing(problem)) is not None:
        out, lse = out.masked_fill(unseeing[..., None], 0.0), lse.masked_fill(unseeing, -math.inf)
    return out, lse


def _width(problem: Problem) -> int:
    """The size that heads of keys and values are padded to: one for both, a multiple of 8."""
    return -(-max(problem.key.shape[-1], problem.value.shape[-1]) // 8) * 8


def _backward(
    problems: Sequence[Problem],
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Gradients of the query, of all keys and of all values, from the joint out and lse."""
    query = problems[0].query
    if any(_unseeing(problem) is not None for problem in problems):
        # No probability is left of queries that see nothing: exp(score - inf) = 0, where -inf would give NaN.
        lse = lse.masked_fill(lse == -math.inf, math.inf)
    found = [_backward_of(problem, out, lse, grad_out, grad_lse) for problem in problems]
    grad_query = found[0][0]
    if len(found) > 1:
        grad_query = sum(x.to(compute_dtype(query)) for x, _, _ in found).to(query.dtype)
    return grad_query, [x for _, x, _ in found], [x for _, _, x in found]


def _backward_of(problem, out, lse, grad_out, grad_lse):
    query, key, value = problem[:3]
    plan = _plan(problem)
    if plan is None:
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    width = _width(problem)
    if grad_lse is not None:
        out, grad_out = _with_gradient_of_lse(out, grad_out, grad_lse, width)
        width += 8
    q, *of_queries = (plan.queries.pack(x, width) for x in (query, out, grad_out))
    k, v = (plan.keys.pack(x, width) for x in (key, value))
    out, grad_out = of_queries
    lse = lse.transpose(0, 1).flatten(1)  # (H, B T)
    lse = (lse if plan.queries.take is None else lse.index_select(1, plan.queries.take)).contiguous()
    seed, unused = q.new_zeros(2, dtype=torch.uint64), q.new_empty(0)  # of dropout
    grads = torch.ops.aten._flash_attention_backward(
        grad_out, q, k, v, out, lse, *plan.arguments(), seed, unused, scale=problem.scale, **plan.window()
    )
    places = (plan.queries, query), (plan.keys, key), (plan.keys, value)
    return tuple(side.unpack(x, like) for x, (side, like) in zip(grads, places, strict=True))


def _with_gradient_of_lse(out, grad_out, grad_lse, width):
    """out and grad_out (B, H, T, width + 8) whose row sums of products are those of the given, less grad_lse."""
    terms, left = [], grad_lse
    for _ in range(3):
        terms.append(left.to(out.dtype))
        left = left - terms[-1]
    out, grad_out = (F.pad(x, (0, width - x.shape[-1])) for x in (out, grad_out))
    more = -torch.stack(terms, -1)  # (B, H, T, 3)
    return (F.pad(torch.cat([x, y], -1), (0, 5)) for x, y in ((out, more), (grad_out, torch.ones_like(more))))


class _FlashAttention(torch.autograd.Function):
    """The kernels over one query and the keys and values of several parts."""

    @staticmethod
    def forward(spans: list[Spans], scale: float, query: torch.Tensor, *pairs: torch.Tensor):
        """pairs: the keys of all parts, then their values."""
        return _forward(_problems(query, *_halves(pairs), spans, scale))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]):
        ctx.spans, ctx.scale, *tensors = inputs
        ctx.save_for_backward(*output, *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None):
        out, lse, query, *pairs = ctx.saved_tensors
        problems = _problems(query, *_halves(pairs), ctx.spans, ctx.scale)
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        grad_query, grad_keys, grad_values = _backward(problems, out, lse, grad_out, grad_lse)
        return None, None, grad_query, *grad_keys, *grad_values


def _halves(x: Sequence[torch.Tensor]) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    return x[: len(x) // 2], x[len(x) // 2 :]


def _problems(query, keys, values, spans, scale) -> list[Problem]:
    return [Problem(query, *part, None, scale) for part in zip(keys, values, spans, strict=True)]


# ------------------------------------------------------------------------------------------------------- the operators


def _operator_forward(
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    lowers: Sequence[torch.Tensor],
    uppers: Sequence[torch.Tensor],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = _forward(_problems(query, keys, values, map(Spans, lowers, uppers), scale))
    return _laid(out), lse.contiguous()


def _forward_shapes(query, keys, values, lowers, uppers, scale):
    b, h, t, _ = query.shape
    out = query.new_empty(b, t, h, values[0].shape[-1]).transpose(1, 2)
    return out, query.new_empty(b, h, t, dtype=compute_dtype(query))


def _operator_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    lowers: Sequence[torch.Tensor],
    uppers: Sequence[torch.Tensor],
    scale: float,
) -> list[torch.Tensor]:
    problems = _problems(query, keys, values, map(Spans, lowers, uppers), scale)
    grad_query, grad_keys, grad_values = _backward(problems, out, lse, grad_out, grad_lse)
    return [_laid(x) for x in (grad_query, *grad_keys, *grad_values)]


def _backward_shapes(grad_out, grad_lse, out, lse, query, keys, values, *rest):
    sizes = [(x, *x.shape) for x in (query, *keys, *values)]
    return [x.new_empty(b, n, h, d).transpose(1, 2) for x, b, h, n, d in sizes]


def _laid(x: torch.Tensor) -> torch.Tensor:
    """x (B, H, N, D), laid out (B, N, H, D) as the operators say."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _keep(ctx, inputs, output):
    query, keys, values, lowers, uppers, ctx.scale = inputs
    ctx.parts = len(keys)
    ctx.save_for_backward(*output, query, *keys, *values, *lowers, *uppers)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_out, grad_lse):
    out, lse, query, *rest = ctx.saved_tensors
    n = ctx.parts
    lists = [list(rest[i * n : (i + 1) * n]) for i in range(4)]
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grads = _backward_operator(grad_out, grad_lse, out, lse, query, *lists, ctx.scale)
    nothing = [None] * n
    return grads[0], grads[1 : n + 1], grads[n + 1 :], nothing, nothing, None


_backward_operator = operator(__file__, "flash_backward", _operator_backward, _backward_shapes)
_forward_operator = operator(__file__, "flash", _operator_forward, _forward_shapes, (_differentiate, _keep))
