"""``splits.csv``: where each image was placed, kept in Git, so that later runs place it alike.

A row for each file that ``split`` has ever placed, also of those that are no longer in the source:
they may come back; and those of every drawing, since parameters may be set back. Parts of one photo
share its row, whatever margin they are cut with. Rows are sorted and end with a line feed, and none
depends on another, so that Git can merge two branches by the union of their lines.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlpipe import files
from tlpipe.data.manifest import SPLITS, UNUSED, Assignment
from tlpipe.errors import ArtifactError

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


def load(path: Path, drawn: str) -> Placements:
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
            f"since none may train that has tested. Then run 'dvc repro' again."
        )
    return Placements(drawn, places, tuple(sorted(others)))


def save(path: Path, placements: Placements) -> None:
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
    known, wanted = load(path, drawn).places, of_table(rows)
    return all(known.get(row.sha256) == wanted.get(row.sha256) for row in rows)


def _is_place(place: str, folds: str | None) -> bool:
    if folds is None:
        return place in SPLITS
    return place.isdecimal() and int(place) < int(folds)
