"""Measure a classifier from its probabilities and the true labels: metrics, and the curves behind.

Curves are reliability, risk-coverage, ROC and precision-recall. Test accuracy is compared with that
on validation. All are pure functions on arrays.

Every metric has an interval. Images of one group (near copies, parts of one photo) count as one
where they are right or wrong together: see ``tlpipe.resampling``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tlpipe.resampling import (
    Weights,
    effective_interval,
    ends,
    group_numbers,
    group_weight,
    independent_difference,
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


def by_recall(per_class: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the classes that have test images, that which is found least often first.

    Example:
        >>> rows = {"a": (0.5, 4), "b": (0.25, 4), "c": (0.0, 0)}
        >>> by_recall({name: {"recall": r, "images": n} for name, (r, n) in rows.items()})
        ['b', 'a']
    """
    tested = [label for label, row in per_class.items() if row["images"]]
    return sorted(tested, key=lambda label: (per_class[label]["recall"], label))


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


class Bin(NamedTuple):
    """Images whose confidence lies in one bin: their mean confidence and accuracy."""

    confidence: float
    accuracy: float
    images: int


def reliability(probabilities: Floats, truth: Labels) -> list[Bin]:
    """Return the bins that have images, by rising confidence.

    Source: Niculescu-Mizil and Caruana (2005), Predicting good probabilities, section 4.
    """
    confidence = probabilities.max(axis=1).astype(np.float64)
    hits = probabilities.argmax(axis=1) == truth
    numbers = bin_numbers(confidence)
    return [
        Bin(float(confidence[inside].mean()), float(hits[inside].mean()), int(np.sum(inside)))
        for inside in (numbers == number for number in range(BINS))
        if inside.any()
    ]


@dataclass(frozen=True)
class Coverage:
    """Where only answers above a threshold are given: which share is, and how many are right.

    All (K,), from the highest threshold to the lowest; the last one answers for every image.
    """

    threshold: npt.NDArray[np.float64]
    coverage: npt.NDArray[np.float64]
    accuracy: npt.NDArray[np.float64]


def coverage(confidence: npt.NDArray[np.float64], hits: npt.NDArray[np.bool_]) -> Coverage:
    """Return the coverage-accuracy curve, a point for each distinct confidence.

    Source: El-Yaniv and Wiener (2010), On the foundations of noise-free selective classification.
    """
    order = np.argsort(-confidence, kind="stable")
    ranked = confidence[order]
    last = np.flatnonzero(np.append(ranked[1:] < ranked[:-1], True))
    answered = last + 1.0
    return Coverage(ranked[last], answered / len(ranked), np.cumsum(hits[order])[last] / answered)


def observed_threshold(curve: Coverage, error_rate: float) -> float:
    """Return the lowest threshold whose answers on these images were wrong at most so often.

    On other images more of them will be wrong, about as often as not: the threshold was picked for
    its luck too. See ``threshold_for``. ``inf`` where there is none.
    """
    good = np.flatnonzero(1 - curve.accuracy <= error_rate)
    return float(curve.threshold[good[-1]]) if len(good) else math.inf


def threshold_for(
    confidence: npt.NDArray[np.float64],
    hits: npt.NDArray[np.bool_],
    groups: Sequence[str],
    error_rate: float,
    confidence_level: float,
) -> float:
    """Return a threshold whose answers are wrong at most so often on other images too.

    ``confidence``, ``hits``, ``groups``: (N,), of images that did not train; one of each group
    counts, the first. An image is answered where its confidence is at least the threshold. With
    probability ``confidence_level`` over such images its error rate is at most ``error_rate``;
    ``inf`` where no threshold is known to be so good. ``images_needed`` says from how many images
    on.

    So many answers may be wrong that more would be likely at the error rate: the binomial bound of
    Geifman and El-Yaniv (2017), Selective classification for deep neural networks. From the most
    confident images on, each number of them is tested at which one more may be wrong, until the
    first that fails. Since their order is fixed before, each test may have the whole probability:
    Angelopoulos, Bates, Candes, Jordan and Lei (2021), Learn then test, fixed sequence testing.
    (The binary search of the former divides it, and starts at half of the images.)
    """
    alone = np.unique(group_numbers(groups), return_index=True)[1]
    curve = coverage(confidence[alone], hits[alone])
    answered = np.rint(curve.coverage * len(alone)).astype(np.int64)
    wrong = answered - np.rint(curve.accuracy * answered).astype(np.int64)
    allowed = _wrong_allowed(len(alone), error_rate, 1 - confidence_level)
    sizes = np.flatnonzero(np.diff(allowed, prepend=-1) > 0)
    threshold = math.inf
    for size in [*sizes, len(alone)]:
        # Equal confidences are answered together.
        place = int(np.searchsorted(answered, size))
        if wrong[place] > allowed[answered[place]]:
            break
        threshold = float(curve.threshold[place])
    return threshold


def _wrong_allowed(most: int, error_rate: float, likely: float) -> Labels:
    """Return, for 0 to ``most`` answers, how many wrong ones show that the error rate is lower.

    So few or fewer are less probable at ``error_rate`` than ``likely``; -1 where none are so few.
    """
    from scipy.special import bdtr  # scipy.stats takes longer to import than all else here

    allowed, wrong = [-1], -1
    likely -= 1e-12  # equal but for rounding is not less
    for answers in range(1, most + 1):
        while bdtr(wrong + 1, answers, error_rate) < likely:
            wrong += 1
        allowed.append(wrong)
    return np.array(allowed)


def images_needed(error_rate: float, confidence_level: float) -> int:
    """Return how many images ``threshold_for`` needs, were all answers right."""
    return math.ceil(math.log(1 - confidence_level) / math.log(1 - error_rate))


class Ranking(NamedTuple):
    """Of one class against the others, by falling threshold: rates in [0, 1], all (K,)."""

    false_positives: npt.NDArray[np.float64]
    recall: npt.NDArray[np.float64]
    precision: npt.NDArray[np.float64]


def ranking(scores: Floats, positive: npt.NDArray[np.bool_]) -> Ranking:
    """Return the points of the ROC and of the precision-recall curve."""
    order = np.argsort(-scores, kind="stable")
    inside = positive[order]
    last = np.flatnonzero(np.append(np.diff(scores[order]) < 0, True))
    true, false = np.cumsum(inside)[last], np.cumsum(~inside)[last]
    return Ranking(
        false / max(int((~positive).sum()), 1),
        true / max(int(positive.sum()), 1),
        true / (true + false),
    )


def ood_auroc(known: npt.NDArray[np.float64], ood: npt.NDArray[np.float64]) -> float:
    """Return the AUROC of telling images of known classes from out-of-distribution ones.

    ``known``, ``ood``: (N,), (M,) confidences; ties count half.
    """
    return float(placements(known, ood).mean())


def compare_validation(
    validation: npt.NDArray[np.bool_],
    validation_groups: Sequence[str],
    test: npt.NDArray[np.bool_],
    test_groups: Sequence[str],
    confidence: float,
) -> dict[str, Any]:
    """Return both accuracies and the test accuracy less that of validation, with intervals.

    Where the accuracy on test images is below that on validation images beyond chance, the test
    images are others than those that training was tuned by (another camera, given splits of other
    days), or validation was fitted. Either way validation promises what does not hold.

    ``validation``: (M,) which answers are right for images held out of training (``held_out``);
    ``test``: (N,); each with the group of every image. ``is_below`` says whether the interval of
    the difference lies below 0: by chance alone with the probability (1 - ``confidence``) / 2.
    """
    parts: dict[str, dict[str, Any]] = {}
    for name, hits, groups in (
        ("validation", validation, validation_groups),
        ("test", test, test_groups),
    ):
        parts[name] = {"images": len(hits)} | share_interval(hits, groups, confidence)
    difference = independent_difference(parts["validation"], parts["test"])
    return {**parts, "difference": difference, "is_below": difference["high"] < 0}


def why_no_threshold(found: Mapping[str, Any]) -> str:
    """Say why no threshold was found: copies or too few of images held out, or too many errors.

    ``found``: the report's section ``abstention``.
    """
    images, needed = found["images"], found["images_needed"]
    if found["is_copied"]:
        return "training has seen copies of the images it would be looked for on"
    if images < needed:
        return f"{images} independent images held out are too few, {needed} or more are needed"
    return f"too many of {images} independent images held out are answered wrongly"


def describe_gap(found: Mapping[str, Any]) -> str:
    """Return what ``compare_validation`` found in words."""
    validation, test, change = found["validation"], found["test"], found["difference"]
    verdict = "below beyond chance" if found["is_below"] else "not below beyond chance"
    return (
        f"{validation['value']:.4f} on {validation['images']} images held out, "
        f"{test['value']:.4f} on {test['images']} test images: {verdict} ({change['value']:+.4f}, "
        f"{change['confidence']:.0%} interval {change['low']:+.4f} to {change['high']:+.4f})"
    )
