"""Which output layer to use, in ten lines, and which figure set each default: both follow from the stored results."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass
from inspect import signature

import monosoftmax as ms

from ..language_model.report import BASELINE, CONTROL
from ..language_model.study_results import CellResults
from ..statistics import SIGNIFICANCE, Difference, holm
from ..synthetic.methods import TRANSFORM_RATE_RATIO
from ..synthetic.settings import MAIN
from .claim import Finding, better, finding, gain
from .dispute import best_posthoc
from .evidence import Evidence, NotRun
from .paper import HEAD_CASE, LOGITS_CASE, cells_that_ran, head_ratio

_FIXED = ("sigsoftmax", "gss-published", "softcap", "sigmoidcap")


@dataclass(frozen=True)
class Default:
    """A default of the package, and the figures that it rests on."""

    name: str
    value: str
    figures: str


def advice(evidence: Evidence) -> list[str]:
    """Ten lines; one whose figures are missing says by which command they are made."""
    lines: tuple[tuple[str, Finding], ...] = (
        ("Language models", lambda: _language_models(evidence)),
        ("The control", lambda: _control(evidence)),
        ("Few dimensions for many classes", lambda: _few_dimensions(evidence)),
        ("Where it does not pay", lambda: _where_not(evidence)),
        ("Which learned function", lambda: _which(evidence)),
        ("Fixed functions", lambda: _fixed(evidence)),
        ("Mixture of Softmaxes", lambda: _mixture(evidence)),
        ("A model that is trained already", lambda: _trained(evidence)),
        ("The optimiser", lambda: _optimiser(evidence)),
        ("The cost", lambda: _cost(evidence)),
    )
    return [f"**{title}.** {finding(line)}" for title, line in lines]


def _seeds(evidence: Evidence, cell: CellResults, label: str, other: str) -> Difference:
    found = evidence.gain(cell, label, other).seeds
    assert found is not None  # Evidence.gain raises NotRun otherwise
    return found


def _language_models(evidence: Evidence) -> str:
    ran = cells_that_ran(evidence)
    best = {cell.cell.name: evidence.best_of(cell).row.label for cell in ran}
    over = {
        other: {cell.cell.name: _seeds(evidence, cell, best[cell.cell.name], other) for cell in ran}
        for other in (BASELINE, CONTROL)
    }
    both = [name for name in best if all(better(differences[name]) for differences in over.values())]
    parts = []
    for other, differences in over.items():
        gains = [-difference.mean for difference in differences.values()]
        count = sum(better(difference) for difference in differences.values())
        span = f"{min(gains):+.4f} to {max(gains):+.4f}"
        parts.append(f"{span} over {other} (significant in {count} of {len(ran)} cells)")
    figures = (
        f"the best transform of a cell gains {' and '.join(parts)}, in nats a word; over both significantly in "
        f"{len(both)} of {len(ran)} cells ({', '.join(both) or 'none'})"
    )
    label, count = Counter(best.values()).most_common(1)[0]
    if 2 * len(both) > len(ran):
        return f"Try {label}: {figures}; it is the best transform in {count} cells."
    return (
        f"A learned function may help, which these trainings do not settle: {figures}; {label} is the best transform "
        f"in {count} cells."
    )


def _control(evidence: Evidence) -> str:
    ran = cells_that_ran(evidence)
    differences = {cell.cell.name: _seeds(evidence, cell, CONTROL, BASELINE) for cell in ran}
    significant = [name for name, difference in differences.items() if better(difference)]
    gains = [-difference.mean for difference in differences.values()]
    tries = sorted({cell.cell.search.tries for cell in ran if cell.cell.search is not None})
    start = "Add" if 2 * len(significant) > len(ran) else "Measure, but do not count on,"
    return (
        f"{start} `Temperature` before anything else: one parameter gains {min(gains):+.4f} to {max(gains):+.4f} nats "
        f"a word over Linear-Softmax in these short trainings, significant in {len(significant)} of {len(ran)} cells. "
        f"Its rates are the best of {' or '.join(map(str, tries))} tries, as every row's: where it is worse than "
        "Linear-Softmax, which it can equal, they were not good ones."
    )


def _few_dimensions(evidence: Evidence) -> str:
    best = evidence.best_learned()
    difference = evidence.synthetic_difference(best, CONTROL)
    if not better(difference):
        return (
            f"Even with d = {MAIN.dim} for {MAIN.words} classes no learned function is significantly better than a "
            f"temperature: {best} gains {gain(difference)}."
        )
    return (
        f"Where the dimension is far too small for the distributions that are to be fitted (synthetic, d = {MAIN.dim}, "
        f"{MAIN.words} classes, alpha = {MAIN.alpha:g}), use {best}: KL {evidence.figure(best, 'kl'):.3f} instead of "
        f"{evidence.figure(BASELINE, 'kl'):.3f}, {100 * evidence.figure(best, 'modes'):.0f} % instead of "
        f"{100 * evidence.figure(BASELINE, 'modes'):.0f} % of the modes; over a temperature {gain(difference)}."
    )


def _where_not(evidence: Evidence) -> str:
    best = evidence.best_learned()
    grid = evidence.grid(best, BASELINE)
    adjusted = holm([difference.p for difference in grid.values()])
    not_lower = [
        f"d = {cell.dim}, alpha = {cell.alpha:g} ({-difference.mean:+.3f})"
        for (cell, difference), p in zip(grid.items(), adjusted, strict=True)
        if p >= SIGNIFICANCE or difference.mean >= 0
    ]
    return (
        f"{best} does not gain significantly in KL over Linear-Softmax in {len(not_lower)} of {len(grid)} synthetic "
        f"cells: {'; '.join(not_lower) or 'none'}."
    )


def _which(evidence: Evidence) -> str:
    order = sorted(evidence.learned(), key=lambda name: evidence.figure(name, "kl"))
    best = order[0]
    level = [
        name
        for name in order[1:]
        if not evidence.synthetic_difference(best, name).significant
    ]  # fmt: skip
    figures = ", ".join(f"{name} {evidence.figure(name, 'kl'):.3f}" for name in order)
    return (
        f"KL in the main synthetic cell: {figures}; not significantly different from {best}: "
        f"{', '.join(level) or 'none'} (not adjusted)."
    )


def _fixed(evidence: Evidence) -> str:
    parts, useful = [], []
    for name in _FIXED:
        difference = evidence.synthetic_difference(name, BASELINE)
        parts.append(f"{name} {gain(difference)}")
        if better(difference):
            useful.append(name)
    start = f"Of the functions with nothing to learn only {', '.join(useful)} helped" if useful else "None helped"
    return f"{start} (synthetic, main cell, gain over Linear-Softmax): {'; '.join(parts)}."


def _mixture(evidence: Evidence) -> str:
    best = evidence.best_learned()
    difference = evidence.synthetic_difference(best, "mos15")
    case = "head train N=2048 d=280 V=32000 float32 std 1"
    plif, mixture = (evidence.overhead("must_head_280", case, name) for name in ("plif-64 fused", "mos-15 fair"))
    if better(difference):
        start = f"{best} is better than 15 softmaxes"
    elif difference.significant:
        start = f"15 softmaxes are better than {best}"
    else:
        start = f"15 softmaxes and {best} do not differ significantly"
    return (
        f"{start} (synthetic, main cell, KL of {best} minus mos15 {difference.describe('nats', 4)}); in a head 15 "
        f"softmaxes take {mixture / plif:.0f} times as long as PLIF."
    )


def _trained(evidence: Evidence) -> str:
    best = best_posthoc(evidence)
    over_model, over_control = (evidence.posthoc_difference(best, name) for name in ("identity", "temperature"))
    start = f"Put {best} on its head and fit it alone" if better(over_control) else "A fitted temperature is enough"
    return (
        f"{start}: on SmolLM2-135M {best} gains {gain(over_model)} over the model as it is, and "
        f"{gain(over_control)} over a temperature."
    )


def _optimiser(evidence: Evidence) -> str:
    sgd = evidence.synthetic_difference("published-sgd", "published-frozen")
    adam = evidence.synthetic_difference("published-adam", "published-sgd")
    return (
        "Give f's parameters to Adam in a group of their own (`ms.parameter_groups`), not to plain SGD: on the "
        f"published slopes SGD gains {gain(sgd)} over no training, and Adam {gain(adam)} over SGD."
    )


def _cost(evidence: Evidence) -> str:
    plif, identity = (
        evidence.overhead("must_logits", LOGITS_CASE, f"{name} fused") for name in ("plif-64", "identity")
    )
    return (
        f"The fused head with PLIF takes {head_ratio(evidence):.2f} of the time of the fused head without f "
        f"({HEAD_CASE}); the fused loss on given logits {plif / identity:.1f} of that without f ({LOGITS_CASE}); both "
        "on a CPU."
    )


def defaults(evidence: Evidence) -> list[Default]:
    """The defaults of the package with what was measured for them."""
    plif = ms.transforms.PLIF()
    return [
        Default("PLIF(num_pieces)", str(plif.num_pieces), finding(lambda: _pieces(evidence))),
        Default("PLIF(bound)", f"{plif.bound:g}", finding(lambda: _bound(evidence))),
        Default("PLIF(init)", plif.init, finding(lambda: _initial(evidence))),
        Default(
            "learning rate of f (`ms.parameter_groups(transform_lr=)`)",
            f"{signature(ms.parameter_groups).parameters['transform_lr'].default:g}",
            finding(lambda: _rates(evidence)),
        ),
        Default(
            "PLIF(min_slope)",
            f"{plif.min_slope:g}",
            "Not measured here. The pilot found no difference in KL to slopes without a floor, whose dead zones reach "
            "slope 0; the inverse needs a floor.",
        ),
    ]


def _pieces(evidence: Evidence) -> str:
    few, many = (evidence.synthetic_difference(name, "plif") for name in ("plif-20-10", "plif-200"))
    ranks = {k: [run["ranks"]["0.0001"] for run in evidence.rank("random-d16", f"plif-{k}")] for k in (20, 50, 1000)}
    time_few, time_many = (
        evidence.overhead("must_logits", LOGITS_CASE, f"plif-{count} fused") for count in (64, 100_000)
    )
    return (
        f"Synthetic, main cell, KL {evidence.figure('plif', 'kl'):.3f}; 20 pieces on [-10, 10] minus it "
        f"{few.describe('nats', 4)}; 200 pieces on [-20, 20] minus it {many.describe('nats', 4)}. Effective rank of "
        "random slopes at 0.0001, d = 16: "
        + ", ".join(f"{k} pieces {statistics.mean(values):.0f}" for k, values in ranks.items())
        + f". 100,000 pieces take {time_many / time_few:.1f} times as long as 64."
    )


def _bound(evidence: Evidence) -> str:
    difference = evidence.posthoc_difference("plif_40", "plif")
    low, high = evidence.synthetic_range("plif")
    return (
        f"Synthetic, main cell: 99.8 % of the trained logits lie in [{low:.1f}, {high:.1f}]. SmolLM2, whose logits "
        f"reach further: bound 40 minus bound 20 {difference.describe('nats', 4)}. Choose it by the logits."
    )


def _initial(evidence: Evidence) -> str:
    trained = evidence.synthetic_difference("plif", "published-adam")
    frozen = evidence.synthetic_difference("plif-frozen", BASELINE)
    return (
        f"Synthetic, main cell: from the identity minus 100,000 random slopes, both by Adam, "
        f"{trained.describe('nats', 4)}; random slopes that stay minus Linear-Softmax {frozen.describe('nats', 4)}. A "
        "trained model keeps its function only under the identity."
    )


def _rates(evidence: Evidence) -> str:
    chosen: Counter[str] = Counter()
    for cell in evidence.cells:
        for row in cell.rows:
            if row.chosen is not None and row.row.learns_transform and row.chosen["tries"]:
                chosen[f"{row.chosen['transform_lr']:g}"] += 1
    if not chosen:
        raise NotRun(evidence.study_command)
    text = ", ".join(f"{rate} in {count}" for rate, count in sorted(chosen.items()))
    return (
        f"Language models, rates that the searches chose, by rows: {text}. The synthetic experiment has "
        f"{TRANSFORM_RATE_RATIO:g} of the head's rate throughout."
    )
