import numpy as np
import pytest
from sklearn import metrics

from tlpipe.metrics import corruptions, curves


def drawn(images: int = 400) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    truth = random.integers(0, 3, images)
    raw = random.random((images, 3)) + np.eye(3)[truth] * random.random((images, 1))
    return (raw / raw.sum(1, keepdims=True)).astype(np.float32).round(2), truth


def test_roc_and_precision_are_scikit_learn_s() -> None:
    probabilities, truth = drawn()
    positive = truth == 1
    found = curves.ranked(probabilities[:, 1], positive)
    false, true, _ = metrics.roc_curve(positive, probabilities[:, 1], drop_intermediate=False)
    assert np.allclose(found.false_positives, false[1:])
    assert np.allclose(found.recall, true[1:])
    precision, recall, _ = metrics.precision_recall_curve(positive, probabilities[:, 1])
    assert np.allclose(found.precision[::-1], precision[:-1])
    assert np.allclose(found.recall[::-1], recall[:-1])


def test_separation_is_the_area_under_the_curve() -> None:
    random = np.random.default_rng(0)
    known, unknown = random.normal(1, 1, 300).round(1), random.normal(0, 1, 80).round(1)
    expected = metrics.roc_auc_score([1] * 300 + [0] * 80, np.concatenate([known, unknown]))
    assert curves.separation(known, unknown) == pytest.approx(expected)


def test_coverage_counts_who_is_surer() -> None:
    confidence = np.array([0.9, 0.8, 0.8, 0.5])
    hits = np.array([True, True, False, False])
    found = curves.coverage(confidence, hits)
    assert found.threshold.tolist() == [0.9, 0.8, 0.5]
    assert found.coverage.tolist() == [0.25, 0.75, 1.0]
    assert found.accuracy == pytest.approx([1, 2 / 3, 0.5])
    assert curves.threshold_for(found, 0.4) == 0.8
    assert curves.threshold_for(found, 0.1) == 0.9
    assert curves.threshold_for(curves.coverage(confidence, ~hits), 0.1) == 1.0


def test_reliability_bins_hold_every_image() -> None:
    probabilities, truth = drawn()
    bins = curves.reliability(probabilities, truth)
    assert sum(b.images for b in bins) == len(truth)
    hits = (probabilities.argmax(1) == truth).mean()
    assert sum(b.images * b.accuracy for b in bins) / len(truth) == pytest.approx(hits)
    assert [b.confidence for b in bins] == sorted(b.confidence for b in bins)


@pytest.mark.parametrize("kind", list(corruptions.STRENGTHS))
def test_stronger_changes_change_more(kind: str) -> None:
    images = np.random.default_rng(0).integers(60, 200, (2, 64, 64, 3), np.uint8)
    images = np.repeat(np.repeat(images[:, ::4, ::4], 4, 1), 4, 2)
    apart = [
        np.abs(corruptions.corrupt(images, kind, strength).astype(float) - images).mean()
        for strength in corruptions.STRENGTHS[kind]
    ]
    assert 0 < apart[0] < apart[1] < apart[2]
