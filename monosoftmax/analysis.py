"""What a trained output layer looks like: its learned transform, and the rank of its log-probabilities.

The plots need matplotlib, which nothing else here does: ``pip install monosoftmax[plots]``.
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

#: Label of the axes that hold the histogram of plot_transform.
_HISTOGRAM = "histogram of the logits"


def spectrum(log_probs: Tensor) -> Tensor:
    """Singular values of a matrix of log-probabilities, largest first.

    Nothing is centred. For Linear-Softmax log P = H W^T + 1 b^T - s 1^T, with s the normalisers of the rows, so that at
    most d + 2 singular values (d + 1 without b) are not rounding noise. That noise is the one of ``log_probs``: about
    1e-7 of the largest value for float32, less where the log-probabilities were computed in float64.

    Args:
        log_probs: (N, V) or (..., V), all of whose leading dimensions are rows; of any floating-point dtype.

    Returns:
        (min(N, V),), float64, on the device of ``log_probs``, detached.

    Raises:
        TypeError: ``log_probs`` is not a floating-point tensor.
        ValueError: it has fewer than 2 dimensions, no elements, or an element that is not finite (as of a masked class:
            leave its column out).
    """
    _check_floating("log_probs", log_probs)
    if log_probs.dim() < 2 or log_probs.numel() == 0:
        raise ValueError(f"log_probs must have shape (..., V) and not be empty, got {tuple(log_probs.shape)}")
    _check_finite("log_probs", log_probs)
    rows = log_probs.detach().reshape(-1, log_probs.shape[-1]).double()
    values: Tensor = torch.linalg.svdvals(rows)
    return values


def effective_rank(matrix_or_singular_values: Tensor, tolerance: float = 1e-4) -> int:
    r"""The smallest k whose leading k squared singular values hold at least (1 - ``tolerance``) of their sum.

    It says how much of the matrix needs rank, where a numerical rank counts rounding noise: a perturbation far below
    anything that matters can take the latter from 10 to 1159.

    Source: Parthiban, Mao, Inkpen, AAAI 2021, supplement, tables 15, 17 and 18, with tolerances 1e-3, 1e-4 and 1e-5.

    Args:
        matrix_or_singular_values: a matrix, (..., V), as for :func:`spectrum`, or singular values, (R,), in any order.
        tolerance: share of the squared Frobenius norm that may be left out, in (0, 1).

    Returns:
        k; 0 for a matrix of zeros.

    Raises:
        TypeError: the tensor is not floating-point, or ``tolerance`` is not a number.
        ValueError: ``tolerance`` is out of range, the tensor is empty or holds an element that is not finite, or a
            singular value is negative.
    """
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)):
        raise TypeError(f"tolerance must be a number, got {type(tolerance).__name__}")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance must be between 0 and 1, got {tolerance}")
    values = matrix_or_singular_values
    _check_floating("matrix_or_singular_values", values)
    if values.dim() == 1:
        _check_singular_values("matrix_or_singular_values", values)
        values = values.detach().double().sort(descending=True).values
    else:
        values = spectrum(values)
    largest = values[0]
    if largest == 0:
        return 0
    # Summed from the smallest, so that a tolerance below the rounding of the sum itself still means something; scaled,
    # so that no square leaves float64.
    tails = (values / largest).square().flip(0).cumsum(0)
    return int((tails > tolerance * tails[-1]).sum())


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

    The offset f(0) is taken out because softmax does not see it. Call it again with the same ``ax`` and ``label`` to
    compare transforms.

    Args:
        transform: f.
        logits: what f is applied to, of any shape; the plot covers their finite values.
        ax: where to plot; a new figure by default.
        bounds: range of z to plot instead; by default that of ``logits`` or, without them, ``transform.bound`` on both
            sides, 20 for a transform that has no such attribute.
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
        raise ImportError("plots need matplotlib: pip install monosoftmax[plots]") from error
    return pyplot.subplots(figsize=size, layout="constrained")[1]


def _range_of(transform: MonotonicTransform, logits: Tensor | None) -> tuple[float, float]:
    if logits is None:
        bound = float(getattr(transform, "bound", 20.0))
        return -bound, bound
    lo, hi = float(logits.min()), float(logits.max())
    # All logits may be equal.
    return (lo, hi) if lo < hi else (lo - 1, hi + 1)


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
