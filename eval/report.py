"""Output of a run: a table in the terminal, results.json, and one page that opens without a network."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hf_gallery.files import read_json, write_json, write_text

from . import peers
from .benchmark import TASKS
from .claims import verdicts
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


# ---- the table: one row for each contestant, the same in the terminal and on the page


def columns(results: dict[str, Any]) -> list[Column]:
    """Of all tasks in their order, those in which something was measured."""
    found = (column for task in TASKS.values() for column in task.columns(results))
    return [c for c in found if any(c.cell(name, entry) != "-" for name, entry in results["summary"].items())]


def table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows. Recall stands under the distance in windows; what was not measured is a dash."""
    found = sorted(columns(results), key=lambda column: not column.leads)
    return ["variant", *(c.whole for c in found)], _rows(results, found, "chance; order-0 bytes")


def _rows(results: dict[str, Any], columns: list[Column], baseline: str) -> list[list[str]]:
    """A row for each contestant, and a last one of what knows nothing of the input."""
    summary = results["summary"].items()
    return [
        *([entry["label"], *(c.cell(name, entry) for c in columns)] for name, entry in summary),
        [baseline, *(c.baseline for c in columns)],
    ]


def parts(results: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """The table cut into parts of a page's width: title, headings and rows of each that has something to show."""
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


def show(results: dict[str, Any], console: Console) -> None:
    """Prints the tables, in parts that fit a terminal of 80 columns."""
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
    """One HTML file with everything in it: table, plots, and how each number was measured."""
    heads, rows = table(results)
    body = [f"<h1>hf-gallery: {html.escape(results['preset'])} run</h1>", _introduction(results)]
    body.append(_html_table(heads, rows))
    body += [
        f"<h2>{html.escape(title)}</h2>{_html_table(heads, rows, 'words')}"
        for title, heads, rows in _with_peers(results)
    ]
    plots = figures(results)
    for i, (title, caption, _) in enumerate(plots):
        body.append(
            f"<section><h2>{html.escape(title)}</h2><div class='plot' id='plot{i}'></div>"
            f"<p>{html.escape(caption)}</p></section>"
        )
    body.append(_provenance(results))
    specs = json.dumps([json.loads(figure.to_json()) for _, _, figure in plots]).replace("</", "<\\/")
    return _PAGE.format(
        title=html.escape(f"hf-gallery: {results['preset']} run"),
        body="\n".join(body),
        plotly=get_plotlyjs(),
        specs=specs,
    )


def _html_table(heads: list[str], rows: list[list[str]], kind: str = "") -> str:
    top = "".join(f"<th scope='col'>{html.escape(head)}</th>" for head in heads)
    lines = (
        f"<tr><th scope='row'>{html.escape(row[0])}</th>" + "".join(f"<td>{html.escape(x)}</td>" for x in row[1:])
        for row in rows
    )
    return (
        f"<div class='wide'><table class='{kind}'><thead><tr>{top}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _introduction(results: dict[str, Any]) -> str:
    lines = "".join(
        f"<li><b>{html.escape(entry['label'])}</b> sees {html.escape(entry['reach'])}</li>"
        for entry in results["summary"].values()
    )
    share = "" if results["share"] == 1 else f" with {results['share']:.0%} of this preset's training steps"
    return (
        "<p>Models of one width, depth and window, and of the same number of parameters to within 3 %, trained on the "
        f"same batches{share}. They differ in what a query sees:</p><ul>{lines}</ul>"
    )


def _provenance(results: dict[str, Any]) -> str:
    """Provenance of each number: settings, and for every cell its file, seconds, machine, versions and command."""
    rows = []
    measured = [(f"cells/{c['task']}.{c['contestant']}.{c['seed']}.json", c) for c in results["cells"]]
    if results.get("peers"):
        measured.append(("peers/results.json", results["peers"]))
    for file, entry in measured:
        p = entry["provenance"]
        machine = f"{p['machine']['processor']}, {p['machine']['torch_threads']} threads, {p['machine']['device']}"
        versions = ", ".join(f"{name} {v}" for name, v in p["versions"].items())
        took = f"{entry['seconds']:.0f} s" if "seconds" in entry else "-"
        texts = (file, took, p["date"], machine, versions, p["command"])
        rows.append("<tr>" + "".join(f"<td>{html.escape(str(x))}</td>" for x in texts) + "</tr>")
    head = "".join(f"<th>{x}</th>" for x in ("cell", "took", "date", "machine", "versions", "command"))
    settings = html.escape(json.dumps(results["settings"], indent=1))
    return (
        "<details><summary>Where each number comes from</summary>"
        f"<div class='wide'><table class='left'><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        f"<pre>{settings}</pre></details>"
    )


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1b1b1b; --paper: #ffffff; --line: #d0d0d0; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e8e8e8; --paper: #16181c; --line: #41454d; }} }}
body {{ font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 72rem; margin: 0 auto; padding: 1rem; }}
h1 {{ font-size: 1.6rem; }} h2 {{ font-size: 1.2rem; margin-bottom: 0; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }}
th, td {{ white-space: nowrap; padding: 0.3rem 0.6rem; border-bottom: 1px solid var(--line); text-align: right; }}
th[scope=row], .left td, .left th {{ text-align: left; white-space: nowrap; }}
.words td, .words th, .words th[scope=row] {{ text-align: left; white-space: normal; min-width: 7rem; }}
tbody th {{ position: sticky; left: 0; background: var(--paper); font-weight: 600; }}
thead th {{ vertical-align: bottom; white-space: normal; }}
.plot {{ min-height: 420px; }}
@media print {{ details {{ display: none; }} section {{ break-inside: avoid; }} }}
</style>
</head>
<body>
{body}
<script>{plotly}</script>
<script>
const specs = {specs};
const dark = window.matchMedia("(prefers-color-scheme: dark)");
function draw() {{
  const ink = getComputedStyle(document.documentElement).getPropertyValue("--ink").trim();
  specs.forEach((spec, i) => {{
    const layout = Object.assign({{}}, spec.layout, {{ font: {{ color: ink, size: 13 }} }});
    Plotly.react("plot" + i, spec.data, layout, {{ responsive: true, displaylogo: false, displayModeBar: false }});
  }});
}}
draw();
dark.addEventListener("change", draw);
</script>
</body>
</html>
"""
