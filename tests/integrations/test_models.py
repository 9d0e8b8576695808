"""f in models of transformers: losses, gradients, logits, checkpoints; and what is refused."""

from __future__ import annotations

import copy
import io
import logging
import subprocess
import sys
import textwrap

import pytest
import tiny_models as tiny
import torch
import transformers as tf
from torch import nn

import monosoftmax as ms
from monosoftmax.integrations.transformers import (
    AutoMonotonicModelForCausalLM,
    MonotonicHead,
    add_transform,
    class_for,
    monotonic_loss,
    register,
)
from monosoftmax.integrations.transformers.classes import _with_f
from monosoftmax.integrations.transformers.head_tap import Inner, inner_of
from monosoftmax.transforms import PLIF, SoftCap, Temperature

INNER = {
    "gemma2": Inner(1.0, 3.0),
    "granite": Inner(4.0, 0.0),
    "cohere": Inner(0.5, 0.0),
    "falcon_h1": Inner(3.0, 0.0),
}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def assert_same_gradients(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], bound: float) -> None:
    assert set(wanted) <= set(found)
    largest = max(each.abs().max() for each in wanted.values())
    for name, gradient in wanted.items():
        # Those of the biases of keys are zero but for rounding.
        error = (found[name] - gradient).norm() / max(gradient.norm(), 1e-4 * largest)
        assert error <= bound, (name, error)


@pytest.mark.parametrize("name", tiny.MODELS)
@pytest.mark.parametrize("fused", ["train", "never"])
def test_loss_and_gradients_are_those_of_materialised_logits(name: str, fused: str) -> None:
    plain, model = tiny.pair(name, fused=fused)
    tokens, labels = tiny.batch()
    f = copy.deepcopy(model.logit_transform)
    output = plain(tokens, labels=labels)
    # What a mixture of experts adds to its loss.
    added = output.loss - tiny.loss_by_hand(output.logits, labels, None)
    wanted = tiny.loss_by_hand(output.logits, labels, f) + added
    wanted.backward()
    for _ in range(2):  # with probes, and without
        model.zero_grad()
        found = model(tokens, labels=labels)
        torch.testing.assert_close(found.loss, wanted, rtol=1e-6, atol=1e-6)
        found.loss.backward()
        assert_same_gradients(gradients(model), gradients(plain), 1e-5)
        torch.testing.assert_close(model.logit_transform.raw_slope.grad, f.raw_slope.grad, rtol=1e-5, atol=1e-7)
    if fused == "train":
        assert found.logits is None and "logits" not in found
        assert model._not_fusible is None
        inner, wanted_inner = model._inner, INNER.get(name, Inner())
        assert torch.allclose(torch.tensor(inner), torch.tensor(wanted_inner), rtol=1e-6)
    else:
        torch.testing.assert_close(found.logits, f(output.logits))


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
def test_logits_are_f_of_the_models_own(name: str) -> None:
    plain, model = tiny.pair(name)
    plain.eval(), model.eval()
    tokens, labels = tiny.batch()
    with torch.no_grad():
        z = plain(tokens).logits
        torch.testing.assert_close(model(tokens).logits, model.logit_transform(z), rtol=0, atol=0)
        with_loss = model(tokens, labels=labels)
        torch.testing.assert_close(with_loss.logits, model.logit_transform(z), rtol=0, atol=0)
        assert model(tokens, logits_to_keep=1).logits.shape == (3, 1, tiny.VOCABULARY)
        assert len(model(tokens, return_dict=False)) == len(plain(tokens, return_dict=False))
        assert len(model(tokens, labels=labels, skip_logits=True, return_dict=False)[0].shape) == 0


def test_shift_labels_and_num_items() -> None:
    _, model = tiny.pair()
    tokens, labels = tiny.batch()
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    count = (shifted != -100).sum()
    loss = model(tokens, labels=labels).loss
    for arguments in (
        {"shift_labels": shifted},
        {"labels": labels, "shift_labels": shifted},
        {"labels": labels, "num_items_in_batch": count},
        {"labels": labels, "num_items_in_batch": int(count)},
        {"labels": labels, "skip_logits": False},
    ):
        torch.testing.assert_close(model(tokens, **arguments).loss, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(model(tokens, labels=labels, num_items_in_batch=7).loss, loss * count / 7)


@pytest.mark.parametrize("fused", ["train", "never"])
def test_odd_labels(fused: str) -> None:
    plain, model = tiny.pair(fused=fused)
    tokens, labels = tiny.batch()
    # A mean over no target is NaN, as it is without f; its gradients are 0.
    nothing = torch.full_like(labels, -100)
    assert model(tokens, labels=nothing).loss.isnan() and plain(tokens, labels=nothing).loss.isnan()
    assert model(tokens, labels=nothing, num_items_in_batch=1).loss == 0
    with pytest.raises(TypeError, match=r"target must be int64 or uint8 class indices, got torch\.int32"):
        model(tokens, labels=labels.int())


def test_evaluation_without_logits_has_statistics_of_tokens() -> None:
    _, model = tiny.pair("gemma2", fused="always")
    tokens, labels = tiny.batch()
    model.eval()
    with torch.no_grad():
        output = model(tokens, labels=labels)
        y = model(tokens).logits[:, :-1].float()
    assert "logits" not in output
    log_p = y.log_softmax(-1)
    target, counts = labels[:, 1:], labels[:, 1:] != -100
    wanted = log_p.gather(-1, target.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(output["log_prob"][:, :-1][counts], wanted[counts], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output["entropy"][:, :-1], -(log_p.exp() * log_p).sum(-1), rtol=1e-4, atol=1e-5)
    assert torch.equal(output["is_top1"][:, :-1][counts], (y.argmax(-1) == target)[counts])
    assert torch.equal(output["log_prob"][:, -1], torch.zeros(3))


def test_a_soft_cap_takes_the_place_of_the_models_cap() -> None:
    plain, model = tiny.pair("gemma2", SoftCap(3.0, learnable=True))
    tokens, labels = tiny.batch()
    assert model.config.final_logit_softcapping is None and plain.config.final_logit_softcapping == 3.0
    torch.testing.assert_close(model(tokens).logits, plain(tokens).logits, rtol=1e-5, atol=1e-6)
    model(tokens, labels=labels).loss.backward()
    assert model._inner == Inner() and model.logit_transform.log_cap.grad is not None
    recurrent = tf.RecurrentGemmaForCausalLM(
        tf.RecurrentGemmaConfig(
            vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
    )
    with pytest.raises(ValueError, match=r"cannot do without: recurrent_gemma has logits_soft_cap=30"):
        add_transform(recurrent, SoftCap(30.0))


def test_the_cap_of_a_config_of_several() -> None:
    text = {
        "vocab_size": 99, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "final_logit_softcapping": 3.0,
    }  # fmt: skip
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    plain = tf.Gemma3ForConditionalGeneration(
        tf.Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    )
    config = plain.config
    model = add_transform(plain, SoftCap(3.0))
    assert config.text_config.final_logit_softcapping == 3.0
    assert model.config.text_config.final_logit_softcapping is None
    assert model.model.language_model.config is model.config.text_config
    # A config that does not take None for it.
    with pytest.raises(ValueError, match=r"cannot do without: gemma3n_text has final_logit_softcapping=30"):
        _with_f(tf.Gemma3nConfig(), class_for(tf.Gemma3nForConditionalGeneration).config_class, SoftCap(30.0))


@pytest.mark.parametrize("name", ["gemma2", "granite"])
def test_a_changed_config_is_noticed(name: str) -> None:
    plain, model = tiny.pair(name)
    tokens, labels = tiny.batch()
    model(tokens, labels=labels)
    for each in (plain, model):
        if name == "gemma2":
            each.config.final_logit_softcapping = 1.5
        else:
            each.config.logits_scaling = 0.5
    wanted = tiny.loss_by_hand(plain(tokens).logits, labels, model.logit_transform)
    torch.testing.assert_close(model(tokens, labels=labels).loss, wanted, rtol=1e-6, atol=1e-6)


def test_what_is_no_scale_and_cap_goes_by_logits(caplog: pytest.LogCaptureFixture) -> None:
    class Odd(tf.LlamaForCausalLM):
        def forward(self, *args, labels=None, **kwargs):  # type: ignore[no-untyped-def]
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + 0.1 * output.logits.square()
            if labels is not None:
                output.loss = self.loss_function(output.logits, labels, self.config.vocab_size)
            return output

    plain = tiny.plain()
    plain.__class__ = Odd
    model = add_transform(copy.deepcopy(plain), tiny.rough())
    tokens, labels = tiny.batch()
    wanted = tiny.loss_by_hand(plain(input_ids=tokens).logits, labels, model.logit_transform)
    for _ in range(2):
        with caplog.at_level(logging.WARNING, "monosoftmax"):
            output = model(input_ids=tokens, labels=labels)
        torch.testing.assert_close(output.loss, wanted, rtol=1e-6, atol=1e-6)
        assert output.logits is not None
    assert [each.getMessage() for each in caplog.records] == [
        "Odd holds its logits for the loss: it does more to its logits than to scale and to cap them"
    ]
    with pytest.raises(NotImplementedError, match="skip_logits=True needs a head"):
        model(input_ids=tokens, labels=labels, skip_logits=True)


@pytest.mark.parametrize(
    ("logits", "wanted"),
    [
        (lambda z: z, Inner()),
        (lambda z: z / 13, Inner(1 / 13)),
        (lambda z: 30 * torch.tanh(z / 30), Inner(1.0, 30.0)),
        (lambda z: 50 * torch.tanh(0.07 * z / 50), Inner(0.07, 50.0)),
        (lambda z: -z, None),
        (lambda z: z + 1, None),
        (lambda z: z.clamp(-50, 50), None),
        (lambda z: z[:-1], None),
        (lambda z: torch.where(torch.arange(len(z)) == 7, 2 * z, z), None),
        (lambda z: torch.full_like(z, float("nan")), None),
    ],
)
def test_inner_of_probes(logits, wanted) -> None:  # type: ignore[no-untyped-def]
    from monosoftmax.integrations.transformers.head_tap import _PROBES

    probes = torch.tensor(_PROBES).repeat(3)
    found = inner_of(probes, logits(probes))
    if wanted is None:
        assert found is None
    else:
        assert found is not None and torch.allclose(torch.tensor(found), torch.tensor(wanted), rtol=1e-5)


@pytest.mark.parametrize("inner", [Inner(), Inner(0.5), Inner(1.0, 3.0), Inner(2.0, 30.0)])
def test_f_of_what_a_model_does(inner: Inner) -> None:
    z, f = torch.linspace(-50, 50, 101), tiny.rough()
    y = z * inner.scale if inner.cap == 0 else inner.cap * torch.tanh(z * inner.scale / inner.cap)
    torch.testing.assert_close(inner.of(z), y, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(inner.before(f)(z), f(y), rtol=1e-5, atol=1e-5)


class Quantised(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input, (self.weight * 8).round() / 8)


@pytest.mark.parametrize("kind", ["quantised", "hook", "replaced"])
def test_heads_that_cannot_be_fused(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    plain, model = tiny.pair()
    for each in (plain, model):
        if kind == "quantised":
            each.lm_head.__class__ = Quantised
        elif kind == "hook":
            each.lm_head.register_forward_hook(lambda _module, _args, output: output * 2)
        else:
            head, own = each.lm_head, each.lm_head.forward
            head.forward = lambda input, own=own: own(input) * 2
    tokens, labels = tiny.batch()
    wanted = tiny.loss_by_hand(plain(tokens).logits, labels, model.logit_transform)
    with caplog.at_level(logging.WARNING, "monosoftmax"):
        torch.testing.assert_close(model(tokens, labels=labels).loss, wanted, rtol=1e-6, atol=1e-6)
    assert "holds its logits for the loss: its head" in caplog.text
    with pytest.raises(NotImplementedError, match="its head"):
        model(tokens, labels=labels, skip_logits=True)


def test_resized_embeddings() -> None:
    plain, model = tiny.pair("qwen2")
    for each in (plain, model):
        torch.manual_seed(3)
        each.resize_token_embeddings(530)
    tokens, labels = tiny.batch()
    wanted = tiny.loss_by_hand(plain(tokens).logits, labels, model.logit_transform)
    torch.testing.assert_close(model(tokens, labels=labels).loss, wanted, rtol=1e-6, atol=1e-6)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt2"])
def test_checkpoints(name: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    _, model = tiny.pair(name)
    model.eval()
    tokens, labels = tiny.batch()
    wanted = model(tokens, labels=labels)
    model.save_pretrained(tmp_path)
    for read in (AutoMonotonicModelForCausalLM, tf.AutoModelForCausalLM):
        found = read.from_pretrained(tmp_path)
        assert type(found) is type(model)
        torch.testing.assert_close(found(tokens, labels=labels).loss, wanted.loss, rtol=0, atol=0)
        torch.testing.assert_close(found(tokens).logits, wanted.logits, rtol=0, atol=0)
        assert (found.get_output_embeddings().weight is found.get_input_embeddings().weight) == (
            model.get_output_embeddings().weight is model.get_input_embeddings().weight
        )
    half = AutoMonotonicModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.logit_transform.raw_slope.dtype == torch.float32
    assert torch.equal(half.logit_transform.raw_slope, model.logit_transform.raw_slope)
    with pytest.raises(Exception, match="AutoMonotonicModelForCausalLM"):
        type(tiny.plain(name)).from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="transform must be left out"):
        AutoMonotonicModelForCausalLM.from_pretrained(tmp_path, "gss")


def test_a_checkpoint_in_a_new_process(tmp_path) -> None:  # type: ignore[no-untyped-def]
    _, model = tiny.pair("gemma2")
    tokens, _ = tiny.batch()
    model.eval().save_pretrained(tmp_path)
    torch.save(model(tokens).logits, tmp_path / "logits.pt")
    code = """
        import sys, torch, transformers
        path = sys.argv[1]
        try:
            transformers.AutoModelForCausalLM.from_pretrained(path)
        except ValueError as error:
            assert "monosoftmax_gemma2" in str(error), error
        else:
            raise AssertionError("read without f")
        import monosoftmax as ms
        ms.integrations.transformers.register("gemma2")
        wanted = torch.load(path + "/logits.pt")
        tokens = torch.randint(3, 515, (3, 12), generator=torch.Generator().manual_seed(1))
        for read in (transformers.AutoModelForCausalLM, ms.integrations.transformers.AutoMonotonicModelForCausalLM):
            assert torch.equal(read.from_pretrained(path)(tokens).logits, wanted)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], check=True)


@pytest.mark.parametrize("transform", [SoftCap(30.0, learnable=True), SoftCap(30.0), Temperature(2.0), PLIF(), "gss"])
def test_f_on_a_plain_checkpoint_is_no_garbage(transform, tmp_path) -> None:  # type: ignore[no-untyped-def]
    plain = tiny.plain()
    plain.save_pretrained(tmp_path)
    model = AutoMonotonicModelForCausalLM.from_pretrained(tmp_path, transform, dtype=torch.bfloat16)
    fresh = ms.transforms.from_dict(model.config.logit_transform)
    for name, value in fresh.state_dict().items():
        assert torch.equal(model.logit_transform.state_dict()[name], value), name
    # What transformers itself makes of a checkpoint that lacks f: it makes the tensors by torch.empty.
    kind = class_for(tf.LlamaForCausalLM)
    config = kind.config_class.from_dict({**plain.config.to_dict(), "logit_transform": fresh.to_dict()})
    loaded = kind.from_pretrained(tmp_path, config=config, dtype=torch.bfloat16)
    assert torch.equal(loaded.logit_transform(), fresh())
    with pytest.raises(ValueError, match="transform must say which f"):
        AutoMonotonicModelForCausalLM.from_pretrained(tmp_path)


def test_learned_values_go_along() -> None:
    f = PLIF(30)
    with torch.no_grad():
        f.raw_slope.uniform_(-1, 1)
    _, model = tiny.pair("llama", f)
    assert model.logit_transform is f


def test_copies_and_pickles() -> None:
    _, model = tiny.pair()
    tokens, labels = tiny.batch()
    loss = model(tokens, labels=labels).loss
    copied = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for each in (copied, torch.load(file, weights_only=False)):
        torch.testing.assert_close(each(tokens, labels=labels).loss, loss, rtol=0, atol=0)
        each(tokens, labels=labels).loss.backward()
        assert each.logit_transform.raw_slope.grad is not None
    assert model.logit_transform.raw_slope.grad is None


def test_another_models_config_is_left_alone() -> None:
    config = tiny.plain("gemma2").config
    first, second = tf.Gemma2ForCausalLM(config), tf.Gemma2ForCausalLM(config)
    add_transform(first, SoftCap(3.0))
    assert type(second.config) is tf.Gemma2Config and second.config.final_logit_softcapping == 3.0
    assert first.model.config is first.config


@pytest.mark.seconds
def test_compiled_training_step() -> None:
    _, model = tiny.pair("gemma2")
    tokens, labels = tiny.batch()
    wanted = model(tokens, labels=labels).loss
    wanted.backward()
    gradient = model.logit_transform.raw_slope.grad.clone()
    model.zero_grad()
    torch._dynamo.reset()
    # The whole step is one graph, once what the model does to its logits is known.
    found = torch.compile(model, backend="aot_eager", fullgraph=True)(tokens, labels=labels).loss
    found.backward()
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.logit_transform.raw_slope.grad, gradient, rtol=1e-5, atol=1e-7)


def test_the_loss_function_is_the_models_own() -> None:
    _, model = tiny.pair()
    with pytest.raises(AttributeError, match="must stay its own"):
        model.loss_function = monotonic_loss(tiny.rough())
    tokens, labels = tiny.batch()
    # Called from outside, with logits that have f.
    loss = model.loss_function(logits=model(tokens).logits, labels=labels, vocab_size=tiny.VOCABULARY)
    torch.testing.assert_close(loss, model(tokens, labels=labels).loss, rtol=1e-6, atol=1e-6)


def test_monotonic_loss_on_a_plain_model() -> None:
    plain, model = tiny.pair()
    tokens, labels = tiny.batch()
    plain.f = copy.deepcopy(model.logit_transform)
    plain.loss_function = monotonic_loss(plain.f)
    for arguments in ({}, {"num_items_in_batch": 5}):
        found, wanted = plain(tokens, labels=labels, **arguments).loss, model(tokens, labels=labels, **arguments).loss
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    plain(tokens, labels=labels).loss.backward()
    assert plain.f.raw_slope.grad is not None
    plain.f.requires_grad_(False)
    with pytest.warns(UserWarning, match="f of monotonic_loss is frozen"):
        plain(tokens, labels=labels)
    with pytest.raises(TypeError, match="transform must be a monosoftmax transform, got None"):
        monotonic_loss(None)  # type: ignore[arg-type]


def test_a_loss_module_as_loss_function_is_refused() -> None:
    plain = tiny.plain()
    for module in (ms.MonotonicCrossEntropyLoss(tiny.rough()), tiny.rough()):
        with pytest.raises(TypeError, match=r"add_transform\(model, f\)"):
            plain.loss_function = module
    plain.lm_head = ms.MonotonicSoftmax(32, tiny.VOCABULARY, tiny.rough(), bias=False)
    with pytest.raises(TypeError, match="f has its place beside the head"):
        plain(tiny.batch()[0])


def test_a_frozen_f_is_told() -> None:
    _, model = tiny.pair()
    model.logit_transform.requires_grad_(False)
    tokens, labels = tiny.batch()
    with pytest.warns(UserWarning, match="logit_transform of LlamaForCausalLM is frozen"):
        model(tokens, labels=labels)


def bart() -> nn.Module:
    return tf.BartForCausalLM(
        tf.BartConfig(
            vocab_size=99, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16,
            is_encoder_decoder=False, is_decoder=True,
        )
    )  # fmt: skip


def t5() -> nn.Module:
    return tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=99, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )


def classifier() -> nn.Module:
    return tf.LlamaForSequenceClassification(tiny.plain().config)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (t5, NotImplementedError, "must be a causal language model, got T5ForConditionalGeneration"),
        (classifier, NotImplementedError, "must be a causal language model, got LlamaForSequenceClassification"),
        (bart, NotImplementedError, "BartForCausalLM does not compute its loss by loss_function"),
        (lambda: nn.Linear(3, 3), TypeError, "model must be a model of transformers, got Linear"),
        (lambda: tiny.plain().model, TypeError, "with a head, got LlamaModel"),
        (lambda: tiny.pair()[1], ValueError, "has a logit_transform already"),
    ],
)
def test_refused_models(model, error, message) -> None:  # type: ignore[no-untyped-def]
    made = model()
    before = type(made)
    with pytest.raises(error, match=message):
        add_transform(made, tiny.rough())
    assert type(made) is before


@pytest.mark.parametrize(
    ("transform", "arguments", "error", "message"),
    [
        (nn.Tanh(), {}, TypeError, "transform must be a monosoftmax transform"),
        ("tanh", {}, ValueError, "must be one of identity"),
        ({"type": "plif", "pieces": 3}, {}, TypeError, "plif has no pieces"),
        ("plif", {"fused": "yes"}, ValueError, "fused must be"),
    ],
)
def test_refused_transforms(transform, arguments, error, message) -> None:  # type: ignore[no-untyped-def]
    plain = tiny.plain()
    with pytest.raises(error, match=message):
        add_transform(plain, transform, **arguments)
    assert type(plain) is tf.LlamaForCausalLM and not hasattr(plain, "logit_transform")


def test_other_errors() -> None:
    _, model = tiny.pair()
    with pytest.raises(ValueError, match="skip_logits=True needs labels"):
        model(tiny.batch()[0], skip_logits=True)
    tokens, _ = tiny.batch()
    with pytest.raises(TypeError, match="takes at most 8 positional arguments, got 9"):
        model(tokens, *[None] * 8)
    with pytest.raises(TypeError, match="multiple values for input_ids"):
        model(tokens, input_ids=tokens)
    with pytest.raises(TypeError, match="base must be a class of transformers' models"):
        class_for(nn.Linear)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model_types must be"):
        register("t5")
    with pytest.raises(ValueError, match=r"config\.logit_transform must say"):
        kind = class_for(tf.LlamaForCausalLM)
        kind(kind.config_class(vocab_size=9, hidden_size=8, intermediate_size=8, num_attention_heads=2))
    with pytest.raises(OSError, match="has no instances"):
        AutoMonotonicModelForCausalLM()
    assert class_for(type(model)) is type(model) and issubclass(type(model), MonotonicHead)
