"""What is known of the images of a source: from an earlier run, a first pass, and this one.

An image is known by its content. A file need not even be read to know its content, if it lies there
as it did: the file ``.seen.csv`` beside the manifest notes how. That one is no output, since times
and inodes are not the same anywhere else; without it files are only read again. What this run has
read lies on disk, a few numbers of each image in memory.
"""

import csv
import hashlib
import logging
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from tlpipe import files, runtime
from tlpipe.data import duplicates as near_duplicates
from tlpipe.data import pixels as packed
from tlpipe.data.images import Pixels, Sampling
from tlpipe.data.manifest import Duplicate, Entry, entry_of, load_duplicates, load_manifest
from tlpipe.data.pixels import PackedPixels, Thumbnails
from tlpipe.data.values import ValueRange, is_deep
from tlpipe.errors import ArtifactError
from tlpipe.sources import Candidate, Reject

_log = logging.getLogger(__name__)
SEEN = ("name", "stamp", "sha256")
Known = tuple[Entry, int]
Keys = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int32]
Flags = npt.NDArray[np.bool_]
_BLOCK = 4096
_SHOWN = 3  # of the files that an image is in conflict with
_RECORD = struct.Struct("<QQQI")
_RECORDS = np.dtype([("content", "<u8"), ("of_file", "<u8"), ("given", "<u8"), ("label", "<u4")])


@dataclass(frozen=True, slots=True)
class Usable:
    """An image that was read, or is known: then ``square`` is its row of the earlier pixels.

    ``stamp`` says how its file lies there, or is empty. Group and version of the entry come later.
    """

    entry: Entry
    square: Pixels | int
    thumbnail: Pixels
    stamp: str


Outcome = Usable | Reject


class FirstPass:
    """What a first reading made of a source: files of 8 bits need no second one.

    ``pixels``: what the images are rows of; ``decoded``: how many of 8 bits it decoded. Nothing of
    it grows in memory with the source: what is asked for comes in the order of the candidates.
    """

    def __init__(
        self,
        pixels: packed.PackedPixels,
        entries: Iterator[Entry],
        stamps: Iterator[tuple[str, str]],
        rejects: Sequence[Reject],
        decoded: int,
    ) -> None:
        """Take the entries, the stamps by name and the rejects, each in the candidates' order."""
        self.pixels = pixels
        self.decoded = decoded
        numbered = ((entry.path, entry, row) for row, entry in enumerate(entries))
        self._entries, self._stamps = _InOrder(numbered), _InOrder(stamps)
        self._rejects = _InOrder((reject.path, reject) for reject in rejects)

    def recall(self, parts: Sequence[Candidate]) -> list[Outcome] | None:
        """Return what became of a file's parts.

        Nothing where it must be read again: it has more than 8 bits, or may have, since all of it
        was rejected.
        """
        found: list[Outcome] = []
        for part in parts:
            if (known := self._entries.take(part.name)) is not None:
                _, entry, row = known
                entry = entry._replace(label=part.label)  # a decision may have changed it
                _, stamp = self._stamps.take(part.name) or ("", "")
                found.append(Usable(entry, row, self.pixels.thumbnails[row], stamp))
            elif (rejected := self._rejects.take(part.name)) is not None:
                found.append(rejected[1])
        usable = [outcome for outcome in found if isinstance(outcome, Usable)]
        is_plain = usable and not any(is_deep(outcome.entry.mode) for outcome in usable)
        return found if is_plain and len(found) == len(parts) else None


class _InOrder:
    """Tuples that begin with a name, looked up in their own order."""

    def __init__(self, found: Iterator[Any]) -> None:
        self._found = found
        self._next = next(found, None)

    def take(self, name: str) -> Any:
        """Return the next one if it has that name, and go on; otherwise None."""
        taken = self._next
        if taken is None or taken[0] != name:
            return None
        self._next = next(self._found, None)
        return taken


class Earlier:
    """Images that need not be decoded; none, where they were made in another way."""

    def __init__(
        self,
        manifest: Path,
        duplicates: Path,
        pixels: Path,
        report: Path,
        *,
        sampling: Sampling,
        decoder: str,
        compared: str,
    ) -> None:
        """Take what lies at the outputs' paths, if it belongs together.

        ``decoder`` and ``compared`` say by what images are decoded, and compared with each other,
        now. ``keys`` are the images' keys as numbers; ``near`` are the pairs of keys whose images
        were found nearly equal, of all that were kept. Pictures of more than 8 bits are taken only
        where ``sampling`` states their range of values; with others, all are compared anew.
        """
        self.pixels: PackedPixels | None = None
        self.value_range: ValueRange | None = None
        self.keys = np.empty(0, np.uint64)
        self.near: list[tuple[int, int]] = []
        self._by_key: dict[bytes, Known] = {}
        self._seen: dict[str, Sequence[str]] = {}
        try:
            found = packed.load(pixels)
            made_by = (found.sampling, found.decoder, files.read_json(report)["compared"])
            wanted = sampling.model_copy(update={"value_range": found.sampling.value_range})
            if made_by != (wanted, decoder, compared):
                return
            if found.data_sha256 != files.sha256(manifest):
                return
            entries = list(load_manifest(manifest))
            keys = [entry.key for entry in entries]
            numbers = [int.from_bytes(key) for key in keys]
            of = dict(zip((entry.path for entry in entries), numbers, strict=True))
            pairs = [(of[pair.path], of[pair.other]) for pair in load_duplicates(duplicates)]
            intact = found.intact()
        except (ArtifactError, OSError, KeyError, ValueError, TypeError):
            return
        self.pixels = found
        self.value_range = found.sampling.value_range
        is_same = None is not sampling.value_range == self.value_range
        usable = [is_same or not is_deep(entry.mode) for entry in entries]
        if all(usable):
            self.keys = np.array(numbers, np.uint64)
            self.near = pairs
        self._by_key = {
            key: (entry, row)
            for row, (key, entry) in enumerate(zip(keys, entries, strict=True))
            if intact[row] and usable[row]
        }
        if damaged := int((~intact).sum()):
            _log.warning("%s of the stored images are damaged and are decoded again", damaged)
        with suppress(ArtifactError):
            rows = files.read_csv(_seen_path(manifest), SEEN)
            self._seen = {name: known for name, *known in rows}

    def by_key(self, key: bytes) -> Known | None:
        """Return the entry of an equal image and its row, if there is one."""
        return self._by_key.get(key)

    def by_stamp(self, name: str, stamp: str) -> Known | None:
        """Return what a whole file is known as, if it lies there as it did."""
        known = self._seen.get(name)
        if known is None or not stamp or known[0] != stamp:
            return None
        return self._by_key.get(bytes.fromhex(known[1][:16]))


def remember(manifest: Path, seen: Path) -> None:
    """Keep the table that notes how the files of this run lie there, a row of ``SEEN`` for each."""
    seen.replace(_seen_path(manifest))


def _seen_path(manifest: Path) -> Path:
    return manifest.with_name(".seen.csv")


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

    def __init__(
        self, folder: Path, sampling: Sampling, known: PackedPixels | None, decoded: int = 0
    ) -> None:
        """Begin; ``known``: the pixels that recalled images are rows of.

        ``decoded``: how many of those were decoded in this run. ``seen`` is the table of those
        whole files that have a stamp.
        """
        self.count, self.decoded, self._decoded_deep = 0, decoded, 0
        self.rejects: list[Reject] = []
        self._folder = folder
        self._entries, self.seen = folder / "entries.csv", folder / "seen.csv"
        self._records = folder / "records"
        tables = [files.open_csv(path, "w") for path in (self._entries, self.seen)]
        numbers = self._records.open("wb")
        self._files: list[IO[Any]] = [*tables, numbers]
        self._write_entry, self._write_seen = (files.csv_writer(file).writerow for file in tables)
        self._write_seen(SEEN)
        self._write_record = numbers.write
        self._pixels = packed.Writer(folder, sampling, known)
        self._labels = dict[str, int]()

    def add(self, outcome: Outcome) -> None:
        """Note what became of one candidate."""
        if isinstance(outcome, Reject):
            self.rejects.append(outcome)
            return
        entry = outcome.entry
        self._pixels.append(entry.key, outcome.square, outcome.thumbnail)
        self._write_entry(entry)
        if outcome.stamp:
            self._write_seen((entry.path, outcome.stamp, entry.sha256))
        record = (
            int.from_bytes(entry.key),
            int(entry.sha256[:16], 16),
            _number(entry.group) if entry.group else 0,
            self._labels.setdefault(entry.label, len(self._labels)),
        )
        self._write_record(_RECORD.pack(*record))
        self.count += 1
        is_decoded = not isinstance(outcome.square, int)
        self.decoded += is_decoded
        self._decoded_deep += is_decoded and is_deep(entry.mode)

    def close(self) -> None:
        """Complete the files."""
        for file in self._files:
            file.close()
        self._pixels.close()
        runtime.trim()

    def group(self, earlier: Earlier) -> Groups:
        """Put together what is equal, nearly equal, of one photo or of one given group.

        ``earlier``: what was found among the images of an earlier run.
        """
        keep = self._without_conflicts()
        # While these are looked for, the records are not in memory.
        found = list(self._near(keep, earlier))
        runtime.trim()
        parents = np.arange(self.count, dtype=np.int32)
        equal = _link_equal(parents, self._column("content"), keep)
        of_file = self._column("of_file")
        _link_equal(parents, of_file, keep)
        near = sorted((i, j) for i, j in found if of_file[i] != of_file[j])
        for i, j in near:
            _union(parents, i, j)
        given = self._column("given")
        _link_equal(parents, given, keep & (given != 0))
        # Named by its smallest member, whatever the order of the files.
        own = np.where(given, given, self._column("content"))
        name = np.full(self.count, np.iinfo(np.uint64).max, np.uint64)
        roots = np.fromiter((_root(parents, row) for row in range(self.count)), np.int32)
        np.minimum.at(name, roots[keep], own[keep])
        rows = {row for pair in near for row in pair}
        return Groups(keep, name[roots], equal, len(rows), near)

    def duplicates(self, pairs: Sequence[tuple[int, int]]) -> Iterator[Duplicate]:
        """Yield the images of some pairs of rows."""
        rows = {row for pair in pairs for row in pair}
        named = {row: (entry.path, entry.label) for row, entry in self._some(rows)}
        for (path, label), (other, other_label) in ((named[i], named[j]) for i, j in pairs):
            yield Duplicate(path, other, label, other_label)

    def labels(self, keep: Flags) -> Counter[str]:
        """Count the labels of the images that are kept."""
        counts = np.bincount(self._column("label")[keep], minlength=len(self._labels))
        return Counter(dict(zip(self._labels, counts.tolist(), strict=True)))

    def entries(self, groups: Groups, data_version: str) -> Iterator[Entry]:
        """Yield the entries that are kept, in order and complete."""
        for values, name, keep in zip(_rows(self._entries), groups.name, groups.keep, strict=True):
            if keep:
                *known, _, split, _ = values
                yield entry_of([*known, f"{name:016x}", split, data_version])

    def pixels(self, keep: Flags) -> packed.Writer:
        """Return the writer of the images that are kept."""
        if keep.all():
            return self._pixels
        runtime.trim()
        keys = self._column("content").astype(">u8")
        return packed.keep_rows(self._pixels, keys, np.flatnonzero(keep))

    def set_aside(self) -> FirstPass:
        """Move all of it out of the way, for another reading of the same source."""
        pixels = packed.set_aside(self._pixels, "first")
        entries, seen = (
            path.rename(pixels.array.folder / path.name) for path in (self._entries, self.seen)
        )
        decoded = self.decoded - self._decoded_deep
        stamps = ((path, stamp) for path, stamp, _ in files.read_csv(seen, SEEN))
        return FirstPass(pixels, map(entry_of, _rows(entries)), stamps, self.rejects, decoded)

    def remove(self) -> None:
        """Remove what is no part of the pixels."""
        self._entries.unlink()
        self._records.unlink()

    def _near(self, keep: Flags, earlier: Earlier) -> Iterator[tuple[int, int]]:
        """Yield the pairs of rows that are nearly equal; of equal ones the first stands for all."""
        which, new, known = self._to_compare(keep, earlier)
        runtime.trim()
        thumbnails, keys = Thumbnails(self._folder, self.count), self._column("content")
        yield from near_duplicates.near_pairs(thumbnails, which, new, keys=keys, known=known)
        thumbnails.close()

    def _to_compare(
        self, keep: Flags, earlier: Earlier
    ) -> tuple[Flags, Flags, list[tuple[int, int]]]:
        """Return (N,) which rows to compare, (N,) which of them are new, and the known pairs."""
        kept = np.flatnonzero(keep)
        keys, first = np.unique(self._column("content")[kept], return_index=True)
        rows = kept[first]
        which, new = np.zeros((2, self.count), dtype=bool)
        which[rows] = new[rows] = True
        # Where one has gone, others may now be among the nearest that were not compared before.
        if not np.isin(earlier.keys, keys).all():
            return which, new, []
        new[rows[np.isin(keys, earlier.keys)]] = False
        near = rows[np.searchsorted(keys, np.array(earlier.near, np.uint64).reshape(-1, 2))]
        return which, new, [(i, j) for i, j in np.sort(near, axis=1).tolist()]

    def _without_conflicts(self) -> Flags:
        """Return (N,): not the very same image under two labels. Those become rejects."""
        content, labels = self._column("content"), self._column("label")
        order = np.lexsort((labels, content))
        same = content[order][1:] == content[order][:-1]
        differs = same & (labels[order][1:] != labels[order][:-1])
        keep = ~np.isin(content, content[order][1:][differs])
        found = dict(self._some(np.flatnonzero(~keep).tolist()))
        equal: dict[bytes, list[Entry]] = {}
        for entry in found.values():
            equal.setdefault(entry.key, []).append(entry)
        for entry in found.values():
            others = [other for other in equal[entry.key] if other.label != entry.label]
            shown = ", ".join(f"{other.path!r} ({other.label})" for other in others[:_SHOWN])
            more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
            detail = f"the same image is here as {entry.label}, and as {shown}{more}"
            self.rejects.append(Reject(entry.path, "conflict", detail))
        return keep

    def _column(self, name: str) -> npt.NDArray[Any]:
        """Return (N,) numbers of all rows, read anew: so much less is in memory at once."""
        column = np.empty(self.count, _RECORDS[name])
        with self._records.open("rb") as file:
            for start in range(0, self.count, _BLOCK):
                block = np.fromfile(file, _RECORDS, min(_BLOCK, self.count - start))
                column[start : start + len(block)] = block[name]
        return column

    def _some(self, rows: Iterable[int]) -> Iterator[tuple[int, Entry]]:
        wanted = set(rows)
        if wanted:
            for row, values in enumerate(_rows(self._entries)):
                if row in wanted:
                    yield row, entry_of(values)


def _rows(table: Path) -> Iterator[list[str]]:
    with files.open_csv(table, "r") as file:
        yield from csv.reader(file)


def _number(group: str) -> int:
    return int.from_bytes(hashlib.sha256(group.encode(errors="surrogateescape")).digest()[:8])


def _link_equal(parents: Rows, keys: Keys, which: Flags) -> int:
    """Put together the rows ``which`` with equal keys; return how many equal an earlier one."""
    rows = np.flatnonzero(which)
    order = rows[np.argsort(keys[rows], kind="stable")]
    found = np.flatnonzero(keys[order][1:] == keys[order][:-1]).tolist()
    for i in found:
        _union(parents, order[i], order[i + 1])
    return len(found)


def _union(parents: Rows, i: int, j: int) -> None:
    a, b = _root(parents, i), _root(parents, j)
    parents[max(a, b)] = min(a, b)


def _root(parents: Rows, row: int) -> int:
    while parents[row] != row:
        parents[row] = parents[parents[row]]
        row = int(parents[row])
    return row
