"""A very long input: `python -m eval long`. Each bounded variant reads 100,000 tokens in chunks and then decodes.

What is held against each other is the same model after a short and after a long context: ms per decoded token, with
both streams in turns, and bytes of the cache. Prefill is timed as it goes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .contestants import CONTESTANTS, Sizes, build
from .cost import Stream
from .measure import interleaved, median, seconds
from .presets import PRESETS

BOUNDED = tuple(c.name for c in CONTESTANTS.values() if c.carries != "nothing")  # and what they carry has an end


@dataclasses.dataclass(frozen=True)
class LongSettings:
    """Sizes of the models, tokens of both contexts, tokens decoded after each."""

    sizes: Sizes
    short: int = 1000
    long: int = 100_000
    decode_tokens: int = 200
    memory_size: int = 262_144  # of the Memorizing Transformer: more than the long context, so that it grows all along
    seed: int = 0


def run(
    settings: LongSettings, device: torch.device, tick: Callable[[str], None] = lambda what: None
) -> dict[str, Any]:
    """Measures each variant. Returns, by variant: prefill tokens/s, decode ms (short, long and their ratio) and cache
    bytes (short, long)."""
    sizes = dataclasses.replace(settings.sizes, memory_size=settings.memory_size)
    found: dict[str, Any] = {}
    for name in BOUNDED:
        contestant = CONTESTANTS[name]
        model = build(contestant, sizes, settings.seed).to(device).eval()  # type: ignore[arg-type]
        tick(f"{contestant.label}: reading {settings.long:,} tokens")
        lengths = {"short": settings.short, "long": settings.long}
        streams = {which: Stream(model, length, settings.seed, device) for which, length in lengths.items()}
        streams["short"].read(settings.short)
        took = seconds(lambda stream=streams["long"]: stream.read(settings.long), device)
        tick(f"{contestant.label}: decoding")
        sizes_held = {which: stream.cache.nbytes for which, stream in streams.items()}
        times = interleaved(
            {which: stream.decode for which, stream in streams.items()}, settings.decode_tokens, device
        )
        milliseconds = {which: 1e3 * median(values) for which, values in times.items()}
        found[name] = {
            "label": contestant.label,
            "prefill_tokens_per_second": settings.long / took,
            "decode_ms_per_token": milliseconds,
            "decode_ratio": milliseconds["long"] / milliseconds["short"],
            "cache_bytes": sizes_held,
        }
    return {"settings": dataclasses.asdict(settings), "variants": found}


def default_settings() -> LongSettings:
    """The models of the quick text task."""
    return LongSettings(PRESETS["quick"].text.sizes)


def show(result: dict[str, Any], console: Console) -> None:
    """Prints the result as a table."""
    s = result["settings"]
    short, long = f"{s['short']:,}", f"{s['long']:,}"
    table = Table(
        title=f"Decoding after {long} tokens against after {short}",
        caption=f"medians of {s['decode_tokens']} tokens, both streams in turns",
    )
    for heading in (
        "variant",
        "prefill tokens/s",
        f"ms, {short}",
        f"ms, {long}",
        "ratio",
        f"KiB, {short}",
        f"KiB, {long}",
    ):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for entry in result["variants"].values():
        ms, held = entry["decode_ms_per_token"], entry["cache_bytes"]
        table.add_row(
            entry["label"],
            f"{entry['prefill_tokens_per_second']:,.0f}",
            f"{ms['short']:.2f}",
            f"{ms['long']:.2f}",
            f"{entry['decode_ratio']:.2f}",
            f"{held['short'] / 1024:,.0f}",
            f"{held['long'] / 1024:,.0f}",
        )
    console.print(table)
