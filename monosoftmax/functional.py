"""The public functions: they check arguments, pick the backend and reduce the losses of the rows; nothing else."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from . import ops, reference
from .backends import BackendName, Call, choose, head_method, target_kind
from .checks import (
    FLOATING_DTYPES,
    HeadMethod,
    Reduction,
    autocast_enabled,
    check_class_probabilities,
    check_classes,
    check_device,
    check_floating,
    check_head,
    check_head_options,
    check_ignore_index,
    check_loss_options,
    check_target,
    check_tensor,
    check_transform,
)
from .gradients_ahead import output_mask
from .groups import Head, HeadOptions, LossOptions, Transform
from .reductions import normalizer
from .transforms import MonotonicTransform
from .transforms.base import arithmetic_dtype, coefficients_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Losses(NamedTuple):
    """The losses of the rows and lse, both of the shape of class indices, and their mean or sum, None for "none".

    ``log_prob`` is log p of the targets, 0 where they are ignored, whatever the options of the loss are; None where it
    was not asked for.
    """

    rows: Tensor
    lse: Tensor
    total: Tensor | None
    log_prob: Tensor | None = None

    def result(self, return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
        loss = self.rows if self.total is None else self.total
        return (loss, self.lse) if return_lse else loss


class HeadCall(NamedTuple):
    """What a call of the head asks for beside its loss: see :func:`linear_cross_entropy`."""

    method: HeadMethod = "auto"
    #: 0 leaves them to the backend.
    chunk_rows: int = 0
    filter_eps: float = 0.0
    grad_in_forward: bool | None = None
    return_log_prob: bool = False


class _LossKeywords(TypedDict, total=False):
    """The keyword arguments of a loss, but for ``return_lse``, on which the type of its result depends."""

    weight: Tensor | None
    ignore_index: int
    label_smoothing: float
    z_loss: float
    reduction: Reduction
    backend: BackendName


class _HeadKeywords(_LossKeywords, total=False):
    linear_bias: Tensor | None
    method: HeadMethod
    chunk_rows: int | None
    filter_eps: float
    grad_in_forward: bool | None


@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    transform: MonotonicTransform | None = ...,
    *,
    return_lse: Literal[False] = ...,
    **options: Unpack[_LossKeywords],
) -> Tensor: ...
@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    transform: MonotonicTransform | None = ...,
    *,
    return_lse: Literal[True],
    **options: Unpack[_LossKeywords],
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

    For class probabilities t, :math:`q_{ij} = ((1 - \epsilon) t_{ij} + \epsilon / V) w_j` with label smoothing
    :math:`\epsilon` and weights w; t need not add up to 1. A class with q = 0 adds nothing to the loss, also where its
    probability is 0 because its logit is -inf: PyTorch gives NaN there.

    A fused backend computes the gradient of a mean or sum together with the loss, while the logits are at hand, and
    scales it in the backward pass; where nothing needs a gradient, or under ``torch.no_grad()``, it computes the loss
    only. Other gradients (``reduction="none"``, lse) take a second pass over the logits.

    Args:
        input: logits z, (V,), (N, V) or (N, V, d1, ...); float32, bfloat16, float16 or float64.
        target: class indices, int64 or uint8, of the shape of ``input`` without V; or class probabilities, of any
            floating dtype listed for ``input`` and of the shape of ``input``. The reference and cpu backends take
            probabilities. The reference backend differentiates with respect to them, and ``"auto"`` chooses it where
            they require a gradient.
        transform: f; ``None`` is Linear-Softmax.
        weight: weight of each class, (V,).
        ignore_index: targets of this value get loss 0 and gradient 0. Not for class probabilities.
        label_smoothing: share of the target probability that is spread over all classes, in [0, 1].
        z_loss: weight of lse^2, added to the loss of every row that is not ignored; not multiplied by ``weight``.
        reduction: ``"mean"`` divides the sum by the number of rows that are not ignored (by the sum of the weights of
            their targets, where ``weight`` is given), and is NaN when there are none, as in PyTorch. For class
            probabilities it divides by the number of rows.
        return_lse: also return lse, of the shape of ``input`` without V; it is differentiable.
        backend: ``"auto"``, or a name from :func:`monosoftmax.backends.available`.

    Returns:
        The loss, a scalar or, for ``reduction="none"``, of the shape of ``input`` without V; with ``return_lse``, a
        pair.

    Raises:
        TypeError, ValueError, NotImplementedError: an argument has the wrong type, shape, dtype, device or range, or
            is of a kind (DTensor, sparse) that is not supported.
        IndexError: a target is out of range, on the CPU. On other devices, and in compiled code of the reference
            backend, the loss of that row is NaN.

    Source: Ganea et al., ICML 2019, for softmax(f(z)); z-loss: Chowdhery et al., PaLM, 2022, section 5.

    Example:
        >>> transform = monosoftmax.transforms.PLIF()
        >>> logits, target = torch.randn(4, 10_000, requires_grad=True), torch.tensor([5, 0, 9_999, -100])
        >>> loss = monosoftmax.cross_entropy(logits, target, transform, label_smoothing=0.1)
        >>> loss.backward()
        >>> logits.grad.shape, transform.raw_slope.grad.shape
        (torch.Size([4, 10000]), torch.Size([50]))
    """
    transform = check_transform(transform)
    check_floating("input", input)
    check_tensor("target", target)
    shape, dim = input.shape, input.dim()
    if dim == 0:
        raise ValueError("input must have at least 1 dimension, (V,) or (N, V, ...), got a scalar")
    class_dim = 0 if dim == 1 else 1
    classes = shape[class_dim]
    check_classes(classes)
    without_classes = shape[:class_dim] + shape[class_dim + 1 :]
    ignore_index = check_ignore_index(ignore_index)
    kind = target_kind(target)
    if kind == "indices":
        target = check_target(target, input.device, without_classes)
        if target.shape != without_classes:
            raise ValueError(
                f"target must have the shape of input without its class dimension, {tuple(without_classes)} for input "
                f"{tuple(shape)}, got {tuple(target.shape)}"
            )
    else:
        check_class_probabilities(target, input, ignore_index)
    options = LossOptions(weight, ignore_index, label_smoothing, z_loss, return_lse)
    check_loss_options(options, classes, input.device, reduction)
    check_device("transform", transform, input.device)
    call = Call("cross_entropy", input.device.type, input.dtype, transform, target_kind=kind, classes=classes)
    chosen = choose(call, backend)
    if dim != 2:
        input = rows_of(input.movedim(class_dim, -1))
        target = target.reshape(-1) if kind == "indices" else rows_of(target.movedim(class_dim, -1))
    losses = _losses_of_rows(chosen, input, target, transform, options, reduction=reduction)
    return _reshaped(losses, without_classes).result(return_lse)


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    transform: MonotonicTransform | None = ...,
    *,
    return_lse: Literal[False] = ...,
    **options: Unpack[_HeadKeywords],
) -> Tensor: ...
@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    transform: MonotonicTransform | None = ...,
    *,
    return_lse: Literal[True],
    **options: Unpack[_HeadKeywords],
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
    method: HeadMethod = "auto",
    chunk_rows: int | None = None,
    filter_eps: float = 0.0,
    grad_in_forward: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r""":func:`cross_entropy` of the logits :math:`z = \text{input}\,\text{linear\_weight}^T + \text{linear\_bias}`.

    A fused backend never holds the logits in full. It takes chunks of rows through one buffer, whose size does not
    depend on the number of rows: product, loss and, for a mean or sum that needs gradients, the gradient of the logits
    in place and the two products of it; the backward pass scales what is there. That makes three products in all, one
    under ``torch.no_grad()``, and none for what needs no gradient. Gradients that depend on more than one number, those
    of ``reduction="none"`` and of lse, cannot be computed ahead: the backward pass then computes the logits again (four
    products), and so it does under ``torch.func.grad``. What is computed ahead waits, a gradient of the weight in
    float32, until the backward pass: see ``grad_in_forward``. In bfloat16 and float16 the logits and their gradient are
    rounded to that type, as they are by PyTorch, and the gradients of ``linear_weight`` and ``linear_bias`` are summed
    over the chunks in float32 and rounded at the end; that of ``input`` is rounded twice where the upstream gradient of
    a mean or sum is not a power of two. The reference backend holds the logits in full.

    Args:
        input: (..., d).
        linear_weight: (V, d), of the dtype of ``input`` (or any, under autocast).
        target: class indices, int64 or uint8, of the shape of ``input`` without d.
        linear_bias: (V,).
        transform, weight, ignore_index, label_smoothing, z_loss, reduction, return_lse, backend: as in
            :func:`cross_entropy`.
        method: how the logits are kept out of memory: ``"chunked"`` as above; ``"recompute"``, of the triton backend,
            forms them tile by tile inside the kernels that use them, and again in the backward pass, so that no logit
            is ever in memory: its sums of gradients are atomic, in an order that changes from run to run. ``"auto"``
            is :func:`monosoftmax.backends.head_method`.
        chunk_rows: rows in a chunk; the backend chooses by default.
        filter_eps: with ``"recompute"``, tiles of logits in which no :math:`|\partial \ell_i / \partial z_{ij}|`
            exceeds ``filter_eps`` add nothing to the gradients of ``input`` and ``linear_weight``; 0 leaves nothing
            out.
        grad_in_forward: whether the gradients of a mean or sum are computed in the forward pass: True for three
            products, and gradients that wait for the backward pass; False for four products, and nothing that waits.
            None computes them ahead for one loss at a time, and for more as long as all that waits on the device is
            at most 64 MiB (:data:`monosoftmax.gradients_ahead.BESIDES_ONE`), so that many losses before one backward
            pass do not hold a gradient of the weight each; ``torch.compile``, which cannot tell, takes True. Within
            ``torch.utils.checkpoint``, which drops what waits, False saves a product.

    Returns:
        As :func:`cross_entropy`.

    Raises:
        As :func:`cross_entropy`.

    Source: for gradients in the forward pass over chunks, Hsu et al., *Liger Kernel: Efficient Triton Kernels for LLM
    Training*, 2024.

    Example:
        >>> head = torch.nn.Linear(64, 10_000, bias=False)
        >>> hidden, target = torch.randn(2, 8, 64), torch.randint(10_000, (2, 8))
        >>> loss = monosoftmax.linear_cross_entropy(hidden, head.weight, target, monosoftmax.transforms.PLIF())
        >>> loss.backward()
        >>> head.weight.grad.shape
        torch.Size([10000, 64])
    """
    options = LossOptions(weight, check_ignore_index(ignore_index), label_smoothing, z_loss, return_lse)
    check_head_options(method, chunk_rows, filter_eps, grad_in_forward, reduction)
    losses = linear_losses(
        Head(input, linear_weight, linear_bias),
        target,
        transform,
        options,
        HeadCall(method, chunk_rows or 0, filter_eps, grad_in_forward),
        reduction=reduction,
        backend=backend,
    )
    return losses.result(return_lse)


def linear_losses(
    head: Head,
    target: Tensor,
    transform: MonotonicTransform | None,
    options: LossOptions,
    how: HeadCall,
    *,
    reduction: Reduction,
    backend: BackendName,
) -> Losses:
    """:func:`linear_cross_entropy`: the losses of the rows and their mean or sum both, and log p of the targets."""
    input, linear_weight, linear_bias = head
    transform = check_transform(transform)
    target, classes = check_head(head, target), linear_weight.shape[0]
    check_loss_options(options, classes, input.device, reduction)
    check_device("transform", transform, input.device)
    call = Call(
        "linear_cross_entropy",
        input.device.type,
        input.dtype,
        transform,
        how.method,
        has_chunk_rows=how.chunk_rows > 0,
        has_grad_in_forward=how.grad_in_forward is not None,
        classes=classes,
    )
    chosen = choose(call, backend)
    rows, shape = rows_of(input), target.shape
    target = target if target.dim() == 1 else target.reshape(-1)
    if chosen == "reference":
        logits = F.linear(rows, linear_weight, linear_bias)
        losses = _losses_of_rows(chosen, logits, target, transform, options, reduction=reduction)
        if how.return_log_prob:
            plain = LossOptions(None, options.ignore_index, 0.0, 0.0, False)
            losses = losses._replace(log_prob=-reference.cross_entropy(logits, target, transform, plain)[0])
        return _reshaped(losses, shape)
    rows = autocast_input(rows)
    options, f = _typed(options, rows), for_kernels(transform, rows)
    operands = (rows, linear_weight, linear_bias, f.coefficients)
    method: str = how.method
    if method == "auto":
        needed = torch.is_grad_enabled() and any([each is not None and each.requires_grad for each in operands])
        chunked = how.return_log_prob or how.chunk_rows > 0
        method = "chunked" if chunked else head_method(chosen, rows.shape[1], rows.dtype, needed)
    wish = False if reduction == "none" or method == "recompute" else how.grad_in_forward
    results = ops.linear_cross_entropy(
        ops.LinearCrossEntropy(
            backend=chosen,
            head=Head(rows, linear_weight, linear_bias),
            target=target,
            transform=f,
            options=options,
            head_options=HeadOptions(method, how.chunk_rows, how.filter_eps),
            reduction=reduction,
            return_log_prob=how.return_log_prob,
            output_mask=output_mask(operands, chosen, wish),
        )
    )
    total = None if reduction == "none" else results.total
    return _reshaped(Losses(results.loss, results.lse, total, results.log_prob if how.return_log_prob else None), shape)


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
            rounded once. The cuda backend has no float64 results.
        backend: ``"auto"``, or a name from :func:`monosoftmax.backends.available`.

    Returns:
        (..., V).

    Raises:
        TypeError, ValueError, NotImplementedError: as in :func:`cross_entropy`.

    Example:
        >>> log_p = monosoftmax.log_softmax(torch.randn(4, 10_000), monosoftmax.transforms.PLIF())
        >>> torch.allclose(log_p.exp().sum(-1), torch.ones(4))
        True
    """
    transform = check_transform(transform)
    check_floating("input", input)
    if input.dim() == 0:
        raise ValueError("input must have at least 1 dimension, (..., V), got a scalar")
    classes = input.shape[-1]
    check_classes(classes)
    if dtype is None:
        dtype = arithmetic_dtype(input.dtype)
    elif dtype not in FLOATING_DTYPES:
        raise TypeError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype}")
    check_device("transform", transform, input.device)
    call = Call("log_softmax", input.device.type, input.dtype, transform, classes=classes, result_dtype=dtype)
    chosen = choose(call, backend)
    rows = rows_of(input)
    if chosen == "reference":
        output = reference.log_softmax(rows, transform, dtype)
    else:
        rows = rows_for_kernel(rows)
        output = ops.log_softmax(ops.LogSoftmax(chosen, rows, for_kernels(transform, rows), dtype)).output
    return output.reshape(input.shape)


def _losses_of_rows(
    backend: str,
    rows: Tensor,
    target: Tensor,
    transform: MonotonicTransform,
    options: LossOptions,
    *,
    reduction: Reduction,
) -> Losses:
    """The losses of logits ``rows`` [N, V] for class indices [N] or class probabilities [N, V]."""
    options = _typed(options, rows)
    if backend == "reference":
        loss, lse = reference.cross_entropy(rows, target, transform, options)
        divisor = normalizer(reduction, target, options, rows.shape[1], loss.dtype)
        return Losses(loss, lse, None if divisor is None else loss.sum() / divisor)
    rows, f = rows_for_kernel(rows), for_kernels(transform, rows)
    target = rows_for_kernel(target) if target.dim() == 2 else target
    results = ops.cross_entropy(
        ops.CrossEntropy(
            backend=backend,
            input=rows,
            target=target,
            transform=f,
            options=options,
            reduction=reduction,
            output_mask=output_mask((rows, f.coefficients), backend, False if reduction == "none" else None),
        )
    )
    return Losses(results.loss, results.lse, None if reduction == "none" else results.total)


def _typed(options: LossOptions, rows: Tensor) -> LossOptions:
    """``options`` with the weight in the arithmetic type."""
    if options.weight is None:
        return options
    return options._replace(weight=options.weight.to(arithmetic_dtype(rows.dtype)))


def for_kernels(transform: MonotonicTransform, input: Tensor) -> Transform:
    assert transform.kernel is not None  # backends.choose() has made sure
    coefficients = coefficients_of(transform, input.device, arithmetic_dtype(input.dtype))
    return Transform(coefficients, transform.kernel, list(transform.constants()))


def autocast_input(input: Tensor) -> Tensor:
    """The input of a head in the type that torch.nn.functional.linear would multiply it in.

    The operators bring the other operands to this type themselves, so that nobody holds a copy of the weight.
    """
    device = input.device.type
    if input.dtype == torch.float64 or not autocast_enabled(device):
        return input
    return input.to(torch.get_autocast_dtype(device))


def rows_of(input: Tensor) -> Tensor:
    """``input`` (..., V) as [N, V]. V may be 0, from which reshape() could not tell N."""
    return input if input.dim() == 2 else input.reshape(math.prod(input.shape[:-1]), input.shape[-1])


def rows_for_kernel(rows: Tensor) -> Tensor:
    """``rows`` as the kernels take them, with columns next to each other; a copy only where they are not."""
    return rows if rows.shape[1] == 1 or rows.stride(1) == 1 else rows.contiguous()


def _reshaped(losses: Losses, shape: torch.Size) -> Losses:
    """What ``losses`` say of each row, in the shape of the targets."""
    if losses.rows.shape == shape:
        return losses
    log_prob = None if losses.log_prob is None else losses.log_prob.reshape(shape)
    return Losses(losses.rows.reshape(shape), losses.lse.reshape(shape), losses.total, log_prob)
