"""Confidence intervals and tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scipy.stats import binomtest, chi2_contingency, ttest_rel

SURE = 0.05  # a difference is said to be there where chance alone would give it more rarely than this


def pooled(scores: Mapping[str, Mapping[str, Any]]) -> tuple[int, int]:
    """Right answers and questions of several scores together, each with `correct` and `asked`."""
    return sum(s["correct"] for s in scores.values()), sum(s["asked"] for s in scores.values())


def wilson(correct: int, asked: int) -> tuple[float, float]:
    """The 95 % interval of Wilson (1927) for a share of correct answers; (0, 1) if nothing was asked."""
    if not asked:
        return 0.0, 1.0
    interval = binomtest(correct, asked).proportion_ci(0.95, method="wilson")
    return min(correct / asked, float(interval.low)), max(correct / asked, float(interval.high))  # also when rounded


def two_proportions(correct: int, asked: int, other_correct: int, other_asked: int) -> float | None:
    """The probability that two samples with one and the same share of right answers differ by as much as these, or
    more (Pearson's chi-squared test without correction); None if either asked nothing."""
    if not asked or not other_asked:
        return None
    if correct + other_correct in (0, asked + other_asked):
        return 1.0  # alike, and the test divides by zero
    table = [[correct, asked - correct], [other_correct, other_asked - other_correct]]
    return float(chi2_contingency(table, correction=False).pvalue)


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


def same_text(first: Mapping[str, Any], second: Mapping[str, Any]) -> float | None:
    """`paired` of two contestants' summaries over the stretches of text that both read, all seeds together."""
    return paired(*([bits for seed in entry["by_stretch"] for bits in seed] for entry in (first, second)))
