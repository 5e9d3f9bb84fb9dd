"""The zoo: `python -m eval zoo BOOKS`. One trained model of each architecture, small enough to lie in the repository.

All are of one size, and read the same documents in the same order, with their cache carried from step to step. A model
is a cell of a run: stopped, it goes on from its last checkpoint, and one that is done is not trained again. What is
measured is the model as saved, opened again: the first bytes of each held-out document, read from its beginning.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import ExportableState

from hf_gallery.cards import render_card, variant_of
from hf_gallery.data import byte_tokenizer, corpus_version, load_corpus
from hf_gallery.files import read_json, write_json, write_text
from hf_gallery.training import newest_whole

from . import text
from .cells import Cell
from .contestants import CONTESTANTS, Contestant, Sizes, build
from .machine import provenance
from .presets import MEDIUM
from .task import plain
from .training import Tick, train, training_arguments

ANIMALS = tuple(name for name, contestant in CONTESTANTS.items() if contestant.smaller_of is None)


@dataclasses.dataclass(frozen=True)
class ZooSettings:
    """Sizes of the models and their training: `steps` of `lanes` documents side by side, `length` bytes each.

    memory_size: of the Memorizing Transformer as it is saved; in training it has the one of `sizes`, which costs less.
    scored_bytes: of each held-out document. save_steps: between two checkpoints. bf16: train in mixed precision.
    """

    sizes: Sizes = dataclasses.replace(
        MEDIUM, hidden=192, intermediate=768, window=128, memory_layers=(2,), recurrent_layers=(2,)
    )
    steps: int = 8000
    lanes: int = 4  # small steps: with 8 lanes, half as many steps end 0.1 bits per byte higher
    length: int = 512
    learning_rate: float = 2e-3
    seed: int = 0
    memory_size: int = 8192
    scored_bytes: int = 131_072
    save_steps: int = 200
    bf16: bool = True

    @property
    def trained_bytes(self) -> int:
        """Bytes that a model reads in training, where no lane ends before the others."""
        return self.steps * self.lanes * self.length


def plan(
    names: list[str], settings: ZooSettings, corpus: str, folder: Path, out: Path, device: torch.device
) -> Iterator[Cell]:
    """The cells of the models of these names, which are trained in `folder` and saved to out/NAME."""
    about = plain(settings) | {"corpus": corpus_version(corpus), "device": device.type}
    documents = functools.cache(lambda: load_corpus(corpus))  # read once, and only if a model is to be made

    def measure(name: str, tick: Tick) -> dict[str, Any]:
        return make(CONTESTANTS[name], settings, documents(), folder / "training" / name, out / name, device, tick)

    for name in names:
        yield Cell("zoo", name, settings.seed, about, settings.steps + 1, functools.partial(measure, name))


def make(
    contestant: Contestant,
    settings: ZooSettings,
    corpus: DatasetDict,
    work: Path,
    place: Path,
    device: torch.device,
    tick: Tick,
) -> dict[str, Any]:
    """Trains a model, with checkpoints in `work`, saves it to `place` and measures it as saved. Returns what its
    training.json says of it."""
    model = build(contestant, settings.sizes, settings.seed)
    with training_arguments(
        device,
        settings.steps,
        settings.learning_rate,
        settings.seed,
        output_dir=str(work),
        per_device_train_batch_size=settings.lanes,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=2,
        logging_steps=max(1, settings.steps // text.LOGGED),
        bf16=settings.bf16,
    ) as arguments:
        trainer = text.trainer_of(model, arguments, settings.length, text.dataset(text.documents(corpus["train"])))
        watch = Stopwatch()
        trainer.add_callback(watch)
        resumed = newest_whole(work) if work.is_dir() else None
        if resumed is not None:
            tick(int(resumed.rsplit("-", 1)[1]))
        train(trainer, tick, resumed)
    if contestant.carries == "memory":
        model.config.memory_size = settings.memory_size
    beside = place.with_name(f".{place.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    save(model, byte_tokenizer(), beside)
    opened: PreTrainedModel = AutoModelForCausalLM.from_pretrained(beside).eval()
    opened.to(device)  # type: ignore[arg-type]  # transformers wraps to(), which hides its self from mypy
    test = corpus["test"].filter(lambda row: len(row["text"].encode()) > 1)  # of one byte none can be foretold
    bits = text.read(opened, text.documents(test, each=settings.scored_bytes), settings.lanes, settings.length, device)
    whole = text.sums(bits)
    about = {
        "bits_per_byte": whole["bits"] / whole["bytes"],
        "scored_bytes": whole["bytes"],
        "by_document": {name: float(x.mean()) for name, x in zip(test["document"], bits, strict=True)},
        "trained_bytes": settings.trained_bytes,
        "documents": len(corpus["train"]),
        "steps": settings.steps,
        "lanes": settings.lanes,
        "length": settings.length,
        "learning_rate": settings.learning_rate,
        "bf16": settings.bf16,
        "seconds": watch.seconds,
        "provenance": provenance(device, "python -m eval zoo"),
    }
    write_json(beside / "training.json", about)
    write_json(beside / "eval_results.json", {"eval_bits_per_byte": about["bits_per_byte"]})
    card = render_card(
        variant_of(beside).name, folder=beside, repo_id=f"{place.parent.name}/{place.name}", training=story(about)
    )
    write_text(beside / "README.md", card)
    shutil.rmtree(place, ignore_errors=True)
    beside.rename(place)
    tick(1)
    return about


class Stopwatch(TrainerCallback, ExportableState):
    """Seconds of training, those before a stop among them: it is kept in each checkpoint."""

    seconds = since = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        kept = state.stateful_callbacks.get(type(self).__name__, self.state())
        self.seconds, self.since = kept["attributes"]["seconds"], time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        self.seconds, self.since = self.seconds + now - self.since, now

    def state(self) -> dict[str, Any]:
        """As transformers keeps it in a checkpoint."""
        return {"args": {}, "attributes": {"seconds": self.seconds}}


def story(about: dict[str, Any]) -> str:
    """A card's words on how a model was trained and measured."""
    p, precision = about["provenance"], "in bfloat16 by autocast" if about["bf16"] else "in float32"
    lines = [
        "## How it was trained",
        "",
        f"On {about['trained_bytes']:,} bytes of {about['documents']} long texts, {about['lanes']} of them side by "
        f"side, {about['length']} bytes each in a step, with the cache carried from step to step: {about['steps']:,} "
        f"steps of AdamW, learning rate {about['learning_rate']:g}, {precision}. All models of the zoo read the same "
        f"bytes in the same order. It took {about['seconds'] / 60:.0f} minutes by the clock on "
        f"{p['machine']['processor']} ({p['machine']['device']}, {p['machine']['torch_threads']} thread(s)), torch "
        f"{p['versions']['torch']}, commit {p['commit']}.",
        "",
        f"Measured as saved, on {about['scored_bytes']:,} bytes of texts that it never read, from their beginnings:",
        "",
        "| text | bits per byte |",
        "|---|---:|",
        *(f"| {name} | {bits:.3f} |" for name, bits in about["by_document"].items()),
        f"| all | {about['bits_per_byte']:.3f} |",
    ]
    return "\n".join(lines)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Saves a model in half precision that opens in full, with its tokenizer, but without code: the package opens it,
    and `push` adds the code."""
    halves: dict[int, torch.Tensor] = {}  # by place: tied weights stay tied, and are saved once
    half = {name: halves.setdefault(x.data_ptr(), x.half()) for name, x in model.state_dict().items()}
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.95)
    model.save_pretrained(folder, state_dict=half)
    tokenizer.save_pretrained(folder)
    for path in folder.glob("*.py"):
        path.unlink()
    config = read_json(folder / "config.json")
    del config["auto_map"]
    write_json(folder / "config.json", config)
