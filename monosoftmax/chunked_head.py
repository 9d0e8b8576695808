"""The LM head fused with the loss: the ``linear_`` operators, made of matrix products and a backend's row operators.

The logits of one chunk of rows at a time are formed in one buffer; the row operator reads them while they are hot and,
where gradients are needed, overwrites them with the gradient dz, which two more products turn into those of input and
linear_weight. The buffer is reused, so that memory beyond inputs and gradients does not grow with N. Nothing here
depends on the backend but the names of the operators, and nothing waits for a device.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import reference
from .float16 import float16_shift
from .ops import FUSED_BACKENDS, library, operator
from .transforms.base import arithmetic_dtype

#: CPU tensors under Triton's interpreter, and under the host execution of the CUDA kernels.
_DISPATCH_KEYS = {"cpu": ("CPU",), "triton": ("CUDA", "CPU"), "cuda": ("CUDA", "CPU")}

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


class _Head:
    """The products around the row operators, chunk by chunk, and the gradients that they add up to."""

    def __init__(
        self,
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        need_input: bool = False,
        need_weight: bool = False,
        need_bias: bool = False,
        rows_in_chunk: int = 0,
    ) -> None:
        self.input, self.weight, self.bias = input, linear_weight, linear_bias
        self.need_input, self.need_weight, self.need_bias = need_input, need_weight, need_bias
        self.needs_logit_gradient = need_input or need_weight or need_bias
        rows, (classes, features) = input.shape[0], linear_weight.shape
        self.rows = rows_in_chunk or chunk_rows(classes, input.dtype, input.device.type)
        self.wide = not _has_fast_products(input)
        self._product = None if self.wide else _onednn_product(input)
        self._buffer = input.new_empty((min(rows, self.rows) if self._product is None else 0, classes))
        # The first chunk overwrites, so that no pass over these is spent on zeros.
        make = torch.empty if rows else torch.zeros
        dtype = arithmetic_dtype(input.dtype)
        self.grad_input = input.new_empty(input.shape if need_input else 0)
        self.grad_weight = make((classes, features) if need_weight else 0, dtype=dtype, device=input.device)
        self.grad_bias = make(classes if need_bias else 0, dtype=dtype, device=input.device)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """The chunks of rows, and the logits of each, to be let go of before the next are asked for."""
        for start in range(0, self.input.shape[0], self.rows):
            chunk = slice(start, min(start + self.rows, self.input.shape[0]))
            if self._product is not None:
                yield chunk, self._product(self.input[chunk], self.weight, self.bias, "none", [], "")
            else:
                logits = self._buffer[: chunk.stop - start]
                self._logits(self.input[chunk], logits)
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

    def add_gradients(self, chunk: slice, dz: Tensor) -> None:
        """Take in the gradient ``dz`` of the logits of ``chunk``."""
        x = self.input[chunk]
        if self.need_input:
            self._grad_input(dz, self.grad_input[chunk])
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
        if self.wide or dz.dtype == total.dtype:
            x = x.to(total.dtype)
            for block in self._blocks() if self.wide else (slice(None),):
                part = dz[:, block].to(total.dtype).t()
                if first:
                    torch.mm(part, x, out=total[block])
                else:
                    total[block].addmm_(part, x)
            return
        for block in self._blocks():
            _add(total[block], _product_to_be_summed(dz[:, block].t(), x), first)

    def _blocks(self) -> Iterator[slice]:
        classes = self.weight.shape[0]
        return (slice(start, min(start + _BLOCK, classes)) for start in range(0, classes, _BLOCK))


def _add(total: Tensor, part: Tensor, first: bool) -> None:
    total.copy_(part) if first else total.add_(part)


def _product_to_be_summed(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for operands in half precision: not rounded to it, where torch can leave that out, which is on GPUs."""
    return a @ b if a.device.type == "cpu" else torch.mm(a, b, out_dtype=torch.float32)


def _has_fast_products(input: Tensor) -> bool:
    """Whether products of this type are faster than those of their operands converted to float32, block by block.

    Without instructions for it, a float16 product of torch's takes up to 90 times as long as a float32 one (torch 2.13,
    Zen 4). A float16 one could overflow, too, where it sums the gradient of the weight.
    """
    if input.dtype not in (torch.float16, torch.bfloat16) or input.device.type != "cpu":
        return True
    if input.dtype == torch.float16 or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _onednn_product(input: Tensor) -> Callable[..., Tensor] | None:
    """oneDNN's linear, which torch.compile uses, too; None where torch has none, or multiplies by it anyway.

    MKL, which torch.mm calls for float32, packs all of linear_weight for each chunk: in chunks of 256 rows the logits
    took 1.3 to 1.5 times as long as in one product, by oneDNN 0.8 to 1.0 times (d = 280 and 1024, V = 32000, Zen 4,
    with AVX-512 and AVX2). It has no out argument, so that each chunk is a new tensor.
    """
    if input.dtype != torch.float32 or input.device.type != "cpu" or input.shape[1] == 0:
        return None
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    product: Callable[..., Tensor] | None = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return product


def _linear_cross_entropy(
    backend: str, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor,
    weight: Tensor | None, coefficients: Tensor, transform: str, constants: list[float], ignore_index: int,
    label_smoothing: float, z_loss: float, method: str, chunk_rows: int, filter_eps: float,
    grad_in_forward: bool | None, return_log_prob: bool, return_lse: bool, scale: Tensor | None,
    need_input: bool, need_linear_weight: bool, need_linear_bias: bool, need_coefficients: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    _check_targets(target, linear_weight.shape[0], ignore_index)
    linear_weight, linear_bias = _operands(input, linear_weight, linear_bias)
    of_transform = coefficients, transform, constants
    if method == "recompute":
        forward = recompute_head(backend).linear_cross_entropy
        needs = need_input, need_linear_weight, need_linear_bias, need_coefficients
        operands = input, linear_weight, linear_bias, target
        options = ignore_index, label_smoothing, z_loss, return_lse, scale
        *of_rows, total, grad_input, grad_weight, grad_bias, grad_coefficients = forward(
            *operands, weight, *of_transform, *options, *needs
        )
        log_prob = of_rows[0].new_empty(0)
        if return_log_prob:  # by a second product: this method has no logits to look at twice
            plain = forward(*operands, None, *of_transform, ignore_index, 0.0, 0.0, False, None, *(False,) * len(needs))
            log_prob = plain[0].neg_()
        return *of_rows, log_prob, total, grad_input, grad_weight, grad_bias, grad_coefficients
    head = _Head(input, linear_weight, linear_bias, need_input, need_linear_weight, need_linear_bias, chunk_rows)
    if scale is None and (head.needs_logit_gradient or need_coefficients):
        raise ValueError("monosoftmax: gradients need a scale")
    row_operator = operator("cross_entropy_" if head.needs_logit_gradient else "cross_entropy", backend)
    dtype, rows = arithmetic_dtype(input.dtype), input.shape[0]
    loss, lse, row_stats = (input.new_empty(shape, dtype=dtype) for shape in ((rows,), (rows,), (2, rows)))
    log_prob = loss.new_empty(rows if return_log_prob else 0)
    sums = _CoefficientSums(coefficients, need_coefficients)
    for chunk, logits in head:
        if return_log_prob:
            # Before the gradient is written over the logits.
            plain = operator("cross_entropy", backend)(
                logits, target[chunk], None, *of_transform, ignore_index, 0.0, 0.0, False, None, False, False
            )
            log_prob[chunk] = plain[0].neg_()
        arguments = (
            logits, target[chunk], weight, *of_transform, ignore_index, label_smoothing, z_loss, return_lse, scale
        )  # fmt: skip
        if head.needs_logit_gradient:
            *of_rows, grad_coefficients = row_operator(*arguments, need_coefficients)
            head.add_gradients(chunk, logits)
        else:
            *of_rows, _, _, grad_coefficients = row_operator(*arguments, False, need_coefficients)
        loss[chunk], lse[chunk], row_stats[:, chunk] = of_rows
        sums.add(grad_coefficients)
        del logits, arguments
    total = loss.new_empty(0) if scale is None else loss.sum() * scale
    return loss, lse, row_stats, log_prob, total, head.grad_input, head.grad_weight, head.grad_bias, sums.total()


def _linear_cross_entropy_backward(
    backend: str, grad_loss: Tensor | None, grad_lse: Tensor | None, input: Tensor, linear_weight: Tensor,
    linear_bias: Tensor | None, target: Tensor, weight: Tensor | None, coefficients: Tensor, transform: str,
    constants: list[float], row_stats: Tensor, ignore_index: int, label_smoothing: float, z_loss: float,
    method: str, chunk_rows: int, filter_eps: float,
    need_input: bool, need_linear_weight: bool, need_linear_bias: bool, need_coefficients: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    linear_weight, linear_bias = _operands(input, linear_weight, linear_bias)
    if method == "recompute":
        gradients: tuple[Tensor, ...] = recompute_head(backend).linear_cross_entropy_backward(
            grad_loss, grad_lse, input, linear_weight, linear_bias, target, weight, coefficients, transform, constants,
            row_stats, ignore_index, label_smoothing, z_loss, filter_eps, need_input, need_linear_weight,
            need_linear_bias, need_coefficients,
        )  # fmt: skip
        return gradients
    head = _Head(input, linear_weight, linear_bias, need_input, need_linear_weight, need_linear_bias, chunk_rows)
    sums = _CoefficientSums(coefficients, need_coefficients)
    shift = None
    if input.dtype == torch.float16 and target.numel() > 0:
        upstream = [each.abs().amax() for each in (grad_loss, grad_lse) if each is not None]
        largest = torch.stack(upstream).amax()
        shift = float16_shift(largest, target, weight, ignore_index)
        grad_loss, grad_lse = (None if each is None else each * shift for each in (grad_loss, grad_lse))
    for chunk, logits in head:
        arguments = (
            None if grad_loss is None else grad_loss[chunk], None if grad_lse is None else grad_lse[chunk],
            logits, target[chunk], weight, coefficients, transform, constants, row_stats[:, chunk],
            ignore_index, label_smoothing, z_loss,
        )  # fmt: skip
        if head.needs_logit_gradient:
            grad_coefficients = operator("cross_entropy_backward_", backend)(*arguments, need_coefficients)
            head.add_gradients(chunk, logits)
        else:
            grad_coefficients = operator("cross_entropy_backward", backend)(*arguments, False, need_coefficients)[1]
        sums.add(grad_coefficients)
        del logits, arguments
    gradients = head.grad_input, head.grad_weight, head.grad_bias, sums.total()
    return gradients if shift is None else tuple(each.div_(shift) for each in gradients)


def _linear_token_statistics(
    backend: str, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor,
    coefficients: Tensor, transform: str, constants: list[float], ignore_index: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    _check_targets(target, linear_weight.shape[0], ignore_index)
    linear_weight, linear_bias = _operands(input, linear_weight, linear_bias)
    dtype, rows = arithmetic_dtype(input.dtype), input.shape[0]
    log_prob, entropy, lse = (input.new_empty(rows, dtype=dtype) for _ in range(3))
    argmax, rank = target.new_empty(rows), target.new_empty(rows)
    for chunk, logits in _Head(input, linear_weight, linear_bias):
        log_prob[chunk], entropy[chunk], argmax[chunk], lse[chunk], rank[chunk] = operator("token_statistics", backend)(
            logits, target[chunk], coefficients, transform, constants, ignore_index
        )
        del logits
    return log_prob, entropy, argmax, lse, rank


def recompute_head(backend: str) -> ModuleType:
    """The module of a backend whose kernels compute the logits of a tile where they are used, twice."""
    if backend != "triton":
        raise ValueError(f'monosoftmax: the {backend} backend has no method "recompute"')
    return importlib.import_module(f"{__package__}.triton_kernels.recompute_head")


class _CoefficientSums:
    """The gradient of f's coefficients, summed over the chunks in float64."""

    def __init__(self, coefficients: Tensor, needed: bool) -> None:
        self._coefficients = coefficients
        self._sum = coefficients.new_zeros(coefficients.shape if needed else 0, dtype=torch.float64)

    def add(self, gradient: Tensor) -> None:
        self._sum += gradient

    def total(self) -> Tensor:
        return self._sum.to(self._coefficients.dtype)


def _operands(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The weight and the bias in the type of ``input``, which they have but for autocast.

    A copy of the weight lives as long as a call. oneDNN reads a bias as if it were contiguous, whatever its stride is.
    """
    bias = None if linear_bias is None else linear_bias.to(input.dtype).contiguous()
    return linear_weight.to(input.dtype), bias


def _check_targets(target: Tensor, classes: int, ignore_index: int) -> None:
    # Here, and not only in the row operator, whose rows are counted from the start of a chunk.
    outside = (target != ignore_index) & ((target < 0) | (target >= classes))
    reference.raise_if_any(outside, target, classes, ignore_index)


def _without_autocast(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    # The input has the type that the operands are meant to be multiplied in.
    def kernel(*arguments: Any) -> Any:
        device = next(each.device.type for each in arguments if isinstance(each, Tensor))
        with torch.autocast(device, enabled=False):
            return function(backend, *arguments)

    return kernel


def register(backend: str) -> None:
    """Give the ``linear_`` operators of ``backend`` their implementation."""
    for name, function in (
        ("linear_cross_entropy", _linear_cross_entropy),
        ("linear_cross_entropy_backward", _linear_cross_entropy_backward),
        ("linear_token_statistics", _linear_token_statistics),
    ):
        for key in _DISPATCH_KEYS[backend]:
            library.impl(operator(name, backend), _without_autocast(function, backend), key)


for _backend in FUSED_BACKENDS:
    register(_backend)
