"""The tables of a data set: which images it has, which files were rejected, who is in which split.

Each format has its ``save`` and ``load`` here. Row *i* of the manifest, of the split table and of
the pixels is the same image; the order is that of the paths.

``splits.csv`` says where each image was placed. It is kept in Git, so that later runs place it
alike: a row for each file that ``split`` has ever placed, also of those that are no longer in the
source: they may come back; and those of every drawing, since parameters may be set back. Parts of
one photo share its row, whatever margin they are cut with. Rows are sorted and end with a line
feed, and none depends on another, so that Git can merge two branches by the union of their lines.
"""

import binascii
import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tlpipe import files
from tlpipe.errors import ArtifactError
from tlpipe.sources import Reject

SPLITS = ("train", "validation", "test")
UNUSED = "unused"


class Entry(NamedTuple):
    """One usable image.

    ``sha256`` is of the file's bytes; ``box`` is the part of it that the image is, as
    ``left upper right lower`` in pixels, or empty; ``width``, ``height``, ``mode`` and ``format``
    are those of the file. Images of one ``group`` must stay in one split: equal or nearly equal
    ones, parts of one photo, and those that the source groups. ``split`` is the one that the source
    gives, or empty. ``data_version`` is DVC's hash of all that ``ingest`` reads.
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


def file_keys(rows: Iterable[Entry | Assignment]) -> npt.NDArray[np.uint64]:
    """Return of which file each image is, (N,): parts of one photo share it."""
    keys = b"".join(image_key(row.sha256, "") for row in rows)
    return np.frombuffer(keys, ">u8").astype(np.uint64)


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


def rows_of(assignments: Sequence[Assignment], split: str) -> list[int]:
    """Return the rows of the images of one split."""
    return [row for row, assignment in enumerate(assignments) if assignment.split == split]


def evenly(rows: Sequence[int], count: int) -> list[int]:
    """Return at most ``count`` of the rows, spread evenly."""
    step = max(len(rows) / count, 1.0)
    return [rows[int(i * step)] for i in range(min(count, len(rows)))]


HEADER = "sha256,place,drawn_by"
DRAWN_BY = ("validation", "test", "folds", "seed")

_LINE = re.compile(
    r"(?P<sha256>[0-9a-f]{64}),(?P<place>[a-z]+|\d+),"
    r"(?P<drawn_by>seed=\d+ (?:folds=(?P<folds>\d+)|validation=\S+ test=\S+))"
)

_SPOILED = {
    "\ufeff": "begins with a byte order mark",
    '"': "has quotes around its values",
    ";": "has semicolons for commas",
    "\t": "has tabs for commas",
}


@dataclass(frozen=True)
class Placements:
    """The rows of one drawing, and those of others.

    Attributes:
        drawn_by: the parameters of the drawing, as ``drawn_by`` writes them.
        places: by the sha256 of each file its split, or its fold where there are folds.
        others: rows of other drawings, as they stand in the file.
    """

    drawn_by: str
    places: Mapping[str, str]
    others: tuple[str, ...] = ()


def drawn_by(params: Mapping[str, Any]) -> str:
    """Return the parameters that another table would be drawn by, as one column holds them.

    ``params``: at least ``DRAWN_BY``. Shares have no effect where there are folds.
    """
    if params["folds"] is not None:
        return f"seed={params['seed']} folds={params['folds']}"
    return f"seed={params['seed']} validation={params['validation']} test={params['test']}"


def of_table(table: Iterable[Assignment]) -> dict[str, str]:
    """Return the place of each file of a split table.

    Those left unused get one that leaves them unused again: their fold, or else the split that
    gives way to any other. They get none where their group stands in two splits, as in tables of
    former versions.
    """
    rows = list(table)
    used = {row.sha256: row.fold or row.split for row in rows if row.split != UNUSED}
    groups: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row.split != UNUSED:
            groups[row.group].add(used[row.sha256])
    unused = {
        row.sha256: row.fold or "train"
        for row in rows
        if row.split == UNUSED and len(groups[row.group]) == 1
    }
    return {**unused, **used}


def load_placements(path: Path, drawn: str) -> Placements:
    """Read the file; none has no rows. ``drawn``: the drawing whose rows are wanted.

    Raises:
        ArtifactError: a line cannot be read, or an image stands in two splits.
    """
    places: dict[str, str] = {}
    lines: dict[str, int] = {}
    others: set[str] = set()
    conflicts: list[str] = []
    if not path.exists():
        return Placements(drawn, places)
    text = path.read_text(encoding="utf-8", errors="backslashreplace")
    for number, line in enumerate(text.splitlines(), start=1):
        if line == HEADER:  # a merge may have left it twice
            continue
        found = _LINE.fullmatch(line)
        if found is None or not _is_place(found["place"], found["folds"]):
            spoiled = next((what for mark, what in _SPOILED.items() if mark in line), "")
            how = f"{spoiled}, as a spreadsheet saves it:" if spoiled else "is"
            repair = "Take out what Git left of a merge but keep the rows of both sides"
            if spoiled:
                repair = "Save it as plain UTF-8 with commas and without quotes"
            raise ArtifactError(
                f"line {number} of {path} {how} {line[:120]!r}; expected {HEADER}, such as "
                f"{'0123456789abcdef' * 4},train,seed=0 validation=0.2 test=0.2. It says where "
                f"images are that must stay there. {repair}, or take the file from Git again: 'git "
                f"checkout -- {path}'."
            )
        if found["drawn_by"] != drawn:
            others.add(line)
            continue
        image = found["sha256"]
        if places.setdefault(image, found["place"]) != found["place"]:
            conflicts.append(
                f"{image} in {places[image]} (line {lines[image]}) and in {found['place']} (line "
                f"{number})"
            )
        lines.setdefault(image, number)
    if conflicts:
        raise ArtifactError(
            f"{path} has {len(conflicts)} images in two splits, the first is {conflicts[0]}; "
            f"expected one row of each: two branches that were merged placed them differently. "
            f"Delete one row of each: that of train, and of two held-out ones that of validation, "
            f"since none may train that has tested. Then run 'tlpipe run' again."
        )
    return Placements(drawn, places, tuple(sorted(others)))


def save_placements(path: Path, placements: Placements) -> None:
    """Write the rows of all drawings; the same rows give the same bytes."""
    drawn = placements.drawn_by
    own = (f"{sha256},{place},{drawn}" for sha256, place in placements.places.items())
    rows = sorted([*own, *placements.others])
    files.write_bytes(path, "".join(f"{line}\n" for line in (HEADER, *rows)).encode())


def gives(path: Path, drawn: str, table: Iterable[Assignment]) -> bool:
    """Return whether the file has just these places for the images of a split table.

    Raises:
        ArtifactError: it cannot be read.
    """
    rows = list(table)
    known, wanted = load_placements(path, drawn).places, of_table(rows)
    return all(known.get(row.sha256) == wanted.get(row.sha256) for row in rows)


def _is_place(place: str, folds: str | None) -> bool:
    if folds is None:
        return place in SPLITS
    return place.isdecimal() and int(place) < int(folds)
