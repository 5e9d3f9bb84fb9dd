"""Output of a run: a table in the terminal, results.json, and one page that opens without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from plotly.offline import get_plotlyjs
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hf_gallery.files import read_json, write_json, write_text

from . import peers
from .benchmark import TASKS
from .claims import verdicts
from .code import told
from .figures import figures
from .significance import SURE, counted
from .task import Column, Family
from .winners import winners

RESULTS, PAGE = "results.json", "report.html"


def read(name: str, runs: Path) -> dict[str, Any]:
    """The results of a finished run, by its name or by the path of its results.json. Raises ValueError if there are
    none."""
    path = Path(name) if name.endswith(".json") else runs / name / RESULTS
    try:
        results = read_json(path)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}); give the name of a run, or a results.json"
        ) from None
    if not isinstance(results, dict) or "summary" not in results:
        raise ValueError(f"{path} is missing or damaged; measure the run first with `python -m eval`")
    try:
        page(results)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, StopIteration, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is not as `python -m eval` writes it ({what}); measure the run again") from None
    return results


def place(name: str, runs: Path) -> Path:
    """The place of a run's page: in its folder, or beside a given file, under its name if that is not usual."""
    if not name.endswith(".json"):
        return runs / name / PAGE
    path = Path(name)
    return path.with_name(PAGE) if path.name == RESULTS else path.with_suffix(".html")


def write_page(path: Path, results: dict[str, Any]) -> Path:
    """Writes the page, at once, and gives its path back."""
    write_text(path, page(results))
    return path


def write(folder: Path, results: dict[str, Any]) -> None:
    """Writes results.json and report.html, each at once."""
    write_json(folder / RESULTS, results)
    write_page(folder / PAGE, results)


# ---- the tables: one row for each contestant, the same in the terminal and on the page


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
    labels = {name: entry["label"] for name, entry in results["summary"].items()}
    best = [[b.what, ", ".join(labels[name] for name in b.names) or "-", b.score] for b in winners(results)]
    if best:
        title = "Who does best, the long-context Transformer aside; who might be as good shares the place"
        found.append((title, ["at", "best", "the first has"], best))
    return found


def _peers_title(result: dict[str, Any]) -> str:
    s = result["settings"]
    return f"Speed-up over existing implementations: {s['layers']} layers, width {s['hidden']}, one machine, in turns"


def _with_peers(results: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """The conclusions, and last the peers as a table like the others, where there is room for its width."""
    own = results.get("peers")
    return conclusions(results) + ([(_peers_title(own), *peers.table(own))] if own else [])


def versions(results: dict[str, Any]) -> str:
    """Tells in a sentence by how many versions of the code the cells of a result were measured."""
    return results.get("code") or told(results["cells"])


def outsiders(results: dict[str, Any]) -> list[str]:
    """A sentence of each contestant from outside the gallery: its size, and what is carried."""
    return [f"{e['label']}: {e['outside']}" for e in results["summary"].values() if "outside" in e]


def show(results: dict[str, Any], console: Console) -> None:
    """Prints by what code the cells were measured, and the tables, in parts that fit a terminal of 80 columns."""
    console.print(versions(results))
    for line in outsiders(results):
        console.print(line)
    for tables, numbers in ((parts(results), True), (conclusions(results), False)):
        for title, heads, rows in tables:
            shown = Table(title=Text(title), title_justify="left")
            shown.add_column(heads[0], no_wrap=numbers)
            for head in heads[1:]:
                shown.add_column(head, justify="right" if numbers else "left")
            for row in rows:
                shown.add_row(*map(Text, row))
            console.print(shown)
    if results.get("peers"):
        console.print(peers.terminal(results["peers"], _peers_title(results["peers"])))


def markdown(results: dict[str, Any]) -> str:
    """The same tables in Markdown, for a README or a model card."""
    blocks = []
    for tables, line in ((parts(results), "---:|"), (_with_peers(results), "---|")):
        for title, heads, rows in tables:
            lines = ["| " + " | ".join(heads) + " |", "|---|" + line * (len(heads) - 1)]
            blocks.append("\n".join([f"{title}:", "", *lines, *("| " + " | ".join(row) + " |" for row in rows)]))
    return "\n\n".join(blocks)


# ---- the page


def page(results: dict[str, Any]) -> str:
    """One HTML file with everything in it: tables, plots, and how each number was measured."""
    plots = figures(results)
    measured = [(title, heads, rows, "") for title, heads, rows in parts(results)]
    words = [(title, heads, rows, "words") for title, heads, rows in conclusions(results)]
    own = results.get("peers")
    beside = [(_peers_title(own), *peers.table(own), "peers")] if own else []
    return _PAGES.get_template("page.html").render(
        title=f"hf-gallery: {results['preset']} run",
        share=results["share"],
        contestants=[(entry["label"], entry["reach"]) for entry in results["summary"].values()],
        tables=[*measured, *words, *beside],
        plots=[(title, caption) for title, caption, _ in plots],
        origins=_origins(results),
        settings=json.dumps(results["settings"], indent=1),
        plotly=get_plotlyjs(),
        specs=[json.loads(figure.to_json()) for _, _, figure in plots],
    )


_PAGES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def _origins(results: dict[str, Any]) -> list[list[str]]:
    """The file, seconds, date, machine, versions and command of every cell."""
    measured = [(f"cells/{c['task']}.{c['contestant']}.{c['seed']}.json", c) for c in results["cells"]]
    if results.get("peers"):
        measured.append(("peers/results.json", results["peers"]))
    rows = []
    for file, entry in measured:
        p = entry["provenance"]
        machine = f"{p['machine']['processor']}, {p['machine']['torch_threads']} threads, {p['machine']['device']}"
        versions = ", ".join(f"{name} {v}" for name, v in p["versions"].items())
        took = f"{entry['seconds']:.0f} s" if "seconds" in entry else "-"
        rows.append([file, took, p["date"], machine, versions, p["command"]])
    return rows
