"""The linear probe against scikit-learn: solver, cross-validation, and what is held out."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import PredefinedSplit, cross_val_predict

from tlpipe.backbones.activations import Activations, Origin
from tlpipe.backbones.backbone import Backbone
from tlpipe.data.pixels import Chunks
from tlpipe.resampling import ALWAYS_TRAINS, held_out_folds
from tlpipe.training import linear_probe
from tlpipe.training.linear_probe import Floats, Head, Labels
from tlpipe.training.model import Dataset, Examples
from tlpipe.training.recipe import Recipe

Blobs = tuple[Floats, Labels]


@pytest.fixture(scope="module")
def blobs() -> Blobs:
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, 400)
    features = random.normal(size=(4, 20))[labels] + 1.5 * random.normal(size=(400, 20))
    return features, labels


def solve(blocks: list[Blobs], weights: Floats | None = None, **options: object) -> Head:
    count = sum(len(labels) for _, labels in blocks)
    given = np.ones(count) if weights is None else weights
    defaults = {"classes": 4, "l2": 0.05, "max_iterations": 2000, "tolerance": 1e-14}
    solution = linear_probe.solve(blocks, given, **{**defaults, **options})  # type: ignore[arg-type]
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
    probabilities = softmax(head.logits(features), axis=1)
    assert np.abs(probabilities - model.predict_proba(features)).max() < 1e-5


def test_the_training_loss_leaves_the_penalty_out(blobs: Blobs) -> None:
    from sklearn.metrics import log_loss

    weights = np.linspace(0.5, 2, 400)
    solution = linear_probe.solve(
        [blobs], weights, classes=4, l2=0.05, max_iterations=500, tolerance=1e-10
    )
    probabilities = softmax(solution.head.logits(blobs[0]), axis=1)
    expected = log_loss(blobs[1], probabilities, sample_weight=weights)
    assert solution.train_loss == pytest.approx(expected, abs=1e-9)
    assert solution.converged and 10 < solution.iterations < 500


def test_an_unfinished_solution_says_so(blobs: Blobs) -> None:
    solution = linear_probe.solve(
        [blobs], np.ones(400), classes=4, l2=1e-4, max_iterations=3, tolerance=1e-12
    )
    assert (solution.converged, solution.iterations) == (False, 3)


def test_where_it_starts_does_not_matter(blobs: Blobs) -> None:
    random = np.random.default_rng(3)
    start = Head(random.normal(size=(4, 20)), random.normal(size=4))
    assert np.abs(solve([blobs], start=start).weight - solve([blobs]).weight).max() < 1e-5


def test_blocks_of_rows_give_what_all_rows_together_give(blobs: Blobs) -> None:
    features, labels = blobs
    blocks = [features[:150] * 3 + 7, features[150:151] * 3 + 7, features[151:] * 3 + 7]
    whole, parts = (
        linear_probe.standardisation([features * 3 + 7]),
        linear_probe.standardisation(blocks),
    )
    assert np.allclose(whole.mean, parts.mean) and np.allclose(whole.scale, parts.scale)
    weights = np.linspace(0, 1, 400)
    split = [(features[:150], labels[:150]), (features[150:], labels[150:])]
    assert np.abs(solve([blobs], weights).weight - solve(split, weights).weight).max() < 1e-6


def test_standardisation_folds_into_the_head(blobs: Blobs) -> None:
    features = blobs[0] * np.linspace(0.1, 9, 20) + 5
    features[:, 3] = 7  # a constant feature
    standard = linear_probe.standardisation([features])
    assert standard.scale.min() > 0
    head = Head(np.random.default_rng(2).normal(size=(4, 20)), np.arange(4.0))
    folded = standard.fold(head)
    expected = head.logits(standard.apply(features))
    assert np.allclose(folded.logits(features), expected, atol=1e-9)


def test_a_feature_that_hardly_varies_is_not_blown_up(blobs: Blobs) -> None:
    """As from few images: a feature that is zero but for one image must not rule the head."""
    features = np.hstack([blobs[0], 1e-3 * np.eye(400)[:, :1]])
    standard = linear_probe.standardisation([features])
    typical = np.sqrt((features.std(axis=0) ** 2).mean())
    assert standard.scale == pytest.approx(np.maximum(features.std(axis=0), 0.3 * typical))
    head = solve([(standard.apply(features), blobs[1])], l2=1e-3)
    weight = np.abs(standard.fold(head).weight)
    assert weight[:, -1].max() < weight[:, :-1].max()


WIDTH, CLASSES = 12, 3


def dataset(train: Examples, validation: Examples, groups: tuple[str, ...]) -> Dataset:
    """Make a data set of which a probe sees its images; what they are stored as is left out."""
    nothing = Chunks(Path(), [], (WIDTH,), "float16")
    stored = Activations(nothing, None, np.empty(0, np.uint64), Origin.model_construct())
    labels = ("a", "b", "c")
    return Dataset(
        stored, Backbone.model_construct(), labels, train, validation, groups, "", digest=""
    )


@pytest.fixture(scope="module")
def features() -> Floats:
    """(240, 2, 12): 240 images in two views, the first one plain, as float16 stores them."""
    random = np.random.default_rng(0)
    labels = np.arange(240) // 2 % CLASSES
    plain = random.normal(size=(CLASSES, WIDTH))[labels] + 1.3 * random.normal(size=(240, WIDTH))
    views = np.stack([plain, plain + 0.3 * random.normal(size=plain.shape)], axis=1)
    return views.astype(np.float16).astype(np.float64)


@pytest.fixture(scope="module")
def data() -> Dataset:
    labels = np.arange(240) // 2 % CLASSES
    groups = tuple(f"g{i // 2}" for i in range(240))
    train, validation = np.arange(180), np.arange(180, 240)
    return dataset(Examples(train, labels[train]), Examples(validation, labels[validation]), groups)


def reader(features: Floats, block: int = 1000) -> linear_probe.Read:
    def read(rows, every_view):  # type: ignore[no-untyped-def]
        views = 2 if every_view else 1
        for start in range(0, len(rows), block):
            yield features[rows[start : start + block], :views].reshape(-1, WIDTH)

    return read


def plain(features: Floats) -> linear_probe.Read:
    """Return what reads the plain view alone, whatever is asked for."""
    return lambda rows, every_view: iter([features[rows, 0]])


def reference(l2: float, weights: Floats) -> LogisticRegression:
    return LogisticRegression(C=1 / (l2 * weights.sum()), max_iter=20000, tol=1e-10)


RECIPE = Recipe(l2=(1.0, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003))


def test_the_l2_and_the_held_out_predictions_are_those_of_cross_validation(
    features: Floats, data: Dataset
) -> None:
    found = linear_probe.fit(plain(features), data, data.labelled, RECIPE)
    standard = found.standard.apply(features[:, 0])
    labels = data.labelled.labels
    losses = {}
    for l2 in RECIPE.l2:
        model = reference(l2, np.ones(180))  # 3 of 4 folds
        expected = cross_val_predict(
            model, standard, labels, cv=PredefinedSplit(found.folds), method="predict_proba"
        )
        losses[l2] = log_loss(labels, expected)
        if l2 == found.best.l2:
            logits = found.best.logits.astype(np.float64)
            assert np.abs(softmax(logits, axis=1) - expected).max() < 0.02
    assert found.best.l2 == min(losses, key=losses.get)  # type: ignore[arg-type]
    assert 0.001 < found.best.l2 < 1.0  # a choice that the ends of the grid would not make
    tried = sorted(RECIPE.l2, reverse=True)[: len(found.path)]
    for l2, step in zip(tried, found.path, strict=True):
        assert step.validation.loss == pytest.approx(losses[l2], abs=2e-3)


def test_the_head_is_fitted_on_training_and_validation_or_on_training_alone(
    features: Floats, data: Dataset
) -> None:
    labels = data.labelled.labels
    for train in (data.labelled, data.train):
        found = linear_probe.fit(plain(features), data, train, RECIPE)
        count = len(train)
        expected = linear_probe.standardisation([features[:count, 0]])
        assert found.standard.mean == pytest.approx(expected.mean)
        standard = found.standard.apply(features[:count, 0])
        model = reference(found.best.l2, np.ones(count)).fit(standard, labels[:count])
        assert np.abs(found.head.weight - model.coef_).max() < 1e-4
        # The head for features as they are gives the same logits.
        weight, bias = found.raw(found.head)
        assert weight.dtype == bias.dtype == np.float32
        ours = features[:, 0] @ weight.T + bias
        assert ours == pytest.approx(
            found.head.logits(found.standard.apply(features[:, 0])), abs=1e-4
        )


def test_views_train_and_only_the_plain_image_is_held_out(features: Floats, data: Dataset) -> None:
    found = linear_probe.fit(reader(features, block=50), data, data.labelled, RECIPE)
    every = found.standard.apply(features.reshape(-1, WIDTH))
    targets, folds = np.repeat(data.labelled.labels, 2), np.repeat(found.folds, 2)
    held = found.held_out(data.labelled)
    probabilities = softmax(found.best.logits.astype(np.float64), axis=1)
    for fold in range(4):
        model = reference(found.best.l2, np.ones(360))
        model.fit(every[folds != fold], targets[folds != fold])
        inside = found.folds == fold
        expected = model.predict_proba(found.standard.apply(features[inside, 0]))
        assert np.abs(probabilities[inside] - expected).max() < 0.02
        # The fold's head for features as they are, as export uses it.
        weight, bias = held.heads[fold]
        again = features[inside, 0] @ weight.T + bias
        assert again == pytest.approx(held.logits[inside], abs=1e-3)


def test_blocks_from_a_file_give_what_one_block_gives(features: Floats, data: Dataset) -> None:
    one = linear_probe.fit(reader(features), data, data.labelled, RECIPE)
    several = linear_probe.fit(reader(features, block=7), data, data.labelled, RECIPE)
    assert np.abs(one.head.weight - several.head.weight).max() < 1e-5
    assert np.abs(one.best.logits - several.best.logits).max() < 1e-3


@pytest.mark.fault("T20")
def test_the_number_of_cores_changes_no_bit(features: Floats, data: Dataset) -> None:
    """Folds that run side by side read one file at the same time."""
    recipe, cores = Recipe(l2=(0.1, 0.03)), os.sched_getaffinity(0)
    alike = []
    try:
        for given in ({min(cores)}, cores):
            os.sched_setaffinity(0, given)
            found = linear_probe.fit(reader(features, block=7), data, data.labelled, recipe)
            alike.append((found.best.logits.tobytes(), found.head.weight.tobytes()))
    finally:
        os.sched_setaffinity(0, cores)
    assert alike[0] == alike[1]


@pytest.mark.parametrize("balance", ["loss", "sampling"])
@pytest.mark.fault("T15")
def test_balance_weighs_images_by_their_class(features: Floats, balance: str) -> None:
    labels = np.array([0] * 100 + [1] * 10 + [2] * 10)
    examples = Examples(np.arange(120), labels)
    nobody = Examples(np.empty(0, np.int64), np.empty(0, np.int64))
    data = dataset(examples, nobody, tuple(f"g{i}" for i in range(240)))
    recipe = Recipe(l2=(0.1,), balance=balance)  # type: ignore[arg-type]
    found = linear_probe.fit(plain(features), data, examples, recipe)
    model = LogisticRegression(
        C=1 / (0.1 * 120), max_iter=20000, tol=1e-10, class_weight="balanced"
    )
    model.fit(found.standard.apply(features[:120, 0]), labels)
    assert np.abs(found.head.weight - model.coef_).max() < 1e-4
    weights = 120 / (3 * np.bincount(labels)[labels])
    probabilities = softmax(found.best.logits.astype(np.float64), axis=1)
    assert found.best.step.validation.loss == pytest.approx(
        log_loss(labels, probabilities, sample_weight=weights), abs=1e-6
    )


def test_what_is_held_out_is_as_wide_as_what_ships(features: Floats, data: Dataset) -> None:
    found = linear_probe.fit(plain(features), data, data.labelled, RECIPE)
    held = found.held_out(data.labelled)
    norms = [np.linalg.norm(head.weight) for head in found.best.fold_heads]
    wider = np.linalg.norm(found.head.weight) / np.mean(norms)
    assert abs(wider - 1) > 0.01
    assert held.logits == pytest.approx(wider * found.best.logits, rel=1e-5)


def test_images_that_are_all_alike_are_answered_by_the_shares_of_classes(data: Dataset) -> None:
    alike = np.ones((240, 2, WIDTH))
    found = linear_probe.fit(plain(alike), data, data.labelled, Recipe(l2=(0.1,)))
    assert not found.head.weight.any()
    held = found.held_out(data.labelled)
    assert softmax(held.logits.astype(np.float64), axis=1) == pytest.approx(
        np.full((240, 3), 1 / 3), abs=0.02
    )


def test_folds_of_classes_of_few_groups_hold_out_every_class() -> None:
    """Two classes of two groups: a fold with half of one and none of the other would be tilted."""
    for groups in (2, 3, 5):
        labels = [label for label in "abc" for _ in range(groups)]
        folds = held_out_folds(labels, [str(i) for i in range(3 * groups)], 4)
        for fold in range(min(groups, 4)):
            inside = [label for label, own in zip(labels, folds, strict=True) if own == fold]
            assert {inside.count(label) for label in "abc"} == {-(-(groups - fold) // 4)}


def test_features_that_tell_nothing_are_said(
    data: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    noise = np.random.default_rng(5).normal(size=(240, 2, WIDTH))
    with caplog.at_level(logging.WARNING):
        linear_probe.fit(plain(noise), data, data.labelled, Recipe(l2=(0.001,)))
    assert any("shares of the classes alone, whose loss is 1.0986" in m for m in caplog.messages)


def test_groups_stay_in_one_fold_and_classes_are_spread() -> None:
    labels = ["a"] * 40 + ["b"] * 9 + ["c"] * 4 + ["d"]
    groups = [f"g{i // 2}" for i in range(40)] + [f"h{i}" for i in range(9)]
    groups += ["i0", "i0", "i1", "i1", "j0"]
    folds = held_out_folds(labels, groups, 4)
    for group in set(groups):
        assert len({f for f, g in zip(folds, groups, strict=True) if g == group}) == 1
    inside = [[np.sum(folds[np.array(labels) == c] == f) for f in range(4)] for c in "abc"]
    counts = np.array(inside)
    assert sorted(counts[0]) == [10, 10, 10, 10]
    assert sorted(counts[1]) == [2, 2, 2, 3]
    assert sorted(counts[2]) == [0, 0, 2, 2]
    assert folds[-1] == ALWAYS_TRAINS  # without it, nothing would know the class d


def test_a_class_whose_groups_share_a_fold_is_never_held_out() -> None:
    """Both photos of class b also show class a, and nothing else keeps them in two folds."""
    labels = ["b", "a", "a", "a", "a"]
    groups = ["x", "x", "y", "z", "w"]
    folds = held_out_folds(labels, groups, 2)
    assert folds[0] == folds[1] == ALWAYS_TRAINS
    assert {*folds[2:]} == {0, 1}


def test_classes_of_three_images_are_cross_validated_with_two_folds(
    features: Floats,
) -> None:
    """One image each for training and validation: every class has two groups in all."""
    labels = np.arange(3)
    train, validation = Examples(np.arange(3) * 2, labels), Examples(np.arange(3) * 2 + 1, labels)
    data = dataset(train, validation, tuple(f"g{i}" for i in range(240)))
    found = linear_probe.fit(plain(features), data, train, RECIPE)
    assert len(found.best.fold_heads) >= 2
    held = found.held_out(data.labelled)
    assert len(held.rows) == 6 and np.isfinite(held.logits).all()


def test_what_was_chosen_is_said_with_its_reason(
    features: Floats, data: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        found = linear_probe.fit(plain(features), data, data.labelled, RECIPE)
    step = found.best.step
    assert caplog.messages[len(found.path) :] == [
        f"chosen: l2 {found.best.l2:g}, which has the least loss; "
        f"{len(RECIPE.l2) - len(found.path)} weaker ones were left out"
    ]
    assert (
        f"l2 {found.best.l2:g}: 4-fold loss {step.validation.loss:.4f}, accuracy "
        f"{step.validation.accuracy:.3f} on 240 images"
    ) in caplog.messages
    caplog.clear()
    with caplog.at_level(logging.INFO):
        linear_probe.fit(plain(features), data, data.labelled, Recipe(l2=(0.01, 3.0, 10.0)))
    assert any("at the end of train.l2" in text for text in caplog.messages)
