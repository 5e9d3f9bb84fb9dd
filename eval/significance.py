"""Confidence intervals and tests, by what is independent.

Stretches of one document resemble each other, and so do questions about one example, so neither counts for itself: a
document or an example is drawn, or changes sides, with all that it holds and in all seeds that read it. Results that
do not say which document or example a number belongs to are counted by stretch or by question, as they were measured,
which makes a difference look surer than it is; `Chance.unit` and `Answers.unit` name what was counted.

Whatever is said is said of the models that were trained, read on other texts: training them anew is not drawn.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import binom, binomtest, bootstrap, chi2_contingency, permutation_test, ttest_rel
from scipy.stats import t as student

SURE = 0.05  # a difference is said to be there where chance alone would give it more rarely than this
RESAMPLES = 9999  # permutations, where there are more than that, and draws of a bootstrap
DOCUMENT, EXAMPLE = "document", "example"
QUESTION, STRETCH, SEED = "question", "stretch", "seed"  # where a result knows no better


@dataclasses.dataclass(frozen=True)
class Chance:
    """The probability that equals differ by as much as was measured, or more.

    unit: what was taken as independent. units: how many of them there were.
    """

    probability: float
    unit: str
    units: int

    @property
    def sure(self) -> bool:
        """Tells whether the difference is more than chance."""
        return self.probability < SURE

    def __str__(self) -> str:
        digits = 3 if self.probability >= 0.1 else 4  # 0.0496 is not 0.05
        rarity = "p < 0.001" if self.probability < 0.001 else f"p = {self.probability:.{digits}f}"
        return rarity if self.unit in (QUESTION, STRETCH) else f"{rarity}, {self.units:,} {self.unit}s"


# ---- right answers


@dataclasses.dataclass(frozen=True)
class Answers:
    """Right answers and questions, together and, where they are known, of each unit that is independent of others."""

    correct: int
    asked: int
    unit: str = QUESTION
    correct_of: tuple[int, ...] = ()
    asked_of: tuple[int, ...] = ()

    @property
    def share(self) -> float:
        """The share of right answers; 0 if nothing was asked."""
        return self.correct / max(1, self.asked)


def by_unit(unit: str, correct: Iterable[int], asked: Iterable[int]) -> dict[str, Any]:
    """A score as JSON holds it: {asked, correct, by_unit}, from right answers and questions of each unit."""
    correct, asked = [int(n) for n in correct], [int(n) for n in asked]
    units = {"unit": unit, "asked": _joined(asked), "correct": _joined(correct)}
    return {"asked": sum(asked), "correct": sum(correct), "by_unit": units}


def _joined(counts: list[int]) -> str:
    return " ".join(map(str, counts))  # one line of a file, where a list would be a line for each number


def answers(score: Mapping[str, Any]) -> Answers:
    """The answers that a score holds. Its units count only if they are units of all that was asked: seeds that were
    measured before units were kept leave the others' incomplete."""
    correct, asked, units = score["correct"], score["asked"], score.get("by_unit")
    if units is not None:
        correct_of, asked_of = (tuple(map(int, units[key].split())) for key in ("correct", "asked"))
        if (sum(correct_of), sum(asked_of)) == (correct, asked):
            return Answers(correct, asked, units["unit"], correct_of, asked_of)
    return Answers(correct, asked)


def pooled(scores: Mapping[str, Mapping[str, Any]]) -> Answers:
    """The answers of several scores together. Where all asked about the same units, say one example at several
    distances, a unit holds its questions of all scores."""
    found = [answers(score) for score in scores.values()]
    correct, asked = sum(a.correct for a in found), sum(a.asked for a in found)
    if len({(a.unit, len(a.asked_of)) for a in found}) != 1 or not found[0].asked_of:
        return Answers(correct, asked)
    correct_of, asked_of = (
        tuple(map(sum, zip(*(getattr(a, name) for a in found), strict=True))) for name in ("correct_of", "asked_of")
    )
    return Answers(correct, asked, found[0].unit, correct_of, asked_of)


def wilson(correct: int, asked: int) -> tuple[float, float]:
    """The 95 % interval of Wilson (1927) for a share of correct answers; (0, 1) if nothing was asked."""
    if not asked:
        return 0.0, 1.0
    interval = binomtest(correct, asked).proportion_ci(0.95, method="wilson")
    return min(correct / asked, float(interval.low)), max(correct / asked, float(interval.high))  # also when rounded


@functools.lru_cache(maxsize=4096)
def interval(found: Answers) -> tuple[float, float]:
    """The 95 % interval of a share of right answers: units are drawn anew (BCa bootstrap). Where they are not known,
    Wilson's by question; and where all units are alike, so that drawing shows no spread, Wilson's with a unit for a
    question."""
    pairs = [(c, n) for c, n in zip(found.correct_of, found.asked_of, strict=True) if n]
    if not pairs:
        return wilson(found.correct, found.asked)
    if len({c / n for c, n in pairs}) > 1:
        low, high = _ratio_interval(*map(np.array, zip(*pairs, strict=True)))
        if np.isfinite((low, high)).all():
            return min(low, found.share), max(high, found.share)
    low, high = wilson(round(found.share * len(pairs)), len(pairs))
    return min(low, found.share), max(high, found.share)


@functools.lru_cache(maxsize=4096)
def answers_differ(first: Answers, second: Answers) -> Chance | None:
    """The chance that two contestants are equally often right; None if either was asked nothing.

    With the same units on both sides, which then change sides one by one; with others, units are shuffled between the
    two; and where units are not known on both sides, Pearson's chi-squared test by question.
    """
    if not first.asked or not second.asked or not first.asked_of or not second.asked_of:
        found = two_proportions(first.correct, first.asked, second.correct, second.asked)
        return None if found is None else Chance(found, QUESTION, first.asked + second.asked)
    if first.asked_of == second.asked_of:
        probability = _changing_sides(np.array(first.correct_of) - np.array(second.correct_of))
        return Chance(probability, first.unit, sum(n > 0 for n in first.asked_of))
    probability = _shuffled(
        *(np.array([pair for pair in zip(a.correct_of, a.asked_of, strict=True) if pair[1]]) for a in (first, second))
    )
    return Chance(probability, first.unit, sum(n > 0 for n in (*first.asked_of, *second.asked_of)))


def two_proportions(correct: int, asked: int, other_correct: int, other_asked: int) -> float | None:
    """The probability that two samples with one and the same share of right answers differ by as much as these, or
    more (Pearson's chi-squared test without correction); None if either asked nothing."""
    if not asked or not other_asked:
        return None
    if correct + other_correct in (0, asked + other_asked):
        return 1.0  # alike, and the test divides by zero
    table = [[correct, asked - correct], [other_correct, other_asked - other_correct]]
    return float(chi2_contingency(table, correction=False).pvalue)


# ---- text


def texts_differ(first: Mapping[str, Any], second: Mapping[str, Any]) -> Chance | None:
    """The chance that two contestants, given by their summaries, need equally many bits for the text that both read;
    None where there are too few units to tell.

    Documents change sides one by one, each with the mean of its bits over seeds. Results that do not say where their
    documents begin are compared stretch by stretch (`paired`).
    """
    own, other = _documents(first), _documents(second)
    if own is not None and other is not None and np.array_equal(own[1], other[1]):
        return Chance(_changing_sides(own[0] - other[0]), DOCUMENT, len(own[0])) if len(own[0]) > 1 else None
    if "by_stretch" not in first or "by_stretch" not in second:
        return None
    stretches = [[bits for seed in entry["by_stretch"] for bits in seed] for entry in (first, second)]
    found = paired(*stretches)
    return None if found is None else Chance(found, STRETCH, min(map(len, stretches)))


def text_interval(entry: Mapping[str, Any]) -> tuple[float, float] | None:
    """The 95 % interval of bits per byte over other documents (BCa bootstrap, each document with the mean of its bits
    over seeds); None where documents are not known, or there is but one."""
    found = _documents(entry)
    return None if found is None else _bits_interval(*found)


def sums_interval(sums: Mapping[str, Any]) -> tuple[float, float] | None:
    """The 95 % interval of bits per byte of {bits, bytes, by_unit}, over other documents; None where the sums do not
    say which document has how much of them."""
    units = sums.get("by_unit")
    if units is None:
        return None
    return _bits_interval(*(np.array(units[key].split(), dtype=float) for key in ("bits", "bytes")))


def _bits_interval(bits: np.ndarray, of: np.ndarray) -> tuple[float, float] | None:
    """The 95 % interval of bits per byte over other documents, from the bits of each document and its bytes,
    (documents,) each; None of a single one, or where all are alike."""
    bits, of = bits[of > 0], of[of > 0]
    if len(of) < 2 or len(set(bits / of)) == 1:
        return None
    low, high = _ratio_interval(bits, of)
    mean = float(bits.sum() / of.sum())
    return (min(low, mean), max(high, mean)) if np.isfinite((low, high)).all() else None


def values_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean of a few measurements, one of each seed (Student's t); None of a single one."""
    if len(values) < 2:
        return None
    middle, error = float(np.mean(values)), float(np.std(values, ddof=1)) / len(values) ** 0.5
    reach = float(student.ppf(0.975, len(values) - 1)) * error
    return middle - reach, middle + reach


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the median of independent measurements: from the k-th least to the k-th greatest, for the
    largest k that holds it in 95 of 100 cases or more. None of fewer than six, where no k does."""
    ordered, count = sorted(values), len(values)
    k = max((k for k in range(count // 2) if 2 * binom.cdf(k, count, 0.5) <= SURE), default=None)
    return None if k is None else (ordered[k], ordered[-1 - k])


def _documents(entry: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray] | None:
    """Bits of each document, the mean over seeds, and its bytes, (documents,) each; None if a seed did not keep them,
    or seeds read different documents."""
    seeds = entry.get("by_document", ())
    if not seeds or len(seeds) != len(entry.get("by_stretch", seeds)):
        return None
    if any(seed["bytes"] != seeds[0]["bytes"] for seed in seeds):
        return None
    return np.mean([seed["bits"] for seed in seeds], axis=0), np.array(seeds[0]["bytes"])


def counted(results: Mapping[str, Any]) -> str:
    """Tells what a run's tests count as independent: "text by document; recall by example"."""
    said: dict[str, set[str]] = {}
    for entry in results["summary"].values():
        if "by_stretch" in entry or "by_document" in entry:
            said.setdefault("text", set()).add(STRETCH if _documents(entry) is None else DOCUMENT)
        for score in entry.get("recall", {}).values():
            said.setdefault("recall", set()).add(answers(score).unit)
    return "; ".join(
        f"{task} by {' or '.join(sorted(found))}" + (", so its p is too small" if found & {QUESTION, STRETCH} else "")
        for task, found in sorted(said.items(), reverse=True)
    )


def paired(first: list[float], second: list[float]) -> float | None:
    """The probability that pairs of measurements without a true difference differ by as much as these, or more
    (Student's paired test, two-sided); None with fewer than two pairs."""
    pairs = list(zip(first, second, strict=False))
    steps = {b - a for a, b in pairs}
    if len(pairs) < 2:
        return None
    if len(steps) == 1:
        return 1.0 if steps == {0.0} else 0.0  # without a spread the test divides by zero
    return float(ttest_rel([a for a, _ in pairs], [b for _, b in pairs]).pvalue)


# ---- resampling, with one seed, so that a report says the same whenever it is written


def _ratio_interval(above: np.ndarray, below: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of sum(above) / sum(below), whose pairs (units,) are drawn together."""
    found = bootstrap(
        (above, below),
        lambda x, y, axis: x.sum(axis) / y.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=1000,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def _changing_sides(differences: np.ndarray) -> float:
    """The two-sided probability of a sum as far from zero, where each difference (units,) could as well have had the
    other sign: all signs where they can be tried, else as many as RESAMPLES."""
    told = differences[differences != 0]  # whoever is alike on both sides tells nothing
    return _permuted((told,), "samples", lambda x, axis: x.sum(axis)) if len(told) > 1 else 1.0


def _shuffled(first: np.ndarray, second: np.ndarray) -> float:
    """The two-sided probability of as large a difference between the shares of right answers, where each unit, a row
    (correct, asked), could as well have stood on the other side."""
    rows = np.concatenate([first, second])

    def share(units: np.ndarray, axis: int) -> np.ndarray:
        return rows[units, 0].sum(axis) / rows[units, 1].sum(axis)

    if min(len(first), len(second)) < 2 or len({c / n for c, n in rows.tolist()}) == 1:
        return 1.0  # too few to tell, or alike
    sides = (np.arange(len(first)), np.arange(len(first), len(rows)))
    return _permuted(sides, "independent", lambda x, y, axis: share(x, axis) - share(y, axis))


def _permuted(data: tuple[np.ndarray, ...], kind: str, statistic: Any) -> float:
    found = permutation_test(
        data,
        statistic,
        permutation_type=kind,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=1000,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)
