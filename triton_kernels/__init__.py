"""Triton kernels, installed as ``monosoftmax.triton_kernels``.

This version has the mathematics of the transforms (:mod:`.transforms`) and first kernels over rows; no backend uses
them yet.
"""
