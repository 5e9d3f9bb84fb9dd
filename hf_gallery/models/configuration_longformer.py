"""Configuration of Longformer (Beltagy et al. 2020)."""

from __future__ import annotations

from typing import Any, ClassVar

from .configuration_base import MOST, UNLIMITED, ByteTokenizerId, GalleryStackConfig


class GalleryLongformerConfig(GalleryStackConfig):
    """Longformer: a sliding window, dilated if asked, and a few global tokens.

    Defaults are longformer-base-4096 (Beltagy et al. 2020, arXiv 2004.05150) over bytes; ForCausalLM is the paper's
    character model, which transformers never had, and takes relative positions by position_embedding_type="relative".

    attention_window: one number, or one per layer. An encoder's window is the total width, half on each side, so it
    must be even: [p - w/2, p + w/2]. A decoder's is the keys before the query: [p - w, p].
    attention_dilation: one number, or one per layer: attend to every g-th key; the window then reaches g times as far.
    segment_length, mem_len: a decoder's, which is then a Longformer-XL: no gradient crosses from a segment into the
    one before, and of that a query sees what lies both in its window and in the mem_len tokens before its segment (by
    default all of its window). In numbers it is the windowed decoder, unless mem_len is shorter than a window.
    Of an encoder-decoder both are the encoder's; its decoder, of num_decoder_layers, sees all that was written.

    Raises ValueError for values that do not fit, naming the argument.

    >>> from hf_gallery import GalleryLongformerConfig
    >>> GalleryLongformerConfig(attention_window=4, num_hidden_layers=2).per_layer("attention_window")
    [4, 4]
    """

    model_type = "gallery_longformer"
    position_embedding_types: ClassVar[list[str]] = ["sinusoidal", "learned", "relative", "none"]

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    attention_dropout: float = 0.1
    attention_window: int | list[int] = 512
    attention_dilation: int | list[int] = 1
    position_embedding_type: str = "learned"
    max_position_embeddings: int | None = 4098
    position_offset: int = 2
    segment_length: int | None = None
    mem_len: int | None = None  # default the farthest that a window reaches, where there are segments
    embedding_norm: bool = True
    initialization: str = "normal"
    sep_token_id: int | None = ByteTokenizerId(260)  # ends the question, for ForQuestionAnswering

    def __post_init__(self, **kwargs: Any):
        for name in ("num_hidden_layers", "num_encoder_layers"):
            if name == "num_hidden_layers" or self.num_encoder_layers is not None:
                self.check_count(name, 1)
        for name in ("attention_window", "attention_dilation"):
            values = getattr(self, name)
            if isinstance(values, tuple):
                values = list(values)
                setattr(self, name, values)
            if isinstance(values, list) and len(values) != self.window_layers:
                layers = "num_hidden_layers" if self.num_encoder_layers is None else "num_encoder_layers"
                raise ValueError(
                    f"{name} has {len(values)} entries; give one number, or one for each of {layers} "
                    f"{self.window_layers}"
                )
            for value in values if isinstance(values, list) else [values]:
                if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                    raise ValueError(f"{name} is {values!r}; it must be 1 or more, one number or one per layer")
        if self.reach > MOST:
            raise ValueError(
                f"attention_window is {self.attention_window!r} and attention_dilation {self.attention_dilation!r}, "
                f"which reach {self.reach} tokens; {MOST} at most"
            )
        if self.segment_length is not None:
            self._check_segments()
        elif self.mem_len is not None:
            raise ValueError(f"mem_len is {self.mem_len!r} and segment_length None; a memory stands before segments")
        super().__post_init__(**kwargs)

    def _check_segments(self):
        self.check_count("segment_length", 1, MOST)
        if self.mem_len is None:
            self.mem_len = self.reach
        self.check_count("mem_len", 0, MOST)
        if set(self.per_layer("attention_dilation")) != {1}:
            raise ValueError(
                f"attention_dilation is {self.attention_dilation!r} and segment_length {self.segment_length}; windows "
                "over segments are not dilated, so give 1, or leave segment_length at None"
            )

    def check_encoder_decoder(self):
        if self.segment_length is not None:
            raise ValueError(
                f"segment_length is {self.segment_length} and is_encoder_decoder is True; segments with a memory are "
                "read by a decoder alone, so leave segment_length at None"
            )
        if self.position_embedding_type == "relative":
            raise ValueError(
                "position_embedding_type is 'relative' and is_encoder_decoder is True; distances are those of "
                "windows, which the decoder has not, so give 'learned', 'sinusoidal' or 'none'"
            )

    def per_layer(self, name: str) -> list[int]:
        """attention_window or attention_dilation of every layer."""
        value = getattr(self, name)
        return value if isinstance(value, list) else [value] * self.window_layers

    @property
    def n_positions(self) -> int:
        return UNLIMITED if self.longest_input is None else self.longest_input  # segments go on counting

    @property
    def window_layers(self) -> int:
        """Layers that have a window: all, or those of an encoder-decoder's encoder."""
        return self.num_hidden_layers if self.num_encoder_layers is None else self.num_encoder_layers

    @property
    def reach(self) -> int:
        """The farthest that any layer looks back."""
        windows, dilations = self.per_layer("attention_window"), self.per_layer("attention_dilation")
        return max(w * g for w, g in zip(windows, dilations, strict=True))

    @property
    def cache_capacity(self) -> int | None:
        """Keys kept for the tokens to come: those that any layer looks back to."""
        if self.is_encoder_decoder:
            return None
        return self.reach if self.segment_length is None else min(self.reach, self.mem_len + self.segment_length - 1)

    def cache_layout(self, layer: int) -> list[dict[str, tuple]]:
        (layout,) = super().cache_layout(layer)
        pair = (self.num_attention_heads, None, self.head_dim)
        with_globals = layout | {"global_keys": pair, "global_values": pair}
        if self.is_encoder_decoder:
            return [layout]
        return [layout, with_globals if self.segment_length is None else {"hidden": (None, self.hidden_size)}]

    @property
    def cache_facts(self) -> dict[str, str]:
        if self.is_encoder_decoder:
            return super().cache_facts
        return {} if self.segment_length is not None else {"global_positions": "global_keys"}
