"""The mistakes of tests/mutations.toml can still be made: ``scripts/mutations.py`` makes them."""

from __future__ import annotations

from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
ROOT = Path(__file__).parents[2]


def test_mistakes_fit_the_sources() -> None:
    mistakes = tomllib.loads((ROOT / "tests/mutations.toml").read_text(encoding="utf-8"))["mutation"]
    assert len({each["name"] for each in mistakes}) == len(mistakes)
    for each in mistakes:
        assert (ROOT / each["file"]).read_text(encoding="utf-8").count(each["old"]) == 1, each["name"]
        for file, _, test in (name.partition("::") for name in each["tests"] if each["kind"] != "cpp"):
            [path] = ROOT.glob(f"tests/**/{file}")
            assert f"def {test}" in path.read_text(encoding="utf-8"), each["name"]
