"""Watching the layers of a model while it reads: each is asked for its map of attention, one after the other.

A layer gives its probabilities where its context asks for them (models/attention_maps.py), also where the model
refuses to return them, since segments or blocks run one by one and have no map in common. What a layer adds beside its
interval of keys is read where it is joined: retrieved pairs behind their gate, the state where the output's map takes
it in.

Letters: see models/spans.py. Z sources.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..intervals import interval_of

NOTHING = "nothing"  # the weight of a query that sees no key, or whose memory is still empty
ABSENT = -1  # the position of what stands nowhere in the text: a state, nothing; memory token i is at -1 - i


def backbone_of(model: nn.Module) -> Any:
    """The gallery's bare model in `model`. Raises TypeError if there is none, or if there are two."""
    found = [x for x in model.modules() if hasattr(x, "run_layers") and hasattr(x, "layers")]
    if len(found) != 1:
        what = "an encoder-decoder" if found else "no model of the gallery"
        raise TypeError(
            f"model is a {type(model).__name__}, {what}; look reads one stack of layers, a causal model or an encoder"
        )
    return found[0]


def period_of(config: Any) -> int | None:
    """Tokens of a segment or a block; None where the text is not cut."""
    return getattr(config, "segment_length", None) or getattr(config, "block_length", None)


def sources_of(config: Any, marks: bool = False) -> tuple[str, ...]:
    """Names of what a query of such a model may take from, in the order of `Look.weights`. marks: a decoder is told
    which tokens are global."""
    cut = getattr(config, "segment_length", None)
    names = ["segment" if cut else "window"]
    if getattr(config, "num_memory_tokens", None):
        names.append("memory tokens")
    if cut and hasattr(config, "mem_len"):
        names.append("memory")
    if marks or (hasattr(config, "attention_window") and not config.is_decoder):
        names.append("global tokens")
    if hasattr(config, "recurrent_layers"):
        names.append("state")
    if hasattr(config, "memory_layers"):
        names.append("retrieved")
    return (*names, NOTHING)


@dataclass
class Sources:
    """The sources of one query in one layer, head by head: the weights (H, N) of N of them add up to one.

    positions (H, N): in the text; below 0 for what stands nowhere in it, of memory token i -1 - i; where a memory
    begins as zeros, those before the text. kinds (N,): each one's place among the names of the sources.
    """

    positions: torch.Tensor
    kinds: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def join(cls, parts: list[Sources]) -> Sources:
        return cls(*(torch.cat([getattr(x, name) for x in parts], -1) for name in ("positions", "kinds", "weights")))


@dataclass
class Watched:
    """One layer's call: queries at the positions [start, start + T).

    map (H, T, S): the weights of the columns; keys (S,): their positions; kinds (T or 1, S): their places among the
    names. retrieved: positions and weights (H, T, k), behind the gate. extra: places among the names, with the weight
    (H, T) that each has. first (T,): the first position that the query's interval shows.
    """

    start: int
    map: torch.Tensor
    keys: torch.Tensor
    kinds: torch.Tensor
    first: torch.Tensor
    retrieved: tuple[int, torch.Tensor, torch.Tensor] | None = None
    extra: dict[int, torch.Tensor] = field(default_factory=dict)

    def sums(self, names: int) -> torch.Tensor:
        """The weights by source, (T, H, Z)."""
        kinds = F.one_hot(self.kinds, names).to(self.map.dtype)  # (T or 1, S, Z)
        found = self.map.transpose(0, 1) @ kinds
        if self.retrieved is not None:
            kind, _, weights = self.retrieved
            found[..., kind] += weights.sum(-1).T
        for kind, weights in self.extra.items():
            found[..., kind] += weights.T
        return found

    def of(self, query: int) -> Sources:
        """The sources of the query at a position. Columns that no head looks at are left out."""
        t, h = query - self.start, self.map.shape[0]
        some = self.map[:, t].amax(0) > 0
        parts = [
            Sources(
                self.keys[some].expand(h, -1),
                self.kinds[t if self.kinds.shape[0] > 1 else 0, some],
                self.map[:, t, some],
            )
        ]
        if self.retrieved is not None:
            kind, positions, weights = self.retrieved
            parts.append(Sources(positions[:, t], torch.full(positions.shape[2:], kind), weights[:, t]))
        for kind, weights in self.extra.items():
            parts.append(Sources(torch.full((h, 1), ABSENT), torch.tensor([kind]), weights[:, t, None]))
        return Sources.join(parts)


class Watch:
    """While it is entered, every call of every layer is noted in `calls`, layer by layer. Batches of one row, without
    padding.

    before: tokens that the cache has read when the watch begins. marks: a decoder is told which tokens are global.
    keep: takes the calls in their place, since all maps of a text that is read at once are more than one needs.
    """

    def __init__(self, model: nn.Module, before: int = 0, marks: bool = False):
        self.backbone = backbone_of(model)
        self.config = self.backbone.config
        self.layers = list(self.backbone.layers)
        self.names = sources_of(self.config, marks)
        self.period = period_of(self.config)
        self.memory_tokens = getattr(self.config, "num_memory_tokens", None)
        self.read = [before] * len(self.layers)
        self.calls: list[list[Watched]] = [[] for _ in self.layers]
        self.joined: list[torch.Tensor | None] = [None] * len(self.layers)
        self.shares = [self._norms(layer.self_attn) for layer in self.layers]
        self.hooks: list[Any] = []
        self.keep: Callable[[int, Watched], None] | None = None

    def __enter__(self) -> Watch:
        for i, layer in enumerate(self.layers):
            self.hooks.append(layer.register_forward_pre_hook(self._ask))
            self.hooks.append(layer.register_forward_hook(lambda _, x, result, i=i: self._note(i, x, result)))
            if self.shares[i] is not None:
                self.hooks.append(
                    layer.self_attn.o_proj.register_forward_pre_hook(lambda _, x, i=i: self._keep(i, x[0]))
                )
        return self

    def __exit__(self, *error: Any):
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    def take(self) -> list[list[Watched]]:
        """The calls since the last time, layer by layer."""
        calls, self.calls = self.calls, [[] for _ in self.layers]
        return calls

    def gates(self) -> torch.Tensor:
        """The share of retrieval of each layer and head, (layers, H); NaN where nothing is retrieved."""
        found = torch.full((len(self.layers), self.config.num_attention_heads), float("nan"))
        for i, layer in enumerate(self.layers):
            if getattr(layer.self_attn, "remembers", False):
                found[i] = torch.sigmoid(layer.self_attn.gate_bias.detach().float().cpu())
        return found

    def _ask(self, layer: nn.Module, inputs: tuple):
        x, context, *rest = inputs
        if x is None:  # a state alone is read, by the blocks that feedback goes to
            return None
        wanted: dict[str, Any] = dict(output_attentions=True)
        wanted |= {name: {} for name in ("retrievals", "global_maps") if hasattr(context, name)}
        return (x, replace(context, **wanted), *rest)

    def _keep(self, i: int, joined: torch.Tensor):
        self.joined[i] = joined.detach()

    def _note(self, i: int, inputs: tuple, result: tuple):
        x, context, *_ = inputs
        if x is None:
            return
        weights = result[2][0].detach().float()  # (H, T, S)
        if self.memory_tokens is not None:
            call = self._in_segment(i, weights, context)
        else:
            call = self._by_column(i, weights, context)
            self._add_retrieved(i, call, context)
            self._add_state(i, call)
        seen = call.map.sum(-1) + sum(call.extra.values(), start=torch.zeros(()))  # (H, T)
        if call.retrieved is not None:
            seen = seen + call.retrieved[2].sum(-1)
        unseen = seen == 0
        if bool(unseen.any()):
            self._add(call, NOTHING, unseen.float())
        self.read[i] += call.map.shape[1]
        if self.keep is None:
            self.calls[i].append(call)
        else:
            self.keep(i, call)

    def _add(self, call: Watched, name: str, weights: torch.Tensor):
        kind = self.names.index(name)
        call.extra[kind] = call.extra[kind] + weights if kind in call.extra else weights

    def _by_column(self, i: int, weights: torch.Tensor, context: Any) -> Watched:
        """Of columns that are tokens, the last of them the last that was read."""
        t, s = weights.shape[1:]
        interval = interval_of(self.layers[i].self_attn, context, s - t, self.config)
        weights, keys, kinds = weights.cpu(), interval.keys, torch.zeros(1, s, dtype=torch.long)
        if "memory" in self.names:
            kinds = interval.remembered * self.names.index("memory")
        marked = getattr(context, "globals", None)
        if marked is not None:
            at, kind = marked.positions[0], self.names.index("global tokens")
            kinds = torch.where(torch.isin(keys, at), kind, kinds)
            for older in (getattr(context, "global_maps", None) or {}).values():  # outside the window, of a decoder
                weights, keys = torch.cat([weights, older[0].float().cpu()], -1), torch.cat([keys, at])
                kinds = torch.cat([kinds, torch.full((len(kinds), len(at)), kind)], 1)
        return Watched(self.read[i], weights, keys, kinds, interval.first)

    def _in_segment(self, i: int, weights: torch.Tensor, context: Any) -> Watched:
        """Of a segment between memory tokens: those in front are a source, those behind neither ask nor are asked."""
        m, length = self.memory_tokens, self.config.segment_length
        place = context.rows.positions[0]  # of each column in its segment, 0 at the first memory token
        if weights.shape[2] != len(place):
            raise ValueError("a reading was begun in the middle of a segment; cut it at segments")
        tokens, memory = (place >= m) & (place < m + length), place < m
        start, t = self.read[i], int(tokens.sum())
        keys = torch.cat([ABSENT - torch.arange(int(memory.sum())), start + torch.arange(t)])
        columns = torch.cat([memory.nonzero()[:, 0], tokens.nonzero()[:, 0]])
        kinds = (keys < 0).long()[None]
        shown = weights.cpu()[:, tokens][:, :, columns]
        return Watched(start, shown, keys, kinds, torch.full((t,), start))

    def _add_retrieved(self, i: int, call: Watched, context: Any):
        """Retrieved pairs take the gate's share, of what is nothing where none was found."""
        layer = self.layers[i].self_attn
        if not getattr(layer, "remembers", False):
            return
        (retrieval,) = context.retrievals.values()
        gate = torch.sigmoid(layer.gate_bias.detach().float()).cpu()[:, None]  # (H, 1)
        positions, weights = (x[0].cpu() for x in retrieval)  # (H, T, k)
        call.map = call.map * (1 - gate[..., None])
        call.retrieved = self.names.index("retrieved"), positions, weights.float() * gate[..., None]
        empty = (positions < 0).all(-1)  # (H, T)
        self._add(call, NOTHING, gate * empty)

    def _add_state(self, i: int, call: Watched):
        """The state's share of a head: of the lengths that the two vectors have which the output's map makes of what
        the window gave and of what the state gave."""
        norms, joined = self.shares[i], self.joined[i]
        if norms is None or joined is None:
            return
        x = joined[0].float().unflatten(-1, (norms.shape[0], -1))  # (T, 2 H, D)
        length = torch.einsum("thd,hde,the->ht", x, norms, x).clamp(min=0).sqrt().cpu()
        window, state = length.chunk(2)  # (H, T)
        share = state / (window + state).clamp(min=torch.finfo(length.dtype).tiny)
        seen = call.map.sum(-1) > 0
        share = torch.where(seen, share, (state > 0).float())
        call.map = call.map * (1 - share)[..., None]
        self._add(call, "state", share)

    def _norms(self, attention: Any) -> torch.Tensor | None:
        """Of a layer that reads a state: for each head of window and state W^T W (2 H, D, D), W its part of the
        output's map, adapters included; the square of a vector's length behind it is x^T W^T W x."""
        if not getattr(attention, "reads_state", False):
            return None
        with torch.no_grad():
            weight = attention.o_proj.weight
            width = 2 * self.config.num_attention_heads * self.config.head_dim
            ones = torch.eye(width, device=weight.device, dtype=weight.dtype)
            part = (attention.o_proj(ones) - attention.o_proj(ones[:1] * 0)).float()  # (2 H D, E)
            part = part.unflatten(0, (2 * self.config.num_attention_heads, -1))
            return part @ part.mT
