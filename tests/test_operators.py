"""The operators: opcheck, torch.compile, torch.func, autocast, double backward, instruction sets, memory and speed."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from losses import TRANSFORMS, disturbed, loss_and_gradients
from torch import Tensor, nn
from torch.nn import functional as F

import monosoftmax as ms
from monosoftmax import ops
from monosoftmax.backends import extension

ROWS, CLASSES = 6, 41


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    target = torch.randint(0, CLASSES, (ROWS,))
    target[1] = -100
    return 3 * torch.randn(ROWS, CLASSES), target


def _arguments(name: str) -> tuple[Tensor, str, list[float]]:
    transform = disturbed(name)
    return transform.coefficients().detach().requires_grad_(), name, list(transform.constants())


_OPTIONS = [(-100, 0.0, 0.0, False), (-100, 0.1, 0.01, True)]


def _opcheck(name: str, arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(ops.operator(name, "cpu"), arguments)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("options", _OPTIONS)
def test_opcheck_cross_entropy(batch: tuple[Tensor, Tensor], name: str, options: tuple[Any, ...]) -> None:
    input, target = batch
    weight = torch.rand(CLASSES) if options[1] else None
    coefficients, *rest = _arguments(name)
    arguments = (input.requires_grad_(), target, weight, coefficients, *rest, *options)
    _opcheck("cross_entropy", (*arguments, None, False, False))
    _opcheck("cross_entropy", (*arguments, torch.tensor(0.3), False, False))
    row_stats = ops.operator("cross_entropy", "cpu")(*arguments, None, False, False)[2].detach()
    upstream = torch.rand(ROWS), torch.rand(ROWS) if options[3] else None
    below = (target, weight, coefficients.detach(), *rest)
    for needs in [(True, True), (True, False), (False, True)]:
        _opcheck("cross_entropy", (*arguments, torch.tensor(0.3), *needs))
        _opcheck("cross_entropy_backward", (*upstream, input.detach(), *below, row_stats, *options[:3], *needs))
    for need in (True, False):
        _opcheck("cross_entropy_", (input.detach().clone(), *below, *options, torch.tensor(0.3), need))
        _opcheck("cross_entropy_backward_", (*upstream, input.detach().clone(), *below, row_stats, *options[:3], need))


@pytest.mark.parametrize("name", ["identity", "plif", "gss"])
@pytest.mark.parametrize("options", _OPTIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck_linear_cross_entropy(name: str, options: tuple[Any, ...], bias: bool) -> None:
    torch.manual_seed(0)
    target = torch.randint(0, CLASSES, (ROWS,))
    head = [torch.randn(ROWS, 5), torch.randn(CLASSES, 5), torch.randn(CLASSES) if bias else None]
    leaves = [None if each is None else each.clone().requires_grad_() for each in head]
    weight = torch.rand(CLASSES) if options[1] else None
    coefficients, *rest = _arguments(name)
    return_lse, options = options[3], (*options[:3], "chunked", 0, 0.0)
    wishes = (None, return_lse, return_lse)  # when gradients are computed, log_prob, lse
    arguments = (*leaves, target, weight, coefficients, *rest, *options, *wishes)
    _opcheck("linear_cross_entropy", (*arguments, None, *(False,) * 4))
    _opcheck("linear_cross_entropy", (*arguments, torch.tensor(0.3), *(False,) * 4))
    row_stats = ops.operator("linear_cross_entropy", "cpu")(*arguments, None, *(False,) * 4)[2].detach()
    upstream = torch.rand(ROWS), torch.rand(ROWS) if return_lse else None
    below = (*head, target, weight, coefficients.detach(), *rest)
    for needs in [(True, True, bias, True), (False, True, False, False), (False, False, False, True)]:
        _opcheck("linear_cross_entropy", (*below, *options, *wishes, torch.tensor(0.3), *needs))
        _opcheck("linear_cross_entropy_backward", (*upstream, *below, row_stats, *options, *needs))
    _opcheck("linear_token_statistics", (*head, target, coefficients.detach(), *rest, -100))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_opcheck_token_statistics(batch: tuple[Tensor, Tensor], name: str) -> None:
    coefficients, *rest = _arguments(name)
    _opcheck("token_statistics", (*batch, coefficients.detach(), *rest, -100))


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_log_softmax(batch: tuple[Tensor, Tensor], name: str, dtype: torch.dtype) -> None:
    input = batch[0]
    coefficients, *rest = _arguments(name)
    torch.library.opcheck(ops.operator("log_softmax", "cpu"), (input.requires_grad_(), coefficients, *rest, dtype))
    row_stats = ops.operator("log_softmax", "cpu")(input, coefficients, *rest, dtype)[1].detach()
    backward = (
        torch.rand_like(input).to(dtype), input.detach(), coefficients.detach(), *rest, row_stats, True, True
    )  # fmt: skip
    torch.library.opcheck(ops.operator("log_softmax_backward", "cpu"), backward)


def test_every_operator_is_opchecked() -> None:
    """In the tests above."""
    losses = {"cross_entropy", "cross_entropy_backward", "cross_entropy_", "cross_entropy_backward_"}
    linear = {"linear_cross_entropy", "linear_cross_entropy_backward", "linear_token_statistics"}
    assert set(ops.SCHEMAS) == losses | linear | {"token_statistics", "log_softmax", "log_softmax_backward"}


@pytest.mark.parametrize(("compiler", "exact"), [("aot_eager", True), ("inductor", False)])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_compiled_training_step(compiler: str, exact: bool, backend: Any) -> None:
    torch.manual_seed(0)
    layer = ms.MonotonicSoftmax(8, CLASSES, ms.transforms.PLIF(16, 4.0), backend=backend)
    results = []
    compiled = torch.compile(
        lambda hidden, target: layer(hidden, target).loss, fullgraph=True, dynamic=True, backend=compiler
    )
    for step in (lambda h, t: layer(h, t).loss, compiled):
        gradients = []
        for rows in (6, 9):  # a second shape: dynamic
            generator = torch.Generator().manual_seed(rows)
            hidden = torch.randn(rows, 8, generator=generator).requires_grad_()
            target = torch.randint(0, CLASSES, (rows,), generator=generator)
            layer.zero_grad()
            loss = step(hidden, target)
            loss.backward()
            gradients += [loss.detach(), hidden.grad, *(p.grad.clone() for p in layer.parameters())]  # type: ignore[union-attr]
        results.append(gradients)
    for eager, other in zip(*results, strict=True):
        if exact:
            assert torch.equal(eager, other)
        else:
            torch.testing.assert_close(eager, other, rtol=2e-5, atol=1e-7)


def test_compiled_tables_of_coefficients(batch: tuple[Tensor, Tensor]) -> None:
    """Inductor of torch 2.9 to 2.11 loses the gradients of several look-ups (:func:`.transforms.base.of_pieces`)."""
    transform, target = disturbed("spline"), batch[1]

    def loss(z: Tensor) -> Tensor:
        result: Tensor = ms.cross_entropy(z, target, transform, backend="reference")
        return result

    wanted = torch.autograd.grad(loss(batch[0]), [*transform.parameters()])
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(batch[0]), [*transform.parameters()])
    for a, b in zip(got, wanted, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_compiled_loss(batch: tuple[Tensor, Tensor], name: str) -> None:
    transform = disturbed(name)
    input, target = batch[0].requires_grad_(), batch[1]
    torch._dynamo.reset()

    def loss(z: Tensor, t: Tensor) -> Tensor:
        result: Tensor = ms.cross_entropy(z, t, transform, label_smoothing=0.1, z_loss=0.01, backend="cpu")
        return result

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    wanted = torch.autograd.grad(loss(input, target), [input, *transform.parameters()])
    got = torch.autograd.grad(compiled(input, target), [input, *transform.parameters()])
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


def test_func_transforms(batch: tuple[Tensor, Tensor]) -> None:
    """func.grad is right, and so is torch.compile of it, where a common pattern silently gives zeros."""
    input, target = batch
    transform = disturbed("plif", num_pieces=16, bound=4.0)
    wanted = loss_and_gradients(input, target, transform, "cpu")["input"]

    def loss(z: Tensor) -> Tensor:
        result: Tensor = ms.cross_entropy(z, target, transform, backend="cpu")
        return result

    assert wanted.abs().max() > 0
    torch.testing.assert_close(torch.func.grad(loss)(input), wanted)
    for compiler in ("eager", "aot_eager", "inductor"):
        torch._dynamo.reset()
        gradient = torch.compile(torch.func.grad(loss), fullgraph=True, backend=compiler)(input)
        torch.testing.assert_close(gradient, wanted)

    def log_p(z: Tensor) -> Tensor:
        return ms.log_softmax(z, transform, backend="cpu").square().sum()

    leaf = input.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(log_p(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(log_p)(input), wanted)
    torch.testing.assert_close(
        torch.compile(torch.func.grad(log_p), fullgraph=True, backend="aot_eager")(input), wanted
    )


def test_func_grad_of_the_parameters(batch: tuple[Tensor, Tensor]) -> None:
    input, target = batch
    loss = ms.MonotonicCrossEntropyLoss(disturbed("spline"), backend="cpu")
    parameters = {name: p.detach() for name, p in loss.named_parameters()}

    def call(parameters: dict[str, Tensor]) -> Tensor:
        result: Tensor = torch.func.functional_call(loss, parameters, (input, target))
        return result

    wanted = loss_and_gradients(input, target, loss.transform, "cpu")
    for name, gradient in torch.func.grad(call)(parameters).items():
        torch.testing.assert_close(gradient, wanted[name.removeprefix("transform.")])


@pytest.mark.parametrize("function", [ms.cross_entropy, ms.log_softmax])
def test_double_backward_raises(batch: tuple[Tensor, Tensor], function: Callable[..., Tensor]) -> None:
    input = batch[0].requires_grad_()
    arguments = (input, batch[1]) if function is ms.cross_entropy else (input,)
    result = function(*arguments, disturbed("gss"), backend="cpu").square().sum()
    (gradient,) = torch.autograd.grad(result, input, create_graph=True)
    with pytest.raises(RuntimeError, match='double backward; use backend="reference"'):
        gradient.sum().backward()


def test_autocast() -> None:
    torch.manual_seed(0)
    layer = ms.MonotonicSoftmax(16, CLASSES, ms.transforms.PLIF())
    hidden, target = torch.randn(5, 16), torch.randint(0, CLASSES, (5,))
    wanted = layer(hidden, target).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = layer(hidden, target).loss
        # Arithmetic on logits is in float32 whatever autocast says.
        logits = F.linear(hidden, layer.weight, layer.bias)
        assert logits.dtype == torch.bfloat16
        assert loss.dtype == torch.float32
        assert torch.equal(loss, ms.cross_entropy(logits.float(), target, layer.transform))
    loss.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-2, atol=1e-2)
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32


def test_saved_tensors_and_checkpoint(batch: tuple[Tensor, Tensor]) -> None:
    """Nothing of the size of the logits is saved but the logits themselves and their gradient."""
    input, target = batch[0].requires_grad_(), batch[1]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        loss = ms.cross_entropy(input, target, ms.transforms.PLIF(), backend="cpu")
    large = {t.data_ptr() for t in saved if t.numel() >= input.numel()}
    gradient = loss.grad_fn.saved_tensors[-2]  # type: ignore[union-attr]
    assert gradient.shape == input.shape and large == {input.data_ptr(), gradient.data_ptr()}
    loss.backward()
    first = input.grad.clone()  # type: ignore[union-attr]
    input.grad = None
    again = torch.utils.checkpoint.checkpoint(
        lambda z: ms.cross_entropy(z, target, ms.transforms.PLIF(), backend="cpu"), input, use_reentrant=False
    )
    again.backward()
    assert torch.equal(input.grad, first)


def test_module_in_a_training_loop_uses_the_fused_kernel(batch: tuple[Tensor, Tensor]) -> None:
    """auto takes the cpu operator for CPU tensors: seen in the profile, not only in explain()."""
    assert ms.backends.explain("cross_entropy", batch[0]).backend == "cpu"
    model = nn.Sequential(nn.Linear(4, CLASSES))
    with torch.profiler.profile() as profile:
        ms.MonotonicCrossEntropyLoss(ms.transforms.PLIF())(model(torch.randn(ROWS, 4)), batch[1]).backward()
    names = {event.name for event in profile.events()}  # type: ignore[union-attr]
    # The gradient of a mean is computed with the loss.
    assert "monosoftmax::cross_entropy" in names and "monosoftmax::cross_entropy_backward" not in names


_EVERY_TRANSFORM = """
import json, torch
from losses import TRANSFORMS, disturbed, loss_and_gradients
import monosoftmax as ms
torch.manual_seed(0)
input, target = 3 * torch.randn(5, 2083), torch.randint(0, 2083, (5,))
result = {}
for name in TRANSFORMS:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        values = loss_and_gradients(input.to(dtype), target, disturbed(name), "cpu", label_smoothing=0.1)
        result[f"{name} {dtype}"] = {key: value.double().flatten()[:50].tolist() for key, value in values.items()}
print(json.dumps([str(ms.backends.available()["cpu"]), result]))
"""


def _run_with_capability(capability: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"MONOSOFTMAX_CPU_CAPABILITY": capability}
    return subprocess.run(
        [sys.executable, "-c", _EVERY_TRANSFORM],
        env=environment,
        cwd=os.path.dirname(__file__),
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_every_instruction_set_gives_the_same_result() -> None:
    assert extension is not None
    results = {}
    for capability in ("default", "avx2", "avx512"):
        run = _run_with_capability(capability)
        if run.returncode != 0:
            assert "MONOSOFTMAX_CPU_CAPABILITY must be one of" in run.stderr, run.stderr
            continue
        status, results[capability] = json.loads(run.stdout)
        assert f"{capability} instructions" in status
    assert "default" in results and extension.cpu_capability() in results
    for capability, result in results.items():
        for case, values in result.items():
            for key, value in values.items():
                wanted = torch.tensor(results["default"][case][key], dtype=torch.float64)
                scale = wanted.abs().max().item()
                tolerance = 1e-12 if "float64" in case else 1e-5 if "float32" in case or key != "input" else 1e-2
                got = torch.tensor(value, dtype=torch.float64)
                assert (got - wanted).abs().max() <= tolerance * scale + 1e-12, (capability, case, key)


def test_unknown_instruction_set_is_refused() -> None:
    run = _run_with_capability("sse9")
    assert run.returncode != 0
    assert "MONOSOFTMAX_CPU_CAPABILITY must be one of" in run.stderr and "got sse9" in run.stderr


_PEAK_MEMORY = """
import torch, monosoftmax as ms
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
target, transform = torch.randint(0, 32000, (512,)), ms.transforms.PLIF(64)
small = torch.randn(512, 100, requires_grad=True)
ms.cross_entropy(small, target % 100, transform, backend="cpu").backward()
input = torch.randn(512, 32000, requires_grad=True)
open("/proc/self/clear_refs", "w").write("5")
before = peak()
loss = ms.cross_entropy(input, target, transform, backend="cpu")
loss.backward()
print((peak() - before) / 1024 - 512 * 32000 * 4 / 2**20)
"""


def test_memory_beyond_inputs_and_gradients() -> None:
    """N=512, V=32000, PLIF with 64 pieces, forward and backward: under 5 MiB beyond the logits and their gradient."""
    run = subprocess.run([sys.executable, "-c", _PEAK_MEMORY], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 5, run.stdout


@pytest.mark.slow
def test_speed() -> None:
    """PLIF, N=512, V=32000, 2 threads: 6 times faster than the reference, within 3 times plain F.cross_entropy."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        input = torch.randn(512, 32000, requires_grad=True)
        target = torch.randint(0, 32000, (512,))
        transform = ms.transforms.PLIF(64)
        cases: dict[str, Callable[[], Tensor]] = {
            "plain": lambda: F.cross_entropy(input, target),
            "fused": lambda: ms.cross_entropy(input, target, transform, backend="cpu"),
            "reference": lambda: ms.cross_entropy(input, target, transform, backend="reference"),
        }
        seconds: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(6):
            for name, case in cases.items():
                input.grad = None
                start = time.perf_counter()
                case().backward()
                seconds[name].append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    plain, fused, reference = (statistics.median(seconds[name][1:]) for name in ("plain", "fused", "reference"))
    assert reference / fused >= 6, seconds
    assert fused / plain <= 3, seconds
