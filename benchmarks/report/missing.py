"""How figures are told that are missing, and differences that are there."""

from __future__ import annotations

from collections.abc import Mapping

from ..engine.statistics import Difference


class NotRun(Exception):
    """A figure is not there; ``command`` makes it."""

    def __init__(self, command: str) -> None:
        super().__init__(command)
        self.command = command


def better(difference: Difference | None) -> bool:
    """Whether a loss is significantly lower."""
    return difference is not None and difference.significant and difference.mean < 0


def count_better(differences: Mapping[str, Difference]) -> int:
    """In how many of ``differences`` the loss is significantly lower."""
    return sum(map(better, differences.values()))


def gain(difference: Difference) -> str:
    """A difference of losses with its sign turned, so that a gain is positive."""
    turned = Difference(-difference.mean, -difference.high, -difference.low, difference.p, difference.pairs)
    return turned.describe("nats", 4)


def nats(difference: Difference) -> str:
    """A difference of losses, its interval, p and whether that is significant."""
    return difference.describe("nats", 4)


def span(differences: Mapping[str, Difference]) -> str:
    """The smallest and the largest gain, like ``+0.01 to +0.02``."""
    gains = [-difference.mean for difference in differences.values()]
    return f"{min(gains):+.4f} to {max(gains):+.4f}"


def of_all(count: int, total: int, what: str) -> str:
    """``supported``, ``supported in part`` or ``not supported``, by how many of all cases agree."""
    word = "supported" if count == total else "supported in part" if count else "not supported"
    return f"**{word}**: {what} in {count} of {total}"
