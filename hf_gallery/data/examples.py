"""Parts of all synthetic tasks: how an example is drawn, kept, and read as a text with a question.

An example is a row of a datasets.Dataset with the columns input_ids, labels and distance, each a list of `length` int.
As in transformers, labels[t] is what column t - 1 is to predict where it is scored and -100 elsewhere; distance[t]
counts the tokens from where the (first) thing that the answer needs was shown to where it is asked for, and is -1
where nothing is scored. All ids are bytes, below 256, but those of the tasks in mqar.py and mad.py: they are numbers
in a vocabulary of each task's own.

What all tasks take: `examples` rows of `length` tokens; `seed` (0 or more) and `split` ("train", "validation" or
"test"), of which each pair has random numbers of its own. The same arguments give the same data in every process.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from datasets import Dataset, Features, Value

SPLITS = {"train": 0, "validation": 1, "test": 2}
NOISE = np.frombuffer(b" .,-", dtype=np.uint8)


def questions(data: Dataset, *, last: bool = False) -> Dataset:
    """The questions of a task's examples as text, as lm-eval asks them.

    A row for each answer, in the order of the examples: `context`, what stands before the answer; `target`, the
    answer, one character or more; `distance`, as in the example, of the answer's first character. An answer is a run
    of scored columns that stand in the input as well; where they do not (slot_recall, permutation_composition), each
    scored column is one. last=True keeps only the last of each example. Characters are the ids of the byte tokenizer.
    No context ends in white space, which lm-eval would count among the answer.

    Raises ValueError for ids that are no printable ASCII: associative_recall makes text if asked for (printable=True),
    the tasks of mqar.py and mad.py never do.
    """
    columns = data.with_format("numpy")
    ids, labels, distance = (columns[name][:] for name in ("input_ids", "labels", "distance"))
    if len(ids) and ids.max() >= 128:
        raise ValueError(f"input_ids holds {ids.max()}, which is not ASCII; make the examples with printable=True")
    if len(ids) and ids.min() < 32:
        raise ValueError(f"input_ids holds {ids.min()}, which is no character; this task's examples are no text")
    scored = labels >= 0
    goes_on = scored[:, 1:] & scored[:, :-1] & (labels[:, :-1] == ids[:, :-1])  # from one column to the next
    begins, ends = scored.copy(), scored.copy()
    begins[:, 1:] &= ~goes_on
    ends[:, :-1] &= ~goes_on
    found: dict[str, list] = {"context": [], "target": [], "distance": []}
    starts, stops = np.argwhere(begins), np.argwhere(ends)[:, 1] + 1
    if last:
        is_last = np.append(starts[1:, 0] != starts[:-1, 0], True)[: len(starts)]
        starts, stops = starts[is_last], stops[is_last]
    for (row, start), stop in zip(starts, stops, strict=True):
        found["context"].append(ids[row, :start].astype(np.uint8).tobytes().decode("ascii"))
        found["target"].append(labels[row, start:stop].astype(np.uint8).tobytes().decode("ascii"))
        found["distance"].append(int(distance[row, start]))
    features = Features({"context": Value("string"), "target": Value("string"), "distance": Value("int64")})
    return Dataset.from_dict(found, features=features)


def generator(seed: int, split: str, task: str) -> np.random.Generator:
    """A stream of its own for each seed, split and task, so that no test example was ever trained on by its seed."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
    check("seed", seed, 0)
    return np.random.default_rng([seed, SPLITS[split], *task.encode()])


def check(name: str, value: int, least: int, most: int | None = None):
    """Raises ValueError unless value is a whole number from least to most."""
    if not isinstance(value, (int, np.integer)) or value < least or (most is not None and value > most):
        bounds = f"at least {least}" + (f" and at most {most}" if most is not None else "")
        raise ValueError(f"{name} is {value!r}; it must be a whole number of {bounds}")


def choices(distances: Sequence[int], least: int, most: int, where: str) -> np.ndarray:
    """The distances to draw from, each once, in rising order. Raises ValueError for one outside of least to most."""
    if isinstance(distances, (int, np.integer)):
        raise ValueError(f"distances is {distances}; give a list of distances, [{distances}]")
    found = sorted(set(distances))
    whole = all(isinstance(d, (int, np.integer)) for d in found)
    if not found or not whole or found[0] < least or found[-1] > most:
        room = f"whole numbers from {least} to {most}" if most >= least else "longer examples: none fits"
        raise ValueError(f"distances are {found}; {where} they need {room}")
    return np.asarray(found, dtype=np.int64)


def scattered(random: np.random.Generator, examples: int, pieces: int, size: int, room: int) -> np.ndarray:
    """First columns of `pieces` pieces of `size` columns, in order, spread at random over `room` columns without
    overlap: (examples, pieces)."""
    gaps = np.sort(random.integers(room - pieces * size + 1, size=(examples, pieces)), axis=1)
    return gaps + size * np.arange(pieces)


def distinct(random: np.random.Generator, shape: tuple[int, ...], below: int) -> np.ndarray:
    """Numbers from 0 on and below `below`, no two alike along the last axis, every order of every choice of them alike
    (Floyd's algorithm, which draws no more than it returns): an array of that shape."""
    found = np.full(shape, -1, dtype=np.int64)
    count = shape[-1]
    for i in range(count):
        last = below - count + i
        drawn = random.integers(last + 1, size=shape[:-1])
        known = (found == drawn[..., None]).any(-1)
        found[..., i] = np.where(known, last, drawn)
    return random.permuted(found, axis=-1)


def noise(random: np.random.Generator, examples: int, length: int) -> np.ndarray:
    """Characters without meaning, (examples, length) int64."""
    return random.choice(NOISE, size=(examples, length)).astype(np.int64)


def unscored(examples: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """labels and distance of examples in which nothing is scored yet, (examples, length) each."""
    return np.full((examples, length), -100, dtype=np.int64), np.full((examples, length), -1, dtype=np.int64)


def dataset(ids: np.ndarray, labels: np.ndarray, distance: np.ndarray) -> Dataset:
    """Examples as all tasks return them; three arrays of (examples, length)."""
    return Dataset.from_dict({"input_ids": list(ids), "labels": list(labels), "distance": list(distance)})
