"""Transformer-XL (Dai, Yang, Yang, Carbonell, Le, Salakhutdinov 2019, arXiv 1901.02860).

    h~     = [stop_gradient(memory) ; h]                                  section 3.2
    q, k, v = W_q h, W_k h~, W_v h~;  r_d = W_r sinusoid(d)               section 3.3
    score(i, j) = ((q_i + u) . k_j + (q_i + v) . r_(i - j)) / sqrt(D)     appendix B: terms (a) + (c), and (b) + (d);
                                              u is content_bias, v position_bias, W_k the paper's W_k,E, W_r its W_k,R
    h      = LayerNorm(h + o),  then the same around the feed-forward     blocks.py; adaptive softmax: adaptive.py

Query p sees [seg(p) - mem_len, p]; with same_length [p - mem_len + 1, p], mem_len keys, as the authors' code masks it
(pytorch/mem_transformer.py, RelPartialLearnableDecoderLayer and MemTransformerLM._forward). What is below 0 does not
exist; with initial_memory "zeros" states of zeros stand there, as in transformers' port (4.35.2, init_mems).

A forward may be longer than a segment: it is then cut into segments inside. No gradient crosses from a segment into
the one before, so all segments of a layer are computed side by side: each query meets its own segment's keys, with
gradient, and the keys of what came before, made again from detached states, so that W_k and W_v still learn from the
memory; one softmax joins both. Without gradients one pass over all keys gives the same numbers, and the cache holds
keys and values; with gradients it holds the states they are made from.

The same by loops over queries and heads, to read beside the paper: tests/plain/transformer_xl.py.

Letters: see spans.py. L segment_length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .adaptive import AdaptiveEmbedding, AdaptiveSoftmax, Projections, is_adaptive
from .attention import OWN_IMPLEMENTATIONS, Position
from .attention_maps import Keys, attend_shown
from .backbone import Backbone
from .blocks import AttentionDropout, MultiHead, ScaledEmbedding, merge_heads, split_heads
from .configuration_transformer_xl import GalleryTransformerXLConfig
from .context import IntervalContext
from .exporting import in_one_graph, possibly
from .heads import CausalLMHead, SequenceClassificationHead, keep_logits
from .modeling_base import GalleryPreTrainedModel
from .positions import sinusoids
from .rows import Rows
from .segments import Parts, SegmentLayer, attend_segments, segment_spans


@dataclass(kw_only=True)
class Context(IntervalContext):
    """Inputs shared by all layers of one forward. Adds to IntervalContext:"""

    farthest: int  # the greatest distance of the table of positions
    relative: torch.Tensor | None  # (R, E) sinusoids of the distances farthest, ..., 1, 0; None if all tables are made
    parts: Parts | None  # with gradients; None without
    biases: tuple[torch.Tensor, torch.Tensor] | None  # u, v (H, D), if layers share them
    start: torch.Tensor | None = None  # (B or 1, C) the columns before a row's first token, where they hold zeros


class GalleryTransformerXLAttention(MultiHead):
    """Attention with relative positions, appendix B."""

    def __init__(self, config: GalleryTransformerXLConfig, layer: int):
        super().__init__(config)
        self.layer, inner = layer, self.num_heads * config.head_dim
        self.r_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=False)
        if config.untie_r:
            self.content_bias = nn.Parameter(torch.zeros(self.num_heads, config.head_dim))  # u
            self.position_bias = nn.Parameter(torch.zeros(self.num_heads, config.head_dim))  # v
        self.untie_r = config.untie_r
        self.dropout = AttentionDropout(config.attention_dropout)

    def table(self, context: Context) -> torch.Tensor:
        """r of the distances farthest, ..., 0: (H, R, D)."""
        return context.table(self.layer, lambda: split_heads(self.r_proj(context.relative)[None], self.num_heads)[0])

    def forward(self, x, own, joined, before, context: Context):
        """x (B, T, E). Pairs of keys and values (B, H, ., D): own (T), joined with the past before them (C + T), and
        with context.parts, whose attention is made of two, `before`, seen without gradient to their states.

        Returns (B, T, E) and, if asked for, probabilities (B, H, T, C + T).
        """
        u, v = (self.content_bias, self.position_bias) if self.untie_r else context.biases
        query = self.query(x)  # (B, H, T, D)
        content, position = query + u[:, None].to(query), query + v[:, None].to(query)
        relative = Position(self.table(context), context.farthest, position)
        dropout = self.dropout.rate
        if context.parts is not None:
            parts = context.parts
            out, probabilities = attend_segments(context, content, own, before, parts, relative, dropout=dropout)
        else:
            key, value = joined
            keys = Keys(key, value, context.spans, relative)
            out, probabilities = attend_shown(context, content, keys, dropout=dropout)
        return self.o_proj(merge_heads(out)), probabilities


class GalleryTransformerXLLayer(SegmentLayer):
    """One layer; its state is that of SegmentLayer."""

    def __init__(self, config: GalleryTransformerXLConfig, layer: int):
        attention = GalleryTransformerXLAttention(config, layer)
        super().__init__(config, attention, config.pre_lnorm, inner_dropout=config.hidden_dropout)

    def _past(self, state, context, x):
        past = super()._past(state, context, x)
        if context.start is None:
            return past
        zeros = self.self_attn.keys_values(self._attention_input(x.new_zeros(1, 1, x.shape[-1])))
        return tuple(
            start_with(zero, columns, context.start, x.shape[0])
            for zero, columns in zip(zeros, past or (None, None), strict=True)
        )


def start_with(zero: torch.Tensor, columns: torch.Tensor | None, start: torch.Tensor, batch: int) -> torch.Tensor:
    """columns (B, H, up to C, D), with what a state of zeros gives, (1, H, 1, D), where start (B or 1, C) says so."""
    count = start.shape[1]
    if columns is None:
        return zero.expand(batch, -1, count, -1)
    if columns.shape[2] < count:
        columns = F.pad(columns, (0, 0, count - columns.shape[2], 0))
    return torch.where(start[:, None, :, None], zero, columns)


class GalleryTransformerXLPreTrainedModel(GalleryPreTrainedModel):
    """Weights and names that Transformer-XL's classes share."""

    config: GalleryTransformerXLConfig
    config_class = GalleryTransformerXLConfig
    _no_split_modules = ["GalleryTransformerXLLayer"]
    auto_classes = {
        "AutoModel": "GalleryTransformerXLModel",
        "AutoModelForCausalLM": "GalleryTransformerXLForCausalLM",
        "AutoModelForSequenceClassification": "GalleryTransformerXLForSequenceClassification",
    }
    takes_pairs = True
    implementations = OWN_IMPLEMENTATIONS | {
        "eager": "their own tiles or kernels, which alone know the position term of Transformer-XL"
    }

    def _init_weights(self, module):
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, 1.0, std)  # as the authors' train.py, weights_init
        for name in ("content_bias", "position_bias", "cluster_weight"):
            if isinstance(getattr(module, name, None), nn.Parameter):
                nn.init.normal_(getattr(module, name), 0.0, std)
        if isinstance(getattr(module, "cluster_bias", None), nn.Parameter):
            nn.init.zeros_(module.cluster_bias)
        if isinstance(module, Projections):
            for proj in module:
                nn.init.normal_(proj, 0.0, self.config.projection_init_range)
        elif isinstance(module, nn.ParameterList):  # the adaptive softmax's weights (words, width) and biases (words,)
            for parameter in module:
                nn.init.normal_(parameter, 0.0, std if parameter.dim() == 2 else 0.0)

    @property
    def embeddings(self) -> nn.ModuleDict:
        """PEFT's prompt tuning finds an adaptive embedding by this name, and tables by their size."""
        if not is_adaptive(self.config):
            raise AttributeError(f"{type(self).__name__} has no attribute 'embeddings'")
        words: Any = self.base_model.embed_tokens
        return nn.ModuleDict({"word_embeddings": words})

    def _resize_token_embeddings(self, new_num_tokens, pad_to_multiple_of=None, mean_resizing=True):
        """As in transformers; with adaptive tables the last cluster grows or shrinks."""
        embedding, softmax = self.get_input_embeddings(), self.get_output_embeddings()
        if not isinstance(embedding, AdaptiveEmbedding):
            return super()._resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        size, last = self.new_size(new_num_tokens, pad_to_multiple_of), max([0, *self.config.cutoffs])
        if size <= last:
            raise ValueError(
                f"the new vocabulary has {size} tokens, and the last cluster begins at {last}; more than that must "
                "stay"
            )
        table: Any = embedding.tables[-1]
        words = table.num_embeddings + size - embedding.num_embeddings
        self._resize_table(table.weight, words, mean_resizing)
        table.num_embeddings, embedding.ends[-1] = words, size
        if softmax is not None:
            self._resize_table(softmax.weights[-1], words, mean_resizing)
            softmax.biases[-1].data = F.pad(softmax.biases[-1].data, (0, words - len(softmax.biases[-1])))
            softmax.ends[-1] = size
        return embedding

    def _resize_table(self, table: nn.Parameter, words: int, mean_resizing: bool):
        resized = nn.Embedding(*table.shape, _weight=table.data)
        table.data = self._get_resized_embeddings(resized, words, mean_resizing=mean_resizing).weight.data


class GalleryTransformerXLModel(Backbone, GalleryTransformerXLPreTrainedModel):
    """The bare Transformer-XL. An input may be any number of segments long; segments follow each row's own count of
    tokens, not the forwards. A cache that was filled without gradients holds keys and values; a later forward with
    gradients sees them as constants.

    >>> import torch
    >>> from hf_gallery import GalleryTransformerXLConfig, GalleryTransformerXLModel
    >>> sizes = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    >>> config = GalleryTransformerXLConfig(**sizes, segment_length=8, mem_len=8)
    >>> model = GalleryTransformerXLModel(config).eval()
    >>> model(torch.tensor([list(b"a long time ago")])).last_hidden_state.shape
    torch.Size([1, 15, 32])
    """

    def __init__(self, config: GalleryTransformerXLConfig):
        super().__init__(config)
        if is_adaptive(config):
            self.embed_tokens = AdaptiveEmbedding(config)
        else:
            self.embed_tokens = ScaledEmbedding(config.vocab_size, config.hidden_size, math.sqrt(config.hidden_size))
        self.layers = nn.ModuleList([GalleryTransformerXLLayer(config, i) for i in range(config.num_hidden_layers)])
        if not config.untie_r:
            self.content_bias = nn.Parameter(torch.zeros(config.num_attention_heads, config.head_dim))  # u
            self.position_bias = nn.Parameter(torch.zeros(config.num_attention_heads, config.head_dim))  # v
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.post_init()

    def embed(self, rows, input_ids, inputs_embeds, **more):
        return self.dropout(super().embed(rows, input_ids, inputs_embeds))

    def finish(self, x):
        return self.dropout(x)

    def tables_follow(self):
        return [layer.self_attn.r_proj for layer in self.layers]

    def plan(self, common, past, **inputs) -> Context:
        config, rows, cached = self.config, common.rows, common.cached
        start, least = None, 0
        if config.initial_memory == "zeros":
            start, least = self._start(rows, cached), -config.mem_len
            cached = cached if start is None else start.shape[1]
        sizes = {name: getattr(config, name) for name in ("segment_length", "mem_len", "same_length")}
        spans, parts = segment_spans(rows, cached, **sizes, least=least, carries=common.carries)
        farthest, tables = spans.reach(cached), common.tables
        if tables is not None:
            farthest = config.cache_capacity  # one table for all forwards to come
        relative = None
        if tables is None or len(tables) < len(self.layers):
            distances = torch.arange(farthest, -1, -1, device=common.device)
            if config.clamp_len > 0:
                distances = distances.clamp(max=config.clamp_len)
            relative = sinusoids(distances, config.hidden_size, "concatenated", self.dtype)
            if parts is not None:  # not where it becomes a table for later forwards
                relative = self.dropout(relative)
        return common.widened(
            Context,
            spans=spans,
            farthest=farthest,
            relative=relative,
            parts=parts,
            biases=None if config.untie_r else (self.content_bias, self.position_bias),
            start=None if start is None else start.to(common.device),
        )

    def _start(self, rows: Rows, cached: int):
        """Marks the columns of this forward that stand before their row's first token, (B or 1, C); None if none do. C
        is above `cached` where more are needed than the cache holds."""
        config = self.config
        reach = rows.first % config.segment_length + config.mem_len  # from the next token to the first key it sees
        begins = config.same_length or in_one_graph()  # what is followed has no past
        columns = max(cached, config.mem_len if begins else int(reach.max()))
        start = rows.column_positions(columns) < 0
        return start if columns and possibly(start) else None


class GalleryTransformerXLForCausalLM(CausalLMHead, GalleryTransformerXLPreTrainedModel):
    """Transformer-XL with a map to the vocabulary: linear, or with cutoffs the adaptive softmax.

    With the adaptive softmax logits are log-probabilities, and None in training with labels: the loss then never
    scores the whole vocabulary.

    >>> import torch
    >>> from hf_gallery import GalleryTransformerXLConfig, GalleryTransformerXLForCausalLM
    >>> sizes = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    >>> config = GalleryTransformerXLConfig(**sizes, segment_length=8, mem_len=8)
    >>> model = GalleryTransformerXLForCausalLM(config).eval()
    >>> cache = model(torch.tensor([list(b"a long time")]), use_cache=True).past_key_values
    >>> model(torch.tensor([list(b" ago")]), past_key_values=cache).logits.shape
    torch.Size([1, 4, 262])
    """

    backbone_class = GalleryTransformerXLModel

    def build_head(self, config):
        if is_adaptive(config):
            self.lm_head = AdaptiveSoftmax(config)
            self._tied_weights_keys = self._adaptive_ties()
        else:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)

    def _adaptive_ties(self):
        tables = self.model.embed_tokens.tables
        ties = {f"lm_head.weights.{i}": f"model.embed_tokens.tables.{i}.weight" for i in range(len(tables))}
        for i in range(len(self.lm_head.projs)):
            if self.config.tie_projs is None or self.config.tie_projs[i]:
                ties[f"lm_head.projs.{i}"] = f"model.embed_tokens.projs.{i if len(tables) > 1 else 0}"
        return ties

    def logits_and_loss(self, hidden, labels, logits_to_keep, loss_arguments):
        if not isinstance(self.lm_head, AdaptiveSoftmax):
            return super().logits_and_loss(hidden, labels, logits_to_keep, loss_arguments)
        targets = loss_arguments.get("shift_labels")
        if targets is None and labels is not None:
            targets = F.pad(labels, (0, 1), value=-100)[:, 1:]
        loss = None if targets is None else self.lm_head(hidden, targets, loss_arguments.get("num_items_in_batch"))
        if loss is not None and self.training:
            return None, loss
        return self.lm_head(keep_logits(hidden, logits_to_keep)), loss


class GalleryTransformerXLForSequenceClassification(SequenceClassificationHead, GalleryTransformerXLPreTrainedModel):
    """A label for each row, from its last token.

    >>> import torch
    >>> from hf_gallery import GalleryTransformerXLConfig, GalleryTransformerXLForSequenceClassification
    >>> sizes = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    >>> config = GalleryTransformerXLConfig(**sizes, segment_length=8, mem_len=8)
    >>> model = GalleryTransformerXLForSequenceClassification(config).eval()
    >>> model(torch.tensor([list(b"a long time ago")])).logits.shape
    torch.Size([1, 2])
    """

    backbone_class = GalleryTransformerXLModel


__all__ = [
    "GalleryTransformerXLForCausalLM",
    "GalleryTransformerXLForSequenceClassification",
    "GalleryTransformerXLModel",
    "GalleryTransformerXLPreTrainedModel",
]
