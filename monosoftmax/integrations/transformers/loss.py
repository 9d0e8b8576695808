"""f in the loss of a model of transformers that stays as it is: :func:`monotonic_loss`."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from ...checks import IGNORE_INDEX, check_transform
from ...transforms import MonotonicTransform
from .targets import loss_of_logits, shifted


class MonotonicLoss:
    """What :func:`monotonic_loss` returns. It is no ``nn.Module``, which a model would register and never call."""

    def __init__(self, transform: MonotonicTransform) -> None:
        self.transform = transform
        self._warned = False

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = IGNORE_INDEX,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The loss, as a model calls its ``loss_function``."""
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"logits must be a Tensor, got {type(logits).__name__}: monotonic_loss(f) is for model.loss_function, "
                "not for Trainer's compute_loss_func, whose f no optimizer would have. Use add_transform(model, f): "
                "the logits that compute_loss_func is given are f(z) then"
            )
        f = check_transform(self.transform)
        parameters = list(f.parameters())
        frozen = bool(parameters) and not any(each.requires_grad for each in parameters)
        if frozen and logits.requires_grad and not self._warned:
            self._warned = True
            warnings.warn(
                "f of monotonic_loss is frozen. If PEFT trains a copy of it (modules_to_save), the loss does not see "
                "the copy: use add_transform(model, f)",
                stacklevel=3,
            )
        target = shifted(labels, shift_labels, ignore_index)
        return loss_of_logits(logits, target, f, ignore_index, num_items_in_batch)


def monotonic_loss(transform: MonotonicTransform) -> MonotonicLoss:
    """A ``loss_function`` for a causal language model of transformers: its loss, with f on its logits.

    Only the loss has f then: ``generate`` samples from softmax(z), and label smoothing, TRL and PEFT's copies go around
    it. :func:`add_transform` has none of these holes; this is for models that it refuses. The model must own f, so that
    f is trained and saved: ``model.f = f``. :func:`inspect` says what has f.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = LlamaConfig(
    ...     vocab_size=100, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    ... )
    >>> model = LlamaForCausalLM(tiny)
    >>> model.f = PLIF()
    >>> model.loss_function = monotonic_loss(model.f)

    Args:
        transform: f, an attribute of the model.

    Raises:
        TypeError: ``transform`` is no transform. When called: ``logits`` are an output of a model, as Trainer's
            ``compute_loss_func`` gets it.
    """
    check_transform(transform)
    if transform is None:
        raise TypeError("transform must be a monosoftmax transform, got None")
    return MonotonicLoss(transform)
