"""Forwards under torch.export: the graph serves all inputs of its shapes, so no tensor may be asked what it holds.

Where a forward asks, to do less or to refuse an input in words, it takes here the way that is right for every input,
and its checks become assertions in the graph. Attention is then computed by its definition, `attend_naive`, whose
T x S scores every backend has, and a memory is searched by its definition too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

Call = TypeVar("Call", bound=Callable)


def is_exporting() -> bool:
    """Whether torch.export, or torch.onnx.export by way of it, follows this forward."""
    return torch.compiler.is_exporting()


def outside_graphs(function: Call) -> Call:
    """The function, which torch.compile's graphs leave out: as torch.compiler.disable, but free where nothing is
    compiled."""
    disabled = torch.compiler.disable(function)

    @functools.wraps(function)
    def call(*args, **kwargs):
        return (disabled if torch.compiler.is_compiling() else function)(*args, **kwargs)

    return call  # type: ignore[return-value]


def records_gradients() -> bool:
    """Whether autograd follows this forward. What is exported only infers, also where nobody has said no_grad."""
    return torch.is_grad_enabled() and not is_exporting()


def surely(held: torch.Tensor) -> bool:
    """Whether `held` is true everywhere, so that a forward may do less; False where that cannot be asked."""
    return not is_exporting() and bool(held.all())


def possibly(found: torch.Tensor) -> bool:
    """Whether `found` is true anywhere, so that a forward must do more; True where that cannot be asked."""
    return is_exporting() or bool(found.any())


def require(held: torch.Tensor, message: str) -> None:
    """Asserts in the exported graph that `held` is true everywhere."""
    torch._assert_async(held.all(), message)


def fixed_length(tokens: int) -> int:
    """`tokens`, T of what is exported. Raises ValueError if it is to stay open where blocks are read one after the
    other, since a graph has no loop over them."""
    if isinstance(tokens, torch.SymInt):
        raise ValueError(
            "torch.export is asked for any number of tokens; this model reads block after block, so export it for one "
            "length, and let only the batch be dynamic"
        )
    return tokens
