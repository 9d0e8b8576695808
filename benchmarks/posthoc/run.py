"""Running what is not there yet: hidden states, f alone, f and the head; and running a part of it again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..claims import claimed, lock_of
from ..machine import environment, machine_changes
from . import records
from .calibration import evaluate, histogram, nll, spectra
from .fit_head import fit, measure
from .fit_transforms import Fit, parameters_of, with_parameters
from .settings import STAGES, TRANSFORMS, Settings
from .states import MODEL, States

#: Losses of a token on another machine may differ by as much: its states, sums and steps are rounded in other ways.
NLL_TOLERANCE = 2e-3
VERIFIED = "temperature"


class Study:
    """The runs on some hidden states, with their results in a folder.

    Args:
        states: hidden states and head.
        settings: of all stages.
        folder: of the results.
        scratch: for the checkpoint of stage 1.
        deadline: of ``time.monotonic``; no run is started after it.
        say: told about the progress.
    """

    def __init__(
        self,
        states: States,
        settings: Settings,
        folder: Path,
        scratch: Path,
        deadline: float = math.inf,
        say: Callable[[str], None] = print,
    ) -> None:
        self.states, self.settings, self.folder, self.scratch = states, settings, folder, scratch
        self.deadline, self.say = deadline, say

    def run(self, stages: tuple[str, ...] = STAGES) -> bool:
        """Run what is missing of the stages; returns whether they are complete.

        Raises:
            RecordError: there are results of other settings or hidden states.
            Diverged: a loss is not finite.
        """
        tasks = {"states": self._describe, "transforms": self._transforms, "head": self._head}
        return all(tasks[stage]() for stage in stages)

    def _late(self) -> bool:
        return time.monotonic() > self.deadline

    def _unit_settings(self, *parts: str) -> dict[str, Any]:
        found = self.settings.to_json(*parts)
        if "head" in found:
            # Which other rates and seeds there are makes no difference to a run.
            found["head"] = {name: value for name, value in found["head"].items() if name not in ("rates", "seeds")}
        return found

    def _stored(self, unit: str, *parts: str) -> dict[str, Any] | None:
        settings = self._unit_settings(*parts)
        return records.read_matching(self.folder, unit, settings, self.states.digest)

    def _write(self, unit: str, *parts: str, **content: Any) -> None:
        start = {"settings": self._unit_settings(*parts), "states": self.states.facts()}
        records.write(self.folder, unit, {**start, **content, "environment": environment()})

    def _describe(self) -> bool:
        parts = ("states", "evaluation", "threads")
        if self._stored("states", *parts) is None:
            test = self.states.splits["test"]
            self._write(
                "states",
                *parts,
                model=MODEL,
                test_documents=list(test.documents),
                test_tokens=test.counts(),
                logits=histogram(test, self.states.head, self.settings.evaluation),
            )
        return True

    def _transforms(self) -> bool:
        parts = ("states", "transforms", "evaluation", "threads")

        def missing() -> list[str]:
            return [name for name in TRANSFORMS if self._stored(records.transform_unit(name), *parts) is None]

        if not missing():
            return True
        # One unit: all contestants share the logits.
        with claimed(lock_of(self.folder, "transforms")) as mine:
            names = missing()
            if not mine or self._late():
                self.say("f alone: " + ("no time is left" if mine else "another process is at it"))
                return False
            if names:
                return self._fit_transforms(names, parts)
        return True

    def _fit_transforms(self, names: list[str], parts: tuple[str, ...]) -> bool:
        states, evaluation = self.states, self.settings.evaluation
        fitted = Fit(states, {name: TRANSFORMS[name] for name in names}, self.settings.transforms)
        checkpoint = self.scratch / f"fit-{fitted.key}.pt"
        if not fitted.run(checkpoint, self.deadline, self.say):
            return False
        labels = {f"{name} {rate:g}": (name, rate) for name, rate in fitted.transforms}
        valid = evaluate(
            states.splits["valid"],
            states.head,
            {label: fitted.transforms[entry] for label, entry in labels.items()},
            evaluation,
        )
        counts = states.splits["valid"].counts()
        losses = {entry: nll(valid[label]["document_nll"], counts) for label, entry in labels.items()}
        chosen = {name: min((e for e in losses if e[0] == name), key=lambda e: losses[e]) for name in names}
        self.say("f alone: testing")
        transforms = {name: fitted.transforms[entry] for name, entry in chosen.items()}
        test = states.splits["test"]
        figures = evaluate(test, states.head, transforms, evaluation)
        spectrum = spectra(test, states.head, transforms, evaluation.rank_contexts)
        for name, entry in chosen.items():
            search = [
                {"rate": rate, "valid_nll": losses[one, rate], "late_fit_nll": fitted.late_loss((one, rate))}
                for one, rate in losses
                if one == name
            ]
            self._write(
                records.transform_unit(name),
                *parts,
                transform=TRANSFORMS[name].label,
                search=search,
                rate=entry[1],
                valid_nll=losses[entry],
                parameters=parameters_of(transforms[name]),
                learned=sum(parameter.numel() for parameter in transforms[name].parameters()),
                test={
                    "nll": nll(figures[name]["document_nll"], test.counts()),
                    **figures[name],
                    **spectrum[name],
                },
            )
        checkpoint.unlink()
        return True

    def _head(self) -> bool:
        methods = records.head_methods(self.folder)
        if not methods:
            self.say("f and the head: stage 1 is not complete, run it first: --only transforms")
            return False
        head = self.settings.head
        complete = True
        # The rates under the first seed for all methods, then the other seeds: what there is can be compared early.
        for name in methods.values():
            for rate in head.rates:
                complete &= self._head_unit(name, rate, head.seeds[0])
        for seed in head.seeds[1:]:
            for name in methods.values():
                rate = records.chosen_rate(records.head_records(self.folder, name, head), head)
                complete &= rate is not None and self._head_unit(name, rate, seed)
        return complete

    def _head_unit(self, name: str, rate: float, seed: int) -> bool:
        unit, parts = records.head_unit(name, rate, seed), ("states", "transforms", "head", "evaluation", "threads")
        if self._stored(unit, *parts) is not None:
            return True
        if self._late():
            return False
        with claimed(lock_of(self.folder, unit)) as mine:
            if not mine:
                return False
            if self._stored(unit, *parts) is None:
                began = time.monotonic()
                first = self._stored(records.transform_unit(name), "states", "transforms", "evaluation", "threads")
                assert first is not None
                transform = with_parameters(TRANSFORMS[name].make(), first["parameters"])
                found = measure(
                    self.states,
                    fit(self.states, transform, rate, seed, self.settings.head),
                    self.settings.evaluation,
                    # It takes a third of the time of a test, and differs little between seeds.
                    spectrum=seed == self.settings.head.seeds[0],
                )
                self._write(unit, *parts, transform=TRANSFORMS[name].label, rate=rate, seed=seed, **found)
                self.say(f"{unit}: test {found['test']['nll']:.4f}, {time.monotonic() - began:.0f} s")
        return True


def verify(states: States, settings: Settings, folder: Path, say: Callable[[str], None] = print) -> bool:
    """Fit the temperature of stage 1 again and test it; returns whether the figures are as stored.

    On the same machine, torch and hidden states they must be the same bit for bit; elsewhere, losses must agree to
    ``NLL_TOLERANCE``, and what is learned is shown.

    Raises:
        RecordError: nothing is stored, or it has other settings.
    """
    unit, parts = records.transform_unit(VERIFIED), ("states", "transforms", "evaluation", "threads")
    stored = records.read(folder, unit)
    if stored is None:
        raise records.RecordError(f"{folder / unit}.json is not there: run python -m benchmarks.posthoc first")
    if stored["settings"] != settings.to_json(*parts):
        raise records.RecordError(f"{folder / unit}.json has other settings than this command")
    fitted = Fit(states, {VERIFIED: TRANSFORMS[VERIFIED]}, settings.transforms)
    for entry in list(fitted.transforms):
        if entry[1] != stored["rate"]:
            del fitted.transforms[entry], fitted.optimizers[entry], fitted.late_losses[entry]
    fitted.run(say=say)
    transform = fitted.transforms[VERIFIED, stored["rate"]]
    test = states.splits["test"]
    figures = evaluate(test, states.head, {VERIFIED: transform}, settings.evaluation)[VERIFIED]
    new = {"nll": nll(figures["document_nll"], test.counts()), **figures}
    here = environment()
    same = not machine_changes(stored["environment"], here)
    same &= stored["states"]["digest"] == states.digest
    old = {name: stored["test"][name] for name in new}
    if same:
        agree = old == new and stored["parameters"] == parameters_of(transform)
        wanted = "same machine and hidden states, must be the same bit for bit"
    else:
        agree = abs(old["nll"] - new["nll"]) <= NLL_TOLERANCE
        wanted = f"another machine or other hidden states, a loss may differ by {NLL_TOLERANCE:g}"
    say(
        f"{unit}: {'agree' if agree else 'DIFFER'} ({wanted})\n"
        f"  stored nll {stored['test']['nll']!r}, {stored['parameters']}\n"
        f"  new    nll {new['nll']!r}, {parameters_of(transform)}"
    )
    return agree
