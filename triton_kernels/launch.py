"""The launchers of the kernels over rows: what each operator of :mod:`monosoftmax.ops` does, on the device's stream.

Tile sizes and registers are chosen here, by tables: nothing is tuned when it runs, and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .coefficient_sums import regime_of
from .cross_entropy import cross_entropy_kernel
from .log_softmax import log_softmax_backward_kernel, log_softmax_kernel
from .tiles import alignment_of, as_aligned, width_of
from .token_statistics import token_statistics_kernel
from .transforms import REGISTRY, TransformFunctions


class Tuning(NamedTuple):
    """Sizes that a launch chooses freely. Benchmarks and tests override them with :func:`tuned`."""

    #: Lanes of a tile, each a thread.
    lanes: int = 256
    #: The same where each lane has a table of its own.
    lanes_with_tables: int = 128
    #: Programs on each multiprocessor that keep sums.
    programs: int = 4


_tuning = Tuning()


@contextmanager
def tuned(**wishes: int) -> Iterator[None]:
    """Launch with ``wishes`` in the place of those fields of :class:`Tuning`. No other thread may launch meanwhile."""
    global _tuning
    before, _tuning = _tuning, _tuning._replace(**wishes)
    try:
        yield
    finally:
        _tuning = before


#: Bytes that the tables of all lanes may take together.
_TABLE_BYTES = 64 * 2**20

#: Logits whose contributions are written, for PyTorch to add up, at a time.
_WRITTEN = 2**24


class Call(NamedTuple):
    """A transform as the kernels take it."""

    functions: TransformFunctions
    coefficients: Tensor
    size: int
    constants: tuple[float, float, float]
    packed: Tensor

    @classmethod
    def of(cls, transform: str, coefficients: Tensor, constants: Sequence[float]) -> Call:
        functions = REGISTRY[transform]
        c0, c1, c2 = (float(each) for each in (*constants, 0.0, 0.0, 0.0)[:3])
        packed = functions.pack(coefficients, constants)
        return cls(functions, coefficients, coefficients.shape[-1], (c0, c1, c2), packed)


def lanes_of(classes: int, width: int, most: int) -> int:
    """LANES: a power of two, as many as a row has use for, up to ``most``."""
    return int(min(most, max(32, triton.next_power_of_2(triton.cdiv(classes, width)))))


def registers_of(table_rows: int, gradient: bool) -> int:
    """Registers that a thread may take. ptxas spills a few bytes to stay below 128 or less where it is not told."""
    if table_rows > 2:
        return 255 if gradient else 96
    return 128 if gradient else 64


def tile_arguments(input: Tensor, output: Tensor | None = None, most_lanes: int | None = None) -> dict[str, Any]:
    """What the kernels are compiled for, as far as it follows from the rows that they read and write."""
    width, alignment = width_of(input.dtype), alignment_of(input)
    arguments = {
        "ALIGNMENT": alignment,
        "EDGES": 1 if alignment == "aligned" else 2,
        "WHOLE": alignment == "aligned" and input.shape[1] % width == 0,
        "LANES": lanes_of(input.shape[1], width, most_lanes or _tuning.lanes),
        "WIDTH": width,
    }
    return arguments if output is None else arguments | {"OUT_ALIGNED": as_aligned(output, input)}


def launch_options(lanes: int, registers: int, device: torch.device) -> dict[str, int]:
    """A thread a lane, and the registers that it may take."""
    # Fused products and sums are the default up to Triton 3.9, and will not be after it.
    options = {"num_warps": max(1, lanes // warp_size(device)), "num_stages": 1, "enable_fp_fusion": True}
    return options | {"maxnreg": registers} if limits_registers(device) else options


def warp_size(device: torch.device) -> int:
    """Threads in a warp: 64 on some AMD GPUs."""
    return int(torch.cuda.get_device_properties(device).warp_size) if device.type == "cuda" else 32


def limits_registers(device: torch.device) -> bool:
    """Whether the compiler takes a limit: NVIDIA's does."""
    return device.type == "cuda" and torch.version.hip is None


class Sums:
    """The sums of contributions to the coefficients: what a kernel keeps them in, and the second stage."""

    def __init__(self, call: Call, input: Tensor, needed: bool) -> None:
        self._call, self._dtype, functions = call, input.dtype, call.functions
        deterministic = torch.are_deterministic_algorithms_enabled()
        # Nothing to sum for the transforms without coefficients, and for no rows.
        self.regime = "none"
        if needed and call.size > 0 and input.shape[0] > 0:
            self.regime = regime_of(functions.table_rows, call.size, deterministic)
        self.most_lanes = _tuning.lanes_with_tables if self.regime == "lanes" else _tuning.lanes
        numbers = call.size * max(functions.table_rows, 1)
        self.count = numbers if self.regime == "registers" else 0
        like = input.new_empty(0, dtype=torch.float32)
        self.programs, self.lanes, self.totals = input.shape[0], like, like
        if self.regime in ("registers", "lanes"):
            self.programs = min(input.shape[0], _tuning.programs * multiprocessors(input.device))
            if self.regime == "lanes":
                width = lanes_of(input.shape[1], width_of(input.dtype), self.most_lanes) * functions.table_rows // 2
                entries = call.size * width
                self.programs = max(1, min(self.programs, _TABLE_BYTES // (8 * entries)))
                self.lanes = input.new_empty(self.programs * entries, dtype=torch.int64)
            self.totals = like.new_empty((self.programs, numbers))
        elif self.regime == "global":
            self.programs = min(input.shape[0], 8 * _tuning.programs * multiprocessors(input.device))
            self.totals = like.new_zeros((1, numbers))
        self.needed = needed

    def begin_written(self, input: Tensor) -> None:
        """Before the first :meth:`written`."""
        functions, size = self._call.functions, self._call.size
        self._classes = input.shape[1]
        self.totals = input.new_zeros((functions.table_rows, size), dtype=torch.float32)

    def written(self, rows: int) -> _Written:
        """Where the contributions of ``rows`` rows are written."""
        elements = rows * self._classes
        contributions = self.totals.new_empty((self._call.functions.table_rows, elements))
        return _Written(self, rows, contributions, contributions.new_empty(elements, dtype=torch.int64))

    def add_written(self, part: _Written) -> None:
        """Takes in what was written. index_add_ is deterministic where that is asked for."""
        self.totals.index_add_(1, part.lanes, part.totals)

    def arguments(self) -> dict[str, Any]:
        """What the kernels are compiled for."""
        functions = self._call.functions
        return {
            "functions": functions.for_logits(self._dtype),
            "size": self._call.size,
            "groups": functions.groups(self._call.size),
            "table_rows": functions.table_rows,
            "regime": self.regime,
            "count": self.count,
        }

    def total(self) -> Tensor:
        """The gradient of the coefficients; empty where it is not needed."""
        coefficients = self._call.coefficients
        if not self.needed:
            return coefficients.new_empty(0)
        if self.regime == "none":
            return torch.zeros_like(coefficients)
        if self.regime == "written":
            return self.totals
        total = self.totals.sum(0, dtype=torch.float64).to(coefficients.dtype)
        return self._call.functions.unpack(total).reshape(coefficients.shape)


class _Written:
    """:class:`Sums` of some rows, as contributions to be added up."""

    def __init__(self, sums: Sums, rows: int, totals: Tensor, pieces: Tensor) -> None:
        self.arguments, self.most_lanes, self.programs = sums.arguments, sums.most_lanes, rows
        self.totals, self.lanes = totals, pieces


class LossOptions(NamedTuple):
    """The options of a loss. ``weight`` [V], of all classes also for a shard of them, is float32 and contiguous."""

    weight: Tensor | None
    ignore_index: int
    label_smoothing: float
    z_loss: float


class Shard(NamedTuple):
    """Which classes the columns of the logits are: those from ``offset`` on, of ``classes`` in all."""

    offset: int
    classes: int


class RowResults(NamedTuple):
    """What the loss kernel writes for each row. ``target_y`` and ``weighted_y``: of a shard, in place of the losses."""

    loss: Tensor
    lse: Tensor
    row_stats: Tensor
    target_y: Tensor
    weighted_y: Tensor

    @classmethod
    def empty(cls, input: Tensor, partial: bool = False) -> RowResults:
        rows = input.shape[0]
        absent, present = (input.new_empty(size, dtype=torch.float32) for size in (0, rows))
        row_stats = input.new_empty((2, rows), dtype=torch.float32)
        if partial:
            return cls(absent, absent, row_stats, present, torch.empty_like(present))
        return cls(present, torch.empty_like(present), row_stats, absent, absent)


class Upstream(NamedTuple):
    """The upstream gradients of the losses, one for all (0-dim) or one each, and of lse.

    With a ``factor``, 0-dim, by which those of the losses are multiplied, nothing is written where it is 1.
    """

    loss: Tensor
    lse: Tensor | None = None
    factor: Tensor | None = None


def launch_cross_entropy(
    call: Call,
    input: Tensor,
    target: Tensor,
    options: LossOptions,
    results: RowResults,
    upstream: Upstream | None = None,
    grad_input: Tensor | None = None,
    sums: Sums | None = None,
    *,
    losses: bool,
    return_lse: bool = False,
    shard: Shard | None = None,
) -> None:
    """Writes ``results`` (with ``losses``), ``grad_input`` and ``sums``, whichever are given."""
    rows, classes = input.shape
    if rows == 0:
        return
    if sums is not None and sums.regime == "written":
        assert upstream is not None
        _launch(call, input, target, options, results, upstream, grad_input, None, losses, return_lse, shard)
        sums.begin_written(input)
        for chunk in _chunks(rows, max(1, _WRITTEN // classes)):
            part = sums.written(chunk.stop - chunk.start)
            stats = results._replace(row_stats=results.row_stats[:, chunk].contiguous())
            of_rows = Upstream(
                upstream.loss[chunk] if upstream.loss.dim() > 0 else upstream.loss,
                None if upstream.lse is None else upstream.lse[chunk],
            )
            _launch(call, input[chunk], target[chunk], options, stats, of_rows, None, part, False, False, shard)
            sums.add_written(part)
        return
    _launch(call, input, target, options, results, upstream, grad_input, sums, losses, return_lse, shard)


def _launch(
    call: Call, input: Tensor, target: Tensor, options: LossOptions, results: RowResults, upstream: Upstream | None,
    grad_input: Tensor | None, sums: Any, losses: bool, return_lse: bool, shard: Shard | None,
) -> None:  # fmt: skip
    rows, classes = input.shape
    sums = Sums(call, input, False) if sums is None else sums
    gradient = grad_input is not None
    tile = tile_arguments(input, grad_input if gradient else input, sums.most_lanes)
    partial = losses and results.loss.shape[0] == 0
    nothing = results.row_stats  # stands where a kernel reads and writes nothing
    weight = nothing if options.weight is None else options.weight
    weight_sum = nothing
    if options.weight is not None and smooths(options):
        weight_sum = weight.sum(dtype=torch.float64).float()
    grad_loss = nothing if upstream is None else upstream.loss
    grad_lse, factor = (None, None) if upstream is None else (upstream.lse, upstream.factor)
    shard = Shard(0, classes) if shard is None else shard
    registers = registers_of(call.functions.table_rows, upstream is not None)
    with on_device(input):
        cross_entropy_kernel[(sums.programs,)](
            input, target, weight, weight_sum, call.packed, grad_loss, nothing if grad_lse is None else grad_lse,
            nothing if factor is None else factor,
            *results, grad_input if gradient else input, sums.totals, sums.lanes,
            rows, classes, input.stride(0), 0 if grad_input is None else grad_input.stride(0), int(grad_loss.dim() > 0),
            shard.offset, shard.classes, *call.constants, options.ignore_index, 1.0 - options.label_smoothing,
            options.label_smoothing / shard.classes, float(options.z_loss),
            **sums.arguments(), losses=losses, return_lse=return_lse, partial=partial, gradient=gradient,
            weighted=options.weight is not None, smooths=smooths(options), of_lse=grad_lse is not None,
            has_z_loss=options.z_loss > 0, has_factor=factor is not None, **tile,
            **launch_options(tile["LANES"], registers, input.device),
        )  # fmt: skip


def smooths(options: LossOptions) -> bool:
    """Whether labels are smoothed."""
    return options.label_smoothing > 0


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's device the current one: kernels are launched there."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def _chunks(rows: int, size: int) -> list[slice]:
    return [slice(begin, min(begin + size, rows)) for begin in range(0, rows, size)]


def multiprocessors(device: torch.device) -> int:
    """How many the device has."""
    if device.type != "cuda":
        return 1  # Triton's interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch_log_softmax(call: Call, input: Tensor, output: Tensor, row_stats: Tensor) -> None:
    """Writes log p to ``output`` and ``row_stats`` [2, N]."""
    rows, classes = input.shape
    if rows == 0:
        return
    tile = tile_arguments(input, output)
    with on_device(input):
        log_softmax_kernel[(rows,)](
            input, call.packed, output, row_stats, rows, classes, input.stride(0), output.stride(0), *call.constants,
            functions=call.functions.for_logits(input.dtype), size=call.size, **tile,
            **launch_options(tile["LANES"], registers_of(call.functions.table_rows, False), input.device),
        )  # fmt: skip


def launch_log_softmax_backward(
    call: Call, grad_output: Tensor, input: Tensor, row_stats: Tensor, grad_input: Tensor | None, sums: Sums
) -> None:
    """Writes ``grad_input``, where it is given, and ``sums``."""
    rows, classes = input.shape
    if rows == 0:
        return
    if sums.regime == "written":
        launch_log_softmax_backward(call, grad_output, input, row_stats, grad_input, Sums(call, input, False))
        sums.begin_written(input)
        for chunk in _chunks(rows, max(1, _WRITTEN // classes)):
            part = sums.written(chunk.stop - chunk.start)
            stats = row_stats[:, chunk].contiguous()
            _launch_log_softmax_backward(call, grad_output[chunk], input[chunk], stats, None, part)
            sums.add_written(part)
        return
    _launch_log_softmax_backward(call, grad_output, input, row_stats, grad_input, sums)


def _launch_log_softmax_backward(
    call: Call, grad_output: Tensor, input: Tensor, row_stats: Tensor, grad_input: Tensor | None, sums: Any
) -> None:
    rows, classes = input.shape
    gradient = grad_input is not None
    tile = tile_arguments(input, grad_input if gradient else input, sums.most_lanes)
    with on_device(input):
        log_softmax_backward_kernel[(sums.programs,)](
            grad_output, input, call.packed, row_stats, grad_input if gradient else input, sums.totals, sums.lanes,
            rows, classes, input.stride(0), grad_output.stride(0), 0 if grad_input is None else grad_input.stride(0),
            *call.constants, **sums.arguments(), gradient=gradient, GRAD_ALIGNED=as_aligned(grad_output, input), **tile,
            **launch_options(tile["LANES"], registers_of(call.functions.table_rows, True), input.device),
        )  # fmt: skip


def launch_token_statistics(
    call: Call, input: Tensor, target: Tensor, ignore_index: int, results: Sequence[Tensor]
) -> None:
    """Writes log_prob, entropy, argmax, lse and rank."""
    rows, classes = input.shape
    if rows == 0:
        return
    tile = tile_arguments(input)
    with on_device(input):
        token_statistics_kernel[(rows,)](
            input, target, call.packed, *results, classes, input.stride(0), *call.constants, ignore_index,
            functions=call.functions.for_logits(input.dtype), size=call.size, **tile,
            **launch_options(tile["LANES"], registers_of(call.functions.table_rows, False), input.device),
        )  # fmt: skip
