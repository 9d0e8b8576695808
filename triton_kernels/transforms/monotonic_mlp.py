"""f(z) = w0 z + sum_h a_h tanh(b_h z + c_h). The kernels read the coefficients as w0, then a, b, c of each unit.

For logits in half precision tanh(u) is 1 - 2 / (1 + exp(2 u)), in a third of the instructions, with an error of 2e-7.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import LOG2_E, divide, exp2, hyperbolic_tangent


def pack(coefficients: Tensor, constants: Sequence[float]) -> Tensor:
    """w0, a[H], b[H], c[H] unit by unit."""
    return torch.cat((coefficients[:1], coefficients[1:].reshape(3, -1).t().reshape(-1)))


def unpack(sums: Tensor) -> Tensor:
    """The inverse of :func:`pack`."""
    return torch.cat((sums[:1], sums[1:].reshape(-1, 3).t().reshape(-1)))


def groups(size: int) -> int:
    """w0, and the three coefficients of each unit."""
    return 1 + (size - 1) // 3


@triton.jit
def parameters(coefficients, size: tl.constexpr, c0, c1, c2):
    return (coefficients,)


@triton.jit
def value(z, parameters, size: tl.constexpr):
    return point(z, parameters, size)[0]


@triton.jit
def point(z, parameters, size: tl.constexpr):
    linear = tl.load(parameters[0])
    result = linear * z
    derivative = tl.zeros(z.shape, tl.float32) + linear
    for h in range((size - 1) // 3):
        amplitude, steepness, tanh, slope = _unit(z, parameters[0] + 1 + 3 * h)
        result += amplitude * tanh
        derivative += amplitude * steepness * slope
    return result, derivative


@triton.jit
def value_of_half(z, parameters, size: tl.constexpr):
    return point_of_half(z, parameters, size)[0]


@triton.jit
def point_of_half(z, parameters, size: tl.constexpr):
    linear = tl.load(parameters[0])
    result = linear * z
    derivative = tl.zeros(z.shape, tl.float32) + linear
    for h in range((size - 1) // 3):
        unit = parameters[0] + 1 + 3 * h
        amplitude, steepness, shift = tl.load(unit), tl.load(unit + 1), tl.load(unit + 2)
        e = exp2(z * (2.0 * LOG2_E * steepness) + 2.0 * LOG2_E * shift)
        reciprocal = divide(1.0, 1.0 + e)
        result += amplitude - (2.0 * amplitude) * reciprocal
        derivative += (4.0 * amplitude * steepness) * (reciprocal * (1.0 - reciprocal))
    return result, derivative


@triton.jit
def contributions(group: tl.constexpr, point, z, weight, parameters, size: tl.constexpr):
    if group == 0:
        return (weight * z,)
    else:
        # Evaluates the unit again. 2 H values of each logit, if kept, would not fit into registers.
        amplitude, _, tanh, slope = _unit(z, parameters[0] + 3 * group - 2)
        by_shift = weight * amplitude * slope
        return weight * tanh, by_shift * z, by_shift


@triton.jit
def _unit(z, coefficients):
    amplitude, steepness = tl.load(coefficients), tl.load(coefficients + 1)
    tanh, slope = hyperbolic_tangent(steepness * z + tl.load(coefficients + 2))
    return amplitude, steepness, tanh, slope
