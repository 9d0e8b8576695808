"""ms.cross_entropy of class probabilities: PyTorch's for the identity, and right to float64 for every transform."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from losses import TRANSFORMS, ErrorsBesideThoseOfPyTorch, distance, disturbed, loss_and_gradients
from operator_calls import PLAIN, check_row_kernels, kernel_transform, opcheck
from torch import Tensor
from torch.nn import functional as F

import monosoftmax as ms
from monosoftmax import ops
from monosoftmax.groups import LossOptions, Transform

BACKENDS = ["reference", "cpu"]
CLASSES = 41


def probabilities(rows: int, classes: int, seed: int = 0, concentration: float = 0.2) -> Tensor:
    """Draws of a Dirichlet distribution in float32, from nearly certain to nearly uniform, the second row one-hot."""
    generator = torch.Generator().manual_seed(seed)
    # A power of a uniform number is a gamma variable, to the precision that peaked targets need.
    target = torch.rand(rows, classes, generator=generator).pow(1 / concentration).clamp(min=1e-30)
    target = target / target.sum(1, keepdim=True)
    if rows > 1:
        target[1] = 0
        target[1, -1 - seed % classes] = 1
    return target


def plain_loss(
    z: Tensor, target: Tensor, transform: Any, weight: Tensor | None, label_smoothing: float, z_loss: float
) -> Tensor:
    """The mean over the rows, as the formula has it."""
    y = z if transform is None else transform(z)
    lse = torch.log(torch.exp(y - y.amax(1, keepdim=True)).sum(1)) + y.amax(1)
    q = (1 - label_smoothing) * target + label_smoothing / z.shape[1]
    q = q if weight is None else q * weight
    return ((q * (lse[:, None] - y)).sum(1) + z_loss * lse**2).mean()


@pytest.mark.grid
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", [(9,), (1,), (6, 9), (4, 9, 3), (2, 9, 3, 2), (0, 9), (2, 9, 0)])
def test_identity_equals_torch(
    backend: Any, reduction: Any, weighted: bool, label_smoothing: float, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    input = (3 * torch.randn(shape)).requires_grad_()
    target = torch.rand(shape).pow(5)
    weight = torch.rand(shape[0] if len(shape) == 1 else shape[1]) if weighted else None
    options: dict[str, Any] = {"weight": weight, "label_smoothing": label_smoothing, "reduction": reduction}
    loss = ms.cross_entropy(input, target, backend=backend, **options)
    wanted = F.cross_entropy(input, target, **options)
    assert loss.shape == wanted.shape
    torch.testing.assert_close(loss, wanted, equal_nan=True)
    upstream = torch.rand_like(loss)
    (gradient,) = torch.autograd.grad(loss, input, upstream)
    (wanted_gradient,) = torch.autograd.grad(wanted, input, upstream)
    torch.testing.assert_close(gradient, wanted_gradient)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lse_has_the_shape_of_the_rows(backend: Any) -> None:
    input, target = torch.randn(4, 9, 3), torch.rand(4, 9, 3)
    loss, lse = ms.cross_entropy(input, target, return_lse=True, reduction="none", backend=backend)
    assert loss.shape == lse.shape == (4, 3)
    torch.testing.assert_close(lse, input.logsumexp(1))
    _, lse = ms.cross_entropy(input[0, :, 0], target[0, :, 0], return_lse=True, backend=backend)
    torch.testing.assert_close(lse, input[0, :, 0].logsumexp(0))


@pytest.mark.grid
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("options", [(False, 0.0, 0.0), (True, 0.1, 0.02)])
def test_gradients_of_the_plain_formula(backend: Any, name: str, options: tuple[bool, float, float]) -> None:
    """In float64, for every transform: the gradients of logits and parameters are those of autograd of the formula."""
    torch.manual_seed(1)
    weighted, label_smoothing, z_loss = options
    weight = torch.rand(CLASSES, dtype=torch.float64) if weighted else None
    transform = disturbed(name).double()
    input = 3 * torch.randn(6, CLASSES, dtype=torch.float64)
    target = probabilities(6, CLASSES).double()
    leaf = input.clone().requires_grad_()
    loss = plain_loss(leaf, target, transform, weight, label_smoothing, z_loss)
    parameters = dict(transform.named_parameters())
    gradients = torch.autograd.grad(loss, [leaf, *parameters.values()])
    wanted = {"loss": loss.detach()} | dict(zip(["input", *parameters], gradients, strict=True))
    got = loss_and_gradients(
        input, target, transform, backend, weight=weight, label_smoothing=label_smoothing, z_loss=z_loss
    )
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        assert value.abs().max() > 0, key
        torch.testing.assert_close(got[key], value, rtol=1e-11, atol=1e-13, msg=key)


@pytest.mark.grid
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("classes", [1, 7, 31, 1023, 2049])
def test_the_cpu_backend_in_float64_is_the_reference(name: str, reduction: str, classes: int) -> None:
    """To 1e-12, under random upstream gradients of loss and lse, without options and with all of them."""
    torch.manual_seed(classes)
    input = 4 * torch.randn(4, classes, dtype=torch.float64)
    target = probabilities(4, classes, classes).double()
    target[3] *= 1.7
    transform = disturbed(name).double()
    every_option = {
        "weight": torch.rand(classes, dtype=torch.float64), "label_smoothing": 0.2, "z_loss": 0.01, "return_lse": True,
    }  # fmt: skip
    upstream = torch.randn(4 if reduction == "none" else (), dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    for options in ({}, every_option):
        wanted, got = (
            loss_and_gradients(
                input, target, transform, backend, upstream=upstream[: 1 + len(options) // 4], reduction=reduction,
                **options,
            )
            for backend in BACKENDS
        )  # fmt: skip
        for key, value in wanted.items():
            scale = value.abs().max().item() if value.numel() else 1.0
            torch.testing.assert_close(got[key], value, rtol=1e-12, atol=1e-12 * max(scale, 1e-3), msg=key)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_as_close_to_the_truth_as_pytorch(name: str) -> None:
    """In float32, with p next to 1, certain and uncertain targets, and with every kind of option."""
    errors, classes = ErrorsBesideThoseOfPyTorch(), 4097
    for seed in range(9):
        generator = torch.Generator().manual_seed(seed)
        transform = disturbed(name, seed)
        input = (0.1, 1.0, 20.0)[seed % 3] * torch.randn(6, classes, generator=generator)
        target = probabilities(6, classes, seed, 1.0 if seed % 2 else 0.02)
        input[1, target[1].argmax()] += 25  # p next to 1
        input[2] -= 30
        options: dict[str, Any] = [
            {},
            {"label_smoothing": 0.1, "z_loss": 1e-3},
            {"weight": torch.rand(classes, generator=generator) + 0.1, "reduction": "sum"},
        ][seed // 3 % 3]
        truth = loss_and_gradients(input, target, transform, "reference", torch.float64, **options)
        plain = loss_and_gradients(input, target, transform, "reference", **options)
        errors.add(loss_and_gradients(input, target, transform, "cpu", **options), plain, truth)
    errors.check()


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(name: str, dtype: torch.dtype) -> None:
    """Logits in half precision give the float32 loss of their values, and its gradient rounded once, bit for bit."""
    torch.manual_seed(0)
    transform = disturbed(name)
    input, target = (3 * torch.randn(7, 1057)).to(dtype), probabilities(7, 1057)
    half = loss_and_gradients(input, target, transform, "cpu")
    single = loss_and_gradients(input.float(), target, transform, "cpu")
    assert half["loss"].dtype == torch.float32 and half["input"].dtype == dtype
    assert torch.equal(half["input"], single["input"].to(dtype))
    for key in half.keys() - {"input"}:
        assert torch.equal(half[key], single[key]), key


@pytest.mark.grid
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("of_input", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("of_target", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_targets_of_every_dtype(backend: Any, of_input: torch.dtype, of_target: torch.dtype) -> None:
    """They are what they are in the type of the arithmetic, bit for bit."""
    input, target = torch.randn(5, 1030).to(of_input), probabilities(5, 1030).to(of_target)
    arithmetic = torch.float64 if of_input == torch.float64 else torch.float32
    got = loss_and_gradients(input, target, disturbed("plif").to(arithmetic), backend)
    wanted = loss_and_gradients(input, target.to(arithmetic), disturbed("plif").to(arithmetic), backend)
    assert got["loss"].dtype == arithmetic
    for key, value in wanted.items():
        assert torch.equal(got[key], value), key


def test_rows_of_any_stride() -> None:
    torch.manual_seed(0)
    storage, targets = torch.randn(9, 2101), torch.rand(9, 2101)
    transform = disturbed("plif")
    views = {
        "slice of columns": lambda x: x[:, 3:1044],
        "one row, expanded": lambda x: x[:1, 3:1044].expand(9, -1),
        "transposed": lambda x: x[:, 3:1044].t().contiguous().t(),
        "every second column": lambda x: x[:, :2082:2],
        "classes before the last dimension": lambda x: x[:, :2100].view(9, 300, 7),
    }
    for name, view in views.items():
        z, t = view(storage), view(targets)
        dense = loss_and_gradients(z.clone(memory_format=torch.contiguous_format), t.contiguous(), transform, "cpu")
        strided = loss_and_gradients(z, t, transform, "cpu")
        for key in dense:
            assert torch.equal(strided[key], dense[key]), (name, key)


@pytest.mark.grid
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_one_hot_probabilities_are_the_index(backend: Any, name: str, label_smoothing: float) -> None:
    torch.manual_seed(0)
    input, index = 3 * torch.randn(6, 1030, dtype=torch.float64), torch.randint(0, 1030, (6,))
    target = F.one_hot(index, 1030).double()
    options = {"label_smoothing": label_smoothing, "z_loss": 1e-3, "reduction": "sum"}
    options |= {"weight": torch.rand(1030, dtype=torch.float64)}
    transform = disturbed(name).double()
    soft, hard = (loss_and_gradients(input, each, transform, backend, **options) for each in (target, index))
    for key, value in hard.items():
        scale = value.abs().max().item() if value.numel() else 1.0
        torch.testing.assert_close(soft[key], value, rtol=1e-11, atol=1e-12 * scale, msg=key)


@pytest.mark.parametrize("name", ["gss", "sigmoid_cap", "monotonic_mlp"])
def test_one_hot_probabilities_are_as_precise_as_the_index(name: str) -> None:
    """The one large part of a parameter's gradient is not rounded with the many small ones that it nearly cancels."""
    errors = []
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        input = torch.randn(4, 20011, generator=generator)
        index = torch.randint(0, 20011, (4,), generator=generator)
        transform = disturbed(name, seed)
        truth = loss_and_gradients(input, index, transform, "cpu", torch.float64)
        hard = loss_and_gradients(input, index, transform, "cpu")
        soft = loss_and_gradients(input, F.one_hot(index, 20011).float(), transform, "cpu")
        for key in truth.keys() - {"loss", "input"}:
            errors.append([distance(each[key], truth[key]) / truth[key].norm().item() for each in (hard, soft)])
    of_hard, of_soft = (statistics.median(column) for column in zip(*errors, strict=True))
    assert of_soft <= 1.4 * of_hard, (of_soft, of_hard)


@pytest.mark.parametrize("backend", BACKENDS)
def test_next_to_certainty(backend: Any) -> None:
    """p of a certain prediction is off by the rounding of 1, not by that of lse, which is 30 times larger here."""
    input, target = torch.zeros(1, 5000), torch.zeros(1, 5000)
    input[0, 17], target[0, 17] = 30.0, 1.0
    truth = loss_and_gradients(input, target, None, "reference", torch.float64)
    result = loss_and_gradients(input, target, None, backend)
    torch.testing.assert_close(result["loss"].double(), truth["loss"], rtol=0, atol=6e-8)
    torch.testing.assert_close(result["input"].double(), truth["input"], rtol=0, atol=6e-8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_masked_classes(backend: Any, name: str) -> None:
    """A logit of -inf whose class has no share of the target adds nothing, wherever PyTorch gives NaN."""
    torch.manual_seed(0)
    transform = disturbed(name).double()
    input, target = 2 * torch.randn(4, 2500, dtype=torch.float64), probabilities(4, 2500).double()
    masked = torch.zeros(4, 2500, dtype=torch.bool)
    masked[:, :1100] = True  # the first tile of the kernels, and more
    masked[2, 1500:1600] = True
    target = target.masked_fill(masked, 0.0)
    input = input.masked_fill(masked, -torch.inf)
    assert F.cross_entropy(input, target).isnan()
    got = loss_and_gradients(input, target, transform, backend, reduction="none", upstream=(torch.ones(4).double(),))
    for key, value in got.items():
        assert value.isfinite().all(), key
    if not transform.bounded_below:
        # Masked classes are none: each row is that of the others alone.
        for row in range(4):
            alone = input[row, ~masked[row]][None], target[row, ~masked[row]][None]
            wanted = loss_and_gradients(*alone, transform, "reference")
            torch.testing.assert_close(got["loss"][row], wanted["loss"], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(got["input"][row, ~masked[row]], wanted["input"][0], rtol=1e-11, atol=1e-13)
            assert (got["input"][row, masked[row]] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_a_distribution(backend: Any) -> None:
    input, target = torch.randn(5, 2500), probabilities(5, 2500)
    input[0] = -torch.inf
    input[1, 1700] = torch.nan
    input[2, 3] = torch.inf
    input[3, 1200] = -torch.inf  # with a share of the target
    target[3, 1200] = 0.5
    target[4] = 0
    result = loss_and_gradients(
        input, target, disturbed("gss"), backend, reduction="none", upstream=(torch.ones(5),), weight=torch.ones(2500)
    )
    assert result["loss"].isnan().tolist() == [True, True, True, False, False]
    assert result["loss"][3] == torch.inf and result["loss"][4] == 0
    assert result["input"].isnan().any(1).tolist() == [True, True, True, False, False]
    assert (result["input"][4] == 0).all()
    # A NaN of the target reaches the loss, too.
    target[4, 2000] = torch.nan
    loss = ms.cross_entropy(input, target, reduction="none", backend=backend)
    assert loss[4].isnan()


def test_columns_are_shared_where_rows_are_few() -> None:
    torch.manual_seed(0)
    input, target = 3 * torch.randn(2, 12345, dtype=torch.float64), probabilities(2, 12345).double()
    input[:, :4000] = -torch.inf
    target[:, :4000] = 0
    options = {"weight": torch.rand(12345, dtype=torch.float64), "z_loss": 1e-3, "return_lse": True}
    for name in TRANSFORMS:
        results = []
        for threads in (1, 3, 4, 4):
            torch.set_num_threads(threads)
            results.append(loss_and_gradients(input, target, disturbed(name).double(), "cpu", **options))
        for key, wanted in results[0].items():
            scale = wanted.abs().max().item() if wanted.numel() else 1.0
            for result in results[1:]:
                torch.testing.assert_close(result[key], wanted, rtol=1e-11, atol=1e-12 * max(scale, 1e-3), msg=key)
            assert torch.equal(results[2][key], results[3][key]), key


@pytest.mark.parametrize("name", TRANSFORMS)
def test_gradcheck_of_the_reference(name: str) -> None:
    """Also of the target's gradient, and of the gradients' own."""
    torch.manual_seed(0)
    transform = disturbed(name).double()
    input = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    target = torch.rand(2, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(5, dtype=torch.float64)

    def call(input: Tensor, target: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        return ms.cross_entropy(
            input, target, transform, weight=weight, label_smoothing=0.1, z_loss=0.05, reduction="none", return_lse=True
        )

    leaves = (input, target, *transform.parameters())
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, (input, target), fast_mode=True)


def test_gradient_of_the_target() -> None:
    """PyTorch's, and 0 where log p = -inf and there is no share of the target."""
    input, target = torch.randn(3, 7), torch.rand(3, 7)
    target[0, 2] = 0
    leaf, other = target.clone().requires_grad_(), target.clone().requires_grad_()
    assert ms.backends.explain("cross_entropy", input, target=leaf).backend == "reference"
    ms.cross_entropy(input, leaf).backward()
    F.cross_entropy(input, other).backward()
    torch.testing.assert_close(leaf.grad, other.grad)
    torch.testing.assert_close(torch.func.grad(lambda t: ms.cross_entropy(input, t))(target), other.grad)
    input[0, 2] = -torch.inf
    (gradient,) = torch.autograd.grad(ms.cross_entropy(input, leaf), leaf)
    assert gradient[0, 2] == 0 and gradient.isfinite().all()
    with torch.no_grad():
        assert ms.backends.explain("cross_entropy", input, target=leaf).backend == "cpu"
        assert ms.cross_entropy(input, leaf, backend="cpu").isfinite()


LOGITS = torch.randn(4, 9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target": torch.rand(4, 8)}, ValueError, r"shape of input, \(4, 9\), where.*float32.*got \(4, 8\)"),
        ({"target": torch.rand(4)}, ValueError, r"shape of input, \(4, 9\), where.*got \(4,\)"),
        ({"target": torch.rand(4, 9, device="meta")}, ValueError, "target must be on cpu like input, got meta"),
        ({"target": torch.rand(4, 9).to(torch.float8_e5m2)}, TypeError, "target must be float32.*float8"),
        ({"target": torch.rand(4, 9).to(torch.complex64)}, TypeError, "target must be int64.*complex64"),
        ({"target": torch.rand(4, 9).to_sparse()}, NotImplementedError, "target must be a dense tensor"),
        ({"ignore_index": 3}, ValueError, "ignore_index must be left at its default, -100.*got 3"),
        ({"ignore_index": -1}, ValueError, "ignore_index must be left at its default, -100.*got -1"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index must be an int, got float"),
        ({"weight": torch.rand(8)}, ValueError, r"weight must have shape \(9,\), got \(8,\)"),
    ],
)
def test_refusals(backend: Any, change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"input": LOGITS, "target": torch.rand(4, 9)} | change
    with pytest.raises(error, match=message):
        ms.cross_entropy(**arguments, backend=backend)


def test_who_takes_them() -> None:
    target = torch.rand(4, 9)
    assert ms.backends.explain("cross_entropy", LOGITS, target=target).backend == "cpu"
    reason = "it does not differentiate with respect to class probabilities, target requires a gradient"
    explanation = ms.backends.explain("cross_entropy", LOGITS, target=target.clone().requires_grad_())
    assert explanation.backend == "reference" and explanation.refused == {"cpu": reason}
    with pytest.raises(ValueError, match=f'backend="cpu" cannot take this call: {reason}'):
        ms.cross_entropy(LOGITS, target.clone().requires_grad_(), backend="cpu")
    with pytest.raises(ValueError, match="target must not require a gradient"):
        leaf, identity = target.clone().requires_grad_(), Transform(torch.empty(0), "identity", [])
        ops.cross_entropy(
            ops.CrossEntropy("cpu", LOGITS, leaf, identity, PLAIN, reduction="none", output_mask=(False, False))
        )
    call = ms.backends.Call("cross_entropy", "cuda", torch.float32, ms.transforms.Identity(), target_kind="indices")
    soft = ms.backends.Call(
        "cross_entropy", "cuda", torch.float32, ms.transforms.Identity(), target_kind="probabilities"
    )
    for name in ("triton", "cuda"):
        backend = ms.backends._BACKENDS[name]
        assert backend.refusal(call) is None and backend.refusal(soft) is None
        assert reason in str(backend.refusal(soft._replace(target_kind="differentiated probabilities")))
    for operation in ("linear_token_statistics", "log_softmax"):
        with pytest.raises(ValueError, match="target must be class indices"):
            ms.backends.explain(operation, LOGITS, target=target)  # type: ignore[arg-type]


def test_statistics_and_modules_refuse_them() -> None:
    hidden, weight, target = torch.randn(4, 5), torch.randn(9, 5), torch.rand(4, 9)
    layer = ms.MonotonicSoftmax(5, 9)
    for call in (
        lambda: ms.linear_token_statistics(hidden, weight, target),
        lambda: layer(hidden, target),
    ):
        with pytest.raises(NotImplementedError, match=r"(?i)class probabilities are for monosoftmax"):
            call()


def test_module() -> None:
    target = torch.rand(4, 9)
    loss = ms.MonotonicCrossEntropyLoss(label_smoothing=0.1, weight=torch.rand(9))
    torch.testing.assert_close(
        loss(LOGITS, target), F.cross_entropy(LOGITS, target, label_smoothing=0.1, weight=loss.weight)
    )


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("name", "options"),
    [("identity", PLAIN), ("plif", LossOptions(torch.linspace(0.1, 1.0, CLASSES), -100, 0.1, 0.01, True))],
    ids=["plain", "all"],
)
def test_opcheck(name: str, options: LossOptions) -> None:
    """The operators of class indices take class probabilities."""
    torch.manual_seed(0)
    transform = kernel_transform(disturbed(name), requires_grad=True)
    below = transform._replace(coefficients=transform.coefficients.detach())
    input, target = torch.randn(6, CLASSES).requires_grad_(), probabilities(6, CLASSES)
    call = ops.CrossEntropy("cpu", input, target, transform, options, reduction="none", output_mask=(False, False))
    for reduction in ("none", "mean", "sum"):
        opcheck(call._replace(reduction=reduction))
    row_stats = ops.cross_entropy(call).row_stats.detach()
    assert row_stats.shape == (3, 6)
    backward = ops.CrossEntropyBackward(
        backend="cpu",
        grad_loss=torch.rand(6),
        grad_lse=torch.rand(6) if options.return_lse else None,
        input=input.detach(),
        target=target,
        transform=below,
        options=options,
        row_stats=row_stats,
        output_mask=(True, True),
    )
    for mask in [(True, True), (True, False), (False, True)]:
        opcheck(call._replace(input=input.detach(), transform=below, reduction="mean", output_mask=mask))
        opcheck(call._replace(reduction="mean", output_mask=mask))
        opcheck(backward._replace(output_mask=mask))
    check_row_kernels("cpu", input.detach(), target, below, options)


@pytest.mark.seconds
def test_compiled() -> None:
    transform = disturbed("plif")
    torch._dynamo.reset()

    def loss(z: Tensor, t: Tensor) -> Tensor:
        result: Tensor = ms.cross_entropy(z, t, transform, label_smoothing=0.1, z_loss=0.01, backend="cpu")
        return result

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (6, 9):
        input, target = torch.randn(rows, CLASSES).requires_grad_(), probabilities(rows, CLASSES)
        wanted = torch.autograd.grad(loss(input, target), [input, *transform.parameters()])
        got = torch.autograd.grad(compiled(input, target), [input, *transform.parameters()])
        for a, b in zip(got, wanted, strict=True):
            assert torch.equal(a, b)


@pytest.mark.seconds
def test_func_transforms() -> None:
    """func.grad is right, and so is torch.compile of it, where a common pattern silently gives zeros."""
    input, target = torch.randn(6, CLASSES), probabilities(6, CLASSES)
    transform = disturbed("plif", num_pieces=16, bound=4.0)
    wanted = loss_and_gradients(input, target, transform, "cpu")["input"]

    def loss(z: Tensor) -> Tensor:
        result: Tensor = ms.cross_entropy(z, target, transform, backend="cpu")
        return result

    assert wanted.abs().max() > 0
    torch.testing.assert_close(torch.func.grad(loss)(input), wanted)
    torch._dynamo.reset()
    gradient = torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")(input)
    torch.testing.assert_close(gradient, wanted)


def test_double_backward_raises() -> None:
    input = torch.randn(6, CLASSES).requires_grad_()
    loss = ms.cross_entropy(input, probabilities(6, CLASSES), disturbed("gss"), backend="cpu").square()
    (gradient,) = torch.autograd.grad(loss, input, create_graph=True)
    with pytest.raises(RuntimeError, match='double backward; use backend="reference"'):
        gradient.sum().backward()


def test_the_gradient_of_a_mean_is_computed_with_the_loss() -> None:
    """And nothing of the size of the logits is saved but the logits, their targets and that gradient."""
    input, target = torch.randn(6, CLASSES).requires_grad_(), probabilities(6, CLASSES)
    saved: list[Tensor] = []
    with (
        torch.profiler.profile() as profile,
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),  # type: ignore[func-returns-value]
    ):
        loss = ms.cross_entropy(input, target, ms.transforms.PLIF())
        large = {t.data_ptr() for t in saved if t.numel() >= input.numel()}
        gradient = loss.grad_fn.saved_tensors[-2]  # type: ignore[union-attr]
        loss.backward()
    names = {event.name for event in profile.events()}  # type: ignore[union-attr]
    assert "monosoftmax::cross_entropy" in names and "monosoftmax::cross_entropy_backward" not in names
    assert gradient.shape == input.shape and large == {each.data_ptr() for each in (input, target, gradient)}
