"""Bad input: a clear error that names the argument, what it got and what it wants."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from losses import disturbed, loss_and_gradients
from operator_calls import PLAIN, flattened
from torch import Tensor
from torch.nn import functional as F

import monosoftmax as ms
from monosoftmax import ops, row_kernels
from monosoftmax.groups import Transform

BACKENDS = ["reference", "cpu"]
LOGITS, TARGET = torch.randn(4, 9), torch.tensor([0, 8, -100, 3])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": [1.0]}, TypeError, "input must be a Tensor, got list"),
        ({"input": torch.ones(4, 9, dtype=torch.int64)}, TypeError, "input must be float32.*got torch.int64"),
        ({"input": torch.ones(4, 9, dtype=torch.complex64)}, TypeError, "input must be float32.*got torch.complex64"),
        ({"input": torch.tensor(1.0)}, ValueError, "input must have at least 1 dimension"),
        ({"input": torch.ones(4, 0)}, ValueError, "input must have at least 1 class, got 0"),
        ({"input": torch.ones(4, 9).to_sparse()}, NotImplementedError, "input must be a dense tensor"),
        ({"target": torch.tensor([0, 1])}, ValueError, r"target must have the shape.*\(4,\).*got \(2,\)"),
        ({"target": torch.zeros(4, 1, dtype=torch.int64)}, ValueError, r"target must have the shape.*got \(4, 1\)"),
        ({"target": torch.zeros(4, dtype=torch.int32)}, TypeError, "target must be int64.*got torch.int32"),
        ({"target": torch.rand(4, 8)}, ValueError, r"target must have the shape of input, \(4, 9\),.*got \(4, 8\)"),
        ({"target": TARGET.to("meta")}, ValueError, "target must be on cpu like input, got meta"),
        ({"transform": F.softplus}, TypeError, "transform must be a monosoftmax transform or None, got builtin"),
        ({"transform": ms.transforms.PLIF(device="meta")}, ValueError, "transform must be on cpu like input, got meta"),
        ({"weight": torch.rand(8)}, ValueError, r"weight must have shape \(9,\), got \(8,\)"),
        ({"weight": torch.ones(9, dtype=torch.int64)}, TypeError, "weight must be float32"),
        ({"weight": torch.rand(9, requires_grad=True)}, ValueError, "weight must not require a gradient"),
        ({"weight": torch.rand(9, device="meta")}, ValueError, "weight must be on cpu like input, got meta"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index must be an int, got float"),
        ({"label_smoothing": -0.1}, ValueError, "label_smoothing must be between 0 and 1, got -0.1"),
        ({"label_smoothing": 1.1}, ValueError, "label_smoothing must be between 0 and 1, got 1.1"),
        ({"label_smoothing": float("nan")}, ValueError, "label_smoothing must be between 0 and 1, got nan"),
        ({"z_loss": -1.0}, ValueError, "z_loss must be finite and not negative, got -1.0"),
        ({"z_loss": float("inf")}, ValueError, "z_loss must be finite and not negative, got inf"),
        ({"reduction": "batchmean"}, ValueError, "reduction must be .*got 'batchmean'"),
        ({"backend": "fast"}, ValueError, "backend must be one of auto, reference, cpu, triton, cuda, got 'fast'"),
        (
            {"backend": "triton"},
            ValueError,
            'backend="triton" cannot take this call: (torch finds no GPU|it takes CUDA)',
        ),
        ({"backend": "cuda"}, ValueError, 'backend="cuda" cannot take this call: .*CUDA'),
    ],
)
def test_cross_entropy_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"input": LOGITS, "target": TARGET} | change
    with pytest.raises(error, match=message):
        ms.cross_entropy(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.randn(4, 6)}, ValueError, r"must agree in d, got \(4, 6\) and \(9, 5\)"),
        ({"linear_weight": torch.randn(5)}, ValueError, "must agree in d"),
        ({"linear_weight": torch.randn(0, 5)}, ValueError, "at least 1 class"),
        ({"linear_weight": torch.randn(9, 5).double()}, TypeError, "linear_weight must have the dtype of input"),
        ({"linear_weight": torch.randn(9, 5, device="meta")}, ValueError, "linear_weight must be on cpu"),
        ({"linear_bias": torch.randn(8)}, ValueError, r"linear_bias must have shape \(9,\), got \(8,\)"),
        ({"linear_bias": torch.ones(9, dtype=torch.int64)}, TypeError, "linear_bias must be float32"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, r"target must have the shape.*got \(3,\)"),
    ],
)
def test_linear_cross_entropy_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"input": torch.randn(4, 5), "linear_weight": torch.randn(9, 5), "target": TARGET}
    with pytest.raises(error, match=message):
        ms.linear_cross_entropy(**arguments | change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.tensor(1.0)}, ValueError, "input must have at least 1 dimension"),
        ({"input": torch.ones(3, 0)}, ValueError, "input must have at least 1 class"),
        ({"dtype": torch.int32}, TypeError, "dtype must be float32.*got torch.int32"),
        ({"transform": "plif"}, TypeError, "transform must be a monosoftmax transform or None, got str"),
    ],
)
def test_log_softmax_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"input": LOGITS}
    with pytest.raises(error, match=message):
        ms.log_softmax(**arguments | change)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", [9, -1, -101, 2**40])
def test_target_out_of_range(backend: Any, wrong: int) -> None:
    target = TARGET.clone()
    target[3] = wrong
    with pytest.raises(IndexError, match=rf"target {wrong} \(row 3\) is out of bounds for 9 classes"):
        ms.cross_entropy(LOGITS, target, backend=backend)


def test_target_out_of_range_poisons_its_row_in_compiled_reference_code() -> None:
    target = torch.tensor([0, 9, -100, 3])
    compiled = torch.compile(
        lambda z, t: ms.cross_entropy(z, t, reduction="none", backend="reference"), backend="eager", fullgraph=True
    )
    loss = compiled(LOGITS, target)
    assert loss.isnan().tolist() == [False, True, False, False]


def test_dtensor_is_refused_by_name_where_it_is_not_supported() -> None:
    code = """
import torch, torch.distributed as dist, monosoftmax as ms
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
sharded = DTensor.from_local(torch.randn(4, 9), mesh, [Shard(0)])
x, target, log_q = torch.randn(4, 9), torch.zeros(4, dtype=torch.int64), torch.zeros(4, 1)
for call in (lambda: ms.linear_token_loss(lambda tokens: tokens.log_prob.sum(), x, sharded, target),
             lambda: ms.linear_distillation(x, sharded, x, x[:, :]),
             lambda: ms.linear_topk_distillation(x, sharded, log_q, target.unsqueeze(1))):
    try:
        call()
    except NotImplementedError as error:
        print(error)
dist.destroy_process_group()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.count("is a DTensor, which is not supported") == 3, run.stderr
    for remedy in ("module.unshard()", "register_fsdp_forward_method"):
        assert run.stdout.count(remedy) == 3
    # Each is silently wrong: a gradient that nobody reduces, the loss over a part of the vocabulary.
    assert "full_tensor" not in run.stdout and "to_local" not in run.stdout


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("input", torch.randn(4, 9, 2), "input must have shape"),
        ("input", torch.randn(9, 4).t(), "columns next to each other"),
        ("target", TARGET[:2], "target must have shape"),
        ("weight", torch.rand(9, dtype=torch.float64), "weight must be"),
        ("coefficients", torch.ones(3), "do not fit transform"),
        ("coefficients", torch.ones(2, 4, dtype=torch.float64), "coefficients must be"),
        ("name", "nothing", 'unknown transform "nothing"'),
        ("constants", [1.0], "plif takes 3 constants"),
    ],
)
def test_the_operator_checks_what_it_is_given(name: str, value: Any, message: str) -> None:
    """Called by its arguments, and by its name at the dispatcher."""
    operator = ops.cross_entropy
    transform = Transform(torch.ones(2, 4), "plif", [-1.0, 0.5, 2.0])
    call = ops.CrossEntropy("cpu", LOGITS, TARGET, transform, PLAIN, reduction="none", output_mask=(False, False))
    operator(call)
    arguments = list(flattened(call))
    assert operator.named(arguments) == call
    arguments[operator.names.index(name)] = value
    for function in (lambda: operator(operator.named(arguments)), lambda: operator.overload(*arguments)):
        with pytest.raises((ValueError, TypeError), match=message):
            function()


def test_explain() -> None:
    explanation = ms.backends.explain("cross_entropy", LOGITS, ms.transforms.PLIF())
    assert explanation.backend == "cpu" and not explanation.refused
    assert "one buffer of logits" in str(ms.backends.explain("linear_cross_entropy", LOGITS))
    assert "one buffer of logits" in str(ms.backends.explain("linear_token_statistics", LOGITS))
    assert ms.backends.explain("log_softmax", LOGITS, backend="reference").backend == "reference"
    on_gpu = ms.backends.explain("cross_entropy", LOGITS.to("meta"))
    assert on_gpu.backend == "reference"
    with pytest.raises(ValueError, match="operation must be one of"):
        ms.backends.explain("softmax", LOGITS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r'dtype must be None for operation "cross_entropy".*got torch\.float64'):
        ms.backends.explain("cross_entropy", LOGITS, dtype=torch.float64)


_LARGE_TABLE = ms.transforms.PLIF(num_pieces=2**22 + 1, device="meta")


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (ms.backends.Call("log_softmax", "cuda", torch.float32, ms.transforms.Identity(), result_dtype=torch.float64),
         "dtype is float64"),
        (ms.backends.Call("cross_entropy", "cuda", torch.float32, _LARGE_TABLE), "PLIF has 4194305"),
        (ms.backends.Call("linear_cross_entropy", "cuda", torch.float32, ms.transforms.Identity(), "recompute"),
         'no method="recompute"'),
    ],
)  # fmt: skip
def test_what_the_cuda_backend_refuses_the_triton_backend_takes(
    call: ms.backends.Call, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _as_on_a_gpu(monkeypatch)
    assert ms.backends.choose(call, "auto") == "triton"
    with pytest.raises(ValueError, match=f'backend="cuda" cannot take this call: .*{reason}'):
        ms.backends.choose(call, "cuda")


def test_rows_that_no_kernel_for_gpus_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    _as_on_a_gpu(monkeypatch)
    for classes, chosen in ((2**30 - 1, "cuda"), (2**30, "reference")):
        call = ms.backends.Call("cross_entropy", "cuda", torch.float32, ms.transforms.Identity(), classes=classes)
        assert ms.backends.choose(call, "auto") == chosen


def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is in the way of the backends for GPUs but what they are called with."""
    able = {name: replace(each, problem=lambda: None) for name, each in ms.backends._BACKENDS.items()}
    monkeypatch.setattr(ms.backends, "_BACKENDS", able)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_public_functions_say_what_a_backend_refuses_before_its_operators_do(
    backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ms.backends, "_MOST_CLASSES_ON_GPU", 8)
    monkeypatch.setattr(ms.backends, "_MOST_PIECES_OF_CUDA", 50)
    logits, target = torch.zeros(4, 9), torch.tensor([0, 8, -100, 3])  # where the backend takes them
    head = (torch.zeros(4, 5), torch.zeros(9, 5), target)
    calls = [
        (lambda: ms.cross_entropy(logits[0], target[0], backend=backend), "classes, input has 9"),
        (lambda: ms.cross_entropy(logits.expand(2, 4, 9).mT, target.expand(2, 4), backend=backend), "input has 9"),
        (lambda: ms.log_softmax(logits, backend=backend), "classes, input has 9"),
        (lambda: ms.linear_cross_entropy(*head, backend=backend), "classes, input has 9"),
        (lambda: ms.linear_token_statistics(*head, backend=backend), "classes, input has 9"),
        (lambda: ms.backends.explain("log_softmax", logits[0], backend=backend), "up to 8 classes, input has 9"),
        (lambda: ms.backends.explain("cross_entropy", logits[0], backend=backend), "up to 8 classes, input has 9"),
        (lambda: ms.backends.explain("cross_entropy", logits[:, :, None], backend=backend), "input has 9"),
    ]
    if backend == "cuda":
        wide, few, many = logits[:, :8], ms.transforms.PLIF(50), ms.transforms.RationalQuadraticSpline(51)
        assert ms.log_softmax(wide, few, backend=backend).shape == wide.shape
        calls += [
            (lambda: ms.log_softmax(wide, dtype=torch.float64, backend=backend), "dtype is float64"),
            (lambda: ms.backends.explain("log_softmax", wide, dtype=torch.float64, backend=backend), "float64"),
            (lambda: ms.log_softmax(wide, many, backend=backend), "of up to 50 pieces, RationalQuadraticSpline has 51"),
            (lambda: ms.backends.explain("cross_entropy", wide, many, backend=backend), "Spline has 51"),
        ]
    for call, reason in calls:
        with pytest.raises(ValueError, match=f'backend="{backend}" cannot take this call: .*{reason}'):
            call()


def test_tables_of_more_pieces_than_float32_numbers() -> None:
    for make in (ms.transforms.PLIF, ms.transforms.RationalQuadraticSpline):
        assert make(2**24, device="meta").table_size == 2**24
        with pytest.raises(ValueError, match="must be at most 16777216, got 16777217"):
            make(2**24 + 1, device="meta")


class _Cube(ms.transforms.MonotonicTransform):
    """A user's own transform: no kernel."""

    def coefficients(self) -> Tensor:
        return torch.ones(1)

    def evaluate(self, z: Tensor, coefficients: Tensor) -> Tensor:
        return coefficients[0] * (z + z**3)

    def evaluate_derivative(self, z: Tensor, coefficients: Tensor) -> Tensor:
        return coefficients[0] * (1 + 3 * z**2)


def test_a_transform_of_the_user_runs_on_the_reference_and_explain_says_so() -> None:
    explanation = ms.backends.explain("cross_entropy", LOGITS, _Cube())
    assert explanation.backend == "reference"
    assert explanation.refused == {"cpu": "_Cube has no fused kernel"}
    torch.testing.assert_close(ms.cross_entropy(LOGITS, TARGET, _Cube()), F.cross_entropy(LOGITS + LOGITS**3, TARGET))
    with pytest.raises(ValueError, match='backend="cpu" cannot take this call: _Cube has no fused kernel'):
        ms.cross_entropy(LOGITS, TARGET, _Cube(), backend="cpu")


@given(
    rows=st.integers(0, 5),
    classes=st.integers(1, 70),
    name=st.sampled_from(list(ms.transforms.REGISTRY)),
    std=st.sampled_from([0.0, 0.1, 1.0, 20.0, 1e4]),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    z_loss=st.sampled_from([0.0, 1e-3]),
    ignored=st.booleans(),
    weighted=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_any_arguments(
    rows: int, classes: int, name: str, std: float, label_smoothing: float, z_loss: float,
    ignored: bool, weighted: bool, seed: int,
) -> None:  # fmt: skip
    """Over the argument space, the cpu backend in float64 is the reference."""
    generator = torch.Generator().manual_seed(seed)
    input = std * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    target = torch.randint(0, classes, (rows,), generator=generator)
    if ignored and rows:
        target[rows // 2] = -100
    options: dict[str, Any] = {"label_smoothing": label_smoothing, "z_loss": z_loss, "reduction": "sum"}
    if weighted:
        options["weight"] = torch.rand(classes, generator=generator, dtype=torch.float64)
    transform = disturbed(name, seed).double()
    results = [loss_and_gradients(input, target, transform, backend, **options) for backend in BACKENDS]
    for key, wanted in results[0].items():
        scale = max(wanted.abs().max().item() if wanted.numel() else 0.0, results[0]["loss"].abs().item(), 1.0)
        torch.testing.assert_close(results[1][key], wanted, rtol=1e-10, atol=1e-10 * scale, msg=key)


@pytest.mark.parametrize(
    ("gpu", "architecture", "runs"),
    [
        ((9, 0), "9.0", True), ((8, 9), "8.6", True), ((8, 6), "8.9", False), ((9, 0), "8.0", False),
        ((9, 0), "8.0+PTX", True), ((12, 0), "10.0+PTX", True), ((8, 0), "9.0+PTX", False),
        ((9, 0), "9.0a", True), ((10, 3), "10.0f", True), ((12, 0), "10.0f", False), ((10, 3), "10.0a", False),
    ],
)  # fmt: skip
def test_gpus_that_compiled_kernels_run_on(gpu: tuple[int, int], architecture: str, runs: bool) -> None:
    assert row_kernels.runs_on(gpu, architecture) is runs


def test_why_the_cuda_backend_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a build with CUDA says where there is no GPU, or another one, whatever there is on this machine."""
    build = {"torch": torch.__version__, "cuda": "13.0", "cuda_architectures": "8.0 9.0 10.0+PTX"}
    monkeypatch.setattr(row_kernels, "extension", SimpleNamespace(build_info=lambda: build))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert str(ms.backends.available()["cuda"]).startswith(
        "not available: built, no device: CUDA 13.0 kernels for 8.0 9.0 10.0+PTX"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert "but this GPU is 7.5: install again with TORCH_CUDA_ARCH_LIST=7.5" in str(row_kernels.PROBLEMS["cuda"]())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert row_kernels.PROBLEMS["cuda"]() is None
    build["cuda"], build["cuda_problem"] = None, "torch is a CPU build"  # type: ignore[assignment]
    assert str(row_kernels.PROBLEMS["cuda"]()) == "the C++ extension was built without CUDA: torch is a CPU build"
