"""What the kernels over rows share: the log-sum-exp of a row that arrives in tiles.

As on the CPU (``csrc/row``), a row is described by its largest y and sum exp(y - largest), not by lse alone: p formed
from these repeats the exponentials of the sum, so that the p of a row add up to 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Logits below this are taken for it where gradients are formed: their probability is 0 as that of -inf is, and the
#: products of a gradient of 0 with what the coefficients' gradients need of z stay 0.
LOWEST: tl.constexpr = tl.constexpr(-1e30)


@triton.jit
def maximum(a, b):
    """The larger of two, NaN if either is."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def add_tile(largest, total, y, inside):
    """(largest, total) of a row with the tile y, whose lanes outside ``inside`` do not exist.

    -inf contributes 0; NaN and +inf make the total NaN.
    """
    # inf - inf is NaN: a tile with +inf has a NaN total. Lanes that do not exist must not hide behind f(-inf), which
    # may be finite, so that the mask comes after f.
    y = tl.where(inside, y, float("-inf"))
    new = maximum(largest, tl.max(y, 0))
    shift = tl.where(new == float("-inf"), 0.0, new)
    return new, total * tl.exp(largest - shift) + tl.sum(tl.exp(y - shift), 0)


@triton.jit
def log_of_sum(total):
    """log(total); NaN for the total 0 of a row of -inf only, which has no distribution."""
    return tl.where(total == 0, float("nan"), tl.log(total))
