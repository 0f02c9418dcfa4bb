"""The table of decisions: which labels people have corrected, dropped or kept, image by image.

``tlpipe label`` writes it, ``ingest`` applies it, Git keeps it. A row is one decision on one image
under one label: ``label`` is the class it is of, the same as ``was`` where the label is kept, and
empty where the image is dropped. ``was`` is empty for an image of an unlabelled folder. ``path`` is
for people; of unlabelled images alone it also says where they lie. So no word is reserved, and a
class may be called drop.

Rows stand one on a line, are sorted, and none depends on another, so Git can merge two branches by
the union of their lines. A decision is undone by deleting its row.
"""

import csv
import hashlib
import io
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tlpipe import files
from tlpipe.errors import ArtifactError, DataError

NAME = "labels.csv"  # where a project keeps it, if nothing else is said
# Before the paths of images of an unlabelled folder; no relative path has it.
UNLABELLED = "unlabelled://"
_SHA256, _PART = re.compile("[0-9a-f]{64}"), re.compile(r"(\d+( \d+){3})?")
_SHOWN = 3


class Decision(NamedTuple):
    """A row: an image by its file's sha256 and its part as in the manifest, and what was decided.

    ``by`` is who decided, ``at`` when, in UTC.
    """

    sha256: str
    part: str
    path: str
    was: str
    label: str
    by: str
    at: str

    @property
    def image(self) -> tuple[str, str]:
        """Which image it is of."""
        return self.sha256, self.part

    @property
    def what(self) -> str:
        """What was decided, in a word."""
        if not self.label:
            return "drop"
        return f"keep {self.label}" if self.label == self.was else self.label


@dataclass(frozen=True)
class Decisions:
    """What a table holds.

    ``lines``: the number of the line that each row stands on; ``sha256``: of the bytes that were
    read, empty where there is no file.
    """

    path: Path
    rows: tuple[Decision, ...] = ()
    lines: tuple[int, ...] = ()
    sha256: str = ""

    def check_unchanged(self) -> None:
        """Check that the file is still the one that was read.

        DVC takes its hash when a stage has ended, and would count what came later as applied.

        Raises:
            DataError: it has changed, or is gone.
        """
        content = self.path.read_bytes() if self.sha256 and self.path.exists() else b""
        if self.sha256 and hashlib.sha256(content).hexdigest() != self.sha256:
            raise DataError(
                f"{self.path} has changed since ingest read it; expected it to stay the same, "
                f"since what was decided meanwhile is not applied. Run ingest again."
            )

    def named(self, row: Decision) -> str:
        """Return how a message names a row."""
        who = f", by {row.by}" if row.by else ""
        return f"{row.what} (line {self.lines[self.rows.index(row)]}{who})"

    def unlabelled(self) -> dict[str, Decision]:
        """Return the rows of images of an unlabelled folder, by their paths."""
        return {row.path: row for row in self.rows if not row.was}

    def classes(self) -> Counter[str]:
        """Count the classes that images of an unlabelled folder were given."""
        return Counter(row.label for row in self.rows if not row.was and row.label)

    def check_classes(self, known: Collection[str]) -> None:
        """Check that corrected labels are classes of the source, or of unlabelled images.

        Raises:
            DataError: one is not.
        """
        there = {*known, *self.classes()}
        wrong = [row for row in self.rows if row.was and row.label not in ("", row.was, *there)]
        if wrong:
            number = self.lines[self.rows.index(wrong[0])]
            raise DataError(
                f"line {number} of {self.path} gives {wrong[0].path!r} the class "
                f"{wrong[0].label!r}, which the source does not have; its classes are "
                f"{', '.join(sorted(there))}. Write one of them, or delete the row."
            )


def written(path: str) -> str:
    r"""Return a path as the table has it: on one line, whatever is in it.

    Example:
        >>> written("a\nb.png")
        'a\\nb.png'
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in path
    )


def load(path: Path) -> Decisions:
    """Read a table; a missing one has no rows.

    Raises:
        ArtifactError: a line cannot be read, or two rows decide differently on one image.
    """
    if not path.exists():
        return Decisions(path)
    rows, lines, content = [], [], path.read_bytes()
    text = content.decode("utf-8-sig", "backslashreplace")  # a spreadsheet writes the mark
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line or line == ",".join(Decision._fields):  # a merge may have left it twice
            continue
        rows.append(_read(line, number, path))
        lines.append(number)
    found = Decisions(path, tuple(rows), tuple(lines), hashlib.sha256(content).hexdigest())
    _check_agree(found)
    return found


def _read(line: str, number: int, path: Path) -> Decision:
    try:
        cells = next(csv.reader([line], strict=True))
    except (csv.Error, StopIteration):
        cells = []
    if len(cells) == len(Decision._fields):
        row = Decision(*cells)
        is_whole = _SHA256.fullmatch(row.sha256) and _PART.fullmatch(row.part)
        if is_whole and row.path and f"{row.was}{row.label}{row.path}".isprintable():
            return row
    raise ArtifactError(
        f"line {number} of {path} is {line[:120]!r}; expected {','.join(Decision._fields)}, with "
        f"commas and in UTF-8, as 'tlpipe label' writes it. Take out what Git left of a merge but "
        f"keep the rows of both sides, or take the file from Git again: 'git checkout -- {path}'."
    )


def _check_agree(found: Decisions) -> None:
    """Check that rows on one image say the same of it.

    Raises:
        ArtifactError: two do not.
    """
    first: dict[tuple[str, str], Decision] = {}
    differ = [
        (first[row.image], row)
        for row in found.rows
        if first.setdefault(row.image, row).label != row.label
    ]
    if differ:
        one, other = differ[0]
        images = len({row.image for _, row in differ})
        raise ArtifactError(
            f"{found.path} decides differently on {images} image{'s' * (images > 1)}, the first is "
            f"{one.path!r}: {found.named(one)} and {found.named(other)}; expected one decision on "
            f"each. Two people have decided, or branches were merged: delete one of both rows."
        )


def save(path: Path, rows: Iterable[Decision]) -> None:
    """Write a table and flush it to disk; the same rows give the same bytes."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    lines = set()
    for row in rows:
        writer.writerow(row)
        lines.add(text.getvalue())
        text.seek(0)
        text.truncate()
    header = ",".join(Decision._fields)
    files.write_bytes(path, "".join([f"{header}\n", *sorted(lines)]).encode())


class Applied:
    """Applies a table to the images of a source, and keeps count of what it did.

    An image that is read a second time counts once.
    """

    def __init__(self, decisions: Decisions) -> None:
        """Take the table."""
        self._decisions = decisions
        self._of: dict[tuple[str, str], dict[str, Decision]] = defaultdict(dict)
        for row in decisions.rows:
            if row.was:
                self._of[row.image][row.was] = row
        self._unlabelled = decisions.unlabelled()
        self._met: set[tuple[str, str]] = set()
        # By the names of the images.
        self._applied: dict[str, Decision] = {}
        self._changed: dict[str, str] = {}
        self._stale: dict[str, tuple[str, Decision]] = {}

    @property
    def counts(self) -> Counter[str]:
        """How many images were ``corrected``, ``dropped``, ``kept`` and ``added``."""
        return counts_of(self._applied.values())

    @property
    def taken(self) -> Counter[str]:
        """Of each class, how many images it lost by corrections and drops."""
        rows = self._applied.values()
        lost = Counter(row.was for row in rows if row.was not in ("", row.label))
        return lost + Counter(self._changed.values())

    def corrected(self) -> list[dict[str, str]]:
        """Return the images whose labels are not the source's, by their paths.

        One whose bytes the source has under two labels stands there with both.
        """
        rows = sorted((name, row) for name, row in self._applied.items() if row.was and row.label)
        images = {row.image for _, row in rows if row.was != row.label}
        return [
            {key: getattr(row, key) for key in ("sha256", "part", "was", "label")} | {"path": name}
            for name, row in rows
            if row.image in images
        ]

    def decide(self, name: str, sha256: str, part: str, label: str) -> Decision | None:
        """Return the decision on an image of the source that bears this label; None: there is none.

        One that was made on another label counts for nothing, and is reported.
        """
        rows = self._of.get((sha256, part))
        if not rows:
            return None
        self._met.add((sha256, part))
        row = rows.get(label)
        if row is None:
            other = next(iter(rows.values()))
            if other.label != label:  # else the source was corrected alike
                self._stale[name] = label, other
            return None
        self._applied[name] = row
        return row

    def is_same(self, name: str, sha256: str) -> bool:
        """Return whether an image of the unlabelled folder is the one that was decided on."""
        row = self._unlabelled[written(name)]
        self._met.add(row.image)
        if row.sha256 != sha256:
            self._changed[name] = row.label
            return False
        self._applied[name] = row
        return True

    def notes(self) -> list[str]:
        """Return what was applied, in a sentence."""
        said = ", ".join(f"{count} {kind}" for kind, count in sorted(self.counts.items()))
        return [f"{self._decisions.path}: {said}"] if said else []

    def warnings(self) -> list[str]:
        """Return what was not applied, and why, a sentence each."""
        said, table = [], self._decisions
        if self._stale:
            shown = [
                f"{name!r} was {row.was!r} when {table.named(row)} was decided, and is {label!r} "
                f"now"
                for name, (label, row) in list(self._stale.items())[:_SHOWN]
            ]
            said.append(
                f"{len(self._stale)} decisions of {table.path} are not applied, since the source "
                f"gives another label now: {_listed(shown, len(self._stale))}. Delete the row, or "
                f"decide again"
            )
        dropped = {row.image for row in self._unlabelled.values() if not row.label}
        absent = [row for row in table.rows if row.image not in self._met | dropped]
        if absent:
            shown = [f"{row.path!r}: {table.named(row)}" for row in absent[:_SHOWN]]
            said.append(
                f"{len(absent)} decisions of {table.path} are on images that are not there: "
                f"{_listed(shown, len(absent))}. They count when such an image comes back; files "
                f"whose bytes changed are other images"
            )
        return said


def _kind(row: Decision) -> str:
    if not row.label:
        return "dropped"
    return "kept" if row.label == row.was else "corrected"


def _listed(shown: list[str], count: int) -> str:
    return "; ".join(shown) + ("; ..." if count > len(shown) else "")


def counts_of(rows: Iterable[Decision]) -> Counter[str]:
    """Count decisions by what they do: ``corrected``, ``dropped``, ``kept`` or ``added``."""
    return Counter("added" if not row.was and row.label else _kind(row) for row in rows)
