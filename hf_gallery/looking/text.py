"""`look`: one reading of a text, and what each of its tokens was predicted from. Letters: see watch.py."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..models.cache import CACHE_NAME, GalleryCache
from .reach import Reach
from .reach import reach as measure_reach
from .reading import Progress, bits, marked, piece_size, quiet
from .watch import NOTHING, Sources, Watch, Watched, backbone_of, period_of
from .worth import worth as measure_worth

PASSAGES = 256  # that a long text is cut into, to say which fetch which


@dataclass
class Look:
    """A reading of a text of T tokens by one model.

    Queries have the positions of the tokens that they read: what token t was predicted from is row t - 1. An encoder
    predicts nothing; its row t is of token t.

    ids (T,). surprise (T,): bits of each token, NaN of the first, or of all where the model predicts none. sources:
    names. weights (T, layers, H, Z): of each source, adding up to one; pairs that were retrieved have their gate's
    share, a recurrent state its share of the output (see `Watch`). first (T, layers): the first position that the
    query's interval shows. shown: of some queries, by position, the sources of each layer. gates (layers, H): the
    share of retrieval, NaN where there is none. fetched (T,): how much weight each token was retrieved with by all
    later ones, over layers and heads; None without retrieval. passages (P, P): the same from passage to passage, of
    passage_length tokens, a row for each that fetched. period: tokens of a segment or block; None without. worth: the
    bits of each token read without a source. reach: see Reach.
    """

    ids: torch.Tensor
    surprise: torch.Tensor
    sources: tuple[str, ...]
    weights: torch.Tensor
    first: torch.Tensor
    shown: dict[int, list[Sources]]
    gates: torch.Tensor
    fetched: torch.Tensor | None = None
    passages: torch.Tensor | None = None
    passage_length: int = 0
    period: int | None = None
    worth: dict[str, torch.Tensor] = field(default_factory=dict)
    reach: Reach | None = None

    @property
    def predicts(self) -> bool:
        """True where tokens were predicted, so that there is a surprise."""
        return bool(self.surprise.isfinite().any())

    def bits_per_token(self, name: str | None = None) -> float:
        """The mean over the text, as read or without a source."""
        return float((self.surprise if name is None else self.worth[name]).nanmean())


def look(
    model: Any,
    ids: Any,
    *,
    at: Sequence[int] = (),
    most: int = 32,
    worth: bool = True,
    reach: bool = True,
    progress: Progress = quiet,
    **inputs: Any,
) -> Look:
    """Reads ids (T,) or (1, T) with a causal model or an encoder of the gallery, and looks where it looks.

    at: positions of tokens whose sources are kept key by key, beside the `most` that surprise most; all others are
    summed by source. worth: reads the text again without each source, as costly as the first reading each. reach:
    measures on the beginning how far back tokens matter. progress: is told (what, done, of how much). inputs: more for
    an encoder; for a causal Longformer global_attention_mask, (T,) or (1, T).

    Raises ValueError for a text of fewer than two tokens, positions that are not in it, padding, other inputs of a
    causal model, and a model whose numbers are NaN; TypeError for a model that is no stack of the gallery.

    >>> import torch
    >>> from hf_gallery import GalleryTransformerXLConfig, GalleryTransformerXLForCausalLM, look
    >>> sizes = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    >>> model = GalleryTransformerXLForCausalLM(GalleryTransformerXLConfig(**sizes, segment_length=8, mem_len=8))
    >>> found = look(model, torch.tensor(list(b"a long time ago")))
    >>> found.sources, found.weights.shape, list(found.worth)
    (('segment', 'memory', 'nothing'), torch.Size([15, 2, 4, 3]), ['memory emptied', 'window halved'])
    """
    try:
        ids = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"ids are a {type(ids).__name__}; give those of one text that a tokenizer made, (T,) or (1, T)"
        ) from error
    ids = ids[0] if ids.dim() == 2 and len(ids) == 1 else ids
    if ids.dim() != 1 or len(ids) < 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"ids are {ids.dtype} {tuple(ids.shape)}; give one text of 2 or more ids, (T,) or (1, T)")
    try:
        at = [operator.index(x) for x in at]  # of a tensor too
    except TypeError as error:
        raise ValueError(f"at is {at}; give positions of tokens, whole numbers in a list") from error
    wrong = [x for x in at if not 0 <= x < len(ids)]
    if wrong:
        raise ValueError(f"at holds {wrong[0]}; the text has the positions 0 to {len(ids) - 1}")
    if most < 0:
        raise ValueError(f"most is {most}; give 0 or more")
    backbone = backbone_of(model)
    ids = ids.long().to(next(backbone.parameters()).device)
    # By name, since a model with remote code has classes of its own; one of PEFT's holds the model.
    predicts = any(kind.__name__ == "CausalLMHead" for x in model.modules() for kind in type(x).__mro__)
    marks = _marks(backbone.config, ids, inputs) if predicts else None
    with in_eval(model), torch.no_grad():
        found = (
            _read(model, ids, at, most, progress, marks) if predicts else _read_at_once(model, ids, at, most, inputs)
        )
        _check_numbers(found, predicts)
        if predicts and worth:
            found.worth = measure_worth(model, ids, progress, marks)
        if predicts and reach:
            further = any(x not in ("window", "segment", "memory", NOTHING) for x in found.sources)
            found.reach = measure_reach(model, ids, found.first, further, progress, marks=marks)
    return found


def _check_numbers(found: Look, predicts: bool):
    """Raises ValueError where a reading gave NaN, of which no sum says anything."""
    of = found.surprise[1:] if predicts else found.weights.sum((1, 2, 3))
    if bool(of.isnan().any()):
        token = int(of.isnan().nonzero()[0]) + int(predicts)
        raise ValueError(
            f"{'the surprise' if predicts else 'the attention'} of token {token} is NaN; the model's weights or "
            "activations are not finite, so give another checkpoint, or read in float32"
        )


def _marks(config: Any, ids: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor | None:
    """The marks (T,) of global tokens that a causal model is given; None without any."""
    known = ("global_attention_mask",) if hasattr(config, "attention_window") else ()
    for name in inputs:
        if name not in known:
            raise ValueError(f"{name} is given, and a causal model is read in pieces, by its ids alone")
    given = inputs.get("global_attention_mask")
    if given is None:
        return None
    marks = torch.as_tensor(given)
    if tuple(marks.shape) not in (tuple(ids.shape), (1, len(ids))):
        raise ValueError(
            f"global_attention_mask has shape {tuple(marks.shape)}; give {tuple(ids.shape)} or (1, {len(ids)}), 1 at "
            "global tokens"
        )
    marks = marks.view(-1).to(ids.device)
    return marks if bool((marks != 0).any()) else None


class Notes:
    """Collects what a watch noted, piece by piece."""

    def __init__(self, watch: Watch, total: int, at: set[int], most: int):
        self.watch, self.at, self.most = watch, at, most
        h = watch.config.num_attention_heads
        self.weights = torch.zeros(total, len(watch.layers), h, len(watch.names))
        self.first = torch.zeros(total, len(watch.layers), dtype=torch.long)
        self.chosen: dict[int, tuple[float, list[Sources]]] = {}
        self.fetched = self.passages = None
        self.passage_length = max(period_of(watch.config) or 1, -(-total // PASSAGES))
        if "retrieved" in watch.names:
            count = -(-total // self.passage_length)
            self.fetched, self.passages = torch.zeros(total), torch.zeros(count * count)

    def add(self, start: int, end: int, scores: torch.Tensor):
        """Notes the queries [start, end), of which those are shown whose scores are among the highest so far."""
        calls = self.watch.take()
        for layer, noted in enumerate(calls):
            for call in noted:
                self._sum(layer, call)
        ranked = {q: float(x) for q, x in zip(range(start, end), scores, strict=True) if not math.isnan(x)}
        best = sorted(ranked, key=lambda q: -ranked[q])[: self.most]
        known = sorted((x for x, _ in self.chosen.values() if x < math.inf), reverse=True)
        least = known[self.most - 1] if 0 < self.most <= len(known) else -math.inf
        for query in {q for q in best if ranked[q] > least} | (self.at & set(range(start, end))):
            score = math.inf if query in self.at else ranked[query]
            self.chosen[query] = score, [_at(noted, query) for noted in calls]
        others = sorted((q for q in self.chosen if q not in self.at), key=lambda q: -self.chosen[q][0])
        for query in others[self.most :]:
            del self.chosen[query]

    def add_at_once(self, layer: int, call: Watched):
        """Notes one call, where it is known beforehand which queries are shown."""
        self._sum(layer, call)
        for query in self.at & set(range(call.start, call.start + call.map.shape[1])):
            self.chosen.setdefault(query, (math.inf, []))[1].append(call.of(query))

    def _sum(self, layer: int, call: Watched):
        part = slice(call.start, call.start + call.map.shape[1])
        self.weights[part, layer] = call.sums(len(self.watch.names))
        self.first[part, layer] = call.first
        if call.retrieved is not None:
            self._add_fetched(call)

    def _add_fetched(self, call: Watched):
        _, positions, weights = call.retrieved  # type: ignore[misc]
        found = positions >= 0  # (H, T, k)
        query = call.start + torch.arange(call.map.shape[1])
        query = query[None, :, None].expand_as(positions)[found]
        self.fetched.index_add_(0, positions[found], weights[found])  # type: ignore[union-attr]
        count = -(-len(self.fetched) // self.passage_length)  # type: ignore[arg-type]
        pair = query // self.passage_length * count + positions[found] // self.passage_length
        self.passages.index_add_(0, pair, weights[found])  # type: ignore[union-attr]

    def result(self, ids: torch.Tensor, surprise: torch.Tensor) -> Look:
        passages = None
        if self.passages is not None:
            count = math.isqrt(len(self.passages))
            passages = self.passages.view(count, count)
        return Look(
            ids.cpu(),
            surprise,
            self.watch.names,
            self.weights,
            self.first,
            {query: self.chosen[query][1] for query in sorted(self.chosen)},
            self.watch.gates(),
            self.fetched,
            passages,
            self.passage_length,
            self.watch.period,
        )


def _at(calls: list[Watched], query: int) -> Sources:
    return next(x for x in calls if x.start <= query < x.start + x.map.shape[1]).of(query)


def _read(
    model: Any, ids: torch.Tensor, at: Sequence[int], most: int, progress: Progress, marks: torch.Tensor | None
) -> Look:
    cache, surprise, start, total = GalleryCache(model.config), [torch.full((1,), math.nan)], 0, len(ids)
    with Watch(model, marks=marks is not None) as watch:
        notes = Notes(watch, total, {max(0, x - 1) for x in at}, most)
        while start < total:
            end = min(total, start + piece_size(model.config, len(watch.layers), start))
            more = marked(marks, start, end) | {CACHE_NAME: cache}
            logits = model(ids[None, start:end], use_cache=True, **more).logits
            targets = ids[None, start + 1 : end + 1]
            found = bits(logits[:, : targets.shape[1]], targets)[0]
            surprise.append(found)
            scores = torch.full((end - start,), math.nan)
            scores[: len(found)] = found
            notes.add(start, end, scores)
            start = end
            progress("reading", start, total)
    return notes.result(ids, torch.cat(surprise))


def _read_at_once(model: Any, ids: torch.Tensor, at: Sequence[int], most: int, inputs: dict[str, Any]) -> Look:
    """An encoder's reading, which sees all at once; without any that are asked for, tokens spread over the text are
    shown."""
    mask = inputs.get("attention_mask")
    if mask is not None and not bool((torch.as_tensor(mask) == 1).all()):
        raise ValueError("attention_mask marks padding; look reads one text as it is, so give its ids without any")
    with Watch(model, marks="global_attention_mask" in inputs) as watch:
        notes = Notes(watch, len(ids), set(at), 0)
        notes.at |= set(torch.linspace(0, len(ids) - 1, min(most, len(ids))).long().tolist())
        watch.keep = notes.add_at_once
        model(ids[None], **inputs)
    return notes.result(ids, torch.full((len(ids),), math.nan))


@contextmanager
def in_eval(model: Any):
    """The model in eval() inside the block, and afterwards as it was."""
    training = model.training
    try:
        yield model.eval()
    finally:
        model.train(training)
