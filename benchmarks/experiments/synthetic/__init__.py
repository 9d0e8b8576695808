"""Random distributions: how well output layers of small dimension match targets from a Dirichlet distribution.

A unit is a training. Their names, with cells like ``n400-m300-d10-alpha0.1`` (N contexts, M words, dimension d, alpha):

- ``CELL/METHOD/search-lr0.03``: on the problem of a seed of its own, one for each learning rate;
- ``CELL/METHOD/seed0``: at the rate with the lowest KL of the search, one for each seed;
- ``timing/CELL``: the losses and the steps of all methods in turn. It has ``times`` only.

Figures of a training: ``kl``, the mean KL(P || Q) in nats; ``modes`` and ``top5``, shares of the most probable words
that are matched; ``ranks``, effective ranks of log Q by tolerance; or ``diverged_at`` alone, the step whose loss was no
number. Searches have ``kl`` only; the first seed of the main cell has ``shape``, its learned f. Times: ``step_seconds``
(median processor time of a step) and ``backend``, that of the loss.
"""

from .demonstration import demonstration
from .experiment import Synthetic

__all__ = ["Synthetic", "demonstration"]
