"""The Block-Recurrent Transformer (Hutchins, Schlag, Wu, Dyer, Neyshabur 2022, arXiv 2203.07852).

    every layer       sliding-window attention: query p sees [p - W, p - 1], T5 bias, unit queries and keys, scaled
    a recurrent layer also has Z state vectors, which block j of W tokens enters as s_j:
      vertical        tokens of block j read s_j besides their window; one map joins both     section 3, recurrent cell
      horizontal      s_j reads itself and tokens of blocks j - 1 and j; gates make s_(j+1)        section 3, gates

    With y = [self-attention ; attention to tokens] of s_j, and each gate(s, z) of old s and new z fixed or LSTM:

      fixed           g = sigmoid(b);  s g + z (1 - g)
      lstm            f = sigmoid(W_f y + b_f + 1), i = sigmoid(W_i y + b_i - 1);  s f + z i
      skip            s_(j+1) = gate(s_j, W_o y)
      dual            a = gate(s_j, W_o y), s_(j+1) = gate(a, feed_forward(norm(a)))
      single          s_(j+1) = gate(s_j, tanh(feed_forward(y))): no map behind the attention, one gate, no norm

The state's keys and values serve both directions, and so do the tokens'; queries are separate. State vectors carry a
learned id, without which they would stay alike. s_0 is learned.

The query itself is not in its window, norms divide by the root mean square alone, maps have no biases, and dropout
falls on a layer's normed input, its feed-forward's output and the last norm, as in the authors' code, whose results
are the paper's: google-research/meliad, transformer/transformer_layer.py, transformer_base.py and
configs/base_htrans.gin as of commit fc4b036, of 2022. The gallery departs from it in three places:

- Document start: the official window holds zero keys that take part in the softmax; here there is nothing.
- Decoding: the official state stays as it was in the cache; here it advances when its block is complete, so decoding
  equals reading.
- Logits: divided by sqrt(V) in the code of 2022 and by sqrt(E) in that of 2025 (cc1aef5); here by sqrt(E).

"single" is as the code of 2022 has it, single_gate in transformer_base.py, tanh and the missing norm included.

The absolute value of the scales, as here, is taken in the code of 2025 only; the two agree while scales are positive.

The same by loops over blocks and tokens, to read beside the paper: tests/plain/block_recurrent_transformer.py.

Blocks start at each row's own first token. All but the state runs over all blocks at once. Gradients flow through all
blocks of one forward, and not between forwards. Letters: see spans.py. W block_length, Z num_state_vectors, J blocks.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import nn

from .attention import OWN_IMPLEMENTATIONS, Position, attend
from .attention_maps import Keys, attend_shown
from .backbone import Backbone
from .blocks import (
    LARGEST_TABLE,
    AttentionDropout,
    FeedForward,
    PreNormLayer,
    ScaledEmbedding,
    ScaledQueryKeyValue,
    T5Bias,
    init_scaled,
    merge_heads,
    scaled_unit,
    split_heads,
)
from .configuration_block_recurrent_transformer import GalleryBlockRecurrentTransformerConfig
from .context import ForwardContext
from .exporting import fixed_length, is_exporting, possibly, readable, surely
from .gate_triton import gate_triton, serves
from .gradients import with_gradients_for
from .heads import CausalLMHead, SequenceClassificationHead
from .modeling_base import GalleryPreTrainedModel
from .rows import Rows
from .spans import Spans
from .states import Derived, Folded, LayerOutput, NextState, Record, State


@dataclass(kw_only=True)
class Context(ForwardContext):
    """Inputs shared by all layers of one forward. Adds to ForwardContext:"""

    block_length: int
    fed: tuple[torch.Tensor, torch.Tensor] | None = None  # feedback: keys and values (B, H, Z, D) of the state vectors

    def window(self, cached: int) -> Spans:
        """[p - W, p - 1] in the columns [cached | new]."""
        p = self.rows.positions
        return self.once(("window", cached), lambda: self.rows.spans(p - self.block_length, p - 1, cached))

    def everything(self, queries: int, columns: int) -> Spans:
        """All columns, for every query."""
        place, ends = ("everything", queries, columns), (0, columns - 1)
        device = self.rows.seen.device
        return self.once(place, lambda: Spans(*(torch.full((1, queries), end, device=device) for end in ends)))

    def ending(self, vectors: int, slots: int) -> tuple[torch.Tensor, Spans]:
        """The rows (B,) whose block ends with the token of this step, and the slots of a ring that Z vectors see then:
        all that are filled, since attention does not ask for an order."""

        def work():
            rows = self.rows
            count = rows.seen + rows.lengths  # (B,)
            done = count % self.block_length == 0
            done = done if rows.mask is None else done & rows.mask[:, 0]
            last = (count.clamp(max=slots) - 1)[:, None].expand(-1, vectors).contiguous()  # (B, Z)
            return done, Spans(torch.zeros_like(last), last)

        return self.once(("ending", vectors, slots), work)

    def fresh(self) -> torch.Tensor:
        """Rows (B,) whose first block is not over when this forward begins."""
        return self.once("fresh", lambda: self.rows.seen < self.block_length)

    def blocks(self, cached: int) -> Blocks:
        return self.once(("blocks", cached), lambda: Blocks(self.rows, cached, self.block_length))

    def token_spans(self, blocks: Blocks, vectors: int) -> Spans:
        return self.once(("tokens", vectors), lambda: blocks.token_spans(vectors))


class Blocks:
    """The rows' tokens by their own blocks: block j of a row is the j-th that this forward touches.

    complete (B, J): whether block j ends in this forward. cuts: where all rows start together, the columns
    [cached | new] at which blocks -1, 0, ..., J begin, cut to those that exist; else None.
    """

    cuts: list[int] | None = None

    def __init__(self, rows: Rows, cached: int, length: int):
        self.rows, self.length, w = rows, length, length
        self.phase = rows.seen % w  # (B,) tokens of the first block that are already behind
        reach = self.phase + rows.lengths  # (B,) tokens from the first block's start
        most = int(reach.max()) if readable(reach) else fixed_length(rows.width)  # where it cannot be asked, no past
        self.count = max(1, -(-most // w))  # J; one also where no row has a token
        self.complete = reach[:, None] >= (1 + torch.arange(self.count, device=rows.device)) * w
        self.columns = cached + rows.width
        if rows.start is not None:
            least = max(0, cached - rows.start)
            begins = (cached - rows.start % w + j * w for j in range(-1, self.count + 1))
            self.cuts = [min(max(least, begin), self.columns) for begin in begins]
            return
        # The columns of block -1 and of all blocks, one behind another, and which of them exist.
        place = torch.arange(-w, self.count * w, device=rows.device)
        column = place - self.phase[:, None] + cached  # (B, (J + 1) * W)
        self.real = (
            (column >= cached - rows.seen[:, None]) & (column < (cached + rows.lengths)[:, None]) & (column >= 0)
        )
        self.column = column.clamp(0, self.columns - 1)

    def ends(self, j: int) -> torch.Tensor:
        """The tokens that a row has read when block j ends, (B,); 0 where it does not end in this forward."""
        return (self.rows.seen - self.phase + (j + 1) * self.length).masked_fill(~self.complete[:, j], 0)

    def windows(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The tokens of x (B, H, C + T, D) that the state sees when each block ends: J times (B, H, up to 2 W, D)."""
        # Split once: a pick from all of x for each block would cost its whole gradient each time.
        if self.cuts is None:
            at = self.column.to(x.device)[:, None, :, None]
            parts = x.gather(2, at.expand(-1, x.shape[1], -1, x.shape[3])).split(self.length, dim=2)
        else:
            ends = [0, *self.cuts, self.columns]
            parts = x.split([end - begin for begin, end in itertools.pairwise(ends)], dim=2)[1:-1]
        return [torch.cat(pair, dim=2) if pair[0].shape[2] else pair[1] for pair in itertools.pairwise(parts)]

    def window_spans(self, j: int, vectors: int) -> Spans:
        """The interval of real columns in window j, the same for all queries; a complete block ends with one."""
        real = self.real[:, j * self.length : (j + 2) * self.length]
        lower = (real.cumsum(1) == 0).sum(1)[:, None].expand(-1, vectors)  # (B, Z)
        return Spans(lower, torch.full_like(lower, 2 * self.length - 1))

    def token_spans(self, vectors: int) -> Spans:
        """The interval of each token, in the Z state vectors of all blocks one behind another: those of its own."""
        p = self.rows.positions
        block = (p // self.length - p[:, :1] // self.length).clamp(max=self.count - 1)  # (B or 1, T)
        return Spans(block * vectors, block * vectors + vectors - 1)


class LSTMGate(nn.Linear):
    """A map that starts small, so that the gate starts where its constant puts it."""

    variance = 0.1  # of its initialisation, see init_scaled


class StateGate(nn.Module):
    """The gate between new content and old state vectors. hidden: what the content was made from."""

    def __init__(self, config: GalleryBlockRecurrentTransformerConfig, hidden: int):
        super().__init__()
        self.lstm = config.gate_type == "lstm"
        if self.lstm:
            self.forget_gate = LSTMGate(hidden, config.hidden_size)
            self.input_gate = LSTMGate(hidden, config.hidden_size)
        else:
            self.gate_bias = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, vectors, content, hidden, done, no_grad):
        """vectors, content (B, Z, E), hidden (B, Z, any) to the next vectors (B, Z, E). done: (B,), the rows that go
        on to them, None for all. no_grad: nobody wants gradients."""
        maps = (self.forget_gate(hidden), self.input_gate(hidden)) if self.lstm else (self.gate_bias,)
        if no_grad and serves(vectors):
            return gate_triton(vectors, content, maps, done)
        if self.lstm:
            ahead = vectors * torch.sigmoid(maps[0] + 1.0) + content * torch.sigmoid(maps[1] - 1.0)
            ahead = ahead.to(vectors.dtype)
        else:
            gate = torch.sigmoid(self.gate_bias).to(vectors.dtype)
            ahead = torch.lerp(content.to(vectors.dtype), vectors, gate)  # under autocast content is of a half type
        return ahead if done is None else torch.where(done[:, None, None], ahead, vectors)


class RecurrentState(nn.Module):
    """The state vectors of a recurrent layer: the horizontal direction.

    config.recurrence_type says what stands between the attention of a state and the next one: "skip" a map and a gate,
    "dual" then a feed-forward and a gate of its own, "single" this feed-forward and its gate alone.
    """

    def __init__(self, config: GalleryBlockRecurrentTransformerConfig):
        super().__init__()
        self.num_heads, self.block_length = config.num_attention_heads, config.block_length
        inner = self.num_heads * config.head_dim
        self.initial = nn.Parameter(torch.zeros(config.num_state_vectors, config.hidden_size))
        self.ids = nn.Parameter(torch.zeros(config.num_state_vectors, config.hidden_size))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.project = ScaledQueryKeyValue(config)
        self.cross_q_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.cross_scale = nn.Parameter(torch.ones(self.num_heads))
        self.kind = config.recurrence_type
        if self.kind != "single":
            self.o_proj = nn.Linear(2 * inner, config.hidden_size, bias=False)
            self.gate = StateGate(config, 2 * inner)
        if self.kind == "dual":
            self.feed_forward_norm = nn.RMSNorm(config.hidden_size, eps=config.layer_norm_eps)
        if self.kind != "skip":
            reads = 2 * inner if self.kind == "single" else config.hidden_size
            self.feed_forward = FeedForward(config, bias=False, reads=reads)
            self.feed_forward_gate = StateGate(config, config.intermediate_size)

    def forward(self, state: State, context: Context, tokens: tuple[torch.Tensor, ...] | None = None):
        """The keys and values (B, H, Z, D) of the state vectors that the next token's block enters with. With tokens,
        which are queries (B, H, T, D), and keys and values (B, H, C + T, D): what the queries read (B, H, T, D), and
        the layer's next state. The only loop over blocks is here."""
        rows = context.rows
        vectors = self._entering(state, context)  # (B, Z, E)
        pair, named = None if tokens is None else context.fed, None
        if pair is None and "state_keys" in state:  # while the state and the weights stay as they were
            pair = state["state_keys"], state["state_values"]
        elif pair is None:
            named = self._named(vectors)
            pair = self.project.keys_values(named)
        if tokens is None:
            return pair
        query, keys, values = tokens
        if rows.steps:
            return self._step((query, keys, values), vectors, named, pair, context)
        # A text that ends within a block moves no state that is read; one that goes on starts from no initial state.
        query = with_gradients_for(query, self)
        blocks = context.blocks(keys.shape[2] - query.shape[2])
        pairs, windows, changes = [], None, []
        for j in range(blocks.count):
            pairs.append(pair)
            done = blocks.complete[:, j]
            goes_on = context.keeps_state or j + 1 < blocks.count  # somebody will read what comes next
            if goes_on and possibly(done):
                windows = windows or (blocks.windows(keys), blocks.windows(values))
                if context.records:
                    changes.append((vectors, blocks.ends(j)))
                named = self._named(vectors) if named is None else named
                seen = windows[0][j], windows[1][j]
                if blocks.cuts is None:
                    spans = blocks.window_spans(j, vectors.shape[1])
                else:
                    spans = context.everything(vectors.shape[1], seen[0].shape[2])
                moves = None if surely(done) else done.to(vectors.device)
                attended = self._attend(named, pair, seen, spans, context)
                vectors = self._advance(vectors, attended, moves, context.no_grad)
                if j + 1 < blocks.count or context.no_grad:
                    named = self._named(vectors)
                    pair = self.project.keys_values(named)
        new: NextState = {"state": Folded(vectors, Record.of(changes, vectors) if context.records else None)}
        if context.no_grad:  # a token of the same block reads them again
            new |= {"state_keys": Derived(pair[0]), "state_values": Derived(pair[1])}
        new = new if context.keeps_state else {}
        if blocks.count == 1:
            return read_state(query, pairs[0][0], pairs[0][1], context), new
        key, value = (torch.cat(x, dim=2) for x in zip(*pairs, strict=True))  # (B, H, J Z, D)
        spans = context.token_spans(blocks, vectors.shape[1])
        return attend(query, key, value, spans, scale=1.0, implementation=context.implementation), new

    def _step(self, tokens, vectors, named, pair, context: Context):
        """`forward` of one token behind a static cache, whose rings (B, H, N, D) hold the last two blocks."""
        query, *rings = tokens
        read, after = read_state(query, pair[0], pair[1], context), pair
        done, spans = context.ending(vectors.shape[1], rings[0].shape[2])
        if possibly(done):
            named = self._named(vectors) if named is None else named
            attended = self._attend(named, pair, rings, spans, context)
            vectors = self._advance(vectors, attended, done, context.no_grad)
            after = self.project.keys_values(self._named(vectors))
        new = {"state": Folded(vectors), "state_keys": Derived(after[0]), "state_values": Derived(after[1])}
        return read, new

    def _entering(self, state, context) -> torch.Tensor:
        """The vectors (B, Z, E) that the next token's block enters with: learned until a row's first block is over."""
        initial = self.initial.expand(context.rows.seen.shape[0], -1, -1)
        if "state" not in state:
            return initial
        fresh = context.fresh()
        if not possibly(fresh):
            return state["state"].to(initial.dtype)
        return torch.where(fresh.to(initial.device)[:, None, None], initial, state["state"].to(initial.dtype))

    def _named(self, vectors):
        """State vectors (B, Z, E) as their maps read them."""
        return self.norm(vectors) + self.ids

    def _attend(self, named, pair, tokens, spans, context):
        """Attention of the vectors, (B, Z, 2 H D). pair: their own keys and values (B, H, Z, D); tokens: those of
        tokens, of which spans says what they see."""
        query, _ = self.project(named, with_scale=False)  # (B, H, Z, D)
        cross_query = scaled_unit(split_heads(self.cross_q_proj(named), self.num_heads), self.cross_scale)
        own = read_state(query, pair[0], pair[1], context)
        cross = attend(cross_query, *tokens, spans, scale=1.0, implementation=context.implementation)
        return torch.cat([merge_heads(own), merge_heads(cross)], dim=-1)

    def _advance(self, vectors, attended, done, no_grad):
        """The state vectors (B, Z, E) after a block. attended (B, Z, 2 H D): what they have seen. done, no_grad: as
        StateGate's."""
        if self.kind == "single":
            hidden, content = self._feed_forward(attended)
            return self.feed_forward_gate(vectors, torch.tanh(content), hidden, done, no_grad)
        ahead = self.gate(vectors, self.o_proj(attended), attended, done, no_grad)
        if self.kind == "dual":
            hidden, content = self._feed_forward(self.feed_forward_norm(ahead))
            ahead = self.feed_forward_gate(ahead, content, hidden, done, no_grad)
        return ahead

    def _feed_forward(self, x):
        """Makes of x (B, Z, any) the hidden layer, which the gate reads, and the new content (B, Z, E)."""
        hidden = self.feed_forward.act(self.feed_forward.up_proj(x))  # (B, Z, intermediate_size)
        return hidden, self.feed_forward.down_proj(hidden)


def read_state(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> torch.Tensor:
    """Attention of queries (B, H, any, D), their scale in them, over keys and values (B, H, Z, D) of state vectors."""
    everything = context.everything(query.shape[2], key.shape[2])
    out = attend(query, key, value, everything, scale=1.0, implementation=context.implementation)
    return cast(torch.Tensor, out)


class GalleryBlockRecurrentTransformerAttention(nn.Module):
    """Sliding-window attention; in a recurrent layer, or with feedback, also over the state that entered the block."""

    def __init__(self, config: GalleryBlockRecurrentTransformerConfig, layer: int):
        super().__init__()
        self.layer, self.num_heads, self.block_length = layer, config.num_attention_heads, config.block_length
        inner = self.num_heads * config.head_dim
        self.project = ScaledQueryKeyValue(config)
        self.relative_bias = T5Bias(self.num_heads)
        self.recurrent = layer in config.recurrent_layers
        self.reads_state = self.recurrent or config.feedback
        if self.reads_state:
            self.cross_q_proj = nn.Linear(config.hidden_size, inner, bias=False)
            self.cross_scale = nn.Parameter(torch.ones(self.num_heads))
        self.o_proj = nn.Linear((2 if self.reads_state else 1) * inner, config.hidden_size, bias=False)
        if self.recurrent:
            self.recurrence = RecurrentState(config)
        self.dropout = AttentionDropout(config.attention_dropout)

    def forward(self, x: torch.Tensor, context: Context, state: State) -> LayerOutput:
        """x (B, T, E). Returns (B, T, E), the next state, and probabilities (B, H, T, C + T) or None."""
        query, scale = self.project(x, with_scale=not context.has_table(self.layer))  # (B, H, T, D), (H,)
        key, value = self.project.keys_values(x)  # (B, H, T, D)
        max_columns = None if self.recurrent else self.block_length
        keys, values, new = context.extend(state, max_columns, keys=key, values=value)  # (B, H, C + T, D)
        cached = keys.shape[2] - key.shape[2]
        spans = context.window(cached)
        farthest = self.block_length  # where a table serves all forwards to come
        if context.tables is None:
            # One distance only where the window is still empty: a table needs an entry all the same.
            farthest = max(1, spans.reach(cached))
        position = Position(context.table(self.layer, lambda: self.relative_bias(farthest, scale)), farthest)
        options = dict(scale=1.0, dropout=self.dropout.rate)
        out, probabilities = attend_shown(context, query, Keys(keys, values, spans, position), **options)
        out = merge_heads(out)
        if self.reads_state:
            cross_query = scaled_unit(split_heads(self.cross_q_proj(x), self.num_heads), self.cross_scale)
            if self.recurrent:
                cross, new_state = self.recurrence(state, context, (cross_query, keys, values))
                new |= new_state
            else:
                key, value = context.fed
                cross = read_state(cross_query, key, value, context)
            out = torch.cat([out, merge_heads(cross)], dim=-1)  # (B, T, 2 H D)
        return self.o_proj(out), new, probabilities


class GalleryBlockRecurrentTransformerLayer(PreNormLayer):
    """One layer. State: keys, values (B, H, C, D); a recurrent layer's also state (B, Z, E), its vectors, and after a
    forward without gradients their keys and values, state_keys and state_values (B, H, Z, D)."""

    def __init__(self, config: GalleryBlockRecurrentTransformerConfig, layer: int):
        super().__init__(config, GalleryBlockRecurrentTransformerAttention(config, layer), nn.RMSNorm)

    def forward(
        self, x: torch.Tensor | None, context: Context, state: State
    ) -> LayerOutput | tuple[torch.Tensor, torch.Tensor]:
        """As PreNormLayer's. Without x, of a recurrent layer: what its RecurrentState gives without tokens."""
        return self.self_attn.recurrence(state, context) if x is None else super().forward(x, context, state)


class GalleryBlockRecurrentTransformerPreTrainedModel(GalleryPreTrainedModel):
    """Weights and names that the Block-Recurrent Transformer's classes share."""

    config: GalleryBlockRecurrentTransformerConfig
    config_class = GalleryBlockRecurrentTransformerConfig
    _no_split_modules = ["GalleryBlockRecurrentTransformerLayer"]
    implementations = OWN_IMPLEMENTATIONS
    auto_classes = {
        "AutoModel": "GalleryBlockRecurrentTransformerModel",
        "AutoModelForCausalLM": "GalleryBlockRecurrentTransformerForCausalLM",
        "AutoModelForSequenceClassification": "GalleryBlockRecurrentTransformerForSequenceClassification",
    }

    def _init_weights(self, module):
        init_scaled(module, self.config.hidden_size**-0.5, self.config.initial_scale)
        if isinstance(getattr(module, "cross_scale", None), nn.Parameter):
            nn.init.constant_(module.cross_scale, self.config.initial_scale)
        if isinstance(module, RecurrentState):
            nn.init.normal_(module.initial, 0.0, 0.1)
            nn.init.normal_(module.ids, 0.0, 1.0)
        if isinstance(module, StateGate) and not module.lstm:
            nn.init.normal_(module.gate_bias, 0.0, 0.1)
        if isinstance(module, LSTMGate):
            nn.init.normal_(module.bias, 0.0, 0.1)


class GalleryBlockRecurrentTransformerModel(Backbone, GalleryBlockRecurrentTransformerPreTrainedModel):
    """The bare Block-Recurrent Transformer. An input may be any number of blocks long.

    >>> import torch
    >>> from hf_gallery import GalleryBlockRecurrentTransformerConfig, GalleryBlockRecurrentTransformerModel
    >>> sizes = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    >>> config = GalleryBlockRecurrentTransformerConfig(**sizes, block_length=8, num_state_vectors=4)
    >>> model = GalleryBlockRecurrentTransformerModel(config).eval()
    >>> model(torch.tensor([list(b"a long time ago")])).last_hidden_state.shape
    torch.Size([1, 15, 32])
    """

    def __init__(self, config: GalleryBlockRecurrentTransformerConfig):
        super().__init__(config)
        self.embed_tokens = ScaledEmbedding(config.vocab_size, config.hidden_size, math.sqrt(config.hidden_size))
        self.layers = nn.ModuleList(
            [GalleryBlockRecurrentTransformerLayer(config, i) for i in range(config.num_hidden_layers)]
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.post_init()

    def tables_follow(self):
        layers = [layer.self_attn for layer in self.layers]
        biases = [part for layer in layers for part in (layer.relative_bias, layer.project.scale)]
        return biases + [layer.recurrence for layer in layers if layer.recurrent]  # the state's keys and values do

    def plan(self, common, past, **inputs) -> Context:
        if is_exporting():
            fixed_length(common.rows.width)
        length = self.config.block_length
        return common.widened(Context, block_length=length, tables=common.tables if length <= LARGEST_TABLE else None)

    def finish(self, x):
        return self.dropout(self.norm(x))

    def run_layers(self, x, context, states, *more):
        if not self.config.feedback:
            return super().run_layers(x, context, states, *more)
        self._check_feedback(context)
        if context.rows.steps:
            return super().run_layers(x, self._feed(context, states), states, *more)
        return self.run_in_blocks(x, context, states, self.config.block_length, self._feed)

    def _feed(self, context: Context, states: list[State]) -> Context:
        """Feedback: all layers of block j read the state that block j - 1 left in the recurrent one."""
        recurrent = next(i for i, layer in enumerate(self.layers) if layer.self_attn.recurrent)
        # In a context of its own: a checkpointed layer computes it again, from what it was computed from.
        state = states[recurrent] if recurrent < len(states) else {}  # a draft of fewer layers reads the initial one
        return replace(context, fed=self.layers[recurrent](None, context, state))

    def _check_feedback(self, context: Context):
        """Raises ValueError for what blocks that run one by one cannot give."""
        if context.output_attentions:
            raise ValueError(
                "output_attentions is True and config.feedback is True: blocks run one by one, so there is no one "
                "map; leave output_attentions out"
            )
        if self.has_reentrant_checkpoints():
            raise ValueError(
                "use_reentrant is True and config.feedback is True: reentrant checkpoints cut the gradients that the "
                "state carries from block to block; enable gradient checkpointing with use_reentrant=False"
            )


class GalleryBlockRecurrentTransformerForCausalLM(CausalLMHead, GalleryBlockRecurrentTransformerPreTrainedModel):
    """The Block-Recurrent Transformer with a map to the vocabulary, tied to the embeddings.

    >>> import torch
    >>> from hf_gallery import GalleryBlockRecurrentTransformerConfig, GalleryBlockRecurrentTransformerForCausalLM
    >>> sizes = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    >>> config = GalleryBlockRecurrentTransformerConfig(**sizes, block_length=8, num_state_vectors=4)
    >>> model = GalleryBlockRecurrentTransformerForCausalLM(config).eval()
    >>> cache = model(torch.tensor([list(b"a long time")]), use_cache=True).past_key_values
    >>> model(torch.tensor([list(b" ago")]), past_key_values=cache).logits.shape
    torch.Size([1, 4, 262])
    """

    backbone_class = GalleryBlockRecurrentTransformerModel


class GalleryBlockRecurrentTransformerForSequenceClassification(
    SequenceClassificationHead, GalleryBlockRecurrentTransformerPreTrainedModel
):
    """A label for each row, from its last token.

    >>> import torch
    >>> from hf_gallery import GalleryBlockRecurrentTransformerConfig
    >>> from hf_gallery import GalleryBlockRecurrentTransformerForSequenceClassification
    >>> sizes = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    >>> config = GalleryBlockRecurrentTransformerConfig(**sizes, block_length=8, num_state_vectors=4)
    >>> model = GalleryBlockRecurrentTransformerForSequenceClassification(config).eval()
    >>> model(torch.tensor([list(b"a long time ago")])).logits.shape
    torch.Size([1, 2])
    """

    backbone_class = GalleryBlockRecurrentTransformerModel


__all__ = [
    "GalleryBlockRecurrentTransformerForCausalLM",
    "GalleryBlockRecurrentTransformerForSequenceClassification",
    "GalleryBlockRecurrentTransformerModel",
    "GalleryBlockRecurrentTransformerPreTrainedModel",
]
