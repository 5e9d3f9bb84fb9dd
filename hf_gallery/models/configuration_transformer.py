"""Configuration of the Transformer of Vaswani et al. 2017."""

from __future__ import annotations

from typing import Any

from .configuration_base import GalleryConfig


class GalleryTransformerConfig(GalleryConfig):
    """The Transformer: encoder-decoder as published, or its decoder or encoder alone.

    Defaults are the base model of Vaswani et al. 2017 (arXiv 1706.03762, table 3) over bytes. Other fields give the
    forms that later models made of it: pre-norm and learned positions (GPT-2), an embedding norm and token types
    (BERT), sinusoids with the sines first (Marian).

    Raises ValueError for values that do not fit, naming the argument.
    """

    model_type = "gallery_transformer"

    num_encoder_layers: int | None = None  # encoder-decoder: default num_hidden_layers
    num_decoder_layers: int | None = None
    is_encoder_decoder: bool = False  # set by ForConditionalGeneration
    is_decoder: bool = False  # one stack: causal; set by ForCausalLM, cleared by ForMaskedLM
    norm_position: str = "post"  # post: norm(x + f(x)), as published; pre: x + f(norm(x)), and a norm at the end
    position_embedding_type: str = "sinusoidal"  # sinusoidal, learned or none
    sinusoid_layout: str = "interleaved"  # interleaved: sin, cos, sin, cos, as published; concatenated: sines first
    max_position_embeddings: int = 2048  # length of the learned table; sinusoids have no end
    scale_embedding: bool = True  # times sqrt(hidden_size), section 3.4
    embedding_norm: bool = False  # a LayerNorm on the embeddings (BERT)
    type_vocab_size: int = 0  # token types (BERT); 0 = none
    attention_bias: bool = True
    initialization: str = "xavier"  # xavier: uniform, as published; normal: normal(0, initializer_range), as GPT-2, BERT
    classifier_dropout: float | None = None  # default hidden_dropout
    final_logits_bias: bool = False  # encoder-decoder: a bias on the logits (Marian)
    # None: a query sees the whole input. A number cuts the input into segments of so many tokens that see only
    # themselves: the vanilla model that Dai et al. 2019 (figure 1) compare with. Positions count within the segment.
    segment_length: int | None = None
    decoder_start_token_id: int | None = None  # encoder-decoder; default bos_token_id

    def __post_init__(self, **kwargs: Any):
        for name in ("num_encoder_layers", "num_decoder_layers"):
            if getattr(self, name) is not None:
                self.check_count(name, 1)
        self.check_choice("norm_position", ["post", "pre"])
        self.check_choice("position_embedding_type", ["sinusoidal", "learned", "none"])
        self.check_choice("sinusoid_layout", ["interleaved", "concatenated"])
        self.check_choice("initialization", ["xavier", "normal"])
        self.check_count("max_position_embeddings", 1)
        self.check_count("type_vocab_size", 0)
        if self.segment_length is not None:
            self.check_count("segment_length", 1)
            if self.is_encoder_decoder:
                raise ValueError(
                    f"segment_length is {self.segment_length} and is_encoder_decoder is True; only a single stack can be "
                    "cut into segments, so leave segment_length at None"
                )
            if self.position_embedding_type == "learned" and self.segment_length > self.max_position_embeddings:
                raise ValueError(
                    f"segment_length is {self.segment_length}, more than max_position_embeddings "
                    f"{self.max_position_embeddings}; learned positions must cover a segment"
                )
        if self.position_embedding_type == "sinusoidal" and self.hidden_size % 2:
            raise ValueError(f"hidden_size is {self.hidden_size}; sinusoidal positions need an even number")
        if self.decoder_start_token_id is None:
            self.decoder_start_token_id = self.bos_token_id
        super().__post_init__(**kwargs)

    @property
    def cache_capacity(self) -> int | None:
        return None if self.segment_length is None else self.segment_length - 1
