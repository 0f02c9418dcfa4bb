"""What the labels of the nearest images say of a mistake, against counts by hand."""

import numpy as np
import pytest
from scipy.stats import binom

from tlpipe.explanation.inputs import Answer
from tlpipe.explanation.neighbours import hint

LABELS = ("cat", "dog", "owl")
MISTAKE = Answer(row=0, path="a.png", label=0, predicted=1, probability=0.9)
DOUBT, CONFIRM = "is the label wrong?", "the label fits, the answer does not."


@pytest.mark.parametrize(
    ("near", "counts", "expected", "end"),
    [
        ([1, 1, 1, 1, 1], [50, 50, 0], True, DOUBT),
        ([0, 0, 0, 0, 0], [50, 50, 0], False, CONFIRM),
        ([1, 1, 1, 1, 0], [50, 50, 0], False, "50 of 100 dog, 50 cat."),
        ([1, 1, 1, 1, 1], [45, 55, 0], False, "55 of 100 dog, 45 cat."),  # of the share alone
        ([1, 1, 1, 1, 1], [46, 54, 0], True, DOUBT),
        ([0, 0, 0, 0, 0], [90, 10, 0], False, "10 of 100 dog, 90 cat."),
        ([0, 0, 0, 2, 2], [10, 10, 80], False, CONFIRM),
        ([1, 1, 1, 1], [50, 50, 0], None, "to say anything of the label."),
        ([1, 1, 1, 1, 1], [4, 50, 46], None, "to say anything of the label."),
        ([0, 0, 0, 0, 0], [50, 4, 46], None, "to say anything of the label."),
        ([], [0, 0, 0], None, "to say anything of the label."),
    ],
)
def test_labels_of_the_nearest_images_speak_where_shares_would_hardly_give_them(
    near: list[int], counts: list[int], expected: bool | None, end: str
) -> None:
    note, is_doubtful = hint(MISTAKE, near, np.array(counts), LABELS)
    assert is_doubtful is expected
    assert note.endswith(end)
    total = max(sum(counts), 1)
    if is_doubtful:
        assert binom.sf(4, 5, counts[1] / total) < 0.05
    if end == CONFIRM:
        assert binom.sf(near.count(0) - 1, 5, counts[0] / total) < 0.05


def test_the_note_says_of_how_many_images_each_class_is() -> None:
    note, _ = hint(MISTAKE, [1, 1, 1, 0, 2], np.array([20, 30, 1000]), LABELS)
    assert note == "nearest: 3 of 5 dog, 1 cat; searched: 30 of 1,050 dog, 20 cat."
