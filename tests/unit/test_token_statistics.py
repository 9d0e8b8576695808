"""ms.linear_token_statistics: what it says of each token, on both backends, for every transform and dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from losses import TRANSFORMS, disturbed
from torch import Tensor
from torch.nn import functional as F

import monosoftmax as ms
from monosoftmax import head_products

BACKENDS: list[Any] = ["reference", "cpu"]
N, D, V = 7, 5, 41


@pytest.fixture(autouse=True)
def thin_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_products, "chunk_rows", lambda *_: 3)


def batch(dtype: torch.dtype = torch.float64, rows: int = N) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    input, weight, bias = (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in ((rows, D), (V, D), (V,)))
    target = torch.randint(0, V, (rows,))
    if rows > 4:
        target[4] = -100
    return input, weight, bias, target


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_definition(backend: Any, name: str, with_bias: bool) -> None:
    input, weight, bias, target = batch()
    transform = disturbed(name).double()
    linear_bias = bias if with_bias else None
    result = ms.linear_token_statistics(input, weight, target, transform, linear_bias=linear_bias, backend=backend)
    assert isinstance(result, ms.TokenStatistics)
    z = F.linear(input, weight, linear_bias)
    log_p = torch.log_softmax(transform(z), 1)
    valid = target != -100
    for row in range(N):
        if valid[row]:
            torch.testing.assert_close(result.log_prob[row], log_p[row, target[row]])
            assert result.rank[row] == (z[row] > z[row, target[row]]).sum()
    torch.testing.assert_close(result.entropy, torch.distributions.Categorical(logits=log_p).entropy())
    torch.testing.assert_close(result.lse, transform(z).logsumexp(1))
    assert torch.equal(result.argmax, z.argmax(1))
    assert result.log_prob[4] == 0 and result.rank[4] == -1
    assert all(each.shape == target.shape and not each.requires_grad for each in result)
    assert result.argmax.dtype == result.rank.dtype == torch.int64

    # What the docstring says of the gradient.
    losses = ms.linear_cross_entropy(
        input, weight, target, transform, linear_bias=linear_bias, reduction="none", backend=backend
    )
    torch.testing.assert_close(result.log_prob, -losses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    *head, target = batch(dtype, 200)
    transform = disturbed("plif")
    wanted, got = (
        ms.linear_token_statistics(*head[:2], target, transform, linear_bias=head[2], backend=backend)
        for backend in BACKENDS
    )
    # Of logits that may differ in their last bit.
    tolerance = 3e-6 if dtype == torch.float32 else 10 * torch.finfo(dtype).eps
    for name in ("log_prob", "entropy", "lse"):
        a, b = getattr(got, name), getattr(wanted, name)
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert (got.argmax == wanted.argmax).double().mean() > 0.95
    assert (got.rank == wanted.rank).double().mean() > (0.99 if dtype == torch.float32 else 0.7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", [2, 17, 300, 3000])
def test_ties(backend: Any, classes: int) -> None:
    """The first of equal logits is the argmax, and none of them outranks another."""
    logits = torch.zeros(4, classes)
    logits[1, classes // 2 :] = 1
    logits[2, -1] = 1
    logits[3] = -0.0
    logits[3, 0] = 0.0
    target = torch.tensor([classes - 1, classes - 1, classes - 1, 0])
    result = ms.linear_token_statistics(logits, torch.eye(classes), target, backend=backend)
    assert result.argmax.tolist() == [0, classes // 2, classes - 1, 0]
    assert result.rank.tolist() == [0, 0, 0, 0]
    beside = ms.linear_token_statistics(logits[:3], torch.eye(classes), torch.zeros(3, dtype=torch.int64))
    assert beside.rank.tolist() == [0, classes - classes // 2, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_rank_and_argmax_are_of_the_logits_where_f_is_flat(backend: Any) -> None:
    """tanh saturates: logits 300 and 400 have one f in float32, and still an order."""
    logits = torch.tensor([[0.0, 300.0, 400.0, 200.0]])
    result = ms.linear_token_statistics(
        logits, torch.eye(4), torch.tensor([3]), ms.transforms.SoftCap(5.0), backend=backend
    )
    assert result.argmax.item() == 2 and result.rank.item() == 2
    assert result.log_prob.item() == pytest.approx(-torch.tensor(3 + torch.e**-5.0).log().item(), abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["identity", "plif", "sigsoftmax", "spline"])
def test_classes_masked_by_the_bias(backend: Any, name: str) -> None:
    """Logits of -inf add nothing to the entropy; a masked target has log p of -inf."""
    input, weight, bias, _ = batch()
    bias[10:] = -torch.inf
    transform = disturbed(name).double()
    target = torch.tensor([0, 3, 9, 0, 1, 2, 20])
    result = ms.linear_token_statistics(input, weight, target, transform, linear_bias=bias, backend=backend)
    kept = ms.linear_token_statistics(
        input[:6], weight[:10], target[:6], transform, linear_bias=bias[:10], backend=backend
    )
    for name in ms.TokenStatistics._fields:
        torch.testing.assert_close(getattr(result, name)[:6], getattr(kept, name))
    assert result.log_prob[6] == -torch.inf and result.entropy[6].isfinite() and result.rank[6] == 10


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["identity", "plif"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_rows_without_a_distribution(backend: Any, name: str, poison: float) -> None:
    torch.manual_seed(0)
    bias = torch.randn(50) if poison != -torch.inf else torch.full((50,), poison)
    bias[20] = poison
    result = ms.linear_token_statistics(
        torch.zeros(2, 50), torch.eye(50), torch.tensor([1, -100]), disturbed(name), linear_bias=bias, backend=backend
    )
    assert result.entropy.isnan().all() and result.log_prob[0].isnan() and result.log_prob[1] == 0
    assert (result.lse.isnan() if poison != poison else ~result.lse.isfinite()).all()
    assert result.rank[1] == -1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_nan_is_alone_with_it(backend: Any) -> None:
    input, weight, bias, target = batch()
    wanted = ms.linear_token_statistics(input, weight, target, linear_bias=bias, backend=backend)
    input[1] = torch.nan
    result = ms.linear_token_statistics(input, weight, target, linear_bias=bias, backend=backend)
    others = torch.arange(N) != 1
    for field in ("log_prob", "entropy", "lse"):
        assert getattr(result, field)[1].isnan()
    for a, b in zip(result, wanted, strict=True):
        assert torch.equal(a[others], b[others])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (0,), (2, 0)])
def test_any_leading_shape(backend: Any, leading: tuple[int, ...]) -> None:
    _, weight, bias, _ = batch()
    input, target = torch.randn(*leading, D, dtype=torch.float64), torch.randint(0, V, leading)
    result = ms.linear_token_statistics(input, weight, target, linear_bias=bias, backend=backend)
    assert all(each.shape == leading for each in result)
    flat = ms.linear_token_statistics(
        input.reshape(-1, D), weight, target.reshape(-1), linear_bias=bias, backend=backend
    )
    assert all(torch.equal(a.reshape(-1), b) for a, b in zip(result, flat, strict=True))


def test_no_gradients_and_one_product_in_chunks() -> None:
    input, weight, bias, target = batch()
    transform = disturbed("plif").double()
    for leaf in (input, weight, bias):
        leaf.requires_grad_()
    with torch.profiler.profile() as profile:
        result = ms.linear_token_statistics(input, weight, target, transform, linear_bias=bias, backend="cpu")
    assert not any(each.requires_grad for each in result)
    assert [event.name for event in profile.events()].count("aten::addmm") == 3  # type: ignore[union-attr]


def test_compiled_and_autocast() -> None:
    input, weight, bias, target = batch(torch.float32)
    transform = disturbed("plif")

    def call(x: Tensor) -> tuple[Tensor, ...]:
        return ms.linear_token_statistics(x, weight, target, transform, linear_bias=bias, backend="cpu")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(input), call(input), strict=True))
    rounded = ms.linear_token_statistics(
        input.bfloat16(), weight.bfloat16(), target, transform, linear_bias=bias.bfloat16(), backend="cpu"
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(call(input), rounded, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.randn(4, 6)}, ValueError, r"must agree in d, got \(4, 6\) and \(9, 5\)"),
        ({"linear_weight": torch.randn(0, 5)}, ValueError, "at least 1 class"),
        ({"linear_weight": torch.randn(9, 5).double()}, TypeError, "linear_weight must have the dtype of input"),
        ({"linear_bias": torch.randn(8)}, ValueError, r"linear_bias must have shape \(9,\), got \(8,\)"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, r"target must have the shape.*got \(3,\)"),
        ({"target": torch.tensor([0, 1, 2, 9])}, IndexError, r"target 9 \(row 3\) is out of bounds for 9 classes"),
        ({"target": torch.rand(4, 9)}, NotImplementedError, "class probabilities are for"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index must be an int, got float"),
        ({"transform": "plif"}, TypeError, "transform must be a monosoftmax transform or None, got str"),
    ],
)
def test_refusals(backend: Any, change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "input": torch.randn(4, 5), "linear_weight": torch.randn(9, 5), "target": torch.tensor([0, 8, -100, 3]),
    }  # fmt: skip
    with pytest.raises(error, match=message):
        ms.linear_token_statistics(**arguments | change, backend=backend)


def test_explain() -> None:
    explanation = ms.backends.explain("linear_token_statistics", torch.zeros(1, 1))
    assert explanation.backend == "cpu" and "one buffer of logits" in str(explanation)
