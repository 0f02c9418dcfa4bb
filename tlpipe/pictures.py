"""Draw figures and galleries into PNG files of stable bytes, without a window system."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tlpipe import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure; width and height in inches."""
    # The figure alone: pyplot would start a window system where there is one.
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["text.parse_math"] = False  # a class may be called $x
    return Figure(figsize=(width, height), layout="constrained", dpi=110)


def scale_by_logarithm(axes: "Axes") -> None:
    """Let an x axis go by powers of ten, with plain numbers on it: formulas are not drawn."""
    from matplotlib.ticker import NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def save(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG."""
    with files.replacing(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def gallery(
    path: Path,
    squares: Sequence[npt.NDArray[np.uint8]],
    captions: Sequence[str],
    *,
    title: str,
    columns: int = 6,
) -> None:
    """Draw images with their captions in rows; with none, the title alone."""
    rows = max(1, -(-len(squares) // columns))
    figure = new_figure(1.7 * columns, 2.0 * rows + 0.5)
    figure.suptitle(title)
    for position, (square, caption) in enumerate(zip(squares, captions, strict=True), start=1):
        axes = figure.add_subplot(rows, columns, position)
        axes.imshow(square)
        axes.set_axis_off()
        axes.set_title(caption, fontsize=8)
    save(figure, path)
