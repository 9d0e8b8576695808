"""The experiments: each is a package that says what is run, how it is measured, and what the report says about it."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from ..engine.experiment import Experiment

#: By name: the package, and its class.
_CLASSES = {
    "synthetic": "Synthetic",
    "rank": "Rank",
    "language_model": "LanguageModels",
    "posthoc": "Posthoc",
}


def _maker(name: str) -> Callable[[], Experiment]:
    def make() -> Experiment:
        # Imported only when it is needed: an experiment imports scipy, transformers or a corpus.
        made: Experiment = getattr(importlib.import_module(f"{__name__}.{name}"), _CLASSES[name])()
        return made

    return make


EXPERIMENTS = {name: _maker(name) for name in _CLASSES}
