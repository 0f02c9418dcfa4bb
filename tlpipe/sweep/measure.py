"""What a trained model is worth on images that it has not seen, without exporting it.

What answers are the trained weights in float32, on the activations that ``embed`` has stored.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from tlpipe.data.manifest import load_split, rows_of
from tlpipe.training import linear_probe
from tlpipe.training.model import Dataset, Examples, Model


def examples_of(data: Dataset, split: Path, part: str) -> Examples:
    """Return the images of one split of a table, with their label numbers."""
    assignments = load_split(split)
    numbers = {label: number for number, label in enumerate(data.labels)}
    rows = rows_of(assignments, part)
    labels = [numbers[assignments[row].label] for row in rows]
    return Examples(np.array(rows, np.int64), np.array(labels, np.int64))


def hits(data: Dataset, trained: Model, pixels: Path, examples: Examples) -> npt.NDArray[np.bool_]:
    """Return which images (N,) a model names rightly."""
    if data.open_stages:
        from tlpipe.training import tuning

        logits = tuning.answers(data, trained, pixels, examples.rows)
    else:
        read = linear_probe.stored(data)
        logits = np.concatenate(list(read(examples.rows, False)))
        for number, (weight, bias) in enumerate(trained.head):
            logits = (np.maximum(logits, 0) if number else logits) @ weight.T + bias
    return np.asarray(logits.argmax(axis=1) == examples.labels)
