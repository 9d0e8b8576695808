"""What to run: sweeps over the axes, presets of them, and the command line that overrides them."""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .cases import DTYPES, GROUPS, MODES, Case, Group, Mode
from .contestants import names
from .emulation import shrunk

VOCABULARIES = (10_000, 32_000, 50_257, 128_000, 256_000)
PIECES = (16, 64, 1024, 100_000)
#: What a sweep runs that is there for its shape and not for its contestants.
_CURVES = ("plain *", "identity fused", "plif-64 fused", "mos-4 fair", "moc-4 fused")


@dataclass(frozen=True)
class Sweep:
    """Every combination of the values of some axes, for one group."""

    group: Group
    modes: tuple[Mode, ...] = ("train",)
    rows: tuple[int, ...] = (512,)
    classes: tuple[int, ...] = (32_000,)
    #: d; of no meaning for given logits.
    dims: tuple[int, ...] = (1024,)
    dtypes: tuple[str, ...] = ("float32",)
    stds: tuple[float, ...] = (1.0,)
    #: Numbers of pieces of PLIF.
    pieces: tuple[int, ...] = (64,)
    #: Patterns of names of contestants.
    contestants: tuple[str, ...] = ("*",)
    #: Whether there are contestants that only a GPU runs.
    on_gpu: bool = False

    def cases(self) -> list[Case]:
        """The cases, those of one shape together."""
        dims: tuple[int | None, ...] = (None,) if self.group == "logits" else self.dims
        return [
            Case(self.group, mode, rows, classes, dim, dtype, std)
            for rows, classes, dim, mode, dtype, std in itertools.product(
                self.rows, self.classes, dims, self.modes, self.dtypes, self.stds
            )
        ]


def _on_gpu(group: Group, modes: tuple[Mode, ...] = ("train",), **axes: Any) -> Sweep:
    """The shape of a large language model's step on a GPU, but for ``axes``. Logits of a trained model are wider."""
    shape: dict[str, Any] = {"rows": (8192,), "classes": (50_304,), "dtypes": ("bfloat16",), "stds": (2.0,)}
    return Sweep(group, modes, **shape | axes, on_gpu=True)


#: Each shape costs a GPU seconds for each contestant: those that say most.
_BACKENDS = ("identity cuda", "identity triton", "plif-64 cuda", "plif-64 triton")
_LOGITS = ("plain eager", *_BACKENDS)
_HEAD = ("plain eager", "identity cuda", "plif-64 cuda", "plif-64 triton")
_HEAD_PEERS = (
    "plain eager",
    "plain compiled",
    "plain linear_cross_entropy",
    "plain liger",
    "plain cut-cross-entropy kernels",
    "identity triton",
)
#: With the choice of monosoftmax.backends.head_method.
_HEAD_NO_GRAD = ("plain eager", "plif-64 cuda", "plif-64 triton chunked", "plif-64 triton recompute")
_OTHER_TRANSFORMS = tuple(
    f"{function} {backend}"
    for function in ("temperature", "sigsoftmax", "gss", "soft_cap", "sigmoid_cap", "monotonic_mlp", "spline", "plif-*")
    for backend in ("cuda", "triton")
)
_BOTH_STDS = (1.0, 20.0)
_NARROW = ("bfloat16", "float16")
_TYPES = ("float32", *_NARROW)
PRESETS: dict[str, tuple[Sweep, ...]] = {
    "quick": (
        Sweep("logits", rows=(128,)),
        Sweep("logits", rows=(128,), stds=_BOTH_STDS, contestants=("plain *", "* fused")),
        Sweep("logits", MODES, rows=(128,), dtypes=("float32", "bfloat16"), contestants=("plain *", "* fused*")),
        Sweep("logits", rows=(128,), classes=(10_000, 32_000, 128_000), contestants=_CURVES),
        Sweep("logits", rows=(32, 128, 512), contestants=_CURVES),
        Sweep("head", rows=(256,), dims=(256,)),
        Sweep("head", ("no-grad",), rows=(256,), dims=(256,), contestants=_CURVES),
        Sweep("head", rows=(256,), classes=(10_000, 32_000, 128_000), dims=(256,), contestants=_CURVES),
        Sweep("head", rows=(64, 256, 1024), dims=(256,), contestants=_CURVES),
    ),
    "must": (
        Sweep("logits", stds=_BOTH_STDS, pieces=(64, 100_000)),
        Sweep("logits", dtypes=_NARROW, stds=_BOTH_STDS, contestants=("plain *", "* fused*")),
        Sweep("head", MODES, rows=(2048,), stds=_BOTH_STDS),
        Sweep("head", rows=(8192,), stds=_BOTH_STDS, contestants=("plain *", "plif-64 fused", "identity fused")),
        Sweep("head", rows=(2048,), dims=(280,), stds=_BOTH_STDS, contestants=("plain *", "* fused", "mos-*", "moc-*")),
    ),
    "full": (
        Sweep("logits", MODES, dtypes=_TYPES, stds=_BOTH_STDS, pieces=PIECES),
        Sweep("logits", MODES, classes=VOCABULARIES, stds=_BOTH_STDS, pieces=PIECES),
        Sweep("logits", MODES, rows=(1, 8, 32, 128, 512, 2048, 8192), stds=_BOTH_STDS, pieces=PIECES),
        Sweep("logits", rows=(4096,), classes=VOCABULARIES, dtypes=_TYPES, contestants=_CURVES),
        Sweep("head", MODES, rows=(2048,), dims=(280, 1024), dtypes=_TYPES, stds=_BOTH_STDS, pieces=PIECES),
        Sweep("head", MODES, rows=(2048,), classes=VOCABULARIES, stds=_BOTH_STDS),
        Sweep("head", MODES, rows=(128, 512, 2048, 8192), stds=_BOTH_STDS),
        Sweep("head", rows=(2048,), dims=(128, 280, 512, 1024, 2048, 4096), contestants=_CURVES),
    ),
    # In the order of what they decide, in case the time is up.
    "gpu": (
        _on_gpu("logits", MODES, contestants=("plain *", *_BACKENDS)),
        _on_gpu("logits", contestants=_OTHER_TRANSFORMS, pieces=(1000,)),
        _on_gpu("logits", rows=(64,), classes=(4096,), contestants=("plain eager", "plain liger", *_BACKENDS)),
        _on_gpu("head", dims=(2048,), contestants=_HEAD_PEERS),
        _on_gpu("head", ("no-grad",), classes=(50_304, 128_256), dims=(1024, 2048), contestants=_HEAD_NO_GRAD),
        _on_gpu("head", classes=(50_304, 128_256), dims=(1024, 2048, 4096), contestants=_HEAD),
        _on_gpu("logits", classes=(128_256,), contestants=("plain compiled",)),
        _on_gpu("logits", MODES, classes=(32_000, 128_256), contestants=("plain liger",)),
        _on_gpu("logits", MODES, classes=(32_000, 50_257, 128_256, 151_936), contestants=_LOGITS),
        _on_gpu("logits", MODES, rows=(4096,), classes=(262_144,), contestants=_LOGITS),
        _on_gpu("logits", rows=(4096,), dtypes=("float32",), contestants=_LOGITS),
    ),
}
#: Turns of each contestant, where --repeats does not say.
_REPEATS, _REPEATS_ON_GPU, _REPEATS_EMULATED = 7, 10, 1


@dataclass(frozen=True)
class Run:
    """A parsed command line."""

    #: The command line as it was given.
    arguments: tuple[str, ...]
    preset: str
    sweeps: tuple[Sweep, ...]
    repeats: int
    threads: int
    device: torch.device
    with_memory: bool
    folder: Path
    overwrite: bool
    #: Whether emulators on the CPU stand in for a GPU, at shapes of their own.
    emulated: bool

    def plan(self) -> dict[Case, list[str]]:
        """The cases with their contestants. A case of several sweeps is run once, with the contestants of all."""
        planned: dict[Case, list[str]] = {}
        for sweep in self.sweeps:
            for case in map(shrunk, sweep.cases()) if self.emulated else sweep.cases():
                wanted = planned.setdefault(case, [])
                found = names(case.group, case.dtype, sweep.pieces, sweep.contestants, sweep.on_gpu)
                wanted += [name for name in found if name not in wanted]
        return {case: wanted for case, wanted in planned.items() if wanted}


def parse(arguments: Sequence[str] | None = None) -> Run:
    """The run that ``arguments`` (by default those of the process) ask for. Exits with code 2 on a mistake in them."""
    parser = _parser()
    words = tuple(sys.argv[1:] if arguments is None else arguments)
    given = parser.parse_args(words)
    axes = {
        name: getattr(given, name)
        for name in ("modes", "rows", "classes", "dims", "dtypes", "stds", "pieces", "contestants")
        if getattr(given, name) is not None
    }
    sweeps = tuple(
        replace(sweep, **axes) for sweep in PRESETS[given.preset] if given.group is None or sweep.group in given.group
    )
    if given.emulate and given.device.type != "cpu":
        parser.error("argument --emulate: it takes the place of a --device")
    if given.repeats is None:
        on_gpu = any(sweep.on_gpu for sweep in sweeps)
        given.repeats = _REPEATS_EMULATED if given.emulate else _REPEATS_ON_GPU if on_gpu else _REPEATS
    run = Run(
        words,
        given.preset,
        sweeps,
        given.repeats,
        given.threads or torch.get_num_threads(),
        given.device,
        # Processes of their own would have no emulators.
        not (given.without_memory or given.emulate),
        given.output or Path("results") / "overhead" / f"{given.preset}{'-emulated' if given.emulate else ''}",
        given.overwrite,
        given.emulate,
    )
    if not run.plan():
        parser.error("argument --contestants: none of the preset's cases has a contestant of such a name")
    return run


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        """Exit with code 2 and one line: argparse's usage of this many options would hide it."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m benchmarks.overhead",
        description="Time and peak memory of monosoftmax's losses beside what there is otherwise, in turn in one run.",
        epilog="An axis that is given takes the place of that axis in every sweep of the preset; VALUE,... are lists.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    about_presets = "quick: minutes on 2 cores; must: the shapes of the targets; gpu: minutes on an H100"
    add("--preset", choices=PRESETS, default="quick", help=about_presets)
    axes = parser.add_argument_group("axes").add_argument
    axes("--group", type=_list_of(_one_of(GROUPS)), metavar="GROUP,...", help=", ".join(GROUPS))
    axes("--modes", type=_list_of(_one_of(MODES)), metavar="MODE,...", help=", ".join(MODES))
    axes("--rows", type=_list_of(_whole), metavar="N,...")
    axes("--classes", type=_list_of(_whole), metavar="V,...")
    axes("--dims", type=_list_of(_whole), metavar="D,...", help="of the head's input")
    axes("--dtypes", type=_list_of(_one_of(tuple(DTYPES))), metavar="TYPE,...", help=", ".join(DTYPES))
    axes("--stds", type=_list_of(_positive), metavar="STD,...", help="standard deviations of the logits")
    axes("--pieces", type=_list_of(_whole), metavar="K,...", help="of PLIF")
    axes("--contestants", type=_list_of(str), metavar="PATTERN,...", help="such as 'plain *,plif-* fused'")
    how = parser.add_argument_group("how").add_argument
    how("--repeats", type=_whole, help="turns of each contestant (7; of the preset gpu, 10; emulated, 1)")
    how("--threads", type=_whole, help="of torch; by default as many as torch takes")
    how("--device", type=device_of, default=torch.device("cpu"), help="cpu, cuda or cuda:N")
    how("--emulate", action="store_true", help="on the CPU at tiny shapes, to see a preset for a GPU run without one")
    how("--without-memory", action="store_true", help="do not measure peak memory, which takes processes of its own")
    where = parser.add_argument_group("results").add_argument
    where("--output", type=Path, metavar="DIR", help="folder (results/overhead/PRESET)")
    where("--overwrite", action="store_true", help="start anew where there are results already")
    return parser


def _list_of(convert: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    def convert_all(text: str) -> tuple[Any, ...]:
        # Each value once: a case that is given twice is the same case.
        return tuple(dict.fromkeys(convert(part.strip()) for part in text.split(",")))

    return convert_all


def _one_of(choices: Sequence[str]) -> Callable[[str], str]:
    def convert(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"must be of {', '.join(choices)}, got {text!r}")
        return text

    return convert


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1, got {text!r}")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value


def device_of(text: str) -> torch.device:
    """The device of a command line."""
    kind, colon, index = text.partition(":")
    if (kind, bool(colon)) not in (("cpu", False), ("cuda", False), ("cuda", True)) or (
        colon and not index.isdecimal()
    ):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, got {text!r}")
    return torch.device(text)
