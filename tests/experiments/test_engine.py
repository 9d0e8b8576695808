"""The engine of the experiments: what is stored is whole, what is done is done once, what is verified is the same."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.engine import document, json_lines, plots, runner
from benchmarks.engine.checkpoint import Checkpoint
from benchmarks.engine.command_line import Commands
from benchmarks.engine.experiment import Experiment, ExperimentError, Measured, Results, Unit
from benchmarks.engine.store import Store, StoreError


@dataclass(frozen=True)
class Settings:
    rate: float
    sizes: tuple[int, ...] = (1, 2)


class Search(Experiment):
    """Three tries, then a training at the best of them."""

    name, title, threads = "toy", "A toy", 1

    def __init__(self, seconds: float = 0.0, ran: list[str] | None = None) -> None:
        self.seconds, self.ran = seconds, [] if ran is None else ran

    def units(self, results: Results) -> Iterable[Unit]:
        tries = [Unit(f"search/{rate:g}", Settings(rate)) for rate in (0.1, 0.2, 0.3)]
        yield from tries
        if all(unit.name in results for unit in tries):
            best = min(tries, key=lambda unit: results[unit.name].figures["loss"])
            yield Unit("main/best", best.settings)

    def run(self, unit: Unit, checkpoint: Checkpoint) -> Measured:
        self.ran.append(unit.name)
        time.sleep(self.seconds)
        return Measured({"loss": abs(unit.settings.rate - 0.2) + 0.1}, {"step": time.perf_counter()})

    def to_verify(self, results: Results) -> list[str]:
        return ["search/0.1"]

    def section(self, results: Results, pictures: Path) -> str:
        with plots.picture(pictures / "toy.png") as grid:
            grid[0, 0].plot([1, 2])
        return f"## Toy\n\n{document.table([{'unit': name} for name in results])}"


def command(*arguments: str, experiment: type[Experiment] = Search) -> int:
    commands = Commands({"toy": experiment}, lambda results, pictures: Search().section(Results(), pictures) + "\n")
    return commands.main(arguments)


def test_units_that_depend_on_results_run_after_them_and_once(tmp_path: Path) -> None:
    experiment, store = Search(), Store("toy", tmp_path)
    assert runner.run(experiment, store, runner.Selection()) == []
    assert experiment.ran == ["search/0.1", "search/0.2", "search/0.3", "main/best"]
    assert store.results()["main/best"].settings == {"rate": 0.2, "sizes": [1, 2]}
    runner.run(experiment, store, runner.Selection())
    assert len(experiment.ran) == 4


def test_selection_by_pattern_share_and_time(tmp_path: Path) -> None:
    experiment, store = Search(), Store("toy", tmp_path)
    left = runner.run(experiment, store, runner.Selection("search/*", limit_minutes=-1.0))
    assert len(left) == 3 and not experiment.ran
    runner.run(experiment, store, runner.Selection("search/*", shard=1, shards=2))
    assert experiment.ran == ["search/0.2"]
    with pytest.raises(ExperimentError, match="nothing"):
        runner.run(experiment, store, runner.Selection("nothing"))


def _share(folder: Path, number: int) -> None:
    experiment = Search(0.3)
    runner.run(experiment, Store("toy", folder), runner.Selection())
    (folder / f"{number}.json").write_text(json.dumps(experiment.ran))


def test_processes_share_the_units(tmp_path: Path) -> None:
    # Forked: they need not import torch again.
    processes = [get_context("fork").Process(target=_share, args=(tmp_path, number)) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    ran = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2)]
    assert sorted(ran[0] + ran[1]) == ["main/best", "search/0.1", "search/0.2", "search/0.3"]
    lines = json_lines.read(tmp_path / "toy.jsonl")
    assert sum("unit" in line for line in lines) == 4


def test_a_line_that_was_cut_off_is_no_result_and_is_removed(tmp_path: Path) -> None:
    experiment, store = Search(), Store("toy", tmp_path)
    runner.run(experiment, store, runner.Selection())
    whole = store.path.read_text()
    store.path.write_text(whole[:-30])
    assert set(store.results()) == {"search/0.1", "search/0.2", "search/0.3"}
    runner.run(experiment, store, runner.Selection())
    assert [json.loads(line)["unit"] for line in store.path.read_text().splitlines()[1:]] == [*store.results()]
    assert len(store.results()) == 4


@pytest.mark.parametrize("line", ["{", '{"unit": "a"}', '{"unit": "a", "environment": "no such"}', "[1]"])
def test_a_damaged_file_is_an_error(line: str, tmp_path: Path) -> None:
    (tmp_path / "toy.jsonl").write_text(f"{line}\n")
    with pytest.raises(StoreError, match=r"toy\.jsonl"):
        Store("toy", tmp_path).results()


def test_results_of_other_settings_are_an_error(tmp_path: Path) -> None:
    store = Store("toy", tmp_path)
    store.append(Unit("search/0.1", Settings(0.5)), Measured({"loss": 1.0}), 0.1)
    with pytest.raises(StoreError, match=r"search/0\.1.*rate: 0\.5 -> 0\.1"):
        runner.run(Search(), store, runner.Selection())


def test_figures_survive_to_the_bit_and_nan_is_an_error(tmp_path: Path) -> None:
    store, unit = Store("toy", tmp_path), Unit("search/0.1", Settings(0.1))
    values = [0.1 + 0.2, 5e-324, math.pi, -0.0]
    store.append(unit, Measured({"values": values}), 0.0)
    assert [v.hex() for v in store.results()[unit.name].figures["values"]] == [v.hex() for v in values]
    before = store.path.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        store.append(unit, Measured({"loss": math.nan}), 0.0)
    assert store.path.read_bytes() == before


def test_files_of_two_machines_put_together_keep_their_environments(tmp_path: Path) -> None:
    store = Store("toy", tmp_path)
    runner.run(Search(), store, runner.Selection("search/*"))
    text = store.path.read_text()
    identifier = json.loads(text.splitlines()[0])["environment"]
    other = text.replace('"processor":"', '"processor":"another ').replace("search/", "other/")
    store.path.write_text(text + other.replace(identifier, "12345678"))
    processors = {name: record.environment["processor"] for name, record in store.results().items()}
    assert len(processors) == 6
    assert {name[:5] for name, each in processors.items() if each.startswith("another ")} == {"other"}


def test_verify_finds_one_changed_bit_on_the_same_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store("toy", tmp_path)
    runner.run(Search(), store, runner.Selection())
    assert command("verify", "toy", "--results", str(tmp_path)) == 0
    assert "search/0.1: the same" in capsys.readouterr().out
    figure = repr(store.results()["search/0.1"].figures["loss"])
    store.path.write_text(store.path.read_text().replace(figure, repr(math.nextafter(float(figure), 1))))
    assert command("verify", "toy", "--results", str(tmp_path)) == 1
    assert "DIFFERS: figures.loss" in capsys.readouterr().out
    # Another machine may differ a little, until there are results of it, too.
    text = store.path.read_text().replace('"processor":"', '"processor":"another ').replace('"loss":0.2', '"loss":0.5')
    store.path.write_text(text.replace(json.loads(text.splitlines()[0])["environment"], "12345678"))
    for options, differs in (((), 1), (("--keep",), 1), ((), 0)):
        assert command("verify", "toy", "--results", str(tmp_path), *options) == differs
        assert ("on another machine (processor: another " in capsys.readouterr().out) == differs
    assert len(store.results().every("search/0.1")) == 2


@pytest.mark.parametrize(
    ("found", "differs"),
    [
        ({"a": [1.0, 2.0]}, []),
        ({"a": [1.0, 2.5]}, ["figures.a[1]: 2.0 -> 2.5"]),
        ({"a": [1.0]}, ["figures.a: [1.0, 2.0] -> [1.0]"]),
        ({"a": [1.0, 2.0], "b": 1}, ["figures.b: None -> 1"]),
    ],
)
def test_compare(found: Any, differs: list[str]) -> None:
    assert runner.compare({"a": [1.0, 2.0]}, found, 0.0) == differs


def test_checkpoint(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "work" / "unit.pt")
    assert checkpoint.load() is None and not checkpoint.due()
    checkpoint.save({"step": 3, "weight": torch.ones(2)})
    assert checkpoint.load()["weight"].tolist() == [1.0, 1.0]
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["unit.pt"]
    checkpoint.remove()
    assert checkpoint.load() is None


def test_report_writes_checks_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("report", "--check", "--results", str(tmp_path)) == 1
    assert command("report", "--results", str(tmp_path)) == 0
    first = (tmp_path / "pictures" / "toy.png").read_bytes()
    assert command("report", "--check", "--results", str(tmp_path)) == 0
    assert command("report", "toy", "--results", str(tmp_path)) == 0
    assert (tmp_path / "pictures" / "toy.png").read_bytes() == first
    (tmp_path / "REPORT.md").write_text("another\n")
    assert command("report", "--check", "--results", str(tmp_path)) == 1
    assert (tmp_path / "REPORT.md").read_text() == "another\n"
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("run", "other"), "there is no experiment 'other'; there are toy"),
        (("run", "toy", "--shard", "3/2"), "shard must be K/N with 1 <= K <= N, got '3/2'"),
        (("run", "toy", "--only", "x*"), "no unit of toy matches 'x*'"),
    ],
)
def test_mistakes_are_told(arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*arguments) == 1
    assert says in capsys.readouterr().err


def test_interrupted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Interrupted(Search):
        def run(self, unit: Unit, checkpoint: Checkpoint) -> Measured:
            if unit.name == "search/0.2":
                raise KeyboardInterrupt
            return super().run(unit, checkpoint)

    assert command("run", "toy", "--results", str(tmp_path), experiment=Interrupted) == 130
    assert "goes on" in capsys.readouterr().err
    assert set(Store("toy", tmp_path).results()) == {"search/0.1"}
