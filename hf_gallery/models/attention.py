"""The one attention function of the gallery, over intervals of keys.

    score(t, s) = (q_t . k_s + position(t, s)) * scale        for s in [lower_t, upper_t]
    out_t       = sum_s softmax_s(score(t, s)) v_s            zeros where the interval is empty
    lse_t       = log sum_s exp(score(t, s))                  -inf where it is empty

`attend_naive` is this definition, written plainly: read it first. `attend` computes the same in time O(T x span) and
memory O(T), by whichever implementation suits the device: attention_tiles.py on CPUs; on GPUs attention_decode.py for
one query a row, attention_flash.py for plain windows in half types, attention_triton.py for all else; and on request
attention_fused.py. `attend_parts` makes one softmax of several sets of keys, `join` of the results over two.

Letters: see spans.py.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from .attention_decode import attend_decode
from .attention_decode import why_not as why_not_decode
from .attention_flash import attend_flash
from .attention_flash import why_not as why_not_flash
from .attention_fused import attend_sdpa
from .attention_problem import Position, Problem, compute_dtype, without_autocast
from .attention_tiles import attend_tiles, attend_tiles_in_graph
from .attention_triton import attend_triton
from .attention_triton import why_not as why_not_triton
from .exporting import in_one_graph, is_exporting
from .rings import attend_ring
from .spans import Spans


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
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    spans = Problem(query, key, value, spans, position, scale).check().spans
    dtype = compute_dtype(query)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scores = query @ key.mT  # (B, H, T, S)
    if position is not None:
        t, s = scores.shape[-2:]
        distance = (s - t) + torch.arange(t, device=query.device)[:, None] - torch.arange(s, device=query.device)
        # What is clamped is never seen.
        entry = (position.farthest - distance).clamp(0, position.table.shape[1] - 1)  # (T, S)
        if position.query is None:
            scores = scores + position.table.to(dtype)[:, entry]
        else:
            term = position.query.to(dtype) @ position.table.to(dtype).mT  # (B, H, T, R)
            scores = scores + term.gather(-1, entry.expand_as(scores))
    visible = spans.visible(key.shape[2]).to(query.device)[:, None]  # (B or 1, 1, T, S)
    scores = (scores * scale).masked_fill(~visible, -math.inf)
    lse = scores.logsumexp(-1)  # (B, H, T)
    seen = visible.any(-1)  # (B or 1, 1, T)
    probabilities = torch.exp(scores - lse.masked_fill(~seen, 0.0)[..., None])  # (B, H, T, S)
    return probabilities @ value, lse, probabilities


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: Spans,
    *,
    position: Position | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    implementation: str = "auto",
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query over the keys in its interval.

    query (B, H, T, D), key (B, H, S, D), value (B, H, S, Dv), in any floating type; half types are computed in
    float32. spans: key columns that each query sees. scale: default 1 / sqrt(D). dropout: on the probabilities.
    implementation: a name of IMPLEMENTATIONS.

    Returns out (B, H, T, Dv) in query's type, zeros where a query sees nothing; with return_lse also the logarithm
    of each query's softmax denominator, lse (B, H, T), -inf where it sees nothing. Two results over disjoint keys
    are joined by it, see `join`. Gradients reach every tensor argument, through lse too.

    Raises ValueError if shapes do not fit, a visible distance has no entry in the table, or the implementation cannot
    do what is asked.
    """
    problem = Problem(query, key, value, spans, position, query.shape[-1] ** -0.5 if scale is None else scale, dropout)
    exporting = is_exporting()
    if exporting and not spans.of_ring:
        with without_autocast(query):
            out, lse, _ = attend_naive(query, key, value, spans, position=position, scale=scale)
        out = out.to(query.dtype)
        return (out, lse) if return_lse else out
    chosen = "tiles" if exporting else choose(problem, implementation)
    if spans.of_ring and chosen != "decode":
        of_ring = attend_ring(query, key, value, spans, position=position, scale=scale, dropout=dropout)
        return of_ring if return_lse else of_ring[0]
    if chosen == "tiles" and in_one_graph():
        out, lse = attend_tiles_in_graph(problem)
        return (out, lse) if return_lse else out
    if chosen == "sdpa":
        if return_lse:
            raise ValueError('implementation="sdpa" has no log-sum-exp to return; use implementation="eager"')
        return attend_sdpa(problem.check())
    if chosen == "triton":
        result: tuple[torch.Tensor, Any] = attend_triton(problem)
    elif chosen == "decode":
        result = attend_decode(problem)
    elif chosen == "flash":
        result = attend_flash(problem)
    else:
        result = attend_tiles(problem.check(), needs_lse=return_lse)
    return result if return_lse else result[0]


def attend_parts(
    query: torch.Tensor,
    parts: Sequence[tuple[torch.Tensor, torch.Tensor, Spans, Position | None]],
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    implementation: str = "auto",
) -> torch.Tensor:
    """`attend` over the disjoint keys of all parts, one softmax for all: out (B, H, T, Dv).

    parts: key, value, spans and position of each, at least two. Raises ValueError as `attend` does.
    """
    options: dict[str, Any] = dict(scale=scale, dropout=dropout)
    names = [implementation] * len(parts)
    if not is_exporting() and not any(part[2].of_ring for part in parts):
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        problems = [Problem(query, *part, scale, dropout) for part in parts]
        chosen = [choose(problem, implementation) for problem in problems]
        if all(name == "flash" for name in chosen):
            return attend_flash(*problems)[0]
        if implementation in _BEST:  # by flash alone, lse would need a gradient
            names = ["triton" if name == "flash" else name for name in chosen]
    results = [
        attend(query, *pair, spans, position=position, implementation=name, return_lse=True, **options)
        for (*pair, spans, position), name in zip(parts, names, strict=True)
    ]
    return joined(functools.reduce(join, results[:-1]), results[-1])


IMPLEMENTATIONS = {
    "auto": "on a GPU decode, flash or triton, the first that serves, else tiles; see `choose`",
    "eager": "as auto: transformers' name for a model's own attention",
    "tiles": "in torch alone, on every device and in every type",
    "triton": "kernels for GPUs, in float32 and half types, heads of at most 256; decode where that serves",
    "decode": "kernels for GPUs that split the keys of one query a row, for inference",
    "flash": "torch's FlashAttention, in half types, where one window serves all queries, without a position term",
    "sdpa": "torch's fused kernels on the same intervals, without lse and without a position term of the query",
}
# Names of attn_implementation that every model takes, with what each is.
OWN_IMPLEMENTATIONS = {
    "eager": "on a GPU their own kernels, or torch's FlashAttention where it serves, else their own tiles",
    "tiles": "their own tiles, on every device",
    "triton": "their own kernels, for GPUs",
    "decode": "their own kernels for GPUs where every row asks with one token, else refused",
    "flash": "torch's FlashAttention, for GPUs, where every layer sees plain windows or segments, else refused",
}
_WHY_NOT = {"triton": why_not_triton, "decode": why_not_decode, "flash": why_not_flash}
_BEST = ("auto", "eager")


def choose(problem: Problem, implementation: str) -> str:
    """The implementation that `attend` runs: "tiles", "triton", "decode", "flash" or "sdpa". Decides by device, type
    and sizes, for "flash" also by intervals on the CPU, and reads no tensor of a GPU. Rings are read by "decode" or in
    torch alone, "tiles".

    "auto" takes "flash" where it serves and `flash_is_right`, but not where torch is asked for deterministic
    algorithms, nor in graphs of torch.compile, which would read its intervals on the host. Raises ValueError for an
    unknown name, or a problem that the named one cannot solve."""
    if implementation not in IMPLEMENTATIONS:
        known = "; ".join(f'"{name}": {what}' for name, what in IMPLEMENTATIONS.items())
        raise ValueError(f"implementation is {implementation!r}; attend has {known}")
    if problem.spans.of_ring and implementation != "decode":
        wanted = implementation == "triton" or (implementation != "tiles" and problem.query.is_cuda)
        return "decode" if wanted and why_not_decode(problem) is None else "tiles"
    if implementation in _BEST:
        return _best(problem)
    if implementation in _WHY_NOT and (reason := _WHY_NOT[implementation](problem)) is not None:
        raise ValueError(f'implementation="{implementation}" {reason}; use implementation="auto"')
    return "decode" if implementation == "triton" and why_not_decode(problem) is None else implementation


def _best(problem: Problem) -> str:
    if not _on_gpu(problem) or why_not_triton(problem) is not None:
        return "tiles"
    if why_not_decode(problem) is None:
        return "decode"
    if torch.compiler.is_compiling() or torch.are_deterministic_algorithms_enabled() or _captures():
        return "triton"
    plain = all(_is_plain(x) and x.dtype == problem.query.dtype for x in problem[:3])
    serves = plain and why_not_flash(problem) is None
    return "flash" if serves and flash_is_right(problem.query.device) else "triton"


def _is_plain(x: torch.Tensor) -> bool:
    """Tells whether a kernel can be given x: of no subclass of tensors, and not inside a transform of torch.func."""
    return type(x) is torch.Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def _on_gpu(problem: Problem) -> bool:
    return problem.query.is_cuda


def _captures() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@functools.cache
def flash_is_right(device: torch.device) -> bool:
    """Tells whether torch's FlashAttention gives on a device what its definition gives, by one small problem, tried
    once: its operators are not part of torch's public interface, and may change. Warns if it does not."""
    # In a thread of its own, since checkpoints, autocast and torch.func would follow it in this one.
    with ThreadPoolExecutor(1) as threads:
        reason = threads.submit(_trial_of_flash, device).result()
    if reason is not None:
        why = f"as a trial of it failed: {reason}"
        warnings.warn(f"torch's FlashAttention is not used on {device}, {why}", stacklevel=2)
    return reason is None


def _trial_of_flash(device: torch.device) -> str | None:
    """The fault of torch's FlashAttention on a device, in words; None if it has none."""
    at, generator = torch.arange(40)[None], torch.Generator().manual_seed(0)
    spans, scale = Spans((at - 7).clamp(min=0), at), 0.25
    x = torch.randn(4, 2, 2, 40, 16, generator=generator).bfloat16()

    def results(x: torch.Tensor, of: Callable[[Problem], tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:
        query, key, value, weight = x.requires_grad_().unbind()
        out, lse = of(Problem(query, key, value, spans, None, scale))[:2]
        (grad,) = torch.autograd.grad((out * weight).sum() + lse.square().sum(), x)
        return [y.detach().to("cpu", torch.float64) for y in (out, lse, *grad[:3])]

    try:
        found = results(x.to(device, copy=True), attend_flash)
        exact = results(x.double(), lambda problem: attend_naive(*problem[:4], scale=scale))
    except torch.OutOfMemoryError:
        raise  # says nothing about the kernels
    except Exception as failure:
        message, *_ = str(failure).partition("\n")
        return f"{type(failure).__name__}: {message}"
    errors = [float((y - z).norm() / z.norm()) for y, z in zip(found, exact, strict=True)]
    wrong = [error for error in errors if not error < 0.02]
    return f"its relative error is {wrong[0]:.1g}" if wrong else None


def join(
    first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention over two disjoint sets of keys from the (out, lse) over each: one softmax over their union."""
    lse = torch.logaddexp(first[1].clamp(min=_NOTHING), second[1].clamp(min=_NOTHING))
    return joined(first, second), lse.masked_fill(lse < _NOTHING / 2, -math.inf)


def joined(first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """`join` without the lse of the union, which nobody asks for behind the last part."""
    # Finite where nothing is seen, so that the difference of two such is 0 and no gradient is NaN.
    lse1, lse2 = (lse.clamp(min=_NOTHING) for _, lse in (first, second))  # (B, H, T)
    share = torch.sigmoid(lse1 - lse2)[..., None].to(first[0].dtype)  # of the first in the one softmax
    return torch.lerp(second[0], first[0], share)  # (B, H, T, Dv), zeros where both are


_NOTHING = -1e30  # less than any sum of scores, and finite
