"""Increasing pointwise transforms of logits. Each is an ``nn.Module``: call it on a tensor, or give it to a loss."""

from __future__ import annotations

from typing import Any

from .base import COMPOSITIONS, REGISTRY, Around, MonotonicTransform, from_dict
from .chain import Chain, Scale
from .gss import GSS
from .identity import Identity
from .monotonic_mlp import MonotonicMLP
from .plif import PLIF
from .sigmoid_cap import SigmoidCap
from .sigsoftmax import SigSoftmax
from .soft_cap import SoftCap
from .spline import RationalQuadraticSpline
from .temperature import Temperature

COMPOSITIONS.update({"scale": Scale, "chain": Chain})
# For a new transform, add its row here.
REGISTRY.update(
    {
        "identity": Identity,
        "temperature": Temperature,
        "plif": PLIF,
        "sigsoftmax": SigSoftmax,
        "gss": GSS,
        "soft_cap": SoftCap,
        "sigmoid_cap": SigmoidCap,
        "monotonic_mlp": MonotonicMLP,
        "spline": RationalQuadraticSpline,
    }
)


def make(name: str, **settings: Any) -> MonotonicTransform:
    """The transform registered as ``name``, constructed with ``settings``.

    Raises:
        ValueError: no transform has that name.
    """
    if name not in REGISTRY:
        raise ValueError(f"name must be one of {', '.join(REGISTRY)}, got {name!r}")
    return REGISTRY[name](**settings)


__all__ = [
    "GSS",
    "PLIF",
    "REGISTRY",
    "Around",
    "Chain",
    "Identity",
    "MonotonicMLP",
    "MonotonicTransform",
    "RationalQuadraticSpline",
    "Scale",
    "SigSoftmax",
    "SigmoidCap",
    "SoftCap",
    "Temperature",
    "from_dict",
    "make",
]
