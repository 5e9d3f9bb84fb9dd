"""Parts that variants share around their attention. Letters: see spans.py."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import Position, compute_dtype
from .cache import last_columns
from .positions import t5_buckets
from .rows import Rows


@dataclass(kw_only=True)
class ForwardContext:
    """What all layers of one forward share; each variant adds what its own need.

    keep: a cache wants the new state, and limit: so many columns of it. shared: per layer, what the cache keeps that
    follows from the weights alone; facts: what it keeps for the whole model. known: see `once`.
    """

    rows: Rows
    keep: bool = False
    limit: int | None = None
    output_attentions: bool = False
    shared: list | None = None
    facts: dict = field(default_factory=dict)
    known: dict = field(default_factory=dict)

    def once(self, key: Hashable, work: Callable[[], Any]) -> Any:
        """What several layers need alike, worked out by the first that asks for it."""
        if key not in self.known:
            self.known[key] = work()
        return self.known[key]


class ResidualLayer(GradientCheckpointingLayer):
    """A layer with `dropout`, and `pre`: whether norms stand before its parts or after the sums."""

    pre: bool

    def add(self, x: torch.Tensor, y: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        """The sum of x and what a part has made of it, (B, T, E) each."""
        x = x + self.dropout(y)
        return x if self.pre else norm(x)


class MeliadLayer(GradientCheckpointingLayer):
    """A layer as google-research/meliad has it (transformer/transformer_layer.py): self_attn and feed_forward on what
    their norms give, dropout before the one and after the other."""

    def forward(self, x, context: ForwardContext, state: dict):
        """x (B, T, E). Returns x, the next state, and probabilities (B, H, T, C + T) or None."""
        y, state, probabilities = self.self_attn(self.dropout(self.self_attn_norm(x)), context, state)
        x = x + y
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x))), state, probabilities


class FeedForward(nn.Module):
    """Two linear maps with an activation between, at every position alone. (B, T, E) to (B, T, E).

    inner_dropout: on the activation, as Transformer-XL has it.
    """

    def __init__(self, config, inner_dropout: float = 0.0, bias: bool = True):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=bias)
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


def append_columns(past: torch.Tensor | None, new: torch.Tensor, limit: int | None = None) -> torch.Tensor:
    """[past | new] over the columns of time, (..., C + T, D).

    limit: how many of them `next_columns` will keep. If it is given, a decode step does not copy the past: memory for
    the limit has spare columns at its end, and the new ones are written there, behind what `past` itself holds.
    """
    if past is None:
        return new
    columns, width = past.shape[-2:]
    end = columns + new.shape[-2]
    if not limit or columns > limit or end > columns + _spare(limit) or not _may_share(past, new):
        return torch.cat([past, new], dim=-2)
    start = past.storage_offset() % past.stride(-3) // width  # the column of the memory where the past begins
    full = start + end > limit + _spare(limit)
    if not _is_roomy(past, limit) or full or _written(past) != start + columns:
        past, start = _with_room(past, limit), 0
    joined = past.as_strided((*past.shape[:-2], end, width), past.stride())
    joined[..., columns:, :] = new
    past.untyped_storage().columns_written = start + end
    return joined


def next_columns(x: torch.Tensor, rows: Rows, limit: int | None) -> torch.Tensor:
    """What a cache keeps of the columns x (B, ..., C + T, D): each row's last token in the last one, at most limit."""
    if limit == 0:
        return x[..., :0, :].clone()
    x = rows.shift(x, x.dim() - 2)
    if limit is None or x.shape[-2] <= limit or not _may_share(x, x):
        return last_columns(x, limit)
    kept = x[..., x.shape[-2] - limit :, :]
    return kept if _is_roomy(x, limit) else _with_room(kept, limit)


def _spare(limit: int) -> int:
    """Spare columns behind `limit`: the past is copied once in so many decode steps. Few, since they cost memory."""
    return max(2, limit // 8)


def _with_room(x: torch.Tensor, limit: int) -> torch.Tensor:
    """A copy of x (..., C, D), C <= limit, in memory with spare columns."""
    room = x.new_empty(*x.shape[:-2], limit + _spare(limit), x.shape[-1])
    copy = room[..., : x.shape[-2], :].copy_(x)
    room.untyped_storage().columns_written = x.shape[-2]
    return copy


def _is_roomy(x: torch.Tensor, limit: int) -> bool:
    """Whether x (..., C, D) lies in memory with spare columns, as _with_room makes it."""
    width = x.shape[-1]
    return x.stride()[-3:] == ((limit + _spare(limit)) * width, width, 1)


def _written(x: torch.Tensor) -> int:
    """How many columns of x's memory anyone has written. Copies of the memory do not know it, and are not written."""
    return getattr(x.untyped_storage(), "columns_written", 0)


def _may_share(past: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether new columns may be written into the memory of the past: no graph and no compiler follows it."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or past.requires_grad:
        return False
    return past.dtype == new.dtype and past.is_inference() == torch.is_inference_mode_enabled()


class ScaledEmbedding(nn.Embedding):
    """Token embeddings times a constant, sqrt(E) in Vaswani et al. 2017, section 3.4. (B, T) to (B, T, E).

    The scale is inside, so that `inputs_embeds` are what this module returns.
    """

    def __init__(self, tokens: int, width: int, scale: float = 1.0):
        super().__init__(tokens, width)
        self.scale = scale

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids) * self.scale


class Heads(nn.Module):
    """Linear maps to heads; the queries carry the scale, 1 / sqrt(D) (Vaswani et al. 2017, section 3.2.1)."""

    def __init__(self, config, bias: bool = False):
        super().__init__()
        self.heads = config.num_attention_heads
        inner = self.heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, inner, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, inner, bias=bias)

    def forward(self, x: torch.Tensor):
        """(B, T, E) to query, key, value (B, H, T, D)."""
        return self.queries(x), *self.keys_values(x)

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        query = split_heads(self.q_proj(x), self.heads)
        return query * query.shape[-1] ** -0.5

    def keys_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return split_heads(self.k_proj(x), self.heads), split_heads(self.v_proj(x), self.heads)

    def scales(self) -> torch.Tensor:
        """The scale of each head (H,)."""
        weight = self.q_proj.weight
        return weight.new_full((self.heads,), (weight.shape[0] // self.heads) ** -0.5)


class ScaledHeads(Heads):
    """Heads of unit length, with a learned scale for each in place of 1 / sqrt(D).

    Keys that keep their length stay comparable with the queries of later weights, which a memory needs. The scale
    starts at config.initial_scale and its absolute value is used. As meliad's transformer_base.py, KVQLayer.
    """

    def __init__(self, config, bias: bool = False):
        super().__init__(config, bias)
        self.scale = nn.Parameter(torch.ones(self.heads))

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        return scaled_unit(split_heads(self.q_proj(x), self.heads), self.scale)

    def keys_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = super().keys_values(x)
        return unit(key), value

    def scales(self) -> torch.Tensor:
        return self.scale.abs()


def unit(x: torch.Tensor) -> torch.Tensor:
    """x (..., D) at length 1."""
    y = x.to(compute_dtype(x))  # squares leave the range of float16
    return (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


def scaled_unit(query: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """query (B, H, T, D) at the length |scale| (H,)."""
    return unit(query) * scale.abs()[:, None, None].to(query.dtype)


class T5Bias(nn.Module):
    """A learned bias for each head and bucket of distances, added to the score before the head's scale."""

    def __init__(self, heads: int):
        super().__init__()
        self.table = nn.Embedding(32, heads)
        self.table.deviation = 32**-0.5  # flax's default for a table (H, 32), see init_scaled

    def forward(self, far: int, scale: torch.Tensor) -> Position:
        """The term for distances far, ..., 0, times the heads' scales (H,)."""
        distance = torch.arange(far, -1, -1, device=scale.device)
        return Position(self.table(t5_buckets(distance)).T * scale[:, None], far)


def init_scaled(module: nn.Module, std: float, scale: float):
    """The initialisation of meliad's layers: linear maps variance_scaling(1, fan_in, truncated normal), biases 0,
    tables normal(0, std), heads' scales `scale`. A map with another `variance` than 1, a table with a `deviation` of
    its own, says so."""
    if isinstance(module, nn.Linear):
        # A normal cut at two deviations keeps 0.8796 of its deviation, which variance_scaling makes up for.
        deviation = (getattr(module, "variance", 1.0) / module.in_features) ** 0.5 / 0.87962566103423978
        nn.init.trunc_normal_(module.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, 0.0, getattr(module, "deviation", std))
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        nn.init.ones_(module.weight)
    if isinstance(getattr(module, "bias", None), nn.Parameter):
        nn.init.zeros_(module.bias)
    if isinstance(module, ScaledHeads):
        nn.init.constant_(module.scale, scale)
