"""The collectives of this package: sums and largest values over the ranks of a process group, counted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Collective(NamedTuple):
    """A collective of this package, as :func:`traffic` records it."""

    #: "sum", "max", "min" or "gather".
    kind: str
    #: What was exchanged, such as "sums of rows".
    what: str
    #: Elements and bytes of the tensor of one rank.
    numel: int
    nbytes: int
    ranks: int


_records: list[list[Collective]] = []


@contextmanager
def traffic() -> Iterator[list[Collective]]:
    """Records the collectives of this package that this process takes part in, in their order.

    >>> with traffic() as collectives:
    ...     pass
    >>> collectives
    []
    """
    record: list[Collective] = []
    _records.append(record)
    try:
        yield record
    finally:
        _records.remove(record)


class Ranks:
    """The ranks of a process group, of which this process is one. A group of one rank communicates nothing."""

    def __init__(self, group: Any) -> None:
        """From a process group, a 1-dimensional DeviceMesh, or None: all ranks.

        Raises:
            TypeError, ValueError, RuntimeError: ``group`` is none of these, this process is not in it, or
                torch.distributed has not been initialised.
        """
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError("group needs torch.distributed.init_process_group() before")
        if hasattr(group, "get_group"):
            if group.ndim != 1:
                raise ValueError(f"group must be a process group or a 1-dimensional mesh, got {group.ndim} dimensions")
            group = group.get_group()
        if group is not None and not isinstance(group, dist.ProcessGroup):
            if group is dist.GroupMember.NON_GROUP_MEMBER:
                raise ValueError("group must be one that this process is in")
            raise TypeError(f"group must be a process group, a DeviceMesh or None, got {type(group).__name__}")
        self.group = group
        self.size: int = dist.get_world_size(group)
        self.rank: int = dist.get_rank(group)
        if self.rank < 0:
            raise ValueError("group must be one that this process is in")

    @classmethod
    def alone(cls) -> Ranks:
        """This process as a group of its own, without torch.distributed."""
        alone = cls.__new__(cls)
        alone.group, alone.size, alone.rank = None, 1, 0
        return alone

    def sum_(self, tensor: Tensor, what: str) -> Tensor:
        """Overwrites a contiguous ``tensor`` with its sum over the ranks, the same bits on each, and returns it."""
        return self._reduce(tensor, "sum", what)

    def max_(self, tensor: Tensor, what: str) -> Tensor:
        """:meth:`sum_` for the largest. What becomes of NaN is not defined."""
        return self._reduce(tensor, "max", what)

    def min_(self, tensor: Tensor, what: str) -> Tensor:
        return self._reduce(tensor, "min", what)

    def _reduce(self, tensor: Tensor, kind: str, what: str) -> Tensor:
        if self.size == 1 or tensor.numel() == 0:
            return tensor
        op = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}[kind]
        with self._collective(kind, what, tensor):
            dist.all_reduce(tensor, op=op, group=self.group)
        return tensor

    def gather(self, tensor: Tensor, what: str) -> Tensor:
        """``tensor`` of each rank, [ranks, ...]."""
        gathered = tensor.new_empty((self.size, *tensor.shape))
        if self.size == 1:
            return gathered.copy_(tensor.unsqueeze(0))
        with self._collective("gather", what, tensor):
            dist.all_gather(list(gathered.unbind(0)), tensor.contiguous(), group=self.group)
        return gathered

    @contextmanager
    def _collective(self, kind: str, what: str, tensor: Tensor) -> Iterator[None]:
        for record in _records:
            record.append(Collective(kind, what, tensor.numel(), tensor.nbytes, self.size))
        try:
            yield
        except RuntimeError as error:  # which torch's DistError is
            shape = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            raise RuntimeError(
                f"monosoftmax: the exchange of {what} ({kind} of {shape}) failed on rank {self.rank} of {self.size}: "
                f"another rank has failed, is late, or was called with other shapes. torch says: {error}"
            ) from error


def is_debugging() -> bool:
    """Whether TORCH_DISTRIBUTED_DEBUG is INFO or DETAIL."""
    return os.environ.get("TORCH_DISTRIBUTED_DEBUG", "").upper() in ("INFO", "DETAIL")


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, ranks: Ranks, what: str) -> Tensor:
        return ranks.sum_(input.clone(), what)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        return grad_output, None, None


def summed(input: Tensor, ranks: Ranks, what: str) -> Tensor:
    """The sum over the ranks, of which each differentiates its own part."""
    found: Tensor = _Sum.apply(input, ranks, what)  # type: ignore[no-untyped-call]
    return found


class _SumOfGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, ranks: Ranks, what: str) -> Tensor:
        ctx.ranks, ctx.what = ranks, what
        return input.view_as(input)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        return ctx.ranks.sum_(grad_output.clone(memory_format=torch.contiguous_format), ctx.what), None, None


def with_summed_gradient(input: Tensor, ranks: Ranks, what: str) -> Tensor:
    """``input``, whose gradient is the sum of the gradients of all ranks: each of them has used it in its own way."""
    summed: Tensor = _SumOfGradients.apply(input, ranks, what)  # type: ignore[no-untyped-call]
    return summed
