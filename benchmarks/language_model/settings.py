"""The settings of a run: presets, and the command line that overrides them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from .corpora import SOURCES, STYLES
from .models import MODELS, OUTPUTS

DEMO_OUTPUTS = ("linear", "temperature", "plif", "sigsoftmax", "softcap", "mos")


@dataclass(frozen=True)
class Settings:
    """Everything that a result depends on, except for versions and the machine. The command line's help explains it."""

    corpus: str
    text_style: str
    vocabulary_size: int | None
    min_count: int
    model: str
    output: tuple[str, ...]
    dim: int
    hidden: int
    layers: int
    heads: int
    experts: int
    dropout: float
    seeds: tuple[int, ...]
    epochs: float | None
    minutes: float | None
    time_limit: float | None
    batch_size: int
    length: int
    lr: float
    transform_lr: float
    clip: float
    validations: int
    evaluation_tokens: int | None
    rank_contexts: int
    device: str
    threads: int

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


_FULL = Settings(
    corpus="sotu",
    text_style="cased",
    vocabulary_size=None,
    min_count=3,
    model="lstm",
    output=(
        "linear",
        "temperature",
        "plif",
        "sigsoftmax",
        "gss",
        "softcap",
        "sigmoidcap",
        "mlp",
        "spline",
        "mos",
        "moc",
    ),
    dim=200,
    hidden=400,
    layers=2,
    heads=4,
    experts=10,
    dropout=0.3,
    seeds=(0, 1, 2),
    epochs=10,
    minutes=None,
    time_limit=None,
    batch_size=20,
    length=35,
    lr=0.002,
    transform_lr=0.01,
    clip=0.25,
    validations=40,
    evaluation_tokens=None,
    rank_contexts=2000,
    device="cpu",
    threads=0,
)
_DEMO = replace(
    _FULL,
    corpus="wiki",
    text_style="ptb",
    vocabulary_size=6000,
    output=DEMO_OUTPUTS,
    dim=96,
    hidden=192,
    layers=1,
    experts=3,
    dropout=0.1,
    seeds=(0,),
    epochs=2,
    time_limit=5.0,
    # A compromise, from one run each: validation perplexity after 245,000 words was 203.7 and 232.0 for linear at 0.003
    # and 0.002, and 303.4 and 278.0 for mos.
    lr=0.003,
    validations=8,
    evaluation_tokens=10000,
    rank_contexts=500,
)
PRESETS = {
    "demo": _DEMO,
    "smoke": replace(
        _DEMO,
        vocabulary_size=2000,
        dim=32,
        hidden=64,
        experts=2,
        epochs=0.05,
        time_limit=0.75,
        validations=4,
        evaluation_tokens=4000,
        rank_contexts=200,
    ),
    "full": _FULL,
}


@dataclass(frozen=True)
class Run:
    """A parsed command line."""

    preset: str
    settings: Settings
    folder: Path
    resume: bool
    overwrite: bool


def parse(arguments: Sequence[str] | None = None) -> Run:
    """The run that ``arguments`` (by default those of the process) ask for. Exits with code 2 on a mistake in them."""
    parser = _parser()
    given = vars(parser.parse_args(arguments))
    preset = given.pop("preset")
    folder, run_name = given.pop("out"), given.pop("run_name")
    resume, overwrite = given.pop("resume"), given.pop("overwrite")
    changes = {name: value for name, value in given.items() if value is not None}
    base = PRESETS[preset]
    if "minutes" in changes and "epochs" in changes:
        parser.error("--minutes and --epochs exclude each other")
    if "minutes" in changes and "time_limit" in changes:
        parser.error("--time-limit goes with --epochs: with --minutes, the layers see different numbers of tokens")
    if "minutes" in changes:
        base = replace(base, epochs=None, time_limit=None)
    elif "epochs" in changes:
        base = replace(base, minutes=None, time_limit=None)
    if "vocabulary_size" in changes:
        changes["vocabulary_size"] = changes["vocabulary_size"] or None
    if "evaluation_tokens" in changes:
        changes["evaluation_tokens"] = changes["evaluation_tokens"] or None
    settings = replace(base, **changes)
    if not settings.threads:
        settings = replace(settings, threads=torch.get_num_threads())
    _check(parser, settings)
    _check_device(parser, settings)
    if folder is None:
        name = run_name or f"{preset}-{settings.corpus}-{settings.model}"
        folder = Path("results") / "language_model" / name
    return Run(preset, settings, folder, resume, overwrite)


def _check(parser: argparse.ArgumentParser, settings: Settings) -> None:
    if settings.model == "transformer" and settings.dim % settings.heads:
        parser.error(f"argument --dim: must be a multiple of --heads, {settings.heads}, got {settings.dim}")
    if settings.vocabulary_size is not None and settings.vocabulary_size < 3:
        parser.error(f"argument --vocabulary-size: must be 0 or at least 3, got {settings.vocabulary_size}")
    if settings.evaluation_tokens is not None and settings.evaluation_tokens < 2 * settings.batch_size:
        parser.error(
            f"argument --evaluation-tokens: must be 0 or at least 2 for each of the {settings.batch_size} streams of a "
            f"batch, got {settings.evaluation_tokens}"
        )


def _check_device(parser: argparse.ArgumentParser, settings: Settings) -> None:
    device = torch.device(settings.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch sees no CUDA device here")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        parser.error(f"argument --device: {device} does not exist, there are {torch.cuda.device_count()} CUDA devices")


def difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    """The settings in which two runs differ, as ``name: one -> other``."""
    names = [field.name for field in fields(Settings) if one.get(field.name) != other.get(field.name)]
    return ", ".join(f"{name}: {one.get(name)} -> {other.get(name)}" for name in names)


class SettingsError(ValueError):
    """Settings that are given as values, not on the command line, are not as they must be."""


def from_values(base: Settings, values: Mapping[str, Any]) -> Settings:
    """``base`` with ``values``, which hold fields of :class:`Settings` as JSON has them and meet the same conditions as
    the options of the command line. The device need not exist here: :func:`require_device` asks for it.

    Raises:
        SettingsError: a name or a value is wrong.
    """
    parser = _parser(_RaisingParser)
    known = {field.name for field in fields(Settings)}
    given = []
    for name, value in values.items():
        if name not in known:
            raise SettingsError(f"{name} is no setting; they are {', '.join(sorted(known))}")
        text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else "0" if value is None else str(value)
        given += [f"--{name.replace('_', '-')}={text}"]
    changes = {name: value for name, value in vars(parser.parse_args(given)).items() if name in values}
    for name in ("vocabulary_size", "evaluation_tokens"):
        if name in changes:
            changes[name] = changes[name] or None
    settings = replace(base, **changes)
    _check(parser, settings)
    return settings


def require_device(settings: Settings) -> None:
    """Raise SettingsError where torch does not see the device."""
    _check_device(_RaisingParser(), settings)


class _RaisingParser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise SettingsError(message)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        """Exit with code 2 and one line: argparse's usage of this many options would hide it."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parser(kind: type[argparse.ArgumentParser] = _Parser) -> argparse.ArgumentParser:
    parser = kind(
        prog="python -m benchmarks.language_model",
        description="Train word-level language models that differ in nothing but their output layer, and compare them.",
        epilog="Many runs with statistics: --study FILE, see --study FILE --help.",
        allow_abbrev=False,
    )
    parser.add_argument("--preset", choices=PRESETS, default="demo", help="where the other settings come from")
    add = parser.add_argument_group("data").add_argument
    add("--corpus", choices=SOURCES)
    add("--text-style", choices=STYLES, help="ptb: lower case, numbers are N")
    add("--vocabulary-size", type=_whole(0), help="keep the most frequent words; 0: all")
    add("--min-count", type=_whole(1), help="rarer words are <unk>")
    add = parser.add_argument_group("model").add_argument
    add("--model", choices=MODELS)
    add("--output", type=_outputs, metavar="NAME,...", help=f"output layers, of {', '.join(OUTPUTS)}")
    add("--dim", type=_whole(1), help="size of the embedding and of what the output layer gets")
    add("--hidden", type=_whole(1), help="size of the inner LSTM layers, or of the Transformer's feed-forward layers")
    add("--layers", type=_whole(1))
    add("--heads", type=_whole(1), help="attention heads of the Transformer")
    add("--experts", type=_whole(1), help="softmaxes in mos, contexts in moc")
    add("--dropout", type=_number(0, 0.99))
    add = parser.add_argument_group("training").add_argument
    add("--seeds", type=_seeds, metavar="SEED,...", help="of initial weights, dropout and order of the documents")
    add("--epochs", type=_number(1e-6), help="every layer sees the same words in the same order, this many times")
    add("--minutes", type=_number(1e-6), help="every layer trains for the same time instead")
    add(
        "--time-limit",
        type=_number(1e-6),
        help="with --epochs: train on fewer words, as many for each layer, so that the whole program takes at most "
        "about this many minutes",
    )
    add("--batch-size", type=_whole(1))
    add("--length", type=_whole(1), help="words through which gradients go back; context of the Transformer")
    add("--lr", type=_number(1e-9), help="of Adam, warmed up and then lowered along a cosine")
    add("--transform-lr", type=_number(0), help="the same for the parameters of transforms")
    add("--clip", type=_number(1e-9), help="largest norm of the gradient")
    add("--device", type=_device, help="cpu, cuda or cuda:N")
    add("--threads", type=_whole(0), help="of torch; 0: as many as torch takes")
    add = parser.add_argument_group("evaluation").add_argument
    add("--validations", type=_whole(1), help="validations during training, at even distances")
    add("--evaluation-tokens", type=_whole(0), help="words of each split to measure the perplexity on; 0: all")
    add("--rank-contexts", type=_whole(2), help="rows of the matrix of log-probabilities whose spectrum is taken")
    add = parser.add_argument_group("results").add_argument
    add("--out", type=Path, help="folder (results/language_model/RUN_NAME)")
    add("--run-name", help="(PRESET-CORPUS-MODEL)")
    add("--resume", action="store_true", help="go on with an interrupted run of the same settings")
    add("--overwrite", action="store_true", help="start anew where there is a run already")
    return parser


def _whole(least: int) -> Any:
    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"must be a whole number, at least {least}, got {text!r}")
        return value

    return convert


def _number(least: float, most: float = math.inf) -> Any:
    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (least <= value <= most and math.isfinite(value)):
            limit = f" and at most {most:g}" if math.isfinite(most) else ""
            raise argparse.ArgumentTypeError(f"must be a number, at least {least:g}{limit}, got {text!r}")
        return value

    return convert


def _outputs(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in OUTPUTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"must be of {', '.join(OUTPUTS)}, got {unknown[0]!r}")
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"must not name a layer twice, got {text!r}")
    return names


def _seeds(text: str) -> tuple[int, ...]:
    seeds = tuple(_whole(0)(part) for part in text.split(","))
    if len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"must not name a seed twice, got {text!r}")
    return seeds


def _device(text: str) -> str:
    kind, _, index = text.partition(":")
    if (
        kind not in ("cpu", "cuda")
        or (index and not index.isdigit())
        or (kind == "cpu" and index)
        or text.endswith(":")
    ):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, got {text!r}")
    return text
