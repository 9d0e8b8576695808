"""The contestants by name: ``FUNCTION FORM``, such as ``plain eager``, ``plif-64 fused`` or ``mos-15 fair``.

``plain`` is the cross entropy of softmax(z), ``plif-64`` that of softmax(f(z)) with f of 64 pieces, ``mos-15`` and
``moc-15`` are mixtures of 15 softmaxes and of 15 contexts. Every parameter that a transform can learn is learned, and
its gradient is part of the work. ``fused`` takes the backend that is best here; ``cuda``, ``triton`` and, for the head,
``triton recompute`` take the backend and method of that name. Tokens and distillation: :mod:`.tokens`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import monosoftmax as ms
from monosoftmax.backends import Operation

from . import tokens
from .cases import Case, Group, Inputs

_TRANSFORMS: dict[str, Callable[[], ms.transforms.MonotonicTransform]] = {
    "identity": ms.transforms.Identity,
    "temperature": ms.transforms.Temperature,
    "sigsoftmax": ms.transforms.SigSoftmax,
    "gss": ms.transforms.GSS,
    "soft_cap": partial(ms.transforms.SoftCap, learnable=True),
    "sigmoid_cap": partial(ms.transforms.SigmoidCap, learnable=True),
    "monotonic_mlp": partial(ms.transforms.MonotonicMLP, 8),
    "spline": partial(ms.transforms.RationalQuadraticSpline, 16),
}
_PLAIN: dict[Group, tuple[str, ...]] = {"logits": ("eager", "compiled")}
_PLAIN["head"] = *_PLAIN["logits"], "linear_cross_entropy", "linear_cross_entropy chunked", "cut-cross-entropy"
_PLAIN_ON_GPU = {"logits": ("liger",), "head": ("liger", "cut-cross-entropy kernels")}
_BACKENDS = {"logits": ("cuda", "triton"), "head": ("cuda", "triton", "triton chunked", "triton recompute")}
_MIXTURES = ("mos-4 published", "mos-4 fair", "mos-15 published", "mos-15 fair", "moc-4 fused", "moc-15 fused")
#: Relative distance up to which losses and norms of gradients of the same function agree.
_TOLERANCES = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.05}


class Unavailable(Exception):
    """A contestant cannot run here; the message says why."""


@dataclass(frozen=True)
class Contestant:
    """A contestant with its inputs."""

    step: Callable[[], tuple[Tensor, ...]]  # one call; returns the loss and its gradients
    backend: str
    function: str  # those with the same must have the same loss and gradients
    compared: int  # so many of the gradients are; the rest are parameters'


def names(group: Group, dtype: str, pieces: Sequence[int], patterns: Sequence[str], on_gpu: bool) -> list[str]:
    """The contestants of a case, baselines first, that match one of ``patterns`` (as file names do).

    ``on_gpu`` adds what only a GPU runs: the forms by backend, and the kernels of other packages.
    """
    if group in tokens.GROUPS:
        return [name for name in tokens.names(group, on_gpu) if any(fnmatchcase(name, pattern) for pattern in patterns)]
    forms = ["reference", "reference compiled", "fused"]
    if dtype in ("bfloat16", "float16") and group == "logits":
        forms.append("fused float32")  # the same logits in float32
    forms += _BACKENDS[group] if on_gpu else ()
    functions = *_TRANSFORMS, *(f"plif-{count}" for count in pieces)
    found = [f"plain {form}" for form in _PLAIN[group] + (_PLAIN_ON_GPU[group] if on_gpu else ())]
    found += [f"{function} {form}" for function in functions for form in forms]
    found += _MIXTURES if group == "head" else ()
    return [name for name in found if any(fnmatchcase(name, pattern) for pattern in patterns)]


def prepare(name: str, case: Case, inputs: Inputs) -> Contestant:
    """The contestant ``name`` on the inputs of ``case``; :class:`Unavailable`, with why, where it cannot run.

    A transform that starts as the identity is compared with its own other forms, but ``identity`` with ``plain``. The
    published form of a mixture adds 1e-8 to the probabilities, so that its forms differ.
    """
    function, form = name.split(" ", 1)
    kind = function.partition("-")[0]
    make = {"plain": _plain, "mos": _mixture, "moc": _mixture}.get(kind, _transformed)
    make = _of_tokens if case.group in tokens.GROUPS else make
    loss, inputs, parameters, backend = make(function, form, case, inputs)
    if form.endswith("compiled"):
        # By default torch.compile gives up on the function that all transforms share after 8 of them.
        torch._dynamo.config.recompile_limit = 256
        loss, backend = torch.compile(loss, fullgraph=True, dynamic=False), "inductor"

    def step() -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(case.mode == "train"):
            found = loss(*inputs.operands, inputs.target)
        # Gradients are returned: to accumulate them would be one more pass over memory.
        wanted = (*inputs.operands, *parameters)
        return (found.detach(), *(torch.autograd.grad(found, wanted) if case.mode == "train" else ()))

    computes = {"identity": "plain", "mos": name, "moc": name}.get(kind, function)
    computes = case.group if case.group in tokens.GROUPS else computes
    return Contestant(step, backend, computes, len(inputs.operands))


def fingerprint(contestant: Contestant) -> tuple[float, ...]:
    """The mean loss, and the norms of the gradients that are compared, of one step."""
    loss, *gradients = contestant.step()
    norms = (torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients[: contestant.compared])
    return (float(loss.double().mean()), *map(float, norms))


def disagreement(case: Case, one: tuple[float, ...], other: tuple[float, ...]) -> str | None:
    """In what two fingerprints differ by more than rounding; None where they agree. What is not finite never does."""
    for index, (a, b) in enumerate(zip(one, other, strict=True)):
        if not (math.isfinite(a) and math.isclose(a, b, rel_tol=_TOLERANCES[case.dtype])):
            return f"{f'norm of gradient {index - 1}' if index else 'loss'} {a:.6g} instead of {b:.6g}"
    return None


def make_transform(function: str) -> ms.transforms.MonotonicTransform:
    """The transform ``function``, on the CPU."""
    kind, _, pieces = function.partition("-")
    return ms.transforms.PLIF(int(pieces)) if kind == "plif" else _TRANSFORMS[function]()


def choose(operation: Operation, *given: Any, **options: Any) -> str:
    """The backend by :func:`monosoftmax.backends.explain`; :class:`Unavailable` where it cannot take the call."""
    try:
        return ms.backends.explain(operation, *given, **options).backend
    except ValueError as error:
        raise Unavailable(str(error)) from None


#: A loss of operands and target, the operands, parameters of its own, and what computes it.
_Made = tuple[Callable[..., Any], Inputs, tuple[Tensor, ...], str]


def _plain(_: str, form: str, case: Case, inputs: Inputs) -> _Made:
    if form in ("eager", "compiled"):
        return F.cross_entropy if case.dim is None else linear_then_cross_entropy, inputs, (), "torch"
    if form == "cut-cross-entropy":  # Wijmans et al., ICLR 2025
        return _peer("cut_cross_entropy.torch_compile").torch_compile_linear_cross_entropy, inputs, (), form
    if form == "cut-cross-entropy kernels":
        if inputs.target.device.type != "cuda":
            raise Unavailable(f"the kernels of cut-cross-entropy need a GPU, inputs are on {inputs.target.device}")
        # These count tiles whose gradients are all small as zero.
        return partial(_peer("cut_cross_entropy").linear_cross_entropy, impl="cce"), inputs, (), form.split()[0]
    if form == "liger" and case.dim is None:
        loss = _peer("liger_kernel.ops.cross_entropy").LigerCrossEntropyFunction.apply
        return lambda *given: loss(*given, None)[0], inputs.copy(), (), form  # the gradient overwrites the logits
    if form == "liger":
        head = _peer("liger_kernel.ops.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyFunction.apply
        return lambda *given: head(*given)[0], inputs, (), form
    if not (hasattr(F, "linear_cross_entropy") and hasattr(nn, "LinearCrossEntropyOptions")):
        raise Unavailable(f"torch {torch.__version__} has no such function, or no options for it")
    options = {"options": nn.LinearCrossEntropyOptions()} if form.endswith("chunked") else {}
    return partial(F.linear_cross_entropy, **options), inputs, (), "torch"


def linear_then_cross_entropy(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(input, weight), target)


def _peer(module: str) -> Any:
    """A module of a package of requirements/peers.txt; :class:`Unavailable` where it, or triton, is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise Unavailable(f"{error}: pip install --no-deps -r requirements/peers.txt") from None


def _transformed(function: str, form: str, case: Case, inputs: Inputs) -> _Made:
    transform = make_transform(function).to(inputs.target.device)
    operation: Operation = "cross_entropy" if case.dim is None else "linear_cross_entropy"
    word, _, method = form.partition(" ")
    given: dict[str, Any] = {"backend": "auto" if word == "fused" else word}
    if case.dim is not None:
        given["method"] = method if word == "triton" and method else "auto"
    inputs = inputs.copy(torch.float32) if form == "fused float32" else inputs
    backend = choose(operation, inputs.operands[0], transform, **given)
    call = getattr(ms, operation)
    return lambda *operands: call(*operands, transform, **given), inputs, tuple(transform.parameters()), backend


def _of_tokens(function: str, form: str, case: Case, inputs: Inputs) -> _Made:
    if function == "plain":
        return tokens.plain(case.group, form, inputs.fixed), inputs, (), "torch"
    transform = ms.transforms.SoftCap(tokens.CAP).to(inputs.target.device) if function == "soft_cap" else None
    operation, _, backend = form.partition(" ") if case.group == "tokens" else ("linear_distillation", "", form)
    given: dict[str, Any] = {"backend": backend if backend in ("cuda", "triton") else "auto"}
    chosen = choose(operation, inputs.operands[0], transform, **given)  # type: ignore[arg-type]
    return tokens.fused(case.group, operation, inputs.fixed, transform=transform, **given), inputs, (), chosen


def _mixture(function: str, form: str, case: Case, inputs: Inputs) -> _Made:
    kind, components = function.split("-")
    input, weight = inputs.operands
    # On the CPU first, so that the parameters are the same whatever the device.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kinds = {"mos": partial(ms.MixtureOfSoftmaxes, published=form == "published"), "moc": ms.MixtureOfContexts}
        layer = kinds[kind](case.dim, case.classes, int(components), bias=False)
    layer.tie_weights(nn.Embedding.from_pretrained(weight.detach(), freeze=False))
    layer.to(input.device, getattr(torch, case.dtype))
    # The decoder's parameter shares the memory of the case's weight, and stands in for it.
    decoder = layer.decoder.weight
    own = tuple(parameter for parameter in layer.parameters() if parameter is not decoder)
    operation: Operation = "cross_entropy" if kind == "mos" else "linear_cross_entropy"
    backend = "torch" if form == "published" else choose(operation, input)
    return lambda input, _, target: layer(input, target).loss, Inputs((input, decoder), inputs.target), own, backend
