"""The gallery on a GPU: `python -m eval gpu`, or `python -m eval.gpu` where torch, triton and transformers alone are.

First every kernel is compared with the plain definition on the device, and torch's FlashAttention as the gallery calls
it; then attention, forward and backward, is timed beside torch's FlashAttention and flex_attention, and the windows of
flash-linear-attention if that is installed; then a training step of every architecture at the size of GPT-2 small, by
what is chosen for it, by the gallery's own kernels, and by the tiles; then reading a text of up
to 262,144 tokens, and decoding behind it as one graph. What was found is written after each part, so that a run that
is cut off keeps it.

Rates count visible pairs only: 4 D operations a pair and head in the forward, 10 D in the backward; a relative term
adds 2 D and 4 D. `--dry` tries the whole script on a CPU, in Triton's interpreter and tiny sizes.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import importlib.util
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if "--dry" in sys.argv and __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_gallery.files import write_json
from hf_gallery.models.attention import Position, attend, attend_naive, attend_parts, flash_is_right
from hf_gallery.models.attention_flash import attend_flash, lacks
from hf_gallery.models.attention_problem import Problem
from hf_gallery.models.spans import Spans

from . import kernels

# Dense products of half types, operations per second by the makers; of two names that fit the first.
PEAK = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}
ATTENDED, TRAINED = 0.4, 0.7  # of the budget: no further attention, no further training step begins
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class GpuSettings:
    """lengths: of attention; tokens: of all rows of a length together. contexts: tokens read before decode_tokens
    are decoded. memory_size: of the kNN memory there. implementations: of training steps. budget: seconds after which
    no further measurement begins. workers: processes that compare kernels, most of whose time is compilation."""

    heads: int = 12
    head_dim: int = 64
    window: int = 512
    lengths: tuple[int, ...] = (2048, 4096, 16384, 65536, 131072)
    tokens: int = 32768
    repeats: int = 10
    flex: bool = True
    hidden: int = 768
    layers: int = 12
    vocabulary: int = 50304
    train_length: int = 4096
    train_batch: int = 8
    train_steps: int = 5
    contexts: tuple[int, ...] = (1024, 32768, 131072, 262144)
    decode_tokens: int = 64
    memory_size: int = 262144
    implementations: tuple[str, ...] = ("eager", "triton", "tiles")
    budget: float = 1500.0
    workers: int = 12
    dry: bool = False


QUICK = GpuSettings(
    lengths=(4096, 16384), repeats=5, train_batch=4, train_steps=3, contexts=(1024, 131072),
    implementations=("eager", "triton"), budget=200.0,
)  # fmt: skip
DRY = GpuSettings(
    heads=1, head_dim=16, window=24, lengths=(48,), tokens=48, repeats=1, hidden=32, layers=2, vocabulary=300,
    train_length=48, train_batch=1, train_steps=1, contexts=(40,), decode_tokens=2, memory_size=64, workers=1,
    dry=True,
)  # fmt: skip


def run(settings: GpuSettings, say: Say = print, keep: Callable[[dict], None] = lambda found: None) -> dict[str, Any]:
    """Measures everything; `keep` is given what was found after each part. A part that fails leaves its error."""
    start = time.perf_counter()
    found: dict[str, Any] = {"settings": dataclasses.asdict(settings), "machine": machine()}

    def clock() -> float:
        return time.perf_counter() - start

    parts = dict(correctness=correctness, attention=attention, training=training, decoding=decoding)
    for name, part in parts.items():
        say(f"[{clock():5.0f} s] {name}")
        try:
            found[name] = part(settings, clock, lambda text: say(f"[{clock():5.0f} s]   {text}"))
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"[:2000]}
            say(f"[{clock():5.0f} s] {name} failed: {found[name]['error']}")
        found["seconds"] = round(clock(), 1)
        keep(found)
    return found


def machine() -> dict[str, Any]:
    """The card, and versions of what the numbers depend on."""
    import triton

    here: dict[str, Any] = {"torch": torch.__version__, "triton": triton.__version__, "python": sys.version.split()[0]}
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        here |= {
            "card": card.name,
            "memory_gib": round(card.total_memory / 2**30, 1),
            "capability": f"{card.major}.{card.minor}",
            "cuda": torch.version.cuda,
        }
    return here


# --------------------------------------------------------------------------------------------------- correctness


def correctness(settings: GpuSettings, clock: Callable[[], float], say: Say) -> dict[str, Any]:
    """The relative errors of every case, against float64 on the device, and whether all are within their limits."""
    names = ["window", "relative, any intervals"] if settings.dry else kernels.all_names()
    found: dict[str, Any] = {}
    if settings.workers == 1:
        found = {name: _case(name) for name in names}
    else:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(settings.workers, mp_context=context) as pool:
            asked = {pool.submit(_case, name): name for name in names}
            for done in concurrent.futures.as_completed(asked):
                found[asked[done]] = done.result()
    reason = lacks(_device())
    if reason is None:
        found |= {name: _flash_case(name) for name in FLASH}
        names = [*names, *FLASH]
        say(f"FlashAttention is {'chosen' if flash_is_right(_device()) else 'not chosen'} where it serves")
    else:
        say(f"FlashAttention {reason}")
    right = {name: _within(name, errors) for name, errors in found.items()}
    for name in names:
        if not right[name]:
            say(f"WRONG {name}: {found[name]}")
    say(f"{sum(right.values())} of {len(right)} cases are right")
    said = {name: {of: x if _is_finite(x) else str(x) for of, x in errors.items()} for name, errors in found.items()}
    return {"all_right": all(right.values()), "wrong": [n for n in names if not right[n]], "errors": said}


def _case(name: str) -> dict[str, Any]:
    try:
        return dict(kernels.measure([name])[name])
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[-1500:]}


def _is_finite(x: Any) -> bool:
    return isinstance(x, float) and math.isfinite(x)


def _within(name: str, errors: dict[str, Any]) -> bool:
    limit = kernels.LIMITS[torch.bfloat16] if name in FLASH else kernels.limit(name)
    return all(_is_finite(x) and x < limit for x in errors.values())


# Of torch's FlashAttention: the whole interval of query p, and the parts that it is computed in. Two rows of 517, the
# second of them 400 long; segments of 100, a memory of 60.
FLASH: dict[str, tuple[Callable[..., Any], ...]] = {
    "flash, causal": (lambda p: (0 * p, p),),
    "flash, window": (lambda p: (p - 200, p),),
    "flash, both sides": (lambda p: (p - 90, p + 90),),
    "flash, before the query": (lambda p: (p - 200, p - 1),),
    "flash, segments": (lambda p: (p - p % 100 - 60, p),),
    "flash, segments in two parts": (
        lambda p: (p - p % 100 - 60, p),
        lambda p: (p - p % 100, p),
        lambda p: (p - p % 100 - 60, p - p % 100 - 1),
    ),
}


def _flash_case(name: str) -> dict[str, Any]:
    """Errors of out and lse, of the gradients of out alone, and of those of lse too."""
    lengths, device = torch.tensor([[517], [400]]), _device()
    p = torch.arange(517).expand(2, -1)

    def spans(ends: Callable[..., Any]) -> Spans:
        lower, upper = ends(p)
        lower, upper = lower.clamp(min=0), torch.minimum(upper, lengths - 1)
        return Spans(lower, torch.where(p < lengths, upper, lower - 1))

    try:
        whole, *parts = map(spans, FLASH[name])
        generator = torch.Generator().manual_seed(3)
        x = [torch.randn(2, 4, 517, d, generator=generator).to(device, torch.bfloat16) for d in (80, 80, 64)]
        exact = [y.double().requires_grad_() for y in x]
        query, key, value = (y.requires_grad_() for y in x)
        results = attend_flash(*(Problem(query, key, value, part, None, 80**-0.5) for part in parts or [whole]))
        expected = attend_naive(exact[0], exact[1], exact[2], whole)[:2]
        errors: dict[str, Any] = {}
        grads: dict[str, list[Any]] = {}
        for leaves, (out, lse) in ((x, results), (exact, expected)):
            weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
            seen = lse.masked_fill(lse == -math.inf, 0.0)
            totals = {"out": (out * weight).double().sum()}
            totals["both"] = totals["out"] + (seen * weight.double().sum(-1)).sum()
            grads.setdefault("out", []).append([out, seen])
            for way, total in totals.items():
                found = torch.autograd.grad(total, leaves, retain_graph=True)
                grads.setdefault(f"gradients of {way}", []).append(found)
        for way, (got, right) in grads.items():
            pairs = zip(got, right, strict=True)
            errors[way] = max(((y.double() - z).norm() / z.norm()).item() for y, z in pairs)
        if not torch.equal(results[1] == -math.inf, expected[1] == -math.inf):
            errors["out"] = math.inf
        return errors
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[-1500:]}


# ----------------------------------------------------------------------------------------------------- attention


def attention(settings: GpuSettings, clock: Callable[[], float], say: Say) -> list[dict[str, Any]]:
    """Milliseconds, rates and peak memory of each kind of attention by each implementation, at each length."""
    found: list[dict[str, Any]] = []
    for length in settings.lengths:
        for name, form in forms(settings, length).items():
            if clock() > ATTENDED * settings.budget:
                say(f"no time is left for {name} at {length:,}")
                continue
            entry = {"length": length, "rows": _rows(settings, length), "form": name} | _timed(settings, length, form)
            say(f"{length:6d} {name:38s} {_words(entry)}")
            found.append(entry)
    yardsticks: dict[Any, dict[str, Any]] = {(e["length"], e["form"]): e for e in found}
    for entry in found:
        best = yardsticks.get((entry["length"], "flash, window")) or {}
        if "forward_tflops" not in best:
            best = yardsticks.get((entry["length"], "flash, causal")) or {}
        for way in ("forward_tflops", "both_tflops"):
            if best.get(way) and entry.get(way):
                entry[f"{way}_of_flash"] = round(entry[way] / best[way], 3)
    return found


@dataclasses.dataclass(frozen=True)
class Form:
    """One way to compute one kind of attention. leaves: makes its tensors; call: of them, the output."""

    leaves: Callable[[], list[torch.Tensor]]
    call: Callable[..., torch.Tensor]
    pairs: int  # visible, of all rows and heads
    relative: bool = False


def forms(settings: GpuSettings, length: int) -> dict[str, Form]:
    """Every implementation under test by name."""
    b, h, d, w = _rows(settings, length), settings.heads, settings.head_dim, settings.window
    device, kind = _device(), torch.float32 if settings.dry else torch.bfloat16
    at = torch.arange(length)
    window = Spans((at - w + 1).clamp(min=0)[None], at[None])
    segment = Spans((at - at % w - w).clamp(min=0)[None], at[None])  # a segment of w, and a memory of w
    causal = b * h * length * (length + 1) // 2

    def pairs(spans: Spans) -> int:
        return b * h * int((spans.upper - spans.lower + 1).sum())

    def normal(*size: int, dtype: torch.dtype = kind) -> torch.Tensor:
        return torch.randn(*size, device=device, dtype=dtype)

    def qkv() -> list[torch.Tensor]:
        return [normal(b, length, h, d).transpose(1, 2) for _ in range(3)]

    def with_bias() -> list[torch.Tensor]:
        return [*qkv(), normal(h, w, dtype=torch.float32)]

    def with_relative() -> list[torch.Tensor]:
        return [*qkv(), normal(h, 2 * w, d), normal(b, length, h, d).transpose(1, 2)]

    def ours(spans: Spans, far: int = 0) -> Callable[..., torch.Tensor]:
        def call(q, k, v, table=None, asked=None):
            position = None if table is None else Position(table, far, asked)
            return attend(q, k, v, spans, position=position, implementation="triton")

        return call

    def by_flash(*parts: Spans) -> Callable[..., torch.Tensor]:
        def call(q, k, v):
            if len(parts) == 1:
                return attend(q, k, v, parts[0], implementation="flash")
            return attend_parts(q, [(k, v, part, None) for part in parts], implementation="flash")

        return call

    own, before = Spans((at - at % w)[None], at[None]), Spans(segment.lower, (at - at % w - 1)[None])
    found = {
        "flash, causal": Form(qkv, _flash_causal, causal),
        "flash, window": Form(qkv, _flash_window(length, b, w), pairs(window)),
        "ours, window": Form(qkv, ours(window), pairs(window)),
        "ours, segment": Form(qkv, ours(segment), pairs(segment)),
        "ours, window and bias": Form(with_bias, ours(window, w - 1), pairs(window)),
        "ours, segment and relative term": Form(with_relative, ours(segment, 2 * w - 1), pairs(segment), True),
    }
    if not settings.dry:
        found |= {
            "by flash, window": Form(qkv, by_flash(window), pairs(window)),
            "by flash, segment": Form(qkv, by_flash(segment), pairs(segment)),
            "by flash, segment in two parts": Form(qkv, by_flash(own, before), pairs(segment)),
        }
    if settings.flex and not settings.dry and length == settings.lengths[0]:
        found |= {
            "flex, window": Form(qkv, _flex(length, w), pairs(window)),
            "flex, window and bias": Form(with_bias, _flex(length, w), pairs(window)),
        }
    if importlib.util.find_spec("fla") is not None and not settings.dry:
        found["fla, window"] = Form(qkv, _fla(w), pairs(window))
    return found


def _flash_causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # on some cards torch prefers cuDNN's
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _flash_window(length: int, rows: int, window: int) -> Callable[..., torch.Tensor]:
    """torch's FlashAttention with a window, on rows laid one behind another."""

    def call(q, k, v):
        from torch.nn.attention.varlen import varlen_attn

        ends = torch.arange(0, (rows + 1) * length, length, device=q.device, dtype=torch.int32)
        flat = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B T, H, D)
        out = varlen_attn(*flat, ends, ends, length, length, window_size=(window - 1, 0))
        return out.unflatten(0, (rows, length)).transpose(1, 2)

    return call


def _flex(length: int, window: int) -> Callable[..., torch.Tensor]:
    """torch's flex_attention on the window, compiled; with a table, a bias by distance."""
    made: list[Any] = []

    def call(q, k, v, table=None):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        if not made:
            made.append(torch.compile(flex_attention, dynamic=False))
            made.append(
                create_block_mask(
                    lambda b, h, i, j: (j <= i) & (j > i - window), None, None, length, length, device=q.device
                )
            )
        score = None
        if table is not None:

            def score(s, b, h, i, j):
                return s + table[h, (window - 1 - i + j).clamp(0, window - 1)]

        return made[0](q, k, v, score_mod=score, block_mask=made[1])

    return call


def _fla(window: int) -> Callable[..., torch.Tensor]:
    """The window of flash-linear-attention, a query's own key among its `window`."""

    def call(q, k, v):
        from fla.ops.attn.parallel import parallel_attn

        return parallel_attn(*(x.transpose(1, 2) for x in (q, k, v)), window_size=window).transpose(1, 2)

    return call


def _timed(settings: GpuSettings, length: int, form: Form) -> dict[str, Any]:
    try:
        x = [y.detach().requires_grad_() for y in form.leaves()]
        with torch.no_grad():
            forward = milliseconds(lambda: form.call(*x), settings.repeats, of_device=True)
        grad = torch.randn_like(form.call(*x))
        both = milliseconds(lambda: torch.autograd.grad(form.call(*x), x, grad), settings.repeats, of_device=True)
        peak = 0.0
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            torch.autograd.grad(form.call(*x), x, grad)
            peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[-1000:]}
    d = settings.head_dim
    ahead, all_ = 4 * d + 2 * d * form.relative, 14 * d + 6 * d * form.relative
    return {
        "forward_ms": round(forward, 4),
        "both_ms": round(both, 4),
        "forward_tflops": round(form.pairs * ahead / forward / 1e9, 1),
        "both_tflops": round(form.pairs * all_ / both / 1e9, 1),
        "peak_extra_gib": round(peak, 3),
    }


def _words(entry: dict[str, Any]) -> str:
    if "error" in entry:
        return f"FAILED {entry['error'][:200]}"
    return (
        f"forward {entry['forward_ms']:8.3f} ms {entry['forward_tflops']:6.1f} TF/s, with backward "
        f"{entry['both_ms']:8.3f} ms {entry['both_tflops']:6.1f} TF/s, peak {entry['peak_extra_gib']:.2f} GiB"
    )


def milliseconds(function: Callable[[], object], repeats: int, of_device: bool = False) -> float:
    """The median of a few calls, by events on the device; by the clock where there is none. of_device: without the
    time that the host takes to launch, for which the device is kept busy first."""
    for _ in range(min(2, repeats)):
        function()
    times = []
    for _ in range(repeats):
        if torch.cuda.is_available():
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if of_device:
                torch.cuda._sleep(BUSY)
            before.record()
            function()
            after.record()
            torch.cuda.synchronize()
            times.append(before.elapsed_time(after))
        else:
            start = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


BUSY = 10**7  # cycles of a device, some milliseconds


def _rows(settings: GpuSettings, length: int) -> int:
    return max(1, settings.tokens // length)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and not kernels.attention_triton.INTERPRETED else "cpu")


# ------------------------------------------------------------------------------------------------------ training


def training(settings: GpuSettings, clock: Callable[[], float], say: Say) -> list[dict[str, Any]]:
    """Tokens/s, share of the card's peak and peak memory of a step of every architecture: forward, backward and
    AdamW, bfloat16 by autocast."""
    sizes = _sizes(settings, settings.train_length, 4 * settings.train_length)
    found = []
    for implementation in settings.implementations:
        for name, contestant in _models().items():
            if clock() > TRAINED * settings.budget:
                say(f"no time is left for {name} by {implementation}")
                continue

            def step(contestant=contestant, implementation=implementation) -> dict[str, Any]:
                with _device():
                    model = contestant.model._from_config(contestant.config(sizes), attn_implementation=implementation)
                return _step(model, settings)

            about = {"variant": name, "implementation": implementation}
            found.append(_measured(about, f"{name:30s} {implementation:7s}", step, _trained, say))
    return found


def _trained(entry: dict[str, Any]) -> str:
    return (
        f"{entry['tokens_per_second']:12,.0f} tokens/s, {100 * entry.get('mfu', 0.0):5.1f} % of peak, "
        f"{entry['peak_gib']:6.1f} GiB"
    )


def _measured(
    about: dict[str, Any],
    label: str,
    measure: Callable[[], dict[str, Any]],
    words: Callable[[dict[str, Any]], str],
    say: Say,
) -> dict[str, Any]:
    """`about` with what was measured, or with the error that came instead; says which."""
    try:
        entry = about | measure()
        say(f"{label} {words(entry)}")
    except Exception as error:
        entry = about | {"error": f"{type(error).__name__}: {error}"[-1500:]}
        say(f"{label} FAILED {entry['error'][-300:]}")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return entry


def _models() -> dict[str, Any]:
    """Contestants to time: of two of one architecture the one that does more, which is the harder one."""
    from .contestants import CONTESTANTS

    return {name: x for name, x in CONTESTANTS.items() if name != "transformer" and not x.smaller_of}


def _sizes(settings: GpuSettings, context: int, memory_size: int) -> Any:
    from .contestants import Sizes

    return Sizes(
        hidden=settings.hidden, layers=settings.layers, heads=settings.heads, window=settings.window, context=context,
        intermediate=4 * settings.hidden, memory_size=memory_size, memory_topk=32,
        memory_layers=(settings.layers - 1,), states=settings.window, recurrent_layers=(settings.layers - 1,),
        vocabulary=settings.vocabulary,
    )  # fmt: skip


def _keys_seen(config: Any, length: int) -> float:
    """Keys that a query of a model attends to, on average over a text: of its window or segment, and those carried on.
    What a few layers see besides is left out: retrieved pairs, a state."""
    own = torch.arange(1, length + 1)  # tokens up to each
    if (window := getattr(config, "attention_window", None) or getattr(config, "block_length", None)) is not None:
        return float(own.clamp(max=window).float().mean())
    segment = own - (own - 1) // config.segment_length * config.segment_length
    before = (own - segment).clamp(max=getattr(config, "mem_len", 0))
    return float((segment + before).float().mean()) + getattr(config, "num_memory_tokens", 0)


def _step(model: Any, settings: GpuSettings) -> dict[str, Any]:
    device, b, t = _device(), settings.train_batch, settings.train_length
    torch.manual_seed(0)
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")
    ids = torch.randint(settings.vocabulary, (b, t), device=device)

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=not settings.dry):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    first = time.perf_counter() - start
    # The tiles take seconds a step: one more tells enough.
    took = milliseconds(step, 1 if first > 5.0 else settings.train_steps) / 1e3
    parameters = sum(x.numel() for x in model.parameters())
    keys = _keys_seen(model.config, t)
    operations = b * t * (6 * parameters + 12 * settings.layers * settings.hidden * keys)
    entry: dict[str, Any] = {
        "parameters": parameters,
        "tokens_per_second": round(b * t / took, 1),
        "step_ms": round(1e3 * took, 2),
        "first_step_s": round(first, 2),
        "peak_gib": 0.0,
    }
    if device.type == "cuda":
        entry["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        peak = next((x for name, x in PEAK.items() if name in torch.cuda.get_device_name()), math.inf)
        entry["mfu"] = round(operations / took / peak, 4)
    return entry


# ------------------------------------------------------------------------------------------------------ decoding


def decoding(settings: GpuSettings, clock: Callable[[], float], say: Say) -> list[dict[str, Any]]:
    """Tokens/s of reading a text of each length, and of decoding one row behind it with a static cache, whose step is
    one graph (torch.compile, mode="reduce-overhead"), in bfloat16."""
    longest = max(settings.contexts)
    sizes = _sizes(settings, longest + 2 * settings.decode_tokens, settings.memory_size)
    found = []
    for name, contestant in _models().items():
        made = functools.cache(functools.partial(_decoder, contestant, sizes, settings))
        for context in settings.contexts:
            if clock() > settings.budget:
                say(f"no time is left for {name} behind {context:,} tokens")
                continue

            def decode(made=made, context=context) -> dict[str, Any]:
                model, step = made()
                return _decoded(model, step, context, settings)

            about = {"variant": name, "context": context}
            found.append(_measured(about, f"{name:30s} behind {context:7,d}:", decode, _told, say))
    return found


def _told(entry: dict[str, Any]) -> str:
    read, decoded = entry["prefill_tokens_per_second"], entry["decode_tokens_per_second"]
    return f"reads {read:12,.0f} tokens/s, decodes {decoded:8,.1f}"


def _decoder(contestant: Any, sizes: Any, settings: GpuSettings) -> tuple[Any, Any]:
    """A model, and its step as one graph."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = contestant.model._from_config(contestant.config(sizes)).to(_device()).eval()
    if settings.dry:
        return model, model
    model = model.bfloat16()
    return model, torch.compile(model, mode="reduce-overhead", fullgraph=True)


@torch.no_grad()
def _decoded(model: Any, step: Any, context: int, settings: GpuSettings) -> dict[str, Any]:
    from hf_gallery import GalleryStaticCache

    device = _device()
    ids = torch.randint(settings.vocabulary, (1, context), device=device)
    cache = GalleryStaticCache(model.config, max(settings.contexts) + 2 * settings.decode_tokens)

    def read() -> None:
        cache.reset()
        model(input_ids=ids, past_key_values=cache, logits_to_keep=1)

    reading = milliseconds(read, 1 if settings.dry else 2)
    token = ids[:, :1].clone(memory_format=torch.contiguous_format)  # of strides that are the same in every context

    def decode() -> None:
        token.copy_(step(input_ids=token, past_key_values=cache).logits[:, -1:].argmax(-1))

    times = milliseconds(decode, settings.decode_tokens)
    return {
        "prefill_tokens_per_second": round(1e3 * context / reading, 1),
        "decode_ms": round(times, 4),
        "decode_tokens_per_second": round(1e3 / times, 1),
        "cache_bytes": cache.nbytes,
    }


# ---------------------------------------------------------------------------------------------------- the command


def main() -> None:
    """Runs the measurement where torch, triton and transformers alone are installed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under four minutes on an H100")
    parser.add_argument("--dry", action="store_true", help="try the script on a CPU")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu/results.json"))
    chosen = parser.parse_args()
    if not chosen.dry and not torch.cuda.is_available():
        parser.error("there is no GPU here; --dry tries the script on a CPU")
    settings = DRY if chosen.dry else QUICK if chosen.quick else GpuSettings()
    found = run(settings, lambda text: print(text, flush=True), lambda found: write_json(chosen.out, found))
    print(f"results {chosen.out}; {found['seconds']} s")


if __name__ == "__main__":
    main()
