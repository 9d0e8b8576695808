"""What the results say: the choices of the stages, and differences between methods. See the package for the names."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from ...engine.experiment import Record, Results
from ...engine.statistics import Difference, over_documents
from .settings import BASELINE, CONTROL, PLIFS, TRANSFORMS, Study

#: Runs of stage 2 with a transform, by the rate of the head and the seed.
Runs = dict[tuple[float, int], Record]
_RATES, _SEED = Study.head_rates, Study.seeds[0]


def fitted_alone(results: Results) -> dict[str, Record]:
    """Stage 1 by the names of the transforms, those that are there, in the order of ``TRANSFORMS``."""
    return {name: results[f"transforms/{name}"] for name in TRANSFORMS if f"transforms/{name}" in results}


def best(results: Results, names: Sequence[str]) -> str:
    """The one of ``names`` with the lowest validation loss, fitted alone.

    Raises:
        KeyError: one of them is not there.
    """
    return min(names, key=lambda name: results[f"transforms/{name}"].figures["valid_nll"])


def best_alone(results: Results) -> str:
    """The best of all transforms that are there, beside the identity and Temperature.

    Raises:
        ValueError: there is none.
    """
    return best(results, [name for name in fitted_alone(results) if name not in (BASELINE, CONTROL)])


def head_roles(results: Results) -> dict[str, str]:
    """The transforms of stage 2 by role, ``linear``, ``temperature``, ``best PLIF`` and ``best other``.

    Validation losses of stage 1 choose. Empty until that is complete.
    """
    if len(fitted_alone(results)) < len(TRANSFORMS):
        return {}
    others = [name for name in TRANSFORMS if name not in (BASELINE, CONTROL, *PLIFS)]
    chosen = {"best PLIF": best(results, PLIFS), "best other": best(results, others)}
    return {"linear": BASELINE, "temperature": CONTROL, **chosen}


def head_runs(results: Results, name: str) -> Runs:
    """Stage 2 with a transform."""
    found = results.matching(f"head/{name}-lr*/seed*")
    return {(record.settings["rate"], record.settings["seed"]): record for record in found}


def chosen_rate(runs: Runs, rates: Sequence[float] = _RATES, seed: int = _SEED) -> float | None:
    """The rate with the lowest validation loss under ``seed``; None until each of ``rates`` has been tried."""
    if any((rate, seed) not in runs for rate in rates):
        return None
    return min(rates, key=lambda rate: runs[rate, seed].figures["valid_nll"])


def chosen_runs(results: Results, name: str, rates: Sequence[float] = _RATES) -> dict[int, Record]:
    """The runs of stage 2 with the chosen rate, by seed."""
    runs = head_runs(results, name)
    rate = chosen_rate(runs, rates)
    return {seed: record for (one, seed), record in runs.items() if one == rate}


def test_tokens(results: Results) -> list[int]:
    """Tokens of each document of the test split."""
    found: list[int] = results["states"].figures["test_tokens"]
    return found


def difference_alone(results: Results, one: str, other: str) -> Difference:
    """Test loss of a token of the transform ``one`` minus that of ``other``, fitted alone, over documents.

    Raises:
        KeyError: one of them, or ``states``, is not there.
    """
    first, second = (results[f"transforms/{name}"].figures["document_nll"] for name in (one, other))
    return over_documents(first, second, test_tokens(results))


def difference_together(
    results: Results, one: str, other: str, rates: Sequence[float] = _RATES
) -> tuple[Difference, list[int]]:
    """As :func:`difference_alone`, with the head fitted too: losses of a document are means over common seeds.

    Returns:
        The difference, and the seeds that both have with their chosen rates.

    Raises:
        LookupError: there is no such seed.
    """
    runs = [chosen_runs(results, name, rates) for name in (one, other)]
    seeds = sorted(runs[0].keys() & runs[1].keys())
    if not seeds:
        raise LookupError(f"{one} and {other} have no seed in common")
    first, second = (
        [statistics.fmean(losses) for losses in zip(*(of[seed].figures["document_nll"] for seed in seeds), strict=True)]
        for of in runs
    )
    return over_documents(first, second, test_tokens(results)), seeds


def calibration_error(bins: Mapping[str, Sequence[float]]) -> float:
    r"""Expected calibration error of the likeliest token.

    .. math:: \mathrm{ECE} = \sum_b \frac{n_b}{N} \left| \mathrm{accuracy}_b - \mathrm{confidence}_b \right|

    with the shares of hits and the mean confidences of the n_b tokens in each bin.

    Source: Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", ICML 2017, equation 5.

    Args:
        bins: ``tokens``, ``confidence`` and ``hits``: sums over the tokens of each bin.
    """
    gaps = (abs(hits - confidence) for hits, confidence in zip(bins["hits"], bins["confidence"], strict=True))
    return math.fsum(gaps) / math.fsum(bins["tokens"])
