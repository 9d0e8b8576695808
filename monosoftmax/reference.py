"""The definition of right: every operation in plain, differentiable PyTorch, on any device and twice differentiable.

Rows are [N, V] logits z. With y = f(z) / temperature, lse = logsumexp(y), q the smoothed and weighted target
distribution:

    loss_i = sum_j q_ij (lse_i - y_ij) + z_loss * lse_i^2        q_ij = (1 - eps) w_t [j = t] + eps / V * w_j

exactly as ``torch.nn.functional.cross_entropy`` combines ``weight`` and ``label_smoothing``. For class probabilities t:

    q_ij = ((1 - eps) t_ij + eps / V) w_j
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ._dispatch import tells_values
from .groups import LossOptions
from .transforms.base import MonotonicTransform, arithmetic_dtype, coefficients_of


def cross_entropy(
    input: Tensor,
    target: Tensor,
    transform: MonotonicTransform,
    options: LossOptions,
    temperature: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss [N] and lse [N] of rows ``input`` [N, V]; ignored rows have loss 0, and lse 0 unless ``return_lse``.

    ``target`` is class indices [N], or class probabilities [N, V]: then it is differentiable, too. An index outside
    [0, V) that is not ``ignore_index`` raises on the CPU and gives a NaN row elsewhere.
    """
    if target.is_floating_point():
        return _of_probabilities(transformed(input, transform, temperature), target, options)
    weight, ignore_index, label_smoothing, z_loss, return_lse = options
    classes = input.shape[1]
    valid = target != ignore_index
    outside = valid & ((target < 0) | (target >= classes))
    raise_if_any(outside, target, classes, ignore_index)
    # An ignored row may hold anything, also NaN: keep it out of the forward and of the backward pass, where an upstream
    # gradient of 0 would not. If it has a distribution, its lse may be asked for.
    left_out, largest = ~valid, input.detach().amax(1)
    if return_lse:
        left_out = left_out & (torch.isnan(largest) if transform.bounded_below else ~torch.isfinite(largest))
    input = torch.where(left_out.unsqueeze(1), torch.zeros_like(input), input)

    y = transformed(input, transform, temperature)
    log_p = F.log_softmax(y, dim=1)
    index = torch.where(valid & ~outside, target, 0).unsqueeze(1)
    loss = -log_p.gather(1, index).squeeze(1)
    if weight is not None:
        loss = loss * weight[index.squeeze(1)]
    if label_smoothing > 0:
        smooth = -(log_p if weight is None else log_p * weight).sum(1)
        loss = (1 - label_smoothing) * loss + label_smoothing / classes * smooth

    lse = torch.zeros_like(loss)
    if return_lse or z_loss > 0:
        lse = torch.logsumexp(y, 1)
        if z_loss > 0:
            loss = loss + z_loss * lse.square()
        lse = torch.where(left_out, largest.to(lse.dtype) if return_lse else 0.0, lse)
    loss = torch.where(valid, loss, torch.zeros_like(loss))
    loss = torch.where(outside, torch.full_like(loss, torch.nan), loss)
    return loss, lse


def _of_probabilities(y: Tensor, target: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
    """A class with q = 0 adds nothing, also where its log p is -inf: there the gradient of ``target`` is 0."""
    weight, _, label_smoothing, z_loss, return_lse = options
    log_p = F.log_softmax(y, dim=1)
    q = target.to(log_p.dtype)
    if label_smoothing > 0:
        q = (1 - label_smoothing) * q + label_smoothing / y.shape[1]
    if weight is not None:
        q = q * weight
    # 0 * inf is NaN, and so would its derivative be.
    loss = -(q * log_p.masked_fill((q == 0) & torch.isneginf(log_p), 0.0)).sum(1)
    if not (return_lse or z_loss > 0):
        return loss, torch.zeros_like(loss)
    lse = torch.logsumexp(y, 1)
    if z_loss > 0:
        loss = loss + z_loss * lse.square()
    return loss, lse


def log_softmax(
    input: Tensor, transform: MonotonicTransform, dtype: torch.dtype, temperature: Tensor | None = None
) -> Tensor:
    """log p of rows ``input`` [N, V], computed in float32 (float64 for float64) and returned as ``dtype``."""
    return F.log_softmax(transformed(input, transform, temperature), dim=1).to(dtype)


def divergence(log_p: Tensor, log_q: Tensor, kind: str, beta: float) -> Tensor:
    """The divergence of p from q, [N]: the formulas of ``RowKernels.divergence``. A term whose factor is 0 is 0."""

    def expected(probability: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
        there = probability > 0
        gap = torch.where(there, log_a, 0.0) - torch.where(there, log_b, 0.0)
        return (probability * gap).sum(1)

    p, q = log_p.exp(), log_q.exp()
    if kind == "forward_kl":
        return expected(q, log_q, log_p)
    if kind == "reverse_kl":
        return expected(p, log_p, log_q)
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log(1 - beta))
    return beta * expected(q, log_q, log_m) + (1 - beta) * expected(p, log_p, log_m)


def token_statistics(
    z: Tensor, target: Tensor, transform: MonotonicTransform, ignore_index: int, temperature: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """log p(target), entropy, argmax, lse and rank of the target, each [N], for logits [N, V].

    The argmax is the first class with the largest logit, the rank the number of classes with a larger logit than the
    target's. In ignored rows log p is 0 and the rank -1. Where a row of logits has no distribution (NaN, +inf, all
    -inf), log p and entropy are NaN, lse is not finite, and argmax and rank mean nothing.
    """
    classes = z.shape[1]
    valid = target != ignore_index
    outside = valid & ((target < 0) | (target >= classes))
    raise_if_any(outside, target, classes, ignore_index)
    index = torch.where(valid & ~outside, target, 0).unsqueeze(1)
    # An ignored row without a distribution must stay out of the backward pass, as in cross_entropy.
    largest = z.detach().amax(1)
    left_out = ~valid & (torch.isnan(largest) if transform.bounded_below else ~torch.isfinite(largest))
    y = transformed(torch.where(left_out.unsqueeze(1), torch.zeros_like(z), z), transform, temperature)
    log_p = F.log_softmax(y, dim=1)
    # p log p -> 0 as p -> 0
    entropy = -(log_p.exp() * log_p.masked_fill(torch.isneginf(log_p), 0.0)).sum(1)
    log_prob = log_p.gather(1, index).squeeze(1)
    log_prob = torch.where(valid, torch.where(outside, torch.nan, log_prob), 0.0)
    # torch.argmax promises the first of equals for some devices only.
    place = torch.arange(classes, device=z.device).expand_as(z)
    argmax = torch.where(z == z.amax(1, keepdim=True), place, classes).amin(1).clamp(max=classes - 1)
    rank = torch.where(valid & ~outside, (z > z.gather(1, index)).sum(1), -1)
    entropy = torch.where(left_out, torch.nan, entropy)
    lse = torch.where(left_out, largest.to(y.dtype), torch.logsumexp(y, 1))
    return log_prob, entropy, argmax, lse, rank


def transformed(input: Tensor, transform: MonotonicTransform, temperature: Tensor | None = None) -> Tensor:
    """y = f(input) / temperature in the type of the arithmetic; NaN for a temperature that is not positive."""
    z = input.to(arithmetic_dtype(input.dtype))
    return evaluated(z, transform, coefficients_of(transform, z.device, z.dtype), temperature)


def evaluated(
    z: Tensor, transform: MonotonicTransform, coefficients: Tensor, temperature: Tensor | None = None
) -> Tensor:
    """:func:`transformed` for coefficients at hand, with gradients that stay finite at logits of -inf."""
    if transform.bounded_below:
        y = transform.evaluate(z, coefficients)
    else:
        # Where f(-inf) = -inf, autograd would form 0 * inf for the gradients of f's parameters. A class whose
        # probability is 0 may still be a target: then its logit has a gradient, that of one far below all others.
        masked = torch.isneginf(z)
        replace: Callable[..., Tensor] = (_Replace if torch.compiler.is_compiling() else _ReplaceForward).apply
        y = replace(transform.evaluate(replace(z, masked, -_FAR), coefficients), masked, -torch.inf)
    return y if temperature is None else y / torch.where(temperature > 0, temperature, torch.nan)


#: A logit this far below 0 is as good as -inf, and its product with a coefficient fits float32.
_FAR = 1e30


class _Replace(torch.autograd.Function):
    """``input`` with ``value`` where ``mask`` is true, whose gradient goes on as if nothing had been replaced."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, mask: Tensor, value: float) -> Tensor:
        return input.masked_fill(mask, value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        return grad_output, None, None


class _ReplaceForward(_Replace):
    """With a forward-mode derivative, which Dynamo refuses to read (torch 2.14)."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return tangent


def raise_if_any(outside: Tensor, target: Tensor, classes: int, ignore_index: int) -> None:
    """IndexError for the first target that is out of range; nothing where asking would stop a device or a trace."""
    if not tells_values(outside) or outside.numel() == 0:
        return
    if bool(outside.any()):
        row = int(outside.int().argmax())
        raise IndexError(
            f"target {int(target[row])} (row {row}) is out of bounds for {classes} classes "
            f"(ignore_index={ignore_index})"
        )
