"""Cost of each contestant by length, measured in turns, so that a slow spell of the machine slows all of them.

A cost that grows as length to the power of s is a line of slope s where both axes are logarithmic. That slope says
more than the points: 0 is constant, 1 linear, 2 quadratic.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedModel

from hf_gallery import GalleryCache
from hf_gallery.models.modeling_base import GalleryPreTrainedModel

from . import outside
from .cells import EVERYONE, Cell
from .contestants import Contestant, build
from .figures import contexts, short
from .measure import LiveBytes, interleaved, median, seconds
from .presets import CostSettings
from .significance import median_interval
from .task import Column, Family, Job, Task, plain
from .training import Tick

CHUNK = 2048  # tokens that are read at once
READINGS = 6  # of every text, each from its first token on; as many as an interval of their median needs
PRODUCT = {"cpu": 1024, "cuda": 8192}  # rows and columns of the matrices whose product says how fast the machine is


def units(settings: CostSettings, contestants: list[Contestant]) -> int:
    """Ticks of the cell."""
    of_training = sum(settings.repeats_at(length) + 1 + len(contestants) for length in settings.lengths)
    return of_training + READINGS * (sum(len(chunks) for chunks in _chunks(settings)) + len(settings.contexts))


def measure(
    contestants: list[Contestant], settings: CostSettings, seed: int, device: torch.device, tick: Tick
) -> dict[str, Any]:
    """For each contestant:

    training: by length of a step, tokens/s (median: forward and backward, no optimiser), peak bytes beyond the
        weights, floating-point operations per token, and utilisation, their share of what the machine reaches in a
        large product of matrices. training_tokens_per_second, training_peak_bytes: of the first length.
    prefill_tokens_per_second, decode_ms_per_token (medians), cache_bytes: by tokens read before.
    tokens_per_second_interval, utilisation_interval, prefill_interval, decode_interval: the 95 % intervals of medians,
        of six times or more.
    slopes: of each of these costs against length; of those with one length only, none.
    """
    models = {c.name: build(c, settings.sizes, seed) for c in contestants}
    for model in models.values():
        model.to(device)  # type: ignore[arg-type]  # transformers wraps to(), which hides its self from mypy
    speed = machine_speed(device, settings.bf16)
    found: dict[str, Any] = {
        name: {
            "parameters": model.num_parameters(),
            "machine_flops_per_second": speed,
            "training": {},
            "prefill_tokens_per_second": {},
            "prefill_interval": {},
            "decode_ms_per_token": {},
            "decode_interval": {},
            "cache_bytes": {},
        }
        for name, model in models.items()
    }
    for length in settings.lengths:
        ids = _random_bytes(settings.batch_at(length), length, seed).to(device)
        steps = {name: _training_step(model.train(), ids, settings.bf16) for name, model in models.items()}
        times = interleaved(steps, settings.repeats_at(length), device, tick=lambda: tick(1))
        for name, step in steps.items():
            second = median(times[name])
            operations, peak = _operations_and_peak(models[name], step, device)
            found[name]["training"][str(length)] = {
                "tokens_per_second": ids.numel() / second,
                "peak_bytes": peak,
                "flops_per_token": operations / ids.numel(),
                "utilisation": operations / second / speed,
            }
            if (limits := median_interval(times[name])) is not None:
                quick, slow = limits
                found[name]["training"][str(length)] |= {
                    "tokens_per_second_interval": [ids.numel() / slow, ids.numel() / quick],
                    "utilisation_interval": [operations / slow / speed, operations / quick / speed],
                }
            tick(1)
    _read(models, settings, seed, device, tick, found)
    for entry in found.values():
        first = entry["training"][str(settings.lengths[0])]
        entry["training_tokens_per_second"] = first["tokens_per_second"]
        entry["training_peak_bytes"] = first["peak_bytes"]
        entry["slopes"] = slopes(entry, settings)
    return found


def _read(
    models: Mapping[str, PreTrainedModel],
    settings: CostSettings,
    seed: int,
    device: torch.device,
    tick: Tick,
    found: dict[str, Any],
) -> None:
    """Reads a text with all models in turns, decodes after each context, and enters in `found` what that costs."""
    places = [(name, context) for name in models for context in settings.contexts]
    reading: dict[tuple[str, int], list[float]] = {place: [] for place in places}
    decoding: dict[tuple[str, int], list[float]] = {place: [] for place in places}
    for _ in range(READINGS):
        streams = {name: Stream(model.eval(), max(settings.contexts), seed, device) for name, model in models.items()}
        spent = dict.fromkeys(streams, 0.0)
        for context, chunks in zip(settings.contexts, _chunks(settings), strict=True):
            for tokens in chunks:
                for name, stream in streams.items():
                    spent[name] += seconds(lambda stream=stream, tokens=tokens: stream.read(tokens), device)
                tick(1)
            for name, stream in streams.items():
                reading[name, context].append(spent[name])
                found[name]["cache_bytes"][str(context)] = stream.cache.nbytes
            times = interleaved({n: stream.decode for n, stream in streams.items()}, settings.decode_tokens, device)
            for name in streams:
                decoding[name, context] += times[name]
            tick(1)
    for name, context in places:
        entry, read, decoded = found[name], reading[name, context], decoding[name, context]
        entry["prefill_tokens_per_second"][str(context)] = context / median(read)
        entry["decode_ms_per_token"][str(context)] = 1e3 * median(decoded)
        if (limits := median_interval(read)) is not None:
            quick, slow = limits
            entry["prefill_interval"][str(context)] = [context / slow, context / quick]
        if (limits := median_interval(decoded)) is not None:
            entry["decode_interval"][str(context)] = [1e3 * x for x in limits]


def slopes(entry: Mapping[str, Any], settings: CostSettings) -> dict[str, float]:
    """The powers of length as which a contestant's costs grow; a step's cost is taken for one row of a batch."""
    training = {int(length): x for length, x in entry["training"].items()}
    read = {int(context): x for context, x in entry["prefill_tokens_per_second"].items()}
    costs: dict[str, dict[int, float]] = {
        "training_seconds": {n: n / x["tokens_per_second"] for n, x in training.items()},
        "training_peak_bytes": {n: x["peak_bytes"] / settings.batch_at(n) for n, x in training.items()},
        "prefill_seconds": {n: n / x for n, x in read.items()},
        "decode_seconds": {int(n): x for n, x in entry["decode_ms_per_token"].items()},
        "cache_bytes": {int(n): x for n, x in entry["cache_bytes"].items()},
    }
    return {name: slope(points) for name, points in costs.items() if len(points) > 1}


def slope(points: Mapping[int, float]) -> float:
    """The line through (length, cost) on logarithmic axes, by least squares: its slope."""
    return float(np.polyfit(np.log(list(points)), np.log(list(points.values())), 1)[0])


def flops(step: Callable[[], object]) -> int:
    """Floating-point operations of a call, a multiplication and an addition each counted as one: those of matrix
    products, and of fused attention where torch knows its formula. Softmax, norms, gates, sorting and products of a
    matrix with a vector are not among them."""
    with _Operations() as counter:
        step()
    return counter.total


class _Operations(TorchDispatchMode):
    """Operations of the calls inside the block, by torch's own formulas: its FlopCounterMode without what that asks
    of modules, which takes longer than a step of many small calls."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        formula = FORMULAS.get(function._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def _added_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, **_: Any) -> int:
    """Operations of total += a @ b, of a (B, T, K) and b (B, K, S)."""
    return 2 * a.numel() * b.shape[-1]


# torch counts baddbmm but not its form in place, which is how the attention's backward adds up its gradients.
FORMULAS = {**flop_registry, torch.ops.aten.baddbmm_: _added_product}


def machine_speed(device: torch.device, bf16: bool = False, repeats: int = 15) -> float:
    """Floating-point operations per second in a product of two large matrices of float32, or bf16 (median)."""
    n = PRODUCT[device.type]
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)  # (n, n) each
    times = interleaved({"product": lambda: a @ b}, repeats, device)["product"]
    return 2 * n**3 / median(times)


def _chunks(settings: CostSettings) -> list[list[int]]:
    """For each context, how many tokens are read at a time on the way there from the one before."""
    starts = (0, *settings.contexts[:-1])
    return [
        [min(CHUNK, stop - place) for place in range(start, stop, CHUNK)]
        for start, stop in zip(starts, settings.contexts, strict=True)
    ]


def _random_bytes(rows: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))  # (rows, length)


def _training_step(model: PreTrainedModel, ids: torch.Tensor, bf16: bool = False) -> Callable[[], None]:
    def step() -> None:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        model.zero_grad()

    return step


def _operations_and_peak(model: PreTrainedModel, step: Callable[[], None], device: torch.device) -> tuple[int, int]:
    """Operations of a model's step, and bytes alive at its worst moment beyond what was there before."""
    if device.type != "cuda":
        with _Operations() as counter, LiveBytes() as live:
            step()
        return counter.total, live.peak
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    with _by_tiles(model):
        return flops(step), peak


@contextlib.contextmanager
def _by_tiles(model: PreTrainedModel) -> Iterator[None]:
    """The gallery's attention by its tiles, as on CPUs: torch knows no formula for the operations of its kernels."""
    if not isinstance(model, GalleryPreTrainedModel):
        yield
        return
    before = model.config._attn_implementation
    model.set_attn_implementation("tiles")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


class Stream:
    """A text of `length` random bytes that is read on, as far as one asks, and continued by greedy decoding."""

    def __init__(self, model: PreTrainedModel, length: int, seed: int, device: torch.device):
        self.model, self.ids, self.place = model, _random_bytes(1, length, seed).to(device), 0
        self.cache = _cache(model)

    def read(self, tokens: int) -> None:
        """Reads the next tokens of the text, in chunks."""
        for ids in self.ids[:, self.place : self.place + tokens].split(CHUNK, dim=1):
            self._forward(ids)
        self.place += tokens

    def decode(self) -> None:
        """Appends the likeliest token."""
        self._forward(self.last)

    @torch.no_grad()
    def _forward(self, ids: torch.Tensor) -> None:
        if isinstance(self.cache, outside.Reader):
            logits = self.cache.read(ids, last=True)
        else:
            logits = self.model(input_ids=ids, past_key_values=self.cache, logits_to_keep=1).logits
        self.last = logits[:, -1].argmax(-1, keepdim=True)


def _cache(model: PreTrainedModel) -> GalleryCache | outside.Reader:
    """Cache that a model reads on with. Raises ValueError for one from outside whose cache does not do that."""
    if not outside.is_foreign(model.config):
        return GalleryCache(model.config)
    going = outside.carried(model, 32)
    if going is outside.Reading.SEGMENTS:
        raise ValueError(
            f"{type(model).__name__} does not decode as it reads: with its cache it gives other logits than without, "
            "so that the costs of its cache say nothing; leave it out, or name --tasks without cost"
        )
    return outside.Reader(model, going)


# Names of `slopes`, as the tables have them.
SLOPES = {
    "training_seconds": "step",
    "training_peak_bytes": "step bytes",
    "prefill_seconds": "reading",
    "decode_seconds": "decoding",
    "cache_bytes": "cache bytes",
}
STEP = Family("A training step", "train")
GROWTH = Family("Growth with length: its power, 0 constant, 1 linear, 2 quadratic", "growth")
DECODING = Family("Decoding after a context: ms per token, KiB of cache", "decode")


class Cost(Task):
    """The task `cost`: one cell, of all contestants in turns."""

    name = "cost"
    modules = ("cost", "measure")

    def settings(self, job: Job) -> dict[str, Any]:
        return plain(job.preset.cost) | {"device": job.device.type}

    def longest(self, job: Job) -> int:
        s = job.preset.cost
        decoded = len(s.contexts) * (s.decode_tokens + 1)
        return max(*s.lengths, max(s.contexts, default=0) + decoded)

    def cells_of_all(self, job: Job, contestants: list[Contestant]) -> Iterator[Cell]:
        settings = self.settings(job) | {"contestants": [c.name for c in contestants]}
        models = {c.name: c.own for c in contestants if c.own is not None}
        if models:
            settings["models"] = models
        work = units(job.preset.cost, contestants)
        yield Cell(
            self.name,
            EVERYONE,
            0,
            settings,
            work,
            lambda tick: measure(contestants, job.preset.cost, 0, job.device, tick),
            self.code,
        )

    def add(self, results: dict[str, Any], cell: dict[str, Any]) -> None:
        for name, measured in cell["result"].items():
            results["summary"][name]["cost"] = measured

    def columns(self, results: dict[str, Any]) -> list[Column]:
        def column(family: Family, heading: str, value: Callable[[dict[str, Any]], str], **more: Any) -> Column:
            return Column(family, heading, lambda name, e: value(e["cost"]) if "cost" in e else "-", **more)

        def first(cost: dict[str, Any]) -> dict[str, float]:
            return next(iter(cost["training"].values()))

        def power(cost: dict[str, Any], name: str) -> str:
            return f"{round(cost['slopes'][name], 2) + 0.0:.2f}" if name in cost["slopes"] else "-"  # 0.00, not -0.00

        after = sorted({contexts(results)[0], contexts(results)[-1]}) if contexts(results) else []
        return [
            column(STEP, "tokens/s", lambda cost: f"{cost['training_tokens_per_second']:,.0f}"),
            column(STEP, "peak MiB", lambda cost: f"{cost['training_peak_bytes'] / 2**20:,.0f}"),
            column(STEP, "MFLOP/token", lambda cost: f"{first(cost)['flops_per_token'] / 1e6:,.1f}"),
            column(STEP, "of peak", lambda cost: f"{100 * first(cost)['utilisation']:.0f} %"),
            *(column(GROWTH, told, lambda cost, name=name: power(cost, name)) for name, told in SLOPES.items()),
            *(
                column(DECODING, f"ms, {short(c)}", lambda cost, c=c: f"{cost['decode_ms_per_token'][str(c)]:.2f}")
                for c in after
            ),
            *(
                column(
                    DECODING,
                    f"KiB, {short(c)}",
                    lambda cost, c=c: f"{cost['cache_bytes'][str(c)] / 2**10:,.0f}",
                    prefix="cache",
                )
                for c in after
            ),
        ]
