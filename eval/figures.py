"""The plots of a run: what each contestant remembers, how it reasons, how it models text, what it costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from statistics import mean
from typing import Any

import plotly.graph_objects as go

from .contestants import CONTESTANTS
from .outside import OUTSIDE
from .significance import QUESTION, answers, interval, text_interval

# In the order of the contestants, and taken in turns by whatever else there are several of.
KNOWN = CONTESTANTS | OUTSIDE
COLOURS = [c.colour for c in KNOWN.values()]
SYMBOLS = [c.symbol for c in KNOWN.values()]


Plot = tuple[str, str, go.Figure]  # title, caption, figure
Entries = list[tuple[int, str, dict[str, Any]]]  # number, name and summary of each contestant


def figures(results: dict[str, Any]) -> list[Plot]:
    """(title, caption, figure) of every plot for which something was measured."""
    entries = [(place(name, results), name, e) for name, e in results["summary"].items()]
    plots = [*_recall(results, entries), *_abilities(results, entries), *_text(results, entries)]
    plots += _training_curves(results, entries)
    plots += _costs(entries)
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


def place(name: str, results: dict[str, Any]) -> int:
    """The number by which a contestant is drawn, the same in every run; one that is not known comes last."""
    known = list(KNOWN)
    return known.index(name) if name in known else len(known) + list(results["summary"]).index(name)


def _recall(results: dict[str, Any], entries: Entries) -> list[Plot]:
    """The forgetting curves, and how they move with the size of a memory."""
    window, tested, plots = results["window"]["recall"], distances(results), []
    if not tested:
        return []
    labels, axis = [times(d / window) for d in tested], f"distance, in windows of {window} tokens"
    chance = [results["chance"]] * len(tested)
    curves = [(i, e["label"], [e["recall"][str(d)] for d in tested]) for i, _, e in entries if "recall" in e]
    figure = _curves(curves, labels, chance)
    figure.update_xaxes(title=axis)
    caption = (
        "Share of right answers by the distance from where something was written to where it is asked for. "
        f"Bars are 95 % intervals ({_drawn(results)})."
    )
    plots.append(("What each remembers", caption, figure))
    own = results["settings"]["recall"]["sizes"]["memory_size"]
    for entry in (e for _, _, e in entries if e.get("recall_by_memory_size")):
        sizes = entry["recall_by_memory_size"] | {str(own): entry["recall"]}
        curves = [
            (i, f"{int(size):,} keys", [scores[str(d)] for d in tested])
            for i, (size, scores) in enumerate(sizes.items())
        ]
        figure = _curves(curves, labels, chance)
        figure.update_xaxes(title=axis)
        caption = f"The same trained model, read with that many stored keys per head; it trained with {own:,}."
        plots.append((f"{entry['label']}: how much memory is enough?", caption, figure))
    return plots


def _drawn(results: dict[str, Any]) -> str:
    """Tells how the intervals of recall were found."""
    scores = (score for entry in results["summary"].values() for score in entry.get("recall", {}).values())
    units = {answers(score).unit for score in scores}
    return "Wilson, by question" if QUESTION in units else "examples drawn anew"


def _abilities(results: dict[str, Any], entries: Entries) -> list[Plot]:
    """A curve of each ability over its levels."""
    plots = []
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
    return plots


def _text(results: dict[str, Any], entries: Entries) -> list[Plot]:
    """Bits per byte: as a number, by position in a document, of rare words, and by the size of a memory."""
    plots: list[Plot] = []
    bits = [(i, e["label"], e["bits_per_byte"]) for i, _, e in entries if "bits_per_byte" in e]
    if bits:
        means = [mean(b) for _, _, b in bits]
        bands = [band for _, _, e in entries if "bits_per_byte" in e and (band := text_interval(e)) is not None]
        banded = len(bands) == len(bits)
        figure = go.Figure(
            go.Bar(
                y=[label for _, label, _ in bits],
                x=means,
                error_x=_error(means, bands) if banded else None,
                orientation="h",
                marker={"color": [COLOURS[i % len(COLOURS)] for i, _, _ in bits]},
                text=[f"{b:.3f}" for b in means],
                textposition="inside",
                insidetextanchor="start",
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
        figure.update_xaxes(title="bits per byte", rangemode="tozero")
        figure.update_yaxes(autorange="reversed")
        plots.append(
            (
                "How well each models text",
                "Held-out documents, each read from its first byte to its last with the state carried along. "
                "The dotted line is a model that knows how frequent each byte is and nothing else."
                + (" Bars are 95 % intervals over other documents." if banded else ""),
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
    sums = [
        (i, e["label"], dict(sorted(e["text_by_memory_size"].items(), key=lambda item: int(item[0]))))
        for i, _, e in entries
        if e.get("text_by_memory_size")
    ]
    if sums:
        caption = "The same trained model, read with that many stored keys per head; the last is its own."
        plots.append(("Does a larger memory help with text?", caption, _bit_curves(sums, "keys in memory")))
    return plots


def _training_curves(results: dict[str, Any], entries: Entries) -> list[Plot]:
    """Bits per byte while training, by the time that the bytes read until then take at the speed under cost."""
    text = results["settings"]["text"]
    figure = go.Figure()
    for i, _, e in entries:
        if "training_curve" not in e or "cost" not in e:
            continue
        seconds = text["lanes"] * text["length"] / e["cost"]["training_tokens_per_second"]  # of a step
        curve = e["training_curve"][0]
        figure.add_scatter(
            x=[int(step) * seconds for step in curve],
            y=list(curve.values()),
            name=e["label"],
            mode="lines",
            line={"color": COLOURS[i % len(COLOURS)]},
            hovertemplate="%{y:.3f} bits per byte after %{x:,.0f} s",
        )
    if not figure.data:
        return []
    figure.update_xaxes(title="seconds of training, by the speed under cost")
    figure.update_yaxes(title="bits per byte of the training text")
    caption = "What a second of training buys: all read the same bytes, the quicker ones sooner. First seed."
    return [("Bits per byte by training time", caption, figure)]


def _curves(curves: list[tuple[int, str, list[dict[str, Any]]]], levels: list[str], chance: list[float]) -> go.Figure:
    """Shares of right answers by level with their intervals, a line for each (number, label, scores) of a contestant,
    and what guesses give."""
    figure = go.Figure()
    for i, label, scores in curves:
        share = [s["correct"] / max(1, s["asked"]) for s in scores]
        limits = [interval(answers(s)) for s in scores]
        figure.add_scatter(
            x=levels,
            y=share,
            name=label,
            mode="lines+markers",
            line={"color": COLOURS[i % len(COLOURS)]},
            marker={"symbol": SYMBOLS[i % len(SYMBOLS)], "size": 9},
            error_y=_error(share, limits),
            customdata=[[s["correct"], s["asked"]] for s in scores],
            hovertemplate="%{y:.1%} at %{x} (%{customdata[0]} of %{customdata[1]})",
        )
    figure.add_scatter(x=levels, y=chance, name="chance", mode="lines", line={"dash": "dot", "color": "#888888"})
    figure.update_yaxes(title="right answers", tickformat=".0%", range=[-0.02, 1.04])
    figure.update_xaxes(type="category")
    return figure


def _error(values: list[float], limits: list[tuple[float, float]]) -> dict[str, list[float]]:
    """Bars from the lower limit of each value to its upper one."""
    return {
        "array": [high - y for (_, high), y in zip(limits, values, strict=True)],
        "arrayminus": [y - low for (low, _), y in zip(limits, values, strict=True)],
    }


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


@dataclasses.dataclass(frozen=True)
class _Cost:
    """A plot of one cost. of: its values by length, in a contestant's `cost`. slope: its name in cost.slopes."""

    title: str
    caption: str
    axis: str
    unit: str
    scale: float
    of: Callable[[dict[str, Any]], dict[str, float]]
    slope: str | None = None
    logarithmic: bool = False


def _in_training(key: str) -> Callable[[dict[str, Any]], dict[str, float]]:
    return lambda cost: {length: x[key] for length, x in cost["training"].items()}


STEP, READ = "tokens of a row in a step", "tokens read before"
COSTS = (
    _Cost(
        "What training costs: time",
        "Forward and backward, median of steps taken in turns. A level line is a cost that is linear in length.",
        STEP,
        "tokens per second",
        1,
        _in_training("tokens_per_second"),
        "training_seconds",
    ),
    _Cost(
        "What training costs: memory",
        "Tensors alive at the worst moment of a step, beyond the weights. Short rows come several to a step.",
        STEP,
        "MiB",
        2**20,
        _in_training("peak_bytes"),
        "training_peak_bytes",
        logarithmic=True,
    ),
    _Cost(
        "What training costs: operations",
        "Floating-point operations of matrix products, forward and backward.",
        STEP,
        "MFLOP per token",
        1e6,
        _in_training("flops_per_token"),
    ),
    _Cost(
        "How well training uses the machine",
        "Operations per second as a share of what a product of two large matrices reaches on it.",
        STEP,
        "% of its peak speed",
        0.01,
        _in_training("utilisation"),
    ),
    _Cost(
        "What reading costs: time",
        "A text read from its first token on, in chunks, all models in turns.",
        "tokens read",
        "tokens per second",
        1,
        lambda cost: cost["prefill_tokens_per_second"],
        "prefill_seconds",
    ),
    _Cost(
        "What decoding costs: time",
        "Median over tokens, in turns.",
        READ,
        "ms per token",
        1,
        lambda cost: cost["decode_ms_per_token"],
        "decode_seconds",
    ),
    _Cost(
        "What decoding costs: state",
        "Bytes of the cache after the context.",
        READ,
        "KiB",
        2**10,
        lambda cost: cost["cache_bytes"],
        "cache_bytes",
        logarithmic=True,
    ),
)


def _costs(entries: Entries) -> list[Plot]:
    """Plots of the cost of training, reading and decoding by length."""
    costs = [(i, e["label"], e["cost"]) for i, _, e in entries if "cost" in e]
    plots = []
    for about in COSTS if costs else ():
        figure = go.Figure()
        for i, label, cost in costs:
            points = about.of(cost)
            power = cost["slopes"].get(about.slope)
            told = "" if power is None else f"; cost grows as length to the power of {power:.2f}"
            figure.add_scatter(
                x=[int(n) for n in points],
                y=[x / about.scale for x in points.values()],
                name=label,
                mode="lines+markers",
                line={"color": COLOURS[i % len(COLOURS)]},
                marker={"symbol": SYMBOLS[i % len(SYMBOLS)], "size": 9},
                customdata=[[short(int(n))] for n in points],
                hovertemplate="%{y:,.4g} at %{customdata[0]}" + told,
            )
        lengths = sorted({n for trace in figure.data for n in trace.x})
        named = [short(n) for n in lengths]
        figure.update_xaxes(title=about.axis, type="log", tickvals=lengths, ticktext=named)
        figure.update_yaxes(title=about.unit, rangemode="tozero")
        if about.logarithmic:
            # plotly's own ticks are powers of ten, too few here, or digits between them, too small to read
            powers = [4**k for k in range(16)]
            figure.update_yaxes(type="log", tickvals=powers, ticktext=[f"{power:,}" for power in powers])
        plots.append((about.title, about.caption, figure))
    return plots


def distances(results: dict[str, Any]) -> list[int]:
    """Every distance at which some contestant was asked, in tokens."""
    return sorted({int(d) for entry in results["summary"].values() for d in entry.get("recall", {})})


def contexts(results: dict[str, Any]) -> list[int]:
    """Every context after which decoding was measured, in tokens."""
    costs = [entry["cost"] for entry in results["summary"].values() if "cost" in entry]
    return sorted({int(c) for cost in costs for c in cost["decode_ms_per_token"]})


def times(x: float) -> str:
    """A number of windows as the tables have it: 1/4x, 8x."""
    return {0.25: "1/4", 0.5: "1/2"}.get(x, f"{x:g}") + "x"


def short(tokens: int) -> str:
    """A number of tokens as people say it: 4k."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)
