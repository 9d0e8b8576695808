"""``python -m benchmarks.scale``, which ``python -m benchmarks scale`` is, too."""

import sys

import tyro

from .command import scale

if __name__ == "__main__":
    sys.exit(tyro.cli(scale, prog="python -m benchmarks.scale"))
