"""The statistics of each token, such as log p and entropy: with gradients for reinforcement learning, or without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from . import ops
from .backends import BackendName, Call, Operation, choose
from .candidates import Candidates
from .checks import (
    IGNORE_INDEX,
    check_classes,
    check_device,
    check_floating,
    check_head,
    check_ignore_index,
    check_target,
    check_temperature,
    check_transform,
)
from .dtensor_calls import takes_dtensors
from .functional import Tempered, TokenStatistics, for_kernels, rows_of, statistics_of_rows
from .groups import Head
from .linear import autocast_input
from .transforms import MonotonicTransform

OutputName = Literal["log_prob", "entropy", "is_top1", "rank", "argmax", "lse", "target_logit"]


class StatisticsOptions(NamedTuple):
    ignore_index: int
    temperature: float | Tensor
    candidates: Tensor | None = None


class TokenLogProb(NamedTuple):
    """What :func:`linear_log_prob` returns: each of the shape of ``target``; None where it was not asked for."""

    log_prob: Tensor | None = None
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    rank: Tensor | None = None
    argmax: Tensor | None = None
    lse: Tensor | None = None
    target_logit: Tensor | None = None


@takes_dtensors
def linear_token_statistics(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    transform: MonotonicTransform | None = None,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float | Tensor = 1.0,
    backend: BackendName = "auto",
) -> TokenStatistics:
    r"""What is known of each token under :math:`p = \mathrm{softmax}(f(z))`, for metrics and reinforcement learning.

    The logits :math:`z = \text{input}\,\text{linear\_weight}^T + \text{linear\_bias}` exist for a chunk of rows at a
    time, except on the reference backend. The results carry no gradients, as under ``torch.no_grad()``:
    :func:`linear_log_prob` gives them with gradients.

    Args:
        input, linear_weight, target, transform, linear_bias, ignore_index, temperature, backend: as in
            :func:`linear_cross_entropy`.

    Returns:
        Named tensors, each of the shape of ``target``; the arithmetic is in float32 (float64 for float64):

        - ``log_prob``: log p of the target; 0 where it is ``ignore_index``.
        - ``entropy``: :math:`-\sum_j p_j \log p_j`, in nats.
        - ``argmax``, int64: the class of the largest logit, which is the most probable one; the first of equals.
        - ``lse``: :math:`\log \sum_j e^{y_j}`.
        - ``rank``, int64: the number of classes with a larger logit than the target, 0 for the most probable one; -1
          where the target is ``ignore_index``.

        Logits of -inf are allowed. Where a row has no distribution (a NaN, a +inf, nothing but -inf), log_prob and
        entropy are NaN, lse is not finite, and argmax and rank mean nothing.

    Raises:
        TypeError, ValueError, NotImplementedError, IndexError: as in :func:`cross_entropy`.

    Example:
        >>> hidden, weight, target = torch.randn(8, 64), torch.randn(10_000, 64), torch.randint(10_000, (8,))
        >>> statistics = monosoftmax.linear_token_statistics(hidden, weight, target)
        >>> bool((statistics.rank == 0).eq(statistics.argmax == target).all())
        True
    """
    with torch.no_grad():
        bias = None if linear_bias is None else linear_bias.detach()
        head = Head(input.detach(), linear_weight.detach(), bias)
        options = StatisticsOptions(ignore_index, temperature)
        found = _of_head("linear_token_statistics", head, target, transform, options, backend=backend)
    return TokenStatistics(*(each.reshape(input.shape[:-1]) for each in found))


@takes_dtensors
def linear_log_prob(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    transform: MonotonicTransform | None = None,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    temperature: float | Tensor = 1.0,
    candidates: Tensor | None = None,
    outputs: Sequence[OutputName] = ("log_prob", "entropy"),
    backend: BackendName = "auto",
) -> TokenLogProb:
    r"""log p of each target and the entropy of each row of :math:`p = \mathrm{softmax}(f(z) / \tau)`, with gradients.

    The logits :math:`z = \text{input}\,\text{linear\_weight}^T + \text{linear\_bias}` exist for a chunk of rows at a
    time, except on the reference backend: one product forward, and three backward, which computes the logits again. The
    gradients, for upstream gradients a, e and h of log_prob, entropy and lse, are those of

    .. math:: \frac{\partial L}{\partial y_j} = a\,(1[j = t] - p_j) - e\,p_j (\log p_j + H) + h\,p_j,
        \qquad y = f(z) / \tau

    Args:
        input, linear_weight, target, transform, linear_bias, ignore_index, temperature, candidates, backend: as in
            :func:`linear_cross_entropy`.
        outputs: what to return, at least one of the names below. All of it is computed in one pass.

    Returns:
        Named tensors of the shape of ``target``, or None where ``outputs`` does not name them. Arithmetic is in float32
        (float64 for float64), and so are the results:

        - ``log_prob``: log p of the target, never above 0; 0 where the target is ``ignore_index``. Differentiable.
        - ``entropy``: :math:`H = -\sum_j p_j \log p_j`, in nats, of every row, ignored or not. Differentiable.
        - ``lse``: :math:`\log \sum_j e^{y_j}`, of every row. Differentiable.
        - ``target_logit``: :math:`f(z) / \tau` of the target; 0 where the target is ``ignore_index``. Differentiable.
        - ``is_top1``, bool: whether no class has a larger logit than the target; False where the target is ignored.
        - ``rank``, int64: the number of classes with a larger logit than the target; -1 where the target is ignored.
        - ``argmax``, int64: the class of the largest logit, the first of equals.

    Raises:
        TypeError, ValueError, NotImplementedError, IndexError: as in :func:`cross_entropy`.

    Example:
        >>> head, transform = torch.nn.Linear(64, 10_000, bias=False), monosoftmax.transforms.SoftCap(30.0)
        >>> hidden, action, advantage = torch.randn(8, 64), torch.randint(10_000, (8,)), torch.randn(8)
        >>> policy = monosoftmax.linear_log_prob(hidden, head.weight, action, transform)
        >>> loss = -(advantage * policy.log_prob + 0.01 * policy.entropy).mean()
        >>> loss.backward()
        >>> head.weight.grad.shape
        torch.Size([10000, 64])
    """
    check_outputs(outputs)
    head = Head(input, linear_weight, linear_bias)
    options = StatisticsOptions(ignore_index, temperature, candidates)
    found = _of_head("linear_log_prob", head, target, transform, options, backend=backend)
    return asked_outputs(found._asdict(), outputs, target, ignore_index, shape=input.shape[:-1])


@takes_dtensors
def log_prob(
    input: Tensor,
    target: Tensor,
    transform: MonotonicTransform | None = None,
    *,
    ignore_index: int = IGNORE_INDEX,
    temperature: float | Tensor = 1.0,
    candidates: Tensor | None = None,
    outputs: Sequence[OutputName] = ("log_prob", "entropy"),
    backend: BackendName = "auto",
) -> TokenLogProb:
    r""":func:`linear_log_prob` of given logits.

    Args:
        input: logits z, (..., V); float32, bfloat16, float16 or float64.
        target: class indices, int64 or uint8, of the shape of ``input`` without V.
        transform, ignore_index, temperature, candidates, outputs, backend: as in :func:`linear_log_prob`.

    Returns, Raises:
        As :func:`linear_log_prob`.

    Example:
        >>> logits, target = torch.randn(2, 8, 10_000, requires_grad=True), torch.randint(10_000, (2, 8))
        >>> found = monosoftmax.log_prob(logits, target, outputs=("log_prob", "is_top1"))
        >>> found.log_prob.sum().backward()
        >>> found.is_top1.shape, found.entropy
        (torch.Size([2, 8]), None)
    """
    check_outputs(outputs)
    transform = check_transform(transform)
    check_floating("input", input)
    if input.dim() == 0:
        raise ValueError("input must have at least 1 dimension, (..., V), got a scalar")
    check_classes(input.shape[-1])
    target = check_target(target, input.device, input.shape[:-1])
    if target.shape != input.shape[:-1]:
        raise ValueError(
            f"target must have the shape of input without its last dimension, {tuple(input.shape[:-1])}, "
            f"got {tuple(target.shape)}"
        )
    ignore_index, tau = check_ignore_index(ignore_index), check_temperature(temperature, input)
    check_device("transform", transform, input.device)
    call = Call("log_prob", input.device.type, input.dtype, transform, classes=input.shape[-1])
    chosen, rows, indices = choose(call, backend), rows_of(input), target.reshape(-1)
    allowed = None if candidates is None else Candidates.of(candidates, input.shape[-1], input.device)
    if allowed is not None:
        rows, indices = allowed.of_columns(rows), allowed.of_target(indices, ignore_index)
    index = ignore_index if allowed is None else IGNORE_INDEX
    found = _classes(statistics_of_rows(chosen, rows, indices, Tempered(transform, tau), index), allowed)
    return asked_outputs(found._asdict(), outputs, target, ignore_index, shape=input.shape[:-1])


def _of_head(
    operation: Operation,
    head: Head,
    target: Tensor,
    transform: MonotonicTransform | None,
    options: StatisticsOptions,
    *,
    backend: BackendName,
) -> TokenStatistics:
    """The statistics of the tokens of a head, whose arguments are checked here; each [N]."""
    transform, target, device = check_transform(transform), check_head(head, target), head.input.device
    ignore_index, tau = check_ignore_index(options.ignore_index), check_temperature(options.temperature, head.input)
    check_device("transform", transform, device)
    call = Call(operation, device.type, head.input.dtype, transform, classes=head.linear_weight.shape[0])
    chosen, indices, rows = choose(call, backend), target.reshape(-1), rows_of(head.input)
    allowed: Candidates | None = None
    if options.candidates is not None:
        allowed = Candidates.of(options.candidates, head.linear_weight.shape[0], device)
        head, indices, ignore_index = allowed.of_head(head), allowed.of_target(indices, ignore_index), IGNORE_INDEX
    if chosen == "reference":
        logits = F.linear(rows, head.linear_weight, head.linear_bias)
        return _classes(statistics_of_rows(chosen, logits, indices, Tempered(transform, tau), ignore_index), allowed)
    rows = autocast_input(rows)
    f = for_kernels(transform, rows, tau)
    arguments = ops.LinearTokenStatistics(chosen, head._replace(input=rows), indices, f, ignore_index)
    return _classes(TokenStatistics(*ops.linear_token_statistics(arguments)[:5]), allowed)


def _classes(found: TokenStatistics, allowed: Candidates | None) -> TokenStatistics:
    """``found`` with the argmax as a class, where it is a place among candidates."""
    return found if allowed is None else found._replace(argmax=allowed.classes[found.argmax])


def check_outputs(outputs: Sequence[OutputName]) -> None:
    names = get_args(OutputName)
    if isinstance(outputs, str) or len(outputs) == 0:
        raise ValueError(f"outputs must be a sequence of at least one of {', '.join(names)}, got {outputs!r}")
    for each in outputs:
        if each not in names:
            raise ValueError(f"outputs must be some of {', '.join(names)}, got {each!r}")


def asked_outputs(
    found: dict[str, Tensor], outputs: Sequence[OutputName], target: Tensor, ignore_index: int, *, shape: torch.Size
) -> TokenLogProb:
    """The ``outputs`` by their names, from statistics [N] of tokens, or [0] where there are none."""
    # In the shape of the targets as they were checked: (1,) counts as ().
    results = {name: each.reshape(shape) for name, each in found.items() if each.numel() == target.numel()}
    if "is_top1" in outputs and "is_top1" not in results:
        results["is_top1"] = results["rank"] == 0
    if "target_logit" in outputs:
        target_logit = results["log_prob"] + results["lse"]
        results["target_logit"] = target_logit.masked_fill(target.reshape(shape) == ignore_index, 0.0)
    return TokenLogProb(**{name: results[name] for name in outputs})
