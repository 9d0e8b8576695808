"""The experiment. A unit is one matrix, or one head with its matrices before and after f.

- ``random-d16/F/seed0``: log softmax f(H W^T) with random H and W of that dimension;
- ``noise/c1e-24``: a matrix of known rank with noise, the ``c`` that the published experiment has;
- ``large/F``: a larger random matrix, of which the leading singular values are computed only;
- ``synthetic/METHOD/seed0``: a head that was trained on the main cell of the synthetic experiment; ``kl``, ``modes``;
- ``language_model/OUTPUT``: a head of a small language model, with ``valid_perplexity`` and ``tokens`` of training.

Figures of a matrix: ``ranks``, the effective ranks by tolerance; ``press``, the numerical ranks by dtype; and, where
the report shows them, ``centred``, the ranks without means of rows and columns, and the largest ``singular_values``.
Heads have them as ``before`` (None for mixtures) and ``after`` f. Units that were done before the engine have no
``seconds``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ...engine.checkpoint import Checkpoint
from ...engine.experiment import Experiment, Measured, Results, Unit
from ..synthetic.settings import Training
from . import measures
from .settings import UNITS, LanguageModelHead, Large, Noise, Random

_MEASURES = {
    Random: measures.random_factors,
    Large: measures.large,
    Noise: measures.noise,
    Training: measures.synthetic,
    LanguageModelHead: measures.language_model,
}
_QUICK = ("random-d16/plif-20/seed0", "random-d16/sigsoftmax/seed1", "noise/c1e-24", "synthetic/plif/seed0")


class Rank(Experiment):
    """Ranks before and after f."""

    name = "rank"
    title = "effective ranks and spectra of log-probability matrices"

    def units(self, results: Results) -> Iterator[Unit]:
        yield from (Unit(name, settings) for name, settings in UNITS.items())

    def run(self, unit: Unit, checkpoint: Checkpoint) -> Measured:
        return Measured(_MEASURES[type(unit.settings)](unit.settings))

    def to_verify(self, results: Results) -> list[str]:
        return [name for name in _QUICK if name in results]

    def section(self, results: Results, pictures: Path) -> str:
        from .report import section

        return section(self, results, pictures)
