"""Attention and layer of Longformer; the equations stand in modeling_longformer.py.

Letters: see spans.py. G global tokens of a row.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .attention import Position, attend, attend_naive, join
from .attention_maps import show
from .attention_problem import compute_dtype, without_autocast
from .blocks import MultiHeadAttention, ResidualLayer, merge_heads, split_heads
from .columns import append_columns
from .configuration_longformer import GalleryLongformerConfig
from .context import ForwardContext
from .exporting import is_exporting
from .folding import Folding, GlobalTokens, in_order
from .gradients import with_gradients_for
from .positions import sinusoids
from .segments import Parts, segment_spans
from .spans import Spans
from .stack import mark_branches
from .states import Fixed, LayerOutput, State


@dataclass(kw_only=True)
class Context(ForwardContext):
    """Inputs shared by all layers of one forward. Adds to ForwardContext:"""

    causal: bool
    everything: Spans | None  # encoder: all tokens, for global queries
    globals: GlobalTokens | None
    sizes: dict[str, int] | None = None  # of segments and their memory; None where the text is not cut
    parts: Parts | None = None  # of the segments, with gradients; None without
    # Of a decoder with global tokens, if given: takes each layer's probabilities (B, H, T, G) of global keys that a
    # query's window does not hold, which no column of its map stands for.
    global_maps: dict[int, torch.Tensor] | None = None

    def segments(self, window: int) -> tuple[Spans, Parts | None]:
        """The [cached | new] columns that a window shows of a query's segment and memory, and their parts."""
        sizes = dict(window=window, carries=self.carries, **(self.sizes or {}))
        work = functools.partial(segment_spans, self.rows, self.cached, **sizes)
        return self.once(("segments", window), work)

    def folding(self, dilation: int) -> Folding:
        return self.once(("folding", dilation), lambda: Folding(self.rows, self.cached, dilation))


class GalleryLongformerAttention(MultiHeadAttention):
    """Sliding-window attention with global tokens, section 3.1. One layer has one window and one dilation."""

    def __init__(self, config: GalleryLongformerConfig, layer: int):
        super().__init__(config, config.attention_bias)
        self.layer, self.width = layer, config.hidden_size
        inner = self.num_heads * config.head_dim
        window, self.dilation = (config.per_layer(f"attention_{name}")[layer] for name in ("window", "dilation"))
        self.left, self.right = (window, 0) if config.is_decoder else (window // 2, window // 2)
        if not config.is_decoder:
            self.q_global_proj = nn.Linear(config.hidden_size, inner, bias=config.attention_bias)
            self.k_global_proj = nn.Linear(config.hidden_size, inner, bias=config.attention_bias)
            self.v_global_proj = nn.Linear(config.hidden_size, inner, bias=config.attention_bias)
        self.relative = config.position_embedding_type == "relative"
        if self.relative:
            self.r_proj = nn.Linear(config.hidden_size, inner, bias=False)
            self.content_bias = nn.Parameter(torch.zeros(self.num_heads, config.head_dim))  # u of Transformer-XL
            self.position_bias = nn.Parameter(torch.zeros(self.num_heads, config.head_dim))  # v of Transformer-XL

    def forward(self, x: torch.Tensor, context: Context, state: State) -> LayerOutput:
        """x (B, T, E). Returns (B, T, E), the next state, and probabilities (B, H, T, C + T) or None."""
        query = self.query(x)  # (B, H, T, D)
        key, value = self.keys_values(x)  # (B, H, T, D)
        keys, values, new = context.extend(state, keys=key, values=value)  # (B, H, C + T, D)
        global_pairs = None
        if context.globals is not None:
            global_pairs = self._global_pairs(key, value, context.globals, state)
            if context.keeps_state:
                names = ("global_keys", "global_values")
                new |= {name: Fixed(x) for name, x in zip(names, global_pairs, strict=True)}
        position = None
        if self.relative:
            query, position = self._relative(query, context)
        probabilities, of_globals = None, None
        if not context.causal and context.globals is not None:
            of_globals = self._of_globals(x, context)
        options = dict(dropout=self.dropout.rate, implementation=context.implementation)
        if context.rows.steps:
            spans = context.once((self.left, self.dilation, "ring"), lambda: self._ring(context.rows))
            out = attend(query, keys, values, spans, position=position, **options)
        elif context.output_attentions or is_exporting():
            out, probabilities = self._look(query, (keys, values), global_pairs, position, of_globals, context)
        else:
            out = self._local(query, (keys, values), global_pairs, position, context, options)
            if of_globals is not None:
                out = context.globals.put(out, attend(*of_globals, **options))
        if not context.causal and of_globals is None:
            out = with_gradients_for(out, self.q_global_proj, self.k_global_proj, self.v_global_proj)
        return self.o_proj(merge_heads(out)), new, probabilities

    def _ring(self, rows) -> Spans:
        """A decoder's window in a ring."""
        p = rows.positions
        return rows.spans(p - self.left * self.dilation, p, 0).dilated(self.dilation)

    def _local(self, query, pair, global_pairs, position, context, options):
        folding = context.folding(self.dilation)
        window = context.once((self.left, self.dilation, "window"), lambda: folding.window(self.left, self.right))
        queries, keys, values = folding.queries(query), *map(folding.keys, pair)
        if position is not None:
            position = position._replace(query=folding.queries(position.query))
        if global_pairs is None:
            return folding.unfold(attend(queries, keys, values, window, position=position, **options))
        order, outside = context.once(
            (self.left, self.dilation, "outside"), lambda: folding.outside(context.globals, self.left, self.right)
        )
        result = attend(queries, keys, values, window, position=position, return_lse=True, **options)
        global_keys, global_values = (in_order(z, order) for z in global_pairs)  # (B * g, H, G, D)
        for spans in outside:
            beyond = attend(queries, global_keys, global_values, spans, return_lse=True, **options)
            result = join(result, beyond)
        return folding.unfold(result[0])

    def _global_pairs(self, key, value, globals_, state):
        """Keys and values (B, H, G, D) of all global tokens so far."""
        pairs = []
        for name, new in (("global_keys", key), ("global_values", value)):
            z = append_columns(state.get(name), globals_.take(new))
            if globals_.pick is not None:
                pick = globals_.pick.to(z.device)[:, None, :, None].expand(-1, z.shape[1], -1, z.shape[3])
                z = z.gather(2, pick)
            pairs.append(z)
        return tuple(pairs)

    def _of_globals(self, x, context):
        """The global tokens' attention over everything, by maps of their own: query (B, H, Gn, D), key and value
        (B, H, T, D), intervals."""
        query = context.globals.take(split_heads(self.q_global_proj(x), self.num_heads))
        key, value = (
            split_heads(self.k_global_proj(x), self.num_heads),
            split_heads(self.v_global_proj(x), self.num_heads),
        )
        first = context.everything
        count = query.shape[2]
        spans = context.once(
            "everything", lambda: Spans(first.lower[:, :1].expand(-1, count), first.upper[:, :1].expand(-1, count))
        )
        return query, key, value, spans

    def _relative(self, query, context):
        table = context.table(self.layer, lambda: self._table(query))
        content = query + self.content_bias[:, None].to(query.dtype)
        return content, Position(table, self.left, query + self.position_bias[:, None].to(query.dtype))

    def _table(self, query):
        """r of the distances in the window, farthest first: (H, left + 1 + right, D)."""
        distances = torch.arange(self.left, -self.right - 1, -1, device=query.device) * self.dilation
        sinusoid = sinusoids(distances, self.width, "concatenated", query.dtype)
        return split_heads(self.r_proj(sinusoid)[None], self.num_heads)[0]

    def _look(self, query, pair, global_pairs, position, of_globals, context):
        """The same attention with all T x S scores, for its maps and for what is exported: (B, H, T, D), and if asked
        for the probabilities (B, H, T, S)."""
        globals_, maps, (keys, values) = context.globals, context.global_maps, pair
        asked = context.output_attentions and context.causal and globals_ is not None
        if asked and maps is None:
            raise ValueError(
                "output_attentions is True and a decoder has global tokens, which may be older than the columns of a "
                "map; leave out one of them"
            )
        with without_autocast(query):
            if asked:
                return self._look_beyond(query, pair, global_pairs, position, context)
            probabilities = self._window_map(query, keys, position, context)
            if of_globals is not None:
                probabilities = globals_.put(probabilities, attend_naive(*of_globals)[2])
            shown = None
            if context.output_attentions:
                shown, probabilities = show(context, probabilities)
            kept = F.dropout(probabilities, self.dropout.rate)
            out = kept @ values.to(kept.dtype)
            if of_globals is not None:
                out = globals_.put(out, globals_.take(kept) @ of_globals[2].to(kept.dtype))
        return out.to(query.dtype), shown

    def _look_beyond(self, query, pair, global_pairs, position, context):
        """`_look` of a decoder with global tokens: the map of the window, and into global_maps that of the global keys
        outside it, one softmax for both."""
        columns = pair[0].shape[2]
        keys, values = (torch.cat([x, more], dim=2) for x, more in zip(pair, global_pairs, strict=True))
        probabilities = self._window_map(query, keys, position, context, apart=True)
        kept = F.dropout(probabilities, self.dropout.rate)
        shown, beyond = probabilities.split([columns, keys.shape[2] - columns], dim=-1)
        context.global_maps[self.layer] = beyond
        return (kept @ values.to(kept.dtype)).to(query.dtype), show(context, shown)[0]

    def _window_map(self, query, keys, position, context, apart=False):
        """Probabilities (B, H, T, S) over each query's window and the global tokens, by the same maps for all. apart:
        the global keys stand behind the columns [cached | new], of which then the window is all that is seen."""
        place = (self.left, self.dilation, "apart" if apart else "dense")
        visible, window, entry = context.once(place, lambda: self._visible(context, keys.device, apart))
        dtype = compute_dtype(query)
        scores = query.to(dtype) @ keys.to(dtype).mT
        if position is not None:
            term = (position.query.to(dtype) @ position.table.to(dtype).mT).gather(-1, entry.expand_as(scores))
            scores = scores + term.masked_fill(~window[:, None], 0.0)  # a global token has no distance
        scores = (scores * query.shape[-1] ** -0.5).masked_fill(~visible[:, None], -math.inf)
        return scores.softmax(-1).masked_fill(~visible.any(-1)[:, None, :, None], 0.0)

    def _visible(self, context, device, apart=False):
        """Keys that each query sees (B or 1, T, S), those of its window, and each pair's table entry (1, T, S). apart:
        see `_window_map`."""
        rows, s = context.rows, context.cached + context.rows.width
        last = rows.last
        p = rows.positions.to(last.device)
        key = p[:, :1] - context.cached + torch.arange(s, device=p.device)  # (B or 1, S)
        distance = p[:, :, None] - key[:, None]
        real = (key >= 0) & (key <= last)
        visible = window = self._holds(distance)
        if context.globals is not None and not apart:
            mark = torch.zeros(rows.seen.shape[0], s + 1, dtype=torch.bool, device=p.device)
            mark.scatter_(1, context.globals.index.to(p.device), True)
            mark = mark[:, None, :-1]
            visible = visible | (mark & (distance >= 0) if context.causal else mark)
        visible = visible & real[:, None]
        entry = self.left - torch.div(distance[:1], self.dilation, rounding_mode="floor")
        if apart:
            at = context.globals.positions[:, None]  # (B, 1, G)
            ahead = p[:, :, None] - at
            beyond = (at >= 0) & (ahead >= 0) & ~self._holds(ahead)
            visible = torch.cat([visible.expand(beyond.shape[0], -1, -1), beyond], dim=-1)
            window, entry = (F.pad(x, (0, at.shape[-1])) for x in (window, entry))
        visible = visible & (p <= last)[..., None]
        return visible.to(device), window.to(device), entry.clamp(0, self.left + self.right).to(device)

    def _holds(self, distance):
        """Tells where a window holds keys, by their distance before the query."""
        near = (distance <= self.left * self.dilation) & (distance >= -self.right * self.dilation)
        return near & (distance % self.dilation == 0)


class GalleryLongformerLayer(ResidualLayer):
    """One layer. State of a decoder: keys, values (B, H, C, D); with global tokens global_keys, global_values."""

    attention: type[GalleryLongformerAttention] = GalleryLongformerAttention

    def __init__(self, config: GalleryLongformerConfig, layer: int):
        attention = self.attention(config, layer)
        super().__init__(config, attention, config.norm_position == "pre", config.activation_dropout)
        mark_branches([attention.o_proj, self.feed_forward.down_proj], config)

    def forward(self, x: torch.Tensor, context: Context, state: State) -> LayerOutput:
        """x (B, T, E). Returns x, the next state, and probabilities (B, H, T, C + T) or None."""
        y, new, probabilities = self.self_attn(self.self_attn_norm(x) if self.pre else x, context, state)
        x = self.add(x, y, self.self_attn_norm)
        y = self.feed_forward(self.feed_forward_norm(x) if self.pre else x)
        return self.add(x, y, self.feed_forward_norm), new, probabilities
