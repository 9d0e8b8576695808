"""The transforms as Triton device functions: a file for each, and a row in :data:`REGISTRY`.

A file has three functions of a tensor ``z`` of float32. ``coefficients`` points to the float32 coefficients that
:meth:`monosoftmax.transforms.MonotonicTransform.coefficients` gives, contiguous: a vector of ``size`` numbers, or rows
of ``size`` pieces each. ``c0``, ``c1`` and ``c2`` are its constants, 0 where it has fewer.

- ``value(z, coefficients, size, c0, c1, c2)`` is f(z).
- ``point(...)`` is a tuple of f(z), f'(z) and what ``contribution`` needs of them, from one evaluation; for a table the
  third is the piece, int32, in which z lies.
- ``contribution(index, point, z, weight, coefficients, size)`` is weight * df/dcoefficient: of coefficient ``index``, a
  constexpr, of a vector, or of row ``index`` of the table at the piece of z.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.runtime.jit import JITFunction

from . import gss, identity, monotonic_mlp, plif, sigmoid_cap, sigsoftmax, soft_cap, spline, temperature


class TransformFunctions(NamedTuple):
    """The device functions of a transform, and the rows of its table of coefficients (0: they are a vector)."""

    value: JITFunction
    point: JITFunction
    contribution: JITFunction
    table_rows: int


#: By the name that MonotonicTransform.kernel has.
REGISTRY = {
    "identity": TransformFunctions(identity.value, identity.point, identity.contribution, 0),
    "temperature": TransformFunctions(temperature.value, temperature.point, temperature.contribution, 0),
    "plif": TransformFunctions(plif.value, plif.point, plif.contribution, 2),
    "sigsoftmax": TransformFunctions(sigsoftmax.value, sigsoftmax.point, sigsoftmax.contribution, 0),
    "gss": TransformFunctions(gss.value, gss.point, gss.contribution, 0),
    "soft_cap": TransformFunctions(soft_cap.value, soft_cap.point, soft_cap.contribution, 0),
    "sigmoid_cap": TransformFunctions(sigmoid_cap.value, sigmoid_cap.point, sigmoid_cap.contribution, 0),
    "monotonic_mlp": TransformFunctions(monotonic_mlp.value, monotonic_mlp.point, monotonic_mlp.contribution, 0),
    "spline": TransformFunctions(spline.value, spline.point, spline.contribution, 6),
}
