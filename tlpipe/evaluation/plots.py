"""Plots of the report: confusion, calibration, ROC, coverage, robustness, slices, training."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tlpipe.data import charts
from tlpipe.data.manifest import evenly
from tlpipe.data.pixels import Chunks
from tlpipe.evaluation import answers, metrics
from tlpipe.evaluation.answers import Answers, Shown
from tlpipe.evaluation.metrics import Labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_CURVES, _MOST_THIN_CURVES = 12, 200
_MOST_LABELS = 40
_MOST_SLICES = 30


def draw(folder: Path, report: Mapping[str, Any], given: Answers, history: Path) -> None:
    """Draw the report of ``evaluate``, and how the training went, a PNG file for each question."""
    labels, exact = report["labels"], report["precisions"]["fp32"]
    figures = {
        "confusion": confusion(given.truth, given.predicted, labels),
        "reliability": reliability(given, exact),
        "ranking": ranking(given, labels),
        "coverage": coverage(given, report["abstention"], report["ood"]),
        "robustness": robustness(report["robustness"]),
        "slices": by_slice(report["slices"], exact["accuracy"]["value"]),
        "training": training(history),
    }
    for name, figure in figures.items():
        charts.save_figure(figure, folder / f"{name}.png")


def confusion(truth: Labels, predicted: Labels, labels: Sequence[str]) -> "Figure":
    """Draw the confusion matrix: true classes down, predicted ones across.

    Of more than ``_MOST_LABELS`` classes it shows those with the most mistakes, of and for them,
    and all others as one: the picture does not grow with the square of the classes.
    """
    shown, title = list(labels), "Confusion on the test split (images)"
    if len(labels) > _MOST_LABELS:
        wrong = truth != predicted
        mistakes = sum(np.bincount(of[wrong], minlength=len(labels)) for of in (truth, predicted))
        kept = np.sort(np.argsort(-mistakes, kind="stable")[: _MOST_LABELS - 1])
        number = np.full(len(labels), len(kept))
        number[kept] = np.arange(len(kept))
        truth, predicted = number[truth], number[predicted]
        others = len(labels) - len(kept)
        shown = [*(labels[k] for k in kept), f"{others} others"]
        title = (
            f"Confusion on the test split (images): the {len(kept)} of {len(labels)} classes with "
            f"the most mistakes"
        )
    matrix = np.zeros((len(shown), len(shown)), np.int64)
    np.add.at(matrix, (truth, predicted), 1)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = max(4.0, 1.6 + 0.5 * len(shown))
    figure = charts.new_figure(side, side)
    axes = figure.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(shown)), shown, rotation=90 if max(map(len, shown)) > 2 else 0)
    axes.set_yticks(range(len(shown)), shown)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(title)
    for (row, column), count in np.ndenumerate(matrix):
        if count:
            colour = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=colour)
    return figure


def reliability(given: Answers, exact: Mapping[str, Any]) -> "Figure":
    """Draw how often answers of each confidence are right, and how many there are."""
    bins = metrics.reliability(given.probabilities, given.truth)
    figure = charts.new_figure(5, 5.5)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    upper.plot([0, 1], [0, 1], color="gray", linestyle=":", label="perfect calibration")
    upper.plot([b.confidence for b in bins], [b.accuracy for b in bins], "o-", label="answers")
    upper.set_ylabel("share that is right")
    upper.set_ylim(-0.02, 1.02)
    upper.legend(loc="lower right")
    error = exact["calibration_error"]
    stated = metrics.UNKNOWN
    if error is not None:
        stated = (
            f"{error['value']:.3f} ({error['low']:.3f} to {error['high']:.3f}), "
            f"{exact['calibration_error_before']:.3f} without temperature"
        )
    upper.set_title(f"Calibration error {stated}", fontsize=9)
    lower.bar([b.confidence for b in bins], [b.images for b in bins], width=0.04)
    lower.set_ylabel("images")
    lower.set_xlabel("probability of the answer")
    lower.set_xlim(0, 1.02)
    return figure


def ranking(given: Answers, labels: Sequence[str]) -> "Figure":
    """Draw the ROC and the precision-recall curve of each class against the others.

    Of more than ``_MOST_THIN_CURVES`` classes that many are drawn.
    """
    figure = charts.new_figure(9, 4.4)
    left, right = figure.subplots(1, 2)
    for number in evenly(range(len(labels)), _MOST_THIN_CURVES):
        label, positive = labels[number], given.truth == number
        if not positive.any() or positive.all():
            continue
        found = metrics.ranking(given.probabilities[:, number], positive)
        style: dict[str, Any] = {"linewidth": 1.3, "label": label}
        if len(labels) > _MOST_CURVES:
            style = {"linewidth": 0.6, "color": "#4c72b0", "alpha": 0.5}
            # Points within a straight line can go: thousands, of each class.
            steps = np.diff(found.recall) > 0
            kept = np.flatnonzero([True, *steps] | np.array([*steps, True]))
            found = metrics.Ranking(*(points[kept] for points in found))
        left.plot([0, *found.false_positives], [0, *found.recall], **style)
        right.plot(found.recall, found.precision, **style)
    left.plot([0, 1], [0, 1], color="gray", linestyle=":")
    left.set_xlabel("false positives")
    left.set_ylabel("recall")
    left.set_title("ROC, each class against the others")
    right.set_xlabel("recall")
    right.set_ylabel("precision")
    right.set_title("Precision and recall")
    for axes in (left, right):
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
    if len(labels) <= _MOST_CURVES:
        handles, names = left.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside right center", fontsize=8)
    return figure


def coverage(
    given: Answers, abstention: Mapping[str, Any], ood: Mapping[str, Any] | None
) -> "Figure":
    """Draw accuracy over coverage: of only the most confident answers, how many are right."""
    curve = metrics.coverage(given.confidence, given.hits)
    figure = charts.new_figure(5.5, 4.2)
    axes = figure.subplots()
    axes.step(curve.coverage, curve.accuracy, where="post", label="test images")
    axes.axhline(1 - abstention["error_rate"], color="gray", linestyle=":", label="asked for")
    promised = f"kept with {abstention['confidence']:.0%} confidence on images like these"
    seen = "which would do on images held out, by chance or not"
    for found, kept in ((abstention, promised), (abstention["observed"], seen)):
        if found["accuracy"]:
            label = f"threshold {_near_one(found['threshold'])}, {kept}"
            axes.plot(found["coverage"], found["accuracy"]["value"], "o", label=label)
    axes.set_xlabel("share of images that are answered")
    axes.set_ylabel("share of answers that are right")
    axes.set_xlim(0, 1.02)
    axes.legend(loc="lower left")
    if abstention["threshold"] is None:
        title = (
            f"No threshold is known to keep errors at {abstention['error_rate']:.1%}:\n"
            f"{metrics.why_no_threshold(abstention)}"
        )
    elif ood is None:
        title = "What is answered, and how much of it is right"
    else:
        title = (
            f"Of {ood['images']} out-of-distribution images ({ood['source']}), "
            f"{ood['answered']:.0%} would be answered"
        )
    axes.set_title(title, fontsize=9)
    return figure


def _near_one(probability: float) -> str:
    """Return it with so many digits that it is not taken for 1."""
    missing = 1 - probability
    return f"{probability:.2f}" if missing >= 0.005 or missing == 0 else f"1 - {missing:.1g}"


def robustness(found: Mapping[str, Any]) -> "Figure":
    """Draw the accuracy on changed images, from mild to strong, with intervals."""
    figure = charts.new_figure(5.5, 4.2)
    axes = figure.subplots()
    names = ["none", "mild", "medium", "strong"]
    for number, kind in enumerate(answers.STRENGTHS):
        rows = [found["clean"], *found[kind]]
        values = [row["accuracy"] for row in rows]
        places = np.arange(len(names)) + 0.06 * (number - (len(answers.STRENGTHS) - 1) / 2)
        spread = charts.error_bars(rows)
        (drawn,) = axes.plot(places, values, "o-", label=kind)
        axes.errorbar(places, values, spread, fmt="none", capsize=2, color=drawn.get_color())
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(-0.02, 1.02)
    axes.set_ylabel("accuracy")
    axes.set_xlabel("change")
    axes.legend(loc="lower left")
    axes.set_title(f"Accuracy on changed pictures ({found['images']} test images)")
    return figure


def by_slice(found: Mapping[str, Sequence[Mapping[str, Any]]], overall: float) -> "Figure":
    """Draw the accuracy on parts of the test images, with intervals."""
    rows = [(f"{name}: {row['value']}", row) for name, part in found.items() for row in part]
    rows = rows[:_MOST_SLICES]
    figure = charts.new_figure(7.5, 1.4 + 0.28 * len(rows))
    axes = figure.subplots()
    values = np.array([row["accuracy"] for _, row in rows])
    spread = charts.error_bars([row for _, row in rows])
    places = np.arange(len(rows))
    axes.errorbar(values, places, xerr=spread, fmt="o", markersize=4, capsize=2)
    axes.axvline(overall, color="gray", linestyle=":")
    axes.set_yticks(places, [f"{name} ({row['images']})" for name, row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("accuracy; dotted: on all")
    axes.set_title("Accuracy on parts of the test split (images)")
    return figure


def training(history: Path) -> "Figure":
    """Draw the losses and the accuracy of each epoch, or of each l2 of a linear probe."""
    with history.open(newline="") as file:
        rows = list(csv.DictReader(file))
    is_probe = bool(rows[0]["l2"])
    along = "l2" if is_probe else "step"

    def column(axes: "Axes", name: str, label: str) -> None:
        known = [(float(row[along]), float(row[name])) for row in rows if row[name]]
        if known:
            axes.plot(*zip(*known, strict=True), ".-", label=label)

    figure = charts.new_figure(8, 3.8)
    left, right = figure.subplots(1, 2)
    column(left, "train_loss", "training")
    column(left, "validation_loss", "held out")
    left.set_ylabel("loss (nats)")
    left.legend()
    column(right, "validation_accuracy", "held out")
    right.set_ylabel("accuracy on images held out")
    for axes in (left, right):
        axes.set_xlabel("l2 of the linear probe, strongest first" if is_probe else "epoch")
        if is_probe:
            charts.scale_by_logarithm(axes)
            axes.invert_xaxis()
    return figure


def galleries(folder: Path, squares: Chunks, shown: Sequence[Shown], most: int) -> None:
    """Show the most confident mistakes, and the least confident answers."""
    wrong = [a for a in shown if a.prediction.label != a.entry.label]
    worst = sorted(wrong, key=lambda a: -a.prediction.probability)[:most]
    title = f"Most confident mistakes: {len(worst)} of {len(wrong)}"
    _gallery(folder / "mistakes.png", squares, worst, title)
    least = sorted(shown, key=lambda a: a.prediction.probability)[:most]
    _gallery(
        folder / "least_confident.png", squares, least, f"The {len(least)} least confident answers"
    )


def _gallery(path: Path, squares: Chunks, shown: Sequence[Shown], title: str) -> None:
    captions = [
        f"{a.entry.label} as {a.prediction.label} ({a.prediction.probability:.2f})" for a in shown
    ]
    charts.gallery(path, [squares[a.row] for a in shown], captions, title=title)
