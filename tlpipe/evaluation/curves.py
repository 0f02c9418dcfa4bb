"""Curves from probabilities and true labels: reliability, risk-coverage, ROC, precision-recall."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tlpipe.evaluation.metrics import BINS, Floats, Labels, bin_numbers, placements
from tlpipe.resampling import group_numbers


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
    from scipy.stats import binom

    alone = np.unique(group_numbers(groups), return_index=True)[1]
    curve = coverage(confidence[alone], hits[alone])
    answered = np.rint(curve.coverage * len(alone)).astype(np.int64)
    wrong = answered - np.rint(curve.accuracy * answered).astype(np.int64)
    allowed = binom.ppf(1 - confidence_level, np.arange(len(alone) + 1), error_rate) - 1
    sizes = np.flatnonzero(np.diff(allowed, prepend=-1) > 0)
    threshold = math.inf
    for size in [*sizes, len(alone)]:
        # Equal confidences are answered together.
        place = int(np.searchsorted(answered, size))
        if wrong[place] > allowed[answered[place]]:
            break
        threshold = float(curve.threshold[place])
    return threshold


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
