"""What tests of monosoftmax.distributed call: on one rank with its classes, and on one process with all of them.

A case is a few words and numbers, from which every process makes the same tensors. :func:`wrong` says where what the
ranks found is not what one process finds.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from hands import on
from losses import disturbed
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.func import functional_call

import monosoftmax as ms

T = ms.transforms

#: Options of a loss by name. What is True is drawn: the weights of classes, and the gradients of loss and lse.
OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum", "upstream": True},
    "rows": {"reduction": "none", "upstream": True},
    "rows, lse": {"reduction": "none", "return_lse": True, "upstream": True},
    "mean, lse": {"return_lse": True, "upstream": True},
    "ignored": {"ignore_index": 3},
    "smoothed": {"label_smoothing": 0.1},
    "smoothed whole": {"label_smoothing": 1.0, "reduction": "none", "upstream": True},
    "weighted": {"weight": True},
    "weighted sum": {"weight": True, "reduction": "sum"},
    "weighted, smoothed": {"weight": True, "label_smoothing": 0.2},
    "weighted, smoothed rows, lse": {
        "weight": True, "label_smoothing": 0.2, "reduction": "none", "return_lse": True, "upstream": True,
    },
    "z_loss": {"z_loss": 0.01},
    "z_loss by rows": {"weight": True, "z_loss": 0.01, "z_loss_divisor": "rows"},
    "temperature": {"temperature": 0.7},
    "temperature, tensor": {"temperature": "tensor", "label_smoothing": 0.1},
    "all": {
        "weight": True, "label_smoothing": 0.1, "z_loss": 0.01, "z_loss_divisor": "rows", "temperature": 1.3,
        "ignore_index": 3, "return_lse": True, "upstream": True,
    },
}  # fmt: skip

_COMPOSED = {
    "chain": lambda: T.Chain(T.Scale(0.8), T.SoftCap(6.0), disturbed("plif", num_pieces=20), T.Scale(1.1)),
    "chain of two": lambda: T.Chain(disturbed("gss"), disturbed("spline", 1, num_bins=6)),
}
#: Names for :func:`transform_of`, and those of them that only the reference backend takes.
TRANSFORMS = [*T.REGISTRY, "chain", "chain of two"]
UNFUSED = ("chain of two",)


def transform_of(name: str, seed: int = 0) -> T.MonotonicTransform:
    """The transform ``name``, its parameters away from where they start; "plif, as it starts" has those."""
    name, _, start = name.partition(", ")
    if name in _COMPOSED:
        return _COMPOSED[name]()
    return T.make(name) if start else disturbed(name, seed)


class Case(NamedTuple):
    """A call of a head, or of given logits where ``features`` is 0."""

    transform: str = "plif"
    options: str = "mean"
    #: The number of classes of each rank.
    shards: tuple[int, ...] = (9, 8)
    rows: int = 13
    features: int = 6
    dtype: torch.dtype = torch.float32
    bias: bool = True
    chunk_rows: int | None = None
    grad_in_forward: bool | None = None
    reduce_grad_input: bool = True
    backend: Any = "cpu"
    #: Groups of ranks with other tokens: each has the rows in equal parts.
    token_ranks: int = 1
    seed: int = 0
    #: What becomes of the logits of the first rows, one word for each, such as "-inf of one" rank: see :func:`_spoil`.
    trouble: tuple[str, ...] = ()
    #: Dimensions behind the classes, for logits.
    more: tuple[int, ...] = ()
    #: "rows"; "one", a single row without a dimension for it; "batch", rows as two dimensions; "uint8" targets.
    form: str = "rows"
    #: Operands without gradients: of "input", "weight", "bias" and "f".
    frozen: tuple[str, ...] = ()
    autocast: bool = False
    #: Whether logits are whole numbers, many of them equal.
    whole_numbers: bool = False

    @property
    def classes(self) -> int:
        return sum(self.shards)

    @property
    def starts(self) -> list[int]:
        return [0, *itertools.accumulate(self.shards)][:-1]

    def __str__(self) -> str:
        differing = [
            f"{name}={str(value).removeprefix('torch.')}"
            for name, value in self._asdict().items()
            if value != self._field_defaults[name]
        ]
        return ", ".join(differing) or "default"


class Given(NamedTuple):
    """The arguments of a case, whole."""

    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    target: Tensor
    transform: T.MonotonicTransform
    options: dict[str, Any]
    #: The gradients of loss and lse.
    upstream: tuple[Tensor, ...]

    def to(self, dtype: torch.dtype) -> Given:
        """All floating numbers as ``dtype``, which has their values."""
        options = {name: each.to(dtype) if isinstance(each, Tensor) else each for name, each in self.options.items()}
        tensors = [None if each is None else each.to(dtype) for each in self[:3]]
        upstream = tuple(each.to(dtype) for each in self.upstream)
        return Given(*tensors, self.target, self.transform.to(dtype), options, upstream)  # type: ignore[arg-type]


def given(case: Case) -> Given:
    """Rows with an ignored target, and with one whose p is next to 1."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator)
        return drawn.round() if case.whole_numbers else drawn

    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    rows, classes, few = case.rows, case.classes, case.classes // 2
    target = torch.randint(classes, (rows, *case.more), generator=generator)
    options = dict(OPTIONS[case.options])
    if rows > 2:
        target[1] = options.get("ignore_index", -100)
    weight = bias = None
    if case.features == 0:
        input = 3 * normal(rows, classes, *case.more)
    else:
        input, weight = normal(rows, case.features), normal(classes, case.features)
        bias = normal(classes) if case.bias else None
    if rows > 4 and not case.whole_numbers:
        target[3] = few
        if weight is None:
            input[3] -= 30 * (torch.arange(classes) != few).view(-1, *[1] * len(case.more))
        else:
            input[3] = 8 * weight[few] / weight[few].norm()
    _spoil(case, input)
    if case.form == "one":
        input, target = input[0], target[0]
    elif case.form == "batch":
        input, target = input.unflatten(0, (-1, 2)), target.unflatten(0, (-1, 2))
    elif case.form == "uint8":
        target = target.clamp(min=0).to(torch.uint8)
    if options.get("weight"):
        options["weight"] = torch.rand(classes, generator=generator).add_(0.1).to(wide)
    if options.get("temperature") == "tensor":
        options["temperature"] = torch.tensor(0.8, dtype=wide)
    shapes = [target.shape if options.get("reduction") == "none" else (), target.shape]
    drawn = [torch.rand(each, generator=generator).add_(0.2).to(wide) for each in shapes]
    if not options.pop("upstream", False):
        drawn = [torch.ones_like(each) for each in drawn]
    upstream = tuple(drawn) if options.get("return_lse") else (drawn[0],)
    f = transform_of(case.transform, case.seed).to(wide).requires_grad_("f" not in case.frozen)
    tensors = [None if each is None else each.to(case.dtype) for each in (input, weight, bias)]
    return Given(*tensors, target, f, options, upstream)  # type: ignore[arg-type]


def _spoil(case: Case, input: Tensor) -> None:
    """Puts a number such as -inf into the logits of "all" classes, of those of "one" rank, or of "some" classes; for a
    head into its input.
    """
    for row, trouble in enumerate(case.trouble[: case.rows]):
        number, _, where = trouble.partition(" of ")
        rank, first, last = row % len(case.shards), 0, None
        if where == "one":
            first, last = case.starts[rank], case.starts[rank] + case.shards[rank]
        elif where == "some":
            first = case.classes // 3
        if where:
            input[row, first:last] = float(number)


# --- the calls --------------------------------------------------------------------------------------------------------


def with_gradients(
    outputs: Sequence[Tensor], upstream: Sequence[Tensor], leaves: Mapping[str, Tensor | None]
) -> dict[str, Tensor]:
    """The gradients of the leaves that need them, by name."""
    named = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
    if not named:
        return {}
    gradients = torch.autograd.grad(list(outputs), list(named.values()), list(upstream), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(named.items(), gradients, strict=True)
    }


def parameters_of(transform: T.MonotonicTransform) -> dict[str, Tensor]:
    return {f"f.{name}": each for name, each in transform.named_parameters()}


def _results(found: Any, upstream: Sequence[Tensor], leaves: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    outputs = found if isinstance(found, tuple) else (found,)
    named = dict(zip(("loss", "lse"), (each.detach() for each in outputs), strict=False))
    return named | with_gradients(outputs, upstream, leaves)


def leaf(case: Case, name: str, tensor: Tensor | None) -> Tensor | None:
    """``tensor`` as an operand called ``name``."""
    return None if tensor is None else tensor.detach().clone().requires_grad_(name not in case.frozen)


def _autocast(case: Case) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if case.autocast else nullcontext()


def alone(case: Case, backend: Any = "reference", dtype: torch.dtype | None = torch.float64) -> dict[str, Tensor]:
    """Loss and gradients of one process with all classes and tokens: by default the truth."""
    whole = given(case) if dtype is None else given(case).to(dtype)
    leaves = {name: leaf(case, name, getattr(whole, name)) for name in ("input", "weight", "bias")}
    f = parameters_of(whole.transform)
    with on(backend), _autocast(case):
        if case.features == 0:
            found: Any = ms.cross_entropy(
                leaves["input"], whole.target, whole.transform, backend=backend, **whole.options
            )
        else:
            ways: Any = {} if backend == "reference" else {"chunk_rows": case.chunk_rows}
            found = ms.linear_cross_entropy(
                leaves["input"], leaves["weight"], whole.target, whole.transform, linear_bias=leaves["bias"],
                backend=backend, **ways, **whole.options,
            )  # fmt: skip
    with on(backend):
        return _results(found, whole.upstream, leaves | f)


@functools.cache
def mesh(token_ranks: int) -> Any:
    """The ranks as tokens x classes."""
    shape = (token_ranks, dist.get_world_size() // token_ranks)
    return init_device_mesh("cpu", shape, mesh_dim_names=("tokens", "classes"))


class Place(NamedTuple):
    """What of a case a rank has."""

    start: int
    classes: slice
    tokens: slice
    groups: dict[str, Any]


def place_of(case: Case) -> Place:
    """Of the calling rank."""
    rank, tokens, groups = dist.get_rank(), slice(None), {}
    if case.token_ranks > 1:
        of_classes, of_tokens = (mesh(case.token_ranks)[name] for name in ("classes", "tokens"))
        rank, part, size = of_classes.get_local_rank(), of_tokens.get_local_rank(), case.rows // case.token_ranks
        tokens = slice(part * size, case.rows if part == case.token_ranks - 1 else (part + 1) * size)
        groups = {"group": of_classes, "token_group": of_tokens}
    start = case.starts[rank]
    return Place(start, slice(start, start + case.shards[rank]), tokens, groups)


class Prepared(NamedTuple):
    """A call of a rank: ``forward()`` gives loss and lse, whose gradients are ``upstream``."""

    forward: Callable[[], tuple[Tensor, ...]]
    upstream: list[Tensor]
    leaves: dict[str, Tensor | None]


def prepared(case: Case, **changes: Any) -> Prepared:
    """On a rank: the call for its classes and tokens. ``changes`` are to the arguments, by their names."""
    whole, (start, mine, tokens, groups) = given(case), place_of(case)
    upstream = [each if each.dim() == 0 else each[tokens] for each in whole.upstream]
    target = whole.target[tokens] if case.token_ranks > 1 else whole.target
    options: dict[str, Any] = dict(
        target=target, transform=whole.transform, vocab_start=start, backend=case.backend, **groups, **whole.options
    )
    if case.features == 0:
        local = whole.input[mine] if case.form == "one" else whole.input[tokens][:, mine]
        leaves = {"input": leaf(case, "input", local)}
        function: Any = ms.distributed.cross_entropy
        options |= {"local_input": leaves["input"]}
    else:
        assert whole.weight is not None
        leaves = {
            "input": leaf(case, "input", whole.input[tokens]),
            "weight": leaf(case, "weight", whole.weight[mine]),
            "bias": None if whole.bias is None else leaf(case, "bias", whole.bias[mine]),
        }
        function = ms.distributed.linear_cross_entropy
        options |= dict(
            input=leaves["input"], local_weight=leaves["weight"], linear_bias=leaves["bias"],
            chunk_rows=case.chunk_rows, grad_in_forward=case.grad_in_forward,
            reduce_grad_input=case.reduce_grad_input,
        )  # fmt: skip
    options |= changes

    def forward() -> tuple[Tensor, ...]:
        with on(case.backend), _autocast(case):
            found = function(**options)
        return found if isinstance(found, tuple) else (found,)

    return Prepared(forward, upstream, leaves | parameters_of(options["transform"]))


def shared(case: Case) -> dict[str, Tensor]:
    """On a rank: loss and gradients of its classes and tokens."""
    call = prepared(case)
    outputs = call.forward()
    with on(case.backend):
        return _results(outputs, call.upstream, call.leaves)


def all_shared(cases: Sequence[Case]) -> list[dict[str, Tensor]]:
    """On a rank: :func:`shared` of many cases."""
    found = []
    for case in cases:
        try:
            found.append(shared(case))
        except Exception as error:
            raise AssertionError(f"{case}: {error}") from error
    return found


# --- comparison -------------------------------------------------------------------------------------------------------


def joined(case: Case, results: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What one process would have, of what the ranks have; AssertionError where ranks must have the same bits."""
    size, columns = len(case.shards), 0 if case.form == "one" else 1
    by_tokens = [results[first : first + size] for first in range(0, len(results), size)]
    found = {}
    for name in results[0]:
        parts = [[each[name] for each in ranks] for ranks in by_tokens]
        if name in ("weight", "bias"):
            found[name] = _sum([torch.cat(each) for each in parts])
        elif name == "input" and case.features == 0:
            found[name] = torch.cat([torch.cat(each, columns) for each in parts])
        elif name == "input" and not case.reduce_grad_input:
            found[name] = torch.cat([_sum(each) for each in parts])
        else:
            of_tokens = [the_same(each, name) for each in parts]
            if name == "loss" and of_tokens[0].dim() == 0:
                found[name] = the_same(of_tokens, name)
            elif name in ("loss", "lse", "input"):
                found[name] = torch.cat(of_tokens) if len(of_tokens) > 1 else of_tokens[0]
            else:
                found[name] = _sum(of_tokens)
    return found


def _sum(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([each.double() for each in parts]).sum(0) if len(parts) > 1 else parts[0]


def the_same(tensors: Sequence[Tensor], name: str) -> Tensor:
    """The first of ``tensors``, all of which must have the same bits."""
    first, *others = tensors
    for rank, each in enumerate(others, 1):
        same = first.shape == each.shape and torch.equal(first.isnan(), each.isnan())
        assert same and torch.equal(first.nan_to_num(), each.nan_to_num()), f"{name} of rank {rank} has other bits"
    return first


def grouped(results: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``results`` with the gradients of all parameters of f as one vector: one alone may be a sum that cancels."""
    of_f = [each.reshape(-1).double() for name, each in results.items() if name.startswith("f.")]
    others = {name: each for name, each in results.items() if not name.startswith("f.")}
    return others | ({"f": torch.cat(of_f)} if of_f else {})


def errors(got: Mapping[str, Tensor], truth: Mapping[str, Tensor], floor: float = 0.0) -> dict[str, float]:
    """How far each result is from the truth, relative to the norm of the truth; of f, all gradients together.

    A norm below ``floor`` counts as that.
    """
    got, truth, found = grouped(got), grouped(truth), {}
    assert got.keys() == truth.keys(), (got.keys(), truth.keys())
    for name, true in truth.items():
        assert got[name].shape == true.shape, (name, got[name].shape, true.shape)
        error = (got[name].double() - true.double()).norm().item()
        norm = max(true.double().norm().item(), floor)
        found[name] = error / norm if norm else error
    return found


def terms_of_f(case: Case) -> float:
    """The norm of the gradient of f if all of its terms had one sign: what their rounding is relative to."""
    whole = given(case).to(torch.float64)
    z = whole.input if whole.weight is None else torch.nn.functional.linear(*whole[:3])
    options, f, parameters = dict(whole.options), whole.transform, dict(whole.transform.named_parameters())
    tau = options.pop("temperature", 1.0)
    y = (f(z) / tau).detach().requires_grad_()
    found: Any = ms.cross_entropy(y, whole.target, backend="reference", **options)
    (dy,) = torch.autograd.grad(found, y, whole.upstream)
    jacobian = torch.func.jacfwd(lambda values: functional_call(f, values, (z,)) / tau)(parameters)
    terms = [torch.einsum("...,...p->p", dy.abs(), each.abs().flatten(dy.dim())) for each in jacobian.values()]
    return torch.cat(terms).norm().item()


def wrong(case: Case, results: Sequence[Mapping[str, Tensor]], bound: float = 1e-6, floor: float = 0.0) -> list[str]:
    """Where the results of the ranks are not those of one process, or have other bits than each other.

    The truth is the reference backend in float64. The relative error is at most ``bound`` in float32, or twice that of
    one process in float32. The gradient of f is a sum whose terms may cancel, and some terms are differences: where it
    misses the bound, ten times the bound is relative to the terms. In half precision, and where a row has no
    distribution, the ranks must find what one process finds.
    """
    try:
        got = joined(case, results)
        one = alone(case, case.backend, None)
        exact = case.dtype in (torch.float32, torch.float64) and not case.autocast
        if not (exact and all(each.isfinite().all() for each in one.values())):
            return [f"{case}: {each}" for each in _unlike(case, grouped(got), grouped(one), bound, floor)]
        truth = alone(case)
        most = bound if case.dtype == torch.float32 else 1e-7 * bound
        of_one, found = errors(one, truth, floor), errors(got, truth, floor)
        problems = []
        for name, error in found.items():
            if error <= max(most, 2 * of_one[name]):
                continue
            if name == "f":
                error *= grouped(truth)["f"].norm().item() / (10 * terms_of_f(case))
            if not error <= most:
                problems.append(f"{case}: {name} is off by {error:.1e}, that of one process by {of_one[name]:.1e}")
        return problems
    except AssertionError as error:
        return [f"{case}: {error}"]


def _unlike(case: Case, got: Mapping[str, Tensor], one: Mapping[str, Tensor], bound: float, floor: float) -> list[str]:
    """Which results differ by more than roundings to the type of the operands, or in what is not finite."""
    assert got.keys() == one.keys(), (got.keys(), one.keys())
    # Gradients of half precision are rounded once by each rank, and when they are added up.
    eps = torch.finfo(torch.bfloat16 if case.autocast else case.dtype).eps
    found = []
    for name, true in one.items():
        a, b = got[name].double(), true.double()
        if name == "lse":  # of a row without a distribution it is not finite, and backends differ in how
            a, b = (torch.where(each.isfinite(), each, torch.nan) for each in (a, b))
        if name == "f" and not (a.isfinite().all() or b.isfinite().all()):
            continue  # a row without a distribution poisons some of its gradients
        if a.shape != b.shape or not torch.equal(_kinds(a), _kinds(b)):
            found.append(f"{name} is {a}, of one process {b}")
            continue
        finite = b.isfinite()
        error, norm = (a[finite] - b[finite]).norm().item(), b[finite].norm().item()
        # Numbers next to 0 have fewer bits in float16.
        if error > max(4 * eps, bound) * max(norm, floor) + (1e-6 if case.dtype == torch.float16 else 0):
            found.append(f"{name} is off by {error:.1e} from that of one process, whose norm is {norm:.1e}")
    return found


def _kinds(values: Tensor) -> Tensor:
    return torch.where(values.isnan(), 2.0, torch.where(values.isinf(), values.sign(), 0.0))
