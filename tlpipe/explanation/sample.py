"""Which images are shown: the worst mistakes, typical right answers, and those of the map."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tlpipe.data.manifest import evenly
from tlpipe.explanation import embedding
from tlpipe.explanation.inputs import Answer, Inputs
from tlpipe.explanation.maps import Network
from tlpipe.progress import meter

Ints = npt.NDArray[np.int64]
_MOST_POINTS = 10_000


@dataclass(frozen=True)
class Sample:
    """What is shown, and the features (N, D) of images of ``rows`` (N,), in ascending order.

    Attributes:
        wrong: the most confident mistakes, the worst first.
        right: typical right answers, those of the mistakes' classes first.
        looked_at: how many right answers those were chosen from.
        on_map: (N,) bool, which of the rows the map shows.
        total: how many images it could show.
    """

    wrong: Sequence[Answer]
    right: Sequence[Answer]
    looked_at: int
    rows: Ints
    features: npt.NDArray[np.float32]
    on_map: npt.NDArray[np.bool_]
    total: int

    def of(self, answers: Iterable[Answer]) -> npt.NDArray[np.float32]:
        """Return the features of some test images."""
        return self.features[np.searchsorted(self.rows, [answer.row for answer in answers])]


def choose(inputs: Inputs, network: Network, images: int, mistakes: int) -> Sample:
    """Choose the most confident mistakes, right answers in the middle of their classes, and a map.

    The map shows all images where they are few enough. Else a quarter of it are test images, the
    mistakes that are shown first.
    """
    data, labels = inputs.data, set(inputs.data.labels)
    known = [number for number, row in enumerate(inputs.rows) if row.label in labels]
    most = images if data.open_stages else _MOST_POINTS
    wrong = [answer for answer in inputs.answers if not answer.is_right]
    worst = sorted(wrong, key=lambda answer: -answer.probability)[:mistakes]
    tests = [answer.row for answer in inputs.answers]
    shown = set(known)
    if len(known) > most:
        quarter = -(-most // 4)
        shown = {answer.row for answer in worst[:quarter]}
        if room := quarter - len(shown):
            shown |= set(evenly(sorted(set(tests) - shown), room))
        if room := most - len(shown):
            shown |= set(evenly(sorted(set(known) - set(tests)), room))
    right = [answer for answer in inputs.answers if answer.is_right]
    hits = [answer for answer in right if answer.row in shown]
    hits = hits or [right[n] for n in evenly(range(len(right)), mistakes)]
    rows = np.array(sorted(shown.union(a.row for a in (*worst, *hits))), np.int64)
    with meter("features of images", total=len(rows)) as advancing:
        found = embedding.features(network, data, inputs.squares, rows, advancing)
    on_map = np.isin(rows, list(shown))
    sample = Sample(worst, (), len(hits), rows, found, on_map, len(known))
    typical = _typical(hits, sample.of(hits), worst, mistakes)
    return Sample(worst, typical, len(hits), rows, found, on_map, len(known))


def _typical(
    hits: Sequence[Answer],
    found: npt.NDArray[np.float32],
    wrong: Sequence[Answer],
    count: int,
) -> list[Answer]:
    """Return the hits nearest to the mean of the hits of their class, from each class in turn.

    Classes of the mistakes come first: those of their labels, then those that were answered.
    """
    labels = np.array([answer.label for answer in hits], np.int64)
    confused = [*(answer.label for answer in wrong), *(answer.predicted for answer in wrong)]
    by_class: list[list[Answer]] = []
    for label in dict.fromkeys([*confused, *np.unique(labels).tolist()]):
        places = np.flatnonzero(labels == label)
        if not len(places):
            continue
        centre = found[places].mean(axis=0, keepdims=True)
        order = embedding.nearest(centre, [found[places]], len(places)).positions[0]
        by_class.append([hits[places[n]] for n in order])
    turns = max(map(len, by_class), default=0)
    taken = [
        (number, some[turn])
        for turn in range(turns)
        for number, some in enumerate(by_class)
        if turn < len(some)
    ]
    return [answer for _, answer in sorted(taken[:count], key=lambda pair: pair[0])]
