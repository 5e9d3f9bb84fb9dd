"""Multi-query associative recall by its published definition, on token ids that are no text."""

from __future__ import annotations

import numpy as np
from datasets import Dataset

from .examples import check, dataset, distinct, generator, unscored


def mqar(
    examples: int,
    length: int,
    *,
    vocab_size: int = 8192,
    num_kv_pairs: int = 8,
    power_a: float = 0.01,
    random_non_queries: bool = True,
    seed: int = 0,
    split: str = "train",
) -> Dataset:
    """MQAR (Arora et al. 2023, Zoology: Measuring and improving recall in efficient language models, section 3 and
    figure 2), by the rules of the official code: HazyResearch/zoology at d88d6f5, zoology/data/multiquery_ar.py.

    An example begins with num_kv_pairs pairs "key value". After them each key comes once more, in the first column of
    one of the (length - 2 num_kv_pairs) / 2 slots of two columns, and the column after it is scored: what stands there
    is no answer, so that no question helps another. Slot i, from 1 on, is drawn in proportion to i ** (power_a - 1)
    and without replacement: power_a = 1 spreads the questions evenly, and near 0 most of them follow soon. All other
    columns hold 0, or with random_non_queries any id of the vocabulary, keys and values among them.

    Keys are ids 1 to vocab_size // 2 - 1, values those from vocab_size // 2 on; within an example no key and no value
    comes twice. The distance counts from a pair to its question. Chance is 1 / (vocab_size - vocab_size // 2).

    length: an even number of 4 num_kv_pairs or more, below vocab_size. num_kv_pairs: 1 or more. power_a: above 0, at
    most 1. Raises ValueError for an argument outside these limits.
    """
    check("examples", examples, 1)
    check("num_kv_pairs", num_kv_pairs, 1)
    check("length", length, 4 * num_kv_pairs)
    if length % 2:
        raise ValueError(f"length is {length}; pairs and slots have two columns each, so give an even number")
    check("vocab_size", vocab_size, length + 1)
    if not 0 < power_a <= 1:
        raise ValueError(f"power_a is {power_a!r}; it must be above 0 and at most 1")
    random = generator(seed, split, "mqar")
    half, shown = vocab_size // 2, 2 * num_kv_pairs
    slots = (length - shown) // 2
    keys = 1 + distinct(random, (examples, num_kv_pairs), half - 1)
    values = half + distinct(random, (examples, num_kv_pairs), vocab_size - half)
    weights = np.arange(1, slots + 1) ** (power_a - 1.0)
    # The order in which exponential clocks of these rates ring is that of draws without replacement.
    rings = random.exponential(size=(examples, slots)) / weights
    asked = shown + 2 * np.argsort(rings, axis=1)[:, :num_kv_pairs]  # (examples, pairs) columns of the questions
    if random_non_queries:
        ids = random.integers(vocab_size, size=(examples, length))
    else:
        ids = np.zeros((examples, length), dtype=np.int64)
    ids[:, 0:shown:2], ids[:, 1:shown:2] = keys, values
    labels, distance = unscored(examples, length)
    rows = np.arange(examples)[:, None]
    ids[rows, asked] = keys
    labels[rows, asked + 1] = values
    distance[rows, asked + 1] = asked - 2 * np.arange(num_kv_pairs)
    return dataset(ids, labels, distance)
