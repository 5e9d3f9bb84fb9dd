"""Longformer checkpoints of transformers (longformer-base-4096, -large-4096, and what was trained from them)."""

from __future__ import annotations

from typing import Any

from transformers import LongformerConfig

from ..models import modeling_longformer
from ..models.configuration_longformer import GalleryLongformerConfig
from .bert import (
    FIRST_TOKEN,
    IGNORED,
    ROBERTA_HEAD,
    encoder,
    encoder_settings,
    global_maps,
    head_maps,
    masked_head,
    position_offset,
)
from .checkpoint import Plan, Source, as_config, only
from .parts import architecture, prefix, tokenizer_for

HEADS: dict[str, str | None] = {
    "LongformerForMaskedLM": "lm_head.dense.weight",
    "LongformerForSequenceClassification": "classifier.out_proj.weight",
    "LongformerForTokenClassification": "classifier.weight",
    "LongformerForQuestionAnswering": "qa_outputs.weight",
    "LongformerForMultipleChoice": None,
    "LongformerModel": "embeddings.word_embeddings.weight",
}


class Longformer:
    """Folders of transformers' LongformerModel, without its pooler, and of its heads."""

    name = "Longformer"
    targets = ("longformer",)

    def recognises(self, source: Source) -> bool:
        return source.config.get("model_type") == "longformer"

    def plan(self, source: Source, to: str) -> Plan:
        """attention_window keeps its meaning, the keys on both sides together. Raises ValueError for a config with
        dilation or causal attention, which the released code never had.
        """
        theirs: Any = as_config(LongformerConfig, source.config)
        head = architecture(source, HEADS).removeprefix("Longformer")
        layers = theirs.num_hidden_layers
        only(theirs.to_dict(), autoregressive=(False,), attention_dilation=(1, [1] * layers))
        config: Any = GalleryLongformerConfig(
            **encoder_settings(theirs, position_offset(theirs)),
            attention_window=theirs.attention_window,
            sep_token_id=theirs.sep_token_id,
        )
        origin, backbone = prefix(source, "longformer"), "" if head == "Model" else "model."
        take = encoder(backbone, origin, config) | global_maps(backbone, origin, config, "_global")
        copies: dict[str, str] = {}
        if head == "ForMaskedLM":
            made, copies = masked_head(source, theirs, origin, ROBERTA_HEAD)
            take |= made
        else:
            take |= head_maps(head, *FIRST_TOKEN, f"{origin}pooler.dense")
        return Plan(
            model=getattr(modeling_longformer, f"GalleryLongformer{head}"),
            config=config,
            take=take,
            ignore=IGNORED,
            copies=copies,
            tokenizer=tokenizer_for(config.longest_input),
        )
