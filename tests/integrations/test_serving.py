"""Models with f where monosoftmax is not: what export writes runs in a process that cannot import it; fold."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from built_transforms import BUILT, trained
from tiny_models import batch, loss_by_hand, pair, rough

from monosoftmax.integrations.transformers import add_transform
from monosoftmax.integrations.transformers.serving import export, fold
from monosoftmax.transforms import (
    GSS,
    PLIF,
    REGISTRY,
    Chain,
    Identity,
    MonotonicTransform,
    RationalQuadraticSpline,
    Scale,
    SoftCap,
    Temperature,
)

CHAINS = {
    "fused chain": lambda: Chain(Scale(0.5), SoftCap(5.0), trained("spline")),
    "chain of two": lambda: Chain(trained("gss"), trained("plif"), Scale(2.0)),
}
TRANSFORMS = {**{case: lambda case=case: trained(case) for case in BUILT}, **CHAINS}
#: The models, and the transforms on them. Each transform is on Llama.
CASES = [("llama", case) for case in TRANSFORMS] + [
    (model, case)
    for model in ("qwen2", "gemma2", "gpt2", "mixtral")
    for case in ("plif", "soft_cap", "fused chain")
    if (model, case) != ("gemma2", "fused chain")
]

#: Loads every folder without monosoftmax, in float32 and in bfloat16.
ELSEWHERE = """
import sys
sys.modules["monosoftmax"] = None
import torch
from pathlib import Path
from transformers import AutoModelForCausalLM

here = Path(sys.argv[1])
tokens, labels = torch.load(here / "batch.pt")
found = {}
for folder in sorted((here / "exported").iterdir()):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        output = model(tokens, labels=labels)
    found[folder.name] = own = {
        "logits": output.logits, "loss": output.loss, "tuple": model(tokens, labels=labels, return_dict=False)[0],
        "of_logits": model.loss_function(output.logits, labels, output.logits.shape[-1]),
    }
    if folder.name.endswith("plif"):
        options = {"max_new_tokens": 6, "pad_token_id": 0, "attention_mask": torch.ones_like(tokens)}
        model.config.output_router_logits = False  # of which older versions cannot take the loss while they generate
        own["greedy"] = model.generate(tokens, do_sample=False, **options)
        own["beams"] = model.generate(tokens, do_sample=False, num_beams=4, num_return_sequences=4, **options)
        half = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16).eval()
        with torch.no_grad():
            rounded = half(tokens, labels=labels)
        own |= {"half": rounded.logits, "half_loss": rounded.loss, "coefficients": half.logit_transform.coefficients}
    if folder.name == "llama plif":
        own["compiled"] = torch.compile(model, backend="eager", fullgraph=True)(tokens).logits
        own["cast"] = model.half().logit_transform.coefficients
assert not [name for name in sys.modules if name.startswith("monosoftmax.")]
torch.save(found, here / "found.pt")
"""


def f_of(case: str) -> MonotonicTransform:
    return TRANSFORMS[case]()


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What another process has found in the folders of all cases, and where these are."""
    here = tmp_path_factory.mktemp("serving")
    torch.save(batch(), here / "batch.pt")
    for name, case in CASES:
        export(pair(name, f_of(case))[1].eval(), here / "exported" / f"{name} {case}")
    environment = {**os.environ, "HF_MODULES_CACHE": str(here / "modules"), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(here)], env=environment, cwd=here, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return here, torch.load(here / "found.pt")


def test_every_transform_is_a_case() -> None:
    assert {BUILT[case][0] for _, case in CASES if case in BUILT} == set(REGISTRY)


@pytest.mark.parametrize("name, case", CASES)
def test_exported_gives_f_of_the_plain_logits(name: str, case: str, elsewhere: tuple[Path, dict[str, Any]]) -> None:
    found = elsewhere[1][f"{name} {case}"]
    (without, model), (tokens, labels) = pair(name, f_of(case)), batch()
    without.eval()
    if name == "gemma2" and case == "soft_cap":
        without.config.final_logit_softcapping = None
    with torch.no_grad():
        plain = without(tokens, labels=labels)
    wanted = model.logit_transform(plain.logits)
    torch.testing.assert_close(found["logits"], wanted, rtol=1e-6, atol=1e-6)
    by_hand = loss_by_hand(plain.logits, labels, model.logit_transform)
    if name == "mixtral":  # the loss of its routers, which f has nothing to do with
        by_hand = by_hand + 0.1 * plain.aux_loss
    torch.testing.assert_close(found["loss"], by_hand, rtol=1e-5, atol=1e-5)
    # Loss functions that are called with the model's logits find f in them.
    plain_loss = loss_by_hand(wanted, labels, Identity())
    torch.testing.assert_close(found["of_logits"], plain_loss, rtol=1e-5, atol=1e-5)
    assert found["tuple"] == found["loss"]


@pytest.mark.parametrize("name", [name for name, case in CASES if case == "plif"])
def test_exported_generates_the_same(name: str, elsewhere: tuple[Path, dict[str, Any]]) -> None:
    found, tokens = elsewhere[1][f"{name} plif"], batch()[0]
    model = pair(name, f_of("plif"))[1].eval()
    model.config.output_router_logits = False
    options = {"max_new_tokens": 6, "pad_token_id": 0, "attention_mask": torch.ones_like(tokens), "do_sample": False}
    assert torch.equal(found["greedy"], model.generate(tokens, **options))
    assert torch.equal(found["beams"], model.generate(tokens, num_beams=4, num_return_sequences=4, **options))


# Without Mixtral, whose products of experts in bfloat16 differ from process to process.
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt2"])
def test_exported_rounds_once(name: str, elsewhere: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    found, (tokens, labels) = elsewhere[1][f"{name} plif"], batch()
    torch.set_num_threads(1)  # as elsewhere
    without, model = pair(name, f_of("plif"))
    without.save_pretrained(tmp_path)
    half = type(without).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        plain = half(tokens, labels=labels)
    wanted = model.logit_transform(plain.logits.float())
    assert found["half"].dtype == torch.bfloat16 and torch.equal(found["half"], wanted.bfloat16())
    by_hand = loss_by_hand(plain.logits, labels, model.logit_transform)
    torch.testing.assert_close(found["half_loss"].float(), by_hand.float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(found["coefficients"], model.logit_transform())


def test_exported_compiles_and_is_cast(elsewhere: tuple[Path, dict[str, Any]]) -> None:
    found = elsewhere[1]["llama plif"]
    torch.testing.assert_close(found["compiled"], found["logits"], rtol=1e-5, atol=1e-5)
    assert torch.equal(found["cast"], trained("plif")())  # model.half() has rounded the rest


def test_the_code_is_plain_and_short(elsewhere: tuple[Path, dict[str, Any]]) -> None:
    for name, case in CASES:
        folder = elsewhere[0] / "exported" / f"{name} {case}"
        assert sorted(each.name for each in folder.iterdir()) == [
            "config.json", "generation_config.json", "model.safetensors", "modeling_monosoftmax.py",
        ]  # fmt: skip
        source = (folder / "modeling_monosoftmax.py").read_text()
        imported = {
            line.split()[1].partition(".")[0] for line in source.splitlines() if line.startswith(("import ", "from "))
        }
        assert imported == {"functools", "json", "torch", "transformers"}
        of_f = source.partition("coefficients = self.coefficients.to(z.device, z.dtype)\n")[2].partition("\n\n")[0]
        assert 1 <= len(of_f.splitlines()) <= 22
        assert max(map(len, source.splitlines())) <= 120
        compile(source, "modeling_monosoftmax.py", "exec")


def test_what_would_leave_f_out_refuses(elsewhere: tuple[Path, dict[str, Any]]) -> None:
    folder = elsewhere[0] / "exported" / "llama plif"
    with pytest.raises(Exception, match="trust_remote_code=True"):  # of the checks of configs
        tf.LlamaForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        tf.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)


def test_an_exported_model_has_its_f_already(elsewhere: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder = elsewhere[0] / "exported" / "llama plif"
    model = tf.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with pytest.raises(ValueError, match="has a logit_transform already"):
        add_transform(model, PLIF())
    # Saved again, it still is what it was.
    model.save_pretrained(tmp_path / "again")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True).eval()
    with pytest.raises(Exception, match="trust_remote_code=True"):  # of the checks of configs
        tf.LlamaForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(batch()[0]).logits, model.eval()(batch()[0]).logits)


def test_coefficients_come_from_the_checkpoint_only(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    export(pair()[1], tmp_path / "m")
    weights = load_file(tmp_path / "m/model.safetensors")
    del weights["logit_transform.coefficients"]
    save_file(weights, tmp_path / "m/model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"must have logit_transform\.coefficients"):
        tf.AutoModelForCausalLM.from_pretrained(tmp_path / "m", trust_remote_code=True)


def test_export_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    model = pair()[1]
    before = {name: each.clone() for name, each in model.state_dict().items()}
    export(model, tmp_path / "m")
    assert type(model).__name__ == "MonotonicLlamaForCausalLM" and model.training
    assert model.config.model_type == "monosoftmax_llama" and model.config.logit_transform["type"] == "plif"
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


class Odd(MonotonicTransform):
    """An f whose code depends on the values of its coefficients."""

    def coefficients(self) -> torch.Tensor:
        return torch.ones(1)

    def evaluate(self, z: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
        return z if coefficients[0] > 0 else 2 * z


class Shifting(Odd):
    """An f whose code is another each time, so that what is traced is not what it computes."""

    calls = 0

    def evaluate(self, z: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return z * self.calls


def test_export_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without, model = pair()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="path must be a new or an empty folder"):
        export(model, tmp_path / "full")
    with pytest.raises(FileExistsError, match="path must be a new or an empty folder"):
        export(model, tmp_path / "full" / "notes.txt")
    with pytest.raises(TypeError, match="model must be one of add_transform, got LlamaForCausalLM"):
        export(without, tmp_path / "m")
    monkeypatch.setitem(REGISTRY, "odd", Odd)
    monkeypatch.setitem(REGISTRY, "shifting", Shifting)
    with pytest.raises(NotImplementedError, match="f must be made of calls of torch"):
        export(pair(transform=Odd())[1], tmp_path / "m")
    with pytest.raises(RuntimeError, match="does not compute what it computes"):
        export(pair(transform=Shifting())[1], tmp_path / "m")
    monkeypatch.setattr(type(model), "save_pretrained", lambda self, folder, **_: (folder.mkdir(), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        export(model, tmp_path / "m")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["full"]


@pytest.mark.parametrize("to_plain", [lambda model, path: export(model, path), lambda model, _: fold(model)])
def test_adapters_and_quantised_weights_must_go_first(to_plain: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = pair(transform=Temperature(2.0))[1]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="adapters merged"):
        to_plain(wrapped, tmp_path / "m")
    with pytest.raises(ValueError, match="adapters merged"):
        to_plain(model, tmp_path / "m")
    to_plain(wrapped.merge_and_unload(), tmp_path / "m")
    quantised = pair(transform=Temperature(2.0))[1]
    quantised.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ValueError, match="quantised"):
        to_plain(quantised, tmp_path / "q")
    with pytest.raises(TypeError, match=r"must be one of add_transform"):
        to_plain(torch.nn.DataParallel(model), tmp_path / "q")


FOLDED = [
    ("llama", lambda: Identity()),
    ("llama", lambda: trained("temperature")),
    ("llama", lambda: Chain(Scale(0.5), trained("temperature"), Identity())),
    ("phi", lambda: Temperature(0.6)),  # with a bias
    ("granite", lambda: Temperature(1.7)),
    ("mixtral", lambda: Temperature(1.7)),
    ("qwen2", lambda: Identity()),
    ("gpt2", lambda: Identity()),
    ("gemma2", lambda: Identity()),
    ("gemma2", lambda: SoftCap(2.0)),
    ("gemma2", lambda: trained("soft_cap")),
]
UNTIED = [
    ("qwen2", lambda: Temperature(1.7)),
    ("gpt2", lambda: Temperature(1.7)),
    ("gemma2", lambda: Temperature(1.7)),  # behind its cap
    ("gemma2", lambda: Chain(Temperature(1.7), Scale(2.0))),
]


@pytest.mark.parametrize("name, f, untie", [(*each, False) for each in FOLDED] + [(*each, True) for each in UNTIED])
def test_folded_is_a_plain_model_with_the_same_logits(name: str, f: Any, untie: bool, tmp_path: Path) -> None:
    (without, model), (tokens, labels) = pair(name, f()), batch()
    without.eval(), model.eval()
    if model.get_output_embeddings().bias is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    wanted = model(tokens).logits.detach()
    if untie:
        with pytest.raises(ValueError, match=r"fold\(model, untie=True\) copies it"):
            fold(model)
    folded = fold(model, untie=untie)
    assert folded is model and type(model) is type(without) and type(model.config) is type(without.config)
    assert model.__dict__.keys() == without.__dict__.keys() and model.state_dict().keys() == without.state_dict().keys()
    assert not [
        each for each in model.modules() if type(getattr(each, "config", without.config)) is not type(without.config)
    ]
    head = model.get_output_embeddings()
    assert not head._forward_hooks and not head._forward_pre_hooks
    torch.testing.assert_close(model(tokens).logits, wanted, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(
        model(tokens, labels=labels).loss,
        loss_by_hand(wanted, labels, Identity()) + (0.1 * model(tokens).aux_loss if name == "mixtral" else 0.0),
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip
    assert (head.weight is model.get_input_embeddings().weight) == (
        without.get_output_embeddings().weight is without.get_input_embeddings().weight and not untie
    )
    if untie:
        assert not model.config.tie_word_embeddings and not model.all_tied_weights_keys
    model.tie_weights()  # as resize_token_embeddings does
    torch.testing.assert_close(model(tokens).logits, wanted, rtol=2e-5, atol=2e-6)

    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == without.config.model_type and "logit_transform" not in config
    loaded, report = type(without).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    torch.testing.assert_close(loaded.eval()(tokens).logits, wanted, rtol=2e-5, atol=2e-6)
    assert type(tf.AutoModelForCausalLM.from_pretrained(tmp_path)) is type(without)


@pytest.mark.parametrize(
    "name, f",
    [
        ("llama", lambda: rough()),
        ("llama", lambda: GSS(2.0)),
        ("llama", lambda: Chain(Temperature(2.0), RationalQuadraticSpline())),
        ("llama", lambda: SoftCap(5.0)),
        ("qwen2", lambda: Chain(Temperature(2.0), SoftCap(5.0))),
        ("cohere", lambda: SoftCap(5.0)),
        ("gemma2", lambda: Chain(Temperature(2.0), SoftCap(5.0))),  # behind its cap
    ],
)  # fmt: skip
def test_what_does_not_fold_stays_as_it_is(name: str, f: Any) -> None:
    model, (tokens, labels) = pair(name, f())[1], batch()
    wanted, kind, config = model(tokens).logits, type(model), copy.deepcopy(model.config.to_dict())
    gradient = torch.autograd.grad(model(tokens, labels=labels).loss, model.get_output_embeddings().weight)[0]
    with pytest.raises(ValueError, match=r"export\(model, path\) writes"):
        fold(model, untie=True)
    assert type(model) is kind and model.config.to_dict() == config and model.training
    assert torch.equal(model(tokens).logits, wanted)
    again = torch.autograd.grad(model(tokens, labels=labels).loss, model.get_output_embeddings().weight)[0]
    torch.testing.assert_close(again, gradient)


def test_fold_refuses_a_head_that_is_not_plain() -> None:
    model = pair(transform=Temperature(2.0))[1]
    model.lm_head.register_forward_hook(lambda head, args, output: output + 1)
    with pytest.raises(ValueError, match="its head has a hook"):
        fold(model)
    assert type(model).__name__ == "MonotonicLlamaForCausalLM"
