"""Cost of a memory in training: `python -m eval memory`. One training step of the Memorizing Transformer with its
memory full, against the same model without memory layers, in turns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from hf_gallery import GalleryCache, GalleryMemorizingTransformerConfig, GalleryMemorizingTransformerForCausalLM

from .measure import interleaved, median


@dataclasses.dataclass(frozen=True)
class MemorySettings:
    """A step of batch x length tokens with `memory_size` pairs stored in each row and head."""

    batch: int = 2
    length: int = 512
    layers: int = 4
    hidden: int = 256
    heads: int = 4
    memory_size: int = 8192
    topk: int = 32
    memory_layer: int = 2
    repeats: int = 15
    backends: tuple[str, ...] = ("exact", "faiss_flat")
    seed: int = 0


def run(
    settings: MemorySettings, device: torch.device, tick: Callable[[str], None] = lambda what: None
) -> dict[str, Any]:
    """Median seconds of a step (forward, backward) without memory and with each backend, and their ratios."""
    steps = {}
    for name in ("off", *settings.backends):
        tick(f"filling the memory: {name}")
        steps[name] = _Step(name, settings, device)
    tick("timing")
    seconds = {name: median(values) for name, values in interleaved(steps, settings.repeats, device).items()}
    return {
        "settings": dataclasses.asdict(settings),
        "milliseconds": {name: 1e3 * value for name, value in seconds.items()},
        "ratio_to_off": {name: value / seconds["off"] for name, value in seconds.items()},
    }


class _Step:
    """A training step on the segment after a text that has filled the memory; each call reads on from there."""

    def __init__(self, name: str, settings: MemorySettings, device: torch.device):
        config = GalleryMemorizingTransformerConfig(
            hidden_size=settings.hidden,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            intermediate_size=4 * settings.hidden,
            segment_length=settings.length,
            mem_len=settings.length,
            memory_layers=[] if name == "off" else [settings.memory_layer],
            memory_size=settings.memory_size,
            memory_topk=settings.topk,
            memory_backend="exact" if name == "off" else name,
        )
        torch.manual_seed(settings.seed)
        self.model = GalleryMemorizingTransformerForCausalLM(config).to(device).train()  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(settings.seed)
        text = torch.randint(0, 256, (settings.batch, settings.memory_size), generator=generator).to(device)
        self.ids = torch.randint(0, 256, (settings.batch, settings.length), generator=generator).to(device)
        self.cache = GalleryCache(config)
        with torch.no_grad():
            for part in text.split(settings.length, dim=1):
                self.model(part, past_key_values=self.cache, logits_to_keep=1)

    def __call__(self) -> None:
        """The cache goes into the step and is advanced by it, as in SegmentTrainer."""
        self.model(self.ids, past_key_values=self.cache, labels=self.ids).loss.backward()
        self.model.zero_grad()


def show(result: dict[str, Any], console: Console) -> None:
    """Prints the result as a table."""
    s = result["settings"]
    table = Table(
        title=f"A training step with {s['memory_size']:,} memories: batch {s['batch']} x {s['length']} tokens, "
        f"{s['layers']} layers, width {s['hidden']}, top-k {s['topk']}",
        caption=f"medians of {s['repeats']} steps in turns",
    )
    for heading in ("memory", "ms", "x off"):
        table.add_column(heading, justify="left" if heading == "memory" else "right")
    for name, value in result["milliseconds"].items():
        table.add_row(name, f"{value:.0f}", f"{result['ratio_to_off'][name]:.2f}")
    console.print(table)
