"""Transformer-XL: transformers' TransfoXL folders (removed from it in version 5), and the authors' model.pt.

Both hold the same tensors; the folder's names begin with "transformer.". They compute slightly different things, and
the converted config says which:

- transformers' port begins a text with mem_len memory states of zeros, which take part in the softmax
  (`initial_memory="zeros"`); the authors' code begins with none.
- Column c1 + i - 1 of the adaptive softmax's head is tail cluster i's in transformers' port (`cluster_order=
  "forward"`); the authors' code counts the clusters from the end (utils/proj_adaptive_softmax.py, "reversed").

Neither checkpoint says how long a segment is: there a forward's input is the segment. Here segments follow a row's
tokens, `segment_length` of them each, so it is an option. With same_length, as in transfo-xl-wt103, a query sees the
same keys whatever the segments; otherwise give the length of the forwards whose results are wanted.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..models.adaptive import has_projections, is_adaptive
from ..models.configuration_transformer_xl import GalleryTransformerXLConfig
from ..models.modeling_transformer_xl import (
    GalleryTransformerXLForCausalLM,
    GalleryTransformerXLForSequenceClassification,
    GalleryTransformerXLModel,
)
from .checkpoint import Plan, Source, Take, as_config, only
from .transfo_xl_vocabulary import vocabulary_tokenizer

# Values of the fields that a config.json leaves out: the defaults of transformers 4.35.2, TransfoXLConfig.
DEFAULTS: dict[str, Any] = dict(
    vocab_size=267735,
    cutoffs=[20000, 40000, 200000],
    d_model=1024,
    d_embed=1024,
    n_head=16,
    d_head=64,
    d_inner=4096,
    div_val=4,
    pre_lnorm=False,
    n_layer=18,
    mem_len=1600,
    clamp_len=1000,
    same_length=True,
    proj_share_all_but_first=True,
    dropout=0.1,
    dropatt=0.0,
    untie_r=True,
    proj_init_std=0.01,
    init_std=0.02,
    layer_norm_epsilon=1e-5,
    eos_token_id=0,
    bos_token_id=None,
    pad_token_id=None,
    tie_word_embeddings=True,
)
SAME_NAME = (
    "vocab_size",
    "mem_len",
    "same_length",
    "untie_r",
    "pre_lnorm",
    "cutoffs",
    "div_val",
    "tie_word_embeddings",
    "bos_token_id",
    "pad_token_id",
    "eos_token_id",
)
OTHER_NAME = dict(
    hidden_size="d_model",
    num_hidden_layers="n_layer",
    num_attention_heads="n_head",
    head_dim="d_head",
    intermediate_size="d_inner",
    hidden_dropout="dropout",
    attention_dropout="dropatt",
    layer_norm_eps="layer_norm_epsilon",
    initializer_range="init_std",
    projection_init_range="proj_init_std",
    embedding_size="d_embed",
)
TYPES: dict[str, type] = {name: type(x) for name, x in DEFAULTS.items() if not name.endswith("_token_id")}
TYPES |= dict(bos_token_id=int, pad_token_id=int, tgt_len=int)
KINDS = {bool: "True or False", int: "a whole number", float: "a number", list: "a list of whole numbers"}


class TransfoXL:
    """Folders of transformers' TransfoXLLMHeadModel, TransfoXLForSequenceClassification and TransfoXLModel."""

    name = "Transformer-XL"
    targets = ("transformer_xl",)

    def recognises(self, source: Source) -> bool:
        return source.config.get("model_type") == "transfo-xl"

    def plan(self, source: Source, to: str, segment_length: int | None = None) -> Plan:
        """segment_length: tokens in a segment; default the config's tgt_len, which old checkpoints have, or else its
        mem_len."""
        only(source.config, attn_type=(0,), sample_softmax=(-1, 0))
        given = DEFAULTS | source.config
        check_types(given)
        labels: dict[str, Any] = {x: given[x] for x in ("id2label", "label2id", "problem_type") if x in given}
        as_config(PreTrainedConfig, labels)  # for its checks
        settings = {name: given[name] for name in SAME_NAME} | {ours: given[name] for ours, name in OTHER_NAME.items()}
        share = given["proj_share_all_but_first"]
        default = given.get("tgt_len") or given["mem_len"] or 512
        config = GalleryTransformerXLConfig(
            **settings,
            **labels,
            segment_length=default if segment_length is None else segment_length,
            clamp_len=given["clamp_len"] if given["clamp_len"] > 0 else -1,
            tie_projs=given.get("tie_projs") or [False] + [share] * len(given["cutoffs"]),
            cluster_order="forward",
            initial_memory="zeros",
        )
        return plan_tensors(config, source)


def check_types(given: dict[str, Any]):
    """Raises ValueError, naming the field and its value, for one that is of another type than its default."""
    for name, kind in TYPES.items():
        value = given.get(name)
        if value is None and DEFAULTS.get(name) is None:
            continue
        fits = type(value) is kind or (kind is float and type(value) is int)
        if not fits or (isinstance(value, list) and any(type(x) is not int for x in value)):
            raise ValueError(f"{name} is {value!r}; it must be {KINDS[kind]}")


class ModelPt:
    """The authors' model.pt, as a state_dict and without a config: what its shapes do not tell must be told."""

    name = "Transformer-XL (model.pt of its authors)"
    targets = ("transformer_xl",)

    def recognises(self, source: Source) -> bool:
        return not source.config and (source.folder / "model.pt").is_file()

    def plan(
        self,
        source: Source,
        to: str,
        *,
        segment_length: int | None = None,
        mem_len: int | None = None,
        clamp_len: int = -1,
        same_length: bool = False,
        pre_lnorm: bool = False,
        cutoffs: list[int] | None = None,
        eos_token_id: int = 0,
    ) -> Plan:
        """The options are the arguments of the authors' eval.py (tgt_len is segment_length) and of train.py.

        cutoffs are read from the embeddings where they are of several widths (div_val above 1). eos_token_id: "<eos>"
        comes first in the vocabularies that the authors' scripts make.
        """
        tensors = source.tensors
        needed = ["word_emb.emb_layers.0.weight", "r_w_bias", "layers.0.pos_ff.CoreNet.0.weight"]
        if missing := [name for name in needed if name not in tensors]:
            raise ValueError(f"{tensors.path} is not the authors' Transformer-XL: it has no {', '.join(missing)}")
        if segment_length is None or mem_len is None:
            raise ValueError(
                f"{tensors.path} has no config, so give segment_length (tgt_len in the authors' code) and mem_len"
            )
        if cutoffs is not None and not isinstance(cutoffs, (list, tuple)):
            raise ValueError(f"cutoffs is {cutoffs!r}; it must be a list of ids at which clusters end")
        tables = [_shape(tensors, TABLE.format(i), 2) for i in range(_count(tensors, TABLE))]
        if len(tables) > 1:
            ends = torch.tensor([words for words, _ in tables]).cumsum(0).tolist()[:-1]
            if cutoffs is not None and list(cutoffs) != ends:
                raise ValueError(f"cutoffs are {cutoffs}; the embeddings in {tensors.path} end at {ends}")
            cutoffs = ends
        clusters = _shape(tensors, "crit.cluster_bias", 1)[0] if "crit.cluster_bias" in tensors else 0
        if len(cutoffs or []) != clusters:
            raise ValueError(f"cutoffs are {cutoffs}; {tensors.path} has a head of {clusters} tail clusters")
        heads, head_dim = _shape(tensors, "r_w_bias", 2)
        inner, width = _shape(tensors, "layers.0.pos_ff.CoreNet.0.weight", 2)
        config = GalleryTransformerXLConfig(
            vocab_size=sum(words for words, _ in tables),
            hidden_size=width,
            num_hidden_layers=_count(tensors, "layers.{}.dec_attn.qkv_net.weight"),
            num_attention_heads=heads,
            head_dim=head_dim,
            intermediate_size=inner,
            embedding_size=tables[0][1],
            div_val=tables[0][1] // tables[1][1] if len(tables) > 1 else 1,
            cutoffs=cutoffs,
            tie_projs=[_is_tied(tensors, i, len(tables) > 1) for i in range(clusters + 1)],
            segment_length=segment_length,
            mem_len=mem_len,
            clamp_len=clamp_len,
            same_length=same_length,
            pre_lnorm=pre_lnorm,
            cluster_order="reversed",
            initial_memory="empty",
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=eos_token_id,
        )
        return plan_tensors(config, source)


TABLE = "word_emb.emb_layers.{}.weight"


def _count(tensors, pattern: str) -> int:
    """Counts names that are numbered from 0."""
    i = 0
    while pattern.format(i) in tensors:
        i += 1
    return i


def _shape(tensors, name: str, dims: int) -> tuple[int, ...]:
    """The size of a tensor that says how large the model is."""
    shape = tuple(tensors.meta(name).shape)
    if len(shape) != dims or 0 in shape:
        raise ValueError(
            f"{tensors.path} holds {name} of the shape {shape}; it must have {dims} dimensions, none empty"
        )
    return shape


def _is_tied(tensors, i: int, several: bool) -> bool:
    names = f"crit.out_projs.{i}", f"word_emb.emb_projs.{i if several else 0}"
    return all(name in tensors for name in names) and torch.equal(*(tensors[name] for name in names))


def plan_tensors(config: GalleryTransformerXLConfig, source: Source) -> Plan:
    """The tensors' places, under the head that they have: a language model's, a classifier's or none."""
    tensors = source.tensors
    base = "transformer." if any(name.startswith("transformer.") for name in tensors) else ""
    model: type[PreTrainedModel]
    if any(name.startswith("crit.") for name in tensors):
        model, inside = GalleryTransformerXLForCausalLM, "model."
    elif "score.weight" in tensors:
        model, inside = GalleryTransformerXLForSequenceClassification, "model."
    else:
        model, inside = GalleryTransformerXLModel, ""
    take = {inside + name: made for name, made in _backbone(config, base).items()}
    copies: dict[str, str] = {}
    if not config.untie_r:
        for name in ("r_w_bias", "r_r_bias"):  # transformers' port lists the shared biases again in every layer
            layers = range(config.num_hidden_layers)
            copies |= {f"{base}layers.{i}.dec_attn.{name}": f"{base}{name}" for i in layers}
    if model is GalleryTransformerXLForCausalLM:
        head, ties = _softmax(config, base)
        take |= head
        copies |= ties
    elif model is GalleryTransformerXLForSequenceClassification:
        take["classifier.weight"] = Take(("score.weight",))
    # A safetensors file holds one of those that are the same, and any of them may be it.
    other = {a: b for pair in copies.items() for a, b in (pair, pair[::-1]) if a not in tensors and b in tensors}
    take = {name: replace(made, names=tuple(other.get(n, n) for n in made.names)) for name, made in take.items()}
    return Plan(
        model,
        config,
        take,
        ignore=(r"(transformer\.)?pos_emb\.inv_freq",),
        copies=copies,
        tokenizer=vocabulary_tokenizer,
    )


def _backbone(config, base: str) -> dict[str, Take]:
    def third(i):
        return lambda qkv: qkv.tensor_split(3)[i]  # rows in the order q, k, v

    take = {}
    if is_adaptive(config):
        clusters = range(len(config.cutoffs) + 1 if config.div_val > 1 else 1)
        for i in clusters:
            take[f"embed_tokens.tables.{i}.weight"] = Take((f"{base}word_emb.emb_layers.{i}.weight",))
            if has_projections(config):
                take[f"embed_tokens.projs.{i}"] = Take((f"{base}word_emb.emb_projs.{i}",))
    else:
        take["embed_tokens.weight"] = Take((f"{base}word_emb.emb_layers.0.weight",))
    if not config.untie_r:
        take["content_bias"] = Take((f"{base}r_w_bias",))
        take["position_bias"] = Take((f"{base}r_r_bias",))
    for layer in range(config.num_hidden_layers):
        theirs, ours = f"{base}layers.{layer}.", f"layers.{layer}."
        for i, letter in enumerate("qkv"):
            take[f"{ours}self_attn.{letter}_proj.weight"] = Take((f"{theirs}dec_attn.qkv_net.weight",), third(i))
        names = {
            "self_attn.r_proj.weight": "dec_attn.r_net.weight",
            "self_attn.o_proj.weight": "dec_attn.o_net.weight",
            "self_attn_norm.weight": "dec_attn.layer_norm.weight",
            "self_attn_norm.bias": "dec_attn.layer_norm.bias",
            "feed_forward.up_proj.weight": "pos_ff.CoreNet.0.weight",
            "feed_forward.up_proj.bias": "pos_ff.CoreNet.0.bias",
            "feed_forward.down_proj.weight": "pos_ff.CoreNet.3.weight",
            "feed_forward.down_proj.bias": "pos_ff.CoreNet.3.bias",
            "feed_forward_norm.weight": "pos_ff.layer_norm.weight",
            "feed_forward_norm.bias": "pos_ff.layer_norm.bias",
        }
        if config.untie_r:
            names |= {
                "self_attn.content_bias": "dec_attn.r_w_bias",
                "self_attn.position_bias": "dec_attn.r_r_bias",
            }
        take |= {ours + name: Take((theirs + name_there,)) for name, name_there in names.items()}
    return take


def _softmax(config, base: str) -> tuple[dict[str, Take], dict[str, str]]:
    """The sources of the map to the vocabulary, and the source's names for what it shares with the embedding."""
    tables = range(len(config.cutoffs) + 1 if config.div_val > 1 else 1)
    table = {f"crit.out_layers.{i}.weight": f"{base}word_emb.emb_layers.{i}.weight" for i in tables}
    projections = {}
    if has_projections(config):
        for i in range(len(config.cutoffs) + 1):
            projections[f"crit.out_projs.{i}"] = f"{base}word_emb.emb_projs.{i if config.div_val > 1 else 0}"
    tied = [name for i, name in enumerate(projections) if config.tie_projs is None or config.tie_projs[i]]
    copies = {name: projections[name] for name in tied}
    take = {}
    if config.tie_word_embeddings:
        copies |= table
    if not is_adaptive(config):
        names = {"lm_head.weight": "crit.out_layers.0.weight", "lm_head.bias": "crit.out_layers.0.bias"}
    else:
        names = {f"lm_head.weights.{i}": name for i, name in enumerate(table)}
        names |= {f"lm_head.biases.{i}": f"crit.out_layers.{i}.bias" for i in tables}
        names |= {f"lm_head.projs.{i}": name for i, name in enumerate(projections)}
        if config.cutoffs:
            names |= {f"lm_head.cluster_{kind}": f"crit.cluster_{kind}" for kind in ("weight", "bias")}
    for ours, theirs in names.items():
        if theirs in copies and config.tie_word_embeddings:
            continue  # transformers ties it when it loads
        take[ours] = Take((theirs,))
    return take, copies
