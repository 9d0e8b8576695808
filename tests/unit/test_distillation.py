"""ms.linear_distillation and ms.linear_topk_distillation against plain PyTorch on all logits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from losses import COMPILERS, SOME_TRANSFORMS, TRANSFORMS, disturbed
from operator_calls import kernel_transform, opcheck
from tiers import mostly_slow
from torch import Tensor
from torch.nn import functional as F

import monosoftmax as ms
from monosoftmax import distilled_head, gradients_ahead, ops
from monosoftmax.groups import Divergence, Head, Teacher
from monosoftmax.transforms import PLIF, Chain, Scale, SoftCap

BACKENDS: list[Any] = ["reference", "cpu"]
N, D, E, V, K = 7, 5, 6, 41, 6
KINDS = ["forward_kl", "reverse_kl", "jsd"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def thin_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distilled_head, "chunk_rows", lambda *_: 4)


def batch(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
    """The leaves of the student's head, and the teacher's."""
    torch.manual_seed(0)
    shapes: list[list[tuple[int, ...]]] = [[(N, D), (V, D), (V,)], [(N, E), (V, E), (V,)]]
    student, teacher = ([torch.randn(each, dtype=torch.float64).to(dtype) for each in head] for head in shapes)
    return [each.requires_grad_() for each in student], teacher


def call(student: list[Tensor], teacher: list[Tensor], f: Any, g: Any, **options: Any) -> Tensor:
    return ms.linear_distillation(
        student[0],
        student[1],
        teacher[0],
        teacher[1],
        f,
        g,
        student_bias=student[2],
        teacher_bias=teacher[2],
        **options,
    )


def truth(student: list[Tensor], teacher: list[Tensor], f: Any, g: Any, kind: str, **of: float) -> Tensor:
    """The losses [N], by the definitions, with ``beta`` and ``tau``."""
    beta, tau = of["beta"], of["tau"]
    p = (f(F.linear(*student)) / tau).softmax(1)
    q = (g(F.linear(*(each.to(p.dtype) for each in teacher))) / tau).softmax(1)
    if kind == "forward_kl":
        return (q * (q.log() - p.log())).sum(1)
    if kind == "reverse_kl":
        return (p * (p.log() - q.log())).sum(1)
    m = beta * q + (1 - beta) * p
    return beta * (q * (q / m).log()).sum(1) + (1 - beta) * (p * (p / m).log()).sum(1)


@pytest.mark.grid
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients(name: str, dtype: torch.dtype, kind: Any, reduction: Any, backend: Any) -> None:
    student, teacher = batch(dtype)
    wide_type = torch.float64 if dtype == torch.float64 else torch.float32
    f, g = disturbed(name).to(wide_type), Chain(Scale(0.5), SoftCap(6.0), disturbed("plif", 1)).to(wide_type)
    mask = torch.tensor([True] * 5 + [False, True])
    options = {"divergence": kind, "beta": 0.3, "temperature": 0.8, "reduction": reduction, "mask": mask}
    loss = call(student, teacher, f, g, backend=backend, **options)
    wide, exact = [each.detach().double().requires_grad_() for each in student], copy.deepcopy(f).double()
    of_teacher = [each.double() for each in teacher]
    losses = truth(wide, of_teacher, exact, copy.deepcopy(g).double(), kind, beta=0.3, tau=0.8)
    losses = torch.where(mask, losses, 0.0)
    weights = torch.linspace(0.5, 2.0, N, dtype=torch.float64) if reduction == "none" else 3.0
    wanted = {"none": losses, "sum": losses.sum(), "mean": losses.sum() / 6}[reduction]
    eps = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}[dtype]
    torch.testing.assert_close(loss.double(), wanted, rtol=eps, atol=eps)
    got = torch.autograd.grad((loss.double() * weights).sum(), [*student, *f.parameters()])
    right = torch.autograd.grad((wanted * weights).sum(), [*wide, *exact.parameters()])
    for one, other in zip(got, right, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=eps, atol=eps * max(1.0, other.abs().max().item()))
    assert gradients_ahead.waiting_bytes(torch.device("cpu")) == 0


@pytest.mark.grid(1)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(kind: Any, reduction: Any, backend: Any) -> None:
    student, teacher = batch()
    f = disturbed("gss").double()
    torch.autograd.gradcheck(
        lambda *leaves: call(list(leaves), teacher, f, None, divergence=kind, reduction=reduction, backend=backend),
        student,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_student_like_its_teacher(kind: Any, backend: Any) -> None:
    """The divergence is 0 to rounding, never noticeably below, and so is its gradient; p next to 1, too."""
    student, _ = batch(torch.float32)
    with torch.no_grad():
        student[2][3] += 30
    same = [each.detach() for each in student]
    loss = call(student, same, PLIF(), PLIF(), divergence=kind, reduction="none", backend=backend)
    assert bool((loss.abs() < 2e-6).all())
    (grad,) = torch.autograd.grad(loss.sum(), student[0])
    assert grad.abs().max() < 2e-5


def test_an_infinite_reverse_kl() -> None:
    """Where the teacher excludes a class that the student does not; a forward KL is finite there."""
    student, teacher = batch(torch.float32)
    teacher[2][0] = -torch.inf
    for backend in BACKENDS:
        losses = [call(student, teacher, None, None, divergence=kind, backend=backend) for kind in KINDS]  # type: ignore[arg-type]
        assert losses[1] == torch.inf and bool(losses[0].isfinite()) and bool(losses[2].isfinite())


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_rows_may_hold_anything(backend: Any) -> None:
    student, teacher = batch(torch.float32)
    mask = torch.tensor([False] + [True] * 6)
    before = call(student, teacher, PLIF(), None, mask=mask, backend=backend)
    wanted = torch.autograd.grad(before, student)
    with torch.no_grad():
        student[0][0], teacher[0][0] = torch.nan, torch.inf
    loss = call(student, teacher, PLIF(), None, mask=mask, backend=backend)
    torch.testing.assert_close(loss, before)
    for got, right in zip(torch.autograd.grad(loss, student), wanted, strict=True):
        torch.testing.assert_close(got, right)


def test_no_rows_and_any_shape() -> None:
    student, teacher = batch(torch.float32)
    for backend in BACKENDS:
        nothing = ms.linear_distillation(student[0][:0], student[1], teacher[0][:0], teacher[1], backend=backend)
        assert nothing == 0
        small, large = student[0][:6].reshape(2, 3, D), teacher[0][:6].reshape(2, 3, E)
        losses = ms.linear_distillation(small, student[1], large, teacher[1], reduction="none", backend=backend)
        flat = ms.linear_distillation(
            student[0][:6], student[1], teacher[0][:6], teacher[1], reduction="none", backend=backend
        )
        assert torch.equal(losses, flat.reshape(2, 3))


@pytest.mark.parametrize(("compiler", "exact"), COMPILERS)
def test_compiled(compiler: str, exact: bool) -> None:
    student, teacher = batch(torch.float32)
    f = disturbed("plif")

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return ms.linear_distillation(x, w, teacher[0], teacher[1], f, divergence="jsd", backend="cpu")

    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    wanted, got = (torch.autograd.grad(each(student[0], student[1]), student[:2]) for each in (loss, compiled))
    torch.testing.assert_close(got, wanted, **({"rtol": 0, "atol": 0} if exact else {}))


@pytest.mark.grid(1)
@pytest.mark.parametrize("name", mostly_slow(TRANSFORMS, SOME_TRANSFORMS))
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(name: str, kind: str) -> None:
    student, teacher = batch(torch.float32)
    f = kernel_transform(disturbed(name), requires_grad=True)
    below = f._replace(coefficients=f.coefficients.detach())
    given = Teacher(*teacher, *kernel_transform(disturbed("gss")))
    head, detached = Head(*student), Head(*(each.detach() for each in student))
    arguments = ops.LinearDistillation(
        backend="cpu", head=head, transform=f, teacher=given, divergence=Divergence(kind, 0.3),
        scale=torch.rand(N), output_mask=(True,) * 4,
    )  # fmt: skip
    opcheck(arguments)
    opcheck(arguments._replace(scale=None, output_mask=(False,) * 4))
    stats = ops.linear_distillation(arguments).row_stats.detach()
    for mask in [(True,) * 4, (False, True, False, False)]:
        backward = ops.LinearDistillationBackward(
            backend="cpu", grad_loss=torch.rand(N), head=detached, transform=below, teacher=given,
            divergence=Divergence(kind, 0.3), row_stats=stats, output_mask=mask,
        )  # fmt: skip
        opcheck(backward)


def test_double_backward_is_an_error() -> None:
    student, teacher = batch(torch.float32)
    (grad,) = torch.autograd.grad(call(student, teacher, None, None, backend="cpu"), student[0], create_graph=True)
    with pytest.raises(RuntimeError, match='does not support double backward; use backend="reference"'):
        grad.sum().backward()


STUDENT, TEACHER = batch(torch.float32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"teacher_input": TEACHER[0][:3]}, ValueError, r"teacher_input must have the rows of the student's"),
        ({"teacher_weight": TEACHER[1][:3]}, ValueError, r"teacher_weight must have the classes of the student's, 41"),
        ({"teacher_input": TEACHER[0][:, :3]}, ValueError, r"teacher_input \(..., d\) and teacher_weight \(V, d\)"),
        ({"student_weight": STUDENT[1].double()}, TypeError, "student_weight must have the dtype of student_input"),
        ({"teacher_bias": torch.zeros(3)}, ValueError, r"teacher_bias must have shape \(41,\), got \(3,\)"),
        ({"divergence": "kl"}, ValueError, "divergence must be one of forward_kl, reverse_kl, jsd, got 'kl'"),
        ({"divergence": "jsd", "beta": 1.0}, ValueError, "beta must be between 0 and 1, got 1"),
        ({"reduction": "batchmean"}, ValueError, "reduction must be"),
        ({"mask": torch.ones(N)}, ValueError, "mask must be bool, of shape"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"teacher_transform": 3}, TypeError, "transform must be"),
        ({"teacher_transform": Chain(PLIF(), SoftCap(3.0)), "backend": "cpu"}, ValueError, "no second f after a first"),
    ],
)
def test_refusals(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {
        "student_input": STUDENT[0], "student_weight": STUDENT[1], "teacher_input": TEACHER[0],
        "teacher_weight": TEACHER[1],
    }  # fmt: skip
    with pytest.raises(error, match=message):
        ms.linear_distillation(**(given | change))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("remaining", ["one_class", "drop"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_top_k(backend: Any, dtype: torch.dtype, remaining: Any, reduction: Any) -> None:
    student, teacher = batch(dtype)
    f = disturbed("soft_cap").to(torch.float64 if dtype == torch.float64 else torch.float32)
    log_q, classes = F.linear(*teacher).double().log_softmax(1).topk(K)
    mask = torch.tensor([True] * 5 + [False, True])
    loss = ms.linear_topk_distillation(
        student[0], student[1], log_q.to(f.coefficients().dtype), classes, f, student_bias=student[2],
        remaining=remaining, temperature=0.9, mask=mask, reduction=reduction, backend=backend,
    )  # fmt: skip
    wide, exact = [each.detach().double().requires_grad_() for each in student], copy.deepcopy(f).double()
    log_p = (exact(F.linear(*wide)) / 0.9).log_softmax(1)
    q, p = log_q.exp(), log_p.exp().gather(1, classes)
    each = (q * (log_q - p.log())).sum(1)
    if remaining == "one_class":
        r, s = 1 - q.sum(1), 1 - p.sum(1)
        each = each + r * (r.log() - s.log())
    wanted = each[mask].sum() / (6 if reduction == "mean" else 1)
    eps = {torch.float64: 1e-9, torch.float32: 3e-5, torch.float16: 8e-3}[dtype]
    torch.testing.assert_close(loss.double(), wanted, rtol=eps, atol=eps)
    got = torch.autograd.grad(loss, [*student, *f.parameters()])
    for one, other in zip(got, torch.autograd.grad(wanted, [*wide, *exact.parameters()]), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=eps, atol=eps * max(1.0, other.abs().max().item()))


def test_top_k_of_all_classes_is_the_forward_kl() -> None:
    student, teacher = batch()
    log_q, classes = F.linear(*teacher).log_softmax(1).topk(V)
    for remaining in ("one_class", "drop"):
        loss = ms.linear_topk_distillation(
            student[0],
            student[1],
            log_q,
            classes,
            PLIF(),
            student_bias=student[2],
            remaining=remaining,  # type: ignore[arg-type]
        )
        torch.testing.assert_close(loss, call(student, teacher, PLIF(), None), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"remaining": "spread"}, "remaining must be one of drop, one_class, got 'spread'"),
        ({"reduction": "none"}, 'reduction must be "mean" or "sum", got \'none\''),
        ({"teacher_log_prob": torch.zeros(N, 2)}, r"must have the same shape \(..., k\)"),
        ({"teacher_classes": torch.zeros(N, 3)}, "classes must be int64"),
    ],
)
def test_refused_top_k(change: dict[str, Any], message: str) -> None:
    given = {
        "student_input": STUDENT[0], "student_weight": STUDENT[1], "teacher_log_prob": torch.zeros(N, 3),
        "teacher_classes": torch.arange(3).expand(N, 3),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        ms.linear_topk_distillation(**(given | change))
