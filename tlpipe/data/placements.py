"""``splits.csv``: where each image was placed, kept in Git, so that later runs place it alike.

A row for each image that ``split`` has ever placed, also of those that are no longer in the source:
they may come back. Rows are sorted and end with a line feed, and none depends on another, so that
Git can merge two branches by the union of their lines.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlpipe import files
from tlpipe.data.manifest import SPLITS, UNUSED, Assignment
from tlpipe.errors import ArtifactError

HEADER = "sha256,box,place,drawn_by"
DRAWN_BY = ("validation", "test", "folds", "seed")

Image = tuple[str, str]  # sha256 and box: which image, whatever its path

_LINE = re.compile(
    r"(?P<sha256>[0-9a-f]{64}),(?P<box>[0-9 ]*),(?P<place>[a-z]+|\d+),"
    r"(?P<drawn_by>seed=\d+ (?:folds=(?P<folds>\d+)|validation=\S+ test=\S+))"
)


@dataclass(frozen=True)
class Placements:
    """The rows of one drawing, and how many rows there are of each other one.

    Attributes:
        drawn_by: the parameters of the drawing, as ``drawn_by`` writes them.
        places: of each image its split, or its fold where there are folds.
        others: number of rows by what they were drawn by.
    """

    drawn_by: str
    places: Mapping[Image, str]
    others: Mapping[str, int]


def drawn_by(params: Mapping[str, Any]) -> str:
    """Return the parameters that another table would be drawn by, as one column holds them.

    ``params``: at least ``DRAWN_BY``. Shares have no effect where there are folds.
    """
    if params["folds"] is not None:
        return f"seed={params['seed']} folds={params['folds']}"
    return f"seed={params['seed']} validation={params['validation']} test={params['test']}"


def of_table(table: Iterable[Assignment]) -> dict[Image, str]:
    """Return the place of each image of a split table; those left unused have none."""
    return {(row.sha256, row.box): row.fold or row.split for row in table if row.split != UNUSED}


def load(path: Path, drawn: str) -> Placements:
    """Read the file; none has no rows. ``drawn``: the drawing whose rows are wanted.

    Raises:
        ArtifactError: a line cannot be read, or an image stands in two splits.
    """
    places: dict[Image, str] = {}
    lines: dict[Image, int] = {}
    others: Counter[str] = Counter()
    if not path.exists():
        return Placements(drawn, places, others)
    text = path.read_text(encoding="utf-8", errors="backslashreplace")
    for number, line in enumerate(text.splitlines(), start=1):
        if line == HEADER:  # a merge may have left it twice
            continue
        found = _LINE.fullmatch(line)
        if found is None or not _is_place(found["place"], found["folds"]):
            raise ArtifactError(
                f"line {number} of {path} is {line[:120]!r}; expected {HEADER}, such as "
                f"{'0123456789abcdef' * 4},,train,seed=0 validation=0.2 test=0.2. It says where "
                f"images are that must stay there. Take out what Git left of a merge but keep the "
                f"rows of both sides, or take the file from Git again: 'git checkout -- {path}'."
            )
        if found["drawn_by"] != drawn:
            others[found["drawn_by"]] += 1
            continue
        image = found["sha256"], found["box"]
        if places.setdefault(image, found["place"]) != found["place"]:
            raise ArtifactError(
                f"{path} has the image {' '.join(image).strip()} in {places[image]} (line "
                f"{lines[image]}) and in {found['place']} (line {number}); expected one of them: "
                f"two branches that were merged placed it differently. Delete one of the two "
                f"lines, then run 'dvc repro' again."
            )
        lines.setdefault(image, number)
    return Placements(drawn, places, others)


def save(path: Path, drawn: str, places: Mapping[Image, str]) -> None:
    """Write the rows of one drawing; the same rows give the same bytes."""
    rows = sorted(f"{sha256},{box},{place},{drawn}" for (sha256, box), place in places.items())
    files.write_bytes(path, "".join(f"{line}\n" for line in (HEADER, *rows)).encode())


def gives(path: Path, drawn: str, table: Iterable[Assignment]) -> bool:
    """Return whether the file has just these places for the images of a split table.

    Raises:
        ArtifactError: it cannot be read.
    """
    rows = list(table)
    known, wanted = load(path, drawn).places, of_table(rows)
    images = {(row.sha256, row.box) for row in rows}
    return all(known.get(image) == wanted.get(image) for image in images)


def _is_place(place: str, folds: str | None) -> bool:
    if folds is None:
        return place in SPLITS
    return place.isdecimal() and int(place) < int(folds)
