"""Channels that tell classes apart, and what excites them, against scikit-learn and a full sort."""

import numpy as np
import pytest
from sklearn.feature_selection import f_classif

from tlpipe.explanation.channels import Excited, Strongest, halves, patch
from tlpipe.explanation.maps import Field

RANDOM = np.random.default_rng(0)
LABELS = np.repeat([0, 1, 2], [20, 10, 11])
GIVEN = RANDOM.normal(size=(41, 5, 6, 6)).astype(np.float32)
GIVEN[LABELS == 2, 3] += 2  # channel 3 speaks for the last class
GIVEN[:, 4] = 7  # says nothing


def strongest(kept: int) -> Strongest:
    """Return what is kept of maps that come in uneven batches, rows from 100 on."""
    found = Strongest(5, 3, kept)
    for start, end in ((0, 8), (8, 9), (9, 41)):
        rows = np.arange(100 + start, 100 + end)
        found.add(rows, LABELS[start:end], rows % 2, GIVEN[start:end])
    return found


def test_selectivity_is_the_share_of_variance_between_classes_less_what_chance_gives() -> None:
    peaks = GIVEN.max(axis=(2, 3))[:, :4].astype(np.float64)
    chosen_by, measured = strongest(4).selectivity()
    assert measured is not None
    for start, found in enumerate((chosen_by, measured)):
        f, _ = f_classif(peaks[start::2], LABELS[start::2])
        within = len(LABELS[start::2]) - 3
        # F is (between / 2) / (within / N - 3), and epsilon squared is what between exceeds twice
        # the mean square within by, over both.
        expected = 2 * (f - 1) / (2 * f + within)
        np.testing.assert_allclose(found[:4], expected.clip(0, 1) if start else expected, rtol=1e-9)
    assert measured[4] == 0


@pytest.mark.parametrize(("images", "classes"), [(400, 2), (400, 40)])
def test_of_noise_the_class_explains_about_nothing(images: int, classes: int) -> None:
    random = np.random.default_rng(5)
    labels = np.arange(images) % classes
    found = Strongest(1000, classes, 3)
    half = halves(labels, [str(n) for n in range(images)])
    noise = random.normal(size=(images, 1000)).astype(np.float32)
    found.add(np.arange(images), labels, half, noise)
    best = found.channels(4, [""] * images, 3)
    values = [channel.selectivity for channel in best]
    assert np.mean([value for value in values if value is not None]) < 0.08


def test_with_too_few_images_a_class_nothing_is_said() -> None:
    found = Strongest(2, 5, 3)
    rows = np.arange(10)
    half = halves(rows % 5, [str(row) for row in rows])
    found.add(rows, rows % 5, half, RANDOM.normal(size=(10, 2)).astype(np.float32))
    assert [channel.selectivity for channel in found.channels(2, [""] * 10, 3)] == [None, None]


def test_halves_divide_no_group_and_have_every_class() -> None:
    labels = np.array([0, 1] * 20)
    groups = [f"{label} {n // 8}" for n, label in enumerate(labels)]
    found = halves(labels, groups)
    for group in set(groups):
        assert len({half for half, name in zip(found, groups, strict=True) if name == group}) == 1
    for half in (0, 1):
        assert set(labels[found == half]) == {0, 1}


def test_the_highest_peaks_are_those_of_a_full_sort_one_of_each_group() -> None:
    groups = [""] * 141
    peaks = GIVEN.max(axis=(2, 3))[:, 3]
    order = np.argsort(-peaks)
    groups[100 + order[0]] = groups[100 + order[1]] = "twins"
    first, *_ = strongest(12).channels(2, groups, 4)
    assert first.number == 3
    assert first.label == 2
    assert [e.row for e in first.excited] == [100 + order[n] for n in (0, 2, 3, 4)]
    for excited in first.excited:
        grid = GIVEN[excited.row - 100, 3]
        assert grid[excited.place] == grid.max() == pytest.approx(excited.value)
        assert excited.places == 6


def test_what_gives_one_value_for_an_image_has_one_place() -> None:
    found = Strongest(5, 3, 4)
    found.add(np.arange(41), LABELS, np.arange(41) % 2, GIVEN.max(axis=(2, 3)))
    first, *_ = found.channels(1, [""] * 41, 4)
    assert {e.places for e in first.excited} == {1}


IMAGE = np.arange(20 * 20 * 3, dtype=np.uint8).reshape(20, 20, 3)


def test_a_patch_is_what_its_place_sees_within_the_image() -> None:
    field = Field(start=-1, stride=4, size=6)
    inside = patch(IMAGE, Excited(0, (1, 2), 5, 1.0), field, (255, 0, 0))
    assert (inside == IMAGE[3:9, 7:13]).all()
    corner = patch(IMAGE, Excited(0, (0, 4), 5, 1.0), field, (255, 0, 0))
    assert (corner == IMAGE[0:5, 15:20]).all()


@pytest.mark.parametrize("field", [None, Field(start=-8, stride=4, size=16)])
def test_a_place_that_sees_most_is_marked_in_the_whole_image(field: Field | None) -> None:
    marked = patch(IMAGE, Excited(0, (2, 1), 5, 1.0), field, (255, 0, 0))
    assert marked.shape == IMAGE.shape
    is_changed = (marked != IMAGE).any(axis=2)
    rows, columns = (np.flatnonzero(is_changed.any(axis=axis)) for axis in (1, 0))
    assert (rows.min(), rows.max()) == (6, 13)  # around rows 8 to 11
    assert (columns.min(), columns.max()) == (2, 9)  # around columns 4 to 7
    assert not is_changed[8:12, 4:8].any()
    whole = patch(IMAGE, Excited(0, (0, 0), 1, 1.0), None, (255, 0, 0))
    assert (whole == IMAGE).all()
