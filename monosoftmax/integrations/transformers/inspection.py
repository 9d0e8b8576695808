"""Says whether f is where it has to be in a model of transformers: :func:`inspect`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ...modules import MonotonicCrossEntropyLoss
from ...transforms import MonotonicTransform
from .head_tap import refusal
from .loss import MonotonicLoss
from .model import MonotonicHead, head_of


def inspect(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> str:
    """Where f is in ``model``, found by running it on four tokens: in loss, logits, training and config.

    Args:
        model: a causal language model of transformers, with f or without, wrapped by PEFT or not. It is left as it is:
            no gradients are kept, and random numbers are put back.
        optimizer: what trains it; says which group f is in.

    Returns:
        Lines. The first begins with ``right``, or with ``wrong`` and what to do.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = _transforms(model)
    if not found:
        return (
            f"wrong: {type(model).__name__} has no f: its softmax is the plain one. Give it one with monosoftmax."
            "integrations.transformers.add_transform(model, f)"
        )
    lines: list[str] = []
    problems: list[str] = []
    head = next((each for each in model.modules() if isinstance(each, MonotonicHead)), None)
    in_logits, in_loss = _uses(model, found, problems)
    name, f = next((each for each in found.items() if each[0] in in_loss | in_logits), next(iter(found.items())))
    lines.append(f"f: {f} at {name}")
    lines.append(f"in the logits: {'yes' if name in in_logits else 'no'}")
    lines.append(f"in the loss: {'yes' if name in in_loss else 'no'}{_how(head)}")
    if name not in in_loss:
        problems.append("f is not in the loss")
    if name not in in_logits:
        problems.append("f is not in the logits, so that generate and evaluation do without it")
    lines.append(f"trained: {_trained(model, f, optimizer, problems)}")
    declared = None if head is None else head.config.logit_transform
    lines.append(f"in the config: {declared or 'no'}")
    if declared is None:
        problems.append("the config does not say that there is an f, so that from_pretrained leaves it out")
    verdict = "right" if not problems else "wrong: " + "; ".join(problems)
    if problems and head is None:
        verdict += ". add_transform(model, f) of monosoftmax.integrations.transformers puts f where it has to be"
    return "\n".join([verdict, *lines])


def outermost_transforms(model: nn.Module) -> dict[str, MonotonicTransform]:
    """The transforms of ``model`` by their names there; parts of others left out."""
    found: dict[str, MonotonicTransform] = {}
    inside: set[int] = set()
    for name, each in model.named_modules():
        if isinstance(each, MonotonicTransform) and id(each) not in inside:
            inside.update(id(part) for part in each.modules())
            found[name] = each
    return found


def _transforms(model: nn.Module) -> dict[str, MonotonicTransform]:
    """The transforms of ``model``, and that of its loss function."""
    found = outermost_transforms(model)
    known = {id(part) for each in found.values() for part in each.modules()}
    for each in model.modules():
        loss = each.__dict__.get("_loss_function")
        f = loss.transform if isinstance(loss, (MonotonicLoss, MonotonicCrossEntropyLoss)) else None
        if isinstance(f, MonotonicTransform) and id(f) not in known:
            found["loss_function.transform, which is no part of the model"] = f
    return found


def _uses(
    model: nn.Module, transforms: dict[str, MonotonicTransform], problems: list[str]
) -> tuple[set[str], set[str]]:
    """The names of the transforms that the logits, and that the loss of a training step, are computed with."""
    vocabulary = int(getattr(model.config.get_text_config(), "vocab_size", 4))  # type: ignore[union-attr, operator]
    device = next((each.device for each in model.parameters()), torch.device("cpu"))
    tokens = torch.arange(4, device=device).remainder(vocabulary)[None]
    uses: list[set[str]] = []
    for arguments in ({"input_ids": tokens}, {"input_ids": tokens, "labels": tokens}):
        called: set[str] = set()
        with _watched(transforms, called), _unchanged(model, training="labels" in arguments):
            try:
                model(**arguments)
            except Exception as error:  # the report says so
                problems.append(f"forward({', '.join(arguments)}) raises {type(error).__name__}: {error}")
        uses.append(called)
    return uses[0], uses[1]


@contextlib.contextmanager
def _watched(transforms: dict[str, MonotonicTransform], called: set[str]) -> Iterator[None]:
    handles = [each.register_forward_hook(lambda *_, name=name: called.add(name)) for name, each in transforms.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _unchanged(model: nn.Module, training: bool) -> Iterator[None]:
    """Runs ``model`` in training or evaluation, and puts its mode and the random numbers back."""
    modes = [(each, each.training) for each in model.modules()]
    try:
        with torch.random.fork_rng(), torch.no_grad():
            model.train(training)
            yield
    finally:
        for each, mode in modes:
            each.training = mode


def _how(head: MonotonicHead | None) -> str:
    if head is None:
        return ""
    reason = refusal(head_of(head)) or head._not_fusible
    if head.fused == "never" or reason is not None:
        return f", from logits: {reason or 'fused is never'}"
    return f", fused with the head, as f of {head._inner}"


def _trained(
    model: nn.Module, f: MonotonicTransform, optimizer: torch.optim.Optimizer | None, problems: list[str]
) -> str:
    parameters: list[Tensor] = list(f.parameters())
    if not parameters:
        return "no, f has no parameters"
    owned = {id(each) for each in model.parameters()}
    if not all(id(each) in owned for each in parameters):
        problems.append("f is no part of the model, so that it is neither trained nor saved: model.f = f")
        return "no, f is no part of the model"
    if not any(each.requires_grad for each in parameters):
        problems.append('f is frozen. With PEFT, modules_to_save=["logit_transform"] trains it')
        return "no, f is frozen"
    kinds = ", ".join(sorted({str(each.dtype).removeprefix("torch.") for each in parameters}))
    if optimizer is None:
        return f"yes, in {kinds}, by an optimizer that inspect(model, optimizer) was not given"
    groups = {id(each): group for group in optimizer.param_groups for each in group["params"]}
    group = groups.get(id(parameters[0]))
    if group is None:
        problems.append("the optimizer does not have f's parameters")
        return "no, the optimizer does not have f's parameters"
    decay = group.get("weight_decay", 0)
    if decay:
        problems.append(f"the optimizer decays f, by {decay}: see MonotonicAdamW, or monosoftmax.parameter_groups")
    return f"yes, in {kinds}, group {group.get('name', 'without a name')!r}, lr {group['lr']:g}, weight decay {decay:g}"
