"""Training, as the tasks share it: transformers' own Trainer, quiet, with a progress bar of ours."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from .contestants import Contestant, build

Tick = Callable[[int], None]
Watch = Callable[[Any, int], None]  # told of a model in evaluation mode, and of the steps that it has trained
POINTS = 20  # of a learning curve


def learn(
    contestant: Contestant,
    settings: Any,
    batches: IterableDataset,
    seed: int,
    device: torch.device,
    tick: Tick,
    labels: int | None = None,
    bf16: bool = False,
    *,
    watch: Watch | None = None,
) -> PreTrainedModel:
    """A fresh model that has trained on `batches`, which yields settings.steps whole batches, ready to be asked: a
    causal one, or with `labels` a classifier of them. bf16, watch: as `teach` takes them."""
    model = build(contestant, settings.sizes, seed, labels)
    return teach(model, settings, batches, seed, device, tick, bf16=bf16, watch=watch)


def teach(
    model: Any,
    settings: Any,
    batches: IterableDataset,
    seed: int,
    device: torch.device,
    tick: Tick,
    *,
    bf16: bool = False,
    watch: Watch | None = None,
) -> Any:
    """The model when it has trained on `batches`, see `learn`. bf16: train in mixed precision. watch: is told of the
    model POINTS times while it trains, the last time at its end."""
    with training_arguments(
        device,
        settings.steps,
        settings.learning_rate,
        seed,
        per_device_train_batch_size=1,
        remove_unused_columns=False,
        bf16=bf16,
    ) as arguments:
        trainer = Trainer(model, arguments, train_dataset=batches, data_collator=only)
        if watch is not None:
            trainer.add_callback(Watcher(watch, settings.steps))
        train(trainer, tick)
    return model.to(device).eval()


def only(batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The Trainer's batch of one element, which is a whole batch already."""
    return batches[0]


def train(trainer: Trainer, tick: Tick, checkpoint: str | None = None) -> None:
    """Trains, from a checkpoint on where one is given, with a tick for every optimiser step in place of the Trainer's
    own printing."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Ticker(tick))
    trainer.train(resume_from_checkpoint=checkpoint)
    # or its forward would stay in mixed precision, where it has trained in that
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)


class Ticker(TrainerCallback):
    """Tells `tick` of every optimiser step."""

    def __init__(self, tick: Tick):
        self.tick = tick

    def on_step_end(self, args, state, control, **kwargs):
        self.tick(1)


class Watcher(TrainerCallback):
    """Tells `watch` of the model after POINTS optimiser steps, evenly spread and the last among them. The model trains
    on as if nobody had looked: looking draws no random numbers and the mode is put back."""

    def __init__(self, watch: Watch, steps: int):
        self.watch, self.at = watch, {-(-steps * (i + 1) // POINTS) for i in range(POINTS)}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.at:
            training = model.training
            model.eval()
            self.watch(model, state.global_step)
            model.train(training)


@contextmanager
def training_arguments(
    device: torch.device, steps: int, learning_rate: float, seed: int, logging_steps: int | None = None, **more: Any
) -> Iterator[TrainingArguments]:
    """Arguments of a Trainer that trains for `steps`: AdamW, warm-up over a tenth of the steps (at most 1,000), then a
    cosine down to a twentieth. It leaves no file, unless `more` gives output_dir and when to save. Losses, one every
    `logging_steps`, stay in the Trainer's state."""
    with tempfile.TemporaryDirectory(prefix="gallery-eval-") as folder:
        kept = {"output_dir": folder, "save_strategy": "no"} | more
        yield TrainingArguments(
            max_steps=steps,
            learning_rate=learning_rate,
            weight_decay=0.01,
            adam_beta2=0.98,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.05},
            warmup_steps=min(1000, max(1, steps // 10)),
            max_grad_norm=1.0,
            seed=seed,
            data_seed=seed,
            use_cpu=device.type == "cpu",
            logging_strategy="steps" if logging_steps else "no",
            logging_steps=logging_steps or 500,
            eval_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **kept,
        )
