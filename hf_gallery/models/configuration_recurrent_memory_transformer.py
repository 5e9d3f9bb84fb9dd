"""Configuration of the Recurrent Memory Transformer (Bulatov et al. 2022)."""

from __future__ import annotations

from typing import Any

from .configuration_base import MOST, GalleryStackConfig
from .rings import RingLayout
from .segment_step import SegmentLayout


class GalleryRecurrentMemoryTransformerConfig(GalleryStackConfig):
    """The Recurrent Memory Transformer: segments that hand a few memory tokens on, one to the next.

    Sizes are those of the authors' code for enwik8 (Bulatov, Kuratov, Burtsev 2022, arXiv 2207.06881; booydar/LM-RMT,
    run_enwik8_base.sh): 12 layers, 512 wide. Positions are absolute, within a segment and its memory tokens.

    memory_attention: "full", memory tokens see each other, as in booydar/LM-RMT, of which the paper's language models
    are; "causal", they see what stands before them, as in booydar/recurrent-memory-transformer around GPT-2. Of a
    decoder; an encoder sees all in all directions.

    Raises ValueError for values that do not fit, naming the argument.

    >>> from hf_gallery import GalleryRecurrentMemoryTransformerConfig
    >>> GalleryRecurrentMemoryTransformerConfig(segment_length=8, num_memory_tokens=4).longest_segment
    16
    """

    model_type = "gallery_recurrent_memory_transformer"

    num_hidden_layers: int = 12
    is_decoder: bool = True  # causal, memory before and behind a segment; False: an encoder, memory before it alone
    scale_embedding: bool = True
    segment_length: int = 512  # L: tokens that see each other
    num_memory_tokens: int = 10  # M: carried from segment to segment; 0 = none, and segments know nothing of another
    bptt_depth: int = -1  # gradients through at most as many segments before a segment; -1 = all of the forward
    memory_attention: str = "full"

    def __post_init__(self, **kwargs: Any):
        self.check_count("segment_length", 1, MOST)
        self.check_count("num_memory_tokens", 0, MOST)
        if not isinstance(self.bptt_depth, int) or isinstance(self.bptt_depth, bool) or self.bptt_depth < -1:
            raise ValueError(
                f"bptt_depth is {self.bptt_depth!r}; it is a number of segments of at least 0, or -1 for all"
            )
        self.check_choice("memory_attention", ["full", "causal"])
        super().__post_init__(**kwargs)
        for name, only, why in (
            ("type_vocab_size", 0, "memory tokens have no type"),
            ("embedding_size", None, "memory tokens are as wide as hidden states"),
            ("classifier_act", "tanh", "no pooler stands before its classifier"),
        ):
            if getattr(self, name) != only:
                raise ValueError(f"{name} is {getattr(self, name)!r}; {why} in this model, so leave it at {only!r}")
        self.check_positions()

    def check_positions(self):
        """Raises ValueError unless learned positions cover a segment with its memory tokens."""
        if self.longest_input is not None and self.longest_segment > self.longest_input:
            raise ValueError(
                f"segment_length is {self.segment_length} and num_memory_tokens {self.num_memory_tokens}, together "
                f"{self.longest_segment} positions, more than the {self.longest_input} that max_position_embeddings "
                f"{self.max_position_embeddings} reaches; learned positions must cover a segment with its memory"
            )

    @property
    def longest_segment(self) -> int:
        """Tokens of a whole segment, memory tokens among them."""
        return self.segment_length + (2 if self.is_decoder else 1) * self.num_memory_tokens

    @property
    def cache_capacity(self) -> int:
        """Keys kept for the tokens to come: of the memory that the segment reads, and of its tokens but the last."""
        return self.num_memory_tokens + self.segment_length - 1

    def columns_kept(self, layer: int) -> int:
        """0: what is kept are columns of a segment, which hold memory tokens besides those of time."""
        return 0

    def ring_layout(self, layer: int, most: int | None) -> dict[str, RingLayout]:
        layout = SegmentLayout(self.num_memory_tokens + self.segment_length, memory=self.num_memory_tokens)
        return {"keys": layout, "values": layout}

    def cache_layout(self, layer: int) -> list[dict[str, tuple]]:
        shape = (self.num_attention_heads, self.cache_capacity, self.head_dim)
        layout: dict[str, tuple] = {"keys": shape, "values": shape}
        if layer == 0 and self.num_memory_tokens:
            layout["memory"] = (self.num_memory_tokens, self.hidden_size)
        return [layout]
