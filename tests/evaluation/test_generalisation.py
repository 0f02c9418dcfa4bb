"""Test accuracy against validation accuracy: published numbers, error rates, another camera."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import Workspace
from tlpipe.evaluation.generalisation import compare


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
    found = compare(hits(*second), alone(second[1]), hits(*first), alone(first[1]), 0.95)
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
            compare(validation, alone(300), test, alone(150), 0.95)["is_below"],
            compare(three[0], groups[0], three[1], groups[1], 0.95)["is_below"],
            compare(three[0], alone(900), three[1], alone(450), 0.95)["is_below"],
        ]
    assert alarms[0] == alarms[1] < 40
    assert alarms[2] > 80  # who counted copies as images would be wrong that often


@pytest.mark.fault("L03")
def test_what_is_below_is_called_so() -> None:
    assert compare(hits(285, 300), alone(300), hits(120, 150), alone(150), 0.95)["is_below"]
    assert not compare(hits(120, 150), alone(150), hits(285, 300), alone(300), 0.95)["is_below"]


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
    workspace.configure("ingest", short_side_px=168, interpolation="bilinear")
    workspace.configure("embed", backbone="timm/test_resnet", weights="none")
    said = workspace.run("dvc", "repro").stderr
    report = json.loads((workspace.path / "artifacts/evaluate/report.json").read_text())
    found = report["generalisation"]
    assert found["is_below"]
    assert found["test"]["value"] == report["precisions"]["fp32"]["accuracy"]["value"]
    sentence = f"{found['validation']['value']:.4f} on 80 images held out, "
    assert f"test accuracy is below validation accuracy beyond chance: {sentence}" in said
    assert f"digits version 1 stays out of production: validation {sentence}" in said
    assert "expected test accuracy that is not below it beyond chance" in said
    wide = Workspace(workspace.path, {**workspace.env, "COLUMNS": "200"})
    shown = wide.run("tlpipe", "summary", "artifacts/register/receipt.json").stdout
    assert "test accuracy is below it beyond chance: -0." in shown
    assert "alias challenger" in shown
    failed = workspace.run("tlpipe", "promote", code=11)
    assert sentence in failed.stderr
    gate = {"max_validation_gap": -found["difference"]["high"] - 1e-6}
    workspace.configure("register", gate=gate)
    failed = workspace.run("tlpipe", "promote", code=11)
    assert (
        f"expected test accuracy that is not below it by more than {gate['max_validation_gap']:g}"
        in (failed.stderr)
    )
    workspace.run("tlpipe", "promote", "--force", "the test camera is broken")
    assert "the test camera is broken" in wide.run("tlpipe", "history").stdout
