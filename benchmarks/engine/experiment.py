"""An experiment: which units of work it has, what a unit computes, and what the report says about the results."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .checkpoint import Checkpoint
from .json_lines import plain

if TYPE_CHECKING:
    import pandas as pd


class ExperimentError(Exception):
    """What stops an experiment, and the user can do something about; the command line shows it in one line."""


class NotRun(ExperimentError):
    """A result is not there; ``command`` makes it."""

    def __init__(self, command: str) -> None:
        super().__init__(f"this has not been run: {command}")
        self.command = command


@dataclass(frozen=True)
class Unit:
    """One piece of work, which one process does at a time, and whose result is one line of a file.

    Slashes in ``name`` make groups that ``--only 'group/*'`` selects. ``settings`` is a dataclass of everything that
    the figures depend on, except for versions and the machine. A stored result with other settings is an error.
    """

    name: str
    settings: Any

    def stored_settings(self) -> dict[str, Any]:
        """The settings as JSON has them."""
        return plain(asdict(self.settings))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Measured:
    """What a unit found, as JSON values.

    ``figures`` are the same each time on the same machine: ``verify`` compares them bit for bit. ``times`` are seconds,
    bytes and whatever else differs each time.
    """

    figures: Mapping[str, Any]
    times: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """A stored result: the name of its unit, how many ``seconds`` that took, versions and machine."""

    unit: str
    settings: dict[str, Any]
    figures: dict[str, Any]
    times: dict[str, Any]
    seconds: float
    environment: dict[str, Any]


class Results(Mapping[str, Record]):
    """The results of an experiment that are there, by the names of their units, in the order in which they came."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._records: dict[str, list[Record]] = {}
        for record in records:
            self._records.setdefault(record.unit, []).append(record)

    def __getitem__(self, name: str) -> Record:
        # Files of several machines may be put together. The first result of a unit counts.
        return self._records[name][0]

    def every(self, name: str) -> list[Record]:
        """All results of a unit: ``verify`` takes the one of this kind of machine."""
        return self._records[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def matching(self, pattern: str) -> list[Record]:
        """The records of the units whose names match a pattern like ``main/*/search-*``."""
        return [record for name, record in self.items() if fnmatchcase(name, pattern)]

    def frame(self, pattern: str = "*") -> pd.DataFrame:
        """The matching records as a table with columns like ``unit``, ``settings.cell.dim``, ``figures.kl``."""
        import pandas as pd  # a machine that only runs units may lack it

        return pd.json_normalize([{**vars(record), "environment": None} for record in self.matching(pattern)])


class Experiment(ABC):
    """What an experiment is. Everything else (files, processes, the command line) is the engine's.

    Attributes:
        name, title: of its file ``benchmarks/results/NAME.jsonl``, and what ``list`` says about it.
        default: the units that ``run`` does and ``list`` shows without ``--only``.
        threads: of torch, on which the figures may depend.
        deterministic: whether torch is told to compute the same each time; other algorithms may be faster.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    default: ClassVar[str] = "*"
    threads: ClassVar[int] = 1
    deterministic: ClassVar[bool] = True

    @abstractmethod
    def units(self, results: Results) -> Iterable[Unit]:
        """The units that are known by now, the most wanted first; asked again after the last of them is done.

        So units may depend on results: a training on the learning rate that a search found.
        """

    @abstractmethod
    def run(self, unit: Unit, checkpoint: Checkpoint) -> Measured:
        """Do one of :meth:`units`; ``checkpoint`` keeps the state of one that takes long."""

    def to_verify(self, results: Results) -> list[str]:
        """Names of units that ``verify`` repeats: quick ones, of every kind. Empty if none can be the same again."""
        return []

    @abstractmethod
    def section(self, results: Results, pictures: Path) -> str:
        """The section of the report, as Markdown with a heading of level 2, and its pictures in that folder.

        Where results are missing it names the command that runs them. Links call the folder ``pictures``.
        """

    def command(self, pattern: str = "") -> str:
        """The command that runs what is missing, for the report."""
        only = f" --only '{pattern}'" if pattern else ""
        return f"python -m benchmarks run {self.name}{only}"
