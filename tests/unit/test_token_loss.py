"""ms.linear_token_loss, and the losses and the distillation on top of it, against plain PyTorch on all logits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from losses import SOME_TRANSFORMS, TRANSFORMS, disturbed
from tiers import mostly_slow
from token_batches import D, K, N, V, batch, materialised, products, rich, weights
from torch import Tensor

import monosoftmax as ms
from monosoftmax import gradients_ahead, head_products
from monosoftmax.transforms import PLIF, Chain, Scale, SoftCap

BACKENDS: list[Any] = ["reference", "cpu"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def thin_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_products, "chunk_rows", lambda *_: 3)


@pytest.mark.grid
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("composed", [False, True])
def test_values_and_gradients(name: str, dtype: torch.dtype, backend: Any, composed: bool) -> None:
    head, target, classes = batch(dtype)
    f = disturbed(name).to(torch.float64 if dtype == torch.float64 else torch.float32)
    g = Chain(Scale(0.5), SoftCap(6.0), f) if composed else f
    a, b = weights(dtype)
    loss = ms.linear_token_loss(
        rich, head[0], head[1], target, g, linear_bias=head[2], per_token=(a, b), classes=classes,
        temperature=0.8 if composed else 1.0, backend=backend,
    )  # fmt: skip
    wide = [each.detach().double().requires_grad_() for each in head]
    exact = copy.deepcopy(g).double()
    truth = rich(materialised(wide, target, classes, exact, 0.8 if composed else 1.0), a.double(), b.double())
    eps = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}[dtype]
    torch.testing.assert_close(loss.double(), truth, rtol=eps, atol=eps)
    raws, exact_raws = list(f.parameters()), list(exact.parameters())
    got = torch.autograd.grad(2 * loss, [*head, *raws])
    for each, wanted in zip(got, torch.autograd.grad(2 * truth, [*wide, *exact_raws]), strict=True):
        size = max(1.0, wanted.abs().max().item())
        torch.testing.assert_close(each.double(), wanted, rtol=eps, atol=eps * size)


@pytest.mark.grid(1)
@pytest.mark.parametrize("name", mostly_slow(TRANSFORMS, SOME_TRANSFORMS))
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(name: str, backend: Any) -> None:
    head, target, classes = batch()
    f, given = disturbed(name).double(), weights(torch.float64)

    def loss(*head: Tensor) -> Tensor:
        return ms.linear_token_loss(
            rich, head[0], head[1], target, f, linear_bias=head[2], per_token=given, classes=classes, backend=backend
        )

    torch.autograd.gradcheck(loss, head)


def test_products() -> None:
    """Three; four in float16, which finds a scale first; one without gradients."""
    head, target, classes = batch(torch.float32)
    given = weights(torch.float32)

    def loss(dtype: torch.dtype = torch.float32) -> Tensor:
        input, weight, bias = (each.detach().to(dtype).requires_grad_() for each in head)
        return ms.linear_token_loss(
            rich, input, weight, target, linear_bias=bias, per_token=given, classes=classes, backend="cpu"
        )

    assert products(lambda: loss().backward()) == 3
    assert products(lambda: loss(torch.float16).backward()) == 4
    with torch.no_grad():
        assert products(loss) == 1


def test_ignored_rows_may_hold_anything() -> None:
    head, target, classes = batch(torch.float32)
    with torch.no_grad():
        head[0][4] = 3e38  # whose logits are inf and NaN

    def loss_fn(tokens: ms.Tokens, a: Tensor, here: Tensor) -> Tensor:
        every = a * tokens.log_prob + tokens.entropy + tokens.class_log_prob.sum(1)
        return torch.where(here, every, 0.0).sum()

    loss = ms.linear_token_loss(
        loss_fn, head[0], head[1], target, PLIF(), per_token=(weights(torch.float32)[0], target != -100),
        classes=classes, backend="cpu",
    )  # fmt: skip
    grads = torch.autograd.grad(loss, head[:2])
    assert bool(loss.isfinite()) and all(bool(each.isfinite().all()) for each in grads)
    assert not grads[0][4].any()


def test_log_p_is_never_above_0_and_next_to_0_keeps_its_gradient() -> None:
    """p next to 1: the two parts of the gradient cancel, and the entropy is next to 0."""
    weight = torch.zeros(V, D)
    weight[3] = 10.0
    input = torch.ones(4, D) * torch.tensor([[0.2], [0.5], [1.0], [2.0]])
    target, classes = torch.full((4,), 3), torch.tensor([[3, 4]] * 4)

    def both(dtype: torch.dtype, backend: Any) -> tuple[list[Tensor], list[Tensor]]:
        leaf, seen = input.to(dtype).requires_grad_(), []

        def loss_fn(tokens: ms.Tokens) -> Tensor:
            seen.append([each.detach() for each in tokens[:4]])
            return (tokens.log_prob + 2 * tokens.entropy + tokens.class_log_prob[:, 0]).sum()

        loss = ms.linear_token_loss(loss_fn, leaf, weight.to(dtype), target, classes=classes, backend=backend)
        (grad,) = torch.autograd.grad(loss, leaf)
        return [torch.cat(each) for each in zip(*seen, strict=True)], [grad]

    found, (grad,) = both(torch.float32, "cpu")
    truth, (wanted,) = both(torch.float64, "reference")
    assert bool((found[0] <= 0).all()) and bool((found[3] <= 0).all()) and bool((found[1] >= 0).all())
    for got, right in zip((*found, grad), (*truth, wanted), strict=True):
        torch.testing.assert_close(got.double(), right, rtol=2e-5, atol=1e-6)


def test_scaled_twice_and_with_a_kept_graph() -> None:
    head, target, _ = batch(torch.float32)
    loss = ms.linear_token_loss(lambda tokens: -tokens.log_prob.sum(), head[0], head[1], target, backend="cpu")
    once = torch.autograd.grad(3 * loss, head[:2], retain_graph=True)
    twice = torch.autograd.grad(6 * loss, head[:2])
    for a, b in zip(once, twice, strict=True):
        torch.testing.assert_close(2 * a, b)
    assert gradients_ahead.waiting_bytes(torch.device("cpu")) == 0


def test_double_backward_is_an_error() -> None:
    head, target, _ = batch(torch.float32)
    loss = ms.linear_token_loss(lambda tokens: -tokens.log_prob.sum(), head[0], head[1], target, backend="cpu")
    (grad,) = torch.autograd.grad(loss, head[0], create_graph=True)
    with pytest.raises(
        RuntimeError, match='linear_token_loss does not support double backward; use backend="reference"'
    ):
        grad.sum().backward()


def test_autocast_and_compile() -> None:
    head, target, _ = batch(torch.float32)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return ms.linear_token_loss(lambda tokens: -tokens.log_prob.sum(), x, w, target, PLIF(), backend="cpu")

    plain = torch.autograd.grad(loss(head[0], head[1]), head[:2])
    compiled = torch.autograd.grad(torch.compile(loss, backend="eager")(head[0], head[1]), head[:2])
    torch.testing.assert_close(compiled, plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = torch.autograd.grad(loss(head[0], head[1]), head[:2])
    for each, wanted in zip(rough, plain, strict=True):
        assert each.dtype == torch.float32
        torch.testing.assert_close(each, wanted, rtol=0.1, atol=0.1)


def test_no_rows() -> None:
    head = [each.detach().requires_grad_() for each in (torch.zeros(0, D), torch.randn(V, D))]
    target, classes = torch.zeros(0, dtype=torch.int64), torch.zeros(0, K, dtype=torch.int64)
    for backend in BACKENDS:
        loss = ms.linear_token_loss(
            lambda tokens: tokens.log_prob.sum() + tokens.class_log_prob.sum(), head[0], head[1], target,
            classes=classes, backend=backend,
        )  # fmt: skip
        assert loss == 0
        assert not torch.autograd.grad(loss, head[1])[0].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"loss_fn": 3}, TypeError, "loss_fn must be a function of tokens, got int"),
        ({"loss_fn": lambda tokens: 3.0}, ValueError, "loss_fn must return a 0-dim floating-point tensor.*got float"),
        ({"loss_fn": lambda tokens: tokens.log_prob}, ValueError, r"the sum over its tokens, got shape \("),
        ({"per_token": [torch.ones(3)]}, ValueError, r"per_token\[0\] must begin with the shape of target, \(7,\)"),
        ({"per_token": [torch.ones(N, requires_grad=True)]}, ValueError, r"per_token\[0\] must not require a gradient"),
        ({"classes": torch.zeros(N, 2)}, ValueError, r"classes must be int64 of shape \(7, 'k'\), got torch.float32"),
        ({"classes": torch.full((N, 2), V)}, (IndexError, RuntimeError), "out of bounds"),
        ({"target": torch.full((N,), V)}, IndexError, "target 41"),
        ({"linear_weight": torch.randn(V, D + 1)}, ValueError, "must agree in d"),
    ],
)
def test_refusals(backend: Any, change: dict[str, Any], error: Any, message: str) -> None:
    head, target, _ = batch(torch.float32)
    given = {
        "loss_fn": lambda tokens, *_: tokens.log_prob.sum(), "input": head[0], "linear_weight": head[1],
        "target": target, "backend": backend,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        ms.linear_token_loss(**(given | change))


def test_a_parameter_inside_of_the_loss_is_an_error() -> None:
    """It would get no gradient."""
    head, target, _ = batch(torch.float32)
    beta = torch.tensor(1.0, requires_grad=True)
    with pytest.raises(ValueError, match=r"loss_fn must depend on what requires a gradient through its tokens only"):
        ms.linear_token_loss(lambda tokens: (beta * tokens.log_prob).sum(), head[0], head[1], target, backend="cpu")
