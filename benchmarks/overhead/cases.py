"""A case: what every contestant computes, on what inputs, and the least work that it takes."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

Group = Literal["logits", "head"]
Mode = Literal["train", "no-grad"]
#: ``logits``: the loss of given logits [N, V]. ``head``: the loss of input [N, d] and weight [V, d].
GROUPS: tuple[Group, ...] = ("logits", "head")
#: ``train``: loss and all gradients. ``no-grad``: loss only, as in an evaluation.
MODES: tuple[Mode, ...] = ("train", "no-grad")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_SEED = 0


@dataclass(frozen=True)
class Case:
    """A shape, a type, a width of the logits, and whether gradients are wanted."""

    group: Group
    mode: Mode
    rows: int
    classes: int
    #: d of the head; None for given logits.
    dim: int | None
    dtype: str
    #: Standard deviation of the logits.
    std: float

    def __post_init__(self) -> None:
        if (self.dim is None) != (self.group == "logits"):
            raise ValueError(f"a case of group {self.group} has dim {self.dim}")

    def __str__(self) -> str:
        dim = "" if self.dim is None else f" d={self.dim}"
        return f"{self.group} {self.mode} N={self.rows}{dim} V={self.classes} {self.dtype} std {self.std:g}"

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)

    @property
    def itemsize(self) -> int:
        """Bytes of one logit."""
        return DTYPES[self.dtype].itemsize

    @property
    def logits_bytes(self) -> int:
        """Bytes of the logits [N, V]."""
        return self.rows * self.classes * self.itemsize

    @property
    def operand_bytes(self) -> int:
        """Bytes of what the loss is differentiated by, apart from parameters: logits, or input and weight."""
        if self.dim is None:
            return self.logits_bytes
        return (self.rows + self.classes) * self.dim * self.itemsize

    @property
    def minimum_bytes(self) -> int:
        """Bytes that must be moved: targets and operands read once and, in ``train``, their gradients written once."""
        passes = 2 if self.mode == "train" else 1
        return passes * self.operand_bytes + self.rows * torch.int64.itemsize

    @property
    def flops(self) -> int:
        """Floating-point operations of the matrix products: 2 N V d for each of x W^T and, in ``train``, g W, g^T x."""
        products = 3 if self.mode == "train" else 1
        return 0 if self.dim is None else products * 2 * self.rows * self.classes * self.dim


@dataclass(frozen=True)
class Inputs:
    """What a contestant gets. The operands are leaves that require a gradient in the mode ``train``."""

    #: (logits,) or (input, weight).
    operands: tuple[Tensor, ...]
    target: Tensor

    @cached_property
    def wide(self) -> Inputs:
        """The same values in float32, as leaves of their own; one copy for all that ask."""
        wide = (operand.detach().float().requires_grad_(operand.requires_grad) for operand in self.operands)
        return Inputs(tuple(wide), self.target)


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Normal logits of the case's standard deviation, or a normal input and a weight that make such logits.

    The same on every call with the same arguments. For the head, input ~ N(0, 1) and weight ~ N(0, std^2 / d), so that
    the variance of a logit, a sum of d products, is std^2.
    """
    generator = torch.Generator(device).manual_seed(_SEED)
    dtype = DTYPES[case.dtype]

    def normal(rows: int, columns: int, std: float) -> Tensor:
        values = torch.empty(rows, columns, dtype=dtype, device=device).normal_(0, std, generator=generator)
        return values.requires_grad_(case.mode == "train")

    if case.dim is None:
        operands: tuple[Tensor, ...] = (normal(case.rows, case.classes, case.std),)
    else:
        operands = (
            normal(case.rows, case.dim, 1.0),
            normal(case.classes, case.dim, case.std / math.sqrt(case.dim)),
        )
    return Inputs(operands, torch.randint(case.classes, (case.rows,), device=device, generator=generator))
