"""Measure a classifier from its probabilities and the true labels. Pure functions on arrays."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


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


def log_loss(probabilities: Floats, truth: Labels) -> float:
    """Return the mean negative log probability of the true class, in nats."""
    chosen = probabilities[np.arange(len(truth)), truth].astype(np.float64)
    return float(-np.log(np.clip(chosen, 1e-12, None)).mean())


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


def measure(probabilities: Floats, truth: Labels, confidence: float) -> dict[str, Any]:
    """Return every number of the report; accuracy with its interval, macro F1 of tested classes."""
    classes = probabilities.shape[1]
    predicted = probabilities.argmax(axis=1)
    confusion = confusion_matrix(truth, predicted, classes)
    correct, images = int(np.trace(confusion)), len(truth)
    low, high = wilson_interval(correct, images, confidence)
    rows = per_class(confusion)
    tested = [row for row in rows if row["images"]]
    return {
        "accuracy": {"value": correct / images, "low": low, "high": high, "confidence": confidence},
        "macro_f1": sum(row["f1"] for row in tested) / len(tested),
        "log_loss": log_loss(probabilities, truth),
        "per_class": rows,
        "confusion": confusion.tolist(),
    }
