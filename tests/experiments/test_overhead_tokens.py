"""The groups tokens, forward_kl and jsd of the experiment ``overhead``."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_summary
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("pandas", reason="the experiments need requirements/dev.txt")

from benchmarks.engine.experiment import Record, Results
from benchmarks.overhead import contestants, memory, presets, timing, tokens
from benchmarks.overhead.cases import Case, bare_products, make_inputs
from benchmarks.overhead.experiment import Overhead
from benchmarks.overhead.presets import Timing

CPU = torch.device("cpu")
TOKENS = Case("tokens", "train", 8, 90, 16, "float32", 1.0)
CASES = [replace(TOKENS, group=group) for group in tokens.GROUPS]


def small_timing(case: Case, monkeypatch: pytest.MonkeyPatch, *patterns: str) -> dict[str, Any]:
    monkeypatch.setitem(timing.COPY_BYTES, "cpu", 2**16)
    monkeypatch.setattr(timing, "_on_cpu", lambda action: {"ms": 2.0})
    monkeypatch.setattr(memory, "cpu_peak", lambda case, name: 2**20)
    found = tuple(name for name in contestants.names(case.group, case.dtype, (), patterns, on_gpu=False))
    return timing.measure(Timing(case, found, 1), contestants.prepare)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.group)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_contestants_agree(case: Case, dtype: str) -> None:
    """All but the compiled one, also with numbers of rows that are no multiples of four."""
    for rows in (8, 7):
        case = replace(case, rows=rows, dtype=dtype)
        inputs, first = make_inputs(case, CPU), None
        for name in contestants.names(case.group, dtype, (), ("*",), on_gpu=False):
            if name != "plain compiled":
                found = contestants.prepare(name, case, inputs)
                figures = contestants.fingerprint(found)
                first = first or figures
                assert (found.backend == "torch") is name.startswith("plain"), found.backend
                assert contestants.disagreement(case, figures, first) is None, name


def test_tokens_have_the_upstream_gradients_and_the_cap() -> None:
    inputs = make_inputs(replace(TOKENS, std=40.0), CPU)
    a, e = inputs.fixed
    x, weight = inputs.operands
    p = torch.distributions.Categorical(logits=30 * torch.tanh(x @ weight.T / 30))
    (e * p.entropy() - a * p.log_prob(inputs.target)).sum().backward()
    expected = [x.grad, weight.grad]
    for name in ("plain trl", "soft_cap linear_log_prob", "soft_cap linear_token_loss"):
        found = contestants.prepare(name, replace(TOKENS, std=40.0), inputs).step()[1:]
        torch.testing.assert_close(list(found), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.group)
def test_products_and_bytes(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three for tokens, four where the logits are computed again and for distillation."""
    inputs, shapes, multiply = make_inputs(case, CPU), [], torch.mm

    def count(one: torch.Tensor, other: torch.Tensor, out: torch.Tensor) -> None:
        multiply(one, other, out=out)
        shapes.append((one.shape[1], *out.shape))

    monkeypatch.setattr(torch, "mm", count)
    bare_products(case, inputs, logits_again=case.group == "tokens")()
    first = 16 if case.group == "tokens" else 32
    assert shapes == [(first, 8, 90), (16, 8, 90), (90, 8, 16), (8, 90, 16)]
    assert ("four_products" in timing.probes(case, inputs)) is (case.group == "tokens")
    fixed = sum(each.numel() * each.itemsize for each in inputs.fixed)
    assert case.minimum_bytes == 2 * (8 + 90) * 16 * 4 + fixed + 8 * 8


def test_distillation_has_the_divergence() -> None:
    case = replace(TOKENS, group="forward_kl")
    inputs = make_inputs(case, CPU)
    log_p, log_q = (F.linear(*pair).log_softmax(-1) for pair in (inputs.operands, inputs.fixed))
    expected = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    torch.testing.assert_close(contestants.prepare("plain eager", case, inputs).step()[0], expected.detach())


def test_presets_have_them_on_every_device() -> None:
    found = dict(presets.timings())
    for preset, count in (("tokens", 3), ("tokens_8192", 3), ("gpu", 3), ("dry", 3)):
        units = [name for name in found if name.startswith(f"{preset}/") and found[name].case.group in tokens.GROUPS]
        assert len(units) == count
        assert all(found[name].contestants for name in units)
    assert found["tokens/jsd train N=1024 d=512 teacher d=1024 V=49152 float32 std 1"].device == "cpu"


def test_the_report_and_the_page_of_a_gpu_have_their_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = small_timing(TOKENS, monkeypatch, "plain trl", "soft_cap *")
    times |= {"products_ms": 0.8, "four_products_ms": 1.0, "memory_ms": 0.1}
    text = " ".join(Overhead().section(Results([Record("tokens/x", {}, {}, times, 1.0, {})]), tmp_path).split())
    assert "| x | soft_cap linear_token_loss | 2 | - | - | - | 2.50 | 2.00 | 1.0 |" in text
    case = {"group": "tokens", "mode": "train", "rows": 8, "classes": 90, "dim": 16, "dtype": "float32"}
    page = "\n".join(gpu_summary._tables([{"name": "x", "case": case, **times}]))
    assert "| plain trl | 2.000 (2.50 x) |" in page


@pytest.mark.seconds
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process's memory is measured on Linux only")
def test_what_does_not_hold_the_logits() -> None:
    """V = 10,000: the logits of 1024 rows have 39 MiB, which plain PyTorch holds several times."""
    case = replace(TOKENS, rows=1024, classes=10_000)
    plain, ours = (memory.cpu_peak(case, name) for name in ("plain trl", "soft_cap linear_token_loss"))
    assert plain is not None and ours is not None
    assert plain > 100 * 2**20 and ours < 25 * 2**20
