"""The experiments: each is a package that says what is run, how it is measured, and what the report says about it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pkgutil import resolve_name

from ..engine.experiment import Experiment


def _make(place: str) -> Experiment:
    # Imported only when it is needed: an experiment imports scipy, transformers or a corpus.
    return resolve_name(f"benchmarks.{place}")()  # type: ignore[no-any-return]


EXPERIMENTS: dict[str, Callable[[], Experiment]] = {
    "synthetic": partial(_make, "experiments.synthetic:Synthetic"),
    "rank": partial(_make, "experiments.rank:Rank"),
    "language_model": partial(_make, "experiments.language_model:LanguageModels"),
    "posthoc": partial(_make, "experiments.posthoc:Posthoc"),
    "overhead": partial(_make, "overhead.experiment:Overhead"),
}
