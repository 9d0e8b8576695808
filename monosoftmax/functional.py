"""The public functions: they check arguments, pick the backend and reduce the losses of the rows; nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor

from . import in_place, ops, reference
from .backends import BackendName, Call, choose, target_kind
from .candidates import Candidates
from .checks import (
    FLOATING_DTYPES,
    Reduction,
    ZLossDivisor,
    check_class_probabilities,
    check_classes,
    check_device,
    check_floating,
    check_ignore_index,
    check_loss_options,
    check_target,
    check_temperature,
    check_tensor,
    check_transform,
    check_z_loss_divisor,
)
from .dtensor_calls import takes_dtensors
from .gradients_ahead import output_mask
from .groups import LossOptions, Transform
from .reductions import normalizer
from .transforms import MonotonicTransform
from .transforms.base import arithmetic_dtype, coefficients_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


class TokenStatistics(NamedTuple):
    """What :func:`monosoftmax.linear_token_statistics` says of each token, in the shape of the targets."""

    log_prob: Tensor
    entropy: Tensor
    argmax: Tensor
    lse: Tensor
    rank: Tensor

    def reshape(self, shape: torch.Size) -> TokenStatistics:
        return TokenStatistics(*(each.reshape(shape) for each in self))


class Losses(NamedTuple):
    """The losses of the rows and lse, both of the shape of class indices, and their mean or sum, None for "none".

    ``log_prob`` is log p of the targets, 0 where they are ignored, whatever the options of the loss are; None where it
    was not asked for, and so are the statistics.
    """

    rows: Tensor
    lse: Tensor
    total: Tensor | None
    log_prob: Tensor | None = None
    statistics: TokenStatistics | None = None

    def result(self, return_lse: bool) -> Any:
        """The loss; a tuple where lse or statistics were asked for."""
        loss = self.rows if self.total is None else self.total
        more = [*([self.lse] if return_lse else []), *([] if self.statistics is None else [self.statistics])]
        return (loss, *more) if more else loss


class Tempered(NamedTuple):
    """f and the temperature behind it."""

    f: MonotonicTransform
    temperature: Tensor | None


class LossKeywords(TypedDict, total=False):
    """The keyword arguments of a loss, but for ``return_lse``, on which the type of its result depends."""

    weight: Tensor | None
    ignore_index: int
    label_smoothing: float
    z_loss: float
    reduction: Reduction
    temperature: float | Tensor
    candidates: Tensor | None
    z_loss_divisor: ZLossDivisor
    backend: BackendName


@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    transform: MonotonicTransform | None = ...,
    *,
    return_lse: Literal[False] = ...,
    return_statistics: Literal[False] = ...,
    inplace: bool = ...,
    **options: Unpack[LossKeywords],
) -> Tensor: ...
@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    transform: MonotonicTransform | None = ...,
    *,
    return_lse: Literal[True],
    return_statistics: Literal[False] = ...,
    inplace: bool = ...,
    **options: Unpack[LossKeywords],
) -> tuple[Tensor, Tensor]: ...
@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    transform: MonotonicTransform | None = ...,
    *,
    return_lse: bool = ...,
    return_statistics: Literal[True],
    inplace: bool = ...,
    **options: Unpack[LossKeywords],
) -> tuple[Any, ...]: ...
@takes_dtensors
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
    return_statistics: bool = False,
    temperature: float | Tensor = 1.0,
    candidates: Tensor | None = None,
    z_loss_divisor: ZLossDivisor = "loss",
    inplace: bool = False,
    backend: BackendName = "auto",
) -> Any:
    r"""Cross entropy of :math:`p = \mathrm{softmax}(f(z))`; :func:`torch.nn.functional.cross_entropy` for f = identity.

    .. math:: \ell_i = \sum_j q_{ij} (\mathrm{lse}_i - y_{ij}) + \text{z\_loss}\cdot \mathrm{lse}_i^2,
        \qquad y = f(z) / \tau, \qquad \mathrm{lse}_i = \log \sum_j e^{y_{ij}}

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
            floating dtype listed for ``input`` and of the shape of ``input``. The reference backend differentiates with
            respect to probabilities, and ``"auto"`` chooses it where they require a gradient.
        transform: f; ``None`` is Linear-Softmax.
        weight: weight of each class, (V,).
        ignore_index: targets of this value get loss 0 and gradient 0. Not for class probabilities.
        label_smoothing: share of the target probability that is spread over all classes, in [0, 1].
        z_loss: weight of lse^2, added to the loss of every row that is not ignored; not multiplied by ``weight``.
        reduction: ``"mean"`` divides the sum by the number of rows that are not ignored (by the sum of the weights of
            their targets, where ``weight`` is given), and is NaN when there are none, as in PyTorch. For class
            probabilities it divides by the number of rows.
        return_lse: also return lse, of the shape of ``input`` without V; it is differentiable.
        temperature: :math:`\tau > 0`, by which f(z) is divided: a number, or a 0-dim tensor on the device of ``input``,
            which nothing waits for: if it is not positive, all results are NaN. It gets no gradient; for one that is
            learned, see :class:`monosoftmax.transforms.Temperature`.
        return_statistics: also return :class:`monosoftmax.TokenStatistics` of each row, without gradients: log p,
            entropy, argmax, lse and rank. Not for class probabilities.
        candidates: the classes that this call allows, a mask (V,) of bool or different indices (C,) of int64; ``None``:
            all. The others have probability 0 exactly, even where f(-inf) is finite. Targets must be among them; what
            class probabilities give to the others is dropped, and labels are smoothed over the candidates. Their logits
            are copied. A mask on a GPU waits for the device, indices do not.
        z_loss_divisor: what the sum of the z-losses is divided by in a mean where ``weight`` is given: ``"loss"``, by
            what the loss is divided by, the sum of the weights; ``"rows"``, as Liger does, by the number of rows that
            are not ignored (the gradients then take a second pass).
        inplace: let the gradient of a mean or sum overwrite the memory of ``input`` in the forward pass, so that no
            other memory of its size is needed. ``input`` then holds no logits any more, autograd knows that it has
            changed, and its gradient can be handed out once. In half precision an upstream gradient that is not a power
            of two rounds it a second time. Of fused backends.
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
    check_z_loss_divisor(z_loss_divisor)
    f = Tempered(transform, check_temperature(temperature, input))
    call = Call(
        "cross_entropy", input.device.type, input.dtype, transform, target_kind=kind, classes=classes, inplace=inplace
    )
    chosen = choose(call, backend)
    rows = input
    if dim != 2:
        rows = rows_of(input.movedim(class_dim, -1))
        target = target.reshape(-1) if kind == "indices" else rows_of(target.movedim(class_dim, -1))
    if return_statistics and kind != "indices":
        raise ValueError("return_statistics must be False where target is class probabilities, got True")
    if inplace:
        apart = z_loss_apart(options, target, reduction, z_loss_divisor)
        if reduction == "none" or return_lse or candidates is not None or apart:
            raise ValueError(
                'inplace must be False with reduction="none", return_lse, candidates, or z_loss_divisor="rows" for '
                "weighted losses: the gradient overwrites the logits in the forward pass"
            )
        if rows.data_ptr() != input.data_ptr() or not is_writable(rows):
            raise ValueError(
                "inplace needs the classes of input next to each other, and each row in memory of its own, got strides "
                f"{input.stride()}"
            )
    allowed: Candidates | None = None
    if candidates is not None:
        allowed = Candidates.of(candidates, classes, input.device)
        rows = allowed.of_columns(rows)
        target = allowed.of_target(target, ignore_index) if kind == "indices" else allowed.of_columns(target)
        options = allowed.of_options(options)
    statistics: TokenStatistics | None = None
    if return_statistics:
        with torch.no_grad():
            statistics = statistics_of_rows(chosen, rows.detach(), target, f, options.ignore_index)
        if allowed is not None:
            statistics = statistics._replace(argmax=allowed.classes[statistics.argmax])

    def of_rows(options: LossOptions) -> Losses:
        if inplace and torch.is_grad_enabled() and rows.requires_grad:
            return loss_in_place(chosen, rows, target, f, options, reduction=reduction)
        return losses_of_rows(chosen, rows, target, f, options, reduction=reduction)

    losses = with_z_loss(of_rows, options, target, reduction, z_loss_divisor)._replace(statistics=statistics)
    return reshaped(losses, without_classes).result(return_lse)


@takes_dtensors
def log_softmax(
    input: Tensor,
    transform: MonotonicTransform | None = None,
    *,
    dtype: torch.dtype | None = None,
    temperature: float | Tensor = 1.0,
    backend: BackendName = "auto",
) -> Tensor:
    r"""Log-probabilities :math:`f(z) / \tau - \mathrm{lse}` over the last dimension.

    Args:
        input: logits z, (..., V); float32, bfloat16, float16 or float64.
        transform: f; ``None`` is Linear-Softmax.
        dtype: of the result; float32 by default, float64 for float64. Arithmetic is in float32 or float64 in any case,
            rounded once. The cuda backend has no float64 results.
        temperature: :math:`\tau`, as in :func:`cross_entropy`.
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
    chosen, tau = choose(call, backend), check_temperature(temperature, input)
    rows = rows_of(input)
    if chosen == "reference":
        output = reference.log_softmax(rows, transform, dtype, tau)
    else:
        rows = rows_for_kernel(rows)
        output = ops.log_softmax(ops.LogSoftmax(chosen, rows, for_kernels(transform, rows, tau), dtype)).output
    return output.reshape(input.shape)


def losses_of_rows(
    backend: str,
    rows: Tensor,
    target: Tensor,
    transform: Tempered,
    options: LossOptions,
    *,
    reduction: Reduction,
) -> Losses:
    """The losses of logits ``rows`` [N, V] for class indices [N] or class probabilities [N, V]."""
    options = typed(options, rows)
    if backend == "reference":
        loss, lse = reference.cross_entropy(rows, target, transform.f, options, transform.temperature)
        divisor = normalizer(reduction, target, options, rows.shape[1], loss.dtype)
        return Losses(loss, lse, None if divisor is None else loss.sum() / divisor)
    rows = rows_for_kernel(rows)
    f = for_kernels(transform.f, rows, transform.temperature)
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


def loss_in_place(
    backend: str, rows: Tensor, target: Tensor, transform: Tempered, options: LossOptions, *, reduction: Reduction
) -> Losses:
    """:func:`losses_of_rows`, whose gradient overwrites ``rows``; for fused backends."""
    f = for_kernels(transform.f, rows, transform.temperature)
    target = rows_for_kernel(target) if target.dim() == 2 else target
    mask = (True, f.coefficients.requires_grad)
    total, loss = in_place.total_and_losses(
        ops.CrossEntropy(
            backend=backend,
            input=rows,
            target=target,
            transform=f,
            options=typed(options, rows),
            reduction=reduction,
            output_mask=mask,
        )
    )
    return Losses(loss, torch.zeros_like(loss), total)


def with_z_loss(
    losses_of: Callable[[LossOptions], Losses], options: LossOptions, target: Tensor, reduction: str, divisor: str
) -> Losses:
    """The losses under ``options``, the sum of their z-losses divided by ``divisor``: see :func:`cross_entropy`."""
    if not z_loss_apart(options, target, reduction, divisor):
        return losses_of(options)
    found, valid = losses_of(options._replace(z_loss=0.0, return_lse=True)), target != options.ignore_index
    z_losses = options.z_loss * torch.where(valid, found.lse, 0.0).square()
    assert found.total is not None
    lse = found.lse if options.return_lse else torch.where(valid, found.lse, 0.0)
    return found._replace(rows=found.rows + z_losses, lse=lse, total=found.total + z_losses.sum() / valid.sum())


def z_loss_apart(options: LossOptions, target: Tensor, reduction: str, divisor: str) -> bool:
    """Whether the z-losses are divided by another number than the losses, which a kernel does not do."""
    differs = divisor == "rows" and reduction == "mean" and not target.is_floating_point()
    return differs and options.weight is not None and options.z_loss > 0


def statistics_of_rows(
    backend: str, rows: Tensor, target: Tensor, transform: Tempered, ignore_index: int
) -> TokenStatistics:
    """The statistics of logits ``rows`` [N, V]; on fused backends log p, entropy and lse have gradients."""
    if backend == "reference":
        f, tau = transform
        return TokenStatistics(*reference.token_statistics(rows, target, f, ignore_index, tau))
    rows = rows_for_kernel(rows)
    f_of_kernels = for_kernels(transform.f, rows, transform.temperature)
    found = ops.token_statistics(ops.RowTokenStatistics(backend, rows, target, f_of_kernels, ignore_index))
    return TokenStatistics(*found[:5])


def typed(options: LossOptions, rows: Tensor) -> LossOptions:
    """``options`` with the weight in the arithmetic type."""
    if options.weight is None:
        return options
    return options._replace(weight=options.weight.to(arithmetic_dtype(rows.dtype)))


def for_kernels(transform: MonotonicTransform, input: Tensor, temperature: Tensor | None = None) -> Transform:
    """``transform`` divided by ``temperature``, which :func:`check_temperature` has checked, for kernels."""
    assert transform.kernel is not None  # backends.choose() has made sure
    coefficients = coefficients_of(transform, input.device, arithmetic_dtype(input.dtype))
    scale, cap, factor = transform.around
    if factor != 1:
        temperature = coefficients.new_full((), 1 / factor) if temperature is None else temperature / factor
    inner = [] if (scale, cap) == (1.0, 0.0) else [scale, cap]
    return Transform(coefficients, transform.kernel, list(transform.constants()), inner, temperature)


def rows_of(input: Tensor) -> Tensor:
    """``input`` (..., V) as [N, V]. V may be 0, from which reshape() could not tell N."""
    return input if input.dim() == 2 else input.reshape(math.prod(input.shape[:-1]), input.shape[-1])


def rows_for_kernel(rows: Tensor) -> Tensor:
    """``rows`` as the kernels take them, with columns next to each other; a copy only where they are not."""
    return rows if rows.shape[1] == 1 or rows.stride(1) == 1 else rows.contiguous()


def is_writable(rows: Tensor) -> bool:
    """Whether kernels can write over ``rows``: columns next to each other, and no memory in two rows."""
    count, classes = rows.shape
    return (classes == 1 or rows.stride(1) == 1) and (count < 2 or rows.stride(0) >= classes)


def reshaped(losses: Losses, shape: torch.Size) -> Losses:
    """What ``losses`` say of each row, in the shape of the targets."""
    if losses.rows.shape == shape:
        return losses
    log_prob = None if losses.log_prob is None else losses.log_prob.reshape(shape)
    statistics = None if losses.statistics is None else losses.statistics.reshape(shape)
    return Losses(losses.rows.reshape(shape), losses.lse.reshape(shape), losses.total, log_prob, statistics)
