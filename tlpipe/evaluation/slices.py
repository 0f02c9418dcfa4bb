"""Accuracy on slices of the test images: by column, file size, brightness, near duplicates."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from tlpipe.data.manifest import Entry
from tlpipe.resampling import group_numbers, share_interval

_PARTS = 4
_MOST_VALUES = 12
_OTHERS = "others"


def measure(
    entries: Sequence[Entry],
    brightness: npt.NDArray[np.float64],
    hits: npt.NDArray[np.bool_],
    columns: Sequence[str],
    confidence: float,
) -> dict[str, list[dict[str, Any]]]:
    """Return for each way to part them: values, images, accuracy with its interval.

    ``brightness``: (N,) mean grey levels in [0, 255]; ``columns``: further ones of the manifest.
    """
    # Images are alone in a group where no other is (nearly) equal to them.
    shared = Counter(entry.group for entry in entries if entry.group)
    ways: dict[str, Sequence[str] | npt.NDArray[np.float64]] = {
        "pixels of the file": np.array([e.width * e.height for e in entries], np.float64),
        "brightness": brightness,
        "near duplicates": ["some" if shared[e.group] > 1 else "none" for e in entries],
    }
    for column in columns:
        values = [getattr(entry, column) for entry in entries]
        is_number = all(isinstance(value, int) for value in values)
        ways[column] = np.array(values, np.float64) if is_number else [str(v) for v in values]
    place = group_numbers([entry.group for entry in entries])
    return {
        name: _measure(_named(values), hits, place, confidence) for name, values in ways.items()
    }


def _named(values: Sequence[str] | npt.NDArray[np.float64]) -> Mapping[str, npt.NDArray[np.bool_]]:
    """Return which images each value has: quarters of numbers, common words."""
    if isinstance(values, np.ndarray):
        ends = np.unique(np.quantile(values, np.linspace(0, 1, _PARTS + 1)))
        if len(ends) == 1:
            return {f"{ends[0]:g}": np.ones(len(values), bool)}
        places = np.searchsorted(ends[1:-1], values, side="right")
        return {
            f"{low:.0f} to {high:.0f}": places == number
            for number, (low, high) in enumerate(pairwise(ends))
        }
    common = [value for value, _ in Counter(values).most_common(_MOST_VALUES)]
    words = np.array([value if value in common else _OTHERS for value in values])
    return {value: words == value for value in sorted(set(words))}


def _measure(
    parts: Mapping[str, npt.NDArray[np.bool_]],
    hits: npt.NDArray[np.bool_],
    place: npt.NDArray[np.int64],
    confidence: float,
) -> list[dict[str, Any]]:
    rows = []
    for value, inside in parts.items():
        if inside.any():
            found = share_interval(hits[inside], place[inside], confidence)
            row = {"value": value, "images": int(inside.sum()), "accuracy": found["value"]}
            rows.append({**row, "low": found["low"], "high": found["high"]})
    return rows
