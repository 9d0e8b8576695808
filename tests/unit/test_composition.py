"""The temperature behind f, and chains of transforms, in every public function, against plain PyTorch in float64."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from losses import SOME_TRANSFORMS, TRANSFORMS, disturbed
from tiers import mostly_slow
from torch import Tensor

import monosoftmax as ms
from monosoftmax import head_products
from monosoftmax.transforms import PLIF, Chain, MonotonicTransform, Scale, SoftCap, Temperature

BACKENDS: list[Any] = ["reference", "cpu"]
N, D, V = 6, 5, 43


@pytest.fixture(autouse=True)
def thin_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_products, "chunk_rows", lambda *_: 4)


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    input, weight = torch.randn(N, D, dtype=torch.float64), torch.randn(V, D, dtype=torch.float64)
    target = torch.randint(0, V, (N,))
    target[2] = -100
    return input.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), target


def around(f: MonotonicTransform, parts: str) -> Chain:
    """f with a scale and a cap before it, and a scale behind it."""
    before = {"none": (), "scale": (Scale(0.25),), "cap": (Scale(0.5), SoftCap(3.0), Scale(1.5))}[parts]
    return Chain(*before, f, Scale(1.25))


def plain(z: Tensor, f: MonotonicTransform, parts: str, temperature: float) -> Tensor:
    """What the chain of :func:`around` is, written out."""
    if parts == "scale":
        z = z * 0.25
    elif parts == "cap":
        z = 1.5 * 3.0 * torch.tanh(0.5 * z / 3.0)
    return f(z) * 1.25 / temperature


def close(got: Tensor, wanted: Tensor, what: str = "") -> None:
    eps = 2e-9 if got.dtype == torch.float64 else max(torch.finfo(got.dtype).eps, 2e-6)
    size = max(1.0, wanted.abs().max().item())
    torch.testing.assert_close(
        got.double(), wanted.double(), rtol=2 * eps, atol=4 * eps * size, msg=f"{what}: {{}}".format
    )


@pytest.mark.grid
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("parts", ["none", "scale", "cap"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_function(name: str, parts: str, dtype: torch.dtype, backend: Any) -> None:
    """Values of all, and gradients of the losses, under a chain and a temperature."""
    input, weight, target = batch(dtype)
    tau = 0.7
    f = disturbed(name).to(torch.float64 if dtype == torch.float64 else torch.float32)
    chain, exact = around(f, parts), copy.deepcopy(f).double()
    z = torch.nn.functional.linear(input, weight).detach().requires_grad_()
    wide = z.detach().double().requires_grad_()
    log_p = plain(wide, exact, parts, tau).log_softmax(1)
    kept, index = target != -100, target.clamp(min=0)[:, None]
    loss = torch.where(kept, -log_p.gather(1, index)[:, 0], 0.0).sum() / kept.sum()
    raws, wanted_raws = list(f.parameters()), list(exact.parameters())

    found = ms.cross_entropy(z, target, chain, temperature=tau, backend=backend)
    close(found, loss.detach(), "loss")
    gradients = torch.autograd.grad(found, [z, *raws])
    for got, wanted in zip(gradients, torch.autograd.grad(loss, [wide, *wanted_raws], retain_graph=True), strict=True):
        close(got, wanted, "gradient")
    close(ms.log_softmax(z, chain, temperature=tau, backend=backend), log_p.detach(), "log_softmax")
    tensor = torch.tensor(tau, dtype=torch.float64)
    entropy = -(log_p.exp() * log_p).sum(1)
    of_logits = ms.log_prob(z, target, chain, temperature=tensor, backend=backend)
    assert of_logits.entropy is not None
    close(of_logits.entropy, entropy.detach(), "entropy")
    got = torch.autograd.grad(of_logits.entropy.sum(), [z, *raws])
    for each, wanted in zip(got, torch.autograd.grad(entropy.sum(), [wide, *wanted_raws]), strict=True):
        close(each, wanted, "gradient of the entropy")
    if dtype == torch.bfloat16:  # whose products are rounded in another way
        return
    of_head = ms.linear_cross_entropy(input, weight, target, chain, temperature=tau, backend=backend)
    close(of_head, loss.detach(), "loss of the head")
    statistics = ms.linear_token_statistics(input, weight, target, chain, temperature=tau, backend=backend)
    close(statistics.entropy, entropy.detach(), "entropy of the head")
    assert torch.equal(statistics.argmax, z.argmax(1))


@pytest.mark.grid(1)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("parts", ["none", "cap"])
@pytest.mark.parametrize("name", mostly_slow(TRANSFORMS, SOME_TRANSFORMS))
def test_gradcheck(backend: Any, parts: str, name: str) -> None:
    input, weight, target = batch()
    chain = around(disturbed(name).double(), parts)
    for parameter in chain.parameters():
        parameter.requires_grad_(False)
    temperature = torch.tensor(0.7, dtype=torch.float64)

    def head(x: Tensor, w: Tensor) -> Tensor:
        return ms.linear_cross_entropy(x, w, target, chain, temperature=temperature, z_loss=0.1, backend=backend)

    torch.autograd.gradcheck(head, (input, weight))


def test_temperature_of_one_is_none() -> None:
    input, weight, target = batch(torch.float32)
    f = PLIF()
    without = ms.linear_cross_entropy(input, weight, target, f, backend="cpu")
    for one in (1, 1.0, torch.tensor(1.0)):
        assert torch.equal(ms.linear_cross_entropy(input, weight, target, f, temperature=one, backend="cpu"), without)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [0.0, -1.0, torch.nan])
def test_a_temperature_on_a_device_poisons_the_rows(backend: Any, bad: float) -> None:
    input, weight, target = batch(torch.float32)
    loss = ms.linear_cross_entropy(
        input, weight, target, PLIF(), temperature=torch.tensor(bad), reduction="none", backend=backend
    )
    assert bool(loss[target != -100].isnan().all())
    assert bool(ms.log_softmax(input, temperature=torch.tensor(bad), backend=backend).isnan().all())


@pytest.mark.parametrize(
    ("temperature", "error", "message"),
    [
        (0.0, ValueError, "temperature must be positive and finite, got 0"),
        (-1, ValueError, "temperature must be positive and finite, got -1"),
        (float("nan"), ValueError, "temperature must be positive and finite, got nan"),
        (float("inf"), ValueError, "temperature must be positive and finite, got inf"),
        (True, TypeError, "temperature must be a number or a Tensor, got bool"),
        ("2", TypeError, "temperature must be a number or a Tensor, got str"),
        (torch.ones(2), ValueError, r"temperature must be a number or a 0-dim tensor, got shape \(2,\)"),
        (torch.ones((), dtype=torch.int64), TypeError, "temperature must be float32"),
        (torch.ones((), device="meta"), ValueError, "temperature must be on cpu like input, or a number, got meta"),
        (torch.ones((), requires_grad=True), ValueError, "must not require a gradient.*transforms.Temperature"),
    ],
)
def test_refused_temperatures(temperature: Any, error: type[Exception], message: str) -> None:
    input, weight, target = batch(torch.float32)
    for call in (
        lambda: ms.cross_entropy(input, target.clamp(min=0, max=D - 1), temperature=temperature),
        lambda: ms.log_softmax(input, temperature=temperature),
        lambda: ms.linear_cross_entropy(input, weight, target, temperature=temperature),
        lambda: ms.linear_token_statistics(input, weight, target, temperature=temperature),
        lambda: ms.linear_log_prob(input, weight, target, temperature=temperature),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("cap_first", [True, False])
def test_chains_as_modules(cap_first: bool) -> None:
    """f(z), its derivative, its inverse, and its settings, whatever stands in a chain."""
    f = PLIF(num_pieces=8, bound=5.0).double()
    temperature = Temperature(0.8, dtype=torch.float64)
    chain = Chain(Scale(0.5), SoftCap(4.0), f) if cap_first else Chain(f, Scale(2.0), SoftCap(40.0), temperature)
    z = torch.linspace(-6, 6, 41, dtype=torch.float64, requires_grad=True)
    y = chain(z)
    capped = 4.0 * torch.tanh(0.5 * z / 4.0)
    tanh = 40.0 * torch.tanh(2.0 * f(z) / 40.0)
    close(y, f(capped) if cap_first else tanh / 0.8)
    (slope,) = torch.autograd.grad(y.sum(), z)
    close(chain.derivative(z.detach()), slope)
    close(chain.inverse(y.detach()), z.detach())
    again = ms.transforms.from_dict(chain.to_dict())
    assert repr(again) == repr(chain) and again.to_dict() == chain.to_dict()
    again.load_state_dict(chain.state_dict())
    chain.reset_parameters()
    assert (chain.kernel is None) == (not cap_first)


def test_what_folds() -> None:
    assert Chain(Scale(0.25)).around == (0.25, 0.0, 1.0) and Chain(Scale(0.25)).kernel == "identity"
    nested = Chain(Chain(Scale(0.5), SoftCap(3.0)), Chain(Scale(2.0), PLIF()), Scale(4.0))
    assert nested.around == (1.0, 6.0, 4.0) and nested.kernel == "plif" and len(nested.parts) == 5
    assert Chain(SoftCap(3.0, learnable=True)).kernel == "soft_cap"
    assert list(Chain(SoftCap(3.0)).state_dict()) == []


@pytest.mark.parametrize(
    ("chain", "reason"),
    [
        (Chain(PLIF(), SoftCap(3.0)), "no second f after a first, as SoftCap is in this Chain"),
        (Chain(PLIF(), Temperature()), "no second f after a first, as Temperature is in this Chain"),
        (Chain(SoftCap(3.0), SoftCap(4.0)), "no second f after a first, as SoftCap is in this Chain"),
    ],
)
def test_chains_without_kernels_go_to_the_reference(chain: Chain, reason: str) -> None:
    input, weight, target = batch(torch.float32)
    explanation = ms.backends.explain("cross_entropy", input, chain)
    assert explanation.backend == "reference" and reason in explanation.refused["cpu"]
    with pytest.raises(ValueError, match=re.escape(reason)):
        ms.linear_cross_entropy(input, weight, target, chain, backend="cpu")
    loss = ms.linear_cross_entropy(input, weight, target, chain)
    wanted = torch.nn.functional.cross_entropy(chain(torch.nn.functional.linear(input, weight)), target)
    close(loss.detach(), wanted.detach())
    loss.backward()
    assert all(each.grad is not None and bool(each.grad.any()) for each in chain.parameters())


def test_refused_chains() -> None:
    with pytest.raises(ValueError, match="transforms must be at least one transform, got none"):
        Chain()
    with pytest.raises(TypeError, match="transforms must be monosoftmax transforms, got Linear"):
        Chain(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="factor must be positive, got 0"):
        Scale(0.0)
    with pytest.raises(TypeError, match="chain has no parts: its arguments are transforms"):
        ms.transforms.from_dict({"type": "chain", "parts": []})


def test_logits_of_minus_infinity() -> None:
    """Without a cap their probability is 0; a cap gives them some, on every backend the same."""
    z = torch.randn(3, V)
    z[:, ::2] = -torch.inf
    for chain in (Chain(Scale(0.5), PLIF()), Chain(SoftCap(5.0), PLIF())):
        leaves = [z.clone().requires_grad_() for _ in BACKENDS]
        target = torch.tensor([1, 3, 5])
        for leaf, backend in zip(leaves, BACKENDS, strict=True):
            ms.cross_entropy(leaf, target, chain, backend=backend).backward()
        reference, cpu = (leaf.grad for leaf in leaves)
        assert reference is not None and cpu is not None
        torch.testing.assert_close(cpu, reference, rtol=1e-5, atol=1e-6)
        masses = [ms.log_softmax(z, chain, backend=backend)[:, ::2].exp() for backend in BACKENDS]
        torch.testing.assert_close(masses[0], masses[1], rtol=1e-5, atol=1e-7)
        assert bool((masses[0] > 0).all()) == chain.bounded_below


def test_a_module_keeps_its_chain() -> None:
    layer = ms.MonotonicSoftmax(D, V, Chain(Scale(0.25), SoftCap(30.0), PLIF()))
    input, _, target = batch(torch.float32)
    layer(input, target).loss.backward()
    assert any(
        "raw_slope" in name and bool(each.grad.any())
        for name, each in layer.named_parameters()
        if each.grad is not None
    )
