"""input *= factor, where factor is a number on the device. If it is 1, this costs nothing but the launch.

Gradients that were computed ahead, in the forward pass, are multiplied by the upstream gradient of the loss. It is 1 as
a rule, but only the device knows. Memory traffic: none for a factor of 1, otherwise a read and a write of each element.
The product is formed in float32 and rounded once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import multiprocessors, on_device

_BLOCK, _WARPS = 4096, 8

#: Programs on each multiprocessor. Each takes every num_programs-th block.
_PROGRAMS = 8


@triton.jit(do_not_specialize=["elements"])
def scale_kernel(input, factor, elements, BLOCK: tl.constexpr):
    """Multiplies ``elements`` numbers that lie next to each other, in place."""
    by = tl.load(factor).to(tl.float32)
    blocks = tl.where(by == 1.0, 0, tl.cdiv(elements, BLOCK))
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        index = (tl.full((), 0, tl.int64) + block) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(input + index, mask=index < elements).to(tl.float32)
        tl.store(input + index, (x * by).to(input.dtype.element_ty), mask=index < elements)


def launch_scale(input: Tensor, factor: Tensor) -> None:
    """Multiplies the contiguous ``input`` by ``factor``, 0-dim."""
    elements = input.numel()
    if elements == 0:
        return
    programs = min(triton.cdiv(elements, _BLOCK), _PROGRAMS * multiprocessors(input.device))
    with on_device(input):
        scale_kernel[(programs,)](input, factor, elements, BLOCK=_BLOCK, num_warps=_WARPS)
