"""Turn the bytes of an image file into pixels: the one way, for training and for serving."""

import io
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, PositiveInt

from tlpipe.errors import ImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS = 100_000_000
MAX_ASPECT = 20
Pixels = npt.NDArray[np.uint8]

# Our own limit below is stricter and is decided before decoding; Pillow's would only warn.
Image.MAX_IMAGE_PIXELS = None


class Sampling(BaseModel):
    """How an image becomes a square of pixels: the shorter side resized, the middle kept."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    short_side_px: PositiveInt
    interpolation: Literal["bilinear", "bicubic"]


class Preprocessing(Sampling):
    """The whole way from a file to what the network computes on.

    After ``Sampling`` the middle ``crop_px`` square goes to the network as uint8 RGB; inside the
    network's graph it becomes ``(pixels / 255 - mean) / std``, per channel.
    """

    crop_px: PositiveInt
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def read_square(data: bytes, sampling: Sampling) -> tuple[Pixels, Image.Image]:
    """Decode an image file and return its square of pixels, and the decoded image's header.

    Returns: (short_side_px, short_side_px, 3) uint8 RGB; the opened image, for its original
        size, mode and format.

    Raises:
        ImageError: the file is empty, no image of ``FORMATS``, too large, too thin, cut off or
            corrupt.
    """
    header = _open(data)
    try:
        # For JPEG this decodes at half, quarter or eighth size, never below twice the target.
        image = _open(data)
        image.draft("RGB", (2 * sampling.short_side_px, 2 * sampling.short_side_px))
        image.load()
        pixels = _square(_to_rgb(ImageOps.exif_transpose(image)), sampling)
    except Exception as error:
        # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error and more.
        reason = "truncated" if "truncated" in str(error).lower() else "corrupt"
        raise ImageError(reason, f"{type(error).__name__}: {error}") from None
    return pixels, header


def crop_middle(pixels: Pixels, crop_px: int) -> Pixels:
    """Return the middle square of (..., S, S, 3) pixels as a view (..., crop_px, crop_px, 3)."""
    height, width = pixels.shape[-3:-1]
    top, left = round((height - crop_px) / 2), round((width - crop_px) / 2)
    return pixels[..., top : top + crop_px, left : left + crop_px, :]


def _open(data: bytes) -> Image.Image:
    """Read the header only; refuse by kind and size before anything is decoded."""
    if not data:
        raise ImageError("empty", "the file has 0 bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ImageError("not_image", f"not one of {', '.join(FORMATS)}") from None
    except Exception as error:
        raise ImageError("corrupt", f"{type(error).__name__}: {error}") from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        detail = f"{width} x {height} pixels; at most {MAX_PIXELS:,} are decoded"
        raise ImageError("too_many_pixels", detail)
    # Resized by its shorter side, a line of pixels would grow without bound.
    if max(width, height) > MAX_ASPECT * min(width, height):
        detail = f"{width} x {height} pixels; one side may be {MAX_ASPECT} times the other at most"
        raise ImageError("too_thin", detail)
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB: 16-bit to 8-bit by its high byte, transparency over white."""
    if image.mode.startswith("I"):
        high_bytes = np.clip(np.asarray(image, np.int64) // 256, 0, 255).astype(np.uint8)
        return Image.fromarray(high_bytes).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _square(image: Image.Image, sampling: Sampling) -> Pixels:
    side = sampling.short_side_px
    width, height = image.size
    # The arithmetic of torchvision's Resize, on which the pretrained networks were measured.
    if width <= height:
        size = (side, int(side * height / width))
    else:
        size = (int(side * width / height), side)
    if size != image.size:
        image = image.resize(size, Image.Resampling[sampling.interpolation.upper()])
    return crop_middle(np.asarray(image), side)
