"""The transforms as Triton device functions: a file for each, and a row in :data:`REGISTRY`.

A file has four functions of float32; ``z`` is a tensor of any shape, ``size`` a constexpr.

- ``parameters(coefficients, size, c0, c1, c2)`` loads what a program needs before its first logit: a tuple, the
  ``parameters`` of the others. ``coefficients`` points to what ``pack`` gave (or else to what
  :meth:`monosoftmax.transforms.MonotonicTransform.coefficients` gives), ``size`` is the number of coefficients, or of
  the pieces of a table; ``c0``, ``c1`` and ``c2`` are the transform's constants, 0 where it has fewer.
- ``value(z, parameters, size)`` is f(z).
  Its last operation is no product: the compiler would contract it with the subtraction of the row's largest y in one
  place and not in another, and y would have two roundings. ``+ 0.0`` keeps them apart, at no cost: it is the product's
  own fused addition.
- ``point(z, parameters, size)`` is a tuple of the same f(z), f'(z) and what ``contributions`` needs of them, from one
  evaluation; for a table the third is the piece, int32, in which z lies.
- ``contributions(group, point, z, weight, parameters, size)`` is a tuple of weight * df/dcoefficient: of a table, for
  each of its rows, at the piece of z; of a vector, for the coefficients of ``group``, a constexpr.

``pack(coefficients, constants)``, in plain PyTorch, lays the coefficients out as the kernels read them, and
``unpack(sums)`` brings the sums of the contributions of a vector, in the order of the groups, into theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from . import gss, identity, monotonic_mlp, plif, sigmoid_cap, sigsoftmax, soft_cap, spline, temperature


def _as_they_are(coefficients: Tensor, constants: Sequence[float]) -> Tensor:
    return coefficients.contiguous()


def _one_group(size: int) -> int:
    return 1


def _in_order(sums: Tensor) -> Tensor:
    return sums


class TransformFunctions(NamedTuple):
    """The functions of a transform, and the rows of its table of coefficients (0: they are a vector).

    ``value_of_half`` and ``point_of_half`` stand for ``value`` and ``point`` where logits are bfloat16 or float16.
    """

    parameters: JITFunction
    value: JITFunction
    point: JITFunction
    contributions: JITFunction
    table_rows: int = 0
    pack: Callable[[Tensor, Sequence[float]], Tensor] = _as_they_are
    groups: Callable[[int], int] = _one_group
    unpack: Callable[[Tensor], Tensor] = _in_order
    value_of_half: JITFunction | None = None
    point_of_half: JITFunction | None = None

    def for_logits(self, dtype: torch.dtype) -> tuple[JITFunction, JITFunction, JITFunction, JITFunction]:
        """parameters, value, point and contributions for logits of this type."""
        value, point = self.value, self.point
        if dtype != torch.float32:
            value, point = self.value_of_half or value, self.point_of_half or point
        return self.parameters, value, point, self.contributions


#: By the name that MonotonicTransform.kernel has.
REGISTRY = {
    "identity": TransformFunctions(identity.parameters, identity.value, identity.point, identity.contributions),
    "temperature": TransformFunctions(
        temperature.parameters, temperature.value, temperature.point, temperature.contributions
    ),
    "plif": TransformFunctions(
        plif.parameters, plif.value, plif.point, plif.contributions, table_rows=2, pack=plif.pack
    ),
    "sigsoftmax": TransformFunctions(
        sigsoftmax.parameters, sigsoftmax.value, sigsoftmax.point, sigsoftmax.contributions
    ),
    "gss": TransformFunctions(gss.parameters, gss.value, gss.point, gss.contributions),
    "soft_cap": TransformFunctions(
        soft_cap.parameters,
        soft_cap.value,
        soft_cap.point,
        soft_cap.contributions,
        value_of_half=soft_cap.value_of_half,
        point_of_half=soft_cap.point_of_half,
    ),
    "sigmoid_cap": TransformFunctions(
        sigmoid_cap.parameters, sigmoid_cap.value, sigmoid_cap.point, sigmoid_cap.contributions
    ),
    "monotonic_mlp": TransformFunctions(
        monotonic_mlp.parameters,
        monotonic_mlp.value,
        monotonic_mlp.point,
        monotonic_mlp.contributions,
        pack=monotonic_mlp.pack,
        groups=monotonic_mlp.groups,
        unpack=monotonic_mlp.unpack,
        value_of_half=monotonic_mlp.value_of_half,
        point_of_half=monotonic_mlp.point_of_half,
    ),
    "spline": TransformFunctions(spline.parameters, spline.value, spline.point, spline.contributions, table_rows=6),
}
