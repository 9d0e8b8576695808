"""How long devices take to exchange something: a model with two numbers, which nobody has measured here."""

from __future__ import annotations

from dataclasses import dataclass

from monosoftmax.distributed.collectives import Collective


@dataclass(frozen=True)
class Link:
    """What each device of a ring has to the next one. It sends and receives at a time."""

    name: str
    latency_us: float
    #: In one direction.
    gigabytes_per_second: float

    def __str__(self) -> str:
        return f"{self.name}: {self.latency_us:g} us, {self.gigabytes_per_second:g} GB/s in each direction"

    def ms(self, collective: Collective) -> float:
        """The time of a ring.

        An all-reduce of n bytes takes 2 (G - 1) steps, each of which sends n / G bytes; an all-gather takes G - 1 steps
        of n bytes.
        """
        steps, sent = collective.ranks - 1, float(collective.nbytes)
        if collective.kind != "gather":
            steps, sent = 2 * steps, sent / collective.ranks
        return steps * (1e-3 * self.latency_us + 1e-6 * sent / self.gigabytes_per_second)


#: Assumptions. The bandwidths are peaks that the standards or makers state, which no exchange reaches:
#: - NVLink 4: 900 GB/s of an H100 in both directions together (NVIDIA H100 Tensor Core GPU Datasheet).
#: - PCIe 5.0 x16: 32 GT/s on 16 lanes, 128 of 130 bits are data (PCI Express Base Specification 5.0).
#: - 100 Gb/s Ethernet: IEEE 802.3.
#: The latencies are what NCCL assumes for a step of a ring, protocol Simple (``hwLat`` in its src/graph/tuning.cc).
LINKS = {
    "nvlink4": Link("NVLink 4", 3.4, 450.0),
    "pcie5": Link("PCIe 5.0 x16", 5.7, 63.0),
    "ethernet100": Link("100 Gb/s Ethernet", 14.0, 12.5),
}
