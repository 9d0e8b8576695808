"""The contestants by name: ``FUNCTION FORM``, such as ``plain eager``, ``plif-64 fused`` or ``mos-15 fair``.

The function is what is computed, the form is how. ``plain`` is the cross entropy of softmax(z), ``plif-64`` that of
softmax(f(z)) with f of 64 pieces, ``mos-15`` and ``moc-15`` are mixtures of 15 softmaxes and of 15 contexts. Every
parameter that a transform can learn is learned, and its gradient is part of the work. ``fused`` takes the backend that
is best here; ``cuda``, ``triton`` and, for the head, ``triton recompute`` take the backend and method of that name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import monosoftmax as ms
from monosoftmax.backends import BackendName, Operation
from monosoftmax.checks import HeadMethod

from .cases import DTYPES, Case, Group, Inputs
from .peers import (
    Unavailable,
    cut_cross_entropy,
    cut_cross_entropy_kernels,
    liger_cross_entropy,
    liger_linear_cross_entropy,
    linear_cross_entropy,
)

Loss = Callable[..., Tensor]

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
_COMPONENTS = (4, 15)
#: Contestants that a case of 16-bit logits has beside the others: the fused loss of the same logits in float32.
_WIDE = "fused float32"
#: Forms by backend and, for the head, method: those of a GPU.
_ON_GPU: dict[Group, tuple[str, ...]] = {
    "logits": ("cuda", "triton"),
    "head": ("cuda", "triton", "triton chunked", "triton recompute"),
}
#: Forms of ``plain`` that hold no logits in full.
_WITHOUT_LOGITS = ("linear_cross_entropy chunked", "cut-cross-entropy kernels")
_OVERWRITES = "writes the gradient over the logits, which are restored before each call, untimed"
_SEED = 0
#: Relative distance up to which losses and norms of gradients of the same function agree.
_TOLERANCES = {"float64": 1e-6, "float32": 1e-3, "bfloat16": 0.05, "float16": 0.05}


@dataclass(frozen=True)
class Contestant:
    """A contestant with its inputs."""

    #: The mean loss over the rows.
    loss: Callable[[], Tensor]
    #: What the loss is differentiated by: the operands, then parameters; nothing in the mode ``no-grad``.
    differentiated: tuple[Tensor, ...]
    #: What computes it, in a word or two.
    backend: str
    #: What a reader of the results has to know about it.
    note: str = ""
    #: Restores, before each step and untimed, what a step overwrites.
    reset: Callable[[], object] = lambda: None

    def step(self) -> tuple[Tensor, ...]:
        """The loss and its gradients, which are returned: to accumulate them would be one more pass over memory."""
        if not self.differentiated:
            with torch.no_grad():
                return (self.loss(),)
        loss = self.loss()
        return (loss.detach(), *torch.autograd.grad(loss, self.differentiated))

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients that a step returns."""
        return sum(tensor.numel() * tensor.itemsize for tensor in self.differentiated)


def names(
    group: Group, dtype: str, pieces: Sequence[int], patterns: Sequence[str] = ("*",), on_gpu: bool = False
) -> list[str]:
    """The contestants of a case, baselines first, that match one of ``patterns`` (as file names do).

    ``on_gpu`` adds what only a GPU runs: the forms by backend, and the kernels of other packages.
    """
    functions = [*_TRANSFORMS, *(f"plif-{count}" for count in pieces)]
    forms = ["reference", "reference compiled", "fused"]
    if dtype in ("bfloat16", "float16") and group == "logits":
        forms.append(_WIDE)
    found = ["plain eager", "plain compiled"]
    if group == "head":
        found += ["plain linear_cross_entropy", "plain linear_cross_entropy chunked", "plain cut-cross-entropy"]
    if on_gpu:
        forms += _ON_GPU[group]
        found += ["plain liger", *(["plain cut-cross-entropy kernels"] if group == "head" else [])]
    found += [f"{function} {form}" for function in functions for form in forms]
    if group == "head":
        found += [f"mos-{count} {form}" for count in _COMPONENTS for form in ("published", "fair")]
        found += [f"moc-{count} fused" for count in _COMPONENTS]
    return [name for name in found if any(fnmatchcase(name, pattern) for pattern in patterns)]


def prepare(name: str, case: Case, inputs: Inputs) -> Contestant:
    """The contestant ``name`` on the inputs of ``case``.

    Raises:
        Unavailable: it cannot run here, for a reason that the report gives.
    """
    function, form = name.split(" ", 1)
    if function == "plain":
        return _plain(form, case, inputs)
    if function.startswith(("mos-", "moc-")):
        return _mixture(function, form, case, inputs)
    return _transformed(function, form, case, inputs)


def same_function(name: str) -> str:
    """What a contestant computes: those with the same answer must have the same loss and gradients.

    A transform that starts as the identity is compared with its own other forms, but ``identity`` with ``plain``. The
    published form of a mixture adds 1e-8 to the probabilities, so that its forms differ.
    """
    function, form = name.split(" ", 1)
    if function.startswith("mos-"):
        return f"{function} {form}"
    return "plain" if function == "identity" else function


def fingerprint(case: Case, results: Sequence[Tensor]) -> tuple[float, ...]:
    """The loss and the norms of the gradients of the operands, of what :meth:`Contestant.step` returned."""
    operands = 0 if case.mode == "no-grad" else 1 if case.dim is None else 2
    norms = (torch.linalg.vector_norm(g, dtype=torch.float64) for g in results[1 : 1 + operands])
    return (float(results[0]), *(float(norm) for norm in norms))


def disagreement(case: Case, one: tuple[float, ...], other: tuple[float, ...]) -> str | None:
    """In what two fingerprints differ by more than rounding; None where they agree."""
    tolerance = _TOLERANCES[case.dtype]
    labels = ("loss", *(f"norm of gradient {index}" for index in range(len(one) - 1)))
    for label, a, b in zip(labels, one, other, strict=True):
        if not math.isclose(a, b, rel_tol=tolerance):
            return f"{label} {a:.6g} instead of {b:.6g}"
    return None


def workspace_bytes(name: str, case: Case) -> int:
    """About how many bytes a step takes beyond operands and gradients: what to ask for before it is tried.

    In units of N V in the type of the arithmetic, from measurements of the peak; a step that takes more than there is
    still ends as a row that says so.
    """
    function, form = name.split(" ", 1)
    logits = case.rows * case.classes * max(4, case.itemsize)
    if function.startswith("mos-"):
        components = int(function.removeprefix("mos-"))
        if form == "published":
            return 4 * components * logits
        return 4 * min(ms.mixtures.LOGITS_BUDGET, components * logits)
    if form == _WIDE:
        return 2 * logits
    if form == "liger":
        # Its own logits: all of them, or those of a chunk of rows.
        return case.logits_bytes
    if function.startswith("moc-") or form in ("fused", *_ON_GPU["head"], *_WITHOUT_LOGITS):
        return 0
    if form == "reference":
        return {"monotonic_mlp": 14, "spline": 30}.get(function, 10) * logits
    return {"monotonic_mlp reference compiled": 12}.get(name, 3) * logits


def _plain(form: str, case: Case, inputs: Inputs) -> Contestant:
    loss: Loss = F.cross_entropy if case.group == "logits" else _linear_then_cross_entropy
    if form == "eager":
        return _contestant(loss, inputs, (), "torch")
    if form == "compiled":
        return _contestant(_compiled(loss), inputs, (), "inductor")
    if form == "liger":
        return _liger(case, inputs)
    if form.startswith("cut-cross-entropy"):
        kernels = form.endswith("kernels")
        loss, note = cut_cross_entropy_kernels(inputs.target.device) if kernels else cut_cross_entropy()
        return _contestant(loss, inputs, (), "cut-cross-entropy" if kernels else "inductor", note)
    return _contestant(linear_cross_entropy(chunked=form.endswith("chunked")), inputs, (), "torch")


def _liger(case: Case, inputs: Inputs) -> Contestant:
    if case.group == "head":
        return _contestant(liger_linear_cross_entropy(), inputs, (), "liger")
    loss = liger_cross_entropy()
    if case.mode == "no-grad":
        return _contestant(loss, inputs, (), "liger")
    logits = inputs.operands[0].detach()
    overwritten = logits.clone().requires_grad_()
    contestant = _contestant(loss, Inputs((overwritten,), inputs.target), (), "liger", _OVERWRITES)
    return replace(contestant, reset=lambda: overwritten.detach().copy_(logits))


def _transformed(function: str, form: str, case: Case, inputs: Inputs) -> Contestant:
    transform = make_transform(function)
    transform = transform.to(inputs.target.device, torch.float64 if case.dtype == "float64" else torch.float32)
    operation: Operation = "cross_entropy" if case.group == "logits" else "linear_cross_entropy"
    backend, method = _backend_and_method(form)
    if form == _WIDE:
        inputs = inputs.wide

    def loss_of_logits(logits: Tensor, target: Tensor) -> Tensor:
        return ms.cross_entropy(logits, target, transform, backend=backend)

    def loss_of_head(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return ms.linear_cross_entropy(input, weight, target, transform, backend=backend, method=method)

    loss: Loss = loss_of_logits if case.group == "logits" else loss_of_head
    parameters = tuple(transform.parameters())
    if form == "reference compiled":
        return _contestant(_compiled(loss), inputs, parameters, "inductor")
    if form == "reference":
        return _contestant(loss, inputs, parameters, "reference")
    chosen = explain(operation, inputs.operands[0], transform, backend, method)
    return _contestant(loss, inputs, parameters, chosen.backend, chosen.how)


def make_transform(function: str) -> ms.transforms.MonotonicTransform:
    """The transform ``function``, on the CPU."""
    if function.startswith("plif-"):
        return ms.transforms.PLIF(int(function.removeprefix("plif-")))
    return _TRANSFORMS[function]()


def explain(
    operation: Operation,
    input: Tensor,
    transform: ms.transforms.MonotonicTransform,
    backend: BackendName,
    method: HeadMethod = "auto",
) -> ms.backends.Explanation:
    """:func:`monosoftmax.backends.explain`; :class:`Unavailable` where the backend cannot take the call."""
    try:
        return ms.backends.explain(operation, input, transform, backend=backend, method=method)
    except ValueError as error:
        raise Unavailable(str(error)) from None


def _backend_and_method(form: str) -> tuple[BackendName, HeadMethod]:
    """What a form of a transform asks for."""
    if form.startswith("fused"):
        return "auto", "auto"
    backend, _, method = form.partition(" ")
    return cast(BackendName, backend), "auto" if backend == "reference" else cast(HeadMethod, method or "auto")


def _mixture(function: str, form: str, case: Case, inputs: Inputs) -> Contestant:
    kind, components = function.split("-")
    assert case.dim is not None
    input, weight = inputs.operands
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        layer: ms.MixtureOfSoftmaxes | ms.MixtureOfContexts
        # On the CPU first, so that the parameters are the same whatever the device.
        if kind == "mos":
            layer = ms.MixtureOfSoftmaxes(
                case.dim, case.classes, int(components), bias=False, published=form == "published"
            )
        else:
            layer = ms.MixtureOfContexts(case.dim, case.classes, int(components), bias=False)
    layer = layer.tie_weights(nn.Embedding.from_pretrained(weight.detach(), freeze=False))
    layer = layer.to(input.device, DTYPES[case.dtype])
    decoder = layer.decoder.weight
    own = tuple(parameter for parameter in layer.parameters() if parameter is not decoder)

    def loss(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        result: Tensor = layer(input, target).loss
        return result

    # The decoder's parameter shares the memory of the case's weight, and stands in for it.
    tied = Inputs((input, decoder), inputs.target)
    operation: Operation = "cross_entropy" if kind == "mos" else "linear_cross_entropy"
    backend = "torch" if form == "published" else ms.backends.explain(operation, input).backend
    return _contestant(loss, tied, own, backend)


def _contestant(loss: Loss, inputs: Inputs, parameters: tuple[Tensor, ...], backend: str, note: str = "") -> Contestant:
    differentiated = (*inputs.operands, *parameters) if inputs.operands[0].requires_grad else ()
    return Contestant(lambda: loss(*inputs.operands, inputs.target), differentiated, backend, note)


def _linear_then_cross_entropy(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(input, weight), target)


def _compiled(loss: Loss) -> Loss:
    """``loss`` in one graph for exactly its shapes."""
    # All transforms share the code of one Python function, and torch.compile gives up on a function that it compiled
    # more than 8 times for different values of what it closes over.
    torch._dynamo.config.recompile_limit = 256
    compiled: Loss = torch.compile(loss, fullgraph=True, dynamic=False)
    return compiled
