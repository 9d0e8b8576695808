"""The public functions on plain tensors: each rank of ``group`` has the rows of the weight, or the columns of the
logits, from ``vocab_start`` on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import BackendName
from ..checks import IGNORE_INDEX, Reduction, ZLossDivisor
from ..groups import Head, LossOptions
from ..linear import HeadCall
from ..token_log_prob import OutputName, TokenLogProb
from ..transforms import MonotonicTransform
from ..transforms.base import require_count
from . import checked
from .agreement import together
from .collectives import Ranks
from .losses import Layout, checks_by_default
from .problem import Sums


def linear_cross_entropy(
    input: Tensor,
    local_weight: Tensor,
    target: Tensor,
    transform: MonotonicTransform | None = None,
    *,
    vocab_start: int,
    vocab_size: int | None = None,
    group: Any = None,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    return_lse: bool = False,
    temperature: float | Tensor = 1.0,
    z_loss_divisor: ZLossDivisor = "loss",
    chunk_rows: int | None = None,
    grad_in_forward: bool | None = None,
    reduce_grad_input: bool = True,
    token_group: Any = None,
    check: bool | None = None,
    backend: BackendName = "auto",
) -> Any:
    r""":func:`monosoftmax.linear_cross_entropy` of a head whose classes the ranks of ``group`` share out.

    Each rank multiplies by its rows of the weight only. The ranks exchange 3 or 4 numbers for each token, by two
    all-reduces, and the gradients of ``input`` and of f's coefficients, by one each. All ranks return the same bits,
    and get the same gradients of ``input`` and of f. No rank holds anything of size N x V, nor the weight of another.

    With gradients ahead (``grad_in_forward``), the tokens go through in chunks, and two all-reduces exchange the
    numbers of a chunk: three products. Without, one pair exchanges the numbers of all tokens, and the backward pass
    computes the logits again: four products. In float16 it always does.

    Args:
        input: (..., d), the same on all ranks of ``group``.
        local_weight: (V of this rank, d). A rank may have no classes.
        target: class indices among all classes, int64 or uint8, of the shape of ``input`` without d, the same on all
            ranks of ``group``.
        transform: f, with the same parameters on all ranks. Their gradients are sums over ``group``.
        vocab_start: the first class of this rank. The ranks' classes need not be equally many.
        vocab_size: V. None: the ranks tell each other in each call, which waits for a device.
        group: a process group, a 1-dimensional DeviceMesh, or None: all ranks.
        linear_bias: (V of this rank,).
        weight: (V,), of all classes.
        ignore_index, label_smoothing, z_loss, reduction, return_lse, temperature, z_loss_divisor, chunk_rows, backend:
            as in :func:`monosoftmax.linear_cross_entropy`. The default of ``chunk_rows`` is that of V / ranks classes.
        grad_in_forward: whether the gradients of a mean or sum are computed in the forward pass; None: yes.
        reduce_grad_input: whether the gradient of ``input`` is summed over ``group``. False leaves it to the caller,
            each rank with its part, as sequence parallelism wants it, which scatters the sum.
        token_group: ranks that have other tokens (sequence or context parallelism, data parallelism): the loss is the
            mean or sum over the tokens of all of them, and each rank differentiates it for its own tokens. So the
            gradients of parameters that these ranks have in common are to be summed over them; who averages them, as
            DistributedDataParallel and fully_shard do, multiplies the loss by their number before.
        check: whether the ranks compare their arguments before they compute: shapes, shards, targets, options and f.
            None: where that does not wait for a device, which is on the CPU, and if TORCH_DISTRIBUTED_DEBUG is INFO or
            DETAIL. It takes one small all-gather.

    Returns:
        As :func:`monosoftmax.linear_cross_entropy`.

    Raises:
        TypeError, ValueError, NotImplementedError, IndexError: as there; or ``check`` finds that the arguments of the
            ranks do not fit together: then on all ranks.
        RuntimeError: another rank has failed or is late.

    Source: for classes that ranks share out, Shoeybi et al., *Megatron-LM*, 2019, section 3.

    Example:
        >>> # on each of G ranks, with weight (V / G, d)
        >>> loss = monosoftmax.distributed.linear_cross_entropy(
        ...     hidden, weight, target, transform, vocab_start=rank * len(weight), group=group
        ... )  # doctest: +SKIP
    """
    layout = _layout(
        input, group, vocab_start, vocab_size, check=check, reduce_grad_input=reduce_grad_input,
        token_group=token_group, chunk_rows=chunk_rows,
    )  # fmt: skip
    how = HeadCall(
        chunk_rows=chunk_rows or 0,
        grad_in_forward=grad_in_forward,
        temperature=temperature,
        z_loss_divisor=z_loss_divisor,
    )
    options = LossOptions(weight, ignore_index, label_smoothing, z_loss, return_lse)
    head = Head(input, local_weight, linear_bias)
    found = checked.head_losses(
        head, target, transform, options, how, layout=layout, reduction=reduction, backend=backend
    )
    return found.result(return_lse)


def cross_entropy(
    local_input: Tensor,
    target: Tensor,
    transform: MonotonicTransform | None = None,
    *,
    vocab_start: int,
    vocab_size: int | None = None,
    group: Any = None,
    weight: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    return_lse: bool = False,
    temperature: float | Tensor = 1.0,
    z_loss_divisor: ZLossDivisor = "loss",
    token_group: Any = None,
    check: bool | None = None,
    backend: BackendName = "auto",
) -> Any:
    """:func:`monosoftmax.cross_entropy` of logits whose classes the ranks of ``group`` share out.

    Args:
        local_input: logits of the classes of this rank, (V of this rank,), (N, V of this rank) or
            (N, V of this rank, d1, ...).
        target: class indices among all classes, of the shape of ``local_input`` without V.
        transform, vocab_start, vocab_size, group, weight, ignore_index, label_smoothing, z_loss, reduction, return_lse,
        temperature, z_loss_divisor, token_group, check, backend: as in :func:`linear_cross_entropy`.

    Returns, Raises:
        As :func:`linear_cross_entropy`. The gradient of ``local_input`` is that of this rank's logits.
    """
    layout = _layout(local_input, group, vocab_start, vocab_size, check=check, token_group=token_group)
    how = HeadCall(temperature=temperature, z_loss_divisor=z_loss_divisor)
    options = LossOptions(weight, ignore_index, label_smoothing, z_loss, return_lse)
    found = checked.losses_of_logits(
        local_input, target, transform, options, how, layout=layout, reduction=reduction, backend=backend
    )
    return found.result(return_lse)


def log_softmax(
    local_input: Tensor,
    transform: MonotonicTransform | None = None,
    *,
    vocab_start: int,
    vocab_size: int | None = None,
    group: Any = None,
    dtype: torch.dtype | None = None,
    temperature: float | Tensor = 1.0,
    check: bool | None = None,
    backend: BackendName = "auto",
) -> Tensor:
    """:func:`monosoftmax.log_softmax` of logits whose classes the ranks of ``group`` share out.

    Args:
        local_input: logits of the classes of this rank, (..., V of this rank).
        transform, vocab_start, vocab_size, group, temperature, check, backend: as in :func:`linear_cross_entropy`.
        dtype: as in :func:`monosoftmax.log_softmax`.

    Returns:
        log p of the classes of this rank, (..., V of this rank). Two all-reduces of one number for each row, and one of
        one number backward.

    Raises:
        As :func:`linear_cross_entropy`.
    """
    layout = _layout(local_input, group, vocab_start, vocab_size, check=check)
    return checked.log_softmax(local_input, transform, dtype, temperature, layout=layout, backend=backend)


def linear_log_prob(
    input: Tensor,
    local_weight: Tensor,
    target: Tensor,
    transform: MonotonicTransform | None = None,
    *,
    vocab_start: int,
    vocab_size: int | None = None,
    group: Any = None,
    linear_bias: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    temperature: float | Tensor = 1.0,
    outputs: Sequence[OutputName] = ("log_prob", "entropy"),
    reduce_grad_input: bool = True,
    check: bool | None = None,
    backend: BackendName = "auto",
) -> TokenLogProb:
    """:func:`monosoftmax.linear_log_prob` of a head whose classes the ranks of ``group`` share out.

    Args:
        input, local_weight, target, transform, vocab_start, vocab_size, group, linear_bias, ignore_index, temperature,
        reduce_grad_input, check, backend: as in :func:`linear_cross_entropy`.
        outputs: as in :func:`monosoftmax.linear_log_prob`. ``"argmax"`` takes one more all-reduce, ``"rank"`` one more
            all-reduce and product.

    Returns:
        As :func:`monosoftmax.linear_log_prob`, the same bits on all ranks.

    Raises:
        As :func:`linear_cross_entropy`.
    """
    layout = _layout(input, group, vocab_start, vocab_size, check=check, reduce_grad_input=reduce_grad_input)
    return checked.log_probs(
        Head(input, local_weight, linear_bias),
        target,
        transform,
        outputs,
        ignore_index=ignore_index,
        temperature=temperature,
        layout=layout,
        backend=backend,
    )


def _layout(
    input: Tensor,
    group: Any,
    vocab_start: int,
    vocab_size: int | None,
    *,
    check: bool | None,
    reduce_grad_input: bool = True,
    token_group: Any = None,
    chunk_rows: int | None = None,
) -> Layout:
    ranks = Ranks(group)
    checks = vocab_size is None or checks_by_default(input) if check is None else check or vocab_size is None
    with together(ranks, checks):
        tokens = () if token_group is None else (Ranks(token_group),)
        if isinstance(vocab_start, bool) or not isinstance(vocab_start, int):
            raise TypeError(f"vocab_start must be an int, got {type(vocab_start).__name__}")
        if vocab_start < 0:
            raise ValueError(f"vocab_start must not be negative, got {vocab_start}")
        for name, count in (("vocab_size", vocab_size), ("chunk_rows", chunk_rows)):
            if count is not None:
                require_count(name, count)
    return Layout(ranks, vocab_start, vocab_size, Sums(reduce_grad_input), tokens=tokens, check=checks)
