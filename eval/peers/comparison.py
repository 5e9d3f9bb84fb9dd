"""Peers, their environments, and the turns that both sides take."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hf_gallery.variants import VARIANTS

WORKER = Path(__file__).with_name("worker.py")
MEASURES = {"one_thread": "processor, one thread", "clock": "clock"}


@dataclasses.dataclass(frozen=True)
class PeerSettings:
    """Sizes of all works. length: tokens of the Longformer, Block-Recurrent and full-attention steps. segment: tokens
    of a Transformer-XL and a Memorizing step, and of the memory before it. longformer_window: both sides together."""

    layers: int = 4
    hidden: int = 256
    heads: int = 4
    vocabulary: int = 262  # bytes and the special tokens
    length: int = 4096
    longformer_window: int = 512
    segment: int = 512
    xl_batch: int = 4
    decode_tokens: int = 16
    block: int = 512
    states: int = 512
    memorizing_batch: int = 2
    memories: int = 8192
    topk: int = 32
    repeats: int = 7
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Peer:
    """One comparison. variant, setting: whose model, and how it is run where that is not as by default. requires: what
    pip puts into the peer's environment, without what these require in turn where `bare`; () = this environment has
    it. target: how many times as fast the gallery is meant to be, in processor time on one thread, or by the clock."""

    variant: str
    work: str
    peer: str
    target: float
    requires: tuple[str, ...] = ()
    bare: bool = False
    setting: str = ""
    by_the_clock: bool = False

    @property
    def label(self) -> str:
        """Its name in tables."""
        return VARIANTS[self.variant].title + (f" {self.setting}" if self.setting else "")


_TRANSFO_XL = ("transformers==4.35.2",)
# Bare, since they ask for faiss-gpu, which is not to be had everywhere; faiss-cpu is here already.
_MEMORIZING = (
    "memorizing-transformers-pytorch==0.4.1",
    "einops==0.8.1",
    "einops-exts==0.0.4",
    "joblib",
    "cloudpickle",
    "loky",
)
_RECURRENT = ("block-recurrent-transformer-pytorch==0.4.4", "beartype", *_MEMORIZING)

PEERS = {
    "longformer": Peer("longformer", "training step", "transformers' Longformer", 3.5),
    "transformer_xl_train": Peer("transformer_xl", "training step", "transformers 4.35.2", 2.8, _TRANSFO_XL),
    "transformer_xl_decode": Peer(
        "transformer_xl", "decoding", "transformers 4.35.2", 4.0, _TRANSFO_XL, by_the_clock=True
    ),
    "memorizing_transformer": Peer(
        "memorizing_transformer", "training step", "memorizing-transformers-pytorch 0.4.1", 1.2, _MEMORIZING, True
    ),
    "block_recurrent_transformer": Peer(
        "block_recurrent_transformer",
        "training step",
        "block-recurrent-transformer-pytorch 0.4.4",
        1.4,
        _RECURRENT,
        True,
    ),
    "transformer": Peer("transformer", "training step", "GPT-2 with sdpa", 1.0),
    "transformer_sdpa": Peer("transformer", "training step", "GPT-2 with sdpa", 1.0, setting="with sdpa"),
}


def run(
    settings: PeerSettings,
    folder: Path,
    names: list[str] | None = None,
    tick: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Measures the comparisons in `names` (None: all). Environments are kept under `folder` for the next time.

    Returns by name the target, both parameter counts, and under "clock" and "one_thread" (processor time of sides that
    have one thread, which other work on the machine hardly moves) median milliseconds of both sides, their ratio (peer
    over gallery: how many times as fast the gallery is), its smallest and largest value among the rounds, and the
    gallery's utilisation, its floating-point operations a second as a share of those in a large product of matrices,
    measured in the same turns; or, where the peer could not be had, {"not_measured": why}.
    """
    found: dict[str, Any] = {}
    for name in PEERS if names is None else names:
        peer = PEERS[name]
        tick(f"{name}: preparing")
        try:
            python = environment(peer.requires, peer.bare, folder)
            found[name] = {"peer": peer.peer, "target": peer.target} | _compare(name, python, settings, tick)
        except PeerError as error:
            found[name] = {"peer": peer.peer, "target": peer.target, "not_measured": str(error)}
    return {"settings": dataclasses.asdict(settings), "threads": torch.get_num_threads(), "peers": found}


class PeerError(RuntimeError):
    """A peer that cannot be had or does not run here."""


def environment(requires: tuple[str, ...], bare: bool, folder: Path) -> str:
    """The Python of an environment with `requires` installed before all that this one has; made where it is missing.

    Raises PeerError if pip cannot install them.
    """
    if not requires:
        return sys.executable
    place = folder / re.sub(r"[^\w.]+", "-", requires[0]).strip("-")
    python = place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    done = place / "requirements.json"
    if done.exists() and json.loads(done.read_text()) == list(requires):
        return str(python)
    shutil.rmtree(place, ignore_errors=True)
    venv.create(place, with_pip=True)
    base = {"base": str(place.resolve()), "platbase": str(place.resolve())}
    packages = Path(sysconfig.get_path("purelib", "venv", vars=base))
    # Ours come after its own, so that what is installed there wins and torch is the same on both sides.
    (packages / "gallery.pth").write_text("\n".join(dict.fromkeys(p for p in sys.path if p.endswith("-packages"))))
    install = [str(python), "-m", "pip", "install", "--quiet", "--ignore-installed"]
    tried = subprocess.run([*install, *(["--no-deps"] if bare else []), *requires], capture_output=True, text=True)
    if tried.returncode:
        shutil.rmtree(place, ignore_errors=True)
        reason = next((line for line in tried.stderr.splitlines()[::-1] if "ERROR" in line), "pip failed")
        raise PeerError(f"pip could not install {', '.join(requires)}: {reason}")
    done.write_text(json.dumps(list(requires)))
    return str(python)


def _compare(name: str, python: str, settings: PeerSettings, tick: Callable[[str], None]) -> dict[str, Any]:
    about, clock = _turns(name, python, settings, "clock", tick)
    _, one_thread = _turns(name, python, settings, "one_thread", tick)
    parameters = {side: entry["parameters"] for side, entry in about.items()}
    return {"clock": clock, "one_thread": one_thread, "parameters": parameters}


def _turns(
    name: str, python: str, settings: PeerSettings, measure: str, tick: Callable[[str], None]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both sides as they describe themselves, and how they compare by one of MEASURES."""
    threads, time = (1, "processor") if measure == "one_thread" else (None, "clock")
    with (
        Side(sys.executable, name, "gallery", settings, threads) as ours,
        Side(python, name, "peer", settings, threads) as theirs,
    ):
        sides = {"gallery": ours, "peer": theirs}
        about = {which: side.answer() for which, side in sides.items()}
        seconds: dict[str, list[float]] = {"gallery": [], "peer": [], "product": []}
        for turn in range(settings.repeats):
            tick(f"{name}, {MEASURES[measure]}: {turn + 1} of {settings.repeats}")
            for which in list(sides) if turn % 2 else list(sides)[::-1]:
                seconds[which].append(sides[which].seconds("step")[time])
            seconds["product"].append(ours.seconds("product")[time])
    middle = {what: statistics.median(values) for what, values in seconds.items()}
    rounds = [theirs / ours for ours, theirs in zip(seconds["gallery"], seconds["peer"], strict=True)]
    flops = about["gallery"]["flops"]
    tokens = settings.decode_tokens if name.endswith("decode") else 1
    return about, {
        "milliseconds": {side: 1e3 * middle[side] / tokens for side in sides},
        "ratio": middle["peer"] / middle["gallery"],
        "ratio_of_rounds": [min(rounds), max(rounds)],
        "utilisation": (flops["step"] / middle["gallery"]) / (flops["product"] / middle["product"]),
    }


def measured(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The comparisons that have numbers: not those without a peer, nor those of results that told one time only."""
    return {name: entry for name, entry in result["peers"].items() if MEASURES.keys() <= entry.keys()}


def judged(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """The numbers that the target is about: those of processor time, or of the clock."""
    return entry[_decides(name)]


def _decides(name: str) -> str:
    return "clock" if PEERS[name].by_the_clock else "one_thread"


class Side:
    """A worker process, ready when `answer` has been read once. threads: None = as many as torch takes."""

    def __init__(self, python: str, name: str, side: str, settings: PeerSettings, threads: int | None = None):
        self.what = f"{PEERS[name].label if side == 'gallery' else PEERS[name].peer}, {PEERS[name].work}"
        self.errors = tempfile.TemporaryFile(mode="w+")
        root = str(Path(__file__).parents[2])
        environment = os.environ | ({"PYTHONPATH": root} if side == "gallery" else {"PYTHONPATH": ""})
        if threads is not None:  # in the environment, for processes that a side starts have it too
            environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
        self.process = subprocess.Popen(
            [python, str(WORKER), name, side, json.dumps(dataclasses.asdict(settings))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment | {"TOKENIZERS_PARALLELISM": "false"},
        )

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()

    def answer(self) -> Any:
        """The next value it says. Raises PeerError with its last words if it has died."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            words = self.errors.read().strip().splitlines()
            raise PeerError(f"{self.what} stopped: {words[-1] if words else 'it said nothing'}")
        return json.loads(line)

    def seconds(self, what: str) -> dict[str, float]:
        """Seconds of doing "step", or "product", once more: by the clock, and of processors."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        return self.answer()


def table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows, two for each comparison, the target in the one that it is about; dashes where there are no
    numbers, see `measured`."""
    rows, known = [], measured(result)
    for name, entry in result["peers"].items():
        for measure, title in MEASURES.items():
            numbers, target = ["-"] * 4, f"{entry['target']:g}" if measure == _decides(name) else ""
            if name in known:
                times = entry[measure]
                numbers = [f"{times['milliseconds'][side]:,.1f}" for side in ("gallery", "peer")]
                numbers += [f"{times['ratio']:.2f}", f"{100 * times['utilisation']:.0f} %"]
            rows.append([PEERS[name].label, PEERS[name].work, entry["peer"], title, *numbers, target])
    return ["gallery", "work", "peer", "time", "ms", "peer ms", "ratio", "of peak", "target"], rows


def is_whole(result: Any) -> bool:
    """Tells whether a value is what `run` gives, as a file that a hand has changed may not be."""
    try:
        return bool(table(result)[1]) and {"layers", "hidden"} <= result["settings"].keys()
    except (AttributeError, KeyError, TypeError, ValueError):
        return False


def terminal(result: dict[str, Any], title: str, caption: str | None = None) -> Table:
    """The table for a terminal of 80 columns: works and peers share one column, so that no number is folded."""
    shown = Table(title=title, title_justify="left", caption=caption, box=box.SIMPLE, padding=(0, 1, 0, 0))
    heads, rows = table(result)
    shown.add_column("gallery, work\nand peer", overflow="fold")
    for heading in heads[3:]:
        shown.add_column(heading.replace(" ", "\n"), justify="left" if heading == "time" else "right", no_wrap=True)
    known = measured(result)
    pairs = zip(rows[::2], rows[1::2], result["peers"].items(), strict=True)
    for one_thread, clock, (name, entry) in pairs:
        label, work, peer = one_thread[:3]
        colour = "green" if name in known and judged(name, entry)["ratio"] >= entry["target"] else "red"
        for said, row in ((f"{label}, {work}", one_thread), (f"  {peer}", clock)):
            time, *numbers, target = row[3:]
            cells = [Text(x, colour if target else "") for x in numbers]
            shown.add_row(Text(said), time.split(",")[0], *cells, target)
    return shown


def show(result: dict[str, Any], console: Console) -> None:
    """Prints the result as a table."""
    s = result["settings"]
    title = (
        f"Gallery and peers: {s['layers']} layers, width {s['hidden']}, {s['heads']} heads, float32, "
        f"{result['threads']} threads"
    )
    caption = (
        f"medians of {s['repeats']} rounds in turns, processor time with one thread each and the clock; ratio: peer's "
        "time over the gallery's; of peak: how much of the machine's speed in a large product of matrices the "
        "gallery's step reaches"
    )
    console.print(terminal(result, title, caption))
    for name, entry in result["peers"].items():
        if "not_measured" in entry:
            console.print(Text(f"not measured: {PEERS[name].label}: {entry['not_measured']}"))
