"""Read the files of a source: each once, on all cores, in the order of their names.

Of a photo with boxes each candidate is a part: its box in upright pixels, made square, or none.
"""

import hashlib
import logging
import math
import os
import threading
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import chain, groupby, product
from typing import TextIO

import numpy as np
from PIL import Image

from tlpipe.data import pixels as packed
from tlpipe.data.images import Frame, Header, Sampling, frame_of, read_upright, square
from tlpipe.data.journal import Earlier, FirstPass, Known, Outcome, Usable
from tlpipe.data.manifest import Entry
from tlpipe.data.values import Measured
from tlpipe.errors import ImageError, StoreError
from tlpipe.runtime import uniform
from tlpipe.sources import Box, Candidate, Edges, Reject
from tlpipe.sources.listing import Source

_TRIES = 60


def part_of(candidate: Candidate, frame: Frame, margin: float) -> Box:
    """Return the part of an upright image to take: a box with its margin, or a square beside all.

    Raises:
        ImageError: the box does not lie in the image, was drawn in a picture of another shape, or
            there is no room beside the boxes, or one of them does not lie in the image.
    """
    width, height = frame.upright
    if candidate.avoid is not None:
        boxes = [upright_box(box, candidate.drawn_in, frame) for box in candidate.avoid]
        rejected = [upright_box(box, candidate.drawn_in, frame) for box in candidate.occupied]
        for box in (*boxes, *rejected):
            if not _lies_in(box, frame.upright):
                text = f"the box {_shown(box)} lies outside of {width} x {height} pixels, so what "
                raise ImageError("no_background", f"{text}it is of may lie anywhere")
        parts = [_with_margin(box, margin, frame.upright) for box in boxes]
        sides = [min(part[2] - part[0], part[3] - part[1]) for part in parts]
        if candidate.side_px is not None:
            sides = [min(round(candidate.side_px * (1 + 2 * margin)), *frame.upright)]
        if not (sides := [side for side in sides if side >= 1]):
            raise ImageError("no_background", "no box tells how large a square is to be")
        return _beside([*boxes, *rejected], sides, candidate.file, frame.upright)
    assert candidate.box is not None
    box = upright_box(candidate.box, candidate.drawn_in, frame)
    left, upper, right, lower = box
    # Boxes are drawn by hand: a pixel beyond the edge is no mistake.
    slack = 1 + 0.01 * max(width, height)
    is_beyond = left < -slack or upper < -slack or right > width + slack or lower > height + slack
    if is_beyond or not _lies_in(box, frame.upright):
        raise ImageError("box_outside", f"{_shown(box)} in an image of {width} x {height} pixels")
    return _with_margin(box, margin, frame.upright)


def _lies_in(box: Edges, size: tuple[int, int]) -> bool:
    """Return whether a box and an image share pixels, or would if the box had an area."""
    return box[0] < size[0] and box[1] < size[1] and box[2] > 0 and box[3] > 0


def _shown(box: Edges) -> str:
    return ", ".join(f"{edge:g}" for edge in box)


def _with_margin(box: Edges, margin: float, size: tuple[int, int]) -> Box:
    """Return a box with its margin, widened to a square as far as the image reaches."""
    (left, upper, right, lower), (width, height) = box, size
    side = max(right - left, lower - upper) * (1 + 2 * margin)
    x, y = (left + right) / 2, (upper + lower) / 2
    return (
        max(math.floor(x - side / 2), 0),
        max(math.floor(y - side / 2), 0),
        min(math.ceil(x + side / 2), width),
        min(math.ceil(y + side / 2), height),
    )


def upright_box(box: Edges, drawn_in: tuple[int, int] | None, frame: Frame) -> Edges:
    """Return a box in pixels of the upright image.

    ``drawn_in``: the size of the picture that it was drawn in. That of the stored image, where it
    is not the upright one's too: the box is turned. One of the same shape: the box is scaled.

    Raises:
        ImageError: a picture of that size is neither of them.
    """
    if drawn_in is None or drawn_in == frame.upright:
        return box
    if drawn_in == frame.stored:
        return _turned(box, frame)
    is_upright, is_stored = (_is_scaled(drawn_in, size) for size in (frame.upright, frame.stored))
    if (is_upright == is_stored and frame.upright != frame.stored) or not is_upright | is_stored:
        of, by = drawn_in, frame.upright
        stored = f" (stored as {frame.stored[0]} x {frame.stored[1]})"
        detail = (
            f"the annotation is for an image of {of[0]} x {of[1]} pixels, this one has {by[0]} x "
            f"{by[1]}{stored if frame.stored != frame.upright else ''}; expected the same size, "
            f"or the same shape"
        )
        raise ImageError("size_differs", detail)
    size = frame.upright if is_upright else frame.stored
    across, down = size[0] / drawn_in[0], size[1] / drawn_in[1]
    scaled = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
    return scaled if is_upright else _turned(scaled, frame)


def _is_scaled(drawn_in: tuple[int, int], size: tuple[int, int]) -> bool:
    """Return whether one factor makes one size the other, where each may be rounded to pixels."""
    lowest = max((side - 1) / (was + 1) for side, was in zip(size, drawn_in, strict=True))
    highest = min((side + 1) / max(was - 1, 1) for side, was in zip(size, drawn_in, strict=True))
    return lowest < highest


def _turned(box: Edges, frame: Frame) -> Edges:
    """Return a box in stored pixels as it lies in the upright image (EXIF's orientations)."""
    width, height = frame.stored
    corners = []
    for x, y in (box[:2], box[2:]):
        corners.append(
            {
                2: (width - x, y),
                3: (width - x, height - y),
                4: (x, height - y),
                5: (y, x),
                6: (height - y, x),
                7: (height - y, width - x),
                8: (y, width - x),
            }.get(frame.orientation, (x, y))
        )
    (left, upper), (right, lower) = corners
    return min(left, right), min(upper, lower), max(left, right), max(upper, lower)


def _beside(boxes: Sequence[Edges], sides: Sequence[int], name: str, size: tuple[int, int]) -> Box:
    """Return a square that touches no box, with one of these sides, which the file's name picks.

    A place is drawn by the name too. Where none of those drawn is free, the corners that edges of
    photo and boxes make are tried: if a square of that side fits anywhere, it fits in one of them.
    """
    width, height = size
    around = [
        (math.floor(left), math.floor(upper), math.ceil(right), math.ceil(lower))
        for left, upper, right, lower in boxes
    ]
    order = sorted(range(len(sides)), key=lambda number: uniform(number, f"{name} side"))
    for side in (sides[number] for number in order):
        room = width - side, height - side
        # Of a box that lies outside of the photo nothing is left, or less.
        if side < 1 or min(room) < 0:
            continue
        drawn = (
            (
                int(uniform(attempt, f"{name} x") * (room[0] + 1)),
                int(uniform(attempt, f"{name} y") * (room[1] + 1)),
            )
            for attempt in range(_TRIES)
        )
        corners = product({0, *(box[2] for box in around)}, {0, *(box[3] for box in around)})
        for left, upper in chain(drawn, sorted(corners)):
            right, lower = left + side, upper + side
            is_inside = right <= width and lower <= height
            if is_inside and all(
                right <= box[0] or left >= box[2] or lower <= box[1] or upper >= box[3]
                for box in around
            ):
                return left, upper, right, lower
    shown = ", ".join(str(side) for side in sorted(set(sides))[:3])
    detail = f"no square of the side of a box ({shown} px) fits beside the boxes"
    raise ImageError("no_background", detail)


_log = logging.getLogger(__name__)
_here = threading.local()  # the name of the file that a thread is at
_AHEAD = 32  # files read ahead of the one that is written


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
            data = source.read(parts[0].file)
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
                stamp = source.stamp(file)
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
