"""Finds out before the first number whether the ranks of a group call with arguments that fit together.

Each rank sends a row of whole numbers: shapes and options as they are, what is longer as a checksum. Every rank sees
all rows, so that all raise, and say the same.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import Ranks
from .shards import Shard

#: In Facts.classes: the call does not say how many classes there are.
UNKNOWN = -1


class Facts(NamedTuple):
    """What a rank says of its call, whole numbers."""

    #: The classes of this rank, and the number of all classes, or UNKNOWN.
    start: int
    stop: int
    classes: int
    tokens: int
    #: Of the head; 0 for logits.
    features: int
    dtype: int
    #: Checksums.
    target: int
    transform: int
    options: int
    #: Which operands need gradients, as a number.
    needed: int


#: The words for a disagreement: the argument, and what it must be.
_WORDS = {
    "classes": "vocab_size, or the length of weight, must be the same on all ranks of group",
    "tokens": "input must have the same number of tokens on all ranks of group",
    "features": "input must have the same number of features on all ranks of group",
    "dtype": "input must have the same dtype on all ranks of group",
    "target": (
        "target must be the same on all ranks of group: ranks that share out the classes need the same tokens (where "
        "ranks have tokens of their own, call module.unshard(), or gather the tokens first)"
    ),
    "transform": "transform must be the same on all ranks of group, its parameters and the temperature too",
    "options": (
        "weight, ignore_index, label_smoothing, z_loss, z_loss_divisor, reduction, return_lse, outputs, chunk_rows, "
        "grad_in_forward, reduce_grad_input and token_group must be the same on all ranks of group"
    ),
    "needed": "the same operands must require gradients on all ranks of group",
}
_CHECKSUMS = ("dtype", "target", "transform", "options", "needed")
_FAILED = -2


@contextmanager
def together(ranks: Ranks, enabled: bool) -> Iterator[None]:
    """Lets an error of this rank before :func:`agree` be an error of all ranks, which would wait for this one."""
    try:
        yield
    except Exception:
        if enabled and ranks.size > 1:
            ranks.gather(torch.full((len(Facts._fields),), _FAILED, device=_device(ranks)), "facts of a call")
        raise


def agree(ranks: Ranks, facts: Facts) -> int:
    """The number of all classes.

    Raises:
        ValueError: the facts of the ranks do not fit together.
        RuntimeError: another rank has raised an error.
    """
    row = torch.tensor(facts, dtype=torch.int64, device=_device(ranks))
    table = [Facts(*each) for each in ranks.gather(row, "facts of a call").tolist()]
    failed = [rank for rank, each in enumerate(table) if each.stop == _FAILED]
    if failed:
        raise RuntimeError(f"monosoftmax: rank {failed[0]} of {ranks.size} has raised an error, see there")
    for name, words in _WORDS.items():
        found = [getattr(each, name) for each in table]
        if any(each != found[0] for each in found):
            differ = [rank for rank, each in enumerate(found) if each != found[0]]
            got = f"got {found} on ranks 0 to {len(found) - 1}"
            if name in _CHECKSUMS:
                got = f"ranks {differ} differ from rank 0"
            raise ValueError(f"{words}, {got}")
    return _classes(table)


def _classes(table: list[Facts]) -> int:
    shards = sorted((each.start, each.stop) for each in table if each.start != each.stop)
    reached = 0
    for start, stop in shards:
        if start != reached:
            trouble = "overlap" if start < reached else "leave out classes"
            raise ValueError(
                f"vocab_start and the shards of ranks must share out the classes, they {trouble} at class "
                f"{min(start, reached)}: got {[(each.start, each.stop) for each in table]}"
            )
        reached = stop
    if reached == 0:
        raise ValueError(f"at least one rank of group must have a class, got none on {len(table)} ranks")
    if table[0].classes not in (UNKNOWN, reached):
        raise ValueError(
            f"vocab_size, or the length of weight, must be {reached}, what the shards add up to, got {table[0].classes}"
        )
    if any(each.stop > reached for each in table):  # without classes
        raise ValueError(f"vocab_start must be at most {reached}, vocab_size, got {[each.start for each in table]}")
    return reached


def shard_of(start: int, count: int, classes: int) -> Shard:
    """The shard of this rank, checked as far as one rank can."""
    if not 0 <= start <= start + count <= classes:
        raise ValueError(
            f"vocab_start must be between 0 and vocab_size - {count}, the classes of this rank, for vocab_size "
            f"{classes}, got {start}"
        )
    return Shard(start, start + count, classes)


def checksum_of_tensor(tensor: Tensor) -> int:
    """A whole number that differs where any bit of a small tensor or of targets differs, but for rare chances."""
    bits = tensor.detach().contiguous().reshape(-1)
    bits = bits.view(torch.int32).long() if bits.is_floating_point() and bits.element_size() == 4 else (
        bits.view(torch.int64) if bits.element_size() == 8 else bits.long()
    )  # fmt: skip
    order = torch.arange(1, bits.numel() + 1, device=bits.device)
    return int((bits * (order * 2654435761 + 97)).sum())


def checksum(*values: Any) -> int:
    """A checksum of what has a repr() that tells it."""
    return zlib.crc32(repr(values).encode())


def _device(ranks: Ranks) -> torch.device:
    """A device whose tensors the group exchanges: the CPU, if it can."""
    if "cpu" in str(dist.get_backend_config(ranks.group)):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
