"""Parts of stacks with absolute positions: embeddings, their checks, their initialisation. Letters: see spans.py."""

from __future__ import annotations

import math

import torch
from torch import nn

from .blocks import ScaledEmbedding
from .cache import GalleryCache
from .exporting import readable, require
from .modeling_base import init_linear
from .positions import sinusoids
from .rows import Rows


class AbsoluteEmbeddings:
    """Embeddings of tokens, positions and types, for a PreTrainedModel with a GalleryStackConfig."""

    def build_embeddings(self, config, length: str = "max_position_embeddings"):
        """Makes the modules that `embed` uses. length: the field with the length of the learned table.

        Raises ValueError for tables of another width than the layers' in a decoder or an encoder-decoder."""
        width = config.embedding_width
        if width != config.hidden_size and (config.is_decoder or config.is_encoder_decoder):
            raise ValueError(
                f"embedding_size is {width} and hidden_size {config.hidden_size}; tables of another width than the "
                "layers are ELECTRA's and for encoders alone, so leave embedding_size out"
            )
        self.length = length if getattr(config, length) is not None else "max_position_embeddings"
        scale = math.sqrt(width) if config.scale_embedding else 1.0
        self.embed_tokens = ScaledEmbedding(config.vocab_size, width, scale)
        if config.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(getattr(config, self.length), width)
        if config.type_vocab_size:
            self.embed_types = nn.Embedding(config.type_vocab_size, width)
        if config.embedding_norm:
            self.embed_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        if width != config.hidden_size:
            self.embed_project = nn.Linear(width, config.hidden_size)
        if config.norm_position == "pre":
            self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)
        # Positions begin anew in each segment.
        self.segment_length = getattr(config, "segment_length", None)

    def embed(self, rows: Rows, input_ids, inputs_embeds, position_ids=None, token_type_ids=None, **more):
        """Packed embeddings (B, T, E) with positions, types, norm and dropout; where the tables have another width,
        mapped to E behind all these."""
        config = self.config
        if inputs_embeds is None:
            x = self.embed_tokens(rows.pack(input_ids))  # (B, T, embedding_width)
        else:
            x = rows.pack(inputs_embeds)
        if self.embeds_positions:
            if position_ids is None:
                positions = rows.positions.to(x.device)  # (B or 1, T)
            else:
                positions = rows.pack(position_ids.expand(rows.batch, -1))
            if self.segment_length is not None:
                positions = positions % self.segment_length
            x = self.add_positions(x, positions)
        if config.type_vocab_size:
            if token_type_ids is None:
                types = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
            else:
                types = rows.pack(token_type_ids)
            x = x + self.embed_types(types)
        if config.embedding_norm:
            x = self.embed_norm(x)
        x = self.dropout(x)
        return x if config.embedding_width == config.hidden_size else self.embed_project(x)

    def add_positions(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """x (B, T, E) plus the embeddings of positions (B or 1, T), on its device."""
        config = self.config
        if config.position_embedding_type == "sinusoidal":
            return x + sinusoids(positions, config.embedding_width, config.sinusoid_layout, x.dtype)
        if config.position_embedding_type == "learned":
            # Columns after a row's end have positions that may not exist; they are never used.
            return x + self.embed_positions(positions.clamp(max=self.longest_input - 1) + config.position_offset)
        return x

    def finish(self, x):
        return self.norm(x) if self.config.norm_position == "pre" else x

    @property
    def longest_input(self) -> int | None:
        """Tokens that the learned positions reach; None where positions have no end."""
        return self.config.reach_of(self.length)

    @property
    def embeds_positions(self) -> bool:
        return self.config.position_embedding_type in ("sinusoidal", "learned")

    def check(
        self, rows: Rows, cache: GalleryCache | None, longest: int, position_ids=None, token_type_ids=None, **inputs
    ):
        """Raises ValueError unless positions and types fit the input and the learned tables."""
        b, t, config = rows.batch, rows.columns, self.config
        if position_ids is not None and int(position_ids.min()) < 0:
            raise ValueError(f"position_ids holds {int(position_ids.min())}; positions count from 0")
        if token_type_ids is not None:
            if not config.type_vocab_size:
                raise ValueError("token_type_ids are given, but type_vocab_size is 0; leave them out")
            if token_type_ids.dtype not in (torch.long, torch.int):
                raise ValueError(f"token_type_ids has type {token_type_ids.dtype}; it must be torch.long or torch.int")
            types = config.type_vocab_size
            low, high = (int(x) for x in token_type_ids.aminmax()) if readable(token_type_ids) else (0, 0)
            if not readable(token_type_ids):
                require(
                    (token_type_ids >= 0) & (token_type_ids < types), "token_type_ids holds types that there are not"
                )
            if token_type_ids.shape != (b, t) or low < 0 or high >= types:
                raise ValueError(
                    f"token_type_ids has shape {tuple(token_type_ids.shape)} and values from {low} to {high}; they "
                    f"must be ({b}, {t}), from 0 and below type_vocab_size {types}"
                )
        if self.longest_input is not None and self.segment_length is None:
            if position_ids is not None:
                longest = int(position_ids.max()) + 1
            if longest > self.longest_input and not rows.is_full and not readable(rows.lengths):
                room = f"{self.length} {getattr(config, self.length)} has room for {self.longest_input}"
                require(rows.lengths <= self.longest_input, f"the input reaches more tokens than {room}", rows.lengths)
            elif longest > self.longest_input:
                raise ValueError(
                    f"the input reaches {longest} tokens, but {self.length} {getattr(config, self.length)} has room "
                    f"for {self.longest_input}; shorten it, or use positions without an end"
                )


def init_stack(module: nn.Module, config):
    """Initialises one module as config.initialization says; see GalleryStackConfig."""
    if config.initialization == "normal":
        init_linear(module, config.initializer_range / math.sqrt(getattr(module, "branches", 1)))
        return
    init_linear(module, config.hidden_size**-0.5)
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)


def mark_branches(ends: list[nn.Linear], config):
    """Notes on the last maps of a pre-norm layer's branches how many add up over the depth: GPT-2 starts them smaller
    by the root of that, to keep the variance of the residual stream (Radford et al. 2019, section 2.3)."""
    if config.norm_position == "pre":
        for end in ends:
            end.branches = len(ends) * config.num_hidden_layers
