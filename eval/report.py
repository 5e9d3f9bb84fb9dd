"""What a run shows: a table in the terminal, results.json, and one page that opens without a network."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from statistics import mean
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from rich.console import Console
from rich.table import Table

from hf_gallery.files import read_json, write_json, write_text

from .statistics import two_proportions, wilson

RESULTS, PAGE = "results.json", "report.html"
# Okabe and Ito's colours, which the colour-blind can tell apart, in the order of the contestants.
COLOURS = ["#999999", "#56B4E9", "#E69F00", "#009E73", "#D55E00", "#CC79A7"]
SYMBOLS = ["circle-open", "x", "square", "diamond", "triangle-up", "star"]


def read(name: str, runs: Path) -> dict[str, Any]:
    """The results of a finished run, by its name or by the path of its results.json. Raises ValueError if there are
    none."""
    path = Path(name) if name.endswith(".json") else runs / name / RESULTS
    results = read_json(path)
    if not isinstance(results, dict) or "summary" not in results:
        raise ValueError(f"{path} is missing or damaged; measure the run first with `python -m eval`")
    return results


def write(folder: Path, results: dict[str, Any]) -> None:
    """Writes results.json and report.html, each at once."""
    write_json(folder / RESULTS, results)
    write_text(folder / PAGE, page(results))


# ---- the table: one row for each contestant, the same in the terminal and on the page


def table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows. Recall stands under the distance in windows; what was not measured is a dash."""
    window = results["window"]["recall"]
    tested = distances(results)
    contexts = _contexts(results)
    abilities = results["abilities"]
    best = {name: _leaders(results, name) for name in abilities}
    heads = ["variant", "parameters", *(f"recall {times(d / window)}" for d in tested)]
    heads += [*(f"ability {about['title']}" for about in abilities.values()), "bits/byte"]
    heads += ["train tokens/s", "train peak MiB"]
    heads += [f"decode ms, {_short(c)}" for c in contexts] + [f"cache KiB, {_short(c)}" for c in contexts]
    rows = []
    for contestant, entry in results["summary"].items():
        row = [entry["label"], f"{entry['parameters']:,}" if "parameters" in entry else "-"]
        for d in tested:
            score = entry.get("recall", {}).get(str(d))
            row.append(f"{100 * score['correct'] / max(1, score['asked']):.0f} %" if score else "-")
        for name in abilities:
            correct, asked = _total(entry, name)
            mark = " *" if contestant in best[name] else ""
            row.append(f"{100 * correct / asked:.0f} %{mark}" if asked else "-")
        bits = entry.get("bits_per_byte")
        row.append(f"{mean(bits):.3f}" if bits else "-")
        cost = entry.get("cost")
        row.append(f"{cost['training_tokens_per_second']:,.0f}" if cost else "-")
        row.append(f"{cost['training_peak_bytes'] / 2**20:,.0f}" if cost else "-")
        row += [f"{cost['decode_ms_per_token'][str(c)]:.2f}" if cost else "-" for c in contexts]
        row += [f"{cost['cache_bytes'][str(c)] / 2**10:,.0f}" if cost else "-" for c in contexts]
        rows.append(row)
    base = ["-"] * len(heads)
    base[0] = "chance; order-0 bytes"
    for i, head in enumerate(heads):
        if head.startswith("recall"):
            base[i] = f"{100 * results['chance']:.0f} %"
        elif head.startswith("ability"):
            base[i] = (
                f"{100 * _blind(results, next(n for n, a in abilities.items() if head.endswith(a['title']))):.0f} %"
            )
        elif head == "bits/byte" and results["order0_bits_per_byte"] is not None:
            base[i] = f"{results['order0_bits_per_byte']:.3f}"
    used = [i for i in range(len(heads)) if i == 0 or any(row[i] != "-" for row in rows)]
    return [heads[i] for i in used], [[row[i] for i in used] for row in [*rows, base]]


def parts(results: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """The table cut into parts of a page's width: title, headings and rows of each that has something to show."""
    heads, rows = table(results)
    baselines = iter(("chance", "chance", "bytes by frequency", ""))
    groups = {
        f"Recall by distance, in windows of {results['window']['recall']} tokens": [
            i for i, h in enumerate(heads) if h.startswith("recall")
        ],
        "Abilities: right answers over all levels; * the best, and who is not surely behind": [
            i for i, h in enumerate(heads) if h.startswith("ability")
        ],
        "Text; speed and memory of a training step": [
            i for i, h in enumerate(heads) if h in ("parameters", "bits/byte") or "train" in h
        ],
        "Decoding after a context: ms per token, KiB of cache": [
            i for i, h in enumerate(heads) if h.startswith(("decode", "cache"))
        ],
    }
    found = []
    for title, columns in groups.items():
        rows[-1][0] = next(baselines)
        if columns:
            measured = [row for row in rows if any(row[i] != "-" for i in columns)]
            short = [_FAMILY.sub("", heads[i]) if len(columns) > 1 else heads[i] for i in columns]  # the title says it
            found.append((title, [heads[0], *short], [[row[0], *(row[i] for i in columns)] for row in measured]))
    return found


def show(results: dict[str, Any], console: Console) -> None:
    """Prints the table, in parts that fit a terminal of 80 columns."""
    for title, heads, rows in parts(results):
        shown = Table(title=title, title_justify="left")
        shown.add_column(heads[0], no_wrap=True)
        for head in heads[1:]:
            shown.add_column(head, justify="right")
        for row in rows:
            shown.add_row(*row)
        console.print(shown)


def markdown(results: dict[str, Any]) -> str:
    """The same parts in Markdown, for a README or a model card."""
    blocks = []
    for title, heads, rows in parts(results):
        lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
        blocks.append("\n".join([f"{title}:", "", *lines, *("| " + " | ".join(row) + " |" for row in rows)]))
    return "\n\n".join(blocks)


def distances(results: dict[str, Any]) -> list[int]:
    """Every distance at which some contestant was asked, in tokens."""
    return sorted({int(d) for entry in results["summary"].values() for d in entry.get("recall", {})})


def _contexts(results: dict[str, Any]) -> list[int]:
    costs = [entry["cost"] for entry in results["summary"].values() if "cost" in entry]
    return sorted({int(c) for cost in costs for c in cost["decode_ms_per_token"]})


def _total(entry: dict[str, Any], ability: str) -> tuple[int, int]:
    """Right answers and questions of a contestant, over all levels."""
    levels = entry.get("abilities", {}).get(ability, {}).values()
    return sum(s["correct"] for s in levels), sum(s["asked"] for s in levels)


def _leaders(results: dict[str, Any], ability: str) -> set[str]:
    """The contestant with most right answers, and those that might be as good: a difference as theirs is no rarer than
    1 in 20 by chance. Nobody where the first is not surely better than guessing."""
    totals = {name: _total(entry, ability) for name, entry in results["summary"].items()}
    totals = {name: total for name, total in totals.items() if total[1]}
    first = max(totals.values(), key=lambda total: total[0] / total[1])
    if wilson(*first)[0] <= _blind(results, ability):
        return set()
    return {name for name, total in totals.items() if (two_proportions(*total, *first) or 0.0) >= 0.05}


def _blind(results: dict[str, Any], ability: str) -> float:
    """How often guesses are right over all levels."""
    entry = next(e for e in results["summary"].values() if ability in e.get("abilities", {}))
    levels = entry["abilities"][ability].values()
    return sum(s["chance"] * s["asked"] for s in levels) / max(1, sum(s["asked"] for s in levels))


_FAMILY = re.compile("^(recall|ability|train|decode|cache) ")


def times(x: float) -> str:
    """A number of windows as the tables have it: 1/4x, 8x."""
    return {0.25: "1/4", 0.5: "1/2"}.get(x, f"{x:g}") + "x"


def _short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


# ---- the page


def page(results: dict[str, Any]) -> str:
    """One HTML file with everything in it: table, plots, and how each number was measured."""
    heads, rows = table(results)
    body = [f"<h1>hf-gallery: {html.escape(results['preset'])} run</h1>", _introduction(results)]
    cells = "".join(
        "<tr>" + f"<th scope='row'>{html.escape(row[0])}</th>" + "".join(f"<td>{html.escape(x)}</td>" for x in row[1:])
        for row in rows
    )
    top = "".join(f"<th scope='col'>{html.escape(head)}</th>" for head in heads)
    body.append(f"<div class='wide'><table><thead><tr>{top}</tr></thead><tbody>{cells}</tbody></table></div>")
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


def _introduction(results: dict[str, Any]) -> str:
    lines = "".join(
        f"<li><b>{html.escape(entry['label'])}</b> sees {html.escape(entry['reach'])}</li>"
        for entry in results["summary"].values()
    )
    return (
        "<p>Models of one width, depth and window, and of the same number of parameters to within 3 %, trained on the "
        f"same batches. They differ in what a query sees:</p><ul>{lines}</ul>"
    )


def figures(results: dict[str, Any]) -> list[tuple[str, str, go.Figure]]:
    """(title, caption, figure) of every plot for which something was measured."""
    plots = []
    entries = [(i, name, e) for i, (name, e) in enumerate(results["summary"].items())]
    window, tested = results["window"]["recall"], distances(results)
    if tested:
        curves = [(i, e["label"], [e["recall"][str(d)] for d in tested]) for i, _, e in entries if "recall" in e]
        figure = _curves(curves, [times(d / window) for d in tested], [results["chance"]] * len(tested))
        figure.update_xaxes(title=f"distance, in windows of {window} tokens")
        caption = (
            "Share of right answers by the distance from where something was written to where it is asked for. "
            "Bars are 95 % intervals (Wilson)."
        )
        plots.append(("What each remembers", caption, figure))
    for name, about in results["abilities"].items():
        levels = next(e["abilities"][name] for _, _, e in entries if name in e.get("abilities", {}))
        curves = [
            (i, e["label"], [e["abilities"][name][level] for level in levels])
            for i, _, e in entries
            if name in e.get("abilities", {})
        ]
        figure = _curves(curves, list(levels), [score["chance"] for score in levels.values()])
        figure.update_xaxes(title=about["axis"])
        beyond = [level for level, score in levels.items() if not score["trained"]]
        caption = about["about"] + (f" Never practised: {', '.join(beyond)}." if beyond else "")
        plots.append((f"{about['title']} ({about['group']})", caption, figure))
    bits = [(i, e["label"], e["bits_per_byte"]) for i, _, e in entries if "bits_per_byte" in e]
    if bits:
        figure = go.Figure(
            go.Bar(
                y=[label for _, label, _ in bits],
                x=[mean(b) for _, _, b in bits],
                orientation="h",
                marker={"color": [COLOURS[i % len(COLOURS)] for i, _, _ in bits]},
                text=[f"{mean(b):.3f}" for _, _, b in bits],
                textposition="inside",
                hovertemplate="%{y}: %{x:.4f}<extra></extra>",
            )
        )
        if results["order0_bits_per_byte"] is not None:
            figure.add_vline(
                x=results["order0_bits_per_byte"],
                line_dash="dot",
                annotation_text="order-0 bytes",
                annotation_position="bottom left",
            )
        figure.update_xaxes(title="bits per byte, lower is better", rangemode="tozero")
        figure.update_yaxes(autorange="reversed")
        plots.append(
            (
                "How well each models text",
                "Held-out documents, each read from its first byte to its last with the state carried along. "
                "The dotted line is a model that knows how frequent each byte is and nothing else.",
                figure,
            )
        )
    for key, title, axis, caption in (
        (
            "by_position",
            "Does more context help?",
            "bytes of the document read before, at least",
            "Bits per byte over the stretches of a document. A line that goes on falling is a model that uses what it "
            "read long ago.",
        ),
        (
            "by_last_use",
            "Names and other rare words",
            "bytes since the document used the word last, at least",
            "Bits per byte of words that are rare in the training text: their first use, and later ones by the "
            "distance to the last. Who remembers a name pays less for it.",
        ),
    ):
        sums = [(i, e["label"], e[key]) for i, _, e in entries if e.get(key)]
        if sums:
            plots.append((title, caption, _bit_curves(sums, axis)))
    costs = [(i, e["label"], e["cost"]) for i, _, e in entries if "cost" in e]
    if costs:
        plots.append(
            _bars(
                "What training costs: time",
                "Forward and backward, median of steps taken in turns.",
                costs,
                lambda c: c["training_tokens_per_second"],
                "tokens per second, higher is better",
            )
        )
        plots.append(
            _bars(
                "What training costs: memory",
                "Tensors alive at the worst moment of a training step, beyond the weights.",
                costs,
                lambda c: c["training_peak_bytes"] / 2**20,
                "MiB, lower is better",
            )
        )
        contexts = _contexts(results)
        for key, unit, title, caption, scale in (
            ("decode_ms_per_token", "ms per token", "What decoding costs: time", "Median over tokens, in turns.", 1),
            ("cache_bytes", "KiB", "What decoding costs: state", "Bytes of the cache after the context.", 2**10),
        ):
            figure = go.Figure()
            for i, label, c in costs:
                figure.add_scatter(
                    x=[_short(n) for n in contexts],
                    y=[c[key][str(n)] / scale for n in contexts],
                    name=label,
                    mode="lines+markers",
                    line={"color": COLOURS[i % len(COLOURS)]},
                    marker={"symbol": SYMBOLS[i % len(SYMBOLS)], "size": 9},
                )
            figure.update_xaxes(title="tokens read before", type="category")
            figure.update_yaxes(title=unit, rangemode="tozero")
            if key == "cache_bytes":
                figure.update_yaxes(type="log", dtick=1)  # plotly writes the digits between powers of ten too small
            plots.append((title, caption, figure))
    for _, _, figure in plots:
        figure.update_layout(
            template="none",
            paper_bgcolor="rgba(0,0,0,0)",
            plot_bgcolor="rgba(0,0,0,0)",
            margin={"l": 10, "r": 10, "t": 20, "b": 10},
            legend={"orientation": "h", "y": -0.3},
            height=420,
        )
        figure.update_xaxes(automargin=True, gridcolor="rgba(128,128,128,0.25)")
        figure.update_yaxes(automargin=True, gridcolor="rgba(128,128,128,0.25)")
    return plots


def _curves(curves: list[tuple[int, str, list[dict[str, Any]]]], levels: list[str], chance: list[float]) -> go.Figure:
    """Shares of right answers by level with their intervals, a line for each (number, label, scores) of a contestant,
    and what guesses give."""
    figure = go.Figure()
    for i, label, scores in curves:
        share = [s["correct"] / max(1, s["asked"]) for s in scores]
        limits = [wilson(s["correct"], s["asked"]) for s in scores]
        figure.add_scatter(
            x=levels,
            y=share,
            name=label,
            mode="lines+markers",
            line={"color": COLOURS[i % len(COLOURS)]},
            marker={"symbol": SYMBOLS[i % len(SYMBOLS)], "size": 9},
            error_y={
                "array": [high - y for (_, high), y in zip(limits, share, strict=True)],
                "arrayminus": [y - low for (low, _), y in zip(limits, share, strict=True)],
            },
            customdata=[[s["correct"], s["asked"]] for s in scores],
            hovertemplate="%{y:.1%} at %{x} (%{customdata[0]} of %{customdata[1]})",
        )
    figure.add_scatter(x=levels, y=chance, name="chance", mode="lines", line={"dash": "dot", "color": "#888888"})
    figure.update_yaxes(title="right answers", tickformat=".0%", range=[-0.02, 1.04])
    figure.update_xaxes(type="category")
    return figure


def _bit_curves(curves: list[tuple[int, str, dict[str, dict[str, float]]]], axis: str) -> go.Figure:
    """Bits per byte by label, a line for each (number, label, sums) of a contestant."""
    figure = go.Figure()
    for i, label, sums in curves:
        figure.add_scatter(
            x=list(sums),
            y=[s["bits"] / max(1, s["bytes"]) for s in sums.values()],
            name=label,
            mode="lines+markers",
            line={"color": COLOURS[i % len(COLOURS)]},
            marker={"symbol": SYMBOLS[i % len(SYMBOLS)], "size": 9},
            customdata=[[s["bytes"]] for s in sums.values()],
            hovertemplate="%{y:.3f} bits per byte at %{x} (%{customdata[0]:,} bytes)",
        )
    figure.update_xaxes(title=axis, type="category")
    figure.update_yaxes(title="bits per byte, lower is better")
    return figure


def _bars(title, caption, costs, value, axis):
    figure = go.Figure(
        go.Bar(
            y=[label for _, label, _ in costs],
            x=[value(c) for _, _, c in costs],
            orientation="h",
            marker={"color": [COLOURS[i % len(COLOURS)] for i, _, _ in costs]},
            text=[f"{value(c):,.0f}" for _, _, c in costs],
            textposition="inside",
            hovertemplate="%{y}: %{x:,.1f}<extra></extra>",
        )
    )
    figure.update_xaxes(title=axis)
    figure.update_yaxes(autorange="reversed")
    return title, caption, figure


def _provenance(results: dict[str, Any]) -> str:
    """Where each number comes from: settings, and for every cell its file, seconds, machine, versions and command."""
    rows = []
    for cell in results["cells"]:
        p = cell["provenance"]
        machine = f"{p['machine']['processor']}, {p['machine']['torch_threads']} threads, {p['machine']['device']}"
        versions = ", ".join(f"{name} {v}" for name, v in p["versions"].items())
        name = f"{cell['task']}.{cell['contestant']}.{cell['seed']}"
        texts = (f"cells/{name}.json", f"{cell['seconds']:.0f} s", p["date"], machine, versions, p["command"])
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
