"""Which images are proposed, against what clusters and probabilities are made to be."""

import itertools
import warnings

import numpy as np
import numpy.typing as npt
import pytest

from tlpipe.labelling.proposals import Known, propose

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
NOTHING = Known.nothing(("a", "b", "c"))


def clusters(*sizes: int, spread: float = 0.05) -> tuple[Floats, Labels]:
    """Return features around orthogonal directions, and which of these each has."""
    random = np.random.default_rng(0)
    of = np.repeat(np.arange(len(sizes)), sizes)
    noise = spread * random.normal(size=(len(of), 8))
    return np.eye(8)[of] + noise, of


def opened(count: int) -> Labels:
    return np.full(count, -1, np.int64)


def test_without_labels_each_cluster_is_covered_the_largest_first() -> None:
    features, of = clusters(30, 20, 10)
    assert of[propose(features, opened(60), NOTHING, 3)].tolist() == [0, 1, 2]


def test_what_the_project_has_is_covered_already() -> None:
    features, of = clusters(30, 20, 10)
    known = Known(features[:5], np.zeros(5, np.int64), ("a", "b", "c"))
    assert of[propose(features, opened(60), known, 2)].tolist() == [1, 2]


def test_greedy_covers_nearly_as_well_as_the_best_of_all_choices() -> None:
    """The greedy choice is at least 1 - 1/e as good (Nemhauser, Wolsey and Fisher, 1978)."""
    features = np.random.default_rng(1).normal(size=(12, 8))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    squares = ((unit[:, None] - unit[None]) ** 2).sum(axis=2)
    alike = np.exp(-squares / (0.25 * np.median(squares)))

    def covered(chosen: list[int]) -> float:
        return float(alike[:, chosen].max(axis=1).sum())

    best = max(covered(list(some)) for some in itertools.combinations(range(12), 3))
    chosen = propose(features, opened(12), NOTHING, 3)
    assert covered(chosen) >= (1 - 1 / np.e) * best
    assert covered(chosen[:1]) == pytest.approx(max(covered([row]) for row in range(12)))


def test_unsure_images_go_first_where_coverage_is_the_same() -> None:
    features, of = clusters(10, 10, 10, 10, spread=0.01)
    # Between the two labelled directions, and far from both.
    features[20:30] = (np.eye(8)[0] + np.eye(8)[1]) / np.sqrt(2) + features[20:30] - np.eye(8)[2]
    features[30:] += 3 * np.eye(8)[0]
    labels = opened(40)
    labels[[0, 1]], labels[[10, 11]] = 0, 1
    assert of[propose(features, labels, Known.nothing(("a", "b")), 1)].tolist() == [2]


def test_what_was_decided_is_not_proposed_again() -> None:
    features, _ = clusters(5, 5)
    labels = opened(10)
    labels[:4], labels[4] = 0, -2
    assert sorted(propose(features, labels, NOTHING, 50)) == [5, 6, 7, 8, 9]


def test_nothing_is_proposed_where_nothing_is_open() -> None:
    features, of = clusters(5, 5)
    with warnings.catch_warnings(action="error"):
        assert propose(features, of, NOTHING, 3) == []


def test_the_same_images_in_the_same_order() -> None:
    features, _ = clusters(20, 20)
    assert propose(features, opened(40), NOTHING, 10) == propose(features, opened(40), NOTHING, 10)
