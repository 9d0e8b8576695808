"""The claims of those who disputed the paper, and the questions of this project."""

from __future__ import annotations

from ..language_model.report import BASELINE
from ..rank import report as rank_report
from ..rank.settings import SYNTHETIC_METHODS
from ..statistics import SIGNIFICANCE
from .claim import PARTHIBAN, TOLERANCE, Claim, Finding, better, differences, gain, judge, of_all
from .evidence import Evidence, NotRun


def frozen_is_as_good(evidence: Evidence) -> Claim:
    def pair(one: str, other: str) -> Finding:
        return lambda: (
            f"Synthetic, KL of {one} minus {other}: {evidence.synthetic_difference(one, other).describe('nats', 4)}."
        )

    def language_model(one: str, other: str) -> Finding:
        def found() -> str:
            cell = evidence.cells[0]
            difference = evidence.row_difference(cell, one, other)
            return f"Language model {cell.cell.name}, {one} minus {other}: {differences(difference)}."

        return found

    def verdict() -> str:
        differences = [
            evidence.synthetic_difference("plif", "plif-frozen"),
            evidence.row_difference(evidence.cells[0], "plif", "plif-frozen").seeds,
        ]
        return of_all(sum(not better(each) for each in differences), 2, "trained not significantly better than frozen")

    return judge(
        "A frozen random PLIF is as good as a trained one, so that the gain is regularisation.",
        PARTHIBAN,
        (
            pair("plif", "plif-frozen"),
            pair("plif-frozen", BASELINE),
            pair("published-sgd", "published-frozen"),
            language_model("plif", "plif-frozen"),
            language_model("plif-frozen", BASELINE),
        ),
        verdict,
    )


def published_optimiser(evidence: Evidence) -> Claim:
    def pair(one: str, other: str) -> Finding:
        return lambda: (
            f"Synthetic, {one} (KL {evidence.figure(one, 'kl'):.3f}) minus {other} (KL "
            f"{evidence.figure(other, 'kl'):.3f}): {evidence.synthetic_difference(one, other).describe('nats', 4)}."
        )

    def ranks() -> str:
        names = ("published-frozen", "published-sgd", "published-adam", "plif")
        return f"Effective rank at {TOLERANCE}: " + ", ".join(f"{m} {evidence.rank_of(m):.0f}" for m in names) + "."

    def verdict() -> str:
        sgd = evidence.synthetic_difference("published-sgd", "published-frozen")
        adam = evidence.synthetic_difference("published-adam", "published-sgd")
        moved = "changes the result significantly" if sgd.significant else "changes nothing that is significant"
        word = "supported" if better(adam) else "not supported"
        return (
            f"**{word}**: SGD on the published slopes {moved} ({sgd.mean:+.4f} nats), Adam "
            f"{'does' if better(adam) else 'does not either'} ({adam.mean:+.4f} nats against SGD)"
        )

    return judge(
        "The published setting (100,000 pieces, SGD at 0.02 on the slopes) does not learn f; Adam does.",
        "pilot of this project",
        (
            pair("published-sgd", "published-frozen"),
            pair("published-sgd", BASELINE),
            pair("published-adam", "published-sgd"),
            pair("plif", "published-adam"),
            ranks,
        ),
        verdict,
    )


def rank_is_not_the_reason(evidence: Evidence) -> Claim:
    def measured() -> dict[str, tuple[float, float]]:
        found = {}
        for name in SYNTHETIC_METHODS:
            try:
                found[name] = (evidence.rank_of(name), evidence.figure(name, "kl"))
            except NotRun:
                continue
        if len(found) < 5:
            raise NotRun("python -m benchmarks.synthetic --cells main")
        return found

    def synthetic() -> str:
        text = ", ".join(f"{name} {rank:.0f} / {kl:.3f}" for name, (rank, kl) in measured().items())
        told = rank_report.correlation(measured(), "KL")
        return f"Synthetic, main cell, effective rank at {TOLERANCE} / KL: {text}. {told}"

    def frozen() -> str:
        return (
            f"A frozen random PLIF has effective rank {evidence.rank_of('plif-frozen'):.0f} and KL "
            f"{evidence.figure('plif-frozen', 'kl'):.3f}; Linear-Softmax {evidence.rank_of(BASELINE):.0f} and "
            f"{evidence.figure(BASELINE, 'kl'):.3f}."
        )

    def verdict() -> str:
        statistic, p = rank_report.spearman(measured())
        together = p < SIGNIFICANCE and statistic < 0
        frozen = evidence.synthetic_difference("plif-frozen", BASELINE)
        without_gain = evidence.rank_of("plif-frozen") > evidence.rank_of(BASELINE) and not better(frozen)
        text = of_all((not together) + without_gain, 2, "agrees")
        return (
            f"{text} observations of the synthetic experiment: over all layers higher effective rank "
            f"{'goes' if together else 'does not significantly go'} with lower KL (Spearman {statistic:+.2f}); a "
            f"frozen random PLIF has {'a' if without_gain else 'no'} higher rank without a significant gain"
        )

    return judge(
        "A higher rank is not what makes the gain: rank and loss hardly correlate.",
        PARTHIBAN,
        (synthetic, frozen),
        verdict,
    )


def helps_after_the_fact(evidence: Evidence) -> Claim:
    def alone() -> str:
        best = best_posthoc(evidence)
        return (
            f"SmolLM2-135M, f fitted alone: best by validation {best}, test loss "
            f"{evidence.posthoc(best)['test']['nll']:.4f} nats a token (as trained "
            f"{evidence.posthoc('identity')['test']['nll']:.4f}, temperature "
            f"{evidence.posthoc('temperature')['test']['nll']:.4f}). Gain over the model as it is "
            f"{gain(evidence.posthoc_difference(best, 'identity'))}; over temperature "
            f"{gain(evidence.posthoc_difference(best, 'temperature'))}, over documents."
        )

    def calibration() -> str:
        names = dict.fromkeys(("identity", "temperature", best_posthoc(evidence)))
        text = ", ".join(f"{name} {evidence.calibration(name):.4f}" for name in names)
        ranks = ", ".join(f"{name} {evidence.posthoc(name)['test']['effective_ranks'][TOLERANCE]}" for name in names)
        return f"Expected calibration error: {text}. Effective rank at {TOLERANCE}: {ranks}."

    def together() -> str:
        roles = evidence.head_roles()
        parts = []
        for role in ("temperature", "best PLIF", "best other"):
            difference, seeds = evidence.head_difference(roles[role], roles["linear"])
            parts.append(f"{roles[role]} {gain(difference)} ({seeds} seed{'s' if seeds > 1 else ''})")
        return f"f and the head trained together, gain over the head alone, over documents: {'; '.join(parts)}."

    def verdict() -> str:
        best = best_posthoc(evidence)
        over_model, over_control = (
            better(evidence.posthoc_difference(best, name)) for name in ("identity", "temperature")
        )
        return (
            f"**{'supported' if over_control else 'not supported'}**: f alone gains significantly over a temperature: "
            f"{'yes' if over_control else 'no'}; over the model as it is: {'yes' if over_model else 'no'}"
        )

    return judge(
        "Put on a trained model, a learned f improves its loss beyond what a temperature does.",
        "question of this project",
        (alone, calibration, together),
        verdict,
    )


def best_posthoc(evidence: Evidence) -> str:
    """The transform with the lowest validation loss that is neither the identity nor a temperature."""
    names = [name for name in evidence.posthoc_names() if name not in ("identity", "temperature")]
    if not names:
        raise NotRun("python -m benchmarks.posthoc")
    return min(names, key=lambda name: evidence.posthoc(name)["valid_nll"])


DISPUTE = (frozen_is_as_good, published_optimiser, rank_is_not_the_reason, helps_after_the_fact)
