"""Origins of a run's numbers: when, where, by which code and with which seeds each was measured."""

from __future__ import annotations

import dataclasses
from typing import Any

from . import rates
from .code import by_one_version


@dataclasses.dataclass(frozen=True)
class Origins:
    """Lines that stand above results. facts: (what, said). mixed: a warning where not all is of one code or one
    machine. commits, cells: rows of a table by commit and by cell, under `COMMITS` and `CELLS`."""

    facts: list[tuple[str, str]]
    mixed: str
    commits: list[list[str]]
    cells: list[list[str]]


COMMITS = ["commit", "cells", "of", "measured"]
CELLS = ["cell", "took", "date", "commit", "machine", "versions", "command"]


def origins(results: dict[str, Any]) -> Origins:
    """Everything that a run's cells, and its peers, say of where they come from."""
    measured = [(c["task"], f"cells/{c['task']}.{c['contestant']}.{c['seed']}.json", c) for c in results["cells"]]
    if results.get("peers"):
        measured.append(("peers", "peers/results.json", results["peers"]))
    entries = [entry["provenance"] for *_, entry in measured]
    commits: dict[str, list[tuple[str, str]]] = {}
    for (task, *_), p in zip(measured, entries, strict=True):
        commits.setdefault(_commit(p), []).append((task, p["date"]))
    machines = list(dict.fromkeys(_machine(p) for p in entries))
    facts = [
        ("Measured", _dates(p["date"] for p in entries)),
        ("Machine" if len(machines) == 1 else "Machines", "; ".join(machines)),
        ("Commit" if len(commits) == 1 else "Commits", ", ".join(commits)),
        ("Seeds", _seeds(results["cells"])),
        ("Learning rates of text", rates.told(results)),
        ("Versions", "; ".join(dict.fromkeys(_versions(p, ("python", "torch", "transformers")) for p in entries))),
    ]
    rows = [
        [
            commit,
            f"{len(found)}",
            ", ".join(dict.fromkeys(task for task, _ in found)),
            _dates(date for _, date in found),
        ]
        for commit, found in commits.items()
    ]
    cells = []
    for _, file, entry in measured:
        p = entry["provenance"]
        took = f"{entry['seconds']:.0f} s" if "seconds" in entry else "-"
        where = f"{p['machine']['processor']}, {p['machine']['torch_threads']} threads, {p['machine']['device']}"
        cells.append([file, took, p["date"], _commit(p), where, _versions(p, p["versions"]), p["command"]])
    return Origins([fact for fact in facts if fact[1]], _mixed(results["cells"]), rows, cells)


def _mixed(cells: list[dict[str, Any]]) -> str:
    """The warning of `Origins`. Several commits may have the same code where it decides the numbers."""
    commits, machines = ({of(cell["provenance"]) for cell in cells} for of in (_commit, _machine))
    several = []
    if len(commits) > 1 and not by_one_version(cells):
        several.append((f"{len(commits)} commits", "by the same code"))
    if len(machines) > 1:
        several.append((f"{len(machines)} machines", "on the same machine"))
    if not several:
        return ""
    return (
        f"These {len(cells)} cells come from {' and '.join(what for what, _ in several)}, so not all numbers were "
        f"measured {' or '.join(same for _, same in several)}. Costs were measured in one cell, all contestants in "
        "turns; each cell's commit stands below."
    )


def _commit(p: dict[str, Any]) -> str:
    """A commit in short, with the + of what was changed beside it."""
    known = p.get("commit")
    return f"{known[:7]}{'+' if known.endswith('+') else ''}" if known else "outside git"


def _machine(p: dict[str, Any]) -> str:
    m = p["machine"]
    return f"{m.get('accelerator') or m['processor']}, {m['cores']} cores, {m['memory_gib']:g} GiB"


def _versions(p: dict[str, Any], names: Any) -> str:
    return ", ".join(f"{name} {p['versions'][name]}" for name in names if name in p["versions"])


def _dates(found: Any) -> str:
    """The first date and the last, to the day where they are of several."""
    dates = sorted(found)
    if not dates:
        return ""
    first, last = dates[0], dates[-1]
    if first[:10] != last[:10]:
        return f"{first[:10]} to {last[:10]}"
    return (
        f"{first[:10]}, {first[11:16]} to {last[11:16]} UTC"
        if first[:16] != last[:16]
        else f"{first[:10]}, {first[11:16]} UTC"
    )


def _seeds(cells: list[dict[str, Any]]) -> str:
    """The seeds of each task, tasks with the same seeds together."""
    of: dict[str, set[int]] = {}
    for cell in cells:
        of.setdefault(cell["task"], set()).add(cell["seed"])
    tasks: dict[str, list[str]] = {}
    for task, seeds in of.items():
        tasks.setdefault(", ".join(map(str, sorted(seeds))), []).append(task)
    if len(tasks) < 2:
        return "".join(tasks)
    least = max(tasks, key=lambda seeds: len(tasks[seeds]))
    parts = [f"{seeds} for {', '.join(names)}" for seeds, names in tasks.items() if seeds != least]
    return "; ".join([*parts, f"{least} for all else"])
