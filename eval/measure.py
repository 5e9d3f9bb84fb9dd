"""Clocks and counters: times side by side, bytes alive."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

Name = TypeVar("Name", bound=Hashable)


def synchronize(device: torch.device) -> None:
    """Blocks until queued device work finishes (no-op on CPU)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, by the clock, or on a GPU by events in its stream."""
    synchronize(device)
    if device.type == "cuda":
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        function()
        after.record()
        synchronize(device)
        return before.elapsed_time(after) / 1e3  # of milliseconds
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleaved(
    functions: Mapping[Name, Callable[[], object]],
    repeats: int,
    device: torch.device | None = None,
    tick: Callable[[], None] = lambda: None,
) -> dict[Name, list[float]]:
    """Seconds of each function, `repeats` times, in turns: what slows the machine for a while slows all of them.

    Each is called once before, unmeasured. Every round starts with another function, since the first of a round
    may find colder caches. `tick` is called after every round. Medians of these times compare fairly.
    """
    device = device or torch.device("cpu")
    names = list(functions)
    times: dict[Name, list[float]] = {name: [] for name in names}
    for turn in range(repeats + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            took = seconds(functions[name], device)
            if turn:
                times[name].append(took)
        tick()
    return times


def median(values: list[float]) -> float:
    """The middle value."""
    return float(statistics.median(values))


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages made inside the block and still alive: now (`now`) and at most (`peak`).

    Counted at each operation, so it is exact, the same on every run and independent of the allocator; what a kernel
    allocates and frees inside one operation is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, object] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for x in tree_iter(result):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self._alive:
                    size = storage.nbytes()
                    self._alive[storage._cdata] = weakref.finalize(storage, self._release, storage._cdata, size)
                    self.now += size
                    self.peak = max(self.peak, self.now)
        return result

    def _release(self, place: int, size: int) -> None:
        self._alive.pop(place, None)
        self.now -= size


def peak_bytes(function: Callable[[], object]) -> int:
    """Bytes of tensors alive at the worst moment of a call, beyond those that were there before."""
    with LiveBytes() as live:
        function()
    return live.peak
