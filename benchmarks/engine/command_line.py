"""The command line: ``list``, ``run``, ``report`` and ``verify`` are the same for every experiment."""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import tyro

from . import runner
from .experiment import Experiment, ExperimentError
from .store import RESULTS, Store

Names = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[NAME ...]", help="default: all")]
Only = Annotated[str, tyro.conf.arg(help="a pattern of names of units, like 'main/*'")]
Folder = Annotated[Path, tyro.conf.arg(help="the folder of the results")]


@dataclass(frozen=True)
class Commands:
    """How to make each experiment, the whole report from the folders of results and pictures, and further subcommands:
    functions whose signatures are their options.
    """

    experiments: Mapping[str, Callable[[], Experiment]]
    document: Callable[[Path, Path], str]
    others: Mapping[str, Callable[..., int | None]] = field(default_factory=dict)

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Run a command; returns the exit code: 0, 1 for an error or a difference, 130 after Ctrl-C."""
        table = {"list": self.list, "run": self.run, "report": self.report, "verify": self.verify, **self.others}
        try:
            found: Any = tyro.extras.subcommand_cli_from_dict(
                table, prog="python -m benchmarks", args=arguments, sort_subcommands=False
            )
        except ExperimentError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("Interrupted. What is done is kept: the same command goes on from there.", file=sys.stderr)
            return 130
        return int(found or 0)

    def list(self, experiments: Names = (), /, only: Only = "", results: Folder = RESULTS) -> None:
        """Show the units of experiments, and which of them are done."""
        for experiment in self._named(experiments):
            found = Store(experiment.name, results).results()
            units = runner.Selection(only).of(experiment, found)
            done = [unit for unit in units if unit.name in found]
            print(f"{experiment.name}: {experiment.title}. {len(done)} of {len(units)} units are done.")
            for unit in units if experiments else ():
                seconds = f"{found[unit.name].seconds:.1f} s" if unit.name in found else "missing"
                print(f"  {seconds:>10}  {unit.name}")

    def run(
        self,
        experiment: tyro.conf.Positional[str],
        /,
        only: Only = "",
        shard: str = "1/1",
        limit_minutes: float = math.inf,
        results: Folder = RESULTS,
    ) -> int:
        """Do the units of an experiment that are missing. Any number of processes may do so together.

        Args:
            experiment: its name; `list` shows them.
            shard: K/N does the K-th of N equal shares of the units, for machines that share no file system.
            limit_minutes: start no unit after so many minutes.
        """
        (chosen,) = self._named((experiment,))
        place, _, number = shard.partition("/")
        if not (place.isdigit() and number.isdigit() and 1 <= int(place) <= int(number)):
            raise ExperimentError(f"shard must be K/N with 1 <= K <= N, got {shard!r}")
        selection = runner.Selection(only, int(place) - 1, int(number), limit_minutes)
        left = runner.run(chosen, Store(chosen.name, results), selection)
        if left:
            print(f"{len(left)} units are missing still. The same command goes on.")
        return 0

    def report(
        self, experiment: tyro.conf.Positional[str] = "", /, check: bool = False, results: Folder = RESULTS
    ) -> int:
        """Write REPORT.md and its pictures from the results, or print the section of one experiment.

        Args:
            experiment: print its section, and write only its pictures.
            check: write nothing, and exit with 1 where REPORT.md is not what the results give.
        """
        pictures, path = results / "pictures", results / "REPORT.md"
        if experiment:
            (chosen,) = self._named((experiment,))
            print(chosen.section(Store(chosen.name, results).results(), pictures))
            return 0
        with tempfile.TemporaryDirectory() as folder:
            text = self.document(results, Path(folder) if check else pictures)
        if not check:
            path.write_text(text, encoding="utf-8")
            print(os.path.relpath(path))
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            raise ExperimentError(f"{path} is not what the results give: python -m benchmarks report writes it")
        return 0

    def verify(self, experiments: Names = (), /, only: Only = "", keep: bool = False, results: Folder = RESULTS) -> int:
        """Repeat a few quick units, or those that are named, and compare their figures with those that are stored.

        Args:
            keep: add the results of a kind of machine that there are none of, to compare with next time.
        """
        agree = True
        for experiment in self._named(experiments):
            store = Store(experiment.name, results)
            found = store.results()
            names = [name for name in found if fnmatchcase(name, only)] if only else experiment.to_verify(found)
            for name, differences in runner.verify(experiment, store, names, keep):
                print(f"{experiment.name} {name}: {f'DIFFERS: {differences[:400]}' if differences else 'the same'}")
                agree = agree and not differences
        return 0 if agree else 1

    def _named(self, names: Sequence[str]) -> Sequence[Experiment]:
        unknown = [name for name in names if name not in self.experiments]
        if unknown:
            raise ExperimentError(f"there is no experiment {unknown[0]!r}; there are {', '.join(self.experiments)}")
        return [self.experiments[name]() for name in names or self.experiments]
