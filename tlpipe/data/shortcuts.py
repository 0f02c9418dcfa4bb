"""Find classes that the files tell apart without a look at the picture: by size, bytes or format.

Where all images of one class come from another camera, another website or another program, a
network can learn that instead of the object: sharpness and compression survive the resizing. The
test split shares the flaw, so its accuracy says nothing of it. New images do not share it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tlpipe.data.manifest import Entry, evenly
from tlpipe.resampling import ALWAYS_TRAINS, held_out_folds

# From this correlation on, the files tell a class. On clean sets the bytes reach 0.4, since grass
# compresses worse than sky.
LEAST = 0.7
_FOLDS, _NEAREST = 3, 5
_SAMPLE, _LEAST_SAMPLE = 20_000, 12  # images looked at, and of each class at least
_PROPERTIES: Mapping[str, Callable[[Entry], object]] = {
    "width": lambda entry: entry.width,
    "height": lambda entry: entry.height,
    "format": lambda entry: f"{entry.format} {entry.mode}",
    "bytes": lambda entry: entry.file_bytes,
    "bytes per pixel": lambda entry: entry.file_bytes / (entry.width * entry.height),
}
Numbers = npt.NDArray[np.int64]


def find(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Return the classes that one property of the files tells, the best told first.

    At most 20,000 images are looked at, as many of each class as of the others where it has them,
    and not fewer than 12. Each is given the most frequent class among those of other folds with the
    nearest values, at least 5 of them. The correlation is that of being of a class and being given
    it: 0 by chance, however rare the class is, and 1 where no image is given a wrong one.

    Returns:
        a row for each class that is told, by the property that tells it best: ``label``,
        ``property``, ``images`` of the class, ``right`` of these, ``wrong`` images of other classes
        that are given this one, and ``correlation``, from ``LEAST`` to 1.

    Source: Matthews (1975), Biochimica et Biophysica Acta 405, 442-451.
    """
    entries = _sample(entries)
    labels = [entry.label for entry in entries]
    folds = held_out_folds(labels, [entry.group for entry in entries], _FOLDS)
    names, targets = np.unique(labels, return_inverse=True)
    held = folds != ALWAYS_TRAINS
    best: dict[str, dict[str, Any]] = {}
    for name, take in _PROPERTIES.items():
        ranks = np.unique([take(entry) for entry in entries], return_inverse=True)[1]
        given = _by_nearest(ranks, targets, folds)
        for number, label in enumerate(names.tolist()):
            row = _compare((given == number)[held], (targets == number)[held])
            if row["correlation"] > best.get(label, {"correlation": 0.0})["correlation"]:
                best[label] = {"label": label, "property": name, **row}
    told = (row for row in best.values() if row["correlation"] >= LEAST)
    return sorted(told, key=lambda row: (-row["correlation"], row["label"]))


def describe(found: Sequence[Mapping[str, Any]]) -> str:
    """Say which classes are told, the best told ones by name."""
    if not found:
        return "no class is told by the size, the bytes or the format of its files"
    shown = [
        f"{row['label']} by its {row['property']} ({row['right']} of {row['images']} images, "
        f"{row['wrong']} of others)"
        for row in found[:3]
    ]
    more = f" and {len(found) - 3} more" * (len(found) > 3)
    return f"the files alone tell {', '.join(shown)}{more}"


def warning(found: Sequence[Mapping[str, Any]]) -> str:
    """Return what told classes mean and what to do."""
    return (
        f"{describe(found)}: the network may have learned how they were made, which the test split "
        f"shares and new images may not. Bring images of all classes from the same places, or save "
        f"all alike (size, format, quality) and compare."
    )


def _sample(entries: Sequence[Entry]) -> list[Entry]:
    rows: dict[str, list[int]] = {}
    for row, entry in enumerate(entries):
        rows.setdefault(entry.label, []).append(row)
    most = max(_LEAST_SAMPLE, _SAMPLE // max(1, len(rows)))
    return [entries[row] for some in rows.values() for row in evenly(some, most)]


def _by_nearest(ranks: Numbers, targets: Numbers, folds: Numbers) -> Numbers:
    """Return (N,) the class that each image is given; -1 for those that always train."""
    given = np.full(len(ranks), -1, np.int64)
    for fold in np.unique(folds[folds != ALWAYS_TRAINS]):
        asked, known = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
        known = known[np.argsort(ranks[known], kind="stable")]
        values, least = ranks[known], min(_NEAREST, len(known))
        first = np.searchsorted(values, ranks[asked], "left")
        last = np.searchsorted(values, ranks[asked], "right")
        start = np.clip((first + last - least) // 2, 0, len(known) - least)
        first, last = np.minimum(first, start), np.maximum(last, start + least)
        most = np.zeros(len(asked), np.int64)
        for number in np.unique(targets[known]):
            places = np.flatnonzero(targets[known] == number)
            count = np.searchsorted(places, last) - np.searchsorted(places, first)
            given[asked[count > most]] = number
            most = np.maximum(most, count)
    return given


def _compare(given: npt.NDArray[np.bool_], actual: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """Return the correlation of two tables of truth, (N,), and the counts behind it."""
    right, wrong = int((given & actual).sum()), int((given & ~actual).sum())
    images, total = int(actual.sum()), len(actual)
    spread = float(right + wrong) * (total - right - wrong) * images * (total - images)
    # How far the rights exceed those of an independent guess.
    excess = right * total - (right + wrong) * images
    correlation = excess / spread**0.5 if spread else 0.0
    return {"images": images, "right": right, "wrong": wrong, "correlation": round(correlation, 4)}
