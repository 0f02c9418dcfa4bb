"""How long answers take on this machine."""

import time
from statistics import median
from typing import Any

import numpy as np

from tlpipe.data.chunks import Chunks
from tlpipe.inference.predictor import Predictor

# How often an answer for so many images is timed.
TIMED = {1: 15, 32: 3}


def measure(predictor: Predictor, squares: Chunks) -> dict[str, Any]:
    """Return what runs the graph, and the milliseconds for one image and for a batch."""
    milliseconds = {str(size): milliseconds_for(predictor, squares, size) for size in TIMED}
    return {"provider": predictor.provider, "milliseconds": milliseconds}


def milliseconds_for(predictor: Predictor, squares: Chunks, size: int) -> float:
    """Return the median time of an answer for so many images, one of ``TIMED``."""
    images = np.resize(squares[: min(size, len(squares))], (size, *squares.shape[1:]))
    predictor.scores(images)
    spent = []
    for _ in range(TIMED[size]):
        start = time.perf_counter()
        predictor.scores(images)
        spent.append(1000 * (time.perf_counter() - start))
    return median(spent)
