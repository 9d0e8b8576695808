"""f(z) = z / tau: the control for every other transform."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import ScalarTransform


class Temperature(ScalarTransform):
    r""":math:`f(z) = z / \tau` with one learned scalar :math:`\tau > 0`.

    It cannot raise the rank of the log-probability matrix, so its gain is not due to the softmax bottleneck. Always
    report it beside a transform that is meant to break the bottleneck.

    Args:
        tau: initial (or fixed) temperature; 1 starts as the identity.
        learnable: whether tau is a parameter (stored as its logarithm).

    Raises:
        ValueError: tau is not finite or not in [1e-4, 1e4], or ``dtype`` is of half precision.
    """

    kernel = "temperature"

    def __init__(
        self,
        tau: float = 1.0,
        learnable: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__({"log_tau": tau}, learnable, device, dtype)

    def evaluate(self, z: Tensor, coefficients: Tensor) -> Tensor:
        return z / coefficients[0]

    def evaluate_derivative(self, z: Tensor, coefficients: Tensor) -> Tensor:
        return (1 / coefficients[0]).expand_as(z)

    def evaluate_inverse(self, y: Tensor, coefficients: Tensor) -> Tensor:
        return y * coefficients[0]
