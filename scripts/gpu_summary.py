"""Writes the last page of scripts/on_gpu.py: the checks, the measurements, and their verdict on our choices.

    python scripts/gpu_summary.py FOLDER

It reads the files that exist, so that an interrupted run has a page, too.
"""

from __future__ import annotations

import collections
import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: Differences below this share of a time are noise (two runs of one kernel).
_NOISE = 0.03
#: The name of the variant that users get.
_USUAL = "as it is"
_COUNTERS = {
    "Duration": "time",
    "DRAM Throughput": "DRAM",
    "L2 Hit Rate": "L2 hits",
    "Achieved Occupancy": "occupancy",
    "Registers Per Thread": "registers",
    "No Eligible": "no warp ready",
}


def summarize(folder: Path) -> str:
    """Returns the page, in Markdown."""
    run = _json(folder / "run.json") or {}
    parts = [_heading(run), _stages(run), _tests(folder), _sanitizers(folder)]
    cases, operators = _units(folder, "gpu", "dry"), _units(folder, "variants", "dry-variants")
    parts += [*_tables(cases), _variants(operators), _counters(folder), _verdicts(cases)]
    return "\n\n".join(each for each in parts if each) + "\n"


def _heading(run: dict[str, Any]) -> str:
    machine = run.get("machine", {})
    what = "Dry run on the CPU: the figures mean nothing" if run.get("dry_run") else ", ".join(machine.get("gpus", []))
    versions = ", ".join(f"{name} {machine.get(name)}" for name in ("torch", "triton", "numpy", "python"))
    verdict = "correctness HELD" if run.get("holds") else "correctness did NOT hold, or the run has not ended"
    return f"# {what}\n\n{versions}; {machine.get('cores')} cores; commit {machine.get('commit')}\n\n**{verdict}**"


def _stages(run: dict[str, Any]) -> str:
    lines = []
    for stage in run.get("stages", []):
        status = ", ".join(f"{name}: {value}" for name, value in stage["status"].items() if value != 0)
        lines.append(f"- {stage['name']}: {stage.get('seconds', '-')} s of {stage['limit_s']:g}; {status or 'well'}")
    return "\n".join(lines)


def _tests(folder: Path) -> str:
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    failed = []
    for row in _lines(folder / "tests.jsonl"):
        backend = re.search(r"\b(cuda|triton)\b", row["test"].partition("[")[2])
        counts[backend[1] if backend else "other", row["outcome"]] += 1
        if row["outcome"] == "failed":
            failed.append(f"- FAILED {row['test']}: {row.get('why', '')}"[:300])
    if not counts:
        return ""
    text = "; ".join(f"{backend} {outcome}: {count}" for (backend, outcome), count in sorted(counts.items()))
    return "\n".join(
        [f"Tests: {text}", *failed[:15], *([f"- and {len(failed) - 15} more"] if len(failed) > 15 else [])]
    )


def _sanitizers(folder: Path) -> str:
    path = folder / "sanitizers.txt"
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    found = re.findall(r"^(?:=+ )?(ERROR SUMMARY.*|RACECHECK SUMMARY.*|launched \d+)$", text, re.MULTILINE)
    return f"Sanitizers: {'; '.join(found)}" if found else ""


def _units(folder: Path, *presets: str) -> list[dict[str, Any]]:
    """The units of benchmarks.overhead of these presets: ``name``, ``case``, floors and ``contestants``."""
    found = []
    for line in _lines(folder / "overhead.jsonl"):
        preset, _, name = line.get("unit", "").partition("/")
        if preset in presets:
            found.append({"name": name, "case": line["settings"]["case"], **line["times"]})
    return found


def _tables(cases: list[dict[str, Any]]) -> list[str]:
    """A table of contestants by shapes, for each group and mode."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = collections.defaultdict(list)
    for each in cases:
        groups[each["case"]["group"], each["case"]["mode"]].append(each)
    return [_table(group, mode, found) for (group, mode), found in groups.items()]


def _table(group: str, mode: str, cases: list[dict[str, Any]]) -> str:
    floor = "share of the speed of a copy of the same bytes" if group == "logits" else "times the bare products"
    names = list(dict.fromkeys(name for case in cases for name in case["contestants"]))
    lines = [f"### {group}, {mode}: ms ({floor}; CPU time to issue it)"]
    lines += ["", f"| | {' | '.join(map(_shape, cases))} |", f"|---|{'---|' * len(cases)}"]
    lines.append(f"| floor | {' | '.join(_ms(_floor(case)) for case in cases)} |")
    for name in names:
        if any("median_ms" in case["contestants"].get(name, {}) for case in cases):
            lines.append(f"| {name} | {' | '.join(_cell(case, name) for case in cases)} |")
    missing = {f"- {name}: {row['status'][:140]}" for case in cases for name, row in _unmeasured(case)}
    return "\n".join([*lines, "", *sorted(missing)]).rstrip()


def _unmeasured(case: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, row) for name, row in case["contestants"].items() if "median_ms" not in row]


def _times(case: dict[str, Any]) -> dict[str, float]:
    return {name: row["median_ms"] for name, row in case["contestants"].items() if "median_ms" in row}


def _floor(case: dict[str, Any]) -> float:
    return max(float(case["memory_ms"]), case["products_ms"] or 0.0)


def _shape(record: dict[str, Any]) -> str:
    case = record["case"]
    dtype = "" if case["dtype"] == "bfloat16" else f" {case['dtype']}"
    return f"{case['rows']} x {case['classes']}{'' if case['dim'] is None else ' d ' + str(case['dim'])}{dtype}"


def _cell(case: dict[str, Any], name: str) -> str:
    row = case["contestants"].get(name)
    if row is None or "median_ms" not in row:
        return "" if row is None else "-"
    ms, products = row["median_ms"], case["products_ms"]
    share = f"{_floor(case) / ms:.0%}" if products is None else f"{ms / products:.2f} x"
    host = f"; {_ms(row['host_ms'])}" if "host_ms" in row else ""
    return f"{_ms(ms)} ({share}{host})"


def _ms(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _variants(operators: list[dict[str, Any]]) -> str:
    """A line for each operator: the usual variant, and all variants from the fastest on."""
    lines, failed = [], []
    for operator in operators:
        group, times = operator["name"], _times(operator)
        failed += [f"- {group}, {name}: {row['status']}"[:200] for name, row in _unmeasured(operator)]
        if _USUAL in times:
            usual, best = times.pop(_USUAL), min(times, key=times.__getitem__, default=_USUAL)
            verdict = f"TAKE {best}" if times.get(best, usual) <= (1 - _NOISE) * usual else "keep"
            others = "; ".join(f"{name} {_ms(times[name])}" for name in sorted(times, key=times.__getitem__))
            lines.append(f"- {group}: {verdict}. {_USUAL} {_ms(usual)}; {others}")
    return "\n".join(["### Variants, ms", *lines, *failed]) if lines or failed else ""


def _counters(folder: Path) -> str:
    path = folder / "ncu.csv"
    if not path.exists():
        return ""
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.startswith('"')]
    kernels: dict[tuple[str, str], dict[str, str]] = collections.defaultdict(dict)
    for row in csv.DictReader(lines):
        if row.get("Metric Name") in _COUNTERS:
            name = re.sub(r"^.*?(\w+_kernel)\b.*$", r"\1", row["Kernel Name"])
            value = f"{row['Metric Value']} {row['Metric Unit']}".strip()
            kernels[row["ID"], name][_COUNTERS[row["Metric Name"]]] = value
    return "\n".join(
        f"- ncu {number} {name}: {', '.join(f'{key} {value}' for key, value in found.items())}"
        for (number, name), found in kernels.items()
    )


def _verdicts(cases: list[dict[str, Any]]) -> str:
    lines = ["## Verdicts"]
    for case in cases:
        times = _times(case)
        for name, cuda in times.items():
            other = times.get(name.removesuffix(" cuda") + " triton") if name.endswith(" cuda") else None
            if other is not None and other < (1 - _NOISE) * cuda:
                lines.append(f"- backend order: triton is faster, {case['name']}, {name[:-5]}: {other / cuda:.2f}")
        chunked, recompute = (times.get(f"plif-64 triton {method}") for method in ("chunked", "recompute"))
        if chunked and recompute:
            lines.append(f"- head_method: recompute takes {recompute / chunked:.2f} of chunked, {case['name']}")
        ours, theirs = times.get("plif-64 cuda"), times.get("plain compiled")
        if ours and theirs:
            lines.append(f"- plif-64 cuda takes {ours / theirs:.2f} of plain compiled, {case['name']}")
    return "\n".join(lines) if len(lines) > 1 else ""


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The complete lines. An interrupted run may have cut off the last one."""
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else ():
        if line.endswith("\n"):
            yield json.loads(line)


if __name__ == "__main__":
    print(summarize(Path(sys.argv[1])), end="")
