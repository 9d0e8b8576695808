"""``python -m benchmarks.language_model --study FILE``: run, list, report or verify a study."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from .corpora import CorpusError
from .run import Interrupted
from .settings import SettingsError
from .study import StudyError, load_study
from .study_run import RESULTS, SCRATCH, list_runs, run_study, verify


def main(arguments: Sequence[str]) -> int:
    """Do what ``arguments`` say; returns the exit code: 0, 1 for an error or figures that differ, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        study = load_study(options.study)
        folder, scratch = options.out / study.name, SCRATCH / study.name
        if options.list:
            print(list_runs(study, folder))
        elif options.report:
            # matplotlib and scipy take seconds to load, and the processes that train need neither.
            from .study_report import write_report

            print(write_report(study, folder))
        elif options.verify:
            return 0 if verify(study, folder, scratch) else 1
        else:
            run_study(study, folder, scratch, options.limit_minutes)
    except (Interrupted, KeyboardInterrupt):
        command = shlex.join(["python", "-m", "benchmarks.language_model", *arguments])
        print(f"Interrupted. Go on with: {command}", file=sys.stderr)
        return 130
    except (CorpusError, SettingsError, StudyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.language_model",
        description="Run the language models that a study file lists. What is done is skipped; any number of processes "
        "may run the same command together.",
        allow_abbrev=False,
    )
    parser.add_argument("--study", type=Path, required=True, metavar="FILE", help="such as those in studies/")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="print the runs, which are done, and the time that is left")
    what.add_argument("--report", action="store_true", help="write report.md and pictures from the results there are")
    what.add_argument("--verify", action="store_true", help="repeat a small run and compare its figures")
    what.add_argument("--limit-minutes", type=_minutes, metavar="M", help="start no run after so many minutes")
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS,
        metavar="FOLDER",
        help="the results are in a folder of it with the name of the study (benchmarks/results/language_model)",
    )
    return parser


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"must be a positive number of minutes, got {text!r}")
    return value
