"""Gradients that a forward pass computes ahead: how many of them may wait for a backward pass, and how it scales them.

A loss that computes its gradients while its logits are at hand saves a product, or a pass over the logits, and holds a
gradient of the size of the weight, or of the logits, until its backward pass. That is right for one loss. Many of one
head (the depths of multi-token prediction, the windows of truncated backpropagation) would each hold a gradient of the
same weight, so that no more than :data:`BESIDES_ONE` bytes of others are let wait. What waits is saved as autograd
saves any tensor: checkpointing drops it, and saved-tensor hooks can move it to another device.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ._dispatch import has_values, tells_values, within_functorch
from .transforms.base import arithmetic_dtype

#: Bytes of gradients that may wait on a device at a time; one loss may hold what it needs where nothing else waits.
BESIDES_ONE = 64 * 2**20

#: What waits on each device, with its bytes. A gradient is gone from here at the latest when it is gone.
_waiting: dict[torch.device, MutableMapping[Tensor, int]] = {}


def waiting_bytes(device: torch.device) -> int:
    """The bytes of the gradients on ``device`` that wait for a backward pass."""
    return sum(_waiting[device].values()) if device in _waiting else 0


def may_wait(operands: Sequence[Tensor]) -> bool:
    """Whether the gradients of ``operands``, which have values, may be computed ahead."""
    held = waiting_bytes(operands[0].device)
    size = sum(each.numel() * arithmetic_dtype(each.dtype).itemsize for each in operands)
    return held == 0 or held + size <= BESIDES_ONE


def let_wait(gradients: Iterable[Tensor]) -> None:
    """Count ``gradients``, which have values, until they are gone."""
    for each in gradients:
        waiting = _waiting.setdefault(each.device, WeakTensorKeyDictionary())
        waiting[each] = each.nbytes


def let_go(gradients: Iterable[Tensor]) -> None:
    """Count ``gradients`` no more, which a backward pass hands on: whoever gets them may keep them."""
    for each in gradients:
        if waiting := _waiting.get(each.device):
            waiting.pop(each, None)


def scaled(
    gradients: Sequence[Tensor],
    factor: Tensor,
    *,
    rounded: bool,
    in_place: bool,
    scale_operator: torch._ops.OpOverload | None,
) -> Sequence[Tensor] | None:
    """``gradients`` times the 0-dim ``factor``; None where the product would round a result for the second time.

    Args:
        rounded: the gradients are in half precision and must not be rounded again: a factor of 1 leaves them alone.
        in_place: nobody needs ``gradients`` afterwards, so that autograd can keep them, scaled, without a copy.
        scale_operator: multiplies in place unless the factor is 1, on a device that does not tell it without waiting.
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
            if scale_operator is None or told:
                each.mul_(factor)
            else:
                scale_operator(each, factor)
    return own
