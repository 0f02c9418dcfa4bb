import numpy as np
import pytest

from tlpipe.metrics import scores


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Newcombe (1998), Two-sided confidence intervals for the single proportion, table I, method 3.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_s_interval_is_the_published_one(
    successes: int, trials: int, low: float, high: float
) -> None:
    assert scores.wilson_interval(successes, trials, 0.95) == pytest.approx((low, high), abs=5e-5)


def test_the_numbers_are_scikit_learn_s() -> None:
    from sklearn import metrics

    random = np.random.default_rng(0)
    truth = random.integers(0, 4, 300)
    raw = random.random((300, 5)) + 0.6 * np.eye(5)[truth]
    probabilities = (raw / raw.sum(axis=1, keepdims=True)).astype(np.float32)
    predicted = probabilities.argmax(axis=1)
    measured = scores.measure(probabilities, truth, [""] * 300, 0.95)
    assert measured["accuracy"]["value"] == pytest.approx(metrics.accuracy_score(truth, predicted))
    accuracy = measured["accuracy"]
    assert accuracy["low"] < accuracy["value"] < accuracy["high"] < 1
    exact = raw / raw.sum(axis=1, keepdims=True)
    expected = metrics.precision_recall_fscore_support(
        truth, predicted, labels=range(5), zero_division=0
    )
    for i, row in enumerate(measured["per_class"]):
        found = (row["precision"], row["recall"], row["f1"], row["images"])
        assert found == pytest.approx(tuple(column[i] for column in expected))
    # The fifth class has no images; its F1 says nothing.
    assert measured["macro_f1"]["value"] == pytest.approx(expected[2][:4].mean())
    assert measured["balanced_accuracy"]["value"] == pytest.approx(expected[1][:4].mean())
    areas = [metrics.roc_auc_score(truth == c, probabilities[:, c]) for c in range(4)]
    assert measured["auroc"]["value"] == pytest.approx(np.mean(areas))
    for k in (2, 3):
        hits = metrics.top_k_accuracy_score(truth, probabilities, k=k, labels=range(5))
        assert measured[f"top_{k}_accuracy"]["value"] == pytest.approx(hits)
    assert measured["log_loss"]["value"] == pytest.approx(
        metrics.log_loss(truth, exact, labels=range(5)), rel=1e-5
    )
    assert (
        measured["confusion"]
        == metrics.confusion_matrix(truth, predicted, labels=range(5)).tolist()
    )


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Test sets drawn two hundred times from a classifier that is right on 80 % of all images."""
    random = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        truth = random.integers(0, 2, 150)
        answers = np.where(random.random(150) < 0.8, truth, 1 - truth)
        measured = scores.measure(np.eye(2, dtype=np.float32)[answers], truth, [""] * 150, 0.95)[
            "accuracy"
        ]
        held += measured["low"] <= 0.8 <= measured["high"]
    assert 0.9 <= held / 200 <= 0.99


def test_images_of_one_group_count_as_one() -> None:
    """Ten copies of each image say no more than one: the interval stays as wide."""
    random = np.random.default_rng(0)
    truth = random.integers(0, 2, 60)
    answers = np.where(random.random(60) < 0.8, truth, 1 - truth)
    probabilities = np.eye(2, dtype=np.float32)[answers]
    names = [str(number) for number in range(60)]

    def width(times: int, groups: list[str]) -> float:
        many = np.repeat(probabilities, times, axis=0), np.repeat(truth, times)
        measured = scores.measure(*many, groups, 0.95)["accuracy"]
        return measured["high"] - measured["low"]

    single = width(1, names)
    assert width(10, list(np.repeat(names, 10))) == pytest.approx(single, rel=0.1)
    assert width(10, [""] * 600) < 0.5 * single


def test_where_all_are_right_the_interval_is_wilson_s() -> None:
    truth = np.zeros(20, np.int64)
    probabilities = np.tile(np.array([[0.9, 0.1]], np.float32), (20, 1))
    accuracy = scores.measure(probabilities, truth, [""] * 20, 0.95)["accuracy"]
    assert (accuracy["low"], accuracy["high"]) == scores.wilson_interval(20, 20, 0.95)


def test_calibration_error_is_the_published_sum() -> None:
    """Two bins: of 0.7 three in four are right, of 0.9 one in two."""
    probabilities = np.array([[0.7, 0.3]] * 4 + [[0.9, 0.1]] * 2, np.float32)
    truth = np.array([0, 0, 0, 1, 0, 1])
    expected = 4 / 6 * abs(0.75 - 0.7) + 2 / 6 * abs(0.5 - 0.9)
    assert scores.calibration_error(probabilities, truth) == pytest.approx(expected, abs=1e-6)
