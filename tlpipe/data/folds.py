"""Deal groups of images into folds: for ``split``, the linear probe's cross-validation, ``audit``.

Groups stay whole, since their images are not independent; each class is spread evenly.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from tlpipe.seeds import uniform

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
