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

from .exporting import outside_graphs


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


@outside_graphs
def version_of(parts: Iterable[nn.Module | nn.Parameter]) -> Version | None:
    """A value that stays equal while modules compute the same, and parameters are the same; None where that cannot be
    told.

    It covers parameters and buffers (which they are, where they lie, torch's count of writes to them), the steps of
    all optimisers, since fused ones write without being counted, and what else the modules hold: an adapter's scale or
    switch, hooks, a replaced forward. Unknown are weights that torch does not count (made in inference mode), that are
    somewhere else (offloaded, or gathered for a forward and given back), or that are tensors of a kind of their own
    (quantized, sharded). What is not seen is a write through `.data` by hand: after one, reset the rows or take a new
    cache.
    """
    tensors: list[weakref.ref] = []
    facts: list[Any] = [(torch.is_autocast_enabled(x), torch.get_autocast_dtype(x)) for x in ("cpu", "cuda")]
    facts.append(_steps[0])
    waiting: list[Any] = []
    weights: list[Any] = []
    for part in parts:
        (waiting if isinstance(part, nn.Module) else weights).append(part)
    while waiting:
        module = waiting.pop()
        waiting.extend(module._modules.values())
        weights += (*module._parameters.values(), *module._buffers.values())
        facts.append(type(module))
        if not _is_plain(module):
            facts.append(_comparable({name: x for name, x in vars(module).items() if name not in _COUNTED}, tensors))
    for x in weights:
        if x is None:
            continue
        if type(x) not in (nn.Parameter, torch.Tensor) or x.is_meta or x.is_inference() or not x.numel():
            return None
        tensors.append(weakref.ref(x))
        facts.append((x.data_ptr(), x._version))
    return Version(tuple(tensors), tuple(facts))


_steps = [0]  # of any optimiser in this process


def _count_step(*_):
    _steps[0] += 1


register_optimizer_step_pre_hook(_count_step)
register_optimizer_step_post_hook(_count_step)

_COUNTED = {"_parameters", "_buffers", "_modules"}


def _is_plain(module: nn.Module) -> bool:
    """Tells whether it is torch's own, with nothing attached: then its weights alone decide, dropout aside."""
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
        left out, and so are rows of a table that one of the two does not have.
        """
        places = {name: i for i, name in enumerate(other.names)}
        for name in (*self.names, *other.names):
            if _whole(name) == name and (name in places) != (name in self.names):
                return name
        for i, name in enumerate(self.names):
            k = places.get(name)
            if k is None or UNREAD in (self.types[i], other.types[k]):
                continue
            a, b = self.numbers[i], other.numbers[k]
            if self.types[i] != other.types[k]:
                coarse = max(_EPSILON.get(self.types[i], 1.0), _EPSILON.get(other.types[k], 1.0))
                same = _whole(name) != name or torch.allclose(a, b, rtol=coarse, atol=1e-7, equal_nan=True)
            elif _whole(name) != name:  # sums, which another device may add up in another order
                same = torch.allclose(a, b, rtol=1e-6, atol=1e-7, equal_nan=True)
            else:
                same = torch.equal(a.nan_to_num(), b.nan_to_num())
            if not same:
                return _whole(name)
        return None


NUMBERS, UNREAD = 16, "unread"
_GOLDEN = (5**0.5 - 1) / 2  # its multiples, taken modulo 1, keep far apart
_EPSILON = {str(t): torch.finfo(t).eps for t in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}


@torch.no_grad()
def sample_weights(model: nn.Module) -> WeightSample:
    """Numbers of all weights that decide what the model computes: adapters that are switched off do not.

    Of a table of embeddings, which may have been trained in any of its rows, the first row's, and sums over the rows
    1, 2 and 3, 4 to 7, and so on, under names like "embed_tokens.weight[4:8]": a vocabulary that grows keeps them.
    """
    names: list[str] = []
    types: list[str] = []
    numbers: list[torch.Tensor] = []

    def add(name: str, kind: str, x: torch.Tensor):
        names.append(name)
        types.append(kind)
        numbers.append(x)

    for prefix, module in _deciding(model):
        for own, x in module._parameters.items():
            if x is None:
                continue
            name = f"{prefix}.{own}".lstrip(".")
            x = x.detach()
            if type(x) is not torch.Tensor and hasattr(x, "dequantize"):
                x = x.dequantize()
            if x.is_meta or not x.numel():
                add(name, UNREAD, torch.full((NUMBERS,), torch.nan))
                continue
            kind = str(x.dtype)
            is_table = isinstance(module, nn.Embedding)
            first = (x[0] if is_table else x).reshape(-1)
            add(name, kind, first[_spread(len(first)).to(x.device)].float())
            if is_table and x.dim() == 2:
                columns = x[:, _spread(x.shape[1]).to(x.device)].cpu().double()
                for start, end in _doubling(len(x)):
                    # Rows that change places count too, and none so much more than others that those would drown.
                    share = 1 + torch.arange(end - start, dtype=torch.float64) * _GOLDEN % 1
                    add(f"{name}[{start}:{end}]", kind, (columns[start:end] * share[:, None]).sum(0).float())
    by_device: dict[torch.device, list[int]] = {}
    for i, x in enumerate(numbers):
        by_device.setdefault(x.device, []).append(i)
    result = torch.empty(len(numbers), NUMBERS)
    for places in by_device.values():  # one wait for each device, not one for each weight
        result[places] = torch.stack([numbers[i] for i in places]).cpu()
    return WeightSample(names, types, result)


def _spread(count: int) -> torch.Tensor:
    """NUMBERS places of [0, count), from the first to the last."""
    return torch.linspace(0, count - 1, NUMBERS, dtype=torch.float64).long()


def _doubling(rows: int):
    """Borders of the rows 1; 2 and 3; 4 to 7; and so on, the last ones as many as are left."""
    start = 1
    while start < rows:
        yield start, min(2 * start, rows)
        start *= 2


def _whole(name: str) -> str:
    """The name of the weight that a sample's name is of."""
    return name.split("[")[0]


def _deciding(module: nn.Module, prefix: str = ""):
    """The modules in it with their names, in which an adapter that is off leaves no trace."""
    if hasattr(module, "base_layer") and (getattr(module, "disable_adapters", False) or not module.active_adapters):
        yield from _deciding(module.base_layer, prefix)
        return
    yield prefix, module
    for name, child in module.named_children():
        yield from _deciding(child, f"{prefix}.{name}".lstrip("."))
