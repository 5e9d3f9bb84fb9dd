"""MQAR and the six tasks of MAD keep their papers' rules: every label follows from the sequence by the rule alone, as
found by a reader who goes through it token by token; gaps, noise and sizes have the distributions that are told; the
vocabularies are the papers'; and splits share nothing."""

import itertools

import numpy as np
import pytest
from scipy.stats import chisquare

from hf_gallery.data import TASKS, chance, mad_fuzzy_recall, mad_memorization, mad_noisy_recall, mqar, questions
from hf_gallery.data.examples import SPLITS, distinct
from hf_gallery.harness import score

# ------------------------------------------------------------------------------------------------------------- readers
# From a sequence (a list of ids) and the arguments: {column: (answer, distance)} of everything that is asked.


def read_mqar(ids, vocab_size=8192, num_kv_pairs=8, random_non_queries=True, **_):
    shown = {ids[2 * i]: (ids[2 * i + 1], 2 * i) for i in range(num_kv_pairs)}
    assert len(shown) == len({value for value, _ in shown.values()}) == num_kv_pairs
    assert all(0 < key < vocab_size // 2 <= value < vocab_size for key, (value, _) in shown.items())
    after = range(2 * num_kv_pairs, len(ids), 2)
    if random_non_queries:  # then a key may stand where nobody asks
        return {t + 1: (shown[ids[t]][0], t - shown[ids[t]][1]) for t in after if ids[t] in shown}
    assert all(ids[t + 1] == 0 and (ids[t] == 0 or ids[t] in shown) for t in after)
    return {t + 1: (shown[ids[t]][0], t - shown[ids[t]][1]) for t in after if ids[t]}


def read_recall(ids, vocab_size=16, noise_vocab_size=0, **_):
    used, last, found = vocab_size - noise_vocab_size, {}, {}
    for t in range(0, len(ids), 2):
        key, value = ids[t], ids[t + 1]
        if key >= used:
            assert used <= key < vocab_size and used <= value < vocab_size
            continue
        assert key < used // 2 <= value < used
        if key in last:
            assert last[key][0] == value
            found[t + 1] = value, t + 1 - last[key][1]
        last[key] = value, t + 1
    assert len(ids) - 1 in found
    return found


def read_noisy(ids, vocab_size=32, noise_vocab_size=16, **_):
    return read_recall(ids, vocab_size, noise_vocab_size)


def read_fuzzy(ids, vocab_size=16, key_size=3, value_size=3, **_):
    pad, keys = vocab_size - 1, (vocab_size - 1) // 2
    text = list(itertools.dropwhile(lambda x: x == pad, ids))
    start, last, found = len(ids) - len(text), {}, {}
    assert start >= 2 and pad not in text
    runs = [list(run) for _, run in itertools.groupby(text, key=lambda x: x < keys)]
    column = start
    for key, value in zip(runs[::2], runs[1::2], strict=True):
        assert len(set(key)) == len(key) <= key_size and len(set(value)) == len(value) <= value_size
        column += len(key)
        if tuple(key) in last:
            before, where = last[tuple(key)]
            assert before == value
            found |= {column + i: (value[i], column - where) for i in range(len(value))}
        last[tuple(key)] = value, column
        column += len(value)
    assert column == len(ids) and column - 1 in found
    return found


def read_compression(ids, vocab_size=16, **_):
    assert ids[-1] == vocab_size - 1 and max(ids[:-1]) < vocab_size - 1
    return {t: (ids[t], len(ids) - 1 - t) for t in range(len(ids) - 1)}


def read_facts(ids, vocab_size=256, facts_seed=0, **_):
    ask, keys = vocab_size - 1, (vocab_size - 1) // 2
    assert len(ids) % 2 == 1 and set(ids[1::2]) == {ask} and ids[-1] == ask and max(ids[:-1:2]) < keys
    return {t + 2: (FACTS[facts_seed, vocab_size][ids[t]], 1) for t in range(0, len(ids) - 1, 2)}


def read_copy(ids, vocab_size=16, num_tokens_to_copy=16, **_):
    blank, copy = vocab_size - 2, vocab_size - 1
    asked = ids.index(copy)
    tokens = [(t, x) for t, x in enumerate(ids[:asked]) if x != blank]
    assert len(tokens) == num_tokens_to_copy and ids[asked + 1 :] == [blank] * (num_tokens_to_copy + 1)
    assert tokens[-1][0] == asked - 1 and copy not in ids[:asked]
    return {asked + 2 + i: (x, asked + 2 + i - t) for i, (t, x) in enumerate(tokens)}


def facts_of(vocab_size, facts_seed):
    """What the training examples tell of each key."""
    data = mad_memorization(60, 101, vocab_size=vocab_size, facts_seed=facts_seed, seed=9)
    ids, labels = np.array(data["input_ids"]), np.array(data["labels"])
    pairs = set(zip(ids[:, :-1:2].ravel().tolist(), labels[:, 2::2].ravel().tolist(), strict=True))
    found = dict(pairs)
    assert len(found) == len(pairs) == len(set(found.values())) == (vocab_size - 1) // 2
    assert set(found.values()) <= set(range((vocab_size - 1) // 2, vocab_size - 1))
    return found


FACTS = {(seed, size): facts_of(size, seed) for seed in (0, 1) for size in (16, 33)}

# name: [(reader, arguments)...]
CASES = {
    "mqar": (
        read_mqar,
        [
            dict(length=64, num_kv_pairs=4, random_non_queries=False),
            dict(length=64, vocab_size=100, num_kv_pairs=16, random_non_queries=False),
            dict(length=48, vocab_size=90, num_kv_pairs=5, power_a=1.0),
        ],
    ),
    "mad_recall": (read_recall, [dict(length=128), dict(length=32, vocab_size=33)]),
    "mad_noisy_recall": (
        read_noisy,
        [dict(length=128), dict(length=40, frac_noise=0.8), dict(length=64, vocab_size=23, noise_vocab_size=3)],
    ),
    "mad_fuzzy_recall": (
        read_fuzzy,
        [dict(length=129), dict(length=40, vocab_size=11, key_size=2, value_size=4), dict(length=19)],
    ),
    "mad_compression": (read_compression, [dict(length=32), dict(length=9, vocab_size=5)]),
    "mad_memorization": (
        read_facts,
        [dict(length=33, vocab_size=16), dict(length=11, vocab_size=33, facts_seed=1)],
    ),
    "mad_selective_copy": (
        read_copy,
        [dict(length=257), dict(length=30, vocab_size=5, num_tokens_to_copy=3), dict(length=35)],
    ),
}
over_cases = pytest.mark.parametrize(
    ("name", "arguments"), [(name, arguments) for name, (_, several) in CASES.items() for arguments in several]
)


def columns(data):
    return tuple(np.array(data[name]) for name in ("input_ids", "labels", "distance"))


@over_cases
@pytest.mark.parametrize("split", SPLITS)
def test_every_label_follows_from_the_sequence(name, arguments, split):
    ids, labels, distance = columns(TASKS[name](30, **arguments, split=split, seed=3))
    assert ids.shape == labels.shape == distance.shape == (30, arguments["length"])
    assert ids.min() >= 0
    for row in range(30):
        expected = CASES[name][0](ids[row].tolist(), **arguments)
        asked = {
            t: (int(labels[row, t]), int(distance[row, t])) for t in range(ids.shape[1]) if labels[row, t] != -100
        }
        if arguments.get("random_non_queries", name == "mqar" and arguments.get("power_a") == 1.0):
            assert len(asked) == arguments["num_kv_pairs"] and asked.items() <= expected.items()
        else:
            assert asked == expected
        assert [t for t in range(ids.shape[1]) if distance[row, t] != -1] == sorted(asked)


@pytest.mark.parametrize("name", CASES)
def test_seeds_and_splits_share_no_example(name):
    """Of what each task is in its paper: of the smallest sequences there are too few."""
    arguments = CASES[name][1][0]
    made = [
        tuple(row)
        for seed in (0, 1)
        for split in SPLITS
        for row in TASKS[name](20, **arguments, seed=seed, split=split)["input_ids"]
    ]
    again = TASKS[name](20, **arguments, seed=0, split="train")["input_ids"]
    assert [tuple(row) for row in again] == made[:20]
    assert len(set(made)) == len(made)


@pytest.mark.parametrize("name", ["mad_recall", "mad_noisy_recall", "mad_fuzzy_recall"])
def test_every_token_can_be_a_label(name):
    """As the official code trains; the examples and what is asked in them are the same."""
    plain, whole = (columns(TASKS[name](9, 64, every_token=every)) for every in (False, True))
    np.testing.assert_array_equal(plain[0], whole[0])
    np.testing.assert_array_equal(plain[2], whole[2])
    np.testing.assert_array_equal(whole[1][:, 1:], whole[0][:, 1:])
    assert (whole[1][:, 0] == -100).all()
    asked = plain[2] != -1
    np.testing.assert_array_equal(whole[1][asked], plain[1][asked])


# ------------------------------------------------------------------------------------------------------- distributions


@pytest.mark.parametrize("power_a", [0.01, 0.5, 1.0])
def test_gaps_follow_the_power_law(power_a):
    """Of one pair each slot is drawn in proportion to i ** (power_a - 1); of several without replacement, as numpy's
    own choice draws them."""
    examples, slots = 4000, 15
    _, labels, _ = columns(mqar(examples, 32, vocab_size=64, num_kv_pairs=1, power_a=power_a))
    found = np.bincount((np.nonzero(labels >= 0)[1] - 3) // 2, minlength=slots)
    weights = np.arange(1, slots + 1) ** (power_a - 1)
    assert chisquare(found, examples * weights / weights.sum()).pvalue > 1e-3
    _, labels, _ = columns(mqar(examples, 32, vocab_size=64, num_kv_pairs=4, power_a=power_a))
    taken = (labels[:, 9::2] >= 0).mean(axis=0)  # of 12 slots
    assert ((labels >= 0).sum(axis=1) == 4).all()
    weights = np.arange(1, 13) ** (power_a - 1)
    random = np.random.default_rng(0)
    drawn = np.zeros(12)
    for _ in range(examples):
        drawn[random.choice(12, size=4, replace=False, p=weights / weights.sum())] += 1 / examples
    np.testing.assert_allclose(taken, drawn, atol=5 * 0.5 / examples**0.5 * 2**0.5)


def test_other_columns_of_mqar_are_any_id():
    ids, labels, _ = columns(mqar(500, 64, vocab_size=80, num_kv_pairs=4))
    free = np.ones_like(ids, dtype=bool)
    free[:, :8] = False
    free[:, :-1] &= labels[:, 1:] < 0  # no question
    assert chisquare(np.bincount(ids[free], minlength=80)).pvalue > 1e-3


@pytest.mark.parametrize("share", [0.0, 0.2, 0.8])
def test_noise_has_its_share(share):
    """Of all pairs but the last and one that is spared; noise, keys and values are drawn evenly."""
    examples, slots = 600, 32
    ids, _, _ = columns(mad_noisy_recall(examples, 2 * slots, frac_noise=share))
    is_noise = ids[:, 0::2] >= 16
    np.testing.assert_array_equal(is_noise, ids[:, 1::2] >= 16)
    assert not is_noise[:, -1].any() and (is_noise.sum(axis=1) < slots - 1).all()
    expected = share * (slots - 2)
    assert abs(is_noise.sum(axis=1).mean() - expected) < 5 * (slots * 0.25 / examples) ** 0.5
    assert np.ptp(is_noise[:, :-1].mean(axis=0)) < 10 * (0.25 / examples) ** 0.5  # anywhere alike
    if share:
        assert chisquare(np.bincount(ids[:, ::2][is_noise] - 16, minlength=16)).pvalue > 1e-3
    assert chisquare(np.bincount(ids[:, :-2:2][~is_noise[:, :-1]], minlength=8)).pvalue > 1e-3


def test_fuzzy_sizes():
    """All sizes in training, the longest keys in tests."""
    for split, sizes in (("train", {1, 2, 3}), ("validation", {3}), ("test", {3})):
        ids, _, _ = columns(mad_fuzzy_recall(60, 129, split=split))
        found = {True: [], False: []}
        for row in ids.tolist():
            for is_key, run in itertools.groupby([x for x in row if x != 15], key=lambda x: x < 7):
                found[is_key].append(len(list(run)))
        assert set(found[True]) == sizes and set(found[False]) == {1, 2, 3}
        for kind in [found[False]] + [found[True]] * (split == "train"):
            assert min(np.bincount(kind)[1:]) > 0.8 * len(kind) / 3


def test_distinct_numbers():
    """Every ordered choice as often as any other."""
    found = distinct(np.random.default_rng(0), (6000, 2), 4)
    counts = np.bincount(found[:, 0] * 4 + found[:, 1], minlength=16).reshape(4, 4)
    assert counts.trace() == 0 and chisquare(counts[~np.eye(4, dtype=bool)]).pvalue > 1e-3
    whole = np.sort(distinct(np.random.default_rng(0), (7, 5, 6), 6), axis=-1)
    np.testing.assert_array_equal(whole, np.broadcast_to(np.arange(6), whole.shape))


def test_chance_is_the_share_of_each_answer():
    """Answers are drawn evenly, and all that there are come."""
    for name, (_, several) in CASES.items():
        arguments = several[-1]
        _, labels, _ = columns(TASKS[name](600, **arguments))
        counts = np.unique(labels[labels >= 0], return_counts=True)[1]
        share = chance(name, **arguments)
        assert len(counts) == round(1 / share), name
        assert counts.max() < 1.3 * share * counts.sum() + 20, name
    assert chance("mqar", length=64) == 1 / 4096 and chance("mad_noisy_recall", length=64) == 1 / 8


# -------------------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        *((name, {"length": 0}, r"length is 0; it must be a whole number of at least \d+") for name in CASES),
        *((name, {"seed": -1}, r"seed is -1") for name in CASES),
        *((name, {"split": "dev"}, r"split is 'dev'") for name in CASES),
        *((name, {"examples": 0}, r"examples is 0") for name in CASES),
        *((name, {"vocab_size": 2}, r"vocab_size is 2; .* at least \d+") for name in CASES),
        ("mqar", {"length": 31}, r"length is 31; .* at least 32"),
        ("mqar", {"length": 33}, r"length is 33; .* give an even number"),
        ("mqar", {"vocab_size": 64}, r"vocab_size is 64; .* at least 65"),
        ("mqar", {"power_a": 0}, r"power_a is 0; it must be above 0 and at most 1"),
        ("mad_recall", {"length": 33}, r"length is 33; .* give an even number"),
        ("mad_noisy_recall", {"vocab_size": 19}, r"vocab_size is 19; .* at least 20"),
        ("mad_noisy_recall", {"noise_vocab_size": 0}, r"noise_vocab_size is 0; .* at least 1"),
        ("mad_noisy_recall", {"frac_noise": 1}, r"frac_noise is 1; it must be from 0 on and below 1"),
        ("mad_fuzzy_recall", {"key_size": 8}, r"key_size is 8; .* at most 7"),
        ("mad_fuzzy_recall", {"value_size": 9}, r"value_size is 9; .* at most 8"),
        ("mad_fuzzy_recall", {"key_size": 1.5}, r"key_size is 1\.5; it must be a whole number"),
        ("mad_fuzzy_recall", {"length": 18}, r"length is 18; .* at least 19"),
        ("mad_memorization", {"length": 32}, r"length is 32; .* give an odd number"),
        ("mad_memorization", {"facts_seed": -1}, r"facts_seed is -1"),
        ("mad_selective_copy", {"length": 34}, r"length is 34; .* at least 35"),
        ("mad_selective_copy", {"num_tokens_to_copy": 0}, r"num_tokens_to_copy is 0"),
    ],
)
def test_limits(name, arguments, message):
    given = {"examples": 2, "length": 65 if name in ("mad_fuzzy_recall", "mad_memorization") else 64} | arguments
    with pytest.raises(ValueError, match=message):
        TASKS[name](given.pop("examples"), given.pop("length"), **given)


@pytest.mark.parametrize("name", CASES)
def test_token_ids_are_not_read_as_text(name):
    """lm-eval would take an id of 10 for the end of a line."""
    with pytest.raises(ValueError, match=r"input_ids holds \d+, which is "):
        questions(TASKS[name](9, **CASES[name][1][0]))
    with pytest.raises(ValueError, match=r"task is .*whose tokens are no text: python -m eval asks it"):
        score(None, {"easy": (name, CASES[name][1][0])}, examples=2)
