"""Which cases there are, in presets, and which contestants take part in each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from .cases import Case, Group
from .contestants import names


@dataclass(frozen=True)
class Timing:
    """The settings of a unit."""

    case: Case
    contestants: tuple[str, ...]
    #: Turns of each contestant.
    rounds: int
    #: cpu, cuda, or emulated: a GPU's backends on the CPU, whose times mean nothing.
    device: str = "cpu"


#: The values of the fields of a case behind its group, in their order.
_ON_CPU = {"mode": ("train",), "rows": (512,), "classes": (32_000,), "dim": (1024,), "dtype": ("float32",)}
_ON_CPU |= {"std": (1.0,)}
#: The shape of a large language model's step. Logits of a trained model are wider.
_ON_GPU = _ON_CPU | {"rows": (8192,), "classes": (50_304,), "dtype": ("bfloat16",), "std": (2.0,)}
_Sweep = list[tuple[Case, list[str]]]


def _sweep(group: Group, patterns: str, *pieces: int, on_gpu: bool = False, **axes: Any) -> _Sweep:
    """The cases of all combinations of ``axes``, with the contestants of the names; ``pieces`` are those of PLIF."""
    values = (_ON_GPU if on_gpu else _ON_CPU) | ({"dim": (None,)} if group == "logits" else {}) | axes
    cases = [Case(group, *each) for each in itertools.product(*values.values())]
    return [(case, names(group, case.dtype, pieces or (64,), patterns.split(", "), on_gpu)) for case in cases]


def _presets() -> Iterator[tuple[str, int, list[_Sweep]]]:
    """Their names, the rounds, and sweeps."""
    both_modes, both_stds = ("train", "no-grad"), (1.0, 20.0)
    curves = "plain *, identity fused, plif-64 fused, mos-4 fair, moc-4 fused"
    sizes = (10_000, 32_000, 128_000)
    quick = [
        _sweep("logits", "*", rows=(128,)),
        _sweep("logits", "plain *, * fused", rows=(128,), std=both_stds),
        _sweep("logits", "plain *, * fused*", mode=both_modes, rows=(128,), dtype=("float32", "bfloat16")),
        _sweep("logits", curves, rows=(128,), classes=sizes),
        _sweep("logits", curves, rows=(32, 128, 512)),
        _sweep("head", "*", rows=(256,), dim=(256,)),
        _sweep("head", curves, mode=("no-grad",), rows=(256,), dim=(256,)),
        _sweep("head", curves, rows=(256,), classes=sizes, dim=(256,)),
        _sweep("head", curves, rows=(64, 256, 1024), dim=(256,)),
    ]
    yield "quick", 7, quick
    narrow = _sweep("logits", "plain *, * fused*", dtype=("bfloat16", "float16"), std=both_stds)
    yield "logits", 7, [_sweep("logits", "plain *, * fused", 64, 100_000, std=both_stds), narrow]
    yield "head", 3, [_sweep("head", "plain eager, plif-64 fused", mode=both_modes, rows=(2048,), std=both_stds)]
    yield "head_8192", 1, [_sweep("head", "plif-64 fused", rows=(8192,))]
    yield "head_280", 3, [_sweep("head", "plif-64 fused, mos-15 *", rows=(2048,), dim=(280,), std=both_stds)]

    def on_gpu(group: Group, patterns: str, *pieces: int, **axes: Any) -> _Sweep:
        return _sweep(group, patterns, *pieces, on_gpu=True, **axes)

    # Each shape costs a GPU seconds for each contestant: those that say most, in the order of what they decide.
    backends = "plain eager, identity cuda, identity triton, plif-64 cuda, plif-64 triton"
    functions = ("temperature", "sigsoftmax", "gss", "soft_cap", "sigmoid_cap", "monotonic_mlp", "spline", "plif-*")
    peers = "plain eager, plain compiled, plain linear_cross_entropy, plain liger, plain * kernels, identity triton"
    methods = "plain eager, plif-64 cuda, plif-64 triton chunked, plif-64 triton recompute"
    heads = "plain eager, identity cuda, plif-64 cuda, plif-64 triton"
    wide = (50_304, 128_256)
    gpu = [
        on_gpu("logits", f"plain *, {backends}", mode=both_modes),
        on_gpu("logits", ", ".join(f"{each} cuda, {each} triton" for each in functions), 1000),
        on_gpu("logits", f"plain liger, {backends}", rows=(64,), classes=(4096,)),
        on_gpu("head", peers, dim=(2048,)),
        on_gpu("head", methods, mode=("no-grad",), classes=wide, dim=(1024, 2048)),
        on_gpu("head", heads, classes=wide, dim=(1024, 2048, 4096)),
        on_gpu("logits", "plain compiled", classes=(128_256,)),
        on_gpu("logits", "plain liger", mode=both_modes, classes=(32_000, 128_256)),
        on_gpu("logits", backends, mode=both_modes, classes=(32_000, 50_257, 128_256, 151_936)),
        on_gpu("logits", backends, mode=both_modes, rows=(4096,), classes=(262_144,)),
        on_gpu("logits", backends, rows=(4096,), dtype=("float32",)),
    ]
    yield "gpu", 3, gpu


def timings() -> Iterator[tuple[str, Timing]]:
    """The units ``PRESET/CASE``. A case of several sweeps of a preset is one unit, with the contestants of all.

    ``dry`` is ``gpu`` on the CPU, at shapes of its own.
    """
    for preset, rounds, sweeps in _presets():
        planned: dict[Case, dict[str, None]] = {}
        for case, found in itertools.chain(*sweeps):
            planned.setdefault(case, {}).update(dict.fromkeys(found))
        for case, wanted in planned.items():
            yield f"{preset}/{case}", Timing(case, tuple(wanted), rounds, "cuda" if preset == "gpu" else "cpu")
            if preset == "gpu":
                yield f"dry/{shrunk(case)}", Timing(shrunk(case), tuple(wanted), 1, "emulated")


def shrunk(case: Case) -> Case:
    """At most 4 rows, 512 classes and 64 features. The classes keep their remainder by 8, which decides alignment."""
    return replace(
        case,
        rows=max(1, min(4, case.rows // 2048)),
        classes=max(1, min(512, case.classes // 4096 * 8)) + case.classes % 8,
        dim=None if case.dim is None else max(16, min(64, case.dim // 64)),
    )
