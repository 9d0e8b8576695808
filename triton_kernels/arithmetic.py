"""Functions of a tensor of float32 that the transforms share, without libdevice: the interpreter does not have it.

``tl.exp`` is one multiplication and one ex2 on a GPU: a few ulp for arguments near 0, more towards +-88.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def clamp(x, lo, hi):
    """x in [lo, hi]. NaN stays NaN: a comparison with it is false."""
    return tl.where(x < lo, lo, tl.where(x > hi, hi, x))


@triton.jit
def clamp_index(x, last):
    """x in [0, last] as int32, for x a whole number or infinite. NaN becomes 0: the result may be used as an index."""
    x = tl.where(x > 0, x, 0.0)
    return tl.where(x < last, x, last).to(tl.int32)


@triton.jit
def log1p(x):
    """log(1 + x) for 0 <= x <= 1, to 2 ulp: 2 atanh(x / (2 + x)) by its series. lg2 of 1 + x would lose a small x."""
    s = x / (2.0 + x)  # at most 1/3: the first term left out is 3e-9 of the sum
    t = s * s
    tail = 1 / 15.0
    tail = tail * t + 1 / 13.0
    tail = tail * t + 1 / 11.0
    tail = tail * t + 1 / 9.0
    tail = tail * t + 1 / 7.0
    tail = tail * t + 1 / 5.0
    tail = tail * t + 1 / 3.0
    return 2.0 * s * (tail * t + 1.0)


@triton.jit
def logistic(u):
    """sigmoid(u), sigmoid(-u) and exp(-|u|), without overflow or cancellation."""
    decay = tl.exp(-tl.abs(u))
    large = 1.0 / (1.0 + decay)
    small = decay * large
    return tl.where(u < 0, small, large), tl.where(u < 0, large, small), decay


@triton.jit
def hyperbolic_tangent(u):
    """tanh(u) and its derivative, both to relative accuracy."""
    decay = tl.exp(-2.0 * tl.abs(u))
    complement = 2.0 * decay / (1.0 + decay)  # 1 - |tanh(u)|
    size = 1.0 - complement
    square = u * u
    series = u * (1.0 - square * (1 / 3.0 - square * (2 / 15.0 - square * (17 / 315.0 - square * (62 / 2835.0)))))
    tanh = tl.where(square < 0.0625, series, tl.where(u < 0, -size, size))
    return tanh, complement * (1.0 + size)
