"""Find images that are nearly the same: re-encoded, resized, mirrored, a little cropped, brighter.

First by low frequencies: the block of the discrete cosine transform that perceptual hashes take
their bits from (Zauner 2010, Implementation and benchmarking of perceptual image hash functions),
kept as numbers, since a Hamming distance that forgives a crop also joins strangers. Then each pair
is aligned and compared pixel by pixel, contours apart from areas. Of each image some 200 bytes are
in memory; the rest is read from the thumbnails' file.
"""

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from tlpipe.data.pixels import Thumbnails

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]

# Measured on 2,000 photographs with planted copies (tests/data/test_duplicates.py): copies that
# lose up to 6 % of each side lie within 0.43; of 5,000 handwritten digits, all alike, a handful of
# pairs passes both likenesses.
_RADIUS = 0.45
_LIKE_AREAS, _LIKE_CONTOURS, _MAYBE = 0.98, 0.96, 0.9
_FREQUENCIES, _LOWEST = 8, 12
_NEIGHBOURS, _NEAREST = 48, 4
_FLAT = 4.0  # gray levels of standard deviation, below which there is nothing to compare
_MOST_CHANGE = 0.25  # of half a side, that a crop may move or stretch an image
_BLOCK, _PAIRS = 2048, 256
_STEPS = 127  # frequencies are at most 1, and kept as so many steps


def near_pairs(
    thumbnails: Thumbnails, is_known: Callable[[int, int], bool] = lambda _i, _j: False
) -> Iterator[tuple[int, int]]:
    """Yield the pairs of rows (i, j), i < j, whose images are nearly the same.

    ``is_known``: whether a pair was found so before, and need not be compared.
    """
    from threadpoolctl import threadpool_limits

    # Threads of a BLAS that wait for one another burn more than these small products take.
    with threadpool_limits(1):
        unsure = []
        for i, j, is_mirrored in _candidates(_neighbours(thumbnails)):
            if is_known(i, j):
                yield i, j
            else:
                unsure.append((i, j, is_mirrored))
            if len(unsure) == _PAIRS:
                yield from _confirmed(thumbnails, unsure)
                unsure = []
        yield from _confirmed(thumbnails, unsure)


def describe(thumbnails: npt.NDArray[np.uint8]) -> Floats:
    """Return low frequencies of (N, 64, 64) gray images, brightness and contrast taken out.

    Returns: (N, 8, 8), rows are vertical frequencies; NaN for images without structure.
    """
    wide = thumbnails.astype(np.uint16)
    rows = wide[:, ::2] + wide[:, 1::2]
    small = (rows[:, :, ::2] + rows[:, :, 1::2]).astype(np.float32) / 4
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
# The lowest ones, without the constant; a distance in these alone is never the larger one.
_LOW = sorted(
    ((v, h) for v in range(_FREQUENCIES) for h in range(_FREQUENCIES) if v + h),
    key=lambda place: (place[0] ** 2 + place[1] ** 2, place),
)[:_LOWEST]


def _neighbours(thumbnails: Thumbnails) -> npt.NDArray[np.int32]:
    """Return (N, 4): the nearest rows within reach, ``~row`` where mirrored, else the row's own."""
    from scipy.spatial import KDTree

    count = thumbnails.count
    codes = np.empty((count, _FREQUENCIES, _FREQUENCIES), np.int8)
    points = np.empty((count, _LOWEST))
    for start in range(0, count, _BLOCK):
        block = slice(start, min(start + _BLOCK, count))
        frequencies = describe(thumbnails.rows(block.start, block.stop))
        codes[block] = np.round(np.nan_to_num(frequencies) * _STEPS)
        for column, (vertical, horizontal) in enumerate(_LOW):
            signed = frequencies[:, vertical, horizontal]
            points[block, column] = np.abs(signed) if horizontal % 2 else signed
    is_flat = np.isnan(points[:, 0])
    # Out of everybody's reach, and of one another's.
    points[is_flat] = 10 + np.arange(is_flat.sum())[:, None]
    nearest = np.repeat(np.arange(count, dtype=np.int32)[:, None], _NEAREST, axis=1)
    tree = KDTree(points, leafsize=64)
    for start in range(0, count, _BLOCK):
        mine = np.arange(start, min(start + _BLOCK, count), dtype=np.int32)
        _, found = tree.query(points[mine], k=_NEIGHBOURS + 1, distance_upper_bound=_RADIUS)
        others = np.minimum(found, count - 1).astype(np.int32)  # (B, k); absent ones are count
        absent = (found == count) | (others == mine[:, None])
        straight = _distances(codes[mine], codes[others])
        turned = _distances(codes[mine] * _MIRROR, codes[others])
        distances = np.minimum(straight, turned)
        absent |= distances > _RADIUS
        distances[absent] = np.inf
        order = np.argsort(distances, axis=1, kind="stable")[:, :_NEAREST]
        chosen = np.where(turned < straight, ~others, others)
        chosen = np.where(absent, mine[:, None], chosen)
        nearest[mine] = np.take_along_axis(chosen, order, axis=1)
    return nearest


def _distances(mine: npt.NDArray[np.int8], others: npt.NDArray[np.int8]) -> Floats:
    """Return (B, k) distances of (B, 8, 8) and (B, k, 8, 8) frequencies."""
    difference = mine[:, None].astype(np.float32) - others
    squares = np.einsum("bkij,bkij->bk", difference, difference)
    return np.asarray(np.sqrt(squares) / _STEPS, np.float32)


def _candidates(neighbours: npt.NDArray[np.int32]) -> Iterator[tuple[int, int, bool]]:
    """Yield each pair of neighbours once: row, later row, whether mirrored."""
    for i in range(len(neighbours)):
        for found in neighbours[i].tolist():
            j, is_mirrored = (~found, True) if found < 0 else (found, False)
            # From the later one's side it is seen only if the earlier one does not list it.
            if j > i:
                yield i, j, is_mirrored
            elif j < i and i not in neighbours[j] and ~i not in neighbours[j]:
                yield j, i, is_mirrored


def _confirmed(
    thumbnails: Thumbnails, unsure: list[tuple[int, int, bool]]
) -> Iterator[tuple[int, int]]:
    if unsure:
        pairs = np.array(unsure, dtype=np.int64)
        for i, j, _ in pairs[_are_same(thumbnails, pairs)].tolist():
            yield i, j


def _are_same(thumbnails: Thumbnails, pairs: Rows) -> npt.NDArray[np.bool_]:
    """Compare (P, 3) candidates; a coarse look spares most of them the fine one."""
    images = thumbnails.pick(pairs[:, 0].tolist()).astype(np.float32)
    others = thumbnails.pick(pairs[:, 1].tolist()).astype(np.float32)
    mirrored = pairs[:, 2] == 1
    others[mirrored] = others[mirrored][:, :, ::-1]
    same = np.zeros(len(pairs), dtype=bool)
    coarse, _ = likeness(_shrink(images, 2), _shrink(others, 2), levels=((16, 3),))
    maybe = np.flatnonzero(coarse > _MAYBE)
    if len(maybe) == 0:
        return same
    areas, contours = likeness(images[maybe], others[maybe])
    same[maybe] = (areas > _LIKE_AREAS) & (contours > _LIKE_CONTOURS)
    # A part is found in the whole more surely than the other way round.
    if len(maybe := maybe[~same[maybe] & (areas > _MAYBE)]):
        areas, contours = likeness(others[maybe], images[maybe])
        same[maybe] = (areas > _LIKE_AREAS) & (contours > _LIKE_CONTOURS)
    return same


def likeness(
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
            a, a_scale = _normalised(template, overlap)
            b, _ = _normalised(warped, overlap)
            if step == steps:
                break
            by_x, by_y = slope_x / a_scale * overlap, slope_y / a_scale * overlap
            columns = (by_x * grid[:, None, :], by_x, by_y * grid[:, :, None], by_y)
            jacobian = np.stack(columns, axis=1).reshape(count, 4, -1)
            hessian = jacobian @ jacobian.transpose(0, 2, 1)
            hessian += 0.1 * size * np.eye(4, dtype=np.float32)
            residual = ((a - b) * overlap).reshape(count, -1, 1)
            change += np.linalg.solve(hessian, jacobian @ residual)[..., 0]
            change = np.clip(change, -_MOST_CHANGE, _MOST_CHANGE)
    share = overlap / overlap.sum(axis=(1, 2), keepdims=True)
    inner = overlap.copy()
    inner[:, [0, -1], :] = inner[:, :, [0, -1]] = 0
    return (a * b * share).sum(axis=(1, 2)), _correlation(
        _contours(template), _contours(warped), inner
    )


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
    return centred / scale, scale


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
