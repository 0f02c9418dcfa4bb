import numpy as np
import pytest

from tlpipe.training import head as heads

Blobs = tuple[heads.Floats, heads.Labels]


@pytest.fixture(scope="module")
def blobs() -> Blobs:
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, 400)
    features = random.normal(size=(4, 20))[labels] + 1.5 * random.normal(size=(400, 20))
    return features, labels


def solve(
    blocks: list[Blobs], weights: heads.Floats | None = None, **options: object
) -> heads.Head:
    count = sum(len(labels) for _, labels in blocks)
    given = np.ones(count) if weights is None else weights
    defaults = {"classes": 4, "l2": 0.05, "max_iterations": 2000, "tolerance": 1e-14}
    solution = heads.solve(blocks, given, **{**defaults, **options})  # type: ignore[arg-type]
    return solution.head


@pytest.mark.parametrize("is_weighted", [False, True])
def test_the_solution_is_scikit_learn_s(blobs: Blobs, is_weighted: bool) -> None:
    from sklearn.linear_model import LogisticRegression

    features, labels = blobs
    weights = np.random.default_rng(1).uniform(0, 3, 400) if is_weighted else np.ones(400)
    weights[:40] = 0
    model = LogisticRegression(C=1 / (0.05 * weights.sum()), max_iter=20000, tol=1e-12)
    model.fit(features, labels, sample_weight=weights)
    head = solve([blobs], weights)
    assert np.abs(head.weight - model.coef_).max() < 1e-4
    # scikit-learn leaves the intercepts' mean free too; only their differences are determined.
    assert np.abs(np.diff(head.bias) - np.diff(model.intercept_)).max() < 1e-4
    probabilities = np.exp(heads.log_softmax(head.logits(features)))
    assert np.abs(probabilities - model.predict_proba(features)).max() < 1e-5


def test_the_training_loss_leaves_the_penalty_out(blobs: Blobs) -> None:
    from sklearn.metrics import log_loss

    weights = np.linspace(0.5, 2, 400)
    solution = heads.solve(
        [blobs], weights, classes=4, l2=0.05, max_iterations=500, tolerance=1e-10
    )
    probabilities = np.exp(heads.log_softmax(solution.head.logits(blobs[0])))
    expected = log_loss(blobs[1], probabilities, sample_weight=weights)
    assert solution.train_loss == pytest.approx(expected, abs=1e-9)
    assert solution.converged and 10 < solution.iterations < 500


def test_an_unfinished_solution_says_so(blobs: Blobs) -> None:
    solution = heads.solve(
        [blobs], np.ones(400), classes=4, l2=1e-4, max_iterations=3, tolerance=1e-12
    )
    assert (solution.converged, solution.iterations) == (False, 3)


def test_where_it_starts_does_not_matter(blobs: Blobs) -> None:
    random = np.random.default_rng(3)
    start = heads.Head(random.normal(size=(4, 20)), random.normal(size=4))
    assert np.abs(solve([blobs], start=start).weight - solve([blobs]).weight).max() < 1e-5


def test_blocks_of_rows_give_what_all_rows_together_give(blobs: Blobs) -> None:
    features, labels = blobs
    blocks = [features[:150] * 3 + 7, features[150:151] * 3 + 7, features[151:] * 3 + 7]
    whole, parts = heads.standardisation([features * 3 + 7]), heads.standardisation(blocks)
    assert np.allclose(whole.mean, parts.mean) and np.allclose(whole.scale, parts.scale)
    weights = np.linspace(0, 1, 400)
    split = [(features[:150], labels[:150]), (features[150:], labels[150:])]
    assert np.abs(solve([blobs], weights).weight - solve(split, weights).weight).max() < 1e-6


def test_standardisation_folds_into_the_head(blobs: Blobs) -> None:
    features = blobs[0] * np.linspace(0.1, 9, 20) + 5
    features[:, 3] = 7  # a constant feature
    standard = heads.standardisation([features])
    assert standard.scale.min() > 0
    head = heads.Head(np.random.default_rng(2).normal(size=(4, 20)), np.arange(4.0))
    folded = standard.fold(head)
    expected = head.logits(standard.apply(features))
    assert np.allclose(folded.logits(features), expected, atol=1e-9)


def test_a_feature_that_hardly_varies_is_not_blown_up(blobs: Blobs) -> None:
    """As from few images: a feature that is zero but for one image must not rule the head."""
    features = np.hstack([blobs[0], 1e-3 * np.eye(400)[:, :1]])
    standard = heads.standardisation([features])
    typical = np.sqrt((features.std(axis=0) ** 2).mean())
    assert standard.scale == pytest.approx(np.maximum(features.std(axis=0), 0.3 * typical))
    head = solve([(standard.apply(features), blobs[1])], l2=1e-3)
    weight = np.abs(standard.fold(head).weight)
    assert weight[:, -1].max() < weight[:, :-1].max()
