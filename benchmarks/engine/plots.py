"""One style for all pictures, and PNG files that are small and the same each time."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

_STYLE = {
    "axes.grid": True,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "figure.constrained_layout.use": True,
    "grid.alpha": 0.3,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}
#: Pixels per inch, and colours of a file: a picture of lines and text needs no more.
_DPI, _COLOURS = 90, 64


@contextmanager
def picture(
    path: Path, rows: int = 1, columns: int = 1, size: tuple[float, float] = (3.4, 2.6)
) -> Iterator[np.ndarray]:
    """The axes of a new figure, (rows, columns) of ``size`` inches each, which the block ends as the PNG file ``path``.

    Axes that the block draws nothing into are left out.
    """
    with rc_context(_STYLE):
        figure = Figure(figsize=(size[0] * columns, size[1] * rows))
        grid = figure.subplots(rows, columns, squeeze=False)
        yield grid
        for axes in grid.flat:
            if not axes.has_data():
                axes.set_axis_off()
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=_DPI)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Drawn anew from its pixels: the file does not name the version of matplotlib.
    with Image.open(drawn) as image:
        # Not the median cut, which is the default: it makes one colour of the red and the orange of two lines.
        few = image.convert("RGB").quantize(_COLOURS, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        few.save(path, "PNG", optimize=True)
