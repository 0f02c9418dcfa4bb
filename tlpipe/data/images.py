"""Turn the bytes of an image file into pixels: the one way, for training and for serving.

Pillow does not listen to what libtiff says: it prints errors, without the name of a file, to the
error stream of the process; of fax data that make no sense it says so and goes on, and Pillow
returns what came out. So its handler of errors is replaced while an image is decoded.
"""

import ctypes
import io
import re
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError, _imaging, features
from pydantic import BaseModel, ConfigDict, PositiveInt

from tlpipe.data.values import LEVELS, ValueRange, is_deep, to_bytes
from tlpipe.errors import ImageError, TlpipeError
from tlpipe.sources import Box

HEIC_EXTRA = "the extra heic (pip install pillow-heif)"
LIBHEIF = ""  # its version, where the plugin is installed
if find_spec("pillow_heif") is not None:
    try:
        import pillow_heif

        pillow_heif.register_heif_opener()
        LIBHEIF = str(pillow_heif.libheif_version())
    except Exception as error:
        raise TlpipeError(
            f"pillow-heif is installed and cannot be used: {type(error).__name__}: {error}; "
            f"expected one that works, or none. Install it again, or take it away: "
            f"pip uninstall pillow-heif."
        ) from error
FORMATS = (
    *("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"),
    *(("AVIF",) if features.check("avif") else ()),
    *(("HEIF",) if LIBHEIF else ()),
)
# Endings of images that cannot be read here, and what may be done about it.
UNREAD = tuple(
    (suffixes, advice)
    for name, suffixes, advice in (
        ("HEIF", (".heic", ".heif", ".hif"), f"{HEIC_EXTRA} reads them"),
        ("AVIF", (".avif", ".avifs"), "this Pillow was built without it"),
    )
    if name not in FORMATS
)
MAX_PIXELS = 100_000_000
MAX_ASPECT = 20
Pixels = npt.NDArray[np.uint8]
Measure = Callable[[npt.NDArray[np.generic]], None]

# Of images that take hundreds of megabytes when decoded, only so many at a time.
_LARGE_PIXELS = 20_000_000
_LARGE = threading.BoundedSemaphore(2)

# What EXIF's orientation asks for (CIPA DC-008, tag 0x0112).
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Sampling(BaseModel):
    """How an image becomes a square of pixels: the shorter side resized, the middle kept.

    ``value_range``: of pictures of more than 8 bits, what becomes black and white; None where
    there were none, and then they are rejected.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    short_side_px: PositiveInt
    interpolation: Literal["bilinear", "bicubic"]
    value_range: ValueRange | None = None


class Preprocessing(Sampling):
    """The whole way from a file to what the network computes on.

    After ``Sampling`` the middle ``crop_px`` square goes to the network as uint8 RGB; inside the
    network's graph it becomes ``(pixels / 255 - mean) / std``, per channel.
    """

    crop_px: PositiveInt
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class Header:
    """What the file says of its image, as stored: before it is turned upright or converted."""

    width: int
    height: int
    mode: str
    format: str


def read_square(data: bytes, sampling: Sampling) -> tuple[Pixels, Header]:
    """Decode an image file and return its square of pixels, and what its header said.

    Returns: (short_side_px, short_side_px, 3) uint8 RGB; the header.

    Raises:
        ImageError: the file is empty, no image of ``FORMATS``, too large, too thin, cut off,
            corrupt, or has more than 8 bits and no contrast in the range of values, or no range.
    """
    enough_px = 2 * sampling.short_side_px
    image, header = read_upright(data, enough_px=enough_px, value_range=sampling.value_range)
    return np.asarray(square(image, sampling)), header


def read_upright(
    data: bytes,
    *,
    enough_px: int | None = None,
    value_range: ValueRange | None = None,
    measure: Measure | None = None,
) -> tuple[Image.Image, Header]:
    """Decode an image file to upright RGB; of an animation the first frame.

    ``enough_px``: a JPEG may be decoded at half, quarter or eighth size, as long as neither side
    falls below it; ``value_range``: of more than 8 bits, what becomes black and white;
    ``measure``: is given the values of such a picture, whatever becomes of it.

    Raises:
        ImageError: as ``read_square``.
    """
    image = _open(data)
    header = Header(*image.size, image.mode, str(image.format))
    try:
        if enough_px is not None:
            image.draft("RGB", (enough_px, enough_px))
        if image.width * image.height <= _LARGE_PIXELS:
            return _decode(image, value_range, measure), header
        with _LARGE:
            return _decode(image, value_range, measure), header
    except ImageError:
        raise
    except Exception as error:
        # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error and more.
        raise _damage(error) from None


@dataclass(frozen=True)
class Frame:
    """Width and height of an image as stored and when upright, and EXIF's orientation."""

    stored: tuple[int, int]
    upright: tuple[int, int]
    orientation: int


def frame_of(data: bytes) -> Frame:
    """Return the sizes that an image has, as stored and upright; decodes nothing.

    Raises:
        ImageError: as ``read_square``, as far as the header tells.
    """
    image = _open(data)
    orientation = _orientation(image)
    orientation = orientation if orientation in _UPRIGHT else 1
    width, height = image.size
    turned = (height, width) if orientation >= 5 else (width, height)
    # Pillow states a TIFF's size as it will be when turned, others' as it is stored.
    if image.format == "TIFF":
        return Frame(turned, (width, height), orientation)
    return Frame((width, height), turned, orientation)


def square(image: Image.Image, sampling: Sampling, box: Box | None = None) -> Image.Image:
    """Resize the shorter side of an RGB image and keep the middle square.

    ``box``: left, upper, right and lower edge of the part to take for the image, in pixels.

    Returns: short_side_px x short_side_px, RGB.

    Raises:
        ImageError: the image, or the part, is too thin.
    """
    side = sampling.short_side_px
    if box is not None:
        image = image.crop(box)
    width, height = image.size
    check_aspect(width, height)
    # The arithmetic of torchvision's Resize and CenterCrop, on which the pretrained networks were
    # measured; but only what is kept of the resized image is computed.
    left, right = _kept(width, side, side if width <= height else int(side * width / height))
    upper, lower = _kept(height, side, side if height <= width else int(side * height / width))
    method = Image.Resampling[sampling.interpolation.upper()]
    # Columns, then rows, as Pillow does for a whole image: in the other order, and so with one
    # box for both, clipping between the two passes moves sharp edges by several grey levels.
    image = image.resize((side, height), method, box=(left, 0, right, height))
    return image.resize((side, side), method, box=(0, upper, side, lower))


def _kept(length: float, side: int, resized: int) -> tuple[float, float]:
    """Return from where to where a side is kept, if the middle is kept after resizing it."""
    offset = round((resized - side) / 2)
    return offset * length / resized, min((offset + side) * length / resized, length)


def crop_middle(pixels: Pixels, crop_px: int) -> Pixels:
    """Return the middle square of (..., S, S, 3) pixels as a view (..., crop_px, crop_px, 3)."""
    height, width = pixels.shape[-3:-1]
    top, left = round((height - crop_px) / 2), round((width - crop_px) / 2)
    return pixels[..., top : top + crop_px, left : left + crop_px, :]


def check_aspect(width: float, height: float) -> None:
    """Reject a line of pixels, which would grow without bound when its shorter side is resized.

    Raises:
        ImageError: one side is more than ``MAX_ASPECT`` times the other.
    """
    if max(width, height) > MAX_ASPECT * min(width, height):
        detail = (
            f"{width:g} x {height:g} pixels; one side may be {MAX_ASPECT} times the other at most"
        )
        raise ImageError("too_thin", detail)


def _open(data: bytes) -> Image.Image:
    """Read the header only; reject by kind and size before anything is decoded."""
    if not data:
        raise ImageError("empty", "the file has 0 bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise _unidentified(data) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # An error beyond twice what Pillow warns of; a warning, where warnings are errors.
        raise ImageError("too_many_pixels", str(error)) from None
    except Exception as error:
        raise _damage(error) from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        detail = f"{width} x {height} pixels; at most {MAX_PIXELS:,} are decoded"
        raise ImageError("too_many_pixels", detail)
    check_aspect(width, height)
    return image


def _unidentified(data: bytes) -> ImageError:
    """Say by the first bytes alone what a file is that no allowed decoder wants."""
    if not LIBHEIF and data[4:8] == b"ftyp" and _HEIC.search(data[8:64]):
        return ImageError("format", f"HEIC; expected one of {', '.join(FORMATS)}, or {HEIC_EXTRA}")
    Image.init()
    for name, (_, accepts) in sorted(Image.OPEN.items()):
        try:
            if accepts is None or accepts(data[:16]) is not True:
                continue
        except (struct.error, IndexError):
            continue  # fewer bytes than the beginning of that format
        if name in FORMATS:
            return ImageError("corrupt", f"begins like {name}, but its header makes no sense")
        return ImageError("format", f"{name}; expected one of {', '.join(FORMATS)}")
    for name, (start, magic) in _OTHER_FORMATS.items():
        if data[start : start + len(magic)] == magic:
            return ImageError("format", f"{name}; expected one of {', '.join(FORMATS)}")
    return ImageError("not_image", f"not one of {', '.join(FORMATS)}")


# The kinds of HEIC, photos of telephones: the first one, or among those that it is compatible to.
_HEIC = re.compile(rb"he(ic|ix|im|is|vc|vx)")
# What Pillow does not know.
_OTHER_FORMATS = {
    "HEIF": (4, b"ftypmif1"),
    "JPEG XL": (0, b"\xff\x0a"),
    "JPEG XL in a container": (0, b"\0\0\0\x0cJXL "),
    "SVG": (0, b"<svg"),
}


def _damage(error: Exception) -> ImageError:
    if isinstance(error, MemoryError):
        return ImageError("out_of_memory", "the image does not fit into memory when decoded")
    reason = "truncated" if "truncated" in str(error).lower() else "corrupt"
    return ImageError(reason, f"{type(error).__name__}: {error}")


def _decode(
    image: Image.Image, value_range: ValueRange | None, measure: Measure | None
) -> Image.Image:
    has_16_bits = ";16" in str(getattr(image, "tile", [])[:1])
    _load(image)
    turn = _UPRIGHT.get(_orientation(image))
    if is_deep(image.mode):
        values = np.asarray(image)
        if measure is not None:
            measure(values)
        image = Image.fromarray(to_bytes(values, value_range))
    elif has_16_bits:
        _check_high_bytes(image)
    rgb = _to_rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


def _check_high_bytes(image: Image.Image) -> None:
    """Check that a colour picture of 16 bits a channel has contrast in what Pillow reads of it.

    Of 12 bits in 16 the high byte has 16 levels.

    Raises:
        ImageError: its values end far below white, so that the high bytes are nearly one.
    """
    levels = 1 + int(np.asarray(image.convert("RGB")).max())
    if levels < LEVELS:
        raise ImageError(
            "constant",
            f"of 16 bits a channel the high byte is read, which has {levels} of 256 levels here; "
            f"expected colours of 8 bits, or 16 that reach white. Convert it",
        )


def _load(image: Image.Image) -> None:
    """Decode the pixels, and reject what Pillow lets pass.

    Raises:
        ImageError: libtiff has said that they make no sense, or a colour is not in the table.
    """
    colours = _table_size(image)
    with libtiff_errors() as said:
        try:
            image.load()
        except OSError:
            if not said:
                raise
    if said:
        more = f", and {len(said) - 1} errors more" if len(said) > 1 else ""
        raise ImageError("corrupt", f"libtiff says {said[0]!r}{more}")
    if colours is not None and image.mode == "P":
        highest = int(np.asarray(image).max())
        if highest >= colours and highest != image.info.get("transparency"):
            detail = f"a pixel has the colour {highest} of a table of {colours}, counted from 0"
            raise ImageError("corrupt", detail)


def _table_size(image: Image.Image) -> int | None:
    """Return how many colours the table of an image has that is not decoded yet, if it has one."""
    table = image.palette
    if image.mode != "P" or table is None:
        return None
    channels = 4 if set(str(table.rawmode or table.mode)) & {"A", "X"} else 3
    return len(table.palette) // channels


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return 1  # the remarks beside the pixels are damaged; the pixels are not


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode of 8 bits to RGB, transparency over white."""
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


_LENGTH = 300
_here = threading.local()


@contextmanager
def libtiff_errors() -> Iterator[list[str]]:
    """Yield the list of what libtiff calls errors in this thread, in place of printing them."""
    _here.said = said = list[str]()
    try:
        yield said
    finally:
        _here.said = None


def _take_down(module: bytes | None, text: bytes, values: int) -> None:
    line = ctypes.create_string_buffer(_LENGTH)
    ctypes.CDLL(None).vsnprintf(line, _LENGTH, text, ctypes.c_void_p(values))
    said = getattr(_here, "said", None)
    if said is not None:
        said.append(f"{(module or b'').decode(errors='replace')}: {line.value.decode('latin-1')}")


_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)(_take_down)


def _listen() -> None:
    """Have libtiff, the one that Pillow was linked with, call this module."""
    # Not where Pillow has no libtiff, or one inside that nobody else can call.
    with suppress(AttributeError, OSError):
        # The symbols of a library are looked for in those that it needs, too.
        ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(_HANDLER)


_listen()
