"""What mistakes are like: the nearest images that the model was fitted on, and what they say."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tlpipe.explanation import embedding
from tlpipe.explanation.figures import Figure, Picture, Row
from tlpipe.explanation.inputs import Answer, Inputs
from tlpipe.explanation.sample import Sample

Ints = npt.NDArray[np.int64]
_NEIGHBOURS = 5
_SPARE = 4  # times as many as are shown, since of those of one group a single one is
_CHANCE = 0.05
_BLOCK = 4096


@dataclass(frozen=True)
class Near:
    """The figure; of how many mistakes neighbours could speak against the label, and do."""

    figure: Figure
    asked: int
    doubtful: int


def find(inputs: Inputs, sample: Sample) -> Near:
    """Return the images nearest to mistakes, of all that the model was fitted on or a sample."""
    labels, fitted = inputs.data.labels, inputs.fitted.rows
    title = "Images it learned from that each mistake is most like"
    if not sample.wrong:
        why = "There are none: no test image was answered wrongly."
        return Near(Figure("neighbours", title, why), 0, 0)
    if inputs.data.open_stages:
        is_fitted = np.isin(sample.rows, fitted)
        others = sample.rows[is_fitted]
        blocks: Iterable[npt.NDArray[np.float32]] = [sample.features[is_fitted]]
    else:
        others, blocks = fitted, _stored(inputs, fitted)
    _, groups = np.unique(
        [group or str(row) for row, group in enumerate(inputs.data.groups)], return_inverse=True
    )
    found = embedding.nearest(
        sample.of(sample.wrong),
        blocks,
        _SPARE * _NEIGHBOURS,
        own=groups[[answer.row for answer in sample.wrong]],
        groups=groups[others],
    )
    number = {label: n for n, label in enumerate(labels)}
    searched = [number[inputs.rows[row].label] for row in others.tolist()]
    counts = np.bincount(searched, minlength=len(labels))
    rows, said = [], []
    for answer, positions, cosines in zip(
        sample.wrong, found.positions, found.cosines, strict=True
    ):
        near: dict[int, tuple[int, float]] = {}
        for row, cosine in zip(others[positions].tolist(), cosines.tolist(), strict=True):
            if cosine > -math.inf:
                near.setdefault(int(groups[row]), (row, cosine))
        chosen = list(near.values())[:_NEIGHBOURS]
        of = [number[inputs.rows[row].label] for row, _ in chosen]
        note, is_doubtful = hint(answer, of, counts, labels)
        said.append(is_doubtful)
        images = inputs.images([answer.row, *(row for row, _ in chosen)])
        pictures = [Picture(images[0], f"the mistake: {labels[answer.label]}")]
        pictures += [
            Picture(image, f"{labels[label]}, cosine {cosine:.2f}")
            for image, label, (_, cosine) in zip(images[1:], of, chosen, strict=True)
        ]
        if answer.row in inputs.issues:
            note += f" audit suggests {labels[inputs.issues[answer.row]]}."
        rows.append(Row(answer.describe(labels), pictures, f"{note} {answer.path}"))
    among = f"{len(others):,}"
    if len(others) < len(fitted):
        among += f" of {len(fitted):,}"
    reading = (
        f"Beside each mistake stand the nearest of {among} images that the model was fitted on, by "
        f"the cosine between features (1: the same direction); of near copies one, and none of the "
        f"mistake itself. Where all {_NEIGHBOURS} carry the label that was answered, and its share "
        f"of the images would hardly give that, the mistake's own label may be wrong: look at the "
        f"image."
    )
    asked = [is_doubtful for is_doubtful in said if is_doubtful is not None]
    return Near(Figure("neighbours", title, reading, rows), len(asked), sum(asked))


def _stored(inputs: Inputs, rows: Ints) -> Iterator[npt.NDArray[np.float32]]:
    features = inputs.data.activations.features
    for start in range(0, len(rows), _BLOCK):
        yield features[rows[start : start + _BLOCK]].astype(np.float32)
        features.unmap()


def hint(
    answer: Answer, near: Sequence[int], counts: Ints, labels: Sequence[str]
) -> tuple[str, bool | None]:
    """Say what the labels of the nearest images speak for, and whether against the label.

    That is None where it cannot be told: fewer than five are near, or were searched of the label
    or of what was answered.

    Args:
        answer: the mistake.
        near: numbers of the labels of the nearest images, nearest first.
        counts: (C,) how many images of each class were searched.
        labels: their names.
    """
    asked = (answer.predicted, answer.label)
    counted = [int(counts[number]) for number in asked]
    if min(len(near), *counted) < _NEIGHBOURS:
        return "too few images were searched to say anything of the label.", None
    total = int(counts.sum())
    named = [near.count(number) for number in asked]
    wrong, right = (labels[number] for number in asked)
    said = (
        f"nearest: {named[0]} of {len(near)} {wrong}, {named[1]} {right}; searched: "
        f"{counted[0]:,} of {total:,} {wrong}, {counted[1]:,} {right}"
    )
    is_rare = [
        _at_least(some, len(near), count / total) < _CHANCE
        for some, count in zip(named, counted, strict=True)
    ]
    if named[0] == len(near) and is_rare[0]:
        return f"{said}: is the label wrong?", True
    if 2 * named[1] > len(near) and is_rare[1]:
        return f"{said}: the label fits, the answer does not.", False
    return f"{said}.", False


def _at_least(successes: int, trials: int, share: float) -> float:
    """Return the probability of so many successes or more (binomial)."""
    return sum(
        math.comb(trials, k) * share**k * (1 - share) ** (trials - k)
        for k in range(successes, trials + 1)
    )
