"""The contract of ``monosoftmax.row_kernels.RowKernels``, checked on the kernels of any backend against float64.

The composition with what stands before and after f, the gradient of the entropy, rows whose columns are shared out, and
losses for a target of all classes. Tests call the functions ``check_...``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from losses import disturbed
from torch import Tensor

import monosoftmax as ms
from monosoftmax.groups import Divergence, LossOptions, RowResults, Transform, Upstream
from monosoftmax.row_kernels import RowKernels

#: scale and cap before f, and the temperature after it.
COMPOSITIONS: list[tuple[list[float], float | None]] = [
    ([], None), ([], 0.7), ([0.25, 0.0], None), ([0.5, 3.0], None), ([0.5, 3.0], 1.6),
]  # fmt: skip
DIVERGENCES = [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1)]


class Composition(NamedTuple):
    """y = f(inner(z)) / temperature in float64, and the same for the kernels."""

    module: ms.transforms.MonotonicTransform
    inner: list[float]
    temperature: float | None

    def kernel(self, rows: Tensor) -> Transform:
        dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
        coefficients = self.module.coefficients().detach().to(rows.device, dtype)
        tau = None if self.temperature is None else coefficients.new_tensor(self.temperature)
        return Transform(coefficients, self.module.kernel, list(self.module.constants()), self.inner, tau)

    def of(self, z: Tensor, coefficients: Tensor) -> Tensor:
        if self.inner:
            scale, cap = self.inner
            z = z * scale if cap == 0 else cap * torch.tanh(scale * z / cap)
        return self.module.evaluate(z, coefficients) / (self.temperature or 1.0)


def compositions(name: str, seed: int = 0) -> list[Composition]:
    module = disturbed(name, seed)
    return [Composition(module, inner, temperature) for inner, temperature in COMPOSITIONS]


def logits(dtype: torch.dtype, shape: tuple[int, int] = (5, 77), seed: int = 0, device: Any = "cpu") -> Tensor:
    """Rows of an odd stride: plain ones, one whose p is next to 1, and a far one."""
    generator = torch.Generator().manual_seed(seed)
    rows, classes = shape
    values = 2 * torch.randn(rows, classes, generator=generator, dtype=torch.float32)
    values[1, 3] += 30.0
    values[2] -= 20.0
    padded = torch.full((rows, classes + 3), torch.nan, dtype=dtype, device=device)
    padded[:, 1:-2] = values.to(device)
    return padded[:, 1:-2]


def targets(rows: Tensor) -> Tensor:
    count, classes = rows.shape
    target = torch.arange(count, device=rows.device) * 7 % classes
    target[1] = 3
    target[-1] = -100
    return target


class _Truth:
    """Results of float64 and their gradients for rows and coefficients."""

    def __init__(self, rows: Tensor, composition: Composition) -> None:
        self.rows = rows.detach().double().requires_grad_()
        kernel = composition.kernel(self.rows)
        self.coefficients = kernel.coefficients.requires_grad_()
        self.y = composition.of(self.rows, self.coefficients)
        self.log_p = torch.log_softmax(self.y, 1)


def _close(got: Tensor, true: Tensor, what: str, *, unit: float = 1.0) -> None:
    """``unit``: the size of the terms that add up to the result."""
    eps = max(torch.finfo(got.dtype).eps, 1e-15)
    largest = max(unit, true.abs().max().item() if true.numel() else 0.0)
    rtol, atol = (2e-12, 4e-13) if got.dtype == torch.float64 else (2 * max(eps, 6e-6), 2 * max(eps, 2e-6))
    torch.testing.assert_close(got.double(), true.detach(), rtol=rtol, atol=atol * largest, msg=f"{what}: {{}}".format)


def _numbers(rows: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    return torch.randn(len(rows), generator=generator, dtype=dtype).to(rows.device)


class _Named:
    """Kernels whose results have names: those in C++ return plain tuples."""

    def __init__(self, kernels: RowKernels) -> None:
        self._kernels = kernels

    def __getattr__(self, name: str) -> Any:
        kernel = getattr(self._kernels, name)
        if name not in ("cross_entropy", "divergence"):
            return kernel
        return lambda *args, **kwargs: RowResults(*kernel(*args, **kwargs))


def check_composition(kernels: RowKernels, rows: Tensor, composition: Composition) -> None:
    """Losses, statistics and log p, and the gradients, with the upstream gradients of all of them."""
    kernels = cast(RowKernels, _Named(kernels))
    f, truth, target = composition.kernel(rows), _Truth(rows, composition), targets(rows)
    kept, picked = target != -100, target.clamp_min(0)[:, None]
    lse = torch.logsumexp(truth.y, 1)
    loss = torch.where(kept, -truth.log_p.gather(1, picked)[:, 0], 0.0)
    options = LossOptions(None, -100, 0.0, 0.0, True)
    smoothed = LossOptions(None, -100, 0.1, 1e-2, True)
    of_smoothed = torch.where(kept, 0.9 * loss - 0.1 * truth.log_p.mean(1) + 1e-2 * lse.square(), 0.0)
    g, h = _numbers(rows, 1), _numbers(rows, 2)
    one = torch.tensor(0.25, dtype=g.dtype, device=g.device)
    for chosen, true, name in ((options, loss, "loss"), (smoothed, of_smoothed, "smoothed loss")):
        at_once = kernels.cross_entropy(rows, target, f, chosen, Upstream(one), output_mask=(True, True))
        _close(at_once.loss, true, name)
        _close(at_once.lse, lse, "lse")
        for got, wanted, what in zip(at_once[3:], _gradients(truth, 0.25 * true.sum()), ("rows", "f"), strict=True):
            _close(got, wanted, f"gradient of {name} for {what}")
        later = kernels.cross_entropy(
            rows, target, f, chosen, Upstream(g, h), row_stats=at_once.row_stats, output_mask=(True, True)
        )
        wanted_all = _gradients(truth, (g.double() * true + h.double() * lse).sum())
        for got, wanted, what in zip(later[3:], wanted_all, ("rows", "f"), strict=True):
            _close(got, wanted, f"later gradient of {name} for {what}", unit=4.0)
    found = ms.groups.TokenStatistics(*kernels.token_statistics(rows, target, f, -100))
    _close(found.log_prob, -loss, "log_prob")
    _close(found.lse, lse, "lse of statistics")
    _close(found.entropy, -(truth.log_p.exp() * truth.log_p).sum(1), "entropy")
    assert torch.equal(found.argmax, rows.argmax(1)), "argmax"
    log_p, row_stats = kernels.log_softmax(rows, f, g.dtype)
    _close(log_p, truth.log_p, "log softmax", unit=truth.log_p.abs().max().item())
    if rows.dtype == g.dtype:
        over = rows.clone(memory_format=torch.contiguous_format)
        found_over, _ = kernels.log_softmax(over, f, g.dtype, over)
        assert found_over.data_ptr() == over.data_ptr()
        _close(over, truth.log_p, "log softmax in place", unit=truth.log_p.abs().max().item())
    upstream = _numbers(rows.reshape(-1, 1), 3).reshape(rows.shape)
    got_both = kernels.log_softmax_backward(upstream, rows, f, row_stats, (True, True))
    wanted_both = _gradients(truth, (upstream.double() * truth.log_p).sum())
    for got, wanted, what in zip(got_both, wanted_both, ("rows", "f"), strict=True):
        _close(got, wanted, f"gradient of log softmax for {what}", unit=8.0)


def _gradients(truth: _Truth, total: Tensor) -> list[Tensor]:
    """The gradients of ``total``, with the graph kept for the next one."""
    leaves = [truth.rows, truth.coefficients]
    found = torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(leaf) if each is None else each for leaf, each in zip(leaves, found, strict=True)]


def check_entropy_gradient(kernels: RowKernels, rows: Tensor, composition: Composition) -> None:
    """The gradients of log p, lse and the entropy together, and of the entropy alone, also of ignored rows."""
    kernels = cast(RowKernels, _Named(kernels))
    f, truth, target = composition.kernel(rows), _Truth(rows, composition), targets(rows)
    kept, picked = target != -100, target.clamp_min(0)[:, None]
    log_prob = torch.where(kept, truth.log_p.gather(1, picked)[:, 0], 0.0)
    entropy = -(truth.log_p.exp() * truth.log_p).sum(1)
    found = ms.groups.TokenStatistics(*kernels.token_statistics(rows, target, f, -100))
    assert found.row_stats.shape == (3, len(rows))
    a, h, e = (_numbers(rows, seed) for seed in (1, 2, 3))
    options = LossOptions(None, -100, 0.0, 0.0, False)
    for upstream, total in (
        (
            Upstream(-a, h, None, e),
            a.double() * log_prob + h.double() * torch.logsumexp(truth.y, 1) + e.double() * entropy,
        ),
        (Upstream(None, None, None, e), e.double() * entropy),
    ):
        into = rows.clone(memory_format=torch.contiguous_format)
        gradients = kernels.cross_entropy(
            into, target, f, options, upstream, row_stats=found.row_stats, output_mask=(True, True), grad_rows=into
        )
        for got, wanted, what in zip(gradients[3:], _gradients(truth, total.sum()), ("rows", "f"), strict=True):
            _close(got, wanted, f"gradient of the entropy for {what}", unit=4.0)
    # Masked logits neither add to the entropy nor to its gradients.
    masked = rows.clone()
    masked[0, 1::2] = -torch.inf
    found = ms.groups.TokenStatistics(*kernels.token_statistics(masked, target, f, -100))
    gradients = kernels.cross_entropy(
        masked, target, f, options, Upstream(None, None, None, e), row_stats=found.row_stats, output_mask=(True, True)
    )
    assert all(bool(each.isfinite().all()) for each in gradients[3:]), "a logit of -inf"


class _Shards:
    """Rows whose columns are shared out: each shard is rows of a kernel's own.

    One shard is a single column. Each has a target, and p of one target is next to 1. The last row is ignored.
    """

    def __init__(self, kernels: RowKernels, rows: Tensor, f: Transform) -> None:
        third = rows.shape[1] // 3
        bounds = [0, third, third + 1, 2 * third + 5, rows.shape[1]]
        self._kernels, self.rows, self.f = kernels, rows, f
        self.parts = [slice(*each) for each in itertools.pairwise(bounds)]
        self.target = torch.tensor([bounds[each % 4] for each in range(1, len(rows) + 1)], device=rows.device)
        self.target[1], self.target[-1] = 3, -100
        #: Whether a shard has the target of a row, [shards, N].
        self.here = torch.stack([(self.target >= part.start) & (self.target < part.stop) for part in self.parts])

    def calls(self, options: LossOptions) -> Iterator[tuple[Tensor, Tensor, Transform, LossOptions]]:
        """What each shard gives its kernel: a target that is elsewhere is ignored, but not under ``options.weight``."""
        weight = options.weight
        for part, here in zip(self.parts, self.here, strict=True):
            target = torch.where(here, self.target - part.start, -100 if weight is None else 0)
            of_part = options._replace(weight=None if weight is None else weight[part])
            yield self.rows[:, part], target, self.f, of_part

    def gradients(self, options: LossOptions, upstreams: list[Upstream], row_stats: Tensor) -> tuple[Tensor, Tensor]:
        """Of rows and of the coefficients, from the ``row_stats`` of whole rows."""
        rows, coefficients = [], torch.zeros_like(self.f.coefficients)
        for (columns, *call), upstream in zip(self.calls(options), upstreams, strict=True):
            into = columns.clone(memory_format=torch.contiguous_format)
            found = self._kernels.cross_entropy(
                into, *call, upstream, row_stats=row_stats, output_mask=(True, True), grad_rows=into
            )
            rows.append(found.grad_rows)
            coefficients += found.grad_coefficients
        return torch.cat(rows, 1), coefficients


class _Whole:
    """The numbers of whole rows from the row_stats [shards, 2 or 3, N] of shards."""

    def __init__(self, row_stats: list[Tensor]) -> None:
        largest, totals, *moments = torch.stack(row_stats, 1)
        self.largest = largest.amax(0)
        #: How much larger the largest y of the row is than that of a shard.
        self.above = self.largest - largest
        mass = totals * (-self.above).exp()
        total = mass.sum(0)
        self.log_totals, self.log_total = totals.log(), total.log()
        self.lse = self.largest + self.log_total
        # A shard of -inf alone has no mass, and no moment.
        merged = [torch.where(mass > 0, mass * (each + self.above), 0.0).sum(0) / total for each in moments]
        self.row_stats = torch.stack([self.largest, total, *merged])

    def log_prob(self, of_shards: list[Tensor], here: Tensor) -> Tensor:
        """log p of targets from that within the shards ``here``; 0 in ignored rows."""
        y_below_largest = torch.where(here, torch.stack(of_shards) + self.log_totals - self.above, 0.0).sum(0)
        return torch.where(here.any(0), y_below_largest - self.log_total, 0.0)


def check_shards(kernels: RowKernels, rows: Tensor, composition: Composition) -> None:
    """Rows whose columns are shared out: from losses and statistics of shards to gradients for whole rows.

    In a shard without the target, the gradient of the loss is one of lse.
    """
    kernels = cast(RowKernels, _Named(kernels))
    options = LossOptions(None, -100, 0.0, 0.0, True)
    shards = _Shards(kernels, rows.clone(), composition.kernel(rows))
    for row, part in ((2, shards.parts[1]), (0, shards.parts[2])):
        shards.rows[row, part] = -torch.inf
    # p is the same, and no derivative is 0 * inf.
    truth = _Truth(shards.rows.double().clamp_min(-1e30), composition)
    kept = shards.here.any(0)
    true = torch.where(kept, -truth.log_p.gather(1, shards.target.clamp_min(0)[:, None])[:, 0], 0.0)
    lse, entropy = torch.logsumexp(truth.y, 1), -(truth.log_p.exp() * truth.log_p).sum(1)
    losses = [kernels.cross_entropy(*call) for call in shards.calls(options)]
    tokens = [ms.groups.TokenStatistics(*kernels.token_statistics(*call, -100)) for *call, _ in shards.calls(options)]
    of_losses, of_tokens = (_Whole([each.row_stats for each in found]) for found in (losses, tokens))
    _close(-of_losses.log_prob([-each.loss for each in losses], shards.here), true, "loss of shards")
    _close(of_tokens.log_prob([each.log_prob for each in tokens], shards.here), -true, "log_prob of shards")
    _close(of_losses.lse, lse, "lse of shards")
    _close(of_tokens.log_total + of_tokens.row_stats[2], entropy, "entropy of shards")
    g, h, e = (_numbers(rows, seed) for seed in (1, 2, 3))
    of_loss = g.double() * true
    for row_stats, of_lse, of_entropy, total in (
        (of_losses.row_stats, torch.zeros_like(h), None, of_loss),
        (of_tokens.row_stats, h, e, of_loss + h.double() * lse + e.double() * entropy),
    ):
        upstreams = [
            Upstream(torch.where(here, g, 0.0), of_lse + torch.where(kept & ~here, g, 0.0), None, of_entropy)
            for here in shards.here
        ]
        found = shards.gradients(options, upstreams, row_stats)
        for got, wanted, what in zip(found, _gradients(truth, total.sum()), ("rows", "f"), strict=True):
            _close(got, wanted, f"gradient of shards for {what}", unit=4.0)


def check_smoothed_shards(kernels: RowKernels, rows: Tensor, composition: Composition) -> None:
    """The share of smoothed labels in a loss, sum_j w_j (lse - y_j) / V, of rows whose columns are shared out."""
    kernels = cast(RowKernels, _Named(kernels))
    shards, truth = _Shards(kernels, rows, composition.kernel(rows)), _Truth(rows, composition)
    g, h = (_numbers(rows, seed) for seed in (1, 2))
    weight = torch.linspace(0.5, 1.5, rows.shape[1]).to(g)
    true, lse = -(weight.double() * truth.log_p).mean(1), torch.logsumexp(truth.y, 1)
    options = LossOptions(weight, -100, 1.0, 0.0, True)
    losses = [kernels.cross_entropy(*call) for call in shards.calls(options)]
    whole = _Whole([each.row_stats for each in losses])
    found, upstreams = torch.zeros_like(g), []
    for part, each in zip(shards.parts, losses, strict=True):
        share, mass = (part.stop - part.start) / rows.shape[1], weight[part].sum() / rows.shape[1]
        found += share * each.loss + mass * (whole.lse - each.lse)
        upstreams.append(Upstream(share * g, h + (weight.mean() - mass) * g))
    _close(found, true, "smoothed loss of shards")
    wanted_both = _gradients(truth, (g.double() * true + h.double() * lse).sum())
    got_both = shards.gradients(options, upstreams, whole.row_stats)
    for got, wanted, what in zip(got_both, wanted_both, ("rows", "f"), strict=True):
        _close(got, wanted, f"gradient of smoothed shards for {what}", unit=4.0)


def divergence_of(kind: str, beta: float, log_p: Tensor, log_q: Tensor) -> Tensor:
    """The formulas of ``RowKernels.divergence``, [N]. A term whose first factor is 0 is 0."""

    def expectation(first: Tensor, of: Tensor, minus: Tensor) -> Tensor:
        there = first > 0
        return torch.where(there, first * (of - minus).masked_fill(~there, 0.0), 0.0).sum(1)

    p, q = log_p.exp(), log_q.exp()
    if kind == "forward_kl":
        return expectation(q, log_q, log_p)
    if kind == "reverse_kl":
        return expectation(p, log_p, log_q)
    log_m = (beta * q + (1 - beta) * p).log()
    return beta * expectation(q, log_q, log_m) + (1 - beta) * expectation(p, log_p, log_m)


def check_divergence(kernels: RowKernels, rows: Tensor, composition: Composition, *, log_dtype: torch.dtype) -> None:
    """Losses and gradients of each kind, at once and later, into the rows themselves, from log q with zeros of q."""
    kernels = cast(RowKernels, _Named(kernels))
    f, truth = composition.kernel(rows), _Truth(rows, composition)
    teacher = logits(torch.float64, tuple(rows.shape), 5, rows.device)
    log_q = torch.log_softmax(teacher, 1)
    log_q[0] += 0.3
    log_q[3] = truth.log_p[3].detach()
    g = _numbers(rows, 1)
    one = torch.tensor(0.25, dtype=g.dtype, device=g.device)
    for kind, beta in DIVERGENCES:
        given = log_q.clone()
        if kind != "reverse_kl":
            given[2, ::3] = -torch.inf
        given = given.to(log_dtype)
        true = divergence_of(kind, beta, truth.log_p, given.double())
        unit = max(1.0, given.double().clamp_min(-100).abs().max().item() / 8)
        only = kernels.divergence(rows, given, f, Divergence(kind, beta))
        _close(only.loss, true, kind, unit=unit)
        _close(only.lse, torch.logsumexp(truth.y, 1), "lse")
        at_once = kernels.divergence(rows, given, f, Divergence(kind, beta), Upstream(one), None, (True, True))
        _close(at_once.loss, true, kind, unit=unit)
        assert at_once.row_stats.shape == (3, len(rows))
        into = rows.clone(memory_format=torch.contiguous_format)
        later = kernels.divergence(
            into, given, f, Divergence(kind, beta), Upstream(g), at_once.row_stats, (True, True), into
        )
        assert later.grad_rows.data_ptr() == into.data_ptr()
        for results, total, when in (
            (at_once, 0.25 * true.sum(), "at once"), (later, (g.double() * true).sum(), "later")
        ):  # fmt: skip
            for got, wanted, what in zip(results[3:], _gradients(truth, total), ("rows", "f"), strict=True):
                _close(got, wanted, f"gradient of {kind} {beta} {when} for {what}", unit=unit)
    # q = 0 < p: a reverse KL is infinite, and no kind makes a NaN of the loss.
    given = log_q.clone()
    given[:, 0] = -torch.inf
    for kind, beta in DIVERGENCES:
        loss = kernels.divergence(rows, given.to(log_dtype), f, Divergence(kind, beta)).loss
        if kind == "reverse_kl":
            assert bool((loss == torch.inf)[[0, 2, 3, 4]].all()), loss
        else:
            assert bool(loss.isfinite().all()), (kind, loss)


def check_probabilities(kernels: RowKernels, rows: Tensor, composition: Composition) -> None:
    """Class probabilities as the target: losses and gradients, with class weights, smoothing, z-loss and zeros in q."""
    kernels = cast(RowKernels, _Named(kernels))
    f, truth = composition.kernel(rows), _Truth(rows, composition)
    generator = torch.Generator().manual_seed(2)
    q = torch.rand(rows.shape, generator=generator, dtype=torch.float64).to(rows.device)
    q = torch.where(q < 0.3, 0.0, q)
    q /= q.sum(1, keepdim=True)
    weight = torch.rand(rows.shape[1], generator=generator, dtype=torch.float64).to(rows.device) + 0.5
    lse, (g, h) = torch.logsumexp(truth.y, 1), (_numbers(rows, seed) for seed in (1, 2))
    one = torch.tensor(0.25, dtype=g.dtype, device=g.device)
    for w, smoothing, z_loss in itertools.product((None, weight), (0.0, 0.1), (0.0, 1e-2)):
        options = LossOptions(None if w is None else w.to(g.dtype), -100, smoothing, z_loss, True)
        true = -((1 - smoothing) * q + smoothing / q.shape[1]) * (1.0 if w is None else w) * truth.log_p
        loss = true.sum(1) + z_loss * lse.square()
        target = q.to(g.dtype)
        at_once = kernels.cross_entropy(rows, target, f, options, Upstream(one), output_mask=(True, True))
        _close(at_once.loss, loss, "loss", unit=4.0)
        _close(at_once.lse, lse, "lse")
        assert at_once.row_stats.shape == (3, len(rows))
        later = kernels.cross_entropy(
            rows, target, f, options, Upstream(g, h), row_stats=at_once.row_stats, output_mask=(True, True)
        )
        for results, total in ((at_once, 0.25 * loss.sum()), (later, (g.double() * loss + h.double() * lse).sum())):
            for got, wanted, what in zip(results[3:], _gradients(truth, total), ("rows", "f"), strict=True):
                _close(got, wanted, f"gradient of class probabilities for {what}", unit=8.0)
    # A logit of -inf where q is 0 adds nothing.
    masked = rows.clone()
    masked[0] = torch.where(q[0] > 0, rows[0], -torch.inf)
    found = kernels.cross_entropy(
        masked, q.to(g.dtype), f, LossOptions(None, -100, 0.0, 0.0, False), Upstream(one), output_mask=(True, True)
    )
    assert all(bool(each.isfinite().all()) for each in (found.loss, *found[3:])), "q = 0 at a logit of -inf"
