"""One labelled image of a source, before anyone looked inside."""

from typing import NamedTuple

Box = tuple[int, int, int, int]
_SPLITS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}


class Candidate(NamedTuple):
    """A file, or a part of one, under a label.

    ``name`` is unique in the source; ``file`` is what the storage reads; ``split`` and ``group``
    are those that the source gives, or empty. ``box`` is the part to take, in pixels of the
    upright image. Where ``avoid`` is not ``None``, the part is looked for: a square that touches
    none of these boxes.
    """

    name: str
    file: str
    label: str
    split: str = ""
    group: str = ""
    box: tuple[float, float, float, float] | None = None
    avoid: tuple[Box, ...] | None = None


class Reject(NamedTuple):
    """One refused file or part: ``reason`` is a code, ``detail`` a sentence."""

    path: str
    reason: str
    detail: str


def given_split(word: str) -> str:
    """Return the split that a folder's or a table's word means, or nothing."""
    return _SPLITS.get(word.strip().lower(), "")
