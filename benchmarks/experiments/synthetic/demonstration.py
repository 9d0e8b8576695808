"""What f can do, within seconds: a few methods on the main problem, at the rates that the search found."""

from __future__ import annotations

import time
from dataclasses import replace

from ...engine.runner import deterministic
from ...engine.store import Store
from .experiment import Synthetic, best_rate
from .settings import MAIN, SEEDS, Training
from .training import train

_METHODS = ("linear", "temperature", "plif", "gss", "mos4")
_STEPS = 300


def demonstration(steps: int = _STEPS) -> list[dict[str, str]]:
    """Train methods on the first problem of the main cell; the same figures each time.

    Args:
        steps: of each training.

    Returns:
        Rows of a table: ``method``, ``KL`` in nats, ``modes %`` and the ``seconds`` that the training took.

    Raises:
        LookupError: the results have no search.
    """
    results, rows = Store(Synthetic.name).results(), []
    for method in _METHODS:
        lr = best_rate(results, MAIN, method)
        if lr is None:
            raise LookupError(f"the search of {method} is missing: {Synthetic().command(f'{MAIN.name}/*')}")
        started = time.monotonic()
        with deterministic(Synthetic.threads):
            figures = train(Training(replace(MAIN, steps=steps), method, SEEDS[0], lr)).figures
        rows.append(
            {
                "method": method,
                "KL": f"{figures['kl']:.3f}",
                "modes %": f"{100 * figures['modes']:.1f}",
                "seconds": f"{time.monotonic() - started:.1f}",
            }
        )
    return rows
