"""Spectra and effective ranks against what is known of them, and what the plots draw."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

import monosoftmax as ms
from monosoftmax import analysis
from monosoftmax.transforms import PLIF, SigmoidCap, SigSoftmax


@pytest.fixture(scope="module")
def logits():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (90, 120))
    return hidden @ weight.t()


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_spectrum_is_that_of_the_matrix_without_centring():
    torch.manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(30, 5, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(40, 5, dtype=torch.float64))
    known = torch.tensor([100.0, 10.0, 1.0, 0.1, 0.01], dtype=torch.float64)
    values = analysis.spectrum(u * known @ v.t())
    assert values.shape == (30,)
    torch.testing.assert_close(values[:5], known)
    assert values[5:].max() < 1e-12
    # Centring would leave nothing of a constant matrix.
    assert analysis.spectrum(torch.ones(3, 4))[0].item() == pytest.approx(math.sqrt(12))


def test_spectrum_is_computed_in_float64_over_all_leading_dimensions(logits):
    log_p = torch.log_softmax(logits, -1)
    values = analysis.spectrum(log_p.reshape(9, 10, 120))
    torch.testing.assert_close(values, analysis.spectrum(log_p))
    assert analysis.spectrum(log_p.float()).dtype == torch.float64
    half = log_p.half()
    torch.testing.assert_close(analysis.spectrum(half), torch.linalg.svdvals(half.double()))
    assert not analysis.spectrum(log_p.requires_grad_()).requires_grad


def test_linear_softmax_has_rank_d_plus_1_and_sigsoftmax_more(logits):
    for transform, rank in ((None, 9), (SigSoftmax(), 90)):
        values = analysis.spectrum(ms.log_softmax(logits, transform, backend="reference"))
        assert int((values > 1e-10 * values[0]).sum()) == rank
        assert analysis.effective_rank(values, 1e-20) == rank


@pytest.mark.parametrize(
    ("values", "tolerance", "rank"),
    [
        ([1.0], 0.5, 1),
        ([1.0, 1.0, 1.0, 1.0], 0.25, 3),
        ([1.0, 1.0, 1.0, 1.0], 0.26, 3),
        ([1.0, 1.0, 1.0, 1.0], 0.24, 4),
        ([1.0, 1.0, 1.0, 1.0], 0.75, 1),
        # Squares 10000, 100, 1, 0.01: what is left out is 1.0e-2, 1.0e-4, 9.9e-7 of their sum.
        ([100.0, 10.0, 1.0, 0.1], 1.1e-2, 1),
        ([100.0, 10.0, 1.0, 0.1], 9e-3, 2),
        ([100.0, 10.0, 1.0, 0.1], 9e-5, 3),
        ([100.0, 10.0, 1.0, 0.1], 9e-7, 4),
        ([0.1, 10.0, 100.0, 1.0], 9e-5, 3),
        ([3.0, 0.0, 0.0], 1e-5, 1),
        ([0.0, 0.0], 1e-3, 0),
        # No square may overflow or underflow, nor be lost in the sum.
        ([1e200, 1e199], 1e-5, 2),
        ([1e-200, 1e-201], 1e-5, 2),
        ([1.0, 1e-9], 1e-19, 2),
        ([1.0, 1e-9], 1e-17, 1),
    ],
)
def test_effective_rank_of_known_values(values, tolerance, rank):
    assert analysis.effective_rank(torch.tensor(values, dtype=torch.float64), tolerance) == rank
    assert analysis.effective_rank(torch.diag(torch.tensor(values, dtype=torch.float64)), tolerance) == rank


def test_effective_rank_is_its_definition(logits):
    log_p = ms.log_softmax(logits, SigSoftmax(), backend="reference")
    squares = torch.linalg.svdvals(log_p).square()
    ranks = []
    for tolerance in (1e-3, 1e-4, 1e-5):
        kept = squares.cumsum(0) / squares.sum()
        expected = int((kept < 1 - tolerance).sum()) + 1
        assert analysis.effective_rank(log_p, tolerance) == expected
        ranks.append(expected)
    assert analysis.effective_rank(log_p) == ranks[1]
    assert 9 < ranks[0] < ranks[1] < ranks[2] < 90


@pytest.mark.parametrize("tolerance", [0, 0.0, 1, 1.0, -0.1, math.nan, math.inf])
def test_bad_tolerance(tolerance):
    with pytest.raises(ValueError, match="tolerance must be between 0 and 1, got"):
        analysis.effective_rank(torch.ones(3), tolerance)


@pytest.mark.parametrize("tolerance", ["0.1", None, True])
def test_tolerance_of_a_wrong_type(tolerance):
    with pytest.raises(TypeError, match="tolerance must be a number, got"):
        analysis.effective_rank(torch.ones(3), tolerance)


def test_bad_matrices():
    for function, name in ((analysis.spectrum, "log_probs"), (analysis.effective_rank, "matrix_or_singular_values")):
        with pytest.raises(TypeError, match=f"{name} must be a Tensor, got list"):
            function([1.0])
        with pytest.raises(TypeError, match=f"{name} must be a floating-point tensor, got torch.int64"):
            function(torch.ones(2, 2, dtype=torch.long))
    for shape in ((), (3,), (0, 3), (3, 0)):
        with pytest.raises(ValueError, match="log_probs must have shape"):
            analysis.spectrum(torch.ones(shape))
    for bad in (math.nan, math.inf, -math.inf):
        matrix = torch.ones(2, 3)
        matrix[1, 1] = bad
        with pytest.raises(ValueError, match="log_probs must be finite, got 1 elements that are not"):
            analysis.spectrum(matrix)
        with pytest.raises(ValueError, match="matrix_or_singular_values must be finite"):
            analysis.effective_rank(matrix[1])
    with pytest.raises(ValueError, match=r"matrix_or_singular_values must have shape \(R,\) and not be empty"):
        analysis.effective_rank(torch.ones(0))
    with pytest.raises(ValueError, match="matrix_or_singular_values must not be negative, got -2"):
        analysis.effective_rank(torch.tensor([1.0, -2.0]))


# --- large matrices, and the numerical rank -------------------------------------------------------------------------


def with_spectrum(values, rows=90, columns=120) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    u, v = (
        torch.linalg.qr(torch.randn(n, len(values), generator=generator, dtype=torch.float64)).Q
        for n in (rows, columns)
    )
    return u * torch.as_tensor(values, dtype=torch.float64) @ v.t()


def test_leading_spectrum_of_known_values():
    known = torch.tensor([100.0, 30.0, 10.0, 3.0, 1.0], dtype=torch.float64)
    values = analysis.leading_spectrum(with_spectrum(known), 5)
    assert (values.shape, values.dtype) == ((5,), torch.float64)
    torch.testing.assert_close(values, known)
    torch.testing.assert_close(analysis.leading_spectrum(with_spectrum(known).reshape(9, 10, 120), 3), known[:3])
    # float32 is computed in float64 too: what is left is the rounding of the matrix.
    single = analysis.leading_spectrum(with_spectrum(known).float().requires_grad_(), 5)
    torch.testing.assert_close(single, known, rtol=0, atol=1e-5)
    assert not single.requires_grad


def test_leading_spectrum_is_a_lower_bound_within_the_error_of_its_source():
    known = torch.arange(1, 91, dtype=torch.float64).reciprocal()
    matrix, k = with_spectrum(known), 20
    errors = []
    for iterations in (0, 1, 4):
        error = known[:k] - analysis.leading_spectrum(matrix, k, iterations=iterations, seed=3)
        factor = 1 + math.sqrt(k / 9) + math.e * math.sqrt(k + 10) / 10 * math.sqrt(90 - k)
        assert error.min() > -1e-14
        assert error.max() <= factor ** (1 / (2 * iterations + 1)) * known[k]
        errors.append(error.max().item())
    # Power iterations are what makes a slow decay affordable.
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0


def test_leading_spectrum_is_exact_where_it_spans_the_whole_matrix(logits):
    log_p = ms.log_softmax(logits, SigSoftmax(), backend="reference")
    torch.testing.assert_close(analysis.leading_spectrum(log_p, 90), analysis.spectrum(log_p))
    assert analysis.effective_rank(log_p, 1e-5, max_rank=90) == analysis.effective_rank(log_p, 1e-5)


def test_leading_spectrum_depends_on_its_seed_alone(logits):
    log_p = ms.log_softmax(logits, SigSoftmax(), backend="reference")
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = analysis.leading_spectrum(log_p, 20)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(analysis.leading_spectrum(log_p, 20, seed=0), first)
    assert not torch.equal(analysis.leading_spectrum(log_p, 20, seed=1), first)


def test_effective_rank_from_leading_values_is_the_exact_one(logits):
    log_p = ms.log_softmax(logits, SigSoftmax(), backend="reference").float()
    norm = log_p.double().square().sum().item()
    values = analysis.spectrum(log_p)
    for tolerance in (1e-2, 1e-3, 1e-4):
        exact = analysis.effective_rank(log_p, tolerance)
        assert analysis.effective_rank(log_p, tolerance, max_rank=60) == exact
        assert analysis.effective_rank(values[:exact].flip(0), tolerance, squared_norm=norm) == exact
        with pytest.raises(
            ValueError, match=f"the leading {exact - 1} singular values leave out .* than the tolerance"
        ):
            analysis.effective_rank(values[: exact - 1], tolerance, squared_norm=norm)
        with pytest.raises(ValueError, match=r"the leading 1 singular values .*: give a larger max_rank"):
            analysis.effective_rank(log_p, tolerance, max_rank=1)
    assert analysis.effective_rank(torch.zeros(4, 5), max_rank=2) == 0
    assert analysis.effective_rank(torch.zeros(2), squared_norm=0) == 0
    with pytest.raises(ValueError, match="the leading 2 singular values leave out 1 of the squared norm"):
        analysis.effective_rank(torch.zeros(2), squared_norm=1.0)


def test_bad_arguments_for_large_matrices(logits):
    with pytest.raises(TypeError, match="log_probs must be a Tensor, got list"):
        analysis.leading_spectrum([1.0], 1)
    with pytest.raises(ValueError, match=r"log_probs must have shape \(..., V\) and not be empty"):
        analysis.leading_spectrum(torch.ones(3), 1)
    for k in (0, 91):
        with pytest.raises(ValueError, match=rf"k must be from 1 to min\(N, V\) = 90, got {k}"):
            analysis.leading_spectrum(logits, k)
        with pytest.raises(ValueError, match=rf"max_rank must be from 1 to min\(N, V\) = 90, got {k}"):
            analysis.effective_rank(logits, max_rank=k)
    with pytest.raises(TypeError, match="k must be an integer, got float"):
        analysis.leading_spectrum(logits, 2.0)
    with pytest.raises(TypeError, match="max_rank must be an integer, got bool"):
        analysis.effective_rank(logits, max_rank=True)
    for name in ("iterations", "seed"):
        with pytest.raises(ValueError, match=f"{name} must be at least 0, got -1"):
            analysis.leading_spectrum(logits, 2, **{name: -1})
    values = torch.ones(3)
    with pytest.raises(ValueError, match="max_rank goes with a matrix, got 2 with singular values"):
        analysis.effective_rank(values, max_rank=2)
    with pytest.raises(ValueError, match="squared_norm goes with singular values, got 3 with a matrix"):
        analysis.effective_rank(logits, squared_norm=3)
    with pytest.raises(
        ValueError, match="squared_norm must be at least the sum of the squared singular values, 3, got 2"
    ):
        analysis.effective_rank(values, squared_norm=2)
    with pytest.raises(ValueError, match="squared_norm must be finite, got nan"):
        analysis.effective_rank(values, squared_norm=math.nan)
    with pytest.raises(TypeError, match="squared_norm must be a number, got str"):
        analysis.effective_rank(values, squared_norm="3")
    for leading in ({"squared_norm": 3.0}, {"max_rank": 2}):
        with pytest.raises(ValueError, match="tolerance must be at least 1e-12 with leading values only, got 1e-13"):
            analysis.effective_rank(logits if "max_rank" in leading else values, 1e-13, **leading)


def test_press_rank_is_its_threshold():
    eps = torch.finfo(torch.float64).eps
    threshold = 2 * eps / 2 * math.sqrt(30 + 40 + 1)
    matrix = torch.zeros(30, 40, dtype=torch.float64)
    matrix[0, 0], matrix[1, 1], matrix[2, 2] = 2.0, 1.01 * threshold, 0.99 * threshold
    assert analysis.press_rank(matrix) == 2
    assert analysis.press_rank(matrix.reshape(5, 6, 40)) == 2
    assert analysis.press_rank(matrix.float()) == 1
    assert analysis.press_rank(torch.zeros(3, 4)) == 0
    with pytest.raises(TypeError, match="matrix must be a floating-point tensor, got"):
        analysis.press_rank(torch.ones(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="matrix must be finite, got 1 elements that are not"):
        analysis.press_rank(torch.tensor([[1.0, math.nan]]))


def test_press_rank_counts_noise_that_the_effective_rank_does_not_see():
    matrix = with_spectrum([1.0] * 10, 120, 120)
    noise = torch.randn(120, 120, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for scale, rank in ((1e-18, 10), (1e-13, 120)):
        noisy = matrix + scale * noise
        assert analysis.press_rank(noisy) == pytest.approx(rank, abs=3)
        assert [analysis.effective_rank(noisy, tolerance) for tolerance in (1e-3, 1e-5, 1e-12)] == [10, 10, 10]


# --- plots ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pyplot():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


def curves(ax) -> dict:
    return {line.get_label(): line for line in ax.lines}


def test_plot_transform_draws_f_the_identity_and_the_histogram(pyplot, logits):
    transform = PLIF(9, 6.0, init="random", generator=torch.Generator().manual_seed(0))
    ax = analysis.plot_transform(transform, logits)
    assert set(curves(ax)) == {"identity", "PLIF"}
    z, y = (torch.as_tensor(values) for values in curves(ax)["PLIF"].get_data())
    assert z[0].item() == pytest.approx(logits.min().item(), abs=1e-5)
    assert z[-1].item() == pytest.approx(logits.max().item(), abs=1e-5)
    torch.testing.assert_close(y, transform(z).detach() - transform(torch.zeros(1)).item(), rtol=0, atol=1e-5)
    assert curves(ax)["identity"].get_slope() == 1
    assert ax.get_xlim() == pytest.approx((z[0].item(), z[-1].item()))

    (below,) = ax.child_axes
    counts = [bar.get_height() * bar.get_width() * logits.numel() for bar in below.patches]
    assert len(counts) == 80
    torch.testing.assert_close(
        torch.tensor(counts).float(), torch.histc(logits.float(), 80, z[0].item(), z[-1].item()), rtol=0, atol=2
    )
    assert below.get_xlim() == ax.get_xlim()
    assert below.get_xlabel() == "logit z"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["identity", "PLIF"]
    ax.figure.canvas.draw()
    # The histogram lies beneath, inside the figure.
    box = below.get_window_extent()
    assert 0 < box.y0 < box.y1 < ax.get_window_extent().y0


def test_plot_transform_takes_the_offset_out(pyplot):
    _, y = curves(analysis.plot_transform(SigmoidCap(), bounds=(-1.0, 1.0)))["SigmoidCap"].get_data()
    assert y[1000] == 0


def test_plot_transform_compares_on_given_axes(pyplot, logits):
    _, ax = pyplot.subplots()
    assert analysis.plot_transform(PLIF(), logits, ax, label="first") is ax
    analysis.plot_transform(SigSoftmax(), 2 * logits, ax, label="second", bins=20)
    assert set(curves(ax)) == {"identity", "first", "second"}
    assert len([line for line in ax.lines if line.get_label() == "identity"]) == 1
    (below,) = ax.child_axes
    assert len(below.patches) == 100
    assert ax.get_xlim() == pytest.approx((2 * logits.min().item(), 2 * logits.max().item()), rel=1e-5)
    assert len(pyplot.get_fignums()) == 1


def test_range_of_plot_transform(pyplot):
    assert analysis.plot_transform(PLIF(5, 7.0)).get_xlim() == (-7, 7)
    assert analysis.plot_transform(SigSoftmax()).get_xlim() == (-20, 20)
    assert analysis.plot_transform(SigSoftmax(), bounds=(-3, 4)).get_xlim() == (-3, 4)
    masked = torch.tensor([-math.inf, -2.0, 5.0, math.nan])
    assert analysis.plot_transform(PLIF(), masked).get_xlim() == (-2, 5)
    assert analysis.plot_transform(PLIF(), torch.full((4,), 3.0)).get_xlim() == (2, 4)
    assert not analysis.plot_transform(PLIF()).child_axes


def test_plot_transform_takes_half_precision_and_logits_that_need_gradients(pyplot):
    ax = analysis.plot_transform(PLIF().half(), torch.linspace(-3, 3, 50).bfloat16().requires_grad_())
    assert ax.get_xlim() == (-3, 3)


def test_plot_spectrum(pyplot, logits):
    spectra = {name: analysis.spectrum(f(logits)) for name, f in {"linear": lambda z: z, "sig": SigSoftmax()}.items()}
    ax = analysis.plot_spectrum(spectra)
    assert set(curves(ax)) == {"linear", "sig"}
    k, values = curves(ax)["sig"].get_data()
    assert list(k) == list(range(1, 91))
    torch.testing.assert_close(torch.as_tensor(values), spectra["sig"] / spectra["sig"][0])
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    _, given = pyplot.subplots()
    assert analysis.plot_spectrum({"a": torch.tensor([1.0, 2.0])}, given) is given
    assert list(curves(given)["a"].get_ydata()) == [1.0, 0.5]


def test_bad_plots(pyplot):
    with pytest.raises(TypeError, match="transform must be a monosoftmax transform, got builtin_function_or_method"):
        analysis.plot_transform(torch.tanh)
    with pytest.raises(TypeError, match="logits must be a Tensor, got list"):
        analysis.plot_transform(PLIF(), [1.0])
    with pytest.raises(ValueError, match="logits must hold a finite value, got none"):
        analysis.plot_transform(PLIF(), torch.full((3,), -math.inf))
    for bounds in ((1.0, 1.0), (2.0, 1.0), (0.0, math.inf), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="bounds must be finite and increasing, got"):
            analysis.plot_transform(PLIF(), bounds=bounds)
    with pytest.raises(TypeError, match="spectra must map names to singular values, got Tensor"):
        analysis.plot_spectrum(torch.ones(3))
    with pytest.raises(ValueError, match="spectra must hold at least one spectrum, got none"):
        analysis.plot_spectrum({})
    with pytest.raises(ValueError, match=r"spectra\['a'\] must have shape \(R,\)"):
        analysis.plot_spectrum({"a": torch.ones(2, 2)})
    with pytest.raises(ValueError, match=r"spectra\['b'\] must have a positive value, got zeros only"):
        analysis.plot_spectrum({"a": torch.ones(2), "b": torch.zeros(2)})
    assert not pyplot.get_fignums()


def test_matplotlib_is_imported_by_the_plots_only_and_missed_by_name():
    script = (
        "import sys, torch, monosoftmax as ms\n"
        "assert not any(name.split('.')[0] == 'matplotlib' for name in sys.modules)\n"
        "assert ms.analysis.effective_rank(torch.ones(3)) == 3\n"
        "sys.modules['matplotlib'] = None\n"
        "for plot in (lambda: ms.analysis.plot_transform(ms.transforms.PLIF()),\n"
        "             lambda: ms.analysis.plot_spectrum({'a': torch.ones(3)})):\n"
        "    try:\n"
        "        plot()\n"
        "    except ImportError as error:\n"
        "        print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["plots need matplotlib: pip install matplotlib"] * 2
