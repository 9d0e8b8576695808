"""The laws that every transform obeys, and what is particular to each."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call

import monosoftmax as ms
from monosoftmax.transforms import (
    GSS,
    PLIF,
    REGISTRY,
    Identity,
    MonotonicMLP,
    MonotonicTransform,
    RationalQuadraticSpline,
    SigmoidCap,
    SigSoftmax,
    SoftCap,
    Temperature,
)

CASES = {
    "identity": Identity,
    "temperature": Temperature,
    "temperature_fixed": lambda: Temperature(0.7, learnable=False),
    "plif": PLIF,
    "plif_1": lambda: PLIF(1, 5.0),
    "plif_2": lambda: PLIF(2, 5.0),
    "plif_7": lambda: PLIF(7, 4.0),
    "sigsoftmax": SigSoftmax,
    "gss": GSS,
    "gss_published": lambda: GSS(2.5, -1.5, learnable=False),
    "soft_cap": SoftCap,
    "soft_cap_learned": lambda: SoftCap(9.0, learnable=True),
    "sigmoid_cap": SigmoidCap,
    "sigmoid_cap_learned": lambda: SigmoidCap(learnable=True),
    "monotonic_mlp": MonotonicMLP,
    "monotonic_mlp_1": lambda: MonotonicMLP(1, 3.0),
    "spline": RationalQuadraticSpline,
    "spline_1": lambda: RationalQuadraticSpline(1, 2.0),
    "spline_5": lambda: RationalQuadraticSpline(5, 4.0),
}
BOUNDED = (SoftCap, SigmoidCap)
WITHOUT_INVERSE = (GSS, MonotonicMLP)
NOT_IDENTITY_AT_START = (SigSoftmax, SoftCap, SigmoidCap)

every_case = pytest.mark.parametrize("case", CASES)
every_default = pytest.mark.parametrize("name", REGISTRY)


def perturbed(case: str, dtype: torch.dtype = torch.float64, seed: int = 0, scale: float = 0.5) -> MonotonicTransform:
    """The transform of ``case`` with noise on its raw parameters."""
    transform = CASES[case]().to(dtype)
    perturb(transform, seed, scale)
    return transform


def perturb(transform: MonotonicTransform, seed: int = 0, scale: float = 0.5) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


def kinks(transform: MonotonicTransform) -> Tensor:
    """Where the code of f branches: the knots of the piecewise transforms, ends included, in float64."""
    if isinstance(transform, GSS):
        return transform.coefficients().detach().double()[1:]
    if isinstance(transform, PLIF):
        return -transform.bound + transform.width * torch.arange(transform.num_pieces + 1, dtype=torch.float64)
    if isinstance(transform, RationalQuadraticSpline):
        x, width = transform.coefficients().detach().double()[:2]
        return torch.cat([x, (x + width)[-1:]])
    return torch.empty(0, dtype=torch.float64)


def logits_away_from_kinks(transform: MonotonicTransform, count: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    z = 6 * torch.randn(40 * count, generator=generator, dtype=torch.float64)
    knots = kinks(transform)
    if len(knots):
        z = z[(z.unsqueeze(1) - knots).abs().min(1).values > 1e-3]
    # Far out, a cap is so flat that finite differences see rounding only.
    return z[z.abs() < 25][:count].requires_grad_()


def raw_function(transform: MonotonicTransform):
    """f as a function of z and of the raw parameters, which gradcheck can vary."""
    names, values = zip(*transform.named_parameters(), strict=True) if list(transform.parameters()) else ((), ())

    def function(z: Tensor, *raw: Tensor) -> Tensor:
        return functional_call(transform, dict(zip(names, raw, strict=True)), (z,))

    return function, values


def test_every_registered_transform_is_tested_under_its_name():
    tested = {type(make()) for make in CASES.values()}
    assert tested == set(REGISTRY.values())
    for name, kind in REGISTRY.items():
        assert kind.kernel == name
        assert type(ms.transforms.make(name)) is kind
    with pytest.raises(ValueError, match=r"name must be one of identity, .*got 'plf'"):
        ms.transforms.make("plf")
    assert ms.transforms.make("plif", num_pieces=3).num_pieces == 3


# --- increasing -------------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("seed", range(3))
def test_increasing(case, seed):
    transform = perturbed(case, seed=seed, scale=1.0)
    z = torch.cat([torch.linspace(-60, 60, 20001, dtype=torch.float64), kinks(transform)]).sort().values.unique()
    y = transform(z)
    assert torch.isfinite(y).all()
    # Next to each other, two values of a sum of many terms may differ by its rounding.
    assert (y.diff() > -1e-14 * y.abs().max()).all()
    if not isinstance(transform, BOUNDED):
        assert (y[::10].diff() > 0).all()
    assert (transform.derivative(z) > 0).all()


EXTREMES = [3e38, -3e38, 100.0, -100.0, 1e-30, -1e-30]


@every_case
@pytest.mark.parametrize("extreme", [*EXTREMES, "random", "mixed"])
def test_increasing_and_finite_whatever_an_optimiser_step_leaves_behind(case, extreme):
    transform = CASES[case]().float()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in transform.parameters():
            if extreme == "random":
                parameter.copy_(1e30 * torch.randn(parameter.shape, generator=generator))
            elif extreme == "mixed":
                choice = torch.randint(len(EXTREMES), parameter.shape, generator=generator)
                parameter.copy_(torch.tensor(EXTREMES)[choice])
            else:
                parameter.fill_(extreme)
    far = torch.tensor([-1e6, -1e4, -100.0, 100.0, 1e4, 1e6])
    assert torch.isfinite(transform(far)).all()
    assert (transform(far).diff() >= 0).all()
    z = torch.linspace(-50, 50, 4001)
    y, slope = transform(z), transform.derivative(z)
    assert torch.isfinite(y).all()
    assert torch.isfinite(slope).all()
    assert (slope >= 0).all()
    # What float32 rounds, in f, in a logit that a steep piece multiplies or in a table's entries, is no decrease ...
    table = transform.coefficients().detach()
    size = y.abs().max() + 50 * slope.max() + (table.abs().max() if table.dim() == 2 else 0)
    assert (y.diff() >= -4 * torch.finfo(torch.float32).eps * size).all()
    # ... and with these parameters float64 shows none.
    exact = copy.deepcopy(transform).double()(z.double())
    assert (exact.diff() >= -1e-14 * exact.abs().max()).all()
    if isinstance(transform, BOUNDED):
        scale = transform.coefficients()[-1 if isinstance(transform, SigmoidCap) else 0]
        shift = transform.coefficients()[1] if isinstance(transform, SigmoidCap) else 0.0
        unsaturated = ((z + shift) / scale).abs() < 40
        assert (slope[unsaturated] > 0).all()
    else:
        assert (slope > 0).all()
    # And the next step starts from finite gradients.
    if list(transform.parameters()):
        (y * torch.linspace(-1, 1, len(y))).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in transform.parameters())


# --- derivatives ------------------------------------------------------------------------------------------------------


@every_case
def test_derivative_equals_autograd_also_at_kinks(case):
    transform = perturbed(case)
    z = torch.cat([torch.linspace(-40, 40, 3001, dtype=torch.float64), kinks(transform)])
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(transform(z).sum(), z)
    torch.testing.assert_close(gradient, transform.derivative(z), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", [PLIF, RationalQuadraticSpline])
def test_derivative_at_a_kink_is_the_one_from_the_right(kind):
    # A width of 1 makes every knot exact.
    transform = kind(8, 4.0).double()
    with torch.no_grad():
        (transform.raw_slope if kind is PLIF else transform.log_derivative).copy_(
            torch.linspace(-1, 1, 8 if kind is PLIF else 9)
        )
    knots = torch.arange(-4.0, 4.0, dtype=torch.float64)
    if kind is PLIF:
        torch.testing.assert_close(transform.derivative(knots), transform.slopes(), rtol=0, atol=0)
        assert (transform.derivative(knots[1:] - 1e-9) < transform.derivative(knots[1:])).all()
    else:
        torch.testing.assert_close(transform.derivative(knots), transform.log_derivative[:-1].exp())


@every_case
def test_gradcheck_with_respect_to_logits_and_raw_parameters(case):
    transform = perturbed(case)
    function, raw = raw_function(transform)
    z = logits_away_from_kinks(transform, 12)
    assert len(z) == 12
    assert torch.autograd.gradcheck(function, (z, *raw), eps=1e-6, atol=1e-6, rtol=1e-5)


@every_case
def test_gradgradcheck(case):
    if case in ("plif", "spline"):
        pytest.skip("the same code with fewer pieces is checked by plif_7 and spline_5")
    transform = perturbed(case)
    function, raw = raw_function(transform)
    z = logits_away_from_kinks(transform, 5)
    # In float64 the reference keeps where() and clamp() constants, so a function without curvature has no graph to z.
    if isinstance(transform, Identity) or not (raw or isinstance(transform, (SigSoftmax, SoftCap, SigmoidCap, GSS))):
        (first,) = torch.autograd.grad(function(z, *raw).sum(), z, create_graph=True)
        assert not first.requires_grad
        return
    assert torch.autograd.gradgradcheck(function, (z, *raw), atol=1e-5, rtol=1e-4)


# --- where f starts ---------------------------------------------------------------------------------------------------


@every_default
def test_starts_as_the_identity_where_it_can(name):
    transform = ms.transforms.make(name)
    z = torch.cat([torch.linspace(-50, 50, 4001), torch.zeros(1)])
    # MonotonicMLP: 8 units of amplitude 1.5e-7.
    error = ((transform(z) - z).abs() / z.abs().clamp(min=1)).max()
    slope_error = (transform.derivative(z) - 1).abs().max()
    if isinstance(transform, NOT_IDENTITY_AT_START):
        assert error > 0.01
    else:
        assert error < 2e-6
        assert slope_error < 2e-6


@pytest.mark.parametrize("case", ["plif", "monotonic_mlp", "spline"])
def test_reset_parameters_returns_to_the_identity(case):
    transform = perturbed(case, torch.float32)
    z = torch.linspace(-30, 30, 101)
    assert (transform(z) - z).abs().max() > 0.1
    transform.reset_parameters()
    torch.testing.assert_close(transform(z), z, rtol=1e-6, atol=4e-6)


# --- inverse ----------------------------------------------------------------------------------------------------------


@every_case
def test_inverse(case):
    transform = perturbed(case)
    z = torch.cat([torch.linspace(-30, 30, 2001, dtype=torch.float64), kinks(transform)])
    if isinstance(transform, WITHOUT_INVERSE):
        with pytest.raises(NotImplementedError, match=f"{type(transform).__name__} has no inverse"):
            transform.inverse(z)
        return
    torch.testing.assert_close(transform.inverse(transform(z)), z, rtol=1e-9, atol=1e-9)
    y = transform(z).detach()
    torch.testing.assert_close(transform(transform.inverse(y)), y, rtol=1e-12, atol=1e-12)


@every_case
def test_inverse_is_differentiable(case):
    transform = perturbed(case)
    if isinstance(transform, WITHOUT_INVERSE):
        pytest.skip("has no inverse")
    z = logits_away_from_kinks(transform, 50).detach()
    y = transform(z).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(transform.inverse(y).sum(), y)
    torch.testing.assert_close(gradient, 1 / transform.derivative(z), rtol=1e-7, atol=1e-9)


def test_inverse_is_nan_outside_the_range_of_a_cap():
    assert SoftCap(30.0).inverse(torch.tensor([-31.0, 31.0])).isnan().all()
    assert SigmoidCap(23.0).inverse(torch.tensor([-1.0, 24.0])).isnan().all()


# --- published forms --------------------------------------------------------------------------------------------------


def test_gss_with_k_2_and_c_0_is_sigsoftmax():
    z = torch.linspace(-80, 80, 4001, dtype=torch.float64)
    torch.testing.assert_close(GSS(2.0, 0.0, dtype=torch.float64)(z), SigSoftmax()(z), rtol=1e-14, atol=1e-14)
    p = torch.exp(z) * torch.sigmoid(z)
    torch.testing.assert_close(torch.softmax(SigSoftmax()(z), 0), p / p.sum())


def test_formulas_of_the_scalar_transforms():
    z = torch.linspace(-20, 20, 401, dtype=torch.float64)
    close = {"rtol": 1e-6, "atol": 1e-6}
    k, c = 2.5, -1.5
    published = k * (z - c) + c - (k - 1) * torch.nn.functional.softplus(z - c)
    torch.testing.assert_close(GSS(k, c)(z), published, **close)
    torch.testing.assert_close(Temperature(2.0)(z), z / 2, **close)
    torch.testing.assert_close(SoftCap(15.0)(z), 15 * torch.tanh(z / 15), **close)
    torch.testing.assert_close(SigmoidCap(23.0, 5.0, 7.5)(z), 23 * torch.sigmoid((z + 5) / 7.5), **close)


def test_formula_of_the_monotonic_mlp():
    transform = perturbed("monotonic_mlp")
    z = torch.linspace(-20, 20, 401, dtype=torch.float64)
    a = (transform.raw_amplitude.square() + 1e-14).sqrt()
    hidden = torch.tanh(z.unsqueeze(1) * transform.log_steepness.exp() + transform.raw_shift)
    torch.testing.assert_close(transform(z), transform.log_linear.exp() * z + hidden @ a)


def test_formula_of_the_spline():
    transform = perturbed("spline_5")
    width, height = (2 * transform.bound / 5 * raw.exp() for raw in (transform.log_width, transform.log_height))
    derivative = transform.log_derivative.exp()
    anchor = -4.0 + 2 * (2 * 4.0 / 5)
    x = torch.cat([torch.zeros(1), width.cumsum(0)])
    y = torch.cat([torch.zeros(1), height.cumsum(0)])
    x, y = (x - x[2] + anchor).detach(), (y - y[2] + anchor).detach()
    for k in range(5):
        z = torch.linspace(float(x[k]) + 1e-9, float(x[k + 1]) - 1e-9, 21, dtype=torch.float64)
        xi, s = (z - x[k]) / width[k], height[k] / width[k]
        d0, d1 = derivative[k], derivative[k + 1]
        bump = xi * (1 - xi)
        expected = y[k] + height[k] * (s * xi**2 + d0 * bump) / (s + (d0 + d1 - 2 * s) * bump)
        torch.testing.assert_close(transform(z), expected)
    torch.testing.assert_close(transform(x[:1] - 3), y[:1] - 3 * derivative[:1])
    torch.testing.assert_close(transform(x[-1:] + 3), y[-1:] + 3 * derivative[-1:])


def published_plif(x: Tensor, s: Tensor, bound: float) -> Tensor:
    """The formula of the code that came from Ganea et al., with its anchor f(-bound) = 0."""
    pieces = len(s)
    delta = 2 * bound / pieces
    k = torch.trunc((x + bound) / delta).long().clamp(0, pieces - 1)
    before = s.cumsum(0) - s
    # In the type of x: PyTorch multiplies an integer tensor by a number in float32.
    return (x - (-bound + k.to(x.dtype) * delta)) * s[k] + delta * before[k]


@pytest.mark.parametrize(("pieces", "bound"), [(1, 3.0), (2, 20.0), (7, 4.0), (50, 20.0), (100_000, 20.0)])
def test_plif_is_the_published_function_up_to_a_constant(pieces, bound):
    transform = PLIF(pieces, bound, init="random", generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.linspace(-2 * bound, 2 * bound, 3001, dtype=torch.float64)
    difference = transform(x) - published_plif(x, transform.slopes(), bound)
    torch.testing.assert_close(difference, difference[:1].expand_as(difference), rtol=1e-9, atol=1e-9)
    v = transform.raw_slope
    torch.testing.assert_close(transform.slopes(), 0.01 + 0.99 * torch.log1p(v.exp()))


def test_published_start_of_plif():
    transform = PLIF(100_000, 20.0, min_slope=1e-6, init="random", generator=torch.Generator().manual_seed(0))
    raw, slopes = transform.raw_slope.detach(), transform.slopes().detach()
    # 100 000 samples: the standard errors are 0.003, 0.002, 0.002 and 0.002.
    assert raw.mean().item() == pytest.approx(math.log(math.e - 1), abs=0.015)
    assert raw.std().item() == pytest.approx(1.0, abs=0.012)
    assert slopes.mean().item() == pytest.approx(1.106, abs=0.01)
    assert slopes.std().item() == pytest.approx(0.626, abs=0.01)
    narrow = PLIF(100_000, init="random", init_std=0.1, generator=torch.Generator().manual_seed(0))
    assert narrow.raw_slope.std().item() == pytest.approx(0.1, abs=0.002)


def test_random_start_of_plif_is_reproducible():
    def raw(seed):
        return PLIF(10, init="random", generator=torch.Generator().manual_seed(seed)).raw_slope

    assert torch.equal(raw(1), raw(1))
    assert not torch.equal(raw(1), raw(2))


@pytest.mark.parametrize("pieces", [1, 2, 3, 7, 8, 49, 50, 1000, 1001])
@pytest.mark.parametrize("bound", [0.3, 7.0, 20.0])
def test_plif_is_anchored_at_zero(pieces, bound):
    transform = PLIF(pieces, bound, dtype=torch.float64)
    perturb(transform, scale=2.0)
    assert transform(torch.zeros(1, dtype=torch.float64)).abs().item() < 1e-12 * bound


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("pieces", [50, 51, 1000])
@pytest.mark.filterwarnings("ignore:monosoftmax runs the slow reference")
def test_pieces_of_plif_beyond_all_logits_have_a_gradient_of_exactly_zero(backend, pieces):
    generator = torch.Generator().manual_seed(0)
    z = torch.rand(64, 301, generator=generator) * 8 - 3
    target = torch.randint(301, (64,), generator=generator)
    transform = PLIF(pieces, 20.0)
    perturb(transform)
    ms.cross_entropy(z, target, transform, backend=backend).backward()
    reached = ((torch.stack([z.min(), z.max()]) + 20) / transform.width).floor().long().tolist()
    gradient = transform.raw_slope.grad
    assert (gradient[: reached[0]] == 0).all()
    assert (gradient[reached[1] + 1 :] == 0).all()
    assert gradient[reached[0] : reached[1] + 1].abs().min() > 0


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.filterwarnings("ignore:monosoftmax runs the slow reference")
def test_bins_of_a_spline_beyond_all_logits_have_a_gradient_of_exactly_zero(backend):
    generator = torch.Generator().manual_seed(0)
    z = torch.rand(64, 301, generator=generator) * 8 - 3
    target = torch.randint(301, (64,), generator=generator)
    transform = RationalQuadraticSpline(16, 10.0)
    perturb(transform, scale=0.1)
    ms.cross_entropy(z, target, transform, backend=backend).backward()
    x = transform.coefficients().detach()[0]
    first, last = int((x <= z.min()).sum()) - 1, int((x <= z.max()).sum()) - 1
    assert 0 < first < last < 15
    for raw in (transform.log_width, transform.log_height):
        assert (raw.grad[:first] == 0).all()
        assert (raw.grad[last + 1 :] == 0).all()
        assert raw.grad[first : last + 1].abs().min() > 0
    assert (transform.log_derivative.grad[:first] == 0).all()
    assert (transform.log_derivative.grad[last + 2 :] == 0).all()
    assert transform.log_derivative.grad[first : last + 2].abs().min() > 0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    pieces=st.integers(1, 300),
    bound=st.floats(1e-3, 1e3),
    min_slope=st.floats(1e-6, 0.99),
    scale=st.floats(0, 5),
    seed=st.integers(0, 2**31),
)
def test_laws_of_plif(pieces, bound, min_slope, scale, seed):
    transform = PLIF(pieces, bound, min_slope=min_slope, init="random", init_std=scale, dtype=torch.float64)
    transform.reset_parameters(torch.Generator().manual_seed(seed))
    assert transform.slopes().min() >= min_slope * (1 - 1e-12)
    assert transform(torch.zeros(1, dtype=torch.float64)).abs().item() <= 1e-11 * bound
    z = torch.linspace(-2 * bound, 2 * bound, 1001, dtype=torch.float64)
    y = transform(z)
    assert (y.diff() > 0).all()
    torch.testing.assert_close(transform.inverse(y), z, rtol=0, atol=1e-12 * bound / min_slope)
    expected = published_plif(z, transform.slopes(), bound)
    torch.testing.assert_close(y - y[0], expected - expected[0], rtol=1e-10, atol=1e-10 * bound)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(bins=st.integers(1, 100), bound=st.floats(1e-3, 1e3), scale=st.floats(0, 2), seed=st.integers(0, 2**31))
def test_laws_of_the_spline(bins, bound, scale, seed):
    transform = RationalQuadraticSpline(bins, bound, dtype=torch.float64)
    perturb(transform, seed, scale)
    knots = kinks(transform)
    z = torch.linspace(float(knots[0]) - bound, float(knots[-1]) + bound, 1001, dtype=torch.float64)
    z.requires_grad_()
    y = transform(z)
    assert (y.diff() > 0).all()
    slope = transform.derivative(z)
    assert (slope > 0).all()
    (gradient,) = torch.autograd.grad(y.sum(), z)
    torch.testing.assert_close(gradient, slope, rtol=1e-8, atol=1e-12)
    # f is C1: at a knot f and f' agree from both sides.
    step = 1e-9 * transform.coefficients()[1].min().item()
    middle = knots[1:-1]
    torch.testing.assert_close(
        transform.derivative(middle - step), transform.derivative(middle + step), rtol=1e-4, atol=1e-9
    )
    torch.testing.assert_close(transform(transform.inverse(y)), y, rtol=1e-9, atol=1e-9 * bound)


# --- as modules -------------------------------------------------------------------------------------------------------

REPRS = {
    "identity": "Identity()",
    "temperature_fixed": "Temperature(tau=0.7, learnable=False)",
    "plif_7": "PLIF(num_pieces=7, bound=4.0, min_slope=0.01, init='identity', init_std=1.0)",
    "sigsoftmax": "SigSoftmax()",
    "gss_published": "GSS(k=2.5, c=-1.5, learnable=False)",
    "soft_cap": "SoftCap(cap=30.0, learnable=False)",
    "sigmoid_cap_learned": "SigmoidCap(a=23.0, b=5.0, c=7.5, learnable=True)",
    "monotonic_mlp_1": "MonotonicMLP(num_units=1, bound=3.0)",
    "spline_5": "RationalQuadraticSpline(num_bins=5, bound=4.0)",
}


@pytest.mark.parametrize(("case", "expected"), REPRS.items())
def test_repr_is_the_call_that_built_it(case, expected):
    assert repr(perturbed(case)) == expected
    assert repr(CASES[case]().to("meta")) == expected
    assert repr(eval(expected)) == expected


@every_case
def test_copies_compute_the_same(case):
    transform = perturbed(case, torch.float32)
    z = torch.linspace(-30, 30, 301)
    y = transform(z)

    loaded = CASES[case]()
    buffer = io.BytesIO()
    torch.save(transform.state_dict(), buffer)
    buffer.seek(0)
    loaded.load_state_dict(torch.load(buffer))
    assert torch.equal(loaded(z), y)
    assert torch.equal(pickle.loads(pickle.dumps(transform))(z), y)

    copied = copy.deepcopy(transform)
    assert torch.equal(copied(z), y)
    perturb(copied, seed=9)
    assert torch.equal(transform(z), y)


@pytest.mark.parametrize("kind", [Temperature, GSS, SoftCap, SigmoidCap])
def test_fixed_constants_are_saved_but_not_parameters(kind):
    fixed, learned = kind(learnable=False), kind(learnable=True)
    assert not fixed.learnable
    assert learned.learnable
    assert not list(fixed.parameters())
    assert len(list(learned.parameters())) == len(fixed.state_dict())
    assert fixed.state_dict().keys() == learned.state_dict().keys()


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_is_computed_in_float32_and_rounded_once(case, dtype):
    transform = perturbed(case, torch.float32)
    z = torch.linspace(-40, 40, 501).to(dtype)
    for function in (transform, transform.derivative):
        result = function(z)
        assert result.dtype == dtype
        assert torch.equal(result, function(z.float()).to(dtype))


@every_case
def test_float64_input_is_computed_in_float64(case):
    transform = perturbed(case)
    # Steps of 1e-9 around 1 vanish in float32.
    z = 1 + 1e-9 * torch.arange(10, dtype=torch.float64)
    y = transform(z)
    assert y.dtype == torch.float64
    assert (y.diff() > 0).all()


@every_case
def test_infinite_and_nan_logits(case):
    transform = perturbed(case, torch.float32)
    z = torch.tensor([-torch.inf, torch.nan, torch.inf])
    lowest, middle, highest = transform(z).tolist()
    assert math.isnan(middle)
    if isinstance(transform, BOUNDED):
        assert transform.bounded_below
        top = transform.coefficients()[0].item()
        assert highest == pytest.approx(top, rel=1e-6)
        assert lowest == pytest.approx(-top if isinstance(transform, SoftCap) else 0.0, rel=1e-6, abs=1e-30)
    else:
        assert not transform.bounded_below
        assert highest == math.inf
        assert lowest == -math.inf
    slope = transform.derivative(z)
    assert torch.isfinite(slope[[0, 2]]).all()
    assert (slope[[0, 2]] >= 0).all()


@every_case
def test_shape_is_kept(case):
    transform = perturbed(case, torch.float32)
    for shape in ((), (0,), (2, 0, 3), (2, 3, 4)):
        z = torch.randn(shape)
        assert transform(z).shape == shape
        assert transform.derivative(z).shape == shape
    strided = torch.randn(6, 5).t()[::2]
    torch.testing.assert_close(transform(strided), transform(strided.contiguous()))


# --- refusals ---------------------------------------------------------------------------------------------------------

NOT_FINITE = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("kind", [PLIF, MonotonicMLP, RationalQuadraticSpline])
@pytest.mark.parametrize("bound", [0, 0.0, -1.0, 1e-5, 1e5, *NOT_FINITE])
def test_bad_bound(kind, bound):
    with pytest.raises(ValueError, match=r"^bound must be .*got"):
        kind(bound=bound)


@pytest.mark.parametrize("bound", ["1", None, True])
def test_bound_of_a_wrong_type(bound):
    with pytest.raises(TypeError, match="bound must be a number, got"):
        PLIF(bound=bound)


COUNTS = [(PLIF, "num_pieces"), (MonotonicMLP, "num_units"), (RationalQuadraticSpline, "num_bins")]


@pytest.mark.parametrize(("kind", "name"), COUNTS)
@pytest.mark.parametrize(("count", "error"), [(0, ValueError), (-1, ValueError), (True, TypeError), (2.5, TypeError)])
def test_bad_count(kind, name, count, error):
    with pytest.raises(error, match=f"^{name} must be .*got"):
        kind(**{name: count})


def test_monotonic_mlp_has_at_most_21_units():
    assert MonotonicMLP(21).coefficients().shape == (64,)
    with pytest.raises(ValueError, match="num_units must be at most 21, got 22"):
        MonotonicMLP(22)


@pytest.mark.parametrize("min_slope", [0, 1, 0.0, 1.0, -0.1, 2.0, *NOT_FINITE])
def test_bad_min_slope(min_slope):
    with pytest.raises(ValueError, match="min_slope must be"):
        PLIF(min_slope=min_slope)


def test_bad_start_of_plif():
    with pytest.raises(ValueError, match=r'init must be "identity" or "random", got .normal.'):
        PLIF(init="normal")
    for value in (-1.0, *NOT_FINITE):
        with pytest.raises(ValueError, match="init_std must"):
            PLIF(init="random", init_std=value)


SCALES = [(Temperature, "tau"), (GSS, "k"), (SoftCap, "cap"), (SigmoidCap, "a"), (SigmoidCap, "c")]


@pytest.mark.parametrize(("kind", "name"), SCALES)
@pytest.mark.parametrize("value", [0, 0.0, -1.0, 1e-5, 1e5, *NOT_FINITE])
def test_bad_scale(kind, name, value):
    with pytest.raises(ValueError, match=f"^{name} must be .*got"):
        kind(**{name: value})


@pytest.mark.parametrize(("kind", "name"), SCALES)
@pytest.mark.parametrize("value", [1e-4, 1e4])
def test_scales_at_their_limits_are_taken(kind, name, value):
    scalars = kind(**{name: value}).scalars()
    assert scalars[name].item() == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize(("kind", "name"), [(GSS, "c"), (SigmoidCap, "b")])
@pytest.mark.parametrize("value", [1e5, -1e5, *NOT_FINITE])
def test_bad_shift(kind, name, value):
    with pytest.raises(ValueError, match=f"^{name} must be .*got"):
        kind(**{name: value})


@pytest.mark.parametrize("kind", [Temperature, GSS, SoftCap, SigmoidCap])
def test_bad_learnable(kind):
    with pytest.raises(TypeError, match="learnable must be a bool, got int"):
        kind(learnable=1)


@every_default
def test_bad_input(name):
    transform = ms.transforms.make(name)
    for function in (transform, transform.derivative):
        with pytest.raises(TypeError, match="input must be a Tensor, got list"):
            function([1.0])
        with pytest.raises(TypeError, match=r"input must be a floating-point tensor, got torch\.int64"):
            function(torch.arange(3))
    with pytest.raises(TypeError, match="output must be a Tensor, got float"):
        transform.inverse(1.0)
