"""The gate of a Block-Recurrent Transformer's state as one kernel for GPUs in Triton, where torch takes three to six
operations; without a gradient.

    fixed    next = z + sigmoid(b) (s - z)
    lstm     next = s sigmoid(f + 1) + z sigmoid(i - 1)
    out      next in rows whose block is over, else s

s old state vectors, z new content, f and i what the gate's two maps give. In float32, whatever the types.
Letters: see modeling_block_recurrent_transformer.py.
"""

from __future__ import annotations

import torch

from .attention_triton import KINDS, _Tiles, is_ampere, jit
from .operators import operator

try:
    import triton
    import triton.language as tl
except ImportError:  # machines without a GPU, where torch's own operations serve
    triton = tl = None

NUMBERS = _Tiles(1, 1024, 4, 1)  # that a program computes


def serves(vectors: torch.Tensor) -> bool:
    """Tells whether the kernel serves vectors (B, Z, E) that want no gradient; reads no tensor. A compiler fuses
    torch's operations with their neighbours, so it is not given one."""
    if triton is None or torch.compiler.is_compiling():
        return False
    return is_ampere(vectors.device) and vectors.dtype in KINDS


def gate_triton(
    vectors: torch.Tensor,
    content: torch.Tensor,
    maps: tuple[torch.Tensor, ...],
    done: torch.Tensor | None,
) -> torch.Tensor:
    """The next vectors (B, Z, E).

    vectors, content: (B, Z, E). maps: b (E,), or f and i (B, Z, E). done: (B,), the rows whose block is over; None =
    all.
    """
    forget, enter = (*maps, None)[:2]
    return _operator(vectors, content, forget, enter, done)


@jit
def _gate(
    old_ptr, new_ptr, forget_ptr, enter_ptr, done_ptr, out_ptr, N, Z, E,
    LSTM: tl.constexpr, ASKED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N of N numbers, of all vectors of all rows."""
    at = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    some = at < N
    old = tl.load(old_ptr + at, mask=some, other=0.0).to(tl.float32)
    new = tl.load(new_ptr + at, mask=some, other=0.0).to(tl.float32)
    if LSTM:
        forget = tl.load(forget_ptr + at, mask=some, other=0.0).to(tl.float32)
        enter = tl.load(enter_ptr + at, mask=some, other=0.0).to(tl.float32)
        x = old * tl.sigmoid(forget + 1.0) + new * tl.sigmoid(enter - 1.0)
    else:
        x = new + tl.sigmoid(tl.load(forget_ptr + at % E, mask=some, other=0.0).to(tl.float32)) * (old - new)
    if ASKED:
        x = tl.where(tl.load(done_ptr + at // E // Z, mask=some, other=0) != 0, x, old)
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=some)


def _kernel(
    vectors: torch.Tensor,
    content: torch.Tensor,
    forget: torch.Tensor,
    enter: torch.Tensor | None,
    done: torch.Tensor | None,
) -> torch.Tensor:
    _, z, e = vectors.shape
    vectors, content, forget = (x.contiguous() for x in (vectors, content, forget))
    enter = forget if enter is None else enter.contiguous()  # where there is none the pointer is not followed
    out, n = torch.empty_like(vectors), vectors.numel()
    if not n:
        return out
    asked = done is not None
    with torch.cuda.device_of(vectors):
        _gate[(triton.cdiv(n, NUMBERS.keys),)](
            vectors, content, forget, enter, done.contiguous() if asked else forget, out, n, z, e,
            LSTM=forget.dim() == 3, ASKED=asked, BLOCK_N=NUMBERS.keys, num_warps=NUMBERS.warps,
            num_stages=NUMBERS.stages,
        )  # fmt: skip
    return out


if triton is not None:
    _operator = operator(__file__, "gate", _kernel, lambda vectors, *rest: vectors.new_empty(vectors.shape))
