"""Find the part of a photo that a candidate is: its box in upright pixels, made square, or none."""

import math
from collections.abc import Sequence
from itertools import chain, product

from tlpipe.data.images import Frame
from tlpipe.errors import ImageError
from tlpipe.seeds import uniform
from tlpipe.sources.candidates import Box, Candidate, Edges

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
