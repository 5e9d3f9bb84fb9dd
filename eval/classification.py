"""Byte classification: where does a stretch of bytes come from? Accuracy by the length of the stretch.

After the text task of Long Range Arena (Tay et al. 2020, section 2.2): bytes in, one label out, learned from nothing.
Labels are those of a labelled dataset of the Hub (`--corpus hf:stanfordnlp/imdb` is that task's own), and of any other
corpus its largest sources: the books of a folder of books, the packages of the standard library.

Every contestant classifies by the gallery's head for its architecture, a causal model whose last token is asked for
the label. So what stands far from the end counts only if the model carries it there: a mean over all positions would
show each part of the stretch to the windowed Transformer too, and hide what is compared. Stretches are whole windows
long, so that the last token's segment is a full one for those who see segments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel

from hf_gallery.data import corpus_version

from .abilities import OfAbility
from .contestants import Contestant
from .presets import ClassificationSettings
from .significance import DOCUMENT, by_unit
from .task import Job, plain
from .training import Tick, learn

ABOUT = {
    "title": "Byte classification",
    "group": "text",
    "axis": "bytes of the stretch, at most",
    "about": "Which source a stretch of bytes comes from, told at its last byte. Nothing of it was trained on.",
}
HELD_OUT = 5  # a source's last 1 / HELD_OUT is asked about, the rest is for training


@dataclasses.dataclass(frozen=True)
class Source:
    """The texts of one label, for training and for testing, (bytes,) uint8 each."""

    train: list[np.ndarray]
    test: list[np.ndarray]


def sources(corpus: DatasetDict, settings: ClassificationSettings) -> dict[str, Source]:
    """The sources by name: the labels of a corpus with a column "label", each with its texts of train and of test;
    otherwise the settings.classes largest of train, each cut in two (see `_places`).

    Raises ValueError if there are fewer than two with text of a window on both sides, or of the longest stretch where
    a source is cut.
    """
    if "label" in corpus["train"].column_names:
        found, least = _labelled(corpus, settings.sizes.window), settings.sizes.window
    else:
        found, least = _places(corpus["train"], settings), max(settings.lengths)
    if len(found) < 2:
        raise ValueError(
            f"the corpus has {len(found)} source(s) with {least:,} bytes to train on and as many to be asked about, "
            "and the task bytes tells at least two apart; take a corpus of more or longer documents, or one of labels"
        )
    return found


def _labelled(corpus: DatasetDict, least: int) -> dict[str, Source]:
    texts: dict[str, dict[str, list[np.ndarray]]] = {}
    for split in ("train", "test"):
        for label, text in zip(corpus[split]["label"], corpus[split]["text"], strict=True):
            ids = _bytes(text)
            if len(ids) >= least:
                texts.setdefault(str(label), {"train": [], "test": []})[split].append(ids)
    return {label: Source(**texts[label]) for label in sorted(texts) if all(texts[label].values())}


def _places(rows: Dataset, settings: ClassificationSettings) -> dict[str, Source]:
    """One source for each file or folder at the corpus's top: its documents in a row. Of those that are long enough,
    the largest."""
    texts: dict[str, list[str]] = {}
    for document, text in zip(rows["document"], rows["text"], strict=True):
        parts = document.split("/")
        texts.setdefault(parts[1] if parts[0] == "train" and len(parts) > 1 else parts[0], []).append(text)
    joined = {place: _bytes("".join(parts)) for place, parts in texts.items()}
    large = sorted(joined, key=lambda place: (-len(joined[place]), place))[: settings.classes]
    cut = {place: len(joined[place]) - len(joined[place]) // HELD_OUT for place in large}
    return {
        place: Source([joined[place][: cut[place]]], [joined[place][cut[place] :]])
        for place in large
        if len(joined[place]) // HELD_OUT >= max(settings.lengths)
    }


def _bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8)


def _extent(text: np.ndarray, length: int, window: int) -> int:
    """Bytes of a stretch of at most `length` from a text: whole windows."""
    return min(length, len(text)) // window * window


class Stretches(IterableDataset):
    """Whole batches, as many as there are steps: {input_ids, attention_mask}, (B, T) each, and labels (B,), all
    stretches of a batch of one length. First the shortest, then longer ones too; sources, their texts and places in
    them are drawn evenly. Every contestant reads the same batches."""

    def __init__(self, found: dict[str, Source], settings: ClassificationSettings, seed: int):
        self.sources, self.settings, self.seed = list(found.values()), settings, seed

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        s = self.settings
        random = np.random.default_rng([self.seed, 101])
        for step in range(s.steps):
            share = min(1.0, step / (s.steps * s.growing_share))
            length = s.lengths[random.integers(1 + int(share * (len(s.lengths) - 1)))]
            labels = random.integers(len(self.sources), size=max(1, s.tokens // length))
            stretches = []
            for label in labels:
                texts = self.sources[label].train
                text = texts[random.integers(len(texts))]
                extent = _extent(text, length, s.sizes.window)
                start = random.integers(len(text) - extent + 1)
                stretches.append(text[start : start + extent])
            yield _batch(stretches) | {"labels": torch.from_numpy(labels)}


def _batch(stretches: list[np.ndarray]) -> dict[str, torch.Tensor]:
    """Side by side, padded on the left."""
    longest = max(map(len, stretches))
    ids = torch.zeros(len(stretches), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, stretch in enumerate(stretches):
        ids[row, longest - len(stretch) :] = torch.from_numpy(stretch.astype(np.int64))
        mask[row, longest - len(stretch) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


class Question(NamedTuple):
    """A stretch to be asked about, its label, and the number of the text that it was cut from, over all sources."""

    stretch: np.ndarray
    label: int
    text: int


def questions(found: dict[str, Source], settings: ClassificationSettings, length: int, seed: int) -> list[Question]:
    """Stretches of at most `length` bytes to be asked about: no two overlap, all labels alike often, settings.examples
    or as many as there are, drawn by the seed."""
    random = np.random.default_rng([seed, 102, length])
    window = settings.sizes.window
    asked: list[list[Question]] = []
    first = 0  # number of the source's first text
    for label, source in enumerate(found.values()):
        extents = [_extent(text, length, window) for text in source.test]
        places = [(i, at) for i, n in enumerate(extents) for at in range(0, len(source.test[i]) - n + 1, n)]
        drawn = random.permutation(places)
        asked.append([Question(source.test[i][at : at + extents[i]], label, first + int(i)) for i, at in drawn])
        first += len(source.test)
    each = min([settings.examples // len(found), *map(len, asked)])
    return [question for own in asked for question in own[: max(1, each)]]


def units(settings: ClassificationSettings) -> int:
    """Ticks of one cell."""
    return settings.steps + len(settings.lengths)


def measure(
    contestant: Contestant,
    settings: ClassificationSettings,
    corpus: DatasetDict,
    seed: int,
    device: torch.device,
    tick: Tick,
) -> dict[str, Any]:
    """Trains a fresh classifier on stretches of all lengths and asks it about held-out ones. Returns its size, the
    labels and, for each length, how many stretches were asked about, how many answers were right, also of each text,
    and how often a guess is."""
    found = sources(corpus, settings)
    batches = Stretches(found, settings, seed)
    model = learn(contestant, settings, batches, seed, device, tick, labels=len(found), bf16=settings.bf16)
    asked = {length: questions(found, settings, length, seed) for length in settings.lengths}
    texts = sorted({question.text for own in asked.values() for question in own})
    scores = {}
    for length, own in asked.items():
        score = ask(model, own, texts, max(1, settings.tokens // length), device)
        scores[str(length)] = score | {"chance": 1 / len(found), "trained": True}
        tick(1)
    return {"parameters": model.num_parameters(), "labels": list(found), "levels": scores}


@torch.no_grad()
def ask(
    model: PreTrainedModel, asked: list[Question], texts: list[int], rows: int, device: torch.device
) -> dict[str, Any]:
    """{asked, correct, by_unit} over stretches, `rows` at a time; the units are the texts of these numbers."""
    counts = {text: 0 for text in texts}
    right = dict(counts)
    for group in (asked[i : i + rows] for i in range(0, len(asked), rows)):
        batch = _batch([question.stretch for question in group])
        chosen = model(**{name: x.to(device) for name, x in batch.items()}).logits.argmax(-1).tolist()
        for answer, question in zip(chosen, group, strict=True):
            counts[question.text] += 1
            right[question.text] += answer == question.label
    return by_unit(DOCUMENT, right.values(), counts.values())


class Bytes(OfAbility):
    """The task `bytes`."""

    name = "bytes"
    modules = ("classification", "significance")

    def about(self, job: Job) -> dict[str, str]:
        return ABOUT

    def settings(self, job: Job) -> dict[str, Any]:
        return plain(job.preset.classification) | {
            "device": job.device.type,
            "corpus": corpus_version(job.corpus),
        }

    def units(self, job: Job) -> int:
        return units(job.preset.classification)

    def measure(self, job: Job, contestant: Contestant, seed: int, tick: Tick) -> dict[str, Any]:
        return measure(contestant, job.preset.classification, job.labelled_text, seed, job.device, tick)
