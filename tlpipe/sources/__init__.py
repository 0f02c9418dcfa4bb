"""Where labelled images come from: which files there are, and under which labels.

In: a folder, an archive, an address or a built-in set, as class folders, a table, COCO or VOC.
Out: candidates, each a file or a part of one with its label. No image is opened here.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

Box = tuple[int, int, int, int]
Edges = tuple[float, float, float, float]
IMAGES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif"),
    *(".tif", ".tiff", ".heic", ".heif", ".hif", ".avif", ".avifs"),
)
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "validate", "dev", "eval", "evaluation"),
    "test": ("test", "testing", "holdout", "hold_out", "held_out"),
}
_OF_WORD = {word: split for split, words in _SPLITS.items() for word in words}
# As in train_set, test_data, val2017.
_AROUND = re.compile(r"[-_ ]?(set|data|images|split|\d{4})$")


class Candidate(NamedTuple):
    """A file of a source, or a part of one, under a label; nobody has looked inside.

    ``name`` is unique in the source; ``file`` is what the storage reads; ``split`` and ``group``
    are those that the source gives, or empty. ``box`` is the part to take. Where ``avoid`` is not
    ``None``, the part is looked for: a square as large as one of these boxes, which touches none of
    them and of ``occupied``. ``drawn_in`` is the width and height of the picture that boxes are in
    pixels of; where it is not known, of the upright image. ``side_px``: that of the square to look
    for, where ``avoid`` is empty.
    """

    name: str
    file: str
    label: str
    split: str = ""
    group: str = ""
    box: Edges | None = None
    avoid: tuple[Edges, ...] | None = None
    occupied: tuple[Edges, ...] = ()
    drawn_in: tuple[int, int] | None = None
    side_px: float | None = None


class Reject(NamedTuple):
    """One rejected file or part: ``reason`` is a code, ``detail`` a sentence."""

    path: str
    reason: str
    detail: str


# What reading a region may raise where it is damaged.
UNUSABLE = (ValueError, TypeError, OverflowError)


@dataclass
class Photo:
    """One photo and what is labelled in it.

    Attributes:
        size: width and height of the picture that boxes were drawn in, where they are stated.
        labels: name, label and box of each annotation; without a box it is of the whole photo.
        occupied: the boxes of annotations that are rejected; None for one that cannot be told.
    """

    file: str
    split: str = ""
    size: tuple[int, int] | None = None
    labels: list[tuple[str, str, Edges | None]] = field(default_factory=list)
    occupied: list[Edges | None] = field(default_factory=list)

    def occupy(self, region: Callable[[], Edges | None]) -> None:
        """Add the box of a rejected annotation, which ``region`` reads."""
        try:
            self.occupied.append(region())
        except UNUSABLE:
            self.occupied.append(None)


def given_split(word: str) -> str:
    """Return the split that a folder's or a table's word means, or nothing.

    Examples:
        >>> given_split("Training_Set"), given_split("val2017"), given_split("trains")
        ('train', 'validation', '')
    """
    plain = word.strip().lower().replace("-", "_")
    return _OF_WORD.get(plain) or _OF_WORD.get(_AROUND.sub("", plain), "")
