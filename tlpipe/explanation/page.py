"""The page: one HTML file with all of its pictures inside, which fetches nothing.

Names of classes and paths are what users wrote. As HTML they are escaped; to the script they come
as JSON in which nothing can end the element, and it shows them as text only.
"""

import base64
import html
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from tlpipe.data import charts
from tlpipe.data import pixels as packed
from tlpipe.data.images import Pixels
from tlpipe.explanation.figures import Figure, Row

if TYPE_CHECKING:
    from matplotlib.artist import Artist

_TEMPLATE = Path(__file__).with_suffix(".html")
_SHOWN_PX = 192  # the longer side of a picture in the page
_MANY = 12  # pictures in a row, from which on they are small
# Okabe and Ito (2008), Color universal design; shapes differ, too, for those that look alike.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#f0e442", "#000000")
_SHAPES = "os^DvP"
_TURN = math.lcm(len(COLOURS), len(_SHAPES))
# Thumbnails of more images are smaller: the map of 10,000 photographs takes 2.8 MB, of 2,000 1.7.
_THUMBNAILS = ((2_000, 48), (5_000, 32), (10_000, 24))
_GRID = 9_999  # places are whole numbers up to it
_MOST_NAMED = 24  # classes in the legend of the picture
_READ = 256  # images, after which what was read is no more held in memory


@dataclass(frozen=True)
class Points:
    """A map of N of ``total`` images, and what is known of each.

    ``places``: (N, 2) in [0, 1]; ``is_fitted``: whether the model was fitted on it; ``label``,
    ``answer`` and ``suggested`` are numbers of labels, the last -1 where the label is no issue;
    ``rows``: (N,) of ``squares``; ``tested``, ``accuracy``, ``issues``: of all images, how many
    test images and label issues there are, and how often test images are answered rightly.
    """

    labels: Sequence[str]
    places: npt.NDArray[np.float32]
    paths: Sequence[str]
    splits: Sequence[str]
    is_fitted: Sequence[bool]
    label: Sequence[int]
    answer: Sequence[int]
    probability: Sequence[float]
    suggested: Sequence[int]
    squares: packed.Chunks
    rows: npt.NDArray[np.int64]
    total: int
    tested: int
    accuracy: float
    issues: int

    @property
    def reading(self) -> str:
        """How the map is read."""
        shown = f"Each mark is one of all {self.total:,} images."
        if (count := len(self.rows)) < self.total:
            tested = sum(split == "test" for split in self.splits)
            shown = (
                f"Each mark is an image: {tested:,} of {self.tested:,} test images, the explained "
                f"mistakes first, and {count - tested:,} of {self.total - self.tested:,} others. "
                f"So shares of mistakes mean nothing here: {self.accuracy:.1%} of all test images "
                f"are answered rightly."
            )
        issues = sum(number >= 0 for number in self.suggested)
        return (
            f"{shown} Images whose features are alike lie close together "
            f"(t-SNE); how far clusters are apart, and the directions, mean nothing. A mark among "
            f"those of another class is an image that the network takes for that class, or a wrong "
            f"label. Rings are label issues: {issues:,} of {self.issues:,} that audit has found."
        )


def style(label: int) -> tuple[str, str]:
    """Return the colour and the shape of a class; 48 classes have one of their own."""
    shape = (label + label // _TURN) % len(_SHAPES)
    return COLOURS[label % len(COLOURS)], _SHAPES[shape]


def draw_map(path: Path, points: Points, stamp: str) -> None:
    """Draw the map as a PNG file; ``stamp``: what model it is of."""
    figure = charts.new_figure(9, 7)
    axes = figure.subplots()
    labels, suggested = np.array(points.label), np.array(points.suggested)
    legend: list[tuple[Artist, str]] = []
    for number in np.unique(labels).tolist():
        colour, shape = style(number)
        inside = points.places[labels == number]
        marks = axes.scatter(
            inside[:, 0],
            inside[:, 1], s=22, c=colour, marker=shape, edgecolors="#00000080", linewidths=0.4,
        )  # fmt: skip
        if len(points.labels) <= _MOST_NAMED:
            legend.append((marks, points.labels[number]))
    ringed = points.places[suggested >= 0]
    if len(ringed):
        marks = axes.scatter(
            ringed[:, 0],
            ringed[:, 1], s=110, facecolors="none", edgecolors="black", linewidths=1.2,
        )  # fmt: skip
        legend.append((marks, "label issue"))
    axes.invert_yaxis()
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    if legend:  # named here, since Matplotlib leaves out labels that begin with _
        figure.legend(*zip(*legend, strict=True), loc="outside right upper", fontsize=9)
    axes.set_title("A map of the images: those with features alike lie close together")
    axes.set_xlabel(
        "distances between clusters, and directions, mean nothing; see index.html for the images\n"
        + stamp,
        fontsize=9,
    )
    charts.save_figure(figure, path)


def write(about: str, figures: Sequence[Figure], points: Points) -> bytes:
    """Return the page."""
    parts = {
        "about": html.escape(about),
        "links": "".join(
            f'<a href="#{name}">{html.escape(title)}</a>'
            for name, title in (("images", "A map of the images"), *_named(figures))
        ),
        "reading": html.escape(points.reading),
        "sections": "\n".join(_section(figure) for figure in figures),
        "data": _json(points),
    }
    text = re.sub(
        r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _TEMPLATE.read_text(encoding="utf-8")
    )
    # Paths that are no UTF-8 hold halves of characters.
    return text.encode("utf-8", "backslashreplace")


def _named(figures: Sequence[Figure]) -> list[tuple[str, str]]:
    return [(figure.name, figure.title) for figure in figures]


def _section(figure: Figure) -> str:
    rows = "\n".join(_row(row) for row in figure.rows)
    title, reading = html.escape(figure.title), html.escape(figure.reading)
    body = f'<p>{reading}</p>\n<div class="rows">\n{rows}\n</div>'
    if figure.is_folded:
        body = f"<details><summary><h2>{title}</h2></summary>\n{body}\n</details>"
    else:
        body = f"<h2>{title}</h2>\n{body}"
    return f'<section id="{figure.name}">\n{body}\n</section>'


def _row(row: Row) -> str:
    kind = ' class="small"' if len(row.pictures) > _MANY else ""
    pictures = "".join(
        f'<figure{kind}><img src="{_address(picture.pixels)}" alt="{html.escape(picture.caption)}">'
        f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>"
        for picture in row.pictures
    )
    note = f'<p class="quiet">{html.escape(row.note)}</p>' if row.note else ""
    heading = f"<h3>{html.escape(row.heading)}</h3>"
    return f'<div>{heading}\n{note}\n<div class="row">{pictures}</div></div>'


def _address(pixels: Pixels) -> str:
    """Return a picture as a data address."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((_SHOWN_PX, _SHOWN_PX), Image.Resampling.LANCZOS)
    return _encoded(image, 80)


def _encoded(image: Image.Image, quality: int) -> str:
    content = io.BytesIO()
    image.save(content, format="JPEG", quality=quality, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def _json(points: Points) -> str:
    """Return what the script reads; nothing in it can end the element that holds it."""
    splits = sorted(set(points.splits))
    grid = np.rint(points.places * _GRID).astype(int)
    content = {
        "labels": list(points.labels),
        "colours": COLOURS,
        "splits": splits,
        "x": grid[:, 0].tolist(),
        "y": grid[:, 1].tolist(),
        "label": list(points.label),
        "fitted": list(points.is_fitted),
        "split": [splits.index(split) for split in points.splits],
        "answer": list(points.answer),
        "probability": [round(float(value), 3) for value in points.probability],
        "suggested": list(points.suggested),
        "path": list(points.paths),
        "sprite": _sprite(points),
    }
    text = json.dumps(content, ensure_ascii=True, separators=(",", ":"))
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def _sprite(points: Points) -> dict[str, object]:
    """Return all thumbnails in one picture, row by row."""
    count = len(points.rows)
    side = next((px for most, px in _THUMBNAILS if count <= most), _THUMBNAILS[-1][1])
    columns = math.ceil(math.sqrt(count))
    sheet = Image.new("RGB", (columns * side, math.ceil(count / columns) * side), "white")
    for number, row in enumerate(points.rows.tolist()):
        small = Image.fromarray(points.squares[row]).resize((side, side), Image.Resampling.BOX)
        sheet.paste(small, (number % columns * side, number // columns * side))
        if number % _READ == 0:
            points.squares.unmap()
    return {"side": side, "columns": columns, "image": _encoded(sheet, 65)}
