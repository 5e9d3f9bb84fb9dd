"""Parts that variants share around their attention. Letters: see spans.py."""

from __future__ import annotations

import torch
from torch import nn
from transformers.activations import ACT2FN

from .cache import last_columns
from .rows import Rows


class FeedForward(nn.Module):
    """Two linear maps with an activation between, at every position alone. (B, T, E) to (B, T, E).

    inner_dropout: on the activation, as Transformer-XL has it.
    """

    def __init__(self, config, inner_dropout: float = 0.0):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(inner_dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.dropout(self.act(self.up_proj(x))))


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, T, H * D) to (B, H, T, D)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: torch.Tensor) -> torch.Tensor:
    """(B, H, T, D) to (B, T, H * D)."""
    return x.transpose(1, 2).flatten(2)


def append_columns(past: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
    """[past | new] over the columns of time, (..., C + T, D)."""
    return new if past is None else torch.cat([past, new], dim=-2)


def next_columns(x: torch.Tensor, rows: Rows, limit: int | None) -> torch.Tensor:
    """What a cache keeps of the columns x (B, ..., C + T, D): each row's last token in the last one, at most limit."""
    if limit == 0:
        return x[..., :0, :].clone()
    return last_columns(rows.shift(x, x.dim() - 2), limit)


class ScaledEmbedding(nn.Embedding):
    """Token embeddings times a constant, sqrt(E) in Vaswani et al. 2017, section 3.4. (B, T) to (B, T, E).

    The scale is inside, so that `inputs_embeds` are what this module returns.
    """

    def __init__(self, tokens: int, width: int, scale: float = 1.0):
        super().__init__(tokens, width)
        self.scale = scale

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids) * self.scale
