"""Sinusoidal positions, absolute and relative."""

from __future__ import annotations

import math

import torch


def sinusoids(positions: torch.Tensor, width: int, layout: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Sinusoids of the positions, (..., width) for positions (...).

    Frequencies fall from 1 to 1/10000 in a geometric row: sin(p / 10000^(2i / width)) and cos of the same
    (Vaswani et al. 2017, section 3.5). layout: "interleaved" sin, cos, sin, cos, as in that paper; "concatenated" all
    sines, then all cosines, as in Marian and in Transformer-XL's code (mem_transformer.py, PositionalEmbedding).
    Computed in float64, since float32 cannot hold the angle of a far position.
    """
    frequency = torch.exp(
        torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) * (-math.log(10000.0) / width)
    )
    angle = positions[..., None].to(torch.float64) * frequency  # (..., width / 2)
    parts = (angle.sin(), angle.cos())
    if layout == "concatenated":
        return torch.cat(parts, dim=-1).to(dtype)
    return torch.stack(parts, dim=-1).flatten(-2).to(dtype)


def t5_buckets(distance: torch.Tensor, buckets: int = 32, max_distance: int = 128) -> torch.Tensor:
    """The bucket of each distance >= 0 from a query back to a key (Raffel et al. 2019, section 2.1).

    The first half of the buckets are exact, the second half grow in a geometric row up to max_distance, and the last
    one holds all beyond. The same buckets as meliad's position_t5.py, T5RelativePositionBiases, for causal attention.
    """
    exact = buckets // 2
    growth = torch.log(distance.clamp(min=1).to(torch.float64) / exact) / math.log(max_distance / exact)
    logarithmic = exact + (growth * (buckets - exact)).to(torch.long)
    return torch.where(distance < exact, distance, logarithmic.clamp(max=buckets - 1))
