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
    """Return the median milliseconds of one answer, for one image and for a batch."""
    milliseconds = {}
    for size, times in TIMED.items():
        images = np.resize(squares[: min(size, len(squares))], (size, *squares.shape[1:]))
        predictor.scores(images)
        spent = []
        for _ in range(times):
            start = time.perf_counter()
            predictor.scores(images)
            spent.append(1000 * (time.perf_counter() - start))
        milliseconds[str(size)] = median(spent)
    return {"provider": predictor.provider, "milliseconds": milliseconds}
