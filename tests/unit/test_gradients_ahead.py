"""Gradients that the forward pass computes ahead: how many wait, how they are saved, and a second backward pass."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from losses import disturbed
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import monosoftmax as ms
from monosoftmax import gradients_ahead

ROWS, FEATURES, CLASSES = 3, 5, 17
CPU = torch.device("cpu")
WEIGHT_BYTES = 4 * CLASSES * FEATURES
#: What one loss of the head below computes ahead, in bytes: of input, weight and the 50 x 2 coefficients of f.
ONE = WEIGHT_BYTES + 4 * ROWS * FEATURES + 4 * 100


@pytest.fixture(autouse=True)
def _nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients_ahead, "_waiting", {})


@pytest.fixture
def head() -> tuple[list[Tensor], Tensor, Tensor, ms.transforms.MonotonicTransform]:
    """Hidden states of 6 losses, the weight they share, targets and f."""
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(ROWS, FEATURES, generator=generator).requires_grad_() for _ in range(6)]
    weight = torch.randn(CLASSES, FEATURES, generator=generator).requires_grad_()
    return states, weight, torch.tensor([0, 16, 3]), disturbed("plif")


def gradients(loss: Tensor, leaves: list[Tensor], **options: Any) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves, **options))


@pytest.mark.parametrize(("wish", "limit", "waiting"), [
    (None, 0, 1), (None, 3 * ONE, 3), (None, 2**20, 6), (True, 0, 6), (False, 2**20, 0)
])  # fmt: skip
def test_as_many_wait_as_are_let(
    head: Any, wish: bool | None, limit: int, waiting: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients_ahead, "BESIDES_ONE", limit)
    states, weight, target, transform = head
    leaves = [*states, weight, *transform.parameters()]

    def losses(**options: Any) -> list[Tensor]:
        return [ms.linear_cross_entropy(each, weight, target, transform, **options) for each in states]

    computed = losses(backend="cpu", grad_in_forward=wish)
    assert gradients_ahead.waiting_bytes(CPU) == waiting * ONE
    got = gradients(torch.stack(computed).sum(), leaves)
    del computed
    gc.collect()
    assert gradients_ahead.waiting_bytes(CPU) == 0
    wanted = gradients(torch.stack(losses(backend="reference")).sum(), leaves)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_logits_wait_within_the_same_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients_ahead, "BESIDES_ONE", 0)
    logits = [torch.randn(ROWS, CLASSES).requires_grad_() for _ in range(3)]
    losses = [ms.cross_entropy(each, torch.tensor([0, 1, 2]), backend="cpu") for each in logits]
    assert gradients_ahead.waiting_bytes(CPU) == 4 * ROWS * CLASSES
    for each, loss in zip(logits, losses, strict=True):
        (got,) = gradients(loss, [each])
        (wanted,) = gradients(torch.nn.functional.cross_entropy(each, torch.tensor([0, 1, 2])), [each])
        torch.testing.assert_close(got, wanted)


def test_what_is_dropped_waits_no_more(head: Any) -> None:
    states, weight, target, transform = head
    loss = ms.linear_cross_entropy(states[0], weight, target, transform, backend="cpu")
    assert gradients_ahead.waiting_bytes(CPU) == ONE
    del loss
    gc.collect()
    assert gradients_ahead.waiting_bytes(CPU) == 0


def test_checkpoints_and_hooks_see_what_waits(head: Any) -> None:
    states, weight, target, transform = head
    leaves = [states[0], weight, *transform.parameters()]

    def loss(input: Tensor) -> Tensor:
        return ms.linear_cross_entropy(input, weight, target, transform, backend="cpu")

    wanted = gradients(loss(states[0]), leaves)
    again = checkpoint(loss, states[0], use_reentrant=False)
    assert gradients_ahead.waiting_bytes(CPU) == 0
    packed = []

    def pack(tensor: Tensor) -> Any:
        packed.append(tensor.shape)
        return tensor.numpy(force=True).copy()

    with torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy):
        elsewhere = loss(states[0])
    gc.collect()
    assert packed.count(weight.shape) == 2  # the weight and its gradient
    assert gradients_ahead.waiting_bytes(CPU) == 0
    for other in (again, elsewhere):
        for a, b in zip(gradients(other, leaves), wanted, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("wish", [True, False])
def test_autocast_holds_no_copy_of_the_weight(head: Any, wish: bool) -> None:
    states, weight, target, transform = head
    saved: list[Tensor] = []
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),  # type: ignore[func-returns-value]
    ):
        ms.linear_cross_entropy(states[0], weight, target, transform, grad_in_forward=wish, backend="cpu")
    large = {each.data_ptr() for each in saved if each.shape == weight.shape} - {weight.data_ptr()}
    assert len(large) == wish  # the gradient


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1.0, 0.3])
@pytest.mark.parametrize("layer", ["logits", "head"])
def test_backward_passes_through_a_retained_graph_are_equal_to_the_last_bit(
    dtype: torch.dtype, factor: float, layer: str
) -> None:
    torch.manual_seed(0)
    transform, target = disturbed("plif"), torch.tensor([0, 16, 3])
    if layer == "logits":
        leaves = [torch.randn(ROWS, CLASSES).to(dtype).requires_grad_()]
        loss = ms.cross_entropy(leaves[0], target, transform, backend="cpu")
    else:
        leaves = [torch.randn(rows, FEATURES).to(dtype).requires_grad_() for rows in (ROWS, CLASSES)]
        loss = ms.linear_cross_entropy(*leaves, target, transform, backend="cpu")
    leaves += transform.parameters()
    upstream = torch.full((), factor, dtype=loss.dtype)
    first = gradients(loss, leaves, grad_outputs=upstream, retain_graph=True)
    kept = [each.clone() for each in first]
    for each in first:  # they are the caller's own
        each.zero_()
    second = gradients(loss, leaves, grad_outputs=upstream, retain_graph=True)
    other = gradients(loss, leaves, grad_outputs=2 * upstream, retain_graph=True)
    third = gradients(loss, leaves, grad_outputs=upstream)
    for a, b, c, d in zip(kept, second, third, other, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
        torch.testing.assert_close(d, 2 * a)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_the_gradient_of_half_precision_logits_is_rounded_once(dtype: torch.dtype, factor: float) -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(20, 50).to(dtype), torch.arange(20)
    found = []
    for leaf, backend in ((logits.clone(), "cpu"), (logits.double(), "reference")):
        loss = ms.cross_entropy(leaf.requires_grad_(), target, backend=backend)  # type: ignore[call-overload]
        found += gradients(loss, [leaf], grad_outputs=torch.full((), factor, dtype=loss.dtype))
    got, exact = found
    ulp = torch.finfo(dtype).eps * exact.abs() + (2**-24 if dtype == torch.float16 else 0)
    assert ((got.double() - exact).abs() <= 0.502 * ulp + 2e-6 * exact.abs()).all()


def _loss_of_logits(input: Tensor, *_: Tensor) -> Tensor:
    return ms.cross_entropy(input, torch.tensor([0, 16, 3]), ms.transforms.GSS(2.0, 0.5), backend="cpu")


def _loss_of_head(input: Tensor, weight: Tensor) -> Tensor:
    features = input[:, :FEATURES]
    return ms.linear_cross_entropy(
        features, weight, torch.tensor([0, 16, 3]), ms.transforms.GSS(2.0, 0.5), backend="cpu"
    )


def _log_softmax(input: Tensor, *_: Tensor) -> Tensor:
    return ms.log_softmax(input, ms.transforms.GSS(2.0, 0.5), backend="cpu")


@pytest.mark.parametrize("function", [_loss_of_logits, _loss_of_head, _log_softmax])
def test_gradcheck_with_its_default_settings(function: Callable[..., Tensor]) -> None:
    """It asks for backward passes through a retained graph that are the same to the last bit."""
    torch.manual_seed(0)
    input = torch.randn(ROWS, CLASSES, dtype=torch.float64).requires_grad_()
    weight = torch.randn(CLASSES, FEATURES, dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(function, (input, weight) if function is _loss_of_head else (input,))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"grad_in_forward": 1}, TypeError, "grad_in_forward must be a bool or None, got int"),
        ({"grad_in_forward": True, "reduction": "none"}, ValueError, 'must not be True for reduction="none"'),
        ({"grad_in_forward": True, "method": "recompute"}, ValueError, 'must not be True for method="recompute"'),
        ({"grad_in_forward": False, "backend": "reference"}, ValueError, "no use for grad_in_forward"),
    ],
)
def test_wishes_that_cannot_be_met(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ms.linear_cross_entropy(torch.randn(3, 5), torch.randn(17, 5), torch.tensor([0, 1, 2]), **options)
