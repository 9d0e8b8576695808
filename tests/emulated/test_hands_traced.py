"""Shapes without data, and functions of functions: what traces, stands in for and transforms calls of the package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo.compiled_autograd
from hands import BACKENDS, check_table, on, outcome
from losses import disturbed
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import monosoftmax as ms

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")

ROWS, FEATURES, CLASSES = 3, 4, 7


def of_logits(z: Tensor, target: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    return F.cross_entropy(f(z), target, reduction="sum")


class Column(NamedTuple):
    """A scalar of a public function or module: of x [N, D] and targets, of a head's weight, and f, on a backend."""

    width: int
    call: Callable[[Tensor, Tensor, Tensor, Any, Any], Tensor]
    #: The same in plain PyTorch.
    plain: Callable[[Tensor, Tensor, Tensor, Any], Tensor]
    differentiable: bool = True


LAYERS = {
    name: ms.MonotonicSoftmax(FEATURES, CLASSES, bias=False, reduction="sum", z_loss=0.1, backend=name)  # type: ignore[arg-type]
    for name in BACKENDS
}


def _layer(x: Tensor, target: Tensor, weight: Tensor, f: Any, backend: Any) -> Tensor:
    layer = LAYERS[backend]
    layer.transform = f
    output = torch.func.functional_call(layer, {"weight": weight}, (x, target))
    return output.loss - output.output.sum()  # type: ignore[no-any-return]


def _plain_layer(x: Tensor, target: Tensor, weight: Tensor, f: Any) -> Tensor:
    y = f(x @ weight.t())
    return 2 * F.cross_entropy(y, target, reduction="sum") + 0.1 * y.logsumexp(1).square().sum()


def _plain_statistics(x: Tensor, target: Tensor, weight: Tensor, f: Any) -> Tensor:
    log_p = F.log_softmax(f(x @ weight.t()), 1)
    return log_p.gather(1, target[:, None]).sum() - (log_p.exp() * log_p).sum()


def _statistics(x: Tensor, target: Tensor, weight: Tensor, f: Any, backend: Any) -> Tensor:
    found = ms.linear_token_statistics(x, weight, target, f, backend=backend)
    return found.log_prob.sum() + found.entropy.sum()


COLUMNS = {
    "cross_entropy": Column(
        CLASSES,
        lambda x, target, _, f, backend: ms.cross_entropy(x, target, f, reduction="sum", backend=backend),
        lambda x, target, _, f: of_logits(x, target, f),
    ),
    "log_softmax": Column(
        CLASSES,
        lambda x, _, __, f, backend: (ms.log_softmax(x, f, backend=backend)[:, :2] ** 2).sum(),
        lambda x, _, __, f: (F.log_softmax(f(x), 1)[:, :2] ** 2).sum(),
    ),
    "linear_cross_entropy": Column(
        FEATURES,
        lambda x, t, w, f, backend: ms.linear_cross_entropy(x, w, t, f, reduction="none", backend=backend).sum(),
        lambda x, target, weight, f: of_logits(x @ weight.t(), target, f),
    ),
    "MonotonicSoftmax": Column(FEATURES, _layer, _plain_layer),
    "linear_token_statistics": Column(FEATURES, _statistics, _plain_statistics, differentiable=False),
}


class Case:
    """A column on a backend, with the numbers that it is called on."""

    def __init__(self, column: Column, backend: str, transform: str = "gss") -> None:
        generator = torch.Generator().manual_seed(0)
        self.column, self.backend, self.f = column, backend, disturbed(transform).requires_grad_(False)
        self.x = torch.randn(ROWS, column.width, generator=generator)
        self.weight = torch.randn(CLASSES, FEATURES, generator=generator)
        self.target = torch.tensor([0, 6, 3])
        self._wide = disturbed(transform).double().requires_grad_(False)

    def __call__(self, x: Tensor, target: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        target, weight = self.target if target is None else target, self.weight if weight is None else weight
        return self.column.call(x, target, weight, self.f, self.backend)

    def plain(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        """In float64, of x in float64."""
        return self.column.plain(x, self.target if target is None else target, self.weight.double(), self._wide)

    def leaf(self) -> Tensor:
        return self.x.clone().requires_grad_()

    @property
    def wide(self) -> Tensor:
        return self.x.double()

    def with_gradient(self, x: Tensor) -> tuple[Tensor, ...]:
        """What traces are made of: the value and its gradient, where there is one."""
        value = self(x)
        return (value, *torch.autograd.grad(value, x)) if self.column.differentiable else (value,)


def same(got: Any, wanted: Any) -> None:
    assert got.shape == wanted.shape
    torch.testing.assert_close(got.double(), wanted.double(), rtol=1e-4, atol=1e-5)


def fake(case: Case, others_too: bool = True) -> None:
    """Fake tensors, alone or with real ones that a closure holds."""
    with FakeTensorMode(allow_non_fake_inputs=not others_too) as mode:
        if others_too:
            case.x, case.weight, case.target = (mode.from_tensor(e) for e in (case.x, case.weight, case.target))
            case.f = disturbed("gss").requires_grad_(False)
        results = case.with_gradient(mode.from_tensor(case.x).requires_grad_() if not others_too else case.leaf())
    assert [each.shape for each in results] == [(), case.x.shape][: len(results)]
    assert all(each.dtype == torch.float32 for each in results)


def meta(case: Case) -> None:
    case.x, case.weight, case.target, case.f = (each.to("meta") for each in (case.x, case.weight, case.target, case.f))
    results = case.with_gradient(case.leaf())
    assert [(each.shape, each.device.type) for each in results] == [((), "meta"), (case.x.shape, "meta")][
        : len(results)
    ]


def default_device(case: Case) -> None:
    with torch.device("meta"):
        results = case.with_gradient(case.leaf())
    compare(case, results)


def compare(case: Case, results: Any, x: Tensor | None = None) -> None:
    """The value, and the gradient if there is one."""
    wide = (case.wide if x is None else x.double()).clone().requires_grad_()
    wanted = case.plain(wide)
    same(results[0], wanted)
    if case.column.differentiable:
        same(results[1], *torch.autograd.grad(wanted, wide))


def traced(mode: str) -> Callable[[Case], None]:
    def hand(case: Case) -> None:
        graph = make_fx(lambda x: case.with_gradient(x), tracing_mode=mode, _allow_non_fake_inputs=True)(case.leaf())
        other = (2 * case.x).requires_grad_()
        compare(case, graph(other), other.detach())

    return hand


def exported(strict: bool) -> Callable[[Case], None]:
    class Program(nn.Module):
        def __init__(self, case: Case) -> None:
            super().__init__()
            self.f, self.case = case.f, case

        def forward(self, x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
            return self.case.column.call(x, target, weight, self.f, self.case.backend)

    def hand(case: Case) -> None:
        rows = torch.export.Dim("rows", min=2, max=100)
        program = torch.export.export(
            Program(case), (case.x, case.target, case.weight), strict=strict,
            dynamic_shapes={"x": {0: rows}, "target": {0: rows}, "weight": None},
        ).module()  # fmt: skip
        x, target = torch.cat([case.x, -case.x]), torch.cat([case.target, case.target])
        same(program(x, target, case.weight), case.plain(x.double(), target))

    return hand


def compiled(case: Case) -> None:
    torch._dynamo.reset()
    function = torch.compile(case, fullgraph=True, backend="aot_eager", dynamic=True)
    leaf = case.leaf()
    value = function(leaf)
    compare(case, (value, *torch.autograd.grad(value, leaf)) if case.column.differentiable else (value,))


def compiled_backward(case: Case) -> None:
    torch._dynamo.reset()
    leaf = case.leaf()
    value = case(leaf)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        value.backward()
    compare(case, (value, leaf.grad))


def derivative(transform: Callable[[Callable[..., Tensor]], Callable[[Tensor], Any]]) -> Callable[[Case], None]:
    """A transform of functions that gives all derivatives of one order."""

    def hand(case: Case) -> None:
        same(transform(case)(case.x), transform(case.plain)(case.wide))

    return hand


def forward_mode(case: Case) -> None:
    tangent = torch.ones_like(case.x)
    _, got = jvp(case, (case.x,), (tangent,))
    same(got, (grad(case.plain)(case.wide) * tangent.double()).sum())


def rows_alone(case: Case) -> None:
    """vmap(grad) over rows and their targets together."""
    got = vmap(grad(lambda x, target: case(x[None], target[None])))(case.x, case.target)
    same(got, grad(case.plain)(case.wide))


def many(case: Case) -> None:
    """vmap over rows and their targets together."""
    got = vmap(lambda x, target: case(x[None], target[None]))(case.x, case.target)
    same(got.sum(), case.plain(case.wide))


def batched_upstream(case: Case) -> None:
    leaf, upstream = case.leaf(), torch.tensor([1.0, -2.0])
    (got,) = torch.autograd.grad(case(leaf), leaf, upstream, is_grads_batched=True)
    same(got, upstream[:, None, None].double() * grad(case.plain)(case.wide))


def twice(case: Case) -> None:
    """Double backward."""

    def derived(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(function(x), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    same(derived(case, case.leaf()), derived(case.plain, case.wide.requires_grad_()))


#: The hands, and whether they ask for derivatives.
HANDS: dict[str, tuple[Callable[[Case], None], bool]] = {
    "FakeTensorMode": (fake, False),
    "FakeTensorMode, real tensors in a closure": (lambda case: fake(case, others_too=False), False),
    "meta": (meta, False),
    "CPU tensors where the default device is meta": (default_device, False),
    "make_fx, real": (traced("real"), False),
    "make_fx, fake": (traced("fake"), False),
    "make_fx, symbolic": (traced("symbolic"), False),
    "export": (exported(strict=False), False),
    "export, strict": (exported(strict=True), False),
    "compile": (compiled, False),
    "compiled autograd": (compiled_backward, True),
    "func.grad": (derivative(grad), True),
    "jacrev": (derivative(jacrev), True),
    "vmap": (many, False),
    "vmap(grad)": (rows_alone, True),
    "is_grads_batched": (batched_upstream, True),
    "jvp": (forward_mode, True),
    "jacfwd": (derivative(jacfwd), True),
    "hessian": (derivative(hessian), True),
    "double backward": (twice, True),
}


def cell(hand: Callable[[Case], None], column: Column, backend: str) -> str:
    # What the reference refuses would have nowhere to go.
    refusals = () if backend == "reference" else (NotImplementedError, RuntimeError, ValueError)
    return outcome(
        lambda: hand(Case(column, backend)),
        *refusals,
        saying='use backend="reference"|it takes C.* tensors, input is on',
    )


@pytest.mark.slow
def test_table() -> None:
    cells: dict[str, dict[str, str]] = {name: {} for name in HANDS}
    for backend in BACKENDS:
        with on(backend):
            for name, column in COLUMNS.items():
                for row, (hand, derives) in HANDS.items():
                    if derives and not column.differentiable:
                        continue
                    try:
                        cells[row][f"{name} {backend}"] = cell(hand, column, backend)
                    except Exception as error:
                        raise AssertionError(f"{row}, {name} on {backend}") from error
    check_table("Shapes without data", cells)
