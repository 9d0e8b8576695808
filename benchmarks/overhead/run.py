"""A whole run: every case in turn, every contestant in turn within it, results on the disk after each case."""

from __future__ import annotations

import gc
import math
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm import tqdm

from monosoftmax import info

from .. import machine
from ..files import write_json, write_text
from ..resident_set import MeasurementError
from . import floors, memory, pictures, report
from .cases import Case, make_inputs
from .contestants import Contestant, disagreement, fingerprint, prepare, same_function, workspace_bytes
from .limits import is_out_of_memory, limit_allocations, one_line
from .peers import Unavailable
from .settings import Run
from .targets import judge
from .timing import ISSUED_CALLS, WARM_UP_CALLS, measure

RESULTS, REPORT = "results.json", "report.md"
#: Share of the free memory that a run leaves alone.
_SPARE = 0.05
#: Bytes that torch, its compiler and its matrix products take beside tensors.
_OVERHEAD_BYTES = 2**28


class RunError(Exception):
    """The run cannot start, for a reason that its user can do something about."""


class Suite:
    """A run and its results, which are on the disk after every case."""

    def __init__(self, run: Run) -> None:
        use_device(run.device)
        self.run = run
        self._claim()
        torch.set_num_threads(run.threads)
        if run.device.type == "cpu":
            limit_allocations(round(machine.available_bytes() * (1 - _SPARE)))
        self.results: dict[str, Any] = {
            "complete": False,
            "arguments": list(run.arguments),
            "preset": run.preset,
            "repeats": run.repeats,
            "environment": environment(run),
            "cases": [],
            "targets": [],
        }

    def execute(self) -> dict[str, Any]:
        """Run every case, and write results, report and plots. What was done is written also if it is interrupted."""
        plan = self.run.plan()
        try:
            for index, (case, contestants) in enumerate(plan.items(), 1):
                started = time.perf_counter()
                measured = self._measure(case, contestants, f"{index}/{len(plan)}")
                measured["seconds"] = time.perf_counter() - started
                self.results["cases"].append(measured)
                tqdm.write(f"\n{report.case_table(measured, 'simple')}")
                self._write()
            self.results["complete"] = True
        finally:
            self._write()
            self._describe()
        return self.results

    def _claim(self) -> None:
        folder = self.run.folder
        if (folder / RESULTS).exists() and not self.run.overwrite:
            raise RunError(f"{folder} holds results already: choose another --output, or say --overwrite")
        # Pictures and a report of an older run would look like those of this one.
        for path in [folder / RESULTS, folder / REPORT, *folder.glob(f"{pictures.PREFIX}*.png")]:
            path.unlink(missing_ok=True)

    def _write(self) -> None:
        self.results["targets"] = judge(self.results["cases"])
        write_json(self.run.folder / RESULTS, self.results)

    def _describe(self) -> None:
        drawn = pictures.draw(self.results["cases"], self.run.folder)
        write_text(self.run.folder / REPORT, report.markdown(self.results, [path.name for path in drawn]))

    def _measure(self, case: Case, contestants: Sequence[str], position: str) -> dict[str, Any]:
        """One case, as it is in ``results.json``."""
        record: dict[str, Any] = {"case": case.to_json(), "name": str(case), "floor": None, "skipped": None, "rows": []}
        # Inputs and, at any one time, the gradients of one contestant.
        needed = 2 * case.operand_bytes + floors.probe_bytes(case, self.run.device) + _OVERHEAD_BYTES
        free = self._free_bytes()
        if needed > free:
            record["skipped"] = f"inputs, gradients and buffers take {_gib(needed)}, {_gib(free)} are free"
            return record
        rows: dict[str, dict[str, Any]] = {name: _row(name) for name in contestants}
        turns = 1 + self.run.repeats + (min(self.run.repeats, ISSUED_CALLS) if self.run.device.type == "cuda" else 0)
        bar = tqdm(desc=f"{position} {case}", total=len(rows) * turns, leave=False, disable=None)
        with bar:
            try:
                record["floor"] = self._time(case, rows, bar)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                record["skipped"] = "out of memory for inputs and buffers"
                return record
            finally:
                torch.compiler.reset()
                gc.collect()
        self._add_peaks(case, rows)
        record["rows"] = _with_ratios(list(rows.values()), record["floor"])
        return record

    def _time(self, case: Case, rows: dict[str, dict[str, Any]], bar: Any) -> dict[str, Any]:
        """Fill in the rows, and return the floor."""
        inputs = make_inputs(case, self.run.device)
        probes = floors.probes(case, inputs)
        actions: dict[str, Callable[[], object]] = {name: probe.action for name, probe in probes.items()}
        for action in actions.values():
            action()
        resets: dict[str, Callable[[], object]] = {}
        known: dict[str, tuple[str, tuple[float, ...]]] = {}
        for name, row in rows.items():
            bar.set_postfix_str(f"warm-up {name}")
            bar.update()
            needed = case.operand_bytes + workspace_bytes(name, case)
            free = self._free_bytes()
            if needed > free:
                row.update(status="skipped", reason=f"needs about {_gib(needed)}, {_gib(free)} are free")
                continue
            try:
                contestant = prepare(name, case, inputs)
                row.update(backend=contestant.backend, note=contestant.note)
                checked = self._warm_up(case, contestant)
            except Exception as error:
                _record_failure(row, error)
                continue
            if not all(map(math.isfinite, checked)):
                row.update(status="failed", reason="its loss or a gradient is not finite")
                continue
            row["fingerprint"] = list(checked)
            expected = known.setdefault(same_function(name), (name, checked))
            difference = disagreement(case, checked, expected[1])
            if difference is not None:
                row.update(status="failed", reason=f"disagrees with {expected[0]}: {difference}")
                continue
            resets[name] = contestant.reset
            if self.run.with_memory and self.run.device.type == "cuda":
                contestant.reset()
                row["peak_bytes"] = memory.cuda_peak(contestant, self.run.device)
            actions[name] = contestant.step

        def turn(name: str) -> None:
            bar.set_postfix_str(name)
            bar.update(name in rows)
            if name in resets:
                resets[name]()

        def failed(name: str, error: Exception) -> None:
            if name in probes:
                raise error
            _record_failure(rows[name], error)

        found = measure(actions, self.run.device, self.run.repeats, failed, turn)
        for name in rows.keys() & found.keys():
            rows[name].update(status="measured", **found[name])
        summaries = {name: found[name] for name in probes}
        rates = {name: probe.work / (summaries[name]["median_ms"] / 1e3) for name, probe in probes.items()}
        return {**floors.floor(case, rates), "probes": summaries}

    def _warm_up(self, case: Case, contestant: Contestant) -> tuple[float, ...]:
        for _ in range(WARM_UP_CALLS - 1):
            contestant.reset()
            contestant.step()
        contestant.reset()
        return fingerprint(case, contestant.step())

    def _add_peaks(self, case: Case, rows: dict[str, dict[str, Any]]) -> None:
        measured = [name for name, row in rows.items() if row["status"] == "measured"]
        if not self.run.with_memory or self.run.device.type == "cuda" or not measured:
            return
        try:
            peaks = memory.peaks(case, measured, self.run.threads)
        except MeasurementError as error:
            peaks = dict.fromkeys(measured, str(error))
        for name, found in peaks.items():
            rows[name]["peak_problem" if isinstance(found, str) else "peak_bytes"] = found

    def _free_bytes(self) -> int:
        if self.run.device.type == "cuda":
            device = self.run.device
            kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            return torch.cuda.mem_get_info(device)[0] + kept
        return round(machine.available_bytes() * (1 - _SPARE))


def failures(results: dict[str, Any]) -> list[str]:
    """The contestants that failed where they should not: neither for want of memory nor of a package."""
    return [
        f"{case['name']}: {row['name']}: {row['reason']}"
        for case in results["cases"]
        for row in case["rows"]
        if row["status"] == "failed"
    ]


def environment(run: Run) -> dict[str, Any]:
    """Versions, sources and machine, without its name."""
    found = info.collect()
    cuda = run.device.type == "cuda"
    return {
        "monosoftmax": found["monosoftmax"],
        "commit": machine.commit(),
        "extension": found["extension"],
        "backends": {name: status["detail"] for name, status in found["backends"].items()},
        "torch": found["torch"],
        "python": found["python"],
        "compiler": machine.compiler(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": machine.processor(),
        "instructions": found["cpu_capability"],
        "threads": run.threads,
        "device": device_name(run.device),
        "cuda": torch.version.cuda if cuda else None,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def device_name(device: torch.device) -> str:
    """The model of a GPU, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def use_device(device: torch.device) -> None:
    """Make ``device`` the current one; :class:`RunError` where there is no such device."""
    if device.type == "cpu":
        return
    if not torch.cuda.is_available():
        raise RunError(f"--device {device}: torch {torch.__version__} finds no CUDA device here")
    if (device.index or 0) >= torch.cuda.device_count():
        raise RunError(f"--device {device}: there are only {torch.cuda.device_count()} CUDA devices here")
    torch.cuda.set_device(device)


def _row(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "status": "failed",
        "reason": None,
        "backend": None,
        "note": "",
        "fingerprint": None,
        "median_ms": None,
        "host_ms": None,
        "peak_bytes": None,
        "peak_problem": None,
    }


def _record_failure(row: dict[str, Any], error: Exception) -> None:
    if isinstance(error, Unavailable):
        row.update(status="not available", reason=str(error))
    elif is_out_of_memory(error):
        row.update(status="out of memory", reason="an allocation failed")
    else:
        row.update(status="failed", reason=one_line(error))


def _with_ratios(rows: list[dict[str, Any]], floor: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows with their times relative to the baselines and the floors of the same case."""
    medians = {row["name"]: row["median_ms"] for row in rows}
    against = {
        "to_plain_eager": medians.get("plain eager"),
        "to_plain_compiled": medians.get("plain compiled"),
        "to_floor": floor["ms"],
        "to_products": floor["products_ms"],
    }
    for row in rows:
        for name, base in against.items():
            row[name] = None if row["median_ms"] is None or base is None else row["median_ms"] / base
    return rows


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
