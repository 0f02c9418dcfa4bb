"""Reads what ``explain`` has written, as data."""

import base64
import html
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Picture = tuple[str, npt.NDArray[np.float64]]  # the caption, and the pixels


@dataclass(frozen=True)
class Shown:
    """A page: its text, the data of its map, and of each gallery rows: heading, note, pictures."""

    text: str
    points: dict[str, Any]
    rows: dict[str, list[tuple[str, str, list[Picture]]]]


def read(folder: Path) -> Shown:
    """Read the page."""
    text = (folder / "index.html").read_text()
    (data,) = re.findall(r'id="data">(.*?)</script>', text)
    rows = {}
    for name, section in re.findall(r'<section id="([^"]+)">(.*?)</section>', text, re.DOTALL):
        parts = section.split("<h3>")[1:]
        rows[name] = [
            (
                html.unescape(part.partition("</h3>")[0]),
                html.unescape("".join(re.findall(r'<p class="quiet">(.*?)</p>', part))),
                [
                    (html.unescape(caption), _pixels(encoded))
                    for encoded, caption in re.findall(
                        r'src="data:image/jpeg;base64,([^"]+)" alt="([^"]*)"', part
                    )
                ],
            )
            for part in parts
        ]
    return Shown(html.unescape(text), json.loads(data), rows)


def _pixels(encoded: str) -> npt.NDArray[np.float64]:
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
        return np.asarray(image.convert("RGB"), np.float64)
