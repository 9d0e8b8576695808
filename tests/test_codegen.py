"""What the kernels compile to for GPUs that are not there: the counting itself, the budgets, and the report of both."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from benchmarks.codegen import peers, sass
from benchmarks.codegen.__main__ import REPORT
from benchmarks.codegen.budgets import SHARED_KIB, judge
from benchmarks.codegen.configurations import (
    ALIGNED,
    HEAD_BACKWARD,
    HEAD_LOSS,
    LOG_SOFTMAX,
    LOG_SOFTMAX_BACKWARD,
    LOSS,
    LOSS_ALL,
    LOSS_INPUT,
    QUICK,
    SHIFTED,
    SLICED,
    STATISTICS,
    TRANSFORMS,
    Configuration,
    configurations,
)
from benchmarks.codegen.measure import Measurement, measure
from benchmarks.codegen.report import count_lines, detail_lines, markdown, peer_lines
from benchmarks.codegen.source_loops import enclosing
from benchmarks.codegen.triton_targets import TARGETS, Compiled, compile_for

LISTING = """\
	.section	.nv.info,"",@"SHT_CUDA_INFO"
        /*0000*/                   IGNORED R0 ;
	.section	.text.kernel,"ax",@progbits
	.sectionflags	@"SHF_BARRIERS=1"
kernel:
	//## File "/a/kernel.py", line 3
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_3) ;
.L_x_0:
	//## File "/a/kernel.py", line 5
        /*0020*/              @!P1 LDG.E.128 R4, desc[UR14][R16.64] ;
        /*0030*/                   FADD R5, R4, R5 ;
.L_x_1:
        /*0040*/                   LDG.E.U16 R6, desc[UR14][R8.64] ;
        /*0050*/                   NOP ;
	//## File "/a/kernel.py", line 6
        /*0060*/               @P2 BRA `(.L_x_1) ;
        /*0070*/                   STG.E.64 desc[UR14][R16.64], R4 ;
	//## File "/a/kernel.py", line 4
        /*0080*/              @!UP0 BRA.U `(.L_x_0) ;
.L_x_3:
        /*0090*/                   REDG.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R5 ;
        /*00a0*/                   EXIT ;
.L_x_2:
        /*00b0*/                   BRA `(.L_x_2);
        /*00c0*/                   NOP;
"""


def test_loops_of_a_listing() -> None:
    function = sass.parse(LISTING)["kernel"]
    (outer,) = function.loops()
    (inner,) = outer.inner
    assert (outer.begin, outer.end, outer.location) == (2, 9, ("/a/kernel.py", 4))
    assert (inner.begin, inner.end, inner.location) == (4, 7, ("/a/kernel.py", 6))


def test_instructions_are_counted_without_padding() -> None:
    function = sass.parse(LISTING)["kernel"]
    assert function.count() == 10  # neither the two NOP, nor the branch to itself
    (outer,) = function.loops()
    trips = {4: 10.0, 6: 3.0}
    # 4 of the outer loop, 2 of the inner one.
    assert function.expected(lambda loop: trips[loop.location[1]] if loop.location else 0, outer) == 4 + 3 * 2
    assert function.expected(lambda loop: trips[loop.location[1]] if loop.location else 0) == 4 + 10 * (4 + 3 * 2)


def test_accesses_of_a_listing() -> None:
    function = sass.parse(LISTING)["kernel"]
    assert [each.access_bytes for each in function.matching(sass.is_global_load)] == [16, 2]
    assert [each.access_bytes for each in function.matching(sass.is_global_store)] == [8]
    assert [each.predicate for each in function.matching(sass.is_global_load)] == ["@!P1", ""]
    assert sum(each.name in sass.ATOMICS for each in function.instructions) == 1
    assert not any(map(sass.is_spill, function.instructions))


def test_listings_that_are_none() -> None:
    with pytest.raises(sass.ListingError, match="no instructions"):
        sass.parse("nvdisasm fatal: no such file")
    with pytest.raises(sass.ListingError, match="a branch to nowhere"):
        sass.parse(LISTING.replace("`(.L_x_1)", "`(.L_x_9)"))["kernel"].loops()


def test_source_loops_that_enclose_a_line() -> None:
    _, first = spilling.fn.__code__.co_firstlineno, spilling.starting_line_number
    path = spilling.fn.__code__.co_filename
    line = next(i for i, text in enumerate(spilling.raw_src) if "for step in range(steps)" in text)
    (found,) = enclosing((path, first + line + 1))
    assert (found.bound, found.line) == ("steps", first + line)
    assert enclosing((path, first)) == []


@triton.jit
def spilling(source, result, steps, SIZE: tl.constexpr):
    """Each thread holds 2 SIZE / 32 (AMD: 64) numbers through a loop."""
    values = tl.load(source + tl.arange(0, SIZE))
    sums = values * 0.0
    for step in range(steps):
        sums = sums * values + step
    tl.store(result + tl.arange(0, SIZE), sums)


@pytest.mark.parametrize("target", TARGETS)
def test_spills_are_seen(target: str) -> None:
    """Where a thread may have few registers."""
    types = {"source": "*fp32", "result": "*fp32", "steps": "i32"}
    few = {"waves_per_eu": 8} if target == "gfx942" else {"maxnreg": 32}
    small, large = (compile_for(spilling, types, {"SIZE": size}, target, num_warps=1, **few) for size in (128, 4096))
    assert small.spills == 0 and large.spills > 0
    assert 0 < small.registers <= large.registers


@pytest.fixture(scope="module")
def quick() -> list[Measurement]:
    """What the ordinary tests compile, and the peers' kernels of the same size."""
    return measure([*QUICK, *_peers()])


def _peers() -> list[peers.Peer]:
    return [*peers.peers(ALIGNED), *peers.peers(SHIFTED)]


def test_budgets(quick: Sequence[Measurement]) -> None:
    verdicts = judge(quick)
    assert {each.configuration for each in quick} >= set(QUICK) and len(verdicts) > len(QUICK)
    assert [str(each) for each in verdicts if not each.kept] == []


def test_peers_take_no_less(quick: Sequence[Measurement]) -> None:
    if not peers.is_installed("liger-kernel"):
        pytest.skip("liger-kernel is not installed: pip install --no-deps -r requirements/peers.txt")
    verdicts = [each for each in judge(quick) if each.reason.startswith("as liger-kernel")]
    assert len(verdicts) >= 12
    assert [str(each) for each in verdicts if not each.kept] == []


def test_report_is_up_to_date(quick: Sequence[Measurement]) -> None:
    """The rows that the ordinary tests compile; :func:`test_whole_report_is_up_to_date` has the others."""
    written = REPORT.read_text(encoding="utf-8").splitlines()
    lines = [*detail_lines(quick), *count_lines(quick), *peer_lines([each for each in quick if _is_peer(each)])]
    assert len(lines) > len(QUICK)
    assert [line for line in lines if line not in written] == [], _STALE


def test_configurations_differ() -> None:
    found = configurations()
    assert len(set(found)) == len(found) and set(QUICK) <= set(found)
    assert {each.transform for each in found if each.operator == LOSS} >= {"identity", "plif-1000", "mlp-8"}


@pytest.mark.parametrize("configuration", SLICED, ids=str)
def test_sliced_logits_are_compiled_for_what_they_are(configuration: Configuration) -> None:
    values = configuration.launch("sm_90").values
    logits, gradient = values["input"], values["grad_input"]
    assert logits.shape[1] == ALIGNED and logits.data_ptr() % 16 == 2 and values["ALIGNMENT"] == "shifted"
    in_place = gradient.data_ptr() == logits.data_ptr()
    assert in_place == (configuration.operator != LOSS_ALL) and values["OUT_ALIGNED"] == in_place


def test_every_launch_is_taken_down() -> None:
    (launch,) = Configuration("plif-64", LOSS).launches("sm_90")
    assert launch.named["maxnreg"] > 0 and launch.values["classes"] == ALIGNED
    (launch,) = Configuration("plif-64", LOSS).launches("gfx942")
    assert "maxnreg" not in launch.named


ONE_WARP = {"fp32": 100, "bf16": 200}


@pytest.mark.parametrize("dtype", ONE_WARP)
@pytest.mark.parametrize("transform", ["identity", "plif-64"])
@pytest.mark.parametrize("operator", [LOSS, LOSS_ALL, STATISTICS, LOG_SOFTMAX, LOG_SOFTMAX_BACKWARD])
def test_lanes_of_a_warp_have_the_same_sums(operator: str, transform: str, dtype: str) -> None:
    """A lane that adds another one's number adds two numbers that have been rounded.

    In a program of one warp nothing else tells the lanes what their sum is: they all add, each with another partner.
    Where a product goes into the addition, one of the two numbers has not been rounded, in each lane the other one.
    """
    options = operator in (LOSS, LOSS_ALL)
    compiled = Configuration(transform, operator, ONE_WARP[dtype], dtype, options).launch("sm_90").compile_for("sm_90")
    assert compiled.num_warps == 1
    _check_exchanged_numbers(compiled)


def test_lanes_of_the_recomputed_head_have_the_same_sums() -> None:
    """Those that share a row: in float32 each has one of its columns in a part."""
    _check_exchanged_numbers(Configuration("identity", HEAD_LOSS, dtype="fp32").launch("sm_90").compile_for("sm_90"))


@pytest.mark.parametrize(("classes", "warps"), [(100, 1), (ALIGNED, 8)])
def test_all_threads_have_read_the_target_before_one_overwrites_it(classes: int, warps: int) -> None:
    """Where the gradient is written over the logits."""
    compiled = Configuration("identity", LOSS_INPUT, classes, "fp32").launch("sm_90").compile_for("sm_90")
    assert compiled.num_warps == warps and compiled.function is not None
    code = compiled.function.instructions
    target, barrier, gradient = (
        [place for place, each in enumerate(code) if each.opcode.startswith(opcode)]
        for opcode in ("LDG.E", "BAR.SYNC", "STG.E.128")
    )
    read = next(place for place in target if code[place].opcode == "LDG.E")
    assert any(read < place < gradient[0] for place in barrier)


def _check_exchanged_numbers(compiled: Compiled) -> None:
    assert compiled.function is not None
    readers = list(_readers_of_exchanged_numbers(compiled.function.instructions))
    for exchange, reader in readers:
        _, received, sent, *_ = _operands(exchange)
        assert reader.name != "FFMA", (exchange, reader)
        if reader.name == "FADD":
            assert sorted(_operands(reader)[1:]) == sorted((received, sent)), (exchange, reader)
    assert sum(reader.name == "FADD" for _, reader in readers) >= 5


def _readers_of_exchanged_numbers(
    instructions: Sequence[sass.Instruction],
) -> Iterator[tuple[sass.Instruction, sass.Instruction]]:
    """The exchanges between lanes, each with the first instruction that reads what it received."""
    for place, exchange in enumerate(instructions):
        if exchange.opcode == "SHFL.BFLY":
            received = _operands(exchange)[1]
            yield exchange, next(each for each in instructions[place + 1 :] if received in _operands(each)[1:])


def _operands(instruction: sass.Instruction) -> list[str]:
    return [re.sub(r"\.reuse$", "", each.strip()) for each in instruction.operands.split(",")]


_ONE_OF_EACH = [each for each in TRANSFORMS if each not in ("plif-4", "plif-50", "plif-1000")]
_WITH_OPTIONS = ["identity", "plif-64", "mlp-8"]


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("transform", "all_options"), [*((each, False) for each in _ONE_OF_EACH), *((each, True) for each in _WITH_OPTIONS)]
)
def test_recomputed_head(transform: str, target: str, all_options: bool) -> None:
    """Every one of them: the report has three."""
    heads = [Configuration(transform, operator, all_options=all_options) for operator in (HEAD_LOSS, HEAD_BACKWARD)]
    verdicts = judge(measure(heads, [target]))
    assert len(verdicts) == 6 and [str(each) for each in verdicts if not each.kept] == []


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("transform", ["identity", "plif-64", "mlp-8", "spline-16"])
def test_recomputed_head_in_float32(transform: str, target: str) -> None:
    """Whose products are not the matrix units' on every target."""
    heads = [Configuration(transform, operator, dtype="fp32") for operator in (HEAD_LOSS, HEAD_BACKWARD)]
    for each in measure(heads, [target]):
        assert each.spills == 0 and each.shared <= SHARED_KIB[target] * 1024


@pytest.mark.slow
def test_whole_report_is_up_to_date() -> None:
    if not all(map(peers.is_installed, peers.PACKAGES)):
        pytest.skip("a package that the report compares with is not installed: see requirements/peers.txt")
    measurements = measure([*configurations(), *_peers()], jobs=2)
    verdicts = judge(measurements)
    assert markdown(measurements, verdicts) == REPORT.read_text(encoding="utf-8"), _STALE
    assert [str(each) for each in verdicts if not each.kept] == []


_STALE = "out of date: python -m benchmarks.codegen triton --write"


def _is_peer(measurement: Measurement) -> bool:
    return isinstance(measurement.configuration, peers.Peer)
