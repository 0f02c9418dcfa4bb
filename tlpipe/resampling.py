"""Folds, bootstrap and intervals for images of which some belong together: near copies, one photo.

Groups stay whole, since their images are not independent. Folds spread each class evenly. Shares
(accuracy and whatever is a weighted mean of right answers) get Wilson's interval on an effective
number of images; other numbers get the bootstrap over groups.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from tlpipe.runtime import generator, uniform

ALWAYS_TRAINS = -1


def deal(
    classes: Mapping[str, Collection[str]],
    folds: int,
    seed: int,
    placed: Mapping[str, int],
    *,
    of_equal_size: bool,
) -> dict[str, int]:
    """Return the fold of every group, from 0 to ``folds`` - 1.

    The class with the fewest groups is dealt first; each group goes to the fold that has the fewest
    of its class. Groups are dealt in an order drawn with ``seed``.

    Args:
        classes: the groups of each class; a group may stand in several.
        folds: how many folds.
        seed: draws the order.
        placed: folds of groups that stay where they are.
        of_equal_size: whether of several such folds it is the smallest, or the first. The first
            keeps the shares of classes alike in all folds, also where a class has fewer groups
            than there are folds.
    """
    labels: dict[str, list[str]] = defaultdict(list)
    for label, groups in classes.items():
        for group in groups:
            labels[group].append(label)
    result = dict(placed)
    total = Counter(result.values())
    by_class: dict[str, Counter[int]] = defaultdict(Counter)
    for group, fold in result.items():
        for label in labels[group]:
            by_class[label][fold] += 1
    for label in sorted(classes, key=lambda label: (len(classes[label]), label)):
        free = set(classes[label]) - result.keys()
        for group in sorted(free, key=lambda group: (uniform(seed, group), group)):
            fold = min(
                range(folds), key=lambda f: (by_class[label][f], total[f] * of_equal_size, f)
            )
            result[group] = fold
            total[fold] += 1
            for other in labels[group]:
                by_class[other][fold] += 1
    return result


def held_out_folds(
    labels: Sequence[str], groups: Sequence[str], folds: int
) -> npt.NDArray[np.int64]:
    """Return for each image the fold that holds it out, ``ALWAYS_TRAINS`` where none can.

    A class that stands in one fold alone would be unknown to what trains on the others, so its
    images are held out by none. Classes of two groups all stand in the first two folds: a fold that
    held out half of one class and nothing of another would tilt its head against what it answers.

    Args:
        labels: one for each image, (N,).
        groups: one for each image, (N,); equal ones share a fold.
        folds: how many folds.
    """
    classes: dict[str, set[str]] = defaultdict(set)
    for label, group in zip(labels, groups, strict=True):
        classes[label].add(group)
    dealt = deal(classes, folds, seed=0, placed={}, of_equal_size=False)
    for members in classes.values():
        if len({dealt[group] for group in members}) == 1:
            dealt |= dict.fromkeys(members, ALWAYS_TRAINS)
    return np.array([dealt[group] for group in groups], np.int64)


Weights = npt.NDArray[np.float64]
_RESAMPLES, _AT_ONCE = 1000, 50


def group_numbers(groups: Sequence[str]) -> npt.NDArray[np.int64]:
    """Return the number of each image's group, (N,) from 0; with the empty name it is alone."""
    names = [group or f"\n{number}" for number, group in enumerate(groups)]
    return np.unique(names, return_inverse=True)[1].astype(np.int64)


def resamples(groups: int) -> Iterator[Weights]:
    """Yield how often each of so many groups counts in each resampling, (B, G) in parts.

    Groups are drawn with replacement, always the same for the same number.

    Source: Efron and Tibshirani (1993), An introduction to the bootstrap, sections 6 and 13.3;
    Davison and Hinkley (1997), Bootstrap methods, section 3.8, for whole groups.
    """
    random = generator(0, "resamples")
    for _ in range(0, _RESAMPLES, _AT_ONCE):
        counts = [
            np.bincount(random.integers(groups, size=groups), minlength=groups)
            for _ in range(_AT_ONCE)
        ]
        yield np.stack(counts).astype(np.float64)


def ends(drawn: Weights, confidence: float) -> tuple[float, float]:
    """Return between which values so large a share of the resampled ones lies."""
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(drawn, [tail, 1 - tail])
    return float(low), float(high)


def wilson_interval(successes: float, trials: float, confidence: float) -> tuple[float, float]:
    """Return the interval of a proportion, both ends in [0, 1]; numbers need not be whole.

    Source: Wilson (1927), Probable inference, the law of succession, and statistical inference,
    JASA 22; it holds for small samples and for proportions near 0 and 1.
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = min(max(successes / trials, 0.0), 1.0)
    centre = share + z * z / (2 * trials)
    half_width = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    low, high = (centre - half_width) / scale, (centre + half_width) / scale
    # Where all or none succeeded, one end is the share itself but for rounding.
    return min(max(low, 0.0), share), max(min(high, 1.0), share)


def share_interval(
    right: npt.NDArray[np.bool_] | npt.NDArray[np.float64],
    groups: Sequence[str] | npt.NDArray[np.int64],
    confidence: float,
    *,
    weights: Weights | None = None,
    classes: npt.NDArray[np.int64] | None = None,
) -> dict[str, float]:
    """Return the weighted share of right answers, in [0, 1], with its interval.

    ``right``: (N,), at least one; ``groups``: name or number of each image's group; ``weights``:
    (N,), they sum to 1, by default all are equal; ``classes``: (N,) numbers, given where mistakes
    may gather in one class, as for a mean over classes.

    The interval is Wilson's on the effective number of images (see ``effective_interval``), with
    the variance between groups. Images without groups give Wilson's interval exactly; copies of
    images, each with its copies in one group, give the interval of the images without copies.
    """
    number = len(right)
    place = groups if isinstance(groups, np.ndarray) else group_numbers(groups)
    share = np.full(number, 1 / number) if weights is None else weights
    value = float(right.mean() if weights is None else share @ right)
    variance = float((np.bincount(place, share * (right - value)) ** 2).sum())
    unit = group_weight(share, place, classes)
    low, high = effective_interval(value, variance, unit, confidence, most=1 / float(share @ share))
    return {"value": value, "low": low, "high": high, "confidence": confidence}


def group_weight(
    weights: Weights, place: npt.NDArray[np.int64], classes: npt.NDArray[np.int64] | None = None
) -> float:
    """Return the weight of one group of the usual size, of the class where it is largest.

    The mean over groups, by weight: Kish (1965), Survey sampling, section 11.7. Without groups and
    classes it is 1 / N.
    """
    stratum = np.zeros(len(place), np.int64) if classes is None else classes
    cells, inside = np.unique(stratum * (int(place.max()) + 1) + place, return_inverse=True)
    of_cells = np.bincount(inside, weights)
    of_class = cells // (int(place.max()) + 1)
    total = np.bincount(of_class, of_cells)
    return float((np.bincount(of_class, of_cells**2)[total > 0] / total[total > 0]).max())


def effective_interval(
    value: float, variance: float, unit: float, confidence: float, *, most: float = math.inf
) -> tuple[float, float]:
    """Return Wilson's interval of a mean in [0, 1] on its effective number of images, at ``most``.

    ``variance``: of the mean, estimated between groups; ``unit``: the weight of one group.

    The effective number is value (1 - value) / variance: Korn and Graubard (1998), Confidence
    intervals for proportions with small expected number of positive counts estimated from survey
    data, Survey Methodology 24. Where (nearly) all are right or wrong, or groups are few, that
    variance is unknown or far too small. So one more group counts, with all of its images on the
    other side: value (1 - value) + unit over variance + unit^2. For images without groups this
    changes nothing; where all are right it leaves 1 / unit trials, all of them right. For a mean
    over C classes whose smallest has n groups that is C n trials, and their bound holds whatever
    class mistakes gather in: the chance that none shows, a product of (1 - error of a class) to the
    power of its groups, is at most (1 - mean error)^(C n), by the inequality of the means.
    """
    trials = min((value * (1 - value) + unit) / (variance + unit**2), most)
    return wilson_interval(value * trials, trials, confidence)


def independent_difference(
    first: Mapping[str, float], second: Mapping[str, float]
) -> dict[str, float]:
    """Return by how much the second share is above the first, of other images, with its interval.

    ``first``, ``second``: as ``share_interval`` gives them, with one confidence.

    Source: Newcombe (1998), Interval estimation for the difference between independent proportions,
    Statistics in Medicine 17, method 10, the hybrid score interval; here on Wilson's intervals for
    effective numbers of images. It has a width also where both are 1.
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


def paired_difference(
    first: npt.NDArray[np.bool_] | npt.NDArray[np.float64],
    second: npt.NDArray[np.bool_] | npt.NDArray[np.float64],
    groups: Sequence[str],
    confidence: float,
) -> dict[str, float]:
    """Return by how much more often the second is right on the same images, with its interval.

    ``first``, ``second``: (N,) which answers are right, or by what share in [0, 1] each counts.

    The difference is the share that became right less the share that became wrong. Their intervals
    are combined, so the result has a width even where nothing changed: a change that none of n
    images shows may still happen for some 4 in n.

    Source: Newcombe (1998), Improved confidence intervals for the difference between binomial
    proportions based on paired data, Statistics in Medicine 17; Zou and Donner (2008), Construction
    of confidence limits about effect measures, Statistics in Medicine 27, equation 3, with the
    correlation of the two shares.
    """
    place = group_numbers(groups)
    gained = second.astype(np.float64) - first.astype(np.float64)
    changes = (np.maximum(gained, 0), np.maximum(-gained, 0))
    up, down = (share_interval(change, place, confidence) for change in changes)
    value = float(gained.mean())  # rounded once: two of 200 images are 0.01, no bit more
    apart = [
        np.bincount(place, change - share["value"])
        for change, share in zip(changes, (up, down), strict=True)
    ]
    size = math.sqrt(float((apart[0] ** 2).sum() * (apart[1] ** 2).sum()))
    # Of a single group nothing is known but rounding.
    correlation = float(apart[0] @ apart[1]) / size if size and len(apart[0]) > 1 else 0.0

    def width(one: float, other: float) -> float:
        return math.sqrt(max(one**2 + other**2 - 2 * correlation * one * other, 0.0))

    low = value - width(up["value"] - up["low"], down["high"] - down["value"])
    high = value + width(up["high"] - up["value"], down["value"] - down["low"])
    return {
        "value": value,
        "low": max(low, -1.0),
        "high": min(high, 1.0),
        "confidence": confidence,
    }


_POWER = NormalDist().inv_cdf(0.8)  # four of five cases


def detectable_drop(
    first: npt.NDArray[np.bool_],
    second: npt.NDArray[np.bool_],
    groups: Sequence[str],
    confidence: float,
) -> float:
    """Return the smallest drop that shows in four of five cases (a power of 0.8), in [0, 1].

    ``first``, ``second``, ``groups``: as of ``paired_difference``; a drop shows where its interval
    ends below 0. As many images are gained by chance as are now changed the rarer way round, and
    the drop is lost beside them, so the variance grows with it. Groups count as whole.

    Source: Bloom (1995), Minimum detectable effects, Evaluation Review 19: the standard error times
    the sum of the quantiles for confidence and power; the variance of a paired difference: Newcombe
    (1998), as there. Effective number of groups: Kish (1965), Survey sampling, section 11.7.
    """
    sizes = np.bincount(group_numbers(groups))
    effective = len(first) ** 2 / float((sizes.astype(np.float64) ** 2).sum())
    gained = min(float((second & ~first).mean()), float((first & ~second).mean()))
    quantiles = NormalDist().inv_cdf(0.5 + confidence / 2) + _POWER
    unit = quantiles**2 / effective  # drop^2 = unit (2 gained + drop - drop^2)
    drop = (unit + math.sqrt(unit**2 + 8 * gained * unit * (1 + unit))) / (2 * (1 + unit))
    return min(drop, 1.0)


def images_to_tell(change: Mapping[str, float], images: int, max_drop: float) -> int:
    """Return of how many images the interval ends above ``-max_drop`` in four of five cases.

    ``change``: what ``paired_difference`` gives for so many ``images``, itself above ``-max_drop``.
    """
    sure = NormalDist().inv_cdf(0.5 + change["confidence"] / 2)
    half = (change["value"] - change["low"]) * (1 + _POWER / sure)
    return math.ceil(images * (half / (change["value"] + max_drop)) ** 2)
