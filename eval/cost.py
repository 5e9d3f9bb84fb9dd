"""What each contestant costs: all of them in turns, so that what slows the machine for a while slows all alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from .contestants import Contestant, build
from .measure import interleaved, median, peak_bytes
from .presets import CostSettings
from .training import Tick


def units(settings: CostSettings, contestants: list[Contestant]) -> int:
    """Ticks of the cell."""
    return settings.repeats + 1 + len(contestants) * (1 + len(settings.contexts)) + len(settings.contexts)


def measure(
    contestants: list[Contestant], settings: CostSettings, seed: int, device: torch.device, tick: Tick
) -> dict[str, Any]:
    """For each contestant: training tokens/s (median step: forward, backward, no optimiser), peak bytes of a training
    step beyond the weights, and after each context ms per decoded token (median) and bytes of the cache."""
    models = {c.name: build(c, settings.sizes, seed) for c in contestants}
    for model in models.values():
        model.to(device)  # type: ignore[arg-type]  # transformers wraps to(), which hides its self from mypy
    ids = torch.randint(0, 256, (settings.batch, settings.length), generator=torch.Generator().manual_seed(seed))
    ids = ids.to(device)
    steps = {name: _training_step(model.train(), ids) for name, model in models.items()}
    seconds = interleaved(steps, settings.repeats, device, tick=lambda: tick(1))
    found: dict[str, Any] = {}
    for name, step in steps.items():
        found[name] = {
            "parameters": models[name].num_parameters(),
            "training_tokens_per_second": ids.numel() / median(seconds[name]),
            "training_peak_bytes": _peak(step, device),
            "decode_ms_per_token": {},
            "cache_bytes": {},
        }
        tick(1)
    for context in settings.contexts:
        streams = {}
        for name, model in models.items():
            streams[name] = Stream(model.eval(), context, seed, device)
            found[name]["cache_bytes"][str(context)] = streams[name].cache.nbytes
            tick(1)
        times = interleaved(dict(streams), settings.decode_tokens, device)
        for name, values in times.items():
            found[name]["decode_ms_per_token"][str(context)] = 1e3 * median(values)
        tick(1)
    return found


def _training_step(model: PreTrainedModel, ids: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()

    return step


def _peak(step: Callable[[], None], device: torch.device) -> int:
    """Bytes alive at the worst moment of a step beyond what was there before."""
    if device.type != "cuda":
        return peak_bytes(step)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


class Stream:
    """One text that is read (`context` random bytes, in chunks) and then continued: each call decodes a token."""

    def __init__(self, model: PreTrainedModel, context: int, seed: int, device: torch.device, chunk: int = 2048):
        self.model = model
        ids = torch.randint(0, 256, (1, context), generator=torch.Generator().manual_seed(seed)).to(device)
        self.cache: Any = None
        for part in ids.split(chunk, dim=1):
            self._read(part)

    @torch.no_grad()
    def _read(self, ids: torch.Tensor) -> None:
        output = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache, self.last = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)

    def __call__(self) -> None:
        self._read(self.last)
