"""The signature plot as a picture, for the README and the model cards: how each architecture forgets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hf_gallery.models.files import whole_file

from .figures import COLOURS, SYMBOLS, distances, place, times
from .significance import answers, interval

MARKERS = {  # matplotlib's names of the symbols of palette.py
    "circle": "o", "circle-open": "o", "x": "x", "cross": "P", "square": "s", "diamond": "D", "triangle-up": "^",
    "triangle-down": "v", "star": "*", "hexagon": "h", "pentagon": "p", "diamond-open": "d", "star-open": "8",
    "star-square": "X", "hexagon-open": "H",
}  # fmt: skip


def forgetting_curves(results: dict[str, Any], path: Path) -> None:
    """Draws recall against distance into `path`, a .png or .svg, whole or not at all.

    Raises ValueError for another ending, or a run without recall.
    """
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"--picture is {path}; it must end in .png or .svg")
    found = distances(results)
    if not found:
        raise ValueError("this run measured no recall, so there is nothing to draw")
    window = results["window"]["recall"]
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    places = range(len(found))
    for name, entry in results["summary"].items():
        if "recall" not in entry:
            continue
        i = place(name, results)
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[SYMBOLS[i % len(SYMBOLS)]]
        scores = [entry["recall"][str(d)] for d in found]
        share = [s["correct"] / max(1, s["asked"]) for s in scores]
        limits = [interval(answers(s)) for s in scores]
        below, above = zip(*((y - low, high - y) for y, (low, high) in zip(share, limits, strict=True)), strict=True)
        axes.errorbar(places, share, yerr=(below, above), label=entry["label"], color=colour, marker=marker, capsize=2)
    axes.axhline(results["chance"], linestyle=":", color="#444444", label="chance")
    axes.set_xticks(list(places), [times(d / window) for d in found])
    axes.set_xlabel(f"distance, in windows of {window} tokens")
    axes.set_ylabel("right answers")
    axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.0f} %")
    axes.set_ylim(-0.03, 1.05)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False)
    # Without a date, so that the same results give the same file.
    metadata = {"Date": None} if path.suffix == ".svg" else {}
    with whole_file(path) as beside:
        figure.savefig(beside, format=path.suffix[1:], dpi=150, metadata=metadata)
