"""A training step of a head that devices share out: the calls that are counted, timed, and run by real processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

import monosoftmax as ms
from monosoftmax.distributed.collectives import Ranks
from monosoftmax.head_products import chunk_rows

#: ``whole``: each device has the whole head and a share of the tokens. The others share out the vocabulary: ``ahead``
#: with three products and collectives for each chunk, ``again`` with four products and collectives for all tokens.
Layout = Literal["whole", "ahead", "again"]
LAYOUTS: tuple[Layout, ...] = ("whole", "ahead", "again")


@dataclass(frozen=True)
class Shape:
    """A head, and the tokens of one step of all devices."""

    tokens: int
    classes: int
    features: int
    devices: int
    dtype: str = "float32"
    #: The type of the devices, which decides how many rows a chunk has.
    kind: str = "cpu"

    def of_device(self, layout: Layout) -> Shape:
        """The tokens and classes of one device: of the one that has most."""
        name = "tokens" if layout == "whole" else "classes"
        return replace(self, **{name: math.ceil(getattr(self, name) / self.devices)})

    @property
    def rows_in_chunk(self) -> int:
        return chunk_rows(self.classes, getattr(torch, self.dtype), self.kind)


@contextmanager
def fake_devices(number: int) -> Iterator[None]:
    """While it lasts, this process takes itself for the first of so many. What it gets from them has no meaning."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # which makes the backend known to torch

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=number)
    try:
        yield
    finally:
        dist.destroy_process_group()


def prepare(shape: Shape, layout: Layout, device: str = "cpu", rows_in_chunk: int = 0) -> Callable[[], Tensor]:
    """One step, forward and backward, of this rank of the default process group, whose ranks are ``shape.devices``."""
    # All ranks must make all groups.
    alone = [dist.new_group([rank]) for rank in range(shape.devices)][dist.get_rank()]
    everyone, here, dtype = Ranks(None), shape.of_device(layout), getattr(torch, shape.dtype)
    start = 0 if layout == "whole" else min(dist.get_rank() * here.classes, shape.classes)
    count = min(here.classes, shape.classes - start)
    with torch.device(device):
        generator = None if device == "meta" else torch.Generator().manual_seed(0)
        input = torch.empty(here.tokens, shape.features, dtype=dtype).normal_(generator=generator).requires_grad_()
        weight = torch.empty(count, shape.features, dtype=dtype).normal_(0, 0.02, generator=generator).requires_grad_()
        target = torch.randint(shape.classes, (here.tokens,), generator=generator)
        f = ms.transforms.PLIF(64)
    parameters = (weight, *f.parameters())

    def step() -> Tensor:
        for each in (input, *parameters):
            each.grad = None
        loss: Tensor = ms.distributed.linear_cross_entropy(
            input,
            weight,
            target,
            f,
            vocab_start=start,
            vocab_size=shape.classes,
            group=alone if layout == "whole" else None,
            token_group=everyone.group if layout == "whole" and everyone.size > 1 else None,
            chunk_rows=rows_in_chunk or here.rows_in_chunk,
            grad_in_forward=layout != "again",
            check=False,
        )
        torch.autograd.backward(loss)
        # As DistributedDataParallel does, which computes the mean.
        for each in parameters if layout == "whole" else ():
            assert each.grad is not None
            everyone.sum_(each.grad, "the gradient of a parameter")
        return loss.detach()

    return step
