"""nn.Modules around the functions: a loss, an output layer, and the optimiser groups that their transforms want."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .backends import BackendName
from .checks import Reduction, check_transform
from .functional import cross_entropy, linear_losses, log_softmax
from .transforms import Identity, MonotonicTransform
from .transforms.base import arithmetic_dtype, require_count


class MonotonicCrossEntropyLoss(nn.Module):
    """:func:`monosoftmax.cross_entropy` as a module, like :class:`torch.nn.CrossEntropyLoss`.

    It owns ``transform``, so that the transform's parameters are trained with those of the module it is put in.

    Args:
        transform: f; ``None`` is Linear-Softmax.
        weight, ignore_index, label_smoothing, z_loss, reduction, backend: as in :func:`monosoftmax.cross_entropy`.

    Shapes: input (V,), (N, V) or (N, V, d1, ...); target of that shape without V, or of that shape where it is class
    probabilities; returns a scalar, or the shape without V for "none".
    """

    weight: Tensor | None

    def __init__(
        self,
        transform: MonotonicTransform | None = None,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        reduction: Reduction = "mean",
        backend: BackendName = "auto",
    ) -> None:
        super().__init__()
        self.transform = Identity() if transform is None else check_transform(transform)
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.reduction: Reduction = reduction
        self.backend: BackendName = backend

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(
            input,
            target,
            self.transform,
            weight=self.weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            reduction=self.reduction,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing:g}, z_loss={self.z_loss:g}, "
            f"reduction={self.reduction!r}, backend={self.backend!r}"
        )


class OutputAndLoss(NamedTuple):
    """What an output layer returns: log p(target) for each row, and the mean loss."""

    output: Tensor
    loss: Tensor


class MonotonicSoftmax(nn.Module):
    r"""Output layer :math:`p(x \mid h) = \mathrm{softmax}_x f(\langle w_x, h \rangle + b_x)` with its loss.

    The interface is that of :class:`torch.nn.AdaptiveLogSoftmaxWithLoss`. Training by ``loss`` alone takes the three
    matrix products of :func:`monosoftmax.linear_cross_entropy`; ``output`` is differentiable too, and where it is
    differentiated the backward pass computes the logits again and does without what the forward pass computed.

    Args:
        in_features: d.
        n_classes: V.
        transform: f; ``None`` is Linear-Softmax.
        bias: whether there is a b.
        ignore_index, label_smoothing, z_loss, backend: as in :func:`monosoftmax.linear_cross_entropy`.

    Shapes: weight (V, d), bias (V,).

    Raises:
        TypeError, ValueError: ``in_features`` or ``n_classes`` is not an int >= 1, or ``transform`` is no transform.

    Source: Ganea et al., ICML 2019.
    """

    def __init__(
        self,
        in_features: int,
        n_classes: int,
        transform: MonotonicTransform | None = None,
        bias: bool = True,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        backend: BackendName = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = require_count("in_features", in_features)
        self.n_classes = require_count("n_classes", n_classes)
        self.transform = Identity() if transform is None else check_transform(transform)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.backend: BackendName = backend
        self.weight = nn.Parameter(torch.empty(n_classes, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(n_classes, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise weight and bias as :class:`torch.nn.Linear` does. The transform is left as it is."""
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def tie_weights(self, embedding: nn.Embedding) -> MonotonicSoftmax:
        """Use the weight of ``embedding`` (V, d) as that of this layer; returns the layer.

        Raises:
            ValueError: the shapes differ.
        """
        if embedding.weight.shape != self.weight.shape:
            raise ValueError(
                f"embedding must have a weight of shape {tuple(self.weight.shape)}, got {tuple(embedding.weight.shape)}"
            )
        self.weight = cast(nn.Parameter, embedding.weight)
        return self

    def logits(self, input: Tensor) -> Tensor:
        """The logits before the transform, (..., V)."""
        return F.linear(input, self.weight, self.bias)

    def forward(self, input: Tensor, target: Tensor) -> OutputAndLoss:
        """Log-probabilities of the targets, of the shape of ``target`` (0 where ignored), and the mean loss.

        Args:
            input: (..., d).
            target: (...), int64.
        """
        plain = self.label_smoothing == 0 and self.z_loss == 0
        losses = linear_losses(
            input, self.weight, target, self.transform, self.bias, None, self.ignore_index, self.label_smoothing,
            self.z_loss, "mean", not plain, self.backend,
        )  # fmt: skip
        assert losses.total is not None  # there is a reduction
        if plain:
            return OutputAndLoss(-losses.rows, losses.total)
        valid = target != self.ignore_index
        index = torch.where(valid, target, 0)
        y = (input * self.weight[index]).sum(-1, dtype=arithmetic_dtype(input.dtype))
        if self.bias is not None:
            y = y + self.bias[index]
        output = self.transform(y) - losses.lse
        return OutputAndLoss(torch.where(valid, output, torch.zeros_like(output)), losses.total)

    def log_prob(self, input: Tensor) -> Tensor:
        """Log-probabilities of all classes, (..., V)."""
        return log_softmax(self.logits(input), self.transform, backend=self.backend)

    def predict(self, input: Tensor) -> Tensor:
        """The most probable class, (...). f is increasing, so it is that of the largest logit."""
        return self.logits(input).argmax(-1)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, n_classes={self.n_classes}, bias={self.bias is not None}, "
            f"ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing:g}, z_loss={self.z_loss:g}, "
            f"backend={self.backend!r}"
        )


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
    their own. Use an optimiser of the Adam family for them; plain SGD hardly moves a PLIF (see :class:`PLIF`).

    Args:
        module: the model. Parameters that do not require a gradient are left out.
        lr: learning rate of everything else.
        transform_lr: learning rate of the transforms; 0.003 to 0.01 worked for Adam, or 0.03 to 0.1 of the head's.
        weight_decay: of everything else.
        **options: further options of the optimiser, for both groups.

    Returns:
        A group named "model" and, where there are such parameters, a group named "transform".

    Raises:
        ValueError: a learning rate or the weight decay is negative or not finite.
    """
    for name, value in (("lr", lr), ("transform_lr", transform_lr), ("weight_decay", weight_decay)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be finite and not negative, got {value}")
    in_transforms = {
        id(parameter)
        for part in module.modules()
        if isinstance(part, MonotonicTransform)
        for parameter in part.parameters()
    }
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {
            "name": "model",
            "params": [parameter for parameter in trained if id(parameter) not in in_transforms],
            "lr": lr,
            "weight_decay": weight_decay,
            **options,
        },
        {
            "name": "transform",
            "params": [parameter for parameter in trained if id(parameter) in in_transforms],
            "lr": transform_lr,
            "weight_decay": 0.0,
            **options,
        },
    ]
    return [group for group in groups if group["params"]]
