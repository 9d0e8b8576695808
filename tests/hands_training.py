"""Twenty steps of AdamW, and what they make of a head; as a job of ranks, what they make of it together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from hands_heads import CLASSES, FEATURES, ROWS, built
from losses import TRANSFORMS
from torch import Tensor, nn

STEPS, LR, LR_OF_F = 20, 1e-2, 1e-3

_generator = torch.Generator().manual_seed(4)
HIDDEN = torch.randn(STEPS, ROWS, FEATURES, generator=_generator)
TARGET = torch.randint(CLASSES, (STEPS, ROWS), generator=_generator)
GRID = torch.linspace(-6, 6, 49, dtype=torch.float64)


def train(
    module: Any,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    parameters: Mapping[str, Tensor] | None = None,
    rows: slice = slice(None),
    dtype: torch.dtype = torch.float32,
) -> None:
    """At the usual rates, f in a group of its own; ``module``'s own loss and parameters, unless others are given."""
    named = dict(module.named_parameters()) if parameters is None else parameters
    of_f = [parameter for name, parameter in named.items() if "transform." in name]
    others = [parameter for name, parameter in named.items() if "transform." not in name]
    groups = [{"params": others, "lr": LR}, {"params": of_f, "lr": LR_OF_F, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW([group for group in groups if group["params"]])
    for input, target in zip(HIDDEN.to(dtype), TARGET, strict=True):
        optimiser.zero_grad()
        (module if loss is None else loss)(input[rows], target[rows]).backward()
        optimiser.step()


def reached(name: str, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters, and f as the function that it is to a softmax, by which no constant shows; in float64."""
    values = {each: parameter.detach().double() for each, parameter in parameters.items()}
    head = built(name).double()
    head.load_state_dict(values)
    with torch.no_grad():
        return {**values, "f": head.transform(GRID) - head.transform(torch.zeros_like(GRID))}


WAYS_OF_PROCESSES = ("DDP", "FSDP2", "FSDP2 of a bfloat16 module")


def together() -> dict[str, dict[str, dict[str, Tensor]]]:
    """On a rank: the parameters, by the way of sharing and the transform."""
    from hands_in_processes import WORLD, parameters_of
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    rank, mesh = torch.distributed.get_rank(), init_device_mesh("cpu", (WORLD,))

    def with_f_apart(head: Any) -> nn.Module:
        fully_shard(head.transform, mesh=mesh)
        return fully_shard(head, mesh=mesh)

    ways: tuple[Callable[[Any], nn.Module], ...] = (
        DistributedDataParallel,
        lambda head: fully_shard(head, mesh=mesh),
        lambda head: with_f_apart(head.to(torch.bfloat16)),
    )
    mine = slice(rank * ROWS // WORLD, (rank + 1) * ROWS // WORLD)
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    for way, enter in zip(WAYS_OF_PROCESSES, ways, strict=True):
        found[way] = {}
        for name in TRANSFORMS:
            module = enter(built(name))
            train(module, rows=mine, dtype=next(module.parameters()).dtype)
            found[way][name] = parameters_of(module)
    return found
