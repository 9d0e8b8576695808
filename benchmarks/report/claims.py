"""The claims, who made them, and what the figures say about each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from ..engine.statistics import SIGNIFICANCE
from ..experiments.rank.settings import METHODS
from .models import ModelEvidence
from .others import CostEvidence, PosthocEvidence, RankEvidence, spearman
from .synthetic import SyntheticEvidence
from .words import better, count_better, of_all

#: What "costs little" is held to: time of the head with f over that of the head without.
LITTLE = 1.1
#: What "close to Mixture of Softmaxes" is held to: share of its gain over Linear-Softmax.
CLOSE = 0.8

_GANEA = "Ganea et al., ICML 2019"
_PARTHIBAN = "Parthiban et al., AAAI 2021"


@dataclass(frozen=True)
class Evidence:
    """The figures of all experiments."""

    synthetic: SyntheticEvidence
    models: ModelEvidence
    posthoc: PosthocEvidence
    ranks: RankEvidence
    cost: CostEvidence

    @cached_property
    def ranks_and_kl(self) -> dict[str, tuple[float, float]]:
        """Effective rank and KL by layer, of the main synthetic cell."""
        return {name: (self.synthetic.rank(name), self.synthetic.mean(name, "kl")) for name in METHODS}


def claims(evidence: Evidence) -> list[tuple[str, str, str]]:
    """What was claimed, by whom, and the verdict here, in the order of the report."""
    return [(text, source, verdict(evidence)) for text, (source, verdict) in _CLAIMS.items()]


def _rank_is_raised(evidence: Evidence) -> str:
    trained = [each for each in evidence.ranks.trained() if each[0] not in ("linear", "temperature")]
    raised = sum(all(b > a for a, b in zip(before, after, strict=True)) for _, before, after in trained)
    return of_all(raised, len(trained), "effective rank at 0.0001 after f above before f, trained heads,")


def _synthetic_improves(evidence: Evidence) -> str:
    names = evidence.synthetic.IN_GRID
    counts = [evidence.synthetic.grid_counts(name) for name in names]
    lower, cells = sum(count[0] for count in counts), sum(map(sum, counts))
    return of_all(lower, cells, f"KL significantly below Linear-Softmax ({', '.join(names)}, cells by d and alpha)")


def _language_models_improve(evidence: Evidence) -> str:
    models = evidence.models
    over_linear, over_control = (models.seeds_of("best", other) for other in ("linear", "temperature"))
    text = of_all(
        len(models.better_than_both()),
        len(models.ran),
        "the best transform gains significantly over Linear-Softmax and over temperature",
    )
    return (
        f"{text} cells (over Linear-Softmax in {count_better(over_linear)}, over temperature in "
        f"{count_better(over_control)}), at these sizes and short trainings; {len(models.cells) - len(models.ran)} "
        "cells were not run"
    )


def _costs_little(evidence: Evidence) -> str:
    ratio = evidence.cost.head()
    word = "supported" if ratio <= LITTLE else "not supported"
    return f"**{word}**: the head with PLIF takes {ratio:.2f} of the time without, held to {LITTLE:g}"


def _close_to_mixtures(evidence: Evidence) -> str:
    share = evidence.synthetic.share(evidence.synthetic.best_learned(), "mos15")
    cell = evidence.models.with_mixture()
    difference = evidence.models.pair(cell, evidence.models.best(cell), "mos").seeds
    assert difference is not None  # pair() has seen to it
    worse = difference.significant and difference.mean > 0
    return (
        f"{of_all((share >= CLOSE) + (not worse), 2, 'close')} comparisons (synthetic, share of mos15's gain: "
        f"{share:.0%}, held to {CLOSE:.0%}; language model, best transform significantly worse than mos: "
        f"{'yes' if worse else 'no'})"
    )


def _frozen_is_as_good(evidence: Evidence) -> str:
    differences = [
        evidence.synthetic.difference("plif", "plif-frozen"),
        evidence.models.pair(evidence.models.first, "plif", "plif-frozen").seeds,
    ]
    return of_all(sum(not better(each) for each in differences), 2, "trained not significantly better than frozen")


def _published_optimiser(evidence: Evidence) -> str:
    sgd = evidence.synthetic.difference("published-sgd", "published-frozen")
    adam = evidence.synthetic.difference("published-adam", "published-sgd")
    moved = "changes the result significantly" if sgd.significant else "changes nothing that is significant"
    return (
        f"**{'supported' if better(adam) else 'not supported'}**: SGD on the published slopes {moved} ({sgd.mean:+.4f} "
        f"nats), Adam {'does' if better(adam) else 'does not either'} ({adam.mean:+.4f} nats against SGD)"
    )


def _rank_is_not_the_reason(evidence: Evidence) -> str:
    synthetic = evidence.synthetic
    statistic, p = spearman(evidence.ranks_and_kl)
    together = p < SIGNIFICANCE and statistic < 0
    higher = synthetic.rank("plif-frozen") > synthetic.rank("linear")
    without_gain = higher and not better(synthetic.difference("plif-frozen", "linear"))
    return (
        f"{of_all((not together) + without_gain, 2, 'agrees')} observations of the synthetic experiment: over all "
        f"layers higher effective rank {'goes' if together else 'does not significantly go'} with lower KL (Spearman "
        f"{statistic:+.2f}); a frozen random PLIF has {'a' if without_gain else 'no'} higher rank without a "
        "significant gain"
    )


def _helps_after_the_fact(evidence: Evidence) -> str:
    best = evidence.posthoc.best()
    over_model, over_control = (better(evidence.posthoc.difference(best, name)) for name in ("identity", "temperature"))
    return (
        f"**{'supported' if over_control else 'not supported'}**: f alone gains significantly over a temperature: "
        f"{'yes' if over_control else 'no'}; over the model as it is: {'yes' if over_model else 'no'}"
    )


_CLAIMS: dict[str, tuple[str, Callable[[Evidence], str]]] = {
    "Increasing pointwise functions raise the rank of the log-probability matrix.": (_GANEA, _rank_is_raised),
    "In synthetic experiments cross entropy and mode matching improve.": (_GANEA, _synthetic_improves),
    "Real language models improve.": (_GANEA, _language_models_improve),
    "A learned f costs little.": (_GANEA, _costs_little),
    "It comes close to Mixture of Softmaxes.": (_GANEA, _close_to_mixtures),
    "A frozen random PLIF is as good as a trained one, so that the gain is regularisation.": (
        _PARTHIBAN,
        _frozen_is_as_good,
    ),
    "The published setting (100,000 pieces, SGD at 0.02 on the slopes) does not learn f; Adam does.": (
        "pilot of this project",
        _published_optimiser,
    ),
    "A higher rank is not what makes the gain: rank and loss hardly correlate.": (_PARTHIBAN, _rank_is_not_the_reason),
    "Put on a trained model, a learned f improves its loss beyond what a temperature does.": (
        "question of this project",
        _helps_after_the_fact,
    ),
}
