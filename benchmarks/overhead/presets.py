"""Which cases there are, in presets, and which contestants take part in each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .cases import Case, Group
from .contestants import names

#: What takes part where the shape is what is asked for.
_CURVES = ("plain *", "identity fused", "plif-64 fused", "mos-4 fair", "moc-4 fused")
_FUSED = ("plain *", "* fused*")
_SWEEP = (10_000, 32_000, 128_000)
#: Each shape costs a GPU seconds for each contestant: those that say most.
_BACKENDS = ("identity cuda", "identity triton", "plif-64 cuda", "plif-64 triton")
_ON_LOGITS = ("plain eager", *_BACKENDS)
_ON_HEADS = ("plain eager", "identity cuda", "plif-64 cuda", "plif-64 triton")
_HEAD_PEERS = (
    *("plain eager", "plain compiled", "plain linear_cross_entropy", "plain liger"),
    *("plain cut-cross-entropy kernels", "identity triton"),
)
#: With the choice of monosoftmax.backends.head_method.
_HEAD_NO_GRAD = ("plain eager", "plif-64 cuda", "plif-64 triton chunked", "plif-64 triton recompute")
_OTHER_TRANSFORMS = tuple(
    f"{function} {backend}"
    for function in ("temperature", "sigsoftmax", "gss", "soft_cap", "sigmoid_cap", "monotonic_mlp", "spline", "plif-*")
    for backend in ("cuda", "triton")
)


@dataclass(frozen=True)
class Timing:
    """The settings of a unit."""

    case: Case
    contestants: tuple[str, ...]
    #: Turns of each contestant.
    rounds: int
    #: cpu, cuda, or emulated: a GPU's backends on the CPU, whose times mean nothing.
    device: str = "cpu"


@dataclass(frozen=True)
class _Sweep:
    """Every combination of the values of some axes, for one group; and the patterns of names of contestants."""

    group: Group
    contestants: Sequence[str] = ("*",)
    modes: Sequence[Any] = ("train",)
    rows: Sequence[int] = (512,)
    classes: Sequence[int] = (32_000,)
    dims: Sequence[int] = (1024,)
    dtypes: Sequence[str] = ("float32",)
    stds: Sequence[float] = (1.0,)
    #: Numbers of pieces of PLIF.
    pieces: Sequence[int] = (64,)

    def cases(self) -> Iterator[Case]:
        dims = (None,) if self.group == "logits" else self.dims
        for mode, *axes in itertools.product(self.modes, self.rows, self.classes, dims, self.dtypes, self.stds):
            yield Case(self.group, mode, *axes)


def _on_gpu(group: Group, contestants: Sequence[str], **axes: Any) -> _Sweep:
    """The shape of a large language model's step on a GPU, but for ``axes``. Logits of a trained model are wider."""
    shape: dict[str, Any] = {"rows": (8192,), "classes": (50_304,), "dtypes": ("bfloat16",), "stds": (2.0,)}
    return _Sweep(group, contestants, **shape | axes)


_BOTH_MODES, _BOTH_STDS = ("train", "no-grad"), (1.0, 20.0)
_PRESETS: dict[str, tuple[_Sweep, ...]] = {
    "quick": (
        _Sweep("logits", rows=(128,)),
        _Sweep("logits", ("plain *", "* fused"), rows=(128,), stds=_BOTH_STDS),
        _Sweep("logits", _FUSED, modes=_BOTH_MODES, rows=(128,), dtypes=("float32", "bfloat16")),
        _Sweep("logits", _CURVES, rows=(128,), classes=_SWEEP),
        _Sweep("logits", _CURVES, rows=(32, 128, 512)),
        _Sweep("head", rows=(256,), dims=(256,)),
        _Sweep("head", _CURVES, modes=("no-grad",), rows=(256,), dims=(256,)),
        _Sweep("head", _CURVES, rows=(256,), classes=_SWEEP, dims=(256,)),
        _Sweep("head", _CURVES, rows=(64, 256, 1024), dims=(256,)),
    ),
    "logits": (
        _Sweep("logits", ("plain *", "* fused"), stds=_BOTH_STDS, pieces=(64, 100_000)),
        _Sweep("logits", _FUSED, dtypes=("bfloat16", "float16"), stds=_BOTH_STDS),
    ),
    "head": (_Sweep("head", ("plain eager", "plif-64 fused"), modes=_BOTH_MODES, rows=(2048,), stds=_BOTH_STDS),),
    "head_8192": (_Sweep("head", ("plif-64 fused",), rows=(8192,)),),
    "head_280": (_Sweep("head", ("plif-64 fused", "mos-15 *"), rows=(2048,), dims=(280,), stds=_BOTH_STDS),),
    # In the order of what they decide, in case the time is up.
    "gpu": (
        _on_gpu("logits", ("plain *", *_BACKENDS), modes=_BOTH_MODES),
        _on_gpu("logits", _OTHER_TRANSFORMS, pieces=(1000,)),
        _on_gpu("logits", ("plain eager", "plain liger", *_BACKENDS), rows=(64,), classes=(4096,)),
        _on_gpu("head", _HEAD_PEERS, dims=(2048,)),
        _on_gpu("head", _HEAD_NO_GRAD, modes=("no-grad",), classes=(50_304, 128_256), dims=(1024, 2048)),
        _on_gpu("head", _ON_HEADS, classes=(50_304, 128_256), dims=(1024, 2048, 4096)),
        _on_gpu("logits", ("plain compiled",), classes=(128_256,)),
        _on_gpu("logits", ("plain liger",), modes=_BOTH_MODES, classes=(32_000, 128_256)),
        _on_gpu("logits", _ON_LOGITS, modes=_BOTH_MODES, classes=(32_000, 50_257, 128_256, 151_936)),
        _on_gpu("logits", _ON_LOGITS, modes=_BOTH_MODES, rows=(4096,), classes=(262_144,)),
        _on_gpu("logits", _ON_LOGITS, rows=(4096,), dtypes=("float32",)),
    ),
}
_ROUNDS = {"quick": 7, "logits": 7, "head": 3, "head_8192": 1, "head_280": 3, "gpu": 3}


def timings() -> Iterator[tuple[str, Timing]]:
    """The units ``PRESET/CASE``. A case of several sweeps of a preset is one unit, with the contestants of all.

    ``dry`` is ``gpu`` on the CPU, at shapes of its own.
    """
    for preset, sweeps in _PRESETS.items():
        on_gpu = preset == "gpu"
        planned: dict[Case, dict[str, None]] = {}
        for sweep in sweeps:
            for case in sweep.cases():
                found = names(case.group, case.dtype, sweep.pieces, sweep.contestants, on_gpu)
                planned.setdefault(case, {}).update(dict.fromkeys(found))
        for case, wanted in planned.items():
            yield f"{preset}/{case}", Timing(case, tuple(wanted), _ROUNDS[preset], "cuda" if on_gpu else "cpu")
            if on_gpu:
                yield f"dry/{shrunk(case)}", Timing(shrunk(case), tuple(wanted), 1, "emulated")


def shrunk(case: Case) -> Case:
    """At most 4 rows, 512 classes and 64 features. The classes keep their remainder by 8, which decides alignment."""
    return replace(
        case,
        rows=max(1, min(4, case.rows // 2048)),
        classes=max(1, min(512, case.classes // 4096 * 8)) + case.classes % 8,
        dim=None if case.dim is None else max(16, min(64, case.dim // 64)),
    )
