"""What the results say: the choices of the stages, and differences between methods. See the package for the names."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from ...engine.experiment import Record, Results
from ...engine.statistics import Difference, over_documents
from .settings import BASELINE, CONTROL, PLIFS, TRANSFORMS


def fitted_alone(results: Results) -> dict[str, Record]:
    """Stage 1 by the names of the transforms, those that are there, in the order of ``TRANSFORMS``."""
    return {name: results[f"transforms/{name}"] for name in TRANSFORMS if f"transforms/{name}" in results}


def best_alone(results: Results, names: Sequence[str] = ()) -> str:
    """The one of ``names`` with the lowest validation loss in stage 1; of all but identity and Temperature by default.

    Raises:
        LookupError: one of them is not there.
    """
    alone = fitted_alone(results)
    names = names or [name for name in TRANSFORMS if name not in (BASELINE, CONTROL)]
    return min(names, key=lambda name: alone[name].figures["valid_nll"])


def head_roles(results: Results) -> dict[str, str]:
    """The transforms of stage 2 by role, ``linear``, ``temperature``, ``best PLIF`` and ``best other``.

    Validation losses of stage 1 choose. Empty until that is complete.
    """
    if len(fitted_alone(results)) < len(TRANSFORMS):
        return {}
    others = [name for name in TRANSFORMS if name not in (BASELINE, CONTROL, *PLIFS)]
    best = {"best PLIF": best_alone(results, PLIFS), "best other": best_alone(results, others)}
    return {"linear": BASELINE, "temperature": CONTROL, **best}


def head_search(results: Results, name: str) -> dict[float, Record]:
    """The runs of stage 2 with a transform that choose the rate of the head, by that rate."""
    found = results.matching(f"head/{name}-lr*/seed*")
    return {record.settings["rate"]: record for record in found if record.settings["search"]}


def head_runs(results: Results, name: str) -> dict[int, Record]:
    """The runs of stage 2 with a transform and the rate of the lowest validation loss, by seed."""
    search = head_search(results, name)
    if not search:
        return {}
    rate = min(search, key=lambda rate: search[rate].figures["valid_nll"])
    return {record.settings["seed"]: record for record in results.matching(f"head/{name}-lr{rate:g}/seed*")}


def alone_difference(results: Results, one: str, other: str) -> Difference:
    """Test loss of a token of the transform ``one`` minus that of ``other``, fitted alone, over documents.

    Raises:
        LookupError: one of them, or ``states``, is not there.
    """
    first, second = (results[f"transforms/{name}"].figures["document_nll"] for name in (one, other))
    return over_documents(first, second, results["states"].figures["test_tokens"])


def head_difference(results: Results, one: str, other: str) -> tuple[Difference, list[int]]:
    """As :func:`alone_difference`, with the head fitted too; the losses of a document are means over common seeds.

    Returns:
        The difference, and these seeds.

    Raises:
        LookupError: there is none.
    """
    runs = [head_runs(results, name) for name in (one, other)]
    seeds = sorted(runs[0].keys() & runs[1].keys())
    if not seeds:
        raise LookupError(f"{one} and {other} have no seed in common")
    losses = [zip(*(of[seed].figures["document_nll"] for seed in seeds), strict=True) for of in runs]
    means = [[statistics.fmean(values) for values in each] for each in losses]
    return over_documents(*means, results["states"].figures["test_tokens"]), seeds


def calibration_error(bins: Mapping[str, Sequence[float]]) -> float:
    """Expected calibration error of the likeliest token: the sum of n_b / N |hits_b - confidence_b| over the bins b.

    Source: Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", ICML 2017, equation 5.

    Args:
        bins: sums ``tokens``, ``confidence`` and ``hits`` over the n_b tokens of each bin.
    """
    gaps = (abs(hits - confidence) for hits, confidence in zip(bins["hits"], bins["confidence"], strict=True))
    return math.fsum(gaps) / math.fsum(bins["tokens"])
