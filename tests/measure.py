"""Costs of a computation, counted and not timed: products of matrices, bytes alive, bytes made."""

import weakref
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages made inside the block: alive now, alive at most (`peak`), and of all together (`made`)."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.largest = self.made = 0
        self._seen = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for x in tree_iter(result):
            if isinstance(x, torch.Tensor):
                self._watch(x.untyped_storage(), given)
        return result

    def _watch(self, storage, given):
        place = storage._cdata
        if place in self._seen or place in given:  # views, results written in place, tensors from outside
            return
        size = storage.nbytes()
        self._seen[place] = weakref.finalize(storage, self._release, place, size)
        self.now += size
        self.made += size
        self.peak = max(self.peak, self.now)
        self.largest = max(self.largest, size)

    def _release(self, place, size):
        self._seen.pop(place, None)
        self.now -= size


class Cost(NamedTuple):
    """flops: of the matrix products. peak: bytes alive at the worst moment. largest: bytes of the largest tensor.
    made: bytes of all tensors that were ever made, copies among them."""

    flops: int
    peak: int
    largest: int
    made: int


def cost_of(function, *arguments):
    """The Cost of `function(*arguments)`, its arguments not counted."""
    with FlopCounterMode(display=False) as counter, LiveBytes() as live:
        function(*arguments)
    return Cost(counter.get_total_flops(), live.peak, live.largest, live.made)
