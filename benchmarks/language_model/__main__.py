"""``python -m benchmarks.language_model``; ``--help`` lists the options."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from . import study_command
from .corpora import CorpusError
from .run import Interrupted, RunError, Session, resume_command
from .settings import parse
from .training import Diverged


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code: 0, 1 for an error, 130 after Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if any(argument.split("=")[0] == "--study" for argument in given):
        return study_command.main(given)
    run = parse(given)
    try:
        Session(run).execute()
    except (Interrupted, KeyboardInterrupt):
        print(f"Interrupted. Go on with: {resume_command(given)}", file=sys.stderr)
        return 130
    except (CorpusError, Diverged, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
