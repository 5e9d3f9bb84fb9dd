"""Forwards that are followed as one graph, by torch.export or torch.compile: it serves all inputs of its shapes, so no
tensor may be asked what it holds.

Where a forward asks, to do less or to refuse an input in words, it takes here the way that is right for every input,
and its checks are done in the graph. What torch.export makes runs anywhere: attention is computed by its definition,
`attend_naive`, whose T x S scores every backend has, and a memory is searched by its definition too. What
torch.compile makes runs here, so the graph holds the tiles and the search as operators, which do ask.

torch.compile follows a forward as one graph where no cache is given or made, and documents are not packed; else it
leaves out what asks, and makes several graphs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

from .operators import operator

Call = TypeVar("Call", bound=Callable)
Result = TypeVar("Result")


def is_exporting() -> bool:
    """Tells whether torch.export, or torch.onnx.export by way of it, follows this forward."""
    return torch.compiler.is_exporting()


_compiled_whole = [False]  # the forward that runs now, while torch.compile follows it


def compile_whole(forward: Callable[[], Any]) -> Any:
    """The result of a forward, followed by torch.compile as one graph."""
    before, _compiled_whole[0] = _compiled_whole[0], True
    try:
        return forward()
    finally:
        _compiled_whole[0] = before


def in_one_graph() -> bool:
    """Tells whether this forward is followed as one graph: no tensor may be asked what it holds."""
    return torch.compiler.is_compiling() and (_compiled_whole[0] or is_exporting())


def once(memo: dict, key: Hashable, work: Callable[[], Result]) -> Result:
    """Returns what the work gives, which the memo keeps under the key."""
    if in_one_graph():  # it finds by itself what is worked out twice, and checkpoints in it keep nothing
        return work()
    if key not in memo:
        memo[key] = work()
    return memo[key]


def outside_graphs(function: Call) -> Call:
    """The function, which torch.compile leaves out where it makes several graphs: as torch.compiler.disable, but free
    where nothing is compiled."""
    disabled = torch.compiler.disable(function)

    @functools.wraps(function)
    def call(*args, **kwargs):
        left_out = torch.compiler.is_compiling() and not in_one_graph()
        return (disabled if left_out else function)(*args, **kwargs)

    return call  # type: ignore[return-value]


def records_gradients() -> bool:
    """Tells whether autograd follows this forward. What is exported infers only, also where nobody said no_grad."""
    return torch.is_grad_enabled() and not is_exporting()


def readable(x: torch.Tensor) -> bool:
    """Tells whether a forward may ask what x holds: a graph cannot, and a GPU would make the host wait."""
    return x.device.type == "cpu" and not in_one_graph()


def asks_later(x: torch.Tensor) -> bool:
    """Tells whether a check of x is left to `require`, by the compiler or for a GPU, and not done here at once."""
    return torch.compiler.is_compiling() or not readable(x)


def surely(held: torch.Tensor) -> bool:
    """Tells whether `held` is true everywhere, so that a forward may do less; False where that cannot be asked."""
    return readable(held) and bool(held.all())


def possibly(found: torch.Tensor) -> bool:
    """Tells whether `found` is true anywhere, so that a forward must do more; True where that cannot be asked."""
    return not readable(found) or bool(found.any())


def require(held: torch.Tensor, message: str, values: torch.Tensor | None = None) -> None:
    """Has the graph check that `held` is true everywhere: on CPUs a ValueError with the message, and what of `values`
    is wrong; an assertion of the device's own where the host would wait for it, and in exported graphs."""
    if is_exporting() or held.device.type != "cpu":
        torch._assert_async(held.all(), message)
    else:
        _require(held, held if values is None else values, message)


def _check_held(held: torch.Tensor, values: torch.Tensor, message: str) -> None:
    if not bool(held.all()):
        wrong = values[~held].flatten()[:3].tolist()
        raise ValueError(message if values.dtype == torch.bool else f"{message}; found {wrong}")


_require = operator(__file__, "require", _check_held, lambda held, values, message: None)
torch.fx.node.has_side_effect(_require)  # else a graph leaves out what gives nothing


def fixed_length(tokens: int) -> int:
    """`tokens`, T of a forward in one graph, which has no loop over blocks that are read one after the other: a graph
    of torch.compile is for this length. Raises ValueError if torch.export is asked to leave it open."""
    if not is_exporting():
        return int(tokens)
    if isinstance(tokens, torch.SymInt):
        raise ValueError(
            "torch.export is asked for any number of tokens; this model reads block after block, so export it for one "
            "length, and let only the batch be dynamic"
        )
    return tokens
