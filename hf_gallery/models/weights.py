"""Weights that a cache follows from: whether they have changed since, and whether a file's cache was made by them.

Within a process, `version_of` compares who the weights are and how often they were written. Between processes,
`sample_weights` compares a few numbers of each.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


class Version:
    """Version of what some modules compute, told without computing: see `version_of`."""

    def __init__(self, tensors: tuple, facts: tuple):
        self.tensors, self.facts = tensors, facts

    def __eq__(self, other) -> bool:
        if not isinstance(other, Version) or self.facts != other.facts or len(self.tensors) != len(other.tensors):
            return False
        # Who they are, not what they hold: references to tensors would compare by numbers.
        return all(a() is not None and a() is b() for a, b in zip(self.tensors, other.tensors, strict=True))

    __hash__ = None  # type: ignore[assignment]


@torch.compiler.disable
def version_of(modules: Iterable[nn.Module]) -> Version | None:
    """A value that stays equal while the modules compute the same; None where that cannot be known.

    It covers parameters and buffers (which they are, where they lie, torch's count of writes to them), the steps of
    all optimisers, since fused ones write without being counted, and what else the modules hold: an adapter's scale or
    switch, hooks, a replaced forward. Unknown are weights that torch does not count (made in inference mode), that are
    somewhere else (offloaded), or that are tensors of a kind of their own (quantized, sharded). What is not seen is a
    write through `.data` by hand: after one, reset the rows or take a new cache.
    """
    tensors: list[weakref.ref] = []
    facts: list[Any] = [(torch.is_autocast_enabled(x), torch.get_autocast_dtype(x)) for x in ("cpu", "cuda")]
    facts.append(_steps[0])
    for root in modules:
        for module in root.modules():
            held = [x for x in (*module._parameters.values(), *module._buffers.values()) if x is not None]
            for x in held:
                if type(x) not in (nn.Parameter, torch.Tensor) or x.is_meta or x.is_inference():
                    return None
                tensors.append(weakref.ref(x))
                facts.append((x.data_ptr(), x._version))
            facts.append(type(module))
            if not _is_plain(module):
                facts.append(
                    _comparable({name: x for name, x in vars(module).items() if name not in _COUNTED}, tensors)
                )
    return Version(tuple(tensors), tuple(facts))


_steps = [0]  # of any optimiser in this process


def _count_step(*_):
    _steps[0] += 1


register_optimizer_step_pre_hook(_count_step)
register_optimizer_step_post_hook(_count_step)

_COUNTED = {"_parameters", "_buffers", "_modules"}


def _is_plain(module: nn.Module) -> bool:
    """Whether it is torch's own, with nothing attached: then its weights alone decide, dropout aside."""
    own = type(module).__module__.startswith("torch.nn.modules")
    return own and not module._forward_hooks and not module._forward_pre_hooks and "forward" not in vars(module)


def _comparable(x: Any, tensors: list) -> Any:
    """x by value where it is plain, else by who it is."""
    if x is None or isinstance(x, (bool, int, float, str)):
        return x
    if isinstance(x, (list, tuple)):
        return tuple(_comparable(y, tensors) for y in x)
    if isinstance(x, dict):
        return tuple((key, _comparable(y, tensors)) for key, y in x.items())
    if isinstance(x, torch.Tensor):
        tensors.append(weakref.ref(x))
        return x.data_ptr(), None if x.is_inference() else x._version
    return id(x)


@dataclass
class WeightSample:
    """A few numbers of each weight. names: of the weights; types: of their numbers; numbers (weights, 16) float32."""

    names: list[str]
    types: list[str]
    numbers: torch.Tensor

    def difference(self, other: WeightSample) -> str | None:
        """The first weight by which two models differ; None if none is found.

        The same weights in another floating type are the same; weights that could not be read (offloaded ones) are
        left out.
        """
        for name, twin in zip(self.names, other.names, strict=False):
            if name != twin:
                return min(name, twin)
        if len(self.names) != len(other.names):
            return max(self.names, other.names, key=len)[min(len(self.names), len(other.names))]
        for i, name in enumerate(self.names):
            a, b = self.numbers[i], other.numbers[i]
            if UNREAD in (self.types[i], other.types[i]):
                continue
            if self.types[i] == other.types[i]:
                same = torch.equal(a.nan_to_num(), b.nan_to_num())
            else:
                coarse = max(_EPSILON.get(self.types[i], 1.0), _EPSILON.get(other.types[i], 1.0))
                same = torch.allclose(a, b, rtol=coarse, atol=1e-7, equal_nan=True)
            if not same:
                return name
        return None


NUMBERS, UNREAD = 16, "unread"
_EPSILON = {str(t): torch.finfo(t).eps for t in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}


@torch.no_grad()
def sample_weights(model: nn.Module) -> WeightSample:
    """Numbers of all weights that decide what the model computes: adapters that are switched off do not.

    Of a table of embeddings only the first row counts, so that a vocabulary may grow.
    """
    names, types, numbers = [], [], []
    for prefix, module in _deciding(model):
        for name, x in module._parameters.items():
            if x is None:
                continue
            names.append(f"{prefix}.{name}".lstrip("."))
            x = x.detach()
            if type(x) is not torch.Tensor and hasattr(x, "dequantize"):
                x = x.dequantize()
            types.append(UNREAD if x.is_meta or not x.numel() else str(x.dtype))
            if types[-1] == UNREAD:
                numbers.append(torch.full((NUMBERS,), torch.nan))
                continue
            x = (x[0] if isinstance(module, nn.Embedding) else x).reshape(-1)
            at = torch.linspace(0, len(x) - 1, NUMBERS, dtype=torch.float64).long().to(x.device)
            numbers.append(x[at].float())
    by_device: dict[torch.device, list[int]] = {}
    for i, x in enumerate(numbers):
        by_device.setdefault(x.device, []).append(i)
    result = torch.empty(len(numbers), NUMBERS)
    for places in by_device.values():  # one wait for each device, not one for each weight
        result[places] = torch.stack([numbers[i] for i in places]).cpu()
    return WeightSample(names, types, result)


def _deciding(module: nn.Module, prefix: str = ""):
    """The modules in it with their names, in which an adapter that is off leaves no trace."""
    if hasattr(module, "base_layer") and (getattr(module, "disable_adapters", False) or not module.active_adapters):
        yield from _deciding(module.base_layer, prefix)
        return
    yield prefix, module
    for name, child in module.named_children():
        yield from _deciding(child, f"{prefix}.{name}".lstrip("."))
