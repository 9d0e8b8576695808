"""Distillation: the divergence of a student's head from a teacher, whose logits nobody holds in full."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from . import ops, reference
from .backends import BackendName, Call, choose
from .checks import (
    IGNORE_INDEX,
    Reduction,
    autocast_enabled,
    check_classes,
    check_device,
    check_floating,
    check_temperature,
    check_tensor,
    check_transform,
)
from .functional import for_kernels, rows_of
from .gradients_ahead import output_mask
from .groups import Divergence, Head, Teacher
from .linear import autocast_input
from .token_loss import linear_token_loss
from .token_loss_head import Tokens
from .transforms import MonotonicTransform
from .transforms.base import arithmetic_dtype

DivergenceName = Literal["forward_kl", "reverse_kl", "jsd"]
Remaining = Literal["drop", "one_class"]


def linear_distillation(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    student_transform: MonotonicTransform | None = None,
    teacher_transform: MonotonicTransform | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    divergence: DivergenceName = "forward_kl",
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    backend: BackendName = "auto",
) -> Tensor:
    r"""The divergence of the student's p from the teacher's q, :math:`p = \mathrm{softmax}(f(z) / \tau)` both.

    ================  ============================================================================================
    divergence        loss of a row
    ================  ============================================================================================
    ``"forward_kl"``  :math:`\mathrm{KL}(q, p) = \sum_j q_j (\log q_j - \log p_j)`
    ``"reverse_kl"``  :math:`\mathrm{KL}(p, q) = \sum_j p_j (\log p_j - \log q_j)`
    ``"jsd"``         :math:`\beta\,\mathrm{KL}(q, m) + (1 - \beta)\,\mathrm{KL}(p, m)`, m = beta q + (1 - beta) p
    ================  ============================================================================================

    A fused backend forms the logits of both heads for a chunk of rows at a time. Where the gradients of a mean or sum
    are needed, it computes them in the forward pass: two products, and two of the student's gradients. For
    ``reduction="none"`` the backward pass computes the logits of both again. The teacher gets no gradient. The losses
    are not multiplied by :math:`\tau^2`, as Hinton et al. propose for gradients of one size at every temperature:
    multiply by it where you want that.

    Args:
        student_input, student_weight, student_bias: (..., d), (V, d) and (V,): the student's head.
        teacher_input, teacher_weight, teacher_bias: (..., e), (V, e) and (V,): the teacher's, of the dtype of the
            student's.
        student_transform, teacher_transform: their f; ``None`` is the identity.
        divergence: see above.
        beta: for ``"jsd"``, in (0, 1); it is not used otherwise.
        temperature: of both, as in :func:`cross_entropy`.
        mask: bool, (...): where it is False, the row has loss 0 and no gradient, whatever it holds.
        reduction: ``"mean"`` divides by the number of rows that are not masked, and is 0 where there are none.
        backend: as in :func:`cross_entropy`.

    Returns:
        The loss, a scalar or, for ``reduction="none"``, (...); float32 (float64 for float64). For a reverse KL it is
        +inf where some q is 0 and p is not.

    Raises:
        TypeError, ValueError, NotImplementedError: as in :func:`linear_cross_entropy`.

    Source: Hinton et al., *Distilling the Knowledge in a Neural Network*, 2015; for jsd, Agarwal et al., *On-Policy
    Distillation of Language Models*, 2024.

    Example:
        >>> student, teacher = torch.nn.Linear(16, 1_000), torch.nn.Linear(64, 1_000)
        >>> small, large = torch.randn(2, 8, 16), torch.randn(2, 8, 64)
        >>> loss = monosoftmax.linear_distillation(
        ...     small, student.weight, large, teacher.weight, monosoftmax.transforms.PLIF(),
        ...     student_bias=student.bias, teacher_bias=teacher.bias, divergence="jsd", temperature=2.0,
        ... )
        >>> loss.backward()
        >>> student.weight.grad.shape
        torch.Size([1000, 16])
    """
    f, g = check_transform(student_transform), check_transform(teacher_transform)
    student = Head(student_input, student_weight, student_bias)
    teacher = Head(teacher_input, teacher_weight, teacher_bias)
    _check_heads(student, teacher)
    _check_divergence(divergence, beta, reduction)
    shape, device = student_input.shape[:-1], student_input.device
    check_device("student_transform", f, device)
    check_device("teacher_transform", g, device)
    keep = _checked_mask(mask, shape, device)
    tau = check_temperature(temperature, student_input)
    call = Call("linear_distillation", device.type, student_input.dtype, f, classes=student_weight.shape[0])
    # Both transforms must have kernels, of one backend.
    chosen = choose(call, "reference" if choose(call._replace(transform=g), backend) == "reference" else backend)
    rows, of_teacher = rows_of(student_input), rows_of(teacher_input.detach())
    if keep is not None:
        # A masked row may hold NaN, which an upstream gradient of 0 would not keep out of the sums.
        rows, of_teacher = (each.masked_fill(~keep.unsqueeze(1), 0.0) for each in (rows, of_teacher))
    scale = _scale(rows, keep, reduction)
    if chosen == "reference":
        with torch.no_grad():
            log_q = reference.log_softmax(F.linear(of_teacher, teacher_weight, teacher_bias), g, scale.dtype, tau)
        z = F.linear(rows, student_weight, student_bias)
        losses = reference.divergence(reference.log_softmax(z, f, scale.dtype, tau), log_q, divergence, beta)
        return (losses * scale).reshape(shape) if reduction == "none" else (losses * scale).sum()
    rows, of_teacher = autocast_input(rows), autocast_input(of_teacher)
    transform = for_kernels(f, rows, tau)
    with torch.no_grad():
        bias = None if teacher_bias is None else teacher_bias.detach()
        fixed = Teacher(of_teacher, teacher_weight.detach(), bias, *for_kernels(g, of_teacher, tau))
    operands = (rows, student_weight, student_bias, transform.coefficients)
    results = ops.linear_distillation(
        ops.LinearDistillation(
            backend=chosen,
            head=Head(rows, student_weight, student_bias),
            transform=transform,
            teacher=fixed,
            divergence=Divergence(divergence, float(beta)),
            scale=None if reduction == "none" else scale,
            output_mask=output_mask(operands, chosen, False if reduction == "none" else None),
        )
    )
    return (results.loss * scale).reshape(shape) if reduction == "none" else results.total


def linear_topk_distillation(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_log_prob: Tensor,
    teacher_classes: Tensor,
    student_transform: MonotonicTransform | None = None,
    *,
    student_bias: Tensor | None = None,
    remaining: Remaining = "one_class",
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    backend: BackendName = "auto",
) -> Tensor:
    r"""KL(q, p) where of the teacher's q only the k most probable classes of each row are stored.

    .. math:: \sum_{j \le k} q_j (\log q_j - \log p_j) + r (\log r - \log s), \qquad r = 1 - \sum_{j \le k} q_j, \quad
        s = 1 - \sum_{j \le k} p_j

    with p over all V classes. ``remaining="one_class"`` takes what the teacher gives to all other classes for one
    class, which is the last term; ``"drop"`` leaves it out: then the loss may be negative, and lets the student do
    anything with the remaining mass but pull it from the k classes. Neither divides the stored q by their sum: do so
    before, where you want that. The gradients come from three products (:func:`linear_token_loss`).

    Args:
        student_input, student_weight, student_bias, student_transform, mask, reduction, backend: as in
            :func:`linear_distillation`.
        teacher_log_prob: (..., k): log q of the classes, at the temperature of the student.
        teacher_classes: (..., k), int64: the classes, different from each other in each row.
        remaining: see above.
        temperature: of the student.

    Returns:
        A scalar; float32 (float64 for float64).

    Raises:
        TypeError, ValueError, NotImplementedError, IndexError: as in :func:`linear_cross_entropy`.

    Example:
        >>> student, large = torch.nn.Linear(16, 1_000, bias=False), torch.randn(8, 1_000)
        >>> log_prob, classes = large.log_softmax(-1).topk(20)
        >>> loss = monosoftmax.linear_topk_distillation(torch.randn(8, 16), student.weight, log_prob, classes)
        >>> loss.backward()
        >>> student.weight.grad.shape
        torch.Size([1000, 16])
    """
    if remaining not in get_args(Remaining):
        raise ValueError(f"remaining must be one of {', '.join(get_args(Remaining))}, got {remaining!r}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum", got {reduction!r}')
    check_floating("teacher_log_prob", teacher_log_prob)
    check_tensor("teacher_classes", teacher_classes)
    if teacher_log_prob.shape != teacher_classes.shape or teacher_classes.dim() == 0:
        raise ValueError(
            f"teacher_log_prob and teacher_classes must have the same shape (..., k), got "
            f"{tuple(teacher_log_prob.shape)} and {tuple(teacher_classes.shape)}"
        )
    check_floating("student_input", student_input)
    shape = student_input.shape[:-1]
    keep, rows = _checked_mask(mask, shape, student_input.device), student_input
    if keep is not None:
        rows = rows.masked_fill(~keep.reshape(shape).unsqueeze(-1), 0.0)
    scale = _scale(rows_of(rows), keep, reduction).reshape(shape)

    def loss_fn(tokens: Tokens, log_q: Tensor, scale: Tensor) -> Tensor:
        log_q = log_q.to(tokens.lse.dtype)
        q, log_p = log_q.exp(), tokens.class_log_prob
        loss = torch.where(q > 0, q * (log_q - log_p), 0.0).sum(1)
        if remaining == "one_class":
            # 1 - p has the rounding of p: nothing smaller can be told from 0.
            eps = torch.finfo(q.dtype).eps
            r, p = (1 - q.sum(1)).clamp(min=0.0), log_p.exp().sum(1).clamp(max=1 - eps)
            loss = loss + torch.xlogy(r, r) - r * torch.log1p(-p)
        return (loss * scale).sum()

    target = torch.full(shape, IGNORE_INDEX, dtype=torch.int64, device=student_input.device)
    return linear_token_loss(
        loss_fn, rows, student_weight, target, student_transform,
        linear_bias=student_bias, per_token=(teacher_log_prob.detach(), scale), classes=teacher_classes,
        temperature=temperature, backend=backend,
    )  # fmt: skip


def _check_heads(student: Head, teacher: Head) -> None:
    for who, head in (("student", student), ("teacher", teacher)):
        check_floating(f"{who}_input", head.input)
        check_floating(f"{who}_weight", head.linear_weight)
        if (
            head.input.dim() == 0
            or head.linear_weight.dim() != 2
            or head.input.shape[-1] != head.linear_weight.shape[1]
        ):
            raise ValueError(
                f"{who}_input (..., d) and {who}_weight (V, d) must agree in d, got {tuple(head.input.shape)} and "
                f"{tuple(head.linear_weight.shape)}"
            )
        for name, operand in ((f"{who}_weight", head.linear_weight), (f"{who}_bias", head.linear_bias)):
            if operand is None:
                continue
            check_floating(name, operand)
            if operand.device != student.input.device:
                raise ValueError(f"{name} must be on {student.input.device} like student_input, got {operand.device}")
            if operand.dtype != head.input.dtype and not autocast_enabled(operand.device.type):
                raise TypeError(f"{name} must have the dtype of {who}_input, {head.input.dtype}, got {operand.dtype}")
        if head.linear_bias is not None and head.linear_bias.shape != head.linear_weight.shape[:1]:
            classes = head.linear_weight.shape[0]
            raise ValueError(f"{who}_bias must have shape ({classes},), got {tuple(head.linear_bias.shape)}")
    check_classes(student.linear_weight.shape[0])
    for what, mine, other in (
        ("input must be on the device", student.input.device, teacher.input.device),
        ("input must have the dtype", student.input.dtype, teacher.input.dtype),
        ("input must have the rows", tuple(student.input.shape[:-1]), tuple(teacher.input.shape[:-1])),
        ("weight must have the classes", student.linear_weight.shape[0], teacher.linear_weight.shape[0]),
    ):
        if mine != other:
            raise ValueError(f"teacher_{what} of the student's, {mine}, got {other}")


def _check_divergence(divergence: str, beta: float, reduction: str) -> None:
    if divergence not in get_args(DivergenceName):
        raise ValueError(f"divergence must be one of {', '.join(get_args(DivergenceName))}, got {divergence!r}")
    if divergence == "jsd" and not 0 < beta < 1:
        raise ValueError(f"beta must be between 0 and 1, got {beta}")
    if reduction not in get_args(Reduction):
        raise ValueError(f'reduction must be "none", "mean" or "sum", got {reduction!r}')


def _checked_mask(mask: Tensor | None, shape: torch.Size, device: torch.device) -> Tensor | None:
    """The mask as [N]."""
    if mask is None:
        return None
    check_tensor("mask", mask)
    if mask.dtype != torch.bool or mask.shape != shape or mask.device != device:
        raise ValueError(
            f"mask must be bool, of shape {tuple(shape)} and on {device}, got {mask.dtype}, {tuple(mask.shape)} and "
            f"{mask.device}"
        )
    return mask.reshape(-1)


def _scale(rows: Tensor, keep: Tensor | None, reduction: str) -> Tensor:
    """The factor [N] of each loss in the result."""
    dtype = arithmetic_dtype(rows.dtype)
    scale = rows.new_ones(rows.shape[0], dtype=dtype) if keep is None else keep.to(dtype)
    return scale / scale.sum().clamp(min=1) if reduction == "mean" else scale
