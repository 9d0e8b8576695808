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
    rounds: int  # turns of each contestant
    device: str = "cpu"  # cuda, or emulated: a GPU's backends on the CPU, whose times mean nothing


#: The values of the fields of a case behind its group, in their order, and the pieces of PLIF.
_ON_CPU = {"mode": ("train",), "rows": (512,), "classes": (32_000,), "dim": (1024,), "dtype": ("float32",)}
_ON_CPU |= {"std": (1.0,), "pieces": (64,)}
#: The shape of a large language model's step. Logits of a trained model are wider.
_ON_GPU = _ON_CPU | {"rows": (8192,), "classes": (50_304,), "dtype": ("bfloat16",), "std": (2.0,)}
_MODES: dict[str, Any] = {"mode": ("train", "no-grad")}
_STDS: dict[str, Any] = {"std": (1.0, 20.0)}
_SIZES: dict[str, Any] = {"classes": (10_000, 32_000, 128_000)}
_WIDE: dict[str, Any] = {"classes": (50_304, 128_256)}
_CURVES = "plain *, identity fused, plif-64 fused, mos-4 fair, moc-4 fused"
_BACKENDS = "plain eager, identity cuda, identity triton, plif-64 cuda, plif-64 triton"
_FUNCTIONS = ("temperature", "sigsoftmax", "gss", "soft_cap", "sigmoid_cap", "monotonic_mlp", "spline", "plif-*")
_BY_FUNCTION = ", ".join(f"{each} cuda, {each} triton" for each in _FUNCTIONS)
_PEERS = "plain eager, plain compiled, plain linear_cross_entropy, plain liger, plain * kernels, identity triton"
_METHODS = "plain eager, plif-64 cuda, plif-64 triton chunked, plif-64 triton recompute"
_HEADS = "plain eager, identity cuda, plif-64 cuda, plif-64 triton"
_TOKENS = "plain eager, plain trl, soft_cap * cuda, soft_cap * triton"
_DISTILLED = "plain eager, identity cuda, identity triton"
_DISTILLATION: dict[str, Any] = {"rows": (1024,), "classes": (49_152,), "dim": (512,)}
_MANY: dict[str, Any] = {"rows": (8192,)}
_ROUNDS = {"quick": 7, "logits": 7, "head": 3, "head_8192": 1, "head_280": 3}
_ROUNDS |= {"tokens": 5, "tokens_8192": 1, "gpu": 3}
#: Preset, group, patterns of contestants, and what is not as above: all combinations are cases.
_SWEEPS: tuple[tuple[str, Group, str, dict[str, Any]], ...] = (
    ("quick", "logits", "*", {"rows": (128,)}),
    ("quick", "logits", "plain *, * fused", {"rows": (128,), **_STDS}),
    ("quick", "logits", "plain *, * fused*", {**_MODES, "rows": (128,), "dtype": ("float32", "bfloat16")}),
    ("quick", "logits", _CURVES, {"rows": (128,), **_SIZES}),
    ("quick", "logits", _CURVES, {"rows": (32, 128, 512)}),
    ("quick", "head", "*", {"rows": (256,), "dim": (256,)}),
    ("quick", "head", _CURVES, {"mode": ("no-grad",), "rows": (256,), "dim": (256,)}),
    ("quick", "head", _CURVES, {"rows": (256,), **_SIZES, "dim": (256,)}),
    ("quick", "head", _CURVES, {"rows": (64, 256, 1024), "dim": (256,)}),
    ("logits", "logits", "plain *, * fused", {**_STDS, "pieces": (64, 100_000)}),
    ("logits", "logits", "plain *, * fused*", {"dtype": ("bfloat16", "float16"), **_STDS}),
    ("head", "head", "plain eager, plif-64 fused", {**_MODES, "rows": (2048,), **_STDS}),
    ("head_8192", "head", "plif-64 fused", {"rows": (8192,)}),
    ("head_280", "head", "plif-64 fused, mos-15 *", {"rows": (2048,), "dim": (280,), **_STDS}),
    ("tokens", "tokens", "*", {"dim": (256,)}),
    ("tokens", "forward_kl", "*", _DISTILLATION),
    ("tokens", "jsd", "*", _DISTILLATION),
    # For the memory of what does not hold the logits.
    ("tokens_8192", "tokens", "soft_cap *", {**_MANY, "dim": (256,)}),
    ("tokens_8192", "forward_kl", "identity *", {**_DISTILLATION, **_MANY}),
    ("tokens_8192", "jsd", "identity *", {**_DISTILLATION, **_MANY}),
    # Each shape costs a GPU seconds for each contestant: those that say most, in the order of what they decide.
    ("gpu", "logits", f"plain *, {_BACKENDS}", _MODES),
    ("gpu", "logits", _BY_FUNCTION, {"pieces": (1000,)}),
    ("gpu", "logits", f"plain liger, {_BACKENDS}", {"rows": (64,), "classes": (4096,)}),
    ("gpu", "head", _PEERS, {"dim": (2048,)}),
    ("gpu", "tokens", _TOKENS, {"dim": (2048,)}),
    ("gpu", "forward_kl", _DISTILLED, {**_DISTILLATION, **_MANY}),
    ("gpu", "jsd", _DISTILLED, {**_DISTILLATION, **_MANY}),
    ("gpu", "head", _METHODS, {"mode": ("no-grad",), **_WIDE, "dim": (1024, 2048)}),
    ("gpu", "head", _HEADS, {**_WIDE, "dim": (1024, 2048, 4096)}),
    ("gpu", "logits", "plain compiled", {"classes": (128_256,)}),
    ("gpu", "logits", "plain liger", {**_MODES, "classes": (32_000, 128_256)}),
    ("gpu", "logits", _BACKENDS, {**_MODES, "classes": (32_000, 50_257, 128_256, 151_936)}),
    ("gpu", "logits", _BACKENDS, {**_MODES, "rows": (4096,), "classes": (262_144,)}),
    ("gpu", "logits", _BACKENDS, {"rows": (4096,), "dtype": ("float32",)}),
)


def timings() -> Iterator[tuple[str, Timing]]:
    """The units ``PRESET/CASE``. A case of several sweeps of a preset is one unit, with the contestants of all.

    ``dry`` is ``gpu`` on the CPU, at shapes of its own.
    """
    planned: dict[tuple[str, Case], dict[str, None]] = {}
    for preset, group, patterns, given in _SWEEPS:
        on_gpu = preset == "gpu"
        axes = (_ON_GPU if on_gpu else _ON_CPU) | ({"dim": (None,)} if group == "logits" else {}) | given
        pieces = axes.pop("pieces")
        for case in itertools.starmap(Case, itertools.product((group,), *axes.values())):
            found = names(group, case.dtype, pieces, patterns.split(", "), on_gpu)
            planned.setdefault((preset, case), {}).update(dict.fromkeys(found))
    for (preset, case), wanted in planned.items():
        device = "cuda" if preset == "gpu" else "cpu"
        yield f"{preset}/{case}", Timing(case, tuple(wanted), _ROUNDS[preset], device)
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
