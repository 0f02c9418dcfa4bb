import numpy as np
import pytest

from tlpipe.learning import head as heads


@pytest.fixture(scope="module")
def blobs() -> tuple[heads.Floats, heads.Labels]:
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, 400)
    features = random.normal(size=(4, 20))[labels] + 1.5 * random.normal(size=(400, 20))
    return features, labels


def test_the_solution_is_scikit_learn_s(blobs: tuple[heads.Floats, heads.Labels]) -> None:
    from sklearn.linear_model import LogisticRegression

    penalty = 0.05
    solution = heads.solve([blobs], [blobs], classes=4, penalty=penalty, max_iterations=500)
    reference = LogisticRegression(C=1 / (penalty * 400), max_iter=5000, tol=1e-10).fit(*blobs)
    assert solution.converged
    assert np.abs(solution.head.weight - reference.coef_).max() < 0.01
    probabilities = np.exp(heads.log_softmax(solution.head.logits(blobs[0])))
    assert np.abs(probabilities - reference.predict_proba(blobs[0])).max() < 0.01


def test_the_gradient_vanishes_at_the_solution(blobs: tuple[heads.Floats, heads.Labels]) -> None:
    solution = heads.solve([blobs], [blobs], classes=4, penalty=0.1, max_iterations=500)
    best, _ = heads.score(solution.head, [blobs])
    best += 0.05 * (solution.head.weight**2).sum()
    random = np.random.default_rng(1)
    for _ in range(20):
        moved = solution.head.weight + 0.01 * random.normal(size=solution.head.weight.shape)
        loss, _ = heads.score(heads.Head(moved, solution.head.bias), [blobs])
        assert loss + 0.05 * (moved**2).sum() > best


def test_standardisation_folds_into_the_head(blobs: tuple[heads.Floats, heads.Labels]) -> None:
    features = blobs[0] * np.linspace(0.1, 9, 20) + 5
    features[:, 3] = 7  # a constant feature
    standard = heads.standardisation([features])
    assert standard.scale.min() > 0
    head = heads.Head(np.random.default_rng(2).normal(size=(4, 20)), np.arange(4.0))
    folded = standard.fold(head)
    expected = head.logits(standard.apply(features))
    assert np.allclose(folded.logits(features), expected, atol=1e-9)


def test_a_path_starts_where_the_stronger_penalty_ended(
    blobs: tuple[heads.Floats, heads.Labels],
) -> None:
    solutions = heads.solve_path(
        [blobs], [blobs], classes=4, penalties=(0.01, 1.0, 0.1), max_iterations=500
    )
    assert [solution.penalty for solution in solutions] == [1.0, 0.1, 0.01]
    sizes = [(solution.head.weight**2).sum() for solution in solutions]
    assert sizes == sorted(sizes)
    again = heads.solve(
        [blobs], [blobs], classes=4, penalty=0.01, max_iterations=5, start=solutions[-1].head
    )
    assert again.last.train_loss == pytest.approx(solutions[-1].last.train_loss, abs=1e-6)


def test_a_feature_that_hardly_varies_is_not_blown_up(
    blobs: tuple[heads.Floats, heads.Labels],
) -> None:
    """As from few images: a feature that is zero but for one image must not rule the head."""
    features = np.hstack([blobs[0], 1e-3 * np.eye(400)[:, :1]])
    standard = heads.standardisation([features])
    table = [(standard.apply(features), blobs[1])]
    solution = heads.solve(table, table, classes=4, penalty=1e-3, max_iterations=500)
    weight = np.abs(standard.fold(solution.head).weight)
    assert weight[:, -1].max() < weight[:, :-1].max()


def test_blocks_of_rows_give_what_all_rows_together_give(
    blobs: tuple[heads.Floats, heads.Labels],
) -> None:
    features, labels = blobs
    blocks = [features[:150] * 3 + 7, features[150:151] * 3 + 7, features[151:] * 3 + 7]
    whole, parts = heads.standardisation([features * 3 + 7]), heads.standardisation(blocks)
    assert np.allclose(whole.mean, parts.mean) and np.allclose(whole.scale, parts.scale)
    split = [(features[:150], labels[:150]), (features[150:], labels[150:])]
    options = {"classes": 4, "penalty": 0.05, "max_iterations": 500}
    one, several = heads.solve([blobs], [blobs], **options), heads.solve(split, split, **options)
    assert np.abs(one.head.weight - several.head.weight).max() < 1e-3
    assert one.last.validation_loss == pytest.approx(several.last.validation_loss, abs=1e-6)
