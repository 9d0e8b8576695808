"""Finds the extension and the Triton kernels of this package, and the command to install the package again.

Python looks into the current folder before any other, and the root of a checkout holds ``monosoftmax/``. These are
the sources only. An installation adds the extension ``_C`` and the Triton kernels, as ``monosoftmax.triton_kernels``.
A development install adds both to the sources. Without it, this module finds the Triton kernels beside
``monosoftmax/``, and the extension in the installed package, if that package has the same Python files.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import shlex
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

#: The folder of this package.
FOLDER = Path(__file__).absolute().parent

#: --no-build-isolation builds the extension against the torch of the environment. --no-cache-dir makes pip build it
#: again. pip keeps the wheels that it builds from an archive or a commit, and finds them by the sources. So it would
#: install an old wheel for another torch, or after a missing compiler was installed.
_INSTALL = "pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps"


def checkout() -> Path | None:
    """The root of the checkout or unpacked archive that contains this package; None for an installed package."""
    return FOLDER.parent if _is_checkout(FOLDER.parent) else None


def command() -> str:
    """The command that builds the package again, from the place that it came from, and installs it."""
    root, origin = checkout(), _origin()
    if root is not None:
        editable = origin.get("dir_info", {}).get("editable") and origin["url"] == root.as_uri()
        return f"{_INSTALL} {'--editable ' if editable else ''}{shlex.quote(str(root))}"
    # A package from an index has no address.
    source = origin.get("url", "monosoftmax")
    if "vcs_info" in origin:
        source = f"{origin['vcs_info']['vcs']}+{source}@{origin['vcs_info']['commit_id']}"
    elif source.endswith(".whl"):
        source = "SOURCES, where SOURCES is a checkout or source distribution of monosoftmax"
    return f"{_INSTALL} {source}"


def import_extension() -> ModuleType:
    """The extension ``monosoftmax._C``. The installed package's extension comes before one that lies in a checkout.

    Raises:
        ModuleNotFoundError: there is no extension; :func:`missing_extension` says why.
        ImportError: the extension does not load.
    """
    name = f"{__package__}._C"
    spec, different = _installed_extension()
    if spec is None or spec.loader is None or different:
        return importlib.import_module(name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module


def load_extension() -> tuple[ModuleType | None, str]:
    """The extension, or None and the reason why it cannot be used."""
    try:
        module = import_extension()
    except ModuleNotFoundError as error:
        if error.name != f"{__package__}._C":
            raise
        return None, missing_extension()
    except ImportError as error:
        return None, f"the C++ extension does not load ({error}): {command()}"
    built, running = module.build_info()["torch"].split("+")[0], torch.__version__.split("+")[0]
    if built.rsplit(".", 1)[0] != running.rsplit(".", 1)[0]:
        return None, f"the C++ extension was built against torch {built}, this is torch {running}: {command()}"
    return module, ""


def missing_extension() -> str:
    """The reason why there is no extension, and the remedy."""
    spec, different = _installed_extension()
    if spec is None or spec.origin is None:
        return f"the C++ extension is not built: with a C++ compiler on PATH, {command()}"
    return (
        f"the C++ extension is not built in {FOLDER}, the sources of a checkout, whose {different} is not that of the "
        f"package installed in {Path(spec.origin).parent}: run Python in another folder for that one, or install the "
        f"checkout again: {command()}"
    )


def find_triton_kernels() -> None:
    """Makes ``monosoftmax.triton_kernels`` importable in a checkout, as an installation does."""
    root, name = checkout(), f"{__package__}.triton_kernels"
    if root is None or importlib.util.find_spec(name) is not None:
        return
    spec = importlib.util.spec_from_file_location(name, root / "triton_kernels/__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    setattr(sys.modules[__package__], "triton_kernels", module)  # noqa: B010, mypy knows modules by their contents


def _is_checkout(folder: Path) -> bool:
    return (folder / "setup.py").is_file() and (folder / "csrc/sources.txt").is_file()


def _origin() -> dict[str, Any]:
    """pip's note on the origin of the package; empty if there is none."""
    path = [str(FOLDER.parent)] if checkout() is None else sys.path
    for distribution in importlib.metadata.distributions(name=__package__, path=path):
        if text := distribution.read_text("direct_url.json"):
            origin: dict[str, Any] = json.loads(text)
            return origin
    return {}


def _installed_extension() -> tuple[ModuleSpec | None, str]:
    """In a checkout: the extension of the package that Python would find in another current folder, and a difference.

    The difference is the first Python file of the checkout that the other package lacks or has in another version, if
    any. Additional files of the other package do not matter: pip installs files that earlier versions left in
    ``build/``.
    """
    root = checkout()
    if root is None:
        return None, ""
    elsewhere = [each for each in sys.path if not _is_checkout(Path(each))]
    package = PathFinder.find_spec(__package__, elsewhere)
    if package is None or package.origin is None:
        return None, ""
    folder = Path(package.origin).parent
    spec = PathFinder.find_spec(f"{__package__}._C", [str(folder)])
    if spec is None:
        return None, ""
    files = {path.relative_to(FOLDER): path for path in FOLDER.rglob("*.py")}
    files |= {path.relative_to(root): path for path in (root / "triton_kernels").rglob("*.py")}
    for name, path in sorted(files.items()):
        if not (folder / name).is_file() or (folder / name).read_bytes() != path.read_bytes():
            return spec, str(name)
    return spec, ""
