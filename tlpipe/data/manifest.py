"""The tables of a data set: which images it has, which files were refused, who is in which split.

The three formats have their ``save`` and ``load`` here. Row *i* of the manifest, of the split
table and of the pixels is the same image; the order is that of the paths.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from tlpipe import files

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Entry:
    """One usable image.

    ``sha256`` is of the file's bytes; images of one ``group`` must stay in one split; ``split`` is
    the one that the source gives, or empty.
    """

    path: str
    label: str
    sha256: str
    bytes: int
    width: int
    height: int
    mode: str
    group: str
    split: str


@dataclass(frozen=True)
class Reject:
    """One refused file: ``reason`` is a code, ``detail`` a sentence."""

    path: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Assignment:
    """The split of one image: ``train``, ``validation`` or ``test``."""

    path: str
    label: str
    split: str


def save_manifest(path: Path, entries: Sequence[Entry]) -> None:
    """Write the manifest as CSV."""
    files.write_csv(path, _names(Entry), map(astuple, entries))


def load_manifest(path: Path) -> list[Entry]:
    """Read the manifest.

    Raises:
        ArtifactError: it is missing or has other columns.
    """
    return [
        Entry(
            path=row["path"],
            label=row["label"],
            sha256=row["sha256"],
            bytes=int(row["bytes"]),
            width=int(row["width"]),
            height=int(row["height"]),
            mode=row["mode"],
            group=row["group"],
            split=row["split"],
        )
        for row in files.read_csv(path, _names(Entry))
    ]


def save_rejects(path: Path, rejects: Sequence[Reject]) -> None:
    """Write the table of refused files as CSV."""
    files.write_csv(path, _names(Reject), map(astuple, rejects))


def save_split(path: Path, assignments: Sequence[Assignment]) -> None:
    """Write the split table as CSV."""
    files.write_csv(path, _names(Assignment), map(astuple, assignments))


def load_split(path: Path) -> list[Assignment]:
    """Read the split table.

    Raises:
        ArtifactError: it is missing or has other columns.
    """
    return [Assignment(**row) for row in files.read_csv(path, _names(Assignment))]


def _names(row_type: type) -> list[str]:
    return [field.name for field in fields(row_type)]
