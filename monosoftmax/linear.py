"""The loss fused with the LM head: the public function checks arguments, picks the backend and reduces losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from . import ops, reference
from .backends import BackendName, Call, choose, head_method, target_kind
from .candidates import Candidates
from .checks import (
    IGNORE_INDEX,
    HeadMethod,
    Reduction,
    ZLossDivisor,
    autocast_enabled,
    check_classes,
    check_device,
    check_floating,
    check_head,
    check_head_options,
    check_ignore_index,
    check_loss_options,
    check_target,
    check_temperature,
    check_tensor,
    check_transform,
    check_z_loss_divisor,
)
from .dtensor_calls import takes_dtensors
from .functional import (
    Losses,
    LossKeywords,
    Tempered,
    TokenStatistics,
    for_kernels,
    losses_of_rows,
    reshaped,
    rows_for_kernel,
    rows_of,
    statistics_of_rows,
    typed,
    with_z_loss,
)
from .gradients_ahead import output_mask
from .groups import Head, HeadOptions, LossOptions
from .reductions import normalizer
from .transforms import MonotonicTransform

if TYPE_CHECKING:
    from typing_extensions import Unpack


class HeadCall(NamedTuple):
    """What a call of the head asks for beside its loss: see :func:`linear_cross_entropy`."""

    method: HeadMethod = "auto"
    #: 0 leaves them to the backend.
    chunk_rows: int = 0
    filter_eps: float = 0.0
    grad_in_forward: bool | None = None
    return_log_prob: bool = False
    return_statistics: bool = False
    temperature: float | Tensor = 1.0
    candidates: Tensor | None = None
    z_loss_divisor: ZLossDivisor = "loss"


class _HeadKeywords(LossKeywords, total=False):
    linear_bias: Tensor | None
    method: HeadMethod
    chunk_rows: int | None
    filter_eps: float
    grad_in_forward: bool | None


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    transform: MonotonicTransform | None = ...,
    *,
    return_lse: Literal[False] = ...,
    return_statistics: Literal[False] = ...,
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
    return_statistics: Literal[False] = ...,
    **options: Unpack[_HeadKeywords],
) -> tuple[Tensor, Tensor]: ...
@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    transform: MonotonicTransform | None = ...,
    *,
    return_lse: bool = ...,
    return_statistics: Literal[True],
    **options: Unpack[_HeadKeywords],
) -> tuple[Any, ...]: ...
@takes_dtensors
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
    return_statistics: bool = False,
    temperature: float | Tensor = 1.0,
    candidates: Tensor | None = None,
    z_loss_divisor: ZLossDivisor = "loss",
    backend: BackendName = "auto",
    method: HeadMethod = "auto",
    chunk_rows: int | None = None,
    filter_eps: float = 0.0,
    grad_in_forward: bool | None = None,
) -> Any:
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
        linear_weight: (V, d), of the dtype of ``input`` (or any, under autocast). As for
            ``torch.nn.functional.linear_cross_entropy`` also (V, d1, ..., dK, d) for an ``input`` (N, d): K-dimensional
            losses, one head (V, d) for each place.
        target: class indices, int64 or uint8, of the shape of ``input`` without d, or (N, d1, ..., dK). Or class
            probabilities: (..., V), or (N, V, d1, ..., dK).
        linear_bias: (V,), or (V, d1, ..., dK).
        transform, weight, ignore_index, label_smoothing, z_loss, reduction, return_lse, temperature, z_loss_divisor,
        backend: as in :func:`cross_entropy`.
        return_statistics: as in :func:`cross_entropy`; from the logits of the loss, without another product.
        candidates: as in :func:`cross_entropy`. Their rows of ``linear_weight`` are copied; there are no logits of the
            others.
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
    check_z_loss_divisor(z_loss_divisor)
    how = HeadCall(
        method, chunk_rows or 0, filter_eps, grad_in_forward, return_statistics=return_statistics,
        temperature=temperature, candidates=candidates, z_loss_divisor=z_loss_divisor,
    )  # fmt: skip
    head = Head(input, linear_weight, linear_bias)
    if not isinstance(linear_weight, Tensor) or linear_weight.dim() <= 2:
        losses = linear_losses(head, target, transform, options, how, reduction=reduction, backend=backend)
        return losses.result(return_lse)
    target = _check_places(head, target)
    check_loss_options(options, len(linear_weight), input.device, reduction)

    def losses_of(options: LossOptions) -> Losses:
        return _losses_of_places(head, target, transform, options, how, reduction=reduction, backend=backend)

    return with_z_loss(losses_of, options, target, reduction, z_loss_divisor).result(return_lse)


def _check_places(head: Head, target: Tensor) -> Tensor:
    """Checks the shapes of a weight (V, d1, ..., dK, d) and its companions; ``target`` as check_target returns it."""
    input, weight, bias = head
    check_floating("input", input)
    check_tensor("linear_weight", weight)
    check_tensor("target", target)
    if bias is not None:
        check_tensor("linear_bias", bias)
    if input.dim() != 2:
        raise ValueError(f"input must be (N, d) for linear_weight {tuple(weight.shape)}, got {tuple(input.shape)}")
    classes, *places = weight.shape[:-1]
    check_classes(classes)
    if math.prod(places) == 0:
        raise ValueError(f"linear_weight must have at least 1 place, got shape {tuple(weight.shape)}")
    probabilities = target.is_floating_point()
    wanted = (len(input), classes, *places) if probabilities else (len(input), *places)
    for name, tensor, shape in (("target", target, wanted), ("linear_bias", bias, (classes, *places))):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    return target if probabilities else check_target(target, input.device, target.shape)


def _losses_of_places(
    head: Head,
    target: Tensor,
    transform: MonotonicTransform | None,
    options: LossOptions,
    how: HeadCall,
    *,
    reduction: Reduction,
    backend: BackendName,
) -> Losses:
    """:func:`linear_losses` of a weight (V, d1, ..., dK, d): of a head for each of the d1 ... dK places."""
    input, weight, bias = head
    classes, *places = weight.shape[:-1]
    probabilities, count = target.is_floating_point(), math.prod(places)
    weights = weight.reshape(classes, count, weight.shape[-1]).unbind(1)
    biases = [None] * count if bias is None else bias.reshape(classes, count).unbind(1)
    flat = target.reshape(len(input), classes, count) if probabilities else target.reshape(-1, count)
    targets = flat.unbind(-1)
    each_reduction: Reduction = "none" if reduction == "none" else "sum"
    each = [
        linear_losses(Head(input, w, b), t, transform, options, how, reduction=each_reduction, backend=backend)
        for w, b, t in zip(weights, biases, targets, strict=True)
    ]
    total: Tensor | None = None
    if reduction != "none":
        total = torch.stack([found.total for found in each if found.total is not None]).sum()
        if reduction == "mean":
            of_rows = rows_of(flat.movedim(1, -1)) if probabilities else flat.reshape(-1)
            divisor = normalizer(reduction, of_rows, typed(options, input), classes, total.dtype)
            assert divisor is not None
            total = total / divisor

    def joined(columns: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(columns), 1).reshape(len(input), *places)

    statistics = [found.statistics for found in each if found.statistics is not None]
    return Losses(
        joined([found.rows for found in each]),
        joined([found.lse for found in each]),
        total,
        statistics=TokenStatistics(*map(joined, zip(*statistics, strict=True))) if statistics else None,
    )


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
    transform = check_transform(transform)
    target, classes = check_head(head, target, probabilities=True), head.linear_weight.shape[0]
    kind, input = target_kind(target), head.input
    check_loss_options(options, classes, input.device, reduction)
    if kind != "indices" and (how.return_statistics or how.method == "recompute"):
        raise ValueError('class probabilities as target take neither return_statistics nor method="recompute"')
    if how.return_statistics and how.method == "recompute":
        raise ValueError('return_statistics is for chunks of logits, which method="recompute" does not have')
    if kind != "indices" and options.ignore_index != IGNORE_INDEX:
        raise ValueError(
            f"ignore_index must be left at its default, {IGNORE_INDEX}, where target is class probabilities, of which "
            f"none are ignored: got {options.ignore_index}"
        )
    check_device("transform", transform, input.device)
    call = Call(
        "linear_cross_entropy",
        input.device.type,
        input.dtype,
        transform,
        how.method,
        has_chunk_rows=how.chunk_rows > 0,
        has_grad_in_forward=how.grad_in_forward is not None,
        target_kind=kind,
        classes=classes,
    )
    chosen, f = choose(call, backend), Tempered(transform, check_temperature(how.temperature, input))
    head, shape = head._replace(input=rows_of(input)), input.shape[:-1]
    target = target.reshape(-1) if kind == "indices" else rows_of(target)
    allowed: Candidates | None = None
    if how.candidates is not None:
        allowed = Candidates.of(how.candidates, classes, input.device)
        head = allowed.of_head(head)
        target = allowed.of_target(target, options.ignore_index) if kind == "indices" else allowed.of_columns(target)
        options = allowed.of_options(options)

    def losses_of(options: LossOptions) -> Losses:
        return _losses_of_head(chosen, head, target, f, options=options, how=how, reduction=reduction)

    found = with_z_loss(losses_of, options, target, reduction, how.z_loss_divisor)
    if allowed is not None and found.statistics is not None:
        statistics = found.statistics._replace(argmax=allowed.classes[found.statistics.argmax])
        found = found._replace(statistics=statistics)
    return reshaped(found, shape)


def _losses_of_head(
    chosen: str,
    head: Head,
    target: Tensor,
    transform: Tempered,
    *,
    options: LossOptions,
    how: HeadCall,
    reduction: Reduction,
) -> Losses:
    """:func:`linear_losses` of rows [N, d] on a backend."""
    rows, linear_weight, linear_bias = head
    if chosen == "reference":
        logits = F.linear(rows, linear_weight, linear_bias)
        losses = losses_of_rows(chosen, logits, target, transform, options, reduction=reduction)
        if how.return_log_prob:
            plain = LossOptions(None, options.ignore_index, 0.0, 0.0, False)
            log_prob = -reference.cross_entropy(logits, target, transform.f, plain, transform.temperature)[0]
            losses = losses._replace(log_prob=log_prob)
        if how.return_statistics:
            with torch.no_grad():
                found = statistics_of_rows(chosen, logits, target, transform, options.ignore_index)
            losses = losses._replace(statistics=found)
        return losses
    rows = autocast_input(rows)
    target = rows_for_kernel(target) if target.dim() == 2 else target
    if how.return_statistics:
        options = options._replace(return_lse=True)
    options, f = typed(options, rows), for_kernels(transform.f, rows, transform.temperature)
    operands = (rows, linear_weight, linear_bias, f.coefficients)
    method: str = how.method
    if method == "auto":
        needed = torch.is_grad_enabled() and any([each is not None and each.requires_grad for each in operands])
        chunked = how.return_log_prob or how.return_statistics or how.chunk_rows > 0 or target.dim() == 2
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
            return_statistics=how.return_statistics,
            output_mask=output_mask(operands, chosen, wish),
        )
    )
    statistics: TokenStatistics | None = None
    if how.return_statistics:
        log_prob = results.log_prob.detach()
        statistics = TokenStatistics(log_prob, results.entropy, results.argmax, results.lse.detach(), results.rank)
    return Losses(
        results.loss,
        results.lse,
        None if reduction == "none" else results.total,
        results.log_prob if how.return_log_prob else None,
        statistics,
    )


def autocast_input(input: Tensor) -> Tensor:
    """The input of a head in the type that torch.nn.functional.linear would multiply it in.

    The operators bring the other operands to this type themselves, so that nobody holds a copy of the weight.
    """
    device = input.device.type
    if input.dtype == torch.float64 or not autocast_enabled(device):
        return input
    return input.to(torch.get_autocast_dtype(device))
