"""Colours and symbols of curves: each colour as it can be seen on a light and on a dark page, each symbol as SVG."""

from __future__ import annotations

import math

LIGHT, DARK = "#ffffff", "#16181c"  # papers that curves are drawn on; as hf_gallery/looking/templates/base.html has it
SEEN = 3.0  # least contrast of a curve with the page, as WCAG 2.1 asks for graphics (1.4.11)


def contrast(first: str, second: str) -> float:
    """The contrast of two colours, #rrggbb, by WCAG 2.1: 1 for equal ones, 21 for black on white."""
    dark, light = sorted(map(_luminance, (first, second)))
    return (light + 0.05) / (dark + 0.05)


def readable(colour: str, paper: str) -> str:
    """The colour, or the nearest to it, towards black on a light page and towards white on a dark one, that stands out
    from `paper`."""
    end = "#000000" if _luminance(paper) > 0.5 else "#ffffff"
    for step in range(21):
        mixed = _mix(colour, end, step / 20)
        if contrast(mixed, paper) >= SEEN:
            return mixed
    return end


def _mix(first: str, second: str, share: float) -> str:
    channels = zip(_channels(first), _channels(second), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in channels)


def _channels(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def _luminance(colour: str) -> float:
    shares = [x / 255 for x in _channels(colour)]
    linear = [x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _polygon(corners: int, turn: float = 0.0, inner: float | None = None) -> str:
    """The path of a regular polygon around (0, 0), or with `inner` of a star."""
    radii = [5.0] if inner is None else [5.0, inner]
    count = corners * len(radii)
    points = [
        (radii[i % len(radii)] * math.sin(angle), -radii[i % len(radii)] * math.cos(angle))
        for i, angle in ((i, math.radians(turn) + 2 * math.pi * i / count) for i in range(count))
    ]
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + "Z"


_CIRCLE = "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0Z"
# Those whose names end in -open are not filled, and x is nothing but lines.
SHAPES = {
    "circle": _CIRCLE,
    "circle-open": _CIRCLE,
    "x": "M-3.5 -3.5L3.5 3.5M-3.5 3.5L3.5 -3.5",
    "cross": "M-1.6 -4.5H1.6V-1.6H4.5V1.6H1.6V4.5H-1.6V1.6H-4.5V-1.6H-1.6Z",
    "square": "M-3.7 -3.7H3.7V3.7H-3.7Z",
    "diamond": _polygon(4),
    "triangle-up": _polygon(3),
    "triangle-down": _polygon(3, turn=180),
    "star": _polygon(5, inner=2.2),
    "hexagon": _polygon(6),
    "pentagon": _polygon(5),
    "diamond-open": _polygon(4),
    "star-open": _polygon(5, inner=2.2),
    "star-square": _polygon(4, turn=45, inner=2.2),
    "hexagon-open": _polygon(6),
}
