"""A whole run: train every layer, measure, write results, tables and pictures; stop and resume anywhere."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import matplotlib
import numpy
import torch
from tqdm import tqdm

from .. import machine
from ..files import write_json, write_text
from . import measurements, pictures, report
from .budget import Budget
from .corpora import Corpus, load
from .settings import Run, Settings, difference
from .training import Trainer, steps_per_epoch

#: A crash loses at most this much training; Ctrl-C loses none.
_SECONDS_BETWEEN_CHECKPOINTS = 60.0
#: Share of a time limit that is kept back, because a calibration of a few steps is off by about as much.
_SPARE = 0.12
#: Seconds that a run needs beside training and evaluation, for drawing and to measure memory in other processes, and
#: those for each layer.
_SECONDS_BESIDE, _SECONDS_BESIDE_PER_LAYER = 8.0, 1.0


class RunError(Exception):
    """The run cannot start, for a reason that its user can do something about."""


class Interrupted(Exception):
    """The user stopped the run, and everything is saved."""


class StopSignal:
    """Ctrl-C as a question that is asked between two training steps, instead of an exception in the middle of one."""

    def __init__(self) -> None:
        self.received = False

    def __call__(self) -> bool:
        return self.received

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within the block the first SIGINT or SIGTERM is noted; a second one has its usual effect."""
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def note(number: int, frame: FrameType | None) -> None:
            self.received = True
            for each, handler in before.items():
                signal.signal(each, handler)

        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Session:
    """A run in its folder: ``run.json`` (what was asked for), ``checkpoints/``, ``results.json``, tables, pictures."""

    def __init__(self, run: Run) -> None:
        self.run, self.settings, self.folder = run, run.settings, run.folder
        self.started = time.monotonic()
        self.stop = StopSignal()
        self.record = self._claim()
        torch.set_num_threads(self.settings.threads)
        self.corpus: Corpus = load(
            self.settings.corpus,
            style=self.settings.text_style,
            vocabulary_size=self.settings.vocabulary_size,
            min_count=self.settings.min_count,
        )

    def _claim(self) -> dict[str, Any]:
        """The content of ``run.json``, old or new."""
        path = self.folder / "run.json"
        asked = self.settings.to_json()
        if path.is_file() and not self.run.overwrite:
            record: dict[str, Any] = json.loads(path.read_text())
            changed = difference(record["settings"], asked)
            if changed:
                raise RunError(
                    f"{self.folder} holds a run with other settings ({changed}): choose another --run-name or --out, "
                    "or say --overwrite"
                )
            if not self.run.resume:
                state = "a finished run" if (self.folder / "results.json").is_file() else "an interrupted run"
                raise RunError(f"{self.folder} holds {state} of these settings: say --resume or --overwrite")
            if record["environment"]["torch"] != torch.__version__:
                print(
                    f"Started with torch {record['environment']['torch']}, resumed with {torch.__version__}: "
                    "the result may differ from that of an uninterrupted run."
                )
            return record
        if self.run.resume and not self.run.overwrite:
            raise RunError(f"{self.folder} holds no run to resume")
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        (self.folder / "results.json").unlink(missing_ok=True)
        record = {"preset": self.run.preset, "settings": asked, "environment": environment(self.settings)}
        write_json(path, record)
        return record

    def execute(self) -> dict[str, Any]:
        """Do what is left to do, and return the results.

        Raises:
            Interrupted: Ctrl-C; the checkpoints are written.
            Diverged: a loss is not finite.
        """
        if "budget" not in self.record:
            self.record["budget"] = self._plan()
            write_json(self.folder / "run.json", self.record)
        plan = self.record["budget"]
        # The list in the record itself: what is planned is written to run.json.
        self.budget = Budget(self.settings.validations, plan["ends"], plan["seconds"])
        print(self._describe_plan())
        finished = self._train_all()
        trainers = [self._trainer(output, self.settings.seeds[0]) for output in self.settings.output]
        results = self._measure(trainers, finished)
        drawn = pictures.draw(results, trainers, self.folder)
        write_text(self.folder / "report.md", report.markdown(results, [path.name for path in drawn]))
        write_json(self.folder / "results.json", results)
        print(f"\n{report.tables(results, 'simple')}\n")
        for path in (*drawn, self.folder / "report.md", self.folder / "results.json"):
            print(path)
        return results

    def _plan(self) -> dict[str, Any]:
        """How long to train, as ``run.json`` has it; under a time limit, rounds are planned one by one later."""
        settings = self.settings
        plan: dict[str, Any] = {"most_steps": None, "ends": [], "seconds": None, "limit": None}
        if settings.minutes is not None:
            return {**plan, "seconds": settings.minutes * 60}
        assert settings.epochs is not None
        most = max(1, round(settings.epochs * steps_per_epoch(self.corpus, settings)))
        if settings.time_limit is None:
            return {**plan, "most_steps": most, "ends": Budget.of_steps(most, settings.validations).ends}
        step, evaluation = self._calibrate()
        stretch = settings.batch_size * settings.length
        evaluated = {
            name: min(len(split.tokens), settings.evaluation_tokens or len(split.tokens)) / stretch
            for name, split in self.corpus.splits.items()
        }
        seeds = len(settings.seeds)
        reserved = (
            _SECONDS_BESIDE
            + _SECONDS_BESIDE_PER_LAYER * len(settings.output)
            + measurements.TIMED_STEPS * step
            + evaluation * seeds * sum(evaluated.values())
        )
        return {
            **plan,
            "most_steps": most,
            "limit": settings.time_limit * 60 * (1 - _SPARE) - (time.monotonic() - self.started) - reserved,
            "calibrated_step_seconds": step * seeds,
            "calibrated_validation_seconds": evaluation * seeds * evaluated["valid"],
        }

    def _calibrate(self) -> tuple[float, float]:
        """Seconds that a training step and the evaluation of as many words take, summed over the output layers."""
        step = evaluation = 0.0
        for output in tqdm(self.settings.output, desc="calibrating", unit="layer", leave=False):
            trainer = Trainer(self.corpus, self.settings, output, 0, Budget.of_steps(6))
            trainer.train(1, self.stop, lambda words, loss: None)
            step += statistics.mean(trainer.step_seconds[2:])
            started = time.perf_counter()
            trainer.perplexity("valid", 2 * self.settings.batch_size * (self.settings.length + 1))
            evaluation += (time.perf_counter() - started) / 2
        return step, evaluation

    def _describe_plan(self) -> str:
        facts = self.corpus.facts()
        return (
            f"{self.settings.corpus}: {len(self.corpus.splits['train'].tokens):,} words for training, "
            f"{facts['vocabulary']:,} known; {self.settings.model}, outputs {', '.join(self.settings.output)}\n"
            f"{self._describe_training(finished=False)}"
        )

    def _describe_training(self, finished: bool) -> str:
        """What each layer got or will get."""
        budget, settings = self.record["budget"], self.settings
        if budget["seconds"] is not None:
            return f"every layer trains for {budget['seconds'] / 60:g} minutes, whatever the number of words in them."
        limited = f"this machine's speed and the limit of {settings.time_limit or 0:g} minutes"
        if budget["limit"] is not None and not finished:
            return f"every layer sees the same words in the same order; {limited} decide how many."
        steps = budget["ends"][-1]
        text = (
            f"every layer sees the same {steps * settings.batch_size * settings.length:,} words in the same order "
            f"({steps / steps_per_epoch(self.corpus, settings):.2f} epochs), so that perplexities compare; "
            "tokens/s shows what each costs."
        )
        if steps < budget["most_steps"]:
            text += f" The number was set by {limited}"
            text += "." if steps > settings.validations else ", which is too short here: it is the least that can be."
        return text

    def _trainer(self, output: str, seed: int) -> Trainer:
        trainer = Trainer(self.corpus, self.settings, output, seed, self.budget)
        path = self._checkpoint(output, seed)
        if path.is_file():
            trainer.load(path)
        return trainer

    def _checkpoint(self, output: str, seed: int) -> Path:
        return self.folder / "checkpoints" / f"{output}-{seed}.pt"

    def _train_all(self) -> dict[tuple[str, int], dict[str, Any]]:
        """Train what is not trained yet; histories and final perplexities by output layer and seed.

        Under a time limit all models advance together, so that a round can be as long as the time left allows.
        Otherwise one seed is done before the next begins, which takes less memory.
        """
        settings = self.settings
        every = [(output, seed) for seed in settings.seeds for output in settings.output]
        if self.record["budget"]["limit"] is not None:
            groups = [every]
        else:
            groups = [[pair for pair in every if pair[1] == seed] for seed in settings.seeds]
        finished = {}
        for group in groups:
            trainers = [self._trainer(*pair) for pair in group]
            with self.stop.watching():
                self._train_group(trainers)
            for trainer in trainers:
                finished[trainer.output, trainer.seed] = {
                    "seed": trainer.seed,
                    "tokens": trainer.tokens,
                    "seconds": trainer.seconds,
                    "median_step_seconds": statistics.median(trainer.step_seconds),
                    "history": trainer.history,
                    "perplexity": trainer.final,
                }
        return finished

    def _train_group(self, trainers: Sequence[Trainer]) -> None:
        rounds, plan = self.settings.validations, self.record["budget"]
        last_saved = time.monotonic()
        by_time = plan["seconds"] is not None
        words_per_step = len(trainers) * self.settings.batch_size * self.settings.length
        total = len(trainers) * plan["seconds"] if by_time else (self.budget.ends or [0])[-1] * words_per_step
        done = sum(trainer.seconds if by_time else trainer.tokens for trainer in trainers)
        unit = " s" if by_time else " words"
        bar = tqdm(total=total, initial=done, unit=unit, unit_scale=not by_time, smoothing=0.05, mininterval=0.5)
        with bar:
            for current in range(1, rounds + 1):
                if not by_time and len(self.budget.ends) < current:
                    self._plan_round(trainers)
                    begin, end = [0, *self.budget.ends][-2:]
                    bar.total = (end + (rounds - current) * (end - begin)) * words_per_step
                for trainer in trainers:
                    if len(trainer.history) >= current:
                        continue
                    bar.set_description(f"{trainer.output}, seed {trainer.seed}")

                    def advance(words: int, loss: float, trainer: Trainer = trainer) -> None:
                        bar.update(min(trainer.step_seconds[-1], total - bar.n) if by_time else words)

                    trainer.train(current / rounds, self.stop, advance)
                    self._stop_if_asked(trainers)
                    trainer.validate()
                    bar.set_postfix_str(f"valid ppl {trainer.history[-1]['valid_perplexity']:.1f}")
                    if time.monotonic() - last_saved > _SECONDS_BETWEEN_CHECKPOINTS:
                        self._save(trainers)
                        last_saved = time.monotonic()
                    self._stop_if_asked(trainers)
        for trainer in tqdm(trainers, desc="evaluating", unit="model", leave=False):
            if trainer.final is None:
                trainer.finish()
            self._stop_if_asked(trainers)
        self._save(trainers)

    def _plan_round(self, trainers: Sequence[Trainer]) -> None:
        """Decide how long the next round is, from the time that is left and the speed in the last one."""
        plan, done = self.record["budget"], len(self.budget.ends)
        if done:
            begin = [0, *self.budget.ends][-2]
            step = sum(statistics.mean(trainer.step_seconds[begin:]) for trainer in trainers)
            validation = sum(trainer.evaluation_seconds for trainer in trainers) / done
        else:
            step, validation = plan["calibrated_step_seconds"], plan["calibrated_validation_seconds"]
        spent = sum(trainer.seconds + trainer.evaluation_seconds for trainer in trainers)
        self.budget.plan_round(plan["most_steps"], plan["limit"] - spent, step, validation)
        write_json(self.folder / "run.json", self.record)

    def _save(self, trainers: Sequence[Trainer]) -> None:
        for trainer in trainers:
            trainer.save(self._checkpoint(trainer.output, trainer.seed))

    def _stop_if_asked(self, trainers: Sequence[Trainer]) -> None:
        if self.stop():
            self._save(trainers)
            raise Interrupted

    def _measure(self, trainers: Sequence[Trainer], finished: dict[tuple[str, int], dict[str, Any]]) -> dict[str, Any]:
        seconds = measurements.layer_seconds(trainers)
        peaks, problem = measurements.layer_bytes(self.settings, len(self.corpus.vocabulary))
        layers: list[dict[str, Any]] = []
        for trainer, layer_seconds in zip(
            tqdm(trainers, desc="spectrum", unit="layer", leave=False), seconds, strict=True
        ):
            function = measurements.transform(trainer)
            layers.append(
                {
                    "output": trainer.output,
                    "parameters": measurements.parameters(trainer),
                    "backend": measurements.backend(trainer),
                    "layer_seconds": layer_seconds,
                    "peak_bytes": peaks.get(trainer.output),
                    "spectrum": measurements.spectrum(trainer),
                    "transform": None
                    if function is None
                    else {name: value.tolist() for name, value in function.state_dict().items()},
                    "runs": [finished[trainer.output, seed] for seed in self.settings.seeds],
                }
            )
        return {
            **self.record,
            "data": self.corpus.facts(),
            "training": {"description": self._describe_training(finished=True)},
            "peak_problem": problem,
            "summary": report.summary(layers, self.settings.batch_size * self.settings.length),
            "layers": layers,
        }


def environment(settings: Settings) -> dict[str, Any]:
    """Versions and machine, without its name."""
    device = torch.device(settings.device)
    return {
        **machine.environment(),
        "numpy": numpy.__version__,
        "matplotlib": matplotlib.__version__,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def resume_command(arguments: Sequence[str]) -> str:
    """The command line that takes up the run that ``arguments`` started."""
    kept = [argument for argument in arguments if argument not in ("--resume", "--overwrite")]
    return shlex.join(["python", "-m", "benchmarks.language_model", *kept, "--resume"])
