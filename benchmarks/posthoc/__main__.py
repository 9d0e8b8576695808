"""``python -m benchmarks.posthoc``; ``--help`` lists the options."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence

import torch

from ..language_model.corpora import CorpusError
from .fit_transforms import Diverged
from .records import RecordError
from .run import Study, verify
from .settings import STAGES, Settings, parse, states_folder
from .states import StatesError, load, place_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 1 for an error or figures that differ, 130 after Ctrl-C."""
    options = parse(list(sys.argv[1:] if arguments is None else arguments))
    try:
        if options.report:
            from .report import write

            print(write(options.results))
            return 0
        return _run(options)
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on from here.", file=sys.stderr)
        return 130
    except (CorpusError, Diverged, RecordError, StatesError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run(options) -> int:  # type: ignore[no-untyped-def]
    settings = Settings()
    torch.set_num_threads(settings.threads)
    torch.use_deterministic_algorithms(True)
    minutes = options.limit_minutes
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    cache = states_folder()
    if options.verify and not (place_of(cache, settings.states) / "complete.json").is_file():
        raise StatesError(
            f"{cache} has no hidden states; they take about 5 minutes: python -m benchmarks.posthoc --only states"
        )
    states = load(cache, settings.states, deadline=deadline, say=_say)
    if states is None:
        _say("The hidden states are not complete. The same command goes on from here.")
        return 0
    if options.verify:
        return 0 if verify(states, settings, options.results, _say) else 1
    stages = STAGES if options.only is None else ("states", options.only) if options.only != "states" else ("states",)
    complete = Study(states, settings, options.results, cache, deadline, _say).run(stages)
    _say("complete" if complete else "Not complete. The same command goes on from here.")
    return 0


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
