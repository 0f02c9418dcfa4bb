"""What a classifier trades for what: curves from probabilities and true labels. Pure functions."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tlpipe.metrics.scores import BINS, Floats, Labels, auroc, bin_numbers

Exact = npt.NDArray[np.float64]
Hits = npt.NDArray[np.bool_]


class Bin(NamedTuple):
    """Images whose confidence lies in one bin: how sure the classifier is, and how often right."""

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

    threshold: Exact
    coverage: Exact
    accuracy: Exact


def coverage(confidence: Exact, hits: Hits) -> Coverage:
    """Return the coverage-accuracy curve, a point for each distinct confidence.

    Source: El-Yaniv and Wiener (2010), On the foundations of noise-free selective classification.
    """
    order = np.argsort(-confidence, kind="stable")
    ranked = confidence[order]
    last = np.flatnonzero(np.append(ranked[1:] < ranked[:-1], True))
    answered = last + 1.0
    return Coverage(ranked[last], answered / len(ranked), np.cumsum(hits[order])[last] / answered)


def threshold_for(curve: Coverage, error_rate: float) -> float:
    """Return the lowest threshold above which no more answers are wrong; 1 where there is none."""
    good = np.flatnonzero(1 - curve.accuracy <= error_rate)
    return float(curve.threshold[good[-1]]) if len(good) else 1.0


class Ranked(NamedTuple):
    """Of one class against the others, by falling threshold: rates in [0, 1], all (K,)."""

    false_positives: Exact
    recall: Exact
    precision: Exact


def ranked(scores: Floats, positive: Hits) -> Ranked:
    """Return the points of the ROC and of the precision-recall curve."""
    order = np.argsort(-scores, kind="stable")
    inside = positive[order]
    last = np.flatnonzero(np.append(np.diff(scores[order]) < 0, True))
    true, false = np.cumsum(inside)[last], np.cumsum(~inside)[last]
    return Ranked(
        false / max(int((~positive).sum()), 1),
        true / max(int(positive.sum()), 1),
        true / (true + false),
    )


def separation(known: Exact, unknown: Exact) -> float:
    """Return the chance that a known image scores above an unknown one, with halves for ties."""
    is_known = np.arange(len(known) + len(unknown)) < len(known)
    once = np.ones((1, len(is_known)))
    return float(auroc(np.concatenate([known, unknown]), is_known, once)[0])
