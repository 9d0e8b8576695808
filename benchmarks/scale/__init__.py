"""Simulated time and memory of a head by number of devices: ``python -m benchmarks.scale``."""
