"""Who is compared, and how they are made alike: same width, depth, heads, window and number of parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, set_seed

import hf_gallery as gallery

MATCH = 0.03  # parameter counts of one run differ by no more than this share


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What all contestants of one task share. window: tokens of local attention. context: tokens that the upper line
    sees. memory_size, memory_topk, memory_layers: of the Memorizing Transformer. states, recurrent_layers: state
    vectors of the Block-Recurrent Transformer, and the layers that have them."""

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
    """One line of the comparison: `config` makes its configuration for some sizes, `model` is its causal model."""

    name: str
    label: str
    reach: str
    model: type[PreTrainedModel]
    config: Callable[[Sizes], PreTrainedConfig]


def _transformer(sizes: Sizes) -> PreTrainedConfig:
    return gallery.GalleryTransformerConfig(norm_position="pre", segment_length=sizes.window, **sizes.common())


def _transformer_full(sizes: Sizes) -> PreTrainedConfig:
    return gallery.GalleryTransformerConfig(norm_position="pre", segment_length=sizes.context, **sizes.common())


def _transformer_xl(sizes: Sizes) -> PreTrainedConfig:
    return gallery.GalleryTransformerXLConfig(
        pre_lnorm=True, segment_length=sizes.window, mem_len=2 * sizes.window, **sizes.common()
    )


def _longformer(sizes: Sizes) -> PreTrainedConfig:
    return gallery.GalleryLongformerConfig(
        norm_position="pre",
        position_embedding_type="relative",
        embedding_norm=False,
        attention_window=sizes.window,
        **sizes.common(),
    )


def _memorizing_transformer(sizes: Sizes) -> PreTrainedConfig:
    return gallery.GalleryMemorizingTransformerConfig(
        segment_length=sizes.window,
        mem_len=sizes.window,
        memory_layers=list(sizes.memory_layers),
        memory_size=sizes.memory_size,
        memory_topk=sizes.memory_topk,
        initial_scale=_unit_scale(sizes),
        **sizes.common(),
    )


def _block_recurrent_transformer(sizes: Sizes) -> PreTrainedConfig:
    return gallery.GalleryBlockRecurrentTransformerConfig(
        block_length=sizes.window,
        num_state_vectors=sizes.states,
        recurrent_layers=list(sizes.recurrent_layers),
        initial_scale=_unit_scale(sizes),
        **sizes.common(),
    )


def _unit_scale(sizes: Sizes) -> float:
    """Where the scale of unit queries and keys starts so that their scores spread as everybody else's, which are
    divided by sqrt(D): at sqrt(D). At 1, where the authors start, they are almost alike, and a short training like
    these cannot raise it."""
    return (sizes.hidden / sizes.heads) ** 0.5


CONTESTANTS = {
    c.name: c
    for c in (
        Contestant(
            "transformer_full",
            "Transformer, long context",
            "its segment of 16 windows (upper line)",
            gallery.GalleryTransformerForCausalLM,
            _transformer_full,
        ),
        Contestant(
            "transformer",
            "Transformer, windowed",
            "its segment of one window (lower line)",
            gallery.GalleryTransformerForCausalLM,
            _transformer,
        ),
        Contestant(
            "transformer_xl",
            "Transformer-XL",
            "its segment and a memory of two windows, in each layer",
            gallery.GalleryTransformerXLForCausalLM,
            _transformer_xl,
        ),
        Contestant(
            "longformer",
            "Longformer",
            "one window in each layer",
            gallery.GalleryLongformerForCausalLM,
            _longformer,
        ),
        Contestant(
            "memorizing_transformer",
            "Memorizing Transformer",
            "its segment and one window, and the nearest stored keys",
            gallery.GalleryMemorizingTransformerForCausalLM,
            _memorizing_transformer,
        ),
        Contestant(
            "block_recurrent_transformer",
            "Block-Recurrent Transformer",
            "one window, and a recurrent state",
            gallery.GalleryBlockRecurrentTransformerForCausalLM,
            _block_recurrent_transformer,
        ),
    )
}


def build(contestant: Contestant, sizes: Sizes, seed: int = 0, labels: int | None = None) -> PreTrainedModel:
    """A fresh model with weights drawn from `seed`: the causal one, or a classifier of so many `labels`. Its
    feed-forward is narrowed or widened until it has as many parameters as the windowed Transformer of the same sizes
    under the same head, to the nearest unit.

    Raises ValueError where that leaves a difference of more than 3 %.
    """
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
    config.num_labels, config.is_decoder = labels, True  # as causal as the language models are
    return getattr(gallery, contestant.model.heads["AutoModelForSequenceClassification"])(config)
