"""Photos with labelled boxes, as annotations describe them: each box becomes a candidate."""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter

from tlpipe.seeds import uniform
from tlpipe.sources.candidates import Candidate, Edges, Reject

# What reading a region may raise where it is damaged.
UNUSABLE = (ValueError, TypeError, OverflowError)


@dataclass
class Photo:
    """One photo and what is labelled in it.

    Attributes:
        size: width and height of the picture that boxes were drawn in, where they are stated.
        labels: name, label and box of each annotation; without a box it is of the whole photo.
        occupied: the boxes of annotations that are rejected; None for one that cannot be told.
    """

    file: str
    split: str = ""
    size: tuple[int, int] | None = None
    labels: list[tuple[str, str, Edges | None]] = field(default_factory=list)
    occupied: list[Edges | None] = field(default_factory=list)

    def occupy(self, region: Callable[[], Edges | None]) -> None:
        """Add the box of a rejected annotation, which ``region`` reads."""
        try:
            self.occupied.append(region())
        except UNUSABLE:
            self.occupied.append(None)


def candidates(
    photos: Iterable[Photo], background: str | None, rejects: list[Reject]
) -> list[Candidate]:
    """Return the boxes of photos as candidates, and a photo whose label is of the whole of it.

    ``background``: the label of a square in each photo, which touches no stated box, be it
    one that is rejected. Where the region of an annotation is not known, or is the whole photo,
    there is none. It has the side of one of the photo's own boxes, since the class could be told by
    its sharpness otherwise; in a photo without boxes, of a box of the photo that follows it by the
    hash of names, which others that come or go seldom change. That side is in pixels of the picture
    that the other box was drawn in: whether its file is larger or smaller is not known before it is
    read.
    """
    found: list[Candidate] = []
    sound = [(photo, list(_sound(photo, rejects))) for photo in photos]
    ring = sorted((uniform(0, photo.file), boxes) for photo, boxes in sound if boxes)
    for photo, boxes in sound:
        found += _whole(photo, rejects)
        found += (
            Candidate(name, photo.file, label, photo.split, box=box, drawn_in=photo.size)
            for name, label, box in boxes
        )
        if background is not None and _has_room(photo, background, rejects):
            found.append(
                Candidate(
                    name=f"{photo.file}#{background}",
                    file=photo.file,
                    label=background,
                    split=photo.split,
                    avoid=tuple(box for _, _, box in boxes),
                    occupied=_refused(photo, boxes),
                    drawn_in=photo.size,
                    side_px=None if boxes else _side_of_next(photo, ring),
                )
            )
    return found


Ring = Sequence[tuple[float, list[tuple[str, str, Edges]]]]


def _side_of_next(photo: Photo, ring: Ring) -> float | None:
    """Return the longer side of a box of the photo that follows; hashes of names pick both."""
    if not ring:
        return None
    place = bisect_left(ring, uniform(0, photo.file), key=itemgetter(0))
    boxes = ring[place % len(ring)][1]
    number = int(uniform(0, f"{photo.file} side of next") * len(boxes))
    _, _, (left, upper, right, lower) = boxes[number]
    return max(right - left, lower - upper)


def _has_room(photo: Photo, background: str, rejects: list[Reject]) -> bool:
    """Return whether each annotation has a region, and none the whole photo; or add a reject."""
    boxes = [*(box for _, _, box in photo.labels), *photo.occupied]
    if all(box is not None and all(map(math.isfinite, box)) for box in boxes):
        return True
    text = "an annotation is of the whole photo, or its region cannot be told"
    rejects.append(Reject(f"{photo.file}#{background}", "no_background", text))
    return False


def _refused(photo: Photo, sound: list[tuple[str, str, Edges]]) -> tuple[Edges, ...]:
    """Return the boxes of rejected annotations, with edges in order."""
    taken = {box for _, _, box in sound}
    boxes = [*(box for _, _, box in photo.labels), *photo.occupied]
    return tuple(
        (min(box[0], box[2]), min(box[1], box[3]), max(box[0], box[2]), max(box[1], box[3]))
        for box in boxes
        if box is not None and box not in taken
    )


def _whole(photo: Photo, rejects: list[Reject]) -> Iterator[Candidate]:
    labels = sorted({label for _, label, box in photo.labels if box is None})
    if len(labels) > 1:
        text = f"one image under the labels {', '.join(labels)}"
        rejects.append(Reject(photo.file, "conflict", text))
    elif labels:
        yield Candidate(name=photo.file, file=photo.file, label=labels[0], split=photo.split)


def _sound(photo: Photo, rejects: list[Reject]) -> Iterator[tuple[str, str, Edges]]:
    """Yield the boxes that have an area, each name once."""
    seen: dict[str, tuple[str, Edges]] = {}
    for name, label, box in photo.labels:
        if box is None:
            continue
        left, upper, right, lower = box
        if not all(map(math.isfinite, box)) or right - left < 1 or lower - upper < 1:
            text = f"{label}: {', '.join(f'{edge:g}' for edge in box)} has no area"
            if all(-1 <= edge <= 1 for edge in box):
                text += "; if these are shares of the photo's sides, export them in pixels"
            rejects.append(Reject(name, "degenerate_box", text))
        elif name not in seen:
            seen[name] = (label, box)
            yield name, label, box
        else:
            is_equal = seen[name] == (label, box)
            text = f"its id stands there twice; the other one is {seen[name][0]}"
            rejects.append(Reject(name, "repeated" if is_equal else "bad_annotation", text))
