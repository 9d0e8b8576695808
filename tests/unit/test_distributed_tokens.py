"""log p and statistics of tokens whose classes ranks share out: of 2 and 4 processes what one process finds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import ranks
import torch
from distributed_cases import TRANSFORMS, UNFUSED, Case
from distributed_tokens import (
    all_of_ranks,
    apart,
    log_prob_alone,
    log_prob_joined,
    log_prob_of_rank,
    log_softmax_alone,
    log_softmax_joined,
    log_softmax_of_rank,
    unlike,
)
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="torch has no gloo"
)

OPTIONS = ("mean", "ignored", "temperature", "temperature, tensor")
SHARDS = {2: ((9, 8), (17, 0), (1, 20), (0, 5)), 4: ((5, 4, 4, 4), (5, 9, 0, 30), (1, 1, 1, 1), (0, 0, 3, 8))}
EPS = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


def table(size: int) -> list[Case]:
    """Each transform with each option; backends and shards in turn."""
    return [
        Case(
            name, options, shards=SHARDS[size][(i + j) % 4], seed=10 * i + j, bias=(i + j // 2) % 2 == 0,
            backend="reference" if name in UNFUSED or (i + 2 * j) % 5 == 0 else "cpu", reduce_grad_input=i % 3 > 0,
        )
        for (i, name), (j, options) in itertools.product(enumerate(TRANSFORMS), enumerate(OPTIONS))
    ]  # fmt: skip


def found_by(
    job: Callable[..., Any], cases: Sequence[Case], *more: Any, size: int = 2
) -> Iterator[tuple[Case, Sequence[Any]]]:
    """Each case, and what ``job`` returns on each rank."""
    of_ranks = ranks.call(size, all_of_ranks, job, [(case, *more) for case in cases])
    return zip(cases, zip(*of_ranks, strict=True), strict=True)


def check_log_prob(size: int, cases: Sequence[Case]) -> None:
    problems = []
    for case, results in found_by(log_prob_of_rank, cases, size=size):
        got = log_prob_joined(case, results)
        found = apart(got, log_prob_alone(case, case.backend, None), log_prob_alone(case))
        if "log_prob" in got and not (got["log_prob"] <= 0).all():
            found.append(f"log p is {got['log_prob'].max().item()}")
        problems += [f"{case}: {each}" for each in found]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("size", [2, 4])
def test_linear_log_prob(size: int) -> None:
    """All outputs at once, and each of them alone or beside another one."""
    some = [Case("gss", shards=SHARDS[size][seed % 4], seed=100 + seed) for seed in range(28)]
    check_log_prob(size, [*table(size), *some])


def test_ties_and_empty_batches() -> None:
    """Of equal logits the argmax is the first of all ranks; the rank counts larger ones only."""
    ties = [
        Case("identity", shards=shards, seed=seed, features=2, rows=40, whole_numbers=True, bias=seed % 2 == 0)
        for seed in range(4)
        for shards in ((9, 8), (17, 0), (1, 20), (0, 5))
    ]
    check_log_prob(2, [*ties, *(Case(rows=rows) for rows in (0, 1))])


def test_linear_log_prob_in_half_precision() -> None:
    cases = [
        Case(name, dtype=dtype, seed=seed, shards=shards)
        for dtype in (torch.bfloat16, torch.float16)
        for seed, (name, shards) in enumerate(itertools.product(("plif", "gss", "soft_cap"), SHARDS[2]))
    ]
    problems = [
        f"{case}: {each}"
        for case, results in found_by(log_prob_of_rank, cases)
        for each in unlike(log_prob_joined(case, results), log_prob_alone(case, case.backend, None), EPS[case.dtype])
    ]
    assert not problems, "\n".join(problems)


def test_tokens_that_are_nan() -> None:
    """log p, entropy and lse are NaN; what the integers say means nothing, but they are classes and ranks."""
    cases = [Case(backend=each, trouble=("nan of all", "", "nan of all")) for each in ("cpu", "reference")]
    for case, results in found_by(log_prob_of_rank, cases):
        got = log_prob_joined(case, results)
        for name in ("log_prob", "entropy", "lse"):
            assert got[name].isnan().tolist() == [True, False, True] + [False] * 10, name
        assert ((got["argmax"] >= 0) & (got["argmax"] < case.classes)).all()
        assert ((got["rank"] >= -1) & (got["rank"] < case.classes)).all()


@pytest.mark.parametrize("size", [2, 4])
def test_log_softmax(size: int) -> None:
    cases = [case._replace(features=0) for case in table(size)]
    shards = SHARDS[size][0]
    cases += [Case(features=0, dtype=each, shards=shards) for each in (torch.float64, torch.bfloat16, torch.float16)]
    cases += [Case(features=0, rows=each, shards=shards) for each in (0, 1)]
    cases += [Case(features=0, rows=6, form=each, shards=shards) for each in ("one", "batch")]
    problems = []
    for case, results in found_by(log_softmax_of_rank, cases, size=size):
        got, one = log_softmax_joined(results), log_softmax_alone(case, backend=case.backend, dtype=None)
        half = EPS.get(case.dtype)
        found = apart(got, one, log_softmax_alone(case)) if half is None else unlike(got, one, half)
        problems += [f"{case}: {each}" for each in found]
    assert not problems, "\n".join(problems)


def test_log_softmax_of_other_types() -> None:
    """Rounded once, into the type that is asked for."""
    cases = [Case(name, features=0, shards=shards) for name in ("plif", "identity") for shards in SHARDS[2]]
    exact = list(found_by(log_softmax_of_rank, cases))
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        for (_, wanted), (_, found) in zip(exact, found_by(log_softmax_of_rank, cases, dtype), strict=True):
            for of_rank, exact_of_rank in zip(found, wanted, strict=True):
                assert of_rank["log_p"].dtype == dtype
                assert torch.equal(of_rank["log_p"], exact_of_rank["log_p"].to(dtype))


def test_rows_without_a_distribution() -> None:
    """NaN, and -inf, are where one process has them."""
    numbers = ("-inf of all", "-inf of one", "-inf of some", "nan of one", "nan of all", "inf of some")
    cases = [
        Case(name, features=0, shards=shards, backend=backend, trouble=(each, "", each))
        for each in numbers
        for name in ("identity", "plif", "sigmoid_cap")
        for shards in SHARDS[2]
        for backend in ("cpu", "reference")
    ]
    problems = []
    for case, results in found_by(log_softmax_of_rank, cases):
        got, one = log_softmax_joined(results), log_softmax_alone(case, backend=case.backend, dtype=None)
        # A row without a distribution poisons some of the gradients of f, or all.
        got, one = ({name: of[name] for name in ("log_p", "input")} for of in (got, one))
        problems += [f"{case}: {each}" for each in unlike(got, one, 1e-6)]
    assert not problems, "\n".join(problems[:20])


@st.composite
def any_case(draw: Any) -> Case:
    """Any shards, of which one may be empty, and types; logits with rows that have no distribution."""
    features, rows = draw(st.sampled_from([0, 1, 4])), draw(st.integers(0, 9))
    name = draw(st.sampled_from(TRANSFORMS))
    words = ("", "-inf of all", "-inf of one", "-inf of some", "nan of one", "nan of some", "inf of some")
    return Case(
        name,
        draw(st.sampled_from(OPTIONS)),
        draw(st.tuples(st.integers(0, 12), st.integers(0, 12)).filter(any)),
        rows=rows,
        features=features,
        dtype=draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])),
        bias=draw(st.booleans()),
        backend="reference" if name in UNFUSED else draw(st.sampled_from(["cpu", "reference"])),
        seed=draw(st.integers(0, 99)),
        trouble=tuple(draw(st.lists(st.sampled_from(words), max_size=rows))) if features == 0 else (),
        whole_numbers=draw(st.booleans()),
    )


def check_any(case: Case) -> None:
    eps = EPS.get(case.dtype, 2.5e-5)
    if case.features == 0:
        [(_, results)] = found_by(log_softmax_of_rank, [case])
        got, one = log_softmax_joined(results), log_softmax_alone(case, backend=case.backend, dtype=None)
        if case.trouble:  # a row without a distribution poisons some of the gradients of f, or all
            got, one = ({name: of[name] for name in ("log_p", "input")} for of in (got, one))
    else:
        [(_, results)] = found_by(log_prob_of_rank, [case])
        got, one = log_prob_joined(case, results), log_prob_alone(case, case.backend, None)
        if case.dtype in EPS and not case.whole_numbers:  # equal logits need not be equal where sums have another order
            got, one = ({name: each for name, each in of.items() if each.is_floating_point()} for of in (got, one))
    problems = unlike(got, one, eps, floor=0.1)
    assert not problems, "\n".join([str(case), *problems])


@settings(max_examples=80)
@given(any_case())
def test_any_case(case: Case) -> None:
    check_any(case)


@pytest.mark.slow
@settings(max_examples=2000)
@given(any_case())
def test_many_cases(case: Case) -> None:
    check_any(case)
