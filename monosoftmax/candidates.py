"""The classes that a call allows: the others have probability exactly 0, whatever f(-inf) is."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._dispatch import tells_values
from .checks import IGNORE_INDEX, check_tensor
from .groups import Head, LossOptions


class Candidates(NamedTuple):
    """Some of the classes, C of V. What is not computed for the others needs no mask in a kernel, and no product.

    A mask of a device waits for the device once, to count its classes; indices do not.
    """

    #: [C], increasing if they come from a mask.
    classes: Tensor
    #: [V]: the place of a class in ``classes``; C for the others, which is no class of the smaller problem.
    place: Tensor

    @classmethod
    def of(cls, candidates: Tensor, count: int, device: torch.device) -> Candidates:
        """From a mask [V], bool, or class indices [C], int64, different from each other.

        Raises:
            TypeError, ValueError: ``candidates`` have another type, shape or device, or there are none.
        """
        check_tensor("candidates", candidates)
        if candidates.device != device:
            raise ValueError(f"candidates must be on {device} like input, got {candidates.device}")
        if candidates.dtype == torch.bool:
            if candidates.shape != (count,):
                raise ValueError(f"candidates must have shape ({count},) as a mask, got {tuple(candidates.shape)}")
            index = candidates.nonzero().squeeze(1)
        elif candidates.dtype == torch.int64 and candidates.dim() == 1:
            index = candidates
        else:
            raise TypeError(
                f"candidates must be a mask (V,), bool, or class indices (C,), int64, got {candidates.dtype} "
                f"{tuple(candidates.shape)}"
            )
        if index.numel() == 0:
            raise ValueError("candidates must have at least 1 class, got none")
        if tells_values(index):
            outside = (index < 0) | (index >= count)
            if bool(outside.any()):
                raise ValueError(f"candidates must be classes from 0 to {count - 1}, got {int(index[outside][0])}")
            if candidates.dtype != torch.bool and torch.unique(index).numel() != index.numel():
                raise ValueError("candidates must be different from each other")
        size = index.numel()
        place = torch.full((count,), size, dtype=torch.int64, device=device)
        place[index] = torch.arange(size, device=device)
        return cls(index, place)

    def of_head(self, head: Head) -> Head:
        bias = None if head.linear_bias is None else head.linear_bias.index_select(0, self.classes)
        return Head(head.input, head.linear_weight.index_select(0, self.classes), bias)

    def of_options(self, options: LossOptions) -> LossOptions:
        weight = None if options.weight is None else options.weight.index_select(0, self.classes)
        return options._replace(weight=weight, ignore_index=IGNORE_INDEX)

    def of_columns(self, rows: Tensor) -> Tensor:
        return rows.index_select(-1, self.classes)

    def of_target(self, target: Tensor, ignore_index: int) -> Tensor:
        """Class indices among the candidates, IGNORE_INDEX where they are ignored; C where they are no candidates.

        Raises:
            IndexError: a target is no candidate, on the CPU. Elsewhere it is no class, and its row becomes NaN.
        """
        ignored = target == ignore_index
        classes = self.place.shape[0]
        inside = ~ignored & (target >= 0) & (target < classes)
        place = torch.where(inside, self.place[torch.where(inside, target, 0)], self.classes.shape[0])
        lost = ~ignored & (place == self.classes.shape[0])
        if tells_values(lost) and lost.numel() > 0 and bool(lost.any()):
            raise IndexError(f"target {int(target[lost][0])} is none of the {self.classes.shape[0]} candidates")
        return torch.where(ignored, IGNORE_INDEX, place)
