"""What torch takes at the edges is taken here, and what it takes wrongly is refused, on every backend."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hands import BACKENDS, on
from losses import TRANSFORMS, disturbed, loss_and_gradients
from torch import Tensor, nn
from torch.nn import functional as F

import monosoftmax as ms
from monosoftmax.checks import check_transform

NAN, INFINITY = float("nan"), float("inf")
#: Small tables, which take the interpreter less time.
_FEW = {"plif": {"num_pieces": 4}, "spline": {"num_bins": 3}, "monotonic_mlp": {"num_units": 2}}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[Any]:
    with on(request.param):
        yield request.param


def test_one_row_and_a_target_of_one_element(backend: Any) -> None:
    z, h, weight, target = torch.randn(5), torch.randn(4), torch.randn(5, 4), torch.tensor([3])
    for reduction in ("none", "mean"):
        wanted = F.cross_entropy(z, target, reduction=reduction)
        got = ms.cross_entropy(z, target, backend=backend, reduction=reduction)  # type: ignore[call-overload]
        torch.testing.assert_close(got, wanted)
        head = ms.linear_cross_entropy(h, weight, target, backend=backend, reduction=reduction)  # type: ignore[call-overload]
        torch.testing.assert_close(head, F.cross_entropy(weight @ h, target, reduction=reduction))
    statistics = ms.linear_token_statistics(h, weight, target, backend=backend)
    torch.testing.assert_close(statistics.log_prob, -F.cross_entropy(weight @ h, target[0]))
    for found in (
        ms.linear_log_prob(h, weight, target, backend=backend),
        ms.log_prob(weight @ h, target, backend=backend),
    ):
        torch.testing.assert_close(found.log_prob, statistics.log_prob)
    output = ms.MonotonicSoftmax(4, 5, backend=backend)(h, target)
    assert output.output.shape == () and output.loss.shape == ()
    with pytest.raises(ValueError, match="target must have the shape of input"):
        ms.cross_entropy(torch.randn(1, 5), torch.tensor([[3]]), backend=backend)


@pytest.mark.parametrize("ignored", [torch.tensor(3), torch.tensor([3]), torch.tensor(3, dtype=torch.uint8)])
def test_ignore_index_may_be_a_tensor(backend: Any, ignored: Tensor) -> None:
    z, h, weight, target = torch.randn(3, 5), torch.randn(3, 4), torch.randn(5, 4), torch.tensor([3, 1, 3])
    wanted = F.cross_entropy(z, target, ignore_index=3)
    torch.testing.assert_close(ms.cross_entropy(z, target, ignore_index=ignored, backend=backend), wanted)  # type: ignore[call-overload]
    loss = ms.MonotonicCrossEntropyLoss(ignore_index=ignored, backend=backend)  # type: ignore[arg-type]
    torch.testing.assert_close(loss(z, target), wanted)
    wanted = F.cross_entropy(h @ weight.t(), target, ignore_index=3)
    head = ms.linear_cross_entropy(h, weight, target, ignore_index=ignored, backend=backend)  # type: ignore[call-overload]
    torch.testing.assert_close(head, wanted)
    statistics = ms.linear_token_statistics(h, weight, target, ignore_index=ignored, backend=backend)  # type: ignore[arg-type]
    assert statistics.log_prob[[0, 2]].tolist() == [0, 0]


@pytest.mark.parametrize("wrong", [3.0, True, torch.tensor(3.0), torch.tensor([1, 2]), "3", None])
def test_what_ignore_index_may_not_be(wrong: Any) -> None:
    with pytest.raises(TypeError, match=f"ignore_index must be an int, got {type(wrong).__name__}"):
        ms.cross_entropy(torch.randn(3, 5), torch.tensor([0, 1, 2]), ignore_index=wrong)


def test_targets_of_uint8(backend: Any) -> None:
    z, h, weight = torch.randn(3, 300), torch.randn(3, 4), torch.randn(300, 4)
    target = torch.tensor([0, 255, 7], dtype=torch.uint8)
    torch.testing.assert_close(ms.cross_entropy(z, target, backend=backend), F.cross_entropy(z, target))
    loss = ms.linear_cross_entropy(h, weight, target, backend=backend)
    torch.testing.assert_close(loss, F.cross_entropy(h @ weight.t(), target))
    # 255 is what -1 would be in uint8: nothing is ignored by accident.
    loss = ms.cross_entropy(z, target, ignore_index=255, backend=backend)
    torch.testing.assert_close(loss, F.cross_entropy(z, target, ignore_index=255))
    assert ms.MonotonicSoftmax(4, 300, backend=backend)(h, target).output.shape == (3,)
    assert ms.linear_token_statistics(h, weight, target, backend=backend).rank.dtype == torch.int64
    with pytest.raises(TypeError, match=r"target must be int64 or uint8 class indices, got torch\.int32"):
        ms.cross_entropy(z, target.int(), backend=backend)


def test_no_classes(backend: Any) -> None:
    none, nobody = torch.zeros(3, 0), torch.tensor([0, 0, 0])
    for call in (
        lambda: ms.cross_entropy(none, nobody, backend=backend),
        lambda: ms.log_softmax(none, backend=backend),
        lambda: ms.linear_cross_entropy(torch.zeros(3, 4), torch.zeros(0, 4), nobody, backend=backend),
        lambda: ms.linear_token_statistics(torch.zeros(3, 4), torch.zeros(0, 4), nobody, backend=backend),
    ):
        with pytest.raises(ValueError, match="at least 1 class, got 0"):
            call()


@pytest.mark.grid
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_target_mass_on_a_logit_of_minus_infinity(backend: Any, name: str, smoothing: float) -> None:
    """The gradient of that logit is -q f'(-inf), as it is -q in PyTorch, and not 0."""
    f = disturbed(name)
    z, target = torch.tensor([[1.0, -INFINITY, 2.0], [0.5, 0.1, -INFINITY]]), torch.tensor([1, 0])
    options = {"label_smoothing": smoothing, "reduction": "sum"}
    got = loss_and_gradients(z, target, f, backend, **options)
    # A logit far below all others stands for -inf: its probability is 0, too.
    far = z.double().masked_fill(torch.isneginf(z), -1e30)
    far.requires_grad_()
    F.cross_entropy(disturbed(name).double()(far), target, **options).backward()  # type: ignore[arg-type]
    assert far.grad is not None
    torch.testing.assert_close(got["input"].double(), far.grad, rtol=1e-4, atol=1e-5)
    if not f.bounded_below:
        assert got["loss"] == INFINITY and got["input"][0, 1] < -0.05
    if name == "identity":
        z.requires_grad_()
        F.cross_entropy(z, target, **options).backward()  # type: ignore[arg-type]
        torch.testing.assert_close(got["input"], z.grad)
    reference = loss_and_gradients(z.detach(), target, f, "reference", **options)
    for key, value in reference.items():
        torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.grid
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize(
    ("bad", "options", "return_lse"),
    [
        (NAN, {}, True),
        (NAN, {"z_loss": 0.1}, False),
        (INFINITY, {"z_loss": 0.1}, True),
        (-INFINITY, {"label_smoothing": 0.1, "reduction": "none"}, True),
    ],
)
def test_an_ignored_row_never_reaches_a_gradient(
    backend: Any, name: str, bad: float, options: dict[str, Any], return_lse: bool
) -> None:
    """Whatever it holds. lse of the other rows is differentiated, too, where it is asked for."""
    target = torch.tensor([1, -100, 3, -100])
    z = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    valid = target >= 0

    def gradients(logits: Tensor) -> list[Tensor]:
        f, leaf = disturbed(name, **_FEW.get(name, {})), logits.clone().requires_grad_()
        loss, lse = ms.cross_entropy(leaf, target, f, return_lse=True, backend=backend, **options)
        total = loss.sum() + lse[valid].sum() if return_lse else ms.cross_entropy(
            leaf, target, f, backend=backend, **options
        ).sum()  # fmt: skip
        found = torch.autograd.grad(total, [leaf, *f.parameters()])
        return [total.detach(), *found]

    spoilt = z.clone()
    spoilt[1], spoilt[3, 2] = bad, bad
    for clean, other in zip(gradients(z), gradients(spoilt), strict=True):
        torch.testing.assert_close(other, clean)


def test_an_ignored_row_of_a_head_never_reaches_a_gradient(backend: Any) -> None:
    h, target = torch.randn(4, 6), torch.tensor([1, -100, 3, 0])

    def gradients(hidden: Tensor) -> list[Tensor]:
        torch.manual_seed(0)
        layer = ms.MonotonicSoftmax(6, 9, disturbed("plif"), z_loss=0.1, label_smoothing=0.1, backend=backend)
        leaf = hidden.clone().requires_grad_()
        output = layer(leaf, target)
        total = output.loss + output.output.sum()
        return [total.detach(), *torch.autograd.grad(total, [layer.transform.raw_slope, leaf])]

    spoilt = h.clone()
    spoilt[1] = NAN
    for clean, other in zip(gradients(h), gradients(spoilt), strict=True):
        torch.testing.assert_close(other, clean)


_TWICE = """
import sys, torch
import monosoftmax as first
z, target = torch.randn(3, 5, requires_grad=True), torch.tensor([0, 1, 2])
def use(ms):
    loss = ms.cross_entropy(z, target, ms.transforms.PLIF(), backend="cpu")
    loss = loss + ms.linear_cross_entropy(z, torch.ones(4, 5), target, backend="cpu")
    return loss.item(), torch.autograd.grad(loss, z)[0].tolist()
before = use(first)
for name in [name for name in sys.modules if name.partition(".")[0] == "monosoftmax"]:
    del sys.modules[name]
import monosoftmax as second
assert second is not first and second.ops.library is not first.ops.library
assert use(second) == before and use(first) == before
compiled = torch.compile(lambda z: second.cross_entropy(z, target, backend="cpu"), fullgraph=True, backend="aot_eager")
assert torch.equal(compiled(z), first.cross_entropy(z, target, backend="cpu"))
print("both work")
"""


def test_two_imports_in_one_process() -> None:
    run = subprocess.run([sys.executable, "-W", "error", "-c", _TWICE], capture_output=True, text=True)
    assert run.stdout == "both work\n", run.stderr


def test_meta_tensors_take_the_backend_that_is_found() -> None:
    with torch.device("meta"):
        h, target = torch.randn(3, 4, requires_grad=True), torch.zeros(3, dtype=torch.int64)
        for name in TRANSFORMS:
            f = ms.transforms.make(name)
            for layer in (
                ms.MonotonicSoftmax(4, 5, f, z_loss=0.1),
                ms.MixtureOfSoftmaxes(4, 5, 2),
                ms.MixtureOfContexts(4, 5, 2),
            ):
                output = layer(h, target)
                assert output.loss.is_meta and output.output.shape == (3,)
                (output.loss + output.output.sum()).backward()
                assert layer.log_prob(h).shape == (3, 5)
            assert ms.MonotonicCrossEntropyLoss(f)(torch.randn(3, 5), target).is_meta
            assert ms.cross_entropy(torch.randn(3, 5), torch.rand(3, 5), f).is_meta
            assert ms.linear_token_statistics(h, torch.randn(5, 4), target, f).rank.dtype == torch.int64


@pytest.mark.parametrize("wrapped", [nn.Sequential(ms.transforms.PLIF()), nn.Identity()])
def test_wrappers_that_hide_a_transform_are_refused(wrapped: nn.Module) -> None:
    with pytest.raises(TypeError, match=f"got {type(wrapped).__name__}: wrap the module that owns the transform"):
        ms.cross_entropy(torch.randn(3, 5), torch.tensor([0, 1, 2]), wrapped)  # type: ignore[call-overload]


def test_a_compiled_transform_is_the_transform() -> None:
    f = ms.transforms.PLIF()
    assert check_transform(torch.compile(f)) is f  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_whatever_their_strides(backend: str) -> None:
    """``sum().backward()`` expands a number to no rows, whose strides ``contiguous()`` leaves at 0."""
    with on(backend):
        input = torch.zeros(0, 7, requires_grad=True)
        ms.log_softmax(input, backend=backend).sum().backward()
        assert input.grad is not None and input.grad.shape == (0, 7)
        expanded = torch.zeros(0, 1).expand(0, 7)
        loss = ms.cross_entropy(expanded, torch.zeros(0, dtype=torch.int64), reduction="sum", backend=backend)
        assert loss == 0
