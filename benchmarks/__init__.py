"""Benchmarks of monosoftmax. They use its public interface only and are not installed with it."""
