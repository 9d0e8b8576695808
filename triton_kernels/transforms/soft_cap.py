"""f(z) = c tanh(z / c). Coefficients: c."""

from __future__ import annotations

import triton
import triton.language as tl

from ..arithmetic import clamp, hyperbolic_tangent


@triton.jit
def value(z, coefficients, size, c0, c1, c2):
    return point(z, coefficients, size, c0, c1, c2)[0]


@triton.jit
def point(z, coefficients, size, c0, c1, c2):
    cap = tl.load(coefficients)
    # tanh is constant beyond 400; the clamp keeps inf * 0 out of the gradient of c.
    u = clamp(z / cap, -400.0, 400.0)
    tanh, slope = hyperbolic_tangent(u)
    return cap * tanh, slope, u, tanh


@triton.jit
def contribution(index: tl.constexpr, point, z, weight, coefficients, size):
    # df/dc = tanh(u) - u (1 - tanh(u)^2), which is 2/3 u^3 for small u: by its series there, where the difference
    # cancels.
    u = point[2]
    square = u * u
    series = u * square * (2 / 3.0 - square * (8 / 15.0 - square * (34 / 105.0)))
    return weight * tl.where(square < 1e-2, series, point[3] - u * point[1])
