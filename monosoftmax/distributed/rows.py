"""The logits of a rank's columns, chunk of rows by chunk of rows, and the gradients that their gradient adds up to.

The sources of rows have what :class:`monosoftmax.head_products.HeadProducts` has: logits that are given, and the head
of a rank without classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..groups import Head, HeadGradients
from ..head_products import Gathered, HeadProducts
from ..transforms.base import arithmetic_dtype


class Rows(Protocol):
    """A source of logits, as :class:`monosoftmax.head_products.HeadProducts` is one."""

    needs_logit_gradient: bool

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]: ...

    def gathered(self, *kinds: tuple[torch.dtype, int]) -> Gathered: ...

    def gradients(self, logits: Tensor, need_coefficients: bool) -> dict[str, Any]: ...

    def add_gradients(self, chunk: slice, dz: Tensor) -> None: ...

    def summed(self, grad_coefficients: Tensor | None) -> HeadGradients: ...


class GivenRows:
    """Logits [N, V] that are there, as a single chunk. Their gradient is the gradient of ``input``."""

    def __init__(self, rows: Tensor, output_mask: Sequence[bool]) -> None:
        self._rows, self.needs_logit_gradient = rows, output_mask[0]
        self._gradient = rows.new_empty((rows.shape[0], 0))  # all of it, where there are no classes

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        yield slice(0, self._rows.shape[0]), self._rows

    def gathered(self, *kinds: tuple[torch.dtype, int]) -> Gathered:
        return Gathered(self._rows.shape[0], kinds, None)

    def gradients(self, logits: Tensor, need_coefficients: bool) -> dict[str, Any]:
        return {"output_mask": (self.needs_logit_gradient, need_coefficients), "grad_rows": None}

    def add_gradients(self, chunk: slice, dz: Tensor) -> None:
        self._gradient = dz

    def summed(self, grad_coefficients: Tensor | None) -> HeadGradients:
        assert grad_coefficients is not None
        nothing = grad_coefficients.new_empty(0)
        return HeadGradients(self._gradient, nothing, nothing, grad_coefficients)


class NoClasses:
    """The head of a rank that has no classes: it takes part in the collectives, and adds nothing."""

    def __init__(self, head: Head, output_mask: Sequence[bool], rows_in_chunk: int) -> None:
        self._head, self._mask, self._rows = head, output_mask, rows_in_chunk
        self.needs_logit_gradient = False

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        rows = self._head.input.shape[0]
        for start in range(0, max(rows, 1), self._rows):
            chunk = slice(start, min(start + self._rows, rows))
            yield chunk, self._head.input.new_empty((chunk.stop - start, 0))

    def gathered(self, *kinds: tuple[torch.dtype, int]) -> Gathered:
        rows = self._head.input.shape[0]
        return Gathered(rows, kinds, self._head.input.device if rows > self._rows else None)

    def gradients(self, logits: Tensor, need_coefficients: bool) -> dict[str, Any]:
        return {"output_mask": (False, need_coefficients), "grad_rows": None}

    def add_gradients(self, chunk: slice, dz: Tensor) -> None: ...

    def summed(self, grad_coefficients: Tensor | None) -> HeadGradients:
        assert grad_coefficients is not None
        input, weight, _ = self._head
        needs_input, needs_weight, _ = self._mask
        dtype = arithmetic_dtype(input.dtype)
        return HeadGradients(
            torch.zeros_like(input) if needs_input else input.new_empty(0),
            weight.new_zeros(weight.shape if needs_weight else 0, dtype=dtype),
            weight.new_empty(0, dtype=dtype),
            grad_coefficients.to(dtype),
        )


def rows_of_head(head: Head, output_mask: Sequence[bool], rows_in_chunk: int) -> Rows:
    if head.linear_weight.shape[0] == 0:
        return NoClasses(head, output_mask, rows_in_chunk)
    return HeadProducts(head, output_mask, rows_in_chunk)
