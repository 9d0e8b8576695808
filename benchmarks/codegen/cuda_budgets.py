"""All budgets of the CUDA kernels, each with its reason, and what keeps or breaks them.

None is about time: no kernel is run. A budget that is broken is work to do on the kernels, unless the code has changed
for a reason: then the table says so. Instructions are the static ones of the main loops, for the main target, bf16 and
rows of 50304 logits: all code of the loops, both sides of every branch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .cuda_configurations import (
    BACKWARD,
    LOG_SOFTMAX,
    LOG_SOFTMAX_BACKWARD,
    LOSS,
    LOSS_ALL,
    LOSS_INPUT,
    STATISTICS,
    Configuration,
)
from .cuda_devices import DEVICES
from .cuda_measure import MAIN_TARGET, KernelFacts, Measurement, Measurements
from .verdict import Verdict

_CHUNK = "chunks of 16 bytes: an eighth of the instructions of accesses of 2 bytes"


@dataclass(frozen=True)
class KernelBudget:
    """The most (or least) that a figure of a kernel may be; of all targets the worst counts. None: it has none."""

    name: str
    limit: float
    reason: str
    figure: Callable[[KernelFacts], float | None]
    at_least: bool = False


def _async(each: KernelFacts) -> float | None:
    if each.async_copies is None or not DEVICES[each.target].has_async_copies:
        return None
    return float(each.async_copies)


#: Of every kernel that is compiled, for every target.
KERNELS: tuple[KernelBudget, ...] = (
    KernelBudget("spilled bytes", 0, "a spilled register is a store and a load", lambda each: each.spills),
    KernelBudget("bytes of stack", 0, "no array is in a thread's own memory", lambda each: each.stack),
    KernelBudget("accesses of local memory", 0, "as no byte of stack", lambda each: each.local_accesses),
    KernelBudget("bytes loaded at once of chunks", 16, _CHUNK, lambda each: each.load_bytes, True),
    KernelBudget("bytes stored at once of chunks", 16, _CHUNK, lambda each: each.store_bytes, True),
    KernelBudget("copies past the registers", 1, "from sm_80 on: no thread waits for what it copies", _async, True),
    KernelBudget("registers", 128, "two blocks of 256 threads to a multiprocessor", lambda each: each.registers),
)

#: The contract of the project: instructions per element of PLIF with all gradients.
CONTRACT = {(LOSS_ALL, transform): 40.0 for transform in ("plif-4", "plif-50", "plif-64")}

#: What the instructions of an operator are for.
_SWEEPS = {
    LOSS: "one sweep: f, the largest y and the exponential",
    LOSS_INPUT: "a copy, the largest logit, the sum and the gradient; of plif-5000 as a loss and a backward pass",
    LOSS_ALL: "as without the coefficients' gradients, and their sums",
    BACKWARD: "one sweep: the gradient and the sums",
    STATISTICS: "a loss, and a sweep for entropy, argmax and rank",
    LOG_SOFTMAX: "a loss, and a sweep that writes; for results of each type, and of any alignment",
    LOG_SOFTMAX_BACKWARD: "a sum of upstream gradients, and the gradient; for those of each type and alignment",
}

#: Instructions per element, by operator and transform: 2 % above what they were when this was written, so that more is
#: seen. Less is not: lower the limit then.
INSTRUCTIONS: dict[str, dict[str, float]] = {
    LOSS: {
        "identity": 7.5,
        "temperature": 8.5,
        "sigsoftmax": 15.75,
        "gss": 18.75,
        "soft_cap": 26,
        "sigmoid_cap": 16.75,
        "plif-4": 13.75,
        "plif-50": 13.75,
        "plif-64": 13.75,
        "plif-1000": 13.75,
        "plif-5000": 18.75,
        "spline-16": 98.25,
        "mlp-8": 141,
    },
    LOSS_INPUT: {
        "identity": 17,
        "temperature": 20.25,
        "sigsoftmax": 38.5,
        "gss": 46.75,
        "soft_cap": 60,
        "sigmoid_cap": 43.5,
        "plif-4": 30.25,
        "plif-50": 30.25,
        "plif-64": 30.25,
        "plif-1000": 30.25,
        "plif-5000": 41.75,
        "spline-16": 207,
        "mlp-8": 320,
    },
    LOSS_ALL: {
        "temperature": 23.75,
        "gss": 53.25,
        "soft_cap": 70,
        "sigmoid_cap": 48,
        "plif-4": 40,
        "plif-50": 40,
        "plif-64": 40,
        "plif-1000": 183,
        "plif-5000": 183,
        "spline-16": 248,
        "mlp-8": 559,
    },
    BACKWARD: {
        "identity": 10.25,
        "temperature": 16,
        "sigsoftmax": 23.5,
        "gss": 35.25,
        "soft_cap": 44,
        "sigmoid_cap": 31.75,
        "plif-4": 27.5,
        "plif-50": 27.5,
        "plif-64": 27.5,
        "plif-1000": 164,
        "plif-5000": 164,
        "spline-16": 151,
        "mlp-8": 420,
    },
    STATISTICS: {
        "identity": 28,
        "temperature": 30,
        "sigsoftmax": 44.25,
        "gss": 50.25,
        "soft_cap": 64.75,
        "sigmoid_cap": 46.25,
        "plif-4": 40.75,
        "plif-50": 40.75,
        "plif-64": 40.75,
        "plif-1000": 40.75,
        "plif-5000": 50.5,
        "spline-16": 209,
        "mlp-8": 297,
    },
    LOG_SOFTMAX: {
        "identity": 23.5,
        "temperature": 25.5,
        "sigsoftmax": 39.75,
        "gss": 46,
        "soft_cap": 60.25,
        "sigmoid_cap": 41.75,
        "plif-4": 36.25,
        "plif-50": 36.25,
        "plif-64": 36.25,
        "plif-1000": 36.25,
        "plif-5000": 46.25,
        "spline-16": 254,
        "mlp-8": 294,
    },
    LOG_SOFTMAX_BACKWARD: {
        "identity": 35,
        "temperature": 37.75,
        "sigsoftmax": 45.25,
        "gss": 57.75,
        "soft_cap": 69.5,
        "sigmoid_cap": 53.5,
        "plif-4": 49.25,
        "plif-50": 49.25,
        "plif-64": 49.25,
        "plif-1000": 191,
        "plif-5000": 191,
        "spline-16": 173,
        "mlp-8": 439,
    },
}


def judge(measurements: Measurements) -> list[Verdict]:
    """Every budget, held against what there are measurements for."""
    found = [verdict for budget in KERNELS for verdict in _of_kernels(budget, measurements.kernels)]
    found += _instructions(measurements.configurations)
    return [*found, *_launches(measurements.configurations)]


def _of_kernels(budget: KernelBudget, kernels: Sequence[KernelFacts]) -> Iterator[Verdict]:
    groups: dict[tuple[str, str], list[tuple[float, KernelFacts]]] = {}
    for each in kernels:
        value = budget.figure(each)
        if value is not None:
            groups.setdefault((each.kernel, each.dtype), []).append((value, each))
    choose = min if budget.at_least else max
    for group in groups.values():
        value, worst = choose(group, key=lambda each: each[0])
        where = worst.target if len(group) == 1 else f"{len(group)} targets, worst of them {worst.target}"
        subject = f"{worst.kernel}{f' ({worst.dtype})' if worst.dtype else ''} for {where}"
        yield Verdict(budget.name, subject, value, budget.limit, budget.reason, budget.at_least)


def _instructions(measurements: Sequence[Measurement]) -> Iterator[Verdict]:
    name = "static instructions per element of the main loops"
    for each in measurements:
        one, count = each.configuration, each.figures.main
        if each.target != MAIN_TARGET or one != Configuration(one.transform, one.operator):
            continue
        subject = f"{one} for {each.target}"
        if (one.operator, one.transform) in CONTRACT:
            yield Verdict(name, subject, count, CONTRACT[one.operator, one.transform], "the contract of the project")
        # Of what has no limit, nothing is kept.
        limit = INSTRUCTIONS.get(one.operator, {}).get(one.transform, 0.0)
        yield Verdict(name, subject, count, limit, _SWEEPS[one.operator])


def _launches(measurements: Sequence[Measurement]) -> Iterator[Verdict]:
    """That what is planned can be launched: the plans know the kernels' static memory by a limit only."""
    groups: dict[Configuration, list[Measurement]] = {}
    for each in measurements:
        groups.setdefault(each.configuration, []).append(each)
    for one, group in groups.items():
        worst = min(group, key=lambda each: each.blocks)
        where = worst.target if len(group) == 1 else f"{len(group)} targets, worst of them {worst.target}"
        reason = "a block of the plan has its registers and shared memory"
        yield Verdict("blocks of a multiprocessor", f"{one} for {where}", worst.blocks, 1, reason, True)
