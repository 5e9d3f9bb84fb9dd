"""BERT (Devlin et al. 2018) and encoders that compute as it does: RoBERTa (Liu et al. 2019), XLM-R (Conneau et al.
2020), CamemBERT (Martin et al. 2020), data2vec's of text (Baevski et al. 2022), ELECTRA (Clark et al. 2020). From
transformers' checkpoints to a Transformer encoder, or to a Longformer, as Beltagy et al. 2020, section 5, made theirs.

Left out is what has no place in the gallery: what a bare model's pooler makes of the first token, the next-sentence
head beside a masked language model, and the head by which ELECTRA's discriminator finds replaced tokens: of that class
the encoder is taken, a bare model. All else is equal, dropout included: RoBERTa's and ELECTRA's classifiers of texts
have it before their first map too, BERT's has not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from transformers import (
    BertConfig,
    CamembertConfig,
    Data2VecTextConfig,
    ElectraConfig,
    PreTrainedConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

from ..models import modeling_longformer, modeling_transformer
from ..models.configuration_longformer import GalleryLongformerConfig
from ..models.configuration_transformer import GalleryTransformerConfig
from .checkpoint import Plan, Source, Take, as_config, copy_tokenizer, only
from .parts import affine, alias, architecture, given, longer, prefix, repeated, tokenizer_for


class MaskedHead(NamedTuple):
    """Names that a masked language model's head has in the source: of the map, its norm, the output map, its bias.
    activation: the head's, where it is not the layers'."""

    dense: str
    norm: str
    decoder: str
    bias: str
    activation: str | None = None


class Family(NamedTuple):
    """Encoders of one kind in transformers, as far as they differ.

    name: how their classes begin; prefix: their tensors'. heads: what follows the name in classes that are known, with
    a tensor that shows the class where the config names none, or None. counts_from_padding: positions begin behind the
    id of padding. classifier: the maps of a classifier of texts. pooler: the map before a score of multiple choice.
    """

    name: str
    config: type[PreTrainedConfig]
    prefix: str
    heads: Mapping[str, str | None]
    masked: MaskedHead
    classifier: tuple[str, str]
    pooler: str
    counts_from_padding: bool = False


BERT_HEAD = MaskedHead(
    "cls.predictions.transform.dense",
    "cls.predictions.transform.LayerNorm",
    "cls.predictions.decoder",
    "cls.predictions.bias",
)
ROBERTA_HEAD = MaskedHead("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias", "gelu")
ELECTRA_HEAD = MaskedHead(
    "generator_predictions.dense",
    "generator_predictions.LayerNorm",
    "generator_lm_head",
    "generator_lm_head.bias",
    "gelu",
)
FIRST_TOKEN = ("classifier.dense", "classifier.out_proj")  # RoBERTa's classifier of whole texts, and ELECTRA's
BARE = "embeddings.word_embeddings.weight"

BERT_HEADS = {
    "ForMaskedLM": "cls.predictions.transform.dense.weight",
    "ForPreTraining": None,
    "ForSequenceClassification": "classifier.weight",
    "ForTokenClassification": None,
    "ForQuestionAnswering": "qa_outputs.weight",
    "ForMultipleChoice": None,
    "Model": BARE,
}
ROBERTA_HEADS = {
    "ForMaskedLM": "lm_head.dense.weight",
    "ForSequenceClassification": "classifier.out_proj.weight",
    "ForTokenClassification": "classifier.weight",
    "ForQuestionAnswering": "qa_outputs.weight",
    "ForMultipleChoice": None,
    "Model": BARE,
}
ELECTRA_HEADS = {
    "ForMaskedLM": "generator_predictions.dense.weight",
    "ForPreTraining": "discriminator_predictions.dense.weight",
    "ForSequenceClassification": "classifier.out_proj.weight",
    "ForMultipleChoice": "sequence_summary.summary.weight",
    "ForTokenClassification": "classifier.weight",
    "ForQuestionAnswering": "qa_outputs.weight",
    "Model": BARE,
}


def roberta_like(name: str, config: type[PreTrainedConfig], prefix: str = "roberta") -> Family:
    """A family whose classes are RoBERTa's under another name."""
    return Family(name, config, prefix, ROBERTA_HEADS, ROBERTA_HEAD, FIRST_TOKEN, "{origin}pooler.dense", True)


FAMILIES = {
    "bert": Family(
        "Bert",
        BertConfig,
        "bert",
        BERT_HEADS,
        BERT_HEAD,
        ("{origin}pooler.dense", "classifier"),
        "{origin}pooler.dense",
    ),
    "roberta": roberta_like("Roberta", RobertaConfig),
    "xlm-roberta": roberta_like("XLMRoberta", XLMRobertaConfig),
    "camembert": roberta_like("Camembert", CamembertConfig),
    "data2vec-text": roberta_like("Data2VecText", Data2VecTextConfig, "data2vec_text"),
    "electra": Family(
        "Electra", ElectraConfig, "electra", ELECTRA_HEADS, ELECTRA_HEAD, FIRST_TOKEN, "sequence_summary.summary"
    ),
}
PRE_TRAINED = {"Bert": "ForMaskedLM", "Electra": "Model"}  # what becomes of a class with both heads of its training

# Encoders of transformers that compute something else: what they are asked for is refused, with what it is.
OTHERS = {
    "albert": "its layers share one set of weights",
    "big_bird": "its attention has random blocks",
    "canine": "it reads characters and shortens them",
    "convbert": "its attention is mixed with convolutions",
    "deberta": "its scores have terms of content and position",
    "deberta-v2": "its scores have terms of content and position",
    "distilbert": "its classifier and its masked head are others",
    "ernie": "it embeds the task",
    "funnel": "its layers shorten the text",
    "megatron-bert": "its norms stand before the layers",
    "mobilebert": "its layers have bottlenecks",
    "modernbert": "it has rotary positions and gated feed-forwards",
    "mpnet": "its scores have relative positions",
    "nystromformer": "its attention is approximate",
    "rembert": "its tables of input and output differ in width",
    "roberta-prelayernorm": "its norms stand before the layers",
    "roformer": "it has rotary positions",
    "squeezebert": "its maps are grouped convolutions",
    "xlm-roberta-xl": "its norms stand before the layers",
}


class Bert:
    """Folders of transformers' BERT and its kin: the bare models, masked language models, classifiers of texts and of
    tokens, models that answer questions, and those that choose."""

    name = "BERT, RoBERTa, XLM-R, CamemBERT, data2vec-text or ELECTRA"
    targets = ("transformer", "longformer")

    def recognises(self, source: Source) -> bool:
        """Raises ValueError for an encoder that is none of these, with what it has that they have not."""
        kind = source.config.get("model_type")
        if kind in OTHERS:
            raise ValueError(
                f"{source.folder} is a {kind} model, which cannot be converted: {OTHERS[kind]}; encoders that can are "
                f"{', '.join(FAMILIES)}, longformer"
            )
        return kind in FAMILIES

    def plan(
        self,
        source: Source,
        to: str,
        attention_window: int | list[int] | None = None,
        max_position_embeddings: int | None = None,
        sep_token_id: int | None = None,
    ) -> Plan:
        """to="transformer": the same model.

        to="longformer": position embeddings copied again and again until there are max_position_embeddings (by default
        enough for 4096 tokens), global maps that start as the local ones, and an attention_window (keys, half on each
        side; default 512). With a window over everything, it gives what the source gives. sep_token_id: the token that
        ends a question; by default RoBERTa's end of a text, or the tokenizer's separator.
        """
        family = FAMILIES[source.config["model_type"]]
        theirs: Any = as_config(family.config, source.config)
        head = architecture(source, {family.name + head: x for head, x in family.heads.items()})
        head = head.removeprefix(family.name)
        if head == "ForPreTraining":
            head = PRE_TRAINED[family.name]
        only(
            theirs.to_dict(), is_decoder=(False,), add_cross_attention=(False,), position_embedding_type=("absolute",)
        )
        options = given(
            to,
            ("attention_window", "max_position_embeddings", "sep_token_id") if to == "longformer" else (),
            attention_window=attention_window,
            max_position_embeddings=max_position_embeddings,
            sep_token_id=sep_token_id,
        )
        offset = position_offset(theirs) if family.counts_from_padding else 0
        settings = encoder_settings(theirs, offset) | head_settings(theirs, family, head)
        config: Any
        origin = prefix(source, family.prefix)
        backbone = "" if head == "Model" else "model."
        if to == "transformer":
            model = getattr(modeling_transformer, f"GalleryTransformer{head}")
            config = GalleryTransformerConfig(**settings)
            take = encoder(f"{backbone}stack.", origin, config)
        else:
            own = theirs.max_position_embeddings
            length = longer(options.get("max_position_embeddings"), 4096 + offset, own)
            model = getattr(modeling_longformer, f"GalleryLongformer{head}")
            options = {"sep_token_id": separator(source, theirs, family)} | options
            config = GalleryLongformerConfig(**settings | options | {"max_position_embeddings": length})
            take = encoder(backbone, origin, config) | global_maps(backbone, origin, config, "")
            take[f"{backbone}embed_positions.weight"] = Take(
                (f"{origin}embeddings.position_embeddings.weight",), repeated(own, length, offset)
            )
        copies: dict[str, str] = {}
        if head == "ForMaskedLM":
            made, copies = masked_head(source, theirs, origin, family.masked)
            take |= made
        else:
            maps = [name.format(origin=origin) for name in (*family.classifier, family.pooler)]
            take |= head_maps(head, *maps)
        return Plan(
            model=model,
            config=config,
            take=take,
            ignore=IGNORED,
            copies=copies,
            tokenizer=tokenizer_for(config.longest_input),
        )


def head_settings(theirs: Any, family: Family, head: str) -> dict[str, Any]:
    """Settings that the head has otherwise than `encoder_settings` says. Raises ValueError for what has none."""
    if head == "ForMultipleChoice" and family.name == "Electra":
        only(theirs.to_dict(), summary_type=("first",), summary_use_proj=(True,))
        activation = theirs.summary_activation or "linear"
        return dict(classifier_act=activation, classifier_dropout=theirs.summary_last_dropout)
    if head == "ForMultipleChoice" and family.counts_from_padding:
        return dict(classifier_dropout=None)  # theirs leaves it aside
    if head != "ForSequenceClassification":
        return {}
    if family.name == "Bert":
        return dict(pooler_dropout=0.0)
    behind = theirs.classifier_dropout
    settings = dict(pooler_dropout=theirs.hidden_dropout_prob if behind is None else behind)
    return settings | (dict(classifier_act="gelu") if family.name == "Electra" else {})


def separator(source: Source, theirs: PreTrainedConfig, family: Family) -> int | None:
    """The token that ends a question, if the source says so."""
    if family.counts_from_padding:
        return theirs.eos_token_id
    tokenizer = copy_tokenizer(source)
    return None if tokenizer is None else tokenizer.sep_token_id


# ------------------------------------------------------------------------------- what Longformer has of RoBERTa, too

# Buffers of older files, and what is left out (see above).
IGNORED = (
    r"(.+\.)?embeddings\.(position|token_type)_ids",
    r"(.+\.)?pooler\..*|cls\.seq_relationship\..*|discriminator_predictions\..*",
)


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
        embedding_size=getattr(theirs, "embedding_size", None),
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
    if config.embedding_width != config.hidden_size:
        take |= affine(f"{to}embed_project", f"{origin}embeddings_project")
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
    if head.activation is not None:
        only(theirs.to_dict(), hidden_act=(head.activation,))  # of the head, whatever that of the layers
    kept, copies = alias(source, head.bias, f"{head.decoder}.bias")
    copies[f"{head.decoder}.weight"] = f"{origin}embeddings.word_embeddings.weight"
    take = affine("transform", head.dense) | affine("transform_norm", head.norm) | {"lm_head.bias": Take((kept,))}
    return take, copies


def head_maps(head: str, dense: str, output: str, pooler: str) -> dict[str, Take]:
    """The maps of every head but a masked language model's. dense, output: the source's classifier of texts; pooler:
    its map before the score of a choice."""
    if head == "ForSequenceClassification":
        return affine("pooler", dense) | affine("classifier", output)
    if head == "ForMultipleChoice":
        return affine("pooler", pooler) | affine("score", "classifier")
    if head == "ForTokenClassification":
        return affine("classifier", "classifier")
    return affine("qa_outputs", "qa_outputs") if head == "ForQuestionAnswering" else {}
