"""The state of a unit that takes long, so that a process that is ended loses a minute of it, not all."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

#: Seconds between two states that are kept.
_INTERVAL = 60.0


class Checkpoint:
    """Keeps a state in a file, which is there whole or not at all."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._saved = time.monotonic()

    def load(self) -> Any:
        """The state that was kept last, its tensors on the CPU; None where there is none."""
        if not self._path.is_file():
            return None
        return torch.load(self._path, map_location="cpu", weights_only=True)

    def due(self) -> bool:
        """Whether the last state is a minute old."""
        return time.monotonic() - self._saved > _INTERVAL

    def save(self, state: Any) -> None:
        """Keep ``state``: tensors, numbers, strings, and lists and dictionaries of them."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        part = self._path.with_suffix(f".{os.getpid()}.part")
        torch.save(state, part)
        part.replace(self._path)
        self._saved = time.monotonic()

    def remove(self) -> None:
        """Forget the state: the unit is done."""
        self._path.unlink(missing_ok=True)
