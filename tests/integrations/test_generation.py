"""What models with f generate, compared with probabilities softmax(f(z)) by hand from the logits z of plain models."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from tiny_models import batch, pair, plain, rough

from monosoftmax import reference
from monosoftmax.integrations.transformers import add_transform
from monosoftmax.transforms import MonotonicTransform

NAMES = ("llama", "qwen2", "gemma2", "gpt2", "mixtral")
every_model = pytest.mark.parametrize("name", NAMES)

TOKENS = batch(rows=3, length=7)[0]
#: No token ends a sequence, so that all have one length.
OPTIONS: dict[str, Any] = {"max_new_tokens": 5, "pad_token_id": 0, "return_dict_in_generate": True}


def both(name: str, f: MonotonicTransform | None = None) -> tuple[Any, Any]:
    """A plain model, and the same with f, for generation without an end."""
    models = pair(name, steep() if f is None else f)
    for model in models:
        model.eval().generation_config.eos_token_id = None
        # Mixtral's own term of the loss fails in generation with a mask, also without f.
        model.config.output_router_logits = False
    return models


def steep() -> MonotonicTransform:
    """An f that makes the likely ones of softmax(z) much likelier, and changes the order of sums of log p."""
    f = rough()
    with torch.no_grad():
        f.raw_slope.mul_(2.0).add_(1.0)
    return f


def by_hand(model: Any, f: MonotonicTransform) -> Any:
    """``model``, whose class is changed by hand: its forward gives f(z), by the reference."""
    kind = type(model)

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = kind.forward(self, *args, **kwargs)
        output.logits = reference.transformed(output.logits, f).to(output.logits.dtype)
        return output

    changed = copy.deepcopy(model)
    changed.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    return changed


@torch.no_grad()
def log_p(without: Any, tokens: torch.Tensor, f: MonotonicTransform | None) -> torch.Tensor:
    """(B, V), the log probabilities of the next token, from all tokens anew."""
    z = without(tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits[:, -1]
    return (z if f is None else reference.transformed(z, f)).log_softmax(-1)


def generated(model: Any, tokens: torch.Tensor = TOKENS, **options: Any) -> Any:
    torch.manual_seed(3)
    options = {"attention_mask": torch.ones_like(tokens), "do_sample": False, **OPTIONS, **options}
    return model.generate(tokens, **options)


@every_model
def test_greedy_logits_and_scores(name: str) -> None:
    without, model = both(name)
    found = generated(model, output_logits=True, output_scores=True, repetition_penalty=1.3)
    tokens = TOKENS
    for logits, scores in zip(found.logits, found.scores, strict=True):
        wanted = log_p(without, tokens, model.logit_transform)
        torch.testing.assert_close(logits.log_softmax(-1), wanted, rtol=1e-4, atol=1e-4)
        # The penalty is for f(z), as it is for the logits of a model that caps them itself.
        with torch.no_grad():
            y = reference.transformed(without(tokens, use_cache=False).logits[:, -1], model.logit_transform)
        seen = torch.zeros_like(y, dtype=torch.bool).scatter(1, tokens, True)
        penalised = torch.where(seen, torch.where(y < 0, y * 1.3, y / 1.3), y)
        torch.testing.assert_close(scores, penalised, rtol=1e-4, atol=1e-4)
        tokens = torch.cat([tokens, penalised.argmax(-1, keepdim=True)], 1)
    assert torch.equal(found.sequences, tokens)


@torch.no_grad()
def beams_of(without: Any, f: MonotonicTransform | None, beams: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Beam search on log softmax(f(z)), written out: (B * beams, T) and the mean of log p of each."""
    sequences, means = [], []
    for row in TOKENS:
        tokens, total = row[None], torch.zeros(1)
        for _ in range(OPTIONS["max_new_tokens"]):
            candidates = total[:, None] + log_p(without, tokens, f)
            total, place = candidates.flatten().topk(beams)
            parent, token = place // candidates.shape[1], place % candidates.shape[1]
            tokens = torch.cat([tokens[parent], token[:, None]], 1)
        sequences.append(tokens)
        means.append(total / OPTIONS["max_new_tokens"])
    return torch.cat(sequences), torch.cat(means)


@every_model
def test_beam_search(name: str) -> None:
    without, model = both(name)
    found = generated(model, num_beams=4, num_return_sequences=4, output_scores=True)
    sequences, means = beams_of(without, model.logit_transform, 4)
    assert torch.equal(found.sequences, sequences)
    torch.testing.assert_close(found.sequences_scores, means, rtol=1e-4, atol=1e-4)
    if name == "llama":  # where f makes a difference
        assert not torch.equal(beams_of(without, None, 4)[0], sequences)


@every_model
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 1.5, "top_k": 20},
        {"top_p": 0.8, "top_k": 0},
        {"min_p": 0.05, "repetition_penalty": 1.2, "no_repeat_ngram_size": 2},
        {"num_beams": 3, "temperature": 0.9},
    ],
    ids=str,
)
@pytest.mark.grid
def test_sampling_is_that_of_logits_by_hand(name: str, options: dict[str, Any]) -> None:
    without, model = both(name)
    found = generated(model, do_sample=True, output_scores=True, **options)
    wanted = generated(by_hand(without, model.logit_transform), do_sample=True, output_scores=True, **options)
    assert torch.equal(found.sequences, wanted.sequences)
    for scores, by_f in zip(found.scores, wanted.scores, strict=True):
        torch.testing.assert_close(scores, by_f, rtol=1e-4, atol=1e-4)


def chi_square(counts: torch.Tensor, p: torch.Tensor) -> float:
    """How many standard deviations Pearson's statistic lies above its mean; classes with few are taken together."""
    expected = p * counts.sum()
    few = expected < 5
    if few.any():
        counts = torch.cat([counts[~few], counts[few].sum()[None]])
        expected = torch.cat([expected[~few], expected[few].sum()[None]])
    freedom = len(expected) - 1
    return float(((counts - expected).square() / expected).sum() - freedom) / (2 * freedom) ** 0.5


@torch.no_grad()
def test_samples_are_distributed_as_softmax_of_f() -> None:
    without, model = both("gemma2")
    prompt, temperature, samples = TOKENS[:1, :3], 0.7, 20_000
    found = generated(
        model, prompt, do_sample=True, temperature=temperature, top_k=0, max_new_tokens=1, num_return_sequences=samples
    )
    counts = found.sequences[:, -1].bincount(minlength=model.config.vocab_size).double()
    z = without(prompt).logits[0, -1]
    p = (reference.transformed(z, model.logit_transform).double() / temperature).softmax(-1)
    assert chi_square(counts, p) < 5
    # The same samples are not those of softmax(z / temperature).
    assert chi_square(counts, (z.double() / temperature).softmax(-1)) > 50


def assistant(f: MonotonicTransform | None) -> Any:
    """A smaller model that often, but not always, agrees."""
    model = plain("llama").eval()
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    model.generation_config.eos_token_id = None
    model.generation_config.num_assistant_tokens = 3
    return model if f is None else add_transform(model, f)


@pytest.mark.parametrize("helper", ["plain", "with f", "prompt lookup"])
def test_assisted_decoding(helper: str) -> None:
    without, model = both("llama")
    f = model.logit_transform
    prompt = TOKENS[:1].repeat(1, 2)
    ways = [
        {"prompt_lookup_num_tokens": 2} if helper == "prompt lookup" else {"assistant_model": small}
        for small in (assistant(f if helper == "with f" else None), assistant(None))
    ]
    if helper == "with f":
        ways[1]["assistant_model"] = by_hand(assistant(None), f)
    options = {"max_new_tokens": 12}
    greedy = generated(model, prompt, **options, **ways[0])
    assert torch.equal(greedy.sequences, generated(model, prompt, **options).sequences)
    # Accepted with min(1, p / q), where p, and q of an assistant with f, are those of f(z).
    options |= {"do_sample": True, "temperature": 0.8, "output_scores": True}
    found = generated(model, prompt, **options, **ways[0])
    wanted = generated(by_hand(without, f), prompt, **options, **ways[1])
    assert torch.equal(found.sequences, wanted.sequences)
    torch.testing.assert_close(torch.stack(found.scores), torch.stack(wanted.scores), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_left_padding(name: str) -> None:
    _, model = both(name)
    lengths = (7, 4, 2)
    padded = torch.zeros_like(TOKENS)
    for row, length in enumerate(lengths):
        padded[row, -length:] = TOKENS[row, :length]
    mask = (padded != 0).long()
    options = {"num_beams": 2, "output_scores": True}
    found = generated(model, padded, attention_mask=mask, **options)
    for row, length in enumerate(lengths):
        alone = generated(model, TOKENS[row : row + 1, :length], **options)
        assert torch.equal(found.sequences[row, 7:], alone.sequences[0, length:])
        torch.testing.assert_close(found.sequences_scores[row], alone.sequences_scores[0], rtol=1e-4, atol=1e-4)


@every_model
@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 5])], ids=["last", "last 3", "two"])
def test_logits_to_keep(name: str, keep: int | torch.Tensor) -> None:
    without, model = both(name)
    with torch.no_grad():
        z = without(TOKENS).logits[:, slice(-keep, None) if isinstance(keep, int) else keep]
        found = model(TOKENS, logits_to_keep=keep).logits
    wanted = reference.transformed(z, model.logit_transform)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@every_model
def test_static_cache(name: str) -> None:
    without, model = both(name)
    f = model.logit_transform
    options = {"cache_implementation": "static", "output_scores": True, "do_sample": True, "temperature": 0.8}
    found = generated(model, **options)
    wanted = generated(by_hand(without, f), **{**options, "cache_implementation": None})
    assert torch.equal(found.sequences, wanted.sequences)
    torch.testing.assert_close(torch.stack(found.scores), torch.stack(wanted.scores), rtol=1e-4, atol=1e-4)


@pytest.mark.seconds
def test_compiled_forward_with_a_static_cache() -> None:
    without, model = both("llama")
    options = {"cache_implementation": "static", "output_scores": True, "do_sample": True, "max_new_tokens": 4}
    model.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    found = generated(model, **options)
    wanted = generated(by_hand(without, model.logit_transform), **{**options, "cache_implementation": None})
    assert torch.equal(found.sequences, wanted.sequences)
    torch.testing.assert_close(torch.stack(found.scores), torch.stack(wanted.scores), rtol=1e-4, atol=1e-4)


@every_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(name: str, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    without, model = both(name)
    exact = model.logit_transform().detach().clone()
    without, model = without.to(dtype), model.to(dtype)
    with torch.no_grad():
        z, found = without(TOKENS).logits, model(TOKENS).logits
    assert z.dtype == found.dtype == dtype and torch.equal(model.logit_transform(), exact)
    wanted = model.logit_transform.evaluate(z.float(), exact)
    assert torch.equal(found, wanted.to(dtype))
    rounded = model.logit_transform.evaluate(z, exact.to(dtype))
    assert not torch.equal(found, rounded)
    if dtype == torch.bfloat16:
        sequences = generated(model, num_beams=2).sequences
        assert torch.equal(sequences, generated(by_hand(without, model.logit_transform), num_beams=2).sequences)
