"""The contestants, made alike: same width, depth, heads, window and number of parameters."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, set_seed

from hf_gallery import variants
from hf_gallery.variants import VARIANTS, Variant

MATCH = 0.03  # parameter counts of one run differ by no more than this share


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes shared by all contestants of a task. window: tokens of local attention. context: tokens that the upper
    line sees. memory_size, memory_topk, memory_layers: of the Memorizing Transformer. states, recurrent_layers: state
    vectors of the Block-Recurrent Transformer, and the layers that have them; memory tokens go by the former."""

    hidden: int
    layers: int
    heads: int
    window: int
    context: int
    intermediate: int
    memory_size: int
    memory_topk: int
    memory_layers: tuple[int, ...]
    states: int
    recurrent_layers: tuple[int, ...]
    vocabulary: int = 262

    def common(self) -> dict[str, Any]:
        """Config arguments that mean the same in every variant."""
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": self.intermediate,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        }


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One line of the comparison: `config` makes its configuration for some sizes, `model` a causal model of that.
    smaller_of: see variants.Contestant. own: the arguments of a configuration that a user gave, which stays as it is,
    whatever the sizes."""

    name: str
    label: str
    reach: str
    model: Callable[[PreTrainedConfig], PreTrainedModel]
    config: Callable[[Sizes], PreTrainedConfig]
    carries: str
    colour: str
    symbol: str
    smaller_of: str | None = None
    own: dict[str, Any] | None = None


def _contestant(variant: Variant, entry: variants.Contestant) -> Contestant:
    """A line of the table of architectures with the model that it is of."""
    return Contestant(
        entry.name,
        entry.label,
        entry.reach,
        variant.causal,
        lambda sizes: variant.config(**sizes.common() | entry.settings(sizes)),
        entry.carries,
        entry.colour,
        entry.symbol,
        entry.smaller_of,
    )


CONTESTANTS = {c.name: _contestant(v, c) for v in VARIANTS.values() for c in v.contestants}


def build(contestant: Contestant, sizes: Sizes, seed: int = 0, labels: int | None = None) -> PreTrainedModel:
    """A fresh model with weights drawn from `seed`: the causal one, or with `labels` a classifier of them. Its
    feed-forward is narrowed or widened until it has as many parameters as the windowed Transformer of the same sizes
    under the same head, to the nearest unit. A configuration of a user's own stays as it is.

    Raises ValueError where that leaves a difference of more than 3 %.
    """
    if contestant.own is not None:
        set_seed(seed)
        return _with_vocabulary(_make(contestant, sizes, labels), sizes)
    reference = CONTESTANTS["transformer"]
    target = _count(reference, sizes, labels)
    if contestant.config is not reference.config:
        wider = dataclasses.replace(sizes, intermediate=sizes.intermediate + 1)
        own = _count(contestant, sizes, labels)
        unit = _count(contestant, wider, labels) - own  # parameters of one feed-forward unit in every layer
        matched = sizes.intermediate + round((target - own) / unit)
        if matched < 1:
            raise ValueError(
                f"{contestant.name} has {own:,} parameters where the Transformer has {target:,}, and its feed-forward "
                f"of {sizes.intermediate} cannot be narrowed that far; raise intermediate or hidden"
            )
        sizes = dataclasses.replace(sizes, intermediate=matched)
    set_seed(seed)
    model = _make(contestant, sizes, labels)
    if abs(model.num_parameters() / target - 1) > MATCH:
        raise ValueError(
            f"{contestant.name} has {model.num_parameters():,} parameters, more than {MATCH:.0%} off the "
            f"Transformer's {target:,}; raise hidden or intermediate"
        )
    return model


def _with_vocabulary(model: PreTrainedModel, sizes: Sizes) -> PreTrainedModel:
    """The model. Raises ValueError if it does not know every token."""
    if model.config.vocab_size < sizes.vocabulary:
        raise ValueError(
            f"the configuration's vocab_size is {model.config.vocab_size}, and there are {sizes.vocabulary} tokens: "
            f"bytes and a few more; raise it to {sizes.vocabulary}"
        )
    return model


def smaller_memories(model: PreTrainedModel) -> Iterator[int]:
    """Gives a model with a kNN memory smaller ones in turn, from as many keys as it retrieves on, four times as many
    each time, and at last its own again. Yields each smaller size while it holds; nothing for other models."""
    own = getattr(model.config, "memory_size", None)
    if own is None:
        return
    size = model.config.memory_topk
    try:
        while size < own:
            model.config.memory_size = size
            yield size
            size *= 4
    finally:
        model.config.memory_size = own


def _count(contestant: Contestant, sizes: Sizes, labels: int | None) -> int:
    with torch.device("meta"):
        return _make(contestant, sizes, labels).num_parameters()


def _make(contestant: Contestant, sizes: Sizes, labels: int | None) -> PreTrainedModel:
    config = contestant.config(sizes)
    if labels is None:
        return contestant.model(config)
    if not isinstance(contestant.model, type):
        raise ValueError(f"{contestant.name} is from outside the gallery and has no classifier that could be compared")
    config.num_labels, config.is_decoder = labels, True  # as causal as the language models are
    module = sys.modules[contestant.model.__module__]
    return getattr(module, contestant.model.auto_classes["AutoModelForSequenceClassification"])(config)  # type: ignore
