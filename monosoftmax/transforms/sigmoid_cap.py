"""f(z) = a sigmoid((z + b) / c): the logit cap of modded-nanogpt."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import ScalarTransform
from .soft_cap import LARGEST_LOGIT, SATURATION


class SigmoidCap(ScalarTransform):
    r""":math:`f(z) = a\, \sigma((z + b) / c)`, with :math:`a, c > 0`: values are kept in (0, a).

    Source: KellerJordan/modded-nanogpt, which uses a = 23, b = 5, c = 7.5.

    Args:
        a: height of the cap, in [1e-4, 1e4].
        b: shift of the logits, in [-1e4, 1e4].
        c: width of the transition, in [1e-4, 1e4].
        learnable: whether a, b and c are parameters.

    Raises:
        ValueError: a, b or c is not finite or out of range, or ``dtype`` is of half precision.
    """

    kernel = "sigmoid_cap"
    bounded_below = True

    def __init__(
        self,
        a: float = 23.0,
        b: float = 5.0,
        c: float = 7.5,
        learnable: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__({"log_a": a, "raw_b": b, "log_c": c}, learnable, device, dtype)

    def evaluate(self, z: Tensor, coefficients: Tensor) -> Tensor:
        a, b, c = coefficients.unbind()
        u = (z.clamp(-LARGEST_LOGIT, LARGEST_LOGIT) + b) / c
        return a * torch.sigmoid(u.clamp(-SATURATION, SATURATION))

    def evaluate_derivative(self, z: Tensor, coefficients: Tensor) -> Tensor:
        a, b, c = coefficients.unbind()
        decay = torch.exp(-((z + b) / c).abs().clamp(max=SATURATION))
        return a / c * decay / (1 + decay) ** 2

    def evaluate_inverse(self, y: Tensor, coefficients: Tensor) -> Tensor:
        a, b, c = coefficients.unbind()
        return c * torch.logit(y / a) - b
