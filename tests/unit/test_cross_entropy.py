"""ms.cross_entropy: PyTorch's for the identity, and as close to the float64 truth as PyTorch for every transform."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from losses import (
    TRANSFORMS,
    ErrorsBesideThoseOfPyTorch,
    LossCase,
    check_case,
    disturbed,
    loss_and_gradients,
    loss_cases,
)
from torch.nn import functional as F

import monosoftmax as ms

BACKENDS = ["reference", "cpu"]
#: Those of GPUs, "triton" in its interpreter and "cuda" in its host execution, have no float64, and do not look at
#: targets.
WITH_GPU = [*BACKENDS, "triton", "cuda"]
FUSED = ["cpu", "triton", "cuda"]


@pytest.mark.grid
@pytest.mark.parametrize("backend", WITH_GPU)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", [(9,), (6, 9), (4, 9, 3), (2, 9, 3, 2)])
def test_identity_equals_torch(
    backend: Any, reduction: Any, weighted: bool, label_smoothing: float, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    class_dim = 0 if len(shape) == 1 else 1
    input = (3 * torch.randn(shape)).requires_grad_()
    target = torch.randint(0, 9, shape[:class_dim] + shape[class_dim + 1 :])
    if target.dim() > 0:
        target.view(-1)[1] = 4 if len(shape) == 2 else 7
    weight = torch.rand(9) if weighted else None
    options = {"weight": weight, "ignore_index": 7, "label_smoothing": label_smoothing, "reduction": reduction}
    loss = ms.cross_entropy(input, target, backend=backend, **options)
    wanted = F.cross_entropy(input, target, **options)
    torch.testing.assert_close(loss, wanted)
    upstream = torch.rand_like(loss)
    (gradient,) = torch.autograd.grad(loss, input, upstream)
    (wanted_gradient,) = torch.autograd.grad(wanted, input, upstream)
    torch.testing.assert_close(gradient, wanted_gradient)


@pytest.mark.parametrize("case", loss_cases(), ids=str)
def test_loss_cases(case: LossCase) -> None:
    """The cases that tests/gpu has in full size, for the cpu backend: every transform, type, option and alignment."""
    check_case(case.small(), "cpu", "cpu")


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("classes", [1, 7, 33, 1000, 32000, 50257])
def test_cpu_is_as_close_to_the_truth_as_pytorch(name: str, classes: int) -> None:
    """In all shapes, with p next to 1, and with every kind of option."""
    errors = ErrorsBesideThoseOfPyTorch()
    for seed in range(36 if classes <= 1000 else 9):
        generator = torch.Generator().manual_seed(seed)
        transform = disturbed(name, seed)
        input = (0.1, 1.0, 20.0)[seed % 3] * torch.randn(6, classes, generator=generator)
        target = torch.randint(0, classes, (6,), generator=generator)
        target[0] = -100
        input[1, target[1]] += 25  # p next to 1
        input[2] -= 30
        options: dict[str, Any] = [
            {},
            {"label_smoothing": 0.1, "z_loss": 1e-3},
            {"weight": torch.rand(classes, generator=generator) + 0.1, "reduction": "sum"},
        ][seed // 3 % 3]
        truth = loss_and_gradients(input, target, transform, "reference", torch.float64, **options)
        plain = loss_and_gradients(input, target, transform, "reference", **options)
        fused = loss_and_gradients(input, target, transform, "cpu", **options)
        errors.add(fused, plain, truth)
    errors.check()


@pytest.mark.grid
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.2},
        {"z_loss": 0.01},
        {"weight": True},
        {"weight": True, "label_smoothing": 0.2, "z_loss": 0.01},
    ],
)
@pytest.mark.parametrize("classes", [1, 5, 1030])
def test_every_option_in_float64(name: str, reduction: str, options: dict[str, Any], classes: int) -> None:
    """The cpu backend in float64 is the reference, to 1e-12, under random upstream gradients of loss and lse."""
    torch.manual_seed(classes)
    input = 4 * torch.randn(5, classes, dtype=torch.float64)
    target = torch.tensor([0, classes - 1, 3, classes // 2, 0])
    transform = disturbed(name).double()
    if options.get("weight"):
        options = options | {"weight": torch.rand(classes, dtype=torch.float64)}
    upstream = (torch.randn(5 if reduction == "none" else (), dtype=torch.float64), torch.randn(5, dtype=torch.float64))
    if classes > 1:
        options = options | {"ignore_index": 3}
    else:
        target[2] = 0
    results = [
        loss_and_gradients(
            input, target, transform, backend, upstream=upstream, reduction=reduction, return_lse=True, **options
        )
        for backend in BACKENDS
    ]
    for key, wanted in results[0].items():
        scale = wanted.abs().max().item() if wanted.numel() else 1.0
        torch.testing.assert_close(results[1][key], wanted, rtol=1e-12, atol=1e-12 * max(scale, 1e-3), msg=key)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(name: str, dtype: torch.dtype) -> None:
    """Half precision logits give the float32 loss of their values, and its gradient rounded once, bit for bit."""
    torch.manual_seed(0)
    transform = disturbed(name)
    input = (3 * torch.randn(7, 1057)).to(dtype)
    target = torch.randint(0, 1057, (7,))
    half = loss_and_gradients(input, target, transform, "cpu")
    single = loss_and_gradients(input.float(), target, transform, "cpu")
    assert half["loss"].dtype == torch.float32
    assert half["input"].dtype == dtype
    assert torch.equal(half["input"], single["input"].to(dtype))
    for key in half.keys() - {"input"}:
        assert torch.equal(half[key], single[key]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rows_of_any_stride(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    storage = torch.randn(9, 2101).to(dtype)
    target = torch.randint(0, 1041, (9,))
    transform = disturbed("plif")
    views = {
        "slice of columns, unaligned": storage[:, 3:1044],
        "every second row": storage.repeat_interleave(2, 0)[::2, 3:1044],
        "one row, expanded": storage[:1, 3:1044].expand(9, -1),
        "transposed": storage[:, 3:1044].t().contiguous().t(),
        "every second column": storage[:, :2082:2],
    }
    for name, view in views.items():
        before = storage.clone()
        strided = loss_and_gradients(view, target, transform, "cpu")
        dense = loss_and_gradients(view.clone(memory_format=torch.contiguous_format), target, transform, "cpu")
        for key in dense:
            assert torch.equal(strided[key], dense[key]), (name, key)
        assert torch.equal(storage, before)


@pytest.mark.parametrize("backend", FUSED)
def test_target_gradient_next_to_certainty(backend: Any) -> None:
    """p of a certain prediction is off by the rounding of 1, not by that of lse, which is 30 times larger here."""
    input = torch.zeros(1, 5000)
    input[0, 17] = 30.0
    target = torch.tensor([17])
    truth = loss_and_gradients(input, target, None, "reference", torch.float64)
    result = loss_and_gradients(input, target, None, backend)
    torch.testing.assert_close(result["loss"].double(), truth["loss"], rtol=0, atol=6e-8)
    torch.testing.assert_close(result["input"].double(), truth["input"], rtol=0, atol=6e-8)


@pytest.mark.parametrize("backend", WITH_GPU)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_masked_logits(backend: Any, name: str) -> None:
    """Logits of -inf have probability exp(f(-inf) - lse), and every gradient is finite."""
    torch.manual_seed(0)
    input = torch.randn(4, 40)
    input[:, 5:11] = -torch.inf
    input[1, :33] = -torch.inf
    target = torch.tensor([0, 39, 20, 30])
    transform = disturbed(name)
    result = loss_and_gradients(input, target, transform, backend)
    for key, value in result.items():
        assert value.isfinite().all(), key
    assert (result["input"][:, 5:11] == 0).all()
    finite = torch.where(input == -torch.inf, -1e30, input)
    wanted = loss_and_gradients(finite, target, transform, backend)
    torch.testing.assert_close(result["loss"], wanted["loss"])


@pytest.mark.parametrize("backend", WITH_GPU)
def test_special_rows_are_those_of_torch(backend: Any) -> None:
    nan, inf = torch.nan, torch.inf
    input = torch.tensor(
        [[nan, 1.0, 2.0], [inf, 1.0, 2.0], [-inf, -inf, -inf], [-inf, 1.0, 2.0], [0.0, 1.0, 2.0], [1.0, nan, -inf]]
    ).requires_grad_()
    target = torch.tensor([1, 1, 1, 0, 2, 2])
    loss = ms.cross_entropy(input, target, reduction="none", backend=backend)
    wanted = F.cross_entropy(input, target, reduction="none")
    torch.testing.assert_close(loss, wanted, equal_nan=True)
    (gradient,) = torch.autograd.grad(loss.sum(), input)
    (wanted_gradient,) = torch.autograd.grad(wanted.sum(), input)
    torch.testing.assert_close(gradient[4], wanted_gradient[4])
    assert gradient[0].isnan().all() and gradient[1].isnan().any() and gradient[2].isnan().all()


@pytest.mark.parametrize("backend", WITH_GPU)
def test_empty_and_ignored_batches(backend: Any) -> None:
    transform = ms.transforms.PLIF()
    empty = torch.zeros(0, 7, requires_grad=True)
    no_target = torch.zeros(0, dtype=torch.int64)
    assert ms.cross_entropy(empty, no_target, transform, backend=backend).isnan()
    assert ms.cross_entropy(empty, no_target, transform, reduction="sum", backend=backend) == 0
    assert ms.cross_entropy(empty, no_target, transform, reduction="none", backend=backend).shape == (0,)
    ms.cross_entropy(empty, no_target, transform, reduction="sum", backend=backend).backward()
    assert empty.grad is not None and empty.grad.shape == (0, 7)
    assert transform.raw_slope.grad is not None and (transform.raw_slope.grad == 0).all()

    input = torch.full((3, 7), torch.nan)  # ignored rows may hold anything
    target = torch.full((3,), -100)
    assert ms.cross_entropy(input, target, transform, backend=backend).isnan()
    result = loss_and_gradients(input, target, transform, backend, reduction="sum")
    for key, value in result.items():
        assert (value == 0).all(), key
    assert F.cross_entropy(torch.zeros(3, 7), target).isnan()


@pytest.mark.parametrize("backend", WITH_GPU)
def test_ignored_rows_contribute_nothing(backend: Any) -> None:
    torch.manual_seed(0)
    input = torch.randn(6, 11)
    target = torch.tensor([1, -1, 10, -1, 0, 4])
    transform = disturbed("gss")
    result = loss_and_gradients(input, target, transform, backend, ignore_index=-1)
    kept = loss_and_gradients(input[target >= 0], target[target >= 0], transform, backend)
    for key in ("loss", "log_k", "raw_c"):
        torch.testing.assert_close(result[key], kept[key])
    assert (result["input"][target < 0] == 0).all()
    torch.testing.assert_close(result["input"][target >= 0], kept["input"])


@pytest.mark.parametrize("backend", WITH_GPU)
def test_ignore_index_may_be_a_class(backend: Any) -> None:
    input = torch.randn(6, 11)
    target = torch.tensor([1, 3, 10, 3, 0, 4])
    weight = torch.rand(11)
    loss = ms.cross_entropy(input, target, weight=weight, ignore_index=3, backend=backend)
    torch.testing.assert_close(loss, F.cross_entropy(input, target, weight=weight, ignore_index=3))


@pytest.mark.parametrize("backend", WITH_GPU)
def test_lse_of_ignored_rows(backend: Any) -> None:
    input = torch.randn(4, 9, requires_grad=True)
    target = torch.tensor([1, -100, 2, -100])
    loss, lse = ms.cross_entropy(input, target, return_lse=True, reduction="none", backend=backend)
    torch.testing.assert_close(lse, input.logsumexp(1))
    (gradient,) = torch.autograd.grad(lse.sum(), input)
    torch.testing.assert_close(gradient, input.softmax(1))
    assert (loss[target < 0] == 0).all()


@pytest.mark.parametrize("name", TRANSFORMS)
def test_loss_is_shift_invariant(name: str) -> None:
    """A constant added to f changes nothing: the gradients of y, summed over a row, are 0."""
    transform = disturbed(name).double()
    input = torch.randn(3, 50, dtype=torch.float64, requires_grad=True)
    y = transform(input)
    for backend in BACKENDS:
        loss = ms.cross_entropy(y, torch.tensor([0, 1, 2]), backend=backend, label_smoothing=0.1)
        (gradient,) = torch.autograd.grad(loss, y, retain_graph=True)
        torch.testing.assert_close(gradient.sum(1), torch.zeros(3, dtype=torch.float64), atol=1e-15, rtol=0)
        torch.testing.assert_close(
            ms.cross_entropy(y + 13.0, torch.tensor([0, 1, 2]), backend=backend, label_smoothing=0.1), loss
        )


@pytest.mark.grid
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("needs_input", [False, True])
@pytest.mark.parametrize("needs_transform", [False, True])
@pytest.mark.parametrize("backend", FUSED)
def test_requires_grad_combinations(backend: Any, name: str, needs_input: bool, needs_transform: bool) -> None:
    transform = disturbed(name).requires_grad_(needs_transform)
    input = torch.randn(4, 30, requires_grad=needs_input)
    target = torch.tensor([0, 5, 29, 3])
    loss = ms.cross_entropy(input, target, transform, backend=backend)
    differentiable = needs_input or any(p.requires_grad for p in transform.parameters())
    assert loss.requires_grad == differentiable
    if not differentiable:
        return
    loss.backward()
    whole = loss_and_gradients(input, target, transform.requires_grad_(), backend)
    if needs_input:
        assert torch.equal(input.grad, whole["input"])  # type: ignore[arg-type]
    else:
        assert input.grad is None
    for key, parameter in transform.named_parameters():
        if needs_transform:
            assert torch.equal(parameter.grad, whole[key]), key  # type: ignore[arg-type]
        else:
            assert parameter.grad is None


@pytest.mark.parametrize("backend", FUSED)
def test_same_result_twice(backend: Any) -> None:
    torch.manual_seed(0)
    rows = 8 if backend == "triton" else 64
    input, target = torch.randn(rows, 3000), torch.randint(0, 3000, (rows,))
    transform = disturbed("plif")
    first, second = (loss_and_gradients(input, target, transform, backend) for _ in range(2))
    for key in first:
        assert torch.equal(first[key], second[key]), key


def test_reference_is_twice_differentiable() -> None:
    torch.manual_seed(0)
    input = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([1, -100, 4])
    for name in TRANSFORMS:
        transform = disturbed(name, num_pieces=4, bound=3.0) if name == "plif" else disturbed(name)
        transform.double()

        def loss(z: torch.Tensor, transform: Any = transform) -> torch.Tensor:
            result: torch.Tensor = ms.cross_entropy(
                z, target, transform, label_smoothing=0.1, z_loss=0.01, backend="reference"
            )
            return result

        assert torch.autograd.gradcheck(loss, (input,))
        assert torch.autograd.gradgradcheck(loss, (input,))


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_log_softmax(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    input = (3 * torch.randn(2, 3, 1031)).to(dtype)
    transform = disturbed(name)
    outputs = {}
    for backend in BACKENDS:
        leaf = input.clone().requires_grad_()
        output = ms.log_softmax(leaf, transform, backend=backend)
        assert output.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert output.shape == input.shape
        upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
        gradients = torch.autograd.grad(output, [leaf, *transform.parameters()], upstream)
        outputs[backend] = (output.detach(), *gradients)
    torch.testing.assert_close(outputs["cpu"][0].exp().sum(-1), torch.ones(2, 3).to(outputs["cpu"][0]))
    for got, wanted in zip(outputs["cpu"], outputs["reference"], strict=True):
        scale = wanted.abs().max().item()
        tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}[wanted.dtype]
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.grid
@pytest.mark.parametrize("backend", WITH_GPU)
@pytest.mark.parametrize("out", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_log_softmax_dtype_is_rounded_once(backend: Any, dtype: torch.dtype, out: torch.dtype) -> None:
    torch.manual_seed(0)
    input = torch.randn(3, 77).to(dtype).requires_grad_()
    refused = {"triton": (dtype,), "cuda": (dtype, out)}.get(backend, ())
    if torch.float64 in refused:
        with pytest.raises(ValueError, match=f'backend="{backend}" cannot take this call: .*float64'):
            ms.log_softmax(input, dtype=out, backend=backend)
        return
    result = ms.log_softmax(input, dtype=out, backend=backend)
    assert torch.equal(result, ms.log_softmax(input, backend=backend).to(out))
    # An upstream gradient is of the type of the result.
    upstream = torch.randn(3, 77).to(out)
    (gradient,) = torch.autograd.grad(result, input, upstream)
    wide = input.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(ms.log_softmax(wide, backend="reference"), wide, upstream.double())
    torch.testing.assert_close(gradient, wanted.to(dtype))


@pytest.mark.parametrize("backend", WITH_GPU)
@pytest.mark.parametrize("leading", [(), (4,), (2, 3)])
def test_linear_cross_entropy(backend: Any, leading: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    transform = disturbed("sigmoid_cap")
    leaves = [torch.randn(*leading, 5), torch.randn(30, 5), torch.randn(30)]
    target = torch.randint(0, 30, leading)

    def run(fused: bool) -> tuple[torch.Tensor, ...]:
        input, weight, bias = (leaf.clone().requires_grad_() for leaf in leaves)
        if fused:
            loss = ms.linear_cross_entropy(
                input, weight, target, transform, linear_bias=bias, label_smoothing=0.1, backend=backend
            )
        else:
            logits = F.linear(input, weight, bias).reshape(-1, 30)
            loss = F.cross_entropy(transform(logits), target.reshape(-1), label_smoothing=0.1)
        return (loss, *torch.autograd.grad(loss, [input, weight, bias, *transform.parameters()]))

    for got, wanted in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(got, wanted)
