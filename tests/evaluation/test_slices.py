"""Test accuracy against validation accuracy: published numbers, error rates, another camera."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from tests.conftest import Workspace
from tlpipe.data.manifest import Entry
from tlpipe.evaluation.evaluate import measure_slices
from tlpipe.evaluation.metrics import compare_validation


def entry(number: int, *, group: str = "", form: str = "PNG", width: int = 10) -> Entry:
    return Entry(f"{number}.png", "a", "", "", 1, width, 10, "RGB", form, group, "", "")


def wilson(successes: int, trials: int) -> tuple[float, float]:
    found = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    return found.low, found.high


def test_a_slice_has_its_images_and_wilson_s_interval() -> None:
    entries = [entry(i, form="PNG" if i < 30 else "JPEG") for i in range(50)]
    hits = np.arange(50) % 5 > 0
    rows = measure_slices(entries, np.full(50, 9.0), hits, ("format",), 0.95)["format"]
    assert [(row["value"], row["images"]) for row in rows] == [("JPEG", 20), ("PNG", 30)]
    for row, right in zip(rows, (16, 24), strict=True):
        assert row["accuracy"] == right / row["images"]
        assert (row["low"], row["high"]) == pytest.approx(wilson(right, row["images"]))


@pytest.mark.fault("M01")
@pytest.mark.parametrize("wrong", [0, 3, 12])
def test_copies_of_images_narrow_no_slice(wrong: int) -> None:
    hits = np.arange(12) >= wrong
    entries = [entry(i, group=str(i // 9)) for i in range(12 * 9)]
    found = measure_slices(entries, np.full(108, 9.0), np.repeat(hits, 9), ("format",), 0.95)
    (row,) = found["format"]
    assert row["images"] == 108
    assert (row["low"], row["high"]) == pytest.approx(wilson(12 - wrong, 12))
    (twins,) = found["near duplicates"]
    assert twins == {**row, "value": "some"}


@pytest.mark.fault("M01")
def test_a_slice_of_one_photo_is_wide() -> None:
    entries = [entry(i, group="photo" if i < 40 else "", form="AB"[i >= 40]) for i in range(60)]
    rows = measure_slices(entries, np.full(60, 9.0), np.ones(60, bool), ("format",), 0.95)["format"]
    assert (rows[0]["low"], rows[0]["high"]) == pytest.approx(wilson(1, 1))
    assert (rows[1]["low"], rows[1]["high"]) == pytest.approx(wilson(20, 20))


def test_numbers_are_parted_into_quarters() -> None:
    entries = [entry(i, width=i + 1) for i in range(40)]
    light = np.repeat([10.0, 20.0, 30.0, 40.0], 10)
    found = measure_slices(entries, light, np.arange(40) < 10, ("width",), 0.95)
    assert [row["images"] for row in found["width"]] == [10] * 4
    assert [row["accuracy"] for row in found["width"]] == [1, 0, 0, 0]
    assert [row["images"] for row in found["pixels of the file"]] == [10] * 4
    assert sum(row["images"] for row in found["brightness"]) == 40
    (same,) = measure_slices(entries, np.full(40, 7.0), np.arange(40) < 10, (), 0.95)["brightness"]
    assert (same["value"], same["images"], same["accuracy"]) == ("7", 40, 0.25)


def test_rare_words_are_put_together() -> None:
    entries = [entry(i, form=f"F{min(i // 2, 20)}") for i in range(60)]
    rows = measure_slices(entries, np.full(60, 9.0), np.ones(60, bool), ("format",), 0.95)["format"]
    assert len(rows) == 13
    assert sum(row["images"] for row in rows) == 60
    assert next(row["images"] for row in rows if row["value"] == "others") == 2 * 9


def hits(right: int, images: int) -> np.ndarray:
    return np.arange(images) < right


def alone(images: int) -> Sequence[str]:
    return [str(number) for number in range(images)]


@pytest.mark.parametrize(
    ("first", "second", "low", "high"),
    [
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((6, 7), (2, 7), 0.0582, 0.8062),
        ((5, 56), (0, 29), -0.0381, 0.1926),
        ((0, 10), (0, 20), -0.1611, 0.2775),
        ((10, 10), (0, 20), 0.6791, 1.0000),
    ],
)
def test_the_interval_is_newcombe_s_method_10(
    first: tuple[int, int], second: tuple[int, int], low: float, high: float
) -> None:
    """Newcombe (1998), Statistics in Medicine 17, 873-890, table II, which takes first - second."""
    found = compare_validation(hits(*second), alone(second[1]), hits(*first), alone(first[1]), 0.95)
    assert found["difference"]["low"] == pytest.approx(low, abs=6e-5)
    assert found["difference"]["high"] == pytest.approx(high, abs=6e-5)
    assert found["difference"]["value"] == pytest.approx(
        first[0] / first[1] - second[0] / second[1]
    )
    assert (found["validation"]["images"], found["test"]["images"]) == (second[1], first[1])
    assert found["is_below"] is False


@pytest.mark.fault("L03")
def test_what_is_equal_is_hardly_ever_called_below_also_with_copies() -> None:
    """Each image three times in one group: as many alarms as for the images without copies."""
    random, alarms = np.random.default_rng(0), np.zeros(3)
    for _ in range(1000):
        validation, test = random.random(300) < 0.9, random.random(150) < 0.9
        three = np.repeat(validation, 3), np.repeat(test, 3)
        groups = np.repeat(alone(300), 3).tolist(), np.repeat(alone(150), 3).tolist()
        alarms += [
            compare_validation(validation, alone(300), test, alone(150), 0.95)["is_below"],
            compare_validation(three[0], groups[0], three[1], groups[1], 0.95)["is_below"],
            compare_validation(three[0], alone(900), three[1], alone(450), 0.95)["is_below"],
        ]
    assert alarms[0] == alarms[1] < 40
    assert alarms[2] > 80  # who counted copies as images would be wrong that often


@pytest.mark.fault("L03")
def test_what_is_below_is_called_so() -> None:
    assert compare_validation(hits(285, 300), alone(300), hits(120, 150), alone(150), 0.95)[
        "is_below"
    ]
    assert not compare_validation(hits(120, 150), alone(150), hits(285, 300), alone(300), 0.95)[
        "is_below"
    ]


def camera(folder: Path, images: int, seed: int, swapped: int) -> None:
    """Fill a folder with two kinds of texture, of which so many show the other kind."""
    for number, label in enumerate(("coarse", "fine")):
        (folder / label).mkdir(parents=True)
        for i in range(images):
            noise = np.random.default_rng(1000 * seed + 100 * number + i)
            grain = 1 + ((number == 0) ^ (i < swapped))
            pixels = noise.integers(0, 256, (40, 40, 3), "u1").repeat(grain, 0).repeat(grain, 1)
            Image.fromarray(pixels).save(folder / label / f"{i}.png")


@pytest.mark.slow
@pytest.mark.fault("L03")
def test_a_test_split_of_another_camera_keeps_a_version_out_of_production(
    workspace: Workspace,
) -> None:
    """Even the first version, which else goes into production by itself."""
    camera(workspace.path / "data/photos/train", 40, 1, swapped=0)
    camera(workspace.path / "data/photos/test", 20, 2, swapped=3)
    workspace.set_source("data/photos")
    workspace.use_small_network()
    said = workspace.reproduce()
    report = json.loads((workspace.path / "artifacts/evaluate/report.json").read_text())
    found = report["generalisation"]
    assert found["is_below"]
    assert found["test"]["value"] == report["precisions"]["fp32"]["accuracy"]["value"]
    sentence = f"{found['validation']['value']:.4f} on 80 images held out, "
    assert f"test accuracy is below validation accuracy beyond chance: {sentence}" in said
    assert f"digits version 1 stays out of production: validation {sentence}" in said
    assert "expected test accuracy that is not below it beyond chance" in said
    wide = Workspace(workspace.path, {**workspace.env, "COLUMNS": "200"})
    shown = wide.call("summary").stdout
    assert "test accuracy is below it beyond chance: -0." in shown
    assert "alias challenger" in shown
    failed = workspace.call("promote", code=11)
    assert sentence in failed.stderr
    gate = {"max_validation_gap": -found["difference"]["high"] - 1e-6}
    workspace.configure("register", gate=gate)
    failed = workspace.call("promote", code=11)
    assert (
        f"expected test accuracy that is not below it by more than {gate['max_validation_gap']:g}"
        in (failed.stderr)
    )
    workspace.call("promote", "--force", "--reason", "the test camera is broken")
    assert "the test camera is broken" in wide.call("history").stdout
