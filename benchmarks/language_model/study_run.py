"""Running a study: one file for each run, by any number of processes together, stopped and taken up again anywhere.

A process claims a run by a lock on a file in ``scratch``; the system gives the lock back when the process ends, however
it ends. Results are written whole or not at all, so that whatever is there is a valid result.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..claims import claimed
from ..files import write_json
from ..machine import environment, machine_changes
from . import measurements
from .budget import Budget
from .corpora import Corpus, load
from .run import Interrupted, StopSignal
from .settings import Settings, require_device
from .study import Study, StudyError, Unit, read_result
from .training import Diverged, Trainer, steps_per_epoch

_ROOT = Path(__file__).parents[2]
#: Where results and, outside of git, locks and checkpoints are; each has a folder for each study.
RESULTS = _ROOT / "benchmarks" / "results" / "language_model"
SCRATCH = _ROOT / "build" / "locks" / "language_model"

_SECONDS_BETWEEN_CHECKPOINTS = 60.0
_SECONDS_BETWEEN_POLLS = 2.0
#: Coefficients of f are stored up to this many: published PLIF has 100,000 of them.
_MOST_COEFFICIENTS = 1000
#: Quantiles of the logits, which tell over which range f is used.
_QUANTILES = (0.0, 0.001, 0.01, 0.5, 0.99, 0.999, 1.0)
#: Relative difference of perplexities and losses that another machine may have.
TOLERANCE = 0.02


def run_study(study: Study, folder: Path, scratch: Path, limit_minutes: float | None = None) -> bool:
    """Do the runs of ``study`` that are neither done nor being done by another process.

    Args:
        study: what to run.
        folder: of the results of this study.
        scratch: for locks and checkpoints.
        limit_minutes: start no run after so many minutes.

    Returns:
        Whether nothing is left, apart from runs that other processes are in the middle of.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; a checkpoint of the current run is written.
        StudyError: a result was made with other settings.
        SettingsError: the device does not exist here.
    """
    started, stop = time.monotonic(), StopSignal()
    with stop.watching():
        while True:
            left = [unit for unit in study.units(folder) if read_result(folder, unit) is None]
            if not left:
                return True
            if limit_minutes is not None and time.monotonic() - started > limit_minutes * 60:
                print(f"The limit of {limit_minutes:g} minutes is reached; {len(left)} runs are left.")
                return False
            if stop():
                raise Interrupted
            if not _do_one(left, folder, scratch, stop):
                # All that could be done is being done elsewhere. What waits for its learning rate is done when those
                # are, by whoever is free then.
                if all(unit.settings is not None for unit in left):
                    print(f"Other processes are at the last {len(left)} runs.")
                    return True
                time.sleep(_SECONDS_BETWEEN_POLLS)


def _do_one(left: list[Unit], folder: Path, scratch: Path, stop: StopSignal) -> bool:
    """Claim the first run that can be claimed, and do it; False where there is none."""
    for unit in left:
        if unit.settings is None:
            continue
        with claimed(scratch / unit.path.with_suffix(".lock")) as mine:
            # Another process may have finished it since ``left`` was made.
            if not mine or (folder / unit.path).is_file():
                continue
            print(f"{time.strftime('%H:%M:%S')} {unit.describe()}", flush=True)
            result = run_unit(unit, scratch / unit.path.with_suffix(".pt"), stop)
            write_json(folder / unit.path, result)
            print(f"{time.strftime('%H:%M:%S')}   {describe_result(result)}", flush=True)
            return True
    return False


def describe_result(result: dict[str, Any]) -> str:
    """Perplexities and time of a run, for the terminal."""
    if result["diverged"]:
        return f"diverged: {result['diverged']}"
    perplexities = ", ".join(f"{split} {value:.2f}" for split, value in result["perplexity"].items())
    return f"perplexity {perplexities}; {result['tokens']:,} words in {result['wall_seconds']:.0f} s"


def run_unit(unit: Unit, checkpoint: Path, stop: Callable[[], bool]) -> dict[str, Any]:
    """Train and evaluate one model. A training that diverges is a result too.

    Args:
        unit: the run, whose settings are known.
        checkpoint: written when ``stop()`` is true, and every minute or so; taken up where it is there.
        stop: asked between steps.

    Raises:
        Interrupted: ``stop()`` was true.
    """
    settings = unit.settings
    assert settings is not None
    require_device(settings)
    checkpoint = checkpoint.with_name(f"{checkpoint.stem}-{_fingerprint(settings)}.pt")
    with _deterministic(settings):
        corpus = prepared(settings)
        trainer = Trainer(corpus, settings, unit.row.output, unit.seed, _budget(corpus, settings))
        if checkpoint.is_file():
            trainer.load(checkpoint)
        began, seconds_before = time.perf_counter(), trainer.seconds + trainer.evaluation_seconds
        diverged = None
        try:
            _train(trainer, checkpoint, stop)
        except Diverged as error:
            diverged = str(error)
        result = {
            "cell": unit.cell,
            "label": unit.row.label,
            "output": unit.row.output,
            "kind": unit.kind,
            "seed": unit.seed,
            "settings": settings.to_json(),
            "chosen": unit.chosen,
            "diverged": diverged,
            "parameters": measurements.parameters(trainer),
            "backend": measurements.backend(trainer),
            "tokens": trainer.tokens,
            "seconds": trainer.seconds,
            "median_step_seconds": statistics.median(trainer.step_seconds),
            "history": trainer.history,
            "data": corpus.facts(),
        }
        if diverged is None:
            result |= _evaluate(trainer, unit.kind)
        result["wall_seconds"] = seconds_before + time.perf_counter() - began
        result["environment"] = environment() | {"gpu": _gpu(settings)}
    checkpoint.unlink(missing_ok=True)
    return result


def _train(trainer: Trainer, checkpoint: Path, stop: Callable[[], bool]) -> None:
    rounds, saved = trainer.budget.rounds, time.monotonic()
    while len(trainer.history) < rounds:
        due = saved + _SECONDS_BETWEEN_CHECKPOINTS
        until = (len(trainer.history) + 1) / rounds

        def pause(due: float = due) -> bool:
            return stop() or time.monotonic() > due

        trainer.train(until, pause, lambda words, loss: None)
        # With the tolerance of Trainer.train.
        finished = trainer.progress >= until - 1e-9
        if finished:
            trainer.validate()
        if stop() or time.monotonic() > due:
            trainer.save(checkpoint)
            saved = time.monotonic()
        if stop():
            raise Interrupted


def _evaluate(trainer: Trainer, kind: str) -> dict[str, Any]:
    """Perplexities of the final weights; of the runs that are compared also the loss of each document, and f."""
    tokens = trainer.settings.evaluation_tokens
    if kind == "search":
        return {"perplexity": {"valid": trainer.history[-1]["valid_perplexity"]}}
    documents = {}
    for split in ("valid", "test"):
        losses, counts = trainer.document_losses(split, tokens)
        documents[split] = {"losses": losses, "tokens": counts}
    result: dict[str, Any] = {
        "perplexity": {
            split: math.exp(math.fsum(each["losses"]) / sum(each["tokens"])) for split, each in documents.items()
        },
        "documents": documents,
        "transform": _coefficients(trainer),
    }
    if trainer.seed == 0:
        result["spectrum"] = measurements.spectrum(trainer)
        # For a picture; five digits are more than it shows.
        result["spectrum"]["singular_values"] = [float(f"{v:.5g}") for v in result["spectrum"]["singular_values"]]
        result["logits"] = _logit_quantiles(trainer)
    return result


def _coefficients(trainer: Trainer) -> dict[str, Any] | None:
    """The parameters of f, where it has any and not more than can be looked at."""
    function = measurements.transform(trainer)
    if function is None:
        return None
    state = function.state_dict()
    if sum(value.numel() for value in state.values()) > _MOST_COEFFICIENTS:
        return None
    return {name: value.tolist() for name, value in state.items()}


def _logit_quantiles(trainer: Trainer) -> dict[str, float] | None:
    if measurements.transform(trainer) is None:
        return None
    values = measurements.logits(trainer).flatten().sort().values
    return {f"{q:g}": values[round(q * (len(values) - 1))].item() for q in _QUANTILES}


# Listing and verifying


def estimate(study: Study, folder: Path) -> list[tuple[Unit, bool, float | None]]:
    """Every run, whether it is done, and how many seconds it took or will take, by the speed of runs that are done.

    The speed is that of the same row, else of the same cell, else unknown (None).
    """
    units = study.units(folder)
    results = [read_result(folder, unit) for unit in units]
    speeds: dict[tuple[str, ...], list[float]] = {}
    for unit, result in zip(units, results, strict=True):
        if result is not None and result["tokens"]:
            speed = result["wall_seconds"] / result["tokens"]
            for key in ((unit.cell,), (unit.cell, unit.row.label)):
                speeds.setdefault(key, []).append(speed)
    found = []
    for unit, result in zip(units, results, strict=True):
        seconds = None
        if result is not None:
            seconds = result["wall_seconds"]
        else:
            known = speeds.get((unit.cell, unit.row.label)) or speeds.get((unit.cell,))
            if known:
                seconds = statistics.mean(known) * _words(study, unit)
        found.append((unit, result is not None, seconds))
    return found


def _words(study: Study, unit: Unit) -> int:
    settings = unit.settings or unit.row.settings
    if unit.settings is None and unit.kind == "search":
        search = next(cell for cell in study.cells if cell.name == unit.cell).search
        assert search is not None
        epochs = search.epochs
    else:
        assert settings.epochs is not None
        epochs = settings.epochs
    steps = max(1, round(epochs * steps_per_epoch(prepared(settings), settings)))
    return steps * settings.batch_size * settings.length


def list_runs(study: Study, folder: Path) -> str:
    """A line for each run, and the time that is left."""
    lines, left, unknown, missing = [], 0.0, 0, 0
    for unit, done, seconds in estimate(study, folder):
        state = "done" if done else "waits" if unit.settings is None else "ready"
        time_text = "?" if seconds is None else f"{seconds:.0f} s"
        lines.append(f"{state:5}  {time_text:>7}  {unit.describe()}")
        if not done:
            missing += 1
            left += seconds or 0.0
            unknown += seconds is None
    tail = f"{missing} of {len(lines)} runs are left"
    if missing > unknown:
        tail += f": about {left / 60:.0f} minutes of one process"
    if unknown:
        tail += f"; how long {unknown} of them take is not known before a run of their cell is done"
    return "\n".join([*lines, tail + "."])


def verify(study: Study, folder: Path, scratch: Path) -> bool:
    """Repeat the small run of ``study`` from its stored settings, compare the figures, and print what was found.

    On the machine that the stored figures are from they must be the same to the bit; elsewhere they may differ by
    ``TOLERANCE``.

    Raises:
        StudyError: it was not run yet.
    """
    stored = read_result(folder, study.verify)
    if stored is None:
        raise StudyError(f"{folder / study.verify.path} is not there: run the study first")
    checkpoint = scratch / f"verify-{os.getpid()}.pt"
    result = run_unit(study.verify, checkpoint, lambda: False)
    figures, before = _figures(result), _figures(stored)
    if not machine_changes(stored["environment"], result["environment"]):
        right = figures == before
        print(f"Same machine: {len(figures)} figures {'are the same to the bit' if right else 'DIFFER'}.")
    else:
        pairs = zip(figures, before, strict=True)
        right = len(figures) == len(before) and all(math.isclose(a, b, rel_tol=TOLERANCE) for a, b in pairs)
        words = f"agree within {TOLERANCE:g}" if right else f"DIFFER by more than {TOLERANCE:g}"
        print(f"Another machine, torch or number of threads: {len(figures)} figures {words} of their values.")
    return right


def _figures(result: dict[str, Any]) -> list[float]:
    return [
        *(result["perplexity"][split] for split in ("valid", "test")),
        *(point["valid_perplexity"] for point in result["history"]),
        *(loss for split in ("valid", "test") for loss in result["documents"][split]["losses"]),
    ]


def prepared(settings: Settings) -> Corpus:
    """The corpus that ``settings`` ask for."""
    return _prepared(settings.corpus, settings.text_style, settings.vocabulary_size, settings.min_count)


@lru_cache(maxsize=2)
def _prepared(name: str, style: str, vocabulary_size: int | None, min_count: int) -> Corpus:
    return load(name, style=style, vocabulary_size=vocabulary_size, min_count=min_count)


def _budget(corpus: Corpus, settings: Settings) -> Budget:
    assert settings.epochs is not None
    return Budget.of_steps(
        max(1, round(settings.epochs * steps_per_epoch(corpus, settings))), rounds=settings.validations
    )


def _fingerprint(settings: Settings) -> str:
    return hashlib.sha256(json.dumps(settings.to_json(), sort_keys=True).encode()).hexdigest()[:12]


def _gpu(settings: Settings) -> str | None:
    return torch.cuda.get_device_name(settings.device) if settings.device.startswith("cuda") else None


@contextmanager
def _deterministic(settings: Settings) -> Iterator[None]:
    """Within the block torch has the threads of ``settings`` and computes the same each time."""
    threads, before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    if settings.device.startswith("cuda"):
        # cuBLAS is deterministic only with a workspace of its own; it reads this when CUDA starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(settings.threads)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.set_num_threads(threads)
