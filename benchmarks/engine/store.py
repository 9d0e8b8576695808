"""The results of an experiment on the disk, and the claims of the processes that work on them.

A file has two kinds of lines: ``{"environment": ID, ...}`` has versions and machine, ``{"unit": NAME, ...}`` has a
result and names its environment by the ID. Lines are only ever appended. So files of several machines can be put
together by ``cat``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from . import json_lines
from .checkpoint import Checkpoint
from .environment import environment
from .experiment import ExperimentError, Measured, Record, Results, Unit

RESULTS = Path(__file__).parents[1] / "results"


class StoreError(ExperimentError):
    """Stored results do not go with the experiment as it is now."""


class Store:
    """The results ``folder/NAME.jsonl``, with locks and checkpoints in ``folder/.work/NAME``.

    Locks end with their process, however it ends. They hold between machines where the file system has them (NFS 4,
    Lustre with ``flock``). Elsewhere give each machine a share of the units (``--shard``) and a folder of its own.
    """

    def __init__(self, name: str, folder: Path = RESULTS) -> None:
        self.path = folder / f"{name}.jsonl"
        self._work = folder / ".work" / name

    def results(self) -> Results:
        """What is there now.

        Raises:
            StoreError: the file is damaged.
        """
        environments: dict[str, dict[str, Any]] = {}
        records = []
        try:
            for line in json_lines.read(self.path):
                if "unit" in line:
                    records.append(Record(**{**line, "environment": environments[line["environment"]]}))
                else:
                    environments[line.pop("environment")] = line
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{self.path} is no file of results: {error!r}") from error
        return Results(records)

    def append(self, unit: Unit, measured: Measured, seconds: float) -> Record:
        """Add a result, with the environment of this process."""
        here = environment()
        record = {
            "unit": unit.name,
            "environment": identifier(here),
            "seconds": round(seconds, 3),
            "settings": unit.stored_settings(),
            "figures": json_lines.plain(measured.figures),
            "times": json_lines.plain(measured.times),
        }
        lines = [{"environment": identifier(here), **here}, record]
        # Two processes may both find it missing: a line that is there twice does no harm.
        if any("unit" not in line and line["environment"] == identifier(here) for line in json_lines.read(self.path)):
            del lines[0]
        json_lines.append(self.path, lines, self._work / "append.lock")
        return Record(**{**record, "environment": here})

    def checkpoint(self, unit: Unit) -> Checkpoint:
        """The checkpoint of ``unit`` with these settings."""
        settings = json.dumps(unit.stored_settings(), sort_keys=True)
        return Checkpoint(self._work / f"{_file_name(unit.name)}-{_digest(settings)}.pt")

    @contextmanager
    def claimed(self, unit: Unit) -> Iterator[bool]:
        """Whether ``unit`` is this process's to do until the block ends; False where another process has it."""
        self._work.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._work / f"{_file_name(unit.name)}.lock", blocking=False)
        try:
            lock.acquire()
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def require_settings(self, unit: Unit, results: Results) -> None:
        """Raise :class:`StoreError` where the stored result of ``unit`` was made with other settings."""
        if unit.name not in results:
            return
        stored, wanted = results[unit.name].settings, unit.stored_settings()
        if stored != wanted:
            names = [name for name in {**stored, **wanted} if stored.get(name) != wanted.get(name)]
            changes = ", ".join(f"{name}: {stored.get(name)} -> {wanted.get(name)}" for name in names)
            raise StoreError(f"{self.path}: {unit.name} was made with other settings ({changes})")


def identifier(values: dict[str, Any]) -> str:
    """A short name for an environment."""
    return _digest(json.dumps(values, sort_keys=True))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _file_name(unit: str) -> str:
    return unit.replace("/", "--")
