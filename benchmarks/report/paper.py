"""The claims of the paper."""

from __future__ import annotations

from ..language_model.report import BASELINE, CONTROL
from ..language_model.study_results import CellResults
from ..rank import report as rank_report
from ..rank.settings import RANDOM_DIMS, SYNTHETIC_METHODS
from ..statistics import SIGNIFICANCE, Difference, holm
from ..synthetic.report import WANTED_KL, WANTED_MODES
from ..synthetic.settings import MAIN, Cell
from .claim import GANEA, TOLERANCE, Claim, Finding, better, differences, gain, gains, judge, of_all, worse
from .evidence import Evidence, NotRun

#: What "costs little" is held to: time of the head with f over that of the head without.
LITTLE = 1.1
#: What "close to Mixture of Softmaxes" is held to: share of its gain over Linear-Softmax.
CLOSE = 0.8
HEAD_CASE = "head train N=1024 d=256 V=32000 float32 std 1"
LOGITS_CASE = "logits train N=512 V=32000 float32 std 1"
_LOSSES = {
    "temperature": "temperature",
    "plif-64": "plif",
    "gss": "gss",
    "soft_cap": "softcap",
    "sigmoid_cap": "sigmoidcap",
    "monotonic_mlp": "mlp",
    "spline": "spline",
}


def rank_is_raised(evidence: Evidence) -> Claim:
    def random() -> str:
        parts = []
        for dim in RANDOM_DIMS:
            spans = {
                name: rank_report.span([run["ranks"][TOLERANCE] for run in evidence.rank(f"random-d{dim}", name)])
                for name in ("linear", "sigsoftmax", "sigmoidcap", "plif-20", "plif-50", "plif-1000", "plif-100000")
            }
            parts.append(f"d = {dim}: " + ", ".join(f"{name} {span}" for name, span in spans.items()))
        return f"Effective rank at {TOLERANCE} of random factors (plif-K: random slopes, K pieces): {'; '.join(parts)}."

    def press() -> str:
        runs = evidence.rank(f"random-d{RANDOM_DIMS[0]}", "plif-100000")
        return (
            "The numerical rank that published tables have is "
            f"{rank_report.span([run['press']['float64'] for run in runs])} for the published 100,000 pieces, whose "
            f"effective rank is {rank_report.span([run['ranks'][TOLERANCE] for run in runs])}: it counts what no "
            "loss would notice."
        )

    def trained() -> str:
        parts = []
        for name in SYNTHETIC_METHODS:
            runs = evidence.rank("synthetic", name)
            if runs[0]["before"] is not None:
                before, after = (
                    rank_report.span([run[when]["ranks"][TOLERANCE] for run in runs]) for when in ("before", "after")
                )
                parts.append(f"{name} {before} -> {after}")
        return f"Trained heads, synthetic, d = {MAIN.dim}, before and after f: {', '.join(parts)}."

    def language_model() -> str:
        cell = evidence.cells[0]
        labels = [each.row.label for each in cell.rows if each.first is not None]
        if not labels:
            raise NotRun(evidence.study_command)
        ranks = ", ".join(f"{label} {evidence.language_model_rank(cell, label, TOLERANCE)}" for label in labels)
        return f"Language model {cell.cell.name}, d = {cell.rows[0].row.settings.dim}, seed 0: {ranks}."

    def verdict() -> str:
        raised = 0
        names = [name for name in SYNTHETIC_METHODS if name not in (BASELINE, CONTROL)]
        there = []
        for name in names:
            runs = evidence.rank("synthetic", name)
            if runs[0]["before"] is None:
                continue
            there.append(name)
            raised += all(run["after"]["ranks"][TOLERANCE] > run["before"]["ranks"][TOLERANCE] for run in runs)
        return of_all(raised, len(there), f"effective rank at {TOLERANCE} after f above before f, trained heads,")

    return judge(
        "Increasing pointwise functions raise the rank of the log-probability matrix.",
        GANEA,
        (random, press, trained, language_model),
        verdict,
    )


def synthetic_improves(evidence: Evidence) -> Claim:
    def main() -> str:
        best = evidence.best_learned()
        return (
            f"d = {MAIN.dim}, alpha = {MAIN.alpha:g}: Linear-Softmax has KL {evidence.figure(BASELINE, 'kl'):.3f} and "
            f"{100 * evidence.figure(BASELINE, 'modes'):.0f} % of the modes, {best} (chosen on the problem of the "
            f"search) {evidence.figure(best, 'kl'):.3f} and {100 * evidence.figure(best, 'modes'):.0f} %. Gain over "
            f"linear {gain(evidence.synthetic_difference(best, BASELINE))}; over temperature "
            f"{gain(evidence.synthetic_difference(best, CONTROL))}."
        )

    def reached() -> str:
        names = [
            name
            for name in evidence.learned()
            if evidence.figure(name, "kl") <= WANTED_KL and evidence.figure(name, "modes") >= WANTED_MODES
        ]
        return (
            f"KL of at most {WANTED_KL} and at least {100 * WANTED_MODES:.0f} % of the modes there: "
            f"{', '.join(names) or 'no learned f'}, of {', '.join(evidence.learned())}."
        )

    def grid() -> str:
        parts = []
        for name in ("plif", "sigmoidcap-learned", "mlp"):
            counted = _counts(evidence.grid(name, BASELINE))
            parts.append(f"{name}: {counted[0]} lower, {counted[1]} not significant, {counted[2]} higher")
        return f"KL against Linear-Softmax by d and alpha (p adjusted by Holm over the cells): {'; '.join(parts)}."

    def verdict() -> str:
        names = ("plif", "sigmoidcap-learned", "mlp")
        counts = [_counts(evidence.grid(name, BASELINE)) for name in names]
        return of_all(
            sum(count[0] for count in counts),
            sum(sum(count) for count in counts),
            f"KL significantly below Linear-Softmax ({', '.join(names)}, cells by d and alpha)",
        )

    return judge(
        "In synthetic experiments cross entropy and mode matching improve.",
        GANEA,
        (main, reached, grid),
        verdict,
    )


def _counts(grid: dict[Cell, Difference]) -> tuple[int, int, int]:
    """In how many cells the KL is significantly lower, neither, and higher."""
    differences = list(grid.values())
    adjusted = holm([difference.p for difference in differences])
    pairs = list(zip(differences, adjusted, strict=True))
    lower = sum(p < SIGNIFICANCE and difference.mean < 0 for difference, p in pairs)
    higher = sum(p < SIGNIFICANCE and difference.mean > 0 for difference, p in pairs)
    return lower, len(pairs) - lower - higher, higher


def language_models_improve(evidence: Evidence) -> Claim:
    def cell_finding(cell: CellResults) -> Finding:
        def found() -> str:
            label = evidence.best_of(cell).row.label
            linear, control = (evidence.gain(cell, label, other) for other in (BASELINE, CONTROL))
            return (
                f"{cell.cell.name}: best transform {label} (on validation), test perplexity "
                f"{evidence.perplexity(cell, label):.1f}, linear {evidence.perplexity(cell, BASELINE):.1f}, "
                f"temperature {evidence.perplexity(cell, CONTROL):.1f}. Gain over linear {gains(linear)}; over "
                f"temperature {gains(control)}."
            )

        return lambda: f"{cell.cell.name} not run: `{evidence.study_command}`." if not _has_run(cell) else found()

    def temperature() -> str:
        parts = []
        for cell in cells_that_ran(evidence):
            difference = evidence.gain(cell, CONTROL, BASELINE).seeds
            assert difference is not None  # gain() has seen to it
            parts.append(f"{cell.cell.name} {gain(difference)}")
        return f"A learned temperature alone gains over linear: {'; '.join(parts)}."

    def verdict() -> str:
        ran = cells_that_ran(evidence)
        over = {
            other: [better(evidence.gain(cell, evidence.best_of(cell).row.label, other).seeds) for cell in ran]
            for other in (BASELINE, CONTROL)
        }
        both = sum(map(all, zip(*over.values(), strict=True)))
        text = of_all(both, len(ran), "the best transform gains significantly over Linear-Softmax and over temperature")
        return (
            f"{text} cells (over Linear-Softmax in {sum(over[BASELINE])}, over temperature in {sum(over[CONTROL])}), "
            f"at these sizes and short trainings; {len(evidence.cells) - len(ran)} cells were not run"
        )

    return judge(
        "Real language models improve.",
        GANEA,
        (*(cell_finding(cell) for cell in evidence.cells), temperature),
        verdict,
    )


def _has_run(cell: CellResults) -> bool:
    """Whether the cell has the runs that a comparison with both controls takes."""
    rows = [cell.row(label) for label in (BASELINE, CONTROL)]
    best = cell.best_transform()
    return best is not None and all(row is not None and len(set(row.runs) & set(best.runs)) > 1 for row in rows)


def cells_that_ran(evidence: Evidence) -> list[CellResults]:
    """The cells of which a transform can be compared with both controls."""
    ran = [cell for cell in evidence.cells if _has_run(cell)]
    if not ran:
        raise NotRun(evidence.study_command)
    return ran


def close_to_mixtures(evidence: Evidence) -> Claim:
    def share(mixture: str) -> float:
        linear = evidence.figure(BASELINE, "kl")
        return (linear - evidence.figure(evidence.best_learned(), "kl")) / (linear - evidence.figure(mixture, "kl"))

    def synthetic(mixture: str) -> Finding:
        def found() -> str:
            best = evidence.best_learned()
            difference = evidence.synthetic_difference(best, mixture)
            equal = f"linear-eq-{mixture}"
            return (
                f"Synthetic, d = {MAIN.dim}: {best} has {share(mixture):.0%} of {mixture}'s gain in KL over "
                f"Linear-Softmax; {best} minus {mixture} {difference.describe('nats', 4)}. Linear-Softmax with as many "
                f"parameters as {mixture} minus {mixture} "
                f"{evidence.synthetic_difference(equal, mixture).describe('nats', 4)}."
            )

        return found

    def language_model() -> str:
        cell = _with_mixture(evidence)
        label = evidence.best_of(cell).row.label
        found = evidence.row_difference(cell, label, "mos")
        return (
            f"Language model {cell.cell.name}: {label} minus mos {differences(found)} (p not adjusted); mos minus "
            f"linear {differences(evidence.gain(cell, 'mos', BASELINE))}."
        )

    def cost() -> str:
        case = "head train N=2048 d=280 V=32000 float32 std 1"
        plif = evidence.overhead("must_head_280", case, "plif-64 fused")
        mixture = evidence.overhead("must_head_280", case, "mos-15 fair")
        return (
            f"MoS with 15 components takes {mixture / plif:.0f} times as long as PLIF with the same fused head, "
            f"{evidence.overhead('must_head_280', case, 'mos-15 published') / plif:.0f} times in the published form "
            f"({case}, CPU)."
        )

    def verdict() -> str:
        synthetic_share = share("mos15")
        cell = _with_mixture(evidence)
        found = evidence.row_difference(cell, evidence.best_of(cell).row.label, "mos").seeds
        close = (synthetic_share >= CLOSE) + (not worse(found))
        text = of_all(close, 2, "close")
        return (
            f"{text} comparisons (synthetic, share of mos15's gain: {synthetic_share:.0%}, held to {CLOSE:.0%}; "
            f"language model, best transform significantly worse than mos: {'yes' if worse(found) else 'no'})"
        )

    return judge(
        "It comes close to Mixture of Softmaxes.",
        GANEA,
        (synthetic("mos4"), synthetic("mos15"), language_model, cost),
        verdict,
    )


def _with_mixture(evidence: Evidence) -> CellResults:
    for cell in evidence.cells:
        row = cell.row("mos")
        if row is not None and len(row.runs) > 1:
            return cell
    raise NotRun(evidence.study_command)


def head_ratio(evidence: Evidence) -> float:
    """Time of the fused head with PLIF over that of the one without f."""
    plif, identity = (evidence.overhead("quick", HEAD_CASE, f"{name} fused") for name in ("plif-64", "identity"))
    return plif / identity


def costs_little(evidence: Evidence) -> Claim:
    def head() -> str:
        products = evidence.overhead("quick", HEAD_CASE, "plif-64 fused", "to_products")
        return (
            f"The head, fused, with PLIF (64 pieces) takes {head_ratio(evidence):.2f} of the time of the head without "
            f"f, {products:.2f} of that of its bare matrix products ({HEAD_CASE}, CPU)."
        )

    def logits() -> str:
        identity = evidence.overhead("must_logits", LOGITS_CASE, "identity fused")
        ratios = ", ".join(
            f"{shown} {evidence.overhead('must_logits', LOGITS_CASE, f'{name} fused') / identity:.1f}"
            for name, shown in _LOSSES.items()
        )
        compiled = evidence.overhead("must_logits", LOGITS_CASE, "plain compiled")
        plif = evidence.overhead("must_logits", LOGITS_CASE, "plif-64 fused")
        return (
            f"The loss alone, logits given, relative to the fused loss without f: {ratios}; PLIF takes "
            f"{plif / compiled:.2f} of the time of F.cross_entropy under torch.compile ({LOGITS_CASE}, CPU)."
        )

    def pieces() -> str:
        few, many = (evidence.overhead("must_logits", LOGITS_CASE, f"plif-{count} fused") for count in (64, 100_000))
        return f"The published 100,000 pieces take {many / few:.1f} times as long as 64."

    def verdict() -> str:
        ratio = head_ratio(evidence)
        word = "supported" if ratio <= LITTLE else "not supported"
        return f"**{word}**: the head with PLIF takes {ratio:.2f} of the time without, held to {LITTLE:g}"

    return judge("A learned f costs little.", GANEA, (head, logits, pieces), verdict)


PAPER = (rank_is_raised, synthetic_improves, language_models_improve, costs_little, close_to_mixtures)
