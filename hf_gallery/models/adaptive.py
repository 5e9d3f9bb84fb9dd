"""Adaptive embeddings and softmax of Transformer-XL: frequent words get wide vectors, rare ones narrow.

The same cluster by cluster: tests/plain/adaptive.py. Letters: see spans.py.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_transformer_xl import GalleryTransformerXLConfig
from .exporting import in_one_graph


class Parameters(nn.ParameterList):
    """A list of parameters that gives them in a forward: tools that offload or shard them bring them in for it."""

    __call__ = nn.Module.__call__  # a ParameterList refuses to be called

    def forward(self) -> list[torch.Tensor]:
        return list(self)


class Projections(Parameters):
    """Maps between a cluster's width and E, (E, width) each. A type of its own, initialised in its own way."""


class AdaptiveEmbedding(nn.Module):
    """Embeddings in clusters of falling frequency and width (Baevski and Auli 2018), the authors' AdaptiveEmbedding.

    Cluster i holds the ids [ends_i, ends_(i+1)) in a table embedding_size / div_val^i wide, mapped to hidden_size;
    with div_val 1 there is one table for all. (B, T) to (B, T, E), times sqrt(E).
    """

    def __init__(self, config: GalleryTransformerXLConfig):
        super().__init__()
        self.embed_scale = math.sqrt(config.hidden_size)
        self.ends = cluster_ends(config)
        if config.div_val == 1:
            self.ends = [0, config.vocab_size]
        widths = [config.embedding_size // config.div_val**i for i in range(len(self.ends) - 1)]
        self.tables = nn.ModuleList(
            nn.Embedding(end - start, width)
            for start, end, width in zip(self.ends[:-1], self.ends[1:], widths, strict=True)
        )
        self.embedding_dim = config.hidden_size
        self.projs = Projections(torch.empty(config.hidden_size, width) for width in widths if has_projections(config))

    @property
    def num_embeddings(self) -> int:
        return self.ends[-1]

    @property
    def weight(self) -> torch.Tensor:
        """The one table (V, E) that stands for all, as nn.Embedding has it, made anew each time it is asked for."""
        tables = [table.weight for table in self.tables]
        if self.projs:
            tables = [F.linear(table, proj) for table, proj in zip(tables, self.projs, strict=True)]
        return torch.cat(tables)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        ids, projs = input_ids.flatten(), self.projs()
        if len(self.tables) == 1:
            x = self.tables[0](ids)
            x = F.linear(x, projs[0]) if projs else x
        else:
            if in_one_graph():
                return self._of_all_clusters(input_ids)
            x = torch.zeros(len(ids), self.embedding_dim, dtype=projs[0].dtype, device=ids.device)
            for i, (start, end) in enumerate(zip(self.ends[:-1], self.ends[1:], strict=True)):
                at = ((ids >= start) & (ids < end)).nonzero().squeeze(1)
                part = F.linear(self.tables[i](ids[at] - start), projs[i])
                x = x.to(part.dtype).index_copy(0, at, part)
        return x.view(*input_ids.shape, self.embedding_dim) * self.embed_scale

    def _of_all_clusters(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The same without asking which clusters occur: every table is read at every token."""
        x: Any = None
        borders = zip(self.ends[:-1], self.ends[1:], strict=True)
        for table, proj, (start, end) in zip(self.tables, self.projs(), borders, strict=True):
            part = F.linear(table(input_ids.clamp(start, end - 1) - start), proj)  # (B, T, E)
            x = part if x is None else torch.where((input_ids >= start)[..., None], part, x)
        return x * self.embed_scale


class AdaptiveSoftmax(nn.Module):
    """The output side of AdaptiveEmbedding (Grave et al. 2017), as the authors' ProjectedAdaptiveLogSoftmax.

    A first softmax scores the first cluster's words and each tail cluster as one word; a tail word's log-probability
    is its cluster's plus its own within the cluster. config.cluster_order says which column is which tail's. Without
    cutoffs it is one linear map, whose `weight` (V, E) and `bias` (V,) may be read as nn.Linear's.
    """

    def __init__(self, config: GalleryTransformerXLConfig):
        super().__init__()
        self.ends, self.order = cluster_ends(config), config.cluster_order
        count = len(self.ends) - 1
        self.one_table = config.div_val == 1
        ends = [0, config.vocab_size] if self.one_table else self.ends
        widths = [config.embedding_size // config.div_val**i for i in range(count)]
        sizes = list(zip(ends[:-1], ends[1:], widths, strict=False))
        self.weights = Parameters(torch.empty(end - start, width) for start, end, width in sizes)
        self.biases = Parameters(torch.zeros(end - start) for start, end, _ in sizes)
        self.projs = Projections(torch.empty(config.hidden_size, width) for width in widths if has_projections(config))
        if count > 1:
            self.cluster_weight = nn.Parameter(torch.zeros(count - 1, config.embedding_size))
            self.cluster_bias = nn.Parameter(torch.zeros(count - 1))

    def __getattr__(self, name: str):
        if name not in ("weight", "bias"):
            return super().__getattr__(name)
        if len(self.ends) > 2:
            raise AttributeError(
                f"the adaptive softmax with clusters that end at {self.ends[1:]} has no one {name}: a word's "
                f"probability is its cluster's times its own in it. A tool that reads lm_head.{name}, as TRL's "
                "trainers do, cannot train it; use transformers' Trainer or SegmentTrainer, which call the model, or "
                "a config without cutoffs"
            )
        if name == "bias":
            return self.biases[0]
        return F.linear(self.weights[0], self.projs[0]) if self.projs else self.weights[0]

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor | None = None, num_items_in_batch=None):
        """hidden (B, T, E) to log-probabilities (B, T, V). With labels (B, T) to their mean negative log-likelihood,
        -100 left out, without scoring clusters that do not occur."""
        scores = partial(self._scores, self.weights(), self.biases(), self.projs())
        if labels is not None:
            return self._loss(scores, hidden, labels, num_items_in_batch)
        flat = hidden.flatten(0, 1)
        first = scores(flat, 0).log_softmax(-1)
        parts = [first[:, : self.ends[1]]]
        for i in range(1, len(self.ends) - 1):
            parts.append(scores(flat, i).log_softmax(-1) + first[:, self._column(i), None])
        return torch.cat(parts, dim=-1).view(*hidden.shape[:2], -1)

    def _loss(self, scores, hidden, labels, num_items_in_batch):
        wanted = labels.flatten() != -100
        flat, labels = hidden.flatten(0, 1)[wanted], labels.flatten()[wanted]
        first = scores(flat, 0).log_softmax(-1)
        cluster = torch.bucketize(labels, torch.tensor(self.ends[1:-1], device=labels.device), right=True)
        column = torch.tensor([0] + [self._column(i) for i in range(1, len(self.ends) - 1)], device=labels.device)
        total = first.gather(1, torch.where(cluster == 0, labels, column[cluster])[:, None]).sum()
        for i in range(1, len(self.ends) - 1):
            # Also where it is empty: a weight without a gradient stops DistributedDataParallel.
            at = (cluster == i).nonzero().squeeze(1)
            tail = scores(flat[at], i).log_softmax(-1)
            total = total + tail.gather(1, (labels[at] - self.ends[i])[:, None]).sum()
        return -total / (max(len(labels), 1) if num_items_in_batch is None else num_items_in_batch)

    def _scores(self, weights, biases, projs, hidden, i):
        """Scores (tokens, words of cluster i, and for the first one each tail cluster) of hidden (tokens, E)."""
        start, end = self.ends[i], self.ends[i + 1]
        weight, bias = (x[0][start:end] if self.one_table else x[i] for x in (weights, biases))
        if i == 0 and len(self.ends) > 2:
            weight, bias = torch.cat([weight, self.cluster_weight]), torch.cat([bias, self.cluster_bias])
        if projs:
            hidden = F.linear(hidden, projs[i].t())
        scores = F.linear(hidden, weight, bias)
        return scores if scores.dtype == torch.float64 else scores.float()  # half types lose too much in log_softmax

    def _column(self, i):
        """The column of tail cluster i in the first softmax."""
        return self.ends[1] + i - 1 if self.order == "forward" else self.ends[1] + len(self.ends) - 2 - i


def cluster_ends(config: GalleryTransformerXLConfig) -> list[int]:
    """Borders of the clusters: [0, first cutoff, ..., vocab_size]."""
    return [0, *config.cutoffs, config.vocab_size]


def is_adaptive(config: GalleryTransformerXLConfig) -> bool:
    """Tells whether embedding and softmax need clusters or projections; else they are one table and one linear map."""
    return bool(config.cutoffs) or has_projections(config)


def has_projections(config: GalleryTransformerXLConfig) -> bool:
    """Tells whether maps stand between the embeddings' widths and hidden_size."""
    return config.div_val > 1 or config.embedding_size != config.hidden_size
