"""Output of a run: a table in the terminal, results.json, and one page that opens without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from hf_gallery.files import read_json, write_json, write_text

from . import peers, rates
from .code import told
from .page import page
from .tables import conclusions, parts, peers_title, terminal

RESULTS, PAGE = "results.json", "report.html"


def read(name: str, runs: Path) -> dict[str, Any]:
    """The results of a finished run, by its name or by the path of its results.json. Raises ValueError if there are
    none."""
    return read_file(Path(name) if name.endswith(".json") else runs / name / RESULTS)


def read_file(path: Path) -> dict[str, Any]:
    """The results in a file. Raises ValueError if it is missing, or not as a run writes it."""
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


def _with_peers(results: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """The conclusions, and last the peers as a table like the others, where there is room for its width."""
    own = results.get("peers")
    return conclusions(results) + ([(peers_title(own), *peers.table(own))] if own else [])


def versions(results: dict[str, Any]) -> str:
    """Tells in a sentence by how many versions of the code the cells of a result were measured."""
    return results.get("code") or told(results["cells"])


def outsiders(results: dict[str, Any]) -> list[str]:
    """A sentence of each contestant from outside the gallery: its size, and what is carried."""
    return [f"{e['label']}: {e['outside']}" for e in results["summary"].values() if "outside" in e]


def show(results: dict[str, Any], console: Console) -> None:
    """Prints by what code the cells were measured, and the tables, in parts that fit a terminal of 80 columns."""
    console.print(versions(results))
    if learning_rates := rates.told(results):
        console.print(f"learning rates of text: {learning_rates}")
    for line in outsiders(results):
        console.print(line)
    for tables, numbers in ((parts(results), True), (conclusions(results), False)):
        for title, heads, rows in tables:
            console.print(terminal(title, heads, rows, numbers))
    if results.get("peers"):
        console.print(peers.terminal(results["peers"], peers_title(results["peers"])))


def markdown(results: dict[str, Any]) -> str:
    """The same tables in Markdown, for a README or a model card, and the learning rates of text."""
    blocks = []
    for tables, line in ((parts(results), "---:|"), (_with_peers(results), "---|")):
        for title, heads, rows in tables:
            lines = ["| " + " | ".join(heads) + " |", "|---|" + line * (len(heads) - 1)]
            blocks.append("\n".join([f"{title}:", "", *lines, *("| " + " | ".join(row) + " |" for row in rows)]))
    if learning_rates := rates.told(results):
        blocks.append(f"Learning rates of text: {learning_rates}.")
    return "\n\n".join(blocks)
