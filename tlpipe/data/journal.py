"""What ``ingest`` has read so far: pixels and entries on disk, a few numbers of each in memory."""

import csv
import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tlpipe.data import duplicates as near_duplicates
from tlpipe.data import pixels as packed
from tlpipe.data.earlier import Earlier
from tlpipe.data.images import Sampling
from tlpipe.data.manifest import Duplicate, Entry, entry_of
from tlpipe.data.pixels import PackedPixels, Thumbnails
from tlpipe.data.reading import Outcome
from tlpipe.sources.candidates import Reject

Keys = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int32]
Flags = npt.NDArray[np.bool_]
_values = attrgetter(*Entry.__slots__)


@dataclass(frozen=True)
class Groups:
    """What belongs together.

    ``keep``: (N,) whether an image is used; ``name``: (N,) the number that names its group;
    ``equal`` and ``nearly_equal``: how many used images are so to another one; ``pairs``: rows that
    are nearly equal.
    """

    keep: Flags
    name: Keys
    equal: int
    nearly_equal: int
    pairs: list[tuple[int, int]]


class Journal:
    """Takes down what becomes of each candidate, in a folder that is still being made."""

    def __init__(self, folder: Path, sampling: Sampling, known: PackedPixels | None) -> None:
        """Begin; ``known``: the pixels that recalled images are rows of."""
        self.count = self.decoded = 0
        self.rejects: list[Reject] = []
        self._folder = folder
        self._entries, self._seen = folder / "entries.csv", folder / "seen.csv"
        self._files = [
            path.open("w", newline="", encoding="utf-8", errors="surrogateescape")
            for path in (self._entries, self._seen)
        ]
        self._write_entry, self._write_seen = (
            csv.writer(file, lineterminator="\r\n").writerow for file in self._files
        )
        self._pixels = packed.Writer(folder, sampling, known)
        self._content, self._of_file, self._given = array("Q"), array("Q"), array("Q")
        self._label, self._labels = array("I"), dict[str, int]()

    def add(self, outcome: Outcome) -> None:
        """Note what became of one candidate."""
        if isinstance(outcome, Reject):
            self.rejects.append(outcome)
            return
        entry = outcome.entry
        self._pixels.append(entry.key, outcome.square, outcome.thumbnail)
        self._write_entry(_values(entry))
        if outcome.stamp:
            self._write_seen((entry.path, outcome.stamp, entry.sha256))
        self._content.append(int.from_bytes(entry.key))
        self._of_file.append(int(entry.sha256[:16], 16))
        self._given.append(_number(entry.group) if entry.group else 0)
        self._label.append(self._labels.setdefault(entry.label, len(self._labels)))
        self.count += 1
        self.decoded += not isinstance(outcome.square, int)

    def close(self) -> None:
        """Complete the files."""
        for file in self._files:
            file.close()
        self._pixels.close()

    def group(self, earlier: Earlier) -> Groups:
        """Put together what is equal, nearly equal, of one photo or of one given group.

        ``earlier``: what was found among the images of an earlier run.
        """
        content, of_file, given = map(_numbers, (self._content, self._of_file, self._given))
        labels = _numbers(self._label)
        keep = self._without_conflicts(content, labels)
        parents = np.arange(self.count, dtype=np.int32)
        for keys, which in ((content, keep), (of_file, keep), (given, keep & (given != 0))):
            _link_equal(parents, keys, which)
        near: list[tuple[int, int]] = []
        thumbnails = Thumbnails(self._folder, self.count)
        for i, j in near_duplicates.near_pairs(thumbnails, self._knows(earlier)):
            if keep[i] and keep[j] and of_file[i] != of_file[j]:
                _union(parents, i, j)
                near.append((i, j))
        thumbnails.close()
        roots = np.fromiter((_root(parents, row) for row in range(self.count)), np.int32)
        # Named by its smallest member, whatever the order of the files.
        name = np.full(self.count, np.iinfo(np.uint64).max, np.uint64)
        np.minimum.at(name, roots[keep], np.where(given, given, content)[keep])
        return Groups(
            keep=keep,
            name=name[roots],
            equal=int(keep.sum()) - len(np.unique(content[keep])),
            nearly_equal=len({row for pair in near for row in pair}),
            pairs=sorted(near),
        )

    def duplicates(self, pairs: Sequence[tuple[int, int]]) -> Iterator[Duplicate]:
        """Yield the images of some pairs of rows."""
        rows = {row for pair in pairs for row in pair}
        named = {row: (entry.path, entry.label) for row, entry in self._some(rows)}
        for (path, label), (other, other_label) in ((named[i], named[j]) for i, j in pairs):
            yield Duplicate(path, other, label, other_label)

    def labels(self, keep: Flags) -> Counter[str]:
        """Count the labels of the images that are kept."""
        counts = np.bincount(_numbers(self._label)[keep], minlength=len(self._labels))
        return Counter(dict(zip(self._labels, counts.tolist(), strict=True)))

    def entries(self) -> Iterator[Entry]:
        """Yield the entries in order."""
        with self._entries.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            yield from map(entry_of, csv.reader(file))

    def seen(self) -> Iterator[tuple[str, str, str]]:
        """Yield name, stamp and sha256 of the files that have a stamp."""
        with self._seen.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            yield from csv.reader(file)

    def pixels(self, keep: Flags) -> packed.Writer:
        """Return the writer of the images that are kept."""
        if keep.all():
            return self._pixels
        keys = [number.to_bytes(8) for number in self._content]
        return packed.keep_rows(self._pixels, keys, np.flatnonzero(keep).tolist())

    def remove(self) -> None:
        """Remove what is no part of the pixels."""
        self._entries.unlink()
        self._seen.unlink()

    def _knows(self, earlier: Earlier) -> Callable[[int, int], bool]:
        """Return what says whether two rows were found nearly equal before."""
        content, pairs = self._content, earlier.near
        return lambda i, j: (min(content[i], content[j]), max(content[i], content[j])) in pairs

    def _without_conflicts(self, content: Keys, labels: Keys) -> Flags:
        """Return (N,): not the very same image under two labels. Those become rejects."""
        order = np.lexsort((labels, content))
        same = content[order][1:] == content[order][:-1]
        differs = same & (labels[order][1:] != labels[order][:-1])
        keep = ~np.isin(content, content[order][1:][differs])
        found = dict(self._some(np.flatnonzero(~keep).tolist()))
        names: dict[bytes, set[str]] = {}
        for entry in found.values():
            names.setdefault(entry.key, set()).add(entry.label)
        for entry in found.values():
            detail = f"the same image under the labels {', '.join(sorted(names[entry.key]))}"
            self.rejects.append(Reject(entry.path, "conflict", detail))
        return keep

    def _some(self, rows: Iterable[int]) -> Iterator[tuple[int, Entry]]:
        wanted = set(rows)
        if wanted:
            for row, entry in enumerate(self.entries()):
                if row in wanted:
                    yield row, entry


def _numbers(values: "array[int]") -> "npt.NDArray[Any]":
    """Return an array's numbers without a copy."""
    return np.frombuffer(values, values.typecode) if values else np.empty(0, values.typecode)


def _number(group: str) -> int:
    return int.from_bytes(hashlib.sha256(group.encode(errors="surrogateescape")).digest()[:8])


def _link_equal(parents: Rows, keys: Keys, which: Flags) -> None:
    """Put together the rows ``which`` with equal keys."""
    rows = np.flatnonzero(which)
    order = rows[np.argsort(keys[rows], kind="stable")]
    for i in np.flatnonzero(keys[order][1:] == keys[order][:-1]).tolist():
        _union(parents, order[i], order[i + 1])


def _union(parents: Rows, i: int, j: int) -> None:
    a, b = _root(parents, i), _root(parents, j)
    parents[max(a, b)] = min(a, b)


def _root(parents: Rows, row: int) -> int:
    while parents[row] != row:
        parents[row] = parents[parents[row]]
        row = int(parents[row])
    return row
