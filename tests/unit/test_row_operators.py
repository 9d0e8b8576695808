"""The row kernels of C++, called directly: ``monosoftmax._C.cpu``, and ``cuda`` in its host execution."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import pytest
import torch
from hands import on
from losses import TRANSFORMS, disturbed
from torch import Tensor

import monosoftmax as ms
from monosoftmax import reference
from monosoftmax.groups import LossOptions, RowResults, Transform, Upstream
from monosoftmax.row_kernels import RowKernels, row_kernels
from monosoftmax.transforms.plif import _coefficients as formula

N, V = 6, 37
PLAIN = LossOptions(None, -100, 0.0, 0.0, False)
SMOOTHED = LossOptions(torch.linspace(0.5, 1.5, V), -100, 0.1, 0.01, True)
BOTH = (True, True)


@pytest.fixture(params=["cpu", "cuda"])
def kernels(request: pytest.FixtureRequest) -> Iterator[RowKernels]:
    with on(request.param):
        yield row_kernels(request.param)


class Call(NamedTuple):
    rows: Tensor
    target: Tensor
    f: Transform
    module: ms.transforms.MonotonicTransform


def call_of(name: str = "plif", rows: int = N) -> Call:
    """Rows in wider memory, the second one ignored."""
    torch.manual_seed(0)
    module = disturbed(name)
    target = torch.randint(0, V, (rows,))
    target[1:2] = -100
    f = Transform(module().detach(), cast(str, module.kernel), list(module.constants()))
    return Call(3 * torch.randn(rows, V + 3)[:, :V], target, f, module)


def upstream_of(options: LossOptions) -> Upstream:
    return Upstream(torch.linspace(0.1, 0.9, N), torch.linspace(-0.5, 0.5, N) if options.return_lse else None)


def truth(call: Call, options: LossOptions, upstream: Upstream) -> tuple[Tensor, ...]:
    """Loss, lse, and the gradients of rows and of the parameters, by the reference in float64."""
    weight = None if options.weight is None else options.weight.double()
    leaf, module = call.rows.double().requires_grad_(), copy.deepcopy(call.module).double()
    loss, lse = reference.cross_entropy(leaf, call.target, module, options._replace(weight=weight, return_lse=True))
    if not options.return_lse and not call.target.is_floating_point():
        lse = lse * (call.target >= 0)
    given = [each.double() for each in upstream if each is not None]
    gradients = torch.autograd.grad((loss, lse)[: len(given)], [leaf, *module.parameters()], given)
    return tuple(each.detach().float() for each in (loss, lse, *gradients))


def parameter_gradients(call: Call, grad_coefficients: Tensor) -> tuple[Tensor, ...]:
    parameters = list(call.module.parameters())
    return torch.autograd.grad(call.module(), parameters, grad_coefficients) if parameters else ()


def assert_same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("options", [PLAIN, SMOOTHED])
def test_losses_and_gradients(kernels: RowKernels, name: str, options: LossOptions) -> None:
    call = rows, target, f, _ = call_of(name)
    upstream = upstream_of(options)
    losses = RowResults(*kernels.cross_entropy(rows, target, f, options))
    later = RowResults(*kernels.cross_entropy(rows, target, f, options, upstream, losses.row_stats, BOTH))
    once = RowResults(*kernels.cross_entropy(rows, target, f, options, upstream, None, BOTH))
    assert [list(each.shape) for each in losses] == [[N], [N], [2, N], [0], [0]]
    assert [list(each.shape) for each in later] == [[0], [0], [0], [N, V], list(f.coefficients.shape)]
    for results in (losses[:2] + later[3:], once[:2] + once[3:]):
        found = (*results[:3], *parameter_gradients(call, results[3]))
        for each, wanted in zip(found, truth(call, options, upstream), strict=True):
            torch.testing.assert_close(each, wanted, atol=2e-5, rtol=2e-5)
    if options.return_lse:  # no kernel has both, so that a call is made of two
        assert_same(once, losses[:3] + later[3:])


@pytest.mark.parametrize("options", [PLAIN, SMOOTHED])
@pytest.mark.parametrize("first", [False, True])
def test_upstream_gradients(kernels: RowKernels, options: LossOptions, first: bool) -> None:
    """A number stands for N equal ones, an absent one for zeros; either gradient is what it is beside the other."""
    rows, target, f, _ = call_of()
    stats = None if first else kernels.cross_entropy(rows, target, f, options)[2]

    def gradients(upstream: Upstream, mask: tuple[bool, bool] = BOTH) -> tuple[Tensor, ...]:
        return kernels.cross_entropy(rows, target, f, options, upstream, stats, mask)[3:]

    scale, zeros = torch.tensor(0.3), torch.zeros(N)
    number = gradients(Upstream(scale))
    for each, wanted in zip(number, gradients(Upstream(scale.repeat(N))), strict=True):
        torch.testing.assert_close(each, wanted)
    assert_same(gradients(Upstream(None, None)), gradients(Upstream(zeros, zeros)))
    if options.return_lse:
        assert_same(gradients(Upstream(None, 0.5 + zeros)), gradients(Upstream(zeros, 0.5 + zeros)))
    assert_same(gradients(Upstream(scale), (True, False)), (number[0], f.coefficients.new_empty(0)))
    assert gradients(Upstream(scale), (False, True))[0].shape == (0,)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("options", [PLAIN, SMOOTHED])
def test_gradients_into_given_memory(kernels: RowKernels, options: LossOptions, first: bool) -> None:
    rows, target, f, _ = call_of()
    stats = None if first else kernels.cross_entropy(rows, target, f, options)[2]
    arguments = target, f, options, upstream_of(options), stats, BOTH
    wanted = kernels.cross_entropy(rows, *arguments)
    beside, overwritten = torch.full((N, 2 * V), 7.0), rows.clone()
    assert_same(kernels.cross_entropy(rows, *arguments, beside[:, :V]), wanted)
    assert torch.equal(beside[:, :V], wanted[3]) and (beside[:, V:] == 7).all()
    assert kernels.cross_entropy(overwritten, *arguments, overwritten)[3] is overwritten
    assert torch.equal(overwritten, wanted[3])


@pytest.mark.parametrize("kernels", ["cuda"], indirect=True)
def test_a_factor_rescales_gradients(kernels: RowKernels) -> None:
    rows, target, f, _ = call_of()
    scale, mask = torch.tensor(0.25), (True, False)
    _, _, stats, grad, _ = kernels.cross_entropy(rows, target, f, PLAIN, Upstream(scale), None, mask)
    marked = torch.full_like(grad, 7)
    kernels.cross_entropy(rows, target, f, PLAIN, Upstream(scale, None, torch.tensor(1.0)), stats, mask, marked)
    assert (marked == 7).all()
    kernels.cross_entropy(rows, target, f, PLAIN, Upstream(scale, None, torch.tensor(4.0)), stats, mask, marked)
    torch.testing.assert_close(marked, 4 * grad)
    kernels.scale_(marked, torch.tensor(0.5))
    torch.testing.assert_close(marked, 2 * grad)


@pytest.mark.parametrize("options", [PLAIN, SMOOTHED])
def test_class_probabilities(options: LossOptions) -> None:
    call = call_of()._replace(target=torch.rand(N, V).softmax(1))
    cpu, upstream = row_kernels("cpu"), upstream_of(options)
    for stats in (None, cpu.cross_entropy(*call[:3], options)[2]):
        found = cpu.cross_entropy(*call[:3], options, upstream, stats, BOTH)
        wanted = truth(call, options, upstream)
        torch.testing.assert_close(found[3], wanted[2], atol=2e-5, rtol=2e-5)
        if stats is None:
            assert found[2].shape == (3, N)
            torch.testing.assert_close(found[0], wanted[0])


def test_no_rows(kernels: RowKernels) -> None:
    rows, target, f, _ = call_of(rows=0)
    results = kernels.cross_entropy(rows, target, f, PLAIN, Upstream(torch.tensor(1.0)), None, BOTH)
    assert [list(each.shape) for each in results[:4]] == [[0], [0], [2, 0], [0, V]]
    assert not results[4].any() and results[4].shape == f.coefficients.shape
    output, stats = kernels.log_softmax(rows, f, torch.float32)
    assert output.shape == (0, V)
    assert not kernels.log_softmax_backward(output, rows, f, stats, BOTH)[1].any()
    assert [each.shape for each in kernels.token_statistics(rows, target, f, -100)] == [*[(0,)] * 5, (3, 0)]


@pytest.mark.parametrize("name", ["identity", "plif", "gss"])
def test_log_softmax_and_statistics(kernels: RowKernels, name: str) -> None:
    call = rows, target, f, module = call_of(name)
    output, stats = kernels.log_softmax(rows, f, torch.float32)
    leaf, upstream = rows.double().requires_grad_(), torch.randn(N, V)
    wide = copy.deepcopy(module).double()
    wanted = reference.log_softmax(leaf, wide, torch.float64)
    torch.testing.assert_close(output, wanted.detach().float(), atol=1e-5, rtol=1e-5)
    of_rows, of_coefficients = kernels.log_softmax_backward(upstream, rows, f, stats, BOTH)
    gradients = torch.autograd.grad(wanted, [leaf, *wide.parameters()], upstream.double())
    for each, right in zip((of_rows, *parameter_gradients(call, of_coefficients)), gradients, strict=True):
        torch.testing.assert_close(each, right.float(), atol=2e-5, rtol=2e-5)
    log_prob, _, argmax, _, rank, _ = kernels.token_statistics(rows, target, f, -100)
    counted = target >= 0
    torch.testing.assert_close(log_prob[counted], output[counted].gather(1, target[counted, None])[:, 0])
    assert torch.equal(argmax, rows.argmax(1)) and rank[1] == -1 and log_prob[1] == 0


F32 = torch.zeros(N)
REFUSALS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"rows": torch.randn(N, V, 2)}, ValueError, "input must have shape"),
    ({"rows": torch.randn(N, 0)}, ValueError, "input must have shape .* with V > 0"),
    ({"rows": torch.randn(V, N).t()}, ValueError, "input must have its columns next to each other"),
    ({"rows": torch.randn(N, V, device="meta")}, ValueError, "input must be on .*, got meta"),
    ({"rows": torch.zeros(N, V, dtype=torch.int32)}, TypeError, "got Int|Int is not supported"),
    ({"rows": 1}, TypeError, "incompatible function arguments"),
    ({"target": torch.zeros(2, dtype=torch.int64)}, ValueError, r"target must have shape \[6\], got \[2\]"),
    ({"target": torch.zeros(N, dtype=torch.int32)}, TypeError, "target must be Long, got Int"),
    ({"coefficients": torch.ones(3)}, ValueError, 'do not fit transform "plif"'),
    ({"coefficients": torch.ones(3, 4)}, ValueError, 'do not fit transform "plif"'),
    ({"coefficients": torch.ones(2, 4).double()}, TypeError, "coefficients must be Float, got Double"),
    ({"coefficients": torch.ones(2, 4, device="meta")}, ValueError, "coefficients must be on cpu, got meta"),
    ({"name": "nothing"}, ValueError, 'unknown transform "nothing"'),
    ({"name": "monotonic_mlp", "coefficients": torch.ones(5)}, ValueError, r"takes 3H \+ 1 coefficients"),
    ({"constants": [1.0]}, ValueError, "plif takes 3 constants"),
    ({"weight": torch.rand(N)}, ValueError, r"weight must have shape \[37\]"),
    ({"weight": torch.rand(V).double()}, TypeError, "weight must be Float"),
    ({"upstream": None}, ValueError, "gradients need a scale"),
    ({"upstream": Upstream(torch.tensor(1.0).double())}, TypeError, "scale must be Float"),
    ({"upstream": Upstream(torch.ones(2))}, ValueError, "grad_loss must have shape"),
    ({"upstream": Upstream(None, torch.ones(2))}, ValueError, "grad_lse must have shape"),
    ({"upstream": Upstream(F32, None, F32[0])}, ValueError, "factor"),
    ({"row_stats": torch.ones(4, N)}, ValueError, r"row_stats must have shape \["),
    ({"grad_rows": torch.ones(N, V + 1)}, ValueError, "grad_rows must have shape"),
    ({"grad_rows": torch.ones(N, V).bfloat16()}, TypeError, "grad_rows must be Float"),
    ({"grad_rows": torch.ones(V, N).t()}, ValueError, "grad_rows must have its columns next to each other"),
    ({"grad_rows": torch.ones(N, V), "output_mask": (False, True)}, ValueError, "gradient of rows is not asked for"),
    ({"transform": [F32, "plif", []]}, TypeError, "Transform must be a tuple, got list"),
    ({"transform": (F32, "plif")}, TypeError, "Transform has 5 fields, got 2"),
    ({"coefficients": None}, TypeError, "Transform.coefficients cannot be of type NoneType"),
    ({"name": 3}, TypeError, "Transform.name cannot be of type int"),
    ({"constants": "abc"}, TypeError, "Transform.constants cannot be of type str"),
    ({"constants": ["a"]}, TypeError, "must be real number, not str"),
    ({"options": (None, -100, 0.0, 0.0)}, TypeError, "LossOptions has 5 fields, got 4"),
    ({"ignore_index": 1.5}, TypeError, "LossOptions.ignore_index cannot be of type float"),
    ({"return_lse": None}, TypeError, "LossOptions.return_lse cannot be of type NoneType"),
    ({"upstream": (F32, None)}, TypeError, "Upstream has 4 fields, got 2"),
    ({"output_mask": True}, TypeError, "output_mask must be a tuple, got bool"),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSALS, ids=range(len(REFUSALS)))
def test_refusals(kernels: RowKernels, change: dict[str, Any], error: type[Exception], message: str) -> None:
    """The message is one line: no backtrace of C++ follows."""
    rows, target, f, _ = call_of()
    arguments: dict[str, Any] = {
        "rows": rows, "target": target, "transform": f, "options": PLAIN, "upstream": Upstream(torch.tensor(1.0)),
        "row_stats": None, "output_mask": BOTH, "grad_rows": None,
    }  # fmt: skip
    kernels.cross_entropy(**arguments)
    for group in ("transform", "options"):
        fields = {name: value for name, value in change.items() if name in arguments[group]._fields}
        arguments[group] = arguments[group]._replace(**fields)
    arguments |= {name: value for name, value in change.items() if name in arguments}
    with pytest.raises(error, match=message) as caught:
        kernels.cross_entropy(**arguments)
    assert "rows" in change or "\n" not in str(caught.value)


def test_targets_and_means_on_the_cpu() -> None:
    rows, target, f, _ = call_of()
    cpu: Any = row_kernels("cpu")
    target[2] = V
    with pytest.raises(
        IndexError, match=r"^target 37 \(row 2\) is out of bounds for 37 classes \(ignore_index=-100\)$"
    ):
        cpu.cross_entropy(rows, target, f, PLAIN)
    for ignored in (-100, 5, V):
        for dtype in (torch.float32, torch.float64):
            wanted = (target != ignored).sum().to(dtype).reciprocal()
            assert_same((cpu.mean_scale(target, ignored, dtype),), (wanted,))
    assert cpu.mean_scale(target[:0], -100, torch.float32) == torch.inf
    with pytest.raises(TypeError, match="target must be Long"):
        cpu.mean_scale(rows, -100, torch.float32)


@pytest.mark.parametrize("pieces", [1, 2, 7, 64, 1000, 100_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coefficients_of_plif(kernels: RowKernels, pieces: int, dtype: torch.dtype) -> None:
    """PyTorch's formula in float64, to rounding; on the CPU its bits. Slopes below, at and above their limit."""
    if dtype == torch.float64 and hasattr(kernels, "scale_"):
        with pytest.raises(TypeError, match="raw_slope must be Float"):
            kernels.plif_coefficients(torch.zeros(pieces, dtype=dtype), 1.0, 0.1)
        return
    torch.manual_seed(pieces)
    raw = torch.randn(pieces, dtype=dtype)
    raw[3::7], raw[4::7], raw[5::7] = 19998, 19999, 20000
    wide, grad_table = raw.double().requires_grad_(), torch.randn(2, pieces, dtype=dtype)
    wanted = formula(wide, 4.3, 0.5)
    (gradient,) = torch.autograd.grad(wanted, wide, grad_table.double())
    table = kernels.plif_coefficients(raw, 4.3, 0.5)
    found = kernels.plif_coefficients_backward(grad_table, raw, 4.3, 0.5)
    eps = 4 * torch.finfo(dtype).eps
    for each, right in ((table, wanted.detach()), (found, gradient)):
        torch.testing.assert_close(each.double(), right, rtol=eps, atol=eps * max(1, float(right.abs().max())))
    if not hasattr(kernels, "scale_"):
        assert_same((table,), (formula(raw, 4.3, 0.5),))
    assert table.dtype == found.dtype == dtype
    assert not found[raw == 20000].any() and found[raw == 19999].all()


@pytest.mark.parametrize(
    ("raw", "bound", "message"),
    [
        (torch.zeros(2, 3), 1.0, r"raw_slope must have shape \[K\]"),
        (torch.zeros(0), 1.0, r"raw_slope must have shape \[K\] with K from 1"),
        (torch.zeros(3), 0.0, "bound must be positive, got 0"),
        (torch.zeros(3, device="meta"), 1.0, "raw_slope must be on .*, got meta"),
    ],
)
def test_coefficients_of_plif_refuse(kernels: RowKernels, raw: Tensor, bound: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.plif_coefficients(raw, bound, 0.1)
    with pytest.raises(ValueError, match=message):
        kernels.plif_coefficients_backward(torch.zeros(2, 3), raw, bound, 0.1)
