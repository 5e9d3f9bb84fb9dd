"""Language modelling: bits per byte on held-out documents, each read from its first byte to its last."""

from __future__ import annotations

import collections
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from statistics import mean
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_gallery import GalleryCache
from hf_gallery.data import byte_tokenizer, corpus_version, encode_bytes
from hf_gallery.training import DocumentLanes, SegmentTrainer

from . import outside
from .cells import Cell
from .contestants import Contestant, build, smaller_memories
from .presets import TextSettings
from .significance import DOCUMENT
from .task import Column, Family, Job, OfEach, add_up, plain
from .training import Tick, only, train, training_arguments

LOGGED = 40  # points of a training curve
STRETCH = 4096  # bytes


def documents(split: Dataset, limit: int | None = None, each: int | None = None) -> list[np.ndarray]:
    """The bytes of each document, (bytes,) each: its first `each`, and of all at most `limit`, the last document cut
    there."""
    found, left = [], math.inf if limit is None else limit
    for text in split["text"]:
        ids = encode_bytes(text)[:each]
        ids = ids[: int(min(left, len(ids)))]
        if len(ids) > 1:
            found.append(ids)
        left -= len(ids)
        if left <= 0:
            break
    return found


def held_out(corpus: DatasetDict, settings: TextSettings) -> list[np.ndarray]:
    """The documents that are scored, as `documents` has them."""
    return documents(corpus["test"], settings.test_bytes, settings.document_bytes)


def dataset(found: list[np.ndarray]) -> Dataset:
    """As SegmentTrainer reads them."""
    return Dataset.from_dict({"input_ids": found})


def order0_bits(corpus: DatasetDict, settings: TextSettings) -> float:
    """Bits per byte of a model that knows how frequent each byte is, and nothing else: counted on the training split
    (add-one), scored on the held-out bytes."""
    counts = np.ones(256)
    for ids in documents(corpus["train"]):
        counts += np.bincount(ids, minlength=256)
    bits = -np.log2(counts / counts.sum())
    scored = np.concatenate([ids[1:] for ids in held_out(corpus, settings)])
    return float(bits[scored].mean())


def units(settings: TextSettings) -> int:
    """Ticks of one cell: training takes three times the work of evaluation for each token."""
    return settings.steps + math.ceil(settings.test_bytes / (3 * settings.lanes * settings.length))


def measure(
    contestant: Contestant, settings: TextSettings, corpus: DatasetDict, seed: int, device: torch.device, tick: Tick
) -> dict[str, Any]:
    """Trains a fresh model on the training documents, its cache carried from step to step, and reads the held-out
    documents from their first byte to their last. Returns its size, bits per byte, scored bytes, bytes trained on,
    seconds of training, its bits per byte while it trained, bits by position, document, stretch and of rare words (see
    `by_position`, `by_document`, `by_stretch`, `by_last_use`), and with smaller memories, where it has one."""
    model = build(contestant, settings.sizes, seed)
    with training_arguments(
        device,
        settings.steps,
        settings.learning_rate,
        seed,
        per_device_train_batch_size=settings.lanes,
        logging_steps=max(1, settings.steps // LOGGED),
        bf16=settings.bf16,
        torch_compile=settings.compile,
    ) as arguments:
        trainer = trainer_of(model, arguments, settings.length, dataset(documents(corpus["train"])))
        start = time.perf_counter()
        train(trainer, tick)
        seconds = time.perf_counter() - start
    model.to(device).eval()  # type: ignore[arg-type]  # transformers wraps to(), which hides its self from mypy
    found = held_out(corpus, settings)
    bits = read(model, found, settings.lanes, settings.length, device)
    by_memory_size = {}
    for size in smaller_memories(model):
        smaller = read(model, found, settings.lanes, settings.length, device)
        by_memory_size[str(size)] = sums(smaller) | {
            "by_document": by_document(smaller),
            "by_stretch": by_stretch(smaller),
        }
    tick(units(settings) - settings.steps)
    whole = sums(bits)
    return {
        "parameters": model.num_parameters(),
        "bits_per_byte": whole["bits"] / whole["bytes"],
        "scored_bytes": whole["bytes"],
        "trained_bytes": settings.steps * settings.lanes * settings.length,
        "training_seconds": seconds,
        "training_curve": {
            str(entry["step"]): entry["loss"] / math.log(2) for entry in trainer.state.log_history if "loss" in entry
        },
        "by_position": by_position(bits),
        "by_document": by_document(bits),
        "by_stretch": by_stretch(bits),
        "by_last_use": by_last_use(bits, found, frequent_words(corpus["train"])),
        "by_memory_size": by_memory_size,
        **({"read": outside.how(model, settings.length).value} if outside.is_foreign(model.config) else {}),
    }


def trainer_of(model: PreTrainedModel, arguments: TrainingArguments, length: int, found: Dataset) -> Trainer:
    """A trainer on documents, `length` bytes of each in a step, with the cache carried along; a model from outside has
    no cache that it could carry."""
    if not outside.is_foreign(model.config):
        return SegmentTrainer(
            model, arguments, segment_length=length, train_dataset=found, processing_class=byte_tokenizer()
        )
    seed, rows = arguments.data_seed or arguments.seed, arguments.per_device_train_batch_size
    lanes = DocumentLanes(found, lanes=rows, segment_length=length, seed=seed)
    batches = outside.Segments(lanes, arguments.max_steps, outside.positions(model.config))
    arguments.per_device_train_batch_size, arguments.remove_unused_columns = 1, False  # batches come whole
    return outside.SegmentsTrainer(model, arguments, train_dataset=batches, data_collator=only)


@torch.no_grad()
def read(
    model: PreTrainedModel, found: list[np.ndarray], lanes: int, length: int, device: torch.device
) -> list[np.ndarray]:
    """Bits that the model gives each byte of each document but its first, (bytes - 1,) each.

    Documents of like length are read side by side, `lanes` at a time at most, with their state carried along; those
    that end before others are padded. A forward reads as many tokens as `lanes` of `length` have. A model from outside
    does as outside.how says, `length` tokens of each document at a time.
    """
    going = None
    if outside.is_foreign(model.config):
        length = min(length, outside.positions(model.config) or length)
        going = outside.how(model, length)
    bits: list[np.ndarray] = [np.zeros(0)] * len(found)
    for group in alike([len(x) for x in found], lanes):
        longest = max(len(found[i]) for i in group)
        ids = torch.zeros(len(group), longest, dtype=torch.long)
        mask = torch.zeros(len(group), longest, dtype=torch.long)
        for row, i in enumerate(group):
            ids[row, : len(found[i])], mask[row, : len(found[i])] = torch.from_numpy(found[i].astype(np.int64)), 1
        ids, mask, parts = ids.to(device), mask.to(device), []
        further = _reader(model, going)
        width = lanes * length // len(group) if going is None else length
        for start in range(0, longest - 1, width):
            columns = slice(start, min(start + width, longest - 1))
            logits = further(ids[:, columns], mask[:, columns])  # (lanes, T, V)
            asked = ids[:, columns.start + 1 : columns.stop + 1]
            loss = torch.nn.functional.cross_entropy(logits.float().mT, asked, reduction="none")
            parts.append((loss / math.log(2)).cpu().numpy())
        joined = np.concatenate(parts, axis=1)  # (lanes, longest - 1)
        for row, i in enumerate(group):
            bits[i] = joined[row, : len(found[i]) - 1].astype(np.float64)
    return bits


def _reader(
    model: PreTrainedModel, going: outside.Reading | None
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Takes the next tokens of texts and their mask, (B, T) each, and gives the logits after them."""
    if going is not None:
        reader = outside.Reader(model, going)
        return lambda ids, mask: reader.read(ids)  # padding stands behind a text, where none of its tokens sees it
    cache = GalleryCache(model.config)
    return lambda ids, mask: model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits


def alike(lengths: list[int], most: int) -> list[list[int]]:
    """Groups of at most that many, by place, in which none is less than two thirds as long as another."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if not groups or len(groups[-1]) == most or 3 * lengths[groups[-1][0]] < 2 * lengths[i]:
            groups.append([])
        groups[-1].append(i)
    return groups


def by_position(bits: list[np.ndarray]) -> dict[str, dict[str, Any]]:
    """{first byte of the stretch: {bits, bytes, by_unit}} over stretches of a document that double in length from 64
    bytes on: does more context help, and until where?"""
    found: dict[str, dict[str, Any]] = {}
    longest = max(len(x) for x in bits)
    start, stop = 0, 64
    while start < longest:
        found[str(start)] = _of_documents([x[start:stop] for x in bits])
        start, stop = stop, 2 * stop
    return found


def by_document(bits: list[np.ndarray]) -> dict[str, list[float]]:
    """{bits, bytes} of each document, in their order: two models that read the same ones are compared document by
    document."""
    return {"bits": [float(x.sum()) for x in bits], "bytes": [len(x) for x in bits]}


def by_stretch(bits: list[np.ndarray]) -> list[float]:
    """Bits per byte of each stretch of STRETCH bytes, one document after another: what results hold that were measured
    before `by_document` was, so that one run may hold both."""
    return [float(part.mean()) for x in bits for part in np.array_split(x, max(1, len(x) // STRETCH))]


def sums(bits: list[np.ndarray]) -> dict[str, float]:
    """{bits, bytes} of documents, or of parts of them, together."""
    return {"bits": float(sum(x.sum() for x in bits)), "bytes": int(sum(len(x) for x in bits))}


def _of_documents(bits: list[np.ndarray]) -> dict[str, Any]:
    """{bits, bytes, by_unit} of parts of documents, one of each, in their order; some may be empty."""
    return sums(bits) | {"by_unit": _units([float(x.sum()) for x in bits], [len(x) for x in bits])}


def _units(bits: Iterable[float], count: Iterable[int]) -> dict[str, str]:
    """The bits and bytes of each document, as lines of a file; bits to the thousandth."""
    joined = " ".join(f"{x:.3f}" for x in bits), " ".join(str(int(n)) for n in count)
    return {"unit": DOCUMENT, "bits": joined[0], "bytes": joined[1]}


WORD = re.compile(rb"[A-Za-z_][A-Za-z0-9_]{2,}")
FREQUENT = 2000  # words that are not rare
FIRST_USE = "first use"


def frequent_words(training: Dataset) -> set[bytes]:
    """The most frequent words of the training documents; all other words are rare: names, for the most part."""
    counts: collections.Counter[bytes] = collections.Counter()
    for text in training["text"]:
        counts.update(WORD.findall(text.encode()))
    return {word for word, _ in counts.most_common(FREQUENT)}


def by_last_use(bits: list[np.ndarray], found: list[np.ndarray], frequent: set[bytes]) -> dict[str, dict[str, Any]]:
    """Cost of rare words by the distance in bytes to their last use in the document: {least distance: {bits, bytes,
    words, by_unit}}, in steps of four from 16 on, and "first use". Who remembers the names of a book pays less for a
    later use than for the first. A word stands from its first to its last byte; the byte after it, which ends it, is
    not counted."""
    sums: dict[str, dict[str, Any]] = {}
    for document, (x, ids) in enumerate(zip(bits, found, strict=True)):
        last: dict[bytes, int] = {}
        for match in WORD.finditer(ids.astype(np.uint8).tobytes()):
            word, start = match.group(), match.start()
            if word in frequent:
                continue
            label = FIRST_USE
            if word in last:
                distance = start - last[word]
                label = str(4 ** max(2, int(math.log(distance, 4) + 1e-9)))
            last[word] = start
            if start == 0:
                continue  # nothing stands before the first byte
            of = np.zeros((len(found), 2))  # bits and bytes of each document
            entry = sums.setdefault(label, {"bits": 0.0, "bytes": 0, "words": 0, "by_unit": of})
            cost, length = float(x[start - 1 : match.end() - 1].sum()), match.end() - start
            entry["bits"] += cost
            entry["bytes"] += length
            entry["words"] += 1
            entry["by_unit"][document] += cost, length
    for entry in sums.values():
        entry["by_unit"] = _units(*entry["by_unit"].T)
    return {label: sums[label] for label in sorted(sums, key=lambda k: -1 if k == FIRST_USE else int(k))}


ORDER0 = "order0"  # in place of a contestant's name: who knows how frequent each byte is, and nothing else


class Text(OfEach):
    """The task `text`."""

    name = "text"
    modules = ("text",)

    def settings(self, job: Job) -> dict[str, Any]:
        return plain(job.preset.text) | {"device": job.device.type, "corpus": corpus_version(job.corpus)}

    def units(self, job: Job) -> int:
        return units(job.preset.text)

    def cells(self, job: Job, contestants: list[Contestant], seed: int) -> Iterator[Cell]:
        """The baseline's, which has no seed, before those of the contestants."""

        def measure_order0(tick: Tick) -> dict[str, float]:
            bits = order0_bits(job.text, job.preset.text)
            tick(1)
            return {"bits_per_byte": bits}

        if seed == 0:
            yield Cell(self.name, ORDER0, 0, self.settings(job), 1, measure_order0, self.code)
        yield from super().cells(job, contestants, seed)

    def measure(self, job: Job, contestant: Contestant, seed: int, tick: Tick) -> dict[str, Any]:
        return measure(contestant, job.preset.text, job.text, seed, job.device, tick)

    def add(self, results: dict[str, Any], cell: dict[str, Any]) -> None:
        result = cell["result"]
        if cell["contestant"] == ORDER0:
            results["order0_bits_per_byte"] = result["bits_per_byte"]
            return
        entry = results["summary"][cell["contestant"]]
        entry["parameters"] = result["parameters"]
        for name in ("bits_per_byte", "by_stretch", "training_curve"):
            entry.setdefault(name, []).append(result[name])
        if "by_document" in result:
            entry.setdefault("by_document", []).append(result["by_document"])
        for name in ("by_position", "by_last_use"):
            add_up(entry.setdefault(name, {}), result[name])
        if not result["by_memory_size"]:
            return
        whole = {key: sum(s[key] for s in result["by_position"].values()) for key in ("bits", "bytes")}
        kept = [name for name in ("by_document", "by_stretch") if name in result]
        own = {str(results["settings"]["text"]["sizes"]["memory_size"]): whole | {name: result[name] for name in kept}}
        for size, score in (result["by_memory_size"] | own).items():
            for name in kept:
                entry.setdefault(f"{name}_of_memory_size", {}).setdefault(size, []).append(score[name])
            sums = {key: score[key] for key in ("bits", "bytes")}
            add_up(entry.setdefault("text_by_memory_size", {}), {size: sums})

    def columns(self, results: dict[str, Any]) -> list[Column]:
        family, order0 = Family("Text", baseline="bytes by frequency"), results["order0_bits_per_byte"]

        def parameters(name: str, entry: dict[str, Any]) -> str:
            return f"{entry['parameters']:,}" if "parameters" in entry else "-"

        def bits(name: str, entry: dict[str, Any]) -> str:
            return f"{mean(entry['bits_per_byte']):.3f}" if entry.get("bits_per_byte") else "-"

        return [
            Column(family, "parameters", parameters),
            Column(family, "bits/byte", bits, "-" if order0 is None else f"{order0:.3f}"),
        ]
