"""Operators of torch: what a compiled graph holds whole, and does not look into.

Remote code is imported once for each folder that it is loaded from, so operators are named by the hash of their code:
a second import of the same code uses those of the first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def operator(
    file: str, name: str, function: Callable, shapes: Callable, gradient: tuple[Callable, Callable] | None = None
) -> Any:
    """The operator of a file's code with that name, made by whoever comes first.

    function: what it computes; its parameters are flat and annotated, as torch's schemas are. shapes: the same with
    tensors that hold nothing. gradient: (backward, setup_context) of torch.library.register_autograd.
    """
    space = "hf_gallery_" + hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12]
    existing = getattr(getattr(torch.ops, space), name, None)
    if existing is not None:
        return existing.default
    made = torch.library.custom_op(f"{space}::{name}", function, mutates_args=())
    made.register_fake(shapes)
    if gradient is not None:
        made.register_autograd(gradient[0], setup_context=gradient[1])
    return getattr(getattr(torch.ops, space), name).default


def attention_gradient(backward: Any) -> tuple[Callable, Callable]:
    """`gradient` of an operator that attends: its parameters are those of `Problem.tensors`, then others, of which the
    last three are no tensors; its results out and lse.

    backward: the operator that gives the gradients, from those of out and of lse (None if it has none), from out and
    lse, which tensors want one, and all parameters.
    """

    def keep(ctx, inputs, output):
        ctx.save_for_backward(*output, *inputs[:-3])
        ctx.numbers = inputs[-3:]
        ctx.set_materialize_grads(False)

    def differentiate(ctx, grad_out, grad_lse):
        out, lse, *tensors = ctx.saved_tensors
        wants = list(ctx.needs_input_grad[:5])
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        grads = backward(grad_out, grad_lse, out, lse, wants, *tensors, *ctx.numbers)
        found = (x if wanted else None for x, wanted in zip(grads, wants, strict=True))
        return *found, *[None] * (len(ctx.needs_input_grad) - len(wants))

    return differentiate, keep
