"""The heads that processes share and that are trained: small, away from where they start, with learned constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from losses import disturbed
from torch import Tensor, nn

import monosoftmax as ms

FEATURES, CLASSES, ROWS = 6, 11, 8
#: Sizes that two processes cannot share evenly, and bends where the logits are.
SETTINGS: dict[str, dict[str, Any]] = {
    "plif": {"num_pieces": 9, "bound": 3.0}, "spline": {"num_bins": 5, "bound": 3.0}, "soft_cap": {"cap": 3.0},
    "monotonic_mlp": {"num_units": 3, "bound": 3.0},
}  # fmt: skip


class Head(ms.MonotonicSoftmax):
    """The head of a language model as a module that returns its loss."""

    def __init__(self, transform: nn.Module, backend: Any = "cpu") -> None:
        super().__init__(FEATURES, CLASSES, transform, backend=backend)  # type: ignore[arg-type]
        with torch.no_grad():
            self.weight.mul_(4)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input, target).loss


def built(name: str, of: Callable[[Head], nn.Module] = lambda head: head, **options: Any) -> Any:
    """The same module every time, and on all ranks."""
    torch.manual_seed(0)
    return of(Head(disturbed(name, **SETTINGS.get(name, {})), **options))
