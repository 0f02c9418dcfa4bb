"""Measure a classifier from its probabilities and the true labels. Pure functions on arrays.

Every metric has an interval. Images of one group (near copies, parts of one photo) count as one
where they are right or wrong together: see ``tlpipe.resampling``.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tlpipe.resampling import (
    Weights,
    effective_interval,
    ends,
    group_numbers,
    group_weight,
    resamples,
    share_interval,
)

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Interval = dict[str, float]

BINS = 15
_TOP = (2, 3, 5)
# What people are told where ``calibration_error`` is None.
UNKNOWN = "unknown, since all test images are of one group"
# All names that a metric may have; which there are depends on the number of classes.
METRICS = (
    "accuracy",
    "balanced_accuracy",
    "macro_f1",
    "log_loss",
    "auroc",
    "calibration_error",
    *(f"top_{k}_accuracy" for k in _TOP),
)


def title(metric: str) -> str:
    """Return what people call a metric."""
    return metric.replace("_", " ").replace("auroc", "AUROC").replace("f1", "F1")


def measure(
    probabilities: Floats, truth: Labels, groups: Sequence[str], confidence: float
) -> dict[str, Any]:
    """Return every number of the report: metrics with their intervals, and those of each class.

    ``groups``: one for each image; images that share one, other than the empty one, are not
    independent. Classes without test images count in no mean over classes.
    """
    predicted = probabilities.argmax(axis=1)
    right = predicted == truth
    true = probabilities[np.arange(len(truth)), truth]
    place = group_numbers(groups)
    losses = -np.log(np.clip(true.astype(np.float64), 1e-12, None))
    measured: dict[str, Any] = {
        "accuracy": share_interval(right, place, confidence),
        **{
            name: share_interval(right, place, confidence, weights=weights, classes=truth)
            for name, weights in class_weights(truth, predicted).items()
        },
        "log_loss": _log_loss(losses, place, confidence),
        "calibration_error": calibration_error(probabilities, truth, groups, confidence),
    }
    for k in _TOP:
        if k < probabilities.shape[1]:
            among = (probabilities > true[:, None]).sum(axis=1) < k
            measured[f"top_{k}_accuracy"] = share_interval(among, place, confidence)
    if (truth != truth[0]).any():
        measured["auroc"] = auroc(probabilities, truth, place, confidence)
    return measured | {"per_class": per_class(truth, predicted, probabilities.shape[1])}


def class_weights(truth: Labels, predicted: Labels) -> dict[str, Weights]:
    """Return how much each right answer counts (N,) in the balanced accuracy and in the macro F1.

    Both are then the sum of the weights of right answers, and all weights sum to 1: the F1 of a
    class is twice its hits over the number of images that are of it or taken for it, each of which
    shares its weight between its own class and the one that it is taken for.
    """
    size = int(max(truth.max(), predicted.max())) + 1
    actual = np.bincount(truth, minlength=size)
    both = actual + np.bincount(predicted, minlength=size)
    tested = int((actual > 0).sum())
    each = np.where(actual > 0, 1 / np.maximum(both, 1), 0.0) / tested
    return {
        "balanced_accuracy": 1 / (tested * actual[truth]),
        "macro_f1": each[truth] + each[predicted],
    }


def _log_loss(losses: Weights, place: npt.NDArray[np.int64], confidence: float) -> Interval:
    sums, images = np.bincount(place, losses), np.bincount(place)
    drawn = np.concatenate([(w @ sums) / (w @ images) for w in resamples(len(sums))])
    value, (low, high) = float(losses.mean()), ends(drawn, confidence)
    return {
        "value": value,
        "low": min(low, value),
        "high": max(high, value),
        "confidence": confidence,
    }


def auroc(
    probabilities: Floats, truth: Labels, groups: npt.NDArray[np.int64], confidence: float
) -> Interval:
    """Return the area under the ROC curve, each class against the others, the mean over classes.

    ``truth``: of two classes or more; ``groups``: (N,) numbers.

    The variance is that of placements (of each image: the share of the other side that it is
    rightly ranked against), summed over classes and whole groups: DeLong, DeLong and Clarke-Pearson
    (1988), Biometrics 44; Obuchowski (1997), Nonparametric analysis of clustered ROC curve data,
    Biometrics 53. It takes one sort for each class, and room for N numbers. Where the classes are
    (nearly) separate it says too little: the interval is then that of the smallest class, or of
    what it is held against, since the variance of a class is at most area (1 - area) over the
    smaller side: Birnbaum and Klose (1957), Bounds for the variance of the Mann-Whitney statistic.
    """
    actual = np.bincount(truth)
    tested = np.flatnonzero(actual)
    share = np.zeros(len(truth))
    area = 0.0
    for number in tested:
        positive = truth == number
        scores = probabilities[:, number]
        above = placements(scores[positive], scores[~positive])
        below = 1 - placements(scores[~positive], scores[positive])
        area += float(above.mean()) / len(tested)
        share[positive] += above / (len(above) * len(tested))
        share[~positive] += (below - below.mean()) / (len(below) * len(tested))
    weights = 1 / (len(tested) * actual[truth])
    # Against the area of all: a class with one image would seem to have no variance.
    apart = np.bincount(groups, share - area * weights)
    # A wrong answer counts twice: in its own class, and in the one that the image is taken for.
    unit = 2 * group_weight(weights, groups, truth)
    low, high = effective_interval(area, float((apart**2).sum()), unit, confidence)
    return {"value": area, "low": low, "high": high, "confidence": confidence}


def placements(
    scores: npt.NDArray[np.floating[Any]], others: npt.NDArray[np.floating[Any]]
) -> Weights:
    """Return for each score (N,) the share of the others (M,) below it, with halves for ties.

    Its mean is the area under the ROC curve: Mann and Whitney (1947).
    """
    ranked = np.sort(others)
    below = np.searchsorted(ranked, scores, "left")
    return (below + np.searchsorted(ranked, scores, "right")) / (2 * len(others))


def calibration_error(
    probabilities: Floats, truth: Labels, groups: Sequence[str], confidence: float
) -> Interval | None:
    """Return the calibration error of the answers, in [0, 1], with its interval.

    It is the root of the mean squared difference between confidence and accuracy, over the bins of
    ``calibration_bins``. That difference is never zero, so the plain mean is too large; its
    expected noise is taken off, from the spread between groups, and the root of what is left is the
    value, 0 where nothing is. With fewer than two groups the noise, and so the error, is unknown:
    None.
    Source: Kumar, Liang and Ma (2019), Verified uncertainty calibration, section 5; where all
    images of a bin have one confidence and no groups, it is their estimator.

    The interval of the square is a basic bootstrap over groups about the corrected value: Davison
    and Hinkley (1997), Bootstrap methods, section 5.2. The bootstrap has no width where all groups
    agree, so the interval also spans what that of the accuracy leaves open: the mean square is at
    least the square of the difference between mean confidence and accuracy.
    """
    confidences = probabilities.max(axis=1).astype(np.float64)
    right = probabilities.argmax(axis=1) == truth
    gaps, place = confidences - right, group_numbers(groups)
    numbers = calibration_bins(confidences, place)
    if numbers is None:
        return None
    distinct = int(place.max()) + 1
    images, sums = np.zeros((2, distinct, BINS))
    np.add.at(images, (place, numbers), 1)
    np.add.at(sums, (place, numbers), gaps)

    def squares(weights: Weights) -> Weights:
        """Return the plain mean squares (B,), for how often each group counts (B, G)."""
        of_bins = weights @ images
        squared = (weights @ sums) ** 2 / np.maximum(of_bins, 1)
        found: Weights = squared.sum(axis=1) / of_bins.sum(axis=1)
        return found

    plain = float(squares(np.ones((1, distinct)))[0])
    square = plain - _noise(gaps, numbers, place)
    drawn = np.concatenate([squares(weights) for weights in resamples(distinct)])
    low, high = ends(drawn - drawn.mean(), confidence)
    value = math.sqrt(max(square, 0.0))
    accuracy = share_interval(right, place, confidence)
    mean = float(confidences.mean())
    closest = mean - min(max(mean, accuracy["low"]), accuracy["high"])
    furthest = max(abs(mean - accuracy[end]) for end in ("low", "high"))
    down = max(high, (mean - accuracy["value"]) ** 2 - closest**2)
    return {
        "value": value,
        "low": min(math.sqrt(max(square - down, 0.0)), value),
        "high": min(max(math.sqrt(max(square, 0.0) - min(low, 0.0)), furthest, value), 1.0),
        "confidence": confidence,
    }


def calibration_bins(confidences: Weights, place: Labels) -> Labels | None:
    """Return the bin of each image (N,): equally many in each, equal confidences together.

    ``confidences``: (N,) confidences; ``place``: (N,) number of each image's group, from 0.

    There are (number of groups)^(2/5) bins, at most ``BINS``: with more, the estimate follows the
    noise, with fewer it misses errors that cancel out within a bin. Where that leaves a bin with
    the images of one group, whose noise cannot be told from an error, there are fewer. None where
    all images are of one group.

    Source: Lee, Huang, Hassani and Dobriban (2023), T-Cal: an optimal test for the calibration of
    predictive models, JMLR 24: n^(2 / (4 s + 1)) bins detect the smallest calibration error of one
    probability with the debiased estimator; s = 1 where accuracy has a bounded slope.
    """
    groups = int(place.max()) + 1
    for bins in range(min(BINS, int(groups**0.4)), 0, -1):
        edges = np.quantile(confidences, np.arange(1, bins) / bins, method="inverted_cdf")
        numbers = np.searchsorted(edges, confidences, side="left").astype(np.int64)
        of_bins = np.bincount(np.unique(numbers * groups + place) // groups)
        if (of_bins != 1).all():  # some have no image, where many confidences are equal
            return numbers
    return None


def _noise(gaps: Weights, numbers: Labels, place: Labels) -> float:
    """Return by how much chance raises the mean squared gap: the variances of its bins, summed.

    Each bin has two groups at least.
    """
    noise = 0.0
    for number in np.unique(numbers):
        inside = numbers == number
        mean, (_, of_bin) = gaps[inside].mean(), np.unique(place[inside], return_inverse=True)
        apart, groups = np.bincount(of_bin, gaps[inside] - mean), int(of_bin.max()) + 1
        variance = float((apart**2).sum()) / inside.sum() ** 2 * groups / (groups - 1)
        noise += inside.mean() * variance
    return float(noise)


def softmax(logits: Floats) -> Floats:
    """Return the probabilities (N, C) of logits."""
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    found: Floats = raised / raised.sum(axis=1, keepdims=True)
    return found


def bin_numbers(confidence: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Return the bin of each confidence, from 0 to ``BINS`` - 1; its upper end belongs to a bin."""
    return np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)


def confusion_pairs(truth: Labels, predicted: Labels) -> Labels:
    """Return (K, 3) true class, predicted class, and their images, for the K pairs that occur.

    There are at most as many as images, where the matrix would have the square of the classes.
    Those with the most images come first.
    """
    pairs, images = np.unique(np.stack([truth, predicted], axis=1), axis=0, return_counts=True)
    found = np.column_stack([pairs, images]).astype(np.int64)
    return found[np.argsort(-images, kind="stable")]


def per_class(truth: Labels, predicted: Labels, classes: int) -> list[dict[str, Any]]:
    """Return precision, recall, F1 (0 where undefined) and the number of images of each class."""
    hits = np.bincount(truth[truth == predicted], minlength=classes)
    actual, answered = (np.bincount(each, minlength=classes) for each in (truth, predicted))

    def share(part: npt.NDArray[Any], whole: npt.NDArray[Any]) -> list[float]:
        found: list[float] = (part / np.maximum(whole, 1)).tolist()
        return found

    columns = {
        "precision": share(hits, answered),
        "recall": share(hits, actual),
        "f1": share(2 * hits, actual + answered),
        "images": actual.tolist(),
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
