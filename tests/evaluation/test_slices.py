import numpy as np
import pytest
from scipy import stats

from tlpipe.data.manifest import Entry
from tlpipe.evaluation import slices


def entry(number: int, *, group: str = "", form: str = "PNG", width: int = 10) -> Entry:
    return Entry(f"{number}.png", "a", "", "", 1, width, 10, "RGB", form, group, "", "")


def wilson(successes: int, trials: int) -> tuple[float, float]:
    found = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    return found.low, found.high


def test_a_slice_has_its_images_and_wilson_s_interval() -> None:
    entries = [entry(i, form="PNG" if i < 30 else "JPEG") for i in range(50)]
    hits = np.arange(50) % 5 > 0
    rows = slices.measure(entries, np.full(50, 9.0), hits, ("format",), 0.95)["format"]
    assert [(row["value"], row["images"]) for row in rows] == [("JPEG", 20), ("PNG", 30)]
    for row, right in zip(rows, (16, 24), strict=True):
        assert row["accuracy"] == right / row["images"]
        assert (row["low"], row["high"]) == pytest.approx(wilson(right, row["images"]))


@pytest.mark.fault("M01")
@pytest.mark.parametrize("wrong", [0, 3, 12])
def test_copies_of_images_narrow_no_slice(wrong: int) -> None:
    hits = np.arange(12) >= wrong
    entries = [entry(i, group=str(i // 9)) for i in range(12 * 9)]
    found = slices.measure(entries, np.full(108, 9.0), np.repeat(hits, 9), ("format",), 0.95)
    (row,) = found["format"]
    assert row["images"] == 108
    assert (row["low"], row["high"]) == pytest.approx(wilson(12 - wrong, 12))
    (twins,) = found["near duplicates"]
    assert twins == {**row, "value": "some"}


@pytest.mark.fault("M01")
def test_a_slice_of_one_photo_is_wide() -> None:
    entries = [entry(i, group="photo" if i < 40 else "", form="AB"[i >= 40]) for i in range(60)]
    rows = slices.measure(entries, np.full(60, 9.0), np.ones(60, bool), ("format",), 0.95)["format"]
    assert (rows[0]["low"], rows[0]["high"]) == pytest.approx(wilson(1, 1))
    assert (rows[1]["low"], rows[1]["high"]) == pytest.approx(wilson(20, 20))


def test_numbers_are_parted_into_quarters() -> None:
    entries = [entry(i, width=i + 1) for i in range(40)]
    light = np.repeat([10.0, 20.0, 30.0, 40.0], 10)
    found = slices.measure(entries, light, np.arange(40) < 10, ("width",), 0.95)
    assert [row["images"] for row in found["width"]] == [10] * 4
    assert [row["accuracy"] for row in found["width"]] == [1, 0, 0, 0]
    assert [row["images"] for row in found["pixels of the file"]] == [10] * 4
    assert sum(row["images"] for row in found["brightness"]) == 40
    (same,) = slices.measure(entries, np.full(40, 7.0), np.arange(40) < 10, (), 0.95)["brightness"]
    assert (same["value"], same["images"], same["accuracy"]) == ("7", 40, 0.25)


def test_rare_words_are_put_together() -> None:
    entries = [entry(i, form=f"F{min(i // 2, 20)}") for i in range(60)]
    rows = slices.measure(entries, np.full(60, 9.0), np.ones(60, bool), ("format",), 0.95)["format"]
    assert len(rows) == 13
    assert sum(row["images"] for row in rows) == 60
    assert next(row["images"] for row in rows if row["value"] == "others") == 2 * 9
