"""Piecewise linear increasing function (Ganea et al., ICML 2019)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._dispatch import SingleLevelFunction, unobserved
from ..row_kernels import RowKernels, kernels_for
from .base import (
    MOST_PIECES,
    SCALE_LIMIT,
    MonotonicTransform,
    of_pieces,
    raw_tensor,
    require_count,
    require_finite,
    require_positive,
    widened,
)

#: Slopes that the kernels of every GPU backend take (``csrc/cuda/limits.h``), in float32.
_MOST_ON_GPU = 2**22

#: The softplus of this raw value is 1.
_RAW_OF_UNIT_SLOPE = math.log(math.e - 1)


def _coefficients(raw_slope: Tensor, bound: float, min_slope: float) -> Tensor:
    """[2, K]: the slopes, and the values at the left ends of the pieces."""
    pieces = raw_slope.shape[0]
    width = 2 * bound / pieces
    slopes = (min_slope + (1 - min_slope) * F.softplus(raw_slope)).clamp(max=SCALE_LIMIT)
    # Sums over up to 10^5 slopes are in float64, so that f is continuous up to the rounding of float32.
    rises = slopes.double() * width
    # 0 lies in piece `centre`, at a distance of `inside` from its left end.
    centre = min(int(bound / width), pieces - 1)
    inside = bound - centre * width
    at_centre = -slopes[centre].double() * inside
    left = at_centre - rises[:centre].flip(0).cumsum(0).flip(0)
    right = at_centre + rises[centre:-1].cumsum(0)
    values = torch.cat([left, at_centre.reshape(1), right])
    return torch.stack([slopes, values.to(slopes.dtype)])


def _kernels_for(raw_slope: Tensor) -> RowKernels | None:
    """The kernels that compute the coefficients; None where the formula must, which takes everything."""
    if not unobserved((raw_slope,)):
        return None
    if raw_slope.device.type != "cpu" and (raw_slope.dtype != torch.float32 or raw_slope.shape[0] > _MOST_ON_GPU):
        return None
    return kernels_for(raw_slope.device.type)


class _Coefficients(SingleLevelFunction):
    """:func:`_coefficients` by one kernel each way: twenty small kernels would cost more than the loss."""

    @staticmethod
    def forward(ctx: Any, raw_slope: Tensor, bound: float, min_slope: float, kernels: RowKernels) -> Tensor:
        ctx.save_for_backward(raw_slope)
        ctx.call = bound, min_slope, kernels
        return kernels.plif_coefficients(raw_slope, bound, min_slope)

    @staticmethod
    def backward(ctx: Any, grad_coefficients: Tensor) -> tuple[Tensor | None, ...]:
        (raw_slope,), (bound, min_slope, kernels) = ctx.saved_tensors, ctx.call
        again = torch.is_grad_enabled()
        if not again and unobserved((raw_slope, grad_coefficients)):
            return kernels.plif_coefficients_backward(grad_coefficients, raw_slope, bound, min_slope), None, None, None
        # The gradient may be differentiated again, or may be a batch of gradients: only the formula allows this.
        with torch.enable_grad():
            leaf = raw_slope if again else raw_slope.detach().requires_grad_()
            coefficients = _coefficients(leaf, bound, min_slope)
            (gradient,) = torch.autograd.grad(coefficients, leaf, grad_coefficients, create_graph=again)
        return gradient, None, None, None


class PLIF(MonotonicTransform):
    r"""Piecewise linear increasing function with K pieces of equal width on [-bound, bound].

    .. math:: f(z) = \mathrm{value}_k + \mathrm{slope}_k\,(z - \mathrm{knot}_k), \qquad
              k = \mathrm{clamp}(\lfloor (z + \mathrm{bound}) / \mathrm{width} \rfloor, 0, K-1)

    with ``slope = min_slope + (1 - min_slope) softplus(raw_slope)``. Beyond the bounds f continues with its first and
    last slope. It is anchored at f(0) = 0, and the values at the knots are summed outwards from there. So a piece has a
    gradient of exactly zero if no logit reaches it or lies beyond it, as seen from 0. (With f(-bound) = 0, as
    published, rounding leaves noise in this gradient, which Adam blows up to full-size steps.) The offset itself is
    irrelevant: softmax is shift invariant.

    Train ``raw_slope`` with Adam in its own group (:func:`monosoftmax.parameter_groups`): the gradient of a slope
    scales with the width of its piece, so plain SGD at the rate of the head leaves the slope where it started.

    Source: Ganea, Gelly, Bécigneul, Severyn, "Breaking the Softmax Bottleneck via Learnable Monotonic Pointwise
    Non-linearities", ICML 2019. Anchor, floor and initialisation are changed as said above; ``init="random"`` with
    ``num_pieces=100_000, bound=20, min_slope=1e-6`` is the published setting.

    Args:
        num_pieces: K, at most 2^24.
        bound: the pieces cover [-bound, bound], in [1e-4, 1e4].
        min_slope: floor of the slopes, in (0, 1); keeps f strictly increasing.
        init: ``"identity"`` (all slopes 1) or ``"random"`` (``raw_slope`` normal around that point, as published).
        init_std: standard deviation of ``raw_slope`` for ``init="random"``.
        generator: source of randomness for ``init="random"``.

    Raises:
        ValueError: ``num_pieces`` outside [1, 2^24], ``bound <= 0``, ``min_slope`` outside (0, 1), ``init`` unknown,
            one of them not finite, or ``dtype`` of half precision.
    """

    kernel = "plif"

    def __init__(
        self,
        num_pieces: int = 50,
        bound: float = 20.0,
        *,
        min_slope: float = 0.01,
        init: Literal["identity", "random"] = "identity",
        init_std: float = 1.0,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_pieces = require_count("num_pieces", num_pieces, largest=MOST_PIECES)
        self.bound = require_positive("bound", bound)
        self.min_slope = require_finite("min_slope", min_slope)
        if not 0 < self.min_slope < 1:
            raise ValueError(f"min_slope must be between 0 and 1, got {min_slope}")
        if init not in ("identity", "random"):
            raise ValueError(f'init must be "identity" or "random", got {init!r}')
        self.init = init
        self.init_std = require_finite("init_std", init_std)
        if self.init_std < 0:
            raise ValueError(f"init_std must not be negative, got {init_std}")
        self.raw_slope = nn.Parameter(raw_tensor(num_pieces, device, dtype))
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set the slopes to their initial values; with ``init="random"`` they are drawn anew."""
        raw = self._raw("raw_slope")
        with torch.no_grad():
            if self.init == "random":
                raw.normal_(_RAW_OF_UNIT_SLOPE, self.init_std, generator=generator)
            else:
                raw.fill_(_RAW_OF_UNIT_SLOPE)

    def arguments(self) -> dict[str, Any]:
        return {
            "num_pieces": self.num_pieces,
            "bound": self.bound,
            "min_slope": self.min_slope,
            "init": self.init,
            "init_std": self.init_std,
        }

    @property
    def width(self) -> float:
        """The width of a piece."""
        return 2 * self.bound / self.num_pieces

    def slopes(self) -> Tensor:
        """The K slopes, in [min_slope, 1e4]."""
        slopes: Tensor = self()[0]
        return slopes

    @property
    def table_size(self) -> int:
        return self.num_pieces

    def coefficients(self) -> Tensor:
        """[2, K]: the slopes, and the values at the left ends of the pieces."""
        raw = widened(self.raw_slope, self.num_pieces)
        kernels = _kernels_for(raw)
        if kernels is None:
            return _coefficients(raw, self.bound, self.min_slope)
        coefficients: Tensor = _Coefficients.apply(raw, self.bound, self.min_slope, kernels)  # type: ignore[attr-defined]
        return coefficients

    def constants(self) -> tuple[float, ...]:
        """The left bound, the width of a piece, and the inverse of this width."""
        return (-self.bound, self.width, 1 / self.width)

    def evaluate(self, z: Tensor, coefficients: Tensor) -> Tensor:
        piece, offset = self._locate(z)
        slope, value = of_pieces(coefficients, piece)
        return value + slope * offset

    def evaluate_derivative(self, z: Tensor, coefficients: Tensor) -> Tensor:
        return coefficients[0][self._locate(z)[0]]

    def evaluate_inverse(self, y: Tensor, coefficients: Tensor) -> Tensor:
        piece = torch.searchsorted(coefficients[1, 1:].detach().contiguous(), y.detach().contiguous(), right=True)
        slope, value = of_pieces(coefficients, piece)
        return -self.bound + piece.to(y.dtype) * self.width + (y - value) / slope

    def _locate(self, z: Tensor) -> tuple[Tensor, Tensor]:
        lo, width, inverse_width = self.constants()
        # floor() has derivative zero, so the index carries no gradient. NaN must not reach the conversion to int.
        piece = torch.floor((z.detach() - lo) * inverse_width).clamp(0, self.num_pieces - 1).nan_to_num(nan=0.0)
        return piece.long(), z - (lo + piece * width)
