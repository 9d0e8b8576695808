"""The products of a head: logits of one chunk of rows at a time, and what their gradient adds to the head's gradients.

Memory beyond inputs and gradients does not grow with the number of rows. Nothing here depends on a backend, and nothing
waits for a device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ._dispatch import multiplies_bfloat16, onednn_linear
from .checks import autocast_enabled
from .groups import Head, HeadGradients
from .transforms.base import arithmetic_dtype

#: Bytes of logits in a chunk: at most, unless it had fewer than _FEWEST_ROWS; and at least, whatever its rows.
_LARGEST, _SMALLEST = 64 * 2**20, 4 * 2**20
_FEWEST_ROWS, _ENOUGH_ROWS = 128, 256

#: The same on a GPU: rows in a chunk, at least and at most, and the bytes of logits that decide between them.
_ROWS_ON_GPU, _LARGEST_ON_GPU = (2048, 8192), 2**30

#: Classes in a block of a product whose result is widened, or whose operands are.
_BLOCK = 2048


def chunk_rows(classes: int, dtype: torch.dtype, device: str = "cpu") -> int:
    """Rows in a chunk. Not a function of N, so that memory beyond inputs and gradients is not one either.

    On a GPU 2048 to 8192, as many as 1 GiB of logits holds: its products want that many rows to be bound by arithmetic
    (2 V d of them for each read of V d weights), and each chunk adds V d numbers to the gradient of the weight. Loss
    and gradients of 8192 rows, d = 2048, V = 50304, bfloat16, took an H100 12.8 ms in chunks of 1024, 9.4 of 4096, 8.7
    of 8192 (PLIF-64; ``benchmarks/results/gpu/h100_80gb_hbm3``).

    On the CPU, by the caches:

    A chunk reads the V d numbers of linear_weight and, where its gradient is formed, reads and writes as many sums: a
    price that is independent of the rows, and like the products proportional to V d. So the rows that pay it back are
    the same whatever V and d are. With float32, V = 32000 and d = 280 on Zen 4, a training step took 0.81 s in chunks
    of 128 rows, 0.74 s of 256, 0.77 s of 512, whose logits no longer stay in the cache. For few classes the price of a
    call of each operator counts instead, and rows are many.
    """
    if device != "cpu":
        fewest, most = _ROWS_ON_GPU
        return max(fewest, min(most, _LARGEST_ON_GPU // (classes * dtype.itemsize)))
    largest, smallest = (size // (classes * dtype.itemsize) for size in (_LARGEST, _SMALLEST))
    return max(_FEWEST_ROWS, min(largest, max(_ENOUGH_ROWS, smallest)))


class HeadProducts:
    """The products around the row kernels, chunk by chunk, and the gradients that they add up to."""

    def __init__(self, head: Head, output_mask: Sequence[bool] = (False, False, False), rows_in_chunk: int = 0) -> None:
        self.input, self.weight, self.bias = input, weight, _ = operands_of(head)
        self.need_input, self.need_weight, self.need_bias = output_mask
        self.needs_logit_gradient = any(output_mask)
        rows, (classes, features) = input.shape[0], weight.shape
        self.rows = rows_in_chunk or chunk_rows(classes, input.dtype, input.device.type)
        self.wide = not _has_fast_products(input)
        self._product = None if self.wide else _onednn_product(input)
        #: One chunk of logits; oneDNN makes a new tensor of each.
        self._buffer = input.new_empty((min(rows, self.rows), classes)) if self._product is None else input
        # The first chunk overwrites, so that no pass over these is spent on zeros.
        self.grad_input = input.new_empty(input.shape if self.need_input else 0)
        dtype = arithmetic_dtype(input.dtype)
        self.grad_weight = input.new_empty((classes, features) if self.need_weight else 0, dtype=dtype)
        self.grad_bias = input.new_empty(classes if self.need_bias else 0, dtype=dtype)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """The chunks of rows, one at least, and the logits of each, to be let go of before the next are asked for."""
        rows = self.input.shape[0]
        for start in range(0, max(rows, 1), self.rows):
            chunk = slice(start, min(start + self.rows, rows))
            x = rows_in(self.input, chunk)
            if self._product is not None:
                yield chunk, self._product(x, self.weight, self.bias)
            else:
                logits = rows_in(self._buffer, slice(0, chunk.stop - start))
                self._logits(x, logits)
                yield chunk, logits

    def _logits(self, x: Tensor, logits: Tensor) -> None:
        if not self.wide:
            if self.bias is None:
                torch.mm(x, self.weight.t(), out=logits)
            else:
                torch.addmm(self.bias, x, self.weight.t(), out=logits)
            return
        x = x.float()
        for block in self._blocks():
            part = x @ self.weight[block].float().t()
            logits[:, block] = part if self.bias is None else part.add_(self.bias[block])

    def gathered(self, *kinds: tuple[torch.dtype, int]) -> Gathered:
        """Memory for results of rows: the type of each, and how many numbers a row has."""
        rows = self.input.shape[0]
        return Gathered(rows, kinds, self.input.device if rows > self.rows else None)

    def gradients(self, logits: Tensor, need_coefficients: bool) -> dict[str, Any]:
        """What a row kernel is asked for: where a gradient of the logits is needed, it is written over them."""
        needed = self.needs_logit_gradient
        return {"output_mask": (needed, need_coefficients), "grad_rows": logits if needed else None}

    def add_gradients(self, chunk: slice, dz: Tensor) -> None:
        """Take in the gradient ``dz`` of the logits of ``chunk``."""
        x = rows_in(self.input, chunk)
        if self.need_input:
            self._grad_input(dz, rows_in(self.grad_input, chunk))
        if self.need_weight:
            self._add_grad_weight(dz, x, chunk.start == 0)
        if self.need_bias:
            for block in self._blocks() if dz.dtype != self.grad_bias.dtype else (slice(None),):
                part = dz[:, block].sum(0, dtype=self.grad_bias.dtype)
                _add(self.grad_bias[block], part, chunk.start == 0)

    def _grad_input(self, dz: Tensor, out: Tensor) -> None:
        if not self.wide:
            torch.mm(dz, self.weight, out=out)
            return
        total = dz.new_zeros(out.shape, dtype=torch.float32)
        for block in self._blocks():
            total.addmm_(dz[:, block].float(), self.weight[block].float())
        out.copy_(total)

    def _add_grad_weight(self, dz: Tensor, x: Tensor, first: bool) -> None:
        total = self.grad_weight
        if dz.dtype == total.dtype:
            _add_product(total, dz, x, first)
            return
        x = x.to(total.dtype) if self.wide else x
        for block in self._blocks():
            if self.wide:
                _add_product(total[block], dz[:, block].to(total.dtype), x, first)
            else:
                _add(total[block], _product_to_be_summed(dz[:, block].t(), x), first)

    def summed(self, grad_coefficients: Tensor | None) -> HeadGradients:
        """The gradients, with ``grad_coefficients``, a sum over the chunks."""
        assert grad_coefficients is not None  # there is at least one chunk
        if grad_coefficients.dtype != self.grad_weight.dtype:
            grad_coefficients = grad_coefficients.to(self.grad_weight.dtype)
        return HeadGradients(self.grad_input, self.grad_weight, self.grad_bias, grad_coefficients)

    def _blocks(self) -> Iterator[slice]:
        classes = self.weight.shape[0]
        return (slice(start, min(start + _BLOCK, classes)) for start in range(0, classes, _BLOCK))


class Gathered:
    """What the chunks say of their rows, as if all rows had been one chunk.

    The memory is made before the first chunk of logits. Small tensors that outlive the logits beside which they were
    made would lie above the hole that the logits leave in the heap of the C library. oneDNN's next chunk, which must be
    aligned, does not fit into the hole, so that memory would grow by a chunk with each chunk (glibc 2.36).
    """

    def __init__(self, rows: int, kinds: Sequence[tuple[torch.dtype, int]], device: torch.device | None) -> None:
        """Without a device: for a single chunk, whose results are handed on."""
        self.results: list[Tensor] = []
        self._one = device is None
        if device is not None:
            shapes = [((rows,) if numbers == 1 else (numbers, rows), dtype) for dtype, numbers in kinds]
            self.results = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes]

    def put(self, chunk: slice, parts: Sequence[Tensor]) -> None:
        if self._one:
            self.results = list(parts)
            return
        for whole, part in zip(self.results, parts, strict=True):
            whole[..., chunk] = part


def _add(total: Tensor, part: Tensor, first: bool) -> None:
    total.copy_(part) if first else total.add_(part)


def _add_product(total: Tensor, dz: Tensor, x: Tensor, first: bool) -> None:
    torch.mm(dz.t(), x, out=total) if first else total.addmm_(dz.t(), x)


def _product_to_be_summed(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for operands in half precision: not rounded to it, where torch can leave that out, which is on GPUs."""
    return a @ b if a.device.type == "cpu" else torch.mm(a, b, out_dtype=torch.float32)


def rows_in(tensor: Tensor, rows: slice) -> Tensor:
    """``tensor[rows]``, where all of it is itself."""
    return tensor if rows.start == 0 and rows.stop == tensor.shape[0] else tensor[rows]


def _has_fast_products(input: Tensor) -> bool:
    """Whether products of this type are faster than the products of operands converted to float32, block by block.

    Without instructions for it, a float16 product of torch's takes up to 90 times as long as a float32 one (torch 2.13,
    Zen 4). A float16 one could overflow, too, where it sums the gradient of the weight.
    """
    if input.dtype not in (torch.float16, torch.bfloat16) or input.device.type != "cpu":
        return True
    return input.dtype == torch.bfloat16 and multiplies_bfloat16()


def _onednn_product(input: Tensor) -> Callable[..., Tensor] | None:
    """oneDNN's linear; None where torch has none, or multiplies by it anyway.

    MKL, which torch.mm calls for float32, packs all of linear_weight for each chunk: in chunks of 256 rows the logits
    took 1.3 to 1.5 times as long as in one product, by oneDNN 0.8 to 1.0 times (d = 280 and 1024, V = 32000, Zen 4,
    with AVX-512 and AVX2). It has no out argument, so that each chunk is a new tensor.
    """
    if input.dtype != torch.float32 or input.device.type != "cpu" or input.numel() == 0:
        return None
    return onednn_linear()


def operands_of(head: Head) -> Head:
    """The weight and the bias in the type of ``input``, which they have but for autocast.

    A copy of the weight lives as long as a call. oneDNN reads a bias as if it were contiguous, whatever its stride is.
    """
    input, weight, bias = head
    weight = weight if weight.dtype == input.dtype else weight.to(input.dtype)
    return Head(input, weight, None if bias is None else bias.to(input.dtype).contiguous())


def sum_of_chunks(total: Tensor | None, part: Tensor) -> Tensor:
    """The sum over chunks, in float64."""
    return part if total is None else total.double() + part


def as_they_are(device: str) -> AbstractContextManager[Any]:
    """In this context, autocast leaves operands on ``device`` in the types that they have."""
    return torch.autocast(device, enabled=False) if autocast_enabled(device) else nullcontext()


def without_autocast(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``function``, whose operands are multiplied in the type that its input has."""

    @functools.wraps(function)
    def kernel(call: Any) -> Any:
        with as_they_are(call.head.input.device.type):
            return function(call)

    return kernel
