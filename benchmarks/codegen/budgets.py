"""All budgets of the compiled kernels, each with its reason, and what keeps or breaks them.

None is about time: no kernel is run. They are about what takes time on every GPU that the kernels are compiled for:
registers that went to memory, narrow accesses, instructions. A budget that is broken is work to do on the kernels: it
is not moved to what they happen to need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .configurations import (
    ALIGNED,
    BACKWARD,
    HEAD_BACKWARD,
    HEAD_LOSS,
    LOG_SOFTMAX,
    LOG_SOFTMAX_BACKWARD,
    LOSS,
    LOSS_ALL,
    LOSS_IN_PLACE,
    LOSS_INPUT,
    SHIFTED,
    STATISTICS,
    Configuration,
)
from .measure import MAIN_TARGET, Measurement
from .peers import Peer
from .verdict import Verdict

_CLOSED_FORMS = ("temperature", "sigsoftmax", "gss", "soft_cap", "sigmoid_cap")
_PLIF = ("plif-4", "plif-50", "plif-64")
_BUT_THE_SPLINE = ("identity", *_CLOSED_FORMS, *_PLIF, "plif-1000", "mlp-8")
_GRADIENTS = (LOSS_INPUT, LOSS_ALL, LOSS_IN_PLACE, BACKWARD)
_TRAINING = (LOSS, *_GRADIENTS)


@dataclass(frozen=True)
class Budget:
    """The most (or least) that a figure of some configurations may be."""

    name: str
    limit: float
    reason: str
    figure: Callable[[Measurement], float | None]
    operators: tuple[str, ...] = ()
    transforms: tuple[str, ...] = ()
    classes: tuple[int, ...] = (ALIGNED,)
    dtypes: tuple[str, ...] = ("bf16",)
    #: None: all, of which the worst counts.
    target: str | None = MAIN_TARGET
    with_options: bool = False
    #: Those of sliced logits among them.
    sliced: bool = True
    at_least: bool = False

    def takes(self, measurement: Measurement) -> bool:
        """Whether the budget is one of this measurement. What it does not name may be anything."""
        one = measurement.configuration
        return isinstance(one, Configuration) and all(
            (
                not self.operators or one.operator in self.operators,
                not self.transforms or one.transform in self.transforms,
                not self.classes or one.classes in self.classes,
                not self.dtypes or one.dtype in self.dtypes,
                self.target in (None, measurement.target),
                self.with_options or not (one.all_options or one.deterministic),
                self.sliced or not one.sliced,
            )
        )

    def verdicts(self, measurements: Sequence[Measurement]) -> Iterator[Verdict]:
        """One for each configuration."""
        groups: dict[Configuration | Peer, list[tuple[float, Measurement]]] = {}
        for each in measurements:
            value = self.figure(each) if self.takes(each) else None
            if value is not None:
                groups.setdefault(each.configuration, []).append((value, each))
        choose = min if self.at_least else max
        for group in groups.values():
            value, worst = choose(group, key=lambda each: each[0])
            yield Verdict(self.name, _subject(worst, group), value, self.limit, self.reason, self.at_least)


def _main(measurement: Measurement) -> float | None:
    return measurement.main


def _whole(measurement: Measurement) -> float | None:
    return measurement.whole


def _registers(measurement: Measurement) -> float:
    return measurement.registers


_SPILLS = Budget(
    "spilled bytes",
    0,
    "a spilled register is a store and a load for each tile; nothing is spilled anywhere, for any target",
    lambda each: each.spills,
    classes=(),
    dtypes=(),
    target=None,
    with_options=True,
)

_LOADS = Budget(
    "bytes loaded at once by the loops over full tiles",
    16,
    "an eighth of the load instructions of 2-byte loads, in rows of any alignment",
    lambda each: each.main_load_bytes,
    operators=(*_TRAINING, LOG_SOFTMAX),
    classes=(),
    dtypes=(),
    at_least=True,
)

#: By arithmetic, issued instructions bound a loss before memory does from about 17 per element on (bf16, H100: 132
#: multiprocessors of 128 lanes at 1.755 GHz against 3.35 TB/s). The limits are the project's contract.
_INSTRUCTIONS = (
    Budget("instructions per element", 11, "the plain loss: far from that bound", _main, (LOSS,), ("identity",)),
    Budget("instructions per element", 16, "a closed form: below that bound", _main, (LOSS,), _CLOSED_FORMS),
    Budget("instructions per element", 20, "PLIF, up to 64 pieces: next to that bound", _main, (LOSS,), _PLIF),
    Budget(
        "instructions per element",
        48,
        "PLIF: two sweeps of a row, with a look-up each, and the sums of two tables",
        _main,
        (LOSS_ALL, LOSS_IN_PLACE),
        _PLIF,
    ),
    # Where the whole row keeps the limit of the main loops too, that is held; of rows that begin anywhere see below.
    Budget(
        "instructions per element of the row",
        11,
        "as of the main loops",
        _whole,
        (LOSS,),
        ("identity",),
        sliced=False,
    ),
    Budget(
        "instructions per element of the row",
        16,
        "as of the main loops",
        _whole,
        (LOSS,),
        ("temperature", "sigsoftmax", "soft_cap", "sigmoid_cap"),
        sliced=False,
    ),
    Budget("instructions per element of the row", 20, "as of the main loops", _whole, (LOSS,), _PLIF, sliced=False),
    Budget("instructions per element of the row", 48, "as of the main loops", _whole, (LOSS_ALL,), _PLIF, sliced=False),
)

#: A little above what is there: what needs more has lost something. Up to 64 registers leave 1024 threads to each
#: multiprocessor, up to 128 leave 512.
_REGISTERS = (
    Budget("registers", 48, "loss of the identity", _registers, (LOSS,), ("identity",), ()),
    Budget("registers", 64, "every loss: the limit that the launcher sets", _registers, (LOSS,), _BUT_THE_SPLINE, ()),
    Budget(
        "registers",
        64,
        "log_softmax, statistics: as a loss",
        _registers,
        (STATISTICS, LOG_SOFTMAX),
        _BUT_THE_SPLINE,
        (),
    ),
    Budget(
        "registers",
        96,
        "the spline without gradients: six numbers a piece",
        _registers,
        (LOSS, STATISTICS, LOG_SOFTMAX),
        ("spline-16",),
        (),
    ),
    Budget(
        "registers",
        128,
        "gradients of all but the spline: the limit that the launcher sets",
        _registers,
        (*_GRADIENTS, LOG_SOFTMAX_BACKWARD),
        _BUT_THE_SPLINE,
        (),
    ),
    Budget(
        "registers",
        232,
        "gradients of the spline, six rows of a table: below the 255 that there are",
        _registers,
        (*_GRADIENTS, LOG_SOFTMAX_BACKWARD),
        ("spline-16",),
        (),
    ),
)

BUDGETS: tuple[Budget, ...] = (_SPILLS, _LOADS, *_INSTRUCTIONS, *_REGISTERS)

#: Rows of any alignment against aligned ones, whole rows: the edges of a shifted row are two masked tiles, not one.
SHIFTED_RATIO = 1.10
#: The same where the gradient has memory of its own, and its rows begin elsewhere than those of the logits: the threads
#: change places by way of shared memory, and store 4 or 8 bytes at once.
SLICED_RATIO = 1.20

#: The instructions of each target's matrix units: mma.sync, wgmma and tcgen05 in PTX, MFMA.
PRODUCTS = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA", "gfx942": "v_mfma"}

#: Shared memory that a program may have.
SHARED_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}

#: Ours beside a peer's: the transform, by whether there is a soft cap.
_BESIDE = {None: "identity", 30.0: "soft_cap"}


def judge(measurements: Sequence[Measurement]) -> list[Verdict]:
    """Every budget that there are measurements for, held against each configuration that it is one of."""
    found = [verdict for budget in BUDGETS for verdict in budget.verdicts(measurements)]
    return [*found, *_heads(measurements), *_shifted(measurements), *_beside_peers(measurements)]


def _heads(measurements: Sequence[Measurement]) -> Iterator[Verdict]:
    for each in measurements:
        one = each.configuration
        if isinstance(one, Configuration) and one.operator in (HEAD_LOSS, HEAD_BACKWARD):
            wanted = PRODUCTS[each.target]
            found = sum(wanted in name for name in each.matrix)
            yield Verdict(f"{wanted} instructions", _subject(each), found, 1, "products by the matrix units", True)
            limit = SHARED_KIB[each.target]
            yield Verdict("KiB of shared memory", _subject(each), each.shared / 1024, limit, "what a program may have")


def _shifted(measurements: Sequence[Measurement]) -> Iterator[Verdict]:
    known = {
        (each.configuration, each.target): each
        for each in measurements
        if isinstance(each.configuration, Configuration)
    }
    for (one, target), shifted in known.items():
        of_interest = one.sliced or (one.classes == SHIFTED and one.operator in (LOSS, LOSS_ALL))
        if not of_interest or target != MAIN_TARGET or one.all_options:
            continue
        # In place nothing else is compiled, where rows are aligned.
        operator = LOSS_ALL if one.operator == LOSS_IN_PLACE else one.operator
        aligned = known.get((Configuration(one.transform, operator, ALIGNED, one.dtype), target))
        if aligned is None or shifted.whole is None or aligned.whole is None:
            continue
        yield Verdict(
            "instructions per element of the row, to those of aligned rows",
            _subject(shifted),
            shifted.whole / aligned.whole,
            SLICED_RATIO if one.sliced and one.operator == LOSS_ALL else SHIFTED_RATIO,
            "logits that lie anywhere" if one.sliced else "vocabularies of any size",
        )


def _beside_peers(measurements: Sequence[Measurement]) -> Iterator[Verdict]:
    known = {(each.configuration, each.target): each for each in measurements}
    for (peer, target), theirs in known.items():
        if not isinstance(peer, Peer) or theirs.main is None or theirs.whole is None:
            continue
        transform = _BESIDE[peer.softcap]
        operator = LOSS if not peer.gradient else LOSS_ALL if transform == "identity" else LOSS_INPUT
        ours = known.get((Configuration(transform, operator, peer.classes), target))
        if ours is None or ours.main is None or ours.whole is None:
            continue
        reason = f"as {peer}"
        yield Verdict("instructions per element", _subject(ours), ours.main, theirs.main, reason)
        yield Verdict("instructions per element of the row", _subject(ours), ours.whole, theirs.whole, reason)
        yield Verdict("registers", _subject(ours), ours.registers, theirs.registers, reason)


def _subject(worst: Measurement, group: Sequence[object] = ()) -> str:
    where = worst.target if len(group) < 2 else f"{len(group)} targets, worst of them {worst.target}"
    return f"{worst.configuration} for {where}"
