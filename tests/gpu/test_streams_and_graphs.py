"""How calls meet the rest of a program on a GPU: no waiting, streams, captured graphs, compilers, determinism."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from losses import distance, disturbed, head_loss_and_gradients, loss_and_gradients

import monosoftmax as ms

BACKENDS = ["cuda", "triton"]


def batch(rows: int, classes: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    input = torch.randn(rows, classes, device="cuda").to(dtype).requires_grad_()
    return input, torch.randint(classes, (rows,), device="cuda")


def step(backend: Any, input: torch.Tensor, target: torch.Tensor, transform: Any) -> tuple[torch.Tensor, ...]:
    loss = ms.cross_entropy(input, target, transform, backend=backend)
    return (loss.detach(), *torch.autograd.grad(loss, (input, *transform.parameters())))


def assert_same(got: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...], bound: float = 1e-6) -> None:
    for a, b in zip(got, wanted, strict=True):
        assert distance(a, b) <= bound * b.double().norm().item()


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["identity", "plif", "spline"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_host_does_not_wait(backend: Any, name: str) -> None:
    transform = disturbed(name).cuda()
    input, target = batch(64, 4096)
    x, weight = (torch.randn(n, 64, device="cuda").bfloat16().requires_grad_() for n in (64, 999))
    leaves = (x, weight, *transform.parameters())
    # A mean, a sum scaled by a number that only the device knows, rows, and a head.
    factor = torch.tensor(0.37, device="cuda")

    def calls() -> None:
        step(backend, input, target, transform)
        torch.autograd.grad(ms.cross_entropy(input, target, transform, backend=backend) * factor, input)
        rows = ms.cross_entropy(input, target, transform, reduction="none", backend=backend)
        torch.autograd.grad(rows, input, torch.ones_like(rows))
        torch.autograd.grad(ms.linear_cross_entropy(x, weight, target % 999, transform, backend=backend), leaves)
        ms.log_softmax(input, transform, backend=backend)

    calls()
    with waiting_is_an_error():
        calls()


@pytest.mark.parametrize("name", ["identity", "plif", "gss"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_captured_step_replays_with_new_inputs(backend: Any, name: str) -> None:
    transform = disturbed(name).cuda()
    input, target = batch(64, 50304)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(backend, input, target, transform)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(backend, input, target, transform)
    with torch.no_grad():
        input.copy_(torch.randn_like(input))
        target.copy_(target.flip(0))
        for parameter in transform.parameters():
            parameter += 0.1
    graph.replay()
    assert_same(captured, step(backend, input, target, transform))


@pytest.mark.parametrize("pieces", [64, 5000])
@pytest.mark.parametrize("backend", BACKENDS)
def test_work_is_in_the_current_stream(backend: Any, pieces: int) -> None:
    transform = disturbed("plif", num_pieces=pieces).cuda()
    input, target = batch(500, 50304)
    wanted = step(backend, input, target, transform)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        later = torch.zeros_like(input).requires_grad_()
        torch.cuda._sleep(20_000_000)
        with torch.no_grad():
            later.copy_(input)  # what the kernels read is there only then
        got = step(backend, later, target, transform)
    torch.cuda.synchronize()
    assert_same(got, wanted, 1e-5)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_training_step(backend: Any, mode: str) -> None:
    transform = disturbed("plif").cuda()
    input, target = batch(40, 4096)
    compiled = torch.compile(lambda z, t: ms.cross_entropy(z, t, transform, backend=backend), fullgraph=True, mode=mode)
    for _ in range(3):
        loss = compiled(input, target)
        got = (loss.detach().clone(), *(g.clone() for g in torch.autograd.grad(loss, (input, transform.raw_slope))))
    assert_same(got, step(backend, input, target, transform), 1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend: Any) -> None:
    torch.manual_seed(0)
    transform = disturbed("plif").cuda()
    operands = {"input": torch.randn(64, 64, device="cuda"), "linear_weight": torch.randn(999, 64, device="cuda") / 4}
    target = torch.randint(999, (64,), device="cuda")
    half = {name: each.bfloat16() for name, each in operands.items()}
    wanted = head_loss_and_gradients(half, target, transform, backend)
    with torch.autocast("cuda", torch.bfloat16):
        got = head_loss_and_gradients(operands, target, transform, backend)
    for key, value in wanted.items():
        assert distance(got[key], value) <= 1e-2 * value.double().norm().item(), key


@pytest.mark.parametrize("pieces", [64, 1000, 5000])
@pytest.mark.parametrize("backend", BACKENDS)
def test_deterministic_algorithms(backend: Any, pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under ``torch.use_deterministic_algorithms`` two runs have the same bits, with sums of any size."""
    transform = disturbed("plif", num_pieces=pieces).cuda()
    input, target = batch(64, 32000, torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        one, two = (loss_and_gradients(input, target, transform, backend) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for key, value in one.items():
        assert torch.equal(value, two[key]), key


@pytest.mark.parametrize("backend", BACKENDS)
def test_function_transforms(backend: Any) -> None:
    transform = disturbed("gss").cuda()
    input, target = batch(5, 77, torch.float32)
    got = torch.func.grad(lambda z: ms.cross_entropy(z, target, transform, backend=backend))(input.detach())
    wanted = loss_and_gradients(input, target, transform, "reference")["input"]
    assert distance(got, wanted) <= 1e-5 * wanted.norm().item()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_device_that_is_not_the_current_one(backend: Any) -> None:
    transform = disturbed("plif").to("cuda:1")
    input, target = (each.to("cuda:1") for each in batch(40, 4096))
    got = loss_and_gradients(input, target, transform, backend)
    wanted = loss_and_gradients(input, target, transform, "reference")
    for key, value in wanted.items():
        assert distance(got[key], value) <= 1e-2 * value.double().norm().item(), key
