"""What the training of a transform asks of an optimiser: groups of parameters, and the clipping of gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .transforms import MonotonicTransform


class GradientNorms(NamedTuple):
    """The norms of the gradients before :func:`clip_grad_norm_`, scalars: of all parameters but f's, and of f's."""

    model: Tensor
    transform: Tensor


def parameter_groups(
    module: nn.Module,
    *,
    lr: float,
    transform_lr: float = 0.01,
    weight_decay: float = 0.0,
    **options: Any,
) -> list[dict[str, Any]]:
    """Parameter groups for any ``torch.optim`` optimiser, with settings of their own for transforms.

    The parameters of transforms get no weight decay (it would pull f away from the identity) and a learning rate of
    their own. Use an optimiser of the Adam family for them; plain SGD hardly moves a PLIF (see :class:`PLIF`). What is
    below a transform is its own, wrapped, parametrised or pruned as it may be.

    >>> model = nn.Sequential(nn.Linear(8, 8), MonotonicCrossEntropyLoss(PLIF()))
    >>> optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3, weight_decay=0.1))
    >>> [group["name"] for group in optimizer.param_groups]
    ['model', 'no_decay', 'transform']

    Args:
        module: the model, sharded by ``fully_shard`` or not. Parameters that do not require a gradient are left out.
        lr: learning rate of everything else.
        transform_lr: learning rate of the transforms; 0.003 to 0.01 worked for Adam, or 0.03 to 0.1 of the head's.
        weight_decay: of the parameters with 2 dimensions or more that are in no transform.
        **options: further options of the optimiser, for all groups.

    Returns:
        Those of these groups that hold anything, each in the order of ``module.parameters()`` and each parameter once,
        tied as it may be: "model"; where ``weight_decay`` is not 0, "no_decay", the biases and gains of norms (fewer
        than 2 dimensions), which differs from "model" in its weight decay of 0 only; "transform".

    Raises:
        TypeError: ``module`` is no module.
        ValueError: a learning rate or the weight decay is negative or not finite, or FSDP1 has flattened f's parameters
            and others into one.
    """
    for name, value in (("lr", lr), ("transform_lr", transform_lr), ("weight_decay", weight_decay)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be finite and not negative, got {value}")
    model, transform = (
        [parameter for parameter in part if parameter.requires_grad] for part in _model_and_transform(module)
    )
    flattened = _dimensions_before_flattening(module)
    decayed = [
        # A weight decay of 0 leaves nothing to set apart, and the state of the optimiser is that of older versions.
        parameter
        for parameter in model
        if weight_decay == 0 or flattened.get(id(parameter), parameter.dim()) >= 2
    ]
    kept = {id(parameter) for parameter in decayed}
    groups: list[dict[str, Any]] = [
        {"name": "model", "params": decayed, "lr": lr, "weight_decay": weight_decay, **options},
        {
            "name": "no_decay",
            "params": [parameter for parameter in model if id(parameter) not in kept],
            "lr": lr,
            "weight_decay": 0.0,
            **options,
        },
        {"name": "transform", "params": transform, "lr": transform_lr, "weight_decay": 0.0, **options},
    ]
    return [group for group in groups if group["params"]]


def clip_grad_norm_(
    module: nn.Module,
    max_norm: float,
    *,
    transform_max_norm: float | None = None,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> GradientNorms:
    r"""Clip the gradients of f's parameters and those of all others apart, each as torch's ``clip_grad_norm_`` does.

    .. math:: g \leftarrow g \cdot \min\left(1, \frac{\text{max\_norm}}{\lVert g \rVert + 10^{-6}}\right),
        \qquad g = g_\text{model}, \text{ and then } g = g_f

    Clipping both together starves the model where f's parameters act on all logits: their gradient is a sum over all
    logits, so that it is most of the joint norm, and the model's own gradients are scaled down for it. Measured: a
    temperature lost 7 % of perplexity by it.

    >>> model = MonotonicSoftmax(64, 1_000, PLIF())
    >>> optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3))
    >>> model(torch.randn(8, 64), torch.randint(1_000, (8,))).loss.backward()
    >>> norms = clip_grad_norm_(model, 1.0)
    >>> optimizer.step()

    Args:
        module: the model, f included; the model itself, where torch's function takes its parameters. It may be sharded
            by ``fully_shard``: call this on every rank.
        max_norm: the norm that the gradients of all parameters but f's keep at most; ``math.inf`` only measures.
        transform_max_norm: that of f's parameters; ``max_norm`` by default.
        norm_type, error_if_nonfinite, foreach: as in :func:`torch.nn.utils.clip_grad_norm_`. Where
            ``error_if_nonfinite`` raises, no gradient has been changed; it waits for the device.

    Returns:
        The two norms before clipping, scalars; 0 where there are no gradients.

    Raises:
        TypeError: ``module`` is no module.
        ValueError: a norm is negative or NaN, or FSDP1 has flattened f's parameters and others into one.
        NotImplementedError: FSDP1 has sharded a parameter.
        RuntimeError: ``error_if_nonfinite``, and a norm is not finite.
    """
    if transform_max_norm is None:
        transform_max_norm = max_norm
    for name, value in (("max_norm", max_norm), ("transform_max_norm", transform_max_norm)):
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    parts = _model_and_transform(module)
    if any(handle.uses_sharded_strategy for handle in _fsdp1_handles(module)):
        raise NotImplementedError(
            "gradients that FullyShardedDataParallel has sharded are added up over the ranks by its own method "
            "clip_grad_norm_ only, which clips all together: shard with torch.distributed.fsdp.fully_shard instead"
        )
    clipped = [[parameter for parameter in part if parameter.grad is not None] for part in parts]
    # Both norms before any gradient changes, for error_if_nonfinite.
    norms = [_total_norm(part, norm_type, error_if_nonfinite, foreach) for part in clipped]
    for part, most, norm in zip(clipped, (max_norm, transform_max_norm), norms, strict=True):
        for alike in _by_mesh(part):
            torch.nn.utils.clip_grads_with_norm_(alike, most, norm, foreach)
    model, transform = norms
    # Where one of them has no gradients: on the device of the other, so that the two can be logged as one tensor.
    return GradientNorms(
        model if clipped[0] else model.to(transform.device), transform if clipped[1] else transform.to(model.device)
    )


def _model_and_transform(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """All parameters but those of transforms, and those of transforms; each once, in the order of the module."""
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"module must be a torch.nn.Module, the model and not its parameters, got {type(module).__name__}"
        )
    of_transforms = {
        id(parameter)
        for part in module.modules()
        if isinstance(part, MonotonicTransform)
        for parameter in part.parameters()
    }
    parameters = list(module.parameters())
    if any(getattr(parameter, "_is_flat_param", False) for parameter in parameters):
        raise ValueError(
            "FullyShardedDataParallel has flattened the parameters of transforms and others into one: "
            "give it use_orig_params=True, or shard with torch.distributed.fsdp.fully_shard"
        )
    return (
        [parameter for parameter in parameters if id(parameter) not in of_transforms],
        [parameter for parameter in parameters if id(parameter) in of_transforms],
    )


def _fsdp1_handles(module: nn.Module) -> Iterator[Any]:
    """What FullyShardedDataParallel keeps of its parameters, found without importing torch.distributed.fsdp."""
    for part in module.modules():
        handle = part.__dict__.get("_handle")
        if getattr(getattr(handle, "flat_param", None), "_is_flat_param", False):
            yield handle


def _dimensions_before_flattening(module: nn.Module) -> dict[int, int]:
    """By the id of a parameter, its dimensions, where it is a piece of what FullyShardedDataParallel has flattened."""
    flat = [handle.flat_param for handle in _fsdp1_handles(module)]
    return {
        id(parameter): len(shape) for each in flat for parameter, shape in zip(each._params, each._shapes, strict=True)
    }


def _by_mesh(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """``parameters`` by the mesh of their gradients: torch takes no DTensors of several, nor any beside plain ones."""
    meshes: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        meshes.setdefault(getattr(parameter.grad, "device_mesh", None), []).append(parameter)
    return list(meshes.values())


def _total_norm(
    parameters: list[nn.Parameter], norm_type: float, error_if_nonfinite: bool, foreach: bool | None
) -> Tensor:
    norms: list[Tensor] = []
    for alike in _by_mesh(parameters):
        gradients = [parameter.grad for parameter in alike if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, norm_type, error_if_nonfinite, foreach)
        # The norm of DTensors is a sum that is still to come, whose item() would be this rank's part of it.
        norms.append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if len(norms) < 2:
        return norms[0] if norms else torch.zeros(())
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]), norm_type)
    return total
