"""GPT-2 checkpoints of transformers (Radford et al. 2019): to a Transformer decoder, to a causal Longformer, to a
Memorizing Transformer, as Wu et al. 2022, section 4.5, give a trained model a memory, or to a Recurrent Memory
Transformer, as the code of Bulatov et al. 2022 wraps one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config

from ..data.tokenizer import UNLIMITED
from ..models import (
    modeling_longformer,
    modeling_memorizing_transformer,
    modeling_recurrent_memory_transformer,
    modeling_transformer,
)
from ..models.configuration_longformer import GalleryLongformerConfig
from ..models.configuration_memorizing_transformer import GalleryMemorizingTransformerConfig
from ..models.configuration_recurrent_memory_transformer import GalleryRecurrentMemoryTransformerConfig
from ..models.configuration_transformer import GalleryTransformerConfig
from .checkpoint import Plan, Source, Take, as_config, only
from .parts import affine, alias, architecture, given, longer, prefix, repeated, tokenizer_for

HEADS = {"GPT2LMHeadModel": "transformer.wte.weight", "GPT2Model": "wte.weight"}
OPTIONS = {
    "transformer": (),
    "longformer": ("attention_window", "max_position_embeddings"),
    "memorizing_transformer": ("memory_layers", "memory_size", "memory_topk", "mem_len", "segment_length"),
    "recurrent_memory_transformer": ("num_memory_tokens", "segment_length", "memory_attention", "bptt_depth"),
}


class GPT2:
    """Folders of transformers' GPT2LMHeadModel and GPT2Model."""

    name = "GPT-2"
    targets = ("transformer", "longformer", "memorizing_transformer", "recurrent_memory_transformer")

    def recognises(self, source: Source) -> bool:
        return source.config.get("model_type") == "gpt2"

    def plan(
        self,
        source: Source,
        to: str,
        *,
        attention_window: int | list[int] | None = None,
        max_position_embeddings: int | None = None,
        memory_layers: list[int] | None = None,
        memory_size: int | None = None,
        memory_topk: int | None = None,
        mem_len: int | None = None,
        segment_length: int | None = None,
        num_memory_tokens: int | None = None,
        memory_attention: str | None = None,
        bptt_depth: int | None = None,
    ) -> Plan:
        """to="transformer": the same model.

        to="longformer": a decoder whose queries see the attention_window (default 512) keys before them, with the
        position embeddings copied again and again until there are max_position_embeddings (default 4096). With a
        window over everything, it gives what the source gives.

        to="memorizing_transformer": the source's weights, and a gate for every head of memory_layers, half open as the
        paper starts it; it learns to use the memory by further training. Closed gates (gate_bias far below 0) give
        what the source gives. Its positions end, so they start anew after as many whole segments as they cover: by
        default one segment_length of all of them, and mem_len 0. Other options are the config's, with its defaults.

        to="recurrent_memory_transformer": the source's weights and fresh memory tokens, normal numbers as wide as its
        embeddings, which learn by further training. segment_length is by default what the positions leave beside
        num_memory_tokens (default 10) in front and behind; memory_attention is "causal", as the authors' code wraps
        GPT-2. Without memory tokens a segment gives what the source gives.
        """
        theirs: Any = as_config(GPT2Config, source.config)
        head = "ForCausalLM" if architecture(source, HEADS) == "GPT2LMHeadModel" else "Model"
        only(theirs.to_dict(), add_cross_attention=(False,), embd_pdrop=(theirs.resid_pdrop,))
        options = given(
            to,
            OPTIONS[to],
            attention_window=attention_window,
            max_position_embeddings=max_position_embeddings,
            memory_layers=memory_layers,
            memory_size=memory_size,
            memory_topk=memory_topk,
            mem_len=mem_len,
            segment_length=segment_length,
            num_memory_tokens=num_memory_tokens,
            memory_attention=memory_attention,
            bptt_depth=bptt_depth,
        )
        config: Any
        if to == "transformer":
            model = getattr(modeling_transformer, f"GalleryTransformer{head}")
            length = theirs.n_positions
            config = GalleryTransformerConfig(**settings(theirs) | STACK, max_position_embeddings=length)
        elif to == "longformer":
            model = getattr(modeling_longformer, f"GalleryLongformer{head}")
            length = longer(options.pop("max_position_embeddings", None), 4096, theirs.n_positions)
            config = GalleryLongformerConfig(**settings(theirs) | STACK | options, max_position_embeddings=length)
        elif to == "recurrent_memory_transformer":
            model = getattr(modeling_recurrent_memory_transformer, f"GalleryRecurrentMemoryTransformer{head}")
            config = recurrent_memory(theirs, options)
            length = UNLIMITED
        else:
            model = getattr(modeling_memorizing_transformer, f"GalleryMemorizingTransformer{head}")
            options = {
                "segment_length": theirs.n_positions,
                "mem_len": 0,
                "num_positions": theirs.n_positions,
            } | options
            config = GalleryMemorizingTransformerConfig(
                **settings(theirs),
                **options,
                normalize_qk=False,
                scale_embedding=False,
                attention_bias=True,
                mlp_bias=True,
                norm_type="layer",
            )
            length = UNLIMITED
        backbone = "" if head == "Model" else "model."
        if to == "transformer":
            backbone += "stack."
        take, copies = decoder(source, theirs, backbone, "project." if to == "memorizing_transformer" else "")
        if head == "ForCausalLM" and not theirs.tie_word_embeddings:
            take["lm_head.weight"] = Take(("lm_head.weight",))
        if to == "longformer":
            table = f"{backbone}embed_positions.weight"
            take[table] = Take(take[table].names, repeated(theirs.n_positions, length))
        tokens = getattr(config, "num_memory_tokens", 0)
        if tokens:
            words = take[f"{backbone}embed_tokens.weight"].names
            take[f"{backbone}memory.initial"] = Take(words, memory_tokens(tokens))
        gates = getattr(config, "memory_layers", [])
        return Plan(
            model=model,
            config=config,
            take=take,
            fresh={f"{backbone}layers.{i}.self_attn.gate_bias" for i in gates},
            ignore=(r"(.+\.)?attn\.(masked_)?bias",),  # masks
            copies=copies,
            tokenizer=tokenizer_for(length),
        )


STACK = dict(
    is_decoder=True,
    norm_position="pre",
    position_embedding_type="learned",
    position_offset=0,
    scale_embedding=False,
    embedding_norm=False,
    initialization="normal",
)


def recurrent_memory(theirs: Any, options: dict[str, Any]) -> GalleryRecurrentMemoryTransformerConfig:
    """The config of a Recurrent Memory Transformer whose segments use all of the source's positions."""
    options = {"num_memory_tokens": 10, "memory_attention": "causal"} | options
    tokens, length = options["num_memory_tokens"], theirs.n_positions
    if "segment_length" not in options and type(tokens) is int and 2 * tokens >= length:
        raise ValueError(
            f"num_memory_tokens is {tokens}, before and behind each segment, and the source has {length} positions, "
            "which leaves none to tokens; give fewer"
        )
    if type(tokens) is int:  # else the config says what is wrong
        options.setdefault("segment_length", length - 2 * tokens)
    return GalleryRecurrentMemoryTransformerConfig(
        **settings(theirs) | STACK | options, max_position_embeddings=length
    )


def memory_tokens(count: int) -> Callable[[Tensor], Tensor]:
    """Makes memory tokens beside a table of embeddings: normal numbers of its deviation, the same at every call."""

    def make(table: Tensor) -> Tensor:
        noise = torch.randn(count, table.shape[1], generator=torch.Generator().manual_seed(0))
        return (noise.to(table.device) * table.float().std()).to(table.dtype)

    return make


def settings(theirs: Any) -> dict[str, Any]:
    """The fields of a gallery config that all targets have."""
    same = ("vocab_size", "initializer_range", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")
    return {field: getattr(theirs, field) for field in same} | dict(
        hidden_size=theirs.n_embd,
        num_hidden_layers=theirs.n_layer,
        num_attention_heads=theirs.n_head,
        intermediate_size=theirs.n_inner or 4 * theirs.n_embd,
        hidden_act=theirs.activation_function,
        hidden_dropout=theirs.resid_pdrop,
        attention_dropout=theirs.attn_pdrop,
        layer_norm_eps=theirs.layer_norm_epsilon,
    )


def decoder(source: Source, theirs: Any, to: str, project: str) -> tuple[dict[str, Take], dict[str, str]]:
    """Embeddings and layers, `to` standing before our names and `project` before those of the maps to heads; and which
    source tensors are copies of others."""
    origin = prefix(source, "transformer")
    words = f"{origin}wte.weight"
    copies: dict[str, str] = {}
    if theirs.tie_word_embeddings:
        words, copies = alias(source, words, "lm_head.weight")
    take = {f"{to}embed_tokens.weight": Take((words,)), f"{to}embed_positions.weight": Take((f"{origin}wpe.weight",))}
    for i in range(theirs.n_layer):
        a, b = f"{to}layers.{i}", f"{origin}h.{i}"
        for part, x in enumerate("qkv"):
            for kind in ("weight", "bias"):
                scale = query_scale(theirs, i) if x == "q" else 1.0
                ours = f"{a}.self_attn.{project}{x}_proj.{kind}"
                take[ours] = Take((f"{b}.attn.c_attn.{kind}",), third(part, scale))
        take |= affine(f"{a}.self_attn.o_proj", f"{b}.attn.c_proj", turned)
        take |= affine(f"{a}.self_attn_norm", f"{b}.ln_1")
        take |= affine(f"{a}.feed_forward.up_proj", f"{b}.mlp.c_fc", turned)
        take |= affine(f"{a}.feed_forward.down_proj", f"{b}.mlp.c_proj", turned)
        take |= affine(f"{a}.feed_forward_norm", f"{b}.ln_2")
    return take | affine(f"{to}norm", f"{origin}ln_f"), copies


def query_scale(theirs: Any, layer: int) -> float:
    """The factor that turns scores over sqrt(D) into the source's, which may not divide by it, or also by the layer's
    number."""
    scale = 1.0 if theirs.scale_attn_weights else math.sqrt(theirs.n_embd // theirs.n_head)
    return scale / (layer + 1) if theirs.scale_attn_by_inverse_layer_idx else scale


def third(part: int, scale: float) -> Callable[[Tensor], Tensor]:
    """Queries, keys or values of the map that makes all three, which holds inputs by outputs; the same of its bias."""

    def make(tensor: Tensor) -> Tensor:
        x = turned(tensor.chunk(3, dim=-1)[part])
        return x if scale == 1.0 else x * scale

    return make


def turned(tensor: Tensor) -> Tensor:
    """A weight of inputs by outputs as nn.Linear has it; a bias as it is."""
    return tensor.mT if tensor.dim() == 2 else tensor
