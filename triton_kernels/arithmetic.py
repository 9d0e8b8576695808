"""Functions of a tensor of float32 that the transforms and the kernels share.

On NVIDIA GPUs they compile to ex2, lg2 and rcp of the special function unit, which flush subnormal numbers to 0, in 1
to 3 instructions. ``tl.exp``, ``tl.log2`` and ``/`` take 5, 31 and 10 (Triton 3.7.1, sm_90), since they are right for
subnormal numbers, too. A probability as small as that may be 0. The unit's error is up to 2 ulp; exp also rounds the
product with log2(e).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.target_info import is_hip

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
_LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def exp(x):
    """e^x; below 1.2e-38 it is 0."""
    return libdevice.exp2(x * LOG2_E)


@triton.jit
def decay(x):
    """e^-|x|. The constant is negative because Triton compiles -x to a subtraction, one more instruction."""
    return libdevice.exp2(tl.abs(x) * -LOG2_E)


@triton.jit
def exp2(x):
    """2^x; below 1.2e-38 it is 0."""
    return libdevice.exp2(x)


@triton.jit
def divide(a, b):
    """a / b, for b below 2^126."""
    return libdevice.fast_dividef(a, b)


@triton.jit
def log(x):
    """The natural logarithm of a normal number."""
    if is_hip():
        return tl.log(x)
    else:
        return _LN_2 * libdevice.fast_log2f(x)


@triton.jit
def log1p(x):
    """log(1 + x) for 0 <= x <= 1, with an absolute error of 2e-7 from the rounding of 1 + x."""
    return log(1.0 + x)


@triton.jit
def clamp(x, lo, hi):
    """x in [lo, hi]; NaN stays NaN."""
    x = tl.maximum(x, lo, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, hi, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def clamp_index(x, last):
    """floor(x) in [0, last] as int32. NaN becomes 0, so that the result is always a valid index."""
    return tl.minimum(tl.maximum(x, 0.0), last).to(tl.int32)


@triton.jit
def logistic(u):
    """sigmoid(u), sigmoid(-u) and exp(-|u|), without overflow or cancellation."""
    e = decay(u)
    large = divide(1.0, 1.0 + e)
    small = e * large
    return tl.where(u < 0, small, large), tl.where(u < 0, large, small), e


@triton.jit
def hyperbolic_tangent(u):
    """tanh(u) and its derivative, both to relative accuracy."""
    e = decay(2.0 * u)
    complement = divide(2.0 * e, 1.0 + e)  # 1 - |tanh(u)|
    size = 1.0 - complement
    square = u * u
    series = u * (1.0 - square * (1 / 3.0 - square * (2 / 15.0 - square * (17 / 315.0 - square * (62 / 2835.0)))))
    tanh = tl.where(square < 0.0625, series, tl.where(u < 0, -size, size))
    return tanh, complement * (1.0 + size)


@triton.jit
def halves_of(pair):
    """The two float32 of an int64, the lower one first."""
    return pair.to(tl.int32).to(tl.float32, bitcast=True), (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def pair_of(low, high):
    """The int64 of two float32."""
    upper = high.to(tl.int32, bitcast=True).to(tl.int64) << 32
    return upper | low.to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit
def entry_at(base, index, bytes: tl.constexpr, dtype: tl.constexpr):
    """A pointer to a ``dtype``, ``bytes`` * index bytes after base, whatever base points to."""
    return (base.to(tl.pointer_type(tl.int8)) + index.to(tl.int64) * bytes).to(tl.pointer_type(dtype))
