"""The parts of the overhead benchmark, on logits of a few hundred numbers."""

from __future__ import annotations

import gc
import importlib
import json
import math
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("tabulate", reason="the benchmarks need requirements/dev.txt")
pytest.importorskip("matplotlib", reason="the benchmarks need requirements/dev.txt")
pytest.importorskip("tqdm", reason="the benchmarks need requirements/dev.txt")

from benchmarks.overhead import (
    cases,
    contestants,
    emulation,
    floors,
    limits,
    memory,
    peers,
    pictures,
    run,
    settings,
    targets,
    timing,
)
from benchmarks.overhead.cases import Case

pytestmark = pytest.mark.filterwarnings("ignore:monosoftmax runs the slow reference backend")

CPU = torch.device("cpu")
LOGITS = Case("logits", "train", 6, 90, None, "float32", 1.0)
HEAD = Case("head", "train", 6, 90, 8, "float32", 1.0)


def _as(case: Case, **changes: Any) -> Case:
    return Case(**{**case.to_json(), **changes})


@pytest.fixture(autouse=True)
def small_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of 64 KiB."""
    monkeypatch.setitem(floors.COPY_BUFFER_BYTES, "cpu", 2**16)


# Cases


def test_least_work_of_given_logits() -> None:
    assert LOGITS.minimum_bytes == 2 * 6 * 90 * 4 + 6 * 8
    assert _as(LOGITS, mode="no-grad").minimum_bytes == 6 * 90 * 4 + 6 * 8
    assert _as(LOGITS, dtype="bfloat16").minimum_bytes == 2 * 6 * 90 * 2 + 6 * 8
    assert LOGITS.flops == 0


def test_least_work_of_the_head() -> None:
    assert HEAD.minimum_bytes == 2 * (6 * 8 + 90 * 8) * 4 + 6 * 8
    assert HEAD.flops == 3 * 2 * 6 * 90 * 8
    assert _as(HEAD, mode="no-grad").flops == 2 * 6 * 90 * 8


@pytest.mark.parametrize("group, dim", [("logits", 8), ("head", None)])
def test_only_the_head_has_a_dim(group: Any, dim: int | None) -> None:
    with pytest.raises(ValueError, match=group):
        Case(group, "train", 6, 90, dim, "float32", 1.0)


@pytest.mark.parametrize("std", [1.0, 20.0])
@pytest.mark.parametrize("dim", [None, 64])
def test_logits_have_the_standard_deviation_of_the_case(dim: int | None, std: float) -> None:
    case = Case("logits" if dim is None else "head", "no-grad", 100, 2000, dim, "float32", std)
    inputs = cases.make_inputs(case, CPU)
    logits = inputs.operands[0] if dim is None else F.linear(*inputs.operands)
    assert logits.shape == (100, 2000)
    assert logits.std().item() == pytest.approx(std, rel=0.05)


def test_inputs_are_the_same_every_time() -> None:
    one, other = (cases.make_inputs(HEAD, CPU) for _ in range(2))
    assert all(map(torch.equal, (*one.operands, one.target), (*other.operands, other.target)))
    assert all(operand.requires_grad for operand in one.operands)
    assert not any(operand.requires_grad for operand in cases.make_inputs(_as(HEAD, mode="no-grad"), CPU).operands)


# Contestants


def _names(case: Case, *patterns: str) -> list[str]:
    return contestants.names(case.group, case.dtype, (16,), patterns or ("*",))


def _runs_at_once(name: str) -> bool:
    if "linear_cross_entropy" in name and not hasattr(F, "linear_cross_entropy"):
        return False  # test_an_older_torch_has_no_linear_cross_entropy says so
    return not name.endswith(("compiled", "cut-cross-entropy"))


def test_every_transform_is_there_in_every_form() -> None:
    from monosoftmax.transforms import REGISTRY

    found = contestants.names("logits", "float32", (16, 64))
    functions = [*(name for name in REGISTRY if name != "plif"), "plif-16", "plif-64"]
    for function in functions:
        assert {f"{function} {form}" for form in ("reference", "reference compiled", "fused")} <= set(found)
    assert found[:2] == ["plain eager", "plain compiled"]
    assert len(found) == 2 + 3 * len(functions)


def test_contestants_of_the_head() -> None:
    found = contestants.names("head", "float32", (64,))
    mixtures = {f"mos-{count} {form}" for count in (4, 15) for form in ("published", "fair")}
    peers_of_it = {f"plain {form}" for form in ("linear_cross_entropy", "linear_cross_entropy chunked")}
    assert mixtures | peers_of_it | {"plain cut-cross-entropy", "moc-4 fused", "moc-15 fused"} <= set(found)


def test_narrow_logits_are_held_against_wide_ones() -> None:
    assert "gss fused float32" in contestants.names("logits", "float16", ())
    assert "gss fused float32" not in contestants.names("logits", "float32", ())
    case = _as(LOGITS, dtype="bfloat16")
    inputs = cases.make_inputs(case, CPU)
    wide = contestants.prepare("gss fused float32", case, inputs)
    assert [g.dtype for g in wide.step()[1:2]] == [torch.float32]
    assert [g.dtype for g in contestants.prepare("gss fused", case, inputs).step()[1:2]] == [torch.bfloat16]


def test_contestants_by_backend_are_those_of_a_gpu() -> None:
    for group, forms in (("logits", {"cuda", "triton"}), ("head", {"cuda", "triton chunked", "triton recompute"})):
        everywhere, on_gpu = (contestants.names(group, "bfloat16", (64,), on_gpu=each) for each in (False, True))
        assert set(everywhere) < set(on_gpu)
        added = set(on_gpu) - set(everywhere)
        assert {f"plif-64 {form}" for form in forms} | {"plain liger"} <= added
        assert ("plain cut-cross-entropy kernels" in added) == (group == "head")
        assert not any(name.startswith(("mos-", "moc-")) for name in added)


@pytest.mark.parametrize("form", ["cuda", "triton", "triton recompute"])
def test_a_named_backend_is_not_replaced(form: str) -> None:
    with pytest.raises(peers.Unavailable, match=f'backend="{form.split()[0]}" cannot take this call'):
        contestants.prepare(f"plif-64 {form}", HEAD, cases.make_inputs(HEAD, CPU))


def test_what_liger_overwrites_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed: requirements/peers.txt")
    # Imported anew, to be interpreted: other tests compile its kernels.
    for name in [name for name in sys.modules if name.partition(".")[0] == "liger_kernel"]:
        monkeypatch.delitem(sys.modules, name)
    inputs = cases.make_inputs(LOGITS, CPU)
    before = inputs.operands[0].detach().clone()
    with emulation.emulating():
        eager, liger = (contestants.prepare(f"plain {form}", LOGITS, inputs) for form in ("eager", "liger"))
        expected = contestants.fingerprint(LOGITS, eager.step())
        for _ in range(2):
            liger.reset()
            found = contestants.fingerprint(LOGITS, liger.step())
            assert contestants.disagreement(LOGITS, found, expected) is None
    assert torch.equal(inputs.operands[0], before)


def test_patterns_choose_contestants() -> None:
    assert _names(LOGITS, "plain *", "plif-* fused") == ["plain eager", "plain compiled", "plif-16 fused"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("case", [LOGITS, HEAD], ids=lambda case: case.group)
def test_forms_of_a_function_agree(case: Case, mode: Any, dtype: str) -> None:
    case = _as(case, mode=mode, dtype=dtype)
    inputs = cases.make_inputs(case, CPU)
    known: dict[str, tuple[float, ...]] = {}
    for name in filter(_runs_at_once, _names(case)):
        found = contestants.fingerprint(case, contestants.prepare(name, case, inputs).step())
        assert len(found) == 1 + (mode == "train") * len(inputs.operands)
        expected = known.setdefault(contestants.same_function(name), found)
        assert contestants.disagreement(case, found, expected) is None, name
    assert {contestants.same_function(f"identity {form}") for form in ("fused", "reference")} == {"plain"}


def test_a_step_returns_every_gradient_and_leaves_none_behind() -> None:
    inputs = cases.make_inputs(LOGITS, CPU)
    step = contestants.prepare("sigmoid_cap fused", LOGITS, inputs).step()
    assert [tuple(tensor.shape) for tensor in step] == [(), (6, 90), (1,), (1,), (1,)]
    assert inputs.operands[0].grad is None
    mixture = contestants.prepare("mos-4 fair", HEAD, cases.make_inputs(HEAD, CPU))
    assert mixture.gradient_bytes == 4 * (6 * 8 + 90 * 8 + 4 * 8 + 4 * 8 * 8 + 4 * 8)


def test_no_grad_computes_the_loss_alone() -> None:
    case = _as(LOGITS, mode="no-grad")
    step = contestants.prepare("plif-16 reference", case, cases.make_inputs(case, CPU)).step()
    assert len(step) == 1 and step[0].grad_fn is None


def test_a_mixture_uses_the_weight_of_the_case() -> None:
    inputs = cases.make_inputs(HEAD, CPU)
    mixture = contestants.prepare("moc-4 fused", HEAD, inputs)
    assert mixture.differentiated[1].data_ptr() == inputs.operands[1].data_ptr()


def test_disagreement_names_what_differs() -> None:
    assert contestants.disagreement(LOGITS, (1.0, 2.0), (1.0001, 2.0)) is None
    assert contestants.disagreement(LOGITS, (1.0, 2.0), (1.0, 2.1)) == "norm of gradient 0 2 instead of 2.1"
    assert "loss" in str(contestants.disagreement(LOGITS, (math.nan,), (1.0,)))


@pytest.mark.slow
@pytest.mark.parametrize("case", [LOGITS, HEAD], ids=lambda case: case.group)
def test_compiled_forms_agree(case: Case) -> None:
    inputs = cases.make_inputs(case, CPU)
    expected = contestants.fingerprint(case, contestants.prepare("plain eager", case, inputs).step())
    names = [name for name in _names(case, "plain *", "identity *") if name.endswith(("compiled", "cut-cross-entropy"))]
    if importlib.util.find_spec("cut_cross_entropy") is None:  # test_cut_cross_entropy_needs_no_triton says so
        names = [name for name in names if not name.endswith("cut-cross-entropy")]
    assert len(names) >= 2
    for name in names:
        found = contestants.fingerprint(case, contestants.prepare(name, case, inputs).step())
        assert contestants.disagreement(case, found, expected) is None, name


# Other packages


def test_an_older_torch_has_no_linear_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    with pytest.raises(peers.Unavailable, match="has no torch"):
        contestants.prepare("plain linear_cross_entropy", HEAD, cases.make_inputs(HEAD, CPU))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name="cut_cross_entropy")

    monkeypatch.setattr(importlib, "import_module", missing)
    peers.cut_cross_entropy.cache_clear()
    with pytest.raises(peers.Unavailable, match=r"requirements/peers\.txt"):
        peers.cut_cross_entropy()


def test_cut_cross_entropy_needs_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("cut_cross_entropy") is None:
        pytest.skip("cut-cross-entropy is not installed: requirements/peers.txt")
    for name in [name for name in sys.modules if name.partition(".")[0] == "cut_cross_entropy"]:
        monkeypatch.delitem(sys.modules, name)
    peers.cut_cross_entropy.cache_clear()
    loss, note = peers.cut_cross_entropy()
    assert callable(loss)
    if importlib.util.find_spec("triton") is None:
        assert "triton is not installed" in note
        with pytest.raises(ModuleNotFoundError, match="triton"):
            importlib.import_module("cut_cross_entropy")


# Time


def test_contestants_take_turns() -> None:
    calls: list[str] = []
    actions = {name: (lambda name=name: calls.append(name)) for name in "abcd"}
    samples = timing.take_turns(actions, timing.wall_clock, 5, failed=lambda name, error: pytest.fail(name))
    rounds = [calls[start : start + 4] for start in range(0, 20, 4)]
    assert all(sorted(round_) == list("abcd") for round_ in rounds)
    assert len(set(map(tuple, rounds))) > 1
    assert {name: len(seconds) for name, seconds in samples.items()} == dict.fromkeys("abcd", 5)


def test_who_fails_takes_no_further_turn() -> None:
    turns: list[int] = []
    told: list[tuple[str, Exception]] = []

    def fail_the_second_time() -> None:
        turns.append(1)
        if len(turns) == 2:
            raise ValueError("enough")

    samples = timing.take_turns(
        {"good": lambda: None, "bad": fail_the_second_time},
        timing.wall_clock,
        4,
        failed=lambda name, error: told.append((name, error)),
    )
    assert list(samples) == ["good"] and len(samples["good"]) == 4
    assert len(turns) == 2 and [(name, str(error)) for name, error in told] == [("bad", "enough")]
    assert gc.isenabled()


def test_the_clock_measures_the_action() -> None:
    assert timing.wall_clock("product", lambda: torch.randn(1000, 1000) @ torch.randn(1000, 1000))() > 1e-4


@pytest.fixture
def device_log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a CUDA device is told, in order. It runs at 1 GHz; its cache has 1 KiB, and the CPU's memory for its own."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            log.append(f"record on {stream}")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 250.0

    class Properties:
        L2_cache_size = 1024

    zero = Tensor.zero_
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("idle"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(timing, "_sleep", lambda cycles: log.append(f"sleep {cycles}"))
    monkeypatch.setattr(timing, "_cycles_per_second", lambda device: 1e9)
    monkeypatch.setattr(Tensor, "zero_", lambda self: log.append(f"flush {self.nbytes}") or zero(self))
    return log


def test_a_device_is_busy_until_all_of_a_call_is_issued(device_log: list[str]) -> None:
    clock = timing.DeviceClock(CPU, {"a": 2e-3, "b": 0.0})
    actions = {name: (lambda name=name: device_log.append(name)) for name in "ab"}
    samples = timing.take_turns(actions, clock, 1, failed=lambda name, error: pytest.fail(name))
    assert samples == {"a": [0.25], "b": [0.25]}
    begun, waits = device_log[:-2], device_log[-2:]
    # The host waits at the end of the round only.
    assert waits == ["wait", "wait"] and "wait" not in begun
    turns = [begun[:5], begun[5:]] if begun[3] == "a" else [begun[5:], begun[:5]]
    for name, sleep, turn in zip("ab", (3_100_000, 100_000), turns, strict=True):
        assert turn == [f"sleep {sleep}", "flush 3072", "record on stream", name, "record on stream"]


def test_issuing_is_timed_on_an_idle_device(device_log: list[str]) -> None:
    seconds = timing.IssueClock(torch.device("cuda:1"))("a", lambda: device_log.append("a"))
    assert device_log == ["idle", "a"] and 0 < seconds() < 0.1


def test_host_time_is_beside_device_time(device_log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "DeviceClock", lambda device, seconds: timing.wall_clock)
    failed: list[str] = []

    def fail() -> None:
        raise ValueError

    actions = {"good": lambda: None, "bad": fail}
    found = timing.measure(actions, torch.device("cuda"), 7, failed=lambda name, error: failed.append(name))
    assert list(found) == ["good"] and failed == ["bad"]
    assert len(found["good"]["seconds"]) == 7 and found["good"]["host_ms"] > 0
    assert device_log.count("idle") == timing.ISSUED_CALLS + 1
    assert timing.measure({"good": lambda: None}, CPU, 2, failed=lambda *_: None)["good"]["host_ms"] is None


def test_summary() -> None:
    assert timing.summary([0.003, 0.001, 0.002, 0.005, 0.004]) == {
        "seconds": [0.003, 0.001, 0.002, 0.005, 0.004],
        "median_ms": 3.0,
        "first_quartile_ms": 2.0,
        "third_quartile_ms": 4.0,
    }
    assert timing.summary([0.002])["third_quartile_ms"] == 2.0


# Floors


@pytest.mark.parametrize("mode, expected", [("train", 3), ("no-grad", 1)])
def test_the_products_are_those_of_the_case(mode: Any, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = _as(HEAD, mode=mode)
    inputs = cases.make_inputs(case, CPU)
    probe = floors.probes(case, inputs)[floors.PRODUCTS]
    done: list[tuple[Tensor, Tensor]] = []
    multiply = torch.mm

    def record(one: Tensor, other: Tensor, *, out: Tensor) -> Tensor:
        done.append((multiply(one, other, out=out), multiply(one.double(), other.double())))
        return out

    monkeypatch.setattr(torch, "mm", record)
    probe.action()
    assert [tuple(out.shape) for out, _ in done] == [(6, 90), (6, 8), (90, 8)][:expected]
    for out, exact in done:
        torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-4)
    assert probe.work == case.flops
    assert list(floors.probes(LOGITS, cases.make_inputs(LOGITS, CPU))) == [floors.COPY]


def test_the_floor_is_the_longer_of_both() -> None:
    alone = floors.floor(LOGITS, {"copy": 1e6})
    assert alone["bytes_per_second"] == 1e6
    assert alone["ms"] == alone["memory_ms"] == pytest.approx(1e3 * LOGITS.minimum_bytes / 1e6)
    assert alone["products_ms"] is None
    slow_products = floors.floor(HEAD, {"copy": 1e12, "products": HEAD.flops / 0.5})
    assert slow_products["ms"] == slow_products["products_ms"] == 500
    assert slow_products["flops_per_second"] == HEAD.flops / 0.5
    slow_copy = floors.floor(HEAD, {"copy": 1e3, "products": 1e12})
    assert slow_copy["ms"] == slow_copy["memory_ms"]


# Memory


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process's memory is measured on Linux only")
def test_peaks_are_those_beyond_inputs_and_gradients() -> None:
    case = _as(LOGITS, rows=100, classes=20_000)
    found = memory.peaks(case, ["plain eager", "plif-64 fused", "plif-64 reference", "none such"], threads=1)
    eager, fused, reference, wrong = found.values()
    assert isinstance(eager, int) and isinstance(fused, int) and isinstance(reference, int)
    # Eager holds log p and a copy of its gradient.
    assert 0.9 * case.logits_bytes < eager < 2.5 * case.logits_bytes
    assert fused < 0.2 * case.logits_bytes
    assert 4 * case.logits_bytes < reference < contestants.workspace_bytes("plif-64 reference", case) * 1.2
    assert wrong == "KeyError: 'none'"


def test_the_process_that_measures_may_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 1, "", "Traceback\nValueError: no\n")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(run.MeasurementError, match="ValueError: no"):
        memory.peaks(LOGITS, ["plain eager"], threads=1)


def _die(*arguments: Any) -> None:
    os._exit(3)


@pytest.mark.skipif(sys.platform != "linux", reason="the processes are forked")
def test_a_process_that_is_killed_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(memory, "_report", _die)
    memory._main({"case": LOGITS.to_json(), "names": ["plain eager"], "threads": 1})
    assert json.loads(capsys.readouterr().out) == {"plain eager": "its process died with exit code 3"}


def _allocate_under_a_limit(sender: Any) -> None:
    limits.limit_allocations(2**26)
    torch.empty(2**20, dtype=torch.uint8)
    try:
        torch.empty(2**30, dtype=torch.uint8)
    except Exception as error:
        sender.send(limits.one_line(error))
    else:
        sender.send("granted")


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA limits mappings on Linux only")
def test_too_large_an_allocation_is_an_error() -> None:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_allocate_under_a_limit, args=(sender,))
    process.start()
    sender.close()
    assert receiver.recv() == "out of memory"
    process.join()


def test_other_errors_are_not_out_of_memory() -> None:
    assert limits.one_line(MemoryError()) == "out of memory"
    assert limits.one_line(ValueError("first\nsecond")) == "ValueError: first"
    assert limits.one_line(RuntimeError()) == "RuntimeError"


# Settings


def test_an_axis_that_is_given_replaces_that_of_every_sweep() -> None:
    parsed = settings.parse(
        ["--rows", "3,3,5", "--classes", "7", "--dims", "2", "--stds", "1", "--contestants", "plain *"]
    )
    plan = parsed.plan()
    assert {(case.rows, case.classes, case.dim) for case in plan} == {(3, 7, None), (5, 7, None), (3, 7, 2), (5, 7, 2)}
    assert len(plan) == len(set(plan))
    assert plan[Case("logits", "train", 3, 7, None, "float32", 1.0)] == ["plain eager", "plain compiled"]
    only_head = settings.parse(["--group", "head"]).plan()
    assert {case.group for case in only_head} == {"head"}


def test_a_case_of_two_sweeps_runs_once_with_all_contestants() -> None:
    case = Case("logits", "train", 128, 32_000, None, "float32", 1.0)
    wanted = settings.parse([]).plan()[case]
    assert len(wanted) == len(set(wanted)) == len(contestants.names("logits", "float32", (64,)))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--rows", "0"],
        ["--dtypes", "int8"],
        ["--stds", "-1"],
        ["--stds", "nan"],
        ["--group", "tail"],
        ["--device", "tpu"],
        ["--device", "cuda:"],
        ["--contestants", "nobody"],
        ["--repeats", "1.5"],
    ],
)
def test_mistakes_are_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        settings.parse(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_full_has_every_axis_of_the_issue() -> None:
    plan = settings.parse(["--preset", "full"]).plan()
    for group in cases.GROUPS:
        chosen = [case for case in plan if case.group == group]
        assert {case.classes for case in chosen} == {10_000, 32_000, 50_257, 128_000, 256_000}
        assert {case.dtype for case in chosen} == {"float32", "bfloat16", "float16"}
        assert {case.std for case in chosen} == {1.0, 20.0}
        assert {case.mode for case in chosen} == {"train", "no-grad"}
        assert len({case.rows for case in chosen}) >= 3
        pieces = {name.split()[0] for case in chosen for name in plan[case] if name.startswith("plif-")}
        assert pieces == {"plif-16", "plif-64", "plif-1024", "plif-100000"}


def test_the_preset_gpu_compiles_little_and_asks_for_backends_by_name() -> None:
    plan = settings.parse(["--preset", "gpu"]).plan()
    compiled = [case for case, names in plan.items() for name in names if name.endswith(("compiled", "cross-entropy"))]
    assert len(compiled) == 4 and not any(name.endswith(" fused") for names in plan.values() for name in names)
    heads = {(case.classes, case.dim) for case in plan if case.group == "head"}
    assert heads == {(classes, dim) for classes in (50_304, 128_256) for dim in (1024, 2048, 4096)}
    for case, names in plan.items():
        if case.group == "head" and case.mode == "no-grad":
            assert {"plif-64 cuda", "plif-64 triton chunked", "plif-64 triton recompute"} <= set(names)


def test_emulated_cases_stay_different() -> None:
    plan = settings.parse(["--preset", "gpu"]).plan()
    small = [emulation.shrunk(case) for case in plan]
    assert len(set(small)) == len(plan)
    assert all(case.rows <= 8 and case.classes <= 600 for case in small)
    assert [case.classes % 8 for case in small] == [case.classes % 8 for case in plan]


# Variants


@pytest.fixture
def variants() -> Any:
    pytest.importorskip("triton", reason="Triton is not installed")
    return importlib.import_module("benchmarks.overhead.variants")


def test_launches_are_as_before_after_an_exception(variants: Any) -> None:
    launch = importlib.import_module("monosoftmax.triton_kernels.launch")
    logits = torch.randn(2, 5000)
    assert launch.tile_arguments(logits)["LANES"] == 256
    with pytest.raises(RuntimeError, match="enough"), variants.tuned_launches(lanes=64):
        assert launch.tile_arguments(logits)["LANES"] == 64
        raise RuntimeError("enough")
    assert launch.tile_arguments(logits)["LANES"] == 256
    with pytest.raises(ValueError, match="warps"), variants.tuned_launches(warps=8):
        pass


def test_plans_are_as_before_after_an_exception(variants: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wishes: list[dict[str, int]] = []
    extension = SimpleNamespace(tune_plans=lambda **each: wishes.append(each))
    monkeypatch.setattr(variants.ms.backends, "extension", extension)
    with pytest.raises(RuntimeError, match="enough"), variants.tuned_plans(fewest_blocks=2):
        raise RuntimeError("enough")
    assert wishes == [{"fewest_blocks": 2}, {}]
    monkeypatch.setattr(variants.ms.backends, "extension", None)
    with pytest.raises(peers.Unavailable, match="no CUDA"), variants.tuned_plans():
        pass


# Targets


def _record(case: Case, names: list[str], ms: Callable[[str], float], peak: Callable[[str], int]) -> dict[str, Any]:
    rows = [{"name": name, "median_ms": ms(name), "peak_bytes": peak(name)} for name in names]
    return {"case": case.to_json(), "name": str(case), "skipped": None, "floor": {"products_ms": 10.0}, "rows": rows}


def test_the_preset_must_has_the_figures_of_every_target() -> None:
    plan = settings.parse(["--preset", "must"]).plan()
    verdicts = targets.judge(
        [_record(case, names, lambda name: 10.0, lambda name: 2**20) for case, names in plan.items()]
    )
    claims = [(verdict["case"], verdict["claim"]) for verdict in verdicts]
    assert len(claims) == len(set(claims))
    for std in (1, 20):
        of_std = [claim for case, claim in claims if case.endswith(f" std {std}")]
        for function in targets._OF_COMPILED:
            assert f"{function} fused / plain compiled" in of_std
        assert sum(claim.endswith("the same in float32") for claim in of_std) == 2 * 9
        assert of_std.count("plif-64 fused, peak MiB") == 2
        assert of_std.count("plif-64 fused / plain eager") == 2
        assert "plif-64 fused / three products" in of_std and "plif-64 fused / one product" in of_std
        assert sum(claim.startswith(("time of mos-15", "peak memory of mos-15")) for claim in of_std) == 2


def test_verdicts() -> None:
    case = Case("logits", "train", 512, 32_000, None, "float32", 1.0)
    times = {"plain eager": 20.0, "plain compiled": 10.0, "plif-64 fused": 11.0, "identity fused": 9.0}
    verdicts = {
        verdict["claim"]: verdict
        for verdict in targets.judge([_record(case, list(times), times.__getitem__, lambda name: 0)])
    }
    assert verdicts["plif-64 fused / plain compiled"]["value"] == pytest.approx(1.1)
    assert not verdicts["plif-64 fused / plain compiled"]["met"]
    assert verdicts["plif-64 fused / plain eager"]["met"]
    assert verdicts["identity fused / plain compiled"]["met"]
    assert len(verdicts) == 3


def test_the_best_mixture_counts() -> None:
    case = Case("head", "train", 2048, 32_000, 280, "float32", 1.0)
    times = {"plif-64 fused": 10.0, "mos-15 fair": 190.0, "mos-15 published": 900.0, "mos-4 fair": 1.0}
    peaks = {"plif-64 fused": 1000, "mos-15 fair": 500 * 2**20, "mos-15 published": 30 * 2**20, "mos-4 fair": 1}
    time, space = targets.judge([_record(case, list(times), times.__getitem__, peaks.__getitem__)])
    assert (time["claim"], time["met"]) == ("time of mos-15 fair / plif-64 fused", False)
    assert (space["claim"], space["value"], space["met"]) == (
        "peak memory of mos-15 published / plif-64 fused", 30.0, True
    )  # fmt: skip


# Pictures


def _swept() -> list[dict[str, Any]]:
    found = []
    for rows, classes in ((4, 100), (4, 1000), (4, 300), (8, 1000)):
        case = _as(LOGITS, rows=rows, classes=classes)
        record = _record(case, ["plain eager", "plif-64 fused", "plif-64 reference"], lambda name: 2.0, lambda name: 0)
        record["floor"] = {"memory_ms": classes / 1000, "products_ms": None, "ms": 1.0}
        found.append(record)
    return found


def test_a_sweep_is_in_order_and_differs_in_one_axis() -> None:
    assert [record["case"]["classes"] for record in pictures.longest_sweep(_swept(), "classes")] == [100, 300, 1000]
    assert [record["case"]["rows"] for record in pictures.longest_sweep(_swept(), "rows")] == [4, 8]
    assert pictures.longest_sweep(_swept()[:1], "rows") == []


def test_plots_are_logarithmic_with_the_floors() -> None:
    figure = pictures.cost(_swept(), "title")
    assert figure is not None
    against_classes, against_rows, *memory_axes = figure.axes
    assert all(axes.get_xscale() == axes.get_yscale() == "log" for axes in figure.axes)
    lines = {line.get_label(): line for line in against_classes.lines}
    assert set(lines) == {"plain eager", "plif-64 fused", "floor: bytes / copy bandwidth"}
    assert list(lines["floor: bytes / copy bandwidth"].get_ydata()) == [0.1, 0.3, 1.0]
    assert list(lines["plain eager"].get_xdata()) == [100, 300, 1000]
    assert list(against_rows.lines[0].get_xdata()) == [4, 8]
    assert len(memory_axes) == 2 and "bytes of the logits" in memory_axes[0].get_legend_handles_labels()[1]
    assert pictures.cost(_swept()[:1], "title") is None
