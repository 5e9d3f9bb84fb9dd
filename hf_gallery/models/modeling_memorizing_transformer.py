"""The Memorizing Transformer (Wu, Rabe, Hutchins, Szegedy 2022, arXiv 2203.08913).

    every layer      local attention over [seg(p) - mem_len, p], T5 bias, unit queries and keys, a scale per head
    a memory layer   besides, for each query and head, the k stored pairs with the largest dot product, attended to by
                     a softmax of their own, with the same scale and no bias                          section 3
    out = local (1 - g) + retrieved g,  g = sigmoid(gate bias), one for each head                     section 3

The memory of a query in segment s holds the last memory_size pairs before s: it is searched before the segment is
appended. Nothing stored is differentiated, and neither is the local cache; the queries, the scale and the gate learn.

The norms (root mean square alone), the maps without biases and the places of dropout follow the authors' code,
google-research/meliad: transformer/transformer_layer.py and configs/base_htrans.gin as of commit fc4b036, the memory
(memory_layer.py) as of 9b21017, both of 2022. The gallery departs from it in five places:

- Local window: the official one is the mem_len tokens strictly before each query; here, as in the paper, the segment
  and a cache before it.
- Document start: the official window holds zero keys that take part in the softmax; here there is nothing.
- Search: the official one is approximate, the best key of each of k buckets; here it is exact.
- Fewer than k pairs stored: the official store starts as zeros, and zero keys with zero values take part; here they
  do not, and a query that finds nothing adds zeros.
- Logits: divided by sqrt(V) in the code of 2022 and by sqrt(E) in that of 2025 (cc1aef5); here by sqrt(E).

The absolute value of the scales, as here, is taken in the code of 2025 only; the two agree while scales are positive.
The paper's k is 32, the default; the published external_memory_8k.gin has 128.

The config can take back unit length, T5 bias and the rest of what sets the layers apart from GPT-2's, so that a
trained GPT-2 can be given a memory: with its gates closed it is GPT-2, on pieces as long as its table of positions.

The same by loops over queries and heads, to read beside the paper: tests/plain/memorizing_transformer.py.

Letters: see spans.py. L segment_length, N slots of the memory, k memory_topk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)

from .attention import OWN_IMPLEMENTATIONS, Position
from .attention_maps import Keys, attend_shown
from .backbone import Backbone
from .blocks import (
    LARGEST_TABLE,
    AttentionDropout,
    PreNormLayer,
    QueryKeyValue,
    ScaledEmbedding,
    ScaledQueryKeyValue,
    T5Bias,
    init_scaled,
    merge_heads,
)
from .configuration_memorizing_transformer import GalleryMemorizingTransformerConfig
from .context import IntervalContext
from .exporting import in_one_graph, outside_graphs, possibly
from .heads import CausalLMHead, SequenceClassificationHead
from .memory import Appended, Source, attend_memory, query_tile, require_backend
from .modeling_base import GalleryPreTrainedModel
from .rings import position_in
from .segments import Pair, Parts, attend_segments, segment_spans
from .states import LayerOutput, NextState, State


class Retrieval(NamedTuple):
    """Pairs retrieved by one memory layer. positions (B, H, T, k): in the row, -1 where nothing was found; weights
    (B, H, T, k): of the softmax over them, before the gate."""

    positions: torch.Tensor
    weights: torch.Tensor


class Found(NamedTuple):
    """Attention of queries over the pairs found for them: out (B, H, T, D), its weights (B, H, T, k), which of the k
    there are, and their columns, see `attend_memory`."""

    out: torch.Tensor
    weights: torch.Tensor
    is_found: torch.Tensor
    columns: torch.Tensor


@dataclass
class MemorizingOutput(BaseModelOutputWithPast):
    """With output_retrievals: retrievals, one Retrieval for each memory layer, by layer number."""

    retrievals: dict[int, Retrieval] | None = None


@dataclass
class MemorizingCausalLMOutput(CausalLMOutputWithPast):
    """With output_retrievals: retrievals, one Retrieval for each memory layer, by layer number."""

    retrievals: dict[int, Retrieval] | None = None


@dataclass
class MemorizingSequenceClassifierOutput(SequenceClassifierOutputWithPast):
    """With output_retrievals: retrievals, one Retrieval for each memory layer, by layer number."""

    retrievals: dict[int, Retrieval] | None = None


@dataclass(kw_only=True)
class Context(IntervalContext):
    """Inputs shared by all layers of one forward. Adds to IntervalContext:"""

    parts: Parts | None
    farthest: int
    segment_length: int
    memory_size: int
    retrievals: dict | None = None

    def memory_intervals(self) -> MemoryIntervals:
        return self.once("memory", lambda: MemoryIntervals(self))

    def memory_in_ring(self, slots: int) -> MemoryInRing:
        return self.once("memory", lambda: MemoryInRing(self, slots))


class MemoryIntervals:
    """Places of the memory of each query, the same in all memory layers.

    The memory of a query in the segment that begins at s is the positions [s - memory_size, s). Those that earlier
    forwards have stored are in the ring, those of segments that ended since are in the columns [cached | new]:

        positions   oldest .......... stored .......... segment ... p
                    ring [lower, upper)      columns [lower, upper)

    stored (B,): positions that earlier forwards have stored, those of whole segments. appended (B,): how many this
    one stores. ring: an interval of slots, columns: one of columns, each (lower, upper), (B, T); columns is None if
    no segment ends before a query of this forward. start (B,): the position in column 0.
    """

    def __init__(self, context: Context):
        rows, length, self.size = context.rows, context.segment_length, context.memory_size
        self.length = length
        seen = rows.first[:, 0].expand(rows.lengths.shape[0])
        position = seen[:, None] + torch.arange(rows.width)  # (B, T)
        segment = position - position % length
        oldest = (segment - self.size).clamp(min=0)
        self.start = seen - context.cached
        self.stored = seen - seen % length
        if context.keeps_state:
            end = seen + rows.lengths
            self.appended = end - end % length - self.stored
        stored, start = self.stored[:, None], self.start[:, None]
        slot = torch.minimum(oldest, stored) % self.size
        self.ring = slot, slot + (stored - oldest).clamp(min=0)
        self.columns = None
        if possibly(segment > stored):
            column = torch.maximum(oldest, stored) - start
            self.columns = column, torch.maximum(segment - start, column)

    def sources(self, ring: Pair | None, joined: Pair) -> list[Source]:
        """The pairs in the ring and in the columns, in the order of their positions, with what each query may see."""
        sources = []
        if ring is not None:
            sources.append(Source(*ring, *self.ring))
        if self.columns is not None:
            keys, values = joined
            sources.append(Source(keys.detach(), values.detach(), *self.columns))
        return [x.on(joined[0].device) for x in sources]

    def positions(self, columns: torch.Tensor, slots: int) -> torch.Tensor:
        """Positions in the row of the columns (B, H, T, k) that `retrieve` found: slots of the ring, then columns."""
        stored, start = (x.to(columns.device).view(-1, 1, 1, 1) for x in (self.stored, self.start))
        turns = torch.div(stored - 1 - columns, self.size, rounding_mode="floor")  # of the ring since
        return torch.where(columns < slots, columns + turns * self.size, columns - slots + start)

    def appended_columns(self, x: torch.Tensor) -> torch.Tensor:
        """The part (B, H, A, D) of x (B, H, C + T, D) that this forward stores, any behind a row's own."""
        most = int(self.appended.max())
        if not most:
            return x[:, :, :0]
        column = (self.stored - self.start)[:, None] + torch.arange(most)
        column = column.clamp(0, x.shape[2] - 1).to(x.device)[:, None, :, None]
        return x.gather(2, column.expand(-1, x.shape[1], -1, x.shape[3]))

    def appended_at(self) -> torch.Tensor:
        """(B, A): the tokens that a row has read when each of those is stored, at the end of its segment."""
        offset = torch.arange(int(self.appended.max()))
        return self.stored[:, None] + offset - offset % self.length + self.length


class MemoryInRing:
    """Places of the memory of a static cache's one query, see MemoryLayout: ring (lower, upper), (B, 1) each."""

    def __init__(self, context: Context, slots: int):
        position = context.rows.positions  # (B, 1)
        segment = position - position % context.segment_length
        oldest = (segment - context.memory_size).clamp(min=0)
        lower = oldest % slots
        self.ring = lower, lower + (segment - oldest)
        self.newest, self.slots = context.rows.last, slots

    def positions(self, columns: torch.Tensor) -> torch.Tensor:
        """Positions in the row of the slots (B, H, 1, k) that `retrieve` found."""
        return position_in(self.newest[..., None, None], columns, self.slots)


class GalleryMemorizingTransformerAttention(nn.Module):
    """Local attention, and in a memory layer retrieval joined to it by the gate."""

    def __init__(self, config: GalleryMemorizingTransformerConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.project = (ScaledQueryKeyValue if config.normalize_qk else QueryKeyValue)(config, config.attention_bias)
        if config.num_positions is None:
            self.relative_bias = T5Bias(config.num_attention_heads)
        inner = config.num_attention_heads * config.head_dim
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=config.attention_bias)
        self.remembers = layer in config.memory_layers
        if self.remembers:
            require_backend(config.memory_backend)
            self.gate_bias = nn.Parameter(torch.zeros(config.num_attention_heads))
            self.topk, self.backend = config.memory_topk, config.memory_backend
        self.dropout = AttentionDropout(config.attention_dropout)

    def forward(self, x: torch.Tensor, context: Context, state: State) -> LayerOutput:
        """x (B, T, E). Returns (B, T, E), the next state, and local probabilities (B, H, T, C + T) or None."""
        biased = hasattr(self, "relative_bias")
        query, scale = self.project(x, with_scale=biased and not context.has_table(self.layer))  # (B, H, T, D), (H,)
        key, value = self.project.keys_values(x)  # (B, H, T, D)
        keys, values, new = extended(context, state, key, value)  # (B, H, C + T, D)
        position = None
        if biased:
            farthest = context.farthest
            position = Position(context.table(self.layer, lambda: self.relative_bias(farthest, scale)), farthest)
        out, probabilities = self._local(query, (key, value), (keys, values), position, context, state)
        if self.remembers:
            if context.rows.steps:
                retrieved, memory = self._remember_in_ring(query, (key, value), context, state)
            else:
                retrieved, memory = self._remember(query, (keys, values), context, state)
            gate = torch.sigmoid(self.gate_bias)[:, None, None].to(out.dtype)
            out = torch.lerp(out, retrieved, gate)
            new |= memory
        return self.o_proj(merge_heads(out)), new, probabilities

    def _local(self, query, own: Pair, joined: Pair, position: Position | None, context: Context, state: State):
        options = dict(scale=1.0, dropout=self.dropout.rate)
        if context.parts is None:
            return attend_shown(context, query, Keys(*joined, context.spans, position), **options)
        if context.parts.carries:
            constant = joined[0].detach(), joined[1].detach()
            return attend_segments(context, query, joined, constant, context.parts, position, **options)
        before = joined if context.parts.crosses else (state.get("keys"), state.get("values"))
        return attend_segments(context, query, own, before, context.parts, position, **options)

    @outside_graphs  # where the memory's columns lie depends on the rows: see `attend`
    def _remember(
        self, query: torch.Tensor, joined: Pair, context: Context, state: State
    ) -> tuple[torch.Tensor, NextState]:
        """The memory's contribution (B, H, T, D), and its next state: searched first, appended to afterwards."""
        where = context.memory_intervals()
        ring = (state["memory_keys"], state["memory_values"]) if "memory_keys" in state else None
        sources = where.sources(ring, joined)
        found = self._search(query, sources, where.size, context.no_grad) if sources else None
        if context.retrievals is not None:
            slots = 0 if ring is None else ring[0].shape[2]
            context.retrievals[self.layer] = self._retrieval(query, found, lambda x: where.positions(x, slots))
        retrieved = torch.zeros_like(query) if found is None else found.out
        if not context.keeps_state:
            return retrieved, {}
        new: NextState = {}
        for name, old, x in zip(("memory_keys", "memory_values"), ring or (None, None), joined, strict=True):
            pairs, until = where.appended_columns(x.detach()), where.appended_at() if context.records else None
            new[name] = Appended(old, pairs, where.stored, where.appended, where.size, context.no_grad, until)
        return retrieved, new

    def _remember_in_ring(self, query, own: Pair, context: Context, state: State) -> tuple[torch.Tensor, NextState]:
        """`_remember` of one token behind a static cache."""
        names = "memory_keys", "memory_values"
        keys, values = (context.append(state[name], x, None) for name, x in zip(names, own, strict=True))
        where = context.memory_in_ring(keys.shape[2])
        lower, upper = where.ring
        found = self._search(query, [Source(keys, values, lower, upper)], where.slots, context.no_grad)
        if context.retrievals is not None:
            context.retrievals[self.layer] = self._retrieval(query, found, where.positions)
        return found.out, context.columns(None, memory_keys=keys, memory_values=values)

    def _search(self, query: torch.Tensor, sources: list[Source], size: int, no_grad: bool) -> Found:
        """The k pairs of all sources that suit each query best, and its attention over them; queries in tiles.
        no_grad: nobody wants its gradient."""
        parts, results = [slice(None)], []
        if not in_one_graph():  # the operator in it has tiles of its own
            tile = query_tile(query, self.topk, size)
            parts = [slice(start, start + tile) for start in range(0, query.shape[2], tile)]
        for part in parts:
            some = [x.of_queries(part) for x in sources]
            results.append(attend_memory(self.backend, query[:, :, part], some, self.topk, no_grad))
        return Found(*(results[0] if len(results) == 1 else (torch.cat(x, dim=2) for x in zip(*results, strict=True))))

    def _retrieval(self, query: torch.Tensor, found: Found | None, positions: Callable) -> Retrieval:
        """The pairs that were found, as they are shown. positions: in the row, of the columns that were found."""
        if found is None:
            shape = (*query.shape[:3], self.topk)
            return Retrieval(torch.full(shape, -1, device=query.device), query.new_zeros(shape))
        weights = found.weights.to(query.dtype)
        return Retrieval(positions(found.columns).masked_fill(~found.is_found, -1), weights)


@outside_graphs  # torch 2.13 fails on a compiled part that returns views and the same views detached
def extended(context, state, key, value):
    """Keys and values (B, H, C + T, D) over [cached | new], and the next state; no gradient passes them, unless the
    cache carries gradients over."""
    if context.carries:
        return context.extend(state, keys=key, values=value)
    return context.extend(state, keys=key.detach(), values=value.detach())


def norm_of(config: GalleryMemorizingTransformerConfig) -> type[nn.Module]:
    """The kind of norm that config.norm_type names."""
    return nn.RMSNorm if config.norm_type == "rms" else nn.LayerNorm


class GalleryMemorizingTransformerLayer(PreNormLayer):
    """One layer. State: keys, values (B, H, C, D); a memory layer's also memory_keys, memory_values (B, H, N, D)."""

    def __init__(self, config: GalleryMemorizingTransformerConfig, layer: int):
        attention = GalleryMemorizingTransformerAttention(config, layer)
        super().__init__(config, attention, norm_of(config), config.mlp_bias)


class GalleryMemorizingTransformerPreTrainedModel(GalleryPreTrainedModel):
    """Weights and names that the Memorizing Transformer's classes share."""

    config: GalleryMemorizingTransformerConfig
    config_class = GalleryMemorizingTransformerConfig
    _no_split_modules = ["GalleryMemorizingTransformerLayer"]
    implementations = OWN_IMPLEMENTATIONS | {
        "eager": "their own tiles or kernels, which join local attention and cache"
    }
    auto_classes = {
        "AutoModel": "GalleryMemorizingTransformerModel",
        "AutoModelForCausalLM": "GalleryMemorizingTransformerForCausalLM",
        "AutoModelForSequenceClassification": "GalleryMemorizingTransformerForSequenceClassification",
    }

    def _init_weights(self, module):
        init_scaled(module, self.config.hidden_size**-0.5, self.config.initial_scale)
        if isinstance(module, GalleryMemorizingTransformerAttention) and module.remembers:
            nn.init.zeros_(module.gate_bias)


class GalleryMemorizingTransformerModel(Backbone, GalleryMemorizingTransformerPreTrainedModel):
    """The bare Memorizing Transformer.

    >>> import torch
    >>> from hf_gallery import GalleryMemorizingTransformerConfig, GalleryMemorizingTransformerModel
    >>> sizes = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    >>> config = GalleryMemorizingTransformerConfig(**sizes, segment_length=8, memory_size=32, memory_topk=4)
    >>> model = GalleryMemorizingTransformerModel(config).eval()
    >>> model(torch.tensor([list(b"a long time ago")])).last_hidden_state.shape
    torch.Size([1, 15, 32])
    """

    output_type = MemorizingOutput
    own_arguments = ("output_retrievals",)

    def __init__(self, config: GalleryMemorizingTransformerConfig):
        super().__init__(config)
        scale = math.sqrt(config.hidden_size) if config.scale_embedding else 1.0
        self.embed_tokens = ScaledEmbedding(config.vocab_size, config.hidden_size, scale)
        if config.num_positions is not None:
            self.embed_positions = nn.Embedding(config.num_positions, config.hidden_size)
        self.layers = nn.ModuleList(
            [GalleryMemorizingTransformerLayer(config, i) for i in range(config.num_hidden_layers)]
        )
        self.norm = norm_of(config)(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        position_ids: torch.LongTensor | None = None,
        output_retrievals: bool = False,
        **inputs,
    ):
        """As Backbone's. output_retrievals: also return what each memory layer retrieved, over each row's own tokens
        (equal to the input's columns where there is no padding)."""
        return super().forward(
            input_ids,
            attention_mask,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            position_ids=position_ids,
            output_retrievals=output_retrievals,
            **inputs,
        )

    def embed(self, rows, input_ids, inputs_embeds, **more):
        x = super().embed(rows, input_ids, inputs_embeds)
        period = self.config.position_period
        return x if period is None else x + self.embed_positions((rows.positions % period).to(x.device))

    def finish(self, x):
        return self.dropout(self.norm(x))

    def tables_follow(self):
        if self.config.num_positions is not None:
            return []
        layers = [layer.self_attn for layer in self.layers]
        scales = [layer.project.scale for layer in layers] if self.config.normalize_qk else []
        return [*(layer.relative_bias for layer in layers), *scales]

    def check_packed(self, attends, inputs):
        super().check_packed(attends, inputs)
        if inputs.get("output_retrievals"):
            raise ValueError(
                "output_retrievals is True, and documents are packed in the rows: what is retrieved is told by rows; "
                "give each document a row of its own to see it"
            )

    def plan(self, common, past, output_retrievals=False, **inputs) -> Context:
        config, cached = self.config, common.cached
        length, period = config.segment_length, config.position_period
        sizes = dict(segment_length=length, mem_len=config.mem_len, period=period)
        spans, parts = segment_spans(common.rows, cached, **sizes, carries=common.carries)
        tables = common.tables if config.cache_capacity <= LARGEST_TABLE else None
        # A table that is kept serves all forwards to come.
        farthest = spans.reach(cached) if tables is None else config.cache_capacity
        return common.widened(
            Context,
            spans=spans,
            parts=parts,
            farthest=farthest,
            tables=tables,
            segment_length=length,
            memory_size=config.memory_size,
            retrievals={} if output_retrievals else None,
        )

    def results(self, context, attentions):
        return super().results(context, attentions) | {"retrievals": context.retrievals}


class GalleryMemorizingTransformerForCausalLM(CausalLMHead, GalleryMemorizingTransformerPreTrainedModel):
    """The Memorizing Transformer with a map to the vocabulary, tied to the embeddings.

    >>> import torch
    >>> from hf_gallery import GalleryMemorizingTransformerConfig, GalleryMemorizingTransformerForCausalLM
    >>> sizes = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    >>> config = GalleryMemorizingTransformerConfig(**sizes, segment_length=8, memory_size=32, memory_topk=4)
    >>> model = GalleryMemorizingTransformerForCausalLM(config).eval()
    >>> cache = model(torch.tensor([list(b"a long time")]), use_cache=True).past_key_values
    >>> model(torch.tensor([list(b" ago")]), past_key_values=cache).logits.shape
    torch.Size([1, 4, 262])
    """

    backbone_class = GalleryMemorizingTransformerModel
    output_type = MemorizingCausalLMOutput


class GalleryMemorizingTransformerForSequenceClassification(
    SequenceClassificationHead, GalleryMemorizingTransformerPreTrainedModel
):
    """A label for each row, from its last token.

    >>> import torch
    >>> from hf_gallery import GalleryMemorizingTransformerConfig
    >>> from hf_gallery import GalleryMemorizingTransformerForSequenceClassification
    >>> sizes = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    >>> config = GalleryMemorizingTransformerConfig(**sizes, segment_length=8, memory_size=32, memory_topk=4)
    >>> model = GalleryMemorizingTransformerForSequenceClassification(config).eval()
    >>> model(torch.tensor([list(b"a long time ago")])).logits.shape
    torch.Size([1, 2])
    """

    backbone_class = GalleryMemorizingTransformerModel
    output_type = MemorizingSequenceClassifierOutput


__all__ = [
    "GalleryMemorizingTransformerForCausalLM",
    "GalleryMemorizingTransformerForSequenceClassification",
    "GalleryMemorizingTransformerModel",
    "GalleryMemorizingTransformerPreTrainedModel",
]
