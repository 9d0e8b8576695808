"""The kernels for GPUs, under emulators, on two ranks that share out the classes: what one process finds in float64."""

from __future__ import annotations

import pytest
import ranks
import torch
from distributed_cases import Case, all_shared, wrong
from distributed_tokens import (
    all_of_ranks,
    apart,
    log_prob_alone,
    log_prob_joined,
    log_prob_of_rank,
    log_softmax_alone,
    log_softmax_joined,
    log_softmax_of_rank,
)

pytestmark = [
    pytest.mark.skipif(
        not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="torch has no gloo"
    ),
    pytest.mark.filterwarnings("ignore:All-NaN slice"),  # of the interpreter of Triton, about rows of NaN
]
backends = pytest.mark.parametrize("backend", ["triton", "cuda"])


@backends
def test_losses(backend: str) -> None:
    """Every kind of option, of a head and of logits, with a rank that has no classes, and rows of -inf and NaN."""
    cases = [
        Case("plif", "mean", chunk_rows=3, rows=4),
        Case("gss", "rows, lse", shards=(0, 9), rows=7, seed=1),
        Case("gss", "all", chunk_rows=4, rows=7, seed=2),
        Case("spline", "smoothed", features=0, rows=2, seed=3),
        *(
            Case("identity", options, rows=3, features=0, trouble=(each, "", "nan of one"))
            for options in ("rows", "weighted, smoothed")
            for each in ("-inf of one", "-inf of all", "nan of all")
        ),
    ]
    cases = [case._replace(backend=backend) for case in cases]
    found = ranks.call(2, all_shared, cases, timeout=300)
    problems = [problem for case, *results in zip(cases, *found, strict=True) for problem in wrong(case, results)]
    assert not problems, "\n".join(problems)


@backends
def test_log_prob_and_log_softmax(backend: str) -> None:
    for each in (Case("gss", "ignored", rows=5), Case("sigsoftmax", shards=(0, 5), rows=5)):
        each = each._replace(backend=backend)
        results = [found[0] for found in ranks.call(2, all_of_ranks, log_prob_of_rank, [(each,)], timeout=300)]
        got = log_prob_joined(each, results)
        assert not apart(got, log_prob_alone(each, backend, None), log_prob_alone(each))
        logits = each._replace(features=0)
        results = [found[0] for found in ranks.call(2, all_of_ranks, log_softmax_of_rank, [(logits,)], timeout=300)]
        one = log_softmax_alone(logits, backend=backend, dtype=None)
        assert not apart(log_softmax_joined(results), one, log_softmax_alone(logits))
