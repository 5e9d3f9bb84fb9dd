"""What the training tasks share: transformers' own Trainer, quiet, with a bar of ours."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

Tick = Callable[[int], None]


def train(trainer: Trainer, tick: Tick) -> None:
    """Trains, with a tick for every optimiser step in place of the Trainer's own printing."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Ticker(tick))
    trainer.train()


class Ticker(TrainerCallback):
    """Tells `tick` of every optimiser step."""

    def __init__(self, tick: Tick):
        self.tick = tick

    def on_step_end(self, args, state, control, **kwargs):
        self.tick(1)


@contextmanager
def training_arguments(
    device: torch.device, steps: int, learning_rate: float, seed: int, **more: Any
) -> Iterator[TrainingArguments]:
    """Arguments of a Trainer that trains for `steps` and leaves no file: AdamW, warm-up over a tenth of the steps (at
    most 1,000), then a cosine down to a twentieth."""
    with tempfile.TemporaryDirectory(prefix="gallery-eval-") as folder:
        yield TrainingArguments(
            output_dir=folder,
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
            save_strategy="no",
            logging_strategy="no",
            eval_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **more,
        )
