"""f beside a head under PEFT: LoRA on the body and on the head, copies that are trained, merging."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import tiny_models as tiny
import torch
import transformers as tf

import monosoftmax as ms
from monosoftmax.integrations.transformers import AutoMonotonicModelForCausalLM, TransformCallback, add_transform

SAVED = ["logit_transform"]


def wrapped(model: Any, targets: list[str], saved: list[str]) -> Any:
    """``model`` with adapters that do something: those of LoRA start at zero."""
    torch.manual_seed(11)
    found = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, modules_to_save=saved))
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return found


def trained(model: Any, steps: int = 3) -> Any:
    optimizer = torch.optim.AdamW(ms.parameter_groups(model, lr=1e-2, transform_lr=0.05))
    tokens, labels = tiny.batch()
    for _ in range(steps):
        model(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


CASES = {
    "body": (["q_proj", "v_proj"], SAVED),
    "head": (["q_proj", "lm_head"], SAVED),
    "head trained whole": (["q_proj"], [*SAVED, "lm_head"]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_loss_is_that_of_materialised_logits(case: str, name: str) -> None:
    plain, model = tiny.pair(name)
    f = copy.deepcopy(model.logit_transform)
    if case != "body" and name == "gemma2":  # which ties them
        for each in (plain, model):
            each.lm_head.weight = torch.nn.Parameter(each.lm_head.weight.detach().clone())
    targets, saved = CASES[case]
    model = wrapped(model, targets, saved)
    hand = wrapped(plain, targets, [each for each in saved if each != "logit_transform"] or None)
    tokens, labels = tiny.batch()
    found = model(input_ids=tokens, labels=labels)
    wanted = tiny.loss_by_hand(hand(input_ids=tokens).logits, labels, f)
    torch.testing.assert_close(found.loss, wanted, rtol=1e-6, atol=1e-6)
    found.loss.backward()
    wanted.backward()
    gradients = {key: each.grad for key, each in model.named_parameters() if each.grad is not None}
    (of_f,) = [each for key, each in gradients.items() if "logit_transform" in key]
    torch.testing.assert_close(of_f, f.raw_slope.grad, rtol=1e-5, atol=1e-7)
    compared = 0
    for key, each in hand.named_parameters():
        if each.grad is not None:
            torch.testing.assert_close(gradients[key], each.grad, rtol=1e-4, atol=1e-6)
            compared += 1
    assert compared >= 4
    if case != "head":
        assert found.logits is None


@pytest.mark.parametrize("case", CASES)
def test_trained_saved_reloaded_and_merged(case: str, tmp_path: Any) -> None:
    _, model = tiny.pair()
    start = copy.deepcopy(model.logit_transform)
    base = copy.deepcopy(model)
    model = trained(wrapped(model, *CASES[case]))
    active = model.base_model.model.logit_transform.modules_to_save["default"]
    assert (active.raw_slope - start.raw_slope).abs().max() > 0.01
    assert active.raw_slope.dtype == torch.float32
    tokens, _ = tiny.batch()
    model.eval()
    with torch.no_grad():
        wanted = model(input_ids=tokens).logits
        model.save_pretrained(tmp_path / "adapter")
        reloaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        torch.testing.assert_close(reloaded(input_ids=tokens).logits, wanted, rtol=0, atol=0)
        with model.disable_adapter():
            plain = tiny.plain().eval()
            torch.testing.assert_close(model(input_ids=tokens).logits, start(plain(tokens).logits))
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(tokens).logits, wanted, rtol=1e-4, atol=1e-4)
        merged.save_pretrained(tmp_path / "merged")
        again = AutoMonotonicModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(again(tokens).logits, wanted, rtol=1e-4, atol=1e-4)


def test_a_tied_head_under_lora() -> None:
    """PEFT adds to the head only, so that it is no longer the embedding; the loss follows the logits."""
    _, model = tiny.pair("qwen2")
    f = copy.deepcopy(model.logit_transform)
    plain = wrapped(tiny.plain("qwen2"), ["lm_head"], None)
    model = wrapped(model, ["lm_head"], SAVED)
    tokens, labels = tiny.batch()
    wanted = tiny.loss_by_hand(plain(input_ids=tokens).logits, labels, f)
    torch.testing.assert_close(model(input_ids=tokens, labels=labels).loss, wanted, rtol=1e-6, atol=1e-6)


def test_f_without_modules_to_save_is_told() -> None:
    _, model = tiny.pair()
    model = wrapped(model, ["q_proj"], None)
    tokens, labels = tiny.batch()
    with pytest.warns(UserWarning, match=r'modules_to_save=\["logit_transform"\] trains it'):
        model(input_ids=tokens, labels=labels)


def test_f_comes_before_peft() -> None:
    model = wrapped(tiny.plain(), ["q_proj"], None)
    with pytest.raises(TypeError, match="give the model its f before PEFT wraps it"):
        add_transform(model, tiny.rough())


@pytest.mark.filterwarnings("ignore:.*is frozen")
def test_trainer(tmp_path: Any) -> None:
    def run(saved: Any) -> Any:
        _, model = tiny.pair()
        model = wrapped(model, ["q_proj"], saved)
        tokens, labels = tiny.batch(8)
        rows = [{"input_ids": x, "labels": y} for x, y in zip(tokens, labels, strict=True)]
        settings = tf.TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=4, logging_steps=1, save_strategy="no",
            report_to="none", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = tf.Trainer(model, settings, train_dataset=rows, callbacks=[TransformCallback()])
        trainer.train()
        return trainer

    trainer = run(SAVED)
    active = trainer.model.base_model.model.logit_transform.modules_to_save["default"]
    assert not torch.equal(active.raw_slope, tiny.rough().raw_slope)
    assert "transform/slope_max" in trainer.state.log_history[0]
    frozen = run(None).model.base_model.model.logit_transform
    assert torch.equal(frozen.raw_slope, tiny.rough().raw_slope)
