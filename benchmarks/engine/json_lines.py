"""JSON Lines files that several processes append to: a line is there whole, or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock


def plain(value: Any) -> Any:
    """``value`` as it comes back from JSON: tuples are lists, and keys are strings. NaN and infinity are an error."""
    return json.loads(json.dumps(value, allow_nan=False))


def read(path: Path) -> list[Any]:
    """The lines of ``path``, parsed; none where there is no file.

    Characters behind the last end of a line are no line: a process was killed while it wrote them.

    Raises:
        ValueError: a line is not JSON.
    """
    if not path.is_file():
        return []
    found = []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return found


def append(path: Path, values: Iterable[Any], lock: Path) -> None:
    """Append a line for each value, and wait until they are on the disk.

    What a killed process left behind the last end of a line is removed first. ``lock`` is a file that all writers lock.
    """
    text = "".join(f"{json.dumps(value, allow_nan=False, separators=(',', ':'))}\n" for value in values)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock), path.open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
