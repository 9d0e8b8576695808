"""Training a stored run once more, to see that its figures come out again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..machine import environment, machine_changes
from . import records
from .settings import MAIN, Command, Unit
from .training import train

#: Elsewhere arithmetic is rounded in another way, and a training that is not convex may end in another place.
KL_TOLERANCE, MODES_TOLERANCE = 0.05, 0.05
_QUICK = ("linear", "plif")


@dataclass(frozen=True)
class Comparison:
    """A run's stored and new figures, and whether they agree as they should on this machine."""

    name: str
    same_machine: bool
    commits: tuple[str | None, str | None]
    stored: dict[str, Any]
    new: dict[str, Any]

    @property
    def agree(self) -> bool:
        if self.same_machine:
            return self.stored == self.new
        kl, modes = (abs(self.stored[name] - self.new[name]) for name in ("kl", "modes"))
        return bool(kl <= KL_TOLERANCE and modes <= MODES_TOLERANCE)

    def describe(self) -> str:
        wanted = (
            "same machine, must be the same bit for bit"
            if self.same_machine
            else f"another machine, KL may differ by {KL_TOLERANCE:g} and modes by {MODES_TOLERANCE:g}"
        )
        verdict = "agree" if self.agree else "DIFFER"
        text = f"{self.name}: {verdict} ({wanted})\n  stored {self.stored}\n  new    {self.new}"
        if not self.agree and self.commits[0] != self.commits[1]:
            text += f"\n  The sources differ, which may be why: stored {self.commits[0]}, now {self.commits[1]}"
        return text


def chosen(command: Command) -> list[Unit]:
    """The units to verify: the quick ones of the main cell, of those that the command line names; else the first."""
    stored = [unit for unit in command.units if records.read(unit, command.folder)["runs"]]
    quick = [unit for unit in stored if unit.cell == MAIN and unit.method in _QUICK]
    return quick or stored[:1]


def compare(unit: Unit, folder: Path) -> Comparison:
    """Train the first stored run of ``unit`` again.

    Raises:
        RecordError: there is none.
    """
    record = records.read(unit, folder)
    if not record["runs"]:
        raise records.RecordError(f"{unit.name} has no run to compare with in {folder}")
    run = record["runs"][0]
    there, here = record["environments"][run["environment"]], environment()
    again = train(unit.cell, unit.method, run["seed"], run["lr"], keep_shape=False)
    return Comparison(
        f"{unit.name}, seed {run['seed']}",
        not machine_changes(there, here),
        (there.get("commit"), here["commit"]),
        run["figures"],
        again["figures"],
    )
