"""What ranks exchange and hold, and what becomes of all of them if one is wrong, late or gone."""

from __future__ import annotations

import re
import time
from typing import Any, NamedTuple

import pytest
import ranks
import torch
from distributed_cases import Case, transform_of
from distributed_jobs import (
    differentiated_twice,
    disagreeing,
    exchanged,
    largest_tensor,
    leaving,
    of_groups,
    outcome_without_grad,
    peak_mib,
)
from distributed_tokens import OUTPUTS

import monosoftmax as ms
from monosoftmax.distributed.losses import checks_by_default

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="torch has no gloo"
)

# --- what is exchanged ------------------------------------------------------------------------------------------------

N, D, P = 13, 6, 10
#: A head whose f has a table of 2 x P coefficients, with everything that ranks would tell each other known before.
QUIET = {"vocab_size": 17, "check": False}
HEAD = Case("plif, as it starts", chunk_rows=N)


class Call(NamedTuple):
    """A call and the collectives that it may take, as kinds and elements: forward and backward."""

    function: str
    changes: dict[str, Any]
    forward: list[tuple[str, int]]
    backward: list[tuple[str, int]]


F = ms.transforms.make("plif", num_pieces=P)
GRADIENTS = [("sum", N * D), ("sum", 2 * P)]
CALLS = {
    "a loss": Call("linear_cross_entropy", {}, [("max", N), ("sum", 2 * N)], GRADIENTS),
    "arguments compared": Call(
        "linear_cross_entropy", {"check": True}, [("gather", 10), ("max", N), ("sum", 2 * N)], GRADIENTS
    ),
    "chunks, gradients ahead": Call(
        "linear_cross_entropy", {"chunk_rows": 7}, [("max", 7), ("sum", 14), ("max", 6), ("sum", 12)], GRADIENTS
    ),
    "chunks, gradients later": Call(
        "linear_cross_entropy", {"chunk_rows": 7, "grad_in_forward": False}, [("max", N), ("sum", 2 * N)], GRADIENTS
    ),
    "smoothed labels": Call(
        "linear_cross_entropy", {"label_smoothing": 0.1, "z_loss": 0.1}, [("max", N), ("sum", 3 * N)], GRADIENTS
    ),
    "a part of the gradient of the input": Call(
        "linear_cross_entropy", {"reduce_grad_input": False}, [("max", N), ("sum", 2 * N)], GRADIENTS[1:]
    ),
    "f without parameters": Call(
        "linear_cross_entropy", {"transform": None}, [("max", N), ("sum", 2 * N)], GRADIENTS[:1]
    ),
    "log p and entropy": Call(
        "linear_log_prob", {"outputs": OUTPUTS[:2]}, [("max", N), ("sum", 3 * N)], GRADIENTS
    ),
    "log p alone": Call("linear_log_prob", {"outputs": OUTPUTS[:1]}, [("max", N), ("sum", 2 * N)], GRADIENTS),
    "all statistics": Call(
        "linear_log_prob", {}, [("max", 2 * N), ("sum", 4 * N), ("min", N), ("sum", N)], GRADIENTS
    ),
    "log_softmax": Call("log_softmax", {}, [("max", N), ("sum", 2 * N)], [("sum", N), ("sum", 2 * P)]),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_collectives(name: str) -> None:
    """Two all-reduces of a few numbers for each token, and one of each gradient; the dispatcher sees the same."""
    function, changes, forward, backward = CALLS[name]
    changes = QUIET | {"transform": F} | changes
    if changes["transform"] is None:
        changes["transform"] = ms.transforms.Identity()
    case = HEAD._replace(features=0) if function == "log_softmax" else HEAD
    for found in ranks.call(2, exchanged, case, function, changes):
        assert found.forward == forward
        assert found.backward == backward
        for counted, seen in ((found.forward, found.seen_forward), (found.backward, found.seen_backward)):
            names = {"gather": "allgather_"}
            assert seen == [(names.get(kind, "allreduce_"), elements) for kind, elements in counted]


@pytest.mark.parametrize("function", ["linear_cross_entropy", "linear_log_prob", "log_softmax"])
def test_a_rank_alone_exchanges_nothing(function: str) -> None:
    case = HEAD._replace(features=0) if function == "log_softmax" else HEAD
    for found in ranks.call(2, exchanged, case, function, {"transform": F}, True):
        assert found == ([], [], [], [])


def test_tokens_shared_out_exchange_counts_and_losses() -> None:
    """Of all ranks' tokens: the two numbers that a mean and its z-losses are divided by, and the loss."""
    case = HEAD._replace(token_ranks=2, rows=2 * N)
    for found in ranks.call(4, exchanged, case, "linear_cross_entropy", QUIET | {"transform": F}):
        assert found.forward == [("sum", 2), ("max", N), ("sum", 2 * N), ("sum", 1)]
        assert found.backward == GRADIENTS


# --- how a call is used -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["mean", "rows, lse", "all"])
@pytest.mark.parametrize("grad_in_forward", [None, False], ids=str)
def test_backward_passes(options: str, grad_in_forward: bool | None) -> None:
    """A second one finds the same; a gradient has no derivative, and says so."""
    case = Case(options=options, grad_in_forward=grad_in_forward, chunk_rows=5)
    for same, words in ranks.call(2, differentiated_twice, case):
        assert same
        assert words.startswith("monosoftmax.distributed does not support double backward")
    assert ranks.call(2, outcome_without_grad, case) == [(True, False)] * 2


def test_groups() -> None:
    first, second = ranks.call(2, of_groups, Case())
    for found in (first, second):
        assert found["none"] == found["process group"] == found["mesh"] == first["none"] > 0
        assert found["two dimensions"].startswith("ValueError: group must be a process group or a 1-dimensional mesh")
        assert found["a word"] == "TypeError: group must be a process group, a DeviceMesh or None, got str"
        assert found["of the other rank"] == "ValueError: group must be one that this process is in"


def test_calls_are_compared_where_nothing_waits_or_for_debugging(monkeypatch: pytest.MonkeyPatch) -> None:
    here, elsewhere = torch.zeros(1), torch.zeros(1, device="meta")
    for value, compared in (("", False), ("OFF", False), ("INFO", True), ("detail", True)):
        monkeypatch.setenv("TORCH_DISTRIBUTED_DEBUG", value)
        assert checks_by_default(here) and checks_by_default(elsewhere) == compared


# --- what is held -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["mean", "weighted, smoothed", "rows, lse"])
@pytest.mark.parametrize("grad_in_forward", [None, False], ids=str)
def test_no_tensor_is_larger_than_a_part_of_the_weight(options: str, grad_in_forward: bool | None) -> None:
    """Neither N x V of one rank, nor the weight of all: of 4 x 500 classes, 300 tokens and 16 features."""
    case = Case("plif", options, (500,) * 4, rows=300, features=16, chunk_rows=10, grad_in_forward=grad_in_forward)
    for elements in ranks.call(4, largest_tensor, case, "linear_cross_entropy", {}):
        assert elements == 500 * 16


@pytest.mark.seconds
def test_memory_does_not_grow_with_the_tokens() -> None:
    """V = 2 x 16,000, d = 64: 256 rows of a rank's logits are 15.6 MiB, all of them 125 and 250."""
    case = Case("plif, as it starts", shards=(16_000, 16_000), features=64)
    with ranks.Group(2) as group:
        for function, options in (
            ("linear_cross_entropy", {}),
            ("linear_cross_entropy", {"label_smoothing": 0.1, "grad_in_forward": False}),
            ("linear_log_prob", {}),
        ):
            peaks = []
            for rows in (2048, 4096):
                peaks.append(group.call(peak_mib, case._replace(rows=rows), function, options))
            assert max(peaks[0] + peaks[1]) < 15.7 + 4, (function, peaks)
            assert all(more < less + 1 for less, more in zip(*peaks, strict=True)), (function, peaks)


# --- ranks that are wrong ---------------------------------------------------------------------------------------------

CASE = Case(options="weighted, smoothed", chunk_rows=5)
OTHER = "rank 1 of 2 has raised an error"


class Mistake(NamedTuple):
    """What rank 1 does otherwise, and the error of each rank, as "Type: words"."""

    change: dict[str, Any]
    first: str
    second: str = ""
    function: str = "linear_cross_entropy"
    both: bool = False


def different(change: dict[str, Any], words: str, **more: Any) -> Mistake:
    """A difference that both ranks find."""
    return Mistake(change, f"ValueError: {words}", f"ValueError: {words}", **more)


def alone(change: dict[str, Any], error: str, **more: Any) -> Mistake:
    """A mistake that rank 1 finds, and tells the other one of."""
    return Mistake(change, f"RuntimeError: monosoftmax: {OTHER}", error, **more)


NO_CLASSES = {"local_weight": torch.zeros(0, 6, requires_grad=True), "linear_bias": torch.zeros(0, requires_grad=True)}
MISTAKES = {
    "tokens": different({"case": {"rows": 12}}, "input must have the same number of tokens"),
    "features": different({"case": {"features": 5}}, "input must have the same number of features"),
    "dtype": different({"case": {"dtype": torch.float64}}, "input must have the same dtype"),
    "target": different({"target": torch.zeros(13, dtype=torch.int64)}, "target must be the same"),
    "parameters of f": different({"transform": transform_of("plif", 1)}, "transform must be the same"),
    "f": different({"transform": transform_of("gss")}, "transform must be the same"),
    "constants of f": different(
        {"transform": ms.transforms.Chain(ms.transforms.Scale(0.5), transform_of("plif"))}, "transform must be the same"
    ),
    "temperature": different({"temperature": 0.5}, "transform must be the same"),
    "weight": different({"weight": torch.ones(17)}, "weight, ignore_index"),
    "no weight": different({"weight": None}, "vocab_size, or the length of weight, must be the same"),
    "ignore_index": different({"ignore_index": 4}, "weight, ignore_index"),
    "label_smoothing": different({"label_smoothing": 0.3}, "weight, ignore_index, label_smoothing"),
    "no label_smoothing": different({"label_smoothing": 0.0}, "weight, ignore_index, label_smoothing"),
    "z_loss": different({"z_loss": 0.3}, "weight, ignore_index, label_smoothing, z_loss"),
    "reduction": different({"reduction": "sum"}, "weight, .* reduction"),
    "chunk_rows": different({"chunk_rows": 4}, "weight, .* chunk_rows"),
    "grad_in_forward": different({"grad_in_forward": False}, "weight, .* grad_in_forward"),
    "reduce_grad_input": different({"reduce_grad_input": False}, "weight, .* reduce_grad_input"),
    "no gradient of input": different({"case": {"frozen": ("input",)}}, "the same operands must require gradients"),
    "no gradient of f": different({"case": {"frozen": ("f",)}}, "the same operands must require gradients"),
    "no_grad": different({"grad": False}, "the same operands must require gradients"),
    "gap": different({"vocab_start": 10}, "vocab_start and the shards .* leave out classes at class 9"),
    "overlap": different({"vocab_start": 8}, "vocab_start and the shards .* overlap at class 8"),
    "vocab_size of one": different({"vocab_size": 16, "weight": None}, "vocab_size, or .*, must be the same"),
    "vocab_size": different({"vocab_size": 18, "weight": None}, "vocab_size, .* must be 17, .* got 18", both=True),
    "length of weight": different({"weight": torch.ones(16)}, "vocab_size, .* must be 17, .* got 16", both=True),
    "no classes": different(NO_CLASSES | {"weight": None}, "at least one", both=True),
    "empty shard": different(NO_CLASSES | {"vocab_start": 18}, "vocab_size, .* must be 9, .* got 17"),
    "empty shard far away": different(
        NO_CLASSES | {"vocab_start": 18}, "vocab_start must be at most 9, vocab_size", function="linear_log_prob"
    ),
    "outputs": different({"outputs": ("lse",)}, "weight, .* outputs", function="linear_log_prob"),
    "columns": different({"case": {"rows": 3}}, "input must have the same number of tokens", function="log_softmax"),
    "function": different({"temperature": 2.0}, "transform must be the same", function="log_softmax"),
    "type of vocab_start": alone({"vocab_start": "9"}, "TypeError: vocab_start must be an int"),
    "negative vocab_start": alone({"vocab_start": -1}, "ValueError: vocab_start must not be negative"),
    "bad temperature": alone({"temperature": -1.0}, "ValueError: temperature must be positive"),
    "bad backend": alone({"backend": "fast"}, "ValueError: backend must be one of"),
    "bad transform": alone({"transform": torch.nn.ReLU()}, "TypeError: transform must be"),
    "bad target": alone({"target": torch.zeros(13, dtype=torch.int32)}, "TypeError: target must be"),
    "shape of target": alone({"target": torch.zeros(12, dtype=torch.int64)}, "ValueError: target must have the shape"),
    "bad chunk_rows": alone({"chunk_rows": 0}, "ValueError: chunk_rows must be"),
    "bad grad_in_forward": alone({"grad_in_forward": 1}, "TypeError: grad_in_forward must be"),
    "bad z_loss": alone({"z_loss": -1.0}, "ValueError: z_loss must be"),
    "bad z_loss_divisor": alone({"z_loss_divisor": "tokens"}, "ValueError: z_loss_divisor must be"),
    "bad vocab_size": alone({"vocab_size": 0}, "ValueError: vocab_size must be"),
    "shape of bias": alone({"linear_bias": torch.zeros(3)}, "ValueError: linear_bias must have shape"),
    "bad token_group": alone({"token_group": "all"}, "TypeError: group must be"),
    "bad outputs": alone({"outputs": "lse"}, "ValueError: outputs must be", function="linear_log_prob"),
    "bad dtype": alone({"dtype": torch.int64}, "TypeError: dtype must be", function="log_softmax"),
    "target of no class": Mistake(
        {"target": torch.full((13,), 17)}, "IndexError: target 17", "IndexError: target 17", both=True
    ),
    "negative target, log p": Mistake(
        {"target": torch.full((13,), -1)}, "IndexError: target -1", "IndexError: target -1", "linear_log_prob", True
    ),
}  # fmt: skip


def test_mistakes_of_a_rank_are_errors_of_all() -> None:
    """At once, and saying what is wrong; the ranks can go on together."""
    wrong = []
    for name, mistake in MISTAKES.items():
        case = CASE._replace(features=0) if mistake.function == "log_softmax" else CASE
        if mistake.function != "linear_cross_entropy":
            case = case._replace(options="mean")
        places = (0, 1) if mistake.both else (1,)
        start = time.monotonic()
        found = ranks.outcomes(2, disagreeing, case, {place: mistake.change for place in places}, mistake.function)
        if time.monotonic() - start > 8:
            wrong.append(f"{name}: it takes {time.monotonic() - start} seconds")
        for rank, (outcome, error) in enumerate(zip(found, (mistake.first, mistake.second), strict=True)):
            if not re.match(error, outcome.error):
                wrong.append(f"{name}: rank {rank} says {outcome.error or outcome.value}, not {error}")
    assert not wrong, "\n".join(wrong)
    first, second = ranks.call(2, disagreeing, CASE, {}, "linear_cross_entropy")
    assert first == second


def test_unchecked_calls_do_not_compare() -> None:
    """With ``check=False`` the ranks may pass different parameters; each rank still finds a shard that does not fit."""
    quiet = {"check": False, "vocab_size": 17}
    first, second = ranks.call(
        2, disagreeing, CASE, {0: quiet, 1: quiet | {"transform": transform_of("plif", 1)}}, "linear_cross_entropy"
    )
    assert first == second
    with ranks.Group(2, group_timeout=3) as group:
        found = group.outcomes(disagreeing, CASE, {0: quiet, 1: quiet | {"vocab_start": 10}}, "linear_cross_entropy")
        assert re.match("ValueError: vocab_start must be between 0 and vocab_size - 8", found[1].error)
        assert found[0].error.startswith("RuntimeError: monosoftmax: the exchange of largest logits")


@pytest.mark.parametrize("how", ["dies", "dies between", "raises", "sleeps"])
def test_a_rank_that_is_gone_ends_the_others(how: str) -> None:
    """Within the timeout of their group, and with an error that says what they waited for."""
    with ranks.Group(2, group_timeout=2) as group:
        start = time.monotonic()
        first, second = group.outcomes(leaving, CASE, how, timeout=20)
        assert time.monotonic() - start < 12
    what = "the gradient of" if how == "dies between" else "facts of a call"
    assert re.match(rf"RuntimeError: monosoftmax: the exchange of {what} .* failed on rank 0 of 2", first.error)
    assert "another rank has failed, is late" in first.error
    assert first.seconds < 6
    assert second.error.startswith({"raises": "KeyError", "sleeps": "RuntimeError: monosoftmax"}.get(how, "died"))


def test_ranks_that_hang_or_die_spoil_no_other_test() -> None:
    """tests/ranks.py ends them, and starts others."""
    start = time.monotonic()
    assert [each.error for each in ranks.outcomes(2, leaving, CASE, "sleeps", timeout=1)] == ["hangs", "hangs"]
    assert ranks.outcomes(2, leaving, CASE, "dies")[1].error == "died"
    with (
        ranks.Group(2, group_timeout=1) as group,
        pytest.raises(AssertionError, match=r"rank 1: KeyError.*\nTraceback"),
    ):
        group.call(leaving, CASE, "raises")
    first, second = ranks.call(2, disagreeing, CASE, {}, "linear_cross_entropy")
    assert first == second
    assert time.monotonic() - start < 12


def test_no_group() -> None:
    logits, target = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"torch\.distributed\.init_process_group"):
        ms.distributed.cross_entropy(logits, target, vocab_start=0)
