"""f(z) = c tanh(z/c): the logit soft cap of Gemma 2."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import ScalarTransform

#: tanh and sigmoid are constant in float64 beyond this argument. Clamping the argument and the logit itself avoids
#: 0 * inf in the gradients of logits of -inf and +inf.
SATURATION = 400.0
LARGEST_LOGIT = 1e30


class SoftCap(ScalarTransform):
    r""":math:`f(z) = c \tanh(z / c)`, with :math:`c > 0`: logits are kept in (-c, c).

    Source: Gemma 2 technical report (2024), section 2, with c = 30 for the final logits.

    Args:
        cap: c, in [1e-4, 1e4].
        learnable: whether c is a parameter.

    Raises:
        ValueError: cap is not finite or out of range, or ``dtype`` is of half precision.
    """

    kernel = "soft_cap"
    bounded_below = True

    def __init__(
        self,
        cap: float = 30.0,
        learnable: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__({"log_cap": cap}, learnable, device, dtype)

    def evaluate(self, z: Tensor, coefficients: Tensor) -> Tensor:
        cap = coefficients[0]
        u = z.clamp(-LARGEST_LOGIT, LARGEST_LOGIT) / cap
        return cap * torch.tanh(u.clamp(-SATURATION, SATURATION))

    def evaluate_derivative(self, z: Tensor, coefficients: Tensor) -> Tensor:
        # 1 - tanh(u)^2 is 4 e / (1 + e)^2 with e = exp(-2|u|), without cancellation.
        decay = torch.exp(-2 * (z / coefficients[0]).abs().clamp(max=SATURATION))
        return 4 * decay / (1 + decay) ** 2

    def evaluate_inverse(self, y: Tensor, coefficients: Tensor) -> Tensor:
        return coefficients[0] * torch.atanh(y / coefficients[0])
