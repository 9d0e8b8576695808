"""The results as tables, on the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from monosoftmax.row_kernels import PROBLEMS

from .cases import Case


def case_table(record: Mapping[str, Any], style: str) -> str:
    """The rows of a case below its name and floor, and below them why any figure is missing.

    Args:
        record: a case as in ``results.json``.
        style: a table format of tabulate.
    """
    heading = f"### {record['name']}" if style == "github" else record["name"]
    if record["skipped"]:
        return f"{heading}\n\nSkipped: {record['skipped']}."
    parts = [heading, _floor(record), _rows(record, style)]
    missing = [f"{row['name']}: {row['status']}: {row['reason']}" for row in record["rows"] if row["reason"]]
    missing += [
        f"{row['name']}: peak not measured: {row['peak_problem']}" for row in record["rows"] if row["peak_problem"]
    ]
    missing += [f"{row['name']}: {row['note']}" for row in record["rows"] if row["note"] and not _is_ours(row)]
    if missing:
        parts.append("\n".join(f"- {line}" for line in missing))
    return "\n\n".join(parts)


def targets_table(targets: Sequence[Mapping[str, Any]], style: str) -> str:
    """The promises that the run has figures for, with their verdicts."""
    body = [
        [
            target["case"],
            target["claim"],
            f"{target['value']:.3g}",
            f"{'>=' if target['at_least'] else '<='} {target['bound']:g}",
            "-" if target["aim"] is None else f"{target['aim']:g}",
            "yes" if target["met"] else "NO",
        ]
        for target in targets
    ]
    return _table(body, ["case", "figure", "measured", "must be", "aim", "met"], style)


def variants_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The variants of an operator, and below them why a figure is missing."""
    body = []
    for row in rows:
        cells = [row["name"], row["status"], "", "", ""]
        if row["status"] == "measured":
            quartiles = f"{row['first_quartile_ms']:.4f} - {row['third_quartile_ms']:.4f}"
            host = "-" if row["host_ms"] is None else f"{row['host_ms']:.3f}"
            cells[1:] = [f"{row['median_ms']:.4f}", quartiles, host, f"{row['share_of_floor']:.1%}"]
        body.append(cells)
    table = _table(body, [rows[0]["group"], "ms", "quartiles", "host ms", "share of floor"], "simple", text_columns=1)
    return "\n".join([table, *(f"- {row['name']}: {row['reason']}" for row in rows if row["reason"])])


def markdown(results: Mapping[str, Any], pictures: Sequence[str]) -> str:
    """The report as a Markdown document with the plots."""
    parts = [f"# Overhead of the loss and the head: {results['preset']}"]
    if not results["complete"]:
        parts.append("**Incomplete: the run was interrupted. What is here was measured in full.**")
    parts += [f"![{name}]({name})" for name in pictures]
    if results["targets"]:
        parts += ["## Targets", targets_table(results["targets"], "github")]
    parts += ["## Method", notes(results), "## Machine", _facts(results["environment"]), "## Cases"]
    parts += [case_table(record, "github") for record in results["cases"]]
    return "\n\n".join(parts) + "\n"


def notes(results: Mapping[str, Any]) -> str:
    """What the columns are and how they were measured, one fact a line."""
    environment = results["environment"]
    on_cpu = environment["cuda"] is None
    clock = (
        "wall time,"
        if on_cpu
        else "GPU time between two CUDA events, with all launches of the call queued before it begins and the L2 cache "
        "overwritten,"
    )
    peak = (
        "growth of the resident set (VmHWM) to its peak, in a process of its own for each contestant,"
        if on_cpu
        else "peak of what torch's CUDA allocator handed out,"
    )
    host = "host ms: CPU time to issue the call to an idle device; all of it where the call waits for the device."
    lines = [
        f"ms: {clock} median of {results['repeats']} turns, with quartiles. Contestants, the copy and the "
        "bare matrix products of a case take turns in rounds of changing order, warmed up: compiling is not timed.",
        *([] if on_cpu else [host]),
        "train: loss and gradients of all operands and parameters, which the call allocates. no-grad: loss alone.",
        "floor: the longer of two times. Memory: operands and targets read once, gradients written once, at the "
        "bandwidth of a copy between two large buffers; data that fits in a cache can beat it. Products: the bare "
        "matrix products at the case's own shape (x W^T, and for train g W and g^T x) into tensors that exist.",
        "share of copy: floor / ms, for given logits.",
        f"peak MiB: {peak} beyond operands, parameters and gradients.",
        "Contestants with the same function had the same loss and norms of gradients, or are marked as failed.",
        f"Logits and inputs are normal, of the given standard deviation; {environment['threads']} threads.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _floor(record: Mapping[str, Any]) -> str:
    case, floor = Case(**record["case"]), record["floor"]
    text = (
        f"Floor {_ms(floor['ms'])} ms: {floor['bytes'] / 2**20:,.1f} MiB at {floor['bytes_per_second'] / 1e9:.1f} GB/s "
        f"take {_ms(floor['memory_ms'])} ms"
    )
    if floor["products_ms"] is None:
        return f"{text}."
    products = "3 matrix products" if case.mode == "train" else "1 matrix product"
    return (
        f"{text}; {products}, {floor['flops'] / 1e9:,.3g} GFLOP at {floor['flops_per_second'] / 1e9:,.3g} GFLOP/s, "
        f"{_ms(floor['products_ms'])} ms. Logits: {case.logits_bytes / 2**20:,.1f} MiB."
    )


def _rows(record: Mapping[str, Any], style: str) -> str:
    with_products = record["floor"]["products_ms"] is not None
    on_device = any(row["host_ms"] is not None for row in record["rows"])
    headers = ["contestant", "by", "ms", "quartiles", *(["host ms"] if on_device else []), "/ eager", "/ compiled"]
    headers += ["/ products" if with_products else "share of copy", "peak MiB"]
    body = []
    for row in record["rows"]:
        cells = [row["name"], row["backend"] or "-"]
        if row["median_ms"] is None:
            cells += [row["status"], *["-"] * (len(headers) - 3)]
        else:
            cells += [
                _ms(row["median_ms"]),
                f"{_ms(row['first_quartile_ms'])} - {_ms(row['third_quartile_ms'])}",
                *([_ms(row["host_ms"])] if on_device else []),
                _ratio(row["to_plain_eager"]),
                _ratio(row["to_plain_compiled"]),
                _ratio(row["to_products"]) if with_products else f"{1 / row['to_floor']:.0%}",
                "-" if row["peak_bytes"] is None else f"{max(0, row['peak_bytes']) / 2**20:,.1f}",
            ]
        body.append(cells)
    return _table(body, headers, style, text_columns=2)


def _is_ours(row: Mapping[str, Any]) -> bool:
    # The JSON has what a fused backend says of itself.
    return row["backend"] in (*PROBLEMS, "reference")


def _facts(environment: Mapping[str, Any]) -> str:
    lines = []
    for name, value in environment.items():
        text = ", ".join(f"{key}: {part}" for key, part in value.items()) if isinstance(value, dict) else value
        lines.append(f"- {name}: {'-' if text is None else text}")
    return "\n".join(lines)


def _table(body: list[list[Any]], headers: list[str], style: str, text_columns: int = 2) -> str:
    alignment = ["left"] * text_columns + ["right"] * (len(headers) - text_columns)
    return str(tabulate(body, headers, style, disable_numparse=True, colalign=alignment))


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.2f}"
