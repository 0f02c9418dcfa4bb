"""Channels that tell classes apart, and what excites them, against scikit-learn and a full sort."""

import numpy as np
import pytest
from sklearn.feature_selection import f_classif

from tlpipe.explanation.channels import Excited, Strongest, patch
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
        found.add(np.arange(100 + start, 100 + end), LABELS[start:end], GIVEN[start:end])
    return found


def test_selectivity_is_the_share_of_variance_between_classes() -> None:
    peaks = GIVEN.max(axis=(2, 3))[:, :4].astype(np.float64)
    f, _ = f_classif(peaks, LABELS)
    # F is (between / 2) / (within / 38), and eta squared is between / (between + within).
    expected = 2 * f / (2 * f + 38)
    found = strongest(4).selectivity()
    np.testing.assert_allclose(found[:4], expected, rtol=1e-9)
    assert found[4] == 0


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
    found.add(np.arange(41), LABELS, GIVEN.max(axis=(2, 3)))
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
