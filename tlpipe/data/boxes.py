"""Find the part of a photo that a candidate is: its box in upright pixels, made square, or none."""

import math
from collections.abc import Sequence

from tlpipe.data.images import Frame
from tlpipe.errors import ImageError
from tlpipe.seeds import uniform
from tlpipe.sources.candidates import Box, Candidate, Edges

_SMALLEST_BACKGROUND_PX = 32


def part_of(candidate: Candidate, frame: Frame, margin: float) -> Box:
    """Return the part of an upright image to take: a box with its margin, or a square beside all.

    Raises:
        ImageError: the box does not lie in the image, was drawn in a picture of another shape, or
            there is no room beside the boxes.
    """
    if candidate.avoid is not None:
        boxes = [upright_box(box, candidate.drawn_in, frame) for box in candidate.avoid]
        return _beside(boxes, candidate.file, frame.upright)
    assert candidate.box is not None
    left, upper, right, lower = box = upright_box(candidate.box, candidate.drawn_in, frame)
    width, height = frame.upright
    # Boxes are drawn by hand: a pixel beyond the edge is no mistake.
    slack = 1 + 0.01 * max(width, height)
    if left < -slack or upper < -slack or right > width + slack or lower > height + slack:
        shown = ", ".join(f"{edge:g}" for edge in box)
        raise ImageError("box_outside", f"{shown} in an image of {width} x {height} pixels")
    longer = max(right - left, lower - upper)
    side = longer * (1 + 2 * margin)
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


def _beside(boxes: Sequence[Edges], name: str, size: tuple[int, int]) -> Box:
    """Return the largest square among those tried, by the file's name, that touches no box."""
    width, height = size
    for share in (0.75, 0.5, 0.375, 0.25, 0.125):
        side = int(min(width, height) * share)
        if side < _SMALLEST_BACKGROUND_PX:
            break
        for attempt in range(60):
            left = int(uniform(attempt, f"{name} x") * (width - side + 1))
            upper = int(uniform(attempt, f"{name} y") * (height - side + 1))
            right, lower = left + side, upper + side
            if all(
                right <= math.floor(box[0])
                or left >= math.ceil(box[2])
                or lower <= math.floor(box[1])
                or upper >= math.ceil(box[3])
                for box in boxes
            ):
                return left, upper, right, lower
    raise ImageError("no_background", "the boxes leave no room for a square")
