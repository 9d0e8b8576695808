"""Effective ranks and spectra of log-probability matrices: of random factors, with noise, and of trained heads.

A unit is one matrix, or one head with its matrices before and after f:

- ``random-d16/F/seed0``: log softmax f(H W^T) with random H and W of that dimension;
- ``noise/c1e-24``: a matrix of known rank with noise, the ``c`` that the published experiment has;
- ``large/F``: a larger random matrix, of which the leading singular values are computed only;
- ``synthetic/METHOD/seed0``: a head that was trained on the main cell of the synthetic experiment; ``kl``, ``modes``;
- ``language_model/OUTPUT``: a head of a small language model, with ``valid_perplexity`` and ``tokens`` of training.

Figures of a matrix: ``ranks``, the effective ranks by tolerance; ``press``, the numerical ranks by dtype; and, where
the report shows them, ``centred``, the ranks without means of rows and columns, and the largest ``singular_values``.
Heads have them as ``before`` (None for mixtures) and ``after`` f. Units that were done before the engine have no
``seconds``.
"""

from .experiment import Rank

__all__ = ["Rank"]
