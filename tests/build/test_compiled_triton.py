"""What the Triton kernels compile to, where that decides whether they are right: seen in machine code, by codegen."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from tiers import mostly_slow

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks.codegen import cubin, triton_compiler
from benchmarks.codegen import triton_calls as calls
from benchmarks.codegen.figures import Figures, Kernel


@pytest.mark.parametrize("operator", [calls.LOSS, calls.LOSS_ALL, calls.LOSS_IN_PLACE])
def test_sliced_logits_are_compiled_for_what_they_are(operator: str) -> None:
    values = triton_compiler.launch_of(calls.kernel("identity", operator, variant=calls.SLICED), "sm_90").values
    logits = values["input"]
    assert logits.shape[1] == calls.ALIGNED and logits.data_ptr() % 16 == 2 and values["ALIGNMENT"] == "shifted"
    in_place = values["grad_input"].data_ptr() == logits.data_ptr()
    assert in_place == (operator != calls.LOSS_ALL) and values["OUT_ALIGNED"] == in_place


_OPERATORS = (calls.LOSS, calls.LOSS_ALL, calls.STATISTICS, calls.LOG_SOFTMAX, calls.LOG_SOFTMAX_BACKWARD)
_KERNELS = [("identity", "bf16"), ("identity", "fp32"), ("plif-64", "fp32")]


@pytest.mark.parametrize(("transform", "dtype"), mostly_slow(_KERNELS, _KERNELS[:1]))
@pytest.mark.parametrize("operator", mostly_slow(_OPERATORS, _OPERATORS[:2]))
def test_lanes_of_a_warp_have_the_same_sums(operator: str, transform: str, dtype: str) -> None:
    """In a program of one warp each lane adds up, with other partners: what it adds must have been rounded before.

    Of a product that is fused with an addition, each lane rounds another one.
    """
    options = calls.ALL_OPTIONS if operator in (calls.LOSS, calls.LOSS_ALL) else ""
    figures = _check_exchanged_numbers(
        calls.kernel(transform, operator, dtype, options), {"fp32": 100, "bf16": 200}[dtype]
    )
    assert figures.threads == 32


def test_lanes_of_the_recomputed_head_have_the_same_sums() -> None:
    """Those that share a row: in float32 each has one of its columns in a part."""
    _check_exchanged_numbers(calls.kernel("identity", calls.HEAD_LOSS, "fp32"), None)


@pytest.mark.parametrize(("classes", "threads"), [(100, 32), pytest.param(calls.ALIGNED, 256, marks=pytest.mark.slow)])
def test_all_threads_have_read_the_target_before_one_overwrites_it(classes: int, threads: int) -> None:
    figures, code = _compiled(calls.kernel("identity", calls.LOSS_INPUT, "fp32"), classes)
    assert figures.threads == threads
    reads = [place for place, each in enumerate(code) if each.opcode == "LDG.E"]
    barriers = [place for place, each in enumerate(code) if each.opcode.startswith("BAR.SYNC")]
    writes = [place for place, each in enumerate(code) if each.opcode.startswith("STG.E.128")]
    assert any(reads[0] < place < writes[0] for place in barriers)


def _compiled(kernel: Kernel, classes: int | None) -> tuple[Figures, Sequence[cubin.Instruction]]:
    with calls.as_on("sm_90", 32):
        (launch,) = triton_compiler.launches_of(calls.call_of(kernel, classes))
    compiled = launch.compile_for("sm_90")
    assert compiled.program is not None
    return compiled.figures, compiled.program.instructions


def _check_exchanged_numbers(kernel: Kernel, classes: int | None) -> Figures:
    """Of what a lane receives, the first reader adds it to what the lane has sent, and rounds nothing else with it."""
    figures, code = _compiled(kernel, classes)
    additions = 0
    for place, exchange in enumerate(code):
        if exchange.opcode != "SHFL.BFLY":
            continue
        _, received, sent, *_ = _operands(exchange)
        reader = next(each for each in code[place + 1 :] if received in _operands(each)[1:])
        assert reader.name != "FFMA", (exchange, reader)
        if reader.name == "FADD":
            assert sorted(_operands(reader)[1:]) == sorted((received, sent)), (exchange, reader)
            additions += 1
    assert additions >= 5
    return figures


def _operands(instruction: cubin.Instruction) -> list[str]:
    return [re.sub(r"\.reuse$", "", each.strip()) for each in instruction.operands.split(",")]
