"""ms.linear_cross_entropy: values and gradients for every chunk, option, dtype and subset of gradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from losses import COMPILERS, TRANSFORMS, distance, disturbed, head_loss_and_gradients
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import monosoftmax as ms
from monosoftmax import head_products

BACKENDS: list[Any] = ["reference", "cpu"]
N, D, V = 7, 5, 33
PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "mkldnn::_linear_pointwise"}


@pytest.fixture
def chunks_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda rows: monkeypatch.setattr(head_products, "chunk_rows", lambda *_: rows)


@pytest.fixture
def thin_chunks(chunks_of: Callable[[int], None]) -> Iterator[None]:
    """Chunks of 3 rows, so that 7 rows are 2 whole ones and a part."""
    chunks_of(3)
    yield


def head_of(rows: int = N, features: int = D, classes: int = V, bias: bool = True, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "input": torch.randn(rows, features, generator=generator, dtype=torch.float64),
        "linear_weight": torch.randn(classes, features, generator=generator, dtype=torch.float64),
        "linear_bias": torch.randn(classes, generator=generator, dtype=torch.float64) if bias else None,
    }


def targets_of(rows: int = N, classes: int = V, ignored: int = 4) -> Tensor:
    target = torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(1))
    if rows > ignored:
        target[ignored] = -100
    return target


def assert_same(results: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    for key, value in wanted.items():
        scale = max(value.abs().max().item() if value.numel() else 0.0, 1e-3)
        torch.testing.assert_close(results[key], value, rtol=tolerance, atol=tolerance * scale, msg=key)


# --- values and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.grid
@pytest.mark.usefixtures("thin_chunks")
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"label_smoothing": 0.2}, {"z_loss": 0.01}, {"label_smoothing": 0.2, "z_loss": 0.01, "weight": True}],
)
def test_every_option_in_float64(
    name: str, reduction: str, return_lse: bool, bias: bool, options: dict[str, Any]
) -> None:
    """Over several chunks the cpu backend is the reference, to 1e-12, under random upstream gradients."""
    head, target, transform = head_of(bias=bias), targets_of(), disturbed(name).double()
    torch.manual_seed(0)  # the gradient of a scalar is a sum that cancels, with some upstream gradients to nothing
    if options.get("weight"):
        options = options | {"weight": torch.rand(V, dtype=torch.float64)}
    upstream = (torch.randn(N if reduction == "none" else (), dtype=torch.float64),)
    if return_lse:
        upstream += (torch.randn(N, dtype=torch.float64),)
    options = options | {"reduction": reduction, "return_lse": return_lse, "upstream": upstream}
    wanted, got = (head_loss_and_gradients(head, target, transform, each, **options) for each in BACKENDS)
    assert_same(got, wanted)


@pytest.mark.grid
@pytest.mark.parametrize("rows", [1, 2, 6, 7, 8])
@pytest.mark.parametrize("chunk", [1, 2, 3, 6, 7, 8, 1000])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_every_chunk_size_gives_the_same(
    chunks_of: Callable[[int], None], rows: int, chunk: int, reduction: str
) -> None:
    head, target, transform = head_of(rows), targets_of(rows), disturbed("plif", num_pieces=16, bound=4.0).double()
    wanted = head_loss_and_gradients(head, target, transform, "reference", reduction=reduction)
    chunks_of(chunk)
    assert_same(head_loss_and_gradients(head, target, transform, "cpu", reduction=reduction), wanted)


@pytest.mark.grid
@pytest.mark.parametrize("name", ["identity", "plif", "spline"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("wide", [False, True])
def test_as_close_to_the_truth_as_pytorch(
    chunks_of: Callable[[int], None], monkeypatch: pytest.MonkeyPatch,
    name: str, dtype: torch.dtype, reduction: str, wide: bool,
) -> None:  # fmt: skip
    """At most 1.5 times the relative error of the reference in the same dtype, whichever way products are done.

    4 chunks of 50 rows; 5000 classes are three blocks. The float16 gradients of a mean are held to float32's scale.
    """
    monkeypatch.setattr(head_products, "_has_fast_products", lambda _: not wide)
    if wide and dtype == torch.float32:
        pytest.skip("float32 is not widened")
    rows, classes = 200, 5000
    head = {key: each.to(dtype).double() for key, each in head_of(rows, 16, classes).items()}
    head["linear_weight"] = (0.5 * head["linear_weight"]).to(dtype).double()
    target, transform = targets_of(rows, classes), disturbed(name)
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": 0.1}
    if reduction == "none":
        options["upstream"] = (torch.rand(rows) / rows,)
    truth = head_loss_and_gradients(head, target, transform, "reference", torch.float64, **options)
    plain = head_loss_and_gradients(head, target, transform, "reference", dtype, **options)
    chunks_of(50)
    fused = head_loss_and_gradients(head, target, transform, "cpu", dtype, **options)
    for key, value in truth.items():
        assert fused[key].dtype == plain[key].dtype, key
        of_fused, of_plain = (distance(each[key], value) / value.norm().item() for each in (fused, plain))
        assert of_fused <= 1.5 * of_plain + 1e-6, (key, of_fused, of_plain)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("weighted", [False, True])
def test_float16_gradients_do_not_underflow(chunks_of: Callable[[int], None], reduction: str, weighted: bool) -> None:
    """1/N of a probability is below float16's 6e-8 here; a scaled loss gets its gradients back nevertheless."""
    chunks_of(100)
    rows, classes = 300, 2000
    head = {key: each.half().double() for key, each in head_of(rows, 16, classes).items()}
    head["linear_weight"] = head["linear_weight"] / 16
    target, transform = targets_of(rows, classes), disturbed("plif")
    options: dict[str, Any] = {"reduction": reduction}
    if weighted:
        options["weight"] = 1e-6 + 1e-6 * torch.rand(classes)
    loss_scale = 65536.0
    options["upstream"] = (torch.full((rows,), loss_scale / rows) if reduction == "none" else torch.tensor(loss_scale),)
    truth = head_loss_and_gradients(head, target, transform, "reference", torch.float64, **options)
    fused = head_loss_and_gradients(head, target, transform, "cpu", torch.float16, **options)
    for key in ("input", "linear_weight", "linear_bias", "raw_slope"):
        bound = 2e-3 if not (weighted and reduction == "none") or key == "raw_slope" else 0.1
        assert distance(fused[key], truth[key]) <= bound * truth[key].norm(), key


def test_gradient_of_the_weight_is_summed_in_float32(chunks_of: Callable[[int], None]) -> None:
    """512 chunks of one row with the same gradient: a sum of 0.75s in bfloat16 stops growing at 256."""
    chunks_of(1)
    weight, bias = (torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True) for shape in ((4, 1), (4,)))
    ms.linear_cross_entropy(
        torch.ones(512, 1, dtype=torch.bfloat16), weight, torch.zeros(512, dtype=torch.int64), linear_bias=bias,
        reduction="sum", backend="cpu",
    ).backward()  # fmt: skip
    assert weight.grad is not None and bias.grad is not None
    assert weight.grad.flatten().tolist() == bias.grad.tolist() == [-384.0, 128.0, 128.0, 128.0]


@pytest.mark.usefixtures("thin_chunks")
def test_gradients_of_the_transform_are_summed_in_float64() -> None:
    rows = 3000
    head, target, transform = head_of(rows, 8), targets_of(rows), disturbed("sigmoid_cap")
    truth = head_loss_and_gradients(head, target, transform, "reference", torch.float64, reduction="sum")
    got = head_loss_and_gradients(head, target, transform, "cpu", torch.float32, reduction="sum")
    for key, _ in transform.named_parameters():
        assert distance(got[key], truth[key]) <= 1e-5 * truth[key].norm(), key


@pytest.mark.usefixtures("thin_chunks")
@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (2, 0, 3)])
def test_any_leading_shape(leading: tuple[int, ...]) -> None:
    count = math.prod(leading)
    head, transform = head_of(count), disturbed("gss").double()
    target = targets_of(count).reshape(leading)
    shaped = head | {"input": head["input"].reshape(*leading, D)}
    for reduction in ("none", "sum"):
        wanted, got = (
            head_loss_and_gradients(shaped, target, transform, each, reduction=reduction, return_lse=True)
            for each in BACKENDS
        )
        assert got["loss"].shape == (leading if reduction == "none" else ())
        assert got["lse"].shape == leading
        assert got["input"].shape == (*leading, D)
        assert_same(got, wanted)


@pytest.mark.usefixtures("thin_chunks")
def test_operands_of_any_stride() -> None:
    head, target, transform = head_of(), targets_of(), disturbed("plif").double()
    wanted = head_loss_and_gradients(head, target, transform, "cpu")
    for view in (lambda t: t.t().contiguous().t(), lambda t: t.repeat_interleave(2, 1)[:, ::2]):
        leaves = [view(head[name]).requires_grad_() for name in ("input", "linear_weight")]
        loss = ms.linear_cross_entropy(*leaves, target, transform, linear_bias=head["linear_bias"], backend="cpu")
        gradients = torch.autograd.grad(loss, leaves)
        assert_same(dict(zip(["loss", "input", "linear_weight"], (loss.detach(), *gradients), strict=True)), {
            key: wanted[key] for key in ("loss", "input", "linear_weight")
        })  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_and_ignored_batches(backend: Any) -> None:
    transform = disturbed("plif").double()
    for rows in (0, 4):
        head, target = head_of(rows), torch.full((rows,), -100)
        result = head_loss_and_gradients(head, target, transform, backend)
        assert result.pop("loss").isnan()
        if rows == 0 or backend == "cpu":  # the reference has NaN here where there are rows, from 0 / 0
            assert all((value == 0).all() for value in result.values())
        result = head_loss_and_gradients(head, target, transform, backend, reduction="sum")
        assert all((value == 0).all() for value in result.values())
        assert result["linear_weight"].shape == (V, D)


@pytest.mark.usefixtures("thin_chunks")
def test_a_row_of_nan_stays_a_row_of_nan() -> None:
    head, target, transform = head_of(), targets_of(), disturbed("plif").double()
    head["input"][5] = torch.nan
    result = head_loss_and_gradients(head, target, transform, "cpu", reduction="none")
    others = torch.arange(N) != 5
    assert result["loss"][5].isnan() and result["input"][5].isnan().all()
    assert result["loss"][others].isfinite().all() and result["input"][others].isfinite().all()
    assert result["linear_weight"].isnan().all()
    target[5] = -100
    assert head_loss_and_gradients(head, target, transform, "cpu")["loss"].isfinite()


def test_same_result_twice() -> None:
    head, target, transform = head_of(300, 16, 1000), targets_of(300, 1000), disturbed("plif")
    for reduction in ("none", "mean"):
        first, second = (
            head_loss_and_gradients(head, target, transform, "cpu", torch.float32, reduction=reduction)
            for _ in range(2)
        )
        for key in first:
            assert torch.equal(first[key], second[key]), key


@pytest.mark.usefixtures("thin_chunks")
@pytest.mark.parametrize("wrong", [V, -1])
def test_target_out_of_range_names_its_row(wrong: int) -> None:
    head, target = head_of(), targets_of()
    target[5] = wrong  # in the second chunk
    for reduction in ("none", "mean"):
        with pytest.raises(IndexError, match=rf"target {wrong} \(row 5\) is out of bounds for {V} classes"):
            head_loss_and_gradients(head, target, None, "cpu", reduction=reduction)


def test_size_of_the_chunks() -> None:
    for classes in (10, 1000, 32_000, 50_257, 128_256, 262_144):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            rows = head_products.chunk_rows(classes, dtype)
            size = rows * classes * dtype.itemsize
            assert rows == 128 or size <= 64 * 2**20, (classes, dtype)
            assert rows >= 256 or size > 50 * 2**20, (classes, dtype)


# --- only what is needed ----------------------------------------------------------------------------------------------


def products_in(work: Callable[[], Any]) -> int:
    with torch.profiler.profile() as profile:
        work()
    return sum(event.name in PRODUCTS for event in profile.events())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("needs", "reduction", "products"),
    [
        ((), "mean", 1),
        (("transform",), "mean", 1),
        (("linear_bias",), "mean", 1),
        (("input",), "mean", 2),
        (("linear_weight",), "mean", 2),
        (("input", "linear_weight", "linear_bias", "transform"), "mean", 3),
        (("input", "linear_weight", "linear_bias", "transform"), "sum", 3),
        (("transform",), "none", 2),
        (("input", "linear_weight"), "none", 4),
    ],
)
def test_products_are_those_that_are_needed(
    chunks_of: Callable[[int], None], needs: tuple[str, ...], reduction: str, products: int
) -> None:
    chunks_of(1000)
    head, target, transform = head_of(), targets_of(), disturbed("plif").double()
    whole = head_loss_and_gradients(head, target, transform, "cpu", reduction=reduction)
    transform.requires_grad_("transform" in needs)
    for name, leaf in head.items():
        leaf.requires_grad_(name in needs)

    def step() -> None:
        loss = ms.linear_cross_entropy(
            head["input"], head["linear_weight"], target, transform, linear_bias=head["linear_bias"],
            reduction=reduction, backend="cpu",
        )  # fmt: skip
        assert loss.requires_grad == bool(needs)
        if needs:
            loss.sum().backward()

    assert products_in(step) == products
    for name, leaf in (*head.items(), *transform.named_parameters()):
        if name in needs or (name == "raw_slope" and "transform" in needs):
            assert_same({name: leaf.grad}, {name: whole[name]})
        else:
            assert leaf.grad is None


def test_nothing_but_the_loss_without_gradients() -> None:
    head, target, transform = head_of(), targets_of(), disturbed("plif").double()
    for leaf in head.values():
        leaf.requires_grad_()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            count = products_in(
                lambda: ms.linear_cross_entropy(head["input"], head["linear_weight"], target, transform)
            )
        assert count == 1


def test_the_layer_takes_three_products_and_its_output_four() -> None:
    layer = ms.MonotonicSoftmax(D, V, disturbed("plif"), label_smoothing=0.1, backend="cpu")
    input, target = torch.randn(N, D, requires_grad=True), targets_of()
    assert products_in(lambda: layer(input, target).loss.backward()) == 3
    assert layer(input, target).output.requires_grad


@pytest.mark.parametrize("upstream", [1.0, 0.3])
def test_gradients_are_handed_over_without_a_copy(upstream: float) -> None:
    head = {name: leaf.float().requires_grad_() for name, leaf in head_of().items()}
    transform = disturbed("temperature")
    loss = ms.linear_cross_entropy(
        head["input"], head["linear_weight"], targets_of(), transform, linear_bias=head["linear_bias"], backend="cpu"
    )
    computed = [each.data_ptr() for each in loss.grad_fn.saved_tensors[-4:]]  # type: ignore[union-attr]
    loss.backward(torch.tensor(upstream))
    assert [leaf.grad.data_ptr() for leaf in head.values()] == computed[:3]


# --- backward passes of every kind ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("thin_chunks")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("upstream", [0.3, 65536.0])
def test_upstream_gradients_scale_exactly(dtype: torch.dtype, upstream: float) -> None:
    head, target, transform = head_of(), targets_of(), disturbed("plif")
    plain, scaled = (
        head_loss_and_gradients(head, target, transform, "cpu", dtype, upstream=(torch.tensor(value),))
        for value in (1.0, upstream)
    )
    for key in plain.keys() - {"loss"}:
        # Of the parameters of f: the coefficients' gradient goes on through float32 whatever the dtype of the head.
        eps = torch.finfo(torch.float32 if key == "raw_slope" and dtype != torch.float64 else dtype).eps
        wanted = plain[key].double() * torch.tensor(upstream).double()
        # float16 keeps more of small values where they are scaled up.
        tiny = 6e-8 * upstream * wanted.numel() ** 0.5 if dtype == torch.float16 else 0.0
        assert distance(scaled[key], wanted) <= 2 * eps * wanted.norm() + tiny, key


@pytest.mark.usefixtures("thin_chunks")
def test_second_backward_through_a_retained_graph() -> None:
    head, target, transform = head_of(), targets_of(), disturbed("plif").double()
    leaves = [leaf.requires_grad_() for leaf in head.values()] + list(transform.parameters())
    loss = ms.linear_cross_entropy(
        head["input"], head["linear_weight"], target, transform, linear_bias=head["linear_bias"], backend="cpu"
    )
    first = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    second = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    third = torch.autograd.grad(loss, leaves)
    for a, b, c in zip(first, second, third, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(3 * c, a, rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("thin_chunks")
def test_total_rows_and_lse_together() -> None:
    """The layer's loss, output and lse, each with a gradient of its own, in one backward pass."""
    head, target = head_of(), targets_of()
    results = []
    for backend in BACKENDS:
        torch.manual_seed(0)
        layer = ms.MonotonicSoftmax(D, V, disturbed("plif"), z_loss=0.01, backend=backend).double()
        input = head["input"].clone().requires_grad_()
        output, loss = layer(input, target)
        (2 * loss + (output * torch.linspace(-1, 1, N, dtype=torch.float64)).sum()).backward()
        results.append({"input": input.grad} | {name: p.grad for name, p in layer.named_parameters()})
    assert_same(results[1], results[0])


@pytest.mark.usefixtures("thin_chunks")
def test_gradients_accumulate_over_calls_and_over_tied_weights() -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(V, D)
    layer = ms.MonotonicSoftmax(D, V, ms.transforms.PLIF(), backend="cpu").tie_weights(embedding)
    plain = copy.deepcopy(embedding), copy.deepcopy(layer)
    words = [torch.randint(V, (N,)) for _ in range(3)]
    for word in words:
        layer(embedding(word), targets_of()).loss.backward()
        F.cross_entropy(F.linear(plain[0](word), plain[0].weight, plain[1].bias), targets_of()).backward()
    torch.testing.assert_close(embedding.weight.grad, plain[0].weight.grad)
    assert layer.bias is not None and plain[1].bias is not None
    torch.testing.assert_close(layer.bias.grad, plain[1].bias.grad)


@pytest.mark.usefixtures("thin_chunks")
def test_checkpoint_and_anomaly_mode() -> None:
    head, target, transform = head_of(bias=False), targets_of(), disturbed("plif").double()
    wanted = head_loss_and_gradients(head, target, transform, "cpu")["input"]
    input = head["input"].requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return ms.linear_cross_entropy(2 * x, head["linear_weight"] / 2, target, transform, backend="cpu")

    with torch.autograd.set_detect_anomaly(True):
        (gradient,) = torch.autograd.grad(checkpoint(loss, input, use_reentrant=False), input)
    torch.testing.assert_close(gradient, wanted)


def test_double_backward_raises() -> None:
    head = head_of()
    input, target = head["input"].requires_grad_(), targets_of()

    def loss(x: Tensor) -> Tensor:
        return ms.linear_cross_entropy(x, head["linear_weight"], target, backend="cpu")

    (gradient,) = torch.autograd.grad(loss(input), input, create_graph=True)
    assert_same({"input": gradient.detach()}, {"input": torch.func.grad(loss)(head["input"].detach())})
    with pytest.raises(RuntimeError, match='double backward; use backend="reference"'):
        gradient.sum().backward()
    with pytest.raises(RuntimeError, match='double backward; use backend="reference"'):
        torch.func.grad(lambda x: torch.func.grad(loss)(x).square().sum())(head["input"].detach())


@pytest.mark.usefixtures("thin_chunks")
def test_func_transforms() -> None:
    head, target, transform = head_of(bias=False), targets_of(), disturbed("plif").double()
    wanted = head_loss_and_gradients(head, target, transform, "cpu")

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return ms.linear_cross_entropy(x, weight, target, transform, backend="cpu")

    arguments = head["input"], head["linear_weight"]
    for call in (
        torch.func.grad(loss, (0, 1)),
        torch.compile(torch.func.grad(loss, (0, 1)), fullgraph=True, backend="aot_eager"),
    ):
        gradients = call(*arguments)
        assert_same(dict(zip(("input", "linear_weight"), gradients, strict=True)), {
            key: wanted[key] for key in ("input", "linear_weight")
        })  # fmt: skip

    inputs = torch.stack([arguments[0], arguments[0].flip(0)])
    batched = torch.vmap(torch.func.grad(loss), (0, None))(inputs, arguments[1])
    assert_same({"input": batched[0]}, {"input": wanted["input"]})
    leaf = arguments[0].clone().requires_grad_()
    many = torch.tensor([1.0, -2.0], dtype=torch.float64)
    (each,) = torch.autograd.grad(loss(leaf, arguments[1]), leaf, many, is_grads_batched=True)
    assert_same({"input": each[1]}, {"input": -2 * wanted["input"]})


@pytest.mark.seconds
@pytest.mark.grid(1)
@pytest.mark.parametrize(("compiler", "exact"), COMPILERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled(compiler: str, exact: bool, dtype: torch.dtype, reduction: str) -> None:
    torch._dynamo.reset()
    transform = disturbed("plif", num_pieces=16, bound=4.0)

    def step(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        return ms.linear_cross_entropy(
            x, weight, target, transform, linear_bias=bias, reduction=reduction, label_smoothing=0.1, backend="cpu"
        )  # fmt: skip

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=compiler)
    for rows in (6, 9):
        leaves = [leaf.to(dtype).requires_grad_() for leaf in head_of(rows).values()]
        results = []
        for call in (step, compiled):
            loss = call(*leaves, targets_of(rows))
            upstream = torch.full(loss.shape, 0.3)
            gradients = torch.autograd.grad(loss, [*leaves, *transform.parameters()], upstream)
            results.append((loss.detach(), *gradients))
        for eager, other in zip(*results, strict=True):
            if exact:
                assert torch.equal(eager, other)
            else:
                torch.testing.assert_close(eager, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_multiplies_in_its_type_and_nothing_else(dtype: torch.dtype) -> None:
    head = {name: leaf.float() for name, leaf in head_of().items()}
    target, transform = targets_of(), disturbed("plif")
    rounded = {name: leaf.to(dtype) for name, leaf in head.items()}
    wanted = head_loss_and_gradients(rounded, target, transform, "cpu")
    with torch.autocast("cpu", dtype):
        got = head_loss_and_gradients(head, target, transform, "cpu")
        # Operands of different types are what autocast is for.
        mixed = head_loss_and_gradients(head | {"input": head["input"].to(dtype)}, target, transform, "cpu")
    for key, value in wanted.items():
        # The gradients of a float32 weight and bias are sums in float32, which nothing rounds to the other type.
        rounded_to = dtype if key in ("linear_weight", "linear_bias") else value.dtype
        assert torch.equal(got[key].to(rounded_to).float(), value.float()), key
        assert torch.equal(mixed[key].to(rounded_to).float(), value.float()), key
    assert got["linear_weight"].dtype == torch.float32
    with torch.autocast("cpu", dtype):
        loss = ms.linear_cross_entropy(*(head_of()[name] for name in ("input", "linear_weight")), target)
    assert loss.dtype == torch.float64


def test_compiled_func_grad_has_no_second_derivative_when_it_is_asked_for() -> None:
    """torch.compile traces the backward pass of func.grad with the transform's parameters: no error until it runs."""
    head, target, transform = head_of(bias=False), targets_of(), disturbed("plif").double()

    def loss(x: Tensor) -> Tensor:
        return ms.linear_cross_entropy(x, head["linear_weight"], target, transform, backend="cpu")

    gradient = torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")(head["input"])
    assert gradient.requires_grad
    with pytest.raises(RuntimeError, match='double backward; use backend="reference"'):
        gradient.sum().backward()
