"""f(z) = z: Linear-Softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import MonotonicTransform


class Identity(MonotonicTransform):
    r""":math:`f(z) = z`. The loss with this transform is the ordinary cross entropy."""

    kernel = "identity"

    def coefficients(self) -> Tensor:
        return torch.empty(0, dtype=torch.float32, device="cpu")  # whatever the defaults are

    def evaluate(self, z: Tensor, coefficients: Tensor) -> Tensor:
        return z

    def evaluate_derivative(self, z: Tensor, coefficients: Tensor) -> Tensor:
        return torch.ones_like(z)

    def evaluate_inverse(self, y: Tensor, coefficients: Tensor) -> Tensor:
        return y
