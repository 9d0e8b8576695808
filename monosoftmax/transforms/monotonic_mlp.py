"""A monotonic network with one hidden layer of tanh units (Sill, NeurIPS 1998)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .base import (
    SCALE_LIMIT,
    MonotonicTransform,
    bounded_exp,
    bounded_shift,
    raw_tensor,
    require_count,
    require_positive,
    widened,
)

#: The smallest amplitude of a unit. Amplitudes start here, so that f starts as the identity up to rounding.
MIN_AMPLITUDE = 1e-7


class MonotonicMLP(MonotonicTransform):
    r""":math:`f(z) = w_0 z + \sum_{h=1}^{H} a_h \tanh(b_h z + c_h)`, with :math:`w_0, a_h, b_h > 0`.

    The amplitudes are :math:`a_h = \sqrt{\mathrm{raw}_h^2 + 10^{-14}}`: positive, and next to 0 at the start. Their
    gradient does not vanish there, unlike with a softplus, and does not die when an optimiser step overshoots, unlike
    with a clamp. At the start, the centres of the units lie evenly on [-bound, bound].

    Source: Sill, "Monotonic Networks", NeurIPS 1998; the second family of Ganea et al., ICML 2019.

    Args:
        num_units: H, at most 21 (the kernels keep the 3H + 1 coefficients in registers).
        bound: range of the logits over which the units are spread, in [1e-4, 1e4].

    Raises:
        ValueError: ``num_units`` outside [1, 21], ``bound`` not positive, not finite or out of range, or ``dtype``
            of half precision.
    """

    kernel = "monotonic_mlp"

    def __init__(
        self,
        num_units: int = 8,
        bound: float = 10.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_units = require_count("num_units", num_units, largest=21)
        self.bound = require_positive("bound", bound)
        self.log_linear = nn.Parameter(raw_tensor(1, device, dtype))
        self.raw_amplitude = nn.Parameter(raw_tensor(num_units, device, dtype))
        self.log_steepness = nn.Parameter(raw_tensor(num_units, device, dtype))
        self.raw_shift = nn.Parameter(raw_tensor(num_units, device, dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set f to the identity."""
        with torch.no_grad():
            self._raw("log_linear").zero_()
            self._raw("raw_amplitude").fill_(MIN_AMPLITUDE)
            # A unit rises over about 4 / b, so that neighbours overlap. A single unit is at 0.
            spacing = 2 * self.bound / self.num_units
            steepness = 4 / (2 * spacing)
            self._raw("log_steepness").fill_(math.log(steepness))
            # Places 1, 2, ... come from a sum, since arange() gives no DTensor if the parameter is one.
            shift = self._raw("raw_shift")
            places = torch.ones_like(shift, dtype=torch.float64).cumsum(0)
            shift.copy_(-steepness * ((places - 0.5) * spacing - self.bound))

    def arguments(self) -> dict[str, Any]:
        return {"num_units": self.num_units, "bound": self.bound}

    def coefficients(self) -> Tensor:
        """[3H + 1]: w_0, then all a, all b, all c."""
        units = self.num_units
        raw = widened(self.raw_amplitude, units)
        amplitude = torch.hypot(raw, torch.full_like(raw, MIN_AMPLITUDE)).clamp(max=SCALE_LIMIT)
        linear, steepness = bounded_exp(self.log_linear), bounded_exp(self.log_steepness, units)
        return torch.cat([linear, amplitude, steepness, bounded_shift(self.raw_shift, units)])

    def evaluate(self, z: Tensor, coefficients: Tensor) -> Tensor:
        result = coefficients[0] * z
        # A loop over units, since a tensor of shape [..., H] would be H times as large as the logits.
        for a, b, c in self._units(coefficients):
            result = result + a * torch.tanh(b * z + c)
        return result

    def evaluate_derivative(self, z: Tensor, coefficients: Tensor) -> Tensor:
        result = coefficients[0].expand_as(z)
        for a, b, c in self._units(coefficients):
            decay = torch.exp(-2 * (b * z + c).abs())
            result = result + a * b * (4 * decay / (1 + decay) ** 2)
        return result

    def _units(self, coefficients: Tensor) -> zip[tuple[Tensor, Tensor, Tensor]]:
        a, b, c = coefficients[1:].reshape(3, self.num_units).unbind()
        return zip(a.unbind(), b.unbind(), c.unbind(), strict=True)
