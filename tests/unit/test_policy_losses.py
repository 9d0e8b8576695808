"""ms.losses against plain PyTorch on all logits, in float64 and float32."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from losses import disturbed
from token_batches import products
from torch import Tensor
from torch.nn import functional as F

from monosoftmax import head_products
from monosoftmax.losses import dpo, kl_to_reference, linear_policy_loss, sequence_log_prob

BACKENDS: list[Any] = ["reference", "cpu"]
B, T, D, V = 3, 4, 5, 31


@pytest.fixture(autouse=True)
def thin_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_products, "chunk_rows", lambda *_: 5)


def batch(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    shapes: list[tuple[int, ...]] = [(B, T, D), (V, D), (V,)]
    head = [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    target = torch.randint(0, V, (B, T))
    target[0, 0], target[2] = -100, -100  # the last sequence has no token that counts
    return head, target


def token_statistics(head: list[Tensor], target: Tensor, f: Any) -> tuple[Tensor, Tensor]:
    log_p = f(F.linear(*head)).log_softmax(-1)
    found = log_p.gather(-1, target.clamp(min=0)[..., None])[..., 0]
    return torch.where(target != -100, found, 0.0), -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("reduction", ["token", "sequence", "sum"])
@pytest.mark.parametrize("old", [True, False])
def test_policy_loss(backend: Any, dtype: torch.dtype, reduction: Any, old: bool) -> None:
    head, target = batch(dtype)
    f = disturbed("plif").to(dtype)
    generator = torch.Generator().manual_seed(1)
    advantage = torch.randn(B, generator=generator).to(dtype)
    sampled = token_statistics(head, target, f)[0].detach()
    old_log_prob = sampled + 0.4 * torch.randn(B, T, generator=generator).to(dtype) if old else None
    reference = sampled - 0.5 * torch.rand(B, T, generator=generator).to(dtype)
    if old_log_prob is not None:
        old_log_prob[target == -100] = torch.nan  # nobody sampled these
    found = linear_policy_loss(
        head[0], head[1], target, f, linear_bias=head[2], advantage=advantage, old_log_prob=old_log_prob,
        reference_log_prob=reference, clip=(0.2, 0.28), entropy_weight=0.05, kl_weight=0.1, reduction=reduction,
        backend=backend,
    )  # fmt: skip

    wide, exact = [each.detach().double().requires_grad_() for each in head], copy.deepcopy(f).double()
    log_prob, entropy = token_statistics(wide, target, exact)
    counts = target != -100
    before = log_prob.detach() if old_log_prob is None else torch.where(counts, old_log_prob.double(), log_prob)
    ratio, a = (log_prob - before).exp(), advantage.double()[:, None]
    clipped = ratio.clamp(0.8, 1.28)
    gap = torch.where(counts, reference.double(), 0.0) - log_prob
    kl = gap.exp() - gap - 1
    each = torch.where(counts, -torch.minimum(ratio * a, clipped * a) - 0.05 * entropy + 0.1 * kl, 0.0)
    per_sequence = each.sum(1) / counts.sum(1).clamp(min=1)
    loss = {"token": each.sum() / counts.sum(), "sequence": per_sequence.mean(), "sum": each.sum()}[reduction]
    eps = 1e-10 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(found.loss.double(), loss, rtol=eps, atol=eps)
    got = torch.autograd.grad(found.loss, [*head, *f.parameters()])
    for one, wanted in zip(got, torch.autograd.grad(loss, [*wide, *exact.parameters()]), strict=True):
        torch.testing.assert_close(one.double(), wanted, rtol=eps, atol=eps * max(1, wanted.abs().max().item()))
    logged = [entropy, kl, (clipped * a < ratio * a).double()]
    for one, wanted in zip(found[1:], logged, strict=True):
        assert not one.requires_grad
        torch.testing.assert_close(one.double(), wanted[counts].mean().detach(), rtol=10 * eps, atol=10 * eps)


def test_policy_loss_takes_three_products() -> None:
    head, target = batch(torch.float32)
    counted = products(
        lambda: linear_policy_loss(
            head[0], head[1], target, advantage=torch.ones(B), entropy_weight=0.1, backend="cpu"
        ).loss.backward(),
        rows=B * T,
    )
    assert counted == 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_preferences(backend: Any, average: bool, kind: Any) -> None:
    head, target = batch()
    target[2, 1] = 3
    f, reference = disturbed("soft_cap").double(), torch.randn(2, B, dtype=torch.float64)
    policy = sequence_log_prob(head[0], head[1], target, f, linear_bias=head[2], average=average, backend=backend)
    other = sequence_log_prob(head[0].flip(1), head[1], target, f, average=average, backend=backend)
    epsilon = 0.1 if kind == "sigmoid" else 0.0
    loss = dpo(policy, other, *reference, beta=0.3, kind=kind, label_smoothing=epsilon).mean()

    wide = [each.detach().clone().requires_grad_() for each in head]
    divisor = (target != -100).sum(1) if average else 1
    chosen = token_statistics(wide, target, f)[0].sum(1) / divisor
    bias = torch.zeros(V, dtype=torch.float64)
    rejected = token_statistics([wide[0].flip(1), wide[1], bias], target, f)[0].sum(1) / divisor
    margin = (chosen - rejected) - (reference[0] - reference[1])
    p = torch.sigmoid(0.3 * margin)
    each = -0.9 * p.log() - 0.1 * (1 - p).log() if kind == "sigmoid" else (margin - 1 / 0.6) ** 2
    torch.testing.assert_close(loss, each.mean())
    got = torch.autograd.grad(loss, head)
    for one, wanted in zip(got, torch.autograd.grad(each.mean(), wide), strict=True):
        torch.testing.assert_close(one, wanted)


def test_estimates_of_kl() -> None:
    log_prob = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.5, -2.0, -1.0], dtype=torch.float64)
    r = reference - log_prob
    for estimator, wanted in (("k1", -r), ("k2", r * r / 2), ("k3", r.exp() - r - 1)):
        torch.testing.assert_close(kl_to_reference(log_prob, reference, estimator=estimator), wanted)  # type: ignore[arg-type]
    torch.autograd.gradcheck(lambda x: kl_to_reference(x, reference), log_prob)


def test_nothing_counts() -> None:
    """A batch without tokens that count has loss 0, and gradients of 0."""
    head, target = batch(torch.float32)
    nothing = torch.full_like(target, -100)
    for reduction in ("token", "sequence", "sum"):
        found = linear_policy_loss(
            head[0],
            head[1],
            nothing,
            advantage=torch.ones(B),
            reduction=reduction,
            backend="cpu",  # type: ignore[arg-type]
        )
        assert found.loss == 0 and not any(each.any() for each in torch.autograd.grad(found.loss, head[:2]))


ONES = torch.ones(B)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"advantage": torch.ones(T)}, ValueError, r"advantage must have the shape of target, \(3, 4\), got \(4,\)"),
        ({"advantage": torch.ones(B, T).requires_grad_()}, ValueError, "advantage must not require a gradient"),
        ({"old_log_prob": ONES}, ValueError, r"old_log_prob must have the shape of target"),
        ({"clip": (-0.1, 0.2)}, ValueError, "clip must be two numbers that are not negative"),
        ({"clip": 0.2}, ValueError, "clip must be two numbers that are not negative, got 0.2"),
        ({"kl_weight": 0.1}, ValueError, "reference_log_prob must be given where kl_weight is not 0"),
        ({"estimator": "k4"}, ValueError, "estimator must be one of k1, k2, k3, got 'k4'"),
        ({"reduction": "mean"}, ValueError, "reduction must be one of token, sequence, sum, got 'mean'"),
    ],
)
def test_refused_policies(change: dict[str, Any], error: type[Exception], message: str) -> None:
    head, target = batch(torch.float32)
    with pytest.raises(error, match=message):
        linear_policy_loss(head[0], head[1], target, **({"advantage": ONES} | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 0.0}, "beta must be positive, got 0"),
        ({"kind": "hinge"}, "kind must be one of sigmoid, ipo, got 'hinge'"),
        ({"label_smoothing": 0.6}, "label_smoothing must be between 0 and 0.5"),
        ({"kind": "ipo", "label_smoothing": 0.1}, 'label_smoothing is for kind="sigmoid"'),
        ({"rejected": torch.ones(2)}, r"rejected must have the shape of chosen, \(3,\), got \(2,\)"),
    ],
)
def test_refused_preferences(change: dict[str, Any], message: str) -> None:
    given = {"chosen": ONES, "rejected": ONES, "reference_chosen": ONES, "reference_rejected": ONES}
    with pytest.raises(ValueError, match=message):
        dpo(**(given | change))
