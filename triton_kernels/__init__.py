"""Triton kernels, installed as ``monosoftmax.triton_kernels``: the ``triton`` backend.

From the ground up: :mod:`.arithmetic`; :mod:`.transforms` (f, its derivative, its coefficients' gradients);
:mod:`.tiles` and :mod:`.rows` (a row in tiles, its log-sum-exp); :mod:`.coefficient_sums`; the kernels
:mod:`.cross_entropy`, :mod:`.log_softmax` and :mod:`.token_statistics`; their launchers, :mod:`.launch`;
:mod:`.scaling`; the operators, :mod:`.operators`. :mod:`.vocabulary_parallel` has the losses of rows whose columns lie
on several devices. The head whose logits are in no memory: :mod:`.head_tiles`, the kernels
:mod:`.linear_cross_entropy` and :mod:`.linear_cross_entropy_backward`, and the operators, :mod:`.recompute_head`.
"""
