"""Find the box around a polygon or a mask of COCO: run-length encoded, as numbers or compressed."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tlpipe.sources.candidates import Edges


def box_around(segmentation: Any) -> Edges:
    """Return left, upper, right and lower edge of what polygons or a mask cover.

    ``segmentation``: polygons as ``[[x, y, x, y, ...], ...]``, or a mask as ``{"size": [height,
    width], "counts": ...}`` with the lengths of runs down the columns, of pixels outside first.

    Raises:
        ValueError: it is neither, or empty.
    """
    if isinstance(segmentation, Mapping):
        height, width = size_of_mask(segmentation)
        counts = segmentation.get("counts")
        runs = _decompressed(counts) if isinstance(counts, str) else counts
        return _around_runs(runs, height, width)
    points: list[float] = []
    for polygon in segmentation if isinstance(segmentation, Sequence) else ():
        if not isinstance(polygon, Sequence) or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError("a polygon is no list of at least three pairs x, y")
        points += map(float, polygon)
    if not points or not all(map(math.isfinite, points)):
        raise ValueError("its segmentation is no list of polygons of finite numbers and no mask")
    return min(points[::2]), min(points[1::2]), max(points[::2]), max(points[1::2])


def size_of_mask(mask: Mapping[str, Any]) -> tuple[int, int]:
    """Return the height and width that a mask states.

    Raises:
        ValueError: it does not.
    """
    match mask.get("size"):
        case [int(height), int(width)] if height > 0 and width > 0:
            return height, width
    raise ValueError(f"its mask has the size {mask.get('size')!r}; expected [height, width]")


def _around_runs(runs: Any, height: int, width: int) -> Edges:
    is_list = isinstance(runs, list) and all(isinstance(run, int) and run >= 0 for run in runs)
    if not is_list or sum(runs) != height * width:
        raise ValueError(f"the runs of its mask do not add up to {height} x {width} pixels")
    left, upper, right, lower, end = width, height, 0, 0, 0
    for number, run in enumerate(runs):
        start, end = end, end + run
        if number % 2 == 0 or not run:
            continue
        first, last = start // height, (end - 1) // height
        left, right = min(left, first), max(right, last + 1)
        # A run that goes on in the next column touches the lowest and the highest row.
        upper = min(upper, start % height if first == last else 0)
        lower = max(lower, (end - 1) % height + 1 if first == last else height)
    if right <= left:
        raise ValueError("its mask covers no pixel")
    return left, upper, right, lower


def _decompressed(text: str) -> list[int]:
    """Return the runs of COCO's compressed masks.

    Each number is five bits a character, the lowest first, signed; 32 marks that more follow. From
    the fourth on it is the difference to the one two before (maskApi.c, rleFrString).

    Raises:
        ValueError: the text ends within a number, or has other characters.
    """
    runs: list[int] = []
    value = bits = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or bits > 60:
            raise ValueError(f"the compressed mask holds {character!r}, which has no meaning there")
        value |= (code & 31) << bits
        bits += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << bits
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = bits = 0
    if bits:
        raise ValueError("the compressed mask ends within a number")
    return runs
