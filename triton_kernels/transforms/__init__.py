"""The transforms as Triton device functions: a file for each, and a row in :data:`REGISTRY`.

A file has four functions of float32; ``z`` is a tensor of any shape, ``size`` a constexpr.

- ``parameters(coefficients, size, c0, c1, c2)`` loads what a program needs before its first logit. It returns a tuple,
  the ``parameters`` of the other functions. ``coefficients`` points to the result of ``pack``. ``size`` is the number
  of coefficients, or of the pieces of a table. ``c0``, ``c1`` and ``c2`` are the transform's constants, and 0 if it has
  fewer.
- ``value(z, parameters, size)`` is f(z). Its last operation must not be a product. The compiler would fuse the product
  with the subtraction of the row's largest y in one place and not in another, and y would be rounded in two ways.
  ``+ 0.0`` after the product prevents this, at no cost: the product is fused with the addition of 0.
- ``point(z, parameters, size)`` is a tuple: the same f(z), f'(z), and what else ``contributions`` needs, from one
  evaluation. For a table the third element is the piece of z, int32.
- ``contributions(group, point, z, weight, parameters, size)`` is a tuple of weight * df/dcoefficient. For a table it
  has an element for each row, at the piece of z. For a vector it has the coefficients of ``group``, a constexpr.

``pack(coefficients, constants)``, in plain PyTorch, lays the coefficients out as the kernels read them. The sums of a
vector come in the order of the groups; ``unpack(sums)`` puts them into the order of the coefficients.
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
    """The functions of a transform, and the number of rows of its table of coefficients (0: a vector, no table).

    For bfloat16 and float16 logits ``value_of_half`` and ``point_of_half`` replace ``value`` and ``point``.
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
