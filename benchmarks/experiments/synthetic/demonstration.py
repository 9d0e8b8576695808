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


def demonstration(steps: int = 200) -> list[dict[str, str]]:
    """Rows of a table, with KL in nats, after training on the first problem of the main cell; the same each time."""
    results, rows = Store(Synthetic.name).results(), []
    # What is loaded at the first step is none of the first method's time.
    train(Training(replace(MAIN, steps=1), "linear", SEEDS[0], 0.1))
    for method in ("linear", "temperature", "plif", "gss", "mos4"):
        lr = best_rate(results, MAIN, method)
        if lr is None:
            raise ExperimentError(f"the search of {method} is missing: {Synthetic().command(f'{MAIN.name}/*')}")
        started = time.monotonic()
        with deterministic(Synthetic.threads):
            found = train(Training(replace(MAIN, steps=steps), method, SEEDS[0], lr)).figures
        row = {"method": method, "KL": f"{found['kl']:.3f}", "modes %": f"{100 * found['modes']:.1f}"}
        rows.append(row | {"seconds": f"{time.monotonic() - started:.1f}"})
    return rows
