"""The variants that every law is tested on. A new one is one more entry in VARIANTS.

Sizes divide nothing: 23 tokens, segments of 7, a memory of 5, 3 heads of 10. Weights are drawn wide, so that a key too
many or too few changes the result, and dropout is on in the config, so that a model in eval() that drops shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

import hf_gallery as gallery

VOCAB, BOS, EOS, PAD = 97, 94, 95, 96
WORDS = 90  # ids below it are plain tokens


@dataclass(frozen=True)
class Head:
    """One class of a variant, and how it is fed.

    stream: it is causal and carries a cache. source: it reads an encoder's input too. pooled: one result a row.
    """

    kind: type
    auto: str
    settings: dict[str, Any] = field(default_factory=dict)
    stream: bool = False
    source: bool = False
    pooled: bool = False


@dataclass(frozen=True)
class Variant:
    """One architecture in one setting.

    horizon: tokens after which the bytes of the cache stop growing; None where they grow with the input.
    linear: the cost per token does not grow with the input.
    limit: the longest input, where there is one.
    """

    name: str
    config: type
    heads: dict[str, Head]
    settings: dict[str, Any]
    horizon: int | None = None
    linear: bool = False
    limit: int | None = None

    def make_config(self, head="causal", **overrides):
        return self.config(**SIZES | self.settings | self.heads[head].settings | overrides)

    def make(self, head="causal", *, seed=0, dtype=torch.float32, **overrides):
        """A model in eval(), with loud random weights that depend on the seed only."""
        model = self.heads[head].kind(self.make_config(head, **overrides))
        return loud(model, seed).to(dtype).eval()


SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=30,
    num_hidden_layers=3,
    num_attention_heads=3,
    intermediate_size=41,
    hidden_dropout=0.1,
    attention_dropout=0.1,
    pad_token_id=PAD,
    bos_token_id=BOS,
    eos_token_id=EOS,
)

TRANSFORMER_HEADS = {
    "causal": Head(gallery.GalleryTransformerForCausalLM, "AutoModelForCausalLM", stream=True),
    "decoder": Head(gallery.GalleryTransformerModel, "AutoModel", {"is_decoder": True}, stream=True),
    "encoder": Head(gallery.GalleryTransformerModel, "AutoModel", {"is_decoder": False}),
    "masked": Head(gallery.GalleryTransformerForMaskedLM, "AutoModelForMaskedLM"),
    "sequence": Head(
        gallery.GalleryTransformerForSequenceClassification, "AutoModelForSequenceClassification", pooled=True
    ),
}
SEQ2SEQ = {
    "seq2seq": Head(
        gallery.GalleryTransformerForConditionalGeneration,
        "AutoModelForSeq2SeqLM",
        {"num_encoder_layers": 2, "num_decoder_layers": 3, "decoder_start_token_id": BOS},
        stream=True,
        source=True,
    )
}
XL_HEADS = {
    "causal": Head(gallery.GalleryTransformerXLForCausalLM, "AutoModelForCausalLM", stream=True),
    "decoder": Head(gallery.GalleryTransformerXLModel, "AutoModel", stream=True),
    "sequence": Head(
        gallery.GalleryTransformerXLForSequenceClassification, "AutoModelForSequenceClassification", pooled=True
    ),
}


def transformer(name, heads=None, **settings):
    return Variant(
        f"transformer{name}", gallery.GalleryTransformerConfig, heads or TRANSFORMER_HEADS | SEQ2SEQ, settings
    )


def transformer_xl(name, **settings):
    settings = dict(segment_length=7, mem_len=5) | settings
    horizon = settings["segment_length"] + settings["mem_len"]
    return Variant(
        f"transformer_xl{name}", gallery.GalleryTransformerXLConfig, XL_HEADS, settings, horizon=horizon, linear=True
    )


# fmt: off
VARIANTS = [
    transformer("", norm_position="post", position_embedding_type="sinusoidal"),
    Variant("transformer_pre", gallery.GalleryTransformerConfig, TRANSFORMER_HEADS | SEQ2SEQ, dict(norm_position="pre", position_embedding_type="learned", hidden_act="gelu_new", scale_embedding=False, max_position_embeddings=61), limit=61),
    Variant("transformer_segments", gallery.GalleryTransformerConfig, TRANSFORMER_HEADS, dict(segment_length=7), horizon=7, linear=True),
    transformer_xl(""),
    transformer_xl("_long_memory", segment_length=4, mem_len=11),
    transformer_xl("_no_memory", mem_len=0),
    transformer_xl("_same_length", same_length=True, mem_len=6),
    transformer_xl("_clamp", clamp_len=6, mem_len=8),
    transformer_xl("_untied_pre", untie_r=True, pre_lnorm=True),
    transformer_xl("_adaptive", cutoffs=[13, 41], div_val=2),
]
# fmt: on


def loud(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draws every parameter anew: maps that keep the size of what they are given, biases and norms that show."""
    g = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            x = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
            if id(parameter) in embeddings:
                x = 0.3 * x
            elif parameter.dim() > 1:
                x = 1.2 * x / parameter.shape[-1] ** 0.5
            else:
                x = 1 + 0.2 * x if name.endswith("weight") else 0.3 * x
            parameter.copy_(x)
    return model


def words(*shape, seed=0):
    """Random plain tokens."""
    return torch.randint(0, WORDS, shape, generator=torch.Generator().manual_seed(1000 + seed))


@dataclass
class Runner:
    """A model under one head, called the same way whatever the head.

    Rows that read an encoder's input read one of their own: row i of a batch the i-th of `sources`.
    """

    variant: Variant
    head: Head
    model: nn.Module

    def sources(self, rows):
        """Encoder input (B, 9) and mask for the rows numbered `rows`; its length differs from row to row."""
        ids = torch.stack([words(9, seed=500 + row) for row in rows])
        lengths = torch.tensor([9 - row % 4 for row in rows])
        return ids, (torch.arange(9) < lengths[:, None]).long()

    def __call__(self, ids, mask=None, cache=None, *, rows=None, embeds=None, **options):
        """(result, cache): hidden states or logits (B, T, any), or one result a row (B, any)."""
        arguments = dict(options)
        if self.head.stream:
            arguments |= dict(past_key_values=cache, use_cache=options.get("use_cache", True))
        if self.head.source:
            source, source_mask = self.sources(range(len(ids)) if rows is None else rows)
            arguments |= dict(input_ids=source, attention_mask=source_mask, decoder_input_ids=ids)
            arguments |= dict(decoder_attention_mask=mask)
        else:
            arguments |= dict(input_ids=ids if embeds is None else None, attention_mask=mask, inputs_embeds=embeds)
        output = self.model(**{k: x for k, x in arguments.items() if x is not None})
        result = output["last_hidden_state"] if "last_hidden_state" in output else output["logits"]
        return result, output.get("past_key_values")


def runner(variant, head, **options):
    return Runner(variant, variant.heads[head], variant.make(head, **options))


def over(condition=lambda variant, head: True):
    """Parametrises a test over `variant` and `head` (its name), for the heads that the condition picks."""
    pairs = [(v, name) for v in VARIANTS for name, head in v.heads.items() if condition(v, head)]
    return pytest.mark.parametrize(("variant", "head"), pairs, ids=[f"{v.name}-{name}" for v, name in pairs])


def streams(condition=lambda variant: True, of_head=lambda head: True):
    """Parametrises over the heads that carry a cache."""
    return over(lambda variant, head: head.stream and condition(variant) and of_head(head))


def causal(condition=lambda variant: True):
    """Parametrises over `variant`, for those that have a causal language model."""
    chosen = [v for v in VARIANTS if "causal" in v.heads and condition(v)]
    return pytest.mark.parametrize("variant", chosen, ids=[v.name for v in chosen])


FLOAT32 = dict(rtol=1e-4, atol=1e-5)
FLOAT64 = dict(rtol=1e-9, atol=1e-10)


def tolerance(x):
    return FLOAT64 if x.dtype == torch.float64 else FLOAT32


def assert_equal(got, expected, message=""):
    """Within the tolerance of the type."""
    torch.testing.assert_close(got, expected, **tolerance(expected), msg=lambda m: f"{message}: {m}" if message else m)
