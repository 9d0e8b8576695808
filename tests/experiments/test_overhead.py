"""What the experiment ``overhead`` times, that it checks before it times, and what its report says."""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("pandas", reason="the experiments need requirements/dev.txt")

from benchmarks.engine.experiment import NotRun, Record, Results, Unit
from benchmarks.engine.store import Store
from benchmarks.overhead import contestants, memory, presets, results, timing, variants
from benchmarks.overhead.cases import Case, make_inputs
from benchmarks.overhead.experiment import Overhead
from benchmarks.overhead.presets import Timing

pytestmark = pytest.mark.filterwarnings("ignore:monosoftmax runs the slow reference backend")

CPU = torch.device("cpu")
LOGITS = Case("logits", "train", 6, 90, None, "float32", 1.0)
HEAD = Case("head", "train", 6, 90, 8, "float32", 1.0)


@pytest.fixture(autouse=True)
def small_and_unlimited(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of 64 KiB, turns of one call, and no process for each contestant."""
    monkeypatch.setitem(timing.COPY_BYTES, "cpu", 2**16)
    monkeypatch.setattr(timing, "_TURN", 0.0)
    monkeypatch.setattr(memory, "cpu_peak", lambda case, name: 3 * 2**20)


def test_the_stored_results_are_those_of_the_units() -> None:
    store = Store("overhead")
    found = store.results()
    units = {unit.name: unit for unit in Overhead().units(found)}
    assert len(found) >= 28 and set(found) <= set(units)
    for unit in units.values():
        store.require_settings(unit, found)


def test_a_case_says_its_least_work_and_the_width_of_its_logits() -> None:
    assert LOGITS.minimum_bytes == 2 * 6 * 90 * 4 + 6 * 8
    assert replace(LOGITS, mode="no-grad", dtype="bfloat16").minimum_bytes == 6 * 90 * 2 + 6 * 8
    assert HEAD.minimum_bytes == 2 * (6 * 8 + 90 * 8) * 4 + 6 * 8
    for case in (LOGITS, replace(HEAD, dim=64)):
        operands = make_inputs(replace(case, rows=100, classes=2000, std=20.0), CPU).operands
        logits = operands[0] if case.dim is None else F.linear(*operands)
        assert logits.std().item() == pytest.approx(20.0, rel=0.05)


@pytest.mark.parametrize("mode", ["train", "no-grad"])
def test_the_products_are_those_of_the_case(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case, done, multiply = replace(HEAD, mode=mode), [], torch.mm
    inputs = make_inputs(case, CPU)
    monkeypatch.setattr(torch, "mm", lambda one, other, out: done.append(multiply(one, other, out=out)))
    timing.probes(case, inputs)["products"]()
    x, weight = (operand.detach() for operand in inputs.operands)
    logits = x @ weight.T
    torch.testing.assert_close(done, [logits, logits @ weight, logits.T @ x][: 3 if mode == "train" else 1])


def _result(name: str, case: Case) -> tuple[str, tuple[float, ...]]:
    contestant = contestants.prepare(name, case, make_inputs(case, CPU))
    return contestant.function, contestants.fingerprint(contestant)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("mode", ["train", "no-grad"])
@pytest.mark.parametrize("case", [LOGITS, HEAD], ids=lambda case: case.group)
def test_forms_of_a_function_agree(case: Case, mode: Any, dtype: str) -> None:
    case = replace(case, mode=mode, dtype=dtype)
    known: dict[str, tuple[float, ...]] = {}
    for name in contestants.names(case.group, dtype, (16,), ("*",), on_gpu=False):
        if not name.endswith(("compiled", "cut-cross-entropy")):
            with suppress(contestants.Unavailable):  # by an older torch
                function, found = _result(name, case)
                assert len(found) == 1 + (mode == "train") * (1 if case.dim is None else 2)
                assert contestants.disagreement(case, found, known.setdefault(function, found)) is None, name
    assert "identity" not in known and "plain" in known and len(known) >= 9


@pytest.mark.slow
def test_compiled_forms_agree() -> None:
    for name in ("plain compiled", "identity reference compiled", "plain cut-cross-entropy"):
        assert contestants.disagreement(HEAD, _result(name, HEAD)[1], _result("plain eager", HEAD)[1]) is None


def test_disagreement_names_what_differs() -> None:
    assert contestants.disagreement(LOGITS, (1.0, 2.0), (1.0001, 2.0)) is None
    assert contestants.disagreement(LOGITS, (1.0, 2.0), (1.0, 2.1)) == "norm of gradient 0 2 instead of 2.1"
    assert "loss" in str(contestants.disagreement(LOGITS, (math.inf,), (math.inf,)))


def test_a_step_returns_every_gradient_and_leaves_none_behind() -> None:
    inputs = make_inputs(LOGITS, CPU)
    step = contestants.prepare("sigmoid_cap fused", LOGITS, inputs).step()
    assert [tuple(tensor.shape) for tensor in step] == [(), (6, 90), (1,), (1,), (1,)]
    assert inputs.operands[0].grad is None


def test_what_liger_overwrites_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed: requirements/peers.txt")
    # Imported anew, to be interpreted: other tests compile its kernels.
    for name in [name for name in sys.modules if name.partition(".")[0] == "liger_kernel"]:
        monkeypatch.delitem(sys.modules, name)
    inputs = make_inputs(LOGITS, CPU)
    before = inputs.operands[0].detach().clone()
    with timing.emulating():
        found = contestants.fingerprint(contestants.prepare("plain liger", LOGITS, inputs))
    assert contestants.disagreement(LOGITS, found, _result("plain eager", LOGITS)[1]) is None
    assert torch.equal(inputs.operands[0], before)


def test_the_preset_gpu_compiles_little_and_asks_for_backends_by_name() -> None:
    gpu = {name: each for name, each in presets.timings() if name.startswith("gpu/")}
    names = [name for each in gpu.values() for name in each.contestants]
    assert sum(name.endswith("compiled") for name in names) == 4
    assert not any(name.endswith(("fused", "reference")) for name in names)
    assert {case.classes % 8 for case in {presets.shrunk(each.case) for each in gpu.values()}} == {0, 1}


def test_plans_and_launches_are_as_before_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    wishes: list[dict[str, int]] = []
    extension = SimpleNamespace(tune_plans=lambda **each: wishes.append(each))
    monkeypatch.delitem(sys.modules, "monosoftmax_cuda_host", raising=False)
    monkeypatch.setattr(variants.ms.backends, "extension", extension)
    block = variants.head_products._BLOCK
    with pytest.raises(RuntimeError), variants.tuned("cuda", fewest_blocks=2, block=1):
        assert variants.head_products._BLOCK == 1
        raise RuntimeError
    assert wishes == [{"fewest_blocks": 2}, {}] and block == variants.head_products._BLOCK
    pytest.importorskip("triton", reason="Triton is not installed")
    launch = importlib.import_module("monosoftmax.triton_kernels.launch")
    with variants.tuned("triton", lanes=64):
        assert launch.tile_arguments(torch.zeros(2, 5000))["LANES"] == 64
    assert launch.tile_arguments(torch.zeros(2, 5000))["LANES"] == 256


def test_contestants_take_turns_and_who_fails_takes_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_on_cpu", lambda action: {"ms": action()})
    calls: list[str] = []

    def call(name: str) -> float:
        calls.append(name)
        return calls.count(name) / (name != "bad")

    found = timing.take_turns({name: partial(call, name) for name in ("a", "b", "c", "bad")}, CPU, 5)
    assert found["bad"] == {"status": "failed: ZeroDivisionError: division by zero"} and calls.count("bad") == 1
    assert found["a"] == {"median_ms": 3.0, "first_quartile_ms": 2.0, "third_quartile_ms": 4.0}
    calls.remove("bad")
    rounds = [calls[start : start + 3] for start in range(0, 15, 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds) and len(set(map(tuple, rounds))) > 1


def test_a_whole_unit_and_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_on_cpu", lambda action: {"ms": 2.0})
    unit = Unit("quick/x", Timing(LOGITS, ("plain eager", "plif-64 fused", "plif-64 cuda"), 2))
    times = dict(Overhead().run(unit, None).times)  # type: ignore[arg-type]
    rows = times["contestants"]
    assert times["products_ms"] is None and times["device"] == "cpu"
    assert times["memory_ms"] == pytest.approx(LOGITS.minimum_bytes / 2**16)
    assert rows["plif-64 fused"]["median_ms"] == 2.0 and rows["plif-64 fused"]["peak_bytes"] == 3 * 2**20
    assert rows["plif-64 cuda"]["status"].startswith("not available:") and "median_ms" not in rows["plif-64 cuda"]


@pytest.mark.parametrize("factor", [1.01, math.nan])
def test_what_is_wrong_is_not_timed(factor: float) -> None:
    def wrong(name: str, *given: Any) -> contestants.Contestant:
        found = contestants.prepare(name, *given)
        return found if name == "plain eager" else replace(found, step=lambda: (factor * found.step()[0],))

    _, row = timing.measure(Timing(LOGITS, ("plain eager", "identity fused"), 2), wrong)["contestants"].values()
    assert "disagrees with plain eager: loss" in row["status"] and "median_ms" not in row


def test_units_run_without_what_writes_reports() -> None:
    code = "import sys; sys.modules.update(dict.fromkeys(('pandas', 'jinja2', 'tabulate', 'matplotlib')))"
    code += "; from benchmarks.__main__ import COMMANDS; COMMANDS.main(['list', 'overhead', '--only', 'dry/*'])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "0 of 27 units are done" in found.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process's memory is measured on Linux only")
def test_peaks_are_those_beyond_inputs_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    case = replace(LOGITS, rows=100, classes=20_000)
    eager, fused, wrong = (memory.cpu_peak(case, name) for name in ("plain eager", "plif-64 fused", "none such"))
    # The logits have 8 MB. Eager holds log p and a copy of its gradient.
    assert isinstance(eager, int) and 7.2e6 < eager < 20e6
    assert isinstance(fused, int) and fused < 1.6e6 and wrong is None


def test_too_large_an_allocation_is_an_error() -> None:
    free = 1024 * memory._kib("/proc/meminfo", "MemAvailable")
    with pytest.raises(RuntimeError) as caught, memory.limited(CPU):
        torch.empty(free + 2**29, dtype=torch.uint8)
    assert memory.describe(caught.value) == "out of memory"
    assert memory.describe(ValueError("first\nsecond")) == "failed: ValueError: first"


def test_figures_and_ratios(tmp_path: Path) -> None:
    ms = {"plain eager": 12.0, "identity fused": 4.0, "plif-64 fused": 6.0}
    rows = {name: {"median_ms": value, "peak_bytes": 2**20} for name, value in ms.items()}
    times = {"memory_ms": 1.0, "products_ms": 4.0, "contestants": rows | {"plain compiled": {"status": "failed: x"}}}
    found = Results([Record("logits/a float32", {}, {}, times, 1.0, {"machine": "m"})])
    assert results.ratio(found, "logits/a float32", "plif-64 fused", "identity fused") == 1.5
    assert results.ratio(found, "logits/a float32", "plain eager", "floor") == 3.0
    for unit, name in (("logits/b", "plain eager"), ("logits/a float32", "plain compiled")):
        with pytest.raises(NotRun, match=f"--only '{unit}'"):
            results.figure(found, unit, name)
    text = " ".join(Overhead().section(found, tmp_path).split())
    assert "| a float32 | plif-64 fused | 6 | 1.50 | 0.50 | - | 1.50 | 1.0 |" in text
    assert "failed: x" in text and "Not run: `python -m benchmarks run overhead --only 'head*/*'`" in text
