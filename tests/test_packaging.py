"""The package as it is installed: its metadata, its command, and installs with and without a compiler."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

import monosoftmax as ms
import monosoftmax.triton_kernels

ROOT = Path(__file__).parents[1]
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
    assert "torch>=2.9" in metadata.get_all("Requires-Dist")
    for minor in range(10, 14):
        assert f"Programming Language :: Python :: 3.{minor}" in metadata.get_all("Classifier")


def test_triton_kernels_is_a_part_of_the_package() -> None:
    assert Path(monosoftmax.triton_kernels.__file__).parent == ROOT / "triton_kernels"


def test_every_cpp_file_is_built_once() -> None:
    lines = (ROOT / "csrc/sources.txt").read_text(encoding="utf-8").splitlines()
    listed = [line.split()[0] for line in lines if line and not line.startswith("#")]
    assert sorted(listed) == sorted(str(path.relative_to(ROOT / "csrc")) for path in ROOT.glob("csrc/**/*.cpp"))


@pytest.mark.parametrize("build", sorted(ROOT.glob("build/temp*")), ids=lambda build: build.name)
def test_instruction_sets_share_no_code(build: Path) -> None:
    """Of a function that two object files define, the linker keeps one copy, made for the wrong instructions."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    owners: dict[str, list[str]] = {}
    for path in build.glob("row_kernels_*/**/*.o"):
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


def test_info_says_what_is_missing() -> None:
    code = (
        "import runpy, sys; sys.modules['monosoftmax._C'] = None; "
        "runpy.run_module('monosoftmax.info', run_name='__main__', alter_sys=True)"
    )
    text = run("-c", code, CXX="/nonexistent/c++")
    assert "not available  the C++ extension is not built" in text
    assert "not found: there is no /nonexistent/c++" in text


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
    """What ``python *command`` prints with the package in ``site``, blind to a development install."""
    path = os.pathsep.join((str(site), sysconfig.get_path("purelib")))
    return run("-S", *command, cwd=site.parent, PYTHONPATH=path, **environment)


@pytest.mark.slow
def test_sdist_installs_with_the_extension(tree: Path, tmp_path: Path) -> None:
    run("-c", f"import setuptools.build_meta as backend; backend.build_sdist({str(tmp_path)!r})", cwd=tree)
    archive = tmp_path / f"monosoftmax-{ms.__version__}.tar.gz"
    with tarfile.open(archive) as sdist:
        files = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"LICENSE", "Makefile", "CMakeLists.txt", "csrc/sources.txt", "tests/conftest.py"} <= files

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
def test_install_fails_on_an_error_in_our_sources(tree: Path, tmp_path: Path) -> None:
    (tree / "csrc/sources.txt").write_text("bindings.cpp extension\n")
    (tree / "csrc/bindings.cpp").write_text("#error not a program\n")
    output = install(tree, tmp_path / "site", succeeds=False, MONOSOFTMAX_CPP="")
    assert "#error not a program" in output
