"""Galleries of rows, heat maps over images, filters as pictures."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tlpipe.data import charts
from tlpipe.explanation.figures import Figure, Picture, Row, draw, enlarged, filters, overlay

SHADES = [(n, 200, 255 - n) for n in range(3, 250, 5)]


def figure(lengths: list[int]) -> Figure:
    """Return rows of so many pictures, each of one colour of its own."""
    shades = iter(SHADES)
    rows = [
        Row(
            f"row {n} " + "W" * 60,
            [Picture(np.full((9, 9, 3), next(shades), np.uint8), "caption") for _ in range(length)],
            "note " * 90,
        )
        for n, length in enumerate(lengths)
    ]
    return Figure("gallery", "A title", "How it is read. " * 20, rows)


@pytest.mark.parametrize(
    ("lengths", "columns"), [([3, 3, 3], 6), ([2] * 4, 6), ([4, 4], 4), ([6, 5], 6), ([17, 17], 8)]
)
def test_rows_stand_side_by_side_or_in_lines_and_no_word_covers_a_picture(
    tmp_path: Path, lengths: list[int], columns: int
) -> None:
    draw(tmp_path, figure(lengths), "Bundle 0123abcd.")
    with Image.open(tmp_path / "gallery.png") as picture:
        found = np.asarray(picture.convert("RGB"))
    lefts, places = set(), []
    for shade in SHADES[: sum(lengths)]:
        inside = (found == shade).all(axis=2)
        rows, across = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
        assert inside[rows[0] : rows[-1] + 1, across[0] : across[-1] + 1].all()
        assert len(rows) == len(across) == 168
        lefts.add(across[0])
        places.append((rows[0], across[0]))
    assert places == sorted(places)
    assert len(lefts) == columns


def test_a_heat_map_leaves_what_counts_for_nothing_grey() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    heat = np.zeros((4, 4), np.float32)
    assert np.ptp(overlay(image, heat), axis=2).max() == 0
    heat[0, 3] = 0.002  # the greatest, however small it is
    laid = overlay(image, heat).astype(int)
    assert np.ptp(laid[25:, :15], axis=2).max() == 0
    top, grey = laid[:6, 34:].mean(axis=(0, 1)), laid[25:, :15].mean(axis=(0, 1))
    assert top[:2].min() > grey.mean() + 40  # yellow
    assert top[2] < top[1]
    assert (overlay(image, 100 * heat) == laid).all()


def test_filters_are_grey_where_they_are_zero_and_bright_where_they_are_positive() -> None:
    weight = np.zeros((2, 3, 2, 2), np.float32)
    weight[0, 0, 0, 1], weight[0, 2, 1, 0] = 0.5, -0.25
    first, second = filters(weight)
    assert first[0, 1].tolist() == [255, 128, 128]
    assert first[1, 0].tolist() == [128, 128, 64]
    assert (second == 128).all()


def test_small_pictures_get_larger_pixels() -> None:
    small = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    large = enlarged(small)
    assert large.shape == (66, 66, 3)
    assert (large[::22, ::22] == small).all()
    assert enlarged(np.zeros((100, 80, 3), np.uint8)).shape == (100, 80, 3)


def test_a_gallery_says_of_which_model_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(charts, "gallery", lambda *_, reading, **__: said.append(reading))
    draw(tmp_path, figure([1]), "Bundle 0123abcd, measured on 2026-01-01, test accuracy 0.875.")
    (reading,) = said
    assert reading.endswith(
        "How it is read.  Bundle 0123abcd, measured on 2026-01-01, test accuracy 0.875."
    )
