"""What the kernels compile to for GPUs that are not there: machine code, budgets, and rows of the reports.

``make codegen`` compiles all kernels. Here it is a few of them, in slow tests some more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import torch
import triton
import triton.language as tl

from benchmarks.codegen import budgets, command, cubin, cuda_compiler, report, triton_compiler
from benchmarks.codegen import triton_calls as calls
from benchmarks.codegen.figures import AMD, DEVICES, Figures, Kernel, Measurement, blocks_at_once, of_nvidia
from benchmarks.engine.experiment import ExperimentError

needs_nvcc = pytest.mark.skipif(cuda_compiler.find_nvcc() is None, reason=cuda_compiler.MISSING)

LISTING = """\
	.section	.nv.info,"",@"SHT_CUDA_INFO"
        /*0000*/                   IGNORED R0 ;
	.section	.text.kernel,"ax",@progbits
	.sectionflags	@"SHF_BARRIERS=1"
kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/              @!P1 LDG.E.128 R4, desc[UR14][R16.64] ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR14][R16.64] ;
        /*0030*/              @!PT LDS RZ, [RZ] ;
        /*0040*/                   LDG.E.U16 R6, desc[UR14][R8.64] ;
        /*0050*/                   LDG.E R7, desc[UR14][R8.64] ;
        /*0060*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0070*/                   STG.E.64 desc[UR14][R16.64], R4 ;
        /*0080*/                   STL.64 [R1+0x8], R4 ;
        /*0090*/               @P0 BRA `(.L_x_0) ;
        /*00a0*/                   REDG.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R5 ;
        /*00b0*/                   NOP;
"""


def test_figures_of_a_listing() -> None:
    (code,) = cubin.parse_listing(LISTING).values()
    assert code[1] == cubin.Instruction("LDG.E.128", "R4, desc[UR14][R16.64]", "@!P1")
    figures = of_nvidia(cubin.Program(40, 16, 8, 2048, tuple(code)), "sm_90", 256)
    assert figures.loads == ((16, 2), (4, 1), (2, 1)) and figures.stores == ((8, 1),)
    assert [figures.value(name) for name in ("wide_loads", "single_loads", "wide_stores", "code")] == [2, 1, 0, 10]
    assert (figures.async_copies, figures.atomics, figures.matrix, figures.products) == (1, 1, ("HGMMA",), 1)
    # Neither the instruction that no thread executes nor the padding.
    assert (figures.local, figures.local_accesses) == (24, 1)
    # The driver's part is none of the kernel's.
    assert figures.shared == 1024 and of_nvidia(cubin.Program(40, 0, 0, 2048, ()), "sm_80", 256).shared == 2048


def test_what_cannot_be_read() -> None:
    with pytest.raises(cubin.ToolError, match="no instructions"):
        cubin.parse_listing("nvdisasm fatal: no such file")
    with pytest.raises(cubin.ToolError, match="not the name"):
        cuda_compiler.parse_name("void other::kernel<float>(int)")


@pytest.mark.parametrize(
    ("target", "registers", "shared", "threads", "blocks"),
    [
        ("sm_90", 64, 0, 256, 4),  # 65536 registers / (64 * 256)
        ("sm_90", 73, 0, 128, 6),  # allocated by 8 a thread, to 24 warps
        ("sm_90", 32, 0, 256, 8),  # 2048 threads
        ("sm_90", 32, 640 + 112 * 1024, 256, 2),  # 228 KiB, 1 KiB of each block the driver's
        ("sm_90", 32, 640 + 227 * 1024, 256, 0),  # more than a block can have
        ("sm_75", 32, 32 * 1024, 256, 2),
        ("sm_120", 176, 0, 288, 0),  # 2 warps in each of 4 parts
    ],
)
def test_blocks_of_a_multiprocessor(target: str, registers: int, shared: int, threads: int, blocks: int) -> None:
    assert blocks_at_once(DEVICES[target], registers, shared, threads) == blocks


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        (
            "void @cross_entropy_gradient_kernel<@TableTransform<monosoftmax::Plif, @Pack<float, 4>, false>, @Pack"
            "<float, 4>, @WarpSums<monosoftmax::Plif<@Pack<float, 4>, false>, @Pack<float, 4> >, __half, false>(@A)",
            ("Plif", "cross entropy gradient", "fp16", "reread, WarpSums, table in global memory"),
        ),
        (
            "void @cross_entropy_gradient_kernel<@VectorTransform<monosoftmax::Gss, @Pack<float, 4> >, "
            "@Pack<float, 4>, @NoSums, float, true>(@A)",
            ("Gss", "cross entropy gradient", "fp32", "resident, NoSums"),
        ),
        ("@(anonymous namespace)::plif_coefficients_kernel(@A)", ("", "plif coefficients", "", "")),
    ],
)
def test_names_of_cuda_kernels(name: str, kernel: tuple[str, ...]) -> None:
    assert cuda_compiler.parse_name(name.replace("@", "monosoftmax::cuda::")) == Kernel("cuda", *kernel)


def test_what_is_compiled() -> None:
    work = triton_compiler.work()
    assert len(set(work)) == len(work) and {kernel for kernel, _ in work} == set(calls.kernels())
    met = {(kernel.transform, target) for kernel, target in work}
    assert met == {(transform, target) for transform in calls.TRANSFORMS for target in triton_compiler.TARGETS}
    assert {target for kernel, target in work if kernel == HEAD} == set(triton_compiler.TARGETS)
    assert {source for source, target in cuda_compiler.work() if target == "sm_90"} == set(cuda_compiler.sources())
    assert {target for _, target in cuda_compiler.work()} == set(cuda_compiler.TARGETS)


def test_budgets_name_what_there_is() -> None:
    operators = {each.operator for each in calls.kernels()}
    for each in budgets.BUDGETS:
        if each.compiler == "triton":
            assert set(each.operators) <= operators and set(each.transforms) <= set(calls.TRANSFORMS), each
        assert isinstance(FIGURES.value(each.figure), int), each
    # No kernel over rows is without limits of its loads and registers.
    for one in calls.kernels():
        figures = {each.figure for each in budgets.BUDGETS if each.takes(Measurement(one, "sm_90", FIGURES))}
        assert figures >= {"local", "blocks"}
        over_rows = one.operator not in (*calls.HEADS, calls.COEFFICIENTS, calls.COEFFICIENTS_BACKWARD)
        assert not over_rows or "wide_loads" in figures, one


FIGURES = Figures(
    registers=40, local=0, local_accesses=0, shared=640, threads=256, blocks=2, loads=((16, 4), (2, 1)),
    stores=((16, 2),), async_copies=4, atomics=0, matrix=("HGMMA",), products=4, code=1000,
)  # fmt: skip
TRITON = calls.kernel("plif-64", calls.LOSS_ALL)
HEAD = calls.kernel("plif-64", calls.HEAD_LOSS)
RESIDENT = Kernel("cuda", "Plif", "cross entropy gradient", "bf16", "resident, LaneSums, table in shared memory")


def measurement(kernel: Kernel = TRITON, target: str = "sm_90", **changed: object) -> Measurement:
    return Measurement(kernel, target, replace(FIGURES, **changed))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kernel", "target", "changed", "figure"),
    [
        (TRITON, "sm_100", {"local": 8}, "local"),
        (TRITON, AMD, {"local_accesses": 1}, "local_accesses"),
        (HEAD, "sm_120", {"blocks": 0}, "blocks"),
        (TRITON, "sm_90", {"registers": 129}, "registers"),
        (TRITON, "sm_80", {"loads": ((16, 3), (2, 1))}, "wide_loads"),
        (TRITON, "sm_80", {"loads": ((16, 4), (2, 9))}, "single_loads"),
        (replace(TRITON, variant="V=50257"), "sm_80", {"loads": ((16, 2), (2, 17))}, None),
        (replace(TRITON, variant="sliced"), "sm_80", {"loads": ((16, 1), (2, 17))}, "wide_loads"),
        (replace(TRITON, variant="V=50257"), "sm_80", {"loads": ((16, 2), (2, 18))}, "single_loads"),
        (TRITON, "sm_80", {"stores": ((8, 2),)}, "wide_stores"),
        (TRITON, "sm_80", {"stores": ((16, 2), (2, 8))}, "single_stores"),
        (HEAD, "sm_90", {"products": 0, "matrix": ("HMMA",)}, "products"),
        (HEAD, AMD, {"shared": 65537}, "shared"),
        (RESIDENT, "sm_75", {"registers": 129}, "registers"),
        (RESIDENT, "sm_80", {"async_copies": 0}, "async_copies"),
        (RESIDENT, "sm_75", {"async_copies": 0}, None),
        (RESIDENT, "sm_80", {"shared": 1025}, "shared"),
        (RESIDENT, "sm_80", {"loads": ((8, 4),)}, "wide_loads"),
        (RESIDENT, "sm_80", {"stores": ((16, 1), (2, 26))}, "wide_stores single_stores"),
    ],
)
def test_broken_budgets(kernel: Kernel, target: str, changed: dict[str, object], figure: str | None) -> None:
    found = [each.budget.figure for each in budgets.judge([measurement(kernel, target, **changed)]) if not each.kept]
    assert found == (figure or "").split()


def test_exit_codes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = [measurement()]
    compiler = SimpleNamespace(NAME="triton", TARGETS=("sm_90",), MAIN_TARGET="sm_90", version=lambda: "Triton 0")
    compiler.work = lambda targets: []
    monkeypatch.setattr(command, "import_module", lambda *names: compiler)
    monkeypatch.setattr(command, "measure", lambda *arguments: found)
    monkeypatch.setattr(command, "FOLDER", tmp_path)
    assert command.codegen(("triton",), write=True) == 0
    assert command.codegen(("triton",), check=True) == 0
    found[:] = [measurement(code=1001)]
    assert command.codegen(("triton",), check=True) == 1
    assert "+| plif-64 | loss, d logits, d coefficients |" in capsys.readouterr().out
    # Code of another compiler is another: only budgets hold.
    compiler.version = lambda: "Triton 1"
    assert command.codegen(("triton",), check=True) == 0
    found[:] = [measurement(local=8)]
    assert command.codegen(("triton",), check=True) == 1
    broken = "plif-64: loss, d logits, d coefficients (bf16) for sm_90: local 8, at most 0"
    assert f"BROKEN {broken}" in capsys.readouterr().out
    assert f"- {broken}" in report.markdown(compiler, found, budgets.judge(found))
    with pytest.raises(ExperimentError):
        command.codegen(("triton",), check=True, targets=("sm_90",))


@triton.jit
def spilling(source, result, steps, SIZE: tl.constexpr):
    values = tl.load(source + tl.arange(0, SIZE))
    sums = values * 0.0
    for step in range(steps):
        sums = sums * values + step
    tl.store(result + tl.arange(0, SIZE), sums)


@pytest.mark.parametrize("target", ["sm_90", AMD])
def test_spills_are_seen(target: str) -> None:
    few = {"waves_per_eu": 8} if target == AMD else {"maxnreg": 32}
    x, y = torch.empty(4096), torch.empty(4096)
    small, large = (
        triton_compiler.launches_of(lambda size=size: spilling[(1,)](x, y, 4, SIZE=size, num_warps=1, **few))[0]
        for size in (128, 4096)
    )
    assert small.compile_for(target).figures.local == 0 < large.compile_for(target).figures.local_accesses


@needs_nvcc
def test_local_memory_is_seen(tmp_path: Path) -> None:
    source = tmp_path / "spilling.cu"
    source.write_text(
        "namespace monosoftmax::cuda { template <class E> __global__ void scale_kernel(E* x, int n) {"
        "  E kept[64];"
        "  for (int i = 0; i < 64; ++i) kept[i] = x[i * n];"
        "  for (int i = 0; i < n; ++i) x[i] = kept[x[i] > 0 ? i % 64 : (i + 1) % 64];"
        "} template __global__ void scale_kernel<float>(float*, int); }",
        encoding="utf-8",
    )
    (found,) = cuda_compiler.measure(source, "sm_90")
    assert found.kernel == Kernel("cuda", "", "scale", "fp32")
    assert found.figures.local == 256 and found.figures.local_accesses > 0


@pytest.mark.parametrize("step", [200, pytest.param(12, marks=pytest.mark.slow)])
def test_some_triton_kernels(step: int) -> None:
    """Every so many, and of many also a head for every target."""
    work = triton_compiler.work()
    some = [each for place, each in enumerate(work) if place % step == 0 or (step < 200 and each[0] == HEAD)]
    _check_some(triton_compiler, some)


@needs_nvcc
@pytest.mark.slow
def test_some_cuda_kernels() -> None:
    work = cuda_compiler.work(("sm_90",))
    _check_some(cuda_compiler, [each for each in work if each[0].stem in ("cross_entropy_bfloat16", "launch")])


def _check_some(compiler: Any, work: Sequence[Any]) -> None:
    """They keep the budgets, and are what the report says."""
    found = command.measure(compiler, work)
    verdicts = budgets.judge(found)
    assert len(verdicts) >= 4 * len(found) and [str(each) for each in verdicts if not each.kept] == []
    written = (command.FOLDER / f"{compiler.NAME}.md").read_text(encoding="utf-8")
    if compiler.version() not in written:
        pytest.skip("the report is not of the compiler that is installed")
    lines = [report.detail_line(each) for each in found if each.target == "sm_90"]
    assert lines and [line for line in lines if line not in written] == [], "python -m benchmarks codegen --write"
