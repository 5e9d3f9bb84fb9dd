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
    return max(0.0, middle - half), min(1.0, middle + half)
