"""A `Look` as one page of HTML that opens without a network."""

from __future__ import annotations

import base64
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .text import Look
from .watch import NOTHING, Sources

if TYPE_CHECKING:
    from jinja2 import Environment

KEYS = 10  # sources that are listed of a head
SEGMENTS = 60  # points of a curve over the text
FETCHED = 12  # passages that are listed
WIDTH, HEIGHT = 640, 210  # of a drawing
LEFT = 84  # of it, for the numbers beside
MOST_BITS = 2**16 - 1  # tenths of a bit that the script is given
LEAST = 1e-4  # of the greatest, that a drawing of the reach shows
BYTE_OF = {name: byte for byte, name in bytes_to_unicode().items()}  # in the vocabularies of GPT-2 and the gallery
BYTES = re.compile(r"([\x00-\x7f]*?)((?:<[0-9A-F]{2}>)+)")  # a token that holds a part of a character, from `words_of`
SPOKEN = {
    "segment": "its own segment",
    "window": "the window",
    "memory": "the memory of segments before",
    "state": "the recurrent state",
    "retrieved": "retrieved pairs",
}


def page(found: Look, words: list[str], title: str, command: str = "") -> str:
    """The page of a look. words: each token as it is read. title: of what was read by what. command: that made it."""
    words, parts = legible(words)
    return (
        environment()
        .get_template("look.html")
        .render(
            title=title,
            command=command,
            sources=[name for name in found.sources if _appears(found, name)],
            predicts=found.predicts,
            findings=findings(found),
            worth=worth_rows(found),
            worth_curve=worth_curve(found),
            reach_curve=reach_curve(found),
            reach=found.reach,
            gates=[
                (layer, [_percent(float(x)) for x in row])
                for layer, row in enumerate(found.gates)
                if bool(row.isfinite().all())
            ],
            passages=passage_rows(found, words),
            passage_length=found.passage_length,
            parts=parts,
            data=data(found, words) | {"parts": parts},
        )
    )


def environment(*folders: Path) -> Environment:
    """Jinja2's environment for pages, which escapes what it is given. Their templates are in `folders`, and here the
    one that all extend (base.html)."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    places = [*folders, Path(__file__).with_name("templates")]
    found = Environment(
        loader=FileSystemLoader(places),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.policies["json.dumps_kwargs"] = {}  # keys in their own order
    return found


def words_of(tokenizer: Any, ids: torch.Tensor) -> list[str]:
    """Each token as it is read; bytes that are no text by themselves as <E2>."""
    known = {}
    for kind in ids.unique().tolist():
        word = tokenizer.decode([kind], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        known[kind] = word if "\ufffd" not in word else _bytes_of(tokenizer.convert_ids_to_tokens(kind)) or word
    return [known[x] for x in ids.tolist()]


def _bytes_of(token: str) -> str | None:
    """The bytes that a vocabulary names so, as <E2>, those of ASCII as they are; None if its names are others."""
    if re.fullmatch("<0x[0-9A-F]{2}>", token):  # of SentencePiece
        return f"<{token[3:5]}>"
    found = [BYTE_OF.get(name, -1) for name in token]
    if min(found) < 0 or max(found) < 128:
        return None
    return "".join(chr(x) if x < 128 else f"<{x:02X}>" for x in found)


def legible(words: list[str]) -> tuple[list[str], dict[int, str]]:
    """Words as they are shown, and by position those that are parts of a character, as they are. Its last part shows
    the character, each before it a dot; bytes that make none stay as they are."""
    shown, parts = list(words), {}
    waiting: list[tuple[int, str]] = []  # parts so far, with the text before each
    read = b""
    for i, word in enumerate(words):
        found = BYTES.fullmatch(word)
        if found is None or (waiting and found[1]):
            waiting, read = [], b""
        if found is None:
            continue
        waiting.append((i, found[1]))
        read += bytes.fromhex(re.sub("[<>]", "", found[2]))
        try:
            text = read.decode()
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data":
                waiting, read = [], b""
            continue
        if text.isprintable():
            for place, before in waiting:
                shown[place], parts[place] = before + "·", words[place]
            shown[i] = waiting[-1][1] + text
        waiting, read = [], b""
    return shown, parts


def findings(found: Look) -> list[str]:
    """Sentences about the numbers."""
    total, said = found.weights.mean((0, 1, 2)), []
    layers = found.weights.shape[1]
    if found.predicts:
        hardest = int(found.surprise.nan_to_num(-1).argmax())
        said.append(
            f"{len(found.ids):,} tokens cost {found.bits_per_token():.3f} bits each; the most surprising, token "
            f"{hardest:,}, cost {float(found.surprise[hardest]):.1f}."
        )
    shares = [
        (float(x), name)
        for x, name in zip(total, found.sources, strict=True)
        if _appears(found, name) and name != NOTHING
    ]
    listed = ", ".join(f"{_percent(x)} from {SPOKEN.get(name, name)}" for x, name in sorted(shares, reverse=True))
    said.append(f"Over all {layers} layers and their heads, a query takes {listed}.")
    for name in found.worth:
        more = found.bits_per_token(name) - found.bits_per_token()
        said.append(
            f"With the {name}, a token costs {abs(more):.3f} bits {'more' if more >= 0 else 'less'}"
            f" ({found.bits_per_token(name):.3f})."
        )
    if found.reach is not None:
        farthest = int(found.reach.allowed.max())
        seen = (found.reach.changed > 1e-3).nonzero().flatten()
        said.append(
            f"Its intervals allow a token to move losses up to {farthest:,} tokens later"
            + (", and what it carries beside them goes on from there" if found.reach.further else "")
            + (
                f"; among the first {len(found.reach.changed):,}, changed ones moved losses a thousandth of a bit up "
                f"to {int(seen.max()):,} later."
                if len(seen)
                else "."
            )
        )
    return said


def worth_rows(found: Look) -> list[tuple[str, str, str]]:
    """(what was read, bits per token, difference) of the text as it is and without each source."""
    if not found.worth:
        return []
    base = found.bits_per_token()
    rows = [("as it is", f"{base:.3f}", "")]
    rows += [(x, f"{found.bits_per_token(x):.3f}", f"{found.bits_per_token(x) - base:+.3f}") for x in found.worth]
    return rows


def worth_curve(found: Look) -> dict[str, Any] | None:
    """Extra bits without each source, by position in the text."""
    if not found.worth:
        return None
    total = len(found.ids)
    size = max(1, -(-total // SEGMENTS))
    lines = {}
    for name, bits in found.worth.items():
        parts = (bits - found.surprise)[1:].split(size)
        lines[name] = [
            (1 + size * i + len(part) / 2, float(part.nanmean())) for i, part in enumerate(parts) if len(part)
        ]
    return drawing(lines, across="position in the text", up="extra bits per token")


def reach_curve(found: Look) -> dict[str, Any] | None:
    """The change of losses by a token before them, by distance, on axes of powers; each line by its own greatest
    value, since one is in bits and one in bits per unit."""
    if found.reach is None:
        return None
    lines = {}
    for name, values in (("a changed token", found.reach.changed), ("gradient", found.reach.gradient)):
        greatest = float(values.nan_to_num(0).max())
        points, low = [], 1
        while low < len(values):
            high = min(len(values), max(low + 1, int(low * 1.3)))
            part = values[low:high]
            if bool(part.isfinite().any()) and greatest > 0:
                share = max(LEAST, float(part.nanmean()) / greatest)
                points.append((math.log2((low + high - 1) / 2), math.log10(share)))
            low = high
        if points:
            lines[name] = points
    marks = {"its intervals end": math.log2(max(1, int(found.reach.allowed.max())))}
    return drawing(lines, across="distance in tokens", up="share of the greatest", powers=True, marks=marks)


def drawing(
    lines: dict[str, list[tuple[float, float]]],
    *,
    across: str,
    up: str,
    powers: bool = False,
    marks: dict[str, float] | None = None,
) -> dict[str, Any] | None:
    """A drawing that the template makes an SVG of: lines as points of the drawing, and the numbers beside its axes."""
    points = [point for line in lines.values() for point in line]
    if not points:
        return None
    marks = marks or {}
    base = math.log10(LEAST) if powers else 0.0
    xs, ys = [x for x, _ in points] + list(marks.values()), [y for _, y in points] + [base]
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)
    right, high = max(right, left + 1e-9), max(high, low + 1e-9)

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + (x - left) / (right - left) * (WIDTH - LEFT - 20), 12 + (high - y) / (high - low) * (HEIGHT - 52)

    def spoken(x: float) -> str:
        return f"{round(2**x):,}" if powers else f"{x:,.0f}"

    middle = base if low < base < high else (low + high) / 2
    levels = [y for y in (low, middle, high) if y == middle or abs(place(left, y)[1] - place(left, middle)[1]) >= 16]
    return {
        "across": across,
        "up": up,
        "lines": [
            (name, " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*p) for p in line))) for name, line in lines.items()
        ],
        "marks": [(name, round(place(x, 0)[0], 1)) for name, x in marks.items()],
        "zero": round(place(left, base)[1], 1),
        "ticks_x": [(round(place(x, 0)[0], 1), spoken(x)) for x in (left, (left + right) / 2, right)],
        "ticks_y": [(round(place(left, y)[1], 1), f"{10**y if powers else y:.2g}") for y in levels],
        "left": LEFT,
        "width": WIDTH,
        "height": HEIGHT,
    }


def passage_rows(found: Look, words: list[str]) -> list[dict[str, Any]]:
    """The passages that are fetched most, each beside the one that fetched it most."""
    if found.passages is None or found.fetched is None:
        return []
    by_passage, size = found.passages.sum(0), found.passage_length
    rows = []
    for number in by_passage.argsort(descending=True)[:FETCHED].tolist():
        if by_passage[number] <= 0:
            break
        by = int(found.passages[:, number].argmax())
        rows.append(
            {
                "position": number * size,
                "text": _passage(words, number, size),
                "weight": f"{float(by_passage[number]):.1f}",
                "share": _percent(float(by_passage[number] / by_passage.sum())),
                "by": by * size,
                "by_text": _passage(words, by, size),
            }
        )
    return rows


def data(found: Look, words: list[str]) -> dict[str, Any]:
    """The data of the page's script. Shares of sources are bytes, 255 for all; bits are in tenths, of two bytes, the
    lower first."""
    layers = found.weights.shape[1]
    by_layer = found.weights.mean(2)  # (T, layers, Z)
    names = [i for i, name in enumerate(found.sources) if _appears(found, name)]
    surprise = found.surprise.nan_to_num(0).mul(10).round().clamp(0, MOST_BITS).to(torch.int32)
    return {
        "words": words,
        "bits": base64.b64encode(surprise.numpy().astype("<u2").tobytes()).decode(),
        "shares": _packed(by_layer[..., names].mul(255).round().to(torch.uint8)),
        "sources": [found.sources[i] for i in names],
        "layers": layers,
        "heads": found.weights.shape[2],
        "predicts": found.predicts,
        "period": found.period,
        "shown": {query: _listed(layers, names) for query, layers in found.shown.items()},
    }


def _listed(layers: list[Sources], names: list[int]) -> dict[str, Any]:
    """The largest weights of one query as [position, source, per cent]: of all layers and heads, of each layer, and of
    each head of it, under "all", "LAYER" and "LAYER,HEAD"; what stands nowhere in the text is at -1. sums: of each
    "LAYER,HEAD" the weights by source."""
    found: dict[str, Any] = {"sums": {}}
    for number, sources in enumerate(layers):
        found[f"{number}"] = _largest(sources.positions, sources.kinds, sources.weights / len(sources.weights), names)
        for head, (positions, weights) in enumerate(zip(sources.positions, sources.weights, strict=True)):
            found[f"{number},{head}"] = _largest(positions[None], sources.kinds, weights[None], names)
            sums = torch.zeros(max(names) + 1).index_add_(0, sources.kinds, weights)
            found["sums"][f"{number},{head}"] = [round(float(sums[i]), 3) for i in names]
    whole = Sources.join(layers)
    count = len(layers) * len(whole.weights)
    return found | {"all": _largest(whole.positions, whole.kinds, whole.weights / count, names)}


def _largest(positions: torch.Tensor, kinds: torch.Tensor, weights: torch.Tensor, names: list[int]) -> list[list[Any]]:
    """Of weights (H, N), added up over heads, the largest that are a thousandth or more."""
    place, width = positions.clamp(min=-1) + 1, max(names) + 1
    key, index = (place * width + kinds).unique(return_inverse=True)
    sums = torch.zeros(len(key)).index_add_(0, index.flatten(), weights.flatten())
    best = sums.argsort(descending=True)[:KEYS].tolist()
    return [
        [int(key[i]) // width - 1, names.index(int(key[i]) % width), round(100 * float(sums[i]), 1)]
        for i in best
        if sums[i] >= 1e-3
    ]


def _appears(found: Look, name: str) -> bool:
    return name != NOTHING or bool(found.weights[..., found.sources.index(name)].max() > 0)


def _packed(x: torch.Tensor) -> str:
    return base64.b64encode(x.contiguous().numpy().tobytes()).decode()


def _passage(words: list[str], number: int, size: int) -> str:
    text = "".join(words[number * size : (number + 1) * size]).replace("\n", "⏎")
    return text if len(text) <= 160 else text[:157] + "..."


def _percent(x: float) -> str:
    return f"{100 * x:.0f} %" if x >= 0.095 or x == 0 else f"{100 * x:.1f} %"
