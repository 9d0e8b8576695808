"""Memory of the fused losses in a process of its own, and logits with more elements than an int32 counts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_PEAK = """
import sys, torch, monosoftmax as ms
rows, features, classes, layer, mode = *map(int, sys.argv[1:4]), *sys.argv[4:]
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
def step(rows, classes):
    torch.manual_seed(0)
    input, weight = torch.randn(rows, features), torch.randn(classes, features)
    target, transform = torch.randint(0, classes, (rows,)), ms.transforms.PLIF(64)
    if mode == "training":
        input.requires_grad_(), weight.requires_grad_()
    open("/proc/self/clear_refs", "w").write("5")
    before = peak()
    if layer == "fused":
        loss = ms.linear_cross_entropy(input, weight, target, transform, backend="cpu")
    elif layer == "statistics":
        loss = ms.linear_token_statistics(input, weight, target, transform, backend="cpu")
    elif layer == "log_prob":
        found = ms.linear_log_prob(input, weight, target, transform, backend="cpu")
        loss = found.log_prob.sum() + found.entropy.sum()
    elif layer == "token_loss":
        def loss_fn(tokens): return tokens.log_prob.sum() + tokens.entropy.sum()
        loss = ms.linear_token_loss(loss_fn, input, weight, target, transform, backend="cpu")
    elif layer == "distillation":
        loss = ms.linear_distillation(input, weight, input.detach(), weight.detach().clone(), transform, backend="cpu")
    else:
        loss = ms.cross_entropy(torch.nn.functional.linear(input, weight), target, transform, backend="cpu")
    gradients = 0
    if mode == "training":
        (0.5 * loss).backward()
        gradients = 4 * (input.grad.numel() + weight.grad.numel())
    return (peak() - before) / 1024 - gradients / 2**20
step(8, classes)
print(step(rows, classes))
"""


def peak_mib(rows: int, features: int, classes: int, layer: str, mode: str, *, exact: bool = True) -> float:
    environment = dict(os.environ)
    if exact:  # every tensor is mapped when it is made and gone when it is freed
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _PEAK, *map(str, (rows, features, classes)), layer, mode],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return float(run.stdout)


@pytest.mark.slow
def test_memory_of_the_head_does_not_grow_with_the_batch() -> None:
    """V=16000, d=64: 256 rows of logits are 15.6 MiB, all of them 125 and 250. No second copy of a gradient."""
    peaks = [peak_mib(rows, 64, 16_000, "fused", "training") for rows in (2048, 4096)]
    assert max(peaks) < 15.7 + 4, peaks
    assert abs(peaks[1] - peaks[0]) < 1, peaks
    assert peak_mib(2048, 64, 16_000, "logits", "training") > 2 * 120


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["fused", "statistics"])
def test_memory_of_the_head_without_gradients(layer: str) -> None:
    """V=16000: 1024 rows of logits are 62.5 MiB, all of them 250."""
    assert peak_mib(4096, 64, 16_000, layer, "inference") < 62.5 + 4


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["fused", "statistics", "log_prob", "token_loss"])
def test_memory_with_the_usual_malloc(layer: str) -> None:
    """V=32000, d=64: 256 rows of logits are 31 MiB, all of them 500 and 2000. Freed memory may have holes, but few."""
    mode = "inference" if layer == "statistics" else "training"
    peaks = [peak_mib(rows, 64, 32_000, layer, mode, exact=False) for rows in (4096, 16384)]
    assert max(peaks) < 8 * 31.25, peaks


@pytest.mark.slow
def test_memory_of_distillation() -> None:
    """V=49152: 192 rows of logits are 36 MiB, and there are two buffers; all of them 1536, of two heads."""
    assert peak_mib(8192, 32, 49_152, "distillation", "training") < 100


@pytest.mark.slow
def test_more_logits_than_an_int32_counts() -> None:
    """16,385 x 131,072 in bfloat16, 4 GiB each for the logits and their gradient: beyond 2**31 elements."""
    code = """
import torch, monosoftmax as ms
rows, classes = 2**14 + 1, 2**17
assert rows * classes > 2**31
transform = ms.transforms.PLIF(64, init="random", generator=torch.Generator().manual_seed(0))
pattern = torch.randn(8, classes, generator=torch.Generator().manual_seed(1)).bfloat16()
logits = torch.empty(rows, classes, dtype=torch.bfloat16)
for start in range(0, rows, 8):
    logits[start : start + 8] = pattern[: min(8, rows - start)]
logits[-1] = pattern[5]
target = torch.arange(rows) * 7 % classes
logits.requires_grad_()
loss, lse = ms.cross_entropy(logits, target, transform, reduction="sum", return_lse=True, backend="cpu")
loss.backward()
check = [0, 1, 2**14 - 1, 2**14]
few = logits.detach()[check].requires_grad_()
each, wanted_lse = ms.cross_entropy(
    few, target[check], transform, reduction="none", return_lse=True, backend="reference"
)
each.sum().backward()
torch.testing.assert_close(lse[check], wanted_lse)
torch.testing.assert_close(logits.grad[check], few.grad, rtol=1e-2, atol=1e-9)
assert logits.grad[2**14].abs().max() > 0.5
assert transform.raw_slope.grad.isfinite().all()
rows_alone = ms.cross_entropy(logits.detach(), target, transform, reduction="none", backend="cpu")
torch.testing.assert_close(rows_alone[check], each.detach())
torch.testing.assert_close(rows_alone.sum(dtype=torch.float64).float(), loss.detach(), rtol=1e-5, atol=0)
"""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = int(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))
    if available < 11 * 2**20:
        pytest.skip(f"11 GiB of memory are needed, {available / 2**20:.1f} are free")
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
