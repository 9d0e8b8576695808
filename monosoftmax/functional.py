"""The public functions: they check arguments, pick the backend and reduce the losses of the rows; nothing else."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from . import autograd, reference
from .backends import BackendName, Call, choose
from .checks import (
    FLOATING_DTYPES,
    Reduction,
    check_device,
    check_floating,
    check_loss_options,
    check_target,
    check_transform,
)
from .transforms import MonotonicTransform
from .transforms.base import arithmetic_dtype


@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    transform: MonotonicTransform | None = ...,
    *,
    weight: Tensor | None = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    reduction: Reduction = ...,
    return_lse: Literal[False] = ...,
    backend: BackendName = ...,
) -> Tensor: ...
@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    transform: MonotonicTransform | None = ...,
    *,
    weight: Tensor | None = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    reduction: Reduction = ...,
    return_lse: Literal[True],
    backend: BackendName = ...,
) -> tuple[Tensor, Tensor]: ...
def cross_entropy(
    input: Tensor,
    target: Tensor,
    transform: MonotonicTransform | None = None,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    return_lse: bool = False,
    backend: BackendName = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Cross entropy of :math:`p = \mathrm{softmax}(f(z))`; :func:`torch.nn.functional.cross_entropy` for f = identity.

    .. math:: \ell_i = \sum_j q_{ij} (\mathrm{lse}_i - f(z_{ij})) + \text{z\_loss}\cdot \mathrm{lse}_i^2,
        \qquad \mathrm{lse}_i = \log \sum_j e^{f(z_{ij})}

    with q the target distribution after ``weight`` and ``label_smoothing``, exactly as in PyTorch. Arithmetic is in
    float32 (float64 for float64), and so is the result, whatever the dtype of ``input``.

    Args:
        input: logits z, (V,), (N, V) or (N, V, d1, ...); float32, bfloat16, float16 or float64.
        target: class indices, int64, of the shape of ``input`` without V.
        transform: f; ``None`` is Linear-Softmax.
        weight: weight of each class, (V,).
        ignore_index: targets of this value get loss 0 and gradient 0.
        label_smoothing: share of the target probability that is spread over all classes, in [0, 1].
        z_loss: weight of lse^2, added to the loss of every row that is not ignored; not multiplied by ``weight``.
        reduction: ``"mean"`` divides the sum by the number of rows that are not ignored (by the sum of the weights of
            their targets, where ``weight`` is given), and is NaN when there are none, as in PyTorch.
        return_lse: also return lse, of the shape of ``target``; it is differentiable.
        backend: ``"auto"``, or a name from :func:`monosoftmax.backends.available`.

    Returns:
        The loss, a scalar or, for ``reduction="none"``, of the shape of ``target``; with ``return_lse``, a pair.

    Raises:
        TypeError, ValueError, NotImplementedError: an argument has the wrong type, shape, dtype, device or range, or
            is of a kind (DTensor, sparse, class probabilities) that is not supported.
        IndexError: a target is out of range, on the CPU. On other devices, and in compiled code of the reference
            backend, the loss of that row is NaN.

    Source: Ganea et al., ICML 2019, for softmax(f(z)); z-loss: Chowdhery et al., PaLM, 2022, section 5.
    """
    transform = check_transform(transform)
    check_floating("input", input)
    check_target(target, input.device)
    if input.dim() == 0:
        raise ValueError("input must have at least 1 dimension, (V,) or (N, V, ...), got a scalar")
    class_dim = 0 if input.dim() == 1 else 1
    classes = input.shape[class_dim]
    expected = input.shape[:class_dim] + input.shape[class_dim + 1 :]
    if target.shape != expected:
        raise ValueError(
            f"target must have the shape of input without its class dimension, {tuple(expected)} for input "
            f"{tuple(input.shape)}, got {tuple(target.shape)}"
        )
    check_loss_options(classes, input.device, weight, ignore_index, label_smoothing, z_loss, reduction)
    check_device("transform", transform, input.device)

    chosen = choose(Call("cross_entropy", input.device.type, input.dtype, transform), backend)
    rows = input.movedim(class_dim, -1).reshape(-1, classes)
    return _loss_of_rows(
        rows, target, transform, weight, ignore_index, label_smoothing, z_loss, reduction, return_lse, chosen
    )


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    transform: MonotonicTransform | None = ...,
    *,
    linear_bias: Tensor | None = ...,
    weight: Tensor | None = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    reduction: Reduction = ...,
    return_lse: Literal[False] = ...,
    backend: BackendName = ...,
) -> Tensor: ...
@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    transform: MonotonicTransform | None = ...,
    *,
    linear_bias: Tensor | None = ...,
    weight: Tensor | None = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    reduction: Reduction = ...,
    return_lse: Literal[True],
    backend: BackendName = ...,
) -> tuple[Tensor, Tensor]: ...
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    transform: MonotonicTransform | None = None,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    return_lse: bool = False,
    backend: BackendName = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r""":func:`cross_entropy` of the logits :math:`z = \text{input}\,\text{linear\_weight}^T + \text{linear\_bias}`.

    In this version no backend fuses the head: the logits exist in full, as :func:`monosoftmax.backends.explain` says.

    Args:
        input: (..., d).
        linear_weight: (V, d), of the dtype of ``input`` (or any, under autocast).
        target: class indices, int64, of the shape of ``input`` without d.
        linear_bias: (V,).
        transform, weight, ignore_index, label_smoothing, z_loss, reduction, return_lse, backend: as in
            :func:`cross_entropy`.

    Returns:
        As :func:`cross_entropy`.

    Raises:
        As :func:`cross_entropy`.
    """
    transform = check_transform(transform)
    check_floating("input", input)
    check_floating("linear_weight", linear_weight)
    check_target(target, input.device)
    if input.dim() == 0 or linear_weight.dim() != 2 or input.shape[-1] != linear_weight.shape[1]:
        raise ValueError(
            f"input (..., d) and linear_weight (V, d) must agree in d, got {tuple(input.shape)} and "
            f"{tuple(linear_weight.shape)}"
        )
    if target.shape != input.shape[:-1]:
        raise ValueError(
            f"target must have the shape of input without its last dimension, {tuple(input.shape[:-1])}, "
            f"got {tuple(target.shape)}"
        )
    classes = linear_weight.shape[0]
    operands = {"linear_weight": linear_weight}
    if linear_bias is not None:
        check_floating("linear_bias", linear_bias)
        if linear_bias.shape != (classes,):
            raise ValueError(f"linear_bias must have shape ({classes},), got {tuple(linear_bias.shape)}")
        operands["linear_bias"] = linear_bias
    autocast = torch.is_autocast_enabled(input.device.type)
    for name, operand in operands.items():
        if operand.device != input.device:
            raise ValueError(f"{name} must be on {input.device} like input, got {operand.device}")
        if operand.dtype != input.dtype and not autocast:
            raise TypeError(f"{name} must have the dtype of input, {input.dtype}, got {operand.dtype}")
    check_loss_options(classes, input.device, weight, ignore_index, label_smoothing, z_loss, reduction)
    check_device("transform", transform, input.device)

    chosen = choose(Call("linear_cross_entropy", input.device.type, input.dtype, transform), backend)
    rows = F.linear(input.reshape(-1, input.shape[-1]), linear_weight, linear_bias)
    return _loss_of_rows(
        rows, target, transform, weight, ignore_index, label_smoothing, z_loss, reduction, return_lse, chosen
    )


def log_softmax(
    input: Tensor,
    transform: MonotonicTransform | None = None,
    *,
    dtype: torch.dtype | None = None,
    backend: BackendName = "auto",
) -> Tensor:
    r"""Log-probabilities :math:`f(z) - \mathrm{lse}` over the last dimension.

    Args:
        input: logits z, (..., V); float32, bfloat16, float16 or float64.
        transform: f; ``None`` is Linear-Softmax.
        dtype: of the result; float32 by default, float64 for float64. Arithmetic is in float32 or float64 in any case,
            rounded once.
        backend: ``"auto"``, or a name from :func:`monosoftmax.backends.available`.

    Returns:
        (..., V).

    Raises:
        TypeError, ValueError, NotImplementedError: as in :func:`cross_entropy`.
    """
    transform = check_transform(transform)
    check_floating("input", input)
    if input.dim() == 0:
        raise ValueError("input must have at least 1 dimension, (..., V), got a scalar")
    classes = input.shape[-1]
    if classes == 0:
        raise ValueError("input must have at least 1 class, got 0")
    if dtype is None:
        dtype = arithmetic_dtype(input.dtype)
    elif dtype not in FLOATING_DTYPES:
        raise TypeError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype}")
    check_device("transform", transform, input.device)
    chosen = choose(Call("log_softmax", input.device.type, input.dtype, transform), backend)
    rows = input.reshape(-1, classes)
    if chosen == "reference":
        output = reference.log_softmax(rows, transform, dtype)
    else:
        output = autograd.log_softmax(chosen, _rows_for_kernel(rows), transform, dtype)
    return output.reshape(input.shape)


def _loss_of_rows(
    rows: Tensor,
    target: Tensor,
    transform: MonotonicTransform,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: Reduction,
    return_lse: bool,
    backend: str,
) -> Tensor | tuple[Tensor, Tensor]:
    """The loss of logits ``rows`` [N, V] for ``target`` of any shape with N elements."""
    row_target = target.reshape(-1)
    if weight is not None:
        weight = weight.to(arithmetic_dtype(rows.dtype))
    if backend == "reference":
        loss, lse = reference.cross_entropy(
            rows, row_target, transform, weight, ignore_index, label_smoothing, z_loss, return_lse
        )
    else:
        rows = _rows_for_kernel(rows)
        loss, lse = autograd.cross_entropy(
            backend, rows, row_target, transform, weight, ignore_index, label_smoothing, z_loss, return_lse
        )
    if reduction == "none":
        loss = loss.reshape(target.shape)
    elif reduction == "sum":
        loss = loss.sum()
    else:
        valid = row_target != ignore_index
        if weight is None:
            loss = loss.sum() / valid.sum()
        else:
            inside = (row_target >= 0) & (row_target < rows.shape[1])
            loss = loss.sum() / (weight[torch.where(inside, row_target, 0)] * valid).sum()
    return (loss, lse.reshape(target.shape)) if return_lse else loss


def _rows_for_kernel(rows: Tensor) -> Tensor:
    """``rows`` as the kernels take them, with columns next to each other; a copy only where they are not."""
    return rows if rows.shape[1] == 1 or rows.stride(1) == 1 else rows.contiguous()
