"""Models of transformers with f in two processes: what one process computes by hand, or an error that says why not."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import integrations_jobs as jobs
import pytest
import ranks
import torch
from integrations_jobs import ROWS, Trained, data, reference, sampled, spread_out
from tiny_models import pair, plain, rough
from torch import Tensor
from transformers import LogitsProcessorList

from monosoftmax.integrations.transformers import AutoMonotonicModelForCausalLM

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="torch has no gloo"
)

FUSED = pytest.mark.parametrize("fused", [True, False], ids=["fused", "logits"])


def trained(job: Any, *arguments: Any, **named: Any) -> Trained:
    """What a job has come to, which all ranks must agree on."""
    run = functools.partial(job, **named)
    run.__name__ = job.__name__  # type: ignore[attr-defined]
    first, second = ranks.call(2, run, *arguments)
    assert first.losses == second.losses
    for name, each in first.moved.items():
        assert torch.equal(each, second.moved[name]), name
    return first


def assert_same(found: Trained, wanted: Trained, gradients: float = 3e-6, moved: float = 5e-4) -> None:
    """``moved`` is rounded to where the parameters are, so that gradients tell more."""
    assert found.losses == pytest.approx(wanted.losses, rel=gradients)
    for of_found, of_wanted, tolerance in (
        (found.gradients, wanted.gradients, gradients),
        (found.moved, wanted.moved, moved),
    ):
        assert of_found.keys() == of_wanted.keys()
        for name, each in of_wanted.items():
            error = float((of_found[name] - each).abs().max() / each.abs().max())
            assert error < tolerance, (name, error)


# --- DDP and FSDP through libraries -----------------------------------------------------------------------------------


@FUSED
@pytest.mark.parametrize("fsdp", [False, True], ids=["DDP", "FSDP2"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_accelerate(name: str, fsdp: bool, fused: bool) -> None:
    found = trained(jobs.by_accelerate, name, fused, fsdp)
    assert found.notes["class"].startswith("FSDPMonotonic" if fsdp else "DistributedDataParallel")
    assert found.notes["has logits"] != fused
    assert_same(found, reference(name))


@pytest.mark.seconds
@FUSED
@pytest.mark.parametrize("fsdp", [False, True], ids=["DDP", "FSDP2"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_trainer(name: str, fsdp: bool, fused: bool) -> None:
    """Batches of each rank and accumulated ones have other numbers of targets; the norm is one of all parameters."""
    found = trained(jobs.by_trainer, name, fused, 2 * ROWS, fsdp=fsdp, clip=1.0)
    assert found.notes["class"].startswith("FSDPMonotonic" if fsdp else "DistributedDataParallel")
    assert_same(found, reference(name, 2 * ROWS, clip=1.0))
    # What the callback logs, also where fully_shard has f.
    low, high, smallest, largest = found.notes["logged"]
    assert low < -0.5 < 0.5 < high and 0 < smallest < 1 < largest


def test_the_callback_notices_an_f_that_differs() -> None:
    for message in ranks.call(2, jobs.f_of_each_rank):
        assert message.startswith("f differs between ranks: its gradient is not reduced")


@pytest.mark.seconds
def test_smoothed_labels_of_trainer_and_fsdp() -> None:
    """Trainer shifts labels for the names of classes that it knows; FSDP renames the class."""
    found = trained(jobs.by_trainer, "llama", True, fsdp=True, smoothing=0.2)
    assert_same(found, reference("llama", smoothing=0.2))


# --- fully_shard ------------------------------------------------------------------------------------------------------


@FUSED
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("llama", "root"),
        ("llama", "layers"),
        ("llama", "head"),
        ("llama", "layers, norm and head"),
        ("llama", "f alone"),
        ("llama", "layers, norm and head, f alone"),
        ("qwen2", "layers"),
        ("qwen2", "f alone"),
        # With a cap, and with a scale.
        ("gemma2", "f alone"),
        ("granite", "layers, norm and head, f alone"),
    ],
)
def test_fully_shard(name: str, layout: str, fused: bool) -> None:
    found = trained(jobs.by_fully_shard, layout, name, fused)
    assert found.notes["has logits"] != fused
    assert_same(found, reference(name))


def test_head_and_f_in_one_unit() -> None:
    """f's call ends the unit, which shards the head's weight before a fused loss could read it."""
    found = trained(jobs.by_fully_shard, "head and f", "llama", None)
    assert found.notes["has logits"]
    assert_same(found, reference("llama"))


@pytest.mark.seconds
@FUSED
@pytest.mark.parametrize("alone", [True, False], ids=["f alone", "f in the root"])
def test_bfloat16_of_fully_shard(alone: bool, fused: bool) -> None:
    """f is rounded with the unit that it is in; alone it is not. What the optimiser has is float32 in any case."""
    found = trained(jobs.by_fully_shard, "f alone" if alone else "root", "llama", fused, half=True)
    assert found.notes["f in forward"] == {torch.float32 if alone else torch.bfloat16}
    assert found.notes["parameters"] == {torch.float32}
    wanted = reference("llama", half="weights" if alone else "all")
    assert found.losses == pytest.approx(wanted.losses, rel=1e-3)
    for name, each in wanted.gradients.items():
        assert float((found.gradients[name] - each).abs().max() / each.abs().max()) < 0.03, name


def test_f_left_out_of_fsdp() -> None:
    for found in ranks.call(2, jobs.words_of_errors):
        assert (
            "RuntimeError: fully_shard shards LlamaForCausalLM without its logit_transform.raw_slope"
            in (found["left out"])
        )
        assert "call fully_shard(model.logit_transform)" in found["left out"]
        assert found["left out, evaluation"] == found["left out, frozen"] == ""
        assert "NotImplementedError" in found["one unit"] and "in one unit with logit_transform" in found["one unit"]
        assert "ValueError: model must get its transform before fully_shard has it" in found["afterwards"]


def test_evaluation_before_a_step() -> None:
    """A head that stays whole after an evaluation would be the one of before the step in the next loss."""
    for found in ranks.call(2, jobs.after_evaluation):
        assert found == pytest.approx(reference("llama").losses[1], rel=1e-6)


# --- samples ----------------------------------------------------------------------------------------------------------


def samples_by_hand(name: str, prompt: Tensor, new: int = jobs.NEW_TOKENS) -> list[Tensor]:
    """Greedy, and sampled, of a model without f and f of its logits."""
    model, f = plain(name).eval(), spread_out()
    processor = LogitsProcessorList([lambda _, z: f(z)])
    found = [sampled(model, prompt, new, sample=each, logits_processor=processor) for each in (False, True)]
    assert not torch.equal(found[1], sampled(model, prompt, new, sample=True)), "f makes no difference"
    return found


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("name", "layout"), [("llama", "layers, norm and head"), ("llama", "f alone"), ("qwen2", "layers")]
)
def test_samples_of_fsdp(name: str, layout: str) -> None:
    """Ranks with another number of tokens wait for each other."""
    for rank, found in enumerate(ranks.call(2, jobs.sharded_samples, name, layout)):
        wanted = samples_by_hand(name, data()[0][:2, : 5 - rank], jobs.NEW_TOKENS - 4 * rank)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


# --- loaded in parts --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folders of a model without f, and with f."""

    @functools.cache
    def of(name: str, transform: Any = rough) -> tuple[str, str]:
        folder = tmp_path_factory.mktemp(name)
        for each, path in zip(pair(name, transform()), ("plain", "with_f"), strict=True):
            each.save_pretrained(folder / path)
        return str(folder / "plain"), str(folder / "with_f")

    return of


def assert_saved(folder: Path, found: Trained, name: str) -> None:
    """One process reads what the ranks have saved."""
    again = AutoMonotonicModelForCausalLM.from_pretrained(folder)
    for (label, after), (_, before) in zip(again.named_parameters(), pair(name)[1].named_parameters(), strict=True):
        assert torch.equal(after, before + found.moved[label]) or torch.allclose(after - before, found.moved[label])


@pytest.mark.seconds
@pytest.mark.parametrize("given", [False, True], ids=["saved with f", "plain checkpoint"])
@FUSED
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])
def test_tensor_parallelism(name: str, fused: bool, given: bool, checkpoints: Any, tmp_path: Path) -> None:
    path = checkpoints(name)[0 if given else 1]
    found = trained(jobs.by_parts, path, str(tmp_path / "saved"), "tp", given, fused)
    assert found.notes["placements"] == "(Shard(dim=0),)"
    assert_same(found, reference(name))
    z, f = plain(name).eval()(data()[0][:ROWS]).logits.detach(), rough()
    assert torch.allclose(found.notes["logits"], f(z), atol=5e-6)
    assert found.notes["range"] == pytest.approx([float(z.min()), float(z.max())], rel=1e-5)
    assert_saved(tmp_path / "saved", found, name)


@pytest.mark.parametrize("how", ["tp", "fsdp"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])
def test_samples_of_parts(name: str, how: str, checkpoints: Any) -> None:
    wanted = samples_by_hand(name, data()[0][:2, :5])
    for found in ranks.call(2, jobs.samples_in_parts, checkpoints(name, spread_out)[1], how):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@FUSED
def test_fsdp_of_parts(fused: bool, checkpoints: Any, tmp_path: Path) -> None:
    """The layout that transformers has for FSDP: layers, the norm with the head, the rest with f."""
    found = trained(jobs.by_parts, checkpoints("llama")[1], str(tmp_path), "fsdp", False, fused)
    assert found.notes == {"class": "FSDPMonotonicLlamaForCausalLM", "has logits": not fused}
    assert_same(found, reference("llama"))
    assert_saved(tmp_path, found, "llama")


def test_fsdp_of_parts_of_a_plain_checkpoint(checkpoints: Any) -> None:
    for words in ranks.call(2, jobs.words_of_plain_parts, checkpoints("llama")[0]):
        assert "before fully_shard" in words and "save_pretrained" in words


# --- DeepSpeed --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_zero_3(name: str) -> None:
    """Its head's weight is gathered within the head only, so that the loss is one of logits."""
    found = trained(jobs.by_deepspeed, name)
    assert found.notes["has logits"]
    assert_same(found, reference(name))
