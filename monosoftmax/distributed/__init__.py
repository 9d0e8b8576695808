"""Output layers that the ranks of ``torch.distributed`` share out: classes, tokens, or both.

The functions here take plain tensors, the part of each rank. The functions of :mod:`monosoftmax` take DTensors, whose
placements say the same.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .collectives import Collective, traffic
from .functional import cross_entropy, linear_cross_entropy, linear_log_prob, log_softmax

if TYPE_CHECKING:
    from .parallel import VocabParallel, prepare

__all__ = [
    "Collective",
    "VocabParallel",
    "cross_entropy",
    "linear_cross_entropy",
    "linear_log_prob",
    "log_softmax",
    "prepare",
    "traffic",
]


def __getattr__(name: str) -> Any:
    # These load torch.distributed.tensor, which takes a second.
    if name in ("VocabParallel", "prepare"):
        return getattr(importlib.import_module(f"{__name__}.parallel"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
