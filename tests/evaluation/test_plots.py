"""What the plots show: the data behind their marks, and that they come out as pictures."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.patches import Rectangle
from PIL import Image
from sklearn.metrics import precision_recall_curve, roc_auc_score, roc_curve

from tlpipe.data import charts
from tlpipe.evaluation import answers, metrics, plots
from tlpipe.evaluation.answers import Answers


@pytest.fixture
def given() -> Answers:
    random = np.random.default_rng(0)
    truth = random.integers(0, 3, 200)
    logits = (random.normal(size=(200, 3)) + 2 * np.eye(3)[truth]).astype(np.float32)
    raised = np.exp(logits)
    probabilities = (raised / raised.sum(axis=1, keepdims=True)).astype(np.float32)
    return Answers(logits, probabilities, truth)


def line(axes: Any, label: str) -> tuple[list[float], list[float]]:
    (found,) = (line for line in axes.get_lines() if line.get_label() == label)
    return np.asarray(found.get_xdata()).tolist(), np.asarray(found.get_ydata()).tolist()


def test_the_confusion_is_shown_as_shares_and_counts(tmp_path: Path) -> None:
    truth, predicted = np.repeat([0, 0, 1], [8, 2, 5]), np.repeat([0, 1, 1], [8, 2, 5])
    figure = plots.confusion(truth, predicted, ["a", "b", "c"])
    (axes,) = figure.axes
    shown = axes.get_images()[0].get_array()
    assert np.asarray(shown).tolist() == [[0.8, 0.2, 0], [0, 1, 0], [0, 0, 0]]
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    assert texts == {(0, 0): "8", (1, 0): "2", (1, 1): "5"}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]
    # As a picture: the full class is dark blue, the empty one white.
    charts.save_figure(figure, tmp_path / "confusion.png")
    with Image.open(tmp_path / "confusion.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))

    def colour(column: int, row: int) -> list[int]:
        x, y = axes.transData.transform((column + 0.35, row + 0.35))
        found: list[int] = pixels[len(pixels) - round(y), round(x)].tolist()
        return found

    assert colour(1, 1) == [8, 48, 107]
    assert colour(2, 2) == [247, 251, 255]


def test_reliability_shows_the_bins_and_the_error(given: Answers) -> None:
    error = {"value": 0.012, "low": 0.0, "high": 0.034}
    figure = plots.reliability(given, {"calibration_error": error, "calibration_error_before": 0.1})
    upper, lower = figure.axes
    bins = metrics.reliability(given.probabilities, given.truth)
    known = [b.confidence for b in bins], [b.accuracy for b in bins]
    assert line(upper, "answers") == known
    bars = [bar.get_height() for bar in lower.patches if isinstance(bar, Rectangle)]
    assert bars == [b.images for b in bins]
    assert upper.get_title() == (
        "Calibration error 0.012 (0.000 to 0.034), 0.100 without temperature"
    )


@pytest.mark.fault("M02")
def test_an_unknown_calibration_error_is_told_in_words(given: Answers) -> None:
    unknown = {"calibration_error": None, "calibration_error_before": None}
    title = plots.reliability(given, unknown).axes[0].get_title()
    assert title == "Calibration error unknown, since all test images are of one group"


def test_ranking_shows_scikit_learn_s_curves(given: Answers) -> None:
    left, right = plots.ranking(given, ["a", "b", "c"]).axes
    for number, label in enumerate("abc"):
        positive, shown = given.truth == number, given.probabilities[:, number]
        false, true, _ = roc_curve(positive, shown, drop_intermediate=False)
        x, y = line(left, label)
        assert np.allclose(x, false)
        assert np.allclose(y, true)
        precision, recall, _ = precision_recall_curve(positive, shown)
        x, y = line(right, label)
        assert np.allclose(x[::-1], recall[:-1])
        assert np.allclose(y[::-1], precision[:-1])


def test_many_classes_need_neither_a_wall_nor_thousands_of_points(tmp_path: Path) -> None:
    """100 classes: the confusion matrix stays a picture, and curves keep only their corners."""
    random = np.random.default_rng(0)
    truth = np.arange(1000) % 100
    shown = (random.random((1000, 100)) + np.eye(100)[truth]).astype(np.float32)
    given = Answers(shown, shown / shown.sum(axis=1, keepdims=True), truth)
    labels = [f"class {number}" for number in range(100)]
    # Classes 7 and 93 have mistakes, and are shown; of others there are 39 less two.
    answered = np.where(np.isin(truth, [7, 93]), 100 - truth, truth)
    figure = plots.confusion(truth, answered, labels)
    charts.save_figure(figure, tmp_path / "c.png")
    (axes,) = figure.axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert len(names) == 40 and names[-1] == "61 others"
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    row, column = names.index("class 7"), names.index("class 93")
    assert texts[column, row] == texts[row, column] == "10"
    assert texts[39, 39] == "610"
    assert sum(map(int, texts.values())) == 1000
    with Image.open(tmp_path / "c.png") as picture:
        assert max(picture.size) < 2600
    left, right = plots.ranking(given, labels).axes
    lines = [line for line in left.get_lines() if line.get_linestyle() == "-"]
    assert len(lines) == len(right.get_lines()) == 100
    assert sum(len(np.asarray(line.get_xdata())) for line in lines) < 3 * 1000 + 3 * 100
    for number in (0, 99):
        x, y = (np.asarray(data) for data in lines[number].get_data())
        area = float(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2))
        known = roc_auc_score(truth == number, given.probabilities[:, number])
        assert area == pytest.approx(known)


NONE = {"threshold": None, "coverage": None, "accuracy": None}
KNOWN = {"threshold": 0.9, "coverage": 0.6, "accuracy": {"value": 0.97}}
OBSERVED = {"threshold": 0.7, "coverage": 0.8, "accuracy": {"value": 0.95}}


def abstention(known: dict[str, Any], observed: dict[str, Any]) -> dict[str, Any]:
    sizes = {"error_rate": 0.02, "confidence": 0.95, "images": 120, "images_needed": 149}
    sizes["is_copied"] = False
    return {**sizes, **known, "observed": observed}


def test_coverage_shows_the_curve_and_both_thresholds(given: Answers) -> None:
    unknown = {"images": 50, "source": "walls", "answered": 0.25}
    (axes,) = plots.coverage(given, abstention(KNOWN, OBSERVED), unknown).axes
    curve = metrics.coverage(given.confidence, given.hits)
    assert line(axes, "test images") == (curve.coverage.tolist(), curve.accuracy.tolist())
    assert line(axes, "threshold 0.90, kept with 95% confidence on images like these") == (
        [0.6],
        [0.97],
    )
    seen = "threshold 0.70, which would do on images held out, by chance or not"
    assert line(axes, seen) == ([0.8], [0.95])
    assert axes.get_title() == "Of 50 out-of-distribution images (walls), 25% would be answered"


def test_coverage_says_nothing_of_unknown_images_where_there_are_none(given: Answers) -> None:
    (axes,) = plots.coverage(given, abstention(KNOWN, OBSERVED), None).axes
    assert axes.get_title() == "What is answered, and how much of it is right"


@pytest.mark.fault("M03")
def test_coverage_says_that_no_threshold_is_known(given: Answers) -> None:
    unknown = {"images": 50, "source": "walls", "answered": None}
    (axes,) = plots.coverage(given, abstention(NONE, NONE), unknown).axes
    labels = {line.get_label() for line in axes.get_lines()}
    assert labels == {"test images", "asked for"}
    assert axes.get_title() == (
        "No threshold is known to keep errors at 2.0%:\n"
        "120 independent images held out are too few, 149 or more are needed"
    )


def test_robustness_shows_each_kind_from_none_to_strong() -> None:
    def row(accuracy: float) -> dict[str, float]:
        return {"accuracy": accuracy, "low": accuracy - 0.2, "high": accuracy + 0.05}

    rows = {
        kind: [row(0.9 - 0.1 * step - 0.01 * number) for step in range(3)]
        for number, kind in enumerate(answers.STRENGTHS)
    }
    (axes,) = plots.robustness({"images": 64, "clean": row(0.95), **rows}).axes
    intervals = [cast(LineCollection, bars).get_segments() for bars in axes.collections]
    for (kind, found), drawn in zip(rows.items(), intervals, strict=True):
        places, values = line(axes, kind)
        expected = [0.95, *(row["accuracy"] for row in found)]
        assert values == expected
        for place, value, ends in zip(places, expected, drawn, strict=True):
            assert ends.tolist() == [[place, value - 0.2], [place, value + 0.05]]
    assert "64 test images" in axes.get_title()
    names = [label.get_text() for label in axes.get_xticklabels()]
    assert names == ["none", "mild", "medium", "strong"]


def test_slices_are_shown_with_their_intervals() -> None:
    rows = [
        {"value": "PNG", "images": 12, "accuracy": 0.75, "low": 0.5, "high": 0.9},
        {"value": "JPEG", "images": 7, "accuracy": 1.0, "low": 0.6, "high": 1.0},
    ]
    (axes,) = plots.by_slice({"format": rows}, 0.8).axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["format: PNG (12)", "format: JPEG (7)"]
    (points, _, (bars,)) = axes.containers[0]
    assert np.asarray(points.get_xdata()).tolist() == [0.75, 1.0]
    ends = [sorted(segment[:, 0].tolist()) for segment in bars.get_segments()]
    assert np.allclose(ends, [[0.5, 0.9], [0.6, 1.0]])


def test_training_shows_the_history(tmp_path: Path) -> None:
    history = tmp_path / "history.csv"
    history.write_text(
        "step,train_loss,validation_loss,validation_accuracy,l2\n"
        "0,2.0,2.1,0.1,\n1,1.0,1.2,0.6,\n2,0.5,,,\n"
    )
    left, right = plots.training(history).axes
    assert line(left, "training") == ([0, 1, 2], [2.0, 1.0, 0.5])
    assert line(left, "held out") == ([0, 1], [2.1, 1.2])
    assert line(right, "held out") == ([0, 1], [0.1, 0.6])
    assert (left.get_xlabel(), left.get_xscale()) == ("epoch", "linear")


def test_training_shows_a_probe_by_its_l2(tmp_path: Path) -> None:
    history = tmp_path / "history.csv"
    history.write_text(
        "step,train_loss,validation_loss,validation_accuracy,l2\n1,2.0,2.1,0.1,1.0\n2,1.0,1.2,0.6,0.3\n"
    )
    figure = plots.training(history)
    left, right = figure.axes
    assert line(left, "held out") == ([1.0, 0.3], [2.1, 1.2])
    for axes in (left, right):
        assert (axes.get_xlabel(), axes.get_xscale()) == (
            "l2 of the linear probe, strongest first",
            "log",
        )
        assert axes.xaxis_inverted()
    # Numbers, not the formulas that Matplotlib writes on such axes.
    charts.save_figure(figure, tmp_path / "training.png")
    for axes in (left, right):
        shown = [label.get_text() for label in axes.get_xticklabels(which="both")]
        assert {"0.01", "0.1"} & set(shown)
        assert not [text for text in shown if "$" in text]


def test_a_threshold_near_one_is_not_called_one() -> None:
    assert [plots._near_one(p) for p in (0.873, 0.99731, 0.99996, 1.0)] == [
        "0.87",
        "1 - 0.003",
        "1 - 4e-05",
        "1.00",
    ]
