"""monosoftmax in the frameworks that people train and serve with: ``transformers`` and ``trl``, loaded when asked for.

They hold on to objects, never to globals of the framework: f is ``model.logit_transform``, one declared place that
training, scoring, sampling, saving and serving read.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["transformers", "trl"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
