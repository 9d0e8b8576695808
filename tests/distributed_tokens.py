"""Log-probabilities and statistics of tokens whose classes ranks share out, beside those of one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from distributed_cases import (
    Case,
    Given,
    errors,
    given,
    grouped,
    leaf,
    parameters_of,
    place_of,
    the_same,
    with_gradients,
)
from hands import on
from torch import Tensor

import monosoftmax as ms

#: All of ``linear_log_prob``: those that are differentiable come first.
OUTPUTS = ("log_prob", "entropy", "lse", "target_logit", "is_top1", "rank", "argmax")
DIFFERENTIABLE = OUTPUTS[:4]


def _drawn(case: Case, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Upstream gradients, the same on all ranks."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(case.seed + 1)).to(dtype)


def _options(whole: Given, *names: str) -> dict[str, Any]:
    return {name: whole.options[name] for name in names if name in whole.options}


# --- linear_log_prob --------------------------------------------------------------------------------------------------


def _log_prob_results(case: Case, whole: Given, call: Callable[..., Any], leaves: dict[str, Any]) -> dict[str, Tensor]:
    outputs = _outputs(case)
    with on(case.backend):
        found = call(
            leaves["input"], leaves["weight"], whole.target, whole.transform, linear_bias=leaves["bias"],
            outputs=outputs, **_options(whole, "ignore_index", "temperature"),
        )  # fmt: skip
        asked = [name for name in DIFFERENTIABLE if name in outputs]
        values = [getattr(found, name) for name in asked]
        upstream = [_drawn(case, values[0].shape, values[0].dtype) * (i + 1) for i in range(len(values))]
        gradients = with_gradients(values, upstream, leaves | parameters_of(whole.transform))
    assert [name for name in found._fields if getattr(found, name) is not None] == [
        name for name in found._fields if name in outputs
    ]
    return {name: getattr(found, name).detach() for name in outputs} | gradients


def _outputs(case: Case) -> tuple[Any, ...]:
    """All, or what ``case.seed`` says: one alone, or two."""
    if case.seed < 100:
        return OUTPUTS
    first = OUTPUTS[case.seed % 4]
    return tuple(dict.fromkeys((first, OUTPUTS[case.seed // 4 % 7])))


def log_prob_of_rank(case: Case) -> dict[str, Tensor]:
    whole, place = given(case), place_of(case)
    assert whole.weight is not None
    leaves = {
        "input": leaf(case, "input", whole.input),
        "weight": leaf(case, "weight", whole.weight[place.classes]),
        "bias": None if whole.bias is None else leaf(case, "bias", whole.bias[place.classes]),
    }

    def call(*operands: Any, **options: Any) -> Any:
        return ms.distributed.linear_log_prob(
            *operands, vocab_start=place.start, backend=case.backend, reduce_grad_input=case.reduce_grad_input,
            **options,
        )  # fmt: skip

    return _log_prob_results(case, whole, call, leaves)


def log_prob_alone(
    case: Case, backend: Any = "reference", dtype: torch.dtype | None = torch.float64
) -> dict[str, Tensor]:
    whole = given(case) if dtype is None else given(case).to(dtype)
    leaves = {name: leaf(case, name, getattr(whole, name)) for name in ("input", "weight", "bias")}

    def call(*operands: Any, **options: Any) -> Any:
        return ms.linear_log_prob(*operands, backend=backend, **options)

    return _log_prob_results(case, whole, call, leaves)


def log_prob_joined(case: Case, results: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    found = {}
    for name in results[0]:
        parts = [each[name] for each in results]
        if name in ("weight", "bias"):
            found[name] = torch.cat(parts)
        elif name == "input" and not case.reduce_grad_input:
            found[name] = torch.stack(parts).sum(0)
        else:
            found[name] = the_same(parts, name)
    return found


# --- log_softmax ------------------------------------------------------------------------------------------------------


def _log_softmax_results(case: Case, whole: Given, call: Callable[..., Tensor], columns: slice) -> dict[str, Tensor]:
    local = leaf(case, "input", whole.input[..., columns])
    with on(case.backend):
        log_p = call(local, whole.transform, **_options(whole, "temperature"))
        upstream = _drawn(case, whole.input.shape, log_p.dtype)[..., columns]
        gradients = with_gradients([log_p], [upstream], {"input": local, **parameters_of(whole.transform)})
    return {"log_p": log_p.detach()} | gradients


def log_softmax_of_rank(case: Case, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    place = place_of(case)

    def call(*operands: Any, **options: Any) -> Tensor:
        return ms.distributed.log_softmax(
            *operands, vocab_start=place.start, dtype=dtype, backend=case.backend, **options
        )

    return _log_softmax_results(case, given(case), call, place.classes)


def log_softmax_alone(
    case: Case, out: torch.dtype | None = None, *, backend: Any = "reference", dtype: torch.dtype | None = torch.float64
) -> dict[str, Tensor]:
    whole = given(case) if dtype is None else given(case).to(dtype)

    def call(*operands: Any, **options: Any) -> Tensor:
        return ms.log_softmax(*operands, dtype=out, backend=backend, **options)

    return _log_softmax_results(case, whole, call, slice(None))


def log_softmax_joined(results: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    of_classes = ("log_p", "input")
    return {
        name: torch.cat([each[name] for each in results], -1)
        if name in of_classes
        else the_same([each[name] for each in results], name)
        for name in results[0]
    }


def all_of_ranks(job: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
    """On a rank: what ``job`` returns for each of many arguments."""
    return [job(*each) for each in calls]


def apart(got: Mapping[str, Tensor], one: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> list[str]:
    """Which results are further from the truth than 1e-6, relative to its norm, and twice those of one process.

    The gradients of f are sums of terms of both signs. If those of one process have a small error, that may be luck.
    """
    whole = {name for name, each in truth.items() if not each.is_floating_point()}
    found = [f"{name} is {got[name]}, not {one[name]}" for name in whole if not torch.equal(got[name], one[name])]
    floating = [grouped({name: each for name, each in of.items() if name not in whole}) for of in (got, one, truth)]
    of_ranks, of_one = errors(floating[0], floating[2]), errors(floating[1], floating[2])
    return found + [
        f"{name} is off by {error:.1e}, that of one process by {of_one[name]:.1e}"
        for name, error in of_ranks.items()
        if not error <= (max(5e-6, 4 * of_one[name]) if name == "f" else max(1e-6, 2 * of_one[name]))
    ]


def unlike(got: Mapping[str, Tensor], one: Mapping[str, Tensor], eps: float, floor: float = 0.0) -> list[str]:
    """Which results differ from those of one process by more than a few ``eps``, or in what is not finite.

    A norm below ``floor`` counts as that.
    """
    found = []
    for name, true in grouped(one).items():
        a, b = grouped(got)[name].double(), true.double()
        finite = b.isfinite()
        same = torch.equal(torch.where(finite, 0.0, a).nan_to_num(7.0), torch.where(finite, 0.0, b).nan_to_num(7.0))
        if not same or (a[finite] - b[finite]).norm() > 4 * eps * max(b[finite].norm().item(), floor):
            found.append(f"{name} is {a}, of one process {b}")
    return found
