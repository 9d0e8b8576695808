"""ms.linear_cross_entropy on a GPU: chunks, tiles that are computed again, and how much memory either takes."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from losses import DTYPES, distance, disturbed, head_loss_and_gradients

import monosoftmax as ms

BACKENDS = ["cuda", "triton"]
MIB = 2**20


def head(rows: int, features: int, classes: int, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    return {
        "input": torch.randn(rows, features, device=device).to(dtype),
        "linear_weight": (torch.randn(classes, features, device=device) * (3 / features**0.5)).to(dtype),
        "linear_bias": torch.randn(classes, device=device).to(dtype),
    }


@pytest.mark.emulated
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["identity", "plif", "gss"])
@pytest.mark.parametrize(("backend", "method"), [("cuda", "chunked"), ("triton", "chunked"), ("triton", "recompute")])
def test_loss_and_gradients(backend: Any, method: Any, name: str, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    shape = (300, 256, 5003) if device.type == "cuda" else (11, 16, 70)
    operands = head(*shape, dtype, device)
    target = torch.randint(shape[2], shape[:1], device=device)
    target[3] = -100
    transform = disturbed(name).to(device)
    how = {"method": method} | ({"chunk_rows": (shape[0] + 2) // 3} if method == "chunked" else {})
    truth = head_loss_and_gradients(operands, target, transform, "reference", torch.float64)
    plain = head_loss_and_gradients(operands, target, transform, "reference")
    got = head_loss_and_gradients(operands, target, transform, backend, **how)
    for key, wanted in truth.items():
        slack = 2e-5 * wanted.norm().item() + 1e-6
        assert distance(got[key], wanted) <= 2 * distance(plain[key], wanted) + slack, key
    with torch.no_grad():
        loss = ms.linear_cross_entropy(
            operands["input"], operands["linear_weight"], target, transform, linear_bias=operands["linear_bias"],
            backend=backend, method=method,
        )  # fmt: skip
    assert distance(loss, truth["loss"]) <= 2 * distance(plain["loss"], truth["loss"]) + 1e-5 * truth["loss"].item()


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_given_take_no_memory_but_their_gradient(backend: Any) -> None:
    """Beyond the gradient: O(N), and the buffers of the sums of a table."""
    rows, classes = 4096, 50304
    input = torch.randn(rows, classes, device="cuda", dtype=torch.bfloat16).requires_grad_()
    target = torch.randint(classes, (rows,), device="cuda")
    transform = ms.transforms.PLIF(64).cuda()
    assert (
        _extra(lambda: ms.cross_entropy(input, target, transform, backend=backend), (input, transform.raw_slope))
        <= {
            "cuda": 2 * MIB,
            "triton": 72 * MIB,  # 64 MiB of tables, one for each lane
        }[backend]
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_head_holds_one_chunk_of_logits(backend: Any) -> None:
    """Beyond gradients: a chunk of logits, and the gradient of the weight in float32, however many rows there are."""
    features, classes = 512, 50304
    transform = ms.transforms.PLIF(64).cuda()
    weight = torch.randn(classes, features, device="cuda", dtype=torch.bfloat16).requires_grad_()
    extra = []
    for rows in (8192, 32768):
        input = torch.randn(rows, features, device="cuda", dtype=torch.bfloat16).requires_grad_()
        target = torch.randint(classes, (rows,), device="cuda")
        loss = partial(
            ms.linear_cross_entropy, input, weight, target, transform,
            backend=backend, method="chunked", chunk_rows=2048,
        )  # fmt: skip
        extra.append(_extra(loss, (input, weight, transform.raw_slope)))
    chunk, wide = 2048 * classes * 2, classes * features * 4
    assert max(extra) <= chunk + wide + 96 * MIB, [each / MIB for each in extra]
    assert extra[1] - extra[0] <= 4 * MIB


def _extra(loss: Any, leaves: tuple[torch.Tensor, ...]) -> int:
    """Bytes at the peak of a step beyond what was there and the gradients that it returns."""
    torch.autograd.grad(loss(), leaves)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = torch.autograd.grad(loss(), leaves)
    torch.cuda.synchronize()
    returned = sum(each.numel() * each.element_size() for each in gradients)
    return torch.cuda.max_memory_allocated() - before - returned
