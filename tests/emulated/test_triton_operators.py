"""The triton backend as a whole: choice, explanation, operators, torch.compile, the head, what a launch compiles."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, get_args

import pytest
import torch
from losses import distance, disturbed, head_loss_and_gradients, loss_and_gradients
from operator_calls import PLAIN, check_row_kernels, kernel_transform, opcheck
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

triton = pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402
from triton_interpreter import interpreting  # noqa: E402

import monosoftmax as ms  # noqa: E402
from monosoftmax import backends, head_products, ops  # noqa: E402
from monosoftmax.groups import Head, HeadOptions, LossOptions, Upstream  # noqa: E402
from monosoftmax.triton_kernels import launch, operators  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
ROWS, CLASSES = 5, 41


def on_gpu_or_interpreted() -> Any:
    return nullcontext() if GPU else interpreting()


def _batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, CLASSES, (ROWS,), generator=generator)
    target[1] = -100
    return 3 * torch.randn(ROWS, CLASSES, generator=generator).to(DEVICE), target.to(DEVICE)


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_refused_without_a_gpu() -> None:
    input, target = _batch()
    assert str(backends.available()["triton"]) == "not available: torch finds no GPU"
    with pytest.raises(ValueError, match='backend="triton" cannot take this call: torch finds no GPU'):
        ms.cross_entropy(input, target, backend="triton")
    assert ms.backends.explain("cross_entropy", input).backend == "cpu"


_BARE_CALL = """
import sys, torch, monosoftmax
assert "triton" not in sys.modules
sys.modules.update(dict.fromkeys(sys.argv[1:]))
arguments = "triton", torch.zeros(0, 7), torch.zeros(0, dtype=torch.int64), torch.zeros(0), "identity", []
options = [], None, None, -100, 0.0, 0.0, False, "none", [False, False]
print(torch.ops.monosoftmax.cross_entropy.default(*arguments, *options)[0])
"""


def test_a_bare_call_loads_triton() -> None:
    """Importing the package registers the operators, and Triton is imported when a kernel of its is called."""

    def bare_call(*absent: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", _BARE_CALL, *absent], capture_output=True, text=True)

    run = bare_call()
    assert run.returncode == 0 and run.stdout == "tensor([])\n", run.stderr
    run = bare_call("triton")
    assert run.returncode != 0 and "triton does not load (" in run.stderr and "pip install triton" in run.stderr


def test_explanations() -> None:
    with on_gpu_or_interpreted():
        assert backends.available()["triton"].available
        input = torch.zeros(2, 3, device=DEVICE)
        for operation in get_args(backends.Operation):
            explanation = ms.backends.explain(operation, input, backend="triton")
            assert explanation.backend == "triton" and "fused Triton kernel" in explanation.how
        recompute = ms.backends.explain("linear_cross_entropy", input, backend="triton", method="recompute")
        assert "no logits in memory" in recompute.how
        with pytest.raises(ValueError, match="it computes in float32, input is float64"):
            ms.cross_entropy(input.double(), torch.zeros(2, dtype=torch.int64, device=DEVICE), backend="triton")
    with pytest.raises(ValueError, match='no method="recompute": the triton backend has'):
        ms.backends.explain("linear_cross_entropy", torch.zeros(2, 3), backend="cpu", method="recompute")
    with pytest.raises(ValueError, match='it holds the logits in full, and has no method="chunked"'):
        ms.backends.explain("linear_cross_entropy", torch.zeros(2, 3), backend="reference", method="chunked")


def test_method_of_the_head() -> None:
    choose = backends.head_method
    assert choose("triton", 512, torch.bfloat16, False) == "recompute"
    for other in (
        ("cpu", 512, torch.bfloat16, False), ("triton", 2048, torch.bfloat16, False),
        ("triton", 512, torch.float32, False), ("triton", 512, torch.bfloat16, True),
    ):  # fmt: skip
        assert choose(*other) == "chunked"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "tiled"}, "method must be one of auto, chunked, recompute, got 'tiled'"),
        ({"chunk_rows": 0}, "chunk_rows must be at least 1, got 0"),
        ({"chunk_rows": 3, "method": "recompute"}, "chunk_rows is for chunks of logits"),
        ({"filter_eps": 1e-4}, "filter_eps needs method=\"recompute\", got method='auto'"),
        ({"filter_eps": -1.0, "method": "recompute"}, "filter_eps must be at least 0 and less than 1, got -1.0"),
        ({"method": "recompute", "backend": "cpu"}, 'it has no method="recompute"'),
        ({"chunk_rows": 2, "backend": "reference"}, "it holds the logits in full, and has no use for chunk_rows"),
    ],
)
def test_refused_options_of_the_head(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ms.linear_cross_entropy(torch.randn(4, 5), torch.randn(9, 5), torch.tensor([0, 8, 1, 3]), **options)


@pytest.mark.slow
@pytest.mark.parametrize("all_options", [False, True])
@pytest.mark.parametrize("name", ["identity", "plif", "gss"])
def test_opcheck(name: str, all_options: bool) -> None:
    input, target = _batch()
    transform = disturbed(name).to(DEVICE)
    weight = torch.linspace(0.1, 1.0, CLASSES, device=DEVICE)
    options = LossOptions(weight, -100, 0.1, 0.01, True) if all_options else PLAIN
    leaf, of_leaf = input.clone().requires_grad_(), kernel_transform(transform, requires_grad=True, device=DEVICE)
    f = kernel_transform(transform, device=DEVICE)
    upstream, both = torch.rand(2, ROWS, device=DEVICE), (True, True)
    with on_gpu_or_interpreted():
        call = ops.CrossEntropy("triton", input, target, f, options, reduction="mean", output_mask=both)
        opcheck(call)
        opcheck(call._replace(input=leaf, transform=of_leaf, output_mask=(False, False)))
        opcheck(call._replace(input=leaf, transform=of_leaf, reduction="none", output_mask=(False, False)))
        opcheck(
            ops.CrossEntropyBackward(
                backend="triton",
                grad_loss=upstream[0],
                grad_lse=upstream[1] if all_options else None,
                input=input,
                target=target,
                transform=f,
                options=options,
                row_stats=ops.cross_entropy(call).row_stats,
                output_mask=both,
            )
        )
        check_row_kernels("triton", input, target, f, options)
        opcheck(ops.LogSoftmax("triton", leaf, of_leaf, torch.float32))
        row_stats = ops.log_softmax(ops.LogSoftmax("triton", input, f, torch.float32)).row_stats
        opcheck(ops.LogSoftmaxBackward("triton", upstream[0][:, None] * input, input, f, row_stats, output_mask=both))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["chunked", "recompute"])
def test_opcheck_of_the_head(method: str) -> None:
    _, target = _batch()
    f, generator = kernel_transform(disturbed("plif"), device=DEVICE), torch.Generator().manual_seed(0)
    shapes = ((ROWS, 5), (CLASSES, 5), (CLASSES,))
    head = Head(*(torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes))
    with on_gpu_or_interpreted():
        call = ops.LinearCrossEntropy(
            backend="triton",
            head=head,
            target=target,
            transform=f,
            options=PLAIN,
            head_options=HeadOptions(method, 0, 0.0),
            reduction="sum",
            return_log_prob=True,
            return_statistics=False,
            output_mask=(True,) * 4,
        )
        opcheck(call)
        backward = ops.LinearCrossEntropyBackward(
            backend="triton",
            grad_loss=torch.rand(ROWS, device=DEVICE),
            grad_lse=None,
            head=head,
            target=target,
            transform=f,
            options=PLAIN,
            head_options=call.head_options,
            row_stats=ops.linear_cross_entropy(call).row_stats,
            output_mask=call.output_mask,
        )
        opcheck(backward)
        opcheck(ops.LinearTokenStatistics("triton", head, target, f, -100))


def test_compiled() -> None:
    input, target = _batch()
    transform = disturbed("plif").to(DEVICE)

    def step(x: Tensor) -> Tensor:
        return ms.cross_entropy(x, target, transform, backend="triton")

    with on_gpu_or_interpreted():
        results = []
        for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
            leaf = input.clone().requires_grad_()
            transform.zero_grad()
            loss = function(leaf)
            loss.backward()
            assert leaf.grad is not None and transform.raw_slope.grad is not None
            results.append((loss.detach(), leaf.grad, transform.raw_slope.grad.clone()))
        gradient = torch.func.grad(step)(input)
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient, results[0][1], rtol=1e-6, atol=1e-7)


def test_double_backward_is_refused() -> None:
    input, target = _batch()
    with on_gpu_or_interpreted():
        loss = ms.cross_entropy(input.requires_grad_(), target, backend="triton")
        (gradient,) = torch.autograd.grad(loss, input, create_graph=True)
        with pytest.raises(RuntimeError, match='the triton backend does not support double backward; use backend="ref'):
            gradient.sum().backward()


@pytest.mark.grid(2)
@pytest.mark.parametrize("name", ["identity", "plif", "monotonic_mlp"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["chunked", "recompute"])
def test_head(method: Any, name: str, reduction: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"input": (7, 5), "linear_weight": (CLASSES, 5), "linear_bias": (CLASSES,)}
    head = {key: torch.randn(shape, generator=generator).to(DEVICE, dtype) for key, shape in shapes.items()}
    target = torch.tensor([0, 5, -100, 40, 1, 2, 3], device=DEVICE)
    upstream = (torch.rand((7,) if reduction == "none" else (), generator=generator).to(DEVICE),)
    options = {"reduction": reduction, "upstream": upstream}
    transform = disturbed(name).to(DEVICE)
    with on_gpu_or_interpreted():
        how = {"method": method} if method == "recompute" else {"chunk_rows": 3}
        result = head_loss_and_gradients(head, target, transform, "triton", **how, **options)
    truth = head_loss_and_gradients(head, target, transform, "reference", torch.float64, **options)
    plain = head_loss_and_gradients(head, target, transform, "reference", **options)
    for key, wanted in truth.items():
        error, of_plain = distance(result[key], wanted), distance(plain[key], wanted)
        assert error <= 2 * of_plain + 1e-6 * (1 + wanted.norm().item()), key


def test_recompute_refuses_where_determinism_is_asked_for() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        with on_gpu_or_interpreted():
            input, weight = torch.randn(3, 4, device=DEVICE, requires_grad=True), torch.randn(9, 4, device=DEVICE)
            target = torch.tensor([0, 8, 1], device=DEVICE)
            loss = ms.linear_cross_entropy(input, weight, target, backend="triton", method="recompute")
            with pytest.raises(RuntimeError, match='use method="chunked"'):
                loss.backward()
    finally:
        torch.use_deterministic_algorithms(False)


def test_parts_of_the_weight_gradient_are_float32_on_a_gpu() -> None:
    """As far as torch says without one: of tensors that are not there."""
    with FakeTensorMode():
        a, b = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in ((9, 4), (4, 5)))
        product = head_products._product_to_be_summed(a, b)
    assert product.dtype == torch.float32 and product.shape == (9, 5)


def test_rows_in_a_chunk_on_a_gpu() -> None:
    rows = functools.partial(head_products.chunk_rows, device="cuda")
    assert [rows(classes, torch.bfloat16) for classes in (32000, 131072, 262144, 10**6)] == [8192, 4096, 2048, 2048]


@contextmanager
def _driver_of(target: Any) -> Iterator[None]:
    """Launches compile for ``target``, and run nothing."""

    class Driver:
        get_current_target = staticmethod(lambda: target)
        get_current_device = staticmethod(lambda: id(target))
        get_current_stream = staticmethod(lambda device: 0)

    patch = pytest.MonkeyPatch()
    run: Callable[..., Any] = JITFunction.run
    patch.setattr(triton.runtime.driver, "_active", Driver())
    patch.setattr(JITFunction, "run", lambda self, *args, warmup, **kwargs: compiled.append(
        run(self, *args, warmup=True, **kwargs)
    ))  # fmt: skip
    patch.setattr(launch, "limits_registers", lambda device: target.backend == "cuda")
    patch.setattr(launch, "warp_size", lambda device: target.warp_size)
    try:
        yield
    finally:
        patch.undo()


compiled: list[Any] = []


@pytest.mark.skipif(GPU, reason="launches are real here")
@pytest.mark.parametrize("target", [GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)], ids=["sm_90", "gfx942"])
@pytest.mark.parametrize("name", ["identity", "plif"])
def test_launches_compile(name: str, target: Any) -> None:
    """From the arguments of the operators to a binary, as on a GPU, but for the launch itself."""
    compiled.clear()
    transform = disturbed(name)
    f, upstream = kernel_transform(transform), Upstream(torch.ones(()))
    input, labels = torch.zeros(3, 50304, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.int64)
    smoothed, mask = PLAIN._replace(label_smoothing=0.1, z_loss=0.1), (True, True)
    with _driver_of(target):
        operators.cross_entropy(input, labels, f, PLAIN, upstream=upstream, output_mask=mask)
        stats, of_rows = torch.ones(2, 3), Upstream(torch.ones(3))
        operators.cross_entropy(input, labels, f, smoothed, upstream=of_rows, row_stats=stats, output_mask=mask)
        operators.log_softmax(input, f, torch.float32)
        operators.token_statistics(input, labels, f, -100)
        operators.scale_(input, torch.ones(()))
    binary = "cubin" if target.backend == "cuda" else "hsaco"
    assert len(compiled) == 5 and all(each.asm[binary] for each in compiled)


@pytest.mark.skipif(GPU, reason="needs the driver that runs nothing")
@pytest.mark.parametrize("classes", [50304, 50257])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["plif", "spline"])
def test_a_lane_of_a_table_is_one_thread_s(name: str, dtype: torch.dtype, classes: int) -> None:
    """Every access to the lanes' tables has one layout, so that no thread sees another one's address."""
    compiled.clear()
    transform = disturbed(name)
    f, upstream = kernel_transform(transform), Upstream(torch.ones(()))
    input, labels = torch.zeros(3, classes, dtype=dtype), torch.zeros(3, dtype=torch.int64)
    with _driver_of(GPUTarget("cuda", 90, 32)):
        operators.cross_entropy(input, labels, f, PLAIN, upstream=upstream, output_mask=(True, True))
    (kernel,) = compiled
    accesses = re.findall(r"(tt\.load|tt\.store) .*tensor<128x!tt\.ptr<i64>, (#\w+)>", kernel.asm["ttgir"])
    assert {kind for kind, _ in accesses} == {"tt.load", "tt.store"}
    (layout,) = {each for _, each in accesses}
    (definition,) = re.findall(rf"^{layout} = (.*)$", kernel.asm["ttgir"], re.MULTILINE)
    assert "sizePerThread = [1], threadsPerWarp = [32], warpsPerCTA = [4]" in definition


def test_deterministic_sums_are_the_same_in_every_run() -> None:
    input, target = _batch()
    for pieces in (4, 64, 1000):
        transform = disturbed("plif", num_pieces=pieces, bound=6.0).to(DEVICE)
        torch.use_deterministic_algorithms(True)
        try:
            with on_gpu_or_interpreted():
                first, second = (loss_and_gradients(input, target, transform, "triton") for _ in range(2))
        finally:
            torch.use_deterministic_algorithms(False)
        for key in first:
            assert torch.equal(first[key], second[key]), key
