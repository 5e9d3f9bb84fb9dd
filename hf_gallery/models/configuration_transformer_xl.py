"""Configuration of Transformer-XL (Dai et al. 2019)."""

from __future__ import annotations

from typing import Any

from .configuration_base import MOST, GalleryConfig


class GalleryTransformerXLConfig(GalleryConfig):
    """Transformer-XL: segments, a memory of the segments before, relative positions.

    Defaults are the base model of Dai et al. 2019 (arXiv 1901.02860) for enwik8 (run_enwik8_base.sh of the authors'
    code): 12 layers, 512 wide, segments and memory of 512.

    Raises ValueError for values that do not fit, naming the argument.

    >>> from hf_gallery import GalleryTransformerXLConfig
    >>> GalleryTransformerXLConfig(segment_length=8, mem_len=16).cache_capacity
    23
    """

    model_type = "gallery_transformer_xl"

    num_hidden_layers: int = 12
    segment_length: int = 512  # L: tokens that attend to each other with gradient; code: tgt_len
    mem_len: int = 512  # tokens kept from before the segment; 0 = none
    same_length: bool = False  # every query sees mem_len keys, itself among them; else all memory and its own segment
    clamp_len: int = -1  # distances beyond it count as it; -1 = off
    untie_r: bool = False  # position biases u and v of each layer's own; False shares them over layers
    pre_lnorm: bool = False  # normalise the sublayers' inputs; False their outputs, as published
    cutoffs: list[int] | None = None  # ids at which a cluster ends (adaptive embedding and softmax); None = one table
    div_val: int = 1  # each cluster's embedding is div_val times narrower than the one before
    embedding_size: int | None = None  # width of the first cluster's embedding; default hidden_size; code: d_embed
    tie_projs: list[bool] | None = None  # per cluster: share the projection with the embedding; default: all True
    # Which column of the adaptive softmax is a tail cluster's: "forward" as transformers' port computes it,
    # "reversed" as the authors' code does (utils/proj_adaptive_softmax.py). Matters for published weights only.
    cluster_order: str = "forward"
    # States before a row's first token: "empty", nothing, as in the authors' code; or "zeros", mem_len states of
    # zeros that take part in the softmax, as in transformers' port.
    initial_memory: str = "empty"
    projection_init_range: float = 0.01

    def __post_init__(self, **kwargs: Any):
        for name in ("vocab_size", "hidden_size"):
            self.check_count(name, 1)
        self.check_count("segment_length", 1, MOST)
        if self.embedding_size is not None:
            self.check_count("embedding_size", 1)
        self.check_count("mem_len", 0, MOST)
        self.check_count("div_val", 1)
        for name in ("same_length", "untie_r", "pre_lnorm"):
            self.check_flag(name)
        self.check_choice("cluster_order", ["forward", "reversed"])
        self.check_choice("initial_memory", ["empty", "zeros"])
        if self.same_length and self.mem_len == 0:
            raise ValueError(
                "same_length is True and mem_len is 0, so no query would see a key; give mem_len 1 or more"
            )
        if not isinstance(self.clamp_len, int) or self.clamp_len == 0 or self.clamp_len < -1:
            raise ValueError(f"clamp_len is {self.clamp_len!r}; it is a distance of at least 1, or -1 for off")
        if self.hidden_size % 2:
            raise ValueError(f"hidden_size is {self.hidden_size}; sinusoidal positions need an even number")
        if self.embedding_size is None:
            self.embedding_size = self.hidden_size
        self.cutoffs = [] if self.cutoffs is None else self.cutoffs
        if not isinstance(self.cutoffs, (list, tuple)) or any(type(c) is not int for c in self.cutoffs):
            raise ValueError(f"cutoffs is {self.cutoffs!r}; it must be a list of ids at which clusters end")
        self.cutoffs = list(self.cutoffs)
        ends = [0, *self.cutoffs, self.vocab_size]
        if any(a >= b for a, b in zip(ends, ends[1:], strict=False)):
            raise ValueError(
                f"cutoffs are {self.cutoffs}; they must rise, be above 0 and below vocab_size {self.vocab_size}"
            )
        if self.embedding_size // self.div_val ** len(self.cutoffs) < 1:
            raise ValueError(
                f"div_val {self.div_val} leaves no width for cluster {len(self.cutoffs)} of an embedding_size of "
                f"{self.embedding_size}; give a smaller div_val or fewer cutoffs"
            )
        clusters = len(self.cutoffs) + 1
        if self.tie_projs is not None:
            if not isinstance(self.tie_projs, (list, tuple)) or any(type(t) is not bool for t in self.tie_projs):
                raise ValueError(f"tie_projs is {self.tie_projs!r}; it must be a list of True and False")
            self.tie_projs = list(self.tie_projs)
        if self.tie_projs is not None and len(self.tie_projs) != clusters:
            raise ValueError(
                f"tie_projs has {len(self.tie_projs)} entries; cutoffs {self.cutoffs} make {clusters} clusters"
            )
        super().__post_init__(**kwargs)

    @property
    def cache_capacity(self) -> int:
        """Keys kept for the tokens to come: the next one may be anywhere in its segment."""
        return self.mem_len if self.same_length else self.mem_len + self.segment_length - 1

    def cache_layout(self, layer: int) -> list[dict[str, tuple]]:
        return [*super().cache_layout(layer), {"hidden": (None, self.hidden_size)}]
