"""y = f(inner(z)) / temperature as a transform of its own, around the functions of any f.

The kernels call f by ``functions`` and hand ``size`` on to it. Where something stands before or after f,
:func:`compose` replaces both: the functions are those of this file, and ``size`` is a tuple that holds f's own
functions and size. So a kernel has no code for it but :func:`load_parameters`, and f alone compiles to what it was.
What a kernel needs the number of coefficients for, it asks :func:`number_of`.

A temperature that is not positive, NaN among them, makes every y NaN. ``inner`` and the quotient keep the rule that the
last operation is no product (:mod:`monosoftmax.triton_kernels.transforms`), since f or a kernel goes on from there.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from ..arithmetic import LOG2_E
from . import soft_cap

#: parameters, value, point and contributions.
Functions = tuple[JITFunction, JITFunction, JITFunction, JITFunction]


def compose(functions: Functions, size: int, inner: str, has_temperature: bool) -> tuple[Functions, Any]:
    """The kernels' ``functions`` and ``size`` for f with what stands around it.

    ``inner`` is ``""`` for nothing, ``"scale"``, ``"cap"`` or, for logits in half precision, ``"cap of half"``.
    """
    if not inner and not has_temperature:
        return functions, size
    of_f, *others = functions
    return (of_f, value, point, contributions), (size, *others, inner, has_temperature)


@triton.constexpr_function
def number_of(size):
    """The number of f's coefficients, or of the pieces of its table."""
    return size if isinstance(size, int) else size[0]


@triton.constexpr_function
def _is_composed(size):
    return not isinstance(size, int)


@triton.jit
def load_parameters(coefficients, temperature, c0, c1, c2, scale, cap, functions: tl.constexpr, size: tl.constexpr):
    """The ``parameters`` of the other functions, whether f stands alone or not."""
    of_f = functions[0](coefficients, number_of(size), c0, c1, c2)
    if _is_composed(size):
        inverse = 1.0
        if size[5]:
            tau = tl.load(temperature)
            inverse = tl.where(tau > 0, 1.0 / tau, float("nan"))
        return of_f, scale, cap, inverse
    else:
        return of_f


@triton.jit
def value(z, parameters, size: tl.constexpr):
    y = size[1](_inner(z, parameters, size[4])[0], parameters[0], size[0])
    if size[5]:
        y = y * parameters[3] + 0.0
    return y


@triton.jit
def point(z, parameters, size: tl.constexpr):
    """y, dy/dz, the piece of inner(z) where f has a table, and f's point with the inner(z) that it is at."""
    inner, slope = _inner(z, parameters, size[4])
    at_inner = size[2](inner, parameters[0], size[0])
    y, derivative, third = at_inner[0], at_inner[1], at_inner[0]
    if size[4] != "":
        derivative = derivative * slope
    if size[5]:
        y = y * parameters[3] + 0.0
        derivative = derivative * parameters[3]
    if len(at_inner) > 2:
        third = at_inner[2]
    return y, derivative, third, at_inner, inner


@triton.jit
def contributions(group: tl.constexpr, point, z, weight, parameters, size: tl.constexpr):
    if size[5]:
        weight = weight * parameters[3]
    return size[3](group, point[3], point[4], weight, parameters[0], size[0])


@triton.jit
def _inner(z, parameters, inner: tl.constexpr):
    """inner(z) and its derivative."""
    _, scale, cap, _ = parameters
    if inner == "":
        return z, 1.0
    elif inner == "scale":
        return z * scale + 0.0, scale
    else:
        # A soft cap of scale z: the parameters of soft_cap.py, with the scale among them.
        steepness = scale / cap
        of_cap = (cap, steepness, 2.0 * LOG2_E * steepness)
        at_z = soft_cap.point_of_half(z, of_cap, 1) if inner == "cap of half" else soft_cap.point(z, of_cap, 1)
        return at_z[0], at_z[1] * scale
