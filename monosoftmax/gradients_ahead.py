"""Gradients that a forward pass computes ahead: how many of them may wait for a backward pass, and how it scales them.

A loss that computes its gradients while its logits are at hand saves a product, or a pass over the logits, and holds a
gradient of the size of the weight, or of the logits, until its backward pass. That is right for one loss. Many of one
head (the depths of multi-token prediction, the windows of truncated backpropagation) would each hold a gradient of the
same weight, so that no more than :data:`BESIDES_ONE` bytes of others are let wait. What waits is saved as autograd
saves any tensor: checkpointing drops it, and saved-tensor hooks can move it to another device.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._dispatch import has_values, tells_values, within_functorch
from .row_kernels import RowKernels
from .transforms.base import arithmetic_dtype

#: Bytes of gradients that may wait on a device at a time; one loss may hold what it needs where nothing else waits.
BESIDES_ONE = 64 * 2**20

#: What waits on each device, by its id, with its bytes. A gradient is gone from here at the latest when it is gone.
_waiting: dict[torch.device, dict[int, tuple[weakref.ref[Tensor], int]]] = {}


def waiting_bytes(device: torch.device) -> int:
    """The bytes of the gradients on ``device`` that wait for a backward pass."""
    waiting = _waiting.get(device)
    return sum([size for _, size in list(waiting.values())]) if waiting else 0


def output_mask(operands: Sequence[Tensor | None], backend: str, wish: bool | None = None) -> tuple[bool, ...]:
    """Which gradients of ``operands`` a forward pass computes: all that are needed, or none.

    Args:
        operands: what a loss is differentiated with respect to; logits [N, V] first, or the operands of a head.
        backend: which computes them.
        wish: whether they are to be computed ahead; None leaves it to what waits already.
    """
    none = (False,) * len(operands)
    if wish is False or not torch.is_grad_enabled():
        return none
    mask = tuple([each is not None and each.requires_grad for each in operands])
    # func.grad asks for gradients that it can differentiate.
    if True not in mask or within_functorch():
        return none
    input = operands[0]
    assert input is not None
    values = has_values(input)
    # The gradient of logits in half precision is scaled by 1 or computed again, so as not to be rounded twice. The CPU
    # says which without waiting; elsewhere the kernel decides.
    twice = len(operands) == 2 and input.dtype in (torch.float16, torch.bfloat16) and not tells_values(input)
    if twice and (backend == "cpu" or not values):
        return none
    if not wish and values and (held := waiting_bytes(input.device)):
        needed = [each for each, computed in zip(operands, mask, strict=True) if each is not None and computed]
        if held + sum(each.numel() * arithmetic_dtype(each.dtype).itemsize for each in needed) > BESIDES_ONE:
            return none
    return mask


def let_wait(gradients: Iterable[Tensor]) -> None:
    """Count ``gradients``, which have values, until they are gone."""
    for each in gradients:
        waiting, key = _waiting.setdefault(each.device, {}), id(each)
        waiting[key] = weakref.ref(each, lambda _, waiting=waiting, key=key: waiting.pop(key, None)), each.nbytes  # type: ignore[misc]


def let_go(gradients: Iterable[Tensor]) -> None:
    """Count ``gradients`` no more, which a backward pass hands on: whoever gets them may keep them."""
    for each in gradients:
        _waiting.get(each.device, {}).pop(id(each), None)


def differentiated_once(gradients: Sequence[Tensor], operands: Sequence[Tensor], function: str) -> list[Tensor]:
    """``gradients`` of the ``operands`` which, where a graph of them is made, end in an error when it is used."""
    if not torch.is_grad_enabled():
        return list(gradients)
    return [_Once.apply(each, function, *operands) for each in gradients]  # type: ignore[no-untyped-call]


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, function: str, *operands: Tensor) -> Tensor:
        ctx.function = function
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(f'{ctx.function} does not support double backward; use backend="reference"')


def scaled(
    gradients: Sequence[Tensor],
    factor: Tensor,
    *,
    rounded: bool,
    in_place: bool,
    kernels: RowKernels,
) -> Sequence[Tensor] | None:
    """``gradients`` times the 0-dim ``factor``; None where the product would round a result for the second time.

    Args:
        rounded: the gradients are in half precision and must not be rounded again: a factor of 1 leaves them alone.
        in_place: nobody needs ``gradients`` afterwards, so that autograd can keep them, scaled, without a copy.
        kernels: whose ``scale_`` multiplies unless the factor is 1, on a device that does not tell without waiting.
    """
    if within_functorch() or not has_values(factor):
        return None if rounded else [(each.to(factor.dtype) * factor).to(each.dtype) for each in gradients]
    told = tells_values(factor)
    unchanged = told and factor.item() == 1
    if rounded and not unchanged:
        return None
    own = gradients if in_place else [each.clone() for each in gradients]
    if not unchanged:
        for each in own:
            each.mul_(factor) if told else kernels.scale_(each, factor)
    return own
