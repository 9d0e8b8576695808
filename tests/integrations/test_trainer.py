"""f in transformers.Trainer: its loss, optimiser, callback and metrics; accelerate."""

from __future__ import annotations

import copy
import math
from typing import Any

import accelerate
import pytest
import tiny_models as tiny
import torch
import transformers as tf
from torch import nn
from torch.utils.data import DataLoader

import monosoftmax as ms
from monosoftmax.integrations.transformers import (
    MonotonicAdamW,
    TransformCallback,
    add_transform,
    monotonic_loss,
    token_metrics,
)
from monosoftmax.transforms import PLIF, SigSoftmax


class Texts(torch.utils.data.Dataset):
    """Tokens of different lengths, padded, whose padding is no target."""

    def __init__(self, count: int = 64) -> None:
        self.tokens, self.labels = tiny.batch(count, seed=7)
        for row in range(0, count, 3):
            self.labels[row, row % 7 + 4 :] = -100

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[i], "labels": self.labels[i]}


def train(model: Any, folder: Any, steps: int = 5, **arguments: Any) -> tf.Trainer:
    own = ("callbacks", "optimizer_cls_and_kwargs", "compute_metrics", "compute_loss_func", "optimizers")
    of_trainer = {name: arguments.pop(name) for name in own if name in arguments}
    settings = {
        "max_steps": steps, "per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 1e-2, "seed": 1,
        "report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    trainer = tf.Trainer(
        model,
        tf.TrainingArguments(str(folder), **{**settings, **arguments}),
        train_dataset=Texts(),
        eval_dataset=Texts(10),
        **of_trainer,
    )
    trainer.train()
    return trainer


def losses(trainer: tf.Trainer) -> list[float]:
    return [each["loss"] for each in trainer.state.log_history if "loss" in each]


class ByHand(nn.Module):
    """A model whose loss is that of materialised logits, by the reference backend."""

    # Trainer counts the targets of models that shift them.
    loss_type = "ForCausalLM"

    def __init__(self, plain: Any, f: Any) -> None:
        super().__init__()
        self.plain, self.logit_transform = plain, f

    def forward(self, input_ids: torch.Tensor, labels: Any = None, num_items_in_batch: Any = None, **_: Any) -> Any:
        logits = self.plain(input_ids).logits
        if labels is None:
            return {"logits": logits}
        loss = tiny.loss_by_hand(logits, labels, self.logit_transform)
        count = (labels[:, 1:] != -100).sum()
        return {"loss": loss if num_items_in_batch is None else loss * count / num_items_in_batch, "logits": logits}


@pytest.mark.parametrize("fused", ["train", "never"])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}],
    ids=["at once", "accumulated"],
)
def test_training_is_that_of_materialised_logits(fused: str, arguments: dict[str, Any], tmp_path: Any) -> None:
    plain, model = tiny.pair("gemma2", fused=fused)
    start = copy.deepcopy(model.logit_transform)
    hand = ByHand(plain, copy.deepcopy(start))
    found, wanted = train(model, tmp_path, **arguments), train(hand, tmp_path, **arguments)
    torch.testing.assert_close(losses(found), losses(wanted), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.logit_transform.raw_slope, hand.logit_transform.raw_slope, rtol=1e-4, atol=1e-5)
    assert (model.logit_transform.raw_slope - start.raw_slope).abs().max() > 0.01


def test_label_smoothing_has_f_and_shifted_labels(tmp_path: Any) -> None:
    plain, model = tiny.pair()
    tokens, labels = tiny.batch(4, seed=7)
    for row in range(0, 4, 3):
        labels[row, row % 7 + 4 :] = -100
    trainer = train(model, tmp_path, steps=1, label_smoothing_factor=0.1, train_sampling_strategy="sequential")
    y = ms.transforms.from_dict(model.config.logit_transform)
    y.load_state_dict(tiny.rough().state_dict())
    rows, target = plain(tokens).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    wanted = ms.cross_entropy(rows, target, y, label_smoothing=0.1, backend="reference")
    assert losses(trainer)[0] == pytest.approx(float(wanted), rel=1e-5)
    assert not torch.equal(model.logit_transform.raw_slope, y.raw_slope)


def test_compute_loss_func_gets_f_of_z(tmp_path: Any) -> None:
    def compute_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return tiny.loss_by_hand(outputs.logits, labels, None)

    plain, model = tiny.pair()
    hand = ByHand(plain, copy.deepcopy(model.logit_transform))
    found = train(model, tmp_path, compute_loss_func=compute_loss, callbacks=[TransformCallback()])

    def by_hand(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return tiny.loss_by_hand(outputs["logits"], labels, hand.logit_transform)

    wanted = train(hand, tmp_path, compute_loss_func=by_hand)
    torch.testing.assert_close(losses(found), losses(wanted), rtol=1e-5, atol=1e-6)
    with pytest.raises(TypeError, match="not for Trainer's compute_loss_func"):
        train(tiny.plain(), tmp_path, compute_loss_func=monotonic_loss(tiny.rough()))


@pytest.mark.parametrize("fused", ["train", "never"])
def test_bfloat16(fused: str, tmp_path: Any) -> None:
    _, model = tiny.pair("llama", PLIF(), fused=fused)
    plain = tiny.plain()
    found, wanted = train(model, tmp_path, bf16=True), train(plain, tmp_path, bf16=True)
    assert model.logit_transform.raw_slope.dtype == torch.float32
    assert losses(found)[0] == pytest.approx(losses(wanted)[0], rel=2e-3)
    assert losses(found) == pytest.approx(losses(wanted), rel=2e-2)


def test_groups_of_the_optimizer(tmp_path: Any) -> None:
    _, model = tiny.pair("phi")
    how = {"lr": 1e-2, "transform_lr": 0.05, "weight_decay": 0.1, "betas": (0.9, 0.99)}
    trainer = train(model, tmp_path, optimizer_cls_and_kwargs=(MonotonicAdamW, how), callbacks=[TransformCallback()])
    groups = {group["name"]: group for group in trainer.optimizer.param_groups}
    assert [groups[name]["initial_lr"] for name in ("model", "no_decay", "transform")] == [1e-2, 1e-2, 0.05]
    assert [groups[name]["weight_decay"] for name in ("model", "no_decay", "transform")] == [0.1, 0.0, 0.0]
    assert groups["transform"]["betas"] == (0.9, 0.99)
    assert [id(each) for each in groups["transform"]["params"]] == [id(model.logit_transform.raw_slope)]
    assert {id(model.lm_head.bias), id(model.model.final_layernorm.weight)} <= {
        id(each) for each in groups["no_decay"]["params"]
    }


def test_clipping_apart() -> None:
    _, model = tiny.pair()
    tokens, labels = tiny.batch()
    optimizer = MonotonicAdamW()(model, lr=1e-3, max_grad_norm=1e-3)
    model(tokens, labels=labels).loss.backward()
    optimizer.step()
    f = [each.grad for each in model.logit_transform.parameters()]
    others = [each.grad for name, each in model.named_parameters() if not name.startswith("logit_transform")]
    assert float(nn.utils.get_total_norm(f)) == pytest.approx(1e-3, rel=1e-3)
    assert float(nn.utils.get_total_norm(others)) == pytest.approx(1e-3, rel=1e-3)
    with pytest.raises(ValueError, match="max_grad_norm must be positive"):
        MonotonicAdamW()(model, lr=1e-3, max_grad_norm=0.0)


def test_the_callback_logs_f(tmp_path: Any) -> None:
    _, model = tiny.pair("gemma2")
    trainer = train(model, tmp_path, steps=2, callbacks=[TransformCallback()], logging_steps=2)
    logged = next(each for each in trainer.state.log_history if "loss" in each)
    low, high = logged["transform/logit_min"], logged["transform/logit_max"]
    assert -3 <= low < -0.1 < 0.1 < high <= 3  # in the cap
    assert logged["transform/bound"] == 4.0
    slopes = model.logit_transform.derivative(torch.linspace(low, high, 257))
    assert logged["transform/slope_min"] == pytest.approx(float(slopes.min()))
    assert logged["transform/slope_max"] == pytest.approx(float(slopes.max()))


def closure(model: Any, f: Any) -> Any:
    """What users write: f in the loss of a plain model."""
    loss = ms.MonotonicCrossEntropyLoss(f)

    def compute(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return loss(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    return compute


def test_the_callback_raises_where_f_is_left_out(tmp_path: Any) -> None:
    callbacks = [TransformCallback()]
    with pytest.raises(ValueError, match="has no monosoftmax transform"):
        train(tiny.plain(), tmp_path, callbacks=callbacks, compute_loss_func=closure(None, tiny.rough()))
    # f is in the model, and label smoothing goes around the loss that it is in.
    plain = tiny.plain()
    plain.f = tiny.rough()
    plain.loss_function = monotonic_loss(plain.f)
    with pytest.raises(RuntimeError, match="f got no gradient in the first step"):
        train(plain, tmp_path, callbacks=callbacks, label_smoothing_factor=0.1)
    # An optimizer without f.
    _, model = tiny.pair()
    optimizer = torch.optim.AdamW(model.model.parameters(), lr=1e-3)
    with pytest.raises(ValueError, match="optimizer does not have the parameters of f"):
        train(model, tmp_path, callbacks=callbacks, optimizers=(optimizer, None))
    _, model = tiny.pair()
    with pytest.warns(UserWarning, match=r"the optimizer decays the parameters of f, by 0\.1"):
        train(model, tmp_path, callbacks=callbacks, weight_decay=0.1)
    # f without parameters has nothing to be trained.
    _, model = tiny.pair("llama", SigSoftmax())
    train(model, tmp_path, steps=2, callbacks=callbacks)


@pytest.mark.parametrize("batch", [3, 4])
def test_metrics_without_logits(batch: int, tmp_path: Any) -> None:
    _, model = tiny.pair("gemma2", fused="always")
    trainer = train(model, tmp_path, compute_metrics=token_metrics, per_device_eval_batch_size=batch)
    found = trainer.evaluate()
    texts = Texts(10)
    model.eval()
    with torch.no_grad():
        logits = model(texts.tokens).logits[:, :-1].float()
    log_p, counts = logits.log_softmax(-1), texts.labels[:, 1:] != -100
    target = texts.labels[:, 1:][counts]
    of_target = log_p[counts].gather(1, target[:, None])
    assert found["eval_perplexity"] == pytest.approx(math.exp(-float(of_target.mean())), rel=1e-5)
    assert found["eval_accuracy"] == pytest.approx(float((log_p[counts].argmax(-1) == target).double().mean()))
    entropy = -(log_p.exp() * log_p).sum(-1)[counts]
    assert found["eval_entropy"] == pytest.approx(float(entropy.mean()), rel=1e-5)
    _, with_logits = tiny.pair("llama")
    with pytest.raises(ValueError, match=r"prediction must have log_prob.*fused=\"always\""):
        train(with_logits, tmp_path, steps=1, compute_metrics=token_metrics, eval_strategy="steps", eval_steps=1)


def test_resuming_from_a_checkpoint(tmp_path: Any) -> None:
    def run(folder: Any, steps: int, resume: Any = None) -> Any:
        _, model = tiny.pair("qwen2")
        settings = tf.TrainingArguments(
            str(folder), max_steps=steps, per_device_train_batch_size=4, save_steps=2, logging_steps=1, use_cpu=True,
            report_to="none", disable_tqdm=True, lr_scheduler_type="constant",
        )  # fmt: skip
        how = (MonotonicAdamW, {"lr": 1e-2, "transform_lr": 0.05})
        trainer = tf.Trainer(model, settings, train_dataset=Texts(), optimizer_cls_and_kwargs=how)
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "half", 2)
    resumed = run(tmp_path / "half", 4, resume=True)
    torch.testing.assert_close(resumed.logit_transform.raw_slope, whole.logit_transform.raw_slope, rtol=1e-5, atol=1e-6)
    assert resumed.lm_head.weight is resumed.model.embed_tokens.weight


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision: str, tmp_path: Any) -> None:
    plain, model = tiny.pair()
    f = copy.deepcopy(model.logit_transform)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW(ms.parameter_groups(model, lr=1e-2))
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(Texts(8), batch_size=2))
    for step, batch in enumerate(loader):
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            if step == 0:
                with accelerator.autocast():
                    logits = plain(batch["input_ids"]).logits
                wanted = float(tiny.loss_by_hand(logits, batch["labels"], f))
                assert float(loss) == pytest.approx(wanted, rel=1e-5 if precision == "no" else 1e-2)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    trained = accelerator.unwrap_model(model).logit_transform
    assert not torch.equal(trained.raw_slope, f.raw_slope)
    accelerator.save_state(str(tmp_path))
    value = trained.raw_slope.detach().clone()
    with torch.no_grad():
        trained.raw_slope.zero_()
    accelerator.load_state(str(tmp_path))
    assert torch.equal(trained.raw_slope, value)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    _, model = tiny.pair("qwen2")
    other = copy.deepcopy(model)
    other.gradient_checkpointing_enable({"use_reentrant": reentrant})
    tokens, labels = tiny.batch()
    for each in (model, other):
        each.enable_input_require_grads()
        each(tokens, labels=labels).loss.backward()
    for (name, found), wanted in zip(other.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_add_transform_is_the_whole_change(tmp_path: Any) -> None:
    """At the identity, the training starts as that of the plain model."""
    plain = tiny.plain()
    model = add_transform(copy.deepcopy(plain), "gss")
    found, wanted = losses(train(model, tmp_path, steps=1)), losses(train(plain, tmp_path, steps=1))
    assert found == pytest.approx(wanted, rel=1e-6)
