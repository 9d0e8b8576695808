"""Triton kernels, installed as ``monosoftmax.triton_kernels``. This version has none yet: see the CHANGELOG."""
