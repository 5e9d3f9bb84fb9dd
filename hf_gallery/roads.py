"""Roads: by which way each query of a model reaches which key, read from the model's own plan of a forward.

`watch` runs a model once on one text and looks at what its layers are given: intervals (see intervals.py), global
tokens, the memory that is searched, the state. A layer that sees its interval and no more needs nothing here; for
another kind of context a function is registered with `roads_of`.

Letters: see models/spans.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch
from itertools import count
from typing import Any

import torch
from transformers import PreTrainedModel

from .intervals import interval_of
from .models import longformer_layer as longformer
from .models import modeling_block_recurrent_transformer as block_recurrent
from .models import modeling_memorizing_transformer as memorizing
from .models import modeling_transformer as transformer
from .models import modeling_transformer_xl as transformer_xl
from .models.backbone import Backbone
from .models.modeling_recurrent_memory_transformer import GalleryRecurrentMemoryTransformerModel as RecurrentMemory
from .models.spans import Spans

# Roads to keys that are attended to, and those that lead through something else to the tokens that it holds.
DIRECT = {
    "window": "its window, segment or text",
    "memory": "memory before its segment",
    "global": "global tokens",
    "source": "the source",
    "state": "state vectors (s)",
    "tokens": "memory tokens (m)",
}
INDIRECT = {
    "retrieval": "stored: the k nearest are retrieved",
    "held": "tokens that these hold",
}
ROADS = DIRECT | INDIRECT

Key = tuple[str, int]  # ("token", position), ("source", position), ("state", number), ("memory", number)
Pairs = set[tuple[Key, Key]]  # (query, key)


@dataclass
class Sight:
    """Keys that the queries of some layers see, by road: pairs (query, key). All these layers see alike.

    stack: "decoder", "encoder", or "cross-attention". queries, keys: in the order in which they stand.
    """

    stack: str
    layers: list[int]
    queries: list[Key]
    keys: list[Key]
    seen: dict[str, Pairs]

    def mask(self, *roads: str) -> torch.Tensor:
        """Marks, bool (queries, keys), where a query sees a key by any of these roads; of all if none is named."""
        row, column = ({key: i for i, key in enumerate(keys)} for keys in (self.queries, self.keys))
        mask = torch.zeros(len(row), len(column), dtype=torch.bool)
        for road in roads or self.seen:
            for query, key in self.seen.get(road, ()):
                mask[row[query], column[key]] = True
        return mask


@dataclass
class Call:
    """One call of a layer of a model, the `number`-th of it. left: what its calls leave for the next ones, here."""

    model: Backbone
    layer: Any
    state: dict[str, torch.Tensor]
    first: int  # position of the first new token
    width: int  # new tokens, T
    number: int
    left: dict[str, Any]

    @property
    def queries(self) -> list[Key]:
        """The new tokens."""
        return [("token", self.first + t) for t in range(self.width)]

    def columns(self, cached: int | None = None) -> list[Key]:
        """The tokens in the columns [cached | new]."""
        cached = self.cached if cached is None else cached
        return [("token", self.first - cached + column) for column in range(cached + self.width)]

    @property
    def cached(self) -> int:
        """Columns of the past, C."""
        return self.state["keys"].shape[2] if "keys" in self.state else 0


@dataclass
class Found:
    """Pairs that a call joins, by road. source: of cross-attention, the number of keys and the pairs."""

    queries: list[Key]
    keys: list[Key]
    seen: dict[str, Pairs]
    source: tuple[int, Pairs] | None = None


def watch(model: PreTrainedModel, **inputs: Any) -> list[Sight]:
    """Runs a model on one text and tells what the queries of its layers see.

    inputs: as the bare model's forward takes them: one row, without padding and without a cache.
    """
    found: dict[tuple[str, int], list[Found]] = {}
    handles = []

    def follow(stack: Backbone, name: str, number: int):
        left: dict[str, Any] = {}
        calls = count()

        def look(layer, arguments):
            x, context, state = arguments[:3]
            if x is None:  # a recurrent layer that is asked for its state alone
                return
            rows = context.rows
            call = Call(stack, layer, state, int(rows.first), rows.width, next(calls), left)
            found.setdefault((name, number), []).append(roads_of(context, call))

        handles.append(stack.layers[number].register_forward_pre_hook(look))

    for stack in (module for module in model.modules() if isinstance(module, Backbone)):
        for number in range(len(stack.layers)):
            follow(stack, "decoder" if stack.causal else "encoder", number)
    try:
        with torch.no_grad():
            model.base_model(use_cache=False, **inputs)
    finally:
        for handle in handles:
            handle.remove()
    sights: list[Sight] = []
    for (name, number), calls in found.items():
        for sight in _sights(name, number, calls):
            like = [x for x in sights if (x.stack, x.keys, x.seen) == (sight.stack, sight.keys, sight.seen)]
            if like:
                like[0].layers.append(number)
            else:
                sights.append(sight)
    return sights


def _sights(name: str, number: int, calls: list[Found]) -> list[Sight]:
    """Sights of one layer over all its calls: of its own keys, and of a source."""
    queries = [query for call in calls for query in call.queries]
    keys = list(dict.fromkeys(key for call in calls for key in call.keys))
    seen: dict[str, Pairs] = {}
    for call in calls:
        for road, some in call.seen.items():
            seen[road] = seen.get(road, set()) | some
    seen = {road: some for road, some in seen.items() if some}
    sights = [Sight(name, [number], queries, keys, seen)]
    if calls[0].source is not None:
        columns, some = calls[0].source
        sources = [("source", s) for s in range(columns)]
        sights.append(Sight("cross-attention", [number], queries, sources, {"source": some}))
    return sights


def joins(spans: Spans, queries: list[Key], keys: list[Key]) -> Pairs:
    """The pairs (query, key) of one row's intervals."""
    return {(queries[t], keys[s]) for t, s in spans.visible(len(keys))[0].nonzero().tolist()}


@singledispatch
def roads_of(context: Any, call: Call) -> Found:
    """The roads of one call of a layer, from its context."""
    return in_interval(context, call, call.cached)


def in_interval(context: Any, call: Call, cached: int) -> Found:
    """The roads of an interval: own keys, and where a segment has a memory those before it."""
    interval = interval_of(getattr(call.layer, "self_attn", None), context, cached, call.model.config)
    keys = call.columns(cached)
    window, memory = interval.mask & ~interval.remembered, interval.mask & interval.remembered
    return Found(call.queries, keys, {"window": pairs_of(window, call, keys), "memory": pairs_of(memory, call, keys)})


def pairs_of(mask: torch.Tensor, call: Call, keys: list[Key]) -> Pairs:
    """The pairs (query, key) of a mask (T, S)."""
    return {(call.queries[t], keys[s]) for t, s in mask.nonzero().tolist()}


@roads_of.register
def _(context: transformer.Context, call: Call) -> Found:
    if isinstance(call.model, RecurrentMemory):
        return _with_memory_tokens(context, call)
    found = in_interval(context, call, call.cached)
    if context.source_spans is not None:
        columns = int(context.source_spans.upper.max()) + 1
        sources = [("source", s) for s in range(columns)]
        found.source = columns, joins(context.source_spans, call.queries, sources)
    return found


def _with_memory_tokens(context: transformer.Context, call: Call) -> Found:
    """A segment of the Recurrent Memory Transformer, [memory | tokens | memory] in its rows."""
    config, read = call.model.config, call.left.setdefault("read", [])
    length, m = config.segment_length, config.num_memory_tokens
    begins = call.number * length  # position of the segment's first token
    keys: list[Key] = []
    for place in range(call.width):
        token = place - m
        numbers = call.number * 2 * m + (place if token < 0 else token - length + m)
        keys.append(("token", begins + token) if 0 <= token < length else ("memory", numbers))
    own = joins(context.spans, keys, keys)
    memory = {pair for pair in own if pair[1][0] == "memory"}
    # The memory in front is what the segment before has written, which has seen all of it and its own memory.
    held = {(query, token) for query, key in memory if key[1] % (2 * m) < m for token in read}
    read += [key for key in keys if key[0] == "token"]
    return Found(keys, keys, {"window": own - memory, "tokens": memory, "held": held})


@roads_of.register
def _(context: transformer_xl.Context, call: Call) -> Found:
    return in_interval(context, call, 0 if context.start is None else context.start.shape[1])


@roads_of.register
def _(context: memorizing.Context, call: Call) -> Found:
    found = in_interval(context, call, call.cached)
    if call.layer.self_attn.remembers:
        columns = context.memory_intervals().columns
        if columns is not None:
            lower, upper = columns
            found.seen["retrieval"] = joins(Spans(lower, upper - 1), call.queries, found.keys)
    return found


@roads_of.register
def _(context: longformer.Context, call: Call) -> Found:
    found = in_interval(context, call, call.cached)
    if context.globals is None:
        return found
    window, marks = found.seen["window"], {("token", p) for p in context.globals.positions[0].tolist()}
    pairs = {(query, key) for query in call.queries for key in marks}
    found.seen["global"] = {(q, k) for q, k in pairs - window if not context.causal or k[1] <= q[1]}
    if context.everything is not None:  # a global token's own query has maps of its own, over everything
        everything = joins(context.everything, call.queries, found.keys)
        found.seen["window"] = {pair for pair in window if pair[0] not in marks}
        found.seen["global"] |= {pair for pair in everything if pair[0] in marks}
    return found


@roads_of.register
def _(context: block_recurrent.Context, call: Call) -> Found:
    found = in_interval(context, call, call.cached)
    tokens = found.keys
    if not call.layer.self_attn.reads_state:
        return found
    vectors: list[Key] = [("state", i) for i in range(call.model.config.num_state_vectors)]
    found.seen["state"] = joins(context.everything(call.width, len(vectors)), call.queries, vectors)
    blocks, length = context.blocks(call.cached), call.model.config.block_length
    held, read = set(), call.left.setdefault("read", set())
    cuts = blocks.cuts or []  # of a text alone, which knows them
    for j in range(blocks.count):
        of_block = [query for query in call.queries if query[1] // length == call.first // length + j]
        held |= {(query, token) for query in of_block for token in read}
        if bool(blocks.complete[0, j]):  # the state takes in the block
            read |= set(tokens[cuts[j] : cuts[j + 2]])
    return Found(call.queries, [*vectors, *tokens], found.seen | {"held": held})
