"""Configuration of the Block-Recurrent Transformer (Hutchins et al. 2022)."""

from __future__ import annotations

from typing import Any

from .configuration_base import MOST, GalleryConfig


class GalleryBlockRecurrentTransformerConfig(GalleryConfig):
    """The Block-Recurrent Transformer: a sliding window, and in some layers a state that is rewritten once a block.

    Defaults are the paper's model (Hutchins et al. 2022, arXiv 2203.07852, and meliad's configs/recurrent) over bytes:
    12 layers, 1024 wide, 8 heads, blocks of 512 tokens, 512 state vectors, recurrence in layer 10 of 12, and its best
    form, "fixed gate, skip".

    gate_type and recurrence_type are the two words by which the paper names its variants (section 3 and its table of
    results); the gin file of the authors' code that says the same stands beside them, in configs/recurrent:

    | paper | arguments | meliad |
    |---|---|---|
    | Rec:fixed:skip | the defaults | bias_skip.gin |
    | Rec:lstm:skip | gate_type="lstm" | lstm_skip.gin |
    | Rec:fixed:dual, Rec:lstm:dual | recurrence_type="dual", and the gate | bias_dual.gin, lstm_dual.gin |
    | Rec:fixed:single, Rec:lstm:single | recurrence_type="single", and the gate | bias_single.gin, lstm_single.gin |
    | Feedback:fixed:skip, and so on | feedback=True, and the above | the above with block_feedback_512.gin |
    | 24 layers, two of them recurrent | num_hidden_layers=24, recurrent_layers=[9, 19] | the above with tall_24L.gin |
    | Slide | recurrent_layers=[] | - |

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
    recurrence_type: str = "skip"  # of the state: see RecurrentState for skip, dual and single
    initial_scale: float = 1.0  # where each head's learned scale starts; scores of unit vectors are within it
    feedback: bool = False  # every layer reads the state of the first recurrent layer; blocks then run one by one

    def __post_init__(self, **kwargs: Any):
        self.check_count("num_hidden_layers", 1)
        self.check_count("block_length", 1, MOST)
        self.check_count("num_state_vectors", 1, MOST)
        self.check_positive("initial_scale")
        self.check_flag("feedback")
        self.check_choice("gate_type", ["fixed", "lstm"])
        self.check_choice("recurrence_type", ["skip", "dual", "single"])
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
