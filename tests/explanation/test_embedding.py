"""Images as points: neighbours and the map, against scikit-learn and NumPy."""

import numpy as np
import pytest
from sklearn.manifold import trustworthiness
from sklearn.neighbors import NearestNeighbors

from tlpipe.explanation.embedding import nearest, place

RANDOM = np.random.default_rng(3)
FOUND = RANDOM.normal(size=(300, 20)).astype(np.float32)


@pytest.mark.parametrize("block", [7, 300])
def test_nearest_images_are_those_of_scikit_learn(block: int) -> None:
    queries = RANDOM.normal(size=(11, 20)).astype(np.float32)
    blocks = (FOUND[start : start + block] for start in range(0, 300, block))
    found = nearest(queries, blocks, 5)
    distances, expected = (
        NearestNeighbors(n_neighbors=5, metric="cosine").fit(FOUND).kneighbors(queries)
    )
    assert (found.positions == expected).all()
    np.testing.assert_allclose(found.cosines, 1 - distances, atol=1e-6)


def test_fewer_images_than_neighbours_are_all_of_them() -> None:
    found = nearest(FOUND[:2], [FOUND[:3]], 5)
    assert found.positions.shape == (2, 3)
    assert found.positions[:, 0].tolist() == [0, 1]


def test_a_few_images_are_placed_by_their_principal_components() -> None:
    few = FOUND[:30] * np.linspace(3, 1, 20, dtype=np.float32)
    placed = place(few)
    centred = few.astype(np.float64) - few.mean(axis=0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    expected = centred @ directions[:2].T
    for axis in (0, 1):
        assert abs(np.corrcoef(placed[:, axis], expected[:, axis])[0, 1]) > 0.9999
    # One scale for both axes: the longer one is 1.
    spans = np.ptp(expected, axis=0)
    np.testing.assert_allclose(np.ptp(placed, axis=0), spans / spans.max(), rtol=1e-3)
    assert placed.min() == 0


def test_equal_images_have_a_place() -> None:
    assert np.isfinite(place(np.ones((20, 4), np.float32))).all()


def test_neighbours_stay_neighbours_and_places_are_the_same_each_time() -> None:
    centres = RANDOM.normal(size=(6, 20)) * 6
    clouds = (centres[np.arange(240) % 6] + RANDOM.normal(size=(240, 20))).astype(np.float32)
    placed = place(clouds)
    assert trustworthiness(clouds, placed, n_neighbors=10) > 0.9
    assert (place(clouds) == placed).all()


def test_rows_of_ones_own_group_are_no_neighbours() -> None:
    groups = np.arange(300) // 3
    queries = FOUND[[7, 100]]
    found = nearest(queries, [FOUND[:128], FOUND[128:]], 5, own=groups[[7, 100]], groups=groups)
    for n, row in enumerate((7, 100)):
        others = np.flatnonzero(groups != groups[row])
        _, expected = (
            NearestNeighbors(n_neighbors=5, metric="cosine")
            .fit(FOUND[others])
            .kneighbors(FOUND[[row]])
        )
        assert (found.positions[n] == others[expected[0]]).all()
