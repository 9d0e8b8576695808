"""The package as it is built and installed: metadata, command, with and without a compiler, a CUDA toolkit and a GPU.

Nothing here compiles a CUDA kernel: scripts/check_cuda_build.py does.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import cuda_toolkit
import pytest
import setuptools
import torch
from setuptools.errors import SetupError

import monosoftmax as ms
import monosoftmax.info
import monosoftmax.triton_kernels
from monosoftmax import _installation, row_kernels

ROOT = Path(__file__).parents[2]
LOSS = "import torch, monosoftmax as ms; print(ms.cross_entropy(torch.zeros(1, 2), torch.tensor([0])).item())"


def run(*command: str | Path, cwd: Path = ROOT, succeeds: bool = True, **environment: str) -> str:
    """What ``python *command`` prints on both streams."""
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert (result.returncode == 0) is succeeds, result.stdout
    return result.stdout


def test_metadata_says_what_is_supported() -> None:
    metadata = importlib.metadata.metadata("monosoftmax")
    assert metadata["Version"] == ms.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "torch>=2.10" in metadata.get_all("Requires-Dist")
    for minor in range(10, 14):
        assert f"Programming Language :: Python :: 3.{minor}" in metadata.get_all("Classifier")


def test_triton_kernels_is_a_part_of_the_package() -> None:
    assert Path(monosoftmax.triton_kernels.__file__).parent == ROOT / "triton_kernels"


def test_every_cpp_file_is_built_once() -> None:
    lines = (ROOT / "csrc/sources.txt").read_text(encoding="utf-8").splitlines()
    listed = [line.split()[0] for line in lines if line and not line.startswith("#")]
    files = (path.relative_to(ROOT / "csrc") for path in ROOT.glob("csrc/**/*"))
    assert sorted(listed) == sorted(str(path) for path in files if path.suffix in (".cpp", ".cu"))


@pytest.mark.parametrize("build", sorted(ROOT.glob("build/temp*")), ids=lambda build: build.name)
def test_instruction_sets_share_no_code(build: Path) -> None:
    """Of a function that two object files define, the linker keeps one copy, made for the wrong instructions."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    owners: dict[str, list[str]] = {}
    for path in build.glob("**/row_kernels_*.o"):
        symbols = subprocess.run(["nm", "--defined-only", "-C", path], check=True, capture_output=True, text=True)
        for line in symbols.stdout.splitlines():
            _, kind, name = line.split(maxsplit=2)
            if kind in "WVu" and "monosoftmax" in name and path.name not in owners.setdefault(name, []):
                owners[name].append(path.name)
    assert owners
    assert not {name: files for name, files in owners.items() if len(files) > 1}


@pytest.mark.parametrize("path", sorted(ROOT.glob("requirements/*.txt")), ids=lambda path: path.name)
def test_requirements_are_pinned(path: Path) -> None:
    requirements = [line for line in path.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    assert requirements
    assert [line for line in requirements if "==" not in line.partition(";")[0]] == []


@pytest.mark.skipif(
    os.environ.get("MONOSOFTMAX_CPP") != "1", reason="MONOSOFTMAX_CPP=1 does not insist on the extension"
)
def test_extension_is_built() -> None:
    assert ms.backends.extension is not None, ms.backends.available()["cpu"].detail


@pytest.mark.slow
def test_info_prints_versions_and_backends() -> None:
    text = run("-m", "monosoftmax.info")
    assert ms.__version__ in text
    for name, status in ms.backends.available().items():
        assert any(line.split()[:1] == [name] and line.endswith(status.detail) for line in text.splitlines()), text


def test_info_as_json() -> None:
    info = json.loads(run("-m", "monosoftmax.info", "--json"))
    assert info["monosoftmax"] == ms.__version__
    assert {name: status["available"] for name, status in info["backends"].items()} == {
        name: status.available for name, status in ms.backends.available().items()
    }
    if ms.backends.extension is not None:
        assert info["extension"] == ms.backends.extension.build_info()


@pytest.mark.slow
def test_info_says_what_is_missing() -> None:
    code = (
        "import runpy, sys; sys.modules['monosoftmax._C'] = None; "
        "runpy.run_module('monosoftmax.info', run_name='__main__', alter_sys=True)"
    )
    text = run("-c", code, CXX="/nonexistent/c++")
    assert "not available  the C++ extension is not built" in text
    assert "cuda: not built; cpu: not built" in text
    assert "not found: there is no /nonexistent/c++" in text


INSTALL = "pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps"


@pytest.mark.parametrize(
    ("origin", "source"),
    [
        (None, "monosoftmax"),
        ({"url": "file:///home/me/a%20b", "dir_info": {}}, "file:///home/me/a%20b"),
        ({"url": "https://example.org/monosoftmax-0.1.0.tar.gz", "archive_info": {}}, None),
        (
            {"url": "https://example.org/monosoftmax", "vcs_info": {"vcs": "git", "commit_id": "0a1b"}},
            "git+https://example.org/monosoftmax@0a1b",
        ),
        (
            {"url": "file:///tmp/monosoftmax-0.1.0-cp311-cp311-linux_x86_64.whl", "archive_info": {}},
            "SOURCES, where SOURCES is a checkout or source distribution of monosoftmax",
        ),
    ],
)
def test_advice_names_what_was_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, origin: dict[str, object] | None, source: str | None
) -> None:
    fake_metadata(tmp_path, origin)
    monkeypatch.setattr(_installation, "FOLDER", tmp_path / "monosoftmax")
    assert _installation.checkout() is None
    assert _installation.command() == f"{INSTALL} {source or origin['url']}"


def fake_metadata(site: Path, origin: dict[str, object] | None) -> None:
    """What pip notes in ``site`` about a package that came from ``origin``; None stands for an index."""
    folder = site / f"monosoftmax-{ms.__version__}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: monosoftmax\nVersion: {ms.__version__}\n")
    if origin is not None:
        (folder / "direct_url.json").write_text(json.dumps(origin))


def test_advice_in_a_checkout_keeps_a_development_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert _installation.command() == f"{INSTALL} {shlex.quote(str(ROOT))}"
    fake_metadata(tmp_path, {"url": ROOT.as_uri(), "dir_info": {"editable": True}})
    assert _installation.command() == f"{INSTALL} --editable {shlex.quote(str(ROOT))}"


def test_advice_is_one() -> None:
    assert f"{INSTALL} ." in (ROOT / "README.md").read_text(encoding="utf-8")
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "setup.py", *ROOT.glob("monosoftmax/**/*.py"))]
    assert sum(text.count("--force-reinstall") for text in texts) == 1


def test_extension_that_cannot_be_used_is_built_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> ModuleType:
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(_installation, "import_extension", refuse)
    module, problem = _installation.load_extension()
    assert module is None
    assert problem == f"the C++ extension does not load (undefined symbol: _ZN3c10): {_installation.command()}"
    old = SimpleNamespace(build_info=lambda: {"torch": "1.2.3+cu92"})
    monkeypatch.setattr(_installation, "import_extension", lambda: old)
    module, problem = _installation.load_extension()
    assert module is None
    running = torch.__version__.partition("+")[0]
    expected = f"the C++ extension was built against torch 1.2.3, this is torch {running}: {_installation.command()}"
    assert problem == expected


def test_kernels_for_other_gpus_are_built_again(monkeypatch: pytest.MonkeyPatch) -> None:
    built = {"cuda": "13.0", "cuda_architectures": "9.0"}
    monkeypatch.setattr(row_kernels, "extension", SimpleNamespace(build_info=lambda: built))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    expected = f"this GPU is 7.5: install again with TORCH_CUDA_ARCH_LIST=7.5 {_installation.command()}"
    assert row_kernels.PROBLEMS["cuda"]().endswith(expected)


def test_readme_installs_what_the_build_requires() -> None:
    """An environment may come with a setuptools that is too old."""
    settings, readme = ((ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "README.md"))
    setuptools_, ninja = re.search(r'^requires = \["(setuptools.*?)", "(ninja)"', settings, re.MULTILINE).groups()
    assert f'pip install "{setuptools_}" {ninja}\n' in readme


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """The root of a checkout, with Python files and nothing that was built."""
    root = tmp_path / "a checkout"
    copy_python(ROOT / "monosoftmax", root / "monosoftmax")
    copy_python(ROOT / "triton_kernels", root / "triton_kernels")
    (root / "csrc").mkdir()
    for name in ("csrc/sources.txt", "setup.py"):
        shutil.copy(ROOT / name, root / name)
    return root


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with the package as pip installs it, with the extension of this environment."""
    if ms.backends.extension is None:
        pytest.skip("the extension is not built")
    package = tmp_path / "site/monosoftmax"
    copy_python(ROOT / "monosoftmax", package)
    copy_python(ROOT / "triton_kernels", package / "triton_kernels")
    extension = Path(ms.backends.extension.__file__)
    (package / extension.name).symlink_to(extension)
    # Of an earlier version, in build/.
    (package / "of_yore.py").write_text("")
    return package.parent


def copy_python(source: Path, target: Path) -> None:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.so", "__pycache__"))


@pytest.mark.slow
def test_checkout_works_with_what_is_installed(sources: Path, site: Path) -> None:
    # What another environment built in the checkout is not for this one.
    name = Path(ms.backends.extension.__file__).name
    (sources / "monosoftmax" / name).write_text("not an extension")
    info = json.loads(run_with(site, "-m", "monosoftmax.info", "--json", cwd=sources))
    assert info["folder"] == str(sources / "monosoftmax")
    assert info["extension_file"] == str(site / "monosoftmax" / name)
    assert info["backends"]["cpu"]["available"], info
    text = run_with(site, "-m", "monosoftmax.info", cwd=sources)
    assert f"of the package in {site}/monosoftmax, which has the same Python files" in text
    code = f"import monosoftmax.triton_kernels.transforms as kernels; print(kernels.__file__); {LOSS}"
    output = run_with(site, "-W", "error::UserWarning", "-c", code, cwd=sources)
    assert output.startswith(f"{sources}/triton_kernels/transforms/__init__.py\n0.693")


@pytest.mark.slow
@pytest.mark.parametrize("file", ["monosoftmax/ops.py", "triton_kernels/transforms/plif.py"])
def test_checkout_that_differs_from_what_is_installed(sources: Path, site: Path, file: str) -> None:
    with open(sources / file, "a") as stream:
        stream.write("# another version\n")
    text = run_with(site, "-m", "monosoftmax.info", cwd=sources)
    assert (
        f"not available  the C++ extension is not built in {sources}/monosoftmax, the sources of a checkout, whose "
        f"{file.removeprefix('monosoftmax/')} is not that of the package installed in {site}/monosoftmax: run Python "
        f"in another folder for that one, or install the checkout again: {INSTALL} '{sources}'\n"
    ) in text
    assert "UserWarning: monosoftmax runs the slow reference backend" in run_with(site, "-c", LOSS, cwd=sources)
    assert run_with(site, "-W", "error::UserWarning", "-c", LOSS, cwd=site.parent).startswith("0.693")


@pytest.mark.slow
def test_checkout_without_an_installation(sources: Path) -> None:
    code = "import monosoftmax as ms; print(ms.triton_kernels.__file__, ms.backends.available()['cpu'].detail)"
    expected = (
        f"{sources}/triton_kernels/__init__.py the C++ extension is not built: with a C++ compiler on PATH, {INSTALL}"
    )
    assert run_with(sources, "-c", code, cwd=sources) == f"{expected} '{sources}'\n"


def run_with(site: Path, *command: str, cwd: Path, **environment: str) -> str:
    """What ``python *command`` prints with the packages in ``site``, blind to a development install."""
    path = os.pathsep.join((str(site), sysconfig.get_path("purelib")))
    return run("-S", *command, cwd=cwd, PYTHONPATH=path, **environment)


@pytest.mark.skipif(ms.backends.extension is None, reason="the extension is not built")
def test_build_info_says_whether_cuda_is_built_in() -> None:
    built = ms.backends.extension.build_info()
    if built["cuda"] is None:
        assert built["cuda_problem"]
    else:
        assert built["cuda_architectures"]


@pytest.mark.parametrize(
    ("built", "gpu", "expected"),
    [
        ({"cuda": None, "cuda_problem": "it is Monday"}, False, "not built (it is Monday)"),
        ({"cuda": "13.0", "cuda_architectures": "9.0+PTX"}, False, "built, no device (CUDA 13.0, for 9.0+PTX)"),
        ({"cuda": "13.0", "cuda_architectures": "9.0+PTX"}, True, "built, Some GPU (CUDA 13.0, for 9.0+PTX)"),
    ],
)
def test_info_says_which_kernels_run_here(
    monkeypatch: pytest.MonkeyPatch, built: dict[str, str | None], gpu: bool, expected: str
) -> None:
    extension = SimpleNamespace(
        build_info=lambda: built, cpu_capability=lambda: "avx2", __file__="/site/monosoftmax/_C"
    )
    monkeypatch.setattr(ms.backends, "extension", extension)
    monkeypatch.setattr(ms.backends, "available", dict)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "Some GPU")
    assert f"cuda: {expected}; cpu: avx2" in ms.info.render(ms.info.collect())


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py, imported, blind to what this environment says about compilers and CUDA."""
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX", "MAX_JOBS", "NVCC_CCBIN"):
        monkeypatch.delenv(name, raising=False)
    # Not deleted: what the build puts there is to go after the test.
    for name in ("MONOSOFTMAX_CPP", "MONOSOFTMAX_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(sys, "path", list(sys.path))
    show_gpus(monkeypatch)
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("monosoftmax_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def show_gpus(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    """Has torch find these GPUs, in a build of torch for 7.5 to 12.0."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"])


def fake_torch(cuda: str | None = "13.0", hip: str | None = None) -> object:
    """What cuda_toolkit.py asks torch about CUDA."""
    return SimpleNamespace(
        __version__="2.99.0",
        __file__="/nonexistent/torch/__init__.py",
        version=SimpleNamespace(cuda=cuda, hip=hip),
        cuda=torch.cuda,
    )


def fake_toolkit(
    home: Path,
    version: str = "13.0",
    without: str = "",
    known: str = "75 80 86 89 90 100 103 120",
    compilation: str = "exit 0",
) -> Path:
    """A CUDA toolkit that can tell about itself and compiles nothing; its nvcc."""
    for name in ("bin/nvcc", "include/cuda_runtime.h", "lib/libcudart.so"):
        if name != without:
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_text("")
    architectures = " ".join(f"compute_{each}" for each in known.split())
    (home / "bin/nvcc").write_text(
        f"""#!/bin/sh
        case " $* " in
        *" --version "*) echo "Cuda compilation tools, release {version}, V{version}.88" ;;
        *" --list-gpu-arch "*) printf "%s\\n" {architectures} ;;
        *" --dryrun "*) echo '#$ TOP={home}/bin/..' >&2; echo '#$ INCLUDES="-I{home}/bin/../include"  ' >&2 ;;
        *) {compilation} ;;
        esac
        """
    )
    (home / "bin/nvcc").chmod(0o755)
    return home / "bin/nvcc"


def test_toolkit_is_found_behind_a_wrapper(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As /usr/local/bin/nvcc, a script that calls the nvcc of a toolkit: there are no headers next to the script."""
    nvcc = fake_toolkit(tmp_path / "cuda")
    wrapper = tmp_path / "bin/nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {nvcc} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", str(wrapper.parent), prepend=os.pathsep)
    monkeypatch.setattr(cuda_toolkit, "torch", fake_torch())
    found = cuda_toolkit.find_toolkit([])
    assert (found.home, found.version) == (tmp_path / "cuda", "13.0")
    assert (found.include, found.runtime) == (tmp_path / "cuda/include", tmp_path / "cuda/lib/libcudart.so")
    assert found.architectures == ("7.5", "8.0", "8.6", "9.0", "10.0", "12.0+PTX")


def test_toolkit_is_found_in_wheels(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As pip installs cuda-toolkit[cccl,nvcc], without a libcudart.so; the wheels come before PATH."""
    home = tmp_path / "site-packages/nvidia/cu13"
    fake_toolkit(home, without="lib/libcudart.so")
    (home / "lib").mkdir()
    (home / "lib/libcudart.so.13").write_text("")
    other = fake_toolkit(tmp_path / "cuda")
    monkeypatch.setenv("PATH", str(other.parent), prepend=os.pathsep)
    stand_in = fake_torch()
    stand_in.__file__ = str(tmp_path / "site-packages/torch/__init__.py")
    monkeypatch.setattr(cuda_toolkit, "torch", stand_in)
    found = cuda_toolkit.find_toolkit([])
    assert (found.home, found.runtime) == (home, home / "lib/libcudart.so.13")


@pytest.mark.parametrize(
    "fake",
    [
        (fake_torch(cuda=None), {}, "torch 2.99.0 is a CPU build"),
        (fake_torch(cuda=None, hip="7.1"), {}, "torch 2.99.0 is a build for ROCm"),
        (fake_torch(), {"version": "12.8"}, "is of CUDA 12.8, torch 2.99.0 of CUDA 13.0"),
        (fake_torch(), {"without": "include/cuda_runtime.h"}, "has no cuda_runtime.h"),
        (fake_torch(), {"without": "lib/libcudart.so"}, "has no libcudart.so"),
        (
            fake_torch(),
            {"compilation": "echo >&2 'error: unsupported GNU version!'; exit 1"},
            "with the host compiler 'c++', compiling an empty kernel for 7.5 8.0 8.6 9.0 10.0 12.0+PTX, fails: "
            "error: unsupported GNU version!",
        ),
    ],
    ids=lambda fake: fake[2][:40],
)
def test_build_says_what_is_missing_for_cuda(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: tuple[object, dict[str, str], str]
) -> None:
    stand_in, toolkit, reason = fake
    fake_toolkit(tmp_path / "cuda", **toolkit)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setattr(cuda_toolkit, "torch", stand_in)
    assert reason in find_no_toolkit()


@pytest.mark.parametrize(("gpus", "unknown"), [(((7, 0),), "7.0"), (((6, 1), (9, 0)), "6.1")])
def test_build_says_which_gpu_is_too_old_for_nvcc(
    build: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpus: tuple[tuple[int, int], ...],
    unknown: str,
) -> None:
    fake_toolkit(tmp_path / "cuda")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setattr(cuda_toolkit, "torch", fake_torch())
    show_gpus(monkeypatch, *gpus)
    reason = f"nvcc 13.0 compiles for 7.5 8.0 8.6 8.9 9.0 10.0 10.3 12.0, not for {unknown}: TORCH_CUDA_ARCH_LIST can"
    assert find_no_toolkit().startswith(reason)


def find_no_toolkit() -> str:
    """Why there is no toolkit."""
    with pytest.raises(cuda_toolkit.Unavailable) as raised:
        cuda_toolkit.find_toolkit([])
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_cuda_home_is_taken_at_its_word(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = fake_toolkit(tmp_path / "cuda")
    monkeypatch.setenv("PATH", str(nvcc.parent), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nothing"))
    monkeypatch.setattr(cuda_toolkit, "torch", fake_torch())
    assert re.search(r"no nvcc in the folder bin of CUDA_HOME=.*nothing", find_no_toolkit())


@pytest.mark.parametrize(
    ("listed", "gpus", "known", "expected"),
    [
        ("8.0;9.0+PTX", (), "80 90", "8.0 9.0+PTX"),
        ("10.0+PTX 9.0a;8.0 8.0", (), "80 90 100", "8.0 9.0a 10.0+PTX"),
        ("Ampere", (), "80 86", "8.0 8.6+PTX"),
        ("8.0", ((9, 0),), "80 90", "8.0"),
        ("", (), "75 80 86 89 90", "7.5 8.0 8.6 9.0+PTX"),
        ("", ((9, 0), (8, 9), (9, 0)), "80 89 90", "8.9 9.0+PTX"),
        ("native", ((8, 6),), "80 86 90", "8.6+PTX"),
        # Newer than torch.
        ("", ((12, 1),), "80 90 120", "12.0+PTX"),
    ],
)
def test_architectures(
    build: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    listed: str,
    gpus: tuple[tuple[int, int], ...],
    known: str,
    expected: str,
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    show_gpus(monkeypatch, *gpus)
    listing = "".join(f"compute_{each}\n" for each in known.split())
    chosen, _ = cuda_toolkit.choose_architectures(listing, "13.0")
    assert " ".join(chosen) == expected


@pytest.mark.parametrize(
    ("listed", "reason"),
    [
        ("Hooper", "Unknown CUDA arch (Hooper)"),
        ("8.0,9.0", "Unknown CUDA arch (8.0,9.0)"),
        ("90", "Unknown CUDA arch (90)"),
        ("8.0a", "Unknown CUDA arch (8.0a)"),
        ("9.0+ptx", "Unknown CUDA arch (9.0+ptx)"),
        ("7.0 8.0", "nvcc 13.0 compiles for 8.0 9.0, not for 7.0"),
        ("native", "is native, but torch finds no GPU"),
    ],
)
def test_architectures_that_cannot_be_meant(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: str, reason: str
) -> None:
    """They stop the build, even where CUDA kernels are not insisted on."""
    fake_toolkit(tmp_path / "cuda", known="80 90")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    monkeypatch.setattr(cuda_toolkit, "torch", fake_torch())
    monkeypatch.setattr(build, "examine_machine", lambda: (None, False))
    with pytest.raises(SetupError, match=r"^TORCH_CUDA_ARCH_LIST") as raised:
        build.BuildKernels(setuptools.Distribution()).run()
    assert reason in str(raised.value)
    if "Unknown" in reason:
        assert repr(listed) in str(raised.value)
        assert "it takes compute capabilities such as 8.0;9.0a;10.0+PTX" in str(raised.value)


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"MONOSOFTMAX_CUDA": "yes"}, "MONOSOFTMAX_CUDA must be 0, 1 or unset, got 'yes'"),
        ({"MONOSOFTMAX_CUDA": "1"}, "MONOSOFTMAX_CUDA=1, but the CUDA kernels cannot be built: torch 2.99.0 is a CPU"),
        ({"MONOSOFTMAX_CUDA": "1", "MONOSOFTMAX_CPP": "0"}, "cannot be built: MONOSOFTMAX_CPP=0 says so"),
        ({"MAX_JOBS": "many"}, "MAX_JOBS must be a number from 1 on, got 'many'"),
        ({"MAX_JOBS": "0"}, "MAX_JOBS must be a number from 1 on, got '0'"),
    ],
)
def test_build_refuses_before_it_compiles(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], reason: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cuda_toolkit, "torch", fake_torch(cuda=None))
    monkeypatch.setattr(build, "examine_machine", lambda: (None, False))
    with pytest.raises(SetupError) as raised:
        build.BuildKernels(setuptools.Distribution()).run()
    assert reason in str(raised.value)


@pytest.mark.parametrize(("wish", "reason"), [("", "torch 2.99.0 is a CPU build"), ("0", "MONOSOFTMAX_CUDA=0 said so")])
def test_build_without_cuda_says_why(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, wish: str, reason: str
) -> None:
    monkeypatch.setenv("MONOSOFTMAX_CUDA", wish)
    monkeypatch.setattr(cuda_toolkit, "torch", fake_torch(cuda=None))
    monkeypatch.setattr(build, "examine_machine", lambda: (None, False))
    monkeypatch.setattr(build.BuildExtension, "run", lambda self: None)
    command = build.BuildKernels(setuptools.Distribution())
    command.run()
    assert command.cuda_flags == [f"-DMONOSOFTMAX_CUDA_PROBLEM={build.c_string(reason)}"]
    assert build.BuildKernels.outcome == f"monosoftmax is built for the CPU, without its CUDA kernels: {reason}"


@pytest.fixture
def built(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> setuptools.Extension:
    """The extension as torch's build_ext gets it, with CUDA for 8.0, 9.0a and 10.0+PTX; nothing is compiled."""
    fake_toolkit(tmp_path / "cuda")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a;10.0+PTX")
    monkeypatch.setenv("NVCC_CCBIN", "aarch64-linux-gnu-g++")
    monkeypatch.setenv("MAX_JOBS", "2")
    monkeypatch.setattr(cuda_toolkit, "torch", fake_torch())
    monkeypatch.setattr(build.cpp_extension, "CUDA_HOME", None)
    monkeypatch.setattr(build, "examine_machine", lambda: (None, False))
    monkeypatch.setattr(build.BuildExtension, "run", lambda self: None)
    monkeypatch.setattr(build.BuildExtension, "build_extension", lambda self, extension: None)
    extension = setuptools.Extension("monosoftmax._C", ["csrc/bindings.cpp"], extra_compile_args=["-O3"])
    command = build.BuildKernels(setuptools.Distribution())
    command.use_ninja = True
    monkeypatch.setattr(command, "compile_source", Compilations(extension))
    command.run()
    command.build_extension(extension)
    return extension


class Compilations:
    """Stands in for BuildKernels.compile_source: returns the name of the file, and sees how many run at a time."""

    def __init__(self, extension: setuptools.Extension) -> None:
        self.lock, self.running = threading.Lock(), 0
        extension.most_at_a_time = 0

    def __call__(self, extension: setuptools.Extension, source: tuple[str, tuple[str, ...]]) -> str:
        assert extension.extra_compile_args["cxx"] == ["-O3", "-fopenmp"]
        with self.lock:
            self.running += 1
            extension.most_at_a_time = max(extension.most_at_a_time, self.running)
        time.sleep(0.05)
        with self.lock:
            self.running -= 1
        return source.file


def test_torch_compiles_what_has_no_flags_of_its_own(build: ModuleType, built: setuptools.Extension) -> None:
    special = [source.file for source in build.sources(cuda=True) if source.flags]
    assert built.extra_objects == special
    assert special[0] == "cpu/row_kernels_default.cpp"
    listed = {source.file for source in build.sources(cuda=True)}
    assert {"bindings.cpp", "cuda/launch.cu", "cuda/operators.cpp"} <= listed
    assert sorted(built.sources) == sorted(f"csrc/{file}" for file in listed.difference(special))


def test_max_jobs_limits_files_with_flags_of_their_own(built: setuptools.Extension) -> None:
    assert 1 <= built.most_at_a_time <= 2


def test_extension_is_told_what_is_built_in(built: setuptools.Extension, tmp_path: Path) -> None:
    assert built.extra_compile_args["cxx"] == [
        "-O3",
        "-fopenmp",
        f"-I{tmp_path}/cuda/include",
        "-DMONOSOFTMAX_CUDA",
        '-DMONOSOFTMAX_CUDA_TOOLKIT="13.0"',
        '-DMONOSOFTMAX_CUDA_ARCHITECTURES="8.0 9.0a 10.0+PTX"',
    ]
    assert built.extra_link_args == [f"{tmp_path}/cuda/lib/libcudart.so"]


def test_machine_code_and_ptx_are_asked_of_nvcc(build: ModuleType, built: setuptools.Extension) -> None:
    flags = built.extra_compile_args["nvcc"]
    assert [flag for flag in flags if "gencode" in flag] == [
        "-gencode=arch=compute_100,code=compute_100",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
    ]
    assert flags[: len(build.NVCC_FLAGS)] == build.NVCC_FLAGS
    assert flags[flags.index("-ccbin") + 1] == "aarch64-linux-gnu-g++"
    # torch looks for "arch" in the flags, which this compiler has in its name, and then adds no architectures.
    assert build.cpp_extension._get_cuda_arch_flags(flags) == []


def test_reasons_survive_shell_and_ninja(build: ModuleType) -> None:
    reason = 'nvcc\'s "$PATH" %s `x` \\ fails:\té'
    literal = build.c_string(reason)
    assert ast.literal_eval(literal).encode("latin-1").decode() == reason
    assert not set(literal[1:-1]) & set("\"'$`%\t")


def test_check_of_the_cuda_build_needs_room(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("check_cuda_build", ROOT / "scripts/check_cuda_build.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=7.25e9))
    assert script.main(["--if-possible"]) == 0
    assert capsys.readouterr().out.startswith("skipped: needs 12 GB free, there are 7.2 (")
    assert script.main([]) == 1
    assert capsys.readouterr().out.startswith("failed: needs 12 GB free, there are 7.2 (")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources, without anything that was built."""
    ignore = shutil.ignore_patterns(
        ".git", ".venv*", "build", "results", "*.egg-info", "*.so", "__pycache__", ".*_cache"
    )
    return Path(shutil.copytree(ROOT, tmp_path / "tree", ignore=ignore))


def install(source: Path, site: Path, succeeds: bool = True, **environment: str) -> str:
    """What pip prints when it installs ``source`` into the folder ``site``."""
    options = ("--verbose", "--no-build-isolation", "--no-deps", "--no-index", "--target", site)
    return run("-m", "pip", "install", *options, source, succeeds=succeeds, **environment)


def run_installed(site: Path, *command: str, **environment: str) -> str:
    """What ``python *command`` prints with the package in ``site``, away from a checkout."""
    return run_with(site, *command, cwd=site.parent, **environment)


@pytest.mark.slow
def test_sdist_installs_with_the_extension(tree: Path, tmp_path: Path) -> None:
    run("-c", f"import setuptools.build_meta as backend; backend.build_sdist({str(tmp_path)!r})", cwd=tree)
    archive = tmp_path / f"monosoftmax-{ms.__version__}.tar.gz"
    with tarfile.open(archive) as sdist:
        files = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"LICENSE", "Makefile", "CMakeLists.txt", "RELEASING.md", "tests/conftest.py"} <= files
    assert {str(path.relative_to(tree)) for path in tree.glob("csrc/**/*.*")} <= files
    assert {"scripts/cuda_toolkit.py", "scripts/check_cuda_build.py", "requirements/cuda.txt"} <= files

    site = tmp_path / "site"
    install(archive, site, MONOSOFTMAX_CPP="1")
    assert {path.name for path in site.iterdir()} == {"monosoftmax", f"monosoftmax-{ms.__version__}.dist-info"}
    assert (site / "monosoftmax/py.typed").exists()
    assert (site / "monosoftmax/triton_kernels/transforms/plif.py").exists()
    info = json.loads(run_installed(site, "-m", "monosoftmax.info", "--json"))
    assert info["backends"]["cpu"]["available"], info
    where = "import monosoftmax.triton_kernels as module; print(module.__file__)"
    assert run_installed(site, "-c", where).startswith(str(site))
    assert run_installed(site, "-W", "error::UserWarning", "-c", LOSS).startswith("0.693")


@pytest.mark.slow
def test_advice_builds_again_what_pip_has_in_its_cache(tree: Path, tmp_path: Path) -> None:
    run("-c", f"import setuptools.build_meta as backend; backend.build_sdist({str(tmp_path)!r})", cwd=tree)
    site = tmp_path / "site"
    settings = {"CACHE_DIR": str(tmp_path / "cache"), "FIND_LINKS": str(tmp_path), "NO_INDEX": "1"}
    settings |= {"TARGET": str(site), "UPGRADE": "1"}
    settings = {f"PIP_{name}": value for name, value in settings.items()}
    first = ("-m", "pip", "install", "--no-build-isolation", "--no-deps", "monosoftmax")
    run(*first, cwd=tmp_path, MONOSOFTMAX_CPP="0", **settings)
    info = json.loads(run_installed(site, "-m", "monosoftmax.info", "--json"))
    advice = info["backends"]["cpu"]["detail"].partition("PATH, ")[2]
    assert advice == f"{INSTALL} monosoftmax"
    # A build would fail.
    settings |= {"CXX": "/nonexistent/c++", "MONOSOFTMAX_CPP": "1"}
    words = ["-m", *shlex.split(advice)]
    run(*(word for word in words if word != "--no-cache-dir"), cwd=tmp_path, **settings)
    output = run(*words, cwd=tmp_path, succeeds=False, **settings)
    assert "MONOSOFTMAX_CPP=1, but the C++ extension cannot be built: there is no C++ compiler" in output


@pytest.mark.slow
def test_installs_without_a_compiler(tree: Path, tmp_path: Path) -> None:
    site, no_compiler = tmp_path / "site", {"CXX": "/nonexistent/c++", "MONOSOFTMAX_CPP": ""}
    output = install(tree, site, **no_compiler)
    assert "monosoftmax is installed WITHOUT its C++ extension: there is no C++ compiler '/nonexistent/c++'" in output
    text = run_installed(site, "-m", "monosoftmax.info", **no_compiler)
    assert "not available  the C++ extension is not built" in text
    assert "not found: there is no /nonexistent/c++" in text
    output = run_installed(site, "-c", LOSS)
    assert "UserWarning: monosoftmax runs the slow reference backend" in output
    assert "0.693" in output


@pytest.mark.slow
def test_install_fails_without_a_compiler_that_is_insisted_on(tree: Path, tmp_path: Path) -> None:
    output = install(tree, tmp_path / "site", succeeds=False, CXX="/nonexistent/c++", MONOSOFTMAX_CPP="1")
    assert "MONOSOFTMAX_CPP=1, but the C++ extension cannot be built: there is no C++ compiler" in output


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is a CUDA build")
def test_install_fails_without_cuda_that_is_insisted_on(tree: Path, tmp_path: Path) -> None:
    output = install(tree, tmp_path / "site", succeeds=False, MONOSOFTMAX_CUDA="1")
    assert f"MONOSOFTMAX_CUDA=1, but the CUDA kernels cannot be built: torch {torch.__version__} is a CPU" in output


@pytest.mark.slow
def test_install_fails_on_an_error_in_our_sources(tree: Path, tmp_path: Path) -> None:
    (tree / "csrc/sources.txt").write_text("bindings.cpp extension\n")
    (tree / "csrc/bindings.cpp").write_text("#error not a program\n")
    output = install(tree, tmp_path / "site", succeeds=False, MONOSOFTMAX_CPP="")
    assert "#error not a program" in output
