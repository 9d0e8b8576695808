"""Losses whose classes and tokens ranks share out: of 2 and 4 processes what one process finds, and on all the same."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import ranks
import torch
from distributed_cases import OPTIONS, TRANSFORMS, UNFUSED, Case, all_shared, wrong
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = [
    pytest.mark.skipif(
        not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="torch has no gloo"
    ),
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated"),  # of torch.func.jacfwd itself
]

#: What a rank has: uneven, all, one class, nothing.
SHARDS = {
    2: ((9, 8), (17, 0), (1, 20), (0, 5)),
    4: ((5, 4, 4, 4), (5, 9, 0, 30), (1, 1, 1, 1), (0, 0, 3, 8)),
}
#: Ways of a call beside its options.
WAYS: list[dict[str, Any]] = [
    {},
    {"features": 0},
    {"chunk_rows": 5},
    {"grad_in_forward": False, "chunk_rows": 4},
    {"grad_in_forward": True, "bias": False},
    {"features": 0, "backend": "reference"},
    {"reduce_grad_input": False},
    {"backend": "reference", "chunk_rows": 6},
    {"grad_in_forward": False, "bias": False, "reduce_grad_input": False},
]


def check(size: int, cases: Sequence[Case], *, timeout: float = 120, **slack: float) -> None:
    found = ranks.call(size, all_shared, cases, timeout=timeout)
    problems = [
        problem for case, *results in zip(cases, *found, strict=True) for problem in wrong(case, results, **slack)
    ]
    assert not problems, f"{len(problems)} of {len(cases)}:\n" + "\n".join(problems[:40])


def made(transform: str, options: str, seed: int, **way: Any) -> Case:
    """A case that its backend takes."""
    if OPTIONS[options].get("reduction") == "none":
        way["grad_in_forward"] = None if way.get("grad_in_forward") else way.get("grad_in_forward")
    if transform in UNFUSED:
        way["backend"] = "reference"
    return Case(transform, options, seed=seed, **way)


@pytest.mark.parametrize("size", [2, 4])
def test_every_transform_with_every_option(size: int) -> None:
    """All pairs, half of them on 2 ranks, half on 4; shards and ways so that each meets each transform and option."""
    cases = [
        made(name, options, i + 20 * j, shards=SHARDS[size][(i + j) // 2 % 4], **WAYS[(i + j // 2) % len(WAYS)])
        for (i, name), (j, options) in itertools.product(enumerate(TRANSFORMS), enumerate(OPTIONS))
        if (i + j) % 2 == (size == 4)
    ]
    check(size, cases)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_every_transform_with_every_option_and_shards(size: int) -> None:
    names = [*TRANSFORMS, "gss, as it starts"]
    for k, shards in enumerate(SHARDS[size]):
        cases = [
            made(name, options, 7 * i + 100 * j + k, shards=shards, **WAYS[(i + 2 * j + 4 * k) % len(WAYS)])
            for (i, name), (j, options) in itertools.product(enumerate(names), enumerate(OPTIONS))
        ]
        check(size, cases, timeout=600)


def test_tokens_and_classes_shared_out() -> None:
    """Of 4 ranks, two groups have other tokens: the mean is one of all of them."""
    cases = [
        made(
            ("plif", "gss", "chain")[j % 3], options, j, shards=((9, 8), (3, 0))[j % 2], token_ranks=2,
            **WAYS[j % len(WAYS)],
        )
        for j, options in enumerate(OPTIONS)
    ]  # fmt: skip
    check(4, cases)
    check(4, [Case(options=each, shards=(17,), token_ranks=4) for each in ("mean", "all", "rows, lse")])


def test_forms() -> None:
    """Shapes of input, types of targets, operands without gradients, autocast, and all types of numbers."""
    dtypes = (torch.float64, torch.bfloat16, torch.float16)
    operands = ("input", "weight", "bias", "f")
    cases = [
        *(Case(form=form, features=features) for form in ("one", "uint8") for features in (0, 6)),
        *(Case(form="batch", rows=12, options=options) for options in ("mean", "rows, lse")),
        *(Case(features=0, more=(3, 2), options=options) for options in ("mean", "rows, lse", "smoothed")),
        *(Case(frozen=(each,), options="smoothed") for each in operands),
        *(Case(frozen=tuple({*operands} - {each}), grad_in_forward=False) for each in operands),
        *(Case(features=0, frozen=(each,)) for each in ("input", "f")),
        Case(frozen=operands),
        Case(autocast=True),
        Case(autocast=True, options="weighted, smoothed", grad_in_forward=False),
        *(
            Case(dtype=dtype, features=features, options=options, chunk_rows=5 if features else None)
            for dtype in dtypes
            for features in (0, 6)
            for options in ("mean", "rows, lse", "weighted, smoothed", "all")
        ),
        *(Case(rows=rows, features=features) for rows in (0, 1) for features in (0, 6)),
        *(Case(rows=0, features=features, options="rows, lse") for features in (0, 6)),
    ]
    check(2, cases)


NOT_FINITE = (
    "",
    "",
    "-inf of all",
    "-inf of one",
    "-inf of some",
    "nan of one",
    "nan of all",
    "inf of one",
    "inf of all",
)


def test_logits_that_are_not_finite() -> None:
    """In the first row, in the ignored second one, and in the third one."""
    cases = [
        Case(
            name, options, SHARDS[2][i % 4], features=0, backend=("cpu", "reference")[(i + j) % 2], rows=5,
            trouble=(trouble, "" if "lse" in options else trouble, trouble),
        )
        for (i, trouble), (j, options) in itertools.product(
            enumerate(NOT_FINITE[1:]), enumerate(("mean", "rows, lse", "z_loss", "weighted, smoothed"))
        )
        for name in ("plif", "sigmoid_cap")
    ]  # fmt: skip
    check(2, cases)


@st.composite
def any_case(draw: Any) -> Case:
    """Any shards, of which most may be empty, any types, and rows that have no distribution."""
    name, options = draw(st.sampled_from(TRANSFORMS)), draw(st.sampled_from([*OPTIONS]))
    features, rows = draw(st.sampled_from([0, 0, 1, 4])), draw(st.integers(0, 9))
    trouble = tuple(draw(st.lists(st.sampled_from(NOT_FINITE), max_size=rows))) if features == 0 else ()
    if OPTIONS[options].get("return_lse"):
        # The gradient of lse of an ignored row, the second one or that of some class, has no meaning there.
        trouble = (
            () if "ignore_index" in OPTIONS[options] else (*trouble[:1], *("" for _ in trouble[1:2]), *trouble[2:])
        )
    return made(
        name,
        options,
        draw(st.integers(0, 1000)),
        shards=draw(st.tuples(st.integers(0, 12), st.integers(0, 12)).filter(any)),
        rows=rows,
        features=features,
        dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])),
        bias=draw(st.booleans()),
        chunk_rows=draw(st.sampled_from([None, 3])),
        grad_in_forward=draw(st.sampled_from([None, False, True])),
        reduce_grad_input=draw(st.booleans()),
        backend=draw(st.sampled_from(["cpu", "reference"])),
        trouble=trouble,
    )


@settings(max_examples=150)
@given(any_case())
def test_any_case(case: Case) -> None:
    check(2, [case], bound=1e-4, floor=0.1)  # of a single row, terms cancel


@pytest.mark.slow
@settings(max_examples=2000)
@given(any_case())
def test_many_cases(case: Case) -> None:
    check(2, [case], bound=1e-4, floor=0.1)  # of a single row, terms cancel
