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
    # None: a query sees the whole input. A number: segments of that length see only themselves, the vanilla model that
    # Dai et al. 2019 (figure 1) compare with. Positions count within the segment.
    segment_length: int | None = None

    def __post_init__(self, **kwargs: Any):
        if self.segment_length is not None:
            self.check_count("segment_length", 1, MOST)
            if self.longest_input is not None and self.segment_length > self.longest_input:
                raise ValueError(
                    f"segment_length is {self.segment_length}, more than the {self.longest_input} tokens that "
                    f"max_position_embeddings {self.max_position_embeddings} reaches; learned positions must cover a "
                    "segment"
                )
        super().__post_init__(**kwargs)

    def check_encoder_decoder(self):
        if self.segment_length is not None:
            raise ValueError(
                f"segment_length is {self.segment_length} and is_encoder_decoder is True; only a single stack can be "
                "cut into segments, so leave segment_length at None"
            )

    @property
    def cache_capacity(self) -> int | None:
        return None if self.segment_length is None else self.segment_length - 1
