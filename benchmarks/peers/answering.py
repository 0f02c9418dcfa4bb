"""Answer for images whenever asked, and say how long it took: what is compared runs in turns.

Needs NumPy alone, since it runs in the peers' environments too.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

Images = npt.NDArray[np.uint8]
Logits = npt.NDArray[np.float32]
BATCH = 32


def answer(name: str, infer: Callable[[Images], Logits], images: Path, answers: Path) -> None:
    """Write the logits (N, C) of all images, print the name, then serve until the input ends.

    Each line of the input is a number of images and how often to time them; the line that is
    printed for it is the median in milliseconds. ``infer``: from (B, S, S, 3) uint8 RGB, computes
    logits and probabilities; ``images``: a ``.npy`` file of all.
    """
    squares = np.load(images)
    parts = [squares[start : start + BATCH] for start in range(0, len(squares), BATCH)]
    np.save(answers, np.concatenate([infer(part) for part in parts]))
    print(name, flush=True)
    for line in sys.stdin:
        size, times = map(int, line.split())
        print(_milliseconds(infer, squares[:size], times), flush=True)


def _milliseconds(infer: Callable[[Images], Logits], images: Images, times: int) -> float:
    infer(images)  # threads that slept during the other's turn wake up
    spent = []
    for _ in range(times):
        start = time.perf_counter()
        infer(images)
        spent.append(1000 * (time.perf_counter() - start))
    return statistics.median(spent)
