"""Pictures of more than 8 bits: the range of values that becomes black to white.

Microscopes, X-ray detectors and scientific cameras write 12 bits into 16, or floating point. The
high byte of such values is black, so their range is stated, or measured over all pictures of a
set: it goes with the pixels and the bundle, and the same file gives the same pixels everywhere.
"""

import math
import threading

import numpy as np
import numpy.typing as npt

from tlpipe.errors import DataError, ImageError

ValueRange = tuple[float, float]
_BLOCK = 256  # rows that are converted at a time
LEVELS = 32  # that a picture's darkest and brightest pixel, of 256, span at least
UNREADABLE = ("value_range", "constant")  # reasons that another range may do away with

# When a measured range is an error: see Measured.check.
_SEEN_VALUES = 65_536  # of a picture, evenly spread
_ENDS = (0.1, 99.9)  # percentiles of a picture, which a few pixels do not move
_FEW = 0.05  # share of pictures
_FEW_LEVELS, _HARDLY_ANY = 64, 32  # of 256 levels, in the median picture


class Measured:
    """The values of the pictures that were decoded; may be added to from several threads.

    ``count``: how many pictures. It says the same of the same pictures in any order, and does not
    grow with their number.
    """

    def __init__(self, found: ValueRange | None = None) -> None:
        """Begin; ``found``: the range that the pictures are decoded with."""
        self.count = 0
        self._lowest, self._highest = (math.inf, ""), (-math.inf, "")
        self._found = found
        self._is_float = False
        self._levels = [0] * 257  # how many pictures keep so many levels
        self._low = self._high = 0  # pictures that come near to an end of the range
        self._lock = threading.Lock()

    @property
    def lowest(self) -> float:
        """The lowest finite value of all."""
        return self._lowest[0]

    @property
    def highest(self) -> float:
        """The highest finite value of all."""
        return self._highest[0]

    def add(self, name: str, values: npt.NDArray[np.generic]) -> None:
        """Measure the picture of a file, (H, W) of integers or floating point."""
        is_float = values.dtype.kind == "f"
        finite = values[np.isfinite(values)] if is_float else values
        with self._lock:
            self.count += 1
            self._is_float |= is_float
            if finite.size:
                lowest, highest = (float(finite.min()), name), (float(finite.max()), name)
                self._lowest, self._highest = min(self._lowest, lowest), max(self._highest, highest)
        if self._found is not None and finite.size:
            flat = finite.ravel()
            self._count_levels(flat[:: math.ceil(flat.size / _SEEN_VALUES)], self._found)

    def _count_levels(self, some: npt.NDArray[np.generic], found: ValueRange) -> None:
        own, kept = len(np.unique(some)), len(np.unique(_scaled(some, found)))
        low, high = np.percentile(some.astype(np.float64), _ENDS)
        with self._lock:
            # A picture of one value says nothing; one of few values has lost none by the range.
            if own > 1:
                self._levels[kept if 2 * kept < min(own, 256) else 256] += 1
            self._low += bool(low < found[0] / 2)
            self._high += bool(high > found[1] / 2)

    def check(self) -> None:
        """Check that pictures keep their contrast in the range that they were decoded with.

        An odd pixel (a hot one, a number for 'no data') stretches a range that goes by all values.
        12 bits in a range of 16 are 16 levels; a set that is mostly dark is none of that, if one
        picture in 20 reaches the outer half.

        Raises:
            DataError: the median picture has less than 32 levels of 256, or less than 64 where few
                pictures reach the outer half. Levels count as lost where it has twice as many
                values itself.
        """
        if self._found is None or not (total := sum(self._levels)):
            return
        below = np.cumsum(self._levels)
        median = int(np.searchsorted(below, (total + 1) // 2))
        low, high = self._found
        is_below = -low > high
        reach = self._low if is_below else self._high
        if median >= (_FEW_LEVELS if reach < _FEW * self.count else _HARDLY_ANY):
            return
        value, name = self._lowest if is_below else self._highest
        raise DataError(
            f"{name!r} has the value {value:g}, so ingest.value_range: auto makes {low:g} black "
            f"and {high:g} white, which leaves the median of {self.count} pictures of more than "
            f"8 bits {median} of 256 levels; expected {_FEW_LEVELS} at least. State the range as "
            f"ingest.value_range: [LOW, HIGH], or repair or remove what has odd values."
        )

    def range(self) -> ValueRange | None:
        """Return the range by the bits that hold all values, or None where there are none.

        From 0, or a negative power of two; to one less than a power of two for integers, and to a
        power of two for floating point. So few sets of one camera have another range than others,
        and it does not depend on the order of pictures.

        Examples:
            >>> measured = Measured()
            >>> measured.add("a.tif", np.array([[3, 4000]], np.uint16))
            >>> measured.range()
            (0.0, 4095.0)
        """
        if self.highest < self.lowest:
            return None
        low = -_power_of_two(-self.lowest) if self.lowest < 0 else 0.0
        if self.highest <= 0:
            return (low, 0.0) if low else (0.0, 1.0)
        if self._is_float:
            return low, _power_of_two(self.highest)
        return low, float(2 ** int(self.highest).bit_length() - 1)


def is_deep(mode: str) -> bool:
    """Return whether Pillow's mode is one of more than 8 bits a value."""
    return mode.startswith(("I", "F"))


def to_bytes(values: npt.NDArray[np.generic], found: ValueRange | None) -> npt.NDArray[np.uint8]:
    """Return (H, W) uint8 of (H, W) values: the range's ends are 0 and 255, beyond is clipped.

    Raises:
        ImageError: there is no range, or the values span less than 32 levels in it.
    """
    if found is None:
        raise ImageError(
            "value_range",
            "its values have more than 8 bits, and nothing says which are black and white; "
            "expected a picture of 8 bits, or ingest.value_range when the model was made",
        )
    pixels = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), _BLOCK):
        pixels[start : start + _BLOCK] = _scaled(values[start : start + _BLOCK], found)
    levels = 1 + int(pixels.max()) - int(pixels.min())
    if levels < LEVELS:
        raise ImageError(
            "constant",
            f"its values have no contrast in the range from {found[0]:g} to {found[1]:g}: they "
            f"span {levels} of 256 levels, expected {LEVELS} at least; ingest.value_range states "
            f"another one",
        )
    return pixels


def _scaled(values: npt.NDArray[np.generic], found: ValueRange) -> npt.NDArray[np.float64]:
    """Return values of any shape as whole numbers from 0 to 255."""
    low, high = found
    real = values.astype(np.float64)
    clipped = np.clip(np.where(np.isnan(real), low, real), low, high)
    return np.asarray(np.rint((clipped - low) * (255 / (high - low))))


def _power_of_two(value: float) -> float:
    """Return the smallest power of two, of any sign of its exponent, that is not below a value."""
    fraction, exponent = math.frexp(value)
    return math.ldexp(1.0, exponent - 1 if fraction == 0.5 else exponent)
