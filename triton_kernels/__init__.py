"""Triton kernels, installed as ``monosoftmax.triton_kernels``: the ``triton`` backend.

From the ground up: :mod:`.arithmetic`; :mod:`.transforms` (f, its derivative, its coefficients' gradients);
:mod:`.tiles` and :mod:`.rows` (a row in tiles, its log-sum-exp); :mod:`.coefficient_sums`; the kernels
:mod:`.cross_entropy`, :mod:`.log_softmax` and :mod:`.token_statistics`; what their launches have in common,
:mod:`.launch`; :mod:`.scaling`; :mod:`.plif_coefficients`; the functions of the backend, :mod:`.operators`.
The head whose logits are in no memory: :mod:`.head_tiles`, the kernels :mod:`.linear_cross_entropy` and
:mod:`.linear_cross_entropy_backward`, and the function of the backend, :mod:`.recompute_head`.
"""
