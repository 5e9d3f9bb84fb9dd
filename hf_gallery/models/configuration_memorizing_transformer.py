"""Configuration of the Memorizing Transformer (Wu et al. 2022)."""

from __future__ import annotations

from typing import Any

from .configuration_base import MOST, GalleryConfig
from .memory import BACKENDS, MemoryLayout
from .rings import RingLayout


class GalleryMemorizingTransformerConfig(GalleryConfig):
    """The Memorizing Transformer: segments, a local cache, and in some layers a large memory searched by top-k.

    Defaults are the paper's model (Wu et al. 2022, arXiv 2203.08913, and meliad's configs/base_htrans.gin) over bytes:
    12 layers, 1024 wide, 8 heads, segments and cache of 512, memory in the ninth of 12 layers, 32 pairs for each
    query. The published configuration, options/external_memory_8k.gin, retrieves 128.

    The fields from num_positions on give a trained GPT-2 a memory (section 4.5 of the paper gives one to a trained
    Transformer). Its learned positions end, so they start anew after `position_period` tokens, and local attention
    reaches back no farther than that start: what came before is seen through the memory only. So the input has no
    limit, and the field is not called max_position_embeddings, which tools take for one.

    Raises ValueError for values that do not fit, naming the argument.

    >>> from hf_gallery import GalleryMemorizingTransformerConfig
    >>> GalleryMemorizingTransformerConfig(num_hidden_layers=6).memory_layers
    [2]
    """

    model_type = "gallery_memorizing_transformer"

    hidden_size: int = 1024
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    intermediate_size: int = 4096
    hidden_dropout: float = 0.05
    attention_dropout: float = 0.05
    layer_norm_eps: float = 1e-6
    segment_length: int = 512  # memory is searched before a segment, and appended to after it
    mem_len: int = 512  # C: keys of before the segment that local attention sees
    memory_layers: list[int] | None = None  # layers with a memory, counted from 0; default the fourth from the top
    memory_size: int = 8192  # N at most: pairs kept for each row and head, first in, first out
    memory_topk: int = 32  # k: pairs that each query and head retrieves, the paper's number
    memory_backend: str = "exact"  # one of memory.BACKENDS. exact: torch, streaming
    num_positions: int | None = None  # length of a learned table of positions; None: T5's bias, as published
    normalize_qk: bool = True  # queries and keys of length 1, a learned scale per head; else 1 / sqrt(head_dim)
    initial_scale: float = 1.0  # where that scale starts; scores of unit vectors are within it
    scale_embedding: bool = True  # times sqrt(hidden_size)
    attention_bias: bool = False  # of the maps to queries, keys, values and from heads
    mlp_bias: bool = False  # of the feed-forward's maps
    norm_type: str = "rms"  # rms: x / root mean square, as published; layer: LayerNorm, with its mean and bias

    def __post_init__(self, **kwargs: Any):
        self.check_count("num_hidden_layers", 1)
        self.check_count("segment_length", 1, MOST)
        self.check_count("mem_len", 0, MOST)
        self.check_count("memory_size", 1, 2**40)  # it is filled as tokens come
        self.check_count("memory_topk", 1)
        self.check_positive("initial_scale")
        self.check_choice("memory_backend", list(BACKENDS))
        if self.memory_topk > self.memory_size:
            raise ValueError(
                f"memory_topk is {self.memory_topk}, more than memory_size {self.memory_size} holds; lower "
                "memory_topk or raise memory_size"
            )
        if self.memory_layers is None:
            self.memory_layers = [max(0, self.num_hidden_layers - 4)]
        self.check_layers("memory_layers")
        for name in ("normalize_qk", "scale_embedding", "attention_bias", "mlp_bias"):
            self.check_flag(name)
        self.check_choice("norm_type", ["rms", "layer"])
        if self.num_positions is not None:
            self.check_count("num_positions", 1)
            self._check_learned_positions()
        super().__post_init__(**kwargs)

    def _check_learned_positions(self):
        period = self.position_period
        if period == 0:
            raise ValueError(
                f"segment_length is {self.segment_length}, more than num_positions {self.num_positions}; learned "
                "positions must cover a segment"
            )
        if self.mem_len > period - self.segment_length:
            raise ValueError(
                f"mem_len is {self.mem_len}, but learned positions start anew after {period} tokens, the segments of "
                f"{self.segment_length} that num_positions {self.num_positions} covers; give mem_len "
                f"{period - self.segment_length} or less"
            )

    @property
    def position_period(self) -> int | None:
        """Tokens after which learned positions start anew, in whole segments; None where positions have no end."""
        return None if self.num_positions is None else self.num_positions - self.num_positions % self.segment_length

    @property
    def why_no_static_cache(self) -> str | None:
        if self.memory_backend == "exact":
            return None
        return f"memory_backend is {self.memory_backend!r}, whose index would be made anew at every token"

    @property
    def cache_capacity(self) -> int:
        """Keys kept for local attention; the next token may be anywhere in its segment."""
        return self.mem_len + self.segment_length - 1

    def ring_layout(self, layer: int, most: int | None) -> dict[str, RingLayout]:
        rings = super().ring_layout(layer, most)
        if layer in self.memory_layers:
            size, length = self.memory_size, self.segment_length
            rings |= {
                f"memory_{name}": MemoryLayout(size + length, columns=name, size=size, length=length)
                for name in list(rings)
            }
        return rings

    def cache_layout(self, layer: int) -> list[dict[str, tuple]]:
        layouts = super().cache_layout(layer)
        if layer in self.memory_layers:  # empty until a segment ends
            pair = (self.num_attention_heads, None, self.head_dim)
            layouts.append(layouts[0] | {"memory_keys": pair, "memory_values": pair})
        return layouts
