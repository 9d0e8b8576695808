"""f in the losses of TRL's trainers, against log p from materialised logits."""

from __future__ import annotations

import copy
import importlib
import math
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

trl = pytest.importorskip("trl")

import peft  # noqa: E402
from datasets import Dataset  # noqa: E402
from tiny_models import VOCABULARY, batch, loss_by_hand, pair, plain, rough  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast  # noqa: E402
from trl.trainer.utils import FusedCausalLMOutput  # noqa: E402

from monosoftmax.integrations import trl as integration  # noqa: E402
from monosoftmax.integrations.transformers import AutoMonotonicModelForCausalLM, add_transform  # noqa: E402

KINDS = ("SFT", "DPO", "KTO", "GRPO", "RLOO")
OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def module_of(kind: str) -> Any:
    return importlib.import_module(f"trl.trainer.{kind.lower()}_trainer")


@pytest.fixture(autouse=True)
def _enabled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for path, names in integration._REPLACED.items():
        module = importlib.import_module(path)
        for name in names:
            monkeypatch.setattr(module, name, getattr(module, name))  # what it undoes
    integration.enable()
    yield


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    of_words = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    of_words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=of_words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint with f."""
    folder = str(tmp_path_factory.mktemp("saved"))
    model = pair("llama")[1]
    with torch.no_grad():
        model.lm_head.weight.mul_(3.0)  # so that logits reach most of f
    model.save_pretrained(folder)
    return folder


def loaded(saved: str, moved: bool = True) -> Any:
    """The model of it, whose f is another than the saved one if ``moved``."""
    model = AutoMonotonicModelForCausalLM.from_pretrained(saved)
    if moved:
        with torch.no_grad():
            model.logit_transform.raw_slope.add_(torch.linspace(-1, 1, 40))
    return model


def head_by_hand(model: Any, temperature: float = 1.0, cast_lm_head_to_fp32: bool = False, outputs: Any = ()) -> None:
    """What ``add_fused_lm_head`` is to compute, from materialised logits f(z)."""
    usual = model.forward

    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return usual(*args, labels=labels, **kwargs)
        y = usual(*args, **kwargs).logits[:, :-1].float() / temperature
        target = labels[:, 1:]
        mask, log_p = target != -100, y.log_softmax(-1)
        found = log_p.gather(-1, target.clamp(min=0)[..., None])[..., 0]
        return FusedCausalLMOutput(
            loss=-(found * mask).sum() / mask.sum(),
            log_probs=found * mask,
            entropy=-(log_p.exp() * log_p).sum(-1) * mask,
            log_sum_sq_probs=(2 * log_p).logsumexp(-1) * mask,
            mean_logits=y.mean(-1) * mask,
            is_top1=(y.argmax(-1) == target) & mask,
            label_mask=mask,
        )

    model.forward = types.MethodType(forward, model)


def tokens_of(rows: int, length: int, seed: int = 0) -> list[list[int]]:
    """Of lengths from ``length - 2`` to ``length``."""
    tokens = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed)).tolist()
    return [row[: length - i % 3] for i, row in enumerate(tokens)]


def words(rows: int, length: int, seed: int = 0) -> list[str]:
    return [" ".join(f"w{i}" for i in row) for row in tokens_of(rows, length, seed)]


def sft_loss_by_hand(model: Any, transform: Any) -> float:
    """The loss of SFT on its whole dataset."""
    rows = [torch.tensor([*row, 2]) for row in tokens_of(8, 12)]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
    z = torch.nn.functional.linear(model.base_model(tokens).last_hidden_state, model.lm_head.weight)
    return loss_by_hand(z, labels, transform).item()


def dataset(kind: str) -> Dataset:
    if kind == "SFT":
        return Dataset.from_dict({"text": words(8, 12)})
    if kind == "DPO":
        return Dataset.from_dict(
            {"prompt": words(8, 4), "chosen": words(8, 5, seed=1), "rejected": words(8, 6, seed=2)}
        )
    if kind == "KTO":
        labels = [True, False, True, True] * 2
        return Dataset.from_dict({"prompt": words(8, 4), "completion": words(8, 5, seed=1), "label": labels})
    return Dataset.from_dict({"prompt": words(8, 4)})


def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(sum(ids) % 7) for ids in completion_ids]


def trainer_of(kind: str, model: Any, tokenizer: Any, folder: Path, **options: Any) -> Any:
    own: dict[str, Any] = {"max_length": 32} if kind in ("SFT", "DPO", "KTO") else {}
    arguments: dict[str, Any] = {"processing_class": tokenizer, "train_dataset": dataset(kind)}
    if kind in ("GRPO", "RLOO"):
        own = {"num_generations": 4, "max_completion_length": 6, "temperature": 0.9, "num_iterations": 2}
        arguments["reward_funcs"] = reward
    if "ref_model" in options:
        arguments["ref_model"] = options.pop("ref_model")
    if "lora" in options:
        arguments["peft_config"] = lora(*options["lora"])
        options = {name: each for name, each in options.items() if name != "lora"}
    torch.manual_seed(0)
    config = getattr(trl, f"{kind}Config")(
        **{
            "output_dir": str(folder), "report_to": "none", "use_cpu": True, "bf16": False, "max_steps": 2,
            "per_device_train_batch_size": 4, "gradient_checkpointing": False, "optim": "sgd", "learning_rate": 0.1,
            "max_grad_norm": 1e9, "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no",
            "disable_tqdm": True, "seed": 3, **own, **options,
        }
    )  # fmt: skip
    return getattr(trl, f"{kind}Trainer")(model=model, args=config, **arguments)


def trained(*args: Any, **options: Any) -> tuple[Any, list[dict[str, float]]]:
    """The trainer, after two steps, and what it logged in each."""
    trainer = trainer_of(*args, **options)
    trainer.train()
    return trainer, [each for each in trainer.state.log_history if "grad_norm" in each]


def f_of(model: Any) -> torch.Tensor:
    f = (model.get_base_model() if hasattr(model, "peft_config") else model).logit_transform
    f = f.modules_to_save["default"] if hasattr(f, "modules_to_save") else f
    return f.raw_slope.detach().clone()


def lora(*modules_to_save: str, target: str = "q_proj") -> peft.LoraConfig:
    return peft.LoraConfig(
        r=4, target_modules=[target], task_type="CAUSAL_LM", modules_to_save=["logit_transform", *modules_to_save]
    )


OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("SFT", {}),
    "sft-dft": ("SFT", {"loss_type": "dft", "gradient_checkpointing": True}),
    "sft-lora": ("SFT", {"lora": ["lm_head"]}),
    "dpo": ("DPO", {"use_weighting": True, "loss_type": ["ipo", "sigmoid"], "loss_weights": [1.0, 0.5]}),
    "dpo-precomputed": ("DPO", {"precompute_ref_log_probs": True}),
    "dpo-lora": ("DPO", {"lora": []}),
    "kto": ("KTO", {}),
    "grpo": ("GRPO", {"beta": 0.2, "loss_type": "grpo"}),
    "grpo-dapo": ("GRPO", {"loss_type": "dapo", "entropy_coef": 0.1, "top_entropy_quantile": 0.8}),
    "grpo-lora": ("GRPO", {"beta": 0.2, "loss_type": "cispo", "epsilon_high": 5.0, "lora": []}),
    "rloo": ("RLOO", {"beta": 0.2}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_trainers_train_as_with_logits(
    name: str, saved: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, options = OPTIONS[name]
    trainer, found = trained(kind, loaded(saved), tokenizer, tmp_path / "a", **options)
    monkeypatch.setattr(module_of(kind), "add_fused_lm_head", head_by_hand)
    by_hand, wanted = trained(kind, loaded(saved), tokenizer, tmp_path / "b", **options)
    for own, other in zip(found, wanted, strict=True):
        shared = {k for k, v in other.items() if isinstance(v, float) and "time" not in k and "profiling" not in k}
        assert {"loss", "grad_norm", "entropy"} <= shared
        assert {k: own[k] for k in shared} == pytest.approx({k: other[k] for k in shared}, rel=1e-5, abs=1e-5)
    before = f_of(loaded(saved))
    moved, wanted_move = f_of(trainer.model) - before, f_of(by_hand.model) - before
    assert moved.abs().max() > 1e-6
    torch.testing.assert_close(moved, wanted_move, rtol=1e-3, atol=1e-6)
    if getattr(trainer, "ref_model", None) is not None:
        torch.testing.assert_close(f_of(trainer.ref_model), f_of(loaded(saved, moved=False)), rtol=0, atol=0)


def test_loss_is_that_of_the_whole_batch_by_hand(saved: str, tokenizer: Any, tmp_path: Path) -> None:
    model = loaded(saved)
    before = copy.deepcopy(model)
    _, found = trained("SFT", model, tokenizer, tmp_path, max_steps=1, per_device_train_batch_size=8)
    wanted = sft_loss_by_hand(before, before.logit_transform)
    assert found[0]["loss"] == pytest.approx(wanted, abs=1e-5)
    assert abs(sft_loss_by_hand(before, None) - wanted) > 0.03


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "mixtral", "phi"])
def test_what_trl_asks_for_and_gradients(name: str) -> None:
    _, model = pair(name)
    model.config.output_router_logits = False
    by_hand, (tokens, labels) = copy.deepcopy(model), batch()
    upstream = torch.rand(2, 3, 11, generator=torch.Generator().manual_seed(0))
    grads = []
    for head, each in ((module_of("GRPO").add_fused_lm_head, model), (head_by_hand, by_hand)):
        head(each, temperature=0.9, outputs=OUTPUTS)
        out = each(input_ids=tokens, labels=labels, fused_lm_head=True)
        (upstream[0] * out.log_probs + upstream[1] * out.entropy).sum().backward()
        grads.append((out, {k: p.grad for k, p in each.named_parameters()}))
    (found, own), (wanted, other) = grads
    for field in (*OUTPUTS, "loss", "label_mask"):
        torch.testing.assert_close(found[field], wanted[field], rtol=1e-5, atol=1e-5)
        assert found[field].requires_grad == (field in ("log_probs", "entropy", "loss"))
    for key, grad in other.items():
        torch.testing.assert_close(own[key], grad, rtol=1e-4, atol=1e-5, msg=key)


def test_shifted_labels_items_and_auxiliary_losses() -> None:
    _, model = pair("mixtral")
    (tokens, labels), usual = batch(), copy.deepcopy(model)
    module_of("SFT").add_fused_lm_head(model)
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    found = model(input_ids=tokens, labels=labels, fused_lm_head=True, num_items_in_batch=7)
    alike = model(input_ids=tokens, shift_labels=shifted, fused_lm_head=True, num_items_in_batch=7)
    wanted = usual(input_ids=tokens, labels=labels, num_items_in_batch=7)
    assert found.loss.item() == pytest.approx(wanted.loss.item(), abs=1e-5)
    assert found.aux_loss.item() == pytest.approx(wanted.aux_loss.item(), abs=1e-6)
    assert alike.log_probs.shape == (3, 12) and alike.loss.item() == pytest.approx(wanted.loss.item(), abs=1e-5)
    torch.testing.assert_close(alike.log_probs[:, :-1], found.log_probs, rtol=0, atol=0)
    # Without a token that counts, there is a loss of 0 to go backward from.
    empty = model(
        input_ids=tokens, labels=torch.full_like(labels, -100), fused_lm_head=True, output_router_logits=False
    )
    empty.loss.backward()
    assert empty.loss == 0
    with pytest.raises(ValueError, match="needs labels or shift_labels"):
        model(input_ids=tokens, fused_lm_head=True)


def test_no_logits_in_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = pair()
    module_of("DPO").add_fused_lm_head(model.eval())
    monkeypatch.setattr(integration, "log_prob", None)  # what is made of logits
    with torch.no_grad():
        assert model(input_ids=batch()[0], labels=batch()[1], fused_lm_head=True).log_probs.min() < -1
    model.fused = "never"
    with pytest.raises(TypeError, match="not callable"):
        model(input_ids=batch()[0], labels=batch()[1], fused_lm_head=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_those_of_the_samples(dtype: torch.dtype, saved: str, tokenizer: Any, tmp_path: Path) -> None:
    # In bfloat16 with the head in float32.
    model = loaded(saved).to(dtype)
    options = {"cast_lm_head_to_fp32": dtype == torch.bfloat16}
    trainer = trainer_of("GRPO", model, tokenizer, tmp_path, max_completion_length=12, **options)
    prompts = torch.tensor([row[:5] for row in tokens_of(4, 7)])
    sampled = trainer.model.generate(
        prompts, generation_config=trainer.generation_config, output_scores=True, return_dict_in_generate=True
    )
    completions = sampled.sequences[:, 5:]
    # The scores are what the samples were drawn from, after the temperature.
    log_p = torch.stack(sampled.scores, 1).log_softmax(-1)
    # Without a cache, as the trainer scores, so that types of 16 bits round alike.
    if dtype != torch.float32:
        logits = trainer.model(sampled.sequences).logits
        log_p = (logits[:, 4:-1] / 0.9).log_softmax(-1)
        assert log_p.dtype == torch.float32
        loss = trainer.model.train()(sampled.sequences, labels=sampled.sequences).loss
        torch.testing.assert_close(loss, loss_by_hand(logits, sampled.sequences, None), rtol=1e-5, atol=1e-5)
    found, entropy, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model, sampled.sequences, torch.ones_like(sampled.sequences), completions.shape[1], compute_entropy=True
    )
    wanted = log_p.gather(-1, completions[..., None])[..., 0]
    assert trainer.temperature == 0.9 and wanted.abs().max() > 1
    assert "_logged" not in model.__dict__  # no logits are held
    assert (found - wanted).abs().max() < 1e-5
    assert (entropy + (log_p.exp() * log_p).sum(-1)).abs().max() < 1e-5


def test_heads_that_cannot_be_fused(
    saved: str, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, (tokens, labels) = loaded(saved), batch()
    wrapped = peft.get_peft_model(model, lora(target="lm_head"))
    torch.nn.init.normal_(model.lm_head.lora_B["default"].weight)
    by_hand = copy.deepcopy(wrapped)
    module_of("GRPO").add_fused_lm_head(model, temperature=0.7, outputs=OUTPUTS)
    head_by_hand(by_hand.get_base_model(), temperature=0.7)
    for _ in range(2):
        found = wrapped(input_ids=tokens, labels=labels, fused_lm_head=True)
    wanted = by_hand(input_ids=tokens, labels=labels, fused_lm_head=True)
    for field in (*OUTPUTS, "loss"):
        torch.testing.assert_close(found[field], wanted[field], rtol=1e-5, atol=1e-5)
    found.loss.backward()
    assert model.lm_head.lora_B["default"].weight.grad.abs().max() > 0
    assert [each.message.count("holds its logits") for each in caplog.records].count(1) == 1
    # TRL's trainers refuse such a head themselves.
    with pytest.raises(ValueError, match="PEFT adapter to `lm_head` is not supported"):
        trainer_of("SFT", wrapped, tokenizer, tmp_path)


def test_a_head_in_float32(saved: str) -> None:
    model, (tokens, labels) = loaded(saved).to(torch.bfloat16), batch()
    module_of("GRPO").add_fused_lm_head(model, cast_lm_head_to_fp32=True)
    hidden = model.base_model(tokens).last_hidden_state
    z = torch.nn.functional.linear(hidden.float(), model.lm_head.weight.float())
    wanted = loss_by_hand(z, labels, model.logit_transform)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(input_ids=tokens, labels=labels, fused_lm_head=True).loss
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    model.fused = "never"
    with pytest.raises(NotImplementedError, match="cast_lm_head_to_fp32"):
        model(input_ids=tokens, labels=labels, fused_lm_head=True)


@pytest.mark.parametrize("kind", KINDS)
def test_without_enable_an_error(
    kind: str, saved: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = module_of(kind)
    monkeypatch.setattr(module, "add_fused_lm_head", module.add_fused_lm_head.__wrapped__)
    with pytest.raises(RuntimeError, match=r"leaves out its logit_transform: call .*trl\.enable\(\)"):
        trainer_of(kind, loaded(saved), tokenizer, tmp_path)


def test_other_trainers_of_trl_raise(saved: str) -> None:
    # What the trainers of trl.experimental and the distillation trainer do, after enable, too.
    model = loaded(saved)
    with pytest.raises(RuntimeError, match="leaves out its logit_transform"):
        trl.trainer.utils.add_fused_lm_head(model)
    with pytest.raises(RuntimeError, match="leaves out its logit_transform"):
        trl.models.utils._ForwardRedirection()(model, model, model.generate)


@pytest.mark.parametrize(("kind", "options"), [("DPO", {}), ("KTO", {}), ("GRPO", {"beta": 0.1}), ("RLOO", {})])
def test_a_reference_without_f_is_an_error(kind: str, options: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    plain().save_pretrained(tmp_path / "plain")
    model = add_transform(AutoModelForCausalLM.from_pretrained(tmp_path / "plain"), rough())
    with pytest.raises(ValueError, match="reference model would have no logit_transform"):
        trainer_of(kind, model, tokenizer, tmp_path, **options)


def test_a_given_reference_stays_what_it_is(tokenizer: Any, tmp_path: Path) -> None:
    model = add_transform(plain(), rough())
    trainer, found = trained("DPO", model, tokenizer, tmp_path, ref_model=plain(), max_steps=1)
    assert not hasattr(trainer.ref_model, "logit_transform")
    # f alone sets the two apart.
    assert abs(found[0]["loss"] - math.log(2)) > 1e-3


def test_vllm_would_sample_without_f(saved: str, tokenizer: Any, tmp_path: Path) -> None:
    for kind in ("GRPO", "RLOO"):
        with pytest.raises(NotImplementedError, match="vLLM would sample without it"):
            trainer_of(kind, loaded(saved), tokenizer, tmp_path, use_vllm=True, beta=0.0)
    with pytest.raises(ImportError, match="vLLM is not available"):
        trainer_of("GRPO", plain(), tokenizer, tmp_path, use_vllm=True)


def test_models_without_f_are_trls(tokenizer: Any, tmp_path: Path) -> None:
    trainer, found = trained("SFT", plain(), tokenizer, tmp_path, max_steps=1, per_device_train_batch_size=8)
    assert trainer.model.forward.__func__.__globals__["__name__"] == "trl.trainer.utils"
    assert found[0]["loss"] == pytest.approx(sft_loss_by_hand(plain(), None), abs=1e-5)


def test_enable_twice() -> None:
    before = module_of("DPO").add_fused_lm_head, module_of("DPO").create_model_from_path
    assert integration.enable() is None
    assert (module_of("DPO").add_fused_lm_head, module_of("DPO").create_model_from_path) == before
    with pytest.raises(NotImplementedError, match="outputs must be some of"):
        before[0](pair("llama")[1], outputs=("log_probs", "top_k"))


def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(module_of("GRPO"), "VLLMGeneration")
    with pytest.raises(RuntimeError, match=rf"1\.16\.0.*got TRL {trl.__version__}.*grpo_trainer.VLLMGeneration"):
        integration.enable()
    monkeypatch.undo()
    monkeypatch.setattr(trl.trainer.utils, "add_fused_lm_head", lambda model, chunk: None)
    with pytest.raises(RuntimeError, match="which takes model, chunk"):
        integration.enable()


def test_without_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, integration.__name__)
    with pytest.raises(ImportError, match=r"pip install 'monosoftmax\[trl\]'"):
        importlib.import_module(integration.__name__)
