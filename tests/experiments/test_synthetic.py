"""The synthetic experiment: the problem, what is measured, how methods are trained, and the choice by search."""

import copy
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import digamma

from benchmarks.engine.experiment import Record, Results
from benchmarks.engine.runner import deterministic
from benchmarks.engine.store import Store
from benchmarks.experiments.rank import Rank
from benchmarks.experiments.synthetic import Synthetic, training
from benchmarks.experiments.synthetic.methods import METHODS, build, size
from benchmarks.experiments.synthetic.report import curve
from benchmarks.experiments.synthetic.settings import GRID, LEARNING_RATES, MAIN, Cell, Timing, Training

CELL = Cell(contexts=24, words=16, dim=3, alpha=0.3, steps=40)


@pytest.mark.parametrize("alpha", [0.01, 0.1, 1.0])
def test_targets_are_dirichlet_distributed(alpha):
    targets, single = training.problem(Cell(4000, 50, 1, alpha, 1), 3)
    torch.testing.assert_close(targets.sum(1), torch.ones(4000, dtype=torch.float64), atol=1e-12, rtol=0)
    # The mean entropy of a symmetric Dirichlet distribution in closed form; 5 standard errors are about 0.05 at most.
    expected = float(digamma(50 * alpha + 1) - digamma(alpha + 1))
    assert -torch.xlogy(targets, targets).sum(1).mean().item() == pytest.approx(expected, abs=0.06)
    assert (single[single > 0] >= torch.finfo(torch.float32).tiny).all() and (single > 0).any()


def test_figures_of_known_distributions():
    targets, log_q = torch.zeros(2, 12, dtype=torch.float64), torch.full((2, 12), -1e3, dtype=torch.float64)
    targets[:, :3] = torch.tensor([[0.0, 0.0, 1.0], [0.5, 0.25, 0.25]])
    log_q[0, :3], log_q[1, :3] = torch.tensor([-0.1, -2e3, -1.0]), torch.tensor([-0.5, -0.75, -2.0])
    found = training.figures(targets, log_q)
    # KL of the first row is 1; of the second 0.9375 - 1.5 log 2.
    assert found["kl"] == pytest.approx((1 + 0.9375 - 1.5 * np.log(2)) / 2, rel=1e-9) and found["modes"] == 0.5
    order = torch.arange(12.0, dtype=torch.float64)
    assert training.figures((order + 3).expand(1, 12) / 102, (-(order - 8).abs()).expand(1, 12))["top5"] == 0.8


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_is_the_exact_cross_entropy(method):
    model, targets = build(method, 10, 7, 3, seed=0), training.problem(Cell(10, 7, 3, 0.5, 1), 0)[0]
    log_q = copy.deepcopy(model).double().log_prob()
    assert model.loss(targets.float()).item() == pytest.approx(-(targets * log_q).sum(1).mean().item(), rel=2e-6)
    # All methods of a seed start with the same vectors, and those with equal parameters have the closest dimension.
    assert torch.equal(model.context, build("linear", 10, 7, model.context.shape[1], 0).context)
    if (other := METHODS[method].as_many_as) is not None:
        wanted = size(other, 40, 300, 10)[1]
        assert size(method, 40, 300, 10)[0] == min(range(99), key=lambda d: abs(340 * d + 300 - wanted)) > 10


def test_parameters_of_f_are_trained_as_the_method_says():
    for method, of_f in {"plif": ("Adam", 0.03), "published-sgd": ("SGD", 0.02), "plif-frozen": None}.items():
        trainer = training.Trainer(Training(CELL, method, 0, 0.3))
        groups = [(type(each).__name__, group) for each in trainer.optimizers for group in each.param_groups]
        found = {group["name"]: (kind, pytest.approx(group["lr"])) for kind, group in groups}
        assert found == {"model": ("Adam", 0.3)} | ({"transform": of_f} if of_f else {})
    trainer.train_step()
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 * 0.3)
    assert [trainer.rate(step) for step in (0, 19, 20, 30, 40)] == pytest.approx([0.05, 1, 1, 0.5, 0])


@pytest.mark.parametrize("method", ["linear", "plif", "mos4"])
@deterministic(1)
def test_training_is_the_same_each_time_and_improves(method):
    settings = Training(CELL, method, 0, 0.3)
    one, two, short = (training.train(replace(settings, cell=replace(CELL, steps=n))).figures for n in (40, 40, 1))
    assert one == two and one["kl"] < 0.8 * short["kl"]
    assert training.train(replace(settings, lr=1e30)).figures.keys() == {"diverged_at"}


# Of the published setting points of f are kept, between which its random slopes are not seen.
@pytest.mark.parametrize(("method", "tolerance"), [("mlp", 1e-4), ("plif", 1e-4), ("published-adam", 1e-2)])
@deterministic(1)
def test_kept_shapes_are_the_learned_f(method, tolerance):
    trainer = training.Trainer(Training(CELL, method, 0, 0.3))
    trainer.train()
    kept = training.shape(trainer.model)
    z = torch.linspace(kept["quantiles"][0][1], kept["quantiles"][-1][1], 50, dtype=torch.float64)
    found, wanted = curve(method, kept, z), trainer.model.transform(z).detach()
    torch.testing.assert_close(found - found[0], wanted - wanted[0], atol=tolerance, rtol=0)
    assert (wanted - wanted[0] - (z - z[0])).abs().max() > 0.05


def test_trainings_are_at_the_rate_that_the_search_found():
    def rates(*figures):
        names = [f"{MAIN.name}/plif/search-lr{lr:g}" for lr in LEARNING_RATES]
        found = [Record(name, {}, of, {}, 1.0, {}) for name, of in zip(names, figures, strict=False)]
        return {unit.name: unit.settings.lr for unit in Synthetic().units(Results(found)) if "/seed" in unit.name}

    searched = {"kl": 1.2}, {"kl": 1.1}, {"diverged_at": 3}
    assert rates(*searched) == {f"{MAIN.name}/plif/seed{seed}": 0.1 for seed in range(5)}
    assert rates(*searched[:2]) == rates(*[searched[2]] * 3) == {}


@pytest.mark.parametrize("experiment", [Synthetic(), Rank()])
def test_the_stored_results_are_those_of_the_units(experiment):
    results = Store(experiment.name).results()
    units = {unit.name: unit.stored_settings() for unit in experiment.units(results)}
    assert units == {name: record.settings for name, record in results.items()}
    assert len(experiment.to_verify(results)) == 4


def test_the_section_follows_from_the_results(tmp_path):
    changed = {name: copy.deepcopy(each) for name, each in Store("synthetic").results().items()}
    for seed in range(5):
        linear, plif, spline = (changed[f"{MAIN.name}/{m}/seed{seed}"].figures for m in ("linear", "plif", "spline"))
        linear["kl"], spline["kl"] = 1.36 + 0.01 * seed**2, 1.36 + 0.01 * seed**2 + (-1) ** seed
        plif |= {"kl": linear["kl"] - 0.3 - 0.01 * seed, "modes": 0.92, "top5": 0.5}
    text = re.sub(" +", " ", Synthetic().section(Results(changed.values()), tmp_path))
    assert "| plif | 0.3* | 5 | 1.100 ± 0.051 | 92.0 | 50.0 | 115 / 228 / 279 | 10 | 7,350 |" in text
    assert "at least 90 % of the modes**: mlp (1.018, 91.0 %, 5 seeds), gss" in text
    assert "-0.3200 [-0.3396, -0.3004]" in text and "1.100 / 92 *" in text
    assert re.search("Not significant: [^.]*spline", text) and "lower KL than Linear-Softmax: plif, " in text
    some = Results(each for name, each in changed.items() if f"{GRID[0].name}/mlp/seed" not in name)
    text = Synthetic().section(some, tmp_path)
    assert f"5 units missing, the first is {GRID[0].name}/mlp/seed0; `python -m benchmarks run synthetic`" in text
    assert "### Differences" in text and "### By d and alpha" not in text


@deterministic(1)
def test_times_are_of_each_method_and_mixtures_have_no_loss():
    found = training.time_steps(Timing(CELL, ("eager", "linear", "mos4"), rounds=3)).times["seconds"]
    assert [list(of) for of in found.values()] == [["loss", "step"], ["loss", "step"], ["step"]]
    assert all(0 < low <= middle <= high for of in found.values() for low, middle, high in of.values())
