"""A sixth architecture, as small as one can be: a query at position p sees the keys from `reach` before the last
multiple of 3 on. It stands for whoever adds one: this file and its entries are all that there is of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from hf_gallery.models.attention import attend
from hf_gallery.models.backbone import Backbone
from hf_gallery.models.blocks import FeedForward, PreNormLayer, QueryKeyValue, merge_heads
from hf_gallery.models.configuration_base import MOST, GalleryConfig
from hf_gallery.models.context import ForwardContext
from hf_gallery.models.heads import CausalLMHead
from hf_gallery.models.modeling_base import GalleryPreTrainedModel, init_linear
from hf_gallery.models.spans import Spans


class GalleryToyConfig(GalleryConfig):
    model_type = "gallery_toy"
    reach: int = 16

    def __post_init__(self, **kwargs):
        self.check_count("reach", 0, MOST)
        super().__post_init__(**kwargs)

    @property
    def cache_capacity(self) -> int:
        return self.reach + 2


@dataclass(kw_only=True)
class Context(ForwardContext):
    spans: Spans


class GalleryToyAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.project = QueryKeyValue(config)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x, context: Context, state: dict):
        query, _ = self.project(x)  # (B, H, T, D)
        key, value = self.project.keys_values(x)  # (B, H, T, D)
        keys, values, new = context.extend(state, keys=key, values=value)  # (B, H, C + T, D)
        out = attend(query, keys, values, context.spans, scale=1.0, implementation=context.implementation)
        return self.o_proj(merge_heads(out)), new, None


class GalleryToyLayer(PreNormLayer):
    def __init__(self, config):
        super().__init__()
        self.self_attn, self.self_attn_norm = GalleryToyAttention(config), nn.LayerNorm(config.hidden_size)
        self.feed_forward, self.feed_forward_norm = FeedForward(config), nn.LayerNorm(config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)


class GalleryToyPreTrainedModel(GalleryPreTrainedModel):
    config_class = GalleryToyConfig
    implementations = {"eager": "their own tiles"}
    auto_classes = {"AutoModel": "GalleryToyModel", "AutoModelForCausalLM": "GalleryToyForCausalLM"}

    def _init_weights(self, module):
        init_linear(module, self.config.initializer_range)


class GalleryToyModel(Backbone, GalleryToyPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([GalleryToyLayer(config) for _ in range(config.num_hidden_layers)])
        self.post_init()

    def plan(self, common, past, **inputs) -> Context:
        p = common.rows.seen[:, None] + torch.arange(common.rows.width)  # (B, T)
        first = common.rows.seen[:, None] - common.cached  # the position in column 0
        return common.widened(Context, spans=Spans((p - p % 3 - self.config.reach).clamp(min=0) - first, p - first))


class GalleryToyForCausalLM(CausalLMHead, GalleryToyPreTrainedModel):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = GalleryToyModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
