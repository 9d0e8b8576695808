"""Common checks of the public functions' arguments. An error names the argument, its value and the allowed values."""

from __future__ import annotations

import math
import operator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .dtensor_calls import is_dtensor
from .groups import Head, LossOptions
from .transforms import Identity, MonotonicTransform
from .transforms.base import arithmetic_dtype, require_count

Reduction = Literal["none", "mean", "sum"]
ZLossDivisor = Literal["loss", "rows"]
HeadMethod = Literal["auto", "chunked", "recompute"]

FLOATING_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IDENTITY = Identity()

#: The default of ``ignore_index``.
IGNORE_INDEX = -100


def check_transform(transform: nn.Module | None) -> MonotonicTransform:
    """The transform itself, without wrappers; the identity for None."""
    if transform is None:
        return IDENTITY
    found = _unwrapped(transform)
    if not isinstance(found, MonotonicTransform):
        raise TypeError(
            f"transform must be a monosoftmax transform or None, got {type(transform).__name__}"
            + (": wrap the module that owns the transform instead" if isinstance(transform, nn.Module) else "")
        )
    return found


def _unwrapped(module: Any) -> Any:
    """The transform inside the wrapper of ``torch.compile``, and inside PEFT's ModulesToSaveWrapper."""
    while not isinstance(module, MonotonicTransform):
        inner = adapter_in_use(module)
        if inner is module:
            if not hasattr(module, "_orig_mod"):
                break
            inner = module._orig_mod
        module = inner
    return module


def adapter_in_use(module: Any) -> Any:
    """The copy that PEFT's ModulesToSaveWrapper trains now, or the original; any other module itself."""
    copies, original = getattr(module, "modules_to_save", None), getattr(module, "original_module", None)
    if not isinstance(copies, nn.ModuleDict) or original is None:
        return module
    names = getattr(module, "active_adapters", None) or module.active_adapter
    names = [names] if isinstance(names, str) else list(names)
    in_use = names and not module.disable_adapters and all(name in copies for name in names)
    return copies[names[0]] if in_use else original


def check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    if is_dtensor(tensor):
        # to_local() would give the loss over a part of the vocabulary, full_tensor() a gradient that nobody reduces.
        raise NotImplementedError(
            f"{name} is a DTensor, which is not supported here. Where fully_shard made it one, call the module that "
            "owns it instead of reading its parameters; or call module.unshard() before; or let "
            'torch.distributed.fsdp.register_fsdp_forward_method(module, "method") gather for a method that is not '
            "forward"
        )
    if tensor.layout != torch.strided:
        raise NotImplementedError(f"{name} must be a dense tensor, got layout {tensor.layout}")


def check_floating(name: str, tensor: Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.dtype not in FLOATING_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")


def check_target(target: Tensor, device: torch.device, shape: torch.Size) -> Tensor:
    """``target`` as int64, and 0-dim if ``shape`` is (). PyTorch takes uint8 and (1,), too."""
    check_tensor("target", target)
    if target.is_floating_point():
        raise NotImplementedError(
            f"target must be int64 class indices, got {target.dtype}: class probabilities are for "
            "monosoftmax.cross_entropy and linear_cross_entropy"
        )
    if target.dtype not in (torch.int64, torch.uint8):
        raise TypeError(f"target must be int64 or uint8 class indices, got {target.dtype}")
    if target.device != device:
        raise ValueError(f"target must be on {device} like input, got {target.device}")
    if target.dtype != torch.int64:
        target = target.long()
    return target.reshape(shape) if len(shape) == 0 and target.shape == (1,) else target


def check_class_probabilities(target: Tensor, input: Tensor, ignore_index: int) -> None:
    check_floating("target", target)
    if target.shape != input.shape:
        raise ValueError(
            f"target must have the shape of input, {tuple(input.shape)}, where it is {target.dtype} class "
            f"probabilities, got {tuple(target.shape)}"
        )
    if target.device != input.device:
        raise ValueError(f"target must be on {input.device} like input, got {target.device}")
    check_ignore_index(ignore_index)
    if ignore_index != IGNORE_INDEX:
        raise ValueError(
            f"ignore_index must be left at its default, {IGNORE_INDEX}, where target is class probabilities, of which "
            f"none are ignored: got {ignore_index}"
        )


def check_head(head: Head, target: Tensor, *, probabilities: bool = False, may_be_empty: bool = False) -> Tensor:
    """Checks the head, and returns ``target`` as :func:`check_target` does; class probabilities as they are.

    ``may_be_empty``: the head may have no classes.
    """
    input, linear_weight, linear_bias = head
    check_floating("input", input)
    check_floating("linear_weight", linear_weight)
    check_tensor("target", target)
    probabilities = probabilities and target.is_floating_point()
    if not probabilities:
        target = check_target(target, input.device, input.shape[:-1])
    if input.dim() == 0 or linear_weight.dim() != 2 or input.shape[-1] != linear_weight.shape[1]:
        raise ValueError(
            f"input (..., d) and linear_weight (V, d) must agree in d, got {tuple(input.shape)} and "
            f"{tuple(linear_weight.shape)}"
        )
    if probabilities:
        shape = (*input.shape[:-1], linear_weight.shape[0])
        check_floating("target", target)
        if target.shape != shape or target.device != input.device:
            raise ValueError(
                f"target must have shape {shape} and be on {input.device} where it is {target.dtype} class "
                f"probabilities, got {tuple(target.shape)} on {target.device}"
            )
    elif target.shape != input.shape[:-1]:
        raise ValueError(
            f"target must have the shape of input without its last dimension, {tuple(input.shape[:-1])}, "
            f"got {tuple(target.shape)}"
        )
    classes = linear_weight.shape[0]
    if linear_bias is not None:
        check_floating("linear_bias", linear_bias)
        if linear_bias.shape != (classes,):
            raise ValueError(f"linear_bias must have shape ({classes},), got {tuple(linear_bias.shape)}")
    for name, operand in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if operand is None:
            continue
        if operand.device != input.device:
            raise ValueError(f"{name} must be on {input.device} like input, got {operand.device}")
        if operand.dtype != input.dtype and not autocast_enabled(input.device.type):
            raise TypeError(f"{name} must have the dtype of input, {input.dtype}, got {operand.dtype}")
    if not may_be_empty:
        check_classes(classes)
    return target


def autocast_enabled(device: str) -> bool:
    """``torch.is_autocast_enabled``, for the meta device, too."""
    # Dynamo of torch 2.10 cannot read torch.amp.is_autocast_available.
    return device != "meta" and torch.is_autocast_enabled(device)


def check_classes(classes: int) -> None:
    if classes == 0:
        raise ValueError("input must have at least 1 class, got 0")


def check_ignore_index(ignore_index: int) -> int:
    """``ignore_index`` as an int. A tensor or an array of one integer counts as an int, too."""
    if not isinstance(ignore_index, bool):
        try:
            return operator.index(ignore_index)
        except TypeError:
            pass  # the error below has our own words
    raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")


def check_loss_options(options: LossOptions, classes: int, device: torch.device, reduction: Reduction) -> None:
    check_classes(classes)
    weight, _, label_smoothing, z_loss, _ = options
    if weight is not None:
        check_floating("weight", weight)
        if weight.shape != (classes,):
            raise ValueError(f"weight must have shape ({classes},), got {tuple(weight.shape)}")
        if weight.device != device:
            raise ValueError(f"weight must be on {device} like input, got {weight.device}")
        if weight.requires_grad:
            raise ValueError("weight must not require a gradient: the loss is not differentiated with respect to it")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be between 0 and 1, got {label_smoothing}")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss must be finite and not negative, got {z_loss}")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f'reduction must be "none", "mean" or "sum", got {reduction!r}')


def check_z_loss_divisor(z_loss_divisor: ZLossDivisor) -> None:
    if z_loss_divisor not in get_args(ZLossDivisor):
        raise ValueError(f'z_loss_divisor must be "loss" or "rows", got {z_loss_divisor!r}')


def check_head_options(
    method: HeadMethod, chunk_rows: int | None, filter_eps: float, grad_in_forward: bool | None, reduction: Reduction
) -> None:
    if method not in get_args(HeadMethod):
        raise ValueError(f"method must be one of {', '.join(get_args(HeadMethod))}, got {method!r}")
    if chunk_rows is not None:
        require_count("chunk_rows", chunk_rows)
        if method == "recompute":
            raise ValueError('chunk_rows is for chunks of logits, which method="recompute" does not have')
    if not 0 <= filter_eps < 1:
        raise ValueError(f"filter_eps must be at least 0 and less than 1, got {filter_eps}")
    if filter_eps > 0 and method != "recompute":
        raise ValueError(f'filter_eps needs method="recompute", got method={method!r}')
    if grad_in_forward is None:
        return
    if not isinstance(grad_in_forward, bool):
        raise TypeError(f"grad_in_forward must be a bool or None, got {type(grad_in_forward).__name__}")
    for name, value in (("method", method), ("reduction", reduction)):
        if grad_in_forward and value in ("recompute", "none"):
            raise ValueError(f'grad_in_forward must not be True for {name}="{value}", got True')


def check_temperature(temperature: float | Tensor, input: Tensor) -> Tensor | None:
    """The temperature, 0-dim, in the type of the arithmetic on ``input`` and on its device; None for the number 1."""
    dtype = arithmetic_dtype(input.dtype)
    if not isinstance(temperature, Tensor):
        if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
            raise TypeError(f"temperature must be a number or a Tensor, got {type(temperature).__name__}")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {temperature}")
        return None if temperature == 1 else torch.full((), temperature, dtype=dtype, device=input.device)
    check_floating("temperature", temperature)
    if temperature.dim() != 0:
        raise ValueError(f"temperature must be a number or a 0-dim tensor, got shape {tuple(temperature.shape)}")
    if temperature.device != input.device:
        raise ValueError(f"temperature must be on {input.device} like input, or a number, got {temperature.device}")
    if temperature.requires_grad:
        raise ValueError(
            "temperature must not require a gradient, which it does not get: end the transform with a learned one, "
            "monosoftmax.transforms.Temperature"
        )
    return temperature.to(dtype)


def check_device(name: str, transform: MonotonicTransform, device: torch.device) -> None:
    # Hooks, and accelerate's forward, may move the parameters to the device before a call of f.
    if transform._forward_pre_hooks or "forward" in vars(transform):
        return
    for parameter in transform.parameters() if transform._modules else transform._parameters.values():
        if parameter is not None and parameter.device != device:
            raise ValueError(f"{name} must be on {device} like input, got {parameter.device}")
