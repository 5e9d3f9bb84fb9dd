"""Vectors at a given length, as one kernel for GPUs in Triton, where torch takes four operations; and its gradient.

    out = |size_h| x / sqrt(|x|^2 + 1e-6)      in float32, whatever the type of x

Letters: see spans.py.
"""

from __future__ import annotations

from typing import Any

import torch

from .attention_triton import KINDS, _block, _load, _program, _store, is_ampere, jit
from .operators import operator

try:
    import triton
    import triton.language as tl
except ImportError:  # machines without a GPU, where torch's own operations serve
    triton = tl = None

EPSILON = 1e-6  # of the squared length
_ROWS = 16  # of a program


def serves(x: torch.Tensor) -> bool:
    """Tells whether the kernel serves vectors (B, H, T, D). A compiler fuses torch's operations with their neighbours,
    so it is not given one."""
    if triton is None or torch.compiler.is_compiling() or x.dim() != 4 or x.shape[-1] > 1024:
        return False
    return is_ampere(x.device) and x.dtype in KINDS


def unit_triton(x: torch.Tensor, size: torch.Tensor | None) -> torch.Tensor:
    """x (B, H, T, D) at length 1, or at the length |size|, size (H,)."""
    return _forward(x, None if size is None else size.float().contiguous())


@jit
def _unit(
    x_ptr, size_ptr, out_ptr, x_b, x_h, x_t, H, T,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, SIZED: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    pair, tile = _program(tl.cdiv(T, ROWS))
    b, h = pair // H, pair % H
    t = tile * ROWS + tl.arange(0, ROWS)
    x = _load(x_ptr + b * x_b + h * x_h, t, x_t, T, D, BLOCK_D, False).to(tl.float32)
    length = 1.0 / tl.sqrt(tl.sum(x * x, 1) + EPS)
    if SIZED:
        length *= tl.abs(tl.load(size_ptr + h))
    _store(out_ptr + (b * T * H + h) * D, x * length[:, None], t, H * D, T, D, BLOCK_D)


@jit
def _unit_backward(
    x_ptr, size_ptr, g_ptr, dx_ptr, along_ptr, x_b, x_h, x_t, g_b, g_h, g_t, H, T,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, SIZED: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """The gradient of x; and along (B, H, T), the part of grad_out along the unit vector, whose sums are |size|'s."""
    pair, tile = _program(tl.cdiv(T, ROWS))
    b, h = pair // H, pair % H
    t = tile * ROWS + tl.arange(0, ROWS)
    x = _load(x_ptr + b * x_b + h * x_h, t, x_t, T, D, BLOCK_D, False).to(tl.float32)
    g = _load(g_ptr + b * g_b + h * g_h, t, g_t, T, D, BLOCK_D, False).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(x * x, 1) + EPS)
    u = x * inverse[:, None]
    along = tl.sum(g * u, 1)
    tl.store(along_ptr + pair * T + t, along, mask=t < T)
    if SIZED:
        inverse *= tl.abs(tl.load(size_ptr + h))
    _store(dx_ptr + (b * T * H + h) * D, (g - u * along[:, None]) * inverse[:, None], t, H * D, T, D, BLOCK_D)


def _like(x: torch.Tensor) -> torch.Tensor:
    """An empty (B, H, T, D), laid out (B, T, H, D)."""
    b, h, t, d = x.shape
    return x.new_empty(b, t, h, d).transpose(1, 2)


def _launch(x: torch.Tensor, size: torch.Tensor | None) -> tuple[tuple[int], dict[str, Any]]:
    b, h, t, d = x.shape
    options = dict(D=d, BLOCK_D=_block(d), ROWS=_ROWS, SIZED=size is not None, EPS=EPSILON, num_warps=4)
    return (b * h * triton.cdiv(t, _ROWS),), options


def _kernel(x: torch.Tensor, size: torch.Tensor | None) -> torch.Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = _like(x)
    grid, options = _launch(x, size)
    if not x.numel():
        return out
    with torch.cuda.device_of(x):
        _unit[grid](x, x if size is None else size, out, *x.stride()[:3], *x.shape[1:3], **options)
    return out


def _kernel_backward(
    grad: torch.Tensor, x: torch.Tensor, size: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    x, grad = (y if y.stride(-1) == 1 else y.contiguous() for y in (x, grad))
    dx, along = _like(x), torch.empty(x.shape[:3], device=x.device)
    grid, options = _launch(x, size)
    if not x.numel():
        return dx, along
    with torch.cuda.device_of(x):
        _unit_backward[grid](
            x, x if size is None else size, grad, dx, along, *x.stride()[:3], *grad.stride()[:3], *x.shape[1:3],
            **options,
        )  # fmt: skip
    return dx, along


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad):
    x, size = ctx.saved_tensors
    dx, along = _backward(grad.to(x.dtype), x, size)
    return dx, along.sum((0, 2)) * size.sign() if ctx.needs_input_grad[1] else None


if triton is not None:
    _backward = operator(
        __file__, "unit_backward", _kernel_backward, lambda grad, x, size: (_like(x), x.new_empty(x.shape[:3]).float())
    )
    _forward = operator(__file__, "unit", _kernel, lambda x, size: _like(x), (_differentiate, _keep))
