"""The attention benchmark: `python -m eval attention`.

One layer's attention over a band: query p sees the keys in [p - span, p], span + 1 keys. What is compared:

- eager: hf_gallery's attention, from scratch, the default of all models (hf_gallery/models/attention.py)
- sdpa: hf_gallery's opt-in path over the same intervals, on torch's fused kernels
- fused: torch's scaled_dot_product_attention as one would use it by hand for a band: blocks of queries, each with the
  blocks of keys that it can reach and a mask of the band, so no T x T matrix either; all blocks folded into the batch
  of one call, or a call for each. The fastest of these is the yardstick.
- dense: attend_naive, the definition, with T x T scores
- eager and sdpa in bfloat16, too

All are checked equal, values and gradients, before anything is timed. Times are forward + backward, in turns,
medians. Memory is counted by `measure.LiveBytes`: tensors alive at the worst moment beyond inputs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from hf_gallery.models.attention import attend, attend_naive
from hf_gallery.models.spans import Spans

from .measure import interleaved, median, peak_bytes

DENSE = "dense"
EAGER = "eager"
SDPA = "sdpa"


@dataclasses.dataclass(frozen=True)
class AttentionSettings:
    """Sizes of the benchmark; times in T tokens, memory at each of `memory_lengths`."""

    length: int = 4096
    span: int = 256
    heads: int = 8
    head_dim: int = 64
    batch: int = 1
    repeats: int = 15
    dense_repeats: int = 3
    fused_blocks: tuple[int, ...] = (64, 128, 256)
    memory_lengths: tuple[int, ...] = (2048, 4096, 8192, 16384)
    dense_limit: int = 4096  # the dense form's T x T scores take 8 GiB and more beyond
    seed: int = 0


def band(length: int, span: int) -> Spans:
    """The intervals [p - span, p] of `length` queries over as many keys."""
    p = torch.arange(length)[None]
    return Spans((p - span).clamp(min=0), p)


class FusedBand:
    """Attention over the band [p - span, p] by torch's fused kernel alone, on blocks of queries.

    Each block meets the blocks of keys that it can reach, under a mask of the band that is made once and not timed.
    folded: all blocks in one call, as rows of its batch; else a call for each block. Called with query, key, value
    (B, H, T, D), T a multiple of `block`; gives (B, H, T, D).
    """

    def __init__(self, span: int, block: int, folded: bool):
        self.span, self.block, self.folded = span, block, folded
        self.reach = -(-span // block)  # blocks of keys before the query's own
        self.masks: dict[tuple[int, torch.device], torch.Tensor] = {}

    def mask(self, n: int, device: torch.device) -> torch.Tensor:
        """(n, 1, block, (reach + 1) block): 0 where block n's query sees the key, else -inf."""
        if (n, device) not in self.masks:
            i = torch.arange(self.block, device=device)[:, None]
            j = torch.arange(-self.reach * self.block, self.block, device=device)
            start = torch.arange(n, device=device)[:, None, None] * self.block
            hidden = (j > i) | (j < i - self.span) | (start + j < 0)
            mask = torch.zeros(hidden.shape, device=device).masked_fill_(hidden, float("-inf"))
            self.masks[n, device] = mask[:, None]
        return self.masks[n, device]

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Spans) -> torch.Tensor:
        n = query.shape[2] // self.block
        mask = self.mask(n, query.device)
        return self._in_one(query, key, value, mask) if self.folded else self._one_by_one(query, key, value, mask)

    def _in_one(self, query, key, value, mask):
        b, n, size = query.shape[0], mask.shape[0], self.block

        def windows(x):
            x = F.pad(x, (0, 0, self.reach * size, 0)).unflatten(2, (self.reach + n, size))
            x = torch.cat([x[:, :, i : i + n] for i in range(self.reach + 1)], dim=3)  # (B, H, n, keys, D)
            return x.transpose(1, 2).flatten(0, 1)  # (B n, H, keys, D)

        query = query.unflatten(2, (n, size)).transpose(1, 2).flatten(0, 1)  # (B n, H, size, D)
        out = F.scaled_dot_product_attention(query, windows(key), windows(value), attn_mask=mask.repeat(b, 1, 1, 1))
        return out.unflatten(0, (b, n)).transpose(1, 2).flatten(2, 3)

    def _one_by_one(self, query, key, value, mask):
        keys, values = key.split(self.block, dim=2), value.split(self.block, dim=2)
        outs = []
        for i, q in enumerate(query.split(self.block, dim=2)):
            near = slice(max(0, i - self.reach), i + 1)
            k, v = torch.cat(keys[near], dim=2), torch.cat(values[near], dim=2)
            outs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask[i : i + 1, :, :, -k.shape[2] :]))
        return torch.cat(outs, dim=2)


def forms(settings: AttentionSettings) -> dict[str, Callable[..., torch.Tensor]]:
    """Every form under test by name, each a function of (query, key, value, spans)."""
    found: dict[str, Callable[..., torch.Tensor]] = {
        EAGER: lambda q, k, v, spans: _output(attend(q, k, v, spans)),
        SDPA: lambda q, k, v, spans: _output(attend(q, k, v, spans, implementation="sdpa")),
    }
    for block in settings.fused_blocks:
        found[f"fused, blocks of {block} in one call"] = FusedBand(settings.span, block, folded=True)
        found[f"fused, blocks of {block} one by one"] = FusedBand(settings.span, block, folded=False)
    found[DENSE] = lambda q, k, v, spans: attend_naive(q, k, v, spans)[0]
    return found


def _output(out: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The single tensor that attend() returns without return_lse, narrowed for the type checker."""
    assert isinstance(out, torch.Tensor)
    return out


class _Case:
    """Random inputs of one length, and forward + backward of a form over them."""

    def __init__(
        self, settings: AttentionSettings, length: int, device: torch.device, dtype: torch.dtype = torch.float32
    ):
        generator = torch.Generator().manual_seed(settings.seed)
        shape = (settings.batch, settings.heads, length, settings.head_dim)
        *inputs, self.grad = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4))
        self.inputs = [x.requires_grad_() for x in inputs]
        self.spans = band(length, settings.span)

    def both_ways(self, form: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The output and the gradients of query, key and value."""
        out = form(*self.inputs, self.spans)
        return (out.detach(), *torch.autograd.grad(out, self.inputs, self.grad))


def check_equal(case: _Case, candidates: dict[str, Callable[..., torch.Tensor]]) -> float:
    """The largest absolute difference of any form's output or gradient from the dense form's.

    Raises AssertionError, naming the form, if one is not equal within rtol 1e-4 and atol 1e-5.
    """
    worst, expected = 0.0, case.both_ways(candidates[DENSE])
    for what, got, right in _found(case, {n: form for n, form in candidates.items() if n != DENSE}, expected):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5, msg=lambda text, w=what: f"{w}: {text}")
        worst = max(worst, float((got - right).abs().max()))
    return worst


def check_half(case: _Case, half: _Case, candidates: dict[str, Callable[..., torch.Tensor]]) -> float:
    """The largest relative error of an output or gradient in bfloat16, in norms, beside the dense form in float32.

    Raises AssertionError, naming the form, if one is 2 % or more.
    """
    worst, expected = 0.0, case.both_ways(candidates[DENSE])
    for what, got, right in _found(half, {n: candidates[n] for n in (EAGER, SDPA)}, expected):
        error = float((got.float() - right).norm() / right.norm())
        assert error < 0.02, f"{what}, in bfloat16: its relative error is {error:.1g}"
        worst = max(worst, error)
    return worst


def _found(
    case: _Case, candidates: dict[str, Callable[..., torch.Tensor]], expected: tuple[torch.Tensor, ...]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """The output and the gradients of each form, beside the expected ones: their name and both."""
    for name, form in candidates.items():
        for what, got, right in zip(("output", "query", "key", "value"), case.both_ways(form), expected, strict=True):
            yield f"{name}, {what}", got, right


def run(
    settings: AttentionSettings, device: torch.device, tick: Callable[[str], None] = lambda what: None
) -> dict[str, Any]:
    """Checks, times and weighs all forms; returns a JSON-able dictionary. Raises AssertionError if forms differ."""
    candidates = forms(settings)
    case, half = (_Case(settings, settings.length, device, dtype) for dtype in (torch.float32, torch.bfloat16))
    tick("comparing values and gradients")
    worst = check_equal(case, candidates)
    worst_half = check_half(case, half, candidates)
    tick("timing")
    calls = {name: functools.partial(case.both_ways, form) for name, form in candidates.items()}
    for name in (EAGER, SDPA):
        calls[f"{name}, bfloat16"] = functools.partial(half.both_ways, candidates[name])
    dense = {DENSE: calls.pop(DENSE)}  # after the others: what it allocates and frees would slow the one next to it
    times = interleaved(calls, settings.repeats, device) | interleaved(dense, settings.dense_repeats, device)
    seconds = {name: median(values) for name, values in times.items()}
    best = min((name for name in seconds if name.startswith("fused")), key=seconds.__getitem__)
    weighed = (EAGER, SDPA, best, DENSE)
    memory: dict[str, dict[str, int]] = {name: {} for name in weighed}
    for length in settings.memory_lengths:
        tick(f"memory at {length:,} tokens")
        case = _Case(settings, length, device)
        for name in weighed:
            if name != DENSE or length <= settings.dense_limit:
                memory[name][str(length)] = peak_bytes(functools.partial(case.both_ways, candidates[name]))
    return {
        "settings": dataclasses.asdict(settings),
        "largest_difference": worst,
        "largest_error_in_bfloat16": worst_half,
        "best_fused": best,
        "milliseconds": {name: 1e3 * value for name, value in seconds.items()},
        "all_milliseconds": {name: [1e3 * x for x in values] for name, values in times.items()},
        "ratio_to_best_fused": {name: value / seconds[best] for name, value in seconds.items()},
        "peak_extra_bytes": memory,
        "eager_growth_per_doubling": _growth(memory[EAGER]),
    }


def _growth(sizes: dict[str, int]) -> list[float]:
    """Peak bytes at each length over those at the length before."""
    values = [sizes[length] for length in sorted(sizes, key=int)]
    return [b / a for a, b in zip(values, values[1:], strict=False)]


def show(result: dict[str, Any], console: Console) -> None:
    """Prints the result as tables."""
    s = result["settings"]
    times = Table(
        title=f"Forward + backward, {s['length']:,} tokens, each query sees the {s['span']} before it and itself, "
        f"{s['heads']} heads of {s['head_dim']}, batch {s['batch']}, float32 unless it says otherwise",
        caption=f"medians of {s['repeats']} repeats in turns; values and gradients equal first "
        f"(largest difference {result['largest_difference']:.1e})",
    )
    times.add_column("attention")
    times.add_column("ms", justify="right")
    times.add_column("x best fused", justify="right")
    for name, ms in sorted(result["milliseconds"].items(), key=lambda item: item[1]):
        times.add_row(name, f"{ms:.1f}", f"{result['ratio_to_best_fused'][name]:.2f}")
    console.print(times)
    memory = Table(
        title="Peak extra memory, forward + backward, bytes per token",
        caption="flat from left to right = memory grows linearly with the input",
    )
    memory.add_column("attention")
    lengths = [str(length) for length in s["memory_lengths"]]
    for length in lengths:
        memory.add_column(f"{int(length):,}", justify="right")
    for name, sizes in result["peak_extra_bytes"].items():
        memory.add_row(name, *(f"{sizes[n] / int(n):,.0f}" if n in sizes else "-" for n in lengths))
    console.print(memory)
