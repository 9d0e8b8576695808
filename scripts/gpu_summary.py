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
    overhead = _json(folder / "overhead.json") or _json(folder / "overhead" / "results.json")
    if overhead:
        parts += _tables(overhead["cases"])
    parts += [_variants(folder), _counters(folder), _verdicts(overhead)]
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


def _tables(cases: list[dict[str, Any]]) -> list[str]:
    """A table of contestants by shapes, for each group and mode."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = collections.defaultdict(list)
    for record in cases:
        if not record["skipped"]:
            groups[record["case"]["group"], record["case"]["mode"]].append(record)
    return [_table(group, mode, records) for (group, mode), records in groups.items()]


def _table(group: str, mode: str, records: list[dict[str, Any]]) -> str:
    floors = {"logits": "share of the speed of a copy of the same bytes", "head": "times the bare products"}
    names = list(dict.fromkeys(row["name"] for record in records for row in record["rows"]))
    lines = [f"### {group}, {mode}: ms ({floors[group]}; CPU time to issue it)"]
    lines += ["", f"| | {' | '.join(map(_shape, records))} |", f"|---|{'---|' * len(records)}"]
    lines.append(f"| floor | {' | '.join(_ms(record['floor']['ms']) for record in records)} |")
    for name in names:
        found = [next((row for row in record["rows"] if row["name"] == name), None) for record in records]
        if any(row is not None and row["median_ms"] is not None for row in found):
            lines.append(f"| {name} | {' | '.join(map(_cell, found))} |")
    missing = {
        f"- {row['name']}: {row['status']}: {str(row['reason'])[:120]}"
        for record in records
        for row in record["rows"]
        if row["median_ms"] is None
    }
    return "\n".join([*lines, "", *sorted(missing)]).rstrip()


def _shape(record: dict[str, Any]) -> str:
    case = record["case"]
    dtype = "" if case["dtype"] == "bfloat16" else f" {case['dtype']}"
    return f"{case['rows']} x {case['classes']}{'' if case['dim'] is None else ' d ' + str(case['dim'])}{dtype}"


def _cell(row: dict[str, Any] | None) -> str:
    if row is None or row["median_ms"] is None:
        return "" if row is None else "-"
    share = f"{row['to_products']:.2f} x" if row["to_products"] is not None else f"{1 / row['to_floor']:.0%}"
    host = "" if row.get("host_ms") is None else f"; {_ms(row['host_ms'])}"
    return f"{_ms(row['median_ms'])} ({share}{host})"


def _ms(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _variants(folder: Path) -> str:
    """A line for each operator: the usual variant, and all variants from the fastest on."""
    groups: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    failed = []
    for row in (_json(folder / "variants.json") or {"rows": []})["rows"]:
        if row["status"] == "measured":
            groups[row["group"]].append(row)
        else:
            failed.append(f"- {row['status']}: {row['group']}, {row['name']}: {row['reason']}"[:200])
    lines = []
    for group, rows in groups.items():
        usual = next((row["median_ms"] for row in rows if row["name"] == _USUAL), None)
        if usual is None:
            continue
        best = min(rows, key=lambda row: float(row["median_ms"]))
        verdict = "keep" if best["median_ms"] > (1 - _NOISE) * usual else f"TAKE {best['name']}"
        ordered = sorted((row for row in rows if row["name"] != _USUAL), key=lambda row: float(row["median_ms"]))
        others = "; ".join(f"{row['name']} {_ms(row['median_ms'])}" for row in ordered)
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


def _verdicts(overhead: dict[str, Any] | None) -> str:
    if overhead is None:
        return ""
    lines = ["## Verdicts"]
    for record in overhead["cases"]:
        times = {row["name"]: row["median_ms"] for row in record["rows"] if row["median_ms"] is not None}
        for name, cuda in times.items():
            other = times.get(name.removesuffix(" cuda") + " triton") if name.endswith(" cuda") else None
            if other is not None and other < (1 - _NOISE) * cuda:
                lines.append(f"- backend order: triton is faster, {record['name']}, {name[:-5]}: {other / cuda:.2f}")
        chunked, recompute = (times.get(f"plif-64 triton {method}") for method in ("chunked", "recompute"))
        if chunked and recompute:
            lines.append(f"- head_method: recompute takes {recompute / chunked:.2f} of chunked, {record['name']}")
        ours, theirs = times.get("plif-64 cuda"), times.get("plain compiled")
        if ours and theirs:
            lines.append(f"- plif-64 cuda takes {ours / theirs:.2f} of plain compiled, {record['name']}")
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
