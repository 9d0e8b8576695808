"""A head with targets and classes of each token, losses of them, and what such a loss costs, for several tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

import monosoftmax as ms
from monosoftmax import head_products

N, D, V, K = 7, 5, 41, 4


def batch(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor, Tensor]:
    """The leaves of a head, targets of which one is ignored, and classes of each token."""
    torch.manual_seed(0)
    shapes: list[tuple[int, ...]] = [(N, D), (V, D), (V,)]
    head = [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    target = torch.randint(0, V, (N,))
    target[4] = -100
    classes = torch.stack([torch.randperm(V)[:K] for _ in range(N)])
    classes[0, 1] = target[0]  # a class that is the target, too
    classes[0, [0, 2, 3]] = (target[0] + torch.tensor([1, 2, 3])) % V
    return head, target, classes


def rich(tokens: ms.Tokens, a: Tensor, b: Tensor) -> Tensor:
    """A loss of all that tokens have."""
    of_classes = (tokens.class_log_prob * b).sum(1) + tokens.class_log_prob.exp().square().sum(1)
    return (a * tokens.log_prob + 0.3 * tokens.entropy.square() + 0.01 * tokens.lse * a + of_classes).sum() / N


def materialised(head: list[Tensor], target: Tensor, classes: Tensor, f: Any, tau: float) -> ms.Tokens:
    y = f(F.linear(head[0], head[1], head[2])) / tau
    log_p, kept = y.log_softmax(1), target != -100
    found = torch.where(kept, log_p.gather(1, target.clamp(min=0)[:, None])[:, 0], 0.0)
    entropy = -(log_p.exp() * log_p).sum(1)
    return ms.Tokens(found, entropy, y.logsumexp(1), log_p.gather(1, classes), y.argmax(1) == target)


def weights(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(N, generator=generator), torch.randn(N, K, generator=generator)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return a.to(wide), b.to(wide)


def products(call: Callable[[], Any], rows: int = N) -> int:
    """How many products of the size of the head a call makes, of ``rows`` rows each."""
    counted = 0
    forward, add = head_products.HeadProducts.__iter__, head_products.HeadProducts.add_gradients

    def iterate(self: Any) -> Any:
        nonlocal counted
        for chunk, logits in forward(self):
            counted += chunk.stop - chunk.start
            yield chunk, logits

    def add_gradients(self: Any, chunk: slice, dz: Tensor) -> None:
        nonlocal counted
        counted += (chunk.stop - chunk.start) * (self.need_input + self.need_weight)
        add(self, chunk, dz)

    with (
        mock.patch.object(head_products.HeadProducts, "__iter__", iterate),
        mock.patch.object(head_products.HeadProducts, "add_gradients", add_gradients),
    ):
        call()
    assert counted % rows == 0
    return counted // rows
