"""Help for the training of transforms: groups of parameters for an optimiser, and the clipping of gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .transforms import MonotonicTransform


class GradientNorms(NamedTuple):
    """The norms of gradients before :func:`clip_grad_norm_`, scalars: of all parameters but f's, and of f's."""

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
    """Parameter groups for any ``torch.optim`` optimiser, with separate settings for transforms.

    The parameters of transforms get their own learning rate, and no weight decay, which would pull f away from the
    identity. Use an optimiser of the Adam family for them: plain SGD hardly moves a PLIF (see :class:`PLIF`). All
    parameters below a transform belong to it, also if it is wrapped, parametrised or pruned.

    >>> model = nn.Sequential(nn.Linear(8, 8), MonotonicCrossEntropyLoss(PLIF()))
    >>> optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3, weight_decay=0.1))
    >>> [group["name"] for group in optimizer.param_groups]
    ['model', 'no_decay', 'transform']

    Args:
        module: the model, sharded by ``fully_shard`` or not. Parameters that do not require a gradient are left out.
        lr: the learning rate of all other parameters.
        transform_lr: learning rate of the transforms. For Adam, 0.003 to 0.01 worked, or 0.03 to 0.1 of the head's.
        weight_decay: for parameters with 2 dimensions or more that are in no transform.
        **options: further options of the optimiser, for all groups.

    Returns:
        The groups "model", "no_decay" and "transform", without empty ones. Each is in the order of
        ``module.parameters()``, and has a tied parameter once. "no_decay" exists if ``weight_decay`` is not 0. It has
        the biases and the gains of norms (fewer than 2 dimensions), and differs from "model" only in its weight decay
        of 0. DTensors of different meshes, and plain tensors beside them, get groups of their own under the same name,
        since no foreach kernel of an optimiser takes a mixture.

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
        # With a weight decay of 0 there is no "no_decay", so that the optimiser has the state of older versions.
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
    return [{**group, "params": alike} for group in groups for alike in _by_mesh(group["params"])]


def clip_grad_norm_(
    module: nn.Module,
    max_norm: float,
    *,
    transform_max_norm: float | None = None,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> GradientNorms:
    r"""Clip the gradients of f's parameters and of all others separately, each like torch's ``clip_grad_norm_``.

    .. math:: g \leftarrow g \cdot \min\left(1, \frac{\text{max\_norm}}{\lVert g \rVert + 10^{-6}}\right),
        \qquad g = g_\text{model}, \text{ and then } g = g_f

    Clipping both together starves the model if f's parameters act on all logits. Their gradient is a sum over all
    logits: it makes up most of the joint norm, and scales down the gradients of the model. Measured: a temperature lost
    7 % of perplexity by it.

    >>> model = MonotonicSoftmax(64, 1_000, PLIF())
    >>> optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3))
    >>> model(torch.randn(8, 64), torch.randint(1_000, (8,))).loss.backward()
    >>> norms = clip_grad_norm_(model, 1.0)
    >>> optimizer.step()

    Args:
        module: the model, f included; torch's function takes parameters instead. It may be sharded by ``fully_shard``:
            call this on every rank.
        max_norm: the largest norm for the gradients of all parameters but f's; ``math.inf`` only measures.
        transform_max_norm: the largest norm for the gradients of f's parameters; ``max_norm`` by default.
        norm_type, error_if_nonfinite, foreach: as in :func:`torch.nn.utils.clip_grad_norm_`. ``error_if_nonfinite``
            waits for the device. If it raises, no gradient has changed.

    Returns:
        The two norms before clipping, scalars; 0 without gradients.

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
    # Both norms come before any gradient changes, for error_if_nonfinite.
    norms = [_total_norm(part, norm_type, error_if_nonfinite, foreach) for part in clipped]
    for part, most, norm in zip(clipped, (max_norm, transform_max_norm), norms, strict=True):
        for alike in _by_mesh(part):
            torch.nn.utils.clip_grads_with_norm_(alike, most, norm, foreach)
    model, transform = norms
    # A norm without gradients goes to the device of the other norm, so that both can be logged as one tensor.
    return GradientNorms(
        model if clipped[0] else model.to(transform.device), transform if clipped[1] else transform.to(model.device)
    )


def _model_and_transform(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters of the model without its transforms, and of its transforms; each once, in the module's order."""
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
    """The handles of FullyShardedDataParallel for its parameters, without an import of torch.distributed.fsdp."""
    for part in module.modules():
        handle = part.__dict__.get("_handle")
        if getattr(getattr(handle, "flat_param", None), "_is_flat_param", False):
            yield handle


def _dimensions_before_flattening(module: nn.Module) -> dict[int, int]:
    """The original dimensions of each parameter that FullyShardedDataParallel has flattened, by the id of its piece."""
    flat = [handle.flat_param for handle in _fsdp1_handles(module)]
    return {
        id(parameter): len(shape) for each in flat for parameter, shape in zip(each._params, each._shapes, strict=True)
    }


def _by_mesh(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Groups ``parameters`` by their mesh: torch takes no mixture of meshes or with plain tensors."""
    meshes: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        meshes.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return list(meshes.values())


def _total_norm(
    parameters: list[nn.Parameter], norm_type: float, error_if_nonfinite: bool, foreach: bool | None
) -> Tensor:
    norms: list[Tensor] = []
    for alike in _by_mesh(parameters):
        gradients = [parameter.grad for parameter in alike if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, norm_type, error_if_nonfinite, foreach)
        # The norm of DTensors is a sum that is not yet reduced: its item() would be the part of this rank.
        norms.append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if len(norms) < 2:
        return norms[0] if norms else torch.zeros(())
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]), norm_type)
    return total
