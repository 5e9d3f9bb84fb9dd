"""Every parameter gets a gradient in every backward: zeros where nothing used it.

What a forward uses may depend on its input: a text shorter than a block moves no recurrent state, an encoder without
global tokens needs none of their maps. But DistributedDataParallel and FSDP wait for the gradients of all parameters
on all processes: one that stays away stops the training, or lets it hang where only some processes miss it. So a
branch that leaves a part out names it here.
"""

from __future__ import annotations

import torch
from torch import nn

from .exporting import records_gradients


def with_gradients_for(x: torch.Tensor, *parts: nn.Module) -> torch.Tensor:
    """x as it is, whose backward also gives zeros to all parameters of the parts that learn.

    Inside of what is checkpointed, so that all gradients of a parameter come in one backward.
    """
    if not records_gradients():
        return x
    parameters = (p for part in parts for p in part.parameters())
    learning = [p for p in parameters if p.requires_grad and p.numel()]  # DeepSpeed's are empty while they are away
    return _Zeros.apply(x, *learning) if learning else x


class _Zeros(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *parameters):
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        zeros = (torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in ctx.like)
        return gradient, *zeros
