"""Confidence intervals and tests."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import mean, stdev
from typing import Any

SURE = 0.05  # a difference is said to be there where chance alone would give it more rarely than this


def pooled(scores: Mapping[str, Mapping[str, Any]]) -> tuple[int, int]:
    """Right answers and questions of several scores together, each with `correct` and `asked`."""
    return sum(s["correct"] for s in scores.values()), sum(s["asked"] for s in scores.values())


def wilson(correct: int, asked: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of Wilson (1927) for a share of correct answers, 95 % at z = 1.96; (0, 1) if nothing was asked."""
    if not asked:
        return 0.0, 1.0
    share, spread = correct / asked, z * z / asked
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))  # it holds the share, also rounded


def two_proportions(correct: int, asked: int, other_correct: int, other_asked: int) -> float | None:
    """The probability that two samples with one and the same share of right answers differ by as much as these, or
    more (two-sided z-test with the pooled share); None if either asked nothing."""
    if not asked or not other_asked:
        return None
    pooled = (correct + other_correct) / (asked + other_asked)
    deviation = math.sqrt(pooled * (1 - pooled) * (1 / asked + 1 / other_asked))
    if deviation == 0.0:
        return 1.0
    return math.erfc(abs(correct / asked - other_correct / other_asked) / deviation / math.sqrt(2))


def paired(first: list[float], second: list[float]) -> float | None:
    """The probability that pairs of measurements without a true difference differ by as much as these, or more
    (Student's paired test, two-sided); None with fewer than two pairs."""
    from scipy.stats import t

    steps = [b - a for a, b in zip(first, second, strict=False)]
    if len(steps) < 2:
        return None
    if stdev(steps) == 0:
        return 1.0 if steps[0] == 0 else 0.0
    return float(2 * t.sf(abs(mean(steps)) / (stdev(steps) / math.sqrt(len(steps))), len(steps) - 1))


def same_text(first: Mapping[str, Any], second: Mapping[str, Any]) -> float | None:
    """`paired` of two contestants' summaries over the stretches of text that both read, all seeds together."""
    return paired(*([bits for seed in entry["by_stretch"] for bits in seed] for entry in (first, second)))
