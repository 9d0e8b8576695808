"""Classes of transformers with f, and models of them: made, changed in place, loaded."""

from __future__ import annotations

import copy
import functools
import inspect
import json
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ...checks import check_transform
from ...transforms import MonotonicTransform, SoftCap, from_dict
from .head_tap import attach
from .model import Fused, MonotonicHead, head_of

#: What the model types of models with f begin with.
PREFIX = "monosoftmax_"

#: The entry of a config that caps logits if it is not None.
_CAP = "final_logit_softcapping"
#: Entries that cap logits, of models that cannot do without.
_FIXED_CAPS = ("logits_soft_cap", "output_logit_soft_cap")

#: What a config of a model with f is saved with where plain classes of configs want a number, so that they refuse it
#: with an error that has these words. Without it LlamaForCausalLM.from_pretrained would read a checkpoint with f, and
#: leave f out after a note.
_READ_BY = (
    "This model has a logit_transform. Load it by monosoftmax.integrations.transformers.AutoMonotonicModelForCausalLM, "
    "or call register of that module before AutoModelForCausalLM"
)
#: The entry with the number.
REPLACED = "replaced_by_a_note"


@functools.cache
def class_for(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of models like ``base`` with f, such as ``MonotonicLlamaForCausalLM``, known to transformers' Auto
    classes from then on.

    Args:
        base: a class of causal language models, such as ``transformers.LlamaForCausalLM``.

    Raises:
        TypeError: ``base`` is no such class.
        NotImplementedError: it is one of an encoder and a decoder, or a classifier.
    """
    if not (isinstance(base, type) and issubclass(base, PreTrainedModel)):
        raise TypeError(f"base must be a class of transformers' models, got {base!r}")
    if issubclass(base, MonotonicHead):
        return base
    if "loss_function" not in inspect.unwrap(base.forward).__code__.co_names:
        raise NotImplementedError(
            f"{base.__name__} does not compute its loss by loss_function, as causal language models of transformers "
            "do, so that f would not be in it: give its logits to monosoftmax.cross_entropy(logits, target, f), or its "
            "last hidden state to monosoftmax.MonotonicSoftmax"
        )
    name = f"Monotonic{base.__name__}"
    config = _config_class_for(base.config_class)
    kind = type(
        name,
        (MonotonicHead, base),
        {
            "__doc__": f"{base.__name__} with f: :class:`MonotonicHead`.",
            "__module__": __package__,
            "config_class": config,
            "forward": _forward_like(base),
            "_own_arguments": _positional(base.forward),
            "_keep_in_fp32_modules_strict": {"logit_transform", *(base._keep_in_fp32_modules_strict or ())},
        },
    )
    # Not a class that somebody has derived from the one that transformers has for this type.
    if MODEL_FOR_CAUSAL_LM_MAPPING.get(base.config_class, base) is base:
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, kind, exist_ok=True)
    return kind


@functools.cache
def _config_class_for(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    entries = {
        "__doc__": f"{base.__name__} with ``logit_transform``, f as ``to_dict()`` of a transform gives it.",
        "__module__": __package__,
        "model_type": PREFIX + base.model_type,
        "logit_transform": None,
        # TRL reads it.
        "auto_map": {},
        "to_json_file": _to_json_file,
        "from_dict": classmethod(_from_dict),
    }
    return type(f"Monotonic{base.__name__}", (base,), entries)


def _to_json_file(self: Any, json_file_path: Any, use_diff: bool = True) -> None:
    content = noted(json.loads(self.to_json_string(use_diff=use_diff)), type(self), _READ_BY)
    with open(json_file_path, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2, sort_keys=True) + "\n")


def noted(content: dict[str, Any], kind: type[PreTrainedConfig], note: str) -> dict[str, Any]:
    """The ``content`` of ``config.json``, in which the width of the model is the ``note`` that plain classes refuse."""
    width = kind.attribute_map.get("hidden_size", "hidden_size")
    # A config of several has it in its parts.
    return {**content, width: note, REPLACED: {width: content[width]}} if width in content else content


def _from_dict(cls: Any, /, config_dict: dict[str, Any], **kwargs: Any) -> Any:
    own = {**config_dict, **config_dict.get(REPLACED, {})}
    own.pop(REPLACED, None)
    from_dict: Any = cls.__base__.from_dict
    return from_dict.__func__(cls, own, **kwargs)


def _forward_like(base: type[PreTrainedModel]) -> Any:
    """:meth:`MonotonicHead.forward` with the signature of the base's, which Trainer and ``generate`` read."""

    def with_f(self: Any, *args: Any, **kwargs: Any) -> Any:
        return MonotonicHead.forward(self, *args, **kwargs)

    forward: Any = functools.wraps(base.forward)(with_f)
    # Without it, what unwraps functions would find the forward without f.
    del forward.__wrapped__
    forward.__signature__ = inspect.signature(base.forward)
    return forward


def _positional(forward: Any) -> tuple[str, ...]:
    """The names of the positional arguments behind self."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(each.name for each in inspect.signature(forward).parameters.values() if each.kind in kinds)[1:]


def register(*model_types: str) -> None:
    """Makes ``AutoModelForCausalLM`` read models with f in a process that has none yet.

    Loading by :class:`AutoMonotonicModelForCausalLM` needs no such call.

    >>> register("llama", "qwen2")

    Args:
        *model_types: of the plain models, such as "llama".

    Raises:
        ValueError: transformers has no causal language model of that type.
    """
    for each in model_types:
        plain = each.removeprefix(PREFIX) if isinstance(each, str) else each
        if plain not in CONFIG_MAPPING or CONFIG_MAPPING[plain] not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(
                f"model_types must be types of causal language models of transformers {transformers.__version__}, "
                f"got {each!r}"
            )
        class_for(MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[plain]])


def add_transform(model: Any, transform: MonotonicTransform | dict[str, Any] | str, *, fused: Fused = "train") -> Any:
    r"""Puts f on the logits of a causal language model, in place: :math:`p(x | c) = \mathrm{softmax}_x f(z)`.

    The model gets ``logit_transform`` beside its head, which stays what it is: tied weights, LoRA, quantisation and
    parallel plans do not notice. From then on ``forward(...).logits`` is f(z), so that ``generate``, evaluation and
    every loss from logits have f; the model's own loss is fused with the head in training. The config says which f
    (``config.logit_transform``), ``save_pretrained`` saves f with the weights, and
    :class:`AutoMonotonicModelForCausalLM` loads both. f stays float32.

    A scale or a cap that the model has of its own stays inside: f(cap tanh(scale z / cap)); fused losses find both out
    by themselves. A :class:`~monosoftmax.transforms.SoftCap` takes the place of ``config.final_logit_softcapping``,
    which becomes None.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = LlamaConfig(
    ...     vocab_size=100, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    ... )
    >>> model = add_transform(LlamaForCausalLM(tiny), PLIF(num_pieces=20))
    >>> tokens = torch.randint(100, (2, 8))
    >>> model(tokens, labels=tokens).loss.backward()
    >>> model.logit_transform.raw_slope.grad.shape
    torch.Size([20])

    Args:
        model: of transformers, with a head for causal language modelling; before PEFT, DDP or FSDP wrap it.
        transform: f; or what ``to_dict()`` of it gives; or the name of one, such as "plif".
        fused: when a loss is fused with the head, so that there are no logits: "train", "always" (in evaluation the
            output then has ``log_prob``, ``entropy`` and ``is_top1`` of the tokens instead, see
            :func:`token_metrics`), or "never". ``skip_logits=`` decides for one call.

    Returns:
        ``model``, whose class is now ``class_for`` of its class.

    Raises:
        TypeError: ``model`` is no model of transformers, is wrapped by PEFT, has no head; ``transform`` is no f.
        ValueError: ``model`` has an f already, or is sharded by ``fully_shard``; ``fused`` is none of the above; or
            ``transform`` is a SoftCap, and the model has a cap that cannot be taken away.
        NotImplementedError: the model is no causal language model: it has an encoder, or classifies.
    """
    if not isinstance(model, PreTrainedModel):
        hint = ": give the model its f before PEFT wraps it" if hasattr(model, "peft_config") else ""
        raise TypeError(f"model must be a model of transformers, got {type(model).__name__}{hint}")
    if hasattr(model, "logit_transform"):
        raise ValueError(f"model has a logit_transform already, {model.logit_transform}: change that")
    if hasattr(model, "unshard"):
        raise ValueError(
            f"model must get its transform before fully_shard has it, got {type(model).__name__}, whose ranks would "
            "each train another f. To load shards of a plain checkpoint, save the model with f once: load it without "
            "distributed_config, add_transform, save_pretrained"
        )
    check_fused(fused)
    # Without a name that transformers knows, as GPT2LMHeadModel, a model has the loss of the first.
    if model.config.is_encoder_decoder or model.loss_type not in (None, "ForCausalLM", "ForConditionalGeneration"):
        raise NotImplementedError(
            f"model must be a causal language model, got {type(model).__name__}: for an encoder with a decoder, and "
            "for classifiers, give the logits to monosoftmax.cross_entropy(logits, target, f)"
        )
    head = head_of(model)
    f = transform_of(transform)
    base: Any = type(model)
    kind = class_for(base)
    config = _with_f(model.config, kind.config_class, f)
    replaced = {id(model.config): config, id(model.config.get_text_config()): config.get_text_config()}
    for each in model.modules():
        if id(getattr(each, "config", None)) in replaced:
            each.config = replaced[id(each.config)]
    model.__class__ = kind
    model.logit_transform = f.to(_device_of(head))
    model.logit_transform.train(model.training)
    model.fused, model.loss_type = fused, "ForCausalLM"
    model._keep_in_fp32_modules_strict = {*(model._keep_in_fp32_modules_strict or ()), "logit_transform"}
    attach(head)
    return model


def transform_of(transform: MonotonicTransform | dict[str, Any] | str) -> MonotonicTransform:
    if isinstance(transform, str):
        transform = {"type": transform}
    return from_dict(transform) if isinstance(transform, dict) else check_transform(transform)


def check_fused(fused: Fused) -> None:
    if fused not in ("train", "always", "never"):
        raise ValueError(f'fused must be "train", "always" or "never", got {fused!r}')


def _with_f(config: Any, kind: type[PreTrainedConfig], f: MonotonicTransform) -> Any:
    """A copy of ``config`` that declares f. That of its text model is a copy, too, if f takes the place of its cap."""
    declared = f.to_dict()
    changed = copy.copy(config)
    changed.__class__ = kind
    changed.logit_transform, changed.auto_map = declared, {}
    text = config.get_text_config()
    if not isinstance(f, SoftCap):
        return changed
    fixed = [name for name in _FIXED_CAPS if getattr(text, name, None)]
    if not fixed and getattr(text, _CAP, None) is None:
        return changed
    without = changed if text is config else copy.copy(text)
    reason: Exception | None = None
    try:
        setattr(without, _CAP, None)
    except Exception as error:  # of the checks of configs, which have no common class over the versions
        fixed, reason = [_CAP], error
    if fixed:
        raise ValueError(
            "transform must not be a SoftCap for a model that has a cap of its own, and cannot do without: "
            f"{text.model_type} has {fixed[0]}={getattr(text, fixed[0])}"
        ) from reason
    for name, value in vars(config).items():
        if value is text:
            setattr(changed, name, without)
    return changed


def _device_of(head: nn.Module) -> Any:
    parameter = next(head.parameters(), None)
    return "cpu" if parameter is None else parameter.device


class AutoMonotonicModelForCausalLM:
    """Loads causal language models with f: ``from_pretrained``."""

    def __init__(self) -> None:
        raise OSError("AutoMonotonicModelForCausalLM has no instances: call from_pretrained")

    @staticmethod
    def from_pretrained(
        path: Any,
        transform: MonotonicTransform | dict[str, Any] | str | None = None,
        *,
        fused: Fused = "train",
        **kwargs: Any,
    ) -> Any:
        """A model with f: of a checkpoint that has one, or of a plain one and ``transform``.

        Args:
            path: a folder or the name of a repository, as for ``AutoModelForCausalLM``.
            transform: f for a plain checkpoint, as for :func:`add_transform`.
            fused: as for :func:`add_transform`.
            **kwargs: as for ``AutoModelForCausalLM.from_pretrained``.

        Raises:
            ValueError: the checkpoint has an f, and ``transform`` is another; or it has none, and so has the call.
            Otherwise as :func:`add_transform`, and as ``AutoModelForCausalLM.from_pretrained``.
        """
        check_fused(fused)
        found, _ = PreTrainedConfig.get_config_dict(path, **{k: v for k, v in kwargs.items() if k in _OF_THE_HUB})
        saved = found.get("logit_transform")
        if saved is None:
            if transform is None:
                raise ValueError(
                    f"transform must say which f the model gets: {path} has none, it is a plain checkpoint"
                )
            f = transform_of(transform)
            return add_transform(AutoModelForCausalLM.from_pretrained(path, **kwargs), f, fused=fused)
        if transform is not None and transform_of(transform).to_dict() != from_dict(saved).to_dict():
            raise ValueError(f"transform must be left out, or the f of {path}, which has {saved}")
        register(found["model_type"])
        model = AutoModelForCausalLM.from_pretrained(path, **kwargs)
        model.fused = fused
        return model


#: The arguments of ``from_pretrained`` that say where the files are.
_OF_THE_HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
