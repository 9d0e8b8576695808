"""The settings: cells, which methods run in them and in what order, and the command line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .methods import METHODS

RESULTS = Path(__file__).parents[1] / "results" / "synthetic"

#: The same for every method. They are tried on a problem of their own, which no reported figure is from.
LEARNING_RATES = (0.03, 0.1, 0.3)
SEARCH_SEED = 100
WARM_UP_STEPS = 20
BETAS = (0.9, 0.99)


@dataclass(frozen=True)
class Cell:
    """One problem size: N contexts, M words, dimension d, Dirichlet's alpha; how long to train, on which seeds."""

    contexts: int
    words: int
    dim: int
    alpha: float
    steps: int
    seeds: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"n{self.contexts}-m{self.words}-d{self.dim}-alpha{self.alpha:g}"

    def to_json(self) -> dict[str, Any]:
        """All that a figure of one seed depends on: the seeds are not among it, so that more can be added."""
        values = asdict(self)
        del values["seeds"]
        return values


@dataclass(frozen=True)
class Unit:
    """A method in a cell: what one file of results holds."""

    cell: Cell
    method: str

    @property
    def name(self) -> str:
        return f"{self.cell.name}/{self.method}"


_SEEDS = (0, 1, 2, 3, 4)
MAIN = Cell(400, 300, 10, 0.1, 1000, _SEEDS)
DIMS, ALPHAS = (5, 10, 20, 50, 100), (0.01, 0.1, 1.0)
GRID = tuple(
    Cell(MAIN.contexts, MAIN.words, dim, alpha, 500, _SEEDS)
    for alpha in (0.1, 0.01, 1.0)
    for dim in DIMS
    if (dim, alpha) != (MAIN.dim, MAIN.alpha)
)
#: More words, and as many seeds and steps as there was time for.
LARGER = (Cell(1000, 1000, 20, 0.1, 500, (0, 1, 2)), Cell(1000, 10_000, 50, 0.1, 200, (0,)))
SMALL = Cell(100, 60, 4, 0.1, 300, (0, 1))

CORE = ("linear", "temperature", "plif", "sigmoidcap-learned", "mlp", "mlp-1")
LARGER_METHODS = (*CORE, "mos4")
_GRID_ROUNDS = (
    CORE,
    ("mos4", "linear-eq-mos4", "sigsoftmax", "softcap-learned", "gss", "plif-frozen", "spline"),
    ("softcap", "sigmoidcap", "gss-published"),
)
GRID_METHODS = tuple(method for methods in _GRID_ROUNDS for method in methods)


def study(preset: str) -> list[Unit]:
    """The units of a preset, the most wanted first."""
    if preset == "small":
        return [Unit(SMALL, method) for method in CORE]
    first, second, third = ([Unit(cell, method) for method in methods for cell in GRID] for methods in _GRID_ROUNDS)
    larger = [Unit(cell, method) for cell in LARGER for method in LARGER_METHODS]
    quick = {cell: [unit for unit in larger if unit.cell == cell and unit.method in CORE] for cell in LARGER}
    slow = [unit for unit in larger if unit.method not in CORE]
    main = [Unit(MAIN, method) for method in METHODS]
    return [*main, *first, *quick[LARGER[0]], *second, *quick[LARGER[1]], *third, *slow]


PRESETS = ("full", "small")


@dataclass(frozen=True)
class Command:
    """A parsed command line."""

    preset: str
    action: str
    units: list[Unit]
    folder: Path
    limit_minutes: float | None
    threads: int


def parse(arguments: Sequence[str] | None = None) -> Command:
    """The command that ``arguments`` (by default those of the process) are. Exits with code 2 on a mistake in them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.synthetic",
        description="Fit random distributions with output layers of small dimension. Without an action it runs what is "
        "missing of the preset; several processes may do so at once.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="full", help="small: one cell and a few methods, within a minute")
    add("--cells", metavar="CELL,...", help="only these; --list shows their names; main is the one of the main table")
    add("--methods", metavar="METHOD,...", help=f"only these, of {', '.join(METHODS)}")
    add("--limit-minutes", type=_positive, help="start no training after this many minutes")
    add("--out", type=Path, help="folder of the results (full: benchmarks/results/synthetic, small: results/synthetic)")
    add("--threads", type=int, default=1, help="of torch; figures are the same for the same number of threads")
    actions = parser.add_mutually_exclusive_group()
    for name, text in (
        ("list", "what there is, what is missing, and how long that would take"),
        ("timing", "time the losses and steps of all methods in turn"),
        ("report", "write report.md and its pictures from the results"),
        ("verify", "train once more what is quick, and compare it with the results"),
    ):
        actions.add_argument(f"--{name}", dest="action", action="store_const", const=name, default="run", help=text)
    given = parser.parse_args(arguments)
    if given.threads < 1:
        parser.error(f"argument --threads: must be at least 1, got {given.threads}")
    units = study(given.preset)
    if given.cells is not None:
        wanted = {MAIN.name if name == "main" else name for name in given.cells.split(",")}
        known = {unit.cell.name for unit in units}
        if wanted - known:
            parser.error(f"argument --cells: must be of {', '.join(sorted(known))}, got {min(wanted - known)!r}")
        units = [unit for unit in units if unit.cell.name in wanted]
    if given.methods is not None:
        wanted = set(given.methods.split(","))
        if wanted - set(METHODS):
            parser.error(f"argument --methods: must be of {', '.join(METHODS)}, got {min(wanted - set(METHODS))!r}")
        units = [unit for unit in units if unit.method in wanted]
    if not units:
        parser.error("no cell of the preset has any of these methods")
    folder = given.out or (RESULTS if given.preset == "full" else Path("results") / "synthetic")
    return Command(given.preset, given.action, units, folder, given.limit_minutes, given.threads)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value
