"""The loss whose gradient overwrites the logits in the forward pass: :func:`monosoftmax.cross_entropy` with inplace."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import gradients_ahead, ops
from ._dispatch import keeps_graph, outside_of_graphs
from .groups import Upstream
from .reductions import reduced, scale_of
from .row_kernels import row_kernels


@outside_of_graphs
def total_and_losses(call: ops.CrossEntropy) -> tuple[Tensor, Tensor]:
    """The mean or sum of the losses, and the losses [N], which have no gradient."""
    found: tuple[Tensor, Tensor] = _InPlace.apply(call, call.input, call.transform.coefficients)  # type: ignore[no-untyped-call]
    return found


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: ops.CrossEntropy, rows: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        memory, classes = rows.detach(), rows.shape[1]
        scale = scale_of(call.reduction, call.target, call.options, classes, coefficients.dtype)
        assert scale is not None  # a mean or a sum
        results = row_kernels(call.backend).cross_entropy(
            memory, call.target, call.transform._replace(coefficients=coefficients.detach()), call.options,
            upstream=Upstream(scale), output_mask=tuple(call.output_mask), grad_rows=memory,
        )  # fmt: skip
        # Whoever has saved the logits for a backward pass of their own must get autograd's error, not wrong numbers.
        torch.autograd.graph.increment_version(rows)
        ctx.backend = call.backend
        ctx.save_for_backward(memory, results[4])
        ctx.mark_non_differentiable(results[0])
        return reduced(results[0], scale)[1], results[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, _: Tensor) -> Any:
        if keeps_graph():
            raise RuntimeError("monosoftmax: inplace=True has its gradient once: retain_graph must be False")
        saved = ctx.saved_tensors  # once: what is scaled in place is another version of itself
        gradients, kernels = [each for each in saved if each.numel() > 0], row_kernels(ctx.backend)
        scaled = gradients_ahead.scaled(gradients, grad_output, rounded=False, in_place=True, kernels=kernels)
        assert scaled is not None  # which is for gradients that must not be rounded twice
        waiting = iter(scaled)
        return None, *(next(waiting) if each.numel() > 0 else None for each in saved)
