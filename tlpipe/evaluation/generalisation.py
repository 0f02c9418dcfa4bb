"""Is the accuracy on test images below that on validation images, beyond chance?

Then the test images are others than those that training was tuned by (another camera, given splits
of other days), or validation was fitted. Either way validation promises what does not hold.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tlpipe.resampling import share_interval


def compare(
    validation: npt.NDArray[np.bool_],
    validation_groups: Sequence[str],
    test: npt.NDArray[np.bool_],
    test_groups: Sequence[str],
    confidence: float,
) -> dict[str, Any]:
    """Return both accuracies and the test accuracy less that of validation, with intervals.

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


def independent_difference(
    first: Mapping[str, float], second: Mapping[str, float]
) -> dict[str, float]:
    """Return by how much the second share is above the first, of other images, with its interval.

    ``first``, ``second``: as ``share_interval`` gives them, with one confidence.

    Source: Newcombe (1998), Interval estimation for the difference between independent proportions,
    Statistics in Medicine 17, method 10, the hybrid score interval; here on Wilson's intervals for
    effective numbers of images (``tlpipe.resampling``). It has a width also where both are 1.
    """
    value = second["value"] - first["value"]
    below = math.hypot(second["value"] - second["low"], first["high"] - first["value"])
    above = math.hypot(second["high"] - second["value"], first["value"] - first["low"])
    return {
        "value": value,
        "low": max(value - below, -1.0),
        "high": min(value + above, 1.0),
        "confidence": first["confidence"],
    }


def describe(found: Mapping[str, Any]) -> str:
    """Return what ``compare`` found in words."""
    validation, test, change = found["validation"], found["test"], found["difference"]
    verdict = "below beyond chance" if found["is_below"] else "not below beyond chance"
    return (
        f"{validation['value']:.4f} on {validation['images']} images held out, "
        f"{test['value']:.4f} on {test['images']} test images: {verdict} ({change['value']:+.4f}, "
        f"{change['confidence']:.0%} interval {change['low']:+.4f} to {change['high']:+.4f})"
    )
