"""The plots of a run: what each contestant remembers, how it reasons, how it models text, what it costs.

A plot is data: values with their 95 % intervals, and where they stand on its axes. The page draws it as SVG
(templates/plots.js). No library of plots is used: plotly's smallest bundle is a megabyte and not on
PyPI, so it would have to be kept here, and its plots can neither be read by keyboard nor take the page's colours; what
the page needs of one is 200 lines.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from statistics import mean
from typing import Any

from .contestants import CONTESTANTS
from .outside import OUTSIDE
from .significance import QUESTION, answers, interval, pooled, sums_interval, text_interval, values_interval

# In the order of the contestants, and taken in turns by whatever else there are several of.
KNOWN = CONTESTANTS | OUTSIDE
COLOURS = [c.colour for c in KNOWN.values()]
SYMBOLS = [c.symbol for c in KNOWN.values()]
# Of curves of one contestant at rising sizes, whose numbers begin at SIZES: from pale to deep.
RAMP, SIZES = ["#9a8fc4", "#7c6bb8", "#5e49ab", "#41299c", "#26106f"], 1000


@dataclasses.dataclass(frozen=True)
class Point:
    """A measured value with its 95 % interval, where one is known. said: both in words."""

    x: float
    y: float
    said: str
    limits: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Series:
    """A curve. contestant: the name by which it is chosen; number: by which it is drawn, see `place`."""

    contestant: str
    label: str
    number: int
    points: tuple[Point, ...]


@dataclasses.dataclass(frozen=True)
class Axis:
    """An axis from `low` to `high`. ticks: its values that are written, in words."""

    title: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """The place of a value: 0 at the low end of the axis, 1 at the high one."""
        low, high, value = (
            (math.log(max(x, 1e-12)) for x in (self.low, self.high, value))
            if self.logarithmic
            else (self.low, self.high, value)
        )
        return (value - low) / (high - low) if high > low else 0.5


@dataclasses.dataclass(frozen=True)
class Plot:
    """A plot. stops: values of x at which it is read, in words. rows: a contestant stands in each row, and x measures;
    else y does. named: its curves are told apart beside it, since all are of one contestant. guesses: (x, y) of what
    knows nothing of the input."""

    title: str
    caption: str
    group: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    stops: tuple[tuple[float, str], ...]
    guesses: tuple[tuple[float, float], ...] = ()
    rows: bool = False
    named: bool = False


Entries = list[tuple[int, str, dict[str, Any]]]  # number, name and summary of each contestant
MARKS = tuple((x / 100, f"{x} %") for x in (0, 25, 50, 75, 100))
MEMORY, REASONING, TEXT, COST = "memory", "reasoning", "text", "cost"


def figures(results: dict[str, Any]) -> list[Plot]:
    """Every plot for which something was measured."""
    entries = [(place(name, results), name, e) for name, e in results["summary"].items()]
    plots = [*_recall(results, entries), *_abilities(results, entries), *_learning_curves(results, entries)]
    return [*plots, *_text(results, entries), *_training_curves(results, entries), *_costs(entries)]


def place(name: str, results: dict[str, Any]) -> int:
    """The number by which a contestant is drawn, the same in every run; one that is not known comes last."""
    known = list(KNOWN)
    return known.index(name) if name in known else len(known) + list(results["summary"]).index(name)


# ---- right answers


def _recall(results: dict[str, Any], entries: Entries) -> list[Plot]:
    """The forgetting curves, and how they move with the size of a memory."""
    window, tested = results["window"]["recall"], distances(results)
    if not tested:
        return []
    labels, axis = [times(d / window) for d in tested], f"distance, in windows of {window} tokens"
    chance = [results["chance"]] * len(tested)
    series = [
        _shares(name, e["label"], i, [e["recall"].get(str(d)) for d in tested])
        for i, name, e in entries
        if "recall" in e
    ]
    caption = (
        "Share of right answers by the distance from where something was written to where it is asked for. "
        f"Bands are 95 % intervals ({_drawn(results)})."
    )
    about = {"group": MEMORY, "axis": axis}
    plots = [_answered(labels, series, chance, title="What each remembers", caption=caption, **about)]
    own = results["settings"]["recall"]["sizes"]["memory_size"]
    for name, entry in ((name, e) for _, name, e in entries if e.get("recall_by_memory_size")):
        sizes = entry["recall_by_memory_size"] | {str(own): entry["recall"]}
        series = [
            _shares(name, f"{int(size):,} keys", SIZES + i, [scores.get(str(d)) for d in tested])
            for i, (size, scores) in enumerate(sorted(sizes.items(), key=lambda item: int(item[0])))
        ]
        title = f"{entry['label']}: how much memory is enough?"
        caption = f"The same trained model, read with that many stored keys per head; it trained with {own:,}."
        plot = _answered(labels, series, chance, title=title, caption=caption, **about)
        plots.append(dataclasses.replace(plot, named=True))
    return plots


def _drawn(results: dict[str, Any]) -> str:
    """Tells how the intervals of recall were found."""
    scores = (score for entry in results["summary"].values() for score in entry.get("recall", {}).values())
    units = {answers(score).unit for score in scores}
    return "Wilson, by question" if QUESTION in units else "examples drawn anew"


def _abilities(results: dict[str, Any], entries: Entries) -> list[Plot]:
    """A curve of each ability over its levels."""
    plots = []
    for ability, about in results["abilities"].items():
        levels = next(e["abilities"][ability] for _, _, e in entries if ability in e.get("abilities", {}))
        series = [
            _shares(name, e["label"], i, [e["abilities"][ability].get(level) for level in levels])
            for i, name, e in entries
            if ability in e.get("abilities", {})
        ]
        beyond = [level for level, score in levels.items() if not score["trained"]]
        caption = about["about"] + (f" Never practised: {', '.join(beyond)}." if beyond else "")
        title, chance = f"{about['title']} ({about['group']})", [score["chance"] for score in levels.values()]
        more = {"group": about["group"], "axis": about["axis"]}
        plots.append(_answered(list(levels), series, chance, title=title, caption=caption, **more))
    return plots


def _learning_curves(results: dict[str, Any], entries: Entries) -> list[Plot]:
    """A curve of each ability over the steps of its training, of all practised levels together."""
    plots = []
    for ability, about in results["abilities"].items():
        learned = [(i, name, e) for i, name, e in entries if ability in e.get("learning_curves", {})]
        if not learned:
            continue
        levels = learned[0][2]["learning_curves"][ability]
        steps = list(next(iter(levels.values())))
        series = []
        for i, name, e in learned:
            curves = e["learning_curves"][ability]
            points = []
            for step in steps:
                score = pooled({level: curve[step] for level, curve in curves.items() if step in curve})
                points.append(Point(int(step), score.share, f"{_percent(score.share)} of {score.asked:,} tokens"))
            series.append(Series(name, e["label"], i, tuple(points)))
        last = int(steps[-1])
        ticks = tuple((x, f"{x:,g}") for x in _ticks(0, last) if x <= last)
        plots.append(
            Plot(
                f"{about['title']}: how it was learned",
                f"Tokens of answers that were the model's first choice while it trained, in held-out examples of the "
                f"practised levels ({', '.join(levels)}). No bands: the examples that tokens stand in are not told "
                "apart.",
                about["group"],
                Axis("steps of training", 0, last, ticks),
                Axis("right tokens", 0, 1, MARKS),
                tuple(series),
                tuple((int(step), f"{int(step):,}") for step in steps),
            )
        )
    return plots


def _shares(name: str, label: str, number: int, scores: list[dict[str, Any] | None]) -> Series:
    """The curve of a contestant's shares of right answers, level after level; None where it was not asked."""
    points = []
    for level, score in enumerate(scores):
        if score is None:
            continue
        share, (low, high) = score["correct"] / max(1, score["asked"]), interval(answers(score))
        said = f"{_percent(share)} ({_percent(low, high)}; {score['correct']:,} of {score['asked']:,})"
        points.append(Point(level, share, said, (low, high)))
    return Series(name, label, number, tuple(points))


def _percent(*shares: float) -> str:
    return " to ".join(f"{100 * x:.0f}" for x in shares) + " %"


def _answered(
    levels: list[str], series: list[Series], chance: list[float], *, title: str, caption: str, group: str, axis: str
) -> Plot:
    """A plot of shares of right answers by level, and of what guesses give."""
    x, stops = _by_label(axis, levels)
    y = Axis("right answers", 0, 1, MARKS)
    return Plot(title, caption, group, x, y, tuple(series), stops, guesses=tuple(enumerate(chance)))


def _by_label(title: str, labels: list[str]) -> tuple[Axis, tuple[tuple[float, str], ...]]:
    """An axis on which labels stand side by side, and the stops at them."""
    stops = tuple((float(i), label) for i, label in enumerate(labels))
    return Axis(title, 0, max(1, len(labels) - 1), stops), stops


# ---- text


LOWER = "bits per byte, lower is better"
# Number, name, label, sums and intervals of a contestant.
BitCurve = tuple[int, str, str, dict[str, dict[str, Any]], Mapping[str, "tuple[float, float] | None"]]


def _text(results: dict[str, Any], entries: Entries) -> list[Plot]:
    """Bits per byte: as a number, by position in a document, of rare words, and by the size of a memory."""
    plots = []
    read = [(i, name, e) for i, name, e in entries if e.get("bits_per_byte")]
    if read:
        plots.append(_bits_of_each(results, read))
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
        sums: list[BitCurve] = [(i, name, e["label"], e[key], {}) for i, name, e in entries if e.get(key)]
        if sums:
            plots.append(_bit_curves(title, caption, axis, sums))
    by_size: list[BitCurve] = []
    for i, name, e in entries:
        if e.get("text_by_memory_size"):
            sizes = dict(sorted(e["text_by_memory_size"].items(), key=lambda item: int(item[0])))
            limits = {
                size: text_interval({"by_document": seeds})
                for size, seeds in e.get("by_document_of_memory_size", {}).items()
            }
            by_size.append((i, name, e["label"], sizes, limits))
    if by_size:
        caption = "The same trained model, read with that many stored keys per head; the last is its own. "
        caption += "Documents differ more than sizes do; claims compare sizes document by document."
        plots.append(_bit_curves("Does a larger memory help with text?", caption, "keys in memory", by_size))
    return plots


def _bits_of_each(results: dict[str, Any], read: Entries) -> Plot:
    """Bits per byte of each contestant with its interval, a row for each."""
    series = []
    for row, (i, name, e) in enumerate(read):
        value, limits = mean(e["bits_per_byte"]), text_interval(e)
        said = f"{value:.3f} bits per byte" + (f" ({limits[0]:.3f} to {limits[1]:.3f})" if limits else "")
        series.append(Series(name, e["label"], i, (Point(value, row, said, limits),)))
    caption = "Held-out documents, each read from its first byte to its last with the state carried along."
    if all(s.points[0].limits for s in series):
        caption += (
            " Lines are 95 % intervals over other documents. All read the same ones and are compared document by "
            "document, so that contestants whose lines overlap may differ surely."
        )
    else:
        caption += " Results that did not keep the bits of each document have no intervals."
    if results["order0_bits_per_byte"] is not None:
        caption += (
            f" A model that knows how frequent each byte is and nothing else needs "
            f"{results['order0_bits_per_byte']:.3f} bits."
        )
    x = _measured(LOWER, ((p.x, p.limits) for s in series for p in s.points))
    stops = tuple((float(row), s.label) for row, s in enumerate(series))
    y = Axis("", 0, max(1, len(series) - 1), stops)
    return Plot("How well each models text", caption, TEXT, x, y, tuple(series), stops, rows=True)


def _bit_curves(
    title: str,
    caption: str,
    axis: str,
    curves: list[BitCurve],
) -> Plot:
    """Bits per byte by label, a curve for each (number, name, label, sums, intervals) of a contestant. Intervals that
    are not given come from the sums themselves, where those hold their documents."""
    labels = list(dict.fromkeys(label for *_, sums, _ in curves for label in sums))
    series = []
    for i, name, said_as, sums, given in curves:
        points = []
        for label, s in sums.items():
            bits, limits = s["bits"] / max(1, s["bytes"]), given.get(label) or sums_interval(s)
            said = f"{bits:.3f}" + (f" ({limits[0]:.3f} to {limits[1]:.3f})" if limits else "")
            points.append(Point(labels.index(label), bits, f"{said} on {s['bytes']:,} bytes", limits))
        series.append(Series(name, said_as, i, tuple(points)))
    caption += _bands(series, "over other documents", "the bits of each document here")
    x, stops = _by_label(axis, [_kilo(label) for label in labels])
    y = _measured(LOWER, ((p.y, p.limits) for s in series for p in s.points))
    return Plot(title, caption, TEXT, x, y, tuple(series), stops)


def _bands(series: list[Series], drawn: str, kept: str) -> str:
    """Tells in a caption how the intervals were found, or why there are none."""
    known = {p.limits is not None for s in series for p in s.points}
    return f" Bands are 95 % intervals {drawn}." if True in known else f" No bands: these results did not keep {kept}."


def _kilo(label: str) -> str:
    return short(int(label)) if label.isdigit() else label


def _training_curves(results: dict[str, Any], entries: Entries) -> list[Plot]:
    """Bits per byte while training, by the time that the bytes read until then take at the speed under cost."""
    text, series = results["settings"]["text"], []
    for i, name, e in entries:
        if "training_curve" not in e or "cost" not in e:
            continue
        seconds = text["lanes"] * text["length"] / e["cost"]["training_tokens_per_second"]  # of a step
        points = []
        for step in e["training_curve"][0]:
            seeds = [curve[step] for curve in e["training_curve"] if step in curve]
            limits, x = values_interval(seeds), int(step) * seconds
            said = f"{mean(seeds):.3f}" + (f" ({limits[0]:.3f} to {limits[1]:.3f})" if limits else "")
            points.append(Point(x, mean(seeds), f"{said} after {x:,.0f} s", limits))
        series.append(Series(name, e["label"], i, tuple(points)))
    if not series:
        return []
    longest = max(p.x for s in series for p in s.points)
    marks = tuple((x, f"{x:,g}") for x in _ticks(0, longest))
    x = Axis("seconds of training, by the speed under cost", 0, marks[-1][0], marks)
    y = _measured("bits per byte of the training text", ((p.y, p.limits) for s in series for p in s.points))
    stops = tuple((longest * i / 20, f"about {longest * i / 20:,.0f} s") for i in range(1, 21))
    caption = "What a second of training buys: all read the same bytes, the quicker ones sooner."
    caption += _bands(series, "of the mean over seeds", "more than one seed of text")
    return [Plot("Bits per byte by training time", caption, TEXT, x, y, tuple(series), stops)]


# ---- cost


@dataclasses.dataclass(frozen=True)
class _Cost:
    """A plot of one cost. of: its values by length, in a contestant's `cost`. slope: its name in cost.slopes. limits:
    the intervals beside the values. unbanded: the reason why it has none."""

    title: str
    caption: str
    axis: str
    unit: str
    scale: float
    of: Callable[[dict[str, Any]], dict[str, float]]
    slope: str | None = None
    logarithmic: bool = False
    limits: Callable[[dict[str, Any]], dict[str, list[float]]] = lambda cost: {}
    unbanded: str = ""


def _in_training(key: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda cost: {length: x[key] for length, x in cost["training"].items() if key in x}


STEP, READ = "tokens of a row in a step", "tokens read before"
COUNTED = "Counted, so the same whenever it is measured."
COSTS = (
    _Cost(
        "What training costs: time",
        "Forward and backward, median of steps taken in turns. A level line is a cost that is linear in length.",
        STEP,
        "tokens per second",
        1,
        _in_training("tokens_per_second"),
        "training_seconds",
        limits=_in_training("tokens_per_second_interval"),
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
        unbanded=COUNTED,
    ),
    _Cost(
        "What training costs: operations",
        "Floating-point operations of matrix products, forward and backward.",
        STEP,
        "MFLOP per token",
        1e6,
        _in_training("flops_per_token"),
        unbanded=COUNTED,
    ),
    _Cost(
        "How well training uses the machine",
        "Operations per second as a share of what a product of two large matrices reaches on it.",
        STEP,
        "% of its peak speed",
        0.01,
        _in_training("utilisation"),
        limits=_in_training("utilisation_interval"),
    ),
    _Cost(
        "What reading costs: time",
        "A text read from its first token on, in chunks, all models in turns.",
        "tokens read",
        "tokens per second",
        1,
        lambda cost: cost["prefill_tokens_per_second"],
        "prefill_seconds",
        limits=lambda cost: cost.get("prefill_interval", {}),
    ),
    _Cost(
        "What decoding costs: time",
        "Median over tokens, in turns.",
        READ,
        "ms per token",
        1,
        lambda cost: cost["decode_ms_per_token"],
        "decode_seconds",
        limits=lambda cost: cost.get("decode_interval", {}),
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
        unbanded=COUNTED,
    ),
)


def _costs(entries: Entries) -> list[Plot]:
    """Plots of the cost of training, reading and decoding by length."""
    costs = [(i, name, e["label"], e["cost"]) for i, name, e in entries if "cost" in e]
    plots = []
    for about in COSTS if costs else ():
        series = []
        for i, name, label, cost in costs:
            power = cost["slopes"].get(about.slope)
            told = "" if power is None else f"; cost grows as length to the power of {power:.2f}"
            known, points = about.limits(cost), []
            for n, value in about.of(cost).items():
                limits = (known[n][0] / about.scale, known[n][1] / about.scale) if n in known else None
                between = f" ({limits[0]:,.4g} to {limits[1]:,.4g})" if limits else ""
                points.append(Point(int(n), value / about.scale, f"{value / about.scale:,.4g}{between}{told}", limits))
            series.append(Series(name, label, i, tuple(points)))
        lengths = sorted({p.x for s in series for p in s.points})
        stops = tuple((n, short(int(n))) for n in lengths)
        x = Axis(about.axis, lengths[0], lengths[-1], stops, logarithmic=True)
        values = [(p.y, p.limits) for s in series for p in s.points]
        y = _powers(about.unit, values) if about.logarithmic else _measured(about.unit, [(0.0, None), *values])
        said = about.unbanded and f" {about.unbanded}"
        caption = about.caption + (said or _bands(series, "of the median", "six times or more of each"))
        plots.append(Plot(about.title, caption, COST, x, y, tuple(series), stops))
    return plots


# ---- axes


def _measured(title: str, values: Iterable[tuple[float, tuple[float, float] | None]]) -> Axis:
    """An axis that holds values and their intervals, from one round number to another."""
    found = [x for value, limits in values for x in (value, *(limits or ()))]
    marks = _ticks(min(found), max(found))
    digits = max(0, -math.floor(math.log10(marks[1] - marks[0]) + 1e-9))
    return Axis(title, marks[0], marks[-1], tuple((x, f"{x:,.{digits}f}") for x in marks))


def _powers(title: str, values: Iterable[tuple[float, tuple[float, float] | None]]) -> Axis:
    """A logarithmic axis between powers of 4: those of 10 are too few here."""
    found = [max(value, 1e-12) for value, _ in values]
    low, high = math.floor(math.log(min(found), 4) + 1e-9), math.ceil(math.log(max(found), 4) - 1e-9)
    marks = tuple((4.0**k, f"{4.0**k:,g}") for k in range(low, max(high, low + 1) + 1))
    return Axis(title, marks[0][0], marks[-1][0], marks, logarithmic=True)


def _ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers, at least two and about `most` at most, the first of them at `low` or below, the last at `high` or
    above."""
    if high <= low:
        low, high = low - abs(low) / 2 - 0.5 * (low == 0), high + abs(high) / 2 + 0.5 * (high == 0)
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(k * power for k in (1, 2, 5, 10) if k * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [k * step for k in range(first, last + 1)]


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
    return f"{tokens // 1024}k" if tokens and tokens % 1024 == 0 else str(tokens)
