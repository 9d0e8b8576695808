"""``python -m benchmarks.synthetic``; ``--help`` lists the options."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..files import write_json
from . import records, report, timing, verify
from .run import Runner, estimated_seconds, prepare
from .settings import Command, parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 1 for an error or a failed comparison, 130 after Ctrl-C."""
    command = parse(arguments)
    prepare(command.threads)
    try:
        return _ACTIONS[command.action](command)
    except records.RecordError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted. What is finished is kept: the same command goes on from there.", file=sys.stderr)
        return 130


def _run(command: Command) -> int:
    total = sum(estimated_seconds(command.units, command.folder).values())
    print(f"{len(command.units)} units, about {total / 60:.1f} minutes of one process are missing; {command.folder}")
    complete = Runner(command).execute()
    for cell in dict.fromkeys(unit.cell for unit in command.units) if command.preset == "small" else ():
        methods = [unit.method for unit in command.units if unit.cell == cell]
        print(f"{cell.name}\n{report.summary(cell, methods, command.folder)}")
    if command.preset == "small":
        print("The whole study: python -m benchmarks.synthetic --list")
    if not complete:
        print("Not everything is there yet. The same command goes on.")
    return 0


def _list(command: Command) -> int:
    seconds = estimated_seconds(command.units, command.folder)
    for unit in command.units:
        missing = records.missing_runs(records.read(unit, command.folder), unit)
        print(f"{unit.name:48} {f'{missing} trainings missing, {seconds[unit]:7.1f} s' if missing else 'done'}")
    print(f"{sum(seconds.values()) / 60:.1f} minutes of one process are missing")
    return 0


def _timing(command: Command) -> int:
    write_json(command.folder / "timing.json", timing.measure_all())
    print(command.folder / "timing.json")
    return 0


def _report(command: Command) -> int:
    if command.preset != "full":
        print("error: the report is that of the full preset", file=sys.stderr)
        return 1
    print(report.write(command.folder))
    return 0


def _verify(command: Command) -> int:
    units = verify.chosen(command)
    if not units:
        print(f"error: nothing to compare with in {command.folder}", file=sys.stderr)
        return 1
    comparisons = [verify.compare(unit, command.folder) for unit in units]
    for comparison in comparisons:
        print(comparison.describe())
    return 0 if all(comparison.agree for comparison in comparisons) else 1


_ACTIONS = {"run": _run, "list": _list, "timing": _timing, "report": _report, "verify": _verify}


if __name__ == "__main__":
    sys.exit(main())
