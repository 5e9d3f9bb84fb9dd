"""Claims of the papers, held against what a run measured: reproduced, not reproduced, or not decided.

A claim is decided where chance alone would give the difference more rarely than 1 in 20. Answers are compared by
example (significance.answers_differ), text by document (significance.texts_differ).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from statistics import mean
from typing import Any

from .contestants import CONTESTANTS
from .significance import Answers, Chance, answers_differ, pooled, texts_differ

REPRODUCED, UNDECIDED, NOT_REPRODUCED, NOT_MEASURED = "reproduced", "undecided", "not reproduced", "not measured"
ATTENTION_ONLY = tuple(c.name for c in CONTESTANTS.values() if c.carries in ("nothing", "keys"))
STRAIGHT = 1.15  # the slope of a cost against length, both on logarithmic scales, up to which it counts as linear


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One claim and what became of it. evidence: the numbers, in a sentence."""

    claim: str
    paper: str
    outcome: str
    evidence: str


def verdicts(results: dict[str, Any]) -> list[Verdict]:
    """Every claim for which the run measured enough."""
    return [verdict for verdict in all_verdicts(results) if verdict.outcome != NOT_MEASURED]


def all_verdicts(results: dict[str, Any]) -> list[Verdict]:
    """Every claim, also those for which the run measured too little. Of one that does not come out here, the evidence
    says by what sizes its paper found it."""
    found = []
    for claim, paper, judge in CLAIMS:
        outcome, evidence = judge(results) or (NOT_MEASURED, "")
        if outcome in (UNDECIDED, NOT_REPRODUCED):
            evidence += f"; the paper's models: {SIZES_OF_PAPERS[paper]}"
        found.append(Verdict(claim, paper, outcome, evidence))
    return found


Judged = tuple[str, str] | None  # outcome and evidence; None: not measured


def _recall_beyond_the_window(results: dict[str, Any]) -> Judged:
    """Transformer-XL against the windowed Transformer, all distances from two windows on together."""
    scores = [_recall_from(results, name, 2.0) for name in ("transformer_xl", "transformer")]
    return _shares(scores, "Transformer-XL", "windowed", "right from two windows back on")


def _recall_through_depth(results: dict[str, Any]) -> Judged:
    """Longformer against the windowed Transformer at two windows: what one layer's window does not reach."""
    scores = [_recall_at(results, name, 2.0) for name in ("longformer", "transformer")]
    return _shares(scores, "Longformer", "windowed", "right at two windows")


def _recall_through_a_memory(results: dict[str, Any]) -> Judged:
    """Longformer-XL against the windowed Transformer of its segment's length, all distances from two windows on
    together: no gradient crosses from a segment into its memory."""
    scores = [_recall_from(results, name, 2.0) for name in ("longformer_xl", "transformer")]
    return _shares(scores, "Longformer-XL", "windowed", "right from two windows back on")


def _recall_by_a_state(results: dict[str, Any]) -> Judged:
    """Block-Recurrent against the windowed Transformer, where the state alone still holds what was written: beyond
    the windows of all layers together, that is at the far end."""
    return _at_the_far_end(results, ("block_recurrent_transformer", "transformer"), ("Block-Recurrent", "windowed"))


def _recall_by_memory_tokens(results: dict[str, Any]) -> Judged:
    """Recurrent Memory against the windowed Transformer, all distances from two windows on together: nothing but the
    memory tokens goes from one segment into the next."""
    scores = [_recall_from(results, name, 2.0) for name in ("recurrent_memory_transformer", "transformer")]
    return _shares(scores, "Recurrent Memory", "windowed", "right from two windows back on")


def _recall_with_memory_tokens(results: dict[str, Any]) -> Judged:
    """Recurrent Memory against another of a quarter of its memory tokens, trained alike, from two windows on."""
    names = ("recurrent_memory_transformer", "recurrent_memory_transformer_few")
    scores = [_recall_from(results, name, 2.0) for name in names]
    return _shares(scores, "all its memory tokens", "a quarter of them", "right from two windows back on")


def _text_with_memory_tokens(results: dict[str, Any]) -> Judged:
    return _texts(results, "recurrent_memory_transformer", "transformer", "Recurrent Memory", "windowed")


def _recall_at_the_far_end(results: dict[str, Any]) -> Judged:
    """Memorizing against Transformer-XL at the longest distance."""
    return _at_the_far_end(results, ("memorizing_transformer", "transformer_xl"), ("Memorizing", "Transformer-XL"))


def _recall_with_memory_size(results: dict[str, Any]) -> Judged:
    """The Memorizing Transformer's own memory against the smallest, all distances together."""
    entry = results["summary"].get("memorizing_transformer", {})
    smaller = entry.get("recall_by_memory_size", {})
    if not smaller:
        return None
    size = min(smaller, key=int)
    scores = [pooled(scores) for scores in (entry["recall"], smaller[size])]
    return _shares(scores, "its whole memory", f"its last {int(size):,} keys", "right over all distances")


def _text_with_a_memory(results: dict[str, Any]) -> Judged:
    return _texts(results, "transformer_xl", "transformer", "Transformer-XL", "windowed")


def _text_with_neighbours(results: dict[str, Any]) -> Judged:
    return _texts(results, "memorizing_transformer", "transformer_xl", "Memorizing", "Transformer-XL")


def _text_with_memory_size(results: dict[str, Any]) -> Judged:
    """The same trained model, read with its whole memory and with the smallest."""
    entry = results["summary"].get("memorizing_transformer", {})
    sums = entry.get("text_by_memory_size", {})
    if len(sums) < 2:
        return None
    sizes = sorted(sums, key=int)
    bits = [sums[size]["bits"] / sums[size]["bytes"] for size in sizes]
    curve = ", ".join(f"{b:.3f} with {int(size):,} keys" for b, size in zip(bits, sizes, strict=True))
    kept = [name for name in ("by_document", "by_stretch") if f"{name}_of_memory_size" in entry]
    chance = texts_differ(
        *({name: entry[f"{name}_of_memory_size"][size] for name in kept} for size in (sizes[-1], sizes[0]))
    )
    if chance is None:
        return None
    evidence = f"{curve} (bits per byte; the last against the first: {chance})"
    return _outcome(bits[0] - bits[-1], chance), evidence


def _text_at_equal_cost(results: dict[str, Any]) -> Judged:
    """Block-Recurrent against Transformer-XL: as trained, and beside it what a training step of each costs."""
    judged = _texts(results, "block_recurrent_transformer", "transformer_xl", "Block-Recurrent", "Transformer-XL")
    speeds = [
        results["summary"].get(name, {}).get("cost", {}).get("training_tokens_per_second")
        for name in ("block_recurrent_transformer", "transformer_xl")
    ]
    if judged is None or None in speeds:
        return None
    ratio = speeds[0] / speeds[1]
    outcome, evidence = judged
    if outcome == REPRODUCED and ratio < 0.95:
        outcome = UNDECIDED
    return outcome, f"{evidence}; it trains {ratio:.2f} times as fast"


def _cost_is_linear(results: dict[str, Any]) -> Judged:
    """Growth of a training step's time with its length, Longformer beside the upper line."""
    slopes = {
        name: results["summary"].get(name, {}).get("cost", {}).get("slopes", {}).get("training_seconds")
        for name in ("longformer", "transformer_full")
    }
    if slopes["longformer"] is None:
        return None
    outcome = REPRODUCED if slopes["longformer"] <= STRAIGHT else NOT_REPRODUCED
    evidence = f"time of a step grows as its length to the power of {slopes['longformer']:.2f}"
    if slopes["transformer_full"] is not None:
        evidence += f"; of the Transformer with long segments, {slopes['transformer_full']:.2f}"
    return outcome, evidence


def _permutations(results: dict[str, Any]) -> Judged:
    """Block-Recurrent against whoever of those with nothing but attention does best, over all lengths."""
    scores = {
        name: pooled(entry["abilities"]["permutations"])
        for name, entry in results["summary"].items()
        if "permutations" in entry.get("abilities", {})
    }
    attention = [name for name in ATTENTION_ONLY if name in scores]
    if "block_recurrent_transformer" not in scores or not attention:
        return None
    best = max(attention, key=lambda name: scores[name].share)
    both = [scores["block_recurrent_transformer"], scores[best]]
    return _shares(both, "Block-Recurrent", results["summary"][best]["label"], "right over all lengths")


# Of the papers' own language models; of Bulatov et al. as their Transformer-XL baselines are (Dai et al.'s base).
SIZES_OF_PAPERS = {
    "Dai et al. 2019": "41M to 277M parameters, 12 to 24 layers",
    "Beltagy et al. 2020": "41M and 102M parameters, 12 and 30 layers",
    "Beltagy et al. 2020 with Dai et al. 2019": "41M parameters and more, 12 layers and more",
    "Wu et al. 2022": "200M parameters and more, 12 layers, 500,000 steps",
    "Hutchins et al. 2022": "150M parameters and more, 12 layers, 500,000 steps of 131,072 tokens",
    "Bulatov et al. 2022": "12 and 16 layers, as Transformer-XL's base models",
}
CLAIMS: list[tuple[str, str, Callable[[dict[str, Any]], Judged]]] = [
    ("Transformer-XL remembers beyond its segment", "Dai et al. 2019", _recall_beyond_the_window),
    (
        "Transformer-XL models text better than a Transformer of the same window",
        "Dai et al. 2019",
        _text_with_a_memory,
    ),
    ("Longformer sees beyond one window through its depth", "Beltagy et al. 2020", _recall_through_depth),
    ("Longformer's training cost is linear in length", "Beltagy et al. 2020", _cost_is_linear),
    (
        "Longformer's windows reach beyond a segment through Transformer-XL's memory",
        "Beltagy et al. 2020 with Dai et al. 2019",
        _recall_through_a_memory,
    ),
    ("A kNN memory reaches further than Transformer-XL", "Wu et al. 2022", _recall_at_the_far_end),
    ("A larger kNN memory remembers more", "Wu et al. 2022", _recall_with_memory_size),
    ("A kNN memory models text better than Transformer-XL", "Wu et al. 2022", _text_with_neighbours),
    ("A larger kNN memory models text better", "Wu et al. 2022", _text_with_memory_size),
    ("A recurrent state carries what no window reaches", "Hutchins et al. 2022", _recall_by_a_state),
    ("Block-Recurrent beats Transformer-XL on text at no higher cost", "Hutchins et al. 2022", _text_at_equal_cost),
    ("A recurrent state composes permutations where attention cannot", "Hutchins et al. 2022", _permutations),
    ("Memory tokens carry what lies beyond the segment", "Bulatov et al. 2022", _recall_by_memory_tokens),
    ("More memory tokens hold more", "Bulatov et al. 2022", _recall_with_memory_tokens),
    (
        "Memory tokens model text better than a Transformer of the same segment",
        "Bulatov et al. 2022",
        _text_with_memory_tokens,
    ),
]


def _at_the_far_end(results: dict[str, Any], names: tuple[str, str], labels: tuple[str, str]) -> Judged:
    """The first of two contestants against the second at the longest distance at which anybody was asked."""
    distances = [int(d) for e in results["summary"].values() for d in e.get("recall", {})]
    if not distances:
        return None
    windows = max(distances) / results["window"]["recall"]
    return _shares([_recall_at(results, name, windows) for name in names], *labels, f"right at {windows:g} windows")


def _recall_at(results: dict[str, Any], name: str, windows: float) -> Answers:
    """The answers of a contestant at a distance of `windows` windows."""
    recall = results["summary"].get(name, {}).get("recall", {})
    return pooled({d: score for d, score in recall.items() if int(d) == windows * results["window"]["recall"]})


def _recall_from(results: dict[str, Any], name: str, windows: float) -> Answers:
    """The answers of a contestant at distances of `windows` windows or more."""
    recall = results["summary"].get(name, {}).get("recall", {})
    return pooled({d: score for d, score in recall.items() if int(d) >= windows * results["window"]["recall"]})


def _shares(scores: list[Answers], first: str, second: str, what: str) -> Judged:
    """Tells whether the first of two shares is surely the larger."""
    chance = answers_differ(*scores)
    if chance is None:
        return None
    shares = [100 * score.share for score in scores]
    evidence = f"{first} {shares[0]:.0f} %, {second} {shares[1]:.0f} % {what} ({chance})"
    return _outcome(shares[0] - shares[1], chance), evidence


def _texts(results: dict[str, Any], first: str, second: str, *labels: str) -> Judged:
    """Tells whether the first of two contestants surely needs fewer bits for the same text."""
    entries = [results["summary"].get(name, {}) for name in (first, second)]
    chance = texts_differ(*entries)
    if chance is None:
        return None
    bits = [mean(entry["bits_per_byte"]) for entry in entries]
    evidence = f"{labels[0]} {bits[0]:.3f}, {labels[1]} {bits[1]:.3f} bits per byte ({chance})"
    return _outcome(bits[1] - bits[0], chance), evidence


def _outcome(gain: float, chance: Chance) -> str:
    if not chance.sure:
        return UNDECIDED
    return REPRODUCED if gain > 0 else NOT_REPRODUCED
