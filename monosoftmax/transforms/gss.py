"""Generalised sigsoftmax (Parthiban, Mao, Inkpen, AAAI 2021)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import ScalarTransform


class GSS(ScalarTransform):
    r""":math:`f(z) = k (z-c) + c - (k-1)\,\mathrm{softplus}(z-c)`, with :math:`k > 0`.

    The slope is k far below c and 1 far above c. ``k=2, c=0`` is :class:`SigSoftmax`. ``k=1``, the default, is the
    identity. Published settings: ``GSS(k=2.5, c=-1.5, learnable=False)`` on the Penn Treebank, ``k=3`` on WikiText-2.

    Source: Parthiban, Mao, Inkpen, "On the Softmax Bottleneck of Recurrent Language Models", AAAI 2021.

    Args:
        k: slope on the left, in [1e-4, 1e4].
        c: where the slope changes, in [-1e4, 1e4].
        learnable: whether k and c are parameters.

    Raises:
        ValueError: k or c is not finite or out of range, or ``dtype`` is of half precision.
    """

    kernel = "gss"

    def __init__(
        self,
        k: float = 1.0,
        c: float = 0.0,
        learnable: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__({"log_k": k, "raw_c": c}, learnable, device, dtype)

    def evaluate(self, z: Tensor, coefficients: Tensor) -> Tensor:
        k, c = coefficients.unbind()
        # k u - (k-1) softplus(u). The linear part of softplus is subtracted by hand, so that no end computes inf - inf.
        # where(), since autograd's derivatives of abs() and clamp() at u = 0 do not add up to f'(c) = (k+1)/2.
        u = z - c
        magnitude = torch.where(u >= 0, u, -u)
        return c + torch.where(u >= 0, u, k * u) - (k - 1) * F.softplus(-magnitude)

    def evaluate_derivative(self, z: Tensor, coefficients: Tensor) -> Tensor:
        k, c = coefficients.unbind()
        return torch.sigmoid(z - c) + k * torch.sigmoid(c - z)
