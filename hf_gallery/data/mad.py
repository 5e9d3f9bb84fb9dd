"""The six tasks of MAD by their published definitions (Poli et al. 2024, Mechanistic Design and Scaling of Hybrid
Architectures, section 3), on token ids that are no text.

Vocabularies, lengths, noise and labels are those of the official code: athms/mad-lab at 0f49a45, mad/data/instances.py
with configs/tasks; what differs is said with each task. `length` counts columns, as everywhere in hf_gallery.data.
Where the official code asks for an answer at the very token that it stands for, our labels need a column after the
last one: there the paper's length L is length = L + 1.
"""

from __future__ import annotations

import numpy as np
from datasets import Dataset

from .examples import check, dataset, distinct, generator, unscored


def mad_recall(
    examples: int,
    length: int,
    *,
    vocab_size: int = 16,
    every_token: bool = False,
    seed: int = 0,
    split: str = "train",
) -> Dataset:
    """In-context recall: pairs "key value" from the first column to the last, drawn with repetition; from a key's
    second time on its value is scored. A key keeps its value within an example, and has another in the next.

    Keys are ids 0 to vocab_size // 2 - 1, values the rest. The last pair's key has come before. every_token: all
    tokens are labels, as the official code trains (it tests without); their distance is -1 where nothing is asked. The
    distance counts from the last time that the pair was shown. Chance is 1 / (vocab_size - vocab_size // 2).

    length: an even number of 4 or more; the paper's L. vocab_size: 4 or more.

    Raises ValueError for an argument outside these limits.
    """
    check("vocab_size", vocab_size, 4)
    random = generator(seed, split, "mad_recall")
    return _pairs(random, (examples, length), vocab_size, 0, 0.0, every_token)


def mad_noisy_recall(
    examples: int,
    length: int,
    *,
    vocab_size: int = 32,
    noise_vocab_size: int = 16,
    frac_noise: float = 0.2,
    every_token: bool = False,
    seed: int = 0,
    split: str = "train",
) -> Dataset:
    """Noisy in-context recall: `mad_recall` in which each pair, but one of the example and the last, is with
    probability frac_noise two tokens of noise instead.

    The last noise_vocab_size ids of the vocabulary are noise, the others keys and values as in mad_recall. The
    official code may choose the last pair as the one that is no noise, and fails where all others are; here it is
    another one.

    length: an even number of 4 or more; the paper's L. vocab_size: noise_vocab_size + 4 or more. noise_vocab_size: 1
    or more. frac_noise: from 0, below 1. Raises ValueError for an argument outside these limits.
    """
    check("noise_vocab_size", noise_vocab_size, 1)
    check("vocab_size", vocab_size, noise_vocab_size + 4)
    if not 0 <= frac_noise < 1:
        raise ValueError(f"frac_noise is {frac_noise!r}; it must be from 0 on and below 1")
    random = generator(seed, split, "mad_noisy_recall")
    return _pairs(random, (examples, length), vocab_size, noise_vocab_size, frac_noise, every_token)


def _pairs(
    random: np.random.Generator,
    shape: tuple[int, int],
    vocab_size: int,
    noise_vocab_size: int,
    frac_noise: float,
    every_token: bool,
) -> Dataset:
    """Examples of mad_recall and mad_noisy_recall."""
    examples, length = shape
    check("examples", examples, 1)
    check("length", length, 4)
    if length % 2:
        raise ValueError(f"length is {length}; an example is made of pairs, so give an even number")
    used = vocab_size - noise_vocab_size
    num_keys, slots = used // 2, length // 2
    rows = np.arange(examples)
    key = random.integers(num_keys, size=(examples, slots))
    value_of = random.integers(num_keys, used, size=(examples, num_keys))
    is_noise = random.random((examples, slots)) < frac_noise
    is_noise[rows, random.integers(slots - 1, size=examples)] = False
    is_noise[:, -1] = False
    shown = np.zeros((examples, num_keys), dtype=bool)
    shown[np.nonzero(~is_noise[:, :-1])[0], key[:, :-1][~is_noise[:, :-1]]] = True
    key[:, -1] = np.argmax(random.random((examples, num_keys)) * shown, axis=1)  # one of those shown, each alike
    ids = np.empty((examples, length), dtype=np.int64)
    ids[:, 0::2], ids[:, 1::2] = key, value_of[rows[:, None], key]
    wide = np.repeat(is_noise, 2, axis=1)
    if noise_vocab_size:
        ids = np.where(wide, random.integers(used, vocab_size, size=ids.shape), ids)
    labels, distance = unscored(examples, length)
    last = np.full((examples, num_keys), -1)  # column of each key's value, the last time that it was shown
    for slot in range(slots):
        column = 2 * slot + 1
        before = last[rows, key[:, slot]]
        row = rows[(before >= 0) & ~is_noise[:, slot]]
        labels[row, column], distance[row, column] = ids[row, column], column - before[row]
        row = rows[~is_noise[:, slot]]
        last[row, key[row, slot]] = column
    return dataset(ids, _all_but_first(ids) if every_token else labels, distance)


def _all_but_first(ids: np.ndarray) -> np.ndarray:
    """Labels of a language model: every token but the first, (examples, length)."""
    labels = ids.copy()
    labels[:, 0] = -100
    return labels


def mad_fuzzy_recall(
    examples: int,
    length: int,
    *,
    vocab_size: int = 16,
    key_size: int = 3,
    value_size: int = 3,
    every_token: bool = False,
    seed: int = 0,
    split: str = "train",
) -> Dataset:
    """Fuzzy in-context recall: keys of 1 to key_size tokens and values of 1 to value_size, "k1 k2 v1 v2 v3", each size
    as often as the others; from a key's second time on all tokens of its value are scored, one question each.

    In the splits validation and test all keys have key_size tokens, as in the official code, which trains on all sizes
    and asks for the longest. No token comes twice within a key or a value. One key, drawn beforehand, stands somewhere
    in the example and again at its end. Padding is in front: ids 0 to (vocab_size - 1) // 2 - 1 make keys, those after
    them values, and the last id is padding. every_token, distance: as in mad_recall; padding is labelled then too. The
    official code now and then draws a place for the first showing that it never reaches; here none is drawn.

    length: the paper's L is length = L + 1; 3 (key_size + value_size) + 1 or more. key_size, value_size: 1 or more, at
    most the ids that there are for them. Raises ValueError for an argument outside these limits.
    """
    longest = key_size + value_size if isinstance(key_size, int) and isinstance(value_size, int) else 2
    check("examples", examples, 1)
    check("vocab_size", vocab_size, 4)
    pad, num_keys = vocab_size - 1, (vocab_size - 1) // 2
    check("key_size", key_size, 1, num_keys)
    check("value_size", value_size, 1, pad - num_keys)
    check("length", length, 3 * longest + 1)
    random = generator(seed, split, "mad_fuzzy_recall")
    most = (length - 1) // 2 + 1  # pairs of an example; the first one drawn is the one asked for at the end
    sizes = (1, key_size + 1) if split == "train" else (key_size, key_size + 1)
    key_sizes = random.integers(*sizes, size=(examples, most))
    value_sizes = random.integers(1, value_size + 1, size=(examples, most))
    keys = distinct(random, (examples, most, key_size), num_keys)
    values = num_keys + distinct(random, (examples, most, value_size), pad - num_keys)
    places = random.random(examples)
    ids = np.full((examples, length), pad, dtype=np.int64)
    labels, distance = unscored(examples, length)
    for row in range(examples):
        drawn = [
            (tuple(key[:k]), tuple(value[:v]))
            for key, value, k, v in zip(
                keys[row].tolist(), values[row].tolist(), key_sizes[row], value_sizes[row], strict=True
            )
        ]
        room = length - 1 - longest - sum(map(len, drawn[0]))  # no pair begins after it, but the last
        text, asked = _fuzzy_pairs(drawn, int(places[row] * (room - longest + 1)), room)
        start = length - len(text)
        ids[row, start:] = text
        for column, before in asked.items():
            labels[row, start + column], distance[row, start + column] = text[column], column - before
    return dataset(ids, _all_but_first(ids) if every_token else labels, distance)


def _fuzzy_pairs(
    drawn: list[tuple[tuple[int, ...], tuple[int, ...]]], place: int, room: int
) -> tuple[list[int], dict[int, int]]:
    """The tokens of one example, from pairs drawn for it, and of each column that is asked for the column in which the
    same token of the pair was shown last. The first pair drawn stands at the first boundary from `place` on and again
    at the end; no other begins at `room` or after it."""
    probe, *others = drawn
    value_of, waiting = {probe[0]: probe[1]}, iter(others)
    last: dict[tuple[int, ...], int] = {}
    text: list[int] = []
    asked: dict[int, int] = {}

    def add(key: tuple[int, ...], value: tuple[int, ...]) -> None:
        value = value_of.setdefault(key, value)
        start = len(text) + len(key)
        if key in last:
            asked.update({start + i: last[key] + i for i in range(len(value))})
        text.extend((*key, *value))
        last[key] = start

    while len(text) < room:
        add(*(probe if len(text) >= place and probe[0] not in last else next(waiting)))
    add(*probe)
    return text, asked


def mad_compression(
    examples: int, length: int, *, vocab_size: int = 16, seed: int = 0, split: str = "train"
) -> Dataset:
    """Compression: random tokens and at last the compression token, from whose state alone, a vector, all of them are
    to be read again.

    It is no task of a language model: labels[t] is input_ids[t] itself, which a decoder is to find from the model's
    state after the last column, and its place t; eval/compression.py holds the decoder of the paper. The last column,
    the last id of the vocabulary in every example, is not scored, though the official code counts it. The distance
    counts from a token to the last column. Chance is 1 / (vocab_size - 1).

    length: 2 or more, the paper's L. vocab_size: 3 or more.

    Raises ValueError for an argument outside these limits.
    """
    check("examples", examples, 1)
    check("length", length, 2)
    check("vocab_size", vocab_size, 3)
    random = generator(seed, split, "mad_compression")
    ids = random.integers(vocab_size - 1, size=(examples, length))
    ids[:, -1] = vocab_size - 1
    labels, distance = unscored(examples, length)
    labels[:, :-1], distance[:, :-1] = ids[:, :-1], np.arange(length - 1, 0, -1)
    return dataset(ids, labels, distance)


def mad_memorization(
    examples: int, length: int, *, vocab_size: int = 256, facts_seed: int = 0, seed: int = 0, split: str = "train"
) -> Dataset:
    """Memorization: keys, each with a value that is the same in all examples of all splits, so that nothing but
    training tells it. After each key stands a token that asks, and its value is scored in the column after that.

    Keys are ids 0 to (vocab_size - 1) // 2 - 1, drawn with repetition; values are a random choice of the ids after
    them, each for one key; the last id asks. No value stands in an input. facts_seed: of which value is whose; seed
    and split draw the keys of the examples. The distance is 1, from the key to what asks. Chance is one over the
    number of keys.

    length: an odd number of 3 or more; the paper's L is length = L + 1. vocab_size: 5 or more.

    Raises ValueError for an argument outside these limits.
    """
    check("examples", examples, 1)
    check("length", length, 3)
    check("vocab_size", vocab_size, 5)
    check("facts_seed", facts_seed, 0)
    if length % 2 == 0:
        raise ValueError(f"length is {length}; a key has two columns and the last answer one, so give an odd number")
    ask, num_keys = vocab_size - 1, (vocab_size - 1) // 2
    value_of = generator(facts_seed, "train", "mad_memorization facts").permutation(np.arange(num_keys, ask))[
        :num_keys
    ]
    random = generator(seed, split, "mad_memorization")
    keys = random.integers(num_keys, size=(examples, length // 2))
    ids = np.full((examples, length), ask, dtype=np.int64)
    ids[:, 0:-1:2] = keys
    labels, distance = unscored(examples, length)
    labels[:, 2::2], distance[:, 2::2] = value_of[keys], 1
    return dataset(ids, labels, distance)


def mad_selective_copy(
    examples: int,
    length: int,
    *,
    vocab_size: int = 16,
    num_tokens_to_copy: int = 16,
    seed: int = 0,
    split: str = "train",
) -> Dataset:
    """Selective copying: tokens among blanks, to be listed in their order after the copy token, one at each of the
    blanks that follow it. No answer stands in the input.

    Tokens are ids 0 to vocab_size - 3, drawn with repetition; vocab_size - 2 is the blank, vocab_size - 1 the copy
    token. Each blank of the first part stands, drawn alike, before one of the tokens: none follows the last, as in
    the official code. The distance counts from the column of a token to that of its answer. Chance is
    1 / (vocab_size - 2).

    length: the paper's L is length = L + 1; 2 num_tokens_to_copy + 3 or more. num_tokens_to_copy: 1 or more.
    vocab_size: 4 or more. Raises ValueError for an argument outside these limits.
    """
    check("examples", examples, 1)
    check("num_tokens_to_copy", num_tokens_to_copy, 1)
    check("length", length, 2 * num_tokens_to_copy + 3)
    check("vocab_size", vocab_size, 4)
    random = generator(seed, split, "mad_selective_copy")
    blank, copy, number = vocab_size - 2, vocab_size - 1, num_tokens_to_copy
    tokens = random.integers(blank, size=(examples, number))
    blanks = random.multinomial(length - 2 - 2 * number, np.full(number, 1 / number), size=examples)
    shown = np.arange(number) + np.cumsum(blanks, axis=1)  # (examples, number) columns
    answered = length - number + np.arange(number)
    ids = np.full((examples, length), blank, dtype=np.int64)
    ids[np.arange(examples)[:, None], shown] = tokens
    ids[:, length - number - 2] = copy
    labels, distance = unscored(examples, length)
    labels[:, answered], distance[:, answered] = tokens, answered - shown
    return dataset(ids, labels, distance)
