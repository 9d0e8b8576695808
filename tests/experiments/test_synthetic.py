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
from benchmarks.experiments.synthetic import Synthetic, timing, training
from benchmarks.experiments.synthetic.methods import METHODS, build, size
from benchmarks.experiments.synthetic.report import curve
from benchmarks.experiments.synthetic.settings import GRID, LEARNING_RATES, MAIN, Cell, Timing, Training

CELL = Cell(contexts=24, words=16, dim=3, alpha=0.3, steps=40)
TARGETS = training.training_targets(training.dirichlet(24, 16, 0.3, 0))


@pytest.fixture(autouse=True)
def one_thread():
    with deterministic(1):
        yield


@pytest.mark.parametrize("alpha", [0.01, 0.1, 1.0])
def test_targets_are_dirichlet_distributed(alpha):
    targets = training.dirichlet(4000, 50, alpha, seed=3)
    torch.testing.assert_close(targets.sum(1), torch.ones(4000, dtype=torch.float64), atol=1e-12, rtol=0)
    # The mean entropy of a symmetric Dirichlet distribution in closed form; 5 standard errors are about 0.05 at most.
    expected = float(digamma(50 * alpha + 1) - digamma(alpha + 1))
    assert -torch.xlogy(targets, targets).sum(1).mean().item() == pytest.approx(expected, abs=0.06)
    assert not torch.equal(targets, training.dirichlet(4000, 50, alpha, seed=4))
    single = training.training_targets(targets)
    assert (single[single > 0] >= torch.finfo(torch.float32).tiny).all() and (single > 0).any()


def test_figures_of_known_distributions():
    targets = torch.tensor([[0.0, 0.0, 1.0], [0.5, 0.25, 0.25]], dtype=torch.float64)
    log_q = torch.tensor([[-0.1, -torch.inf, -1.0], [-0.5, -0.75, -2.0]], dtype=torch.float64)
    found = training.figures(targets, log_q.clamp(min=-1e3))
    # KL of the first row is 1; of the second 0.9375 - 1.5 log 2.
    assert found["kl"] == pytest.approx((1 + 0.9375 - 1.5 * np.log(2)) / 2, rel=1e-12)
    assert found["modes"] == 0.5 and found["top5"] == 1
    assert training.figures(torch.eye(12, dtype=torch.float64), -torch.arange(144.0).view(12, 12))["top5"] < 1


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_is_the_exact_cross_entropy(method):
    model, targets = build(method, 10, 7, 3, seed=0), training.dirichlet(10, 7, 0.5, seed=0)
    log_q = copy.deepcopy(model).double().log_prob()
    assert model.loss(targets.float()).item() == pytest.approx(-(targets * log_q).sum(1).mean().item(), rel=2e-6)
    # All methods of a seed start with the same vectors, and those with equal parameters have the closest dimension.
    assert torch.equal(model.context, build("linear", 10, 7, model.context.shape[1], 0).context)
    if (other := METHODS[method].as_many_as) is not None:
        wanted = size(other, 40, 300, 10)[1]
        assert size(method, 40, 300, 10)[0] == min(range(99), key=lambda d: abs(340 * d + 300 - wanted)) > 10


def test_parameters_of_f_are_trained_as_the_method_says():
    for method, of_f in {"plif": ("Adam", 0.03), "published-sgd": ("SGD", 0.02), "plif-frozen": None}.items():
        trainer = training.Trainer(Training(CELL, method, 0, 0.3), TARGETS)
        groups = [(type(each).__name__, group) for each in trainer.optimizers for group in each.param_groups]
        found = {group["name"]: (kind, pytest.approx(group["lr"])) for kind, group in groups}
        assert found == {"model": ("Adam", 0.3)} | ({"transform": of_f} if of_f else {})
    trainer.train_step()
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 * 0.3)
    assert [trainer.rate(step) for step in (0, 19, 20, 30, 40)] == pytest.approx([0.05, 1, 1, 0.5, 0])


def test_training_is_the_same_each_time_and_improves():
    for method in ("linear", "plif", "mos4"):
        settings = Training(CELL, method, 0, 0.3)
        one, two = (training.train(settings).figures for _ in range(2))
        short = training.train(replace(settings, cell=replace(CELL, steps=1))).figures
        assert one == two and one["kl"] < 0.8 * short["kl"]
        assert training.train(replace(settings, lr=1e30)).figures.keys() == {"diverged_at"}


# Of the published setting points of f are kept, between which its random slopes are not seen.
@pytest.mark.parametrize(("method", "tolerance"), [("mlp", 1e-4), ("plif", 1e-4), ("published-adam", 1e-2)])
def test_kept_shapes_are_the_learned_f(method, tolerance):
    trainer = training.Trainer(Training(CELL, method, 0, 0.3), TARGETS)
    trainer.trained_model()
    kept = training.shape(trainer.model)
    z = torch.linspace(kept["quantiles"][0][1], kept["quantiles"][-1][1], 50, dtype=torch.float64)
    found, wanted = curve(method, kept, z), trainer.model.transform(z).detach()
    torch.testing.assert_close(found - found[0], wanted - wanted[0], atol=tolerance, rtol=0)
    assert (wanted - wanted[0] - (z - z[0])).abs().max() > 0.05


def record(unit, figures, **settings):
    return Record(unit, settings, figures, {"step_seconds": 1e-3, "backend": "cpu"}, 1.0, {})


def searched(cell, method, kls):
    found = {lr: {"kl": kls[lr]} if lr in kls else {"diverged_at": 3} for lr in LEARNING_RATES}
    return [record(f"{cell.name}/{method}/search-lr{lr:g}", figures, lr=lr) for lr, figures in found.items()]


def test_trainings_are_at_the_rate_that_the_search_found():
    def rates(records):
        return {unit.name: unit.settings.lr for unit in Synthetic().units(Results(records)) if "/seed" in unit.name}

    found = searched(MAIN, "plif", {0.03: 1.2, 0.1: 1.1})
    assert rates(found) == {f"{MAIN.name}/plif/seed{seed}": 0.1 for seed in range(5)}
    assert rates(found[:2]) == rates(searched(MAIN, "plif", {})) == {}
    results = Store("synthetic").results()
    units = list(Synthetic().units(results))
    assert set(Synthetic().to_verify(results)) < {unit.name for unit in units} == set(results)
    for unit in units:
        Store("synthetic").require_settings(unit, results)


def test_the_section_follows_from_the_results(tmp_path):
    linear, rest = np.array([1.36, 1.35, 1.37, 1.36, 1.35]), {"modes": 0.92, "top5": 0.5}
    rest["ranks"] = {"0.001": 11, "0.0001": 12, "1e-05": 13}
    runs = [(MAIN, "linear", linear), (MAIN, "temperature", linear - [-0.01, 0.01, -0.02, 0.02, -0.001])]
    runs += [(MAIN, "plif", linear - [0.30, 0.31, 0.32, 0.33, 0.34]), (GRID[0], "linear", linear)]
    records = searched(MAIN, "mlp", {})
    for cell, method, kls in [*runs, (GRID[0], "mlp", linear + 0.1)]:
        records += searched(cell, method, {0.1: 1.0})
        records += [record(f"{cell.name}/{method}/seed{i}", {"kl": float(kl), **rest}) for i, kl in enumerate(kls)]
    text = re.sub(" +", " ", Synthetic().section(Results(records), tmp_path))
    assert "| plif | 0.1 | 5 | 1.038 ± 0.019 | 92.0 | 50.0 | 11 / 12 / 13 | 10 | 7,350 | 1.00 |" in text
    assert "at least 90 % of the modes**: plif (1.038, 92.0 %, 5 seeds). Linear-Softmax: 1.358" in text
    assert "Significantly lower KL than Linear-Softmax: plif. Not significant: temperature." in text
    assert "-0.3200 [-0.3396, -0.3004]" in text and "1.458 / 92 †" in text
    assert "| mos15 | not run |" in text and "| mlp | diverged at all rates |" in text
    assert f"the first is {MAIN.name}/sigmoidcap-learned/search-lr0.03; `python -m benchmarks run synthetic`" in text
    assert (tmp_path / "synthetic-gains.png").stat().st_size > 1000
    assert "nan" not in Synthetic().section(Results(), tmp_path)


def test_times_are_of_each_method_and_mixtures_have_no_loss():
    found = timing.measure(Timing(CELL, ("eager", "linear", "mos4"), rounds=3)).times["seconds"]
    assert [list(of) for of in found.values()] == [["loss", "step"], ["loss", "step"], ["step"]]
    assert all(0 < low <= middle <= high for of in found.values() for low, middle, high in of.values())
