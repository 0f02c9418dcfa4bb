"""What is shown: figures of images with words, as data, and as PNG files."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from tlpipe.data import charts
from tlpipe.data.images import Pixels

# Of Okabe and Ito (2008): told apart also by those who see no red or no green.
MARK = (230, 159, 0)
_COLUMNS, _MOST_COLUMNS = 6, 8  # of small rows together, and of a long one
_LEAST_PX = 64


@dataclass(frozen=True)
class Picture:
    """An image (H, W, 3) uint8 RGB, and a few words below it."""

    pixels: Pixels
    caption: str


@dataclass(frozen=True)
class Row:
    """Pictures that belong together, and what they are."""

    heading: str
    pictures: Sequence[Picture]
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A gallery: the name of its file, what it shows, and how it is read.

    Where there is nothing to show, ``reading`` says why. ``is_folded``: the page shows it when
    asked for.
    """

    name: str
    title: str
    reading: str
    rows: Sequence[Row] = field(default=())
    is_folded: bool = False


def draw(folder: Path, figure: Figure, stamp: str) -> None:
    """Write a figure as a PNG file: rows of few pictures side by side, long ones in lines.

    ``stamp``: what model it is of.
    """
    width = min(_MOST_COLUMNS, max(len(row.pictures) for row in figure.rows))
    squares: list[Pixels | None] = []
    captions, headings = list[str](), list[str]()
    for row in figure.rows:
        empty = -len(row.pictures) % width
        squares += [*(_square(picture.pixels) for picture in row.pictures), *[None] * empty]
        captions += [*(picture.caption for picture in row.pictures), *[""] * empty]
        headings += [f"{row.heading}\n{row.note}", *[""] * (len(row.pictures) + empty - 1)]
    charts.gallery(
        folder / f"{figure.name}.png",
        squares,
        captions,
        title=figure.title,
        columns=width * max(_COLUMNS // width, 1),
        reading=f"{figure.reading} {stamp}",
        headings=headings,
    )


def _square(pixels: Pixels) -> Pixels:
    """Return a picture as a square, white where it has no pixels."""
    height, width = pixels.shape[:2]
    side = max(height, width)
    square = np.full((side, side, 3), 255, np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = pixels
    return square


def enlarged(pixels: Pixels) -> Pixels:
    """Return a picture of at least ``_LEAST_PX``, its pixels as squares where it was smaller."""
    times = -(-_LEAST_PX // max(pixels.shape[:2]))
    return pixels.repeat(times, axis=0).repeat(times, axis=1)


@cache
def _colours() -> npt.NDArray[np.float64]:
    """Return 256 colours (256, 3) in [0, 1], from black to yellow, of even steps in lightness."""
    import matplotlib

    found: npt.NDArray[np.float64] = matplotlib.colormaps["inferno"](np.arange(256))[:, :3]
    return found


def overlay(image: Pixels, heat: npt.NDArray[np.float32]) -> Pixels:
    """Lay a heat map (h, w), not negative, over an image (S, S, 3), which is grey elsewhere.

    It is scaled to its own maximum; a map of zeros leaves the image grey.
    """
    side = len(image)
    most = float(heat.max())
    scaled = np.zeros((side, side))
    if most > 0:
        levels = Image.fromarray(heat / most).resize((side, side), Image.Resampling.BICUBIC)
        scaled = np.asarray(levels, np.float64).clip(0, 1)
    grey = np.asarray(Image.fromarray(image).convert("L"), np.float64)[..., None] / 255
    share = 0.65 * scaled[..., None] ** 0.7
    colours = _colours()[np.rint(255 * scaled).astype(np.int64)]
    mixed = (1 - share) * 0.85 * grey + share * colours
    laid: Pixels = np.rint(255 * mixed.clip(0, 1)).astype(np.uint8)
    return laid


def filters(weight: npt.NDArray[np.float32]) -> list[Pixels]:
    """Return filters (O, 3, k, k) as images (k, k, 3), each by its largest value; 0 is grey."""
    largest = np.abs(weight).max(axis=(1, 2, 3), keepdims=True)
    scaled = 0.5 + 0.5 * weight / np.where(largest > 0, largest, 1)
    return list(np.rint(255 * scaled).astype(np.uint8).transpose(0, 2, 3, 1))
