"""The results of an experiment on the disk, and the claims of the processes that work on them.

A file has two kinds of lines: ``{"environment": ID, ...}`` has versions and machine, ``{"unit": NAME, ...}`` has a
result and names its environment by the ID. Lines are only ever appended. So files of several machines can be put
together by ``cat``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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

    def append(self, unit: Unit, measured: Measured, seconds: float) -> None:
        """Add a result, with the environment of this process."""
        here = environment()
        identifier = _digest(here)
        record = {
            "unit": unit.name,
            "environment": identifier,
            "seconds": round(seconds, 3),
            "settings": unit.stored_settings(),
            "figures": measured.figures,
            "times": measured.times,
        }
        known = {line["environment"] for line in json_lines.read(self.path) if "unit" not in line}
        # Two processes may both find it missing: a line that is there twice does no harm.
        lines = [record] if identifier in known else [{"environment": identifier, **here}, record]
        json_lines.append(self.path, lines, self._work / "append.lock")

    def checkpoint(self, unit: Unit) -> Checkpoint:
        """The checkpoint of ``unit`` with these settings."""
        return Checkpoint(self._work / f"{_file_name(unit.name)}-{_digest(unit.stored_settings())}.pt")

    @contextmanager
    def claimed(self, unit: Unit) -> Iterator[bool]:
        """Whether ``unit`` is this process's to do until the block ends; False where another process has it."""
        self._work.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(FileLock(self._work / f"{_file_name(unit.name)}.lock", blocking=False))
                mine = True
            except Timeout:
                mine = False
            yield mine

    def require_settings(self, unit: Unit, results: Results) -> None:
        """Raise :class:`StoreError` where the stored result of ``unit`` was made with other settings."""
        if unit.name not in results:
            return
        stored, wanted = results[unit.name].settings, unit.stored_settings()
        if stored != wanted:
            names = [name for name in {**stored, **wanted} if stored.get(name) != wanted.get(name)]
            changes = ", ".join(f"{name}: {stored.get(name)} -> {wanted.get(name)}" for name in names)
            raise StoreError(f"{self.path}: {unit.name} was made with other settings ({changes})")


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def _file_name(unit: str) -> str:
    return unit.replace("/", "--")
