"""What the CUDA kernels compile to for GPUs that are not there: the counting itself, the budgets, and the report."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.codegen import cuda_command, cuda_source, sass
from benchmarks.codegen.cuda_budgets import INSTRUCTIONS, judge
from benchmarks.codegen.cuda_command import REPORT
from benchmarks.codegen.cuda_configurations import ALIGNED, LOSS, LOSS_ALL, Configuration, configurations
from benchmarks.codegen.cuda_control_flow import ControlFlow, NaturalLoop
from benchmarks.codegen.cuda_devices import DEVICES, SPEEDS
from benchmarks.codegen.cuda_figures import Figures
from benchmarks.codegen.cuda_loops import Kind, check_sources
from benchmarks.codegen.cuda_measure import MAIN_TARGET, QUICK, KernelFacts, Measurement, Measurements, measure
from benchmarks.codegen.cuda_plans import Launch, Plan, PlanRequest, Programs, programs
from benchmarks.codegen.cuda_report import bound_lines, detail_lines, markdown, other_lines
from benchmarks.codegen.cuda_roofline import ISSUE, MEMORY, roofline
from benchmarks.codegen.cuda_source import CSRC
from benchmarks.codegen.cuda_targets import FLAGS, MISSING, compile_source, is_installed, parse_name

needs_nvcc = pytest.mark.skipif(not is_installed(), reason=MISSING)


def flow_of(code: str) -> ControlFlow:
    """The control flow of instructions, a line each, with labels on lines of their own."""
    lines = ['\t.section\t.text.kernel,"ax"', *code.strip().splitlines()]
    listing = []
    for place, line in enumerate(lines):
        text = line.strip()
        is_code = place > 0 and not text.endswith(":")
        listing.append(f"        /*{16 * place:04x}*/  {text} ;" if is_code else text)
    return ControlFlow(sass.parse("\n".join(listing))["kernel"])


def opcodes(flow: ControlFlow, loop: NaturalLoop) -> list[str]:
    return [each.opcode for each in flow.instructions(loop.blocks)]


def test_a_loop_has_the_blocks_that_lie_out_of_line() -> None:
    flow = flow_of("""
        MOV R0, RZ
    .L_0:
        LDG.E.128 R4, [R2]
        @P0 BRA `(.L_rare)
    .L_1:
        FADD R0, R0, R4
        @!P1 BRA `(.L_0)
        EXIT
    .L_rare:
        MUFU.RCP R4, R4
        BRA `(.L_1)
    """)
    (loop,) = flow.loops
    assert opcodes(flow, loop) == ["LDG.E.128", "BRA", "FADD", "BRA", "MUFU.RCP", "BRA"]
    assert flow.count(loop.blocks) == 6 and flow.count(flow.reachable) == 8
    rare = next(each for each in loop.blocks if flow.instructions([each])[0].name == "MUFU")
    assert flow.behind(lambda block: block == rare) == {rare} and flow.can_be_avoided(rare)


NESTED = """
    .L_rows:
        LDG.E R1, [R2]
        @P0 BRA `(.L_end)
    .L_first:
        LDS.128 R4, [R3]
        @P1 BRA `(.L_first)
    .L_second:
        MUFU.EX2 R4, R4
        @!P3 BRA P2, `(.L_out)
    .L_unit:
        FFMA R4, R4, R5, R6
        @P4 BRA `(.L_unit)
        @P5 BRA `(.L_second)
    .L_out:
        STG.E [R2], R4
    .L_end:
        @P6 BRA `(.L_rows)
        EXIT
    .L_called:
        MOV R9, R9
        RET.REL.NODEC R2 `(kernel)
    .L_forever:
        BRA `(.L_forever)
        NOP
"""


def test_loops_are_nested_and_blocks_that_nothing_leads_to_are_in_none() -> None:
    flow = flow_of(NESTED)
    (rows,) = flow.loops
    first, second = rows.inner
    (unit,) = second.inner
    assert opcodes(flow, first) == ["LDS.128", "BRA"] and opcodes(flow, unit) == ["FFMA", "BRA"]
    assert flow.count(second.blocks) == 5 and flow.count(second.own) == 3
    assert [loop.header for loop in rows.flat()] == [first.header, unit.header, second.header, rows.header]
    unreachable = set(range(len(flow.blocks))) - flow.reachable
    assert {each.opcode for each in flow.instructions(unreachable)} == {"MOV", "RET.REL.NODEC", "BRA", "NOP"}


def test_what_every_way_comes_through_cannot_be_avoided() -> None:
    flow = flow_of(NESTED)
    (rows,) = flow.loops
    first, second = rows.inner
    assert flow.dominates(first.header, second.header) and not flow.dominates(second.header, rows.latches[0])
    assert not flow.can_be_avoided(second.header)  # from the first loop on
    assert flow.can_be_avoided(first.header)  # a row may be left out
    assert not flow.can_be_avoided(rows.header)
    # Behind a block lies what only leads on from there: not the end of the row.
    assert rows.latches[0] not in flow.behind(lambda block: block == first.header)
    assert second.header in flow.behind(lambda block: block == first.header)


@pytest.mark.parametrize(
    "branch",
    [
        "BRA.DIV ~URZ, `(.L_0)",
        "BRA.DIV `(.L_0)",
        "BRA.CONV `(.L_0)",
        "BRA !P0, `(.L_0)",
        "@P0 BRA `(.L_0)",
        "@P0 CALL.REL.NOINC `(.L_0)",
        "BRA.U UP0, `(.L_0)",
    ],
)
def test_branches_that_need_not_be_taken(branch: str) -> None:
    flow = flow_of(f".L_0:\nFADD R0, R0, R1\n{branch}\nEXIT")
    (loop,) = flow.loops
    assert loop.blocks == {0} and flow.reachable == {0, 1}


def test_a_call_of_another_function_goes_on_behind_it() -> None:
    flow = flow_of("MOV R0, RZ\nCALL.REL.NOINC `($__internal_0_$__cuda_div)\nFADD R0, R0, R1\nEXIT")
    assert len(flow.blocks) == 1 and flow.loops == ()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("@P0 BRA `(.L_1)\n.L_0:\nFADD R0, R0, R1\n.L_1:\nFADD R1, R0, R1\n@P1 BRA `(.L_0)\nEXIT", "two entries"),
        ("BRX R2 -0x10\nEXIT", "where does BRX"),
        ("BRA `(.L_9)\nEXIT", "a branch to nowhere"),
        ("BSSY B0, `(.L_1)\nBSYNC B0\nEXIT\n.L_1:\nEXIT", "goes on elsewhere"),
    ],
)
def test_control_flow_that_is_not_understood(code: str, message: str) -> None:
    with pytest.raises(sass.ListingError, match=message):
        _ = flow_of(code).loops


def test_inlined_calls_of_a_listing() -> None:
    listing = """\
\t.section\t.text.kernel,"ax",@progbits
\t//## File "/a/memory.cuh", line 7 inlined at "/a/scan.cuh", line 30
\t//## File "/a/scan.cuh", line 30 inlined at "/a/kernel.cuh", line 50
\t//## File "/a/kernel.cuh", line 50
        /*0000*/                   LDG.E.128 R4, [R2] ;
        /*0010*/                   FADD R4, R4, R5 ;
\t//## File "/a/kernel.cuh", line 51
        /*0020*/              @!PT LDS RZ, [RZ] ;
"""
    load, add, nothing = sass.parse(listing)["kernel"].instructions
    assert load.frames == (("/a/memory.cuh", 7), ("/a/scan.cuh", 30), ("/a/kernel.cuh", 50)) == add.frames
    assert (nothing.location, nothing.calls) == (("/a/kernel.cuh", 51), ())
    assert load.has_effect and not nothing.has_effect


SOURCE = """\
void f(int n) {  // for (;;) is a comment
  MONOSOFTMAX_UNROLL for (int i = 0; i < 4; ++i) a(i);
  for (int c = 0; c < n; ++c) {
    if (aligned) {
      store("for (");
    } else {
      MONOSOFTMAX_UNROLL for (int i = 0; i < 4; ++i) to[i] = 0;
    }
    while (2 * step <= n) step *= 2;
  }
  if (blocks == 1) return;
  meet();
}
"""


def test_loops_and_branches_of_a_source() -> None:
    found = cuda_source.scan("a.cuh", SOURCE)
    loops = {each.line: each for each in found.loops}
    assert [(line, each.last_line, each.unrolled) for line, each in sorted(loops.items())] == [
        (2, 2, True), (3, 10, False), (7, 7, True), (9, 9, False),
    ]  # fmt: skip
    assert loops[9].header == "2 * step <= n" and loops[9].conditions == ()
    assert loops[7].conditions == ("!aligned",)
    sides = {each.condition: (each.line, each.last_line) for each in found.branches}
    assert sides == {"aligned": (5, 6), "!aligned": (7, 8), "!blocks == 1": (12, 12)}
    assert found.functions["f"] == ((1, 13),)


def test_names_of_kernels() -> None:
    t = "monosoftmax::cuda::Pack<float, 4>"
    name = parse_name(
        f"void monosoftmax::cuda::cross_entropy_gradient_kernel<monosoftmax::cuda::TableTransform<monosoftmax::Plif, "
        f"{t}, false>, {t}, monosoftmax::cuda::WarpSums<monosoftmax::Plif<{t}, false>, {t} >, __half, false>"
        "(monosoftmax::cuda::CrossEntropyArguments)"
    )
    assert (name.transform, name.width, name.sums, name.element) == ("Plif", 4, "WarpSums", "__half")
    assert name.table_in_shared_memory is False and not name.resident


def test_configurations_differ() -> None:
    found = configurations()
    assert len(set(found)) == len(found)
    assert {each.transform for each in found if each.operator == LOSS} >= {"identity", "plif-5000", "mlp-8"}


def test_sources_have_what_is_looked_for(tmp_path: Path) -> None:
    check_sources(CSRC / "cuda")
    for each in (CSRC / "cuda").glob("*.cuh"):
        text = each.read_text(encoding="utf-8").replace("if (aligned)", "if (same_alignment)")
        folder = tmp_path / "csrc"
        folder.mkdir(exist_ok=True)
        (folder / each.name).write_text(text, encoding="utf-8")
    with pytest.raises(sass.ListingError, match=r"no branches or functions \['!aligned'\] any more"):
        check_sources(tmp_path / "csrc")


def test_compiler_flags_are_those_of_the_extension() -> None:
    tree = ast.parse((CSRC.parent / "setup.py").read_text(encoding="utf-8"))
    (flags,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List) and _assigned(node) == "NVCC_FLAGS"
    )
    # Those for the host compiler, and against macros of torch's, are in sublists.
    assert tuple(each.value for each in flags.elts if isinstance(each, ast.Constant)) == FLAGS


def _assigned(node: ast.Assign) -> str:
    return ast.unparse(node.targets[0])


@pytest.fixture(scope="module")
def helpers() -> Iterator[Programs]:
    if not is_installed():
        pytest.skip(MISSING)
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    with programs() as found:
        yield found


@pytest.mark.parametrize(
    ("target", "launch", "blocks"),
    [
        ("sm_90", Launch(64, 0, 0, 256), 4),  # 65536 registers / (64 * 256)
        ("sm_90", Launch(65, 0, 0, 256), 3),  # allocated by 8 a thread
        ("sm_90", Launch(32, 0, 0, 256), 8),  # 2048 threads
        ("sm_90", Launch(32, 640, 112 * 1024, 256), 2),  # 228 KiB, 1 KiB of each block the driver's
        ("sm_90", Launch(32, 640, 113 * 1024, 256), 1),
        ("sm_90", Launch(32, 640, 227 * 1024, 256), 0),  # more than a block can have
        ("sm_75", Launch(32, 0, 32 * 1024, 256), 2),
        ("sm_86", Launch(32, 0, 49 * 1024, 256), 2),
        ("sm_120", Launch(128, 0, 0, 256), 2),
    ],
)
def test_occupancy(helpers: Programs, target: str, launch: Launch, blocks: int) -> None:
    assert helpers.blocks([launch], DEVICES[target]) == [blocks]


@pytest.mark.parametrize("target", DEVICES)
def test_most_blocks_of_a_multiprocessor(helpers: Programs, target: str) -> None:
    """``cuda_occupancy.h`` knows it itself."""
    device = DEVICES[target]
    assert helpers.blocks([Launch(16, 0, 0, 32)], device) == [device.blocks_of_multiprocessor]
    threads = helpers.blocks([Launch(16, 0, 0, 128)], device)[0] * 128
    assert threads == min(device.threads_of_multiprocessor, device.blocks_of_multiprocessor * 128)


def test_plans(helpers: Programs) -> None:
    """Those of csrc/cuda/plan.cpp: what is tested here is that they arrive."""
    loss = Configuration("identity", LOSS).request
    large = replace(loss, classes=262144, gradient=True)
    once, cluster = helpers.plans([loss, large], "sm_90")
    assert (once.rows, once.sums, once.cluster) == ("once", "none", 1)
    assert (cluster.rows, cluster.team, cluster.cluster > 1) == ("resident", cluster.threads * cluster.cluster, True)
    (again,) = helpers.plans([large], "sm_80")
    assert (again.rows, again.cluster, again.atomic) == ("reread", 1, False)
    (table,) = helpers.plans([PlanRequest("plif", 5000, 8192, ALIGNED, 2, True, True, True)], "sm_90")
    assert (table.sums, table.table_in_shared_memory) == ("warps", False)


@pytest.fixture(scope="module")
def quick() -> Measurements:
    """What the ordinary tests compile."""
    if not is_installed():
        pytest.skip(MISSING)
    return measure([MAIN_TARGET], QUICK)


def test_budgets(quick: Measurements) -> None:
    verdicts = judge(quick)
    assert len(verdicts) > 6 * len(quick.kernels)
    assert [str(each) for each in verdicts if not each.kept] == []


def test_sweeps_of_a_row_on_chip(quick: Measurements) -> None:
    each = next(each for each in quick.configurations if each.configuration == Configuration("plif-64", LOSS_ALL))
    figures = each.figures
    assert [sweep.kind for sweep in figures.sweeps] == [Kind.COPY, Kind.MAXIMUM, Kind.SUM, Kind.GRADIENT]
    assert all(sweep.path <= sweep.static for sweep in figures.sweeps)
    assert figures.main == pytest.approx(sum(sweep.static / sweep.chunks for sweep in figures.sweeps) / 8)
    assert figures.main_path <= figures.main <= figures.all_options
    assert figures.main <= figures.whole and figures.main_path <= figures.whole_path <= figures.whole
    # An exponential for the sum and one for the gradient.
    assert figures.special == 2
    # The row to shared memory, and from it by three sweeps; two look-ups; a load and a store of two sums.
    assert figures.shared_bytes == 4 * 2 + 2 * 4 + 16
    assert (figures.load_bytes, figures.store_bytes) == (16, 16)


def test_every_configuration_is_counted(quick: Measurements) -> None:
    found = [each.configuration for each in quick.configurations]
    assert len(found) == len(set(found)) > 60
    for each in quick.configurations:
        figures = each.figures
        assert 0 < figures.main_path <= figures.main and 0 < figures.whole_path <= figures.whole, each.configuration
        assert figures.load_bytes == 16 and figures.special >= (
            2 if figures.store_bytes and each.plan.rows != "reread" else 1
        )


def test_report_is_up_to_date(quick: Measurements) -> None:
    """The rows that the ordinary tests compile; :func:`test_whole_report_is_up_to_date` has the others."""
    written = REPORT.read_text(encoding="utf-8").splitlines()
    lines = [*detail_lines(quick.configurations), *other_lines(quick.configurations)]
    assert len(lines) == len(quick.configurations)
    assert [line for line in lines if line not in written] == [], _STALE


@needs_nvcc
def test_local_memory_is_seen(tmp_path: Path) -> None:
    source = tmp_path / "spilling.cu"
    source.write_text(
        "namespace monosoftmax::cuda {\n"
        "template <class E> __global__ void scale_kernel(E* x, int n) {\n"
        "  E kept[64];\n"
        "  for (int i = 0; i < 64; ++i) kept[i] = x[i * n];\n"
        "  for (int i = 0; i < n; ++i) x[i] = kept[x[i] > 0 ? i % 64 : (i + 1) % 64];\n"
        "}\n"
        "template __global__ void scale_kernel<float>(float*, int);\n"
        "}\n",
        encoding="utf-8",
    )
    (kernel,) = compile_source(source, MAIN_TARGET)
    assert kernel.stack == 256 and kernel.local_accesses > 0
    assert (kernel.name.kernel, kernel.name.element, str(kernel.name)) == ("scale_kernel", "float", "float: scale")


# Measurements that are made up.


def facts(**changed: object) -> KernelFacts:
    values = {
        "kernel": "Plif: cross entropy gradient, resident, LaneSums", "transform": "Plif", "dtype": "bf16",
        "target": MAIN_TARGET, "registers": 96, "stack": 0, "spills": 0, "local_accesses": 0, "shared": 640,
        "instructions": 2000, "load_bytes": 16, "store_bytes": 16, "async_copies": True,
    }  # fmt: skip
    return KernelFacts(**{**values, **changed})  # type: ignore[arg-type]


def measurement(main: float = 39.0, blocks: int = 1, transform: str = "plif-64") -> Measurement:
    plan = Plan("resident", "lanes", True, False, 132, 1, 224, 220000)
    figures = Figures((), main, main - 2, main + 3, main + 1, main + 10, 2, 32, 16, 16)
    return Measurement(Configuration(transform, LOSS_ALL), MAIN_TARGET, plan, 96, 220640, blocks, figures)


def broken(kernels: Sequence[KernelFacts] = (), found: Sequence[Measurement] = ()) -> list[str]:
    return [each.budget for each in judge(Measurements(list(kernels), list(found))) if not each.kept]


@pytest.mark.parametrize(
    ("changed", "budgets"),
    [
        ({}, []),
        ({"spills": 8}, ["spilled bytes"]),
        ({"stack": 16}, ["bytes of stack"]),
        ({"local_accesses": 1}, ["accesses of local memory"]),
        ({"load_bytes": 8}, ["bytes loaded at once of chunks"]),
        ({"store_bytes": 2}, ["bytes stored at once of chunks"]),
        ({"async_copies": False}, ["copies past the registers"]),
        ({"async_copies": False, "target": "sm_75"}, []),
        ({"registers": 129}, ["registers"]),
    ],
)
def test_broken_budgets_of_kernels(changed: dict[str, object], budgets: list[str]) -> None:
    assert broken([facts(target="sm_80"), facts(**changed)]) == budgets


def test_broken_budgets_of_configurations() -> None:
    limit = INSTRUCTIONS[LOSS_ALL]["plif-64"]
    count = "static instructions per element of the main loops"
    assert broken(found=[measurement(limit)]) == ([] if limit <= 40 else [count])
    assert broken(found=[measurement(max(limit, 40.0) + 0.1)]) == [count, count]
    assert broken(found=[measurement(1.0, blocks=0)]) == ["blocks of a multiprocessor"]
    # Of what has no limit, nothing is kept.
    assert broken(found=[measurement(1.0, transform="unknown")]) == [count]


def test_a_broken_budget_is_an_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    main = pytest.importorskip("benchmarks.codegen.__main__", reason="Triton is not installed").main
    for kernels, code in (([facts()], 0), ([facts(spills=4)], 1)):
        found = Measurements(kernels, [])
        monkeypatch.setattr(cuda_command, "measure", lambda *arguments, found=found: found)
        monkeypatch.setattr(cuda_command, "markdown", lambda *arguments: "report")
        assert main(["cuda", "--quick", "--check"]) == code
        assert ("BROKEN Plif" in capsys.readouterr().out) == (code == 1)
    assert main(["cuda", "--quick", "--write"]) == 2


def test_bounds_by_data_sheets() -> None:
    each = measurement()
    bounds = roofline(each.configuration, each.figures, SPEEDS["H100"])
    assert bounds.seconds[MEMORY] == pytest.approx(4 / 3.35e12)
    # 67 TFLOPS are two operations of each lane and clock, in which it issues an instruction.
    assert bounds.seconds[ISSUE] == pytest.approx(37 / (67e12 / 2))
    assert bounds.bound == MEMORY and bounds.of_memory_bandwidth == 1
    slower = roofline(each.configuration, replace(each.figures, main_path=80), SPEEDS["H100"])
    assert slower.bound == ISSUE and slower.of_memory_bandwidth == pytest.approx(4 / 3.35e12 * 67e12 / 2 / 80)


def test_spills_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.codegen.cuda_report.nvcc_version", lambda: "13.0")
    found = Measurements([facts(), facts(spills=12)], [measurement()])
    text = markdown(found, judge(found))
    assert "- Plif: cross entropy gradient, resident, LaneSums (bf16) for sm_90: 12 bytes spilled" in text
    assert len(bound_lines(found.configurations)) == 1


@needs_nvcc
@pytest.mark.slow
def test_whole_report_is_up_to_date() -> None:
    measurements = measure(jobs=2)
    verdicts = judge(measurements)
    assert markdown(measurements, verdicts) == REPORT.read_text(encoding="utf-8"), _STALE
    assert [str(each) for each in verdicts if not each.kept] == []


_STALE = "out of date: python -m benchmarks.codegen cuda --write"
