"""Derivatives inside derivatives: torch.func in torch.func, in autograd, and in torch.compile.

``tests/emulated/test_hands_traced.py`` has one level of each. Here an outer level differentiates what an inner level
has made of a loss. An operator that hides its graph from the outer level gives zeros there, and no error. Each case is
either what the reference backend gives in float64, or an error that says what to do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import pytest
import torch
from losses import disturbed
from torch import Tensor
from torch.func import grad, jacrev, jvp, vjp, vmap

import monosoftmax as ms

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:monosoftmax..no_derivative"),
    pytest.mark.parametrize("operation", ["cross_entropy", "linear_cross_entropy"]),
    pytest.mark.parametrize("reduction", ["mean", "none"]),
]
every_backend = pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])

ROWS, FEATURES, CLASSES = 3, 4, 7
Reduction = Literal["mean", "none"]


class Loss:
    """A scalar loss as a function of logits, or of a head's input. ``point`` is where it is differentiated."""

    def __init__(self, operation: str, reduction: Reduction, backend: ms.backends.BackendName) -> None:
        torch.manual_seed(0)
        self.operation, self.reduction, self.backend = operation, reduction, backend
        self.f = disturbed("gss")
        self.weight = torch.randn(CLASSES, FEATURES)
        self.point = torch.randn(ROWS, CLASSES if operation == "cross_entropy" else FEATURES)
        self.target = torch.tensor([0, -100, 3])

    def __call__(self, z: Tensor) -> Tensor:
        reduction, backend = self.reduction, self.backend
        if self.operation == "cross_entropy":
            return ms.cross_entropy(z, self.target, self.f, reduction=reduction, backend=backend).sum()
        head = self.weight, self.target, self.f
        return ms.linear_cross_entropy(z, *head, reduction=reduction, backend=backend).sum()

    def wide(self) -> Loss:
        """The same numbers in float64, on the reference backend."""
        wide = Loss(self.operation, self.reduction, "reference")
        wide.f, wide.weight, wide.point = self.f.double(), self.weight.double(), self.point.double()
        return wide


def primal(loss: Loss, z: Tensor) -> Tensor:
    value: Tensor = vjp(loss, z)[0]
    return value


def primal_beside_cotangent(loss: Loss, z: Tensor) -> Tensor:
    """The value of a vjp, whose derivative is computed as well and adds nothing."""
    value, derivative, *_ = vjp(loss, z)
    unchanged: Tensor = value + 0 * derivative(torch.ones_like(value))[0].detach().sum()
    return unchanged


def primals_in_vmap(loss: Loss, z: Tensor) -> Tensor:
    values: Tensor = vmap(lambda scale: primal(loss, scale * z))(torch.tensor([1.0, 2.0], dtype=z.dtype))
    return values.sum()


def squared_gradient(loss: Loss, z: Tensor) -> Tensor:
    gradient: Tensor = grad(loss)(z)
    return gradient.square().sum()


def grad_of(function: Callable[[Loss, Tensor], Tensor]) -> Callable[[Loss, Tensor], Tensor]:
    return lambda loss, z: grad(lambda u: function(loss, u))(z)


class Nested(NamedTuple):
    """A function of a loss and its point, and what autograd differentiates that function by, if anything."""

    function: Callable[[Loss, Tensor], Tensor]
    by: Literal["nothing", "the point", "f"] = "nothing"

    def __call__(self, loss: Loss, compiled: bool = False) -> Tensor:
        function, point = self.function, loss.point.clone().requires_grad_(self.by == "the point")
        if compiled:
            torch._dynamo.reset()
            function = torch.compile(function, fullgraph=True, backend="aot_eager")
        value = function(loss, point)
        if self.by == "nothing":
            return value
        leaves = [point] if self.by == "the point" else list(loss.f.parameters())
        return torch.cat([each.flatten() for each in torch.autograd.grad(value, leaves)])


#: Of the first order, and right.
RIGHT = {
    "grad": Nested(lambda loss, z: grad(loss)(z)),
    "jacrev": Nested(lambda loss, z: jacrev(loss)(z)),
    "vmap(grad)": Nested(lambda loss, z: vmap(grad(loss))(torch.stack([z, 2 * z]))),
    "grad(vmap)": Nested(grad_of(lambda loss, z: vmap(loss)(torch.stack([z, 2 * z])).sum())),
    "grad of vjp's primal": Nested(grad_of(primal)),
    "grad of vjp's primal beside its cotangent": Nested(grad_of(primal_beside_cotangent)),
    "grad of vjps' primals in vmap": Nested(grad_of(primals_in_vmap)),
    "autograd of vjp's primal": Nested(primal, "the point"),
    "autograd of vjp's primal by f": Nested(primal, "f"),
}

NO_SECOND = 'has no derivative: the (cpu|triton|cuda) backend does not support double backward; use backend="reference"'
NO_FORWARD_MODE = r'no forward-mode derivatives \(jvp, jacfwd, hessian\), and no second ones: use backend="reference"'

#: Of the second order, or of forward mode, and refused.
REFUSED = {
    "grad(grad)": (Nested(grad_of(squared_gradient)), NO_SECOND),
    "autograd of grad": (Nested(squared_gradient, "the point"), NO_SECOND),
    "autograd of grad by f": (Nested(squared_gradient, "f"), NO_SECOND),
    "jvp": (Nested(lambda loss, z: jvp(loss, (z,), (torch.ones_like(z),))[1]), NO_FORWARD_MODE),
}

COMPILED = ("grad of vjp's primal", "autograd of vjp's primal", "autograd of vjp's primal by f")


def assert_right(nested: Nested, loss: Loss, compiled: bool = False) -> None:
    found, wanted = nested(loss, compiled), nested(loss.wide())
    assert wanted.abs().max() > 1e-3, "zeros would pass"
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.grid
@every_backend
@pytest.mark.parametrize("case", RIGHT)
def test_right(case: str, operation: str, reduction: Reduction, backend: ms.backends.BackendName) -> None:
    assert_right(RIGHT[case], Loss(operation, reduction, backend))


@pytest.mark.grid
@every_backend
@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, operation: str, reduction: Reduction, backend: ms.backends.BackendName) -> None:
    nested, message = REFUSED[case]
    loss = Loss(operation, reduction, backend)
    with pytest.raises((RuntimeError, NotImplementedError), match=message):
        nested(loss)
    assert nested(loss.wide()).abs().max() > 1e-3  # there is something to be refused


@pytest.mark.slow
@pytest.mark.parametrize("case", COMPILED)
def test_compiled_right(case: str, operation: str, reduction: Reduction) -> None:
    assert_right(RIGHT[case], Loss(operation, reduction, "cpu"), compiled=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_compiled_refused(case: str, operation: str, reduction: Reduction) -> None:
    nested, message = REFUSED[case]
    with pytest.raises(RuntimeError, match=message):
        nested(Loss(operation, reduction, "cpu"), compiled=True)
