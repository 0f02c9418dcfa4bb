"""Draw what people would rather look at than read."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tlpipe import files
from tlpipe.data.images import Pixels

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def confusion(path: Path, counts: Sequence[Sequence[int]], labels: Sequence[str]) -> None:
    """Draw the confusion matrix: true classes down, predicted ones across."""
    matrix = np.array(counts)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = max(4.0, 1.6 + 0.5 * len(labels))
    figure = _figure(side, side)
    axes = figure.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(labels)), labels, rotation=90 if max(map(len, labels)) > 2 else 0)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title("Confusion on the test split (images)")
    if len(labels) <= 30:
        for (row, column), count in np.ndenumerate(matrix):
            if count:
                colour = "white" if share[row, column] > 0.5 else "black"
                axes.text(column, row, str(count), ha="center", va="center", color=colour)
    _save(figure, path)


def mistakes(path: Path, squares: Sequence[Pixels], captions: Sequence[str], *, total: int) -> None:
    """Draw the most confident mistakes with their captions, or say that there are none."""
    columns = 6
    rows = max(1, -(-len(squares) // columns))
    figure = _figure(1.7 * columns, 2.0 * rows + 0.5)
    figure.suptitle(f"Most confident mistakes: {len(squares)} of {total}")
    for position, (square, caption) in enumerate(zip(squares, captions, strict=True), start=1):
        axes = figure.add_subplot(rows, columns, position)
        axes.imshow(square)
        axes.set_axis_off()
        axes.set_title(caption, fontsize=8)
    _save(figure, path)


def _figure(width: float, height: float) -> "Figure":
    # The figure alone: pyplot would start a window system where there is one.
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["text.parse_math"] = False  # a class may be called $x
    return Figure(figsize=(width, height), layout="constrained", dpi=110)


def _save(figure: "Figure", path: Path) -> None:
    with files.replacing(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
