"""A sixth architecture, as small as one can be: a query at position p sees the keys from `reach` before the last
multiple of 3 on. It stands for whoever adds one: this file and its entries are all that there is of it."""

from torch import nn

from hf_gallery.models.attention_maps import Keys, attend_shown
from hf_gallery.models.backbone import Backbone
from hf_gallery.models.blocks import MultiHeadAttention, PreNormLayer, merge_heads
from hf_gallery.models.configuration_base import MOST, GalleryConfig
from hf_gallery.models.context import IntervalContext
from hf_gallery.models.heads import CausalLMHead
from hf_gallery.models.modeling_base import GalleryPreTrainedModel


class GalleryToyConfig(GalleryConfig):
    model_type = "gallery_toy"
    reach: int = 16

    def __post_init__(self, **kwargs):
        self.check_count("reach", 0, MOST)
        super().__post_init__(**kwargs)

    @property
    def cache_capacity(self) -> int:
        return self.reach + 2


class GalleryToyAttention(MultiHeadAttention):
    def forward(self, x, context: IntervalContext, state: dict):
        key, value = self.keys_values(x)  # (B, H, T, D)
        keys, values, new = context.extend(state, keys=key, values=value)  # (B, H, C + T, D)
        keys = Keys(keys, values, context.spans)
        out, probabilities = attend_shown(context, self.query(x), keys, dropout=self.dropout.rate)
        return self.o_proj(merge_heads(out)), new, probabilities


class GalleryToyPreTrainedModel(GalleryPreTrainedModel):
    config_class = GalleryToyConfig
    auto_classes = {"AutoModel": "GalleryToyModel", "AutoModelForCausalLM": "GalleryToyForCausalLM"}


class GalleryToyModel(Backbone, GalleryToyPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = [PreNormLayer(config, GalleryToyAttention(config)) for _ in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.post_init()

    def plan(self, common, past, **inputs):
        p = common.rows.positions  # (B or 1, T)
        spans = common.rows.spans(p - p % 3 - self.config.reach, p, common.cached)
        return common.widened(IntervalContext, spans=spans)


class GalleryToyForCausalLM(CausalLMHead, GalleryToyPreTrainedModel):
    backbone_class = GalleryToyModel
