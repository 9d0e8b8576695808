"""Triton kernels, installed as ``monosoftmax.triton_kernels``.

This version has the mathematics of the transforms (:mod:`.transforms`) and no kernels over rows yet: no backend uses
it.
"""
