"""The reach of a model: by reading with a token changed, by gradients, and by what its intervals allow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from .reading import Progress, bits, marked, quiet

LENGTH = 1024  # tokens of the beginning that are read
SAMPLES = 8  # tokens that are changed, and losses whose gradients are taken


@dataclass
class Reach:
    """The effect of tokens on the losses of later ones, at a text's beginning.

    A distance is that of the token whose loss it is from the one that moves it; entry d is of distance d, NaN where
    none was measured.

    changed (N,): the mean change of the loss in bits, up or down, by a token that is another one. gradient (N,): the
    mean length of the gradient at a token's embedding, in bits per unit; it stops where the paper stops it, so a
    memory that is not learned through has none. allowed (N,): the greatest distance that the intervals of all layers
    together allow for the loss of each token; memory tokens, states and retrieval go beyond it. further: whether the
    model has any. samples: the positions of the tokens that were changed.
    """

    changed: torch.Tensor
    gradient: torch.Tensor
    allowed: torch.Tensor
    further: bool
    samples: list[int]


def reach(
    model: Any,
    ids: torch.Tensor,
    first: torch.Tensor,
    further: bool,
    progress: Progress = quiet,
    *,
    marks: torch.Tensor | None = None,
    seed: int = 0,
) -> Reach:
    """Of the first tokens of ids (T,). first (T, layers): the first position that each query sees in each layer. marks
    (T,): 1 at global tokens."""
    ids = ids[:LENGTH]
    places = torch.linspace(0, 0.75 * (len(ids) - 1), SAMPLES).long().unique().tolist()
    return Reach(
        by_change(model, ids, places, progress, marks=marks, seed=seed),
        by_gradient(model, ids, progress, marks=marks),
        allowed(first[: len(ids)]),
        further,
        places,
    )


def by_change(
    model: Any,
    ids: torch.Tensor,
    places: list[int],
    progress: Progress = quiet,
    *,
    marks: torch.Tensor | None = None,
    seed: int = 0,
) -> torch.Tensor:
    """The mean change of the loss, up or down, at each distance behind a token that is another one, (N,)."""
    generator = torch.Generator().manual_seed(seed)
    rows = ids.repeat(len(places) + 1, 1)
    for row, place in enumerate(places, 1):
        others = ids[ids != ids[place]]  # another token of this text; of a text of one word any other
        new = (
            others[int(torch.randint(len(others), (1,), generator=generator))]
            if len(others)
            else (ids[place] + 1) % model.config.vocab_size
        )
        rows[row, place] = new
    progress("changed tokens", 0, 1)
    with torch.no_grad():
        more = marked(marks, 0, len(ids) - 1, len(rows))
        found = bits(model(rows[:, :-1], use_cache=False, **more).logits, rows[:, 1:])  # (K + 1, N - 1)
    progress("changed tokens", 1, 1)
    total, count = torch.zeros(len(ids)), torch.zeros(len(ids))
    for row, place in enumerate(places, 1):
        change = (found[row, place:] - found[0, place:]).abs()  # of the losses of place + 1, place + 2, ...
        total[1 : 1 + len(change)] += change
        count[1 : 1 + len(change)] += 1
    return torch.where(count > 0, total / count.clamp(min=1), math.nan)


def by_gradient(
    model: Any, ids: torch.Tensor, progress: Progress = quiet, *, marks: torch.Tensor | None = None
) -> torch.Tensor:
    """The mean length of a loss's gradient at the embeddings that stand at each distance before its token, (N,)."""
    n = len(ids)
    targets = torch.linspace(n / 4, n - 1, SAMPLES).long().clamp(min=1).unique().tolist()
    total, count = torch.zeros(n), torch.zeros(n)
    with torch.enable_grad():
        x = model.get_input_embeddings()(ids[None, :-1]).detach().requires_grad_()  # (1, N - 1, E)
        logits = model(inputs_embeds=x, use_cache=False, **marked(marks, 0, n - 1)).logits[0].float()
        loss = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none") / math.log(2)
        for done, target in enumerate(targets, 1):
            (gradient,) = torch.autograd.grad(loss[target - 1], x, retain_graph=done < len(targets))
            lengths = gradient[0, :target].float().norm(dim=-1).flip(0).cpu()  # of target - 1, target - 2, ...
            total[1 : 1 + target] += lengths
            count[1 : 1 + target] += 1
            progress("gradients", done, len(targets))
    return torch.where(count > 0, total / count.clamp(min=1), math.nan)


def allowed(first: torch.Tensor) -> torch.Tensor:
    """The greatest distance to a token that moves the loss of each, through the intervals of all layers, (N,). first
    (N, layers). The loss of token 0 is moved by none: 0."""
    n, layers = first.shape
    earliest = torch.arange(n)
    for layer in range(layers):  # what a query sees in a layer are the results of the one below
        earliest = earliest[first[:, layer]]
    distances = torch.arange(1, n + 1) - earliest  # of the tokens that the queries predict
    return torch.cat([torch.zeros(1, dtype=torch.long), distances])[:n]
