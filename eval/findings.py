"""Findings of a run in sentences: each follows from verdicts, winners and peers, and changes with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from . import peers
from .claims import NOT_MEASURED, NOT_REPRODUCED, REPRODUCED, UNDECIDED, Verdict, all_verdicts
from .winners import winners


@dataclasses.dataclass(frozen=True)
class Finding:
    """A sentence. who: what it is about, with which it begins."""

    who: str
    said: str

    def __str__(self) -> str:
        return f"{self.who} {self.said}"


def findings(results: dict[str, Any]) -> list[Finding]:
    """Findings: how many claims of the papers came out, who is best at what, and what did not come out."""
    verdicts = all_verdicts(results)
    return [*_counts(verdicts), *_of_winners(results), *_open(verdicts), *_of_peers(results)]


def _counts(verdicts: list[Verdict]) -> list[Finding]:
    """A sentence on how many claims had which outcome; none where nothing was measured."""
    count = {x: sum(v.outcome == x for v in verdicts) for x in (REPRODUCED, UNDECIDED, NOT_REPRODUCED, NOT_MEASURED)}
    left = count.pop(NOT_MEASURED)
    if left == len(verdicts):
        return []
    said = _listed(f"{n} {outcome}" for outcome, n in count.items()) + (
        f"; {left} more {NOT_MEASURED}" if left else ""
    )
    return [Finding(f"{len(verdicts) - left} claims of the papers", f"were put to the test: {said}.")]


def _open(verdicts: list[Verdict]) -> list[Finding]:
    """A sentence for each claim that did not come out as its paper says, though it was measured."""
    found = []
    for outcome in (NOT_REPRODUCED, UNDECIDED):
        of = [v for v in verdicts if v.outcome == outcome]
        found += [Finding(f"{outcome.capitalize()}:", f"{v.claim} ({v.paper}). Here: {v.evidence}.") for v in of]
    return found


def _of_winners(results: dict[str, Any]) -> list[Finding]:
    """A sentence for everyone who is first at something, alone or with others who might be as good."""
    labels = {name: entry["label"] for name, entry in results["summary"].items()}
    wins: dict[tuple[str, ...], list[str]] = {}
    nobody = []
    for best in winners(results):
        if best.names:
            wins.setdefault(tuple(best.names), []).append(f"{best.what} ({best.score})")
        else:
            nobody.append(best.what)
    found = []
    for names, what in wins.items():
        first, others = labels[names[0]], _listed(labels[name] for name in names[1:])
        said = f"is best at {_listed(what)}"
        if others:
            said = f"is ahead at {_listed(what)}, but not surely of {others}"
        found.append(Finding(first, f"{said}."))
    if nobody:
        found.append(Finding("Nobody", f"is surely above a guess at {_listed(nobody)}."))
    return found


def _of_peers(results: dict[str, Any]) -> list[Finding]:
    """Speed beside other implementations: what is reached of what was aimed at, and what is not."""
    own = results.get("peers")
    if not own:
        return []
    measured = peers.measured(own)
    ratios = {name: peers.judged(name, entry)["ratio"] for name, entry in measured.items()}
    found = []
    for reached in (True, False):
        told = [
            f"{peers.PEERS[name].label}'s {peers.PEERS[name].work} {ratios[name]:.2f} times as fast as "
            f"{entry['peer']} (aim {entry['target']:g})"
            for name, entry in measured.items()
            if (ratios[name] >= entry["target"]) == reached
        ]
        if told:
            who = f"{len(told)} of {len(measured)} works {'reach' if reached else 'miss'} their aim"
            found.append(Finding(who, f"beside existing implementations: {_listed(told)}."))
    return found


def _listed(words: Iterable[str]) -> str:
    """Words as a sentence lists them; with semicolons where they hold commas."""
    found = list(words)
    mark = ";" if any(", " in word for word in found) else ","
    if len(found) < 2:
        return "".join(found)
    return f"{f'{mark} '.join(found[:-1])}{mark if mark == ';' else ''} and {found[-1]}"
