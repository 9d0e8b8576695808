"""``python -m benchmarks.rank``; ``--help`` lists the options."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..files import write_text
from ..language_model.corpora import CorpusError
from ..language_model.training import Diverged
from . import report, run
from .settings import VERIFIED, Command, parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 1 for an error or a failed comparison, 130 after Ctrl-C."""
    command = parse(arguments)
    run.prepare(command.threads)
    try:
        return _ACTIONS[command.action](command)
    except (run.RecordError, CorpusError, Diverged, ArithmeticError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted. What is finished is kept: the same command goes on from there.", file=sys.stderr)
        return 130


def _run(command: Command) -> int:
    missing = run.execute(command.units, command.folder)
    if missing:
        print(f"{missing} units are missing yet, which another process is at. The same command goes on.")
    else:
        print(f"All {len(command.units)} units are in {command.folder}; --report writes the report.")
    return 0


def _list(command: Command) -> int:
    for unit in command.units:
        print(f"{unit!s:40} {'missing' if run.read(unit, command.folder) is None else 'done'}")
    return 0


def _report(command: Command) -> int:
    path = command.folder / "report.md"
    write_text(path, report.document(command.folder))
    print(path)
    return 0


def _verify(command: Command) -> int:
    lines = run.verify(VERIFIED, command.folder)
    for line, _ in lines:
        print(line)
    return 0 if all(good for _, good in lines) else 1


_ACTIONS = {"run": _run, "list": _list, "report": _report, "verify": _verify}


if __name__ == "__main__":
    sys.exit(main())
