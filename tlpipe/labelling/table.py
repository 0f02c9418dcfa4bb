"""The table of decisions while people decide: read anew each time, changed under a lock.

So nothing is lost where two pages or two people are at it at once, or the file is edited meanwhile.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tlpipe import files
from tlpipe.errors import ArtifactError
from tlpipe.sources import decisions
from tlpipe.sources.decisions import Decision, Decisions

Image = tuple[str, str]  # sha256 of its file, and its part of it


@dataclass(frozen=True)
class Subject:
    """An image as decisions know it; ``was``: its labels in the source, or an empty one."""

    sha256: str
    part: str
    path: str
    was: tuple[str, ...]

    @property
    def image(self) -> Image:
        """Which image it is."""
        return self.sha256, self.part


class TakenError(Exception):
    """It was decided already, or there is nothing to undo; the message says what."""


class Table:
    """The file, the lock beside which it is changed, and who decides."""

    def __init__(self, path: Path, lock: Path, by: str) -> None:
        """Take their places."""
        self.path, self._lock, self._by = path, lock, by

    def load(self) -> Decisions:
        """Read it.

        Raises:
            ArtifactError: it is damaged, or decides differently on one image.
        """
        return decisions.load(self.path)

    def check_writable(self) -> None:
        """Check that decisions can be saved.

        Raises:
            OSError: they cannot.
        """
        files.check_writable(self.path.parent)
        with files.in_turn(self._lock):
            pass

    def decide(self, subjects: Sequence[Subject], label: Callable[[str], str]) -> list[Decision]:
        """Save a decision on images, those without one; return the rows. It is on disk then.

        ``label``: from what an image was to what it is. Rows of other labels than the source gives
        now are replaced.

        Raises:
            TakenError: all of them have been decided on.
        """
        at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        with files.in_turn(self._lock):
            rows = self.load().rows
            known = decided(rows)
            new = [
                s for s in subjects if not any(row.was in s.was for row in known.get(s.image, ()))
            ]
            if not new:
                row = known[subjects[0].image][0]
                raise TakenError(
                    f"{row.by or 'somebody'} has decided already: {row.what}, {row.at}"
                )
            images = {subject.image for subject in new}
            made = [
                Decision(s.sha256, s.part, decisions.written(s.path), was, label(was), self._by, at)
                for s in new
                for was in s.was
            ]
            decisions.save(self.path, [*(r for r in rows if r.image not in images), *made])
        return made

    def undo(self, subjects: Sequence[Subject]) -> None:
        """Delete the rows of images.

        Raises:
            TakenError: there are none.
        """
        images = {subject.image for subject in subjects}
        with files.in_turn(self._lock):
            rows = self.load().rows
            kept = [row for row in rows if row.image not in images]
            if len(kept) == len(rows):
                raise TakenError("there is no decision to undo: its row is gone")
            decisions.save(self.path, kept)


def _is_settled(subject: Subject, rows: Sequence[Decision]) -> bool:
    return any(row.was in subject.was for row in rows)


def decided(rows: Sequence[Decision]) -> dict[Image, list[Decision]]:
    """Return the rows of each image."""
    found: dict[Image, list[Decision]] = {}
    for row in rows:
        found.setdefault(row.image, []).append(row)
    return found


def check_may_lie(path: Path) -> None:
    """Check that decisions would overwrite nothing but decisions.

    Raises:
        ArtifactError: something else lies there.
    """
    if path.exists() and not path.is_file():
        raise ArtifactError(f"{path} is no file; expected the table of decisions. Move it away.")
    decisions.load(path)
