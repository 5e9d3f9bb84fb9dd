"""Measurements that contestants are compared by, and the winners of each. Whoever might be as good as the first, by
chance of 1 in 20 or more, is one too."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from statistics import mean
from typing import Any

from .significance import Answers, answers, answers_differ, interval, pooled, text_interval, texts_differ

UPPER_LINE = "transformer_full"  # sees all there is, and competes with nobody


@dataclasses.dataclass(frozen=True)
class Best:
    """The first at something. names: contestants that share the place, the first of them ahead; empty where nobody is
    surely better than a guess. score: the first's, in words."""

    what: str
    names: list[str]
    score: str


@dataclasses.dataclass(frozen=True)
class Value:
    """Result of a contestant: a number, the same in words as short as a table needs, and its 95 % interval."""

    number: float
    said: str
    limits: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Measure:
    """One thing that contestants are compared by. heading, unit: of its column in a table. values: by contestant.
    rises: more is better. best: its winners; None where nobody but the upper line was measured."""

    heading: str
    group: str
    unit: str
    values: dict[str, Value]
    rises: bool
    best: Best | None


def winners(results: dict[str, Any]) -> list[Best]:
    """The best at everything that the run measured. The upper line takes no part: it sees all there is."""
    return [measure.best for measure in measures(results) if measure.best is not None]


def measures(results: dict[str, Any]) -> list[Measure]:
    """Everything that the run measured of contestants, a number each."""
    return [*_answered(results), *_read(results), *_costs(results)]


def _answered(results: dict[str, Any]) -> list[Measure]:
    """Right answers at the longest distance, and of each ability over all levels."""
    summary, found = results["summary"], []
    distances = sorted({int(d) for entry in summary.values() for d in entry.get("recall", {})})
    if distances:
        far = distances[-1]
        windows = far / results["window"]["recall"]
        scores = {
            name: answers(e["recall"][str(far)]) for name, e in summary.items() if str(far) in e.get("recall", {})
        }
        what = (f"recall at {windows:g} windows", f"Recall, {windows:g} windows", "memory")
        found.append(_shares(what, scores, results["chance"]))
    for name, about in results["abilities"].items():
        scores = {n: total(e, name) for n, e in summary.items() if name in e.get("abilities", {})}
        if scores:
            what = (about["title"], about["title"], about.get("group", ""))
            found.append(_shares(what, scores, blind(results, name)))
    return found


def _shares(what: tuple[str, str, str], scores: dict[str, Answers], chance: float) -> Measure:
    """A measure of right answers. what: its name, its heading and its group."""
    values = {name: Value(score.share, f"{100 * score.share:.0f}", interval(score)) for name, score in scores.items()}
    rivals = {name: score for name, score in scores.items() if name != UPPER_LINE}
    return Measure(what[1], what[2], "% right", values, True, _most(what[0], rivals, chance) if rivals else None)


def _read(results: dict[str, Any]) -> list[Measure]:
    """Bits per byte of text."""
    texts = {name: entry for name, entry in results["summary"].items() if entry.get("bits_per_byte")}
    if not texts:
        return []
    bits = {name: mean(entry["bits_per_byte"]) for name, entry in texts.items()}
    values = {name: Value(b, f"{b:.3f}", text_interval(texts[name])) for name, b in bits.items()}
    rivals = {name: entry for name, entry in texts.items() if name != UPPER_LINE}
    best = None
    if rivals:
        first = min(rivals, key=lambda name: bits[name])
        alike = [name for name in rivals if name != first and not _sure(rivals[first], rivals[name])]
        best = Best("text", [first, *alike], f"{bits[first]:.3f} bits per byte")
    return [Measure("Text", "text", "bits per byte", values, False, best)]


def _costs(results: dict[str, Any]) -> list[Measure]:
    """Costs; the cheapest are first, both of two that are equal."""
    costs = {name: entry["cost"] for name, entry in results["summary"].items() if "cost" in entry}
    if not costs:
        return []
    context = max(next(iter(costs.values()))["decode_ms_per_token"], key=int)
    after = f"after {int(context):,} tokens"
    table: list[tuple[str, str, str, Callable[[dict[str, Any]], float], str, str, bool]] = [
        (
            "training speed",
            "Training",
            "tokens/s",
            lambda c: c["training_tokens_per_second"],
            "{:,.0f}",
            " tokens/s",
            True,
        ),
        ("training memory", "Training", "MiB", lambda c: c["training_peak_bytes"] / 2**20, "{:,.0f}", " MiB", False),
        (
            f"decoding {after}",
            "Decoding",
            "ms per token",
            lambda c: c["decode_ms_per_token"][context],
            "{:.2f}",
            " ms",
            False,
        ),
        (f"cache {after}", "Cache", "KiB", lambda c: c["cache_bytes"][context] / 2**10, "{:,.0f}", " KiB", False),
    ]
    found = []
    for what, heading, unit, of, form, told, rises in table:
        values = {name: Value(of(cost), form.format(of(cost))) for name, cost in costs.items()}
        rivals = {name: value.number for name, value in values.items() if name != UPPER_LINE}
        first = (max if rises else min)(rivals.values(), default=None)
        names = [name for name, number in rivals.items() if number == first]
        best = Best(what, names, values[names[0]].said + told) if names else None
        found.append(Measure(heading, "cost", unit, values, rises, best))
    return found


def total(entry: dict[str, Any], ability: str) -> Answers:
    """The answers of a contestant, over all levels."""
    return pooled(entry.get("abilities", {}).get(ability, {}))


def blind(results: dict[str, Any], ability: str) -> float:
    """The share of guesses that are right over all levels."""
    entry = next(e for e in results["summary"].values() if ability in e.get("abilities", {}))
    levels = entry["abilities"][ability].values()
    return sum(s["chance"] * s["asked"] for s in levels) / max(1, sum(s["asked"] for s in levels))


def leaders(scores: dict[str, Answers], chance: float) -> list[str]:
    """Contestants by their answers: who has the largest share of right ones, and who might be as good."""
    asked = {name: score for name, score in scores.items() if score.asked}
    if not asked:
        return []
    first = max(asked, key=lambda name: asked[name].share)
    if interval(asked[first])[0] <= chance:
        return []
    differences = {name: answers_differ(asked[name], asked[first]) for name in asked if name != first}
    return [first, *(name for name, found in differences.items() if found is not None and not found.sure)]


def _most(what: str, scores: dict[str, Answers], chance: float) -> Best:
    best = leaders(scores, chance)
    if not best:
        return Best(what, [], f"nobody surely above a guess, {100 * chance:.0f} %")
    return Best(what, best, f"{100 * scores[best[0]].share:.0f} %")


def _sure(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Tells whether two contestants need different bits for the same text."""
    chance = texts_differ(first, second)
    return chance is not None and chance.sure
