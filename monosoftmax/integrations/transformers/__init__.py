"""f in models of transformers: in their logits, their loss, their checkpoints. See :func:`add_transform`."""

from __future__ import annotations

from typing import Any

try:
    import transformers as _transformers
except ImportError as error:
    raise ImportError(
        f"monosoftmax.integrations.transformers needs transformers ({error}): pip install 'monosoftmax[transformers]'"
    ) from error

from .classes import AutoMonotonicModelForCausalLM, add_transform, class_for, register
from .inspection import inspect
from .loss import monotonic_loss
from .model import MonotonicHead
from .serving import export, fold
from .trainer import MonotonicAdamW, TransformCallback, token_metrics

__all__ = [
    "AutoMonotonicModelForCausalLM",
    "MonotonicAdamW",
    "MonotonicHead",
    "TransformCallback",
    "add_transform",
    "class_for",
    "export",
    "fold",
    "inspect",
    "monotonic_loss",
    "register",
    "token_metrics",
]


def __getattr__(name: str) -> Any:
    # Pickles of models name their classes, which class_for makes.
    base = getattr(_transformers, name.removeprefix("Monotonic"), None) if name.startswith("Monotonic") else None
    if base is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if issubclass(base, _transformers.PreTrainedModel):
        return class_for(base)
    from .classes import _config_class_for

    return _config_class_for(base)
