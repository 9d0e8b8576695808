"""The GPUs that the CUDA kernels are compiled for: what kernels share there, and what bounds their speed.

Limits are those of the table "Technical specifications per compute capability" of NVIDIA's CUDA C++ programming guide;
``arch_traits.h`` of NVIDIA's CCCL has the same numbers. How many multiprocessors there are is a matter of the product
that is named.
"""

from __future__ import annotations

from dataclasses import dataclass

_KIB = 1024


@dataclass(frozen=True)
class Device:
    """A GPU. Shared memory in bytes; ``reserved`` is what the driver takes of it for each block."""

    product: str
    capability: int
    multiprocessors: int
    threads_of_multiprocessor: int
    blocks_of_multiprocessor: int
    shared_of_multiprocessor: int
    reserved: int = _KIB
    registers_of_multiprocessor: int = 64 * _KIB

    @property
    def shared_of_block(self) -> int:
        """What a block may have, where its kernel opts in."""
        return self.shared_of_multiprocessor - self.reserved

    @property
    def has_async_copies(self) -> bool:
        """From global to shared memory, not through registers."""
        return self.capability >= 80


#: By nvcc's name for the architecture.
DEVICES = {
    "sm_75": Device("T4", 75, 40, 1024, 16, 64 * _KIB, reserved=0),
    "sm_80": Device("A100", 80, 108, 2048, 32, 164 * _KIB),
    "sm_86": Device("RTX 3090", 86, 82, 1536, 16, 100 * _KIB),
    "sm_89": Device("RTX 4090", 89, 128, 1536, 24, 100 * _KIB),
    "sm_90": Device("H100 SXM", 90, 132, 2048, 32, 228 * _KIB),
    "sm_100": Device("B200", 100, 148, 2048, 32, 228 * _KIB),
    "sm_103": Device("B300", 103, 148, 2048, 32, 228 * _KIB),
    "sm_120": Device("RTX 5090", 120, 170, 1536, 24, 100 * _KIB),
}


@dataclass(frozen=True)
class Speeds:
    """What bounds a kernel, by data sheets.

    The clock is what the data sheet's float32 figure comes to: 2 operations of each of 128 lanes of every
    multiprocessor. It is the highest, which no GPU keeps under load: with a lower one, bounds other than memory are
    longer.
    """

    target: str
    bytes_per_second: float
    float32_per_second: float

    @property
    def device(self) -> Device:
        """The GPU."""
        return DEVICES[self.target]

    @property
    def clock(self) -> float:
        """In Hz."""
        return self.float32_per_second / (2 * LANES * self.device.multiprocessors)


#: Of a multiprocessor, in each clock: thread instructions issued by its 4 schedulers; results of the special function
#: unit (programming guide, "Throughput of Native Arithmetic Instructions"); bytes of shared memory (32 banks of 4).
LANES = 128
SPECIAL_FUNCTIONS = 16
SHARED_BYTES = 128

#: NVIDIA's data sheets: H100 SXM 3.35 TB/s and 67 TFLOPS of float32; HGX B200 8 TB/s and 75 TFLOPS a GPU.
SPEEDS = {
    "H100": Speeds("sm_90", 3.35e12, 67e12),
    "B200": Speeds("sm_100", 8e12, 75e12),
}
