"""What a claim is, and the words that differences and counts are told in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..language_model.study_results import Comparison
from ..statistics import Difference
from .evidence import NotRun

#: The tolerance of the effective ranks in claims.
TOLERANCE = "0.0001"
GANEA = "Ganea et al., ICML 2019"
PARTHIBAN = "Parthiban et al., AAAI 2021"

Finding = Callable[[], str]


@dataclass(frozen=True)
class Claim:
    """What was claimed, by whom, what was found here, and the verdict."""

    text: str
    source: str
    found: tuple[str, ...]
    verdict: str


def judge(text: str, source: str, found: Sequence[Finding], verdict: Finding) -> Claim:
    """A claim from functions that may find that their figures are missing."""
    return Claim(text, source, tuple(finding(each) for each in found), finding(verdict, "not run"))


def finding(function: Finding, missing: str = "Not run") -> str:
    """What ``function`` returns, or that it was not run and by which command it is."""
    try:
        return function()
    except NotRun as error:
        return f"{missing}: `{error.command}`"


def gain(difference: Difference, digits: int = 4) -> str:
    """A difference of losses with its sign turned, so that a gain is positive."""
    turned = Difference(-difference.mean, -difference.high, -difference.low, difference.p, difference.pairs)
    return turned.describe("nats", digits)


def better(difference: Difference | None) -> bool:
    """Whether a loss is significantly lower."""
    return difference is not None and difference.significant and difference.mean < 0


def worse(difference: Difference | None) -> bool:
    """Whether a loss is significantly higher."""
    return difference is not None and difference.significant and difference.mean > 0


def of_all(count: int, total: int, what: str) -> str:
    """``supported``, ``supported in part`` or ``not supported``, by how many of all cases agree."""
    word = "supported" if count == total else "supported in part" if count else "not supported"
    return f"**{word}**: {what} in {count} of {total}"


def gains(comparison: Comparison) -> str:
    assert comparison.seeds is not None  # Evidence raises NotRun otherwise
    text = f"{gain(comparison.seeds)} over {comparison.seeds.pairs} seeds"
    if comparison.documents is not None:
        text += f", {gain(comparison.documents)} over documents"
    return text


def differences(comparison: Comparison) -> str:
    assert comparison.seeds is not None  # Evidence raises NotRun otherwise
    text = f"{comparison.seeds.describe('nats', 4)} over seeds"
    if comparison.documents is not None:
        text += f", {comparison.documents.describe('nats', 4)} over documents"
    return text
