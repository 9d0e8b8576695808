"""The contract of a monotonic pointwise transform f, and the pieces that its parameterisations share."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

#: Positive scalars and shifts are clamped to this range, so that f stays finite and increasing whatever float32 value
#: an optimiser step leaves in a raw parameter. Inside the range the clamp is the identity.
SCALE_LIMIT = 1e4
SHIFT_LIMIT = 1e4

#: The most pieces of a table of coefficients: up to there float32 has a number for each of them.
MOST_PIECES = 2**24


class MonotonicTransform(nn.Module):
    r"""An increasing, pointwise function :math:`f: \mathbb{R} \to \mathbb{R}` on logits.

    A subclass has two faces. As an ``nn.Module`` it holds raw, unconstrained parameters and is called on a tensor of
    any shape. To the fused kernels it is :meth:`coefficients`, a small tensor that is computed from the raw parameters
    by differentiable PyTorch code, and :meth:`constants`, numbers that never change; the kernels return the gradient
    with respect to the coefficients and autograd carries it on to the raw parameters. :meth:`evaluate` defines f in
    terms of both and is the plain PyTorch mathematics that every kernel is tested against.

    Subclasses outside the package need :meth:`coefficients`, :meth:`evaluate` and :meth:`evaluate_derivative` only:
    with ``kernel = None`` the reference backend takes them.
    """

    #: Name of the fused mathematics of this transform (``csrc/transforms``, ``triton_kernels/transforms``).
    kernel: ClassVar[str | None] = None
    #: True where f(-inf) is finite, so that a logit of -inf keeps some probability.
    bounded_below: ClassVar[bool] = False

    def coefficients(self) -> Tensor:
        """What the kernels see: a vector [P] with P <= 64, or a table [R, K] of R coefficients for each of K pieces."""
        raise NotImplementedError

    def constants(self) -> tuple[float, ...]:
        """Numbers that the kernels need beside the coefficients and that are never learned."""
        return ()

    @property
    def table_size(self) -> int:
        """K of a table of coefficients [R, K], which a backend may have no room for; 0 where they are a vector."""
        return 0

    def evaluate(self, z: Tensor, coefficients: Tensor) -> Tensor:
        """f(z), for z and coefficients of one floating-point type."""
        raise NotImplementedError

    def evaluate_derivative(self, z: Tensor, coefficients: Tensor) -> Tensor:
        """f'(z), for z and coefficients of one floating-point type. At a kink: the derivative from the right."""
        raise NotImplementedError

    def evaluate_inverse(self, y: Tensor, coefficients: Tensor) -> Tensor:
        """z with f(z) = y, for y and coefficients of one floating-point type."""
        raise NotImplementedError(f"{type(self).__name__} has no inverse in closed form")

    def forward(self, input: Tensor) -> Tensor:
        """f(input), elementwise. float16 and bfloat16 are computed in float32 and rounded once."""
        return self._call(self.evaluate, input, "input")

    def derivative(self, input: Tensor) -> Tensor:
        """f'(input), elementwise, in the dtype of ``input``."""
        return self._call(self.evaluate_derivative, input, "input")

    def inverse(self, output: Tensor) -> Tensor:
        """The z with f(z) = ``output``, elementwise; NaN outside the range of f.

        Raises:
            NotImplementedError: f has no inverse in closed form or by table.
        """
        return self._call(self.evaluate_inverse, output, "output")

    def _call(self, function, argument: Tensor, name: str) -> Tensor:  # type: ignore[no-untyped-def]
        if not isinstance(argument, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(argument).__name__}")
        if not argument.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {argument.dtype}")
        compute = arithmetic_dtype(argument.dtype)
        result: Tensor = function(argument.to(compute), self.coefficients().to(argument.device, compute))
        return result.to(argument.dtype)


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that arithmetic on logits of type ``dtype`` is done in: float64 for float64, float32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widened(raw: Tensor) -> Tensor:
    """A raw parameter in the type that coefficients are computed in, also where a model was cast to half precision."""
    return raw.to(arithmetic_dtype(raw.dtype))


def of_pieces(coefficients: Tensor, piece: Tensor) -> tuple[Tensor, ...]:
    """The R rows of a table ``coefficients`` [R, K], each looked up at ``piece``.

    In one look-up: torch.compile (inductor, torch 2.9 to 2.11, on CPUs) sets the gradients of several tables to zero
    after summing them, where a reduction over rows, such as that of log_softmax, goes before the sums in one kernel.
    """
    return coefficients[:, piece].unbind()


def bounded_exp(raw: Tensor, limit: float = SCALE_LIMIT) -> Tensor:
    """exp(raw), clamped to [1/limit, limit]: a positive scale, exactly 1 at raw = 0."""
    bound = math.log(limit)
    return widened(raw).clamp(-bound, bound).exp()


def bounded_shift(raw: Tensor) -> Tensor:
    """raw, clamped to [-SHIFT_LIMIT, SHIFT_LIMIT]."""
    return widened(raw).clamp(-SHIFT_LIMIT, SHIFT_LIMIT)


def require_finite(name: str, value: float) -> float:
    """``value`` as a float, or a ValueError that names the argument."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def require_positive(name: str, value: float, limit: float = SCALE_LIMIT) -> float:
    """``value`` as a float in (0, limit], or a ValueError that names the argument."""
    value = require_finite(name, value)
    if value <= 0:
        raise ValueError(f"{name} must be positive, got {value}")
    if not 1 / limit <= value <= limit:
        raise ValueError(f"{name} must be between {1 / limit:g} and {limit:g}, got {value}")
    return value


def require_shift(name: str, value: float) -> float:
    """``value`` as a float in [-SHIFT_LIMIT, SHIFT_LIMIT], or a ValueError that names the argument."""
    value = require_finite(name, value)
    if abs(value) > SHIFT_LIMIT:
        raise ValueError(f"{name} must be between {-SHIFT_LIMIT:g} and {SHIFT_LIMIT:g}, got {value}")
    return value


def require_count(name: str, value: int, largest: int | None = None) -> int:
    """``value`` if it is an int >= 1 (and <= largest), or an error that names the argument."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    if largest is not None and value > largest:
        raise ValueError(f"{name} must be at most {largest}, got {value}")
    return value


class ScalarTransform(MonotonicTransform):
    """A transform with a few scalar coefficients, each of them a positive scale (kept as its logarithm) or a shift.

    The raw values are parameters where they are learned and persistent buffers where they are fixed, under the same
    names, so that a state_dict carries them in both cases.
    """

    def _add_scale(
        self, name: str, value: float, learnable: bool, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        self._add(f"log_{name}", math.log(require_positive(name, value)), learnable, device, dtype)

    def _add_shift(
        self, name: str, value: float, learnable: bool, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        self._add(f"raw_{name}", require_shift(name, value), learnable, device, dtype)

    def _add(
        self, name: str, value: float, learnable: bool, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        if not isinstance(learnable, bool):
            raise TypeError(f"learnable must be a bool, got {type(learnable).__name__}")
        raw = torch.tensor(value, device=device, dtype=dtype)
        if learnable:
            self.register_parameter(name, nn.Parameter(raw))
        else:
            self.register_buffer(name, raw)

    def _scalars(self) -> dict[str, Tensor]:
        raws = [*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)]
        return {name[4:]: bounded_exp(raw) if name.startswith("log_") else bounded_shift(raw) for name, raw in raws}

    @property
    def learnable(self) -> bool:
        """Whether the constants of this transform are parameters."""
        return next(self.parameters(recurse=False), None) is not None

    def extra_repr(self) -> str:
        scalars = ", ".join(
            name if value.is_meta else f"{name}={value.item():.4g}" for name, value in self._scalars().items()
        )
        return f"{scalars}, learnable={self.learnable}"
