"""A loss of the tokens of a head that the caller writes, with all gradients from three products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import gradients_ahead, groups, reference
from ._dispatch import keeps_graph, outside_of_graphs
from .backends import BackendName, Call, choose
from .checks import (
    IGNORE_INDEX,
    check_device,
    check_head,
    check_ignore_index,
    check_temperature,
    check_tensor,
    check_transform,
)
from .functional import for_kernels, rows_of
from .groups import Head
from .head_products import as_they_are
from .linear import autocast_input
from .row_kernels import row_kernels
from .token_loss_head import LossFunction, TokenLoss, Tokens, loss_and_gradients, loss_of
from .transforms import MonotonicTransform
from .transforms.base import arithmetic_dtype


def linear_token_loss(
    loss_fn: LossFunction,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    transform: MonotonicTransform | None = None,
    *,
    linear_bias: Tensor | None = None,
    per_token: Sequence[Tensor] = (),
    classes: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    temperature: float | Tensor = 1.0,
    backend: BackendName = "auto",
) -> Tensor:
    r"""The sum over chunks of rows of ``loss_fn(tokens, *per_token)``, a loss of log p, entropy and lse of each token.

    A fused backend forms the logits of a chunk of rows, calls ``loss_fn`` with their :class:`Tokens`, asks autograd for
    the gradients of these few numbers, and computes the gradients of the head and of f while the logits of the chunk
    are at hand: three products in all, where :func:`linear_log_prob` and a loss behind it take four. They wait for the
    backward pass, which scales them. So the loss of a chunk must need this chunk only: a policy gradient does, DPO,
    which compares whole sequences, does not. In float16 the logits are computed twice, four products in all, since the
    gradients must be scaled by the largest of all tokens.

    With upstream gradients a, e and h of log p(t), entropy and lse, and u of log p of the classes k,

    .. math:: \frac{\partial L}{\partial y_j} = a\,(1[j = t] - p_j) - e\,p_j (\log p_j + H) + h\,p_j
        + \sum_k u_k (1[j = k] - p_j)

    ``torch.compile`` runs it as it is, outside of its graphs. It has no double backward, except on the reference
    backend, which holds the logits in full and calls ``loss_fn`` once, with all rows.

    Args:
        loss_fn: gives the sum of the losses of the tokens that it is given, 0-dim. What has to be divided by the number
            of all tokens is divided in it. It may depend on what requires a gradient through the tokens only.
        input, linear_weight, target, transform, linear_bias, ignore_index, temperature, backend: as in
            :func:`linear_cross_entropy`.
        per_token: tensors with a first part of the shape of ``target``, such as advantages or old log p. ``loss_fn``
            gets the rows of the chunk of each. They must not require gradients.
        classes: int64, of the shape of ``target`` and k: classes of each token, different from each other, whose log p
            are in the tokens, too.

    Returns:
        A scalar in float32 (float64 for float64).

    Raises:
        TypeError, ValueError, NotImplementedError, IndexError: as in :func:`cross_entropy`; ``loss_fn`` gives no
            scalar, or depends on something else that requires a gradient.

    Example:
        >>> head, transform = torch.nn.Linear(64, 10_000, bias=False), monosoftmax.transforms.SoftCap(30.0)
        >>> hidden, action, advantage = torch.randn(8, 64), torch.randint(10_000, (8,)), torch.randn(8)
        >>> def policy_gradient(tokens, advantage):
        ...     return -(advantage * tokens.log_prob + 0.01 * tokens.entropy).sum() / 8
        >>> loss = monosoftmax.linear_token_loss(
        ...     policy_gradient, hidden, head.weight, action, transform, per_token=[advantage]
        ... )
        >>> loss.backward()
        >>> head.weight.grad.shape
        torch.Size([10000, 64])
    """
    transform, target = check_transform(transform), check_head(Head(input, linear_weight, linear_bias), target)
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function of tokens, got {type(loss_fn).__name__}")
    shape, rows = target.shape, rows_of(input)
    for i, each in enumerate(per_token):
        _check_per_token(f"per_token[{i}]", each, shape, input.device)
    if classes is None:
        classes = target.new_empty((*shape, 0))
    else:
        check_tensor("classes", classes)
        if classes.dtype != torch.int64 or classes.dim() != target.dim() + 1 or classes.shape[:-1] != shape:
            raise ValueError(
                f"classes must be int64 of shape {(*shape, 'k')}, got {classes.dtype} {tuple(classes.shape)}"
            )
        if classes.device != input.device:
            raise ValueError(f"classes must be on {input.device} like input, got {classes.device}")
    check_device("transform", transform, input.device)
    kind = Call("linear_token_loss", input.device.type, input.dtype, transform, classes=linear_weight.shape[0])
    call = TokenLoss(
        loss_fn=loss_fn,
        target=target.reshape(-1),
        classes=classes.reshape(rows.shape[0], -1) if rows.shape[0] > 0 else classes.reshape(0, classes.shape[-1]),
        per_token=[each.reshape(rows.shape[0], *each.shape[len(shape) :]) for each in per_token],
        transform=transform,
        temperature=check_temperature(temperature, input),
        ignore_index=check_ignore_index(ignore_index),
        backend=choose(kind, backend),
    )
    if call.backend == "reference":
        return _by_autograd(call, F.linear(rows, linear_weight, linear_bias))
    return of_head(call, autocast_input(rows), linear_weight, linear_bias)


def _check_per_token(name: str, tensor: Tensor, shape: torch.Size, device: torch.device) -> None:
    check_tensor(name, tensor)
    if tensor.shape[: len(shape)] != shape:
        raise ValueError(f"{name} must begin with the shape of target, {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like input, got {tensor.device}")
    if tensor.requires_grad:
        raise ValueError(f"{name} must not require a gradient: it would get none")


def _by_autograd(call: TokenLoss, logits: Tensor) -> Tensor:
    found = groups.TokenStatistics(
        *reference.token_statistics(logits, call.target, call.transform, call.ignore_index, call.temperature), logits
    )
    dtype = arithmetic_dtype(logits.dtype)
    selected = reference.log_softmax(logits, call.transform, dtype, call.temperature).gather(1, call.classes)
    tokens = Tokens(found.log_prob, found.entropy, found.lse, selected, found.rank == 0)
    return loss_of(call, tokens, slice(0, len(logits)))


@outside_of_graphs
def of_head(call: TokenLoss, rows: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
    """The loss on a fused backend."""
    coefficients = for_kernels(call.transform, rows, call.temperature).coefficients
    operands = (rows, linear_weight, linear_bias, coefficients)
    needed = tuple(torch.is_grad_enabled() and each is not None and each.requires_grad for each in operands)
    total: Tensor = _Ahead.apply(  # type: ignore[no-untyped-call]
        call, needed, *operands
    )
    return total


class _Ahead(torch.autograd.Function):
    """The loss, and in the forward pass all gradients of the operands that are ``needed``."""

    @staticmethod
    def forward(ctx: Any, call: TokenLoss, needed: Sequence[bool], *operands: Tensor | None) -> Tensor:
        rows, weight, bias, coefficients = operands
        assert rows is not None and weight is not None and coefficients is not None
        f = for_kernels(call.transform, rows, call.temperature)._replace(coefficients=coefficients)
        with as_they_are(rows.device.type):
            total, gradients = loss_and_gradients(call, Head(rows, weight, bias), f, needed)
        ahead = [each for each, need in zip(gradients, needed, strict=True) if need]
        gradients_ahead.let_wait(ahead)
        ctx.needed, ctx.backend = needed, call.backend
        wanted = [each for each, need in zip(operands, needed, strict=True) if need]
        ctx.save_for_backward(*ahead, *wanted)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        saved, in_place = ctx.saved_tensors, not keeps_graph()
        ahead, operands = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        if in_place:
            gradients_ahead.let_go(ahead)
        with torch.no_grad():
            kernels = row_kernels(ctx.backend)
            scaled = gradients_ahead.scaled(ahead, grad_output, rounded=False, in_place=in_place, kernels=kernels)
            assert scaled is not None  # which is for gradients that must not be rounded twice
            cast = [each.to(operand.dtype) for each, operand in zip(scaled, operands, strict=True)]
        waiting = iter(gradients_ahead.differentiated_once(cast, operands, "linear_token_loss"))
        return None, None, *[next(waiting) if need else None for need in ctx.needed]
