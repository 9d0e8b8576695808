"""What the losses do beside class indices and a mean: class probabilities in the head, inplace, z_loss_divisor and
return_statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from losses import SOME_TRANSFORMS, TRANSFORMS, disturbed, head_loss_and_gradients, loss_and_gradients
from tiers import mostly_slow
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import monosoftmax as ms
from monosoftmax import head_products

BACKENDS: list[Any] = ["reference", "cpu"]
N, D, V = 7, 5, 41
CHUNKS = 3
NAMES = mostly_slow(TRANSFORMS, SOME_TRANSFORMS)
#: Options of a loss. A weight is drawn where it is True.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum", "label_smoothing": 0.1},
    "rows": {"reduction": "none", "z_loss": 0.01},
    "weighted": {"weight": True, "label_smoothing": 0.2, "z_loss": 0.02, "temperature": 0.7},
}


@pytest.fixture(autouse=True)
def thin_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_products, "chunk_rows", lambda *_: 3)


def drawn(options: dict[str, Any], dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    return options | {"weight": torch.linspace(0.2, 1.5, V, dtype=dtype)} if "weight" in options else options


def batch(dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor | None], Tensor, Tensor]:
    """The operands of a head, class indices of which one is ignored, and class probabilities."""
    torch.manual_seed(0)
    shapes = {"input": (N, D), "linear_weight": (V, D), "linear_bias": (V,)}
    head: dict[str, Tensor | None] = {
        name: torch.randn(shape, dtype=torch.float64).to(dtype) for name, shape in shapes.items()
    }
    target = torch.randint(0, V, (N,))
    target[4] = -100
    return head, target, torch.rand(N, V, dtype=torch.float64).pow(4).to(dtype)


def logits_of(head: dict[str, Tensor | None]) -> Tensor:
    input, weight, bias = head.values()
    assert input is not None and weight is not None
    return F.linear(input, weight, bias).detach()


def products(call: Callable[[], Any]) -> int:
    """How many products of two matrices ``call`` computes."""
    with torch.profiler.profile() as profile:
        call()
    events = profile.events()
    assert events is not None
    return sum(event.name in ("aten::mm", "aten::addmm", "aten::addmm_") for event in events)


# Class probabilities in the head.


@pytest.mark.grid
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("return_lse", [False, True])
def test_probabilities_in_the_head(
    backend: Any, name: str, options: dict[str, Any], bias: bool, return_lse: bool
) -> None:
    """As those of the logits in full, by plain PyTorch, in float64 and over several chunks."""
    head, _, target = batch()
    head["linear_bias"] = head["linear_bias"] if bias else None
    transform, options = disturbed(name).double(), drawn(options) | {"return_lse": return_lse}
    rows = N if options.get("reduction") == "none" else ()
    upstream = (torch.rand(rows, dtype=torch.float64) + 0.5, torch.rand(N, dtype=torch.float64))[: 1 + return_lse]
    got = head_loss_and_gradients(head, target, transform, backend, upstream=upstream, **options)

    leaves = {name: each.clone().requires_grad_() for name, each in head.items() if each is not None}
    y = transform(F.linear(leaves["input"], leaves["linear_weight"], leaves.get("linear_bias")))
    y = y / options.get("temperature", 1.0)
    smoothing, weight = options.get("label_smoothing", 0.0), options.get("weight", torch.ones(V, dtype=torch.float64))
    q, lse = ((1 - smoothing) * target + smoothing / V) * weight, y.logsumexp(1)
    loss = (q * (lse.unsqueeze(1) - y)).sum(1) + options.get("z_loss", 0.0) * lse.square()
    reduction = options.get("reduction", "mean")
    loss = loss if reduction == "none" else loss.sum() / (N if reduction == "mean" else 1)
    wanted = {"loss": loss, "lse": lse} if return_lse else {"loss": loss}
    names = {**leaves, **dict(transform.named_parameters())}
    gradients = torch.autograd.grad(list(wanted.values()), list(names.values()), upstream)
    wanted |= dict(zip(names, gradients, strict=True))
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(got[key], value.detach(), rtol=1e-11, atol=1e-12, msg=key)


@pytest.mark.grid
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("grad_in_forward", [True, False, None])
def test_probabilities_in_the_head_in_every_type(
    dtype: torch.dtype, name: str, options: dict[str, Any], grad_in_forward: bool | None
) -> None:
    """Nothing is further from float64 than 4 times what plain PyTorch in this type is, or than some roundings."""
    if options.get("reduction") == "none":
        grad_in_forward = None  # there is no one gradient to compute ahead
    head, _, target = batch(dtype)
    transform, options = disturbed(name), drawn(options, torch.float32)
    given: dict[str, Any] = {} if options.get("reduction") != "none" else {"upstream": (torch.linspace(0.5, 1.5, N),)}
    wide = {key: None if each is None else each.double() for key, each in head.items()}
    truth = head_loss_and_gradients(wide, target.double(), transform, "reference", torch.float64, **options, **given)
    plain = head_loss_and_gradients(head, target, transform, "reference", **options, **given)
    got = head_loss_and_gradients(
        head, target, transform, "cpu", grad_in_forward=grad_in_forward, **options, **given
    )  # fmt: skip
    for key, value in truth.items():
        assert got[key].dtype == (dtype if key in head else torch.float32), key
        error, beside = ((each[key].double() - value).norm() for each in (got, plain))
        least = 2 * torch.finfo(dtype).eps * max(value.norm().item(), 1.0)
        assert error <= 4 * beside + least, (key, error.item(), beside.item())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("of_target", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_probabilities_of_every_dtype(backend: Any, of_target: torch.dtype) -> None:
    """They are what they are in the type of the arithmetic, bit for bit."""
    head, _, target = batch(torch.bfloat16)
    target = target.to(of_target)
    got, wanted = (head_loss_and_gradients(head, each, None, backend) for each in (target, target.float()))
    assert all(torch.equal(got[key], value) for key, value in wanted.items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_probabilities_of_any_layout(backend: Any) -> None:
    head, _, target = batch(torch.float32)
    views = {
        "transposed": target.t().contiguous().t(),
        "columns of more": torch.cat([target, target], 1)[:, :V],
        "every second column": target.repeat_interleave(2, 1)[:, ::2],
        "one row for all": target[:1].expand(N, -1),
    }
    for name, each in views.items():
        wanted = head_loss_and_gradients(head, each.contiguous(), None, backend)
        got = head_loss_and_gradients(head, each, None, backend)
        assert all(torch.equal(got[key], value) for key, value in wanted.items()), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (0,), (2, 0)])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_probabilities_for_any_leading_shape(backend: Any, leading: tuple[int, ...], reduction: Any) -> None:
    input, weight = torch.randn(*leading, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    target = torch.rand(*leading, V)
    loss, lse = ms.linear_cross_entropy(input, weight, target, reduction=reduction, return_lse=True, backend=backend)
    logits = F.linear(input, weight).reshape(-1, V)
    wanted = F.cross_entropy(logits, target.reshape(-1, V), reduction=reduction)
    torch.testing.assert_close(loss, wanted.reshape(leading) if reduction == "none" else wanted, equal_nan=True)
    torch.testing.assert_close(lse, logits.logsumexp(1).reshape(leading))
    loss.sum().backward()
    assert input.grad is not None and input.grad.shape == input.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_hot_probabilities_are_the_index(backend: Any) -> None:
    head, target, _ = batch()
    target[4] = 3
    options = drawn({"weight": True, "label_smoothing": 0.1, "z_loss": 0.01, "reduction": "sum"})
    wanted = head_loss_and_gradients(head, target, disturbed("plif").double(), backend, **options)
    got = head_loss_and_gradients(head, F.one_hot(target, V).double(), disturbed("plif").double(), backend, **options)
    for key, value in wanted.items():
        torch.testing.assert_close(got[key], value, rtol=1e-11, atol=1e-12, msg=key)


def test_float16_gradients_of_a_mean_over_many_rows() -> None:
    """Of 1/N of p, which is no number in float16, until the gradients of all chunks are added up."""
    torch.manual_seed(0)
    rows, classes = 4096, 64
    input = torch.randn(rows, 8).half()
    head: dict[str, Tensor | None] = {"input": input, "linear_weight": torch.randn(classes, 8).half()}
    target = torch.softmax(4 * torch.randn(rows, classes), 1)
    wide = {key: each.double() for key, each in head.items() if each is not None}
    options: dict[str, Any] = {"weight": torch.full((classes,), 1e-3), "chunk_rows": 512}
    got = head_loss_and_gradients(head, target, None, "cpu", **options)
    truth = head_loss_and_gradients(wide, target.double(), None, "cpu", torch.float64, **options)
    error = (got["linear_weight"].double() - truth["linear_weight"]).norm() / truth["linear_weight"].norm()
    assert error < 2e-3, error


def test_products_of_probabilities() -> None:
    """Three for each chunk where gradients are computed ahead, four where they are not, one without any."""
    head, _, target = batch()

    def train(**options: Any) -> None:
        head_loss_and_gradients({**head, "linear_bias": None}, target, None, "cpu", **options)

    assert products(train) == 3 * CHUNKS
    assert products(lambda: train(grad_in_forward=False)) == 4 * CHUNKS
    assert head["input"] is not None and head["linear_weight"] is not None
    input, weight = head["input"], head["linear_weight"]
    assert products(lambda: ms.linear_cross_entropy(input, weight, target, backend="cpu")) == CHUNKS


@pytest.mark.parametrize("backend", BACKENDS)
def test_share_of_a_class_without_probability(backend: Any) -> None:
    """A class whose logit is -inf adds nothing where it has no share of the target, and makes the loss +inf else."""
    head, _, target = batch()
    assert head["linear_bias"] is not None
    head["linear_bias"][3] = -torch.inf
    target[:, 3] = 0
    got = head_loss_and_gradients(head, target, None, backend)
    assert got["loss"].isfinite() and got["linear_weight"].isfinite().all() and (got["linear_bias"][3] == 0).all()
    target[2, 3] = 0.5
    assert head_loss_and_gradients(head, target, None, backend)["loss"] == torch.inf


def test_autocast() -> None:
    """The head is multiplied in bfloat16; probabilities stay what they are."""
    head, _, target = batch(torch.float32)
    half = {key: None if each is None else each.bfloat16() for key, each in head.items()}
    wanted = head_loss_and_gradients(half, target, None, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        got = head_loss_and_gradients(head, target, None, "cpu")
    assert torch.equal(got["loss"], wanted["loss"]) and got["linear_weight"].dtype == torch.float32
    torch.testing.assert_close(got["linear_weight"].bfloat16(), wanted["linear_weight"])


@pytest.mark.seconds
def test_probabilities_compiled() -> None:
    head, _, target = batch(torch.float32)
    transform, (input, weight, bias) = (
        disturbed("plif"),
        [each.requires_grad_() for each in head.values() if each is not None],
    )
    torch._dynamo.reset()

    def loss(x: Tensor, w: Tensor, b: Tensor, t: Tensor) -> Tensor:
        result: Tensor = ms.linear_cross_entropy(
            x, w, t, transform, linear_bias=b, label_smoothing=0.1, z_loss=0.01, backend="cpu"
        )
        return result

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = [input, weight, bias, *transform.parameters()]
    wanted, got = (
        torch.autograd.grad(each(input, weight, bias, target), leaves, torch.tensor(0.3)) for each in (loss, compiled)
    )
    assert all(map(torch.equal, got, wanted))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target": torch.rand(4, 8)}, ValueError, r"target must have shape \(4, 9\).*float32.*got \(4, 8\)"),
        ({"target": torch.rand(9, 4)}, ValueError, r"target must have shape \(4, 9\).*got \(9, 4\)"),
        ({"target": torch.rand(4)}, ValueError, r"target must have shape \(4, 9\).*got \(4,\)"),
        ({"target": torch.rand(4, 9, device="meta")}, ValueError, "be on cpu.*on meta"),
        ({"target": torch.rand(4, 9).to(torch.float8_e5m2)}, TypeError, "target must be float32.*float8"),
        ({"target": torch.rand(4, 9).to_sparse()}, NotImplementedError, "target must be a dense tensor"),
        ({"ignore_index": 3}, ValueError, "ignore_index must be left at its default, -100.*got 3"),
        ({"return_statistics": True}, ValueError, "class probabilities as target take neither return_statistics"),
        ({"method": "recompute"}, ValueError, 'class probabilities.*method="recompute"'),
        ({"weight": torch.rand(8)}, ValueError, r"weight must have shape \(9,\), got \(8,\)"),
    ],
)
def test_refusals_of_probabilities(backend: Any, change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"target": torch.rand(4, 9)}
    with pytest.raises(error, match=message):
        ms.linear_cross_entropy(torch.randn(4, 5), torch.randn(9, 5), **arguments | change, backend=backend)


def test_who_takes_probabilities() -> None:
    """The cpu backend, unless they require a gradient, of which the reference's is right."""
    head, _, target = batch(torch.float32)
    input, weight = head["input"], head["linear_weight"]
    assert input is not None and weight is not None
    leaf = target.clone().requires_grad_()
    with pytest.raises(ValueError, match="it does not differentiate with respect to class probabilities"):
        ms.linear_cross_entropy(input, weight, leaf, backend="cpu")
    (gradient,) = torch.autograd.grad(ms.linear_cross_entropy(input, weight, leaf), leaf)
    torch.testing.assert_close(gradient, -F.linear(input, weight).log_softmax(1) / N)
    with torch.no_grad():
        ms.linear_cross_entropy(input, weight, leaf, backend="cpu")


# inplace: the gradient in the memory of the logits.

#: Options that a gradient in place goes with; the target is class probabilities where "soft" says so.
IN_PLACE: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum", "label_smoothing": 0.1},
    "weighted": {"weight": True, "label_smoothing": 0.1},
    "z_loss": {"z_loss": 0.02, "z_loss_divisor": "rows", "temperature": 0.7},
    "weighted z_loss": {"weight": True, "z_loss": 0.02},
    "soft": {"label_smoothing": 0.1, "soft": True},
    "soft, weighted z_loss": {"weight": True, "z_loss": 0.02, "z_loss_divisor": "rows", "soft": True},
}


def in_place_batch(options: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Logits, the target, and ``options`` as cross_entropy takes them."""
    head, target, probabilities = batch()
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    given = {key: value for key, value in drawn(options, arithmetic).items() if key != "soft"}
    return logits_of(head).to(dtype), probabilities.to(arithmetic) if options.get("soft") else target, given


@pytest.mark.grid
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", IN_PLACE.values(), ids=IN_PLACE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("upstream", [1.0, 0.25, 0.3])
def test_inplace_is_the_ordinary_loss(
    name: str, options: dict[str, Any], dtype: torch.dtype, upstream: float
) -> None:  # fmt: skip
    """To the bit; in half precision to one more rounding, of what is not 1, and of what is small in float16."""
    z, target, options = in_place_batch(options, dtype)
    transform = disturbed(name).to(torch.promote_types(dtype, torch.float32))
    results = []
    for inplace in (False, True):
        leaf = z.clone().requires_grad_()
        logits = leaf * 1.0  # as a head makes them: not a leaf
        loss = ms.cross_entropy(logits, target, transform, inplace=inplace, backend="cpu", **options)
        gradients = torch.autograd.grad(loss * upstream, [leaf, *transform.parameters()])
        results.append([loss.detach(), *gradients])
    exact = dtype in (torch.float32, torch.float64) or upstream == 1
    for wanted, got in zip(*results, strict=True):
        assert got.dtype == wanted.dtype
        tolerance = {"rtol": 2 * torch.finfo(got.dtype).eps, "atol": 1.2e-7}
        if got.dtype == torch.float32:  # the sums for the parameters, which the ordinary loss adds up again
            tolerance = {"rtol": 1e-5, "atol": 1e-6}
        if got.dtype == torch.bfloat16 and upstream == 0.25:
            tolerance = {"rtol": 0, "atol": 0}
        torch.testing.assert_close(got, wanted, **({"rtol": 0, "atol": 0} if exact else tolerance))


@pytest.mark.parametrize("shape", [(V,), (N, V), (1, V, 1), (N, V, 1)])
def test_inplace_in_the_memory_of_the_logits(shape: tuple[int, ...]) -> None:
    """Of a leaf and of what a head makes; the logits are gone by then, and autograd knows that they have changed."""
    target = torch.zeros(shape[:1] + shape[2:] if len(shape) > 1 else (), dtype=torch.int64)
    leaf = torch.randn(shape, requires_grad=True)
    wanted = torch.autograd.grad(ms.cross_entropy(leaf, target), leaf)[0]
    for is_leaf in (True, False):
        z = leaf.detach().clone().requires_grad_() if is_leaf else leaf * 1.0
        seen: list[Tensor] = []
        z.register_hook(seen.append)
        version = z._version
        loss = ms.cross_entropy(z, target, inplace=True)
        assert z._version > version and torch.equal(z.detach(), wanted)
        loss.backward()
        assert seen[0].data_ptr() == z.data_ptr() and torch.equal(seen[0], wanted)


def test_inplace_between_other_columns() -> None:
    """Of logits that are a part of each row of something larger, which keeps its other columns."""
    target = torch.randint(0, V, (N,))
    leaf = torch.randn(N, V + 6, requires_grad=True)
    wide = leaf * 1.0
    before = wide.detach().clone()
    ms.cross_entropy(wide[:, 2 : 2 + V], target, inplace=True).backward()
    wanted = torch.autograd.grad(F.cross_entropy(leaf[:, 2 : 2 + V], target), leaf)[0]
    torch.testing.assert_close(leaf.grad, wanted)
    assert torch.equal(wide[:, :2], before[:, :2]) and torch.equal(wide[:, 2 + V :], before[:, 2 + V :])


def test_inplace_needs_no_other_memory() -> None:
    """Nothing else of the size of the logits is allocated, in either direction."""
    rows, classes = 64, 1024
    sizes = {}
    for inplace in (False, True):
        z = torch.randn(rows, classes, requires_grad=True)
        target = torch.randint(0, classes, (rows,))
        with torch.profiler.profile(profile_memory=True) as profile:
            torch.autograd.grad(ms.cross_entropy(z, target, inplace=inplace, backend="cpu") * 0.5, z)
        events = profile.events()
        assert events is not None
        sizes[inplace] = max(event.self_cpu_memory_usage for event in events)
    assert sizes[False] >= rows * classes * 4 > 16 * sizes[True]


@pytest.mark.parametrize("of_rows", [True, False])
def test_inplace_ignored_rows(of_rows: bool) -> None:
    """They may hold anything, and have gradients of 0, which are written over it."""
    z, target, _ = in_place_batch({}, torch.float32)
    z[4] = torch.nan
    z.requires_grad_()
    transform = disturbed("plif")
    ms.cross_entropy(z, target if of_rows else torch.full_like(target, -100), transform, reduction="sum", inplace=True
    ).backward()  # fmt: skip
    assert z.grad is not None and z.grad.isfinite().all() and (z.grad[4] == 0).all()
    assert all(each.grad is not None and each.grad.isfinite().all() for each in transform.parameters())


def test_inplace_another_use_of_the_logits() -> None:
    """Whoever saved them before gets autograd's error, not the gradient of something else; and so does a change of
    what waits there.
    """
    z, target, _ = in_place_batch({}, torch.float32)
    logits = z.requires_grad_() * 1.0
    penalty = logits.square().mean()
    loss = ms.cross_entropy(logits, target, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + penalty).backward()
    logits = z * 1.0
    total = ms.cross_entropy(logits, target) + ms.cross_entropy(logits, target, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()
    logits = z * 1.0
    loss = ms.cross_entropy(logits, target, inplace=True)
    with torch.no_grad():
        logits.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inplace_once() -> None:
    """The gradient is handed out once, and has no derivative."""
    z, target, _ = in_place_batch({}, torch.float32)
    for given in ({"retain_graph": True}, {"create_graph": True}):
        leaf = z.clone().requires_grad_()
        loss = ms.cross_entropy(leaf, target, inplace=True)
        with pytest.raises(RuntimeError, match="inplace=True has its gradient once: retain_graph must be False"):
            torch.autograd.grad(loss, leaf, **given)  # type: ignore[arg-type]
    leaf = z.clone().requires_grad_()
    loss = ms.cross_entropy(leaf, target, inplace=True)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_inplace_without_a_gradient_of_the_logits() -> None:
    """They stay what they are."""
    z, target, _ = in_place_batch({}, torch.float32)
    transform, before, leaf = disturbed("plif"), z.clone(), z.clone().requires_grad_()
    with torch.no_grad():
        loss = ms.cross_entropy(leaf, target, transform, inplace=True)
    wanted = ms.cross_entropy(z, target, transform)
    torch.testing.assert_close(loss, wanted.detach())
    assert torch.equal(leaf, before) and leaf._version == 0
    loss = ms.cross_entropy(z, target, transform, inplace=True)
    got, true = (torch.autograd.grad(each, list(transform.parameters())) for each in (loss, wanted))
    assert all(map(torch.equal, got, true)) and torch.equal(z, before)


def test_inplace_refuses_a_target_before_it_writes() -> None:
    z, target, _ = in_place_batch({}, torch.float32)
    leaf = z.clone().requires_grad_()
    target[5] = V
    with pytest.raises(IndexError, match=rf"target {V} \(row 5\) is out of bounds"):
        ms.cross_entropy(leaf, target, inplace=True)
    assert torch.equal(leaf, z) and leaf._version == 0


def test_inplace_beside_statistics() -> None:
    """Those of the logits, not of the gradient that replaces them."""
    z, target, _ = in_place_batch({}, torch.float32)
    wanted = ms.cross_entropy(z, target, return_statistics=True)
    found = ms.cross_entropy(z.clone().requires_grad_(), target, return_statistics=True, inplace=True)
    torch.testing.assert_close(found[0], wanted[0])
    assert all(map(torch.equal, found[1], wanted[1]))


def test_inplace_within_a_checkpoint() -> None:
    head, target, _ = batch(torch.float32)
    input, weight = head["input"], head["linear_weight"]
    assert input is not None and weight is not None
    leaves = [input.requires_grad_(), weight.requires_grad_()]

    def loss(x: Tensor, w: Tensor) -> Tensor:
        result: Tensor = ms.cross_entropy(x @ w.t(), target, inplace=True)
        return result

    total = checkpoint(loss, *leaves, use_reentrant=False)
    wanted = F.cross_entropy(input @ weight.t(), target)
    torch.testing.assert_close(torch.autograd.grad(total, leaves), torch.autograd.grad(wanted, leaves))


@pytest.mark.seconds
def test_inplace_compiled() -> None:
    """The compiler leaves it to eager code; it cannot be part of a whole graph."""
    head, target, _ = batch(torch.float32)
    input, weight = head["input"], head["linear_weight"]
    assert input is not None and weight is not None
    leaves = [input.requires_grad_(), weight.requires_grad_()]
    torch._dynamo.reset()

    def loss(x: Tensor, w: Tensor) -> Tensor:
        result: Tensor = ms.cross_entropy(x @ w.t(), target, inplace=True) * 0.5
        return result

    compiled = torch.compile(loss, backend="aot_eager")
    wanted, got = (torch.autograd.grad(each(input, weight), leaves) for each in (loss, compiled))
    torch.testing.assert_close(got, wanted)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(loss, backend="aot_eager", fullgraph=True)(input, weight)


def test_inplace_within_func_grad() -> None:
    z, target, _ = in_place_batch({}, torch.float32)
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda x: ms.cross_entropy(x, target, inplace=True))(z)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction": "none"}, 'inplace must be False with reduction="none"'),
        ({"return_lse": True}, 'inplace must be False with reduction="none", return_lse'),
        ({"candidates": torch.arange(4)}, "inplace must be False with .*candidates"),
        ({"weight": torch.ones(V), "z_loss": 0.1, "z_loss_divisor": "rows"}, 'z_loss_divisor="rows" for weighted'),
        ({"backend": "reference"}, 'backend="reference" cannot take this call: .*inplace'),
        ({"transform": ms.transforms.Chain(ms.transforms.PLIF(), ms.transforms.PLIF())}, "no backend takes this call"),
        ({"input": torch.randn(V, N).t()}, r"inplace needs the classes of input next to each other.*\(1, 7\)"),
        ({"input": torch.randn(1, V).expand(N, -1)}, r"each row in memory of its own, got strides \(0, 1\)"),
        ({"input": torch.randn(N + V).as_strided((N, V), (1, 1))}, r"each row in memory of its own, got strides \(1, 1\)"),  # noqa: E501
        ({"input": torch.randn(N, V, 2), "target": torch.zeros(N, 2).long()}, "inplace needs the classes of input"),
    ],
)  # fmt: skip
def test_inplace_refuses(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"input": torch.randn(N, V), "target": torch.zeros(N).long()} | change
    input = arguments.pop("input").requires_grad_()
    before = input.detach().clone()
    with pytest.raises(ValueError, match=message):
        ms.cross_entropy(input, **arguments, inplace=True)
    assert torch.equal(input, before)


# z_loss_divisor: what the z-losses are divided by.


def z_losses(z: Tensor, target: Tensor, weight: Tensor, label_smoothing: float, z_loss: float) -> tuple[Tensor, ...]:
    """The mean of torch's, and the sum of the z-losses, by how many rows there are, and by their weights."""
    valid = target != -100
    loss = F.cross_entropy(z, target, weight=weight, label_smoothing=label_smoothing)
    total = (z_loss * z.logsumexp(1).square())[valid].sum()
    return loss, total / valid.sum(), total / weight[target[valid]].sum()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("of_head", [False, True])
@pytest.mark.parametrize("return_lse", [False, True])
def test_z_loss_divisor(backend: Any, label_smoothing: float, of_head: bool, return_lse: bool) -> None:
    head, target, _ = batch()
    weight = torch.linspace(0.2, 1.5, V, dtype=torch.float64)
    leaves = {key: each.requires_grad_() for key, each in head.items() if each is not None}
    z = F.linear(leaves["input"], leaves["linear_weight"], leaves["linear_bias"])
    loss, by_rows, by_weights = z_losses(z, target, weight, label_smoothing, 0.05)
    options: dict[str, Any] = {
        "weight": weight, "label_smoothing": label_smoothing, "z_loss": 0.05, "return_lse": return_lse,
        "backend": backend,
    }  # fmt: skip
    for divisor, z_part in (("rows", by_rows), ("loss", by_weights)):
        options["z_loss_divisor"] = divisor
        found = (
            ms.linear_cross_entropy(**leaves, target=target, **options)
            if of_head
            else ms.cross_entropy(z, target, **options)
        )
        wanted = (loss + z_part, z.logsumexp(1)) if return_lse else (loss + z_part,)
        found = found if return_lse else (found,)
        torch.testing.assert_close(found, wanted)
        given = list(leaves.values())
        upstream = [torch.ones_like(each) for each in wanted]
        torch.testing.assert_close(
            torch.autograd.grad(found, given, upstream, retain_graph=True),
            torch.autograd.grad(wanted, given, upstream, retain_graph=True),
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("options", "soft"),
    [
        ({}, False), ({"weight": True, "z_loss": 0.0}, False), ({"weight": True, "reduction": "sum"}, False),
        ({"weight": True, "reduction": "none"}, False), ({"weight": True}, True),
    ],
)  # fmt: skip
def test_divisors_that_are_one(backend: Any, options: dict[str, Any], soft: bool) -> None:
    """Without class weights, without a mean, and for class probabilities, whose losses are divided by the rows."""
    head, indices, probabilities = batch()
    target = probabilities if soft else indices
    options = {"z_loss": 0.05} | drawn(options)
    upstream = (torch.rand(N, dtype=torch.float64),) if options.get("reduction") == "none" else ()
    for function, first in ((head_loss_and_gradients, head), (loss_and_gradients, logits_of(head))):
        got, wanted = (
            function(
                first, target, disturbed("plif").double(), backend, upstream=upstream, z_loss_divisor=each, **options
            )  # type: ignore[operator]
            for each in ("rows", "loss")
        )
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[key], value) for key, value in wanted.items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_z_loss_divisor_and_rows_that_do_not_count(backend: Any) -> None:
    """An ignored row may hold anything; where all are ignored the mean is NaN."""
    z, weight = torch.randn(3, V), torch.rand(V)
    z[1] = torch.nan
    z.requires_grad_()
    options: dict[str, Any] = {"weight": weight, "z_loss": 0.05, "z_loss_divisor": "rows", "backend": backend}
    loss = ms.cross_entropy(z, torch.tensor([0, -100, 5]), **options)
    (gradient,) = torch.autograd.grad(loss, z)
    assert loss.isfinite() and gradient.isfinite().all() and (gradient[1] == 0).all()
    assert ms.cross_entropy(z, torch.full((3,), -100), **options).isnan()
    with pytest.raises(ValueError, match='z_loss_divisor must be "loss" or "rows", got \'row\''):
        ms.cross_entropy(z, torch.tensor([0, -100, 5]), **options | {"z_loss_divisor": "row"})


# return_statistics: what is known of each token, beside the loss.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.grid
def test_statistics(backend: Any, name: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Those of linear_token_statistics, whatever the options of the loss are, which stays what it is."""
    head, target, _ = batch(dtype)
    transform = disturbed(name).to(torch.promote_types(dtype, torch.float32))
    options = drawn(options, torch.promote_types(dtype, torch.float32)) | {"backend": backend}
    input, weight, bias = head.values()
    assert input is not None and weight is not None
    tau = options.get("temperature", 1.0)
    wanted = ms.linear_token_statistics(
        input, weight, target, transform, linear_bias=bias, temperature=tau, backend=backend
    )
    leaves = [input.requires_grad_(), weight.requires_grad_(), *transform.parameters()]
    loss, found = ms.linear_cross_entropy(
        input, weight, target, transform, linear_bias=bias, return_statistics=True, **options
    )
    alone = ms.linear_cross_entropy(input, weight, target, transform, linear_bias=bias, **options)
    assert isinstance(found, ms.TokenStatistics) and torch.equal(loss, alone)
    for each, true, key in zip(found, wanted, found._fields, strict=True):
        assert torch.equal(each, true) and not each.requires_grad, key
    assert found.rank[4] == -1 and found.log_prob[4] == 0 and found.lse[4] != 0
    got, true = (torch.autograd.grad(each.sum(), leaves) for each in (loss, alone))
    assert all(map(torch.equal, got, true))

    z = F.linear(input, weight, bias).detach().requires_grad_()
    loss, of_logits = ms.cross_entropy(z, target, transform, return_statistics=True, **options)
    assert torch.equal(loss, ms.cross_entropy(z, target, transform, **options))
    outputs = ("log_prob", "entropy", "argmax", "lse", "rank")
    beside = ms.log_prob(z, target, transform, temperature=tau, outputs=outputs, backend=backend)
    for key in outputs:
        assert torch.equal(getattr(of_logits, key), getattr(beside, key)), key
        assert not getattr(of_logits, key).requires_grad, key


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_order_of_the_results(backend: Any, reduction: Any) -> None:
    head, target, _ = batch()
    input, weight, _ = head.values()
    assert input is not None and weight is not None
    for found in (
        ms.linear_cross_entropy(
            input, weight.requires_grad_(), target, return_lse=True, return_statistics=True, reduction=reduction,
            backend=backend,
        ),
        ms.cross_entropy(
            F.linear(input, weight), target, return_lse=True, return_statistics=True, reduction=reduction,
            backend=backend,
        ),
    ):  # fmt: skip
        loss, lse, statistics = found
        assert loss.shape == ((N,) if reduction == "none" else ()) and lse.shape == (N,)
        torch.testing.assert_close(lse.detach(), statistics.lse)
        torch.testing.assert_close(
            torch.autograd.grad(lse.sum(), weight, retain_graph=True)[0],
            torch.autograd.grad(F.linear(input, weight).logsumexp(1).sum(), weight)[0],
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (0,), (2, 0)])
def test_statistics_of_any_shape(backend: Any, leading: tuple[int, ...]) -> None:
    input, weight, target = torch.randn(*leading, D), torch.randn(V, D), torch.randint(0, V, leading)
    for found in (
        ms.linear_cross_entropy(input, weight, target, return_statistics=True, backend=backend),
        ms.cross_entropy(
            F.linear(input, weight).movedim(-1, min(len(leading), 1)), target, return_statistics=True, backend=backend
        ),
    ):  # fmt: skip
        statistics = found[1]
        assert all(each.shape == leading for each in statistics)
        torch.testing.assert_close(statistics.argmax, F.linear(input, weight).argmax(-1))
        assert statistics.argmax.dtype == statistics.rank.dtype == torch.int64


def test_products_beside_statistics() -> None:
    """No product more than the loss has, with gradients ahead, with gradients later, and without any."""
    head, target, _ = batch()
    input, weight, _ = head.values()
    assert input is not None and weight is not None
    for needs_gradient, options, count in (
        (True, {}, 3), (True, {"grad_in_forward": False}, 4), (True, {"reduction": "none"}, 4), (False, {}, 1),
    ):  # fmt: skip
        leaves = [each.detach().requires_grad_(needs_gradient) for each in (input, weight)]

        def step(more: bool, leaves: list[Tensor] = leaves, options: dict[str, Any] = options) -> None:
            found: Any = ms.linear_cross_entropy(*leaves, target, return_statistics=more, backend="cpu", **options)
            loss = found[0] if more else found
            if loss.requires_grad:
                torch.autograd.grad(loss.sum(), leaves)

        counts = [products(lambda more=more: step(more)) for more in (False, True)]  # type: ignore[misc]
        assert counts == [count * CHUNKS] * 2, options


@pytest.mark.seconds
def test_statistics_compiled() -> None:
    head, target, _ = batch(torch.float32)
    transform = disturbed("plif")
    input, weight, bias = (each.requires_grad_() for each in head.values() if each is not None)
    torch._dynamo.reset()

    def losses(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        loss, of_head = ms.linear_cross_entropy(
            x, w, target, transform, linear_bias=bias, return_statistics=True, backend="cpu"
        )
        other, of_logits = ms.cross_entropy(
            F.linear(x, w, bias), target, transform, return_statistics=True, backend="cpu"
        )
        return loss + other, *of_head, *of_logits

    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    wanted, got = (each(input, weight) for each in (losses, compiled))
    assert all(map(torch.equal, got, wanted)) and not any(each.requires_grad for each in got[1:])
    gradients = [torch.autograd.grad(each[0], [input, weight]) for each in (got, wanted)]
    assert all(map(torch.equal, *gradients))


def test_statistics_need_logits() -> None:
    head, target, _ = batch(torch.float32)
    input, weight, _ = head.values()
    assert input is not None and weight is not None
    with pytest.raises(ValueError, match='return_statistics is for chunks of logits, which method="recompute"'):
        ms.linear_cross_entropy(input, weight, target, return_statistics=True, method="recompute")
    with pytest.raises(ValueError, match="return_statistics must be False where target is class probabilities"):
        ms.cross_entropy(F.linear(input, weight), torch.rand(N, V), return_statistics=True)
