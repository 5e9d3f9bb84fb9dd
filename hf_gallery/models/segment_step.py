"""A decode step of the Recurrent Memory Transformer behind a static cache: one token, with memory tokens around it.

A ring's slots are the places of a segment, M of the memory that it reads and L of its tokens, so they are overwritten
when the next one begins. Where any row's segment begins or ends its memory tokens run through the layers beside the
token; a graph, which cannot ask, has them in every step, and rows pick what is theirs. Letters: see spans.py. L
segment_length, M num_memory_tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .exporting import possibly
from .rings import RingLayout, StepRows
from .spans import Spans
from .states import SegmentColumns


class SegmentStep(StepRows):
    """The rows of a step, as [read memory | token | written memory].

    reads, writes: memory tokens in front and behind. begins, ends (B,): whether a row's segment does with this token.
    places (B, any): of each of these columns in its segment.
    """

    def __init__(self, rows: StepRows, config):
        super().__init__(rows.seen, rows.mask)
        self.memory, length = config.num_memory_tokens, config.segment_length
        phase, real = rows.seen % length, rows.lengths > 0
        self.begins, self.ends = (phase == 0) & real, (phase == length - 1) & real
        self.reads = self.memory if possibly(self.begins) else 0
        self.writes = self.memory if possibly(self.ends) else 0
        front = torch.arange(self.reads, device=phase.device).expand(self.batch, -1)
        behind = torch.arange(self.writes, device=phase.device).expand(self.batch, -1) + self.memory + length
        self.places = torch.cat([front, self.memory + phase[:, None], behind], dim=1)
        self.slots, self.sees_all = self.memory + length, config.memory_attention == "full"

    def enter(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        """Tokens x (B, 1, E) with their memory (B, M, E)."""
        return torch.cat([memory[:, : self.reads], x, memory[:, : self.writes]], dim=1)

    def leave(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Token (B, 1, E) and written memory of x (B, any, E)."""
        _, token, written = x.split([self.reads, 1, self.writes], dim=1)
        return token, written

    def append(self, ring, new):
        """Columns of the segment's places, those of the written memory behind the ring: (B, H, M + L + any, D)."""
        read, token, written = new.to(ring.dtype).split([self.reads, 1, self.writes], dim=2)
        if self.reads:
            front = torch.where(self.begins[:, None, None, None], read, ring[:, :, : self.reads])
            ring = torch.cat([front, ring[:, :, self.reads :]], dim=2)
        return torch.cat([self.put(ring, token, self.places[:, self.reads]), written], dim=2)

    def segment_spans(self) -> SegmentSpans:
        return SegmentSpans(self)


class SegmentSpans(Spans):
    """The places [0, upper] of its segment that each column of a step sees, (B, any)."""

    of_ring = True

    def __init__(self, step: SegmentStep):
        upper = step.places
        if step.sees_all:
            last = step.slots + step.memory - 1
            upper = torch.where(upper < step.memory, step.memory - 1, torch.where(upper >= step.slots, last, upper))
        super().__init__(torch.zeros_like(upper), upper)

    def ring(self, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
        distance = self.upper[..., None] - torch.arange(slots, device=self.upper.device)  # (B, any, N)
        return distance, distance >= 0


@dataclass(frozen=True)
class SegmentLayout(RingLayout):
    """A segment's columns in a static cache. memory: M, of the slots in front."""

    memory: int = 0

    def lay(self, name, state, seen):
        x = state[name].tensor  # (B, H, C, D)
        count, place = self._count(seen.to(x.device)), torch.arange(self.slots, device=x.device)
        at = (x.shape[2] - count + place).clamp(0, x.shape[2] - 1)[:, None, :, None]  # (B, 1, N, 1)
        ring = x.gather(2, at.expand(-1, x.shape[1], -1, x.shape[3]))
        return ring.masked_fill((place >= count)[:, None, :, None], 0)

    def unlay(self, ring, seen):
        columns = self.slots - 1  # the next segment begins anew when the last token has been read
        at = self._count(seen.to(ring.device)) - columns + torch.arange(columns, device=ring.device)
        at = at.clamp(min=0)[:, None, :, None]
        return SegmentColumns(ring.gather(2, at.expand(-1, ring.shape[1], -1, ring.shape[3])))

    def _count(self, seen):
        """Columns that a segment has so far, (B, 1)."""
        phase = (seen % (self.slots - self.memory))[:, None]
        return torch.where(phase > 0, self.memory + phase, 0)
