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
    measured = scores.measure(probabilities, truth, 0.95)
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
    assert measured["macro_f1"] == pytest.approx(expected[2][:4].mean())
    assert measured["log_loss"] == pytest.approx(
        metrics.log_loss(truth, exact, labels=range(5)), rel=1e-5
    )
    assert (
        measured["confusion"]
        == metrics.confusion_matrix(truth, predicted, labels=range(5)).tolist()
    )
