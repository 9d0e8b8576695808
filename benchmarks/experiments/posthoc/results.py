"""What the results say: the choices of the stages, and differences between methods. See the package for the names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from ...engine.experiment import Record, Results
from ...engine.statistics import Difference, over_documents
from .settings import BASELINE, CONTROL, PLIFS, TRANSFORMS

_OTHERS = tuple(name for name in TRANSFORMS if name not in (BASELINE, CONTROL, *PLIFS))


def fitted_alone(results: Results) -> dict[str, Record]:
    """Stage 1 by the names of the transforms, those that are there, in the order of ``TRANSFORMS``."""
    return {name: results[f"transforms/{name}"] for name in TRANSFORMS if f"transforms/{name}" in results}


def best_alone(results: Results, names: Sequence[str] = (*PLIFS, *_OTHERS)) -> str:
    """The one of ``names``, by default all but identity and Temperature, with the lowest validation loss in stage 1."""
    return min(names, key=lambda name: results[f"transforms/{name}"].figures["valid_nll"])


def head_roles(results: Results) -> dict[str, str]:
    """The transforms of stage 2 by role. Validation losses of stage 1 choose; empty until that is complete."""
    if len(fitted_alone(results)) < len(TRANSFORMS):
        return {}
    best = {"best PLIF": best_alone(results, PLIFS), "best other": best_alone(results, _OTHERS)}
    return {"linear": BASELINE, "temperature": CONTROL, **best}


def head_search(results: Results, name: str) -> dict[float, Record]:
    """The runs of stage 2 with a transform that choose the rate of the head, by that rate."""
    found = results.matching(f"head/{name}-lr*/seed*")
    return {record.settings["rate"]: record for record in found if record.settings["search"]}


def best_rate(search: Mapping[float, Record]) -> float:
    """The rate of the lowest validation loss."""
    return min(search, key=lambda rate: search[rate].figures["valid_nll"])


def head_runs(results: Results, name: str) -> dict[int, Record]:
    """The runs of stage 2 with a transform and the rate of the lowest validation loss, by seed."""
    search = head_search(results, name)
    runs = results.matching(f"head/{name}-lr{best_rate(search):g}/seed*") if search else []
    return {record.settings["seed"]: record for record in runs}


def alone_difference(results: Results, one: str, other: str) -> Difference:
    """Test loss of a token of the transform ``one`` minus that of ``other``, fitted alone, over documents."""
    first, second = (results[f"transforms/{name}"].figures["document_nll"] for name in (one, other))
    return over_documents(first, second, results["states"].figures["test_tokens"])


def head_difference(results: Results, one: str, other: str) -> tuple[Difference, list[int]]:
    """As :func:`alone_difference`, with the head fitted too: of means over the seeds that both have, and those."""
    runs = [head_runs(results, name) for name in (one, other)]
    seeds = sorted(runs[0].keys() & runs[1].keys())
    means = [np.mean([of[seed].figures["document_nll"] for seed in seeds], 0) for of in runs]
    return over_documents(*means, results["states"].figures["test_tokens"]), seeds


def calibration_error(bins: Mapping[str, Sequence[float]]) -> float:
    """Expected calibration error of the likeliest token: the sum of n_b / N |hits_b - confidence_b| over the bins b.

    Source: Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", ICML 2017, equation 5.
    ``bins`` has the sums ``tokens``, ``confidence`` and ``hits`` over the n_b tokens of each bin.
    """
    gaps = (abs(hits - confidence) for hits, confidence in zip(bins["hits"], bins["confidence"], strict=True))
    return math.fsum(gaps) / math.fsum(bins["tokens"])
