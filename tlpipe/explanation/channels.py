"""Which channels of each stage tell classes apart, and the places in images that excite them most.

Images pass once. What is kept grows with channels and classes, not with the number of images.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tlpipe.data import pixels as packed
from tlpipe.data.images import Pixels, crop_middle
from tlpipe.explanation.maps import Field, Network, as_map
from tlpipe.progress import Meter

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
_BATCH = 8
_SPARE = 3  # times as many as are shown, since of those of one group a single one is
_PART = 0.6  # of the image's side; what sees more is shown with the whole image around


@dataclass(frozen=True)
class Excited:
    """An image's row, the place in the map where a channel gives most, and what it gives there.

    ``place``: row and column in a map of ``places`` by ``places``; (0, 0) of 1 where the stage
    gives one value for the whole image.
    """

    row: int
    place: tuple[int, int]
    places: int
    value: float


@dataclass(frozen=True)
class Channel:
    """A channel that tells classes apart.

    ``selectivity``: in [0, 1], see ``Strongest``, None where too few images tell it; ``label``: the
    class number with the highest mean peak; ``excited``: the images with the highest peaks, one of
    each group.
    """

    number: int
    selectivity: float | None
    label: int
    excited: tuple[Excited, ...]


class Strongest:
    """What is kept of one stage: sums of each channel's peaks by class, and its highest peaks.

    A peak is the greatest value of a channel in an image. The selectivity of a channel is epsilon
    squared, the share of the variance of its peaks that lies between the classes, less what chance
    puts there: of noise it is 0 on average. The best of many channels would still be lucky, so
    channels are chosen on one half of the images and selectivity is that of the other.

    Source: Kelley (1935), An unbiased correlation ratio measure, PNAS 21.
    """

    def __init__(self, channels: int, classes: int, kept: int) -> None:
        """Take the numbers of channels and classes, and how many peaks to keep of each channel."""
        self._kept = kept
        self._counts = np.zeros((2, classes))  # by halves
        self._sums = np.zeros((2, classes, channels))
        self._squares = np.zeros((2, channels))
        self._values = np.empty((0, channels), np.float32)
        self._rows = np.empty((0, channels), np.int64)
        self._places = np.empty((0, channels), np.int64)
        self.side = 1

    def add(self, rows: Ints, labels: Ints, half: Ints, given: npt.NDArray[np.float32]) -> None:
        """Take a stage's results (B, C, S, S), or (B, C), for images of these rows and labels.

        ``half``: (B,) 0 of those that choose channels, 1 of those that measure them.
        """
        self.side = given.shape[2] if given.ndim == 4 else 1
        flat = given.reshape(*given.shape[:2], -1)
        places = flat.argmax(axis=2)
        peaks = np.take_along_axis(flat, places[..., None], axis=2)[..., 0]
        np.add.at(self._counts, (half, labels), 1)
        np.add.at(self._sums, (half, labels), peaks)
        np.add.at(self._squares, half, peaks.astype(np.float64) ** 2)
        every = np.broadcast_to(rows[:, None], peaks.shape)
        values = np.concatenate([self._values, peaks])
        order = np.argsort(-values, axis=0, kind="stable")[: self._kept]
        self._values = np.take_along_axis(values, order, axis=0)
        for name, new in (("_rows", every), ("_places", places)):
            known = np.concatenate([getattr(self, name), new])
            setattr(self, name, np.take_along_axis(known, order, axis=0))

    def selectivity(self) -> tuple[Floats, Floats | None]:
        """Return what channels are chosen by, and their selectivity on other images, both (C,).

        Where a half has fewer than two images a class, all images choose, and none can measure.
        """
        first, second = (
            _epsilon_squared(*half)
            for half in zip(self._counts, self._sums, self._squares, strict=True)
        )
        if first is None or second is None:
            sums = (self._counts.sum(axis=0), self._sums.sum(axis=0), self._squares.sum(axis=0))
            return _eta_squared(*sums), None
        return first, second.clip(0, 1)

    def channels(self, count: int, groups: Sequence[str], shown: int) -> list[Channel]:
        """Return the most selective channels, each with its most exciting images.

        ``groups``: of every row; images of one group are (nearly) the same picture.
        """
        chosen_by, measured = self.selectivity()
        counts = self._counts.sum(axis=0)
        means = self._sums.sum(axis=0) / np.maximum(counts, 1)[:, None]
        found = []
        for number in np.argsort(-chosen_by, kind="stable")[:count].tolist():
            excited: dict[str, Excited] = {}
            for row, place, value in zip(
                *(kept[:, number].tolist() for kept in (self._rows, self._places, self._values)),
                strict=True,
            ):
                where = divmod(place, self.side)
                excited.setdefault(groups[row] or str(row), Excited(row, where, self.side, value))
            chosen = tuple(excited.values())[:shown]
            best = int(np.where(counts > 0, means[:, number], -np.inf).argmax())
            selectivity = None if measured is None else float(measured[number])
            found.append(Channel(number, selectivity, best, chosen))
        return found


def _eta_squared(counts: Floats, sums: Floats, squares: Floats) -> Floats:
    """Return the share of the variance between classes, (C,); 0 where peaks do not vary."""
    mean = sums.sum(axis=0) ** 2 / counts.sum()
    total = squares - mean
    between = (sums**2 / np.maximum(counts, 1)[:, None]).sum(axis=0) - mean
    varies = total > 1e-9 * np.maximum(squares, 1e-30)
    return np.where(varies, between / np.where(varies, total, 1), 0.0).clip(0, 1)


def _epsilon_squared(counts: Floats, sums: Floats, squares: Floats) -> Floats | None:
    images, classes = counts.sum(), np.count_nonzero(counts)
    if classes < 2 or images < 2 * classes:
        return None
    shares = _eta_squared(counts, sums, squares)
    return np.asarray(1 - (images - 1) / (images - classes) * (1 - shares))


def halves(labels: Ints, groups: Sequence[str]) -> Ints:
    """Return which half each of N images is in, 0 or 1: each class in both, no group in both."""
    turns: Counter[int] = Counter()
    known: dict[str, int] = {}
    for label, group in zip(labels.tolist(), groups, strict=True):
        if group not in known:
            known[group] = turns[label] % 2
            turns[label] += 1
    return np.array([known[group] for group in groups], np.int64)


def find(
    network: Network,
    squares: packed.Chunks,
    crop_px: int,
    rows: Ints,
    labels: Ints,
    groups: Sequence[str],
    *,
    classes: int,
    channels: int,
    shown: int,
    meter: Meter,
) -> dict[str, list[Channel]]:
    """Return the most selective channels of each stage, in one pass over images of these rows."""
    known: dict[str, Strongest] = {}
    half = halves(labels, [groups[row] or str(row) for row in rows.tolist()])
    for batch in batches(len(rows)):
        chosen = rows[batch]
        images = middle(squares, chosen, crop_px)
        for name, given in network.stage_results(images):
            grid = as_map(given)
            if grid is None:
                grid = given.mean(dim=1) if given.dim() == 3 else given.flatten(1)
            values = grid.numpy()
            if name not in known:
                known[name] = Strongest(values.shape[1], classes, _SPARE * shown)
            known[name].add(chosen, labels[batch], half[batch], values)
        squares.unmap()
        meter.advance(len(chosen))
    return {name: stage.channels(channels, groups, shown) for name, stage in known.items()}


def batches(count: int) -> Iterator[slice]:
    """Yield slices of so many images, some at a time."""
    return (slice(start, start + _BATCH) for start in range(0, count, _BATCH))


def middle(squares: packed.Chunks, rows: "Ints | Sequence[int]", crop_px: int) -> Pixels:
    """Return images (B, crop_px, crop_px, 3) as the network sees them."""
    return np.ascontiguousarray(crop_middle(squares[rows], crop_px))


def is_patch(field: Field, side_px: int) -> bool:
    """Return whether what a place sees is so small a part of the image that it is cut out."""
    return field.size <= _PART * side_px


def patch(
    image: Pixels, excited: Excited, field: Field | None, mark: tuple[int, int, int]
) -> Pixels:
    """Return what excites a channel: what its place sees, or the image with that place marked.

    Args:
        image: (S, S, 3) uint8 RGB.
        excited: the place.
        field: what the places of the stage see.
        mark: the colour of the mark.
    """
    side = len(image)
    if field is not None and is_patch(field, side):
        (top, bottom), (left, right) = (field.seen(place, side) for place in excited.place)
        return image[top:bottom, left:right]
    marked = image.copy()
    if excited.places == 1:
        return marked
    step = side / excited.places
    top, left = (round(place * step) for place in excited.place)
    bottom, right = (min(round((place + 1) * step), side) for place in excited.place)
    width = max(side // 75, 1)
    for inner, colour in ((0, (0, 0, 0)), (width, mark)):
        a, b = max(top - 2 * width + inner, 0), max(left - 2 * width + inner, 0)
        c, d = min(bottom + 2 * width - inner, side), min(right + 2 * width - inner, side)
        for box in (
            np.s_[a : a + width, b:d],
            np.s_[c - width : c, b:d],
            np.s_[a:c, b : b + width],
            np.s_[a:c, d - width : d],
        ):
            marked[box] = colour
    return marked
