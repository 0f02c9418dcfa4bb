"""Measure a classifier from its probabilities and the true labels. Pure functions on arrays.

A headline is a function of how often each image counts. So one function gives its value, where all
count once, and its values on resampled images, between which its interval lies.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tlpipe.resampling import Weights, ends, resamples

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Headlines = dict[str, npt.NDArray[np.float64]]

BINS = 15
_TOP = (2, 3, 5)
# All names that a headline may have; which there are depends on the number of classes.
HEADLINES = (
    "accuracy",
    "balanced_accuracy",
    "macro_f1",
    "log_loss",
    "auroc",
    "calibration_error",
    *(f"top_{k}_accuracy" for k in _TOP),
)


def title(headline: str) -> str:
    """Return what people call a headline."""
    return headline.replace("_", " ").replace("auroc", "AUROC").replace("f1", "F1")


def measure(
    probabilities: Floats, truth: Labels, groups: Sequence[str], confidence: float
) -> dict[str, Any]:
    """Return every number of the report: headlines with their intervals, classes, confusion.

    ``groups``: one for each image; images that share one, other than the empty one, are drawn
    together, since they are not independent.
    """
    classes, images = probabilities.shape[1], len(truth)
    count = headlines(probabilities, truth)
    once = count(np.ones((1, images)))
    values = {name: float(value[0]) for name, value in once.items()}
    spread = [count(weights) for weights in resamples(groups)]
    measured: dict[str, Any] = {}
    for name, value in values.items():
        drawn = np.concatenate([part[name] for part in spread])
        low, high = ends(drawn, confidence)
        if name == "accuracy" and value in (0.0, 1.0):  # however they are drawn, it is the same
            low, high = wilson_interval(round(value * images), images, confidence)
        measured[name] = {"value": value, "low": low, "high": high, "confidence": confidence}
    confusion = confusion_matrix(truth, probabilities.argmax(axis=1), classes)
    return measured | {"per_class": per_class(confusion), "confusion": confusion.tolist()}


def headlines(probabilities: Floats, truth: Labels) -> Callable[[Weights], Headlines]:
    """Return what computes every headline (B,) from how often each image counts (B, N).

    Expected calibration error: Guo et al. (2017), On calibration of modern neural networks, eq. 3,
    with fifteen bins of equal width. AUROC: one class against the others, the mean over classes;
    Mann and Whitney (1947), with halves for ties.
    """
    images, classes = probabilities.shape
    predicted = probabilities.argmax(axis=1)
    confidence = probabilities.max(axis=1).astype(np.float64)
    true = probabilities[np.arange(images), truth].astype(np.float64)
    hit = (predicted == truth).astype(np.float64)
    losses = -np.log(np.clip(true, 1e-12, None))
    rank = (probabilities > true[:, None].astype(np.float32)).sum(axis=1)
    actual = np.eye(classes)[truth]
    answered = np.eye(classes)[predicted]
    bins = np.eye(BINS)[bin_numbers(confidence)]
    tested = np.flatnonzero(np.bincount(truth, minlength=classes))

    def count(weights: Weights) -> Headlines:
        total = weights.sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            hits, drawn = weights @ (actual * hit[:, None]), weights @ actual
            recall = (hits / drawn)[:, tested]
            f1 = (2 * hits / (drawn + weights @ answered))[:, tested]
        gaps = np.abs(weights @ (bins * (confidence - hit)[:, None]))
        found = {
            "accuracy": weights @ hit / total,
            "balanced_accuracy": np.nanmean(recall, axis=1),
            "macro_f1": np.nanmean(f1, axis=1),
            "log_loss": weights @ losses / total,
            "calibration_error": gaps.sum(axis=1) / total,
        }
        for k in _TOP:
            if k < classes:
                found[f"top_{k}_accuracy"] = weights @ (rank < k) / total
        areas = [auroc(probabilities[:, c], truth == c, weights) for c in tested]
        if len(tested) > 1:
            found["auroc"] = np.nanmean(areas, axis=0)
        return found

    return count


def auroc(
    scores: npt.NDArray[np.floating[Any]], actual: npt.NDArray[np.bool_], weights: Weights
) -> Weights:
    """Return the area under the ROC curve (B,) for how often each image counts (B, N).

    It is the chance that one of the class scores above one of the others, with halves for ties;
    NaN where one side is empty.
    """
    order = np.argsort(scores, kind="stable")
    ranked, inside = scores[order], np.flatnonzero(actual[order])
    others = np.zeros((len(weights), len(scores) + 1))
    np.cumsum(weights[:, order] * ~actual[order], axis=1, out=others[:, 1:])
    # Of the others, those that score less, and half of those that score the same.
    first, last = (np.searchsorted(ranked, ranked[inside], side) for side in ("left", "right"))
    positive = weights[:, order[inside]]
    above = (positive * (others[:, first] + others[:, last])).sum(axis=1) / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        area: Weights = above / (positive.sum(axis=1) * others[:, -1])
    return area


def calibration_error(probabilities: Floats, truth: Labels) -> float:
    """Return the expected calibration error, in [0, 1]."""
    once = headlines(probabilities, truth)(np.ones((1, len(truth))))
    return float(once["calibration_error"][0])


def softmax(logits: Floats) -> Floats:
    """Return the probabilities (N, C) of logits."""
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    found: Floats = raised / raised.sum(axis=1, keepdims=True)
    return found


def bin_numbers(confidence: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Return the bin of each confidence, from 0 to ``BINS`` - 1; its upper end belongs to a bin."""
    return np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)


def wilson_interval(successes: int, trials: int, confidence: float) -> tuple[float, float]:
    """Return the interval of a proportion, both ends in [0, 1].

    Source: Wilson (1927), Probable inference, the law of succession, and statistical inference,
    JASA 22; it holds for small samples and for proportions near 0 and 1.
    """
    from statistics import NormalDist

    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / trials
    centre = share + z * z / (2 * trials)
    half_width = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    low, high = (centre - half_width) / scale, (centre + half_width) / scale
    # Where all or none succeeded, one end is the share itself but for rounding.
    return min(max(low, 0.0), share), max(min(high, 1.0), share)


def confusion_matrix(truth: Labels, predicted: Labels, classes: int) -> npt.NDArray[np.int64]:
    """Return (C, C) counts: row is the true class, column the predicted one."""
    flat = np.bincount(truth * classes + predicted, minlength=classes * classes)
    return flat.reshape(classes, classes)


def per_class(confusion: npt.NDArray[np.int64]) -> list[dict[str, Any]]:
    """Return precision, recall, F1 (0 where undefined) and the number of images of each class."""
    rows = []
    for i in range(len(confusion)):
        hits = int(confusion[i, i])
        predicted, actual = int(confusion[:, i].sum()), int(confusion[i].sum())
        rows.append(
            {
                "precision": hits / predicted if predicted else 0.0,
                "recall": hits / actual if actual else 0.0,
                "f1": 2 * hits / (predicted + actual) if predicted + actual else 0.0,
                "images": actual,
            }
        )
    return rows
