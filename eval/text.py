"""Language modelling: bits per byte on held-out documents, each read from its first byte to its last."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict

from hf_gallery.data import byte_tokenizer, encode_bytes
from hf_gallery.training import SegmentTrainer

from .contestants import Contestant, build
from .presets import TextSettings
from .training import Tick, train, training_arguments


def documents(split: Dataset, limit: int | None = None) -> list[np.ndarray]:
    """The bytes of each document, (bytes,) each; at most `limit` bytes in all, the last document cut there."""
    found, left = [], math.inf if limit is None else limit
    for text in split["text"]:
        ids = encode_bytes(text)
        ids = ids[: int(min(left, len(ids)))]
        if len(ids) > 1:
            found.append(ids)
        left -= len(ids)
        if left <= 0:
            break
    return found


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
    scored = np.concatenate([ids[1:] for ids in documents(corpus["test"], settings.test_bytes)])
    return float(bits[scored].mean())


def units(settings: TextSettings) -> int:
    """Ticks of one cell: training takes three times the work of evaluation for each token."""
    return settings.steps + math.ceil(settings.test_bytes / (3 * settings.lanes * settings.length))


def measure(
    contestant: Contestant, settings: TextSettings, corpus: DatasetDict, seed: int, device: torch.device, tick: Tick
) -> dict[str, Any]:
    """Trains a fresh model on the training documents, its cache carried from step to step, and reads the held-out
    documents likewise. Returns its size, bits per byte, scored bytes, bytes trained on and seconds of training."""
    model = build(contestant, settings.sizes, seed)
    with training_arguments(
        device,
        settings.steps,
        settings.learning_rate,
        seed,
        per_device_train_batch_size=settings.lanes,
        per_device_eval_batch_size=settings.lanes,
    ) as arguments:
        trainer = SegmentTrainer(
            model,
            arguments,
            segment_length=settings.length,
            train_dataset=dataset(documents(corpus["train"])),
            eval_dataset=dataset(documents(corpus["test"], settings.test_bytes)),
            processing_class=byte_tokenizer(),
        )
        start = time.perf_counter()
        train(trainer, tick)
        seconds = time.perf_counter() - start
        metrics = trainer.evaluate()
    tick(units(settings) - settings.steps)
    return {
        "parameters": model.num_parameters(),
        "bits_per_byte": metrics["eval_bits_per_byte"],
        "scored_bytes": metrics["eval_tokens"],
        "trained_bytes": settings.steps * settings.lanes * settings.length,
        "training_seconds": seconds,
    }
