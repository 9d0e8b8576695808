"""f(z) = z + log sigmoid(z): sigsoftmax (Kanai et al., NeurIPS 2018)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import MonotonicTransform


class SigSoftmax(MonotonicTransform):
    r""":math:`f(z) = z + \log \sigma(z)`, so that :math:`p \propto e^z \sigma(z)`. No parameters.

    Source: Kanai, Fujiwara, Yamanaka, Adachi, "Sigsoftmax: Reanalysis of the Softmax Bottleneck", NeurIPS 2018,
    equation 14. Evaluated in the log domain, so that strongly negative logits stay finite.
    """

    kernel = "sigsoftmax"

    def coefficients(self) -> Tensor:
        return torch.empty(0, dtype=torch.float32, device="cpu")  # whatever the defaults are

    def evaluate(self, z: Tensor, coefficients: Tensor) -> Tensor:
        return z + F.logsigmoid(z)

    def evaluate_derivative(self, z: Tensor, coefficients: Tensor) -> Tensor:
        return 1 + torch.sigmoid(-z)

    def evaluate_inverse(self, y: Tensor, coefficients: Tensor) -> Tensor:
        # With w = e^z: w^2 = e^y (1 + w), so w = (e^y + sqrt(e^2y + 4 e^y)) / 2. Each branch factors out the part that
        # would overflow. The argument of the other branch is clamped, because torch.where differentiates both.
        positive, negative = y.clamp(min=0), y.clamp(max=0)
        upper = positive + torch.log1p(torch.sqrt(1 + 4 * torch.exp(-positive))) - _LOG_2
        lower = negative / 2 + torch.log(torch.exp(negative / 2) + torch.sqrt(torch.exp(negative) + 4)) - _LOG_2
        return torch.where(y >= 0, upper, torch.where(y < 0, lower, y))


_LOG_2 = 0.6931471805599453
