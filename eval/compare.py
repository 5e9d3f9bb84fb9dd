"""Two runs side by side: `python -m eval compare A B`. What changed, and whether it is more than chance."""

from __future__ import annotations

import dataclasses
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .significance import DOCUMENT, SEED, SURE, Chance, answers, answers_differ, paired, texts_differ


@dataclasses.dataclass(frozen=True)
class Difference:
    """One number of one contestant in both runs. chance: that of so large a difference between equal contestants, None
    where one measurement cannot tell."""

    contestant: str
    what: str
    unit: str
    before: float
    after: float
    chance: Chance | None = None

    @property
    def sure(self) -> bool:
        """Tells whether the difference is more than chance."""
        return self.chance is not None and self.chance.sure


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[Difference]:
    """Every number that both runs measured, in the order of the first. Runs need not be of one preset: contestants,
    distances and contexts that only one of them has are left out."""
    found = []
    for name, a in first["summary"].items():
        b = second["summary"].get(name)
        if b is None:
            continue
        curves = [("recall at {} tokens", a.get("recall", {}), b.get("recall", {}))]
        for ability, levels in a.get("abilities", {}).items():
            title = first["abilities"][ability]["title"]
            curves.append((f"{title}, {{}}", levels, b.get("abilities", {}).get(ability, {})))
        for what, levels, others in curves:
            for level in (k for k in levels if k in others):
                x, y = levels[level], others[level]
                chance = answers_differ(answers(x), answers(y))
                before, after = (100 * s["correct"] / max(1, s["asked"]) for s in (x, y))
                found.append(Difference(a["label"], what.format(level), "%", before, after, chance))
        if "bits_per_byte" in a and "bits_per_byte" in b:
            x, y = a["bits_per_byte"], b["bits_per_byte"]
            found.append(Difference(a["label"], "bits per byte", "bits", mean(x), mean(y), _texts(a, b)))
        if "cost" in a and "cost" in b:
            x, y = a["cost"], b["cost"]
            for key, what, unit, scale in (
                ("training_tokens_per_second", "training", "tokens/s", 1),
                ("training_peak_bytes", "training peak", "MiB", 2**20),
            ):
                found.append(Difference(a["label"], what, unit, x[key] / scale, y[key] / scale))
            for key, what, unit, scale in (
                ("decode_ms_per_token", "decoding after", "ms/token", 1),
                ("cache_bytes", "cache after", "KiB", 2**10),
            ):
                for c in sorted(set(x[key]) & set(y[key]), key=int):
                    what_at = f"{what} {int(c):,} tokens"
                    found.append(Difference(a["label"], what_at, unit, x[key][c] / scale, y[key][c] / scale))
    return found


def _texts(first: dict[str, Any], second: dict[str, Any]) -> Chance | None:
    """The chance of the difference in bits per byte: by document where both runs read the same, else by seed."""
    found = texts_differ(first, second)
    if found is not None and found.unit == DOCUMENT:
        return found
    bits = first["bits_per_byte"], second["bits_per_byte"]
    by_seed = paired(*bits)
    return None if by_seed is None else Chance(by_seed, SEED, min(map(len, bits)))


def show(names: tuple[str, str], found: list[Difference], console: Console) -> None:
    """Prints the differences as one table, those that are more than chance marked."""
    table = Table(title=Text(f"{names[0]} and {names[1]}"), caption=f"* more than chance (p < {SURE:g})")
    for heading in ("variant", "measured", *names, "change", ""):
        table.add_column(Text(heading), justify="left" if heading in ("variant", "measured", "") else "right")
    last = None
    for d in found:
        if last is not None and d.contestant != last:
            table.add_section()
        change = d.after - d.before
        relative = f"{100 * change / d.before:+.1f} %" if d.unit != "%" and d.before else f"{change:+.1f}"
        table.add_row(
            d.contestant if d.contestant != last else "",
            f"{d.what}, {d.unit}",
            f"{d.before:,.4g}",
            f"{d.after:,.4g}",
            relative,
            "*" if d.sure else "",
        )
        last = d.contestant
    console.print(table)
