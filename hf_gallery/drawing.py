"""Drawings of what queries see, as SVG: a query a line, a key a column, a colour for each road.

A cell that is attended to is full; a dot marks a token that is reached through something else, a memory that is
searched or a state. Cells are lines along a row, `M key,query h count`, so a drawing stays small.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from html import escape
from itertools import groupby
from typing import Any, NamedTuple

import torch

from .roads import DIRECT, ROADS, Key, Sight, watch
from .variants import VARIANTS, Drawn, Variant

# Okabe and Ito's colours, darkened where white stands behind them and lightened on black.
COLOURS = {
    "window": ("#0072B2", "#56B4E9"),
    "memory": ("#B26A00", "#F0B040"),
    "global": ("#00805C", "#2FC79A"),
    "source": ("#5C6670", "#B4BCC4"),
    "state": ("#A3487A", "#E39AC4"),
    "tokens": ("#A3487A", "#E39AC4"),
    "retrieval": ("#C24A00", "#FF8A4C"),
    "held": ("#A3487A", "#E39AC4"),
}
FEWEST, MOST = 12, 512  # tokens of a drawing
LENGTHS = ("segment_length", "mem_len", "block_length", "attention_window", "attention_dilation", "memory_size")
# Sizes that change nothing about what is seen, so that any configuration is drawn as fast.
THIN = dict(hidden_size=8, num_attention_heads=1, intermediate_size=8, head_dim=None)
# In pixels: of a panel's cells, of a letter, of a line of text; margins.
CELLS, LETTER, LINE, EDGE, LEFT, GAP = 172.0, 5.4, 13.0, 12.0, 26.0, 18.0
PER_ROW = 2  # panels beside one another, as wide as a phone


class Panel(NamedTuple):
    """One square of a drawing: what some layers see in one setting."""

    title: str
    setting: str
    sight: Sight


def draw(
    variant: str,
    *,
    settings: dict[str, Any] | None = None,
    tokens: int | None = None,
    marks: Iterable[int] = (),
) -> str:
    """The drawing, as SVG, of what an architecture's queries see in a text, layer by layer where layers differ.

    settings: config arguments beside those of the architecture's first drawing in the table of variants; without any
    all drawings that the table has. tokens: of the text; default three times the longest window or segment, from 12 to
    512. marks: positions of global tokens.

    Raises ValueError for a variant, an argument or a value that there is not, and for more tokens than are drawn.
    """
    drawn = panels(variant, settings=settings, tokens=tokens, marks=marks)
    return render(VARIANTS[variant].title, drawn)


def panels(
    variant: str,
    *,
    settings: dict[str, Any] | None = None,
    tokens: int | None = None,
    marks: Iterable[int] = (),
) -> list[Panel]:
    """The panels of `draw`, which has the same arguments."""
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}; choose from {', '.join(VARIANTS)}")
    if tokens is not None and not 1 <= tokens <= MOST:
        raise ValueError(f"tokens is {tokens}; a drawing shows 1 to {MOST}")
    wanted, marks = VARIANTS[variant].drawn, tuple(marks)
    if settings or marks:
        wanted = (Drawn(wanted[0].settings | (settings or {}), marks or wanted[0].marks),)
    return [panel for drawn in wanted for panel in _panels(VARIANTS[variant], drawn, tokens)]


def _panels(about: Variant, drawn: Drawn, tokens: int | None) -> Iterator[Panel]:
    """The panels of one setting: of its encoder and its decoder, and of layers that see otherwise than others."""
    config = about.make_config(**drawn.settings)
    if tokens is None:
        lengths = [getattr(config, name, None) or 0 for name in LENGTHS]
        tokens = min(MOST, max(FEWEST, 3 * max(max(x) if isinstance(x, list) else x for x in lengths)))
    config = about.make_config(**drawn.settings | THIN)
    head = "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else None
    model = (about.classes[about.auto_classes[head]] if head else about.model)(config).eval()
    ids = torch.arange(tokens)[None] % min(8, config.vocab_size)
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if head else {})
    if drawn.marks:
        inputs["global_attention_mask"] = _marked(about, model, drawn.marks, tokens)
    setting = [
        f"{name}={value}"
        for name, value in drawn.settings.items()
        if name not in ("is_decoder", "num_hidden_layers") and value is not None
    ]
    setting += [f"global: {', '.join(map(str, drawn.marks))}"] if drawn.marks else []
    sights = watch(model, **inputs)
    for sight in sights:
        alone = sum(other.stack == sight.stack for other in sights) == 1
        layers = f"layer {_ranges(sight.layers)}"
        yield Panel(sight.stack if alone else f"{sight.stack}, {layers}", ", ".join(setting), sight)


def _marked(about: Variant, model: Any, marks: tuple[int, ...], tokens: int) -> torch.Tensor:
    """The mask (1, T) of global tokens. Raises ValueError if the architecture has none, or the text no such place."""
    if "global_attention_mask" not in model.base_model.arguments():
        raise ValueError(f"marks are {marks}, and {about.title} has no global tokens; leave them out")
    if not all(0 <= mark < tokens for mark in marks):
        raise ValueError(f"marks are {marks}, of a text of {tokens} tokens; give positions from 0 to {tokens - 1}")
    mask = torch.zeros(1, tokens, dtype=torch.long)
    mask[0, list(marks)] = 1
    return mask


def _ranges(numbers: list[int]) -> str:
    """Numbers in short: "0-3, 7"."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def render(title: str, drawn: list[Panel]) -> str:
    """Panels as one SVG, with the roads that they show explained below."""
    body, top, across = [], EDGE, 0.0
    for start in range(0, len(drawn), PER_ROW):
        row, left = drawn[start : start + PER_ROW], EDGE
        texts = [[panel.title, *textwrap.wrap(panel.setting, int((CELLS + LEFT) / LETTER))] for panel in row]
        high = LINE * max(map(len, texts))
        for panel, lines in zip(row, texts, strict=True):
            for i, line in enumerate(lines):
                kind = "" if i else ' class="b"'
                body.append(f'<text{kind} x="{left:g}" y="{top + LINE * (i + 0.8):g}">{escape(line)}</text>')
            body.append(_square(panel.sight, left + LEFT, top + high + LINE))
            left += LEFT + CELLS + GAP
        across = max(across, left - GAP + EDGE)
        top += high + LINE + max(CELLS / len(p.sight.keys) * len(p.sight.queries) for p in row) + GAP
    used = [road for road in ROADS if any(road in panel.sight.seen for panel in drawn)]
    legend, top = _legend(used, top, across)
    said = "Each line is a query, each column a key. " + "; ".join(ROADS[road] for road in used) + "."
    style = "".join(f".{road}{{stroke:{light}}}" for road, (light, _) in COLOURS.items() if road in used)
    dark = "".join(f".{road}{{stroke:{dim}}}" for road, (_, dim) in COLOURS.items() if road in used)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {across:g} {top:g}" width="{across:g}" '
            f'height="{top:g}" role="img" aria-labelledby="t d">',
            f'<title id="t">{escape(title)}: the keys that each query sees</title>',
            f'<desc id="d">{escape(said)}</desc>',
            "<style>text{font:9.5px system-ui,sans-serif;fill:#24292f}.b{font-weight:600}.n{font-size:8px}"
            ".e{text-anchor:end}.m{text-anchor:middle}.back{fill:#fff}.line{stroke:#fff}.frame{stroke:#d0d7de}"
            f"path{{fill:none}}{style}",
            "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.back{fill:#0d1117}.line{stroke:#0d1117}"
            f".frame{{stroke:#3d444d}}{dark}}}</style>",
            f'<rect class="back" width="{across:g}" height="{top:g}" rx="6"/>',
            *body,
            *legend,
            "</svg>\n",
        ]
    )


def _square(sight: Sight, left: float, top: float) -> str:
    """The cells of one panel, with its axes."""
    rows, columns = len(sight.queries), len(sight.keys)
    size = CELLS / columns
    parts = [
        f'<rect class="frame" fill="none" x="{left:g}" y="{top:g}" width="{CELLS:g}" height="{size * rows:g}"/>',
        *(
            f'<text class="n m" x="{left + size * (i + 0.5):g}" y="{top - 3:g}">{name}</text>'
            for i, name in _ticks(sight.keys, size)
        ),
        *(
            f'<text class="n e" x="{left - 3:g}" y="{top + size * (i + 0.5) + 3:g}">{name}</text>'
            for i, name in _ticks(sight.queries, size)
        ),
        f'<g stroke-width="{1 if size >= 4 else 1.1}" transform="translate({left:g} {top:g}) scale({size:.5g})">',
    ]
    cells = {road: sight.mask(road) for road in ROADS if road in sight.seen}
    parts += [f'<path class="{road}" d="{_runs(mask)}"/>' for road, mask in cells.items() if road in DIRECT]
    if size >= 4:  # lines between cells
        lines = "".join(f"M0 {y}h{columns}" for y in range(1, rows)) + "".join(
            f"M{x} 0v{rows}" for x in range(1, columns)
        )
        parts.append(f'<path class="line" stroke-width="{1 / size:.2g}" d="{lines}"/>')
    for road, mask in cells.items():
        if road not in DIRECT:
            runs = _runs(mask)
            parts.append(_dots("line", runs, 0.6) + _dots(road, runs, 0.36))  # with a rim, where they stand on a cell
    return "\n".join([*parts, "</g>"])


def _dots(kind: str, runs: str, size: float) -> str:
    """A square in the middle of each cell of these runs."""
    dash, aside = f"{size:g} {1 - size:g}", f"translate({(1 - size) / 2:g})"
    return f'<path class="{kind}" stroke-width="{size:g}" stroke-dasharray="{dash}" transform="{aside}" d="{runs}"/>'


def _runs(mask: torch.Tensor) -> str:
    """The true cells of a mask (queries, keys), line by line: those side by side together."""
    found = []
    for q, row in enumerate(mask.tolist()):
        for is_seen, run in groupby(range(len(row)), row.__getitem__):
            columns = list(run)
            if is_seen:
                found.append(f"M{columns[0]} {q}.5h{len(columns)}")
    return "".join(found)


def _ticks(keys: list[Key], size: float) -> Iterator[tuple[int, str]]:
    """Names along an axis, as many as have room: positions of tokens; s, m for state vectors and memory tokens."""
    room = 8 + 4 * len(str(len(keys)))
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128) if step * size >= room)
    for i, (kind, number) in enumerate(keys):
        if kind in ("token", "source"):
            if number % step == 0:
                yield i, str(number)
        elif size >= 6 or keys[i - 1][0] != kind:
            yield i, kind[0]


def _legend(used: list[str], top: float, across: float) -> tuple[list[str], float]:
    """A line for each road, side by side where there is room, and where they end."""
    parts, left = [], EDGE
    for road in used:
        wide = 18 + LETTER * len(ROADS[road]) + 14
        if left > EDGE and left + wide > across:
            left, top = EDGE, top + LINE + 2
        dash = "" if road in DIRECT else ' stroke-dasharray="4"'
        parts.append(
            f'<path class="{road}" stroke-width="{10 if road in DIRECT else 4}"{dash} d="M{left:g} {top:g}h12"/>'
        )
        parts.append(f'<text x="{left + 17:g}" y="{top + 3.5:g}">{escape(ROADS[road])}</text>')
        left += wide
    return parts, top + LINE + EDGE - 4
