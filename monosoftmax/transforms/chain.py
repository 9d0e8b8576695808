"""Transforms one after the other: the fixed scale and the cap that a model has around a learned f."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Around, MonotonicTransform, from_dict, require_positive
from .soft_cap import LARGEST_LOGIT, SoftCap


class Scale(MonotonicTransform):
    r""":math:`f(z) = s z`, with a fixed :math:`s > 0`: Cohere's ``logit_scale``, 1 / Granite's ``logits_scaling``, the
    output multiplier of muP.

    Args:
        factor: s, in [1e-4, 1e4].

    Raises:
        ValueError: factor is not finite or out of range.

    Example:
        >>> monosoftmax.transforms.Scale(0.25)(torch.tensor([4.0]))
        tensor([1.])
    """

    kernel = "identity"

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = require_positive("factor", factor)

    @property
    def around(self) -> Around:
        return Around(self.factor, 0.0, 1.0)

    def arguments(self) -> dict[str, Any]:
        return {"factor": self.factor}

    def coefficients(self) -> Tensor:
        return torch.empty(0, dtype=torch.float32, device="cpu")

    def evaluate(self, z: Tensor, coefficients: Tensor) -> Tensor:
        return z * self.factor

    def evaluate_derivative(self, z: Tensor, coefficients: Tensor) -> Tensor:
        return torch.full_like(z, self.factor)

    def evaluate_inverse(self, y: Tensor, coefficients: Tensor) -> Tensor:
        return y / self.factor


class Chain(MonotonicTransform):
    r""":math:`f(z) = f_n(\dots f_1(z))`, with the first of the given transforms next to the logits.

    The fused backends take what models have around a learned f, as one more step in their kernels before f and a factor
    after it: any number of :class:`Scale` and at most one fixed :class:`SoftCap`, then at most one other transform,
    then any number of :class:`Scale`. A scale costs one product for each logit, a cap one tanh. Every other chain (two
    learned transforms, a cap behind f) is for the reference backend only, and the others say why they refuse it.

    Args:
        transforms: the parts, one at least. A :class:`Chain` among them stands for its own parts. A fixed
            :class:`SoftCap` keeps the cap that it was built with, and has no state in the chain.

    Raises:
        TypeError: a part is no transform.
        ValueError: there are no parts.

    Example:
        >>> f = monosoftmax.transforms.Chain(
        ...     monosoftmax.transforms.Scale(0.25), monosoftmax.transforms.SoftCap(30.0), monosoftmax.transforms.PLIF()
        ... )
        >>> logits, target = torch.randn(4, 10_000), torch.tensor([5, 0, 9_999, -100])
        >>> bool(monosoftmax.cross_entropy(logits, target, f) > 0)
        True
    """

    setting_names = ("transforms",)

    def __init__(self, *transforms: MonotonicTransform) -> None:
        super().__init__()
        parts: list[MonotonicTransform] = []
        for each in transforms:
            if not isinstance(each, MonotonicTransform):
                raise TypeError(f"transforms must be monosoftmax transforms, got {type(each).__name__}")
            parts += each._in_order() if isinstance(each, Chain) else [each]
        if not parts:
            raise ValueError("transforms must be at least one transform, got none")
        self.parts = nn.ModuleList(_as_part(each) for each in parts)
        self.bounded_below = any(each.bounded_below for each in parts)
        self._fold(self._in_order())

    def _fold(self, parts: list[MonotonicTransform]) -> None:
        """Find the one transform with kernels, the step before it and the factor after it."""
        #: Why no fused backend takes this chain, or None.
        self.unfused: str | None = None
        scale, cap, factor = 1.0, 0.0, 1.0
        core: MonotonicTransform | None = None
        for each in parts:
            if isinstance(each, Scale) and core is None:
                scale, cap = scale * each.factor, cap * each.factor
            elif isinstance(each, Scale):
                factor *= each.factor
            elif isinstance(each, _Cap) and core is None and cap == 0.0:
                cap = each.cap
            elif core is None and not isinstance(each, _Cap):
                core = each
                if core.kernel is None:
                    self.unfused = f"{type(core).__name__} has no fused kernel"
            else:
                last = "SoftCap" if isinstance(each, _Cap) else type(each).__name__
                self.unfused = f"its kernels have no second f after a first, as {last} is in this Chain"
        #: The transform whose kernels compute the chain; None: it has none, or the identity's do.
        self._core = [core] if core is not None and self.unfused is None else []
        self._around = Around(scale, cap, factor)
        self.kernel = None if self.unfused else "identity" if core is None else core.kernel

    def _in_order(self) -> list[MonotonicTransform]:
        return list(self.parts)  # type: ignore[arg-type]

    @property
    def around(self) -> Around:
        return self._around

    def _sharded(self) -> list[str]:
        # Each part looks at its own parameters, once its hooks have made them whole.
        return []

    def reset_parameters(self) -> None:
        """Restore the values that the parts were built with."""
        for each in self.parts:
            each.reset_parameters()  # type: ignore[operator]

    def constants(self) -> tuple[float, ...]:
        return self._core[0].constants() if self._core else ()

    @property
    def table_size(self) -> int:
        return self._core[0].table_size if self._core else 0

    def arguments(self) -> dict[str, Any]:
        return {"transforms": [each.to_dict() for each in self._in_order()]}

    @classmethod
    def from_arguments(cls, arguments: dict[str, Any]) -> Chain:
        return cls(*(from_dict(each) for each in arguments.get("transforms", ())))

    def extra_repr(self) -> str:
        return ""

    def coefficients(self) -> Tensor:
        """Those of the transform with kernels; of a chain without kernels, of all parts one after the other, [P]."""
        if self.unfused is None:
            return self._core[0]() if self._core else torch.empty(0, dtype=torch.float32, device="cpu")
        each = [part().flatten() for part in self.parts]
        wide = torch.promote_types(torch.float32, max((e.dtype for e in each), key=lambda dtype: dtype.itemsize))
        return torch.cat([e.to(wide) for e in each])

    def evaluate(self, z: Tensor, coefficients: Tensor) -> Tensor:
        if self.bounded_below:
            # A part before the bounded one would see -inf, and have 0 * inf in the gradients of its coefficients.
            z = z.clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
        for part, own in self._with_coefficients(coefficients):
            z = part.evaluate(z, own)
        return z

    def evaluate_derivative(self, z: Tensor, coefficients: Tensor) -> Tensor:
        derivative = torch.ones_like(z)
        for part, own in self._with_coefficients(coefficients):
            derivative = derivative * part.evaluate_derivative(z, own)
            z = part.evaluate(z, own)
        return derivative

    def evaluate_inverse(self, y: Tensor, coefficients: Tensor) -> Tensor:
        for part, own in reversed(self._with_coefficients(coefficients)):
            y = part.evaluate_inverse(y, own)
        return y

    def _with_coefficients(self, coefficients: Tensor) -> list[tuple[MonotonicTransform, Tensor]]:
        """The parts, each with its own coefficients."""
        parts = self._in_order()
        nothing = coefficients.new_empty(0)
        if self.unfused is None:
            return [(each, coefficients if each in self._core else nothing) for each in parts]
        found, start = [], 0
        for each in parts:
            shape = each.coefficients().shape
            found.append((each, coefficients[start : start + shape.numel()].reshape(shape)))
            start += shape.numel()
        return found


class _Cap(SoftCap):
    """A :class:`SoftCap` of a chain that is a number and no state: kernels take it without asking a device."""

    def __init__(self, cap: float) -> None:
        MonotonicTransform.__init__(self)
        self.cap = cap

    def _get_name(self) -> str:
        return "SoftCap"

    def reset_parameters(self) -> None:
        pass

    def to_dict(self) -> dict[str, Any]:
        return {"type": "soft_cap", "cap": self.cap, "learnable": False}

    def arguments(self) -> dict[str, Any]:
        return {"cap": self.cap}

    def coefficients(self) -> Tensor:
        return torch.empty(0, dtype=torch.float32, device="cpu")

    def evaluate(self, z: Tensor, coefficients: Tensor) -> Tensor:
        return super().evaluate(z, z.new_full((1,), self.cap))

    def evaluate_derivative(self, z: Tensor, coefficients: Tensor) -> Tensor:
        return super().evaluate_derivative(z, z.new_full((1,), self.cap))

    def evaluate_inverse(self, y: Tensor, coefficients: Tensor) -> Tensor:
        return super().evaluate_inverse(y, y.new_full((1,), self.cap))


def _as_part(transform: MonotonicTransform) -> MonotonicTransform:
    if isinstance(transform, SoftCap) and not isinstance(transform, _Cap) and not transform.learnable:
        return _Cap(transform.arguments()["cap"])
    return transform
