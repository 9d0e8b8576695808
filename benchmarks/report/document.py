"""REPORT.md as a whole: advice, claims and defaults from one template, and the sections of the experiments."""

from __future__ import annotations

import statistics
from inspect import signature
from pathlib import Path
from typing import Any

import monosoftmax as ms

from ..engine.document import count, template
from ..engine.experiment import NotRun
from ..engine.runner import Selection
from ..engine.statistics import Difference
from ..engine.store import Store
from ..experiments import EXPERIMENTS
from ..experiments.language_model.results import Comparison
from ..experiments.posthoc.results import calibration_error
from ..experiments.rank.report import span as span_of_ranks
from ..experiments.synthetic.methods import TRANSFORM_RATE_RATIO
from ..experiments.synthetic.settings import MAIN
from .claims import Evidence, claims
from .models import ModelEvidence
from .others import CostEvidence, PosthocEvidence, RankEvidence, correlation
from .synthetic import SyntheticEvidence
from .words import better, count_better, span

#: Experiments of which all results must be there.
_COMPLETE = ("synthetic", "rank", "language_model", "posthoc")
_SECTIONS = (*_COMPLETE, "overhead")


def document(results: Path, pictures: Path) -> str:
    """The report on the results in ``results``, as Markdown with links that start there."""
    made = {name: EXPERIMENTS[name]() for name in _SECTIONS}
    found = {name: Store(name, results).results() for name in _SECTIONS}
    evidence = Evidence(
        SyntheticEvidence(found["synthetic"]),
        ModelEvidence(found["language_model"]),
        PosthocEvidence(found["posthoc"]),
        RankEvidence(found["rank"]),
        CostEvidence(found["overhead"]),
    )
    try:
        for name in _COMPLETE:
            if any(unit.name not in found[name] for unit in Selection().of(made[name], found[name])):
                raise NotRun(made[name].command())
        verdicts = _verdicts(evidence)
    except NotRun as error:
        verdicts = f"# The evidence\n\nClaims are judged when all results are there. Next: `{error.command}`."
    sections = [made[name].section(found[name], pictures) for name in _SECTIONS]
    return "\n\n".join(part.strip() for part in (verdicts, *sections)) + "\n"


def _verdicts(evidence: Evidence) -> str:
    filters = {
        "better": count_better,
        "calibration": calibration_error,
        "correlation": correlation,
        "differences": lambda found: _both(found, Difference.describe, "over seeds"),
        "f1": lambda value: f"{value:.1f}",
        "f3": lambda value: f"{value:.3f}",
        "gain": lambda difference: (-difference).describe(),
        "gains": lambda found: _both(
            found, lambda each: (-each).describe(), f"over {count(found.seeds.pairs, 'seed')}"
        ),
        "nats": Difference.describe,
        "mean": statistics.mean,
        "percent": lambda share: f"{100 * share:.0f} %",
        "rank_span": span_of_ranks,
        "span": span,
    }
    page = template(Path(__file__).with_name("verdicts.md.jinja"), filters=filters, tests={"better": better})
    return page.render(
        synthetic=evidence.synthetic,
        models=evidence.models,
        posthoc=evidence.posthoc,
        ranks=evidence.ranks,
        cost=evidence.cost,
        ranks_and_kl=evidence.ranks_and_kl,
        main=MAIN,
        claims=claims(evidence),
        plif=ms.transforms.PLIF(),
        transform_lr=signature(ms.parameter_groups).parameters["transform_lr"].default,
        transform_rate_ratio=TRANSFORM_RATE_RATIO,
    )


def _both(found: Comparison, tell: Any, over: str) -> str:
    text = f"{tell(found.seeds)} {over}"
    return text if found.documents is None else f"{text}, {tell(found.documents)} over documents"
