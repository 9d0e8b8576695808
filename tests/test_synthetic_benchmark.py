"""The synthetic benchmark: its problem, its methods, and that its runs stop, go on, share work and come out again."""

from __future__ import annotations

import copy
import fcntl
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.special import digamma
from torch import nn

from benchmarks import claims
from benchmarks.files import write_json
from benchmarks.synthetic import __main__ as command_line
from benchmarks.synthetic import pictures, problem, records, report, run, settings, timing, training, verify
from benchmarks.synthetic.methods import METHODS, build, equal_dim
from benchmarks.synthetic.settings import GRID, LARGER, MAIN, SEARCH_SEED, Cell, Command, Unit

_CELL = Cell(contexts=24, words=16, dim=3, alpha=0.3, steps=12, seeds=(0, 1))
#: Everything but the published setting, whose 100,000 slopes cost time and are the same code.
_LIGHT = [name for name in METHODS if not name.startswith("published")]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The settings of the command, and locks that no other process takes."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(claims, "LOCKS", tmp_path / "locks")
    run.prepare(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def _command(tmp_path: Path, *units: Unit, limit: float | None = None) -> Command:
    return Command("small", "run", list(units), tmp_path / "results", limit, 1)


def _without_times(record: dict[str, Any]) -> dict[str, Any]:
    kept = copy.deepcopy(record)
    for each in [*kept["search"], *kept["runs"]]:
        del each["seconds_per_step"], each["environment"]
    return {name: value for name, value in kept.items() if name != "environments"}


@pytest.mark.parametrize("alpha", [0.01, 0.1, 1.0])
def test_targets_are_dirichlet_distributed(alpha: float) -> None:
    words = 50
    targets = problem.dirichlet(4000, words, alpha, seed=3)
    assert torch.isfinite(targets).all() and (targets >= 0).all()
    assert torch.allclose(targets.sum(1), torch.ones(4000, dtype=torch.float64), atol=1e-12)
    # The mean entropy of a symmetric Dirichlet distribution in closed form; 5 standard errors are about 0.05 at most.
    expected = float(digamma(words * alpha + 1) - digamma(alpha + 1))
    assert problem.entropy(targets) == pytest.approx(expected, abs=0.06)
    assert torch.equal(targets, problem.dirichlet(4000, words, alpha, seed=3))
    assert not torch.equal(targets, problem.dirichlet(4000, words, alpha, seed=4))


def test_training_targets_hold_no_denormal_numbers() -> None:
    single = problem.training_targets(problem.dirichlet(200, 100, 0.01, seed=0))
    assert single.dtype == torch.float32
    assert (single[single > 0] >= torch.finfo(torch.float32).tiny).all() and (single == 0).any()


def test_figures_of_known_distributions() -> None:
    targets = problem.dirichlet(40, 12, 0.5, seed=1)
    same = problem.figures(targets, targets.log())
    assert same["kl"] == pytest.approx(0, abs=1e-12) and same["modes"] == 1 and same["top5"] == 1

    log_q = torch.log_softmax(torch.randn(40, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 1)
    found = problem.figures(targets, log_q)
    expected = nn.functional.kl_div(log_q, targets, reduction="batchmean").item()
    assert found["kl"] == pytest.approx(expected, rel=1e-12)
    overlap = [
        len({*p.topk(5).indices.tolist()} & {*q.topk(5).indices.tolist()}) / 5
        for p, q in zip(targets, log_q, strict=True)
    ]
    assert found["top5"] == pytest.approx(sum(overlap) / 40)
    assert found["modes"] == (targets.argmax(1) == log_q.argmax(1)).double().mean().item()


def test_figures_of_a_word_without_probability_are_finite() -> None:
    targets = torch.tensor([[0.0, 1.0], [0.5, 0.5]], dtype=torch.float64)
    log_q = torch.tensor([[0.0, -1.0], [-0.5, -0.7]], dtype=torch.float64)
    assert problem.figures(targets, log_q)["kl"] == pytest.approx((1.0 + 0.6 - 0.6931471805599453) / 2)


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_is_the_exact_cross_entropy(method: str) -> None:
    model = build(method, 10, 7, 3, seed=0)
    targets = problem.dirichlet(10, 7, 0.5, seed=0)
    loss = model.loss(targets.float())
    with torch.no_grad():
        log_q = copy.deepcopy(model).double().log_prob()
    assert loss.item() == pytest.approx(-(targets * log_q).sum(1).mean().item(), rel=2e-6)
    loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None and torch.isfinite(parameter.grad).all() for parameter in trained)
    assert model.trained_parameters() == sum(parameter.numel() for parameter in trained)


def test_methods_of_a_seed_start_with_the_same_vectors() -> None:
    plain, mixture, other = build("linear", 9, 8, 4, 5), build("mos4", 9, 8, 4, 5), build("linear", 9, 8, 4, 6)
    assert torch.equal(plain.context, mixture.context)
    assert torch.equal(plain.output.weight, mixture.output.decoder.weight)  # type: ignore[union-attr]
    assert not torch.equal(plain.context, other.context)
    assert torch.equal(build("mos4", 9, 8, 4, 5).output.prior.weight, mixture.output.prior.weight)  # type: ignore[union-attr]


def test_parameters_of_equal_linear_softmax_are_the_closest() -> None:
    n, m, d = MAIN.contexts, MAIN.words, MAIN.dim
    for name in ("mos4", "mos15"):
        wanted = build(name, n, m, d, 0).trained_parameters()
        dim = equal_dim(name, n, m, d)
        gaps = {other: abs((n + m) * other + m - wanted) for other in (dim - 1, dim, dim + 1)}
        assert min(gaps, key=lambda other: gaps[other]) == dim > d
        assert build(f"linear-eq-{name}", n, m, d, 0).context.shape == (n, dim)


def test_rates_rise_and_fall_to_zero() -> None:
    rates = [training.rate(step, 200) for step in range(201)]
    assert rates[0] == pytest.approx(0.05) and max(rates) == 1 and rates[20] == 1
    assert rates[110] == pytest.approx(0.5) and rates[200] == pytest.approx(0)


def test_parameters_of_f_are_trained_as_the_method_says() -> None:
    targets = problem.training_targets(problem.dirichlet(24, 16, 0.3, 0))

    def groups(method: str) -> dict[str, tuple[str, float]]:
        trainer = training.Trainer(_CELL, method, 0, 0.3, targets)
        return {
            group["name"]: (type(optimizer).__name__, group["lr"])
            for optimizer in trainer.optimizers
            for group in optimizer.param_groups
        }

    assert groups("plif") == {"model": ("Adam", 0.3), "transform": ("Adam", pytest.approx(0.03))}
    assert groups("published-sgd") == {"model": ("Adam", 0.3), "transform": ("SGD", 0.02)}
    assert groups("published-adam") == {"model": ("Adam", 0.3), "transform": ("Adam", 0.02)}
    for frozen in ("plif-frozen", "published-frozen", "linear", "softcap"):
        assert groups(frozen) == {"model": ("Adam", 0.3)}


def test_frozen_slopes_are_random_and_stay() -> None:
    targets = problem.training_targets(problem.dirichlet(24, 16, 0.3, 0))
    trainer = training.Trainer(_CELL, "plif-frozen", 0, 0.3, targets)
    assert trainer.model.transform is not None
    before = trainer.model.transform.coefficients()
    assert before[0].std() > 0.1
    for _ in range(5):
        trainer.train_step()
    assert torch.equal(trainer.model.transform.coefficients(), before)


@pytest.mark.parametrize("method", ["linear", "plif", "mos4"])
def test_training_lowers_kl_and_is_the_same_each_time(method: str) -> None:
    one, two = (training.train(_CELL, method, 0, 0.3, True) for _ in range(2))
    assert one["figures"] == two["figures"] and one["history"] == two["history"] and one["shape"] == two["shape"]
    assert one["figures"]["kl"] < one["history"][0][1]
    other = training.train(_CELL, method, 1, 0.3, False)
    assert other["figures"] != one["figures"] and "shape" not in other


def test_a_training_that_diverges_says_when() -> None:
    result = training.train(_CELL, "linear", 0, 1e30, True)
    assert result["figures"] is None and 0 < result["diverged_at"] < _CELL.steps
    assert records.best_rate([result]) is None
    fine = training.train(_CELL, "linear", 0, 0.1, False)
    assert records.best_rate([result, fine]) == 0.1


@pytest.mark.parametrize("method", ["mlp", "plif", "sigmoidcap-learned", "published-adam"])
def test_kept_shapes_are_the_learned_f(method: str) -> None:
    targets = problem.training_targets(problem.dirichlet(24, 16, 0.3, 0))
    trainer = training.Trainer(replace(_CELL, steps=40), method, 0, 0.3, targets)
    for _ in range(30):
        trainer.train_step()
    kept = training.shape(trainer.model)
    assert kept is not None and trainer.model.transform is not None
    kept = json.loads(json.dumps(kept))
    low, high = kept["quantiles"][0][1], kept["quantiles"][-1][1]
    z = torch.linspace(low, high, 50, dtype=torch.float64)
    with torch.no_grad():
        wanted = trainer.model.transform(z)
    found = pictures.curve(method, kept, z)
    # Of the published setting points of f are kept, between which its random slopes are not seen.
    tolerance = 1e-2 if "curve" in kept else 1e-4
    assert torch.allclose(found - found[0], wanted - wanted[0], atol=tolerance)
    assert (wanted - wanted[0] - (z - z[0])).abs().max() > 0.05  # it is not the identity any more


def test_a_unit_stops_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unit = Unit(_CELL, "plif")
    whole = _command(tmp_path / "whole", unit)
    assert run.Runner(whole).execute()
    record = records.read(unit, whole.folder)
    assert [each["lr"] for each in record["search"]] == list(settings.LEARNING_RATES)
    assert {each["seed"] for each in record["search"]} == {SEARCH_SEED}
    assert [each["seed"] for each in record["runs"]] == [0, 1]
    lowest = min(record["search"], key=lambda each: each["figures"]["kl"])
    assert record["lr"] == lowest["lr"] and all(each["lr"] == record["lr"] for each in record["runs"])

    parts = _command(tmp_path / "parts", unit)
    for done in range(1, 6):
        # Out of time after one training each time.
        runner = run.Runner(parts)
        answers = iter([False, False, True, True])
        monkeypatch.setattr(runner, "_out_of_time", lambda answers=answers: next(answers, True))
        assert runner.execute() == (done == 5)
        there = records.read(unit, parts.folder)
        assert len(there["search"]) + len(there["runs"]) == done
    assert _without_times(there) == _without_times(record)
    assert not list(tmp_path.rglob("*.part"))


def test_seeds_can_be_added(tmp_path: Path) -> None:
    unit = Unit(replace(_CELL, seeds=(0,)), "linear")
    run.Runner(_command(tmp_path, unit)).execute()
    more = Unit(replace(_CELL, seeds=(0, 1, 2)), "linear")
    record = records.read(more, tmp_path / "results")
    assert records.missing_runs(record, more) == 2
    run.Runner(_command(tmp_path, more)).execute()
    after = records.read(more, tmp_path / "results")
    assert [each["seed"] for each in after["runs"]] == [0, 1, 2] and after["runs"][0] == record["runs"][0]


def test_a_unit_that_another_process_has_is_left_alone(tmp_path: Path) -> None:
    taken, free = Unit(_CELL, "linear"), Unit(_CELL, "temperature")
    command = _command(tmp_path, taken, free)
    with claims.claimed(claims.lock_of(command.folder, taken.name)) as mine:
        assert mine
        with claims.claimed(claims.lock_of(command.folder, taken.name)) as again:
            assert not again
        assert not run.Runner(command).execute()
        assert not records.path_of(taken, command.folder).exists()
        assert len(records.read(free, command.folder)["runs"]) == 2
    assert run.Runner(command).execute()
    lock = next((tmp_path / "locks").rglob("*linear.lock"))
    with lock.open("w") as file:  # given back
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_results_of_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    unit = Unit(_CELL, "linear")
    run.Runner(_command(tmp_path, unit)).execute()
    with pytest.raises(records.RecordError, match=r"other settings \(cell: .*'steps': 12.*'steps': 13"):
        records.read(Unit(replace(_CELL, steps=13), "linear"), tmp_path / "results")
    records.path_of(unit, tmp_path / "results").write_text("{}")
    with pytest.raises(records.RecordError, match="is not a record"):
        records.read(unit, tmp_path / "results")


def test_verification_notices_a_changed_figure(tmp_path: Path) -> None:
    unit = Unit(_CELL, "plif")
    command = _command(tmp_path, unit)
    run.Runner(command).execute()
    assert verify.chosen(command) == [unit]
    assert verify.compare(unit, command.folder).agree

    record = records.read(unit, command.folder)
    record["runs"][0]["figures"]["kl"] += 1e-15
    records.write(record, unit, command.folder)
    comparison = verify.compare(unit, command.folder)
    assert comparison.same_machine and not comparison.agree and "DIFFER" in comparison.describe()
    assert "sources differ" not in comparison.describe()
    record["environments"][0]["commit"] = "another"
    records.write(record, unit, command.folder)
    assert "sources differ" in verify.compare(unit, command.folder).describe()

    record["environments"][0]["processor"] = "another one"
    records.write(record, unit, command.folder)
    comparison = verify.compare(unit, command.folder)
    assert not comparison.same_machine and comparison.agree
    record["runs"][0]["figures"]["kl"] += 2 * verify.KL_TOLERANCE
    records.write(record, unit, command.folder)
    assert not verify.compare(unit, command.folder).agree


def test_exit_codes_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(settings, "SMALL", _CELL)
    here = ["--preset", "small", "--methods", "linear,plif", "--out", str(tmp_path / "out")]
    assert command_line.main([*here, "--verify"]) == 1
    assert command_line.main(here) == 0
    shown = capsys.readouterr().out
    assert "plif" in shown and "not run" not in shown
    assert command_line.main([*here, "--list"]) == 0 and "done" in capsys.readouterr().out
    assert command_line.main([*here, "--verify"]) == 0
    path = records.path_of(Unit(_CELL, "linear"), tmp_path / "out")
    text = path.read_text()
    kl = json.loads(text)["runs"][0]["figures"]["kl"]
    path.write_text(text.replace(f'"kl": {kl}', f'"kl": {kl + 0.1}'))
    assert command_line.main([*here, "--verify"]) == 1
    for wrong in (["--cells", "nowhere"], ["--methods", "softmax"], ["--limit-minutes", "0"], ["--threads", "0"]):
        with pytest.raises(SystemExit) as stopped:
            settings.parse(wrong)
        assert stopped.value.code == 2


def test_the_study_has_every_method_and_cell() -> None:
    units = settings.study("full")
    assert len(set(units)) == len(units)
    assert {unit.method for unit in units if unit.cell == MAIN} == set(METHODS)
    grid = {(cell.dim, cell.alpha) for cell in (*GRID, MAIN)}
    assert grid == {(dim, alpha) for dim in settings.DIMS for alpha in settings.ALPHAS}
    for cell in GRID:
        assert {unit.method for unit in units if unit.cell == cell} == set(settings.GRID_METHODS)
    # Every cell of the tables can be paired by seeds, and the search has a problem of its own.
    assert all(len(cell.seeds) >= 5 for cell in (MAIN, *GRID))
    assert all(SEARCH_SEED not in cell.seeds for cell in (MAIN, *GRID, *LARGER))
    named = settings.parse(["--cells", "main", "--methods", "plif"]).units
    assert named == [Unit(MAIN, "plif")]


def _fill(folder: Path, cell: Cell, kl: dict[str, list[float]], modes: float) -> None:
    """Results of ``cell`` with these values, as if they had been run."""
    for method, values in kl.items():
        unit = Unit(cell, method)
        record = records.read(unit, folder)
        ranks = {f"{tolerance:g}": 11 for tolerance in problem.TOLERANCES}
        figures = [{"kl": value, "modes": modes, "top5": 0.5, "ranks": ranks} for value in values]
        common = {"lr": 0.1, "backend": "cpu", "seconds_per_step": 1e-3, "environment": 0}
        record["environments"] = [{"processor": "one", "threads": 1}]
        record["search"] = [{**common, "seed": SEARCH_SEED, "lr": lr, "figures": figures[0]} for lr in (0.03, 0.1, 0.3)]
        record["lr"] = 0.1
        record["runs"] = [{**common, "seed": seed, "figures": each} for seed, each in enumerate(figures)]
        records.write(record, unit, folder)


def test_the_report_follows_from_the_results(tmp_path: Path) -> None:
    folder = tmp_path / "synthetic"
    linear = [1.36, 1.35, 1.37, 1.36, 1.35]
    better = [value - gain for value, gain in zip(linear, (0.30, 0.31, 0.32, 0.33, 0.34), strict=True)]
    same = [value + noise for value, noise in zip(linear, (0.01, -0.01, 0.02, -0.02, 0.001), strict=True)]
    _fill(folder, MAIN, {"linear": linear, "temperature": same, "plif": better}, modes=0.92)
    _fill(folder, GRID[0], {"linear": linear, "mlp": [value + 0.1 for value in linear]}, modes=0.5)
    text = re.sub(" +", " ", report.section(folder))
    assert "| plif | 0.1 | 5 | 1.038 ± 0.019 | 92.0 | 50.0 | 11 / 11 / 11 | 10 | 7,350 | 1.00 |" in text
    assert "at least 90 % of the modes**: plif (1.038, 92.0 %, 5 seeds). Linear-Softmax is at 1.358" in text
    assert "Significantly lower KL than Linear-Softmax: plif. Not significant: temperature." in text
    assert "-0.3200 [-0.3396, -0.3004]" in text and "1.458 / 50 †" in text
    assert "| mos15 | not run |" in text and "--cells main --methods sigmoidcap-learned,mlp" in text
    assert "](synthetic/heat_maps.png)" in text and (folder / "heat_maps.png").stat().st_size > 1000
    path = report.write(folder)
    assert "](heat_maps.png)" in path.read_text() and path.read_text().startswith("# Synthetic")
    assert re.sub(" +", " ", report.section(folder)) == text


def test_a_report_of_nothing_says_so(tmp_path: Path) -> None:
    text = report.section(tmp_path / "synthetic")
    assert "Nothing of the main cell has been run yet" in text and "nan" not in text
    assert text.count("not run") > len(METHODS)


def test_heat_maps_show_each_gain() -> None:
    figure = pictures.heat_maps({"plif": {(5, 0.1): 0.25, (10, 0.1): -0.5}}, (5, 10), (0.1, 1.0))
    assert sorted(text.get_text() for text in figure.axes[0].texts) == ["+0.25", "-0.50", "not run", "not run"]


def test_timing_has_each_method_and_the_eager_loss(tmp_path: Path) -> None:
    found = timing.measure(_CELL, (timing.EAGER, "linear", "plif", "mos4"), rounds=5, warm_up=1)
    assert found["rounds"] == 5 and set(found["seconds"]) == {"eager", "linear", "plif", "mos4"}
    for method, of in found["seconds"].items():
        assert set(of) == ({"step"} if method == "mos4" else {"loss", "step"})
        assert all(0 < low <= middle <= high for low, middle, high in of.values())
    assert found["backends"]["eager"] == "torch"
    write_json(tmp_path / "synthetic" / "timing.json", [found])
    table = report.section(tmp_path / "synthetic").partition("### Time")[2]
    assert re.search(r"\| linear +\| [\d.]+ \[[\d., ]+\] +\| +1.00 \|", table)
    assert re.search(r"\| mos4 +\| +- \| +- \|", table)
