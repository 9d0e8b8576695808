"""nn.Modules around the functions: a loss, and an output layer."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .backends import BackendName
from .checks import (
    Reduction,
    check_floating,
    check_ignore_index,
    check_loss_options,
    check_temperature,
    check_tensor,
    check_transform,
)
from .dtensor_calls import call_for_dtensors, is_dtensor
from .functional import Losses, cross_entropy, log_softmax
from .groups import Head, LossOptions
from .head_products import chunk_rows
from .linear import HeadCall, linear_losses
from .sampling import perturbed_argmax
from .transforms import Identity, MonotonicTransform
from .transforms.base import require_count


class MonotonicCrossEntropyLoss(nn.Module):
    """:func:`monosoftmax.cross_entropy` as a module, like :class:`torch.nn.CrossEntropyLoss`.

    It owns ``transform``, so that the transform's parameters are trained with the parameters of the module around it.

    >>> loss = MonotonicCrossEntropyLoss(PLIF(), label_smoothing=0.1)
    >>> loss(torch.randn(8, 1_000, requires_grad=True), torch.randint(1_000, (8,))).backward()

    Args:
        transform: f; ``None`` is Linear-Softmax.
        weight, ignore_index, label_smoothing, z_loss, reduction, backend: as in :func:`monosoftmax.cross_entropy`.

    Shapes: input (V,), (N, V) or (N, V, d1, ...); target: this shape without V for class indices, this shape for class
    probabilities; returns a scalar, or for "none" this shape without V.
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
        self.transform = Identity() if transform is None else _kept(transform)
        self.register_buffer("weight", weight)
        self._initial_weight = _copy(weight)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.reduction: Reduction = reduction
        self.backend: BackendName = backend

    def reset_parameters(self) -> None:
        """Set the transform to its initial values, and ``weight`` to the given values.

        Raises:
            RuntimeError: ``weight`` was given on the meta device, so that its values are unknown.
        """
        check_transform(self.transform).reset_parameters()  # inside a wrapper, too
        _restore("weight", self.weight, self._initial_weight)

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
    """The result of an output layer: log p(target) of each row, and the loss, with the reduction of the layer.

    ``output`` has the shape of the targets, and is 0 for ignored targets. It is always the log-probability: class
    weights, label smoothing and z-loss change only ``loss``. ``loss`` is a scalar, or for the reduction "none" has the
    shape of the targets.
    """

    output: Tensor
    loss: Tensor


class MonotonicSoftmax(nn.Module):
    r"""Output layer :math:`p(x \mid h) = \mathrm{softmax}_x f(\langle w_x, h \rangle + b_x)` with its loss.

    It has the interface of :class:`torch.nn.AdaptiveLogSoftmaxWithLoss`. Training by ``loss`` alone takes the three
    matrix products of :func:`monosoftmax.linear_cross_entropy`. ``output`` is differentiable, too. If it is
    differentiated, the backward pass computes the logits again, and does not use the results of the forward pass.

    >>> layer = MonotonicSoftmax(64, 10_000, PLIF())
    >>> log_p_of_target, loss = layer(torch.randn(32, 64), torch.randint(10_000, (32,)))

    Args:
        in_features: d.
        n_classes: V.
        transform: f; ``None`` is Linear-Softmax.
        bias: whether there is a b.
        weight: weight of each class in the loss, (V,), kept as the buffer ``class_weight`` beside the matrix of the
            layer, which is called ``weight``; it goes to ``device``.
        ignore_index, label_smoothing, z_loss, reduction, backend: as in :func:`monosoftmax.linear_cross_entropy`.

    Shapes: weight (V, d), bias (V,), class_weight (V,).

    Raises:
        TypeError, ValueError: ``in_features`` or ``n_classes`` is not an int >= 1, ``transform`` is no transform, or an
            option is out of range or has the wrong type or shape.

    Source: Ganea et al., ICML 2019.
    """

    bias: nn.Parameter | None
    class_weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        n_classes: int,
        transform: MonotonicTransform | None = None,
        bias: bool = True,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        reduction: Reduction = "mean",
        backend: BackendName = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = require_count("in_features", in_features)
        self.n_classes = require_count("n_classes", n_classes)
        self.transform = Identity() if transform is None else _kept(transform)
        self.ignore_index = check_ignore_index(ignore_index)
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.reduction: Reduction = reduction
        self.backend: BackendName = backend
        self.weight = nn.Parameter(torch.empty(n_classes, in_features, device=device, dtype=dtype))
        # Without a bias, None is registered, as in torch.nn.Linear.
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(n_classes, device=device, dtype=dtype)) if bias else None
        )
        class_weight = weight
        if weight is not None:
            check_tensor("weight", weight)
            class_weight = weight if weight.is_meta else weight.to(self.weight.device)
        self.register_buffer("class_weight", class_weight)
        check_loss_options(self._options(), n_classes, self.weight.device, reduction)
        self._initial_class_weight = _copy(weight)
        self._reset_linear()

    def reset_parameters(self) -> None:
        """Set everything to the values of a new layer. Weight and bias get the values of a :class:`torch.nn.Linear`.

        Random values are drawn in the order of a new transform and a new layer. A tied weight belongs to the embedding.
        It is drawn anew, too: reset the embedding after this.

        Raises:
            RuntimeError: the class weights were given on the meta device, so that their values are unknown; or weight
                or bias is computed from other parameters, so that setting it would change nothing.
        """
        for name in ("weight", "bias"):
            if name not in self._parameters:
                raise RuntimeError(
                    f"{name} is computed from other parameters: remove its parametrization, pruning or weight norm "
                    "before reset_parameters()"
                )
        check_transform(self.transform).reset_parameters()  # inside a wrapper, too
        _restore("class_weight", self.class_weight, self._initial_class_weight)
        self._reset_linear()

    def _reset_linear(self) -> None:
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def tie_weights(self, embedding: nn.Embedding) -> MonotonicSoftmax:
        """Use the weight of ``embedding`` (V, d) as the weight of this layer; returns the layer.

        Tie before the model is sharded, and again after ``to_empty`` has moved it from the meta device, as ``to_empty``
        makes two parameters of one.

        >>> embedding = nn.Embedding(10_000, 64)
        >>> layer = MonotonicSoftmax(64, 10_000).tie_weights(embedding)

        Raises:
            TypeError: ``embedding`` is no ``nn.Embedding``, its weight is quantised, or one of the two weights is no
                parameter but computed from others, as by ``torch.nn.utils.parametrize`` or ``prune``.
            ValueError: the weight has another shape than the weight of this layer, another dtype or device than the
                bias, or is sharded.
        """
        if not isinstance(embedding, nn.Embedding):
            kind = type(embedding)
            raise TypeError(f"embedding must be a torch.nn.Embedding, got {kind.__module__}.{kind.__qualname__}")
        # A weight that torch computes from other parameters is not registered under this name: parametrize puts a
        # property in the class; prune and the older weight_norm and spectral_norm set an attribute before each forward.
        if "weight" not in embedding._parameters:
            raise TypeError(
                "the weight of embedding is computed from other parameters (parametrized, normalised or pruned), so "
                "that there is no parameter to share: leave this layer out and compute the loss by "
                "monosoftmax.linear_cross_entropy(h, embedding.weight, target, transform)"
            )
        if "weight" not in self._parameters:
            raise TypeError(
                "the weight of this layer is computed from other parameters (parametrized, normalised or pruned), so "
                "that it cannot be that of embedding: tie first"
            )
        weight = embedding.weight
        if hasattr(weight, "full_tensor") or hasattr(self.weight, "full_tensor"):
            raise ValueError("embedding and this layer must be tied before they are sharded, got a DTensor")
        check_floating("the weight of embedding", weight)
        if weight.shape != self.weight.shape:
            raise ValueError(
                f"embedding must have a weight of shape {tuple(self.weight.shape)}, got {tuple(weight.shape)}"
            )
        if self.bias is not None:
            for name in ("dtype", "device"):
                wanted, got = getattr(self.bias, name), getattr(weight, name)
                if got != wanted:
                    raise ValueError(f"embedding must have a weight of the {name} of the bias, {wanted}, got {got}")
        self.weight = cast(nn.Parameter, weight)
        return self

    def logits(self, input: Tensor) -> Tensor:
        """The logits before the transform, (..., V); a DTensor where ranks share out the classes or the tokens.

        Raises:
            NotImplementedError: the weight is a parameter that ``fully_shard`` has sharded, as it is everywhere outside
                of forward: see :func:`monosoftmax.distributed.prepare`.
        """
        weight, bias = self.matrix_and_bias()
        if is_dtensor(weight) or is_dtensor(input):
            logits: Tensor = call_for_dtensors("linear", input, weight, bias)
            return logits
        return F.linear(input, weight, bias)

    def matrix_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias with the values that forward would see, for other methods.

        Pruning and the older ``weight_norm`` and ``spectral_norm`` compute them in hooks that run only before forward.

        Raises:
            NotImplementedError: as :meth:`logits`.
        """
        for hook in list(self._forward_pre_hooks.values()):
            if type(hook).__module__.startswith("torch.nn.utils."):
                hook(self, ())
        if not is_dtensor(self.weight):
            check_tensor("weight", self.weight)
        return self.weight, self.bias

    def forward(self, input: Tensor, target: Tensor | None = None) -> OutputAndLoss:
        """Log-probabilities of the targets, in the shape of ``target`` (0 if ignored), and the loss.

        Args:
            input: (..., d).
            target: (...), int64.

        Raises:
            TypeError, ValueError, IndexError: as in :func:`monosoftmax.linear_cross_entropy`. TypeError: no target.
        """
        if target is None:
            raise TypeError(
                "target must be given, since the layer computes its loss: logits(input), log_prob(input) and "
                "predict(input) do without. In a model of transformers f has its place beside the head: monosoftmax."
                "integrations.transformers.add_transform(model, f)"
            )
        if isinstance(target, Tensor) and target.is_floating_point():
            raise NotImplementedError(
                f"target must be int64 class indices, got {target.dtype}: the output is their log p. Class "
                "probabilities are for monosoftmax.linear_cross_entropy"
            )
        # Without these options, the loss of a row is -log p.
        plain = self.label_smoothing == 0 and self.z_loss == 0 and self.class_weight is None
        of_head = linear_losses
        if is_dtensor(self.weight) or is_dtensor(input):
            of_head = functools.partial(call_for_dtensors, "linear_losses")
        losses: Losses = of_head(
            Head(input, self.weight, self.bias),
            target,
            self.transform,
            self._options(),
            HeadCall(return_log_prob=not plain),
            reduction=self.reduction,
            backend=self.backend,
        )
        output = -losses.rows if losses.log_prob is None else losses.log_prob
        return OutputAndLoss(output, losses.rows if losses.total is None else losses.total)

    def _options(self) -> LossOptions:
        ignore_index = check_ignore_index(self.ignore_index)
        return LossOptions(self.class_weight, ignore_index, self.label_smoothing, self.z_loss, False)

    def log_prob(self, input: Tensor) -> Tensor:
        """Log-probabilities of all classes, (..., V)."""
        return log_softmax(self.logits(input), self.transform, backend=self.backend)

    def predict(self, input: Tensor) -> Tensor:
        """The most probable class, (...). f is increasing, so this class has the largest logit."""
        logits = self.logits(input)
        if is_dtensor(logits):
            predicted: Tensor = call_for_dtensors("argmax", logits)
            return predicted
        return logits.argmax(-1)

    @torch.no_grad()
    def sample(
        self, input: Tensor, *, temperature: float | Tensor = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        r"""A class for each row, (...), drawn from :math:`\mathrm{softmax}(f(z) / \tau)`.

        It is exact, also where ranks share out the classes, whose noise is independent and who all get the same
        classes: the class is that of the largest logit of p plus Gumbel noise.

        Args:
            input: (..., d).
            temperature: :math:`\tau`, as in :func:`monosoftmax.cross_entropy`.
            generator: of random numbers, on the device of ``input``; for DTensors on any.

        Raises:
            TypeError, ValueError, NotImplementedError: as in :func:`monosoftmax.linear_cross_entropy`.
        """
        weight, bias = self.matrix_and_bias()
        if is_dtensor(weight) or is_dtensor(input):
            drawn: Tensor = call_for_dtensors("sample", self.logits(input), self.transform, temperature, generator)
            return drawn
        transform, tau = check_transform(self.transform), check_temperature(temperature, input)
        rows = input.reshape(-1, input.shape[-1])
        parts = [
            perturbed_argmax(F.linear(part, weight, bias), transform, tau, generator)[1]
            for part in torch.split(rows, chunk_rows(self.n_classes, torch.float64, input.device.type))
        ]
        return torch.cat(parts).reshape(input.shape[:-1])

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, n_classes={self.n_classes}, bias={self.bias is not None}, "
            f"class_weight={self.class_weight is not None}, ignore_index={self.ignore_index}, "
            f"label_smoothing={self.label_smoothing:g}, z_loss={self.z_loss:g}, reduction={self.reduction!r}, "
            f"backend={self.backend!r}"
        )


def _refuse_unreachable(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    """Refuses a transform, or a loss of one, under the name of a property of the class of ``module``.

    nn.Module registers it there, and the property goes on to be what is read: f would be trained by nothing. So it is
    with ``model.loss_function = MonotonicCrossEntropyLoss(f)`` for the models of transformers.
    """
    if isinstance(submodule, (MonotonicCrossEntropyLoss, MonotonicTransform)) and isinstance(
        getattr(type(module), name, None), property
    ):
        raise TypeError(
            f"{name} is a property of {type(module).__name__}, so that {type(submodule).__name__} would be registered "
            "under that name, and never called. A model of transformers gets f by monosoftmax.integrations."
            "transformers.add_transform(model, f), or by model.loss_function = monotonic_loss(f) from there"
        )


torch.nn.modules.module.register_module_module_registration_hook(_refuse_unreachable)


def _kept(transform: MonotonicTransform) -> MonotonicTransform:
    """``transform`` for an attribute of a module. PEFT's wrapper stays, since it chooses its adapter at every call. The
    wrapper of ``torch.compile`` goes, since it would only change the names of parameters.
    """
    check_transform(transform)
    while "_orig_mod" in transform._modules:
        transform = cast(MonotonicTransform, transform._modules["_orig_mod"])
    return transform


def _copy(weight: Tensor | None) -> Tensor | None:
    """A copy of class weights, to restore them. It is no buffer, so that operations on buffers leave it unchanged."""
    return None if weight is None else weight.detach().clone()


def _restore(name: str, buffer: Tensor | None, initial: Tensor | None) -> None:
    if buffer is None or initial is None or buffer.is_meta:
        return
    if initial.is_meta:
        raise RuntimeError(
            f"{name} was given on the meta device, so that reset_parameters() does not know its values: give it on "
            "another device, or load a state_dict and leave reset_parameters() out"
        )
    with torch.no_grad():
        buffer.copy_(initial)
