"""Word-level language models on real text with any of the output layers.

For other experiments and the report:

- ``settings.Settings``, ``training.prepared(settings)``, ``training.Trainer(corpus, settings, steps=None)`` train one
  model: ``trainer.train()``, then ``trainer.model``, ``trainer.hidden_states(n)``, ``trainer.perplexity("test")``;
- ``corpora.load``, ``corpora.read``, ``corpora.SOURCES``, ``corpora.cache_folder``: the texts;
- ``results.read_cells(results)`` gives a ``CellResults`` for each cell of the main study: ``cell.cell.name``,
  ``cell.row(label)`` with ``runs`` (records by seed), ``perplexities("test")`` and ``effective_rank(1e-4)``,
  ``cell.against(label)`` (by label, ``seeds`` and ``documents``, adjusted by Holm's method),
  ``cell.best_transform()``, and ``results.compare(row, other)`` for two rows alone;
- ``pictures.STYLES``: colour and dashes of each output layer.
"""

from .experiment import LanguageModels

__all__ = ["LanguageModels"]
