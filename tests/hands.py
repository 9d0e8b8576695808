"""Tables of the hands that the package gets into, held against what is written in tests/hands.md.

A row is a kind of hand, a column a public function or module on a backend. A cell is "right" where values and gradients
are those of float64, and the name of the error where the call is refused by one that says what to do. WRITE_HANDS=1
writes what is found.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

BACKENDS = ("reference", "cpu", "triton", "cuda")

FILE = Path(__file__).with_name("hands.md")


def on(backend: str) -> AbstractContextManager[Any]:
    """Where ``backend`` runs on CPU tensors: under an emulator, if it is one for GPUs."""
    if backend == "triton":
        from triton_interpreter import interpreting

        return interpreting()
    if backend == "cuda":
        from cuda_host import executing

        return executing()
    return nullcontext()


def outcome(call: Callable[[], None], *refusals: type[Exception], saying: str = ".") -> str:
    """What comes of ``call``, which asserts that its results are right; other errors than ``refusals`` pass through.

    A refusal must say a thing that the regular expression ``saying`` finds, so that not any error is one.
    """
    try:
        call()
    except refusals as error:
        if re.search(saying, str(error)) is None:
            raise
        return type(error).__name__
    return "right"


def check_table(title: str, cells: Mapping[str, Mapping[str, str]]) -> None:
    """The section ``title`` of the file is this table, of rows by columns."""
    columns = list(dict.fromkeys(column for row in cells.values() for column in row))
    lines = [["", *columns], ["---"] * (1 + len(columns))]
    lines += [[name, *(row.get(column, "") for column in columns)] for name, row in cells.items()]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    text = FILE.read_text(encoding="utf-8")
    section = re.compile(rf"(## {re.escape(title)}\n\n)((?:\|.*\n)*)\n?")
    if os.environ.get("WRITE_HANDS") == "1":
        text = section.sub(lambda found: f"{found[1]}{table}\n", text).rstrip("\n") + "\n"
        FILE.write_text(text, encoding="utf-8")
    found = section.search(text)
    assert found is not None, f"{FILE} has no section {title!r}"
    assert found[2] == table
