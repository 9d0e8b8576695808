"""Other plans, tiles and ways to multiply than those that users get, to choose by measurement on a GPU.

Times bare operators: ``loss``; ``dz``, with the gradient of the logits; ``all``, with those of the coefficients, too.
The variants of an operator take turns with its floor. Each must agree with the first.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import monosoftmax as ms
from monosoftmax import head_products, ops
from monosoftmax.groups import Head, HeadOptions, LossOptions, Transform

from .cases import Case, Inputs
from .contestants import Contestant, choose, make_transform

#: The variant that users get.
USUAL = "as it is"
_MAIN = Case("logits", "train", 8192, 50_304, None, "bfloat16", 2.0)
_WIDE, _WIDEST = replace(_MAIN, rows=3200, classes=128_256), replace(_MAIN, rows=2048, classes=262_144)
_LOSS = replace(_MAIN, mode="no-grad")
_HEAD = Case("head", "train", 8192, 50_304, 2048, "bfloat16", 2.0)


@dataclass(frozen=True)
class Operator:
    """An operator of a backend on one shape, and its variants: ``NAME=VALUE`` of what is not as it is."""

    backend: str
    function: str
    work: str  # loss, dz or all
    case: Case
    variants: tuple[str, ...]

    def __str__(self) -> str:
        dim = "" if self.case.dim is None else f" d={self.case.dim}"
        return f"{self.backend} {self.function} {self.work} {self.case.rows}x{self.case.classes}{dim}"


def operators() -> Iterator[Operator]:
    """All of them. Those whose variants are compiled come last, in case the time is up."""
    rounds = _each("rounds_without_sums", 1, 32)
    kept = (*_each("fewest_blocks", 2, 4), "most_threads=192", "most_threads=128 fewest_threads=64")
    reread = ("keeps_rows=0", *_each("keeps_rows=0 most_threads", 96, 128, 192))
    clusters = ("keeps_rows=0", *_each("fewest_blocks", 2, 4, 8))
    for function in ("identity", "plif-64", "spline"):
        threads = _each("most_threads_losses", 64, 96, 128, 192, 256)
        yield Operator("cuda", function, "loss", _LOSS, (USUAL, *threads, *rounds))
    for function in ("identity", "plif-64"):
        yield Operator("cuda", function, "dz", _MAIN, (USUAL, *kept, *reread, *rounds))
    yield Operator("cuda", "plif-64", "all", _MAIN, (USUAL, *kept, *reread))
    for case in (_WIDE, _WIDEST):
        yield Operator("cuda", "identity", "dz", case, (USUAL, *clusters))
        yield Operator("cuda", "plif-64", "all", case, (USUAL, *clusters))
    chunks = _each("chunk_rows", 2048, 4096, 8192)
    blocks = _each("block", 2048, 8192, 65_536)
    yield Operator("cuda", "plif-64", "all", _HEAD, (USUAL, *chunks, *blocks, *(f"addmm=1 {each}" for each in chunks)))
    lanes = _each("lanes", 128, 512, 1024)
    for function, work, case in (("identity", "loss", _LOSS), ("plif-64", "loss", _LOSS), ("identity", "dz", _MAIN)):
        yield Operator("triton", function, work, case, (USUAL, *lanes))
    tables = ("lanes_with_tables=64", *_each("lanes_with_tables=256 programs", 1, 2))
    yield Operator("triton", "plif-64", "all", _MAIN, (USUAL, *_each("programs", 1, 2, 8), *tables))


def _each(name: str, *values: int) -> tuple[str, ...]:
    return tuple(f"{name}={value}" for value in values)


@contextmanager
def tuned(backend: str, block: int = 0, addmm: int = 0, **wishes: int) -> Iterator[None]:
    """While it lasts, the kernels are planned (``csrc/cuda/plan.h``, Tuning) or launched with ``wishes``."""
    with ExitStack() as stack:
        if block:
            stack.enter_context(mock.patch.object(head_products, "_BLOCK", block))
        if addmm:
            stack.enter_context(
                mock.patch.object(head_products.HeadProducts, "_add_grad_weight", _accumulate_in_the_product)
            )
        if wishes and backend == "triton":
            from monosoftmax.triton_kernels import launch

            stack.enter_context(launch.tuned(**wishes))
        elif wishes:
            if "monosoftmax_cuda_host" in sys.modules:  # emulated
                host = sys.modules["cuda_host"]
                tune = partial(host.module().set_device, 90, 2, host.DEVICES[90])
            else:
                tune = ms.backends.extension.tune_plans
            stack.callback(tune)
            tune(**wishes)
        yield


def _accumulate_in_the_product(head: Any, dz: Tensor, x: Tensor, first: bool) -> None:
    """Gradient of the head's weight, in float32, which the product itself adds to: in torch on CUDA only."""
    options: dict[str, Any] = {"out_dtype": torch.float32, "out": head.grad_weight}
    torch.mm(dz.t(), x, **options) if first else torch.addmm(head.grad_weight, dz.t(), x, **options)


def prepare(operator: Operator, variant: str, case: Case, inputs: Inputs) -> Contestant:
    """The operator under the variant on the inputs of ``case``; :class:`Unavailable` where its backend cannot run."""
    wishes = {each.split("=")[0]: int(each.split("=")[1]) for each in variant.split() if variant != USUAL}
    chunk_rows = wishes.pop("chunk_rows", 0)
    operands = [operand.detach() for operand in inputs.operands]
    device = inputs.target.device
    f = make_transform(operator.function).to(device)
    choose("cross_entropy" if case.dim is None else "linear_cross_entropy", operands[0], f, backend=operator.backend)
    # The identity's coefficients are on the CPU.
    transform = Transform(f.coefficients().detach().to(device), str(f.kernel), list(f.constants()))
    gradient, sums = operator.work != "loss", operator.work == "all"
    given: dict[str, Any] = {"backend": operator.backend, "target": inputs.target, "transform": transform}
    given |= {"options": LossOptions(None, -100, 0.0, 0.0, False), "reduction": "mean" if gradient else "none"}
    if case.dim is None:
        function, mask = ops.cross_entropy, (gradient, sums)
        arguments = ops.CrossEntropy(input=operands[0], output_mask=mask, **given)
    else:
        function, mask = ops.linear_cross_entropy, (gradient, gradient, False, sums)
        given |= {
            "return_log_prob": False,
            "return_statistics": False,
            "head_options": HeadOptions("chunked", chunk_rows, 0.0),
        }
        arguments = ops.LinearCrossEntropy(head=Head(*operands, None), output_mask=mask, **given)

    def step() -> tuple[Tensor, ...]:
        # What nothing differentiates is not seen by autograd, nor by torch's dispatcher.
        with tuned(operator.backend, **wishes), torch.no_grad():
            loss, *others = function(arguments)
            return loss, *(each for each in others[-len(mask) :] if each.numel())

    return Contestant(step, operator.backend, "", len(mask))
