"""Synthetic tasks that ask how far back a model remembers. All are made from seeds, on ids of the byte tokenizer.

An example is a row of a datasets.Dataset with the columns input_ids, labels and distance, each a list of `length` int.
As in transformers, labels[t] is what column t - 1 is to predict where it is scored and -100 elsewhere; distance[t]
counts the tokens from where the answer was shown to where it is asked for, and is -1 where nothing is scored. All ids
are bytes, below 256.

What all tasks take: `examples` rows of `length` tokens; `distances` to draw from, in tokens; `seed` (0 or more) and
`split` ("train", "validation" or "test"), of which each pair has random numbers of its own. The same arguments give
the same data in every process.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from datasets import Dataset

KEYS = range(0, 64)  # ids of keys, values and filler: three disjoint sets of bytes
VALUES = range(64, 128)
FILLER = range(128, 256)
SPLITS = {"train": 0, "validation": 1, "test": 2}


def associative_recall(
    examples: int,
    length: int,
    *,
    distances: Sequence[int],
    num_pairs: int = 8,
    num_values: int = 16,
    seed: int = 0,
    split: str = "train",
) -> Dataset:
    """Multi-query associative recall, in the manner of MQAR (Arora et al. 2023, Zoology, section 3).

    Each of up to num_pairs pairs "key value" stands somewhere in an example, and again at one of `distances` (drawn
    for each pair alike) tokens later; the second value is scored. Everything else is filler. Keys are distinct within
    an example, so the answer is the only one; values are drawn from num_values, so that chance is 1 / num_values.
    A pair for which no room is left is left out.

    distances: from 2, the next token after a pair, to length - 2. num_pairs: 1 to 64. num_values: 2 to 64. Keys are
    the ids 0 to 63, values 64 to 63 + num_values, filler 128 to 255.

    Raises ValueError for an argument outside these limits.
    """
    _check("examples", examples, 1)
    _check("num_pairs", num_pairs, 1, len(KEYS))
    _check("num_values", num_values, 2, len(VALUES))
    _check("length", length, 1)
    choices = _distances(distances, 2, length - 2, f"between a pair and its question, with length {length}")
    random = _generator(seed, split, "associative_recall")
    ids = random.integers(FILLER.start, FILLER.stop, size=(examples, length))
    keys = random.permuted(np.tile(np.arange(KEYS.start, KEYS.stop), (examples, 1)), axis=1)[:, :num_pairs]
    values = random.integers(VALUES.start, VALUES.start + num_values, size=(examples, num_pairs))
    labels = np.full((examples, length), -100, dtype=np.int64)
    distance = np.full((examples, length), -1, dtype=np.int64)
    taken = np.zeros((examples, length), dtype=bool)
    rows = np.arange(examples)
    for pair in range(num_pairs):
        apart = random.choice(choices, size=examples)
        start = np.full(examples, -1)
        for _ in range(16):  # tries to find room; dense examples fail now and then
            guess = (random.random(examples) * (length - apart - 1)).astype(np.int64)
            free = ~(taken[rows, guess] | taken[rows, guess + 1])
            free &= ~(taken[rows, guess + apart] | taken[rows, guess + apart + 1])
            start = np.where((start < 0) & free, guess, start)
        row = rows[start >= 0]
        at, apart = start[row], apart[row]
        for place in (at, at + apart):
            ids[row, place], ids[row, place + 1] = keys[row, pair], values[row, pair]
            taken[row, place] = taken[row, place + 1] = True
        labels[row, at + apart + 1] = values[row, pair]
        distance[row, at + apart + 1] = apart
    return _dataset(ids, labels, distance)


SLOTS, SLOT_VALUES = 8, 8
READS = np.frombuffer(b"12345678", dtype=np.uint8)  # id that asks for each slot
ANSWERS = np.frombuffer(b"abcdefgh", dtype=np.uint8)  # id of each value, as it is predicted
NOISE = np.frombuffer(b" .,-", dtype=np.uint8)
# id that sets a slot to a value: one printable character for each pair, apart from those above
WRITES = np.array(
    [b for b in range(33, 127) if b not in b"12345678abcdefgh.,-"][: SLOTS * SLOT_VALUES], dtype=np.uint8
)


def slot_recall(
    examples: int,
    length: int,
    *,
    distances: Sequence[int],
    num_writes: int = 4,
    num_reads: int = 1,
    num_values: int = 8,
    seed: int = 0,
    split: str = "train",
) -> Dataset:
    """Recall of what was put into a slot: memory over a distance, without the step of induction that
    `associative_recall` needs besides.

    One token says "slot k holds value v"; at one of `distances` tokens later, another says "read slot k", and the
    token after it is to be v. Each of num_writes different slots is written once in an example and read at up to
    num_reads distances, drawn alike from `distances`; all else is noise. The answer itself never stands in the input
    (labels[t] is scored in place of input_ids[t]), so no read helps another. Values are drawn from num_values, so
    chance is 1 / num_values. A read for which no room is left is left out.

    distances: from 1, the token after the write, to length - 2; they count from the write to its read, which stands
    before the scored column. num_writes: 1 to 8. num_reads: 1 or more. num_values: 2 to 8. Slots are read by the
    digits 1 to 8, answers are the letters a to h, noise is " .,-"; writes are other printable characters.

    Raises ValueError for an argument outside these limits. A task of our own.
    """
    _check("examples", examples, 1)
    _check("num_writes", num_writes, 1, SLOTS)
    _check("num_reads", num_reads, 1)
    _check("num_values", num_values, 2, SLOT_VALUES)
    _check("length", length, 3)
    choices = _distances(distances, 1, length - 2, f"from a write to its read, with length {length}")
    random = _generator(seed, split, "slot_recall")
    ids = random.choice(NOISE, size=(examples, length)).astype(np.int64)
    labels = np.full((examples, length), -100, dtype=np.int64)
    distance = np.full((examples, length), -1, dtype=np.int64)
    taken = np.zeros((examples, length), dtype=bool)
    rows = np.arange(examples)
    slots = random.permuted(np.tile(np.arange(SLOTS), (examples, 1)), axis=1)[:, :num_writes]
    values = random.integers(num_values, size=(examples, num_writes))
    written = np.full((examples, num_writes), -1)
    for i in range(num_writes):
        for _ in range(16):  # tries to find room
            guess = random.integers(length - 1 - choices[0], size=examples)
            free = (written[:, i] < 0) & ~taken[rows, guess]
            written[free, i] = guess[free]
        row = rows[written[:, i] >= 0]
        at = written[row, i]
        ids[row, at], taken[row, at] = WRITES[slots[row, i] * SLOT_VALUES + values[row, i]], True
    for _ in range(num_reads):
        for i in range(num_writes):
            apart = random.choice(choices, size=examples)
            at = written[:, i] + apart
            row = rows[(written[:, i] >= 0) & (at < length - 1)]
            row = row[~taken[row, at[row]]]
            at, apart = at[row], apart[row]
            ids[row, at], taken[row, at] = READS[slots[row, i]], True
            labels[row, at + 1], distance[row, at + 1] = ANSWERS[values[row, i]], apart
    return _dataset(ids, labels, distance)


def passkey(
    examples: int, length: int, *, distances: Sequence[int], digits: int = 5, seed: int = 0, split: str = "train"
) -> Dataset:
    """A number hidden in filler text, asked for at the end (Mohtashami and Jaggi 2023, section 4.2, in bytes).

    The text is sentences without meaning; "The pass key is 12345." stands so that each digit is shown exactly one of
    `distances` tokens before it is scored in the last words, "What is the pass key? The pass key is 12345". Chance is
    1 / 10 for each digit.

    distances: from 40 + digits, where the question follows at once, to length - digits - 17. digits: 1 to 18.

    Raises ValueError for an argument outside these limits.
    """
    _check("examples", examples, 1)
    _check("digits", digits, 1, 18)
    shown, asked = b" The pass key is ", b" What is the pass key? The pass key is "
    shortest, longest = len(asked) + digits + 1, length - digits - len(shown)
    choices = _distances(distances, shortest, longest, f"with length {length} and {digits} digits")
    random = _generator(seed, split, "passkey")
    sentence = np.frombuffer(
        b"The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. ", dtype=np.uint8
    )
    turn = random.integers(0, len(sentence), size=(examples, 1))
    ids = sentence[(np.arange(length) + turn) % len(sentence)].astype(np.int64)
    number = random.integers(ord("0"), ord("9") + 1, size=(examples, digits))
    apart = random.choice(choices, size=examples)
    rows = np.arange(examples)[:, None]
    end = length - digits + np.arange(digits)  # (digits,) columns of the answer
    ids[:, length - digits - len(asked) : length - digits] = np.frombuffer(asked, dtype=np.uint8)
    ids[:, end] = number
    first = (length - digits - apart)[:, None]  # (examples, 1) column of the first digit shown
    ids[rows, first + np.arange(digits)] = number
    ids[rows, first - len(shown) + np.arange(len(shown))] = np.frombuffer(shown, dtype=np.uint8)
    ids[rows, first + digits] = ord(".")
    labels = np.full((examples, length), -100, dtype=np.int64)
    distance = np.full((examples, length), -1, dtype=np.int64)
    labels[:, end], distance[:, end] = number, apart[:, None]
    return _dataset(ids, labels, distance)


def _generator(seed: int, split: str, task: str) -> np.random.Generator:
    """A stream of its own for each seed, split and task, so that no test example was ever trained on by its seed."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
    _check("seed", seed, 0)
    return np.random.default_rng([seed, SPLITS[split], *task.encode()])


def _check(name: str, value: int, least: int, most: int | None = None):
    if not isinstance(value, (int, np.integer)) or value < least or (most is not None and value > most):
        limit = f"at least {least}" + (f" and at most {most}" if most is not None else "")
        raise ValueError(f"{name} is {value!r}; it must be a whole number of {limit}")


def _distances(distances: Sequence[int], least: int, most: int, where: str) -> np.ndarray:
    """The distances to draw from, each once, in rising order."""
    if isinstance(distances, (int, np.integer)):
        raise ValueError(f"distances is {distances}; give a list of distances, [{distances}]")
    choices = sorted(set(distances))
    whole = all(isinstance(d, (int, np.integer)) for d in choices)
    if not choices or not whole or choices[0] < least or choices[-1] > most:
        room = f"whole numbers from {least} to {most}" if most >= least else "longer examples: none fits"
        raise ValueError(f"distances are {choices}; {where} they need {room}")
    return np.asarray(choices, dtype=np.int64)


def _dataset(ids: np.ndarray, labels: np.ndarray, distance: np.ndarray) -> Dataset:
    return Dataset.from_dict({"input_ids": list(ids), "labels": list(labels), "distance": list(distance)})
