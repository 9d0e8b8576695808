"""A case: what every contestant computes, on what inputs, and the least work that it takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

#: ``logits``: the loss of given logits [N, V]. ``head``: the loss of input [N, d] and weight [V, d]. ``tokens``: log p
#: and entropy of each token of a head. ``forward_kl`` and ``jsd``: the divergence of a head from a teacher's.
Group = Literal["logits", "head", "tokens", "forward_kl", "jsd"]


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
        dim += "" if self.teacher_dim is None else f" teacher d={self.teacher_dim}"
        return f"{self.group} {self.mode} N={self.rows}{dim} V={self.classes} {self.dtype} std {self.std:g}"

    @property
    def teacher_dim(self) -> int | None:
        """The features of the teacher: twice the student's; None without a teacher."""
        return 2 * self.dim if self.dim is not None and self.group in ("forward_kl", "jsd") else None

    @property
    def minimum_bytes(self) -> int:
        """Bytes that must be moved: all that is given read once and, in ``train``, gradients of operands written once.

        The targets count as given to distillation, too.
        """
        elements = self.rows * self.classes if self.dim is None else (self.rows + self.classes) * self.dim
        elements *= 2 if self.mode == "train" else 1
        elements += (self.rows + self.classes) * (self.teacher_dim or 0)
        upstream = 2 * torch.float32.itemsize if self.group == "tokens" else 0
        return elements * getattr(torch, self.dtype).itemsize + self.rows * (torch.int64.itemsize + upstream)


@dataclass(frozen=True)
class Inputs:
    """What a contestant gets. The operands are leaves that require a gradient in the mode ``train``."""

    operands: tuple[Tensor, ...]  # (logits,) or (input, weight)
    target: Tensor
    #: What gets no gradient: upstream gradients of log p and entropy, or the teacher's input and weight.
    fixed: tuple[Tensor, ...] = ()

    def copy(self, dtype: torch.dtype | None = None) -> Inputs:
        """The same values as leaves of their own, which a contestant may overwrite: it takes the same time on any."""
        copies = [each.detach().to(dtype or each.dtype, copy=True) for each in self.operands]
        return replace(self, operands=tuple(each.requires_grad_(self.operands[0].requires_grad) for each in copies))


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Logits ~ N(0, std^2); or input ~ N(0, 1) and weight ~ N(0, std^2 / d), which make logits of variance std^2."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows: int, columns: int, std: float) -> Tensor:
        values = torch.empty(rows, columns, dtype=getattr(torch, case.dtype), device=device)
        return values.normal_(0, std, generator=generator).requires_grad_(case.mode == "train")

    def head(dim: int) -> tuple[Tensor, Tensor]:
        return normal(case.rows, dim, 1.0), normal(case.classes, dim, case.std / math.sqrt(dim))

    operands = (normal(case.rows, case.classes, case.std),) if case.dim is None else head(case.dim)
    target, fixed = torch.randint(case.classes, (case.rows,), device=device, generator=generator), ()
    if case.group == "tokens":
        fixed = tuple(torch.rand(2, case.rows, device=device, generator=generator))
    elif case.teacher_dim is not None:
        fixed = tuple(each.detach() for each in head(case.teacher_dim))
    return Inputs(operands, target, fixed)


def bare_products(case: Case, inputs: Inputs, *, logits_again: bool = False) -> Callable[[], None]:
    """The products at the case's own shape, whose results are written over each time.

    Logits = x W^T, a teacher's as well, and, in ``train``, dx = g W and dW = g^T x with the logits in the place of g.
    ``logits_again`` computes the logits once more before, as a backward pass does that has not kept them.
    """
    input, weight = (operand.detach() for operand in inputs.operands)
    logits, grad_input, grad_weight = input.new_zeros(case.rows, case.classes), input.clone(), weight.clone()

    def products() -> None:
        if case.teacher_dim is not None:
            torch.mm(inputs.fixed[0], inputs.fixed[1].T, out=logits)
        for _ in range(1 + logits_again):
            torch.mm(input, weight.T, out=logits)
        if case.mode == "train":
            torch.mm(logits, weight, out=grad_input)
            torch.mm(logits.T, input, out=grad_weight)

    return products
