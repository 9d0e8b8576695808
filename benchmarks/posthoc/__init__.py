"""Transforms put on the output layer of a trained language model, SmolLM2-135M: ``python -m benchmarks.posthoc``."""
