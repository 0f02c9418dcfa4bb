"""The table of decisions while people decide: read anew each time, changed under a lock.

So nothing is lost where two pages or two people are at it at once, or the file is edited meanwhile.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tlpipe import files
from tlpipe.sources import decisions
from tlpipe.sources.decisions import Decision, Decisions

Image = tuple[str, str]  # sha256 of its file, and its part of it


@dataclass(frozen=True)
class Subject:
    """An image as decisions know it; ``was``: its labels in the source.

    One of an unlabelled folder has an empty label alone.
    """

    sha256: str
    part: str
    path: str
    was: tuple[str, ...]

    @property
    def image(self) -> Image:
        """Which image it is."""
        return self.sha256, self.part

    def decided(self, rows: Mapping[Image, Sequence[Decision]]) -> list[Decision]:
        """Return the rows that decide on it.

        Of an image of an unlabelled folder also one on the same bytes in the source.
        """
        return [row for row in rows.get(self.image, ()) if row.was in self.was or self.was == ("",)]


class TakenError(Exception):
    """It was decided already, or there is nothing to undo; the message says what."""


class Table:
    """The file, the lock beside which it is changed, and who decides.

    Rows that were there at the beginning on another label than the source gives now are replaced;
    those that come later are somebody's who sees another source, and stay.
    """

    def __init__(self, path: Path, by: str) -> None:
        """Read what is there.

        Raises:
            ArtifactError: as ``load``.
        """
        self.path, self._by = path, by
        # Beside the table: whoever shares the folder shares it.
        self._lock = path.with_name(f".{path.name}.lock")
        self._began = {*self.load().rows}
        self._replaced: dict[frozenset[Decision], list[Decision]] = {}

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

    def decide(self, wanted: Sequence[tuple[Subject, str]]) -> list[Decision]:
        """Save one decision on images, each with its label; return the rows. It is on disk then.

        Of several images, one that bears its label by a decision already stays as it is. The same
        bytes in the unlabelled folder are decided alike.

        Raises:
            TakenError: one of them was decided on otherwise, or all of them.
        """
        at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        with files.in_turn(self._lock):
            rows = self.load().rows
            known = decided(rows)
            made: list[Decision] = []
            replaced: list[Decision] = []
            agreed: list[Decision] = []
            for subject, label in wanted:
                there = known.get(subject.image, [])
                later = [row for row in there if row.was and row not in self._began]
                if standing := subject.decided(known) or later:
                    if len(wanted) == 1 or standing[0].label != label:
                        raise TakenError(_taken(standing[0], subject, len(wanted)))
                    agreed += standing
                    continue
                path = decisions.written(subject.path)
                of = {(path, was) for was in subject.was}
                of |= {(row.path, "") for row in there if not row.was}
                made += [
                    Decision(*subject.image, path, was, label, self._by, at)
                    for path, was in sorted(of)
                ]
                replaced += there
            if not made:
                raise TakenError(_taken(agreed[0], wanted[0][0], len(wanted)))
            decisions.save(self.path, [*({*rows} - {*replaced}), *made])
            self._replaced[frozenset(made)] = replaced
        return made

    def undo(self, rows: frozenset[Decision]) -> None:
        """Delete rows, and put back those that they have replaced since the beginning.

        Raises:
            TakenError: one of them is gone.
        """
        with files.in_turn(self._lock):
            there = {*self.load().rows}
            if not rows <= there:
                images = {row.image for row in rows}
                now = [row for row in there - rows if row.image in images]
                raise TakenError(
                    _taken(now[0]) if now else "there is no decision to undo: its row is gone"
                )
            kept = there - rows
            images = {row.image for row in kept}
            back = [
                row
                for made, replaced in self._replaced.items()
                if made <= rows
                for row in replaced
                if row.image not in images
            ]
            decisions.save(self.path, [*kept, *back])


def _taken(row: Decision, subject: Subject | None = None, images: int = 1) -> str:
    """Say who has decided what; and on which image, where it may be another than was asked of."""
    is_other = subject is not None and row.path != decisions.written(subject.path)
    where = f" on {row.path}" if images > 1 or is_other else ""
    return f"{row.by or 'somebody'} has decided{where} already: {row.what}, {row.at}"


def decided(rows: Sequence[Decision]) -> dict[Image, list[Decision]]:
    """Return the rows of each image."""
    found: dict[Image, list[Decision]] = {}
    for row in rows:
        found.setdefault(row.image, []).append(row)
    return found
