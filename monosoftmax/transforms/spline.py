"""Monotonic rational quadratic spline (Durkan et al., NeurIPS 2019)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import MOST_PIECES, MonotonicTransform, bounded_exp, of_pieces, raw_tensor, require_count, require_positive

#: Widths, heights and derivatives stay within this factor of their initial values. So the square of a slope easily
#: fits float32.
_FACTOR_LIMIT = 1e3


class RationalQuadraticSpline(MonotonicTransform):
    r"""K monotonic rational quadratic pieces between learned knots, linear beyond them; C1, with an exact inverse.

    On the piece with left end :math:`(x, y)`, width w, height h, mean slope :math:`s = h / w` and derivatives
    :math:`d_0, d_1` at its ends, with :math:`\xi = (z - x) / w`:

    .. math:: f(z) = y + h\,\frac{s \xi^2 + d_0\, \xi (1-\xi)}{s + (d_0 + d_1 - 2 s)\, \xi (1-\xi)}

    Source: Durkan, Bekasov, Murray, Papamakarios, "Neural Spline Flows", NeurIPS 2019, equations 4 and 5. Unlike there,
    the widths and heights are free positive numbers, summed outwards from the knot next to 0, instead of shares of a
    fixed interval. So the range of f is not pinned, and a piece has a gradient of exactly zero if no logit reaches it
    or lies beyond it.

    Args:
        num_bins: K, at most 2^24.
        bound: the pieces cover [-bound, bound] at the start, in [1e-4, 1e4].

    Raises:
        ValueError: ``num_bins`` outside [1, 2^24], ``bound`` not positive, not finite or out of range, or ``dtype``
            of half precision.
    """

    kernel = "spline"

    def __init__(
        self,
        num_bins: int = 16,
        bound: float = 10.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_bins = require_count("num_bins", num_bins, largest=MOST_PIECES)
        self.bound = require_positive("bound", bound)
        self.log_width = nn.Parameter(raw_tensor(num_bins, device, dtype))
        self.log_height = nn.Parameter(raw_tensor(num_bins, device, dtype))
        self.log_derivative = nn.Parameter(raw_tensor(num_bins + 1, device, dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set f to the identity."""
        with torch.no_grad():
            for name in ("log_width", "log_height", "log_derivative"):
                self._raw(name).zero_()

    def arguments(self) -> dict[str, Any]:
        return {"num_bins": self.num_bins, "bound": self.bound}

    @property
    def table_size(self) -> int:
        return self.num_bins

    def coefficients(self) -> Tensor:
        """[6, K]: for each piece x, width, y, height, and the derivatives at its left and right end."""
        width = bounded_exp(self.log_width, self.num_bins, _FACTOR_LIMIT) * (2 * self.bound / self.num_bins)
        height = bounded_exp(self.log_height, self.num_bins, _FACTOR_LIMIT) * (2 * self.bound / self.num_bins)
        derivative = bounded_exp(self.log_derivative, self.num_bins + 1, _FACTOR_LIMIT)
        return torch.stack(
            [self._left_ends(width), width, self._left_ends(height), height, derivative[:-1], derivative[1:]]
        )

    def _left_ends(self, steps: Tensor) -> Tensor:
        centre = self.num_bins // 2
        anchor = -self.bound + centre * (2 * self.bound / self.num_bins)
        left = anchor - steps[:centre].double().flip(0).cumsum(0).flip(0)
        right = anchor + steps[centre:-1].double().cumsum(0)
        return torch.cat([left, left.new_full((1,), anchor), right]).to(steps.dtype)

    def evaluate(self, z: Tensor, coefficients: Tensor) -> Tensor:
        x, width, y, height, d0, d1 = self._piece(z, coefficients)
        inside, below, above = self._split(z, x, width)
        xi = inside / width
        slope = height / width
        bump = xi * (1 - xi)
        # s (xi^2 + (1-xi)^2) + (d0 + d1) xi (1-xi) is the published denominator, as a sum of positive terms.
        ratio = (slope * xi**2 + d0 * bump) / (slope * (xi**2 + (1 - xi) ** 2) + (d0 + d1) * bump)
        return y + height * ratio + d0 * below + d1 * above

    def evaluate_derivative(self, z: Tensor, coefficients: Tensor) -> Tensor:
        x, width, _, height, d0, d1 = self._piece(z, coefficients)
        xi = self._split(z, x, width)[0] / width
        slope = height / width
        bump = xi * (1 - xi)
        numerator = d1 * xi**2 + 2 * slope * bump + d0 * (1 - xi) ** 2
        denominator = slope * (xi**2 + (1 - xi) ** 2) + (d0 + d1) * bump
        return (slope / denominator) ** 2 * numerator

    def evaluate_inverse(self, y: Tensor, coefficients: Tensor) -> Tensor:
        knots = coefficients[2, 1:].detach().contiguous()
        piece = torch.searchsorted(knots, y.detach().contiguous(), right=True)
        x, width, y0, height, d0, d1 = of_pieces(coefficients, piece)
        slope = height / width
        inside, below, above = self._split(y, y0, height)
        # Solves a xi^2 + b xi + c = 0 (Durkan, equations 6 to 8), in the form without cancellation.
        a = height * (slope - d0) + inside * (d0 + d1 - 2 * slope)
        b = height * d0 - inside * (d0 + d1 - 2 * slope)
        c = -slope * inside
        xi = 2 * c / (-b - torch.sqrt((b * b - 4 * a * c).clamp(min=0)))
        return x + width * xi + below / d0 + above / d1

    @staticmethod
    def _split(z: Tensor, x: Tensor, width: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The offset in the piece, and the parts of z beyond its left (<= 0) and right (>= 0) end."""
        # where() instead of clamp(): clamp() passes the whole gradient on both sides of a tie, and f' would double at a
        # knot.
        offset = z - x
        zero = torch.zeros_like(offset)
        below, above = offset < 0, offset > width
        inside = torch.where(below, zero, torch.where(above, width, offset))
        return inside, torch.where(below, offset, zero), torch.where(above, offset - width, zero)

    def _piece(self, z: Tensor, coefficients: Tensor) -> tuple[Tensor, ...]:
        knots = coefficients[0, 1:].detach().contiguous()
        piece = torch.searchsorted(knots, z.detach().contiguous(), right=True)
        return of_pieces(coefficients, piece)
