"""Find images that are nearly the same: re-encoded, resized, mirrored, a little cropped, brighter.

First by low frequencies: the block of the discrete cosine transform that perceptual hashes take
their bits from (Zauner 2010, Implementation and benchmarking of perceptual image hash functions),
kept as numbers, since a Hamming distance that forgives a crop also joins strangers. Then each pair
is aligned and compared pixel by pixel, contours apart from areas. Of each image some 100 bytes are
in memory; the rest is read from the thumbnails' file.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from tempfile import TemporaryFile
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt

from tlpipe import runtime
from tlpipe.data.pixels import Thumbnails

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int8]
Points = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int32]
Keys = npt.NDArray[np.uint64]

# Measured on 2,000 photographs with planted copies (tests/data/test_duplicates.py): copies that
# lose up to 6 % of each side lie within 0.36, in the lowest frequencies within 0.22; their
# similarity is at least 0.97 already in a coarse look. Of 5,000 handwritten digits, all alike, a
# handful of pairs passes both similarities.
_RADIUS, _LOW_RADIUS = 0.38, 0.28
_LIKE_AREAS, _LIKE_CONTOURS, _MAYBE = 0.98, 0.96, 0.96
_FREQUENCIES, _LOWEST = 6, 8
_NEIGHBOURS, _NEAREST = 49, 4  # the first of them is the row itself
_FLAT = 4.0  # gray levels of standard deviation, below which there is nothing to compare
_MOST_CHANGE = 0.25  # of half a side, that a crop may move or stretch an image
_BLOCK, _PAIRS = 256, 32
_STEPS = 127  # frequencies are at most 1, and kept as so many steps: distances are then exact
_REACH, _LOW_REACH = (_RADIUS * _STEPS) ** 2, (_LOW_RADIUS * _STEPS) ** 2
_FEW = 2**25  # comparisons that take less time than to load the tree that would spare them


def near_pairs(
    thumbnails: Thumbnails,
    which: Flags | None = None,
    new: Flags | None = None,
    *,
    keys: Keys | None = None,
    known: Sequence[tuple[int, int]] = (),
) -> Iterator[tuple[int, int]]:
    """Yield the pairs of rows (i, j), i < j, whose images are nearly the same.

    Compared are those of which one is among the four nearest of the other. Which these are depends
    on the images alone, not on their names or on which of them were there first: with the pairs
    that are known of the old ones, the result is that of comparing all of them anew.

    ``which``: (N,) the rows to compare, by default all; ``new``: (N,) those that were not there
    when ``known``, the pairs of the others, were found, by default all; ``keys``: (N,) numbers of
    the images' contents, which say who comes first of equally near ones, by default the rows.
    """
    from threadpoolctl import threadpool_limits

    # Threads of a BLAS that wait for one another burn more than these small products take.
    with threadpool_limits(1), _Frequencies(thumbnails, which, keys) as frequencies:
        rows = frequencies.rows
        is_new = np.ones(len(rows), dtype=bool) if new is None else new[rows]
        numbers = frequencies.numbers(known)
        changed, neighbours = _neighbours(frequencies, is_new, numbers)
        runtime.trim()
        for i, j in rows[numbers[~changed[numbers].any(axis=1)]].tolist():
            yield min(i, j), max(i, j)
        pairs = _candidates(neighbours, changed)
        while some := list(islice(pairs, _PAIRS)):
            found = np.array(some, dtype=np.int32)
            found[:, :2] = rows[found[:, :2]]
            for i, j, _ in found[_are_same(thumbnails, found)].tolist():
                yield min(i, j), max(i, j)


def describe(thumbnails: npt.NDArray[np.uint8]) -> Floats:
    """Return low frequencies of (N, 64, 64) gray images, brightness and contrast taken out.

    Returns: (N, 6, 6), rows are vertical frequencies; NaN for images without structure.
    """
    rows = np.add(thumbnails[:, ::2], thumbnails[:, 1::2], dtype=np.uint16)
    small = np.add(rows[:, :, ::2], rows[:, :, 1::2], dtype=np.float32)
    small *= 0.25
    small -= small.mean(axis=(1, 2), keepdims=True)
    norm = np.sqrt(np.einsum("nij,nij->n", small, small))[:, None, None]
    norm[norm < _FLAT * small.shape[1]] = np.nan
    frequencies: Floats = _COSINES @ small @ _COSINES.T / norm
    return frequencies


def _cosines(size: int) -> Floats:
    """Return the first rows of the orthonormal DCT-II."""
    angles = np.pi * (np.arange(size) + 0.5)[None] * np.arange(_FREQUENCIES)[:, None] / size
    cosines: Floats = (np.cos(angles) * np.sqrt(2 / size)).astype(np.float32)
    cosines[0] /= np.sqrt(2)
    return cosines


_COSINES = _cosines(32)
# A mirrored image has the same frequencies; those that are odd from left to right change sign.
_MIRROR = np.where(np.arange(_FREQUENCIES) % 2 == 1, -1, 1).astype(np.int8)
# The lowest ones, without the constant.
_LOW = np.array(
    sorted(
        ((v, h) for v in range(_FREQUENCIES) for h in range(_FREQUENCIES) if v + h),
        key=lambda place: (place[0] ** 2 + place[1] ** 2, place),
    )[:_LOWEST]
)


class _Frequencies:
    """Low frequencies in whole steps, on disk.

    ``rows`` are those wanted that have structure, in the order of their keys: that is how they are
    numbered here.
    """

    def __init__(self, thumbnails: Thumbnails, which: Flags | None, keys: Keys | None) -> None:
        self._file = TemporaryFile()  # noqa: SIM115  closed on exit
        wanted = np.ones(thumbnails.count, dtype=bool) if which is None else which.copy()
        for start in range(0, thumbnails.count, _BLOCK):
            block = slice(start, min(start + _BLOCK, thumbnails.count))
            frequencies = describe(thumbnails.rows(block.start, block.stop))
            wanted[block] &= ~np.isnan(frequencies[:, 0, 0])
            np.round(frequencies[wanted[block]] * _STEPS).astype(np.int8).tofile(self._file)
        self.rows = np.flatnonzero(wanted).astype(np.int32)
        # The number of each in the file's order.
        self._number = np.arange(len(self.rows), dtype=np.int32)
        if keys is not None:
            order = np.argsort(keys[self.rows], kind="stable")
            self._number[order] = np.arange(len(order), dtype=np.int32)
            self.rows = self.rows[order]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def numbers(self, pairs: Sequence[tuple[int, int]]) -> Rows:
        """Return the numbers (P, 2) of pairs of rows."""
        wanted = np.array(pairs, np.int32).reshape(-1, 2)
        order = np.argsort(self.rows).astype(np.int32)
        return order[np.searchsorted(self.rows, wanted, sorter=order)]

    def codes(self) -> Codes:
        """Return (N, 6, 6)."""
        codes = np.empty((len(self.rows), _FREQUENCIES, _FREQUENCIES), np.int8)
        for numbers, some in self._blocks():
            codes[numbers] = some
        return codes

    def points(self) -> Points:
        """Return (N, 8) of the lowest ones, equal for an image and its mirror image."""
        points = np.empty((len(self.rows), len(_LOW)))
        for numbers, codes in self._blocks():
            for column, (vertical, horizontal) in enumerate(_LOW):
                signed = codes[:, vertical, horizontal]
                points[numbers, column] = np.abs(signed) if horizontal % 2 else signed
        return points

    def _blocks(self) -> Iterator[tuple[Rows, Codes]]:
        self._file.seek(0)
        for numbers in _split(self._number, _BLOCK):
            codes = np.fromfile(self._file, np.int8, len(numbers) * _FREQUENCIES**2)
            yield numbers, codes.reshape(-1, _FREQUENCIES, _FREQUENCIES)


def _neighbours(frequencies: _Frequencies, is_new: Flags, known: Rows) -> tuple[Flags, Rows]:
    """Return whose neighbours may have changed, and the neighbours that are needed.

    Returns: (N,) the new ones and those that have a new one in reach; (N, 4) the nearest in reach,
    ``~number`` where mirrored, else each one's own number. Those that have not changed have none,
    but for those that are known to be nearly equal to one that has: it may be they who list it.
    """
    # What may be in reach waits on disk, so that the tree is gone when the rest is compared.
    with TemporaryFile() as file:
        points = frequencies.points()
        changed = _reached(points, is_new)
        wanted = changed.copy()
        wanted[known[changed[known].any(axis=1)]] = True
        asked = np.flatnonzero(wanted).astype(np.int32)
        _save_reach(points, asked, file)
        del points
        runtime.trim()
        file.seek(0)
        codes = frequencies.codes()
        nearest = np.repeat(np.arange(len(codes), dtype=np.int32)[:, None], _NEAREST, axis=1)
        for mine in _split(asked, _BLOCK):
            others = np.fromfile(file, np.int32, len(mine) * _NEIGHBOURS).reshape(len(mine), -1)
            straight = _squares(codes[mine], codes[others])
            turned = _squares(codes[mine] * _MIRROR, codes[others])
            squares = np.minimum(straight, turned)
            absent = (others == mine[:, None]) | (squares > _REACH)
            squares[absent] = np.inf
            order = np.argsort(squares, axis=1, kind="stable")[:, :_NEAREST]
            chosen = np.where(turned < straight, ~others, others)
            chosen = np.where(absent, mine[:, None], chosen)
            nearest[mine] = np.take_along_axis(chosen, order, axis=1)
    return changed, nearest


def _save_reach(points: Points, asked: Rows, file: IO[bytes]) -> None:
    """Write (A, 49) int32: the nearest of each one asked that may be in reach, and its own.

    In the order of their numbers; filled up with its own. Of equally near ones the first count.
    """
    if len(asked) * len(points) <= _FEW:
        for mine in _split(asked, _part(points)):
            others = np.repeat(mine[:, None], _NEIGHBOURS, axis=1)
            for position, near in enumerate(_far(points[mine], points)):
                found = np.flatnonzero(near <= _LOW_REACH)
                nearest = np.argsort(near[found], kind="stable")[:_NEIGHBOURS]
                others[position, : len(nearest)] = np.sort(found[nearest])
            others.tofile(file)
        return
    from scipy.spatial import KDTree

    tree = KDTree(points, leafsize=64)
    for mine in _split(asked, _BLOCK):
        far, found = tree.query(points[mine], _NEIGHBOURS + 1, distance_upper_bound=_LOW_REACH**0.5)
        others = np.where(found == len(points), mine[:, None], found)[:, :_NEIGHBOURS]
        # The tree takes any of those that are as far as the last one.
        last = far[:, _NEIGHBOURS - 1]
        tied = (last == far[:, _NEIGHBOURS]) & np.isfinite(last)
        for position in np.flatnonzero(tied).tolist():
            point = points[mine[position]]
            within = np.sort(tree.query_ball_point(point, last[position] + 1e-6))
            squares = ((points[within] - point) ** 2).sum(axis=1)
            others[position] = within[np.argsort(squares, kind="stable")[:_NEIGHBOURS]]
        np.sort(others, axis=1).astype(np.int32).tofile(file)


def _reached(points: Points, is_new: Flags) -> Flags:
    """Return (N,) who is new or may have a new one in reach; all, where there are many new ones."""
    if is_new.all() or is_new.sum() * len(points) > _FEW:
        return np.ones(len(points), dtype=bool)
    reached = is_new.copy()
    mine = points[is_new]
    for others in _split(np.arange(len(points)), _part(mine)):
        reached[others] |= (_far(mine, points[others]) <= _LOW_REACH).any(axis=0)
    return reached


def _far(mine: npt.NDArray[Any], others: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return (B, N) squared distances of (B, d) and (N, d) whole numbers; exact."""
    lengths = (mine**2).sum(axis=1)[:, None] + (others**2).sum(axis=1)
    return np.asarray(lengths - 2 * mine @ others.T)


def _squares(mine: Codes, others: Codes) -> Floats:
    """Return (B, k) squared distances of (B, 6, 6) and (B, k, 6, 6) frequencies; exact."""
    difference = mine[:, None].astype(np.float32) - others
    return np.asarray(np.einsum("bkij,bkij->bk", difference, difference), np.float32)


def _part(rows: npt.NDArray[Any]) -> int:
    """Return how many others are compared with all of the rows at once."""
    return max(2**16 // max(len(rows), 1), 1)


def _split(rows: npt.NDArray[Any], size: int) -> Iterator[Rows]:
    """Yield the rows in parts."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _candidates(neighbours: Rows, changed: Flags) -> Iterator[tuple[int, int, bool]]:
    """Yield each pair of neighbours with a changed one once: one, a later one, if mirrored."""
    has_any = (neighbours != np.arange(len(neighbours))[:, None]).any(axis=1)
    for i in map(int, np.flatnonzero(has_any)):  # a list would take more than the neighbours
        for found in neighbours[i].tolist():
            j, is_mirrored = (~found, True) if found < 0 else (found, False)
            if not (changed[i] or changed[j]):
                continue
            # From the later one's side it is seen only if the earlier one does not list it.
            if j > i:
                yield i, j, is_mirrored
            elif j < i and i not in neighbours[j] and ~i not in neighbours[j]:
                yield j, i, is_mirrored


def _are_same(thumbnails: Thumbnails, pairs: Rows) -> Flags:
    """Compare (P, 3) candidates; a coarse look spares most of them the fine one."""
    images = thumbnails.pick(pairs[:, 0].tolist()).astype(np.float32)
    others = thumbnails.pick(pairs[:, 1].tolist()).astype(np.float32)
    mirrored = pairs[:, 2] == 1
    others[mirrored] = others[mirrored][:, :, ::-1]
    same = np.zeros(len(pairs), dtype=bool)
    coarse, _ = similarity(_shrink(images, 2), _shrink(others, 2), levels=((16, 3),))
    maybe = np.flatnonzero(coarse > _MAYBE)
    if len(maybe) == 0:
        return same
    areas, contours = similarity(images[maybe], others[maybe])
    same[maybe] = (areas > _LIKE_AREAS) & (contours > _LIKE_CONTOURS)
    # A part is found in the whole more surely than the other way round.
    if len(maybe := maybe[~same[maybe] & (areas > _MAYBE)]):
        areas, contours = similarity(others[maybe], images[maybe])
        same[maybe] = (areas > _LIKE_AREAS) & (contours > _LIKE_CONTOURS)
    return same


def similarity(
    images: Floats, others: Floats, levels: tuple[tuple[int, int], ...] = ((16, 4), (32, 4))
) -> tuple[Floats, Floats]:
    """Align each other image to its image by stretch and shift; return how alike they are then.

    ``images``, ``others``: (P, S, S) gray; ``levels``: sizes of at most S / 2 pixels, and the
        number of steps at each.

    Returns: the normalised cross-correlation of what overlaps, (P,), and that of its contours.

    Source: Baker and Matthews (2004), Lucas-Kanade 20 years on, IJCV 56, equation 10, with gain and
    offset of the gray levels taken out.
    """
    count = len(images)
    change = np.zeros((count, 4), np.float32)  # stretch x, shift x, stretch y, shift y
    for size, steps in levels:
        grid = np.broadcast_to(
            ((np.arange(size) + 0.5) / size * 2 - 1).astype(np.float32), (count, size)
        )
        template = _sample(images, grid, grid)
        slope_y, slope_x = (slope * size / 2 for slope in np.gradient(template, axis=(1, 2)))
        for step in range(steps + 1):
            x = (1 + change[:, 0:1]) * grid + change[:, 1:2]
            y = (1 + change[:, 2:3]) * grid + change[:, 3:4]
            warped = _sample(others, x, y)
            overlap = _within(y)[:, :, None] * _within(x)[:, None, :]
            if step == steps:
                break
            a, a_scale = _normalised(template, overlap)
            b, _ = _normalised(warped, overlap)
            by_x, by_y = slope_x / a_scale * overlap, slope_y / a_scale * overlap
            columns = (by_x * grid[:, None, :], by_x, by_y * grid[:, :, None], by_y)
            jacobian = np.stack(columns, axis=1).reshape(count, 4, -1)
            hessian = jacobian @ jacobian.transpose(0, 2, 1)
            hessian += 0.1 * size * np.eye(4, dtype=np.float32)
            residual = ((a - b) * overlap).reshape(count, -1, 1)
            change += np.linalg.solve(hessian, jacobian @ residual)[..., 0]
            change = np.clip(change, -_MOST_CHANGE, _MOST_CHANGE)
    inner = overlap.copy()
    inner[:, [0, -1], :] = inner[:, :, [0, -1]] = 0
    contours = _correlation(_contours(template), _contours(warped), inner)
    return _correlation(template, warped, overlap), contours


def _shrink(images: Floats, factor: int) -> Floats:
    size = images.shape[-1] // factor
    mean: Floats = images.reshape(-1, size, factor, size, factor).mean(axis=(2, 4))
    return mean


def _sample(images: Floats, x: Floats, y: Floats) -> Floats:
    """Return (P, n, n) images at positions x, y: (P, n) in [-1, 1], smoothed to that resolution."""
    size = images.shape[-1]
    sampled = _tents(y, size) @ images @ _tents(x, size).transpose(0, 2, 1)
    return np.asarray(sampled, np.float32)


def _tents(positions: Floats, size: int) -> Floats:
    """Return (P, n, size) weights: a tent around each position, as wide as two of the n pixels."""
    pixels = np.clip((positions + 1) * size / 2 - 0.5, 0, size - 1)
    reach = size / positions.shape[1]
    distances = np.abs(pixels[..., None] - np.arange(size, dtype=np.float32))
    weights = np.maximum(0, 1 - distances / reach)
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True), np.float32)


def _within(positions: Floats) -> Floats:
    return (np.abs(positions) <= 1).astype(np.float32)


def _normalised(images: Floats, overlap: Floats) -> tuple[Floats, Floats]:
    """Return images with mean 0 and variance 1 over the overlap, and the deviation before."""
    share = overlap / overlap.sum(axis=(1, 2), keepdims=True)
    centred = images - (images * share).sum(axis=(1, 2), keepdims=True)
    scale = np.sqrt((centred**2 * share).sum(axis=(1, 2), keepdims=True)) + 1e-3
    return np.asarray(centred / scale, np.float32), np.asarray(scale, np.float32)


def _contours(images: Floats) -> Floats:
    """Return what is left of images when their 3 x 3 mean is taken away."""
    size = images.shape[1]
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)), mode="edge")
    shifted = [padded[:, i : i + size, j : j + size] for i in range(3) for j in range(3)]
    return images - sum(shifted) / np.float32(9)


def _correlation(images: Floats, others: Floats, overlap: Floats) -> Floats:
    a, _ = _normalised(images, overlap)
    b, _ = _normalised(others, overlap)
    share = overlap / overlap.sum(axis=(1, 2), keepdims=True)
    correlation: Floats = (a * b * share).sum(axis=(1, 2))
    return correlation
