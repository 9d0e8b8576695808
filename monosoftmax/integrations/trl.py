"""f in the losses of TRL's trainers: SFT, DPO, KTO, GRPO and RLOO. See :func:`enable`.

These trainers do not ask a model for logits. They give it a forward pass that multiplies hidden states by the weight of
its head, and so leaves f out; a model with f refuses that. What takes its place here runs the model's own forward, with
log p of each token of softmax(f(z) / temperature) fused with the head.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import trl
except ImportError as error:
    raise ImportError(f"monosoftmax.integrations.trl needs trl ({error}): pip install 'monosoftmax[trl]'") from error

from ..checks import IGNORE_INDEX
from ..token_log_prob import OutputName, TokenLogProb, linear_log_prob, log_prob
from ..transforms import MonotonicTransform
from .transformers import MonotonicHead
from .transformers.head_tap import logits_of

__all__ = ["enable"]

#: The version of TRL that this was tested with.
_TESTED = "1.16.0"

_MAKES_REFERENCES = ("create_model_from_path", "get_config_model_id")

#: The names that are replaced in the modules of trainers. Trainers that are not here still give models TRL's forward,
#: which models with f refuse: those of ``trl.experimental``, whose servers sample without f, and distillation.
_REPLACED = {
    "trl.trainer.sft_trainer": ("add_fused_lm_head",),
    "trl.trainer.dpo_trainer": ("add_fused_lm_head", *_MAKES_REFERENCES),
    "trl.trainer.kto_trainer": ("add_fused_lm_head", *_MAKES_REFERENCES),
    "trl.trainer.grpo_trainer": ("add_fused_lm_head", *_MAKES_REFERENCES, "VLLMGeneration"),
    "trl.trainer.rloo_trainer": ("add_fused_lm_head", *_MAKES_REFERENCES, "VLLMGeneration"),
}

_ARGUMENTS = ["model", "temperature", "cast_lm_head_to_fp32", "outputs"]
#: What TRL may ask for of each token.
_OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

#: The logits that exist at a time where their mean is asked for.
_CHUNK = 2**24


def enable() -> None:
    r"""Puts f into the losses of TRL's SFT, DPO, KTO, GRPO and RLOO trainers, for models that have one.

    Log p and entropy are those of :math:`p = \mathrm{softmax}(f(z) / \mathrm{temperature})`, from which the model
    samples. Call it before a trainer is made. Models without f are trained as TRL does it. Another call changes
    nothing.

    A reference model is loaded by TRL from where the model came from (``config._name_or_path``), with the f that is
    saved there. So a model that got its f by ``add_transform`` must be saved and loaded before it is trained against
    a reference. With PEFT, the reference is the model without its adapters. A trainer that is given a path loads the
    model if ``monosoftmax.integrations.transformers.register`` knows its type.

    It replaces names in the modules of these trainers: ``add_fused_lm_head``, ``create_model_from_path``,
    ``get_config_model_id`` and ``VLLMGeneration``. No class is changed.

    >>> from monosoftmax.integrations.trl import enable
    >>> enable()

    Raises:
        RuntimeError: the installed TRL does not work as the version that this was tested with.
        ValueError: by a trainer: its reference model would have no f, since the checkpoint has none.
        NotImplementedError: by a trainer with ``use_vllm=True``, since vLLM would sample without f; or if
            ``cast_lm_head_to_fp32`` cannot be honoured.
    """
    for module, names in _checked():
        for name in names:
            original = module.__dict__[name]
            if getattr(original, "_monosoftmax", False):
                continue
            replacement = _REPLACEMENTS[name](original)
            replacement._monosoftmax = True
            setattr(module, name, replacement)


def _checked() -> list[tuple[types.ModuleType, tuple[str, ...]]]:
    """The modules of the trainers, and the names to replace in them, which exist.

    Raises:
        RuntimeError: one does not, or is called otherwise.
    """
    modules, missing = [], []
    for path, names in _REPLACED.items():
        try:
            module = importlib.import_module(path)
        except ModuleNotFoundError as error:
            if error.name != path:
                raise
            missing.append(path)
            continue
        modules.append((module, names))
        missing += [f"{path}.{name}" for name in names if not hasattr(module, name)]
    if not missing:
        from trl.trainer import utils

        arguments = list(inspect.signature(utils.add_fused_lm_head).parameters)
        fields = {each.name for each in dataclasses.fields(utils.FusedCausalLMOutput)}
        if arguments != _ARGUMENTS:
            missing = [f"add_fused_lm_head({', '.join(_ARGUMENTS)}), which takes {', '.join(arguments)}"]
        elif not fields.issuperset(_OUTPUTS):
            missing = [f"FusedCausalLMOutput.{name}" for name in _OUTPUTS if name not in fields]
    if missing:
        raise RuntimeError(
            f"monosoftmax.integrations.trl wants TRL {_TESTED}, with which it was tested, or one that works like it; "
            f"got TRL {trl.__version__}, which lacks {'; '.join(missing)}"
        )
    return modules


class _Options(NamedTuple):
    temperature: float
    float32: bool
    outputs: tuple[str, ...]


def _fused_head(original: Callable[..., None]) -> Any:
    """TRL's ``add_fused_lm_head``, which gives a model a forward with ``fused_lm_head=True``."""

    @functools.wraps(original)
    def add_fused_lm_head(
        model: Any,
        temperature: float = 1.0,
        cast_lm_head_to_fp32: bool = False,
        outputs: Sequence[str] = ("log_probs",),
    ) -> None:
        if not isinstance(model, MonotonicHead):
            original(model, temperature, cast_lm_head_to_fp32, tuple(outputs))
            return
        unknown = [each for each in outputs if each not in _OUTPUTS]
        if unknown:
            raise NotImplementedError(
                f"outputs must be some of {', '.join(_OUTPUTS)} for a model with f, got {unknown}"
            )
        options = _Options(temperature, cast_lm_head_to_fp32, tuple(outputs))
        usual = model.forward

        # generate reads the signature.
        @functools.wraps(type(model).forward)
        def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
            return _scored(self, options, args, kwargs) if fused_lm_head else usual(*args, **kwargs)

        setattr(model, "forward", types.MethodType(forward, model))  # noqa: B010, a method to mypy

    return add_fused_lm_head


def _scored(model: MonotonicHead, options: _Options, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """TRL's output of a forward pass: log p of each token, and what else is asked for."""
    from trl.trainer.utils import FusedCausalLMOutput

    if kwargs.get("labels") is None and kwargs.get("shift_labels") is None:
        raise ValueError("fused_lm_head=True needs labels or shift_labels")
    kwargs = {**kwargs, "use_cache": False}
    kwargs.pop("return_dict", None)
    scores = _Scores(options, kwargs.pop("num_items_in_batch", None))
    output = model.scored(scores, *args, **kwargs)
    # The last token has no label after it.
    end = None if kwargs.get("shift_labels") is not None else -1
    fields = {name: value[:, :end] for name, value in scores.fields.items()}
    return FusedCausalLMOutput(loss=output.loss, aux_loss=getattr(output, "aux_loss", None), **fields)


@dataclasses.dataclass
class _Scores:
    """A score as :meth:`MonotonicHead.scored` wants it: the mean of -log p, which keeps the rest in ``fields``."""

    options: _Options
    num_items: Tensor | int | None
    fields: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def __call__(self, rows: Tensor, head: Any, f: MonotonicTransform, target: Tensor) -> Tensor:
        mask = target != IGNORE_INDEX
        weights = None if head is None else _Weights(head.weight, head.bias)
        context: Any = contextlib.nullcontext()
        if self.options.float32:
            if weights is None and rows.dtype in (torch.bfloat16, torch.float16):
                raise NotImplementedError(
                    "cast_lm_head_to_fp32=True needs a head that can be fused with log p, or one that gives logits in "
                    f"float32, got {rows.dtype}"
                )
            rows, weights = rows.float(), weights and weights.float()
            context = torch.autocast(rows.device.type, enabled=False)
        with context:
            found = self._of(rows[mask], weights, f, target[mask])
        self.fields = {
            name: torch.zeros(mask.shape, dtype=each.dtype, device=each.device).masked_scatter(mask, each)
            for name, each in found.items()
        }
        self.fields["label_mask"] = mask
        total = -self.fields["log_probs"].sum()
        return total / (mask.sum().clamp(min=1) if self.num_items is None else self.num_items)

    def _of(self, rows: Tensor, weights: _Weights | None, f: MonotonicTransform, target: Tensor) -> dict[str, Tensor]:
        """What is asked for, of rows (N, D) that have a target."""
        asked, tau = self.options.outputs, self.options.temperature
        names: list[OutputName] = ["log_prob"]
        names += ["entropy"] if "entropy" in asked else []
        names += ["argmax"] if "is_top1" in asked else []
        names += ["lse"] if "log_sum_sq_probs" in asked else []
        statistics = _statistics(rows, weights, f, target, temperature=tau, outputs=names)
        found = {"log_probs": statistics.log_prob, "entropy": statistics.entropy}
        if statistics.argmax is not None:
            # Of equal logits, only the first is TRL's top one.
            found["is_top1"] = statistics.argmax == target
        with torch.no_grad():
            if statistics.lse is not None:
                # The sum of p^2 is that of exp(2 y) over the square of that of exp(y).
                twice: Any = _statistics(rows, weights, f, target, temperature=tau / 2, outputs=["lse"])
                found["log_sum_sq_probs"] = twice.lse - 2 * statistics.lse
            if "mean_logits" in asked:
                found["mean_logits"] = _mean_logits(rows, weights, f) / tau
        return {name: each for name, each in found.items() if each is not None}


class _Weights(NamedTuple):
    weight: Tensor
    bias: Tensor | None

    def float(self) -> _Weights:
        return _Weights(self.weight.float(), None if self.bias is None else self.bias.float())


def _statistics(
    rows: Tensor, weights: _Weights | None, f: MonotonicTransform, target: Tensor, **options: Any
) -> TokenLogProb:
    """Of rows (N, D) before a head; or of logits (N, V), without weights."""
    if weights is None:
        return log_prob(rows, target, f, **options)
    return linear_log_prob(rows, weights.weight, target, f, linear_bias=weights.bias, **options)


def _mean_logits(rows: Tensor, weights: _Weights | None, f: MonotonicTransform) -> Tensor:
    """The mean of f(z) over the classes, which TRL logs. No kernel has it, so the logits of some rows exist."""
    classes = rows.shape[-1] if weights is None else weights.weight.shape[0]
    means = []
    for chunk in torch.split(rows, max(1, _CHUNK // classes)):
        z = chunk if weights is None else logits_of(weights, chunk)
        means.append(f(z if z.dtype == torch.float64 else z.float()).mean(-1))
    return torch.cat(means)


class _Name(str):
    """The name of a checkpoint from which a model with f came."""


def _model_id(original: Callable[[Any], str]) -> Any:
    """TRL's ``get_config_model_id``, the result of which tells whether its model has an f."""

    @functools.wraps(original)
    def get_config_model_id(config: Any) -> str:
        name = original(config)
        return name if getattr(config, "logit_transform", None) is None else _Name(name)

    return get_config_model_id


def _from_path(original: Callable[..., Any]) -> Any:
    """TRL's ``create_model_from_path``, which gives a model with f no reference model without."""

    @functools.wraps(original)
    def create_model_from_path(model_id: str, *args: Any, **kwargs: Any) -> Any:
        model = original(model_id, *args, **kwargs)
        if isinstance(model_id, _Name) and not isinstance(model, MonotonicHead):
            raise ValueError(
                f"the reference model would have no logit_transform: it is loaded from where the model came from, "
                f"{str(model_id)!r}, a plain checkpoint. Save the model with f, and train what "
                "monosoftmax.integrations.transformers.AutoMonotonicModelForCausalLM.from_pretrained reads there; or "
                "give the trainer a ref_model, if it takes one"
            )
        return model

    return create_model_from_path


def _vllm(original: Callable[..., Any]) -> Any:
    """TRL's ``VLLMGeneration``, for models without f."""

    @functools.wraps(original, updated=())
    def generation(*args: Any, **kwargs: Any) -> Any:
        model = kwargs["model"] if "model" in kwargs else args[0]
        if any(isinstance(each, MonotonicHead) for each in model.modules()):
            raise NotImplementedError(
                "use_vllm=True is not supported for a model with a logit_transform: vLLM would sample without it, and "
                "training would be off policy. Leave it out: the model's own generate has f"
            )
        return original(*args, **kwargs)

    return generation


_REPLACEMENTS: dict[str, Callable[[Any], Any]] = {
    "add_fused_lm_head": _fused_head,
    "create_model_from_path": _from_path,
    "get_config_model_id": _model_id,
    "VLLMGeneration": _vllm,
}
