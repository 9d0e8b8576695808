"""candidates=: the classes that a call allows, against plain PyTorch on f(z) with the others at -inf, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from losses import COMPILERS, SOME_TRANSFORMS, TRANSFORMS, disturbed
from tiers import mostly_slow
from torch import Tensor
from torch.nn import functional as F

import monosoftmax as ms
from monosoftmax import head_products
from monosoftmax.token_log_prob import OutputName

BACKENDS: list[Any] = ["reference", "cpu"]
N, D, V = 7, 5, 23
#: In no order; the first and the last class are among them.
CLASSES = [9, 0, 4, 22, 15, 2, 11, 7]
#: f(-inf) is finite for the last one, so that a logit of -inf would not rule a class out.
NAMES = mostly_slow(TRANSFORMS, ("identity", "plif", "soft_cap"))
ALL: tuple[OutputName, ...] = ("log_prob", "entropy", "is_top1", "rank", "argmax", "lse", "target_logit")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum", "temperature": 0.7},
    "rows and lse": {"reduction": "none", "return_lse": True, "z_loss": 0.01},
    "weighted": {"weight": True},
    "everything": {"weight": True, "label_smoothing": 0.2, "z_loss": 0.01, "return_lse": True, "temperature": 1.5},
}


@pytest.fixture(autouse=True)
def thin_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_products, "chunk_rows", lambda *_: 3)


def given(form: str, classes: Sequence[int] = CLASSES) -> Tensor:
    """``classes`` as indices, or as a mask of all classes."""
    index = torch.tensor(classes)
    return index if form == "indices" else torch.zeros(V, dtype=torch.bool).index_fill_(0, index, True)


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The leaves of a head, and targets among the candidates, of which one is ignored."""
    torch.manual_seed(0)
    input, weight, bias = (torch.randn(shape, dtype=dtype).requires_grad_() for shape in ((N, D), (V, D), (V,)))
    target = torch.tensor(CLASSES)[torch.randint(0, len(CLASSES), (N,))]
    target[4] = -100
    return input, weight, bias, target


def drawn(options: dict[str, Any]) -> dict[str, Any]:
    """``options`` with class weights where they ask for some."""
    return options | {"weight": torch.linspace(0.2, 1.4, V, dtype=torch.float64)} if "weight" in options else options


def allowed_y(z: Tensor, transform: Any, temperature: float = 1.0, classes: Sequence[int] = CLASSES) -> Tensor:
    return (transform(z) / temperature).masked_fill(~given("mask", classes), -torch.inf)


def plain_loss(
    z: Tensor,
    target: Tensor,
    transform: Any,
    *,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    return_lse: bool = False,
    temperature: float = 1.0,
) -> tuple[Tensor, ...]:
    """The loss of class indices or probabilities, and lse if it is asked for: the definition, by plain PyTorch."""
    allowed = given("mask")
    y = allowed_y(z, transform, temperature)
    log_p, lse = y.log_softmax(1).masked_fill(~allowed, 0.0), y.logsumexp(1)
    weights = torch.ones(V, dtype=z.dtype) if weight is None else weight
    if target.is_floating_point():
        valid, divisor = torch.ones(len(z), dtype=torch.bool), torch.tensor(len(z))
        share = target
    else:
        valid, index = target != -100, target.clamp(min=0)
        divisor = (weights[index] * valid).sum()
        share = F.one_hot(index, V).to(z.dtype)
    q = ((1 - label_smoothing) * share + label_smoothing / len(CLASSES)) * weights
    loss = torch.where(valid, -(q * log_p).sum(1) + z_loss * lse.square(), 0.0)
    if reduction != "none":
        loss = loss.sum() / (divisor if reduction == "mean" else 1)
    return (loss, lse) if return_lse else (loss,)


def gradients(outputs: Any, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Of a result of a loss, under random upstream gradients that do not depend on the backend."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.rand(each.shape, generator=generator, dtype=torch.float64).to(each) + 0.5 for each in outputs]
    return torch.autograd.grad(outputs, leaves, upstream)


@pytest.mark.grid
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("form", ["mask", "indices"])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_losses(backend: Any, name: str, options: dict[str, Any], form: str, kind: str) -> None:
    """Of logits and of the head. No gradient reaches what belongs to other classes."""
    input, weight, bias, target = batch()
    transform, options = disturbed(name).double(), drawn(options)
    if kind == "probabilities":
        target = torch.rand(N, V, dtype=torch.float64)
    leaves = [input, weight, bias, *transform.parameters()]
    z = F.linear(input, weight, bias).detach().requires_grad_()
    others = ~given("mask")
    wanted = plain_loss(z, target, transform, **options)
    found = ms.cross_entropy(z, target, transform, candidates=given(form), backend=backend, **options)
    torch.testing.assert_close(found if isinstance(found, tuple) else (found,), wanted)
    of_logits = gradients(found, [z, *transform.parameters()])
    torch.testing.assert_close(of_logits, gradients(wanted, [z, *transform.parameters()]))
    assert (of_logits[0][:, others] == 0).all()

    wanted = plain_loss(F.linear(input, weight, bias), target, transform, **options)
    found = ms.linear_cross_entropy(
        input, weight, target, transform, linear_bias=bias, candidates=given(form), backend=backend, **options
    )
    torch.testing.assert_close(found if isinstance(found, tuple) else (found,), wanted)
    of_head = gradients(found, leaves)
    torch.testing.assert_close(of_head, gradients(wanted, leaves))
    assert (of_head[1][others] == 0).all() and (of_head[2][others] == 0).all()
    assert (of_head[1][~others] != 0).any(1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["mask", "indices"])
def test_log_prob(backend: Any, name: str, form: str) -> None:
    """All that is known of a token is known of the classes that are allowed; argmax is a class of the vocabulary."""
    input, weight, bias, target = batch()
    transform, tau, valid = disturbed(name).double(), 0.8, target != -100
    leaves = [input, weight, bias, *transform.parameters()]
    z = F.linear(input, weight, bias)
    y, index = allowed_y(z, transform, tau), target.clamp(min=0).unsqueeze(1)
    logits = z.masked_fill(~given("mask"), -torch.inf)
    log_p = y.log_softmax(1)
    rank = (logits > logits.gather(1, index)).sum(1)
    wanted = ms.TokenLogProb(
        log_prob=torch.where(valid, log_p.gather(1, index).squeeze(1), 0.0),
        entropy=-(log_p.exp() * log_p.masked_fill(~given("mask"), 0.0)).sum(1),
        is_top1=valid & (rank == 0),
        rank=torch.where(valid, rank, -1),
        argmax=logits.argmax(1),
        lse=y.logsumexp(1),
        target_logit=torch.where(valid, y.gather(1, index).squeeze(1), 0.0),
    )
    assert wanted.argmax is not None and not torch.equal(wanted.argmax, z.argmax(1))
    options: dict[str, Any] = {
        "temperature": tau, "candidates": given(form), "outputs": ALL, "backend": backend,
    }  # fmt: skip

    def differentiable(found: ms.TokenLogProb) -> tuple[Any, ...]:
        return found.log_prob, found.entropy, found.lse, found.target_logit

    for found in (
        ms.log_prob(z, target, transform, **options),
        ms.linear_log_prob(input, weight, target, transform, linear_bias=bias, **options),
    ):
        torch.testing.assert_close(found, wanted)
        got = torch.autograd.grad(
            differentiable(found), leaves, [torch.ones(N, dtype=torch.float64)] * 4, retain_graph=True
        )
        true = torch.autograd.grad(
            differentiable(wanted), leaves, [torch.ones(N, dtype=torch.float64)] * 4, retain_graph=True
        )
        torch.testing.assert_close(got, true)
        assert (got[1][~given("mask")] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_statistics_beside_a_loss(backend: Any, kind: str) -> None:
    """Those of log_prob under the same candidates, in the ids of the whole vocabulary."""
    input, weight, bias, target = batch(torch.float32)
    options: dict[str, Any] = {"candidates": given("indices"), "backend": backend, "return_statistics": True}
    transform, z = disturbed("plif"), F.linear(input, weight, bias)
    if kind == "probabilities":
        with pytest.raises(ValueError, match="class probabilities"):
            ms.cross_entropy(z, torch.rand(N, V), transform, **options)
        return
    outputs: tuple[OutputName, ...] = ("log_prob", "entropy", "argmax", "lse", "rank")
    wanted = ms.log_prob(z, target, transform, candidates=given("indices"), outputs=outputs, backend=backend)
    _, of_logits = ms.cross_entropy(z, target, transform, **options)
    _, of_head = ms.linear_cross_entropy(input, weight, target, transform, linear_bias=bias, **options)
    for each in outputs:
        torch.testing.assert_close(getattr(of_logits, each), getattr(wanted, each))
        torch.testing.assert_close(getattr(of_head, each), getattr(wanted, each))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "settings"), [("soft_cap", {"cap": 3.0}), ("sigmoid_cap", {"a": 3.0})])
def test_where_f_of_minus_infinity_is_finite(backend: Any, name: str, settings: dict[str, float]) -> None:
    """The only candidate has probability 1 and its loss no gradient, where a logit of -inf leaves the others some."""
    transform = disturbed(name, **settings).double()
    z = torch.randn(3, V, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([4, 4, 4])
    masked = z.masked_fill(~given("mask", [4]), -torch.inf)
    assert (ms.cross_entropy(masked, target, transform, reduction="none") > 0.01).all()
    loss = ms.cross_entropy(z, target, transform, candidates=given("indices", [4]), backend=backend)
    found = ms.log_prob(z, target, transform, candidates=given("mask", [4]), backend=backend)
    assert loss.item() == 0
    assert found.log_prob is not None and (found.log_prob == 0).all()
    assert found.entropy is not None and (found.entropy == 0).all()
    assert (torch.autograd.grad(loss, z)[0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_they_are_the_smaller_problem_to_the_bit(dtype: torch.dtype) -> None:
    """In every type. A mask is its classes in order."""
    input, weight, _, target = batch(dtype)
    place = torch.full((V,), -1).index_copy_(0, torch.tensor(CLASSES), torch.arange(len(CLASSES)))
    smaller = torch.where(target == -100, -100, place[target.clamp(min=0)])
    transform, few = disturbed("plif"), torch.tensor(CLASSES)
    wanted = ms.linear_cross_entropy(input, weight[few], smaller, transform, label_smoothing=0.1, backend="cpu")
    found = ms.linear_cross_entropy(
        input, weight, target, transform, label_smoothing=0.1, candidates=few, backend="cpu"
    )
    assert torch.equal(found, wanted)
    leaves = [input, weight, *transform.parameters()]
    for got, true in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(wanted, leaves), strict=True):
        assert got.dtype == true.dtype and torch.equal(got, true)
    mask, ordered = (
        ms.linear_cross_entropy(input, weight, target, transform, candidates=each, backend="cpu")
        for each in (given("mask"), given("indices", sorted(CLASSES)))
    )
    assert torch.equal(mask, ordered)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_classes_are_no_restriction(backend: Any) -> None:
    input, weight, bias, target = batch(torch.float32)
    options: dict[str, Any] = {"linear_bias": bias, "label_smoothing": 0.1, "backend": backend}
    every = torch.arange(V)
    for candidates in (every, every == every, every.flip(0)):
        found = ms.linear_cross_entropy(input, weight, target, candidates=candidates, **options)
        torch.testing.assert_close(found, ms.linear_cross_entropy(input, weight, target, **options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ignore_index", [1, 0, 9, 22, -1, 1000])
def test_ignore_index_is_a_class_and_no_place(backend: Any, ignore_index: int) -> None:
    """1 is a place among the candidates, 9 and 0 are candidates at other places, 1000 is no class."""
    z = torch.randn(N, V, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([9, ignore_index, 0, 22, ignore_index, 4, 2])
    valid = target != ignore_index
    options: dict[str, Any] = {"candidates": given("indices"), "ignore_index": ignore_index, "backend": backend}
    loss, lse = ms.cross_entropy(z, target, reduction="none", return_lse=True, **options)
    log_p = allowed_y(z, torch.nn.Identity()).log_softmax(1)
    inside = target.clamp(0, V - 1)
    wanted = torch.where(valid, -log_p.gather(1, inside.unsqueeze(1)).squeeze(1), 0.0)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(lse, allowed_y(z, torch.nn.Identity()).logsumexp(1))
    mean = ms.cross_entropy(z, target, **options)
    torch.testing.assert_close(mean, wanted.sum() / valid.sum())
    (gradient,) = torch.autograd.grad(mean, z)
    assert (gradient[~valid] == 0).all() and (gradient[valid] != 0).any(1).all()
    found = ms.log_prob(z, target, outputs=("log_prob", "rank", "target_logit", "is_top1"), **options)
    torch.testing.assert_close(found.log_prob, -wanted)
    assert found.rank is not None and torch.equal(found.rank == -1, ~valid)
    assert found.target_logit is not None and torch.equal(found.target_logit == 0, ~valid)
    assert found.is_top1 is not None and not found.is_top1[~valid].any()


CALLS: dict[str, Callable[..., Any]] = {
    "cross_entropy": lambda _, z, target, **options: ms.cross_entropy(z, target, **options),
    "linear_cross_entropy": lambda head, _, target, **options: ms.linear_cross_entropy(*head, target, **options),
    "log_prob": lambda _, z, target, **options: ms.log_prob(z, target, **options),
    "linear_log_prob": lambda head, _, target, **options: ms.linear_log_prob(*head, target, **options),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(
    ("wrong", "ignore_index"), [(1, -100), (21, -100), (V, -100), (-1, -100), (10**9, -100), (-100, 3), (8, 22)]
)
def test_target_that_is_no_candidate(backend: Any, call: Any, wrong: int, ignore_index: int) -> None:
    """-100 is none either where another value is ignored; 8 is how many candidates there are."""
    input, weight, _, target = batch(torch.float32)
    target[4] = ignore_index
    target[6] = wrong
    with pytest.raises(IndexError, match=f"target {wrong} is none of the 8 candidates"):
        call(
            (input, weight), input @ weight.t(), target, candidates=given("mask"), ignore_index=ignore_index,
            backend=backend,
        )  # fmt: skip


@pytest.mark.seconds
def test_target_that_is_no_candidate_in_compiled_code() -> None:
    """Nothing there looks at values: the reference's row is NaN, the cpu backend's kernel raises."""
    z, target, candidates = torch.randn(3, V), torch.tensor([9, 1, -100]), given("indices")

    def loss(backend: Any) -> Tensor:
        result: Tensor = ms.cross_entropy(z, target, candidates=candidates, reduction="none", backend=backend)
        return result

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert compiled("reference").isnan().tolist() == [False, True, False]
    with pytest.raises(IndexError, match="out of bounds for 8 classes"):
        compiled("cpu")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_other_classes_may_hold_anything(backend: Any, call: Any) -> None:
    """Their logits, or their rows of the weight, are not looked at, and have gradients of 0."""
    input, weight, _, target = batch(torch.float32)
    z, others = (input @ weight.t()).detach().requires_grad_(), ~given("mask")
    results = []
    for value in (0.0, torch.nan):
        with torch.no_grad():
            z[:, others] = value
            weight[others] = value
        found = call((input, weight), z, target, candidates=given("mask"), backend=backend)
        total = found if isinstance(found, Tensor) else found.log_prob.sum() + found.entropy.sum()
        leaf = z if total.grad_fn is not None and call in (CALLS["cross_entropy"], CALLS["log_prob"]) else weight
        (gradient,) = torch.autograd.grad(total, leaf)
        results.append([total.detach(), gradient])
        assert ((gradient[:, others] if leaf is z else gradient[others]) == 0).all()
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("backend", BACKENDS)
def test_probabilities_of_other_classes_are_dropped(backend: Any) -> None:
    """Whatever they are; the gradient that the reference has for them is 0."""
    z, target = torch.randn(N, V), torch.rand(N, V)
    more = target.masked_fill(~given("mask"), 5.0)
    losses = [ms.cross_entropy(z, each, candidates=given("mask"), backend=backend) for each in (target, more)]
    assert torch.equal(*losses)
    leaf = target.requires_grad_()
    (gradient,) = torch.autograd.grad(ms.cross_entropy(z, leaf, candidates=given("indices")), leaf)
    assert (gradient[:, ~given("mask")] == 0).all() and (gradient[:, given("mask")] != 0).all()
    wanted = -allowed_y(z, torch.nn.Identity()).log_softmax(1) / N
    torch.testing.assert_close(gradient, wanted.masked_fill(~given("mask"), 0.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(V,), (0, V), (4, V, 3), (2, V, 3, 2)])
def test_logits_of_any_shape(backend: Any, shape: tuple[int, ...]) -> None:
    z = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    class_dim = 0 if len(shape) == 1 else 1
    rest = shape[:class_dim] + shape[class_dim + 1 :]
    target = torch.tensor(CLASSES)[torch.randint(0, len(CLASSES), rest)]
    masked = z.movedim(class_dim, -1).masked_fill(~given("mask"), -torch.inf).movedim(-1, class_dim)
    wanted = F.cross_entropy(masked, target, reduction="none")
    found, statistics = ms.cross_entropy(
        z, target, reduction="none", candidates=given("indices"), return_statistics=True, backend=backend
    )
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(statistics.argmax, masked.argmax(class_dim))
    torch.testing.assert_close(gradients(found, [z]), gradients(wanted, [z]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (0,)])
def test_inputs_of_the_head_of_any_shape(backend: Any, leading: tuple[int, ...]) -> None:
    input, weight = torch.randn(*leading, D, dtype=torch.float64), torch.randn(V, D, dtype=torch.float64)
    target = torch.tensor(CLASSES)[torch.randint(0, len(CLASSES), leading)].to(torch.uint8)
    options: dict[str, Any] = {"candidates": given("mask"), "backend": backend}
    loss = ms.linear_cross_entropy(input, weight, target, reduction="none", **options)
    found = ms.linear_log_prob(input, weight, target, outputs=("log_prob", "argmax"), **options)
    y = (input @ weight.t()).masked_fill(~given("mask"), -torch.inf)
    wanted = y.log_softmax(-1).gather(-1, target.long().unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(loss, -wanted)
    torch.testing.assert_close(found.log_prob, wanted)
    torch.testing.assert_close(found.argmax, y.argmax(-1))


@pytest.mark.seconds
@pytest.mark.parametrize(("compiler", "exact"), COMPILERS[:1])
def test_compiled(compiler: str, exact: bool) -> None:
    """Indices, of any number; a mask would have to be counted."""
    input, weight, _, target = batch(torch.float32)
    transform = disturbed("plif")
    torch._dynamo.reset()

    def loss(x: Tensor, w: Tensor, candidates: Tensor) -> Tensor:
        loss, statistics = ms.linear_cross_entropy(
            x, w, target, transform, candidates=candidates, label_smoothing=0.1, return_statistics=True, backend="cpu"
        )
        policy = ms.linear_log_prob(x, w, target, transform, candidates=candidates, backend="cpu")
        assert policy.entropy is not None
        result: Tensor = loss + 0.1 * policy.entropy.sum() + statistics.argmax.sum()
        return result

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=compiler)
    for classes in (CLASSES, [*CLASSES, 3, 5]):
        candidates = given("indices", classes)
        wanted, got = (
            [each(input, weight, candidates), *torch.autograd.grad(each(input, weight, candidates), [input, weight])]
            for each in (loss, compiled)
        )
        torch.testing.assert_close(got, wanted, **({"rtol": 0, "atol": 0} if exact else {}))


@pytest.mark.grid(1)
@pytest.mark.parametrize("name", SOME_TRANSFORMS)
@pytest.mark.parametrize("grad_in_forward", [True, False, None])
def test_gradients_ahead_or_again(name: str, grad_in_forward: bool | None) -> None:
    input, weight, bias, target = batch(torch.float32)
    transform, leaves = disturbed(name), [input, weight, bias]
    results = [
        ms.linear_cross_entropy(
            input, weight, target, transform, linear_bias=bias, candidates=given("mask"), backend="cpu",
            grad_in_forward=each,
        )
        for each in (grad_in_forward, False)
    ]  # fmt: skip
    torch.testing.assert_close(*(torch.autograd.grad(each, leaves) for each in results))


@pytest.mark.grid
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(
    ("candidates", "error", "message"),
    [
        ([1, 2], TypeError, "candidates must be a Tensor, got list"),
        (torch.tensor([1, 2], dtype=torch.int32), TypeError, r"mask \(V,\), bool, or class.*got torch.int32 \(2,\)"),
        (torch.rand(V), TypeError, "candidates must be a mask.*got torch.float32"),
        (torch.tensor([[1, 2]]), TypeError, r"candidates must be a mask.*got torch.int64 \(1, 2\)"),
        (torch.tensor(1), TypeError, "candidates must be a mask"),
        (torch.ones(V - 1, dtype=torch.bool), ValueError, r"must have shape \(23,\) as a mask, got \(22,\)"),
        (torch.ones(N, V, dtype=torch.bool), ValueError, r"must have shape \(23,\) as a mask, got \(7, 23\)"),
        (torch.zeros(V, dtype=torch.bool), ValueError, "candidates must have at least 1 class, got none"),
        (torch.empty(0, dtype=torch.int64), ValueError, "candidates must have at least 1 class, got none"),
        (torch.tensor([1, V]), ValueError, "candidates must be classes from 0 to 22, got 23"),
        (torch.tensor([-1, 4]), ValueError, "candidates must be classes from 0 to 22, got -1"),
        (torch.tensor([4, 1, 4]), ValueError, "candidates must be different from each other"),
        (torch.ones(V, dtype=torch.bool, device="meta"), ValueError, "candidates must be on cpu like input, got meta"),
        (torch.ones(V, dtype=torch.bool).to_sparse(), NotImplementedError, "candidates must be a dense tensor"),
    ],
)
def test_refusals(backend: Any, call: Any, candidates: Any, error: type[Exception], message: str) -> None:
    input, weight, _, target = batch(torch.float32)
    with pytest.raises(error, match=message):
        call((input, weight), input @ weight.t(), target, candidates=candidates, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_class_weights_are_those_of_all_classes(backend: Any) -> None:
    input, weight, _, target = batch(torch.float32)
    for size in (V - 1, len(CLASSES)):
        with pytest.raises(ValueError, match=rf"weight must have shape \(23,\), got \({size},\)"):
            ms.linear_cross_entropy(
                input, weight, target, weight=torch.ones(size), candidates=given("mask"), backend=backend
            )
