"""What a model of transformers does at its head, found out by running it instead of by a list of models.

A model's own forward multiplies hidden states by the weight of its head, scales or caps the logits, and gives them to
``self.loss_function``. A tap sits before the head: for a fused loss it keeps the hidden states and lets no
token through, so that the head and all that follows work on empty tensors. Everything else of the forward pass stays
as it is, such as the auxiliary losses of mixtures of experts.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...dtensor_calls import is_dtensor
from ...transforms import Chain, MonotonicTransform, Scale, SoftCap
from ...transforms.base import SCALE_LIMIT

#: Logits that are put in the place of the head's to see what the model makes of them: large ones show a cap, powers of
#: two show a scale without rounding, and of both signs. Cycled through the classes, so that no class is special.
_PROBES = (1.0, -4.0, 0.0, 32.0, -0.25, 1e6, -16.0, 2.0**-10, 64.0, -(2.0**-7), 8.0, -1e6, 100.0, -2.0, 250.0)

#: Where forwards of a head come from that are its product with the weight all the same: transformers' of a head that
#: ranks share, and TRL's of one in float32, which casts its input.
_OF_LINEAR_FORWARDS = ("transformers.", "trl.")

#: The largest relative error of the logits that the found scale and cap explain.
_TOLERANCE = 1e-4


class Inner(NamedTuple):
    """What a model does to the logits of its head: cap tanh(scale z / cap), or scale z for a cap of 0."""

    scale: float = 1.0
    cap: float = 0.0

    def before(self, transform: MonotonicTransform) -> MonotonicTransform:
        """f of what the model does to its logits."""
        parts: list[MonotonicTransform] = []
        if self.scale != 1.0:
            parts.append(Scale(self.scale))
        if self.cap != 0.0:
            parts.append(SoftCap(self.cap, learnable=False))
        return Chain(*parts, transform) if parts else transform

    def of(self, logits: Tensor) -> Tensor:
        scaled = logits * self.scale
        return scaled if self.cap == 0.0 else self.cap * torch.tanh(scaled / self.cap)

    def __str__(self) -> str:
        scaled = "z" if self.scale == 1.0 else f"{self.scale:g} z"
        return scaled if self.cap == 0.0 else f"{self.cap:g} tanh({scaled} / {self.cap:g})"


class Captured:
    """One forward pass of a model whose head is tapped."""

    def __init__(self, probe: bool) -> None:
        #: Whether the head's output is replaced by probes.
        self.probe = probe
        self.probed: Tensor | None = None
        #: The input of each call of the head.
        self.hidden: list[Tensor] = []


def attach(head: nn.Module) -> None:
    """Lets :func:`tap` work on ``head``. Heads are replaced by resizing and by PEFT, so it is called each time.

    Hooks and their mark stay, since ``torch.compile`` traces hooks, but not their registration. Both are plain
    functions and values, so that copies and pickles of a head have them, too.
    """
    if "_monosoftmax_tap" not in head.__dict__:
        head.register_forward_pre_hook(_before)
        head.register_forward_hook(_after)
        head._monosoftmax_tap = None  # type: ignore[assignment]


def tap(head: nn.Module, captured: Captured | None) -> None:
    """From now on ``head`` gives its input to ``captured`` and works on no token; None ends that.

    The state is on the head itself, since the copies of ``torch.nn.DataParallel`` run at the same time. This is no
    context manager, since Dynamo cannot break a graph within one.
    """
    head._monosoftmax_tap = captured  # type: ignore[assignment]


def _before(head: nn.Module, args: tuple[Any, ...]) -> Any:
    captured: Any = head._monosoftmax_tap
    if captured is None:
        return None
    captured.hidden.append(args[0])
    return (args[0].detach()[:0], *args[1:])


def _after(head: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    captured: Any = head._monosoftmax_tap
    if captured is None or not captured.probe:
        return None
    probes = torch.tensor(_PROBES, dtype=torch.float32, device=output.device)
    captured.probed = probes.repeat(-(-output.shape[-1] // len(_PROBES)))[: output.shape[-1]]
    return captured.probed.reshape([1] * (output.dim() - 1) + [-1])


def unshard(head: Any) -> None:
    """Makes the parameters of a head that is a unit of ``fully_shard`` whole, as they are in its forward."""
    if hasattr(head, "unshard"):
        head.unshard()


def reshard(head: Any) -> None:
    """Undoes :func:`unshard`, unless a backward pass will, which needs whole parameters."""
    if hasattr(head, "unshard") and not torch.is_grad_enabled():
        head.reshard()


def logits_of(head: Any, hidden: Tensor) -> Tensor:
    """The logits (N, V) of hidden states (N, D), whole also of a head that ranks share."""
    if is_dtensor(head.weight):
        from torch.distributed.tensor import DTensor, Replicate

        mesh = head.weight.device_mesh
        hidden = DTensor.from_local(hidden, mesh, [Replicate()] * mesh.ndim, run_check=False)
    logits: Any = nn.functional.linear(hidden, head.weight, head.bias)
    return logits.full_tensor() if is_dtensor(logits) else logits


def inner_of(probed: Tensor, logits: Tensor) -> Inner | None:
    """The scale and cap with which the model makes ``logits`` of the head's output ``probed``; None: something else.

    It waits for the device.
    """
    if logits.numel() != probed.numel() or not logits.is_floating_point():
        return None
    z, y = probed.double().cpu(), logits.detach().double().cpu().flatten()
    if not bool(y.isfinite().all()):
        return None
    small = z == 2.0**-10
    if not bool(small.any()):
        return None
    cap, slope = float(y.abs().max()), float((y / z)[small].mean())
    if cap >= 0.5 * _PROBES[5] * abs(slope):
        scale, cap = slope, 0.0
    else:
        scale = cap * math.atanh(slope * 2.0**-10 / cap) / 2.0**-10
    scale = 1.0 if abs(scale - 1) < 1e-6 else scale
    if not 1 / SCALE_LIMIT <= scale <= SCALE_LIMIT or (cap and not 1 / SCALE_LIMIT <= cap <= SCALE_LIMIT):
        return None
    wanted = scale * z if cap == 0.0 else cap * torch.tanh(scale * z / cap)
    if bool(((y - wanted).abs() > _TOLERANCE * wanted.abs()).any()):
        return None
    return Inner(scale, cap)


def refusal(head: nn.Module) -> str | None:
    """Why the head's weight cannot stand for the head in a fused loss, or None."""
    weight = getattr(head, "weight", None)
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return f"its head is {_kind_of_head(head)}"
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return f"its head has a weight of {getattr(weight, 'dtype', type(weight))}"
    if hasattr(weight, "ds_id"):
        return "DeepSpeed ZeRO-3 gathers its head's weight within the head only"
    if hasattr(head, "_hf_hook"):
        return "accelerate moves its head's weight or input between devices"
    forward = head.__dict__.get("forward")
    if forward is not None and not (getattr(forward, "__module__", None) or "").startswith(_OF_LINEAR_FORWARDS):
        return f"its head has a forward of its own, {getattr(forward, '__qualname__', forward)}"
    for hook in [*head._forward_pre_hooks.values(), *head._forward_hooks.values()]:
        if hook not in (_before, _after) and not (getattr(hook, "__module__", None) or "").startswith("torch."):
            return f"its head has a hook, {getattr(hook, '__qualname__', hook)}"
    return None


def _kind_of_head(head: nn.Module) -> str:
    kind = type(head)
    if kind.__module__.startswith("peft."):
        return f"PEFT's {kind.__module__.split('.')[-2]}.{kind.__name__}, which adds to its product"
    return f"{kind.__module__}.{kind.__name__}, not torch.nn.Linear"
