"""Looks at a trained output layer: its learned transform, and the rank of its log-probabilities.

Only the plots need matplotlib: ``pip install matplotlib``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from .transforms import MonotonicTransform

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: The label of the axes with the histogram of plot_transform.
_HISTOGRAM = "histogram of the logits"
#: The additional random vectors of leading_spectrum, beyond the number of values.
_OVERSAMPLING = 10
#: The rest of a sum near 1, over a million squares, has rounding errors of about 1e-15.
_LEAST_TOLERANCE = 1e-12


def spectrum(log_probs: Tensor) -> Tensor:
    """Singular values of a matrix of log-probabilities, largest first.

    Nothing is centred. For Linear-Softmax log P = H W^T + 1 b^T - s 1^T, with s the normalisers of the rows, so that at
    most d + 2 singular values (d + 1 without b) are not rounding noise. The noise comes from ``log_probs``: about 1e-7
    of the largest value for float32, less if the log-probabilities were computed in float64.

    Args:
        log_probs: (N, V) or (..., V), in which all leading dimensions are rows; of any floating-point dtype.

    Returns:
        (min(N, V),), float64, on the device of ``log_probs``, detached.

    Raises:
        TypeError: ``log_probs`` is not a floating-point tensor.
        ValueError: it has fewer than 2 dimensions, no elements, or an element that is not finite (as of a masked class:
            leave its column out).
    """
    values: Tensor = torch.linalg.svdvals(_rows("log_probs", log_probs))
    return values


def leading_spectrum(log_probs: Tensor, k: int, *, iterations: int = 4, seed: int = 0) -> Tensor:
    r"""The ``k`` largest singular values of a large matrix of log-probabilities, by a randomised SVD.

    ``torch.svd_lowrank``, in float64, with ``k + 10`` random vectors: Q Q^T A with an orthonormal Q stands for A. No
    value is larger than the exact one, up to rounding, and the j-th is too small by at most the expected error

        E ||A - Q Q^T A||_2 <= (1 + (k / 9)^(1/2) + e (k + 10)^(1/2) / 10 (min(N, V) - k)^(1/2))^(1 / (2 q + 1)) s_(k+1)

    with q = ``iterations`` and s_(k+1) the first exact singular value left out. The bound is pessimistic: the leading
    values are far closer, the last few are not. The method pays only for ``k`` well below min(N, V).

    Source: Halko, Martinsson, Tropp, *Finding structure with randomness*, SIAM Review 53(2), 2011, algorithm 4.4 and
    corollary 10.10; as in ``torch.svd_lowrank``.

    Args:
        log_probs: (N, V) or (..., V), as for :func:`spectrum`.
        k: the number of singular values, from 1 to min(N, V).
        iterations: power iterations. Each costs two products with the matrix, and raises the weight of the leading
            singular vectors.
        seed: seed of the random vectors. The same seed gives the same values; the global random state stays as it is.

    Returns:
        (k,), float64, largest first, on the device of ``log_probs``, detached.

    Raises:
        TypeError: ``log_probs`` is not a floating-point tensor, or another argument is not an integer.
        ValueError: as for :func:`spectrum`; ``k`` is out of range, or ``iterations`` or ``seed`` is negative.
    """
    rows = _rows("log_probs", log_probs)
    most = min(rows.shape)
    _check_integer("k", k, 1, most)
    _check_integer("iterations", iterations, 0)
    _check_integer("seed", seed, 0)
    cuda = rows.device.type == "cuda"
    # torch.svd_lowrank takes no generator. torch.manual_seed would seed every device, and not restore their states.
    with torch.random.fork_rng(devices=[rows.device] if cuda else []):
        if cuda:
            with torch.cuda.device(rows.device):
                torch.cuda.manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)
        _, values, _ = torch.svd_lowrank(rows, q=min(k + _OVERSAMPLING, most), niter=iterations)
    return values[:k]


def effective_rank(
    matrix_or_singular_values: Tensor,
    tolerance: float = 1e-4,
    *,
    max_rank: int | None = None,
    squared_norm: float | None = None,
    seed: int = 0,
) -> int:
    r"""The smallest k such that the k largest squared singular values hold at least (1 - ``tolerance``) of their sum.

    It says how much of the matrix needs rank. A numerical rank (:func:`press_rank`) counts rounding noise, too.

    The sum is the squared Frobenius norm, which needs no SVD. So a large matrix needs only its leading singular values.
    With ``max_rank``, they come from :func:`leading_spectrum`. That never underestimates k, as none of them is too
    large. Or give leading values yourself, with ``squared_norm``, for several tolerances at once.

    Source: Parthiban, Mao, Inkpen, AAAI 2021, supplement, tables 15, 17 and 18, with tolerances 1e-3, 1e-4 and 1e-5.

    Args:
        matrix_or_singular_values: a matrix, (..., V), as for :func:`spectrum`, or singular values, (R,), in any order.
        tolerance: share of the squared Frobenius norm that may be left out, in (0, 1).
        max_rank: with a matrix: the number of leading singular values to compute; by default all, by an exact SVD.
        squared_norm: with leading singular values: the squared Frobenius norm of their matrix. By default the singular
            values are complete.
        seed: with ``max_rank``: the seed of :func:`leading_spectrum`.

    Returns:
        k; 0 for a matrix of zeros.

    Raises:
        TypeError: the tensor is not floating-point, ``tolerance`` or ``squared_norm`` is not a number, or ``max_rank``
            or ``seed`` is not an integer.
        ValueError: ``tolerance`` is out of range, the tensor is empty or holds an element that is not finite, or a
            singular value is negative; ``max_rank`` is given with singular values, or ``squared_norm`` with a matrix;
            ``squared_norm`` is smaller than the sum of the squares given; with either of them, ``tolerance`` is below
            1e-12, which a difference of sums cannot resolve, or k is larger than the number of leading values.
    """
    _check_number("tolerance", tolerance)
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance must be between 0 and 1, got {tolerance}")
    values = matrix_or_singular_values
    _check_floating("matrix_or_singular_values", values)
    leading = max_rank is not None or squared_norm is not None
    if leading and tolerance < _LEAST_TOLERANCE:
        raise ValueError(f"tolerance must be at least {_LEAST_TOLERANCE:g} with leading values only, got {tolerance:g}")
    total = None
    if values.dim() == 1:
        if max_rank is not None:
            raise ValueError(f"max_rank goes with a matrix, got {max_rank} with singular values: use squared_norm")
        _check_singular_values("matrix_or_singular_values", values)
        values = values.detach().double().sort(descending=True).values
        if squared_norm is not None:
            _check_number("squared_norm", squared_norm)
            total = torch.tensor(float(squared_norm), dtype=torch.float64, device=values.device)
    elif squared_norm is not None:
        raise ValueError(f"squared_norm goes with singular values, got {squared_norm:g} with a matrix: use max_rank")
    elif max_rank is not None:
        rows = _rows("matrix_or_singular_values", values)
        _check_integer("max_rank", max_rank, 1, min(rows.shape))
        total = torch.linalg.vector_norm(rows).square()
        values = leading_spectrum(rows, max_rank, seed=seed)
    else:
        values = spectrum(values)
    if total is not None:
        return _rank_of_leading(values, total, tolerance)
    largest = values[0]
    if largest == 0:
        return 0
    # Summed from the smallest value, so that a tolerance below the rounding of the whole sum still has a meaning.
    # Scaled, so that no square leaves float64.
    tails = (values / largest).square().flip(0).cumsum(0)
    return int((tails > tolerance * tails[-1]).sum())


def press_rank(matrix: Tensor) -> int:
    r"""Numerical rank: the number of singular values above s_1 * eps / 2 * (N + V + 1)^(1/2), with eps of the dtype.

    Published ranks of log-probability matrices are this number. It answers whether a matrix differs from a matrix of
    lower rank by more than the rounding of an SVD, not whether the difference matters: noise just above eps of the
    largest singular value raises it from 10 to the full size. Use :func:`effective_rank` to compare output layers.

    The singular values are computed in float64 for every dtype. So for float32 the rank counts the rounding of the
    matrix, and not the rounding of the SVD. The threshold of ``numpy.linalg.matrix_rank`` is s_1 * eps * max(N, V).

    Source: Press, Teukolsky, Vetterling, Flannery, *Numerical Recipes*, 3rd edition, 2007, section 2.6.

    Args:
        matrix: (N, V) or (..., V), as for :func:`spectrum`; its dtype sets eps.

    Returns:
        The rank; 0 for a matrix of zeros.

    Raises:
        TypeError: ``matrix`` is not a floating-point tensor.
        ValueError: as for :func:`spectrum`.
    """
    rows = _rows("matrix", matrix)
    values = torch.linalg.svdvals(rows)
    threshold = values[0] * (torch.finfo(matrix.dtype).eps / 2 * math.sqrt(sum(rows.shape) + 1))
    return int((values > threshold).sum())


def plot_transform(
    transform: MonotonicTransform,
    logits: Tensor | None = None,
    ax: Axes | None = None,
    *,
    bounds: tuple[float, float] | None = None,
    label: str | None = None,
    bins: int = 80,
) -> Axes:
    """Plot f(z) - f(0), with the identity as a thin line and, given logits, their histogram beneath.

    f(0) is subtracted because softmax does not see an offset. To compare transforms, call this function again
    with the same ``ax`` and another ``label``.

    Args:
        transform: f.
        logits: the logits, of any shape; the plot covers their finite values.
        ax: where to plot; a new figure by default.
        bounds: range of z to plot; by default the range of ``logits`` or, without them, ``transform.bound`` on both
            sides, 20 for a transform without this attribute.
        label: name of f in the legend; the class of ``transform`` by default.
        bins: bars of the histogram.

    Returns:
        The axes of f; the histogram has its own, in ``ax.child_axes``.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: ``transform`` is not a transform, or ``logits`` not a floating-point tensor.
        ValueError: ``logits`` has no finite value, or ``bounds`` is not a finite, increasing pair.
    """
    if not isinstance(transform, MonotonicTransform):
        raise TypeError(f"transform must be a monosoftmax transform, got {type(transform).__name__}")
    counted = None
    if logits is not None:
        _check_floating("logits", logits)
        counted = logits.detach().cpu().flatten().float()
        counted = counted[torch.isfinite(counted)]
        if counted.numel() == 0:
            raise ValueError("logits must hold a finite value, got none")
    lo, hi = _range_of(transform, counted) if bounds is None else bounds
    if not (math.isfinite(lo) and math.isfinite(hi) and lo < hi):
        raise ValueError(f"bounds must be finite and increasing, got {(lo, hi)}")

    if ax is None:
        ax = _new_axes((5.0, 4.5 if counted is not None else 3.8))
    z = torch.linspace(lo, hi, 2001, dtype=torch.float64)
    device = next((tensor.device for tensor in transform.state_dict().values()), z.device)
    with torch.no_grad():
        y = (transform(z.to(device)) - transform(z.new_zeros(1).to(device))).cpu()
    if any(line.get_label() == "identity" for line in ax.lines):
        ax.set_xlim(min(lo, ax.get_xlim()[0]), max(hi, ax.get_xlim()[1]))
    else:
        ax.axline((0.0, 0.0), slope=1.0, color="0.6", linewidth=0.8, zorder=1, label="identity")
        ax.set_xlim(lo, hi)
    (line,) = ax.plot(z, y, linewidth=1.8, zorder=2, label=type(transform).__name__ if label is None else label)
    ax.set_ylabel("f(z) - f(0)")
    ax.legend(frameon=False)
    below = next((cast("Axes", child) for child in ax.child_axes if child.get_label() == _HISTOGRAM), ax)
    if counted is not None:
        if below is ax:
            below = ax.inset_axes((0.0, -0.3, 1.0, 0.25), sharex=ax, label=_HISTOGRAM)
            ax.tick_params(labelbottom=False)
            ax.set_xlabel("")
        below.hist(counted.numpy(), bins=bins, range=(lo, hi), density=True, alpha=0.5, color=line.get_color())
        below.set_yticks([])
        below.set_ylabel("logits")
        below.spines[["top", "right", "left"]].set_visible(False)
    below.set_xlabel("logit z")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def plot_spectrum(spectra: Mapping[str, Tensor], ax: Axes | None = None) -> Axes:
    """Plot singular values, each spectrum divided by its largest value, on logarithmic axes.

    Args:
        spectra: singular values, (R,), as :func:`spectrum` returns them, by the name to show in the legend.
        ax: where to plot; a new figure by default.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: ``spectra`` is not a mapping of floating-point tensors.
        ValueError: it is empty, or a tensor in it is not 1-dimensional, empty, all zero, negative or not finite.
    """
    if not isinstance(spectra, Mapping):
        raise TypeError(f"spectra must map names to singular values, got {type(spectra).__name__}")
    if not spectra:
        raise ValueError("spectra must hold at least one spectrum, got none")
    for name, values in spectra.items():
        _check_floating(f"spectra[{name!r}]", values)
        _check_singular_values(f"spectra[{name!r}]", values)
        if not bool(values.any()):
            raise ValueError(f"spectra[{name!r}] must have a positive value, got zeros only")
    if ax is None:
        ax = _new_axes((5.0, 3.8))
    for name, values in spectra.items():
        values = values.detach().cpu().double().sort(descending=True).values
        ax.loglog(range(1, len(values) + 1), values / values[0], linewidth=1.5, label=name)
    ax.set_xlabel("index k")
    ax.set_ylabel("singular value k / singular value 1")
    ax.grid(True, which="major", color="0.9", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    return ax


def _new_axes(size: tuple[float, float]) -> Axes:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install matplotlib") from error
    return pyplot.subplots(figsize=size, layout="constrained")[1]


def _range_of(transform: MonotonicTransform, logits: Tensor | None) -> tuple[float, float]:
    if logits is None:
        bound = float(getattr(transform, "bound", 20.0))
        return -bound, bound
    lo, hi = float(logits.min()), float(logits.max())
    # If all logits are equal, the range would be empty.
    return (lo, hi) if lo < hi else (lo - 1, hi + 1)


def _rank_of_leading(values: Tensor, total: Tensor, tolerance: float) -> int:
    if not bool(torch.isfinite(total)):
        raise ValueError(f"squared_norm must be finite, got {float(total):g}")
    largest = values[0]
    if total == 0 and largest == 0:
        return 0
    kept = values.square().cumsum(0)
    if kept[-1] > total * (1 + _LEAST_TOLERANCE):
        raise ValueError(
            f"squared_norm must be at least the sum of the squared singular values, {float(kept[-1]):g}, "
            f"got {float(total):g}"
        )
    left_out = 1 - kept / total
    rank = int((left_out > tolerance).sum()) + 1
    if rank > len(values):
        raise ValueError(
            f"the leading {len(values)} singular values leave out {float(left_out[-1]):.3g} of the squared norm, more "
            f"than the tolerance {tolerance:g}: give a larger max_rank, or more singular values"
        )
    return rank


def _rows(name: str, matrix: Tensor) -> Tensor:
    """Checks a matrix (N, V), and returns it in float64."""
    _check_floating(name, matrix)
    if matrix.dim() < 2 or matrix.numel() == 0:
        raise ValueError(f"{name} must have shape (..., V) and not be empty, got {tuple(matrix.shape)}")
    _check_finite(name, matrix)
    return matrix.detach().reshape(-1, matrix.shape[-1]).double()


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def _check_integer(name: str, value: object, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < least or (most is not None and value > most):
        wanted = f"at least {least}" if most is None else f"from {least} to min(N, V) = {most}"
        raise ValueError(f"{name} must be {wanted}, got {value}")


def _check_floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")


def _check_finite(name: str, tensor: Tensor) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} must be finite, got {int((~torch.isfinite(tensor)).sum())} elements that are not")


def _check_singular_values(name: str, values: Tensor) -> None:
    if values.dim() != 1 or values.numel() == 0:
        raise ValueError(f"{name} must have shape (R,) and not be empty, got {tuple(values.shape)}")
    _check_finite(name, values)
    if bool((values < 0).any()):
        raise ValueError(f"{name} must not be negative, got {float(values.min()):g}")
