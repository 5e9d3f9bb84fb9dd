"""Adaptive embeddings and softmax, plainly: one cluster of words at a time.

The twin of hf_gallery/models/adaptive.py.
"""

import torch


def embed(part, config, token):
    """The vector (E,) of one token. Adaptive: rare ones stand in narrower tables (Baevski and Auli 2018)."""
    if hasattr(part, "weight"):
        return part.weight[token]
    ends = [0] if config.div_val == 1 else [0, *config.cutoffs]
    i = max(i for i, end in enumerate(ends) if token >= end)
    x = part.tables[i].weight[token - ends[i]]
    return part.projs[i] @ x if len(part.projs) else x


def log_probabilities(part, config, x):
    """Adaptive softmax (Grave et al. 2017): log p(word) = log p(its cluster) + log p(word in the cluster). (T, V)."""
    ends = [0, *config.cutoffs, config.vocab_size]
    one_table, tails = config.div_val == 1, len(ends) - 2

    def scores(i, weight, bias):
        return (x @ part.projs[i] if len(part.projs) else x) @ weight.T + bias

    clusters = []
    for i in range(tails + 1):
        at = slice(ends[i], ends[i + 1]) if one_table else slice(None)
        clusters.append((part.weights[0 if one_table else i][at], part.biases[0 if one_table else i][at]))
    if not tails:
        return scores(0, *clusters[0]).log_softmax(-1)
    weight, bias = clusters[0]
    weight, bias = torch.cat([weight, part.cluster_weight]), torch.cat([bias, part.cluster_bias])
    first = scores(0, weight, bias).log_softmax(-1)  # the frequent words, then one column for each tail cluster
    result = [first[:, : ends[1]]]
    for i in range(1, tails + 1):
        column = ends[1] + (i - 1 if config.cluster_order == "forward" else tails - i)
        result.append(first[:, column, None] + scores(i, *clusters[i]).log_softmax(-1))
    return torch.cat(result, dim=-1)
