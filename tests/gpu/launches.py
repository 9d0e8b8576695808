"""A few launches of every family of kernels, on allocations of their own, for compute-sanitizer and ncu.

    compute-sanitizer --tool memcheck python tests/gpu/launches.py sanitize cuda
    ncu ... python tests/gpu/launches.py count

Without a GPU the emulators run them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from losses import disturbed, loss_and_gradients
from operator_calls import PLAIN, kernel_transform

import monosoftmax as ms
from monosoftmax.groups import Upstream
from monosoftmax.row_kernels import row_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

#: Transforms that choose every way to sum: none, a vector, tables of lanes, tables of warps or atomics.
_TRANSFORMS: list[tuple[str, dict[str, Any]]] = [
    ("identity", {}), ("gss", {}), ("plif", {"num_pieces": 64}), ("plif", {"num_pieces": 5000}),
    ("spline", {"num_bins": 16}), ("monotonic_mlp", {}),
]  # fmt: skip
#: Rows of a block and of a cluster, of an alignment that differs from row to row and of one that does not.
_SHAPES = [(3, 2051), (2, 16384)] if DEVICE == "cuda" else [(2, 70)]


def sanitize(backend: Any) -> Iterator[str]:
    """Loss, gradients ahead and later, in place, rescaled; log p and its gradient; token statistics."""
    for name, settings in _TRANSFORMS:
        transform = disturbed(name, **settings).to(DEVICE)
        for rows, classes in _SHAPES:
            for dtype in (torch.bfloat16, torch.float32):
                input, target = torch.randn(rows, classes, device=DEVICE).to(dtype), torch.arange(rows, device=DEVICE)
                smoothing = 0.1 if dtype == torch.float32 else 0.0
                found = loss_and_gradients(input, target, transform, backend, label_smoothing=smoothing)
                half = torch.tensor(0.5, device=DEVICE)
                found |= loss_and_gradients(input, target, transform, backend, upstream=(half,))
                rows_of_ones = (torch.ones(rows, device=DEVICE),)
                found |= loss_and_gradients(input, target, transform, backend, upstream=rows_of_ones, reduction="none")
                leaf = input.clone().requires_grad_()
                log_p = ms.log_softmax(leaf, transform, backend=backend)
                found["gradient of log p"] = torch.autograd.grad(log_p, leaf, torch.ones_like(log_p))[0]
                x, weight = torch.randn(rows, 16, device=DEVICE), torch.randn(classes, 16, device=DEVICE)
                ms.linear_cross_entropy(x.requires_grad_(), weight, target, transform, backend=backend).backward()
                found["log p"] = ms.linear_token_statistics(x, weight, target, transform, backend=backend).log_prob
                wrong = [key for key, value in found.items() if not value.isfinite().all()]
                assert not wrong, wrong
                yield f"{name} {settings} {rows} x {classes} {dtype}"


def count(backend: Any) -> Iterator[str]:
    """The kernels whose counters are wanted, after a first launch: loss; loss and d logits; and d coefficients."""
    rows, classes = (2048, 50304) if DEVICE == "cuda" else (4, 700)
    input = torch.empty(rows, classes, dtype=torch.bfloat16, device=DEVICE).normal_(-3, 2.2)
    target = torch.randint(classes, (rows,), device=DEVICE)
    upstream = Upstream(torch.full((), 1 / rows, device=DEVICE))
    for transform, gradient, sums in (
        (ms.transforms.Identity(), True, False),
        (ms.transforms.PLIF(64), False, False),
        (ms.transforms.PLIF(64), True, True),
    ):
        row_kernels(backend).cross_entropy(
            input,
            target,
            kernel_transform(transform, device=DEVICE),
            PLAIN,
            upstream=upstream if gradient else None,
            output_mask=(gradient, sums),
        )
        yield f"{transform} gradient={gradient} sums={sums}"


def where(backend: str) -> AbstractContextManager[Any]:
    if DEVICE == "cuda":
        return nullcontext()
    if backend == "cuda":
        from cuda_host import executing

        return executing()
    from triton_interpreter import interpreting

    return interpreting()


def main() -> None:
    launches = {"sanitize": sanitize, "count": count}[sys.argv[1]]
    torch.manual_seed(0)
    done = 0
    for backend in sys.argv[2:] or ("cuda", "triton"):
        with where(backend):
            for _ in launches(backend):
                done += 1
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print("launched", done)


if __name__ == "__main__":
    main()
