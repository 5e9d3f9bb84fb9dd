"""BART (Lewis et al. 2019) and LED (Beltagy et al. 2020, section 7) checkpoints of transformers: to a Transformer
encoder-decoder, or to Longformer's, as section 7 starts LED from BART.

Bare models become ones that write: their logits are by the table of embeddings, as in the training of BART.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import BartConfig, LEDConfig, PreTrainedConfig

from ..models.configuration_longformer import GalleryLongformerConfig
from ..models.configuration_transformer import GalleryTransformerConfig
from ..models.modeling_longformer import GalleryLongformerForConditionalGeneration
from ..models.modeling_transformer import GalleryTransformerForConditionalGeneration
from .checkpoint import Plan, Source, Take, as_config, only
from .marian import MAPS, layer_of
from .parts import affine, alias, architecture, given, longer, prefix, repeated, tokenizer_for

HEADS = {
    "Bart": {"BartForConditionalGeneration": "model.shared.weight", "BartModel": "shared.weight"},
    "LED": {"LEDForConditionalGeneration": "led.shared.weight", "LEDModel": "shared.weight"},
}
BIAS = "final_logits_bias"  # of the logits: under one name everywhere, and in no bare model
LED_MAPS = [(f"{x[0]}_proj", f"longformer_self_attn.{x}") for x in ("query", "key", "value")] + [("o_proj", "output")]
GLOBAL_MAPS = ("q_global_proj", "k_global_proj", "v_global_proj")
BART_OFFSET = 2  # its tables of positions begin with two rows that no token reads


class Bart:
    """Folders of transformers' BartForConditionalGeneration and BartModel."""

    name = "BART"
    targets = ("transformer", "longformer")

    def recognises(self, source: Source) -> bool:
        return source.config.get("model_type") == "bart"

    def plan(
        self,
        source: Source,
        to: str,
        attention_window: int | list[int] | None = None,
        max_position_embeddings: int | None = None,
    ) -> Plan:
        """to="transformer": the same model.

        to="longformer": the encoder's position embeddings copied again and again until there are
        max_position_embeddings (by default enough for 16384 tokens; the first 2 rows belong to none), its global maps
        start as the local ones, and it has an attention_window (keys, half on each side; default 512). With a window
        over everything, it gives what the source gives.
        """
        theirs: Any = as_config(BartConfig, source.config)
        only(
            theirs.to_dict(),
            static_position_embeddings=(False,),
            normalize_before=(False,),
            normalize_embedding=(True,),
            add_final_layer_norm=(False,),
            add_bias_logits=(False,),
            extra_pos_embeddings=(BART_OFFSET,),
        )
        options = given(
            to,
            ("attention_window", "max_position_embeddings") if to == "longformer" else (),
            attention_window=attention_window,
            max_position_embeddings=max_position_embeddings,
        )
        own = theirs.max_position_embeddings + BART_OFFSET
        options |= dict(
            **settings(source, theirs, "Bart"),
            scale_embedding=theirs.scale_embedding,
            position_offset=BART_OFFSET,
            max_decoder_position_embeddings=own,
        )
        origin = prefix(source, "model")
        take, copies = tensors(source, theirs, origin)
        config: Any
        if to == "transformer":
            config = GalleryTransformerConfig(**options | {"max_position_embeddings": own})
        else:
            length = longer(options.get("max_position_embeddings"), 16384 + BART_OFFSET, own)
            config = GalleryLongformerConfig(**options | {"max_position_embeddings": length})
            take["model.encoder.embed_positions.weight"] = Take(
                (f"{origin}encoder.embed_positions.weight",), repeated(own, length, BART_OFFSET)
            )
            take |= global_maps(theirs, origin, ("q_proj", "k_proj", "v_proj"))
        long = to == "longformer"
        return Plan(
            model=GalleryLongformerForConditionalGeneration if long else GalleryTransformerForConditionalGeneration,
            config=config,
            take=take,
            copies=copies,
            tokenizer=tokenizer_for(config.longest_input),
        )


class LED:
    """Folders of transformers' LEDForConditionalGeneration and LEDModel."""

    name = "LED"
    targets = ("longformer",)

    def recognises(self, source: Source) -> bool:
        return source.config.get("model_type") == "led"

    def plan(self, source: Source, to: str) -> Plan:
        """attention_window keeps its meaning, the keys on both sides together."""
        theirs: Any = as_config(LEDConfig, source.config)
        config: Any = GalleryLongformerConfig(
            **settings(source, theirs, "LED"),
            attention_window=theirs.attention_window,
            position_offset=0,
            max_position_embeddings=theirs.max_encoder_position_embeddings,
            max_decoder_position_embeddings=theirs.max_decoder_position_embeddings,
        )
        origin = prefix(source, "led")
        take, copies = tensors(source, theirs, origin, LED_MAPS)
        take |= global_maps(theirs, origin, [f"longformer_self_attn.{x}_global" for x in ("query", "key", "value")])
        return Plan(
            model=GalleryLongformerForConditionalGeneration,
            config=config,
            take=take,
            copies=copies,
            tokenizer=tokenizer_for(config.longest_input),
        )


def settings(source: Source, theirs: Any, family: str) -> dict[str, Any]:
    """The gallery's config of both. Raises ValueError if the encoder and the decoder differ in more than their depth
    and positions."""
    architecture(source, HEADS[family])
    only(
        theirs.to_dict(),
        tie_word_embeddings=(True,),
        decoder_attention_heads=(theirs.encoder_attention_heads,),
        decoder_ffn_dim=(theirs.encoder_ffn_dim,),
        encoder_layerdrop=(0.0,),
        decoder_layerdrop=(0.0,),
    )
    same = (
        "vocab_size", "attention_dropout", "activation_dropout", "decoder_start_token_id",
        "pad_token_id", "bos_token_id", "eos_token_id",
    )  # fmt: skip
    return {field: getattr(theirs, field) for field in same} | dict(
        hidden_size=theirs.d_model,
        num_hidden_layers=theirs.encoder_layers,
        num_encoder_layers=theirs.encoder_layers,
        num_decoder_layers=theirs.decoder_layers,
        num_attention_heads=theirs.encoder_attention_heads,
        intermediate_size=theirs.encoder_ffn_dim,
        hidden_act=theirs.activation_function,
        hidden_dropout=theirs.dropout,
        is_encoder_decoder=True,
        final_logits_bias=BIAS in source.tensors,
        position_embedding_type="learned",
        embedding_norm=True,
        initialization="normal",
        initializer_range=theirs.init_std,
    )


def tensors(source: Source, theirs: Any, origin: str, encoder_maps=MAPS) -> tuple[dict[str, Take], dict[str, str]]:
    """Sources of all parameters but the global maps, and which tensors of the source are copies of others."""
    names = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    kept, copies = alias(source, *(origin + name for name in names), "lm_head.weight")
    take = {"model.shared.weight": Take((kept,))}
    if BIAS in source.tensors:
        take[BIAS] = Take((BIAS,))
    for side, layers in (("encoder", theirs.encoder_layers), ("decoder", theirs.decoder_layers)):
        take[f"model.{side}.embed_positions.weight"] = Take((f"{origin}{side}.embed_positions.weight",))
        take |= affine(f"model.{side}.embed_norm", f"{origin}{side}.layernorm_embedding")
        maps = encoder_maps if side == "encoder" else MAPS
        for i in range(layers):
            take |= layer_of(side, f"model.{side}.layers.{i}", f"{origin}{side}.layers.{i}", maps)
    return take, copies


def global_maps(theirs: PreTrainedConfig, origin: str, names) -> dict[str, Take]:
    """Longformer's maps for global tokens, of the query, key and value maps of these names."""
    take = {}
    for i in range(theirs.encoder_layers):
        for ours, name in zip(GLOBAL_MAPS, names, strict=True):
            for kind in ("weight", "bias"):
                place = f"{origin}encoder.layers.{i}.self_attn.{name}.{kind}"
                take[f"model.encoder.layers.{i}.self_attn.{ours}.{kind}"] = Take((place,), torch.clone)
    return take
