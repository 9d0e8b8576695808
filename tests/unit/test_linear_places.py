"""ms.linear_cross_entropy of a weight (V, d1, ..., dK, d): the loss of torch.nn.functional's, place by place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from losses import COMPILERS, SOME_TRANSFORMS, TRANSFORMS, disturbed
from tiers import mostly_slow
from torch import Tensor
from torch.nn import functional as F

import monosoftmax as ms
from monosoftmax import head_products

BACKENDS: list[Any] = ["reference", "cpu"]
N, D, V = 7, 5, 9
PLACES = [(3,), (2, 3), (1,)]
#: None in older versions of torch.
TORCHS: Callable[..., Tensor] | None = getattr(F, "linear_cross_entropy", None)


@pytest.fixture(autouse=True)
def thin_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_products, "chunk_rows", lambda *_: 3)


def batch(places: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    """The input, the weight and the bias, and class indices of which some are ignored, one of them by its whole row."""
    torch.manual_seed(0)
    shapes = (N, D), (V, *places, D), (V, *places)
    target = torch.randint(0, V, (N, *places))
    target[2] = -100
    target[4, ..., -1] = -100
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes], target


def logits_of(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(N, V, d1, ..., dK)."""
    flat = F.linear(input, weight.reshape(-1, D), None if bias is None else bias.reshape(-1))
    return flat.reshape(len(input), *weight.shape[:-1])


@pytest.mark.grid
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("kind", ["indices", "uint8", "probabilities"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("ignore_index", [-100, 3])
@pytest.mark.parametrize("has_bias", [False, True])
def test_identity_equals_torch(
    backend: Any, places: tuple[int, ...], kind: str, reduction: Any, weighted: bool, label_smoothing: float,
    ignore_index: int, has_bias: bool,
) -> None:  # fmt: skip
    (input, weight, bias), target = batch(places)
    if kind == "uint8":
        ignore_index = 3  # which has no negative numbers
    if kind == "probabilities":
        target, ignore_index = torch.rand(N, V, *places, dtype=torch.float64), -100
    else:
        target = torch.where(target == -100, ignore_index, target)
    class_weight = torch.rand(V, dtype=torch.float64) if weighted else None
    given = bias if has_bias else None
    options: dict[str, Any] = {
        "weight": class_weight, "label_smoothing": label_smoothing, "reduction": reduction,
    }  # fmt: skip
    wanted = F.cross_entropy(logits_of(input, weight, given), target, ignore_index=ignore_index, **options)
    if TORCHS is not None:
        # Which wants no ignore_index for class probabilities.
        named = None if kind == "probabilities" else ignore_index
        torchs = TORCHS(input, weight, target, linear_bias=given, ignore_index=named, **options)
        torch.testing.assert_close(torchs, wanted)
    found = ms.linear_cross_entropy(
        input, weight, target.to(torch.uint8) if kind == "uint8" else target, linear_bias=given,
        ignore_index=ignore_index, backend=backend, **options,
    )  # fmt: skip
    torch.testing.assert_close(found, wanted)
    leaves, upstream = [input, weight, *([bias] if has_bias else [])], torch.rand_like(wanted)
    torch.testing.assert_close(
        torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(wanted, leaves, upstream)
    )


@pytest.mark.grid
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", mostly_slow(TRANSFORMS, SOME_TRANSFORMS))
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("z_loss_divisor", ["loss", "rows"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_with_all_options(backend: Any, name: str, kind: str, z_loss_divisor: Any, reduction: Any) -> None:
    """The same as of the logits, which ms.cross_entropy takes with the classes in the second dimension."""
    (input, weight, bias), target = batch((2, 3))
    if kind == "probabilities":
        target = torch.rand(N, V, 2, 3, dtype=torch.float64)
    transform = disturbed(name).double()
    options: dict[str, Any] = {
        "weight": torch.rand(V, dtype=torch.float64), "label_smoothing": 0.1, "z_loss": 0.02, "temperature": 0.7,
        "z_loss_divisor": z_loss_divisor, "reduction": reduction, "return_lse": True,
    }  # fmt: skip
    wanted = ms.cross_entropy(logits_of(input, weight, bias), target, transform, backend="reference", **options)
    found = ms.linear_cross_entropy(input, weight, target, transform, linear_bias=bias, backend=backend, **options)
    torch.testing.assert_close(found, wanted)
    leaves = [input, weight, bias, *transform.parameters()]
    upstream = [torch.rand_like(each) for each in wanted]
    torch.testing.assert_close(
        torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(wanted, leaves, upstream)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("candidates", [None, torch.tensor([8, 0, 3, 5])])
@pytest.mark.parametrize("places", PLACES)
def test_lse_and_statistics(backend: Any, candidates: Tensor | None, places: tuple[int, ...]) -> None:
    """Of the shape of the targets, each of its own place."""
    (input, weight, bias), target = batch(places)
    if candidates is not None:
        target = torch.where(target == -100, -100, candidates[target.clamp(min=0) % 4])
    transform = disturbed("plif").double()
    loss, lse, statistics = ms.linear_cross_entropy(
        input, weight, target, transform, linear_bias=bias, candidates=candidates, return_lse=True,
        return_statistics=True, reduction="none", backend=backend,
    )  # fmt: skip
    rows = logits_of(input, weight, bias).movedim(1, -1)
    outputs = ("log_prob", "entropy", "argmax", "lse", "rank")
    wanted = ms.log_prob(rows, target, transform, candidates=candidates, outputs=outputs, backend="reference")
    assert loss.shape == lse.shape == (N, *places)
    for name in outputs:
        torch.testing.assert_close(getattr(statistics, name), getattr(wanted, name).detach(), msg=name)
        assert not getattr(statistics, name).requires_grad, name
    torch.testing.assert_close(loss, -wanted.log_prob)  # type: ignore[operator]
    torch.testing.assert_close(lse, wanted.lse)
    leaves = [input, weight, bias, *transform.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(lse.sum(), leaves), torch.autograd.grad(wanted.lse.sum(), leaves)  # type: ignore[union-attr]
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_come_in_order(backend: Any) -> None:
    (input, weight, _), target = batch((2,))
    options: dict[str, Any] = {"backend": backend}
    loss = ms.linear_cross_entropy(input, weight, target, **options)
    pair = ms.linear_cross_entropy(input, weight, target, return_lse=True, **options)
    other = ms.linear_cross_entropy(input, weight, target, return_statistics=True, **options)
    assert isinstance(loss, Tensor) and loss.shape == () and pair[1].shape == (N, 2)
    assert torch.equal(pair[0], loss) and torch.equal(other[0], loss) and isinstance(other[1], ms.TokenStatistics)


@pytest.mark.grid
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("features", [1, 16])
def test_types_on_the_cpu_backend(dtype: torch.dtype, kind: str, reduction: Any, features: int) -> None:
    """The product reads the weight of a place where it lies, between those of the others."""
    torch.manual_seed(0)
    places = (2, 3)
    input, weight = torch.randn(N, features).to(dtype), torch.randn(V, *places, features).to(dtype)
    bias, target = torch.randn(V, *places).to(dtype), torch.randint(0, V, (N, *places))
    if kind == "probabilities":
        target = torch.rand(N, V, *places).to(dtype)
    leaves = [each.requires_grad_() for each in (input, weight, bias)]
    wide = [each.detach().double().requires_grad_() for each in leaves]
    logits = F.linear(wide[0], wide[1].reshape(-1, features), wide[2].reshape(-1)).reshape(N, V, *places)
    wanted = F.cross_entropy(
        logits, target.double() if kind == "probabilities" else target, reduction=reduction, label_smoothing=0.1
    )
    found = ms.linear_cross_entropy(
        input, weight, target, linear_bias=bias, reduction=reduction, label_smoothing=0.1, backend="cpu"
    )
    assert found.dtype == torch.float32
    eps = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), wanted, rtol=eps, atol=eps)
    upstream = torch.rand_like(wanted)
    got = torch.autograd.grad(found, leaves, upstream.to(found))
    for gradient, true in zip(got, torch.autograd.grad(wanted, wide, upstream), strict=True):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient.double(), true, rtol=eps, atol=eps * true.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
def test_operands_of_any_layout(backend: Any) -> None:
    (input, weight, bias), target = batch((2, 3), torch.float32)
    wanted = ms.linear_cross_entropy(input, weight, target, linear_bias=bias, backend=backend)
    strided = [each.detach().t().contiguous().t() for each in (input,)]
    strided += [each.detach().movedim(0, -1).contiguous().movedim(-1, 0) for each in (weight, bias)]
    assert not any(each.is_contiguous() for each in strided)
    found = ms.linear_cross_entropy(
        strided[0], strided[1], target.movedim(1, 2).contiguous().movedim(2, 1), linear_bias=strided[2],
        backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nobody_counts(backend: Any) -> None:
    """No rows, and rows that are all ignored: NaN for a mean, as in PyTorch."""
    (input, weight, _), target = batch((2,), torch.float32)
    for x, t in ((input[:0], target[:0]), (input, torch.full_like(target, -100))):
        assert ms.linear_cross_entropy(x, weight, t, backend=backend).isnan()
        assert ms.linear_cross_entropy(x, weight, t, reduction="sum", backend=backend).item() == 0
        rows = ms.linear_cross_entropy(x, weight, t, reduction="none", backend=backend)
        assert rows.shape == t.shape and (rows == 0).all()


def test_gradient_of_the_target() -> None:
    """The reference has one of class probabilities, which "auto" chooses where they require it."""
    (input, weight, bias), _ = batch((2,))
    target = torch.rand(N, V, 2, dtype=torch.float64, requires_grad=True)
    found = ms.linear_cross_entropy(input, weight, target, linear_bias=bias)
    wanted = F.cross_entropy(logits_of(input, weight, bias), target)
    leaves = [input, weight, bias, target]
    torch.testing.assert_close(torch.autograd.grad(found, leaves), torch.autograd.grad(wanted, leaves))
    with pytest.raises(ValueError, match="does not differentiate with respect to class probabilities"):
        ms.linear_cross_entropy(input, weight, target, linear_bias=bias, backend="cpu")


@pytest.mark.parametrize("grad_in_forward", [True, False, None])
def test_products_of_each_place(grad_in_forward: bool | None) -> None:
    """Settings of the head are settings of the head of each place."""
    (input, weight, bias), target = batch((2,), torch.float32)
    wanted = F.cross_entropy(logits_of(input, weight, bias), target)
    found = ms.linear_cross_entropy(
        input, weight, target, linear_bias=bias, grad_in_forward=grad_in_forward, chunk_rows=2, method="chunked",
        backend="cpu",
    )  # fmt: skip
    leaves = [input, weight, bias]
    torch.testing.assert_close(torch.autograd.grad(found, leaves), torch.autograd.grad(wanted, leaves))


@pytest.mark.seconds
@pytest.mark.parametrize(("compiler", "exact"), COMPILERS[:1])
def test_compiled(compiler: str, exact: bool) -> None:
    (input, weight, bias), target = batch((2,), torch.float32)
    transform = disturbed("plif")
    torch._dynamo.reset()

    def loss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        result: Tensor = ms.linear_cross_entropy(
            x, w, target, transform, linear_bias=b, label_smoothing=0.1, backend="cpu"
        )
        return result

    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    leaves = [input, weight, bias]
    wanted, got = ([each(*leaves), *torch.autograd.grad(each(*leaves), leaves)] for each in (loss, compiled))
    torch.testing.assert_close(got, wanted, **({"rtol": 0, "atol": 0} if exact else {}))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.randn(D)}, ValueError, r"input must be \(N, d\) for linear_weight \(9, 2, 5\), got \(5,\)"),
        ({"input": torch.randn(2, 2, D)}, ValueError, r"input must be \(N, d\).*got \(2, 2, 5\)"),
        ({"input": torch.randn(4, 6)}, ValueError, r"must agree in d, got \(4, 6\)"),
        ({"input": [1.0]}, TypeError, "input must be a Tensor, got list"),
        ({"linear_weight": torch.randn(V, 0, D)}, ValueError, r"linear_weight must have at least 1 place.*\(9, 0, 5\)"),
        ({"linear_weight": torch.randn(0, 2, D)}, ValueError, "input must have at least 1 class"),
        ({"linear_weight": torch.randn(V, 2, D).double()}, TypeError, "linear_weight must have the dtype of input"),
        ({"linear_weight": torch.randn(V, 2, D).long()}, TypeError, "linear_weight must be float32"),
        ({"target": torch.zeros(4, dtype=torch.int64)}, ValueError, r"target must have shape \(4, 2\), got \(4,\)"),
        ({"target": torch.zeros(2, 4).long()}, ValueError, r"target must have shape \(4, 2\), got \(2, 4\)"),
        ({"target": torch.rand(4, 2, V)}, ValueError, r"target must have shape \(4, 9, 2\), got \(4, 2, 9\)"),
        ({"target": torch.rand(4, 2)}, ValueError, r"target must have shape \(4, 9, 2\), got \(4, 2\)"),
        ({"target": torch.zeros(4, 2, dtype=torch.int32)}, TypeError, "target must be int64 or uint8"),
        ({"target": torch.full((4, 2), V)}, IndexError, "target 9.*out of bounds for 9 classes"),
        ({"target": "none", "z_loss_divisor": "rows"}, TypeError, "target must be a Tensor, got str"),
        ({"target": torch.rand(4, V, 2), "ignore_index": 3}, ValueError, "ignore_index must be left at its default"),
        ({"target": torch.rand(4, V, 2), "return_statistics": True}, ValueError, "class probabilities.*statistics"),
        ({"linear_bias": torch.randn(V)}, ValueError, r"linear_bias must have shape \(9, 2\), got \(9,\)"),
        ({"linear_bias": torch.randn(2, V)}, ValueError, r"linear_bias must have shape \(9, 2\), got \(2, 9\)"),
        ({"linear_bias": 0.0}, TypeError, "linear_bias must be a Tensor, got float"),
        ({"weight": torch.rand(V, 2)}, ValueError, r"weight must have shape \(9,\), got \(9, 2\)"),
        ({"reduction": "avg"}, ValueError, 'reduction must be "none", "mean" or "sum", got \'avg\''),
        ({"z_loss_divisor": "row"}, ValueError, "z_loss_divisor must be"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be between 0 and 1"),
        ({"transform": "plif"}, TypeError, "transform must be a monosoftmax transform or None, got str"),
    ],
)  # fmt: skip
def test_refusals(backend: Any, change: dict[str, Any], error: type[Exception], message: str) -> None:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "input": torch.randn(4, D), "linear_weight": torch.randn(V, 2, D), "target": torch.zeros(4, 2).long(),
        "weight": torch.ones(V), "z_loss": 0.1,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        ms.linear_cross_entropy(**arguments | change, backend=backend)


def test_log_prob_has_no_places() -> None:
    (input, weight, _), target = batch((2,))
    with pytest.raises(ValueError, match=r"linear_weight \(V, d\) must agree in d|shape of input"):
        ms.linear_log_prob(input, weight, target)
