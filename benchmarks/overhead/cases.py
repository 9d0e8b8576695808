"""A case: what every contestant computes, on what inputs, and the least work that it takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

#: ``logits``: the loss of given logits [N, V]. ``head``: the loss of input [N, d] and weight [V, d].
Group = Literal["logits", "head"]


@dataclass(frozen=True)
class Case:
    """A shape, a type, a width of the logits, and whether gradients are wanted."""

    group: Group
    mode: Literal["train", "no-grad"]  # loss and all gradients, or loss only
    rows: int
    classes: int
    dim: int | None  # d of the head; None for given logits
    dtype: str  # a name in torch
    std: float  # standard deviation of the logits

    def __str__(self) -> str:
        dim = "" if self.dim is None else f" d={self.dim}"
        return f"{self.group} {self.mode} N={self.rows}{dim} V={self.classes} {self.dtype} std {self.std:g}"

    @property
    def minimum_bytes(self) -> int:
        """Bytes that must be moved: targets and operands read once and, in ``train``, their gradients written once."""
        elements = self.rows * self.classes if self.dim is None else (self.rows + self.classes) * self.dim
        passes = 2 if self.mode == "train" else 1
        return passes * elements * getattr(torch, self.dtype).itemsize + self.rows * torch.int64.itemsize


@dataclass(frozen=True)
class Inputs:
    """What a contestant gets. The operands are leaves that require a gradient in the mode ``train``."""

    operands: tuple[Tensor, ...]  # (logits,) or (input, weight)
    target: Tensor

    def copy(self, dtype: torch.dtype | None = None) -> Inputs:
        """The same values as leaves of their own, which a contestant may overwrite: it takes the same time on any."""
        copies = [each.detach().to(dtype or each.dtype, copy=True) for each in self.operands]
        return Inputs(tuple(each.requires_grad_(self.operands[0].requires_grad) for each in copies), self.target)


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Logits ~ N(0, std^2); or input ~ N(0, 1) and weight ~ N(0, std^2 / d), which make logits of variance std^2."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows: int, columns: int, std: float) -> Tensor:
        values = torch.empty(rows, columns, dtype=getattr(torch, case.dtype), device=device)
        return values.normal_(0, std, generator=generator).requires_grad_(case.mode == "train")

    if case.dim is None:
        sizes = [(case.rows, case.classes, case.std)]
    else:
        sizes = [(case.rows, case.dim, 1.0), (case.classes, case.dim, case.std / math.sqrt(case.dim))]
    operands = tuple(normal(*each) for each in sizes)
    return Inputs(operands, torch.randint(case.classes, (case.rows,), device=device, generator=generator))
