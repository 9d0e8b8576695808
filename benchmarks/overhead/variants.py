"""Times other plans, tiles and ways to multiply than those that users get, to choose by measurement.

    python -m benchmarks.overhead.variants --device cuda [--only PATTERN] [--output FILE]
    python -m benchmarks.overhead.variants --device cpu --small     # proves without a GPU that all of them run

Times bare operators: ``loss``; ``dz``, with the gradient of the logits; ``all``, with those of the coefficients, too.
The variants of an operator take turns with its floor. Each must agree with the first. FILE is rewritten after each
operator.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor

import monosoftmax as ms
from monosoftmax import chunked_head, ops
from monosoftmax.backends import Operation
from monosoftmax.groups import Head, HeadOptions, LossOptions, Transform
from monosoftmax.triton_kernels.launch import tuned as tuned_launches

from .. import machine
from ..files import write_json
from .cases import Case, Inputs, make_inputs
from .contestants import disagreement, explain, make_transform
from .emulation import emulating, shrunk, tune_host
from .floors import floor, probes
from .limits import one_line
from .peers import Unavailable
from .report import variants_table
from .run import RunError, device_name, use_device
from .settings import device_of
from .timing import Action, measure

Wishes = Mapping[str, int]


@dataclass(frozen=True)
class Variant:
    """What is different while the operator runs; nothing for the first of a group."""

    name: str = "as it is"
    tuned: Callable[[], AbstractContextManager[object]] = nullcontext
    #: Of the head.
    chunk_rows: int = 0


@dataclass(frozen=True)
class Group:
    """An operator on one shape, and its variants."""

    backend: Literal["cuda", "triton"]
    function: str
    #: loss, dz or all.
    work: str
    case: Case
    variants: Sequence[Variant]

    def __str__(self) -> str:
        dim = "" if self.case.dim is None else f" d={self.case.dim}"
        return f"{self.backend} {self.function} {self.work} {self.case.rows}x{self.case.classes}{dim}"


@contextmanager
def tuned_plans(**wishes: int) -> Iterator[None]:
    """While it lasts, the CUDA kernels are planned with ``wishes`` (``csrc/cuda/plan.h``, Tuning)."""
    tune = tune_host if "monosoftmax_cuda_host" in sys.modules else getattr(ms.backends.extension, "tune_plans", None)
    if tune is None:
        raise Unavailable("the extension has no CUDA kernels")
    tune(**wishes)
    try:
        yield
    finally:
        tune()


def _accumulate_in_the_product(head: Any, dz: Tensor, x: Tensor, first: bool) -> None:
    """Gradient of the head's weight, in float32, which the product itself adds to."""
    if x.device.type != "cuda":
        raise Unavailable("torch multiplies half precision into float32 on CUDA only")
    options: dict[str, Any] = {"out_dtype": torch.float32, "out": head.grad_weight}
    try:
        torch.mm(dz.t(), x, **options) if first else torch.addmm(head.grad_weight, dz.t(), x, **options)
    except (NotImplementedError, TypeError) as error:
        raise Unavailable(f"torch {torch.__version__}: {one_line(error)}") from None


def _variants(tuned: Callable[..., AbstractContextManager[None]], *wishes: Wishes) -> list[Variant]:
    return [
        Variant(" ".join(f"{name}={value}" for name, value in each.items()), partial(tuned, **each)) for each in wishes
    ]


_plans, _launches = partial(_variants, tuned_plans), partial(_variants, tuned_launches)


def groups() -> list[Group]:
    """All groups. Those whose variants are compiled come last, in case the time is up."""
    main, wide, widest = (
        Case("logits", "train", rows, classes, None, "bfloat16", 2.0)
        for rows, classes in ((8192, 50_304), (3200, 128_256), (2048, 262_144))
    )
    loss = replace(main, mode="no-grad")
    threads = [{"most_threads_losses": each} for each in (64, 96, 128, 192, 256)]
    rounds = [{"rounds_without_sums": each} for each in (1, 32)]
    kept = [{"fewest_blocks": 2}, {"fewest_blocks": 4}, {"most_threads": 192}]
    kept.append({"most_threads": 128, "fewest_threads": 64})
    reread = [{"keeps_rows": 0}, *({"keeps_rows": 0, "most_threads": each} for each in (96, 128, 192))]
    clusters = [{"keeps_rows": 0}, *({"fewest_blocks": each} for each in (2, 4, 8))]
    found = [
        *(Group("cuda", name, "loss", loss, _plans(*threads, *rounds)) for name in ("identity", "plif-64", "spline")),
        *(Group("cuda", name, "dz", main, _plans(*kept, *reread, *rounds)) for name in ("identity", "plif-64")),
        Group("cuda", "plif-64", "all", main, _plans(*kept, *reread)),
    ]
    for case in (wide, widest):
        found += [Group("cuda", "identity", "dz", case, _plans(*clusters))]
        found += [Group("cuda", "plif-64", "all", case, _plans(*clusters))]
    head = Case("head", "train", 8192, 50_304, 2048, "bfloat16", 2.0)
    found.append(Group("cuda", "plif-64", "all", head, _of_the_head()))
    lanes = _launches(*({"lanes": each} for each in (128, 512, 1024)))
    found += [Group("triton", name, "loss", loss, lanes) for name in ("identity", "plif-64")]
    found.append(Group("triton", "identity", "dz", main, lanes))
    programs = [{"programs": each} for each in (1, 2, 8)]
    tables = [{"lanes_with_tables": 64}, *({"lanes_with_tables": 256, "programs": each} for each in (1, 2))]
    found.append(Group("triton", "plif-64", "all", main, _launches(*programs, *tables)))
    return found


def _of_the_head() -> list[Variant]:
    block = partial(mock.patch.object, chunked_head, "_BLOCK")
    in_the_product = partial(mock.patch.object, chunked_head._Head, "_add_grad_weight", _accumulate_in_the_product)
    return [
        *(Variant(f"chunk_rows={rows}", chunk_rows=rows) for rows in (2048, 4096, 8192)),
        *(Variant(f"block={classes}", partial(block, classes)) for classes in (2048, 8192, 65_536)),
        *(Variant(f"addmm into float32 chunk_rows={rows}", in_the_product, rows) for rows in (2048, 4096, 8192)),
    ]


def call(group: Group, variant: Variant, inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    """The operator under the variant, its losses and gradients; :class:`Unavailable` where its backend cannot run."""
    case, target, device = group.case, inputs.target, inputs.target.device
    operands = [operand.detach() for operand in inputs.operands]
    name: Operation = "cross_entropy" if case.dim is None else "linear_cross_entropy"
    f = make_transform(group.function).to(device)
    explain(name, operands[0], f, group.backend)
    # The identity's coefficients are on the CPU.
    transform = Transform(f.coefficients().detach().to(device), str(f.kernel), list(f.constants()))
    gradient, sums = group.work != "loss", group.work == "all"
    given: dict[str, Any] = {"backend": group.backend, "target": target, "transform": transform}
    given["options"] = LossOptions(None, -100, 0.0, 0.0, False)
    given["reduction"] = "mean" if gradient else "none"
    operator: ops.Operator[Any, Any]
    arguments: ops.CrossEntropy | ops.LinearCrossEntropy
    if case.dim is None:
        operator, output_mask = ops.cross_entropy, (gradient, sums)
        arguments = ops.CrossEntropy(input=operands[0], output_mask=output_mask, **given)
    else:
        operator, output_mask = ops.linear_cross_entropy, (gradient, gradient, False, sums)
        given |= {"return_log_prob": False, "head_options": HeadOptions("chunked", variant.chunk_rows, 0.0)}
        arguments = ops.LinearCrossEntropy(head=Head(*operands, None), output_mask=output_mask, **given)

    def tuned() -> tuple[Tensor, ...]:
        # What nothing differentiates is not seen by autograd, nor by torch's dispatcher.
        with variant.tuned(), torch.no_grad():
            loss, *others = operator(arguments)
            return loss, *others[-len(output_mask) :]

    return tuned


def time_group(group: Group, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """A row for each variant."""
    inputs = make_inputs(group.case, device)
    bare = probes(group.case, inputs)
    actions: dict[str, Action] = {name: probe.action for name, probe in bare.items()}
    first: tuple[float, ...] | None = None
    rows: dict[str, dict[str, Any]] = {}

    def failed(name: str, error: Exception) -> None:
        if name in bare:
            raise error
        rows[name]["reason"] = one_line(error)

    for variant in (Variant(), *group.variants):
        row = rows[variant.name] = {"group": str(group), "name": variant.name, "status": "failed", "reason": None}
        try:
            action = call(group, variant, inputs)
            loss, *gradients = action()
        except Unavailable as reason:
            row.update(status="not available", reason=str(reason))
            continue
        except Exception as error:
            failed(variant.name, error)
            continue
        norms = [float(torch.linalg.vector_norm(each, dtype=torch.float64)) for each in gradients if each.numel()]
        found = (float(loss.double().mean()), *norms)
        first = found if first is None else first
        difference = None if all(map(math.isfinite, found)) else f"not finite: {found}"
        difference = difference or disagreement(group.case, found, first)
        if difference is not None:
            row["reason"] = difference
            continue
        actions[variant.name] = action
    times = measure(actions, device, repeats, failed)
    rates = {name: probe.work / times.pop(name)["median_ms"] * 1e3 for name, probe in bare.items()}
    floor_ms = floor(group.case, rates)["ms"]
    for name, summary in times.items():
        rows[name].update(status="measured", **summary, share_of_floor=floor_ms / summary["median_ms"])
    return list(rows.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Time what is asked for; returns the exit code: 1 where there is no such device or a variant failed."""
    parser = argparse.ArgumentParser("python -m benchmarks.overhead.variants", allow_abbrev=False)
    parser.add_argument("--device", type=device_of, default=torch.device("cpu"), help="cpu emulates a GPU")
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="of operators, such as 'cuda plif-64 *'")
    parser.add_argument("--repeats", type=int, help="turns of each variant (10; small, 1)")
    parser.add_argument("--output", type=Path, default=Path("results/overhead/variants.json"), metavar="FILE")
    given = parser.parse_args(arguments)
    wanted = [group for group in groups() if fnmatchcase(str(group), given.only)]
    if not wanted:
        parser.error(f"argument --only: no operator is called {given.only!r}")
    try:
        use_device(given.device)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    environment = machine.environment() | {"device": device_name(given.device)}
    results: dict[str, Any] = {"complete": False, "environment": environment, "rows": []}
    with emulating() if given.device.type == "cpu" else nullcontext():
        for group in wanted:
            small = replace(group, case=shrunk(group.case)) if given.small else group
            rows = time_group(small, given.device, given.repeats or (1 if given.small else 10))
            results["rows"] += rows
            results["complete"] = group is wanted[-1]
            write_json(given.output, results)
            print(f"{variants_table(rows)}\n", flush=True)
    return 1 if any(row["status"] == "failed" for row in results["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
