"""Work that several processes share: each claims what it does by a lock, which the system takes back when it ends."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: Locks are no results, and stay out of git.
LOCKS = Path(__file__).parents[1] / "build" / "locks"


def lock_of(folder: Path, unit: str) -> Path:
    """The lock on ``unit`` of the results in ``folder``."""
    return LOCKS / str(folder.resolve()).strip("/").replace("/", "-") / f"{unit.replace('/', '-')}.lock"


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether the lock ``path`` was to be had; False where another process has it. It is kept until the block ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
