"""The contestants by name: ``FUNCTION FORM``, such as ``plain eager``, ``plif-64 fused`` or ``mos-15 fair``.

``plain`` is the cross entropy of softmax(z), ``plif-64`` that of softmax(f(z)) with f of 64 pieces, ``mos-15`` and
``moc-15`` are mixtures of 15 softmaxes and of 15 contexts. Every parameter that a transform can learn is learned, and
its gradient is part of the work. ``fused`` takes the backend that is best here; ``cuda``, ``triton`` and, for the head,
``triton recompute`` take the backend and method of that name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import monosoftmax as ms
from monosoftmax.backends import Operation

from . import peers
from .cases import DTYPES, Case, Group, Inputs
from .peers import Loss

_TRANSFORMS: dict[str, Callable[[], ms.transforms.MonotonicTransform]] = {
    "identity": ms.transforms.Identity,
    "temperature": ms.transforms.Temperature,
    "sigsoftmax": ms.transforms.SigSoftmax,
    "gss": ms.transforms.GSS,
    "soft_cap": lambda: ms.transforms.SoftCap(learnable=True),
    "sigmoid_cap": lambda: ms.transforms.SigmoidCap(learnable=True),
    "monotonic_mlp": lambda: ms.transforms.MonotonicMLP(8),
    "spline": lambda: ms.transforms.RationalQuadraticSpline(16),
}
#: Forms by backend and, for the head, method: those of a GPU.
_ON_GPU = {"logits": ("cuda", "triton"), "head": ("cuda", "triton", "triton chunked", "triton recompute")}
#: Relative distance up to which losses and norms of gradients of the same function agree.
_TOLERANCES = {"float64": 1e-6, "float32": 1e-3, "bfloat16": 0.05, "float16": 0.05}


@dataclass(frozen=True)
class Contestant:
    """A contestant with its inputs."""

    #: One call; returns the loss and its gradients.
    step: Callable[[], tuple[Tensor, ...]]
    #: What computes it, in a word.
    backend: str
    #: What it computes: those with the same function must have the same loss and gradients.
    function: str
    #: How many of the gradients are compared; the rest are parameters'.
    compared: int


def names(
    group: Group, dtype: str, pieces: Sequence[int], patterns: Sequence[str] = ("*",), on_gpu: bool = False
) -> list[str]:
    """The contestants of a case, baselines first, that match one of ``patterns`` (as file names do).

    ``on_gpu`` adds what only a GPU runs: the forms by backend, and the kernels of other packages.
    """
    functions = [*_TRANSFORMS, *(f"plif-{count}" for count in pieces)]
    forms = ["reference", "reference compiled", "fused"]
    if dtype in ("bfloat16", "float16") and group == "logits":
        forms.append("fused float32")  # the same logits in float32
    found = ["plain eager", "plain compiled"]
    if group == "head":
        found += ["plain linear_cross_entropy", "plain linear_cross_entropy chunked", "plain cut-cross-entropy"]
    if on_gpu:
        forms += _ON_GPU[group]
        found += ["plain liger", *(["plain cut-cross-entropy kernels"] if group == "head" else [])]
    found += [f"{function} {form}" for function in functions for form in forms]
    if group == "head":
        found += ["mos-4 published", "mos-4 fair", "mos-15 published", "mos-15 fair", "moc-4 fused", "moc-15 fused"]
    return [name for name in found if any(fnmatchcase(name, pattern) for pattern in patterns)]


def prepare(name: str, case: Case, inputs: Inputs) -> Contestant:
    """The contestant ``name`` on the inputs of ``case``; :class:`Unavailable`, with why, where it cannot run.

    A transform that starts as the identity is compared with its own other forms, but ``identity`` with ``plain``. The
    published form of a mixture adds 1e-8 to the probabilities, so that its forms differ.
    """
    function, form = name.split(" ", 1)
    if function == "plain":
        return _plain(form, case, inputs)
    if function.startswith(("mos-", "moc-")):
        return replace(_mixture(function, form, case, inputs), function=name)
    found = _transformed(function, form, case, inputs)
    return found if function == "identity" else replace(found, function=function)


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


def explain(
    operation: Operation, input: Tensor, transform: ms.transforms.MonotonicTransform, **given: Any
) -> ms.backends.Explanation:
    """:func:`monosoftmax.backends.explain`; :class:`Unavailable` where the backend cannot take the call."""
    try:
        return ms.backends.explain(operation, input, transform, **given)
    except ValueError as error:
        raise peers.Unavailable(str(error)) from None


def _plain(form: str, case: Case, inputs: Inputs) -> Contestant:
    loss: Loss = F.cross_entropy
    if case.group == "head":
        loss = lambda input, weight, target: F.cross_entropy(F.linear(input, weight), target)  # noqa: E731
    backend = "torch"
    if form == "compiled":
        loss, backend = _compiled(loss), "inductor"
    elif form == "liger":
        loss, backend = peers.liger(case.group), "liger"
        inputs = inputs if case.group == "head" else inputs.copy()
    elif form.startswith("cut-cross-entropy"):
        loss, backend = peers.cut_cross_entropy(form.endswith("kernels"), inputs.target.device), "cut-cross-entropy"
    elif form != "eager":
        loss = peers.linear_cross_entropy(chunked=form.endswith("chunked"))
    return _contestant(loss, inputs, (), backend)


def _transformed(function: str, form: str, case: Case, inputs: Inputs) -> Contestant:
    transform = make_transform(function)
    transform = transform.to(inputs.target.device, torch.float64 if case.dtype == "float64" else torch.float32)
    operation: Operation = "cross_entropy" if case.group == "logits" else "linear_cross_entropy"
    word, _, method = form.partition(" ")
    given: dict[str, Any] = {"backend": "auto" if word == "fused" else word}
    if case.group == "head":
        given["method"] = method if word == "triton" and method else "auto"

    def loss(*operands_and_target: Tensor) -> Tensor:
        if case.group == "logits":
            return ms.cross_entropy(*operands_and_target, transform, **given)
        return ms.linear_cross_entropy(*operands_and_target, transform, **given)

    inputs = inputs.wide if form == "fused float32" else inputs
    parameters = tuple(transform.parameters())
    if form == "reference compiled":
        return _contestant(_compiled(loss), inputs, parameters, "inductor")
    chosen = explain(operation, inputs.operands[0], transform, **given)
    return _contestant(loss, inputs, parameters, chosen.backend)


def _mixture(function: str, form: str, case: Case, inputs: Inputs) -> Contestant:
    kind, components = function.split("-")
    assert case.dim is not None
    input, weight = inputs.operands
    layer: ms.MixtureOfSoftmaxes | ms.MixtureOfContexts
    sizes = case.dim, case.classes, int(components)
    # On the CPU first, so that the parameters are the same whatever the device.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "mos":
            layer = ms.MixtureOfSoftmaxes(*sizes, bias=False, published=form == "published")
        else:
            layer = ms.MixtureOfContexts(*sizes, bias=False)
    layer = layer.tie_weights(nn.Embedding.from_pretrained(weight.detach(), freeze=False))
    layer = layer.to(input.device, DTYPES[case.dtype])
    decoder = layer.decoder.weight
    own = tuple(parameter for parameter in layer.parameters() if parameter is not decoder)

    # The decoder's parameter shares the memory of the case's weight, and stands in for it.
    tied = Inputs((input, decoder), inputs.target)
    operation: Operation = "cross_entropy" if kind == "mos" else "linear_cross_entropy"
    backend = "torch" if form == "published" else ms.backends.explain(operation, input).backend
    return _contestant(lambda input, _, target: cast(Tensor, layer(input, target).loss), tied, own, backend)


def _contestant(loss: Loss, inputs: Inputs, parameters: tuple[Tensor, ...], backend: str) -> Contestant:
    train = inputs.operands[0].requires_grad

    def step() -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(train):
            found = loss(*inputs.operands, inputs.target)
        # Gradients are returned: to accumulate them would be one more pass over memory.
        return (found.detach(), *(torch.autograd.grad(found, (*inputs.operands, *parameters)) if train else ()))

    return Contestant(step, backend, "plain", len(inputs.operands))


def _compiled(loss: Loss) -> Loss:
    """``loss`` in one graph for exactly its shapes."""
    # By default torch.compile gives up on the function that all transforms share after 8 of them.
    torch._dynamo.config.recompile_limit = 256
    return cast(Loss, torch.compile(loss, fullgraph=True, dynamic=False))
