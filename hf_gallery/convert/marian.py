"""Marian checkpoints of transformers (Helsinki-NLP's opus-mt models): to the Transformer of Vaswani et al. 2017."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import MarianConfig

from ..models import modeling_transformer
from ..models.configuration_transformer import GalleryTransformerConfig
from ..models.positions import sinusoids
from .checkpoint import Plan, Source, Take, as_config, copy_tokenizer, only
from .parts import affine, alias, architecture, prefix

HEADS = {"MarianMTModel": "final_logits_bias", "MarianModel": "shared.weight"}
# Ours, theirs: an attention's maps.
MAPS = (("q_proj", "q_proj"), ("k_proj", "k_proj"), ("v_proj", "v_proj"), ("o_proj", "out_proj"))


class Marian:
    """Folders of transformers' MarianMTModel and MarianModel."""

    name = "Marian"
    targets = ("transformer",)

    def recognises(self, source: Source) -> bool:
        return source.config.get("model_type") == "marian"

    def plan(self, source: Source, to: str) -> Plan:
        """One table of embeddings serves source, target and logits.

        Raises ValueError if the encoder and the decoder differ in more than their depth, or positions are stored that
        are no sinusoids.
        """
        theirs: Any = as_config(MarianConfig, source.config)
        head = "ForConditionalGeneration" if architecture(source, HEADS) == "MarianMTModel" else "Model"
        only(
            theirs.to_dict(),
            share_encoder_decoder_embeddings=(True,),
            tie_word_embeddings=(True,),
            decoder_vocab_size=(None, theirs.vocab_size),
            decoder_attention_heads=(theirs.encoder_attention_heads,),
            decoder_ffn_dim=(theirs.encoder_ffn_dim,),
            static_position_embeddings=(True,),
            normalize_before=(False,),
            normalize_embedding=(False,),
            add_final_layer_norm=(False,),
            activation_dropout=(0.0,),
            encoder_layerdrop=(0.0,),
            decoder_layerdrop=(0.0,),
        )
        same = (
            "vocab_size", "scale_embedding", "attention_dropout", "decoder_start_token_id",
            "pad_token_id", "bos_token_id", "eos_token_id",
        )  # fmt: skip
        config = GalleryTransformerConfig(
            **{field: getattr(theirs, field) for field in same},
            hidden_size=theirs.d_model,
            num_hidden_layers=theirs.encoder_layers,
            num_encoder_layers=theirs.encoder_layers,
            num_decoder_layers=theirs.decoder_layers,
            num_attention_heads=theirs.encoder_attention_heads,
            intermediate_size=theirs.encoder_ffn_dim,
            hidden_act=theirs.activation_function,
            hidden_dropout=theirs.dropout,
            is_encoder_decoder=True,
            sinusoid_layout="concatenated",
            final_logits_bias=head != "Model",
            initialization="normal",
            initializer_range=theirs.init_std,
        )
        origin, backbone = prefix(source, "model"), "" if head == "Model" else "model."
        kept, copies = alias(
            source,
            f"{origin}shared.weight",
            f"{origin}encoder.embed_tokens.weight",
            f"{origin}decoder.embed_tokens.weight",
            "lm_head.weight",
        )
        take = {f"{backbone}shared.weight": Take((kept,))}
        if head != "Model":
            take["final_logits_bias"] = Take(("final_logits_bias",))
        for side, layers in (("encoder", theirs.encoder_layers), ("decoder", theirs.decoder_layers)):
            check_positions(source, f"{origin}{side}.embed_positions.weight")
            for i in range(layers):
                take |= layer_of(side, f"{backbone}{side}.layers.{i}", f"{origin}{side}.layers.{i}")
        return Plan(
            model=getattr(modeling_transformer, f"GalleryTransformer{head}"),
            config=config,
            take=take,
            ignore=(r"(.+\.)?embed_positions\.weight",),  # the gallery works them out
            copies=copies,
            tokenizer=copy_tokenizer,
        )


def layer_of(side: str, to: str, origin: str, maps: Sequence[tuple[str, str]] = MAPS) -> dict[str, Take]:
    """A layer of the encoder or the decoder. maps: ours and theirs, of self-attention."""
    take: dict[str, Take] = {}
    for ours, theirs in maps:
        take |= affine(f"{to}.self_attn.{ours}", f"{origin}.self_attn.{theirs}")
    take |= affine(f"{to}.self_attn_norm", f"{origin}.self_attn_layer_norm")
    if side == "decoder":
        for ours, theirs in MAPS:
            take |= affine(f"{to}.cross_attn.{ours}", f"{origin}.encoder_attn.{theirs}")
        take |= affine(f"{to}.cross_attn_norm", f"{origin}.encoder_attn_layer_norm")
    take |= affine(f"{to}.feed_forward.up_proj", f"{origin}.fc1")
    take |= affine(f"{to}.feed_forward.down_proj", f"{origin}.fc2")
    return take | affine(f"{to}.feed_forward_norm", f"{origin}.final_layer_norm")


def check_positions(source: Source, name: str):
    """Raises ValueError unless the positions that are stored under a name, if any, are sinusoids, sines first."""
    if name not in source.tensors:
        return
    table = source.tensors[name]
    if table.dim() != 2:
        raise ValueError(f"{name} has the shape {tuple(table.shape)}, which is no table of positions")
    expected = sinusoids(torch.arange(len(table)), table.shape[-1], "concatenated")
    difference = (table.float() - expected).abs().max().item()
    if difference > 2e-3:  # half precision rounds by as much as 5e-4
        raise ValueError(
            f"{name} differs by {difference:.3g} from sinusoids with the sines first, and the gallery has no others"
        )
