"""``python -m benchmarks``: experiments, their report, a demonstration, what kernels compile to, simulated scale."""

from __future__ import annotations

import sys
from pathlib import Path

from .codegen.command import codegen
from .demo import demo
from .engine.command_line import Commands
from .experiments import EXPERIMENTS
from .scale.command import scale
from .train import train


def _document(results: Path, pictures: Path) -> str:
    # matplotlib and scipy take seconds to load, and the other commands need neither.
    from .report.document import document

    return document(results, pictures)


COMMANDS = Commands(EXPERIMENTS, _document, {"demo": demo, "train": train, "codegen": codegen, "scale": scale})

if __name__ == "__main__":
    sys.exit(COMMANDS.main())
