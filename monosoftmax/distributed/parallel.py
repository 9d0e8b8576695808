"""Layers under ``parallelize_module`` and ``fully_shard``."""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from ..modules import MonotonicSoftmax

#: The methods of a layer beside forward that read its parameters.
_METHODS = ("logits", "log_prob", "predict", "sample")


class VocabParallel(ParallelStyle):
    """The style of an output layer whose classes the ranks of a mesh share out, for ``parallelize_module``.

    The weight and the bias become DTensors, ``Shard(0)``. Loss, ``log_prob``, ``predict`` and ``sample`` of a
    :class:`monosoftmax.MonotonicSoftmax` go on as before, and so does :func:`monosoftmax.linear_cross_entropy` of the
    weight of a :class:`torch.nn.Linear`, whose forward gives logits that are a DTensor, ``Shard(-1)``, for
    :func:`monosoftmax.cross_entropy`. f stays as it is on each rank.

    A weight that is tied to an embedding is not tied any more. Shard the embedding, too, by
    ``RowwiseParallel(input_layouts=Replicate())``, and then tie again: ``model.embedding.weight = model.head.weight``.

    >>> from torch.distributed.tensor.parallel import parallelize_module
    >>> model = parallelize_module(model, mesh, {"head": VocabParallel()})  # doctest: +SKIP

    Args:
        input_layouts: how the input of forward is placed where it is a plain tensor: ``Replicate()``, the same on all
            ranks; or ``Shard(dim)`` of the tokens, after sequence parallelism, whose layer gathers them, and scatters
            the gradient. The targets are those of all tokens in any case.

    Raises:
        TypeError: the module is neither a ``MonotonicSoftmax`` nor a ``torch.nn.Linear``.
        ValueError: its weight is a DTensor already, or computed from other parameters.
    """

    def __init__(self, *, input_layouts: Placement | None = None) -> None:
        super().__init__()
        self.input_layouts = input_layouts or Replicate()

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, (MonotonicSoftmax, nn.Linear)):
            raise TypeError(f"VocabParallel is for MonotonicSoftmax and nn.Linear, got {type(module).__name__}")
        for name in ("weight", "bias"):
            parameter = module._parameters.get(name)
            if parameter is None:
                if name == "weight":
                    raise ValueError("weight must be a parameter, not one that is computed from others")
                continue
            if isinstance(parameter, DTensor):
                raise ValueError(f"{name} must be a plain parameter, got a DTensor placed as {parameter.placements}")
            shared = distribute_tensor(parameter, device_mesh, [Shard(0)], src_data_rank=self.src_data_rank)
            module.register_parameter(name, nn.Parameter(shared, requires_grad=parameter.requires_grad))

        def placed(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            input, *others = inputs
            if not isinstance(input, DTensor):
                input = DTensor.from_local(input, device_mesh, [self.input_layouts], run_check=False)
            if isinstance(module, nn.Linear) and not isinstance(self.input_layouts, Replicate):
                input = input.redistribute(placements=[Replicate()])
            return input, *others

        if isinstance(module, nn.Linear) or not isinstance(self.input_layouts, Replicate):
            module.register_forward_pre_hook(placed)
        return module


def prepare(model: nn.Module) -> nn.Module:
    """Lets the methods of output layers that are not forward gather the parameters that ``fully_shard`` has sharded.

    Call it once, after ``fully_shard``: ``log_prob``, ``predict``, ``sample`` and ``logits`` of each
    :class:`monosoftmax.MonotonicSoftmax` in ``model`` are then forward methods of the module that ``fully_shard`` was
    called with, the layer or the nearest one around it (``torch.distributed.fsdp.register_fsdp_forward_method``).

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, MonotonicSoftmax):
            continue
        owner = _owner(model, name)
        for method in _METHODS if owner is not None else ():
            if owner is layer:
                register_fsdp_forward_method(layer, method)
            else:
                _register_at(cast(nn.Module, owner), layer, name, method)
    return model


def _owner(model: nn.Module, name: str) -> nn.Module | None:
    """The module at or above ``name`` whose parameters are gathered together with those of the layer there."""
    path = name.split(".") if name else []
    for length in range(len(path), -1, -1):
        module = model.get_submodule(".".join(path[:length]))
        if isinstance(module, FSDPModule):
            return module
    return None


def _register_at(owner: nn.Module, layer: MonotonicSoftmax, name: str, method: str) -> None:
    """Calls ``method`` of ``layer`` through a forward method of ``owner``."""
    own, through = getattr(layer, method), f"_{method}_of_{name.replace('.', '_')}"

    def of_layer(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    def gathered(*args: Any, **kwargs: Any) -> Any:
        return getattr(owner, through)(*args, **kwargs)

    object.__setattr__(owner, through, of_layer)
    register_fsdp_forward_method(owner, through)
    object.__setattr__(layer, method, gathered)
