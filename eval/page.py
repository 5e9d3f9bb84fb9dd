"""The page of a run: one HTML file that opens without a network."""

from __future__ import annotations

import base64
import csv
import gzip
import io
import json
import re
from pathlib import Path
from typing import Any

from hf_gallery.looking.page import environment

from . import peers
from .claims import NOT_MEASURED, NOT_REPRODUCED, REPRODUCED, UNDECIDED, all_verdicts
from .figures import COLOURS, COST, MEMORY, RAMP, REASONING, SIZES, SYMBOLS, TEXT, Plot, figures, place
from .findings import findings
from .origins import CELLS, COMMITS, origins
from .palette import DARK, LIGHT, SHAPES, readable
from .significance import SURE, counted
from .tables import conclusions, parts, peers_title
from .winners import Measure, measures

ICONS = {REPRODUCED: "✓", UNDECIDED: "?", NOT_REPRODUCED: "✗", NOT_MEASURED: "–"}
GROUPS = {MEMORY: "Memory", REASONING: "Reasoning", TEXT: "Text", COST: "Cost"}


def page(results: dict[str, Any]) -> str:
    """One HTML file with everything in it: findings, tables, plots, and how each number was measured."""
    plots, overview, found = figures(results), measures(results), all_verdicts(results)
    drawn = {s.contestant for plot in plots for s in plot.series}
    contestants = [
        _drawn_as(place(name, results))
        | {"name": name, "label": e["label"], "reach": e["reach"], "drawn": name in drawn}
        for name, e in results["summary"].items()
    ]
    numbers = {c["number"] for c in contestants} | {s.number for plot in plots for s in plot.series}
    tables = _tabs(results)
    grouped = _grouped(plots)
    sections = [
        ("findings", "Findings", []),
        *([("comparison", "All at a glance", [])] if overview else []),
        ("claims", "Claims of the papers", []),
        ("tables", "Tables", []),
        *([("plots", "Plots", [(where, name) for where, name, _ in grouped])] if grouped else []),
        ("origins", "Origins", []),
    ]
    return _PAGES.get_template("page.html").render(
        title=f"hf-gallery: {results['preset']} run",
        share=results["share"],
        contents=sections,
        contestants=contestants,
        colours=[(n, readable(_colour(n), LIGHT), readable(_colour(n), DARK)) for n in sorted(numbers)],
        findings=findings(results),
        overview=[_shaded(measure, results) for measure in overview],
        sure=f"{SURE:g}",
        counted=counted(results),
        claims=[(v, ICONS[v.outcome]) for v in found],
        outcomes=[(x, icon, sum(v.outcome == x for v in found)) for x, icon in ICONS.items()],
        tables=tables,
        plots=grouped,
        origins=origins(results),
        commit_heads=COMMITS,
        cell_heads=CELLS,
        settings=json.dumps(results["settings"], indent=1),
        files={"csv": _packed(csv_of(results)), "json": _packed(json.dumps(results, separators=(",", ":")))},
        data={
            "name": f"hf-gallery-{results['preset']}",
            "plots": {f"plot{i}": _placed(plot) for i, plot in enumerate(plots)},
        },
    )


_PAGES = environment(Path(__file__).parent / "templates")


def _tight(text: str) -> str:
    """Text in which no line parts a number from what belongs to it: "p < 0.001", "41 %"."""
    return re.sub(r" ([<=≥]) ", "\u00a0\\1\u00a0", text).replace(" %", "\u00a0%")


def _soft(text: str) -> str:
    """Text whose long words may be parted by a hyphen, where a column is narrow."""
    return re.sub(r"\b(\w{5})(\w{5,})", "\\1\u00ad\\2", text)


_PAGES.filters |= {"tight": _tight, "soft": _soft}


def _packed(text: str) -> str:
    """A file that the page offers, compressed: as it is it would be four fifths of the page."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def csv_of(results: dict[str, Any]) -> str:
    """Every number of the comparison and of the plots with its 95 % interval, a row each."""
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(["what", "contestant", "at", "value", "low", "high", "unit"])
    for measure in measures(results):
        what = measure.best.what if measure.best is not None else measure.heading
        for name, value in measure.values.items():
            rows.writerow([what, name, "", value.number, *(value.limits or ("", "")), measure.unit])
    for plot in figures(results):
        for s in plot.series:
            label = f"{s.contestant}, {s.label}" if plot.named else s.contestant
            for p in s.points:
                at = "" if plot.rows else dict(plot.stops).get(p.x, f"{p.x:g}")
                number, unit = (p.x, plot.x.title) if plot.rows else (p.y, plot.y.title)
                rows.writerow([plot.title, label, at, number, *(p.limits or ("", "")), unit])
    return out.getvalue()


def _tabs(results: dict[str, Any]) -> list[tuple[str, str, str, list[str], list[list[str]], str]]:
    """Place, name, title, headings, rows and kind of each table behind a tab."""
    found = [(title, heads, rows, "numbers") for title, heads, rows in parts(results)]
    found += [(title, heads, rows, "words") for title, heads, rows in conclusions(results) if heads[0] != "claim"]
    if results.get("peers"):
        found.append((peers_title(results["peers"]), *peers.table(results["peers"]), "peers"))
    names = (re.split(r"[,:;]| by distance| over ", title)[0] for title, *_ in found)
    return [(f"table{i}", name, *table) for i, (name, table) in enumerate(zip(names, found, strict=True))]


def _grouped(plots: list[Plot]) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """Place, heading and plots of each group, as the template needs them."""
    found: dict[str, list[dict[str, Any]]] = {}
    for i, plot in enumerate(plots):
        named = [_drawn_as(s.number) | {"label": s.label} for s in plot.series] if plot.named else []
        about = {"id": f"plot{i}", "title": plot.title, "caption": plot.caption, "named": named}
        found.setdefault(plot.group, []).append(about)
    order = sorted(found, key=lambda group: [*GROUPS, group].index(group))
    return [(f"group{i}", GROUPS.get(group, group.capitalize()), found[group]) for i, group in enumerate(order)]


def _shaded(measure: Measure, results: dict[str, Any]) -> dict[str, Any]:
    """A column of the comparison. shade of a cell: 1 for the best of all, 0 for the worst."""
    numbers = [value.number for value in measure.values.values()]
    low, high = min(numbers), max(numbers)
    best = measure.best.names if measure.best is not None else []
    cells: dict[str, dict[str, Any]] = {}
    for name in results["summary"]:
        value = measure.values.get(name)
        if value is None:
            cells[name] = {"said": "-", "limits": "", "best": False, "shade": None}
            continue
        share = (value.number - low) / (high - low) if high > low else 0.5
        cells[name] = {
            "said": value.said,
            "limits": _limits(value.limits, value.number, measure.unit),
            "best": name in best,
            "shade": round(share if measure.rises else 1 - share, 3),
        }
    return {"heading": measure.heading, "unit": measure.unit, "rises": measure.rises, "cells": cells}


def _limits(limits: tuple[float, float] | None, value: float, unit: str) -> str:
    """An interval in a cell, in the digits of its value."""
    if limits is None:
        return ""
    return "–".join(f"{100 * x:.0f}" if unit == "% right" else f"{x:.2f}" for x in limits)


def _placed(plot: Plot) -> dict[str, Any]:
    """A plot as the script draws it: places on the axes, from 0 to 1, and words."""

    def at(x: float, y: float) -> dict[str, float]:
        return {"x": round(plot.x.place(x), 4), "y": round(plot.y.place(y), 4)}

    series = []
    for s in plot.series:
        points = []
        for p in s.points:
            across = plot.x if plot.rows else plot.y
            limits = [round(across.place(x), 4) for x in p.limits] if p.limits else None
            points.append(at(p.x, p.y) | {"limits": limits, "said": p.said})
        series.append(_drawn_as(s.number) | {"contestant": s.contestant, "label": s.label, "points": points})
    stop = plot.y if plot.rows else plot.x
    return {
        "title": plot.title,
        "rows": plot.rows,
        "x": {"title": plot.x.title, "ticks": [(round(plot.x.place(x), 4), said) for x, said in plot.x.ticks]},
        "y": {"title": plot.y.title, "ticks": [(round(plot.y.place(y), 4), said) for y, said in plot.y.ticks]},
        "series": series,
        "stops": [(round(stop.place(x), 4), said) for x, said in plot.stops],
        "guesses": [tuple(at(*guess).values()) for guess in plot.guesses],
    }


def _drawn_as(number: int) -> dict[str, Any]:
    """The number, symbol and filling of a curve."""
    name = SYMBOLS[number % len(SYMBOLS)]
    fill = "open" if name.endswith("-open") else "lines" if name == "x" else "full"
    return {"number": number, "path": SHAPES[name], "fill": fill}


def _colour(number: int) -> str:
    return RAMP[(number - SIZES) % len(RAMP)] if number >= SIZES else COLOURS[number % len(COLOURS)]
