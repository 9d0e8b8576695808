"""scripts/on_gpu.py without a GPU: its stages, its verdict, and what it leaves when it is stopped."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu_summary
import on_gpu
import pytest
from on_gpu import Command, Stage

ROOT = Path(__file__).resolve().parents[2]
WELL = Command("well", [sys.executable, "-c", "print('done')"])
BADLY = Command("badly", [sys.executable, "-c", "raise SystemExit(1)"])


def statuses(folder: Path) -> dict[str, Any]:
    record = json.loads((folder / "run.json").read_text())
    return {name: status for stage in record["stages"] for name, status in stage["status"].items()}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Every stage is one command that ends well at once."""
    monkeypatch.setattr(on_gpu, "build", lambda run: True)
    monkeypatch.setattr(on_gpu, "machine", lambda: {"gpus": []})
    for name in ("proofs", "variants", "overhead", "more_tests"):
        monkeypatch.setattr(on_gpu, name, lambda run, name=name: Stage(name, 60, [WELL]))
    monkeypatch.setattr(on_gpu, "counters", lambda run, folder: [Stage("counters", 60, [WELL])])
    return monkeypatch


@pytest.mark.parametrize(
    ("stage", "holds"),
    [("none", True), ("proofs", False), ("more_tests", False), ("variants", True), ("build", False)],
)
def test_the_exit_status_says_whether_correctness_held(
    tmp_path: Path, quick: pytest.MonkeyPatch, stage: str, holds: bool
) -> None:
    """And a stage that fails stops no other, but for the build."""
    if stage == "build":
        quick.setattr(on_gpu, "build", lambda run: False)
    elif stage != "none":
        quick.setattr(on_gpu, stage, lambda run: Stage(stage, 60, [BADLY]))
    status = on_gpu.main([str(tmp_path), "--dry-run"])
    assert (status == 0) is holds
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["holds"] is holds
    assert len(record["stages"]) == (0 if stage == "build" else 5)
    said = "correctness HELD" if holds else "correctness did NOT hold"
    assert said in (tmp_path / "summary.md").read_text()


@pytest.mark.slow
def test_what_runs_out_of_time_is_ended_with_its_children(tmp_path: Path, quick: pytest.MonkeyPatch) -> None:
    child = "import os, time; open('PID', 'w').write(str(os.getpid())); time.sleep(600)"
    child = child.replace("PID", str(tmp_path / "pid"))
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    quick.setattr(
        on_gpu, "proofs", lambda run: Stage("proofs", 6, [Command("late", [sys.executable, "-c", code]), WELL])
    )
    assert on_gpu.main([str(tmp_path / "out"), "--dry-run"]) == 1
    assert statuses(tmp_path / "out")["late"] == "out of time"
    assert statuses(tmp_path / "out")["well"] == 0
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()


def test_the_page_of_a_run_that_was_cut_off(tmp_path: Path) -> None:
    lines = [
        {"test": "tests/gpu/test_a.py::test_b[cuda-plif]", "outcome": "passed", "seconds": 1},
        {"test": "tests/gpu/test_a.py::test_b[triton-plif]", "outcome": "failed", "seconds": 1, "why": "off by 2"},
    ]
    (tmp_path / "tests.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in lines) + '{"test": "tests/gp')
    page = gpu_summary.summarize(tmp_path)
    assert "cuda passed: 1; triton failed: 1" in page
    assert "FAILED tests/gpu/test_a.py::test_b[triton-plif]: off by 2" in page
    assert "did NOT hold" in page


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_at_any_moment_it_leaves_valid_results(tmp_path: Path, number: signal.Signals) -> None:
    words = [sys.executable, str(ROOT / "scripts/on_gpu.py"), str(tmp_path), "--dry-run", "--only", "tests"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        lines = tmp_path / "tests.jsonl"
        while not (lines.exists() and lines.stat().st_size > 200) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(30) != 0
    finally:
        _end_all(tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["holds"] is False
    assert len(list(gpu_summary._lines(lines))) >= 1
    assert "did NOT hold" in gpu_summary.summarize(tmp_path)


def _end_all(folder: Path) -> None:
    """What a run that was killed has left behind: its commands name its folder."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes()
        except OSError:  # it has ended meanwhile
            continue
        if str(folder).encode() in words and int(entry.parent.name) != os.getpid():
            os.kill(int(entry.parent.name), signal.SIGKILL)


def check_figures(folder: Path) -> None:
    """Every contestant and every variant ran, but for what only a GPU has."""
    cases, operators = (gpu_summary._units(folder, each) for each in ("dry", "dry-variants"))
    assert len(cases) == 27 and len(operators) == 15
    rows = [(name, row) for case in cases for name, row in case["contestants"].items()]
    assert {row["backend"] for name, row in rows if name.startswith("plif-64 ")} == {"cuda", "triton"}
    packages = {"plain liger": "liger_kernel", "plain linear_cross_entropy": None}
    for name in {name for name, row in rows if "status" in row} - {"plain cut-cross-entropy kernels"}:
        package = packages[name]
        assert package is None or importlib.util.find_spec(package) is None
    missing = [name for each in operators for name, row in each["contestants"].items() if "status" in row]
    assert missing and all(name.startswith("addmm") for name in missing)


@pytest.mark.slow
def test_a_dry_run_goes_through_every_stage(tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "scripts/on_gpu.py"), str(tmp_path), "--dry-run"]
    result = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, result.stdout
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["holds"] is True
    assert set(statuses(tmp_path).values()) == {0}, statuses(tmp_path)
    assert record["seconds"] < 480
    check_figures(tmp_path)
    assert len(list(tmp_path.iterdir())) <= 8
    assert result.stdout.endswith((tmp_path / "summary.md").read_text())
