"""Parts of layers that variants share around their attention: residuals and norms, feed-forward, queries and keys, T5
bias. Blocks of tokens are in block_rows.py. Letters: see spans.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_problem import compute_dtype
from .context import ForwardContext
from .exporting import in_one_graph
from .positions import t5_buckets
from .spans import moved
from .states import LayerOutput, State
from .unit_triton import EPSILON, serves, unit_triton


class ResidualLayer(GradientCheckpointingLayer):
    """self_attn, where given cross_attn, and feed_forward, each with a norm, which stands before the part if `pre`,
    else after the sum. inner_dropout: in the feed-forward."""

    def __init__(self, config, self_attn: nn.Module, pre: bool, inner_dropout: float, cross_attn=None):
        super().__init__()
        self.pre = pre
        self.self_attn = self_attn
        self.self_attn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        if cross_attn is not None:
            self.cross_attn = cross_attn
            self.cross_attn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(config, inner_dropout)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def add(self, x: torch.Tensor, y: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        """The sum of x and what a part has made of it, (B, T, E) each. Post-norm: norm(x + dropout(y))."""
        x = x + self.dropout(y)
        return x if self.pre else norm(x)


class PreNormLayer(GradientCheckpointingLayer):
    """A layer as google-research/meliad has it (transformer/transformer_layer.py): self_attn and feed_forward on what
    their norms give, dropout before the one and after the other."""

    def __init__(self, config, self_attn: nn.Module, norm: type[nn.Module] = nn.LayerNorm, bias: bool = False):
        super().__init__()
        self.self_attn = self_attn
        self.self_attn_norm = norm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(config, bias=bias)
        self.feed_forward_norm = norm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x: torch.Tensor, context: ForwardContext, state: State) -> LayerOutput:
        """x (B, T, E). Returns x, the next state, and probabilities (B, H, T, C + T) or None."""
        y, new, probabilities = self.self_attn(self.dropout(self.self_attn_norm(x)), context, state)
        x = x + y
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x))), new, probabilities


class FeedForward(nn.Module):
    """Two linear maps with an activation between, at every position alone (Vaswani et al. 2017, section 3.3).
    (B, T, E) to (B, T, E).

    inner_dropout: on the activation, as Transformer-XL has it. reads: the size of its input, if it is not E.
    """

    def __init__(self, config, inner_dropout: float = 0.0, bias: bool = True, reads: int | None = None):
        super().__init__()
        self.up_proj = nn.Linear(reads or config.hidden_size, config.intermediate_size, bias=bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=bias)
        self.act = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(inner_dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.dropout(self.act(self.up_proj(x))))


def split_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(B, T, H * D) to (B, H, T, D)."""
    b, t, width = x.shape
    return x.reshape(b, t, num_heads, width // num_heads).transpose(1, 2)


def merge_heads(x: torch.Tensor) -> torch.Tensor:
    """(B, H, T, D) to (B, T, H * D)."""
    return x.transpose(1, 2).flatten(2)


class AttentionDropout(nn.Dropout):
    """Dropout on the probabilities of attention. They never stand in one tensor, so `attend` draws it, at `rate`."""

    @property
    def rate(self) -> float:
        return self.p if self.training else 0.0


class ScaledEmbedding(nn.Embedding):
    """Token embeddings times a constant, sqrt(E) in Vaswani et al. 2017, section 3.4. (B, T) to (B, T, E).

    The scale is inside, so that `inputs_embeds` are what this module returns. PEFT scales what its adapters add by
    an attribute of the name `embed_scale`.
    """

    def __init__(self, tokens: int, width: int, scale: float = 1.0):
        super().__init__(tokens, width)
        self.embed_scale = scale

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids) * self.embed_scale


class MultiHead(nn.Module):
    """Linear maps to the queries, keys and values of all heads (Vaswani et al. 2017, section 3.2.2).

    A module's own parameters are read in its forward only, here and in all models: tools that offload or shard them
    bring them in for it. `keys_values` has none but those of the maps that it calls.
    """

    def __init__(self, config, bias: bool = False):
        super().__init__()
        self.num_heads = config.num_attention_heads
        inner = self.num_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, inner, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, inner, bias=bias)

    def query(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, E) to the query (B, H, T, D)."""
        return split_heads(self.q_proj(x), self.num_heads)

    def keys_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, S, E) to key and value (B, H, S, D)."""
        return split_heads(self.k_proj(x), self.num_heads), split_heads(self.v_proj(x), self.num_heads)


class MultiHeadAttention(MultiHead):
    """Multi-head attention but for its forward: the maps of MultiHead, `o_proj` behind the heads, and dropout."""

    def __init__(self, config, bias: bool = False):
        super().__init__(config, bias)
        self.o_proj = nn.Linear(self.num_heads * config.head_dim, config.hidden_size, bias=bias)
        self.dropout = AttentionDropout(config.attention_dropout)


class QueryKeyValue(MultiHead):
    """MultiHead's maps as a module of their own, whose queries carry the scale, 1 / sqrt(D) (section 3.2.1)."""

    def forward(self, x: torch.Tensor, with_scale: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, E) to the query (B, H, T, D), and the scale in each head's (H,), None without it."""
        query = self.query(x)
        scale = query.new_full((self.num_heads,), query.shape[-1] ** -0.5) if with_scale else None
        return query * query.shape[-1] ** -0.5, scale


class ScaledQueryKeyValue(QueryKeyValue):
    """Queries and keys of unit length, with a learned scale per head in place of 1 / sqrt(D).

    Keys that keep their length stay comparable with the queries of later weights, which a memory needs. The scale
    starts at config.initial_scale. As meliad's transformer_base.py, KVQLayer; the absolute value, from 2025, keeps the
    scale from changing sign.
    """

    def __init__(self, config, bias: bool = False):
        super().__init__(config, bias)
        self.scale = nn.Parameter(torch.ones(self.num_heads))

    def forward(self, x: torch.Tensor, with_scale: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
        # A copy, since the parameter itself is no longer there behind this forward where it is sharded.
        return scaled_unit(self.query(x), self.scale), self.scale.abs() if with_scale else None

    def keys_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = super().keys_values(x)
        return unit(key), value


def unit(x: torch.Tensor) -> torch.Tensor:
    """x (B, H, T, D) at length 1."""
    if serves(x):
        return unit_triton(x, None)
    d = x.shape[-1]
    y = x.to(compute_dtype(x))  # squares leave the range of float16
    # Length 1 is the root mean square 1 / sqrt(D), and a GPU has one kernel for that.
    return (F.rms_norm(y, (d,), eps=EPSILON / d) * d**-0.5).to(x.dtype)


def scaled_unit(query: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """query (B, H, T, D) at the length |size|, size (H,)."""
    if serves(query):
        return unit_triton(query, size)
    return unit(query) * size.abs()[:, None, None].to(query.dtype)


LARGEST_TABLE = 2**14  # distances of a table that a cache keeps, else a forward makes what it needs


class T5Bias(nn.Module):
    """A learned bias for each head and bucket of distances, added to the score before the head's scale."""

    def __init__(self, num_heads: int):
        super().__init__()
        self.table = nn.Embedding(32, num_heads)
        self.table.deviation = 32**-0.5  # flax's default for a table (H, 32), see init_scaled

    def forward(self, farthest: int, scale: torch.Tensor) -> torch.Tensor:
        """The table (H, R) of distances farthest, ..., 0, times the heads' scales (H,): see Position."""
        # Worked out on the CPU they cost a GPU one copy; a graph that is to be captured holds no copy.
        distance = torch.arange(farthest, -1, -1, device=scale.device if in_one_graph() else None)
        buckets = moved(t5_buckets(distance), scale.device)
        table = self.table(buckets).T * scale[:, None]
        return table.to(compute_dtype(table))  # that of scores


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
    if isinstance(module, ScaledQueryKeyValue):
        nn.init.constant_(module.scale, scale)
