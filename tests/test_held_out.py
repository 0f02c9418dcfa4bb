"""Predictions held out: the file, and what the main job keeps in it."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax

from tests.conftest import Workspace
from tlpipe import held_out
from tlpipe.backbones import activations
from tlpipe.data.manifest import load_manifest, load_split
from tlpipe.errors import ArtifactError
from tlpipe.held_out import HeldOut


@pytest.fixture
def few() -> HeldOut:
    random = np.random.default_rng(0)
    logits = random.normal(size=(5, 3)).astype(np.float32)
    heads = [(np.full((3, 2), fold, np.float32), np.arange(3, dtype=np.float32)) for fold in (1, 2)]
    rows, labels = np.array([7, 2, 9, 4, 1]), np.array([0, 1, 2, 0, 1])
    return HeldOut(rows, labels, logits, np.array([0, 1, 0, 1, 0]), heads)


def assert_equal(found: HeldOut, expected: HeldOut) -> None:
    for name in ("rows", "labels", "logits", "folds"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name
        assert getattr(found, name).dtype == getattr(expected, name).dtype
    assert len(found.heads) == len(expected.heads)
    for pair, other in zip(found.heads, expected.heads, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(pair, other, strict=True))


def test_what_is_saved_is_loaded_and_equal_predictions_are_equal_bytes(
    few: HeldOut, tmp_path: Path
) -> None:
    held_out.save(tmp_path / "one", few)
    held_out.save(tmp_path / "other", few)
    assert_equal(held_out.load(tmp_path / "one"), few)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_some_rows_keep_their_order(few: HeldOut) -> None:
    found = few.only([1, 2, 9, 100])
    assert found.rows.tolist() == [2, 9, 1]
    assert found.labels.tolist() == [1, 2, 1] and found.folds.tolist() == [1, 0, 0]
    assert np.array_equal(found.logits, few.logits[[1, 2, 4]])
    assert len(found.heads) == 2


def test_a_damaged_file_is_an_error(few: HeldOut, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"held cannot be read: .*Run 'tlpipe run'"):
        held_out.load(tmp_path / "held")
    held_out.save(tmp_path / "held", few)
    content = (tmp_path / "held").read_bytes()
    (tmp_path / "held").write_bytes(content[:-9])
    with pytest.raises(ArtifactError, match="cannot be read"):
        held_out.load(tmp_path / "held")


def test_every_labelled_image_is_answered_by_the_head_that_has_not_seen_its_group(
    main_job: Workspace,
) -> None:
    folder = main_job.path / "artifacts"
    held = held_out.load(folder / "train/model/held_out.safetensors")
    assignments = load_split(folder / "split/split.csv")
    card = json.loads((folder / "train/model/model.json").read_text())
    labelled = [i for i, row in enumerate(assignments) if row.split in ("train", "validation")]
    assert sorted(held.rows) == labelled
    names = [card["labels"][label] for label in held.labels]
    assert names == [assignments[row].label for row in held.rows]
    # No group of near copies is in two folds.
    groups = [entry.group for entry in load_manifest(folder / "ingest/manifest.csv")]
    assert groups == [row.group for row in assignments]
    folds: dict[str, set[int]] = {}
    for row, fold in zip(held.rows, held.folds, strict=True):
        folds.setdefault(groups[row], set()).add(int(fold))
    assert {len(found) for found in folds.values()} == {1}
    assert len(held.heads) == 4 and sorted(set(held.folds.tolist())) == [0, 1, 2, 3]
    # Its own fold's head gives the logits; the accuracy is the one that the card states.
    features = activations.load(folder / "embed/activations").features[held.rows]
    for fold, (weight, bias) in enumerate(held.heads):
        inside = held.folds == fold
        again = features[inside].astype(np.float32) @ weight.T + bias
        assert again == pytest.approx(held.logits[inside], abs=2e-3)
    hits = held.logits.argmax(axis=1) == held.labels
    assert card["validation_accuracy"] == pytest.approx(hits.mean(), abs=1e-6)


def test_the_temperature_is_that_of_the_predictions_held_out(main_job: Workspace) -> None:
    """The minimum of the negative log likelihood with its prior, found by trying every value."""
    from scipy.special import log_softmax

    folder = main_job.path / "artifacts"
    held = held_out.load(folder / "train/model/held_out.safetensors")
    temperatures = np.geomspace(0.5, 2.0, 4001)
    images = np.arange(len(held.rows))
    losses = [
        -log_softmax(held.logits / t, axis=1)[images, held.labels].sum() + np.log(t) ** 2 / 2
        for t in temperatures
    ]
    parity = json.loads((folder / "export/parity.json").read_text())
    assert parity["temperature"] == pytest.approx(temperatures[np.argmin(losses)], rel=0.01)


def drawn(factor: float, images: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a classifier that is too sure by a factor, and labels drawn as it should be."""
    random = np.random.default_rng(0)
    logits = random.normal(0, 2, (images, 5))
    probabilities = softmax(logits, axis=1)
    labels = np.array([random.choice(5, p=row) for row in probabilities])
    return (factor * logits).astype(np.float32), labels


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_it_finds_by_how_much_logits_are_too_sure(factor: float) -> None:
    assert held_out.fit_temperature(*drawn(factor)) == pytest.approx(factor, rel=0.05)


def test_few_images_that_are_all_right_do_not_make_certainty() -> None:
    found = held_out.fit_temperature(np.array([[3.0, 0], [0, 3.0]], np.float32), np.array([0, 1]))
    assert 0.2 < found < 1
