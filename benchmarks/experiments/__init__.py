"""The experiments: each is a package that says what is run, how it is measured, and what the report says about it."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from ..engine.experiment import Experiment

#: By name: the module, from here, and its class.
_CLASSES = {
    "synthetic": (".synthetic", "Synthetic"),
    "rank": (".rank", "Rank"),
    "language_model": (".language_model", "LanguageModels"),
    "posthoc": (".posthoc", "Posthoc"),
    "overhead": ("..overhead.experiment", "Overhead"),
}


def _maker(name: str) -> Callable[[], Experiment]:
    def make() -> Experiment:
        # Imported only when it is needed: an experiment imports scipy, transformers or a corpus.
        module, class_name = _CLASSES[name]
        made: Experiment = getattr(importlib.import_module(module, __name__), class_name)()
        return made

    return make


EXPERIMENTS = {name: _maker(name) for name in _CLASSES}
