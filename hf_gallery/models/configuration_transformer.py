"""Configuration of the Transformer of Vaswani et al. 2017."""

from __future__ import annotations

from typing import Any

from .configuration_base import MOST, GalleryStackConfig


class GalleryTransformerConfig(GalleryStackConfig):
    """The Transformer: encoder-decoder as published, or its decoder or encoder alone.

    Defaults are the base model of Vaswani et al. 2017 (arXiv 1706.03762, table 3) over bytes. Other fields give the
    forms that later models made of it: pre-norm and learned positions (GPT-2), an embedding norm and token types
    (BERT), sinusoids with the sines first (Marian).

    Raises ValueError for values that do not fit, naming the argument.

    >>> from hf_gallery import GalleryTransformerConfig
    >>> GalleryTransformerConfig(segment_length=8).cache_capacity
    7
    """

    model_type = "gallery_transformer"

    scale_embedding: bool = True  # section 3.4
    num_encoder_layers: int | None = None  # encoder-decoder: default num_hidden_layers
    num_decoder_layers: int | None = None
    is_encoder_decoder: bool = False  # set by ForConditionalGeneration
    final_logits_bias: bool = False  # encoder-decoder: a bias on the logits (Marian)
    # None: a query sees the whole input. A number: segments of that length see only themselves, the vanilla model that
    # Dai et al. 2019 (figure 1) compare with. Positions count within the segment.
    segment_length: int | None = None
    decoder_start_token_id: int | None = None  # encoder-decoder; default bos_token_id

    def __post_init__(self, **kwargs: Any):
        for name in ("num_encoder_layers", "num_decoder_layers"):
            if getattr(self, name) is not None:
                self.check_count(name, 1)
        if self.segment_length is not None:
            self.check_count("segment_length", 1, MOST)
            if self.is_encoder_decoder:
                raise ValueError(
                    f"segment_length is {self.segment_length} and is_encoder_decoder is True; only a single stack can "
                    "be cut into segments, so leave segment_length at None"
                )
            if self.longest_input is not None and self.segment_length > self.longest_input:
                raise ValueError(
                    f"segment_length is {self.segment_length}, more than the {self.longest_input} tokens that "
                    f"max_position_embeddings {self.max_position_embeddings} reaches; learned positions must cover a "
                    "segment"
                )
        self.choose_default_ids()
        if self.decoder_start_token_id is None:
            self.decoder_start_token_id = self.bos_token_id
        for name in ("is_encoder_decoder", "final_logits_bias"):
            self.check_flag(name)
        super().__post_init__(**kwargs)

    @property
    def cache_capacity(self) -> int | None:
        return None if self.segment_length is None else self.segment_length - 1

    @property
    def cache_layers(self) -> int:
        own = self.num_decoder_layers if self.is_encoder_decoder else None
        return self.num_hidden_layers if own is None else own

    def cache_layout(self, layer: int) -> list[dict[str, tuple]]:
        (layout,) = super().cache_layout(layer)
        if self.is_encoder_decoder:
            layout |= {f"cross_{name}": shape for name, shape in layout.items()}
        return [layout]

    @property
    def cache_facts(self) -> dict[str, str]:
        return {"source_length": "cross_keys"} if self.is_encoder_decoder else {}

    def check_special_ids(self):
        super().check_special_ids()
        self.check_ids("decoder_start_token_id")
