"""Where this package was imported from, what it lacks there, and what to type to install it again.

Python looks into the current folder before any other, and the root of a checkout holds ``monosoftmax/``: the sources,
without what an installation adds to them, the extension ``_C`` and the Triton kernels as
``monosoftmax.triton_kernels``. A development install adds both. Without one they are found from here: the Triton
kernels beside ``monosoftmax/``; the extension in the package that is installed, if that has the same Python files.
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

#: The extension is built against the torch of the environment, and it is built. pip keeps the wheels that it builds of
#: an archive or a commit, and without --no-cache-dir installs them again for another torch, or after a compiler was
#: installed that was missing: it looks for them by the sources, so that no name of a wheel could tell them apart.
_INSTALL = "pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps"


def checkout() -> Path | None:
    """The root of the checkout, or unpacked archive, whose sources this package is; None for an installed one."""
    return FOLDER.parent if _is_checkout(FOLDER.parent) else None


def command() -> str:
    """What to type to build the package again, and to install it, from where it came from."""
    root, origin = checkout(), _origin()
    if root is not None:
        editable = origin.get("dir_info", {}).get("editable") and origin["url"] == root.as_uri()
        return f"{_INSTALL} {'--editable ' if editable else ''}{shlex.quote(str(root))}"
    # What came from an index has no address.
    source = origin.get("url", "monosoftmax")
    if "vcs_info" in origin:
        source = f"{origin['vcs_info']['vcs']}+{source}@{origin['vcs_info']['commit_id']}"
    elif source.endswith(".whl"):
        source = "SOURCES, where SOURCES is a checkout or source distribution of monosoftmax"
    return f"{_INSTALL} {source}"


def import_extension() -> ModuleType:
    """The extension ``monosoftmax._C``: of the package that is installed rather than one that lies in a checkout.

    Raises:
        ModuleNotFoundError: there is none; :func:`missing_extension` says why.
        ImportError: it does not load.
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
    """Why there is no extension, and what to do about it."""
    spec, different = _installed_extension()
    if spec is None or spec.origin is None:
        return f"the C++ extension is not built: with a C++ compiler on PATH, {command()}"
    return (
        f"the C++ extension is not built in {FOLDER}, the sources of a checkout, whose {different} is not that of the "
        f"package installed in {Path(spec.origin).parent}: run Python in another folder for that one, or install the "
        f"checkout again: {command()}"
    )


def find_triton_kernels() -> None:
    """Makes ``monosoftmax.triton_kernels`` importable where only an installation would."""
    root, name = checkout(), f"{__package__}.triton_kernels"
    if root is None or importlib.util.find_spec(name) is not None:
        return
    spec = importlib.util.spec_from_file_location(name, root / "triton_kernels/__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    setattr(sys.modules[__package__], "triton_kernels", module)  # noqa: B010, mypy knows modules by what is in them


def _is_checkout(folder: Path) -> bool:
    return (folder / "setup.py").is_file() and (folder / "csrc/sources.txt").is_file()


def _origin() -> dict[str, Any]:
    """What pip noted about where the package came from, or nothing."""
    path = [str(FOLDER.parent)] if checkout() is None else sys.path
    for distribution in importlib.metadata.distributions(name=__package__, path=path):
        if text := distribution.read_text("direct_url.json"):
            origin: dict[str, Any] = json.loads(text)
            return origin
    return {}


def _installed_extension() -> tuple[ModuleSpec | None, str]:
    """In a checkout: the extension of the package that another current folder would give, and what differs in that.

    The latter is the first Python file of the checkout that is not there or not the same, if any. What only the other
    package has does not matter: pip installs what earlier versions left in ``build/``.
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
