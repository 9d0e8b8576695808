"""Word-level language models on real text with any of the output layers: ``python -m benchmarks.language_model``."""
