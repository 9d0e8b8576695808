"""Increasing pointwise transforms of logits. Each is an ``nn.Module``: call it on a tensor, or give it to a loss."""

from __future__ import annotations

from typing import Any

from .base import REGISTRY, MonotonicTransform, settings_of
from .gss import GSS
from .identity import Identity
from .monotonic_mlp import MonotonicMLP
from .plif import PLIF
from .sigmoid_cap import SigmoidCap
from .sigsoftmax import SigSoftmax
from .soft_cap import SoftCap
from .spline import RationalQuadraticSpline
from .temperature import Temperature

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


def from_dict(config: dict[str, Any]) -> MonotonicTransform:
    """The transform that ``config``, from :meth:`MonotonicTransform.to_dict`, describes, as it was built.

    Raises:
        TypeError: ``config`` is no dict, or has names that are no arguments of the transform.
        ValueError: ``"type"`` is missing, or names no transform. The transform's constructor may raise other errors.
    """
    if not isinstance(config, dict):
        raise TypeError(f"config must be a dict, got {type(config).__name__}")
    if "type" not in config:
        raise ValueError(f'config must have a "type", one of {", ".join(REGISTRY)}')
    name = config["type"]
    if not isinstance(name, str) or name not in REGISTRY:
        raise ValueError(f'config["type"] must be one of {", ".join(REGISTRY)}, got {name!r}')
    arguments = {key: value for key, value in config.items() if key != "type"}
    known = settings_of(REGISTRY[name])
    unknown = [key for key in arguments if key not in known]
    if unknown:
        raise TypeError(
            f"{name} has no {', '.join(map(str, unknown))}: its arguments are {', '.join(known) or 'none at all'}"
        )
    return REGISTRY[name](**arguments)


__all__ = [
    "GSS",
    "PLIF",
    "REGISTRY",
    "Identity",
    "MonotonicMLP",
    "MonotonicTransform",
    "RationalQuadraticSpline",
    "SigSoftmax",
    "SigmoidCap",
    "SoftCap",
    "Temperature",
    "from_dict",
    "make",
]
