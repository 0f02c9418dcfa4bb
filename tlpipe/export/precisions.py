"""Whether a graph in fewer bits is good enough to ship, by its answers for held-out images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tlpipe.export.parity import Labels, Logits
from tlpipe.held_out import HeldOut
from tlpipe.resampling import paired_difference, share_interval

# Of fp32's bytes without the last layer, which stays exact and grows with the classes. Eight bits
# are a quarter of thirty-two; the first layers, scales and the graph's structure add to that, a
# fifth in the smallest networks (half a million parameters).
MOST_BYTES = {"int8": 0.35, "fp16": 0.55}
_CONFIDENCE = 0.95
Correct = Callable[[Logits, Logits], tuple[Logits, Logits]]
# Of the spread of logits: about as much as eight bits move one.
_TIE = 0.05


@dataclass(frozen=True)
class Verdict:
    """What a graph in fewer bits answers beside the exact one, on held-out images.

    Attributes:
        accuracy_change: with its interval.
        agreement: share of images with the same answer, with its interval.
        size: share of fp32's bytes, the last layer left out of both.
        reason: why it does not ship, or empty.
        can_tell: whether a change below the bound is ruled out at 95 %; a graph that is good enough
            ships without that, as no more than some 400 images rule out one per cent.
    """

    accuracy_change: dict[str, Any]
    agreement: dict[str, Any]
    size: float
    reason: str
    can_tell: bool

    def __str__(self) -> str:
        """Say it in one line."""
        change, same = self.accuracy_change, self.agreement
        said = (
            f"accuracy {change['value']:+.4f} ({change['low']:+.4f} to {change['high']:+.4f}) "
            f"against fp32 on held-out images, the same answer for {same['value']:.1%}"
        )
        return said if self.can_tell else f"{said}; too few images to rule out more"


def out_of_fold_logits(held: HeldOut, taken: Logits, corrected: Correct | None) -> Logits:
    """Return the logits (N, C) of images by the head of the fold that held each of them out.

    Args:
        held: predictions of N images, with the folds' heads.
        taken: (N, D) what the last layer takes of them in the precision to be checked.
        corrected: changes a head as the last layer of this precision was changed.
    """
    logits = np.empty_like(held.logits)
    for fold, (weight, bias) in enumerate(held.heads):
        weight, bias = corrected(weight, bias) if corrected else (weight, bias)
        inside = held.folds == fold
        logits[inside] = taken[inside] @ weight.T + bias
    return logits


def judge(
    name: str,
    exact: Logits,
    other: Logits,
    truth: Labels,
    groups: Sequence[str],
    *,
    size: float,
    max_drop: float,
) -> Verdict:
    """Compare the answers of two graphs (N, C) for the same held-out images.

    ``groups``: (N,) names of images that belong together, or empty ones; ``size``: as in
    ``Verdict``; ``max_drop``: of accuracy.

    Processors differ in the last bits of logits, and where they do, an image that lies between two
    classes may count on one and not on the other. So that this does not decide what ships, an
    image within a twentieth of the logits' spread of a tie counts in part (``hits``).
    """
    tie = _TIE * float(exact.std())
    right, kept = hits(exact, truth, tie), hits(other, truth, tie)
    change = paired_difference(right, kept, groups, _CONFIDENCE)
    is_same = exact.argmax(axis=1) == other.argmax(axis=1)
    same = share_interval(is_same, groups, _CONFIDENCE)
    reasons = []
    if not np.isfinite(other).all():
        reasons.append("its logits are not finite")
    if change["value"] < -max_drop:
        reasons.append(
            f"its accuracy on {len(truth)} held-out images differs by {change['value']:+.4f} "
            f"({change['low']:+.4f} to {change['high']:+.4f}), expected at least {-max_drop:+g}"
        )
    if size > MOST_BYTES[name]:
        reasons.append(
            f"its size without the last layer is {size:.4f} of fp32's, expected at most "
            f"{MOST_BYTES[name]:g}"
        )
    # Accuracy cannot change by more than the share of answers that changed.
    least = max(change["low"], same["low"] - 1)
    return Verdict(change, same, size, "; ".join(reasons), can_tell=least >= -max_drop)


def hits(logits: Logits, truth: Labels, tie: float) -> npt.NDArray[np.float64]:
    """Return (N,) 1 for each image whose true class leads, 0 where another does.

    In between it rises in a straight line while the true class's logit goes from ``tie`` below the
    best of the others to ``tie`` above it. An image without finite logits counts 0.
    """
    images = np.arange(len(truth))
    others = logits.astype(np.float64)
    true = others[images, truth]
    others[images, truth] = -np.inf
    lead = true - others.max(axis=1)
    width = 2 * max(tie, 1e-30)  # all logits may be equal
    shares = np.clip(0.5 + lead / width, 0.0, 1.0)
    return np.where(np.isfinite(logits).all(axis=1), shares, 0.0)
