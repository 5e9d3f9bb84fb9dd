"""Tasks that ask how far back a model remembers, and how much at once. All are made from seeds, on ids of the byte
tokenizer, as hf_gallery.data.examples describes; `distances`, where a task takes them, are drawn from, in tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from datasets import Dataset

from .examples import check, choices, dataset, generator, noise, scattered, unscored

KEYS = range(0, 64)  # ids of keys, values and filler: three disjoint sets of bytes
VALUES = range(64, 128)
FILLER = range(128, 256)
PRINTABLE = (  # and the same three sets where an example is to be text
    b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz+/",
    b"!\"#$%&'()*:;<=>?",
    b" ,-.@[\\]^_`{|}~",
)


def associative_recall(
    examples: int,
    length: int,
    *,
    distances: Sequence[int],
    num_pairs: int = 8,
    num_values: int = 16,
    printable: bool = False,
    seed: int = 0,
    split: str = "train",
) -> Dataset:
    """Multi-query associative recall, in the manner of MQAR (Arora et al. 2023, Zoology, section 3).

    Each of up to num_pairs pairs "key value" stands somewhere in an example, and again at one of `distances` (drawn
    for each pair alike) tokens later; the second value is scored. Everything else is filler. Keys are distinct within
    an example, so the answer is the only one; values are drawn from num_values, so that chance is 1 / num_values.
    A pair for which no room is left is left out.

    distances: from 2, the next token after a pair, to length - 2. num_pairs: 1 to 64. num_values: 2 to 64. Keys are
    the ids 0 to 63, values 64 to 63 + num_values, filler 128 to 255; with printable=True, which makes an example text
    and num_values at most 16, keys are letters, digits, "+" and "/", and values and filler are other characters.

    Raises ValueError for an argument outside these limits.
    """
    check("examples", examples, 1)
    check("num_pairs", num_pairs, 1, len(KEYS))
    check("num_values", num_values, 2, len(PRINTABLE[1]) if printable else len(VALUES))
    check("length", length, 1)
    apart_from = choices(distances, 2, length - 2, f"between a pair and its question, with length {length}")
    random = generator(seed, split, "associative_recall")
    ids = random.integers(FILLER.start, FILLER.stop, size=(examples, length))
    keys = random.permuted(np.tile(np.arange(KEYS.start, KEYS.stop), (examples, 1)), axis=1)[:, :num_pairs]
    values = random.integers(VALUES.start, VALUES.start + num_values, size=(examples, num_pairs))
    labels, distance = unscored(examples, length)
    taken = np.zeros((examples, length), dtype=bool)
    rows = np.arange(examples)
    for pair in range(num_pairs):
        apart = random.choice(apart_from, size=examples)
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
    if printable:
        table = np.zeros(256, dtype=np.int64)
        for kind, characters in zip((KEYS, VALUES, FILLER), PRINTABLE, strict=True):
            table[kind] = np.resize(np.frombuffer(characters, dtype=np.uint8), len(kind))
        ids, labels = table[ids], np.where(labels >= 0, table[labels], -100)
    return dataset(ids, labels, distance)


SLOTS, SLOT_VALUES = 8, 8
READS = np.frombuffer(b"12345678", dtype=np.uint8)  # id that asks for each slot
ANSWERS = np.frombuffer(b"abcdefgh", dtype=np.uint8)  # id of each value, as it is predicted
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
    check("examples", examples, 1)
    check("num_writes", num_writes, 1, SLOTS)
    check("num_reads", num_reads, 1)
    check("num_values", num_values, 2, SLOT_VALUES)
    check("length", length, 3)
    apart_from = choices(distances, 1, length - 2, f"from a write to its read, with length {length}")
    random = generator(seed, split, "slot_recall")
    ids = noise(random, examples, length)
    labels, distance = unscored(examples, length)
    taken = np.zeros((examples, length), dtype=bool)
    rows = np.arange(examples)
    slots = random.permuted(np.tile(np.arange(SLOTS), (examples, 1)), axis=1)[:, :num_writes]
    values = random.integers(num_values, size=(examples, num_writes))
    written = np.full((examples, num_writes), -1)
    for i in range(num_writes):
        for _ in range(16):  # tries to find room
            guess = random.integers(length - 1 - apart_from[0], size=examples)
            free = (written[:, i] < 0) & ~taken[rows, guess]
            written[free, i] = guess[free]
        row = rows[written[:, i] >= 0]
        at = written[row, i]
        ids[row, at], taken[row, at] = WRITES[slots[row, i] * SLOT_VALUES + values[row, i]], True
    for _ in range(num_reads):
        for i in range(num_writes):
            apart = random.choice(apart_from, size=examples)
            at = written[:, i] + apart
            row = rows[(written[:, i] >= 0) & (at < length - 1)]
            row = row[~taken[row, at[row]]]
            at, apart = at[row], apart[row]
            ids[row, at], taken[row, at] = READS[slots[row, i]], True
            labels[row, at + 1], distance[row, at + 1] = ANSWERS[values[row, i]], apart
    return dataset(ids, labels, distance)


def passkey(
    examples: int, length: int, *, distances: Sequence[int], digits: int = 5, seed: int = 0, split: str = "train"
) -> Dataset:
    """A number hidden in filler text, asked for at the end (Mohtashami and Jaggi 2023, section 4.2, in bytes).

    The text is sentences without meaning; "The pass key is:12345." stands so that each digit is shown exactly one of
    `distances` tokens before it is scored in the last words, "What is the pass key? The pass key is:12345". Chance is
    1 / 10 for each digit.

    distances: from 40 + digits, where the question follows at once, to length - digits - 17. digits: 1 to 18.

    Raises ValueError for an argument outside these limits.
    """
    check("examples", examples, 1)
    check("digits", digits, 1, 18)
    shown, asked = b" The pass key is:", b" What is the pass key? The pass key is:"
    shortest, longest = len(asked) + digits + 1, length - digits - len(shown)
    apart_from = choices(distances, shortest, longest, f"with length {length} and {digits} digits")
    random = generator(seed, split, "passkey")
    sentence = np.frombuffer(
        b"The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. ", dtype=np.uint8
    )
    turn = random.integers(0, len(sentence), size=(examples, 1))
    ids = sentence[(np.arange(length) + turn) % len(sentence)].astype(np.int64)
    number = random.integers(ord("0"), ord("9") + 1, size=(examples, digits))
    apart = random.choice(apart_from, size=examples)
    rows = np.arange(examples)[:, None]
    end = length - digits + np.arange(digits)  # (digits,) columns of the answer
    ids[:, length - digits - len(asked) : length - digits] = np.frombuffer(asked, dtype=np.uint8)
    ids[:, end] = number
    first = (length - digits - apart)[:, None]  # (examples, 1) column of the first digit shown
    ids[rows, first + np.arange(digits)] = number
    ids[rows, first - len(shown) + np.arange(len(shown))] = np.frombuffer(shown, dtype=np.uint8)
    ids[rows, first + digits] = ord(".")
    labels, distance = unscored(examples, length)
    labels[:, end], distance[:, end] = number, apart[:, None]
    return dataset(ids, labels, distance)


LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", dtype=np.uint8)
CAPITALS = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ", dtype=np.uint8)


def verbatim_copy(
    examples: int,
    length: int,
    *,
    distances: Sequence[int],
    num_symbols: int = 8,
    alphabet: int = 26,
    seed: int = 0,
    split: str = "train",
) -> Dataset:
    """A string to be repeated word for word after a delay: the copy task of Graves et al. 2014 (Neural Turing
    Machines, section 4.1) in letters.

    The string stands in brackets, "[qwerty]", in noise, so that each letter is shown exactly one of `distances` tokens
    before it is scored in the last words, "=qwerty". Chance is 1 / alphabet for each letter.

    distances: from num_symbols + 2, where the question follows at once, to length - num_symbols - 1. num_symbols: 1 or
    more. alphabet: 2 to 26 letters, from a on. Noise is " .,-".

    Raises ValueError for an argument outside these limits.
    """
    check("examples", examples, 1)
    check("num_symbols", num_symbols, 1)
    check("alphabet", alphabet, 2, len(LETTERS))
    apart_from = choices(
        distances, num_symbols + 2, length - num_symbols - 1, f"with length {length} and {num_symbols} symbols"
    )
    random = generator(seed, split, "verbatim_copy")
    ids = noise(random, examples, length)
    symbols = random.choice(LETTERS[:alphabet], size=(examples, num_symbols))
    apart = random.choice(apart_from, size=examples)
    rows = np.arange(examples)
    end = length - num_symbols + np.arange(num_symbols)  # (num_symbols,) columns of the answer
    shown = end - apart[:, None]  # (examples, num_symbols)
    ids[rows, shown[:, 0] - 1], ids[rows, shown[:, -1] + 1] = ord("["), ord("]")
    ids[rows[:, None], shown] = symbols
    ids[:, end[0] - 1], ids[:, end] = ord("="), symbols
    labels, distance = unscored(examples, length)
    labels[:, end], distance[:, end] = symbols, apart[:, None]
    return dataset(ids, labels, distance)


def selective_copy(
    examples: int, length: int, *, num_symbols: int = 8, alphabet: int = 26, seed: int = 0, split: str = "train"
) -> Dataset:
    """Capitals among small letters and noise, to be listed in their order at the end: the selective copying of Gu and
    Dao 2023 (Mamba, section 4.1.1), with small letters as distractors.

    num_symbols capitals are spread over the example, drawn with repetition; the last words, "=" and the capitals, are
    scored. The distance differs from letter to letter. Chance is 1 / alphabet for each letter.

    length: 2 num_symbols + 1 or more. num_symbols: 1 or more. alphabet: 2 to 26 letters, from A on. Half of the rest
    are small letters, half " .,-".

    Raises ValueError for an argument outside these limits.
    """
    check("examples", examples, 1)
    check("num_symbols", num_symbols, 1)
    check("alphabet", alphabet, 2, len(CAPITALS))
    check("length", length, 2 * num_symbols + 1)
    random = generator(seed, split, "selective_copy")
    small = random.choice(LETTERS[:alphabet], size=(examples, length))
    ids = np.where(random.random((examples, length)) < 0.5, small, noise(random, examples, length))
    symbols = random.choice(CAPITALS[:alphabet], size=(examples, num_symbols))
    shown = scattered(random, examples, num_symbols, 1, length - num_symbols - 1)
    end = length - num_symbols + np.arange(num_symbols)
    ids[np.arange(examples)[:, None], shown] = symbols
    ids[:, end[0] - 1], ids[:, end] = ord("="), symbols
    labels, distance = unscored(examples, length)
    labels[:, end], distance[:, end] = symbols, end - shown
    return dataset(ids, labels, distance)
