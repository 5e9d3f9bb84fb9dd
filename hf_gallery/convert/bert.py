"""BERT (Devlin et al. 2018) and RoBERTa (Liu et al. 2019) checkpoints of transformers: to a Transformer encoder, or to
a Longformer, as Beltagy et al. 2020, section 5, start theirs.

What a bare model's pooler makes of the first token has no place in the gallery's bare model, and neither has the
next-sentence head beside a masked language model: both are left out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import BertConfig, PreTrainedConfig, RobertaConfig

from ..models import modeling_longformer, modeling_transformer
from ..models.configuration_longformer import GalleryLongformerConfig
from ..models.configuration_transformer import GalleryTransformerConfig
from .checkpoint import Plan, Source, Take, as_config, only
from .parts import affine, alias, architecture, given, longer, prefix, repeated, tokenizer_for

HEADS = {
    "Bert": {
        "BertForMaskedLM": "cls.predictions.transform.dense.weight",
        "BertForSequenceClassification": "classifier.weight",
        "BertModel": "embeddings.word_embeddings.weight",
    },
    "Roberta": {
        "RobertaForMaskedLM": "lm_head.dense.weight",
        "RobertaForSequenceClassification": "classifier.out_proj.weight",
        "RobertaModel": "embeddings.word_embeddings.weight",
    },
}


class Bert:
    """Folders of transformers' BERT and RoBERTa: the bare models, masked language models, classifiers of texts."""

    name = "BERT or RoBERTa"
    targets = ("transformer", "longformer")

    def recognises(self, source: Source) -> bool:
        return source.config.get("model_type") in ("bert", "roberta")

    def plan(
        self,
        source: Source,
        to: str,
        attention_window: int | list[int] | None = None,
        max_position_embeddings: int | None = None,
    ) -> Plan:
        """to="transformer": the same model.

        to="longformer": position embeddings copied again and again until there are max_position_embeddings (by default
        enough for 4096 tokens), global maps that start as the local ones, and an attention_window (keys, half on each
        side; default 512). With a window over everything, it gives what the source gives.
        """
        roberta = source.config["model_type"] == "roberta"
        family = "Roberta" if roberta else "Bert"
        theirs: Any = as_config(RobertaConfig if roberta else BertConfig, source.config)
        head = architecture(source, HEADS[family]).removeprefix(family)
        only(
            theirs.to_dict(), is_decoder=(False,), add_cross_attention=(False,), position_embedding_type=("absolute",)
        )
        options = given(
            to,
            ("attention_window", "max_position_embeddings") if to == "longformer" else (),
            attention_window=attention_window,
            max_position_embeddings=max_position_embeddings,
        )
        offset = position_offset(theirs) if roberta else 0
        settings = encoder_settings(theirs, offset)
        config: Any
        origin = prefix(source, family.lower())
        backbone = "" if head == "Model" else "model."
        if to == "transformer":
            model = getattr(modeling_transformer, f"GalleryTransformer{head}")
            config = GalleryTransformerConfig(**settings)
            take = encoder(f"{backbone}stack.", origin, config)
        else:
            own = theirs.max_position_embeddings
            length = longer(options.get("max_position_embeddings"), 4096 + offset, own)
            model = getattr(modeling_longformer, f"GalleryLongformer{head}")
            config = GalleryLongformerConfig(
                **settings | options | {"max_position_embeddings": length},
                sep_token_id=theirs.eos_token_id if roberta else None,
            )
            take = encoder(backbone, origin, config) | global_maps(backbone, origin, config, "")
            take[f"{backbone}embed_positions.weight"] = Take(
                (f"{origin}embeddings.position_embeddings.weight",), repeated(own, length, offset)
            )
        copies: dict[str, str] = {}
        if head == "ForMaskedLM":
            made, copies = masked_head(source, theirs, origin, ROBERTA_HEAD if roberta else BERT_HEAD)
            take |= made
        elif head == "ForSequenceClassification" and roberta:
            take |= first_token_head()
        elif head == "ForSequenceClassification":
            take |= affine("pooler", f"{origin}pooler.dense") | affine("classifier", "classifier")
        return Plan(
            model=model,
            config=config,
            take=take,
            ignore=IGNORED,
            copies=copies,
            tokenizer=tokenizer_for(config.longest_input),
        )


# ------------------------------------------------------------------------------- what Longformer has of RoBERTa, too

# Buffers of older files, and what is left out (see above).
IGNORED = (r"(.+\.)?embeddings\.(position|token_type)_ids", r"(.+\.)?pooler\..*|cls\.seq_relationship\..*")


class MaskedHead(NamedTuple):
    """Names that a masked language model's head has in the source: of the map, its norm, the output map, its bias."""

    dense: str
    norm: str
    decoder: str
    bias: str


BERT_HEAD = MaskedHead(
    "cls.predictions.transform.dense",
    "cls.predictions.transform.LayerNorm",
    "cls.predictions.decoder",
    "cls.predictions.bias",
)
ROBERTA_HEAD = MaskedHead("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias")


def position_offset(theirs: PreTrainedConfig) -> int:
    """The number of the first token's position, which comes after that of padding."""
    if theirs.pad_token_id is None:
        raise ValueError("pad_token_id is None; positions count from it, so it must be a number")
    return theirs.pad_token_id + 1


def encoder_settings(theirs: PreTrainedConfig, offset: int) -> dict[str, Any]:
    """The gallery's config of an encoder whose positions count from `offset`."""
    same = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
        "layer_norm_eps", "initializer_range", "max_position_embeddings", "type_vocab_size", "tie_word_embeddings",
        "pad_token_id", "bos_token_id", "eos_token_id", "id2label", "label2id", "problem_type",
    )  # fmt: skip
    return {field: getattr(theirs, field) for field in same} | dict(
        hidden_dropout=theirs.hidden_dropout_prob,
        attention_dropout=theirs.attention_probs_dropout_prob,
        classifier_dropout=getattr(theirs, "classifier_dropout", None),
        position_embedding_type="learned",
        position_offset=offset,
        norm_position="post",
        scale_embedding=False,
        embedding_norm=True,
        initialization="normal",
    )


def encoder(to: str, origin: str, config: Any) -> dict[str, Take]:
    """Embeddings and layers, `to` and `origin` being what stands before their names."""
    take = {
        f"{to}embed_{ours}.weight": Take((f"{origin}embeddings.{theirs}_embeddings.weight",))
        for ours, theirs in (("tokens", "word"), ("positions", "position"), ("types", "token_type"))
    }
    take |= affine(f"{to}embed_norm", f"{origin}embeddings.LayerNorm")
    for i in range(config.num_hidden_layers):
        a, b = f"{to}layers.{i}", f"{origin}encoder.layer.{i}"
        for x in ("query", "key", "value"):
            take |= affine(f"{a}.self_attn.{x[0]}_proj", f"{b}.attention.self.{x}")
        take |= affine(f"{a}.self_attn.o_proj", f"{b}.attention.output.dense")
        take |= affine(f"{a}.self_attn_norm", f"{b}.attention.output.LayerNorm")
        take |= affine(f"{a}.feed_forward.up_proj", f"{b}.intermediate.dense")
        take |= affine(f"{a}.feed_forward.down_proj", f"{b}.output.dense")
        take |= affine(f"{a}.feed_forward_norm", f"{b}.output.LayerNorm")
    return take


def global_maps(to: str, origin: str, config: Any, suffix: str) -> dict[str, Take]:
    """Longformer's maps for global tokens, from those with the suffix; "" copies the local ones."""
    take = {}
    for i in range(config.num_hidden_layers):
        for x in ("query", "key", "value"):
            ours, theirs = (
                f"{to}layers.{i}.self_attn.{x[0]}_global_proj",
                f"{origin}encoder.layer.{i}.attention.self.{x}",
            )
            for kind in ("weight", "bias"):
                take[f"{ours}.{kind}"] = Take((f"{theirs}{suffix}.{kind}",), torch.clone)
    return take


def masked_head(
    source: Source, theirs: PreTrainedConfig, origin: str, head: MaskedHead
) -> tuple[dict[str, Take], dict[str, str]]:
    """The head of a masked language model, and which source tensors are copies of others."""
    only(theirs.to_dict(), tie_word_embeddings=(True,))
    if head is ROBERTA_HEAD:
        only(theirs.to_dict(), hidden_act=("gelu",))  # of RoBERTa's head, whatever that of the layers
    kept, copies = alias(source, head.bias, f"{head.decoder}.bias")
    copies[f"{head.decoder}.weight"] = f"{origin}embeddings.word_embeddings.weight"
    take = affine("transform", head.dense) | affine("transform_norm", head.norm) | {"lm_head.bias": Take((kept,))}
    return take, copies


def first_token_head() -> dict[str, Take]:
    """RoBERTa's classifier of whole texts."""
    return affine("pooler", "classifier.dense") | affine("classifier", "classifier.out_proj")
