"""What the tests of the losses share: transforms away from their starting point, and a loss with all its gradients.

:class:`LossCase` is one call of ``ms.cross_entropy``, which :func:`check_case` holds against the reference in float64:
the same code proves every backend on every device (``tests/unit/test_cross_entropy.py``, ``tests/gpu``).
"""

from __future__ import annotations

import copy
import itertools
import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from tiers import mostly_slow
from torch import Tensor

import monosoftmax as ms

TRANSFORMS = list(ms.transforms.REGISTRY)
#: Without coefficients, with a few, and with a table of them: for what is the same code for every function.
SOME_TRANSFORMS = ("identity", "gss", "plif")
#: Of torch.compile, and whether its results are those of eager code to the bit. Inductor takes long the first time.
COMPILERS = mostly_slow([("aot_eager", True), ("inductor", False)], [("aot_eager", True)])
_LEARNED = ("gss", "soft_cap", "sigmoid_cap")


def disturbed(name: str, seed: int = 0, scale: float = 0.3, **settings: Any) -> ms.transforms.MonotonicTransform:
    """The transform ``name`` with learned constants, its raw parameters moved by normal noise."""
    if name in _LEARNED:
        settings["learnable"] = True
    transform = ms.transforms.make(name, **settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in transform.parameters():
            # The same numbers on every device, whatever torch's default is.
            noise = torch.randn(parameter.shape, generator=generator, device="cpu", dtype=torch.float32)
            parameter += scale * noise.to(parameter)
    return transform


def loss_and_gradients(
    input: Tensor,
    target: Tensor,
    transform: ms.transforms.MonotonicTransform | None,
    backend: Any,
    dtype: torch.dtype | None = None,
    upstream: tuple[Tensor, ...] = (),
    **options: Any,
) -> dict[str, Tensor]:
    """Loss, lse if asked for, and their gradients for every parameter, all under the ``upstream`` gradients (or 1)."""
    transform = copy.deepcopy(transform)
    if dtype is not None:
        input = input.to(dtype)
        upstream = tuple(each.to(dtype) for each in upstream)
        options = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in options.items()}
        if transform is not None:
            transform = transform.to(dtype)
    input = input.detach().requires_grad_()
    parameters = {} if transform is None else dict(transform.named_parameters())
    result = ms.cross_entropy(input, target, transform, backend=backend, **options)
    outputs = result if isinstance(result, tuple) else (result,)
    gradients = torch.autograd.grad(
        outputs,
        [input, *parameters.values()],
        list(upstream) or [torch.ones_like(output) for output in outputs],
    )
    named = dict(zip(["loss", "lse"], (output.detach() for output in outputs), strict=False))
    return named | dict(zip(["input", *parameters], gradients, strict=True))


def head_loss_and_gradients(
    head: Mapping[str, Tensor | None],
    target: Tensor,
    transform: ms.transforms.MonotonicTransform | None,
    backend: Any,
    dtype: torch.dtype | None = None,
    upstream: tuple[Tensor, ...] = (),
    **options: Any,
) -> dict[str, Tensor]:
    """:func:`loss_and_gradients` of linear_cross_entropy, for ``head``: its input, linear_weight and linear_bias."""
    transform = copy.deepcopy(transform)
    if dtype is not None:
        head = {name: each if each is None else each.to(dtype) for name, each in head.items()}
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        upstream = tuple(each.to(wide) for each in upstream)
        options = {k: v.to(wide) if isinstance(v, Tensor) else v for k, v in options.items()}
        if transform is not None:
            transform = transform.to(wide)
    leaves = {name: each if each is None else each.detach().clone().requires_grad_() for name, each in head.items()}
    parameters = {} if transform is None else dict(transform.named_parameters())
    result = ms.linear_cross_entropy(
        leaves["input"], leaves["linear_weight"], target, transform, linear_bias=leaves.get("linear_bias"),
        backend=backend, **options,
    )  # fmt: skip
    outputs = result if isinstance(result, tuple) else (result,)
    named = {name: leaf for name, leaf in (*leaves.items(), *parameters.items()) if leaf is not None}
    gradients = torch.autograd.grad(
        outputs, list(named.values()), list(upstream) or [torch.ones_like(output) for output in outputs]
    )
    return dict(zip(["loss", "lse"], (output.detach() for output in outputs), strict=False)) | dict(
        zip(named, gradients, strict=True)
    )


def distance(result: Tensor, truth: Tensor) -> float:
    """Euclidean, in float64."""
    return (result.double() - truth.double()).norm().item()


class ErrorsBesideThoseOfPyTorch:
    """Relative errors of a backend, and of the reference in float32, over draws of what they compute."""

    def __init__(self) -> None:
        self._errors: dict[str, list[tuple[float, float]]] = {}

    def add(self, fused: Mapping[str, Tensor], plain: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> None:
        """One draw. Where the truth is 0, ``fused`` must be that to 1e-7."""
        for key, value in truth.items():
            norm = value.norm().item()
            if norm == 0:
                assert distance(fused[key], value) <= 1e-7, key
            else:
                row = (distance(fused[key], value) / norm, distance(plain[key], value) / norm)
                self._errors.setdefault(key, []).append(row)

    def check(self) -> None:
        """At most twice the error of the reference, plus 1e-7.

        For losses and input gradients over all draws together. For the gradients of parameters in the median draw: they
        are sums that cancel, so that the error of one of them is a draw of luck.
        """
        for key, rows in self._errors.items():
            together = key in ("loss", "input")
            of_fused, of_plain = (
                math.sqrt(statistics.fmean(x * x for x in column)) if together else statistics.median(column)
                for column in zip(*rows, strict=True)
            )
            assert of_fused <= 2 * of_plain + 1e-7, (key, of_fused, of_plain)


def assert_as_close_as_pytorch(
    got: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    dtype: torch.dtype,
    terms: int = 1,
) -> None:
    """No further from the float64 truth than 3 times what PyTorch is in float32, plus rounding.

    Args:
        dtype: of the logits, to which their gradient is rounded.
        terms: rows whose losses are added up without being averaged.
    """
    for key, wanted in truth.items():
        norm = wanted.norm().item()
        slack = 4e-7 * norm + 1e-7
        if key == "input" and dtype != torch.float32:
            slack += torch.finfo(dtype).eps * norm
        if key not in ("loss", "lse", "input"):
            # A sum that cancels: the error of plain PyTorch may be small by luck.
            slack += 6e-6 * terms + 2e-6 * norm
        assert got[key].isfinite().all(), key
        error, beside = distance(got[key], wanted), distance(plain[key], wanted)
        assert error <= 3 * beside + slack, f"{key} is off by {error:.2e}, PyTorch by {beside:.2e}, norm {norm:.2e}"


DTYPES = [torch.float32, torch.bfloat16, torch.float16]

#: Options of a loss, by name. A weight, and upstream gradients of loss and lse, are drawn where they are True.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1, "z_loss": 1e-3},
    "weighted": {"weight": True, "reduction": "sum"},
    "weighted, smoothed": {"weight": True, "label_smoothing": 0.2},
    "rows": {"reduction": "none", "return_lse": True, "upstream": True},
    "scaled": {"upstream": 0.3},
}

#: Rows, classes, and columns that the rows lie between, which hold NaN: of any alignment.
SHAPES = [
    (5, 1, 0, 0), (6, 7, 3, 2), (9, 33, 0, 7), (33, 1023, 1, 4), (40, 4096, 0, 0), (37, 32000, 0, 0),
    (21, 50257, 5, 11), (300, 50304, 0, 0), (150, 128256, 0, 0), (70, 151936, 0, 8), (8, 262144, 0, 0),
]  # fmt: skip


class LossCase(NamedTuple):
    """A call of ``ms.cross_entropy``: what it is given, and how its logits lie in memory."""

    transform: str
    settings: Mapping[str, Any]
    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    options: str
    seed: int = 0

    def __str__(self) -> str:
        rows, classes, before, after = self.shape
        settings = "".join(f" {name}={value}" for name, value in self.settings.items())
        return f"{self.transform}{settings} {rows}x{before}+{classes}+{after} {str(self.dtype)[6:]} {self.options}"

    def small(self) -> LossCase:
        """The same for emulators: few rows, of as many classes as straddle a tile and an alignment in the same way."""
        rows, classes, before, after = self.shape
        few = classes if classes <= 300 else 520 + classes % 8
        return self._replace(shape=(min(rows, 4), few, before, after))

    def logits_and_target(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Rows with an ignored one, p next to 1, large negative logits and, unless labels are smoothed, -inf."""
        rows, classes, before, after = self.shape
        generator = torch.Generator().manual_seed(self.seed)
        # As drawn on the host, the same numbers everywhere; what would take long there is drawn on the device.
        where = device if rows * classes > 1 << 22 else "cpu"
        drawn = torch.Generator(where).manual_seed(self.seed)
        values = torch.randn(rows, classes, generator=drawn, device=where) * (3.0, 0.1, 20.0)[self.seed % 3]
        padded = torch.full((rows, before + classes + after), torch.nan, dtype=self.dtype, device=device)
        padded[:, before : before + classes] = values.to(device)
        input = padded[:, before : before + classes]
        target = torch.randint(classes, (rows,), generator=generator, device="cpu")
        if rows > 1:
            target[0] = -100
        if rows > 2:
            input[1, target[1]] += 25.0
            input[2] -= 30.0
        # With smoothed labels the loss of a masked row is infinite, whoever computes it.
        if rows > 3 and classes > 40 and "label_smoothing" not in OPTIONS[self.options]:
            input[3, ::3] = -torch.inf
            target[3] = 1
        return input, target.to(device)

    def arguments(self, device: torch.device | str) -> dict[str, Any]:
        """What :func:`loss_and_gradients` takes."""
        input, target = self.logits_and_target(device)
        generator = torch.Generator().manual_seed(self.seed + 1)

        def positive(count: int) -> Tensor:
            return (torch.rand(count, generator=generator, device="cpu") + 0.1).to(device)

        options = dict(OPTIONS[self.options])
        if options.get("weight"):
            options["weight"] = positive(self.shape[1])
        upstream = options.pop("upstream", None)
        if upstream is True:
            options["upstream"] = (positive(self.shape[0]), positive(self.shape[0]))
        elif upstream is not None:
            options["upstream"] = (torch.tensor(upstream, device=device),)
        transform = disturbed(self.transform, self.seed, **self.settings).to(device)
        return {"input": input, "target": target, "transform": transform, **options}


def loss_cases() -> list[LossCase]:
    """Every transform with every shape; types and options so that each pair of them, and with each shape, occurs."""
    cases = [
        LossCase(name, {}, shape, DTYPES[(i + j) % 3], list(OPTIONS)[(i + 2 * j + j // 3) % len(OPTIONS)], (i + j) % 3)
        for (i, name), (j, shape) in itertools.product(enumerate(TRANSFORMS), enumerate(SHAPES))
    ]
    more: list[tuple[str, dict[str, Any]]] = [
        *(("plif", {"num_pieces": pieces, "bound": 12.0}) for pieces in (4, 64, 256, 1000, 5000)),
        ("spline", {"num_bins": 64}),
        ("spline", {"num_bins": 3000}),
        ("monotonic_mlp", {"num_units": 21}),
    ]
    options = ("plain", "smoothed", "weighted, smoothed")
    for i, (name, settings) in enumerate(more):
        for j, shape in enumerate((SHAPES[7], SHAPES[6])):
            cases.append(LossCase(name, settings, shape, DTYPES[(i + j) % 3], options[(i + j) % 3], (i + j) % 3))
    return cases


def check_case(
    case: LossCase, backend: Any, device: torch.device | str, before: Callable[[], None] = lambda: None
) -> None:
    """The backend is as close to the truth as PyTorch, and the same twice where it promises that.

    ``before`` is called before each call of the backend.
    """
    arguments = case.arguments(device)
    truth = loss_and_gradients(backend="reference", dtype=torch.float64, **arguments)
    plain = loss_and_gradients(backend="reference", **arguments | {"input": arguments["input"].float()})
    before()
    got = loss_and_gradients(backend=backend, **arguments)
    summed = OPTIONS[case.options].get("reduction") in ("sum", "none")
    assert_as_close_as_pytorch(got, plain, truth, case.dtype, case.shape[0] if summed else 1)
    how = ms.backends.explain("cross_entropy", arguments["input"], arguments["transform"], backend=backend).how
    if "in an order that changes" not in how:
        before()
        again = loss_and_gradients(backend=backend, **arguments)
        for key, value in got.items():
            assert torch.equal(value, again[key]), f"{key} is not the same twice"


def check_log_prob(
    logits: Tensor, target: Tensor, transform: ms.transforms.MonotonicTransform, outputs: tuple[Any, ...], backend: Any
) -> None:
    """``ms.log_prob`` and its gradients, each token with a factor of its own, against the reference in float64."""
    factors = torch.randn(len(outputs), len(target), generator=torch.Generator().manual_seed(1)).to(logits.device)

    def results(dtype: torch.dtype, of: Any) -> list[Tensor]:
        leaf = logits.detach().to(dtype).requires_grad_()
        f = copy.deepcopy(transform).to(dtype)
        found = ms.log_prob(leaf, target, f, outputs=outputs, backend=of)
        each = [getattr(found, name) for name in outputs]
        total = torch.stack([(a * b).sum() for a, b in zip(each, factors, strict=True)]).sum()
        return [*each, *torch.autograd.grad(total, [leaf, *f.parameters()])]

    for got, true in zip(results(logits.dtype, backend), results(torch.float64, "reference"), strict=True):
        eps = max(torch.finfo(got.dtype).eps, 1e-6)
        torch.testing.assert_close(got.double(), true, rtol=3 * eps, atol=10 * eps * max(1.0, true.abs().max().item()))
