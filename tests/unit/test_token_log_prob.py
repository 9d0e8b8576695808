"""ms.linear_log_prob and ms.log_prob: values and gradients for every transform and dtype, on both backends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from losses import COMPILERS, SOME_TRANSFORMS, TRANSFORMS, disturbed
from operator_calls import kernel_transform, opcheck
from tiers import mostly_slow
from torch import Tensor
from torch.nn import functional as F

import monosoftmax as ms
from monosoftmax import head_products, ops
from monosoftmax.groups import Head
from monosoftmax.token_log_prob import OutputName

BACKENDS: list[Any] = ["reference", "cpu"]
N, D, V = 7, 5, 41
DIFFERENTIABLE: tuple[OutputName, ...] = ("log_prob", "entropy", "lse", "target_logit")
ALL: tuple[OutputName, ...] = (*DIFFERENTIABLE, "is_top1", "rank", "argmax")


@pytest.fixture(autouse=True)
def thin_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_products, "chunk_rows", lambda *_: 3)


def batch(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    """The leaves of a head, and targets of which one is ignored."""
    torch.manual_seed(0)
    head = [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in ((N, D), (V, D), (V,))]
    target = torch.randint(0, V, (N,))
    target[4] = -100
    return head, target


def gradients(found: ms.TokenLogProb, names: tuple[str, ...], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Of the sum of the outputs ``names``, each token with a factor of its own."""
    factors = torch.randn(len(DIFFERENTIABLE), N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    total = sum(
        (factor * getattr(found, name).double()).sum()
        for name, factor in zip(DIFFERENTIABLE, factors, strict=True)
        if name in names
    )
    assert isinstance(total, Tensor)
    return torch.autograd.grad(total, leaves, retain_graph=True)


def materialised(z: Tensor, target: Tensor, transform: Any) -> ms.TokenLogProb:
    """The definition, by plain PyTorch on all logits."""
    y, valid = transform(z), target != -100
    log_p, index = y.log_softmax(1), target.clamp(min=0).unsqueeze(1)
    ahead = (z > z.gather(1, index)).sum(1)
    return ms.TokenLogProb(
        log_prob=torch.where(valid, log_p.gather(1, index).squeeze(1), 0.0),
        entropy=-(log_p.exp() * log_p).sum(1),
        is_top1=valid & (ahead == 0),
        rank=torch.where(valid, ahead, -1),
        argmax=z.argmax(1),
        lse=y.logsumexp(1),
        target_logit=torch.where(valid, y.gather(1, index).squeeze(1), 0.0),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("names", [("log_prob",), ("entropy",), ("lse",), ("log_prob", "entropy"), DIFFERENTIABLE])
def test_definition(backend: Any, name: str, names: tuple[str, ...]) -> None:
    (input, weight, bias), target = batch()
    transform = disturbed(name).double()
    leaves = [input, weight, bias, *transform.parameters()]
    z = F.linear(input, weight, bias)
    wanted = materialised(z, target, transform)
    grads = gradients(wanted, names, leaves)
    for found in (
        ms.linear_log_prob(input, weight, target, transform, linear_bias=bias, outputs=ALL, backend=backend),
        ms.log_prob(z, target, transform, outputs=ALL, backend=backend),
    ):
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(gradients(found, names, leaves), grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_errors_against_float64(dtype: torch.dtype, name: str) -> None:
    """No output or gradient is further from float64 than 4 times what plain PyTorch in the same type is.

    Or than 8 units in the last place of 1: of one coefficient, both may be closer by chance than their sums promise.
    """
    (input, weight, bias), target = batch(dtype)
    transform = disturbed(name)

    def results(logits_dtype: torch.dtype | None, backend: Any) -> list[Tensor]:
        z = F.linear(input.double(), weight.double(), bias.double())  # from the same logits, rounded once
        z = z.to(dtype).to(logits_dtype or dtype).detach().requires_grad_()
        f = disturbed(name).double() if logits_dtype == torch.float64 else transform
        found = ms.log_prob(z, target, f, outputs=DIFFERENTIABLE, backend=backend)
        grads = gradients(found, DIFFERENTIABLE, [z, *f.parameters()])
        return [*(getattr(found, each) for each in DIFFERENTIABLE), *grads]

    truth, got, plain = results(torch.float64, "reference"), results(None, "cpu"), results(None, "reference")
    for true, fused, baseline in zip(truth, got, plain, strict=True):
        least = 8 * torch.finfo(fused.dtype).eps * true.abs().max().clamp(min=1)
        assert (fused.double() - true).abs().max() <= 4 * (baseline.double() - true).abs().max() + least


@pytest.mark.parametrize("names", [("log_prob",), ("log_prob", "entropy"), DIFFERENTIABLE])
def test_gradcheck(names: tuple[OutputName, ...]) -> None:
    """With its default settings, on the cpu backend."""
    (input, weight, bias), target = batch()
    coefficients = list(disturbed("gss").double().parameters())

    def call(x: Tensor, w: Tensor, b: Tensor, *raw: Tensor) -> tuple[Tensor, ...]:
        f = disturbed("gss").double()
        for module_name, value in zip([key for key, _ in f.named_parameters()], raw, strict=True):
            del f._parameters[module_name]
            setattr(f, module_name, value)
        found = ms.linear_log_prob(x, w, target, f, linear_bias=b, outputs=names, backend="cpu")
        return tuple(getattr(found, name) for name in names)

    leaves = [each.detach().clone().requires_grad_() for each in (input, weight, bias, *coefficients)]
    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_p_next_to_one(backend: Any) -> None:
    """log p and the entropy keep their small numbers, log p is not above 0, and the gradients are those of float64."""
    gaps = torch.tensor([0.0, 8.0, 16.0, 30.0, 80.0, 200.0])
    z = torch.cat([torch.zeros(6, 1), -gaps.unsqueeze(1).expand(6, 99)], 1) + 20
    found = {}
    for dtype in (torch.float32, torch.float64):
        leaf = z.to(dtype).requires_grad_()
        result = ms.log_prob(leaf, torch.zeros(6, dtype=torch.int64), backend=backend)
        assert result.log_prob is not None and result.entropy is not None
        of_log_prob, of_entropy = (
            torch.autograd.grad(each.sum(), leaf, retain_graph=True)[0] for each in (result.log_prob, result.entropy)
        )
        found[dtype] = [result.log_prob.detach(), result.entropy.detach(), of_log_prob, of_entropy]
        assert (result.log_prob <= 0).all() and (result.entropy >= 0).all()
    for fused, true in zip(found[torch.float32], found[torch.float64], strict=True):
        torch.testing.assert_close(fused.double(), true, rtol=1e-4, atol=2e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["identity", "plif", "soft_cap"])
@pytest.mark.parametrize("outputs", [("log_prob",), ("log_prob", "entropy", "lse")])
def test_ignored_rows_may_hold_anything(backend: Any, name: str, outputs: tuple[OutputName, ...]) -> None:
    """Their entropy is that of their logits; if nobody asks for its gradient, they have none."""
    z = torch.randn(3, V)
    z[1] = torch.nan
    z.requires_grad_()
    transform, valid = disturbed(name), torch.tensor([True, False, True])
    found = ms.log_prob(z, torch.tensor([0, -100, 5]), transform, outputs=outputs, backend=backend)
    assert found.log_prob is not None and found.log_prob[1] == 0
    sum(getattr(found, each)[valid].sum() for each in outputs).backward()  # type: ignore[union-attr]
    assert z.grad is not None and (z.grad[1] == 0).all() and z.grad.isfinite().all()
    assert all(each.grad is not None and each.grad.isfinite().all() for each in transform.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows_may_overflow_in_the_head(backend: Any) -> None:
    """Their logits are infinite; the gradients of what all rows share are those of the other rows."""
    (input, weight, _), target = batch(torch.float32)
    transform, others = disturbed("plif"), target != -100
    with torch.no_grad():
        input[~others] = 3e38
    leaves, grads = [weight, *transform.parameters()], []
    for x, t in ((input, target), (input[others], target[others])):
        found = ms.linear_log_prob(x, weight, t, transform, backend=backend)
        assert found.log_prob is not None and found.entropy is not None
        total = found.log_prob.sum() + found.entropy[t != -100].sum()
        grads.append(torch.autograd.grad(total, leaves))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["identity", "plif", "sigsoftmax"])
def test_masked_logits(backend: Any, name: str) -> None:
    """A logit of -inf has p = 0: it adds nothing to the entropy, and has no gradient."""
    transform, target = disturbed(name).double(), torch.tensor([0, 9, 3])
    few = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    z = F.pad(few, (0, 6), value=-torch.inf)
    leaves = [few, *transform.parameters()]
    results = [ms.log_prob(each, target, transform, outputs=DIFFERENTIABLE, backend=backend) for each in (z, few)]
    torch.testing.assert_close(results[0], results[1])
    grads = [
        torch.autograd.grad(sum(getattr(each, name).sum() for name in ("log_prob", "entropy", "lse")), leaves)
        for each in results
    ]
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (0,), (2, 0)])
def test_any_leading_shape(leading: tuple[int, ...]) -> None:
    weight, target = torch.randn(V, D, requires_grad=True), torch.randint(0, V, leading)
    input = torch.randn(*leading, D, requires_grad=True)
    found = ms.linear_log_prob(input, weight, target, outputs=ALL, backend="cpu")
    assert all(each is not None and each.shape == leading for each in found)
    assert found.log_prob is not None and found.entropy is not None and found.is_top1 is not None
    assert found.is_top1.dtype == torch.bool
    (found.log_prob + found.entropy).sum().backward()
    assert input.grad is not None and input.grad.shape == input.shape


def test_what_was_not_asked_for_is_none() -> None:
    (input, weight, _), target = batch()
    found = ms.linear_log_prob(input, weight, target, outputs=["rank"])
    assert found.rank is not None and [name for name, each in found._asdict().items() if each is None] == [
        name for name in ms.TokenLogProb._fields if name != "rank"
    ]


def test_products() -> None:
    """One forward; three more backward, and none for a gradient that nobody asks for."""
    (input, weight, _), target = batch()

    def products(call: Any) -> int:
        with torch.profiler.profile() as profile:
            call()
        events = profile.events()
        assert events is not None
        return sum(event.name in ("aten::mm", "aten::addmm_") for event in events)

    chunks = 3
    assert products(lambda: ms.linear_log_prob(input, weight, target, backend="cpu")) == chunks
    for operands, count in (((True, False), 2), ((False, True), 2), ((True, True), 3)):
        head = [each.detach().requires_grad_(needed) for each, needed in zip((input, weight), operands, strict=True)]
        leaves = [each for each in head if each.requires_grad]
        found = ms.linear_log_prob(head[0], head[1], target, backend="cpu")
        assert found.log_prob is not None and found.entropy is not None
        total = (found.log_prob * found.entropy).sum()
        assert products(lambda total=total, leaves=leaves: torch.autograd.grad(total, leaves)) == chunks * count


@pytest.mark.parametrize(("compiler", "exact"), COMPILERS)
def test_compiled(compiler: str, exact: bool) -> None:
    (input, weight, _), target = batch(torch.float32)
    transform = disturbed("plif")

    def loss(x: Tensor, w: Tensor) -> Tensor:
        found = ms.linear_log_prob(x, w, target, transform, backend="cpu")
        assert found.log_prob is not None and found.entropy is not None
        return (found.log_prob + 0.1 * found.entropy).sum()

    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    wanted, got = (torch.autograd.grad(each(input, weight), [input, weight]) for each in (loss, compiled))
    torch.testing.assert_close(got, wanted, **({"rtol": 0, "atol": 0} if exact else {}))


@pytest.mark.grid(1)
@pytest.mark.parametrize("name", mostly_slow(TRANSFORMS, SOME_TRANSFORMS))
def test_opcheck(name: str) -> None:
    (input, weight, bias), target = batch(torch.float32)
    f = kernel_transform(disturbed(name), requires_grad=True)
    below = f._replace(coefficients=f.coefficients.detach())
    z = F.linear(input, weight, bias).detach()
    stats = ops.token_statistics(ops.RowTokenStatistics("cpu", z, target, below, -100)).row_stats
    opcheck(ops.LinearTokenStatistics("cpu", Head(input, weight, bias), target, f, -100))
    opcheck(ops.RowTokenStatistics("cpu", z.requires_grad_(), target, f, -100))
    head, upstream = Head(input.detach(), weight.detach(), bias.detach()), torch.randn(3, N)
    for given in ((upstream[0], None, None), (None, upstream[1], None), (None, None, upstream[2]), tuple(upstream)):
        opcheck(ops.LinearTokenStatisticsBackward("cpu", *given, head, target, below, -100, stats, (True,) * 4))
        opcheck(ops.RowTokenStatisticsBackward("cpu", *given, z.detach(), target, below, -100, stats, (True, False)))


def test_double_backward_is_an_error() -> None:
    (input, weight, _), target = batch()
    found = ms.linear_log_prob(input, weight, target, backend="cpu")
    assert found.entropy is not None
    (grad,) = torch.autograd.grad(found.entropy.sum(), input, create_graph=True)
    with pytest.raises(RuntimeError, match='does not support double backward; use backend="reference"'):
        grad.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"outputs": "entropy"}, ValueError, "outputs must be a sequence of at least one of log_prob, entropy"),
        ({"outputs": ()}, ValueError, r"outputs must be a sequence.*got \(\)"),
        ({"outputs": ("log_p",)}, ValueError, "outputs must be some of log_prob.*got 'log_p'"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, r"target must have the shape.*got \(3,\)"),
        ({"target": torch.tensor([0, 1, 2, 9])}, IndexError, r"target 9 \(row 3\) is out of bounds for 9 classes"),
        ({"target": torch.rand(4, 9)}, NotImplementedError, "class probabilities are for"),
        ({"transform": "plif"}, TypeError, "transform must be a monosoftmax transform or None, got str"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index must be an int, got float"),
    ],
)
def test_refusals(backend: Any, change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"target": torch.tensor([0, 8, -100, 3])}
    with pytest.raises(error, match=message):
        ms.linear_log_prob(torch.randn(4, 5), torch.randn(9, 5), **arguments | change, backend=backend)
    with pytest.raises(error, match=message):
        ms.log_prob(torch.randn(4, 9), **arguments | change, backend=backend)


def test_explain() -> None:
    of_head = ms.backends.explain("linear_log_prob", torch.zeros(1, 1))
    assert of_head.backend == "cpu" and "one buffer of logits" in str(of_head)
    assert "kernel each way" in str(ms.backends.explain("log_prob", torch.zeros(1, 1)))
