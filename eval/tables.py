"""The tables of a run: one row for each contestant, the same in the terminal, in Markdown and on the page."""

from __future__ import annotations

from typing import Any

from rich import table
from rich.text import Text

from .benchmark import TASKS
from .claims import NOT_REPRODUCED, REPRODUCED, UNDECIDED, verdicts
from .seeds import outcomes_by_seed
from .significance import SURE, counted
from .task import Column, Family
from .winners import winners


def columns(results: dict[str, Any]) -> list[Column]:
    """Of all tasks in their order, those in which something was measured."""
    found = (column for task in TASKS.values() for column in task.columns(results))
    return [c for c in found if any(c.cell(name, entry) != "-" for name, entry in results["summary"].items())]


def _rows(results: dict[str, Any], columns: list[Column], baseline: str) -> list[list[str]]:
    """A row for each contestant, and a last one of what knows nothing of the input."""
    summary = results["summary"].items()
    return [
        *([entry["label"], *(c.cell(name, entry) for c in columns)] for name, entry in summary),
        [baseline, *(c.baseline for c in columns)],
    ]


def parts(results: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Tables of what was measured, of a terminal's width: title, headings and rows of each that has something to show.
    What was not measured is a dash."""
    families: dict[Family, list[Column]] = {}
    for column in columns(results):
        families.setdefault(column.family, []).append(column)
    found = []
    for family, own in families.items():
        heads = [c.heading if len(own) > 1 else c.whole for c in own]  # the title says the rest
        rows = [row for row in _rows(results, own, family.baseline) if set(row[1:]) != {"-"}]
        found.append((family.title, ["variant", *heads], rows))
    return found


def conclusions(results: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Conclusions in words: title, headings and rows of each table that has something to say."""
    found = []
    claims = [[v.claim, v.paper, v.outcome, v.evidence] for v in verdicts(results)]
    if claims:
        heads = ["claim", "paper", "here", "measured"]
        title = f"What the papers claim, and what came out here (decided at p < {SURE:g}; {counted(results)})"
        found.append((title, heads, claims))
    by_seed = outcomes_by_seed(results)
    if by_seed:
        outcomes = (REPRODUCED, UNDECIDED, NOT_REPRODUCED)
        rows = [[claim, *(str(counts[outcome] or "-") for outcome in outcomes)] for claim, counts in by_seed.items()]
        found.append(
            ("Claims seed by seed: how many seeds by themselves gave what", ["claim by seed", *outcomes], rows)
        )
    labels = {name: entry["label"] for name, entry in results["summary"].items()}
    best = [[b.what, ", ".join(labels[name] for name in b.names) or "-", b.score] for b in winners(results)]
    if best:
        title = "Who does best, the long-context Transformer aside; who might be as good shares the place"
        found.append((title, ["at", "best", "the first has"], best))
    return found


def peers_title(result: dict[str, Any]) -> str:
    """The title of the table of peers."""
    s = result["settings"]
    return f"Speed-up over existing implementations: {s['layers']} layers, width {s['hidden']}, one machine, in turns"


def terminal(title: str, heads: list[str], rows: list[list[str]], numbers: bool = True) -> table.Table:
    """A table for a terminal. numbers: of every column but the first, which stay whole: a name or a heading is broken
    where there is no room, and at blanks."""
    shown = table.Table(title=Text(title), title_justify="left")
    shown.add_column(heads[0])
    for i, head in enumerate(heads[1:], start=1):
        widest = max(map(len, [*head.split(), *(row[i] for row in rows)])) if numbers else None
        shown.add_column(head, justify="right" if numbers else "left", min_width=widest)
    for row in rows:
        shown.add_row(*map(Text, row))
    return shown
