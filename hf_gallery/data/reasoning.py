"""Tasks that ask a model to compute over a long input, not only to find something in it. All are made from seeds, on
ids of the byte tokenizer, as hf_gallery.data.examples describes, and all ids are ASCII.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from random import Random

import numpy as np
from datasets import Dataset

from .examples import check, dataset, generator, noise, scattered, unscored

OPERATORS: dict[str, Callable[[list[int]], int]] = {
    "MAX": max,
    "MIN": min,
    "MED": lambda values: _median(sorted(values)),
    "SM": lambda values: sum(values) % 10,
}


def _median(ordered: list[int]) -> int:
    """The median; of an even number the mean of the middle two, rounded down, as int(numpy.median(...)) has it."""
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) // 2


def listops(
    examples: int,
    length: int,
    *,
    shortest: int | None = None,
    max_depth: int = 10,
    max_args: int = 10,
    seed: int = 0,
    split: str = "train",
) -> Dataset:
    """Nested operations on digits, "[MAX 4 3 [MIN 2 3] 1 0]=4", by the rules of Long Range Arena (Tay et al. 2020,
    section 2.1; lra_benchmarks/data/listops.py): the maximum, minimum, median or sum modulo 10 of 2 to max_args
    arguments, each a digit or, with probability 1/4 above depth max_depth, another operation.

    Long Range Arena keeps expressions of more than 500 and fewer than 2,000 symbols; here a text with "=" and the
    answer has `shortest` (default half of length) to length bytes, and stands at the end of an example after spaces.
    The last column is scored. Its distance counts from the bracket that opens the expression.

    The answers are not evenly frequent: who always gives the most frequent one is right in about one of six; see
    hf_gallery.data.chance.

    length: 11 or more. shortest: 10 to length. max_depth: 2 to 20, max_args: 2 to 10.

    Raises ValueError for an argument outside these limits, and where these rules hardly ever give such lengths.
    """
    check("examples", examples, 1)
    check("length", length, 11)
    shortest = max(10, length // 2) if shortest is None else shortest
    check("shortest", shortest, 10, length)
    check("max_depth", max_depth, 2, 20)
    check("max_args", max_args, 2, 10)
    random = Random(int(generator(seed, split, "listops").integers(2**62)))  # one number at a time: faster than numpy
    ids = np.full((examples, length), ord(" "), dtype=np.int64)
    labels, distance = unscored(examples, length)
    for row in range(examples):
        for _ in range(100_000):
            text, value = _operation(random, max_depth - 1, max_args, length - 2)
            if shortest - 2 <= len(text) <= length - 2:
                break
        else:
            raise ValueError(
                f"max_depth {max_depth} and max_args {max_args} hardly ever make an expression of {shortest} to "
                f"{length} bytes; allow a smaller `shortest`, or raise them"
            )
        text = f"{text}={value}"
        ids[row, length - len(text) :] = np.frombuffer(text.encode(), dtype=np.uint8)
        labels[row, -1], distance[row, -1] = ids[row, -1], len(text) - 1
    return dataset(ids, labels, distance)


def _operation(random: Random, depth: int, max_args: int, room: int) -> tuple[str, int]:
    """Text and value of an operation with `depth` levels left, its own included. A text that grows beyond `room` bytes
    is not drawn to its end."""
    name = tuple(OPERATORS)[int(random.random() * 4)]
    text, values = f"[{name}", []
    for _ in range(2 + int(random.random() * (max_args - 1))):
        if depth > 1 and random.random() < 0.25:
            inner, value = _operation(random, depth - 1, max_args, room - len(text))
        else:
            value = int(random.random() * 10)
            inner = str(value)
        values.append(value)
        text += f" {inner}"
        if len(text) > room:
            break
    return text + "]", OPERATORS[name](values)


NAMES = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz", dtype=np.uint8)
DIGITS = np.frombuffer(b"0123456789", dtype=np.uint8)


def variable_tracking(
    examples: int,
    length: int,
    *,
    hops: int = 2,
    num_chains: int = 4,
    num_questions: int = 1,
    seed: int = 0,
    split: str = "train",
) -> Dataset:
    """Assignments to be followed from variable to variable: "Q=5;" ... "b=Q;" ... "K=b;" ... "?K=5", after RULER's
    variable tracking (Hsieh et al. 2024, section 3).

    num_chains chains, each of a variable set to a digit and `hops` more, each set to the one before, are spread over
    the example; a chain's own assignments stand in order, those of all chains are mixed, and noise is between them. At
    the end num_questions of the chains are asked for the value of their last variable, and the answers are scored; the
    other chains distract. The distance counts from where the value was assigned.

    Chance: the digits are drawn evenly, so that a blind guess is right in 1 of 10; who takes any digit in sight is
    right more often, 1 / num_chains + (1 - 1 / num_chains) / 10.

    length: 4 num_chains (hops + 1) + 4 num_questions or more. hops: 0 or more. num_chains: 1 or more, num_questions: 1
    to num_chains; num_chains (hops + 1) at most 52, the letters. Noise is " .,-".

    Raises ValueError for an argument outside these limits.
    """
    check("examples", examples, 1)
    check("hops", hops, 0, len(NAMES) - 1)
    check("num_chains", num_chains, 1, len(NAMES) // (hops + 1))
    check("num_questions", num_questions, 1, num_chains)
    count = num_chains * (hops + 1)
    check("length", length, 4 * (count + num_questions))
    random = generator(seed, split, "variable_tracking")
    ids = noise(random, examples, length)
    labels, distance = unscored(examples, length)
    rows = np.arange(examples)
    names = random.permuted(np.tile(NAMES, (examples, 1)), axis=1)[:, :count].reshape(examples, num_chains, hops + 1)
    values = random.choice(DIGITS, size=(examples, num_chains))
    sources = np.concatenate([values[:, :, None], names[:, :, :-1]], axis=2)
    start = scattered(random, examples, count, 4, length - 4 * num_questions)
    chain = random.permuted(np.tile(np.repeat(np.arange(num_chains), hops + 1), (examples, 1)), axis=1)
    done = np.zeros((examples, num_chains), dtype=np.int64)  # assignments of each chain so far
    set_at = np.zeros((examples, num_chains), dtype=np.int64)  # column of its value
    for i in range(count):
        which, at = chain[:, i], start[:, i]
        hop = done[rows, which]
        _put(ids, at, names[rows, which, hop], ord("="), sources[rows, which, hop], ord(";"))
        set_at[rows, which] = np.where(hop == 0, at + 2, set_at[rows, which])
        done[rows, which] += 1
    for question in range(num_questions):  # the chains' order is random as it is
        at = np.full(examples, length - 4 * (num_questions - question))
        _put(ids, at, ord("?"), names[:, question, -1], ord("="), values[:, question])
        labels[rows, at + 3], distance[rows, at + 3] = values[:, question], at + 3 - set_at[:, question]
    return dataset(ids, labels, distance)


def _put(ids: np.ndarray, at: np.ndarray, *characters: np.ndarray | int):
    """Writes characters, each an id or one for each row, into every row of ids from column `at` (examples,) on."""
    columns = at[:, None] + np.arange(len(characters))
    ids[np.arange(len(ids))[:, None], columns] = np.stack(np.broadcast_arrays(at, *characters)[1:], axis=1)


def permutation_composition(
    examples: int, length: int, *, size: int = 5, num_questions: int = 1, seed: int = 0, split: str = "train"
) -> Dataset:
    """Things that swap places, and where one of them is in the end: the word problem of the permutations of `size`
    things. For five, no model of fixed depth without recurrence is thought to solve all lengths (Merrill et al. 2024,
    The illusion of state, section 4); attention finds shortcuts for three (Liu et al. 2023, Transformers learn
    shortcuts to automata).

    Thing 1 starts in place 1, and so on. Each letter is a step: "a" leaves all as they are, "b" and the letters after
    it swap what is in places 1 and 2, 1 and 3, ..., 2 and 3, ... "?3" asks for the place of thing 3 at this moment;
    the digit is scored in the column after it, and does not stand in the input. One question stands at the very end,
    and num_questions - 1 anywhere before. The distance counts from the first column, as all steps matter.

    Chance is 1 / size once there were more than a few steps.

    length: 3 num_questions or more; length - 2 num_questions - 1 of its columns are steps before the last question.
    size: 2 to 7. num_questions: 1 or more.

    Raises ValueError for an argument outside these limits.
    """
    check("examples", examples, 1)
    check("size", size, 2, 7)
    check("num_questions", num_questions, 1)
    check("length", length, 3 * num_questions)
    random = generator(seed, split, "permutation_composition")
    swaps = np.array([(0, 0), *combinations(range(size), 2)])
    steps = random.integers(len(swaps), size=(examples, length))
    ids = steps + ord("a")
    labels, distance = unscored(examples, length)
    rows = np.arange(examples)
    last = np.full((examples, 1), length - 3)
    asked = np.concatenate([scattered(random, examples, num_questions - 1, 3, length - 3), last], axis=1)
    thing = random.integers(size, size=asked.shape)
    is_step = np.ones((examples, length), dtype=bool)
    ids[rows[:, None], asked], ids[rows[:, None], asked + 1] = ord("?"), thing + ord("1")
    is_step[rows[:, None], asked] = is_step[rows[:, None], asked + 1] = False
    place_of = np.tile(np.arange(size), (examples, 1))  # of each thing
    for column in range(length):
        row, question = np.nonzero(asked + 2 == column)
        labels[row, column], distance[row, column] = place_of[row, thing[row, question]] + ord("1"), column
        first, second = swaps[np.where(is_step[:, column], steps[:, column], 0)].T[:, :, None]
        place_of = np.where(place_of == first, second, np.where(place_of == second, first, place_of))
    return dataset(ids, labels, distance)
