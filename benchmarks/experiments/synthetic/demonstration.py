"""What f can do, within seconds: a few methods on the main problem, at the rates that the search found."""

from __future__ import annotations

import time
from dataclasses import replace

from ...engine.experiment import ExperimentError
from ...engine.runner import deterministic
from ...engine.store import Store
from .experiment import Synthetic, best_rate
from .settings import MAIN, SEEDS, Training
from .training import train

METHODS = ("linear", "temperature", "plif", "gss", "mos4")


def demonstration(steps: int = 300) -> list[dict[str, str]]:
    """Train ``METHODS`` on the first problem of the main cell; the same figures each time.

    Returns:
        Rows of a table: ``method``, ``KL`` in nats, ``modes %``, and ``seconds`` of the training.

    Raises:
        ExperimentError: the results have no search.
    """
    results, rows = Store(Synthetic.name).results(), []
    # What is loaded at the first step is none of the first method's time.
    train(Training(replace(MAIN, steps=1), METHODS[0], SEEDS[0], 0.1))
    for method in METHODS:
        lr = best_rate(results, MAIN, method)
        if lr is None:
            raise ExperimentError(f"the search of {method} is missing: {Synthetic().command(f'{MAIN.name}/*')}")
        started = time.monotonic()
        with deterministic(Synthetic.threads):
            found = train(Training(replace(MAIN, steps=steps), method, SEEDS[0], lr)).figures
        row = {"method": method, "KL": f"{found['kl']:.3f}", "modes %": f"{100 * found['modes']:.1f}"}
        rows.append({**row, "seconds": f"{time.monotonic() - started:.1f}"})
    return rows
