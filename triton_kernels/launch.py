"""What the launches of the kernels have in common, and the launcher of the loss kernel.

Tile sizes and registers come from tables and rules in this file. Nothing is tuned at run time, and nothing waits for
the device.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from monosoftmax.groups import LossOptions, RowResults, Transform, Upstream

from .coefficient_sums import regime_of
from .cross_entropy import cross_entropy_kernel
from .tiles import alignment_of, as_aligned, width_of
from .transforms import REGISTRY, TransformFunctions
from .transforms.composed import compose


class Tuning(NamedTuple):
    """Sizes that change the speed only. Benchmarks and tests override them with :func:`tuned`."""

    #: Lanes of a tile; each lane is a thread.
    lanes: int = 256
    #: Lanes of a tile if each lane has a table of its own.
    lanes_with_tables: int = 128
    #: Programs on each multiprocessor, if programs keep sums.
    programs: int = 4


_tuning = Tuning()


@contextmanager
def tuned(**wishes: int) -> Iterator[None]:
    """Replaces those fields of :class:`Tuning` while it lasts. No other thread may launch meanwhile."""
    global _tuning
    before, _tuning = _tuning, _tuning._replace(**wishes)
    try:
        yield
    finally:
        _tuning = before


#: The most bytes that the tables of all lanes take together.
_TABLE_BYTES = 64 * 2**20

#: The regime "written" takes so many logits at a time: their contributions are written, then added up by PyTorch.
_WRITTEN = 2**24


class Call(NamedTuple):
    """A transform as the kernels take it, with what stands before and after f."""

    functions: TransformFunctions
    coefficients: Tensor
    size: int
    constants: tuple[float, float, float]
    packed: Tensor
    #: Empty, or scale and cap.
    inner: list[float]
    temperature: Tensor | None

    @classmethod
    def of(cls, transform: Transform) -> Call:
        coefficients, name, constants, inner, temperature = transform
        functions = REGISTRY[name]
        c0, c1, c2 = (float(each) for each in (*constants, 0.0, 0.0, 0.0)[:3])
        packed = functions.pack(coefficients, constants)
        size, numbers = coefficients.shape[-1], (c0, c1, c2)
        return cls(
            functions, coefficients, size, constants=numbers, packed=packed, inner=inner, temperature=temperature
        )

    def arguments(self, dtype: torch.dtype) -> dict[str, Any]:
        """The arguments that every kernel has, for logits of type ``dtype``."""
        c0, c1, c2 = self.constants
        # None is a constant of the compiled kernel, and so no argument of it.
        scale, cap = self.inner or (None, None)
        inner = ("cap" if dtype == torch.float32 else "cap of half") if cap else "scale" if self.inner else ""
        functions, size = compose(
            self.functions.for_logits(dtype), self.size, inner, has_temperature=self.temperature is not None
        )
        return {
            "coefficients": self.packed,
            "temperature": self.temperature,
            "c0": c0,
            "c1": c1,
            "c2": c2,
            "scale": scale,
            "cap": cap,
            "functions": functions,
            "size": size,
        }

    def gradient(self, totals: Tensor) -> Tensor:
        """The gradient of the coefficients from the sums of several programs, [programs, numbers]."""
        total = totals.sum(0, dtype=torch.float64).to(self.coefficients.dtype)
        return self.functions.unpack(total).reshape(self.coefficients.shape)


class RowLoss(NamedTuple):
    """A loss of rows as the kernels take it, with contiguous tensors."""

    target: Tensor
    call: Call
    options: LossOptions

    @classmethod
    def of(cls, target: Tensor, transform: Transform, options: LossOptions) -> RowLoss:
        if options.weight is not None:
            options = options._replace(weight=options.weight.contiguous())
        return cls(target.contiguous(), Call.of(transform), options)

    @property
    def smooths(self) -> bool:
        """Whether labels are smoothed."""
        return self.options.label_smoothing > 0

    def arguments(self, dtype: torch.dtype, unused: Tensor) -> dict[str, Any]:
        """The arguments that every kernel of the loss has. ``unused`` stands for a tensor that is not read."""
        weight = self.options.weight
        arguments = self.call.arguments(dtype)
        arguments.update(
            target=self.target,
            weight=unused if weight is None else weight,
            weighted=weight is not None,
            smooths=self.smooths,
            ignore_index=self.options.ignore_index,
        )
        return arguments

    def gradient_arguments(self, classes: int, upstream: Upstream | None, unused: Tensor) -> dict[str, Any]:
        """The arguments that the kernels with gradients have beyond those of :meth:`arguments`."""
        weight, label_smoothing, z_loss = self.options.weight, self.options.label_smoothing, self.options.z_loss
        loss, lse, *_ = Upstream(unused) if upstream is None else upstream
        assert loss is not None
        functions, size = self.call.functions, self.call.size
        return {
            "weight_sum": unused if weight is None or not self.smooths else weight.sum(dtype=torch.float64).float(),
            "grad_loss": loss,
            "grad_loss_stride": int(loss.dim() > 0),
            "grad_lse": unused if lse is None else lse,
            "of_lse": lse is not None,
            "target_share": 1.0 - label_smoothing,
            "smooth_share": label_smoothing / classes,
            "z_loss": float(z_loss),
            "has_z_loss": z_loss > 0,
            "groups": functions.groups(size),
            "table_rows": functions.table_rows,
        }


def as_read(upstream: Upstream, like: Tensor) -> Upstream:
    """Upstream gradients as the kernels read them: contiguous, and 0 in the place of an absent ``loss``."""
    loss, lse, factor, entropy = upstream
    if loss is None:
        loss = like.new_zeros((), dtype=torch.float32)
    elif loss.dim() > 0 and loss.stride(0) == 0 and len(loss) > 0:
        loss = loss[0]  # a number that was expanded is read as one number
    lse, entropy = (None if each is None else each.contiguous() for each in (lse, entropy))
    return Upstream(loss.contiguous(), lse, factor, entropy)


def rows_of(upstream: Upstream, chunk: slice) -> Upstream:
    """The upstream gradients of some of the rows, without the factor."""
    loss, lse, _, entropy = (each if each is None or each.dim() == 0 else each[chunk] for each in upstream)
    return Upstream(loss, lse, None, entropy)


def lanes_of(classes: int, width: int, most: int) -> int:
    """LANES: a power of two, enough for a whole row or ``most``, and at least 32."""
    return int(min(most, max(32, triton.next_power_of_2(triton.cdiv(classes, width)))))


def registers_of(table_rows: int, gradient: bool) -> int:
    """The limit on the registers of a thread. Without one, ptxas spills a few bytes to stay at 128 or below."""
    if table_rows > 2:
        return 255 if gradient else 96
    return 128 if gradient else 64


def tile_arguments(rows: Tensor, output: Tensor | None = None, most_lanes: int | None = None) -> dict[str, Any]:
    """The constants of a kernel that follow from the rows which it reads and writes."""
    width, alignment = width_of(rows.dtype), alignment_of(rows)
    arguments = {
        "ALIGNMENT": alignment,
        "EDGES": 1 if alignment == "aligned" else 2,
        "WHOLE": alignment == "aligned" and rows.shape[1] % width == 0,
        "LANES": lanes_of(rows.shape[1], width, most_lanes or _tuning.lanes),
        "WIDTH": width,
    }
    if output is not None:
        arguments["OUT_ALIGNED"] = as_aligned(output, rows)
    return arguments


def launch_options(lanes: int, registers: int, device: torch.device) -> dict[str, int]:
    """The compiler's options: one thread for each lane, and at most so many registers for it."""
    # Fused products and sums are the default up to Triton 3.9, and will not be after it.
    options = {"num_warps": max(1, lanes // warp_size(device)), "num_stages": 1, "enable_fp_fusion": True}
    if limits_registers(device):
        options["maxnreg"] = registers
    return options


@functools.cache
def _properties(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device)


def warp_size(device: torch.device) -> int:
    """Threads in a warp: 64 on some AMD GPUs."""
    return int(_properties(device).warp_size) if device.type == "cuda" else 32


def multiprocessors(device: torch.device) -> int:
    """How many the device has; Triton's interpreter has one."""
    return int(_properties(device).multi_processor_count) if device.type == "cuda" else 1


def limits_registers(device: torch.device) -> bool:
    """Whether the compiler takes a limit: NVIDIA's does."""
    return device.type == "cuda" and torch.version.hip is None


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's device the current one: kernels are launched there."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


class Sums:
    """The sums of contributions to the coefficients: what a kernel keeps them in, and the second stage."""

    def __init__(self, call: Call, rows: Tensor, needed: bool) -> None:
        self.call, self.needed, self._rows, functions = call, needed, rows, call.functions
        count, classes = rows.shape
        # Transforms without coefficients have nothing to sum, nor have no rows.
        self.regime = "none"
        if needed and call.size > 0 and count > 0:
            self.regime = regime_of(functions.table_rows, call.size, torch.are_deterministic_algorithms_enabled())
        self.most_lanes = _tuning.lanes_with_tables if self.regime == "lanes" else _tuning.lanes
        numbers = call.size * max(functions.table_rows, 1)
        self._count = numbers if self.regime == "registers" else 0
        like = rows.new_empty(0, dtype=torch.float32)
        self.programs, self._lanes, self.totals = count, like, like
        if self.regime in ("registers", "lanes"):
            self.programs = min(count, _tuning.programs * multiprocessors(rows.device))
            if self.regime == "lanes":
                width = lanes_of(classes, width_of(rows.dtype), self.most_lanes) * functions.table_rows // 2
                entries = call.size * width
                self.programs = max(1, min(self.programs, _TABLE_BYTES // (8 * entries)))
                self._lanes = rows.new_empty(self.programs * entries, dtype=torch.int64)
            self.totals = like.new_empty((self.programs, numbers))
        elif self.regime == "global":
            self.programs = min(count, 8 * _tuning.programs * multiprocessors(rows.device))
            self.totals = like.new_zeros((1, numbers))

    def launches(self) -> Iterator[tuple[slice | None, Sums]]:
        """The launches that the sums take: which rows, None for all of them, and the sums of each launch.

        The launches of some of the rows write contributions and nothing else.
        """
        if self.regime != "written":
            yield None, self
            return
        yield None, Sums(self.call, self._rows, False)
        (count, classes), table_rows = self._rows.shape, self.call.functions.table_rows
        self.totals = self.totals.new_zeros((table_rows, self.call.size))
        at_a_time = max(1, _WRITTEN // classes)
        for begin in range(0, count, at_a_time):
            chunk = slice(begin, min(begin + at_a_time, count))
            part = copy(self)
            part.programs = chunk.stop - begin
            part.totals = self.totals.new_empty((table_rows, part.programs * classes))
            part._lanes = part.totals.new_empty(part.programs * classes, dtype=torch.int64)
            yield chunk, part
            self.add_written(part)

    def add_written(self, part: Sums) -> None:
        """Adds what a launch wrote. index_add_ is deterministic where PyTorch is asked to be."""
        self.totals.index_add_(1, part._lanes, part.totals)

    def arguments(self) -> dict[str, Any]:
        """The arguments of a kernel that sums."""
        return {"totals": self.totals, "lanes": self._lanes, "regime": self.regime, "count": self._count}

    def total(self) -> Tensor:
        """The gradient of the coefficients; empty where it is not needed."""
        if not self.needed:
            return self.call.coefficients.new_empty(0)
        if self.regime == "none":
            return torch.zeros_like(self.call.coefficients)
        return self.totals if self.regime == "written" else self.call.gradient(self.totals)


def reads_again(rows: Tensor, results: RowResults, sums: Sums) -> bool:
    """Whether launches for ``sums`` read logits that the gradient overwrites. Then the gradient must come last."""
    return sums.regime == "written" and results.grad_rows.data_ptr() == rows.data_ptr()


def launch_cross_entropy(
    rows: Tensor, loss: RowLoss, upstream: Upstream | None, results: RowResults, sums: Sums
) -> None:
    """Fills in ``sums`` and those of ``results`` that are not empty; row_stats without losses are read instead.

    Without ``upstream`` there are losses only. The gradient of rows may be written over ``rows``.
    """
    if rows.shape[0] == 0:
        return
    upstream = None if upstream is None else as_read(upstream, rows)
    if reads_again(rows, results, sums):
        empty = rows.new_empty(0)
        launch_cross_entropy(rows, loss, upstream, results._replace(grad_rows=empty), sums)
        results, sums = results._replace(loss=empty), Sums(loss.call, rows, False)
    for chunk, part in sums.launches():
        if chunk is None:
            _launch_cross_entropy(rows, loss, upstream, results, part)
            continue
        assert upstream is not None
        of_chunk = rows_of(upstream, chunk)
        empty, row_stats = rows.new_empty(0), results.row_stats[:, chunk].contiguous()
        stats = RowResults(empty, empty, row_stats, empty, empty)
        _launch_cross_entropy(rows[chunk], loss._replace(target=loss.target[chunk]), of_chunk, stats, part)


def _launch_cross_entropy(
    rows: Tensor, loss: RowLoss, upstream: Upstream | None, results: RowResults, sums: Sums
) -> None:
    (count, classes), unused = rows.shape, results.row_stats
    losses, gradient = results.loss.numel() > 0, results.grad_rows.numel() > 0
    grad_rows = results.grad_rows if gradient else rows
    _, _, factor, entropy = Upstream(None) if upstream is None else upstream
    tile = tile_arguments(rows, grad_rows, sums.most_lanes)
    registers = registers_of(loss.call.functions.table_rows, upstream is not None)
    with on_device(rows):
        cross_entropy_kernel[(sums.programs,)](
            input=rows, rows=count, classes=classes, stride=rows.stride(0), row_stats=results.row_stats,
            loss=results.loss if losses else unused, lse=results.lse if losses else unused, losses=losses,
            return_lse=losses and loss.options.return_lse, grad_input=grad_rows, grad_stride=grad_rows.stride(0),
            gradient=gradient, factor=unused if factor is None else factor, has_factor=factor is not None,
            grad_entropy=unused if entropy is None else entropy, of_entropy=entropy is not None,
            **loss.arguments(rows.dtype, unused), **loss.gradient_arguments(classes, upstream, unused),
            **sums.arguments(), **tile, **launch_options(tile["LANES"], registers, rows.device),
        )  # fmt: skip
