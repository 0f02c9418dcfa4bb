"""Pictures of more than 8 bits: the range of values that becomes black to white.

Microscopes, X-ray detectors and scientific cameras write 12 bits into 16, or floating point. The
high byte of such values is black, so their range is stated, or measured over all pictures of a
set: it goes with the pixels and the bundle, and the same file gives the same pixels everywhere.
"""

import math
import threading

import numpy as np
import numpy.typing as npt

from tlpipe.errors import ImageError

ValueRange = tuple[float, float]
_BLOCK = 256  # rows that are converted at a time
# Of the 256 levels that a picture has at least to be one.
_LEVELS = 3


class Measured:
    """The values of the pictures that were decoded; may be added to from several threads.

    ``count``: how many pictures; ``lowest`` and ``highest``: of all of their finite values.
    """

    def __init__(self) -> None:
        self.count = 0
        self.lowest, self.highest = math.inf, -math.inf
        self._is_float = False
        self._lock = threading.Lock()

    def add(self, values: npt.NDArray[np.generic]) -> None:
        """Measure a picture, (H, W) of integers or floating point."""
        is_float = values.dtype.kind == "f"
        finite = values[np.isfinite(values)] if is_float else values
        with self._lock:
            self.count += 1
            self._is_float |= is_float
            if finite.size:
                self.lowest = min(self.lowest, float(finite.min()))
                self.highest = max(self.highest, float(finite.max()))

    def range(self) -> ValueRange | None:
        """Return the range by the bits that hold all values, or None where there are none.

        From 0, or a negative power of two; to one less than a power of two for integers, and to a
        power of two for floating point. So few sets of one camera have another range than others,
        and it does not depend on the order of pictures.

        Examples:
            >>> measured = Measured()
            >>> measured.add(np.array([[3, 4000]], np.uint16))
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
        ImageError: there is no range, or all values are one in it.
    """
    if found is None:
        raise ImageError(
            "value_range",
            "its values have more than 8 bits, and nothing says which are black and white; "
            "expected a picture of 8 bits, or ingest.value_range when the model was made",
        )
    low, high = found
    pixels = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), _BLOCK):
        block = values[start : start + _BLOCK].astype(np.float64)
        clipped = np.clip(np.where(np.isnan(block), low, block), low, high)
        pixels[start : start + _BLOCK] = np.rint((clipped - low) * (255 / (high - low)))
    if int(pixels.max()) - int(pixels.min()) < _LEVELS - 1:
        raise ImageError(
            "constant",
            f"its values have no contrast in the range from {low:g} to {high:g}; "
            f"ingest.value_range states another one",
        )
    return pixels


def _power_of_two(value: float) -> float:
    """Return the smallest power of two, of any sign of its exponent, that is not below a value."""
    fraction, exponent = math.frexp(value)
    return math.ldexp(1.0, exponent - 1 if fraction == 0.5 else exponent)
