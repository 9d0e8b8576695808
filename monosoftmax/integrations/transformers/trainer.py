"""For ``transformers.Trainer``: an optimiser with groups for f, a callback that guards f, metrics without logits."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ...training import clip_grad_norm_, parameter_groups
from ...transforms import MonotonicTransform, from_dict
from .inspection import outermost_transforms
from .model import MonotonicHead


class MonotonicAdamW:
    """Makes an AdamW with the groups of :func:`monosoftmax.parameter_groups`.

    f has a learning rate of its own and no weight decay; biases and the gains of norms have no weight decay either.
    Trainer makes the optimiser by it once PEFT has wrapped the model:

    >>> from transformers import TrainingArguments, Trainer
    >>> trainer = Trainer(  # doctest: +SKIP
    ...     model, TrainingArguments("run", max_grad_norm=0), train_dataset=dataset,
    ...     optimizer_cls_and_kwargs=(MonotonicAdamW, {"lr": 3e-4, "transform_lr": 0.01, "max_grad_norm": 1.0}),
    ...     callbacks=[TransformCallback()],
    ... )
    """

    def __call__(
        self,
        model: nn.Module,
        *,
        lr: float,
        transform_lr: float = 0.01,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        **options: Any,
    ) -> torch.optim.AdamW:
        """The optimiser of ``model``.

        Args:
            model: with f or without.
            lr, transform_lr, weight_decay: as for :func:`monosoftmax.parameter_groups`.
            max_grad_norm: the largest norm of the gradients of f's parameters, and of all others, clipped apart in each
                step (:func:`monosoftmax.clip_grad_norm_`). None does not clip. Before, Trainer clips both together,
                unless ``TrainingArguments(max_grad_norm=0)``.
            **options: of ``torch.optim.AdamW``, such as ``betas`` and ``fused``.

        Raises:
            TypeError, ValueError: as :func:`monosoftmax.parameter_groups`; ``max_grad_norm`` is not positive.
        """
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive, or None for no clipping, got {max_grad_norm}")
        groups = parameter_groups(model, lr=lr, transform_lr=transform_lr, weight_decay=weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=lr, **options)
        if max_grad_norm is not None:
            optimizer.register_step_pre_hook(lambda *_: _clip(model, max_grad_norm))
        return optimizer


def _clip(model: nn.Module, max_grad_norm: float) -> None:
    clip_grad_norm_(model, max_grad_norm)


class TransformCallback(TrainerCallback):
    """Raises where a training would leave f out, and logs f.

    It raises at the start if there is no f in the model, or the optimiser does not have f's parameters; in the first
    step if f got no gradient, since the loss does not depend on it; and after the first step, and at each log, if ranks
    have different f. It warns if the optimiser decays f. Gradients that ZeRO-3 has partitioned cannot be seen, and are
    refused.

    Each log gets ``transform/slope_min`` and ``transform/slope_max`` of f on the range of the logits, and
    ``transform/logit_min``, ``transform/logit_max`` of a sample of tokens; of a PLIF also ``transform/bound``, beyond
    which f goes on with its last slope. ``trainer.state.log_history`` has them. Reporters such as wandb come before the
    callbacks that a Trainer is given: ``trainer.callback_handler.callbacks.insert(0, TransformCallback())`` puts it
    before them.
    """

    def __init__(self) -> None:
        self._seen_gradient = False

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._seen_gradient = False
        transforms = transforms_of(model)
        if not transforms:
            raise ValueError(
                f"model, {type(model).__name__}, has no monosoftmax transform, so that none is trained or saved: give "
                "it one with monosoftmax.integrations.transformers.add_transform"
            )
        if any(hasattr(each, "ds_id") for each in _parameters(transforms)):
            raise NotImplementedError(
                "TransformCallback cannot see the gradients that DeepSpeed ZeRO-3 has partitioned"
            )
        _check_optimizer(kwargs.get("optimizer"), transforms)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        head = _head_with_f(model)
        if head is not None:
            head.watch_logits = args.logging_steps >= 1 and (state.global_step + 1) % int(args.logging_steps) == 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._seen_gradient:
            return
        transforms = transforms_of(model)
        _check_optimizer(kwargs.get("optimizer"), transforms)
        trained = [each for each in _parameters(transforms) if each.requires_grad]
        if trained and not any(each.grad is not None and bool((_whole(each.grad) != 0).any()) for each in trained):
            raise RuntimeError(
                "f got no gradient in the first step: the loss does not depend on f. A loss that is not the model's "
                "own must start from its logits, which are f(z), and TRL needs monosoftmax.integrations.trl.enable()"
            )
        self._seen_gradient = True

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 1:
            _check_ranks(transforms_of(model))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        transforms = transforms_of(model)
        _check_ranks(transforms)
        head = _head_with_f(model)
        figures = _figures(transforms[0], None if head is None else head.logit_range)
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)


def transforms_of(model: Any) -> list[MonotonicTransform]:
    """The transforms in ``model`` that are not part of another; of those that PEFT copies, the copies in training."""
    found = list(outermost_transforms(model).values())
    return [each for each in found if any(parameter.requires_grad for parameter in each.parameters())] or found


def _parameters(transforms: list[MonotonicTransform]) -> list[nn.Parameter]:
    return [parameter for each in transforms for parameter in each.parameters()]


def _head_with_f(model: Any) -> MonotonicHead | None:
    return next((each for each in model.modules() if isinstance(each, MonotonicHead)), None)


def _check_optimizer(optimizer: Any, transforms: list[MonotonicTransform]) -> None:
    if optimizer is None:
        return
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    for parameter in _parameters(transforms):
        if not parameter.requires_grad:
            continue
        if id(parameter) not in groups:
            raise ValueError("optimizer does not have the parameters of f, so that f would stay as it is")
        if groups[id(parameter)].get("weight_decay", 0):
            warnings.warn(
                f"the optimizer decays the parameters of f, by {groups[id(parameter)]['weight_decay']}, which pulls f "
                "away from the identity: give Trainer optimizer_cls_and_kwargs=(MonotonicAdamW, ...)",
                stacklevel=3,
            )
            return


def _whole(parameter: Any) -> Tensor:
    found: Tensor = parameter.detach()
    return found.full_tensor() if hasattr(found, "full_tensor") else found


def _check_ranks(transforms: list[MonotonicTransform]) -> None:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return
    values = [_whole(each).float().flatten() for each in _parameters(transforms)]
    if not values:
        return
    largest = torch.cat(values)
    smallest = largest.clone()
    distributed.all_reduce(largest, op=distributed.ReduceOp.MAX)
    distributed.all_reduce(smallest, op=distributed.ReduceOp.MIN)
    if not torch.equal(largest, smallest):
        raise RuntimeError(
            "f differs between ranks: its gradient is not reduced. Leave its parameters to DDP and fully_shard, not in "
            "ignored_params"
        )


@torch.no_grad()
def _figures(transform: MonotonicTransform, logit_range: Tensor | None) -> dict[str, float]:
    found: dict[str, float] = {}
    bound = getattr(transform, "bound", None)
    low, high = (-bound, bound) if bound is not None else (-20.0, 20.0)
    if bound is not None:
        found["transform/bound"] = bound
    if logit_range is not None:
        low, high = logit_range.tolist()
        found["transform/logit_min"], found["transform/logit_max"] = low, high
    transform = _gathered(transform)
    device = next((each.device for each in [*transform.parameters(), *transform.buffers()]), None)
    if math.isfinite(low) and math.isfinite(high):
        slopes = transform.derivative(torch.linspace(low, high, 257, device=device))
        found["transform/slope_min"], found["transform/slope_max"] = slopes.min().item(), slopes.max().item()
    return found


def _gathered(transform: MonotonicTransform) -> MonotonicTransform:
    """The transform, or a copy with whole parameters of one that ``fully_shard`` has sharded; called on all ranks."""
    if not any(hasattr(each, "full_tensor") for each in transform.parameters()):
        return transform
    copied = from_dict(transform.to_dict())
    copied.load_state_dict({name: _whole(value) for name, value in transform.state_dict().items()})
    return copied


def token_metrics(prediction: Any) -> dict[str, float]:
    r"""``compute_metrics`` of a Trainer for a model with ``fused="always"``, whose evaluation holds no logits.

    Args:
        prediction: an ``EvalPrediction`` of log p, entropy and is_top1, (B, T) each, and labels, (B, T), not shifted.

    Returns:
        Over all targets that are not -100: ``perplexity``, :math:`\exp(-\text{mean} \log p)`; ``accuracy``, how often
        the target is the most probable token; ``entropy``, the mean of the entropies, in nats.

    Raises:
        ValueError: the predictions are something else, such as logits.
    """
    outputs, labels = prediction.predictions, prediction.label_ids
    if not isinstance(outputs, tuple) or len(outputs) < 3 or any(each.shape != labels.shape for each in outputs[:3]):
        raise ValueError(
            "prediction must have log_prob, entropy and is_top1 of the tokens, as a model has in evaluation after "
            'add_transform(..., fused="always")'
        )
    log_prob, entropy, is_top1 = (each[:, :-1] for each in outputs[:3])
    counts = labels[:, 1:] != -100
    return {
        "perplexity": float(np.exp(-log_prob[counts].mean(dtype=np.float64))),
        "accuracy": float(is_top1[counts].mean(dtype=np.float64)),
        "entropy": float(entropy[counts].mean(dtype=np.float64)),
    }
