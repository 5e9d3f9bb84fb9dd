"""The Recurrent Memory Transformer (Bulatov, Kuratov, Burtsev 2022, arXiv 2207.06881).

    X_s = [mem_s, tokens of segment s, mem_s]                                      section 3.2
    [read, H_s, write] = Transformer(X_s)
    mem_(s+1) = write                                                             mem_0 is learned

A decoder: the read memory in front sees itself, tokens see the read memory and the tokens before them, the write
memory behind sees all. An encoder has memory in front alone, all see all, and what stands there is the next memory.
The layers are those of modeling_transformer.py: a segment with its memory tokens is a little text to them.

The authors have two codes: booydar/LM-RMT (e289508) around Transformer-XL, of the paper's language models, and
booydar/recurrent-memory-transformer (9d0ebe1) around models of transformers. Where they or the paper differ:

- Memory tokens see each other, as in LM-RMT; around GPT-2 they see what stands before them, memory_attention="causal".
- Positions are absolute and count memory tokens too, as around GPT-2: a segment's first token has position M, and the
  write memory those behind the segment. LM-RMT has Transformer-XL's relative ones, and its memory of hidden states
  beside the tokens, which this model has not.
- What is written is what the last norm gives, as around GPT-2; it enters the next segment as an embedding does.
- mem_0 starts as normal numbers of the size of the embeddings, as in both.
- Segments are counted from a row's first token, in the encoder too, where the code counts from the end. A segment
  is written when it is complete, so that results do not depend on how forwards cut the text: generate() of the code
  for transformers writes at whatever place the prompt ends.
- bptt_depth: LM-RMT computes that many segments again before each one, the other code cuts all but the last; here the
  chain is cut before every (bptt_depth + 1)-th segment of a row, so one backward goes over each segment once.
- The encoder's label is read from a row's last token, which sees its segment and the memory of all before. In the code
  every segment has a [CLS] of its own, and the last one's is read.

The same by loops over segments and queries, to read beside the paper: tests/plain/recurrent_memory_transformer.py.

Segments run one after the other, each through all layers. Gradients flow through the memory within a forward, and
not between forwards. Letters: see spans.py. L segment_length, M num_memory_tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from .attention import OWN_IMPLEMENTATIONS
from .backbone import Backbone, LayerResults
from .block_rows import BlockRows
from .columns import whole_columns
from .configuration_recurrent_memory_transformer import GalleryRecurrentMemoryTransformerConfig
from .context import ForwardContext
from .exporting import fixed_length, is_exporting, possibly, surely
from .gradients import with_gradients_for
from .heads import CausalLMHead, SequenceClassificationHead, classifier_dropout
from .modeling_base import GalleryPreTrainedModel
from .modeling_transformer import Context, GalleryTransformerLayer
from .rings import RingColumns
from .rows import Rows
from .segment_step import SegmentStep
from .spans import Spans
from .stack import AbsoluteEmbeddings, init_stack
from .states import Folded, NextState, Record, SegmentColumns, State, tensors_of


class MemoryTokens(nn.Module):
    """The memory that a text begins with, learned."""

    def __init__(self, config: GalleryRecurrentMemoryTransformerConfig):
        super().__init__()
        self.initial = nn.Parameter(torch.zeros(config.num_memory_tokens, config.hidden_size))

    def forward(self, kept: torch.Tensor | None, written: torch.Tensor) -> torch.Tensor:
        """The memory (B, M, E) that the rows go on with: `kept`, where they have `written` (B,) one already."""
        initial = self.initial.expand(written.shape[0], -1, -1)
        return initial if kept is None else choose(written, kept.to(initial.dtype), initial)


@dataclass
class Segment:
    """A segment of each row, as much of it as this forward reads, for the layers: [memory | tokens | memory].

    tokens: rows of the tokens alone, at most L of each. laid: rows with the memory tokens that each has here, `reads`
    columns in front and `writes` behind; a row that goes on in the middle of a segment has read its memory before, and
    one whose segment is not complete writes none. begins, ends (B,): whether a row does either.
    """

    tokens: Rows
    laid: Rows
    reads: int
    writes: int
    begins: torch.Tensor
    ends: torch.Tensor

    @classmethod
    def lay(cls, tokens: Rows, config: GalleryRecurrentMemoryTransformerConfig, writes: bool) -> Segment:
        """writes: whether anybody will read what is written."""
        length, m = config.segment_length, config.num_memory_tokens
        phase = tokens.seen % length
        begins, ends = (phase == 0) & (tokens.lengths > 0), phase + tokens.lengths == length
        before = m if possibly(begins) else 0
        behind = m if writes and possibly(ends) else 0
        parts = [begins[:, None].expand(-1, before), ~tokens.beyond, ends[:, None].expand(-1, behind)]
        mask = torch.cat(parts, dim=1)  # (B, M + T + M)
        laid = Rows(mask.shape[0], mask.shape[1], mask, torch.where(phase == 0, 0, m + phase))
        return cls(tokens, laid, before, behind, begins, ends)

    def enter(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        """Tokens x (B, T, E) with their memory (B, M, E), packed."""
        if self.reads:
            x = torch.cat([memory, x], dim=1)
        if self.writes:
            x = torch.cat([x, memory], dim=1)
        return self.laid.pack(x)

    def leave(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The inverse: of packed x (B, any, E) read memory, tokens and written memory."""
        read, tokens, written = self.laid.unpack(x).split([self.reads, self.tokens.width, self.writes], dim=1)
        return read, tokens, written

    def spans(self, config: GalleryRecurrentMemoryTransformerConfig, cached: int) -> Spans:
        """Whom each packed token sees, in the columns [cached | new] of its segment."""
        place = self.laid.positions  # (B or 1, any), 0 at the first memory token
        lower = torch.zeros_like(place)
        if not config.is_decoder:
            return self.laid.spans(lower, self.laid.last.expand(-1, place.shape[1]), cached)
        upper = place
        if config.memory_attention == "full":
            m, behind = config.num_memory_tokens, config.num_memory_tokens + config.segment_length
            upper = torch.where(place < m, m - 1, torch.where(place >= behind, behind + m - 1, place))
        return self.laid.spans(lower, upper, cached)


class GalleryRecurrentMemoryTransformerPreTrainedModel(GalleryPreTrainedModel):
    """Weights and names that the Recurrent Memory Transformer's classes share."""

    config: GalleryRecurrentMemoryTransformerConfig
    config_class = GalleryRecurrentMemoryTransformerConfig
    _no_split_modules = ["GalleryTransformerLayer"]
    implementations = OWN_IMPLEMENTATIONS
    auto_classes = {
        "AutoModel": "GalleryRecurrentMemoryTransformerModel",
        "AutoModelForCausalLM": "GalleryRecurrentMemoryTransformerForCausalLM",
        "AutoModelForSequenceClassification": "GalleryRecurrentMemoryTransformerForSequenceClassification",
    }

    def _init_weights(self, module):
        init_stack(module, self.config)
        if isinstance(module, MemoryTokens):
            normal, width = self.config.initialization == "normal", self.config.hidden_size
            std = self.config.initializer_range if normal else width**-0.5
            nn.init.normal_(module.initial, 0.0, std * (width**0.5 if self.config.scale_embedding else 1.0))


class GalleryRecurrentMemoryTransformerModel(
    AbsoluteEmbeddings, Backbone, GalleryRecurrentMemoryTransformerPreTrainedModel
):
    """The bare Recurrent Memory Transformer, a decoder if config.is_decoder. An input may be any number of segments
    long.

    >>> import torch
    >>> from hf_gallery import GalleryRecurrentMemoryTransformerConfig, GalleryRecurrentMemoryTransformerModel
    >>> sizes = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    >>> config = GalleryRecurrentMemoryTransformerConfig(**sizes, segment_length=8, num_memory_tokens=4)
    >>> model = GalleryRecurrentMemoryTransformerModel(config).eval()
    >>> model(torch.tensor([list(b"a long time ago")])).last_hidden_state.shape
    torch.Size([1, 15, 32])
    """

    embeds_positions = False  # those of segments: positions of a text can only say where its tokens stand

    def __init__(self, config: GalleryRecurrentMemoryTransformerConfig):
        super().__init__(config)
        config.check_positions()  # again: a head may have made a decoder of an encoder
        self.causal = config.is_decoder
        self.build_embeddings(config)
        if config.num_memory_tokens:
            self.memory = MemoryTokens(config)
        self.layers = nn.ModuleList([GalleryTransformerLayer(config) for _ in range(config.num_hidden_layers)])
        self.post_init()

    def embed(self, rows, input_ids, inputs_embeds, **more):
        """Of tokens alone: what is added to them is added to memory tokens as well, segment by segment."""
        return Backbone.embed(self, rows, input_ids, inputs_embeds)

    def plan(self, common, past, **inputs) -> ForwardContext:
        if common.output_attentions:
            raise ValueError(
                "output_attentions is True: segments run one by one, with memory tokens beside the text's own, so "
                "there is no one map; leave output_attentions out"
            )
        if is_exporting():
            fixed_length(common.rows.width)
        return common

    def run_layers(self, x, context, states, *more) -> LayerResults:
        """The only loop over segments: each goes through all layers with the memory that the one before has left."""
        if context.rows.steps:
            return self._run_step(x, context, states)
        config, rows = self.config, context.rows
        cut = BlockRows(rows, config.segment_length, partial(self.agreed, x.device))
        goes_on = cut.ends[1:] > cut.ends[:-1]  # (J, B): the row has tokens in the segment
        memory = x[:, :0]
        if config.num_memory_tokens:
            x = with_gradients_for(x, self.memory)
            memory = self.memory(states[0].get("memory"), rows.seen >= config.segment_length)
        past = kept = states
        outs, hidden, changes = [], [], []
        for j, (part, tokens) in enumerate(cut.split(x)):
            last = j + 1 == cut.count
            writes = config.is_decoder and (context.keeps_state or not last)
            segment = Segment.lay(tokens, config, writes)
            keeps = context.records or (context.keeps_state and (last or not surely(goes_on[j + 1])))
            memory = self._cut(memory, tokens)
            result = self._run_segment(part, segment, memory, replace(context, keeps_state=keeps), past)
            read, out, written = segment.leave(result.x)
            outs.append(out)
            if segment.writes:
                changes.append((memory, torch.where(segment.ends, tokens.seen + tokens.lengths, 0)))
                memory = choose(segment.ends, self.finish(written), memory)
            elif not config.is_decoder:
                memory = self.finish(read)
            if result.hidden is not None:
                hidden.append([segment.leave(y)[1] for y in result.hidden])
            new = [tensors_of(state) for state in result.states]
            if keeps:
                kept = new if context.records else self._keep(new, kept, goes_on[j])
            # Every row begins its next segment anew, but what is recorded stays before it.
            past = new if context.records else [{}] * len(states)
        shown = [cut.join(parts) for parts in zip(*hidden, strict=True)] if context.output_hidden_states else None
        if shown is not None and not context.packed:
            shown = [rows.unpack(y) for y in shown]
        return LayerResults(cut.join(outs), self._next_states(kept, memory, changes, context), shown, None)

    def _run_segment(self, part, segment: Segment, memory, context: ForwardContext, past: list[State]) -> LayerResults:
        """All layers on the tokens part (B, T, E) of a segment and its memory (B, M, E)."""
        cached = past[0]["keys"].shape[2] if past[0] else 0
        own = replace(context, rows=segment.laid, cached=cached, tables=None, packed=True, memo={})
        own = replace(own, max_columns=None if context.records else self.config.cache_capacity)
        x = self.add_positions(segment.enter(part, memory), segment.laid.positions.to(part.device))
        if self.config.embedding_norm:
            x = self.embed_norm(x)
        spans = segment.spans(self.config, cached)
        return Backbone.run_layers(self, self.dropout(x), own.widened(Context, spans=spans), past)

    def _run_step(self, x: torch.Tensor, context: ForwardContext, states: list[State]) -> LayerResults:
        """All layers on one token x (B, 1, E) behind a static cache."""
        step, memory = SegmentStep(context.rows, self.config), x[:, :0]
        if self.config.num_memory_tokens:
            memory = self.memory(states[0]["memory"], step.seen >= self.config.segment_length)
        x = self.add_positions(step.enter(x, memory), step.places)
        if self.config.embedding_norm:
            x = self.embed_norm(x)
        own = replace(context, rows=step, packed=True, memo={}).widened(Context, spans=step.segment_spans())
        result = Backbone.run_layers(self, self.dropout(x), own, states)
        out, written = step.leave(result.x)
        new: list[NextState] = [
            {name: RingColumns(kept.tensor[:, :, : step.slots]) for name, kept in state.items()}
            for state in result.states
        ]
        if step.memory:
            new[0]["memory"] = Folded(choose(step.ends, self.finish(written), memory) if step.writes else memory)
        hidden = None if result.hidden is None else [step.leave(y)[0] for y in result.hidden]
        if hidden is not None and not context.packed:
            hidden = [context.rows.unpack(y) for y in hidden]
        return LayerResults(out, new, hidden, None)

    def _cut(self, memory: torch.Tensor, tokens: Rows) -> torch.Tensor:
        """The memory without its graph where bptt_depth ends gradients."""
        depth = self.config.bptt_depth
        if depth < 0:
            return memory
        number = tokens.seen // self.config.segment_length  # (B,)
        return choose((number > 0) & (number % (depth + 1) == 0), memory.detach(), memory)

    def _keep(self, new: list[State], old: list[State], touched: torch.Tensor) -> list[State]:
        """The layers' keys and values after a segment, those of rows that it has not `touched` (B,) as they were."""
        if surely(touched):
            return new
        capacity = self.config.cache_capacity
        return [
            {
                name: choose(touched, *(whole_columns(y.to(x.dtype), capacity) for y in (x, before.get(name, x))))
                for name, x in state.items()
            }
            for state, before in zip(new, old, strict=True)
        ]

    def _next_states(self, kept: list[State], memory, changes, context: ForwardContext) -> list[NextState]:
        """changes: the memory before each that was written, (B, M, E), and how many tokens were read then, (B,)."""
        if not context.keeps_state:
            return [{} for _ in kept]
        length, m, capacity = self.config.segment_length, self.config.num_memory_tokens, self.config.cache_capacity
        states: list[NextState] = []
        for state in kept:
            pair = {name: state[name] for name in ("keys", "values")}
            if context.records:
                states.append({name: SegmentColumns(x, length, m) for name, x in pair.items()})
            else:
                states.append({name: SegmentColumns(whole_columns(x, capacity)) for name, x in pair.items()})
        if m:
            record = Record.of(changes, memory) if context.records else None
            states[0]["memory"] = Folded(memory.clone(), record)  # its own: a part of a layer's output keeps all of it
        return states


def choose(condition: torch.Tensor, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Rows of x (B, ...) where the condition (B,) holds, else of the other."""
    if surely(condition):
        return x
    if not possibly(condition):
        return other
    return torch.where(condition.to(x.device).view(-1, *[1] * (x.dim() - 1)), x, other)


class GalleryRecurrentMemoryTransformerForCausalLM(CausalLMHead, GalleryRecurrentMemoryTransformerPreTrainedModel):
    """The decoder with a map to the vocabulary, tied to the embeddings.

    >>> import torch
    >>> from hf_gallery import GalleryRecurrentMemoryTransformerConfig, GalleryRecurrentMemoryTransformerForCausalLM
    >>> sizes = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    >>> config = GalleryRecurrentMemoryTransformerConfig(**sizes, segment_length=8, num_memory_tokens=4)
    >>> model = GalleryRecurrentMemoryTransformerForCausalLM(config).eval()
    >>> cache = model(torch.tensor([list(b"a long time")]), use_cache=True).past_key_values
    >>> model(torch.tensor([list(b" ago")]), past_key_values=cache).logits.shape
    torch.Size([1, 4, 262])
    """

    backbone_class = GalleryRecurrentMemoryTransformerModel
    config_changes = {"is_decoder": True}


class GalleryRecurrentMemoryTransformerForSequenceClassification(
    SequenceClassificationHead, GalleryRecurrentMemoryTransformerPreTrainedModel
):
    """A label for each row, from the last token of a decoder or an encoder.

    >>> import torch
    >>> from hf_gallery import GalleryRecurrentMemoryTransformerConfig
    >>> from hf_gallery import GalleryRecurrentMemoryTransformerForSequenceClassification
    >>> sizes = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    >>> config = GalleryRecurrentMemoryTransformerConfig(**sizes, segment_length=8, num_memory_tokens=4)
    >>> model = GalleryRecurrentMemoryTransformerForSequenceClassification(config).eval()
    >>> model(torch.tensor([list(b"a long time ago")])).logits.shape
    torch.Size([1, 2])
    """

    backbone_class = GalleryRecurrentMemoryTransformerModel

    def build_head(self, config):
        self.num_labels = config.num_labels
        self.dropout = classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def pool(self, hidden, attention_mask, documents):
        return self.dropout(super().pool(hidden, attention_mask, documents))


__all__ = [
    "GalleryRecurrentMemoryTransformerForCausalLM",
    "GalleryRecurrentMemoryTransformerForSequenceClassification",
    "GalleryRecurrentMemoryTransformerModel",
    "GalleryRecurrentMemoryTransformerPreTrainedModel",
]
