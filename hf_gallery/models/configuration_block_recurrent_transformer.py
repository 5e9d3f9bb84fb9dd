"""Configuration of the Block-Recurrent Transformer (Hutchins et al. 2022)."""

from __future__ import annotations

from typing import Any

from .configuration_base import MOST, GalleryConfig


class GalleryBlockRecurrentTransformerConfig(GalleryConfig):
    """The Block-Recurrent Transformer: a sliding window, and in some layers a state that is rewritten once a block.

    Defaults are the paper's model (Hutchins et al. 2022, arXiv 2203.07852, and meliad's configs/recurrent) over bytes:
    12 layers, 1024 wide, 8 heads, blocks of 512 tokens, 512 state vectors, recurrence in layer 10 of 12, and its best
    form, "fixed gate, skip".

    Raises ValueError for values that do not fit, naming the argument.

    >>> from hf_gallery import GalleryBlockRecurrentTransformerConfig
    >>> GalleryBlockRecurrentTransformerConfig(num_hidden_layers=6).recurrent_layers
    [3]
    """

    model_type = "gallery_block_recurrent_transformer"

    hidden_size: int = 1024
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    intermediate_size: int = 4096
    hidden_dropout: float = 0.05
    attention_dropout: float = 0.05
    layer_norm_eps: float = 1e-6
    block_length: int = 512  # W: the window, and the tokens between two states
    recurrent_layers: list[int] | None = None  # layers with a state, counted from 0; default the third from the top
    num_state_vectors: int = 512  # Z
    gate_type: str = "fixed"  # fixed: a learned constant a channel; lstm: forget and input gates
    recurrence_type: str = "skip"  # skip: attention and a gate; dual: then a feed-forward and a second gate
    initial_scale: float = 1.0  # where each head's learned scale starts; scores of unit vectors are within it
    feedback: bool = False  # every layer reads the state of the first recurrent layer; blocks then run one by one

    def __post_init__(self, **kwargs: Any):
        self.check_count("num_hidden_layers", 1)
        self.check_count("block_length", 1, MOST)
        self.check_count("num_state_vectors", 1, MOST)
        self.check_positive("initial_scale")
        self.check_flag("feedback")
        self.check_choice("gate_type", ["fixed", "lstm"])
        self.check_choice("recurrence_type", ["skip", "dual"])
        if self.recurrent_layers is None:
            self.recurrent_layers = [max(0, self.num_hidden_layers - 3)]
        self.check_layers("recurrent_layers")
        if self.feedback and len(self.recurrent_layers) != 1:
            raise ValueError(
                f"feedback is True and recurrent_layers is {self.recurrent_layers}; with feedback all layers read one "
                "state, so give exactly one recurrent layer"
            )
        super().__post_init__(**kwargs)

    @property
    def cache_capacity(self) -> int:
        """Keys kept for the tokens to come: a window; with a state, all of its block and of the block before."""
        return 2 * self.block_length - 1 if self.recurrent_layers else self.block_length

    def columns_kept(self, layer: int) -> int:
        return self.cache_capacity if layer in self.recurrent_layers else self.block_length

    def cache_layout(self, layer: int) -> list[dict[str, tuple]]:
        (layout,) = super().cache_layout(layer)
        if layer in self.recurrent_layers:
            layout["state"] = (self.num_state_vectors, self.hidden_size)
        return [layout]
