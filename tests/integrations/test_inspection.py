"""``inspect`` tells right set-ups from wrong ones."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import tiny_models as tiny
import torch
from torch import nn

import monosoftmax as ms
from monosoftmax.integrations.transformers import MonotonicAdamW, inspect, monotonic_loss


def lora(model: Any, **arguments: Any) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **arguments}))


class HeadWithF(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.f(super().forward(input))


def in_the_loss_only() -> Any:
    model = tiny.plain()
    model.f = tiny.rough()
    model.loss_function = monotonic_loss(model.f)
    return model


def not_owned() -> Any:
    model = tiny.plain()
    model.loss_function = monotonic_loss(tiny.rough())
    return model


def owned_and_unused() -> Any:
    model = tiny.plain()
    model.f = tiny.rough()
    return model


def in_the_head() -> Any:
    model = tiny.plain()
    model.lm_head.__class__, model.lm_head.f = HeadWithF, tiny.rough()
    return model


def layer_as_head() -> Any:
    model = tiny.plain()
    model.lm_head = ms.MonotonicSoftmax(32, tiny.VOCABULARY, tiny.rough(), bias=False)
    return model


def with_f(*arguments: Any, **settings: Any) -> Any:
    return tiny.pair(*arguments, **settings)[1]


SAVED = ["logit_transform"]

RIGHT: dict[str, tuple[Any, list[str]]] = {
    "add_transform": (with_f, ["in the loss: yes, fused with the head, as f of z", "trained: yes, in float32"]),
    "a cap of its own": (lambda: with_f("gemma2"), ["as f of 3 tanh(z / 3)"]),
    "never fused": (lambda: with_f("llama", fused="never"), ["in the loss: yes, from logits: fused is never"]),
    "nothing to be trained": (
        lambda: with_f("qwen2", ms.transforms.SigSoftmax()), ["trained: no, f has no parameters"],
    ),
    "LoRA": (lambda: lora(with_f(), modules_to_save=SAVED), ["fused with the head", "modules_to_save.default"]),
    "LoRA on the head": (
        lambda: lora(with_f(), target_modules=["lm_head"], modules_to_save=SAVED), ["from logits: its head is PEFT's"],
    ),
}  # fmt: skip

WRONG: dict[str, tuple[Any, str]] = {
    "plain": (tiny.plain, "LlamaForCausalLM has no f"),
    "in the loss only": (in_the_loss_only, "f is not in the logits"),
    "not owned": (not_owned, "f is no part of the model, so that it is neither trained nor saved"),
    "owned and unused": (owned_and_unused, "f is not in the loss"),
    "in the head": (in_the_head, "the config does not say that there is an f"),
    "a layer as the head": (layer_as_head, "forward(input_ids) raises TypeError"),
    "frozen by LoRA": (lambda: lora(with_f()), 'f is frozen. With PEFT, modules_to_save=["logit_transform"] trains it'),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right(name: str) -> None:
    make, words = RIGHT[name]
    report = inspect(make())
    assert report.startswith("right\n"), report
    assert "in the logits: yes" in report and "in the config: {'type'" in report
    for each in words:
        assert each in report


@pytest.mark.filterwarnings("ignore:.*is frozen")
@pytest.mark.parametrize("name", WRONG)
def test_wrong(name: str) -> None:
    make, words = WRONG[name]
    report = inspect(make())
    assert report.startswith("wrong: ") and words in report.splitlines()[0], report


def test_the_optimizer() -> None:
    model = with_f()
    report = inspect(model, MonotonicAdamW()(model, lr=1e-3, weight_decay=0.1))
    assert report.startswith("right\n") and "group 'transform', lr 0.01, weight decay 0" in report
    report = inspect(model, torch.optim.AdamW(model.parameters(), weight_decay=0.1))
    assert report.startswith("wrong: the optimizer decays f, by 0.1")
    report = inspect(model, torch.optim.AdamW(model.model.parameters()))
    assert report.startswith("wrong: the optimizer does not have f's parameters")


def test_nothing_changes() -> None:
    model = with_f()
    model.model.layers[0].eval()
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    modes = [each.training for each in model.modules()]
    inspect(model)
    assert torch.equal(torch.rand(3), wanted)
    assert [each.training for each in model.modules()] == modes
    assert all(each.grad is None for each in model.parameters())
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        inspect("llama")  # type: ignore[arg-type]
