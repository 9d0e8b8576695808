"""What bounds the speed of a configuration on a GPU, by data sheets: bounds, no measurements.

Each is the time that one unit of the GPU takes at least for an element of a row, were it never to wait:

- memory: each row that is given is read once, each row of results is written once. What a kernel reads again is taken
  to come from the L2 cache.
- issue: the instructions of the main loops on the path, each scheduler issuing one a clock.
- special functions: results of that unit.
- shared memory: bytes, without conflicts of banks. Of a look-up 4, as if lanes met wherever they can.

Where the compiler has made two copies of code for the sides of a branch (the spline's, on some targets), both count:
there the last three are no strict bounds.

Not in it: latencies that too few warps leave uncovered, bank conflicts, atomic operations, the L2 cache's speed, and
units that are slower than the schedulers (integer arithmetic at half rate).
"""

from __future__ import annotations

from dataclasses import dataclass

from .cuda_configurations import Configuration
from .cuda_devices import LANES, SHARED_BYTES, SPECIAL_FUNCTIONS, Speeds
from .cuda_figures import Figures

MEMORY, ISSUE, SPECIAL, SHARED = "memory", "issue", "special functions", "shared memory"


@dataclass(frozen=True)
class Roofline:
    """Seconds per element of a row, by what takes them."""

    seconds: dict[str, float]

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(self.seconds, key=lambda each: self.seconds[each])

    @property
    def of_memory_bandwidth(self) -> float:
        """The part of the memory's bandwidth that can be used at best."""
        return self.seconds[MEMORY] / self.seconds[self.bound]


def roofline(configuration: Configuration, figures: Figures, speeds: Speeds) -> Roofline:
    """The bounds of a configuration; the figures are those for the GPU's architecture."""
    clocks = speeds.device.multiprocessors * speeds.clock
    return Roofline(
        {
            MEMORY: configuration.moved_bytes / speeds.bytes_per_second,
            ISSUE: figures.main_path / LANES / clocks,
            SPECIAL: figures.special / SPECIAL_FUNCTIONS / clocks,
            SHARED: figures.shared_bytes / SHARED_BYTES / clocks,
        }
    )
