"""Helpers shared by the conversions of transformers' own models."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ..models.configuration_base import MOST
from .checkpoint import Source, Take, copy_tokenizer


def architecture(source: Source, known: Mapping[str, str | None]) -> str:
    """The class that the source's config names. Some old configs name none: then the first of the known classes whose
    tensor, which it has and later ones have not, is there. Raises ValueError if it is none of those known."""
    named = source.config.get("architectures")
    names = [next((n for n, x in known.items() if x in source.tensors), None)] if named in (None, []) else named
    if not isinstance(names, list) or len(names) != 1 or names[0] not in list(known):
        raise ValueError(f"architectures is {named!r}; it must be one of {', '.join(known)}")
    return names[0]


def prefix(source: Source, name: str) -> str:
    """The prefix of the backbone's tensors: its name and a dot, or nothing, as in files of the bare model."""
    return f"{name}." if any(tensor.startswith(f"{name}.") for tensor in source.tensors) else ""


def affine(to: str, origin: str, change: Callable[[Tensor], Tensor] | None = None) -> dict[str, Take]:
    """Weight and bias of a linear map or a norm; change: what is done to the weight."""
    weight = (f"{origin}.weight",)
    return {
        f"{to}.weight": Take(weight) if change is None else Take(weight, change),
        f"{to}.bias": Take((f"{origin}.bias",)),
    }


def alias(source: Source, *names: str) -> tuple[str, dict[str, str]]:
    """One tensor that files keep under any of several names: the first that is there, and the others as its copies."""
    kept = next((name for name in names if name in source.tensors), names[0])
    return kept, {name: kept for name in names if name != kept}


def repeated(own: int, length: int, offset: int = 0) -> Callable[[Tensor], Tensor]:
    """Makes a table of positions of `length` rows by copying one of `own` again and again, its first `offset` rows,
    which belong to no position, once (Beltagy et al. 2020, section 5)."""

    def make(table: Tensor) -> Tensor:
        if len(table) != own:
            raise ValueError(f"the config says that there are {own} positions")
        copies = -(-(length - offset) // (own - offset))
        return torch.cat([table[:offset], table[offset:].repeat(copies, 1)])[:length]

    return make


def longer(wanted: int | None, default: int, own: int) -> int:
    """The length of the longer table of positions. Raises ValueError if it is shorter than the source's own, or no
    such number."""
    length = max(default, own) if wanted is None else wanted
    if not isinstance(length, int) or isinstance(length, bool) or length > MOST:
        raise ValueError(
            f"max_position_embeddings is {length!r}; it must be a whole number of at least {own} and at most {MOST}"
        )
    if length < own:
        raise ValueError(
            f"max_position_embeddings is {length}, fewer than the {own} that the source has; give {own} or more"
        )
    return length


def tokenizer_for(length: int) -> Callable[[Source], Any]:
    """The source's tokenizer for a model that reads `length` tokens."""

    def copy(source: Source):
        tokenizer = copy_tokenizer(source)
        if tokenizer is not None:
            tokenizer.model_max_length = length
        return tokenizer

    return copy


def given(to: str, accepted: Collection[str], **options: Any) -> dict[str, Any]:
    """The options that are set. Raises ValueError for one that the target does not have."""
    options = {name: value for name, value in options.items() if value is not None}
    wrong = [name for name in options if name not in accepted]
    if wrong:
        raise ValueError(
            f"{', '.join(wrong)} is given, but {to} has no such option; it has {', '.join(accepted) or 'none'}"
        )
    return options
