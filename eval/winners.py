"""Winners of each measurement. Whoever might be as good as the first, by chance of 1 in 20 or more, is one too."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from statistics import mean
from typing import Any

from .significance import Answers, answers, answers_differ, interval, pooled, texts_differ


@dataclasses.dataclass(frozen=True)
class Best:
    """The first at something. names: contestants that share the place, the first of them ahead; empty where nobody is
    surely better than a guess. score: the first's, in words."""

    what: str
    names: list[str]
    score: str


def winners(results: dict[str, Any]) -> list[Best]:
    """The best at everything that the run measured. The upper line takes no part: it sees all there is."""
    entries = {name: entry for name, entry in results["summary"].items() if name != "transformer_full"}
    found = []
    distances = sorted({int(d) for entry in entries.values() for d in entry.get("recall", {})})
    if distances:
        far = distances[-1]
        scores = {name: answers(e["recall"][str(far)]) for name, e in entries.items() if "recall" in e}
        windows = far / results["window"]["recall"]
        found.append(_most(f"recall at {windows:g} windows", scores, results["chance"]))
    for name, about in results["abilities"].items():
        scores = {n: total(e, name) for n, e in entries.items() if name in e.get("abilities", {})}
        if scores:
            found.append(_most(about["title"], scores, blind(results, name)))
    texts = {name: entry for name, entry in entries.items() if "bits_per_byte" in entry}
    if texts:
        first = min(texts, key=lambda name: mean(texts[name]["bits_per_byte"]))
        alike = [name for name in texts if name != first and not _sure(texts[first], texts[name])]
        found.append(Best("text", [first, *alike], f"{mean(texts[first]['bits_per_byte']):.3f} bits per byte"))
    costs = {name: entry["cost"] for name, entry in entries.items() if "cost" in entry}
    if costs:
        found += _least(costs)
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


def _least(costs: dict[str, dict[str, Any]]) -> list[Best]:
    """The cheapest contestants; where two measurements are equal, both."""
    context = max(next(iter(costs.values()))["decode_ms_per_token"], key=int)
    measures: list[tuple[str, Callable[[dict[str, Any]], float], str, float]] = [
        ("training speed", lambda c: -c["training_tokens_per_second"], "{:,.0f} tokens/s", -1),
        ("training memory", lambda c: c["training_peak_bytes"], "{:,.0f} MiB", 2**20),
        (f"decoding after {int(context):,} tokens", lambda c: c["decode_ms_per_token"][context], "{:.2f} ms", 1),
        (f"cache after {int(context):,} tokens", lambda c: c["cache_bytes"][context], "{:,.0f} KiB", 2**10),
    ]
    found = []
    for what, value, form, unit in measures:
        least = min(value(c) for c in costs.values())
        names = [name for name, c in costs.items() if value(c) == least]
        found.append(Best(what, names, form.format(least / unit)))
    return found


def _sure(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Tells whether two contestants need different bits for the same text."""
    chance = texts_differ(first, second)
    return chance is not None and chance.sure
