"""Models with f where monosoftmax is not: :func:`export` writes f as code, :func:`fold` turns it into weights.

vLLM was not run, for want of a GPU. As its sources say, its own backend for models of transformers makes logits from
the head alone, so that it would leave f out: serve a model with f by it only after :func:`fold` has made it plain. It
does not know model types such as ``monosoftmax_llama``. What it does with a folder of :func:`export` was not tried.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...transforms import Chain, Identity, MonotonicTransform, Scale, SoftCap, Temperature
from .classes import PREFIX, class_for, noted
from .exported_code import modeling_of
from .head_tap import _PROBES, refusal
from .model import MonotonicHead, head_of

#: The entry of a config that caps logits if it is not None.
_CAP = "final_logit_softcapping"

#: What a folder of export says to a plain class that would leave f out.
_READ_BY = "Load this model, which has f, by AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)"

_MODELING = "modeling_monosoftmax"

#: The largest relative error of logits with f in the weights.
_TOLERANCE = 1e-5


@torch.no_grad()
def export(model: Any, path: str | os.PathLike[str]) -> None:
    """Writes a checkpoint with f that is loaded without monosoftmax, by transformers' ``trust_remote_code=True``.

    The folder has the weights, the configs, and ``modeling_monosoftmax.py``: a subclass of the plain model whose
    ``forward`` applies f to the logits and, with ``labels``, gives the loss of them. The code of f is read off the
    transform's own ``evaluate``. Its coefficients are in the weights, in float32 also where the model is loaded as
    bfloat16, and f is computed in float32 and rounded once. What is learned in the raw parameters of f cannot be
    trained further from there: keep what ``save_pretrained`` writes for that.

    >>> import tempfile
    >>> from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
    >>> from monosoftmax.integrations.transformers import add_transform
    >>> tiny = LlamaConfig(
    ...     vocab_size=100, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    ... )
    >>> model = add_transform(LlamaForCausalLM(tiny), PLIF(num_pieces=20)).eval()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export(model, folder)
    ...     served = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    >>> torch.equal(served(torch.tensor([[1, 2]])).logits, model(torch.tensor([[1, 2]])).logits)
    True

    Args:
        model: with f, on one device, its adapters merged.
        path: of a folder that is made, or is empty. A tokenizer is saved beside it by its own ``save_pretrained``.

    Raises:
        TypeError: ``model`` has no f, or is wrapped.
        ValueError: it has adapters, or quantised, sharded or offloaded weights.
        FileExistsError: ``path`` is a file, or a folder that is not empty.
        NotImplementedError: the model's class is not from transformers; or f is of a class from outside of this
            package whose ``evaluate`` ``torch.fx`` cannot trace.
    """
    plain = _plain_class(model)
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"path must be a new or an empty folder, got {target}")
    f = model.logit_transform
    model_type = f"{PREFIX}exported_{plain.config_class.model_type}"
    source = modeling_of(plain, f, model_type, _READ_BY)
    state = {name: each for name, each in model.state_dict().items() if not name.startswith("logit_transform.")}
    state["logit_transform.coefficients"] = f().float().contiguous()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as unfinished:
        folder = Path(unfinished) / target.name
        model.save_pretrained(folder, state_dict=state)
        (folder / f"{_MODELING}.py").write_text(source, encoding="utf-8")
        config = json.loads(_plain_config(model.config, plain).to_json_string())
        config |= {
            "model_type": model_type,
            "architectures": [f"Monotonic{plain.__name__}"],
            "auto_map": {
                "AutoConfig": f"{_MODELING}.Monotonic{plain.config_class.__name__}",
                "AutoModelForCausalLM": f"{_MODELING}.Monotonic{plain.__name__}",
            },
        }
        config = noted(config, plain.config_class, _READ_BY)
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        folder.replace(target)


@torch.no_grad()
def fold(model: Any, *, untie: bool = False) -> Any:
    r"""Turns a model with f into a plain one with the same logits, in place, where f is no more than what weights and
    config of the plain model express.

    That is the identity, a factor (:class:`~monosoftmax.transforms.Temperature`,
    :class:`~monosoftmax.transforms.Scale`), which goes into the head's weight and bias, a
    :class:`~monosoftmax.transforms.SoftCap` where the plain model has an entry for one
    (``config.final_logit_softcapping``), and chains of them. A factor after a cap also goes into that cap:
    :math:`s\,c \tanh(z / c) = c' \tanh(s z / c')` with :math:`c' = s c`. The plain model's logits are compared with
    f's, for a range of what its head may give, before anything is changed. They are equal up to the rounding of the
    weights, which are rounded once more in their type, unless the factor is a power of two.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from monosoftmax.integrations.transformers import add_transform
    >>> tiny = LlamaConfig(
    ...     vocab_size=100, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    ... )
    >>> type(fold(add_transform(LlamaForCausalLM(tiny), Temperature(2.0)))).__name__
    'LlamaForCausalLM'

    Args:
        model: with f, its adapters merged.
        untie: whether a head that shares its weight with the embedding may get its own, a copy, for a factor.

    Returns:
        ``model``, whose class and config are the plain ones again.

    Raises:
        TypeError: ``model`` has no f, or is wrapped.
        ValueError: f does not fold (:func:`export` is for it); or it is a factor, and the head's weight is shared and
            ``untie`` is False, or is no plain weight; or the model has adapters, or quantised or sharded weights.
    """
    plain = _plain_class(model)
    head: Any = head_of(model)
    f, old = model.logit_transform, model.config
    factor, cap = _factor_and_cap(f, getattr(old, _CAP, None))
    config = _plain_config(old, plain)
    if cap is not None:
        setattr(config, _CAP, cap)
    trial = copy.copy(model)
    trial.__class__, trial.config = plain, config
    if not _equal(_on_probes(trial, head, factor), _on_probes(model, head, 1.0)):
        raise ValueError(
            f"model must be able to do to its logits what {_line(f)} does, but a {plain.__name__} is not, whatever its "
            "config says: export(model, path) writes f as code"
        )
    shared = [name for name, each in model.named_parameters(remove_duplicate=False) if each is head.weight]
    if factor != 1.0:
        reason = refusal(head)
        if reason is not None:
            raise ValueError(f"model must have a plain head to fold {_line(f)} into, but {reason}")
        if len(shared) > 1 and not untie:
            size = head.weight.numel() * head.weight.element_size() / 2**20
            raise ValueError(
                f"model must have a head of its own to fold {_line(f)} into, but {', '.join(shared)} are one: "
                f"fold(model, untie=True) copies it ({size:.0f} MiB), export(model, path) leaves it shared"
            )

    if factor != 1.0:
        if len(shared) > 1:
            head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
            config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
        for each in (head.weight, head.bias):
            if each is not None:
                each.mul_(factor)
    for each in model.modules():
        if getattr(each, "config", None) is old:
            each.config = config
    _detach(head)
    del model.logit_transform
    model.__class__ = plain
    for name in [name for name in model.__dict__ if name in MonotonicHead.own_attributes]:
        del model.__dict__[name]
    model._keep_in_fp32_modules_strict = set(model._keep_in_fp32_modules_strict or ()) - {"logit_transform"}
    if factor != 1.0 and len(shared) > 1:
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=False)
    return model


def _line(f: MonotonicTransform) -> str:
    return " ".join(str(f).split())


def _plain_class(model: Any) -> Any:
    """The class of ``model`` without f.

    Raises:
        TypeError: it has no f, or is wrapped.
        ValueError: its weights are not all its own.
    """
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("model must have its adapters merged, by merge_and_unload() of PEFT, got one with adapters")
    if not isinstance(model, MonotonicHead):
        raise TypeError(f"model must be one of add_transform, got {type(model).__name__}")
    plain: Any = next(each for each in type(model).__mro__ if not issubclass(each, MonotonicHead))
    if type(model) is not class_for(plain):
        raise TypeError(f"model must be a {class_for(plain).__name__}, got {type(model).__name__}: unwrap it first")
    adapter = next((each for each in model.modules() if type(each).__module__.startswith("peft.")), None)
    if adapter is not None:
        raise ValueError(f"model must have its adapters merged, got one with {type(adapter).__name__} of PEFT")
    if getattr(model, "hf_quantizer", None) is not None or getattr(model.config, "quantization_config", None):
        raise ValueError("model must have plain weights, got a quantised one: call model.dequantize()")
    for name, each in model.named_parameters():
        if each.is_meta or hasattr(each, "full_tensor"):
            kind = "meta" if each.is_meta else "DTensor"
            raise ValueError(f"model must have its weights whole on one device, got a {kind} as {name}")
    return plain


def _factor_and_cap(f: MonotonicTransform, cap: float | None) -> tuple[float, float | None]:
    """a and c, such that f after a cap ``cap`` does to z what the cap c does to a z. None is no cap."""
    factor = 1.0
    parts: list[Any] = list(f.parts) if isinstance(f, Chain) else [f]
    for each in parts:
        if isinstance(each, SoftCap) and cap is None:
            # A chain's has no coefficients.
            cap = float(each.arguments()["cap"] if not len(each()) else each()[0])
        elif isinstance(each, (Scale, Temperature)):
            step = each.factor if isinstance(each, Scale) else 1 / float(each()[0])
            factor, cap = factor * step, None if cap is None else cap * step
        elif not isinstance(each, Identity):
            behind = ", behind a cap," if isinstance(each, SoftCap) else ""
            raise ValueError(
                f"model must have an f that a plain model can have, too (a temperature, a scale, a cap), but {each}"
                f"{behind} is none: export(model, path) writes it as code"
            )
    return factor, cap


def _plain_config(old: Any, plain: Any) -> Any:
    config = copy.copy(old)
    config.__class__ = plain.config_class
    for name in ("logit_transform", "auto_map"):
        config.__dict__.pop(name, None)
    return config


def _on_probes(model: Any, head: nn.Module, factor: float) -> Tensor:
    """The logits that ``model`` makes of ``factor`` times a range of numbers, in the place of its head's output."""

    def probes(head: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        some = torch.tensor(_PROBES, dtype=torch.float32, device=output.device) * factor
        return some.repeat(-(-output.shape[-1] // len(some)))[: output.shape[-1]].expand(output.shape)

    hook = head.register_forward_hook(probes)
    try:
        logits: Tensor = model(torch.zeros(1, 1, dtype=torch.long, device=model.device), return_dict=True).logits
    finally:
        hook.remove()
    return logits


def _equal(found: Tensor, wanted: Tensor) -> bool:
    return bool(((found - wanted).abs() <= _TOLERANCE * wanted.abs()).all())


def _detach(head: Any) -> None:
    """Takes off what ``attach`` of :mod:`.head_tap` put on."""
    for hooks in (head._forward_pre_hooks, head._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook.__module__ == refusal.__module__]:
            del hooks[key]
    head.__dict__.pop("_monosoftmax_tap", None)
