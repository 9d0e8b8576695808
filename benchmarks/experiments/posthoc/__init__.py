"""Transforms put on the output layer of a trained language model, SmolLM2-135M: ``python -m benchmarks run posthoc``.

Units, and the figures of each (losses in nats; a loss of a document is a sum over its tokens):

- ``states``: hidden states of text, computed once into a cache outside of git (about 5 minutes, 310 MB). ``model``,
  ``classes``, ``features``; ``tokens`` and ``documents`` by split, ``fit``, ``valid`` and ``test``; ``test_documents``
  (names ``corpus/document``) and ``test_tokens`` of each; ``logits``: histograms of the trained head's logits.
- ``transforms/NAME``: f fitted alone. ``search``: each ``rate`` with its ``valid_nll``; ``rate`` chosen (0: nothing to
  learn), ``valid_nll``, ``parameters`` (raw), ``test_nll``, ``document_nll`` of each test document; ``bins`` of the
  confidence, each with the sums ``tokens``, ``confidence`` and ``hits``; ``effective_ranks`` of log P by tolerance;
  ``singular_values``, those at the places ``measure.kept(1000)``.
- ``head/NAME-lrRATE/seedSEED``: f and the head fitted together, by the transforms of ``results.head_roles``, each rate
  under seed 0, the chosen rate under all. ``step`` of the best validation, ``valid_nll``, ``test_nll``,
  ``document_nll``, ``bins``; under seed 0 ``effective_ranks`` and ``singular_values``.

``times.states`` of each is the digest of the hidden states. :mod:`.results` has what a report needs of all that.
"""

from .experiment import Posthoc

__all__ = ["Posthoc"]
