"""The tables of a data set: which images it has, which files were rejected, who is in which split.

The three formats have their ``save`` and ``load`` here. Row *i* of the manifest, of the split
table and of the pixels is the same image; the order is that of the paths.
"""

import binascii
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tlpipe import files
from tlpipe.sources.candidates import Reject

SPLITS = ("train", "validation", "test")
UNUSED = "unused"


class Entry(NamedTuple):
    """One usable image.

    ``sha256`` is of the file's bytes; ``box`` is the part of it that the image is, as
    ``left upper right lower`` in pixels, or empty; ``width``, ``height``, ``mode`` and ``format``
    are those of the file. Images of one ``group`` must stay in one split: equal or nearly equal
    ones, parts of one photo, and those that the source groups. ``split`` is the one that the source
    gives, or empty. ``data_version`` is DVC's hash of the whole source.
    """

    path: str
    label: str
    sha256: str
    box: str
    file_bytes: int
    width: int
    height: int
    mode: str
    format: str
    group: str
    split: str
    data_version: str

    @property
    def key(self) -> bytes:
        """Which image it is."""
        return image_key(self.sha256, self.box)


class Duplicate(NamedTuple):
    """Two nearly equal images of different files, by their paths, and their labels."""

    path: str
    other: str
    label: str
    other_label: str


class Assignment(NamedTuple):
    """The split of one image: ``train``, ``validation``, ``test``, or ``unused``.

    ``fold`` is its number among ``split.folds``, or empty; ``group`` is that of the manifest.
    ``sha256`` and ``box`` say which image it is, whatever its path.
    """

    path: str
    label: str
    split: str
    fold: str
    group: str
    sha256: str
    box: str

    @property
    def key(self) -> bytes:
        """Which image it is."""
        return image_key(self.sha256, self.box)


def image_key(sha256: str, box: str) -> bytes:
    """Return eight bytes that say which image it is: of its file, and of its part of the file.

    Two of a million images share them with a probability of about 3e-8.
    """
    if not box:
        return binascii.unhexlify(sha256[:16])
    return hashlib.sha256(f"{sha256} {box}".encode()).digest()[:8]


def save_manifest(path: Path, entries: Iterable[Entry]) -> None:
    """Write the manifest as CSV."""
    files.write_csv(path, Entry._fields, entries)


def load_manifest(path: Path) -> Iterator[Entry]:
    """Yield the rows of the manifest.

    Raises:
        ArtifactError: it is missing or has other columns.
    """
    return map(entry_of, files.read_csv(path, Entry._fields))


def entry_of(values: Sequence[str]) -> Entry:
    """Return the entry of a row of the manifest."""
    path, label, sha256, box, count, width, height, *rest = values
    return Entry(path, label, sha256, box, int(count), int(width), int(height), *rest)


def save_rejects(path: Path, rejects: Iterable[Reject]) -> None:
    """Write the table of rejected files as CSV."""
    files.write_csv(path, Reject._fields, rejects)


def save_duplicates(path: Path, pairs: Iterable[Duplicate]) -> None:
    """Write the table of nearly equal images as CSV."""
    files.write_csv(path, Duplicate._fields, pairs)


def load_duplicates(path: Path) -> Iterator[Duplicate]:
    """Yield the pairs of nearly equal images.

    Raises:
        ArtifactError: it is missing or has other columns.
    """
    return (Duplicate(*row) for row in files.read_csv(path, Duplicate._fields))


def save_split(path: Path, assignments: Sequence[Assignment]) -> None:
    """Write the split table as CSV."""
    files.write_csv(path, Assignment._fields, assignments)


def load_split(path: Path) -> list[Assignment]:
    """Read the split table.

    Raises:
        ArtifactError: it is missing or has other columns.
    """
    return [Assignment(*row) for row in files.read_csv(path, Assignment._fields)]


def evenly(rows: Sequence[int], count: int) -> list[int]:
    """Return at most ``count`` of the rows, spread evenly."""
    step = max(len(rows) / count, 1.0)
    return [rows[int(i * step)] for i in range(min(count, len(rows)))]
