"""The units of the studies, and how each is done."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...engine.checkpoint import Checkpoint
from ...engine.experiment import Experiment, Measured, Results, Unit
from . import measures, search
from .search import Preparation
from .studies import DEMO, GPU, MAIN, Study
from .training import Diverged, Trainer, document_tokens, prepared


class LanguageModels(Experiment):
    """Language models that differ in nothing but their output layer.

    Units are called ``STUDY/CELL/ROW/search-RATES-seed100`` (the searches), ``STUDY/CELL/ROW/seedN`` (what the tables
    consist of), ``STUDY/corpus/...`` and ``main/verify/...``. The report is about the first of ``studies``.
    """

    name = "language_model"
    title = "language models on two corpora, at learning rates that were searched for each output layer"
    default = "main/*"

    def __init__(self, studies: Sequence[Study] = (MAIN, GPU, DEMO)) -> None:
        self.studies, self._first = studies, studies[0].name

    def units(self, results: Results) -> Iterator[Unit]:
        for study in self.studies:
            yield from search.units(study, results)

    def run(self, unit: Unit, checkpoint: Checkpoint) -> Measured:
        settings = unit.settings
        corpus = prepared(settings)
        if isinstance(settings, Preparation):
            return Measured({**corpus.facts(), "document_tokens": document_tokens(corpus.splits["test"], settings)})
        # With it cuBLAS is deterministic; it reads this when CUDA starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        trainer = Trainer(corpus, settings)
        try:
            trainer.train(checkpoint=checkpoint)
        except Diverged as error:
            return Measured({"diverged": str(error)})
        times = {"median_step_seconds": statistics.median(trainer.step_seconds)}
        if "/search-" in unit.name:
            return Measured({"perplexity": {"valid": trainer.perplexity("valid")}}, times)
        # A picture shows the spectra of the first cell.
        plotted = unit.name.startswith(f"{self._first}/{self.studies[0].cells[0].name}/")
        return Measured(measures.table_figures(trainer, plotted), times)

    def to_verify(self, results: Results) -> list[str]:
        return [name for name in results if name.startswith((f"{self._first}/verify/", f"{self._first}/corpus/"))]

    def section(self, results: Results, pictures: Path) -> str:
        # matplotlib takes seconds to load, and the processes that train do not need it.
        from .report import section

        return section(results, pictures, self.studies[0])
