"""input *= factor, where factor is a number on the device, at no cost where it is 1.

Gradients that were computed ahead, in the forward pass, are multiplied by the upstream gradient of the loss. That is 1
as a rule, which only the device knows. Memory traffic: nothing for a factor of 1, and else a read and a write of each
element; the product is formed in float32 and rounded once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import multiprocessors, on_device

_BLOCK, _WARPS = 4096, 8

#: Programs on each multiprocessor, which take turns at the blocks.
_PROGRAMS = 8


@triton.jit(do_not_specialize=["elements"])
def scale_kernel(input, factor, elements, BLOCK: tl.constexpr):
    """In place, for contiguous memory."""
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
