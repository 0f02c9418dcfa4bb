"""Read the files of a source: each once, on all cores, in the order of their names."""

import hashlib
import logging
import os
import threading
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from typing import Any, TextIO

import numpy as np
from PIL import Image

from tlpipe.data import pixels as packed
from tlpipe.data.boxes import part_of
from tlpipe.data.earlier import Earlier, Known
from tlpipe.data.images import Header, Pixels, Sampling, frame_of, read_upright, square
from tlpipe.data.manifest import Entry
from tlpipe.data.values import Measured, is_deep
from tlpipe.errors import ImageError, StoreError
from tlpipe.sources.candidates import Candidate, Reject
from tlpipe.sources.listing import Source

_log = logging.getLogger(__name__)
_here = threading.local()  # the name of the file that a thread is at
_AHEAD = 32  # files read ahead of the one that is written


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


def read_all(
    source: Source,
    sampling: Sampling,
    margin: float,
    earlier: Earlier | None,
    measured: Measured,
    first: FirstPass | None = None,
) -> Iterator[Outcome]:
    """Yield what becomes of each candidate of a source, in their order.

    ``margin``: what is added to a box on each side, as a share of its longer side; ``earlier``:
    images that need not be decoded; ``measured``: takes the values of the pictures of more than 8
    bits that are decoded; ``first``: a reading of this source for another range of values, instead
    of ``earlier``.

    Raises:
        DataError: a file changes while it is read.
        StoreError: the disk, the network, the store or the memory fails.
    """

    def read(parts: Sequence[Candidate], stamp: str) -> list[Outcome]:
        try:
            data = source.storage.read(parts[0].file)
        except ImageError as error:
            return [Reject(part.name, error.reason, error.detail) for part in parts]
        return list(_read_parts(data, parts, stamp, sampling, margin, earlier, measured))

    waiting: deque[Future[list[Outcome]] | list[Outcome]] = deque()

    def next_one() -> list[Outcome]:
        found = waiting.popleft()
        return found if isinstance(found, list) else found.result()

    # Reading from afar waits more than it computes.
    threads = (os.cpu_count() or 1) * (1 if source.is_local else 8)
    with warnings_named(), ThreadPoolExecutor(threads) as pool:
        try:
            for file, group in groupby(source.candidates(), key=lambda part: part.file):
                parts = list(group)
                if first is not None and (recalled := first.recall(parts)) is not None:
                    waiting.append(recalled)
                    if len(waiting) >= _AHEAD:
                        yield from next_one()
                    continue
                stamp = source.storage.stamp(file)
                known = earlier.by_stamp(file, stamp) if earlier and _is_whole(parts) else None
                if earlier and known is not None:
                    waiting.append([_recall(parts[0], known, stamp, earlier)])
                else:
                    waiting.append(pool.submit(read, parts, stamp))
                if len(waiting) >= _AHEAD:
                    yield from next_one()
            while waiting:
                yield from next_one()
        finally:
            for found in waiting:
                if isinstance(found, Future):
                    found.cancel()


@contextmanager
def warnings_named() -> Iterator[None]:
    """Log what libraries warn of with the name of the file that they are at, once for each text.

    Without: Pillow's limit of pixels, since ours is decided before anything is decoded.
    """
    shown = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        name = getattr(_here, "name", None)
        if name is None:
            shown(message, category, filename, lineno, file, line)
        elif not issubclass(category, Image.DecompressionBombWarning):
            _log.warning("%s: %s", name, " ".join(str(message).split()))

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = shown


def _is_whole(parts: Sequence[Candidate]) -> bool:
    return len(parts) == 1 and parts[0].box is None and parts[0].avoid is None


def _recall(part: Candidate, known: Known, stamp: str, earlier: Earlier) -> Usable:
    entry, row = known
    assert earlier.pixels is not None
    return Usable(_entry(part, entry), row, earlier.pixels.thumbnails[row], stamp)


def _entry(part: Candidate, image: Entry) -> Entry:
    """Return the entry of a candidate whose image is that of ``image``."""
    return Entry(
        path=part.name,
        label=part.label,
        sha256=image.sha256,
        box=image.box,
        file_bytes=image.file_bytes,
        width=image.width,
        height=image.height,
        mode=image.mode,
        format=image.format,
        group=part.group,
        split=part.split,
        data_version="",
    )


def _read_parts(
    data: bytes,
    parts: Sequence[Candidate],
    stamp: str,
    sampling: Sampling,
    margin: float,
    earlier: Earlier | None,
    measured: Measured,
) -> Iterator[Outcome]:
    """Yield what became of one file's parts; the file is decoded once, and not at all if known."""
    sha256 = hashlib.sha256(data).hexdigest()
    is_whole = _is_whole(parts)
    decoded: tuple[Image.Image, Header] | None = None
    _here.name = parts[0].file
    for part in parts:
        try:
            has_box = part.box is not None or part.avoid is not None
            box = part_of(part, frame_of(data), margin) if has_box else None
            image = Entry(
                path="",
                label="",
                sha256=sha256,
                box=" ".join(map(str, box or ())),
                file_bytes=len(data),
                width=0,
                height=0,
                mode="",
                format="",
                group="",
                split="",
                data_version="",
            )
            if earlier and (known := earlier.by_key(image.key)) is not None:
                yield _recall(part, known, stamp, earlier)
                continue
            if decoded is None:
                enough = 2 * sampling.short_side_px if is_whole else None
                decoded = read_upright(
                    data,
                    enough_px=enough,
                    value_range=sampling.value_range,
                    measure=partial(measured.add, parts[0].file),
                )
            picture, header = decoded
            kept = square(picture, sampling, box)
        except ImageError as error:
            if error.reason == "out_of_memory":
                raise StoreError(
                    f"there is not enough memory to decode {part.name}, and {os.cpu_count()} files "
                    f"are decoded at a time. Nothing was rejected or changed: make room, or run on "
                    f"fewer cores (taskset), then run again."
                ) from None
            yield Reject(part.name, error.reason, error.detail)
            continue
        entry = _entry(part, image)._replace(**asdict(header))
        yield Usable(entry, np.asarray(kept), packed.thumbnail(kept), stamp)
