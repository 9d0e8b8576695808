"""Chains, temperatures, class probabilities, token losses and distillation on the GPU backends, emulated.

The public functions against the reference in float64; tests/row_contract.py has the kernels below them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hands import on
from losses import SOME_TRANSFORMS, TRANSFORMS, disturbed
from operator_calls import kernel_transform, opcheck
from tiers import mostly_slow
from token_batches import K, N, V, batch, rich, weights
from torch import Tensor

import monosoftmax as ms
from monosoftmax import distilled_head, head_products, ops
from monosoftmax.groups import Divergence, Head, Teacher
from monosoftmax.transforms import Chain, MonotonicTransform, Scale, SoftCap

BACKENDS: list[Any] = ["triton", "cuda"]
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def thin_chunks(monkeypatch: pytest.MonkeyPatch, backend: str) -> Iterator[None]:
    monkeypatch.setattr(head_products, "chunk_rows", lambda *_: 4)
    monkeypatch.setattr(distilled_head, "chunk_rows", lambda *_: 6)
    with on(backend):
        yield


def chain(f: MonotonicTransform) -> Chain:
    return Chain(Scale(0.5), SoftCap(6.0), f, Scale(1.25))


def check(call: Callable[..., Tensor], head: list[Tensor], f: MonotonicTransform, backend: Any) -> None:
    """``call(head, f, backend)`` and its gradients for the head and f, against the reference in float64."""
    results = []
    for dtype, of in ((head[0].dtype, backend), (torch.float64, "reference")):
        leaves = [each.detach().to(dtype).requires_grad_() for each in head]
        g = copy.deepcopy(f).to(torch.float64 if of == "reference" else torch.float32)
        value = call(leaves, g, of)
        gradients = torch.autograd.grad(2 * value, [*leaves, *g.parameters()])
        results.append([value.detach(), *gradients])
    eps = 6e-2 if head[0].dtype == torch.bfloat16 else 8e-3 if head[0].dtype == torch.float16 else 3e-5
    for got, wanted in zip(*results, strict=True):
        size = max(1.0, wanted.abs().max().item())
        torch.testing.assert_close(got.double(), wanted, rtol=eps, atol=eps * size)


@pytest.mark.grid
@pytest.mark.parametrize("name", mostly_slow(TRANSFORMS, SOME_TRANSFORMS))
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("backend", BACKENDS)
def test_token_loss(name: str, dtype: torch.dtype, backend: Any) -> None:
    head, target, classes = batch(dtype)
    a, b = weights(torch.float32)

    def call(head: list[Tensor], f: MonotonicTransform, backend: Any) -> Tensor:
        wide = f.to(torch.float64) if backend == "reference" else f
        given = (a.double(), b.double()) if backend == "reference" else (a, b)
        return ms.linear_token_loss(
            rich, head[0], head[1], target, chain(wide), linear_bias=head[2], per_token=given, classes=classes,
            temperature=torch.tensor(0.8), backend=backend,
        )  # fmt: skip

    assert classes.shape == (N, K)
    check(call, head, disturbed(name), backend)


@pytest.mark.grid
@pytest.mark.parametrize("name", mostly_slow(TRANSFORMS, SOME_TRANSFORMS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_distillation(name: str, dtype: torch.dtype, divergence: Any, reduction: Any, backend: Any) -> None:
    head, _, _ = batch(dtype)
    generator = torch.Generator().manual_seed(1)
    large, other = (torch.randn(shape, generator=generator).to(dtype) for shape in ((N, 4), (V, 4)))
    teacher = chain(disturbed("plif", 1))

    def call(head: list[Tensor], f: MonotonicTransform, backend: Any) -> Tensor:
        g = copy.deepcopy(teacher).to(torch.float64 if backend == "reference" else torch.float32)
        losses = ms.linear_distillation(
            head[0], head[1], large.to(head[0].dtype), other.to(head[0].dtype), f, g, student_bias=head[2],
            divergence=divergence, beta=0.3, temperature=0.8, reduction=reduction, backend=backend,
        )  # fmt: skip
        return losses if reduction == "mean" else (losses * torch.linspace(0.5, 1.0, N).to(losses)).sum()

    check(call, head, disturbed(name), backend)


@pytest.mark.grid
@pytest.mark.parametrize("name", mostly_slow(TRANSFORMS, SOME_TRANSFORMS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_losses(name: str, dtype: torch.dtype, kind: str, backend: Any) -> None:
    """Of a head and of given logits, under a chain, a temperature, smoothed labels and class weights."""
    head, indices, _ = batch(dtype)
    probabilities = torch.rand(N, V, generator=torch.Generator().manual_seed(1)).softmax(1)
    target = indices if kind == "indices" else probabilities
    weight = torch.linspace(0.5, 1.5, V)

    def call(head: list[Tensor], f: MonotonicTransform, backend: Any) -> Tensor:
        given = target if kind == "indices" else target.to(torch.float64 if backend == "reference" else dtype).double()
        given = given if kind == "indices" or backend == "reference" else given.to(dtype)
        options: dict[str, Any] = {
            "weight": weight, "label_smoothing": 0.1, "z_loss": 1e-2, "temperature": 0.8, "backend": backend
        }  # fmt: skip
        of_head = ms.linear_cross_entropy(head[0], head[1], given, chain(f), linear_bias=head[2], **options)
        return of_head + ms.cross_entropy(head[0] @ head[1].T, given, chain(f), reduction="sum", **options) / N

    check(call, head, disturbed(name), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_beside_the_loss(backend: Any) -> None:
    head, target, _ = batch(torch.float32)
    f = chain(disturbed("plif"))
    loss, found = ms.linear_cross_entropy(
        head[0], head[1], target, f, linear_bias=head[2], return_statistics=True, backend=backend
    )
    wanted = ms.linear_token_statistics(head[0], head[1], target, f, linear_bias=head[2], backend="reference")
    for got, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, right, rtol=2e-5, atol=2e-5)
    loss.backward()
    assert head[1].grad is not None


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place(backend: Any) -> None:
    torch.manual_seed(0)
    target, f = torch.randint(0, V, (N,)), disturbed("plif")
    leaves = [torch.randn(N, V, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2)]
    for leaf, inplace in zip(leaves, (True, False), strict=True):
        logits = 2 * leaf
        (3 * ms.cross_entropy(logits, target, f, inplace=inplace, backend=backend)).backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_distillation(backend: Any) -> None:
    head, _, _ = batch(torch.float32)
    teacher = [torch.randn(shape) for shape in ((N, 4), (V, 4), (V,))]
    f = kernel_transform(disturbed("plif"), requires_grad=True)
    opcheck(
        ops.LinearDistillation(
            backend=backend,
            head=Head(*head),
            transform=f,
            teacher=Teacher(*teacher, *kernel_transform(disturbed("gss"))),
            divergence=Divergence("jsd", 0.3),
            scale=torch.rand(N),
            output_mask=(True,) * 4,
        )
    )
