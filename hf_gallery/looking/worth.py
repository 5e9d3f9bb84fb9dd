"""The worth of each source: the bits of a text read again without it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from .reading import Progress, quiet, read, read_apart
from .watch import period_of

Reader = Callable[..., torch.Tensor]
# Settings that say how far a window reaches; of those that a configuration has, the first is halved.
WINDOWS = ("attention_window", "mem_len", "segment_length")


def readings(model: Any) -> dict[str, Reader]:
    """The ways to read a text without one of the model's sources, by name."""
    config, length = model.config, period_of(model.config)
    found: dict[str, Reader] = {}
    if length is not None:
        apart = partial(read_apart, model, size=length)
        if hasattr(config, "memory_layers"):
            found["retrieval emptied"] = partial(read, model, size=length, forget=("memory_keys", "memory_values"))
            if config.position_period is None:  # else positions that run on over several segments would begin anew too
                found["memory and retrieval emptied"] = apart
        elif hasattr(config, "recurrent_layers"):
            state = ("state", "state_keys", "state_values")
            found["state reset"] = partial(read, model, size=length, forget=state)
        elif getattr(config, "num_memory_tokens", None):
            found["memory tokens reset"] = apart
        elif getattr(config, "mem_len", None) and _keeps_places(config):
            found["memory emptied"] = apart
    halved = half_window(config) if isinstance(model, PreTrainedModel) else None
    if halved is not None:
        found["window halved"] = partial(_with_settings, model, halved)
    return found


def worth(
    model: Any, ids: torch.Tensor, progress: Progress = quiet, marks: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Bits of each token of ids (T,), by what the text was read without. marks (T,): 1 at global tokens."""
    found = {}
    for name, reader in readings(model).items():
        more = {} if marks is None else {"marks": marks}
        found[name] = reader(ids=ids, what=name, progress=progress, **more)
    if marks is not None:
        found["global tokens unmarked"] = read(model, ids, what="global tokens unmarked", progress=progress)
    return found


def _keeps_places(config: Any) -> bool:
    """True where a segment read apart stands as it stood: positions are distances, or there are none."""
    return getattr(config, "position_embedding_type", "relative") in ("relative", "none")


def half_window(config: Any) -> dict[str, Any] | None:
    """Settings of the same model with half its window; None where none is set, or it is too small to halve."""
    name = next((x for x in WINDOWS if hasattr(config, x)), None)
    if name is None or hasattr(config, "num_memory_tokens") or not getattr(config, name):
        return None  # a segment between memory tokens says when they are written, too
    value = getattr(config, name)
    half = [x // 2 for x in value] if isinstance(value, list) else value // 2
    return {name: half} if min(half if isinstance(half, list) else [half]) >= 1 else None


def _with_settings(model: Any, settings: dict[str, Any], ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """`read` by a model of other settings on the same weights."""
    return read(twin(model, **settings), ids, **options)


def twin(model: Any, **settings: Any) -> Any:
    """A model of other settings whose weights are the same tensors."""
    config = type(model.config).from_dict(model.config.to_dict() | settings)
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        other = type(model)(config)
    other.load_state_dict(model.state_dict(), assign=True)
    waiting = [name for name, x in (*other.named_parameters(), *other.named_buffers()) if x.is_meta]
    if waiting:
        raise ValueError(f"{type(model).__name__} keeps {waiting[0]} out of its state, so no other settings are read")
    return other.eval()
