"""The integrations as a whole: their examples run, they load nothing unasked, their names are those of the README."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers as tf

import monosoftmax as ms

MODULES = [each.name for each in pkgutil.walk_packages(ms.integrations.__path__, "monosoftmax.integrations.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    torch.manual_seed(0)
    module = importlib.import_module(name)
    results = doctest.testmod(
        module, extraglobs={"torch": torch, **vars(ms.transforms), **vars(ms.integrations.transformers)}
    )
    assert results.failed == 0


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_is_loaded_unasked() -> None:
    code = """
        import sys, monosoftmax as ms
        ms.integrations
        assert not {"transformers", "trl", "peft", "accelerate"} & set(sys.modules), sys.modules
        ms.integrations.transformers
        assert "transformers" in sys.modules and "trl" not in sys.modules
    """
    run(code)


@pytest.mark.parametrize("name", ["transformers", "trl"])
def test_a_missing_package_is_named(name: str) -> None:
    code = f"""
        import sys
        sys.modules["{name}"] = None
        import monosoftmax as ms
        try:
            ms.integrations.{name}.enable() if "{name}" == "trl" else ms.integrations.{name}
        except ImportError as error:
            print(error)
    """
    assert f"pip install 'monosoftmax[{name}]'" in run(code)


def test_unknown_names() -> None:
    for module in (ms, ms.integrations, ms.integrations.transformers):
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            module.nothing  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'MonotonicNothing'"):
        ms.integrations.transformers.MonotonicNothing  # noqa: B018
    kind = ms.integrations.transformers.MonotonicLlamaForCausalLM
    assert kind is ms.integrations.transformers.class_for(tf.LlamaForCausalLM)
    assert ms.integrations.transformers.MonotonicLlamaConfig is kind.config_class
