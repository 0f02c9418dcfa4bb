import json
import math

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from tlpipe import files
from tlpipe.evaluation import curves, evaluate
from tlpipe.evaluation.answers import Answers


def drawn(images: int = 400) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    truth = random.integers(0, 3, images)
    raw = random.random((images, 3)) + np.eye(3)[truth] * random.random((images, 1))
    return (raw / raw.sum(1, keepdims=True)).astype(np.float32).round(2), truth


def test_roc_and_precision_are_scikit_learn_s() -> None:
    probabilities, truth = drawn()
    positive = truth == 1
    found = curves.ranking(probabilities[:, 1], positive)
    false, true, _ = metrics.roc_curve(positive, probabilities[:, 1], drop_intermediate=False)
    assert np.allclose(found.false_positives, false[1:])
    assert np.allclose(found.recall, true[1:])
    precision, recall, _ = metrics.precision_recall_curve(positive, probabilities[:, 1])
    assert np.allclose(found.precision[::-1], precision[:-1])
    assert np.allclose(found.recall[::-1], recall[:-1])


@pytest.mark.parametrize("decimals", [0, 1, 8])
def test_separation_is_the_area_under_the_curve(decimals: int) -> None:
    random = np.random.default_rng(0)
    known = random.normal(1, 1, 300).round(decimals)
    unknown = random.normal(0, 1, 80).round(decimals)
    expected = metrics.roc_auc_score([1] * 300 + [0] * 80, np.concatenate([known, unknown]))
    assert curves.ood_auroc(known, unknown) == pytest.approx(expected)


def test_separation_of_equal_and_of_separate_scores() -> None:
    same = np.full(5, 0.7)
    assert curves.ood_auroc(same, same[:2]) == 0.5
    assert curves.ood_auroc(same, same[:2] - 0.1) == 1
    assert curves.ood_auroc(same, same[:2] + 0.1) == 0


def test_coverage_counts_who_is_surer() -> None:
    confidence = np.array([0.9, 0.8, 0.8, 0.5])
    hits = np.array([True, True, False, False])
    found = curves.coverage(confidence, hits)
    assert found.threshold.tolist() == [0.9, 0.8, 0.5]
    assert found.coverage.tolist() == [0.25, 0.75, 1.0]
    assert found.accuracy == pytest.approx([1, 2 / 3, 0.5])
    assert curves.observed_threshold(found, 0.4) == 0.8
    assert curves.observed_threshold(found, 0.1) == 0.9


def test_reliability_bins_hold_every_image() -> None:
    probabilities, truth = drawn()
    bins = curves.reliability(probabilities, truth)
    assert sum(b.images for b in bins) == len(truth)
    hits = (probabilities.argmax(1) == truth).mean()
    assert sum(b.images * b.accuracy for b in bins) / len(truth) == pytest.approx(hits)
    assert [b.confidence for b in bins] == sorted(b.confidence for b in bins)


@pytest.mark.fault("M03")
def test_no_threshold_answers_nothing_even_at_full_confidence() -> None:
    """The softmax of float32 reaches 1.0: a threshold of 1 would answer these."""
    confidence, hits = np.ones(400), np.zeros(400, bool)
    assert curves.observed_threshold(curves.coverage(confidence, hits), 0.1) == math.inf
    assert curves.threshold_for(confidence, hits, [""] * 400, 0.1, 0.95) == math.inf


def upper_bound(wrong: int, images: int, level: float) -> float:
    """Clopper and Pearson's, one-sided, from scipy's exact test."""
    test = stats.binomtest(wrong, images, alternative="less")
    return float(test.proportion_ci(level, method="exact").high)


@pytest.mark.fault("M03")
@pytest.mark.parametrize(("rate", "level"), [(0.02, 0.95), (0.1, 0.9), (0.05, 0.99)])
def test_where_all_are_right_so_many_images_are_enough(rate: float, level: float) -> None:
    least = curves.images_needed(rate, level)
    assert upper_bound(0, least, level) <= rate < upper_bound(0, least - 1, level)
    confidence = np.linspace(1, 0.5, least)
    hits = np.ones(least, bool)
    found = curves.threshold_for(confidence, hits, [""] * least, rate, level)
    assert found == 0.5
    fewer = curves.threshold_for(confidence[1:], hits[1:], [""] * (least - 1), rate, level)
    assert fewer == math.inf
    copies = np.repeat(confidence[1:], 3), np.repeat(hits[1:], 3)
    groups = [str(number) for number in np.repeat(np.arange(least - 1), 3)]
    assert curves.threshold_for(*copies, groups, rate, level) == math.inf, "copies are one"


@pytest.mark.fault("M03")
def test_the_threshold_is_the_last_whose_bound_holds() -> None:
    """Wrong are the 200th, 330th and every image from the 400th on."""
    confidence = np.linspace(1, 0.5, 600)
    hits = np.ones(600, bool)
    hits[[199, 329]] = False
    hits[399:] = False
    found = curves.threshold_for(confidence, hits, [""] * 600, 0.02, 0.95)
    answered = int((confidence >= found).sum())
    assert 330 < answered < 400
    # The fewest of which three may be wrong; the next, of which four may be, has 58.
    assert upper_bound(3, answered, 0.95) <= 0.02 < upper_bound(3, answered - 1, 0.95)
    hits[148] = False
    assert curves.threshold_for(confidence, hits, [""] * 600, 0.02, 0.95) == math.inf


@pytest.mark.fault("M03")
def test_equal_confidences_are_answered_together() -> None:
    """The first 149 of 300 are right; all share one confidence, and ten of them are wrong."""
    hits = np.arange(300) < 290
    assert curves.threshold_for(np.full(300, 0.9), hits, [""] * 300, 0.02, 0.95) == math.inf
    assert curves.threshold_for(np.full(300, 0.9), hits | True, [""] * 300, 0.02, 0.95) == 0.9


@pytest.mark.fault("M03")
@pytest.mark.parametrize(("images", "known"), [(300, 0.1), (1000, 0.5)])
def test_new_images_keep_the_error_rate_as_often_as_promised(images: int, known: float) -> None:
    """P(wrong) is (1 - confidence) / 2: of answers above t, the exact error rate is (1 - t) / 4."""
    random = np.random.default_rng(0)
    rate, level, times = 0.05, 0.9, 500
    exceeded, promised, observed_exceeded = 0, 0, 0
    for _ in range(times):
        confidence = random.random(images)
        hits = random.random(images) >= (1 - confidence) / 2
        found = curves.threshold_for(confidence, hits, [""] * images, rate, level)
        promised += math.isfinite(found)
        exceeded += math.isfinite(found) and (1 - found) / 4 > rate
        observed = curves.observed_threshold(curves.coverage(confidence, hits), rate)
        observed_exceeded += (1 - observed) / 4 > rate
    allowed = times * (1 - level)
    assert exceeded <= allowed + 3 * (allowed * level) ** 0.5
    assert promised > known * times
    assert observed_exceeded > 0.4 * times, "what was observed promises nothing"


def answers(count: int, wrong: list[int], *, repeat: int = 1) -> Answers:
    """Return answers for so many images, more and more confident, some of them wrong."""
    confidence = np.repeat(np.linspace(0.6, 0.99, count), repeat).astype(np.float32)
    truth = np.zeros(count, np.int64)
    truth[wrong] = 1
    probabilities = np.stack([confidence, 1 - confidence], axis=1)
    return Answers(np.log(probabilities), probabilities, np.repeat(truth, repeat))


@pytest.mark.fault("M03")
def test_a_threshold_and_what_it_does_on_test_images() -> None:
    held_out, test = answers(400, list(range(60))), answers(100, [0, 1, 2, 3, 50])
    params = evaluate.Params(error_rate=0.02)
    found = evaluate.selective_prediction(test, [""] * 100, held_out, [""] * 400, params)
    assert (found["images"], found["images_needed"]) == (400, 149)
    for part in (found, found["observed"]):
        answered = test.confidence >= part["threshold"]
        assert part["coverage"] == answered.mean()
        assert part["accuracy"]["value"] == test.hits[answered].mean()
        known = stats.binomtest(int(test.hits[answered].sum()), int(answered.sum()))
        low, high = known.proportion_ci(0.95, method="wilson")
        assert part["accuracy"]["low"] == pytest.approx(low)
        assert part["accuracy"]["high"] == pytest.approx(high)
    assert found["observed"]["threshold"] < found["threshold"] < 0.8


@pytest.mark.fault("M03")
def test_no_threshold_is_null_in_the_report() -> None:
    few = answers(100, [])
    found = evaluate.selective_prediction(few, [""] * 100, few, [""] * 100, evaluate.Params())
    assert found["threshold"] is found["coverage"] is found["accuracy"] is None
    assert found["observed"]["threshold"] == pytest.approx(0.6)
    assert found["observed"]["accuracy"]["value"] == 1
    all_wrong = answers(100, list(range(100)))
    found = evaluate.selective_prediction(few, [""] * 100, all_wrong, [""] * 100, evaluate.Params())
    assert found["observed"] == {"threshold": None, "coverage": None, "accuracy": None}
    text = files.json_bytes(found).decode()
    assert json.loads(text)["threshold"] is None
    # A threshold above all test images: none of them is answered.
    sure = answers(200, [])
    low = Answers(few.logits, few.probabilities / 2, few.truth)
    found = evaluate.selective_prediction(low, [""] * 100, sure, [""] * 200, evaluate.Params())
    assert (found["coverage"], found["accuracy"]) == (0, None)


@pytest.mark.fault("M01")
def test_answers_above_a_threshold_count_groups() -> None:
    held_out = answers(200, [])
    once, many = answers(60, [3, 40]), answers(60, [3, 40], repeat=5)
    groups = [str(number) for number in np.repeat(np.arange(60), 5)]
    params = evaluate.Params()
    found = evaluate.selective_prediction(once, [""] * 60, held_out, [""] * 200, params)
    copied = evaluate.selective_prediction(many, groups, held_out, [""] * 200, params)
    assert copied["accuracy"] == pytest.approx(found["accuracy"])
