from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from tlpipe.data.manifest import Entry
from tlpipe.evaluation import answers, evaluate
from tlpipe.evaluation.answers import Part

KEYS = [f"{number}.png " for number in range(20)]


def smooth(count: int = 2) -> np.ndarray:
    images = np.random.default_rng(0).integers(60, 200, (count, 64, 64, 3), np.uint8)
    return np.repeat(np.repeat(images[:, ::4, ::4], 4, 1), 4, 2)


def change(kind: str, strength: float) -> np.ndarray:
    corrupted = answers.corrupt(smooth(), KEYS[:2], kind, strength).astype(float)
    changed: np.ndarray = corrupted - smooth()
    return changed


@pytest.mark.parametrize("kind", list(answers.STRENGTHS))
def test_stronger_changes_change_more(kind: str) -> None:
    apart = [np.abs(change(kind, strength)).mean() for strength in answers.STRENGTHS[kind]]
    assert 0 < apart[0] < apart[1] < apart[2]


def test_changes_are_what_they_are_called() -> None:
    images = smooth().astype(float)
    for strength in answers.STRENGTHS["noise"][:2]:
        noise = change("noise", strength)
        assert abs(noise.mean()) < 1
        # Where nothing is cut off at 0 or 255, it has that deviation.
        assert noise[(images > 110) & (images < 150)].std() == pytest.approx(strength, rel=0.05)
    for kind in ("dark", "bright"):
        for factor in answers.STRENGTHS[kind]:
            found = images + change(kind, factor)
            assert np.abs(found - (images * factor).clip(0, 255)).max() <= 1
    for quality in answers.STRENGTHS["jpeg"]:
        file = BytesIO()
        Image.fromarray(smooth()[0]).save(file, "JPEG", quality=int(quality))
        known = np.asarray(Image.open(file)).astype(float)
        assert (images[0] + change("jpeg", quality)[0] == known).all()
    # A blur keeps the mean and takes away the difference between neighbours.
    for radius in answers.STRENGTHS["blur"]:
        found = images + change("blur", radius)
        assert found.mean() == pytest.approx(images.mean(), abs=1)
        assert np.abs(np.diff(found, axis=1)).max() < np.abs(np.diff(images, axis=1)).max()


@pytest.mark.fault("M04")
def test_noise_differs_between_images_and_stays_with_each() -> None:
    images = np.repeat(smooth(1), 20, axis=0)
    found = answers.corrupt(images, KEYS, "noise", 10.0)
    assert len({image.tobytes() for image in found}) == 20
    again = answers.corrupt(images[:3], [KEYS[7], KEYS[3], KEYS[7]], "noise", 10.0)
    assert (again == found[[7, 3, 7]]).all()


class Mean:
    """Stands for a predictor: its answer says all that there is to know of the image's mean."""

    def scores(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        share = images.reshape(len(images), -1).mean(axis=1) / 255
        both = np.stack([share, 1 - share], axis=1).astype(np.float32)
        return both, both


@pytest.mark.fault("M04")
@pytest.mark.parametrize("kind", list(answers.STRENGTHS))
def test_answers_for_changed_images_do_not_depend_on_the_batch(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = np.repeat(smooth(1), 20, axis=0)
    entries = [
        Entry(f"{number}.png", "a", "", "", 1, 64, 64, "RGB", "PNG", "", "", "")
        for number in range(20)
    ]
    part = Part(images, list(range(20)), entries, np.zeros(20, np.int64))  # type: ignore[arg-type]
    strength = answers.STRENGTHS[kind][1]
    found: list[Any] = []
    for batch in (1, 8, 20):
        monkeypatch.setattr(answers, "BATCH", batch)
        changed = partial(answers.corrupt, kind=kind, strength=strength)
        found.append(part.ask(Mean(), kind, changed).logits)  # type: ignore[arg-type]
    assert (found[0] == found[1]).all()
    assert (found[0] == found[2]).all()
    if kind == "noise":
        assert len(set(found[0][:, 0].tolist())) > 10, "each image has its own noise"


@pytest.mark.fault("M01", "M04")
@pytest.mark.parametrize("copies", [1, 5])
def test_accuracy_on_changed_images_is_that_of_the_light_with_wilson_s_interval(
    copies: int,
) -> None:
    """Named right is what is brighter than half. Copies of an image do not narrow an interval."""
    levels = np.repeat([100, 160, 200], 4)
    images = np.repeat(levels, copies).astype(np.uint8)[:, None, None, None]
    squares = np.broadcast_to(images, (len(images), 32, 32, 3))
    entries = [
        Entry(f"{number}.png", "a", "", "", 1, 32, 32, "RGB", "PNG", f"{number // copies}", "", "")
        for number in range(len(images))
    ]
    truth = np.zeros(len(images), np.int64)
    part = Part(squares, list(range(len(images))), entries, truth)  # type: ignore[arg-type]
    found = evaluate._robustness(Mean(), part, 0.95)  # type: ignore[arg-type]
    assert found["images"] == len(images)
    factors = {"blur": [1.0] * 3, "noise": [1.0] * 3, "jpeg": [1.0] * 3, "clean": [1.0]}
    factors |= {kind: list(answers.STRENGTHS[kind]) for kind in ("dark", "bright")}
    for kind, strengths in factors.items():
        rows = [found[kind]] if kind == "clean" else found[kind]
        for row, factor in zip(rows, strengths, strict=True):
            right = int((levels * factor > 127.5).sum())
            interval = stats.binomtest(right, 12).proportion_ci(0.95, method="wilson")
            assert row["accuracy"] == pytest.approx(right / 12), (kind, factor)
            assert (row["low"], row["high"]) == pytest.approx(interval), (kind, factor)
