"""Output layers that the ranks of ``torch.distributed`` share out."""

from __future__ import annotations

from .collectives import traffic
from .functional import cross_entropy, linear_cross_entropy, linear_log_prob, log_softmax

__all__ = ["cross_entropy", "linear_cross_entropy", "linear_log_prob", "log_softmax", "traffic"]
