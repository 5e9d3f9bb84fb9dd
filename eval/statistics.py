"""How sure a number is."""

from __future__ import annotations

import math


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
