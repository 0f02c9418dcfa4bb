"""Probes against scikit-learn, LogME against plain evidence maximisation, curves against SciPy."""

import numpy as np
import numpy.typing as npt
import pytest
from scipy.optimize import curve_fit, minimize
from scipy.stats import multivariate_normal
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from tlpipe import progress
from tlpipe.resampling import held_out_folds
from tlpipe.training import linear_probe
from tlpipe.training.linear_probe import Floats, Labels
from tlpipe.training.model import Examples
from tlpipe.training.transferability import (
    LearningCurve,
    Sample,
    held_out_misses,
    learning_curve,
    logme,
    measure_curve,
)


def sample(labels: Labels, groups: list[str]) -> Sample:
    names = [str(label) for label in labels]
    examples = Examples(np.arange(len(labels)), labels)
    numbers = np.unique(groups, return_inverse=True)[1]
    return Sample(examples, numbers, held_out_folds(names, groups, 4), int(labels.max()) + 1)


def alone(count: int) -> list[str]:
    return [str(number) for number in range(count)]


@pytest.mark.parametrize("width", [12, 120])
def test_probes_answer_as_those_of_scikit_learn(width: int) -> None:
    """With fewer images than features they are solved in other columns."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 120)
    noise = 0.7 * width**0.5 * random.normal(size=(120, width))
    features = random.normal(size=(3, width))[labels] + noise
    given = sample(labels, alone(120))
    standard = linear_probe.standardisation([features]).apply(features)
    least, expected = np.inf, np.zeros(120, bool)
    for l2 in (0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003):
        probabilities = np.zeros((120, 3))
        for fold in range(4):
            train = given.folds != fold
            model = LogisticRegression(C=1 / (l2 * train.sum()), max_iter=2000)
            model.fit(standard[train], labels[train])
            probabilities[~train] = model.predict_proba(standard[~train])
        if (loss := log_loss(labels, probabilities)) < least:
            least, expected = loss, probabilities.argmax(axis=1) != labels
    (found,) = held_out_misses(features, given)
    assert 0.05 < expected.mean() < 0.6
    assert (found != expected).sum() <= 2


def test_copies_of_an_image_do_not_answer_for_it() -> None:
    random = np.random.default_rng(0)
    labels = np.repeat(random.permutation(np.arange(40) % 2), 4)  # of noise, nothing can be told
    features = np.repeat(random.normal(size=(40, 60)), 4, axis=0)
    (parted,) = held_out_misses(features, sample(labels, alone(160)))
    (whole,) = held_out_misses(features, sample(labels, [str(n // 4) for n in range(160)]))
    assert parted.mean() < 0.05
    assert 0.3 < whole.mean() < 0.7


def test_a_share_of_the_training_images_of_every_class_is_drawn_anew_each_time() -> None:
    random = np.random.default_rng(0)
    labels = np.arange(90) % 3
    features = 3 * np.eye(3)[labels] + random.normal(size=(90, 3))
    given = sample(labels, alone(90))
    few, all_of_them = held_out_misses(features, given, 0.05, 5), held_out_misses(features, given)
    assert few.shape == (5, 90)
    # One image of each class: better than guessing, worse than all.
    assert all_of_them.mean() < few.mean() < 0.5
    assert len({row.tobytes() for row in few}) == 5


def test_a_learning_curve_counts_training_images_of_a_class() -> None:
    random = np.random.default_rng(0)
    labels = np.arange(160) % 2
    features = random.normal(size=(2, 40))[labels] + 3 * random.normal(size=(160, 40))
    with progress.meter("", total=4) as shown:
        curve = measure_curve(features, sample(labels, alone(160)), shown)
        assert curve is not None
        # Three of four folds of 80 a class.
        assert curve.images.tolist() == [7.5, 15, 30, 60]
        assert curve.errors[0] > curve.errors[-1] + 0.05
        tiny = measure_curve(features[:8], sample(labels[:8], alone(8)), shown)
        assert tiny is None


@pytest.mark.parametrize(("images", "width"), [(40, 6), (12, 30)])
def test_logme_is_the_maximum_evidence(images: int, width: int) -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, images)
    features = random.normal(size=(3, width))[labels] + 2 * random.normal(size=(images, width))
    found = []
    for number in range(3):
        truth = (labels == number).astype(float)

        def negative(logs: Floats, truth: Floats = truth) -> float:
            alpha, beta = np.exp(logs)
            covariance = np.eye(images) / beta + features @ features.T / alpha
            return -float(multivariate_normal(np.zeros(images), covariance).logpdf(truth))

        best = minimize(negative, np.zeros(2), method="Nelder-Mead", options={"fatol": 1e-10})
        found.append(-best.fun / images)
    assert logme(features, labels) == pytest.approx(np.mean(found), abs=1e-4)


def test_logme_is_higher_where_features_tell_classes_apart() -> None:
    random = np.random.default_rng(1)
    labels = np.arange(60) % 3
    noise = random.normal(size=(60, 5))
    shift = random.normal(size=(3, 5))[labels]
    scores = [logme(noise + share * shift, labels) for share in (0.0, 1.0, 4.0)]
    assert scores == sorted(scores)
    for size in (1e-9, 7, 1e9):
        assert logme(size * noise, labels) == pytest.approx(logme(noise, labels), abs=1e-4)


def test_logme_of_features_that_are_all_zero_is_that_of_noise_alone() -> None:
    labels = np.arange(60) % 3
    # Each class's membership is of norm sqrt(20), and normal with the variance 20 / 60.
    alone = -0.5 * (np.log(2 * np.pi * 20 / 60) + 1)
    assert logme(np.zeros((60, 5)), labels) == pytest.approx(alone, abs=1e-6)


def misses(errors: Floats, images: int = 2000) -> tuple[list[npt.NDArray[np.bool_]], Labels]:
    """Return which images are answered wrongly, one draw a size, and that each is alone."""
    ranks = np.random.default_rng(2).permutation(images)
    return [(ranks < round(error * images))[None] for error in errors], np.arange(images)


SIZES = np.array([5.0, 10.0, 20.0, 40.0])


def test_a_curve_is_the_least_squares_power_law() -> None:
    errors = np.array([0.41, 0.30, 0.235, 0.18])
    curve = learning_curve(SIZES, *misses(errors))
    assert curve is not None

    def law(images: Floats, scale: float, exponent: float, floor: float) -> Floats:
        return scale * images**-exponent + floor

    bounds = ([0, 0.1, 0], [np.inf, 1, 1])
    expected, _ = curve_fit(law, SIZES, errors, p0=(1, 0.5, 0.01), bounds=bounds)
    for images in (5, 20, 40, 80):
        assert curve.error(images)[0] == pytest.approx(law(np.array(images), *expected), abs=2e-3)


def test_images_for_a_gain_follow_the_law() -> None:
    errors = 0.9 * SIZES**-0.5
    curve = learning_curve(SIZES, *misses(errors, 20_000))
    assert curve is not None
    # 0.9 n^-0.5 = 0.9 * 40^-0.5 - 0.02 at n = 54.2
    found = curve.more_for(0.02, 40)
    assert found is not None
    assert found[0] == pytest.approx(14.2, abs=1.5)
    assert found[1] < 14.2 < found[2]
    assert curve.more_for(0.13, 40) is None  # 1,114 more: beyond four times
    value, low, high = curve.gain(40, 40)
    assert low < 0.9 * (40**-0.5 - 80**-0.5) < high
    assert value == pytest.approx(0.0417, abs=2e-3)


def test_a_flat_curve_promises_nothing() -> None:
    curve = learning_curve(SIZES, *misses(np.full(4, 0.25)))
    assert curve is not None
    assert curve.more_for(0.02, 40) is None
    assert curve.gain(40, 40)[2] < 0.001


def test_two_sizes_make_no_curve() -> None:
    assert learning_curve(SIZES[:2], *misses(np.array([0.4, 0.3]))) is None


def simulated(random: np.random.Generator, groups: Labels) -> LearningCurve:
    """Return a curve of errors drawn from a law: of each group all images or none are missed."""
    errors = 0.8 * SIZES**-0.5 + 0.05
    draws = (8, 4, 2, 1)
    drawn = [
        (random.random((k, int(groups.max()) + 1)) < error)[:, groups]
        for k, error in zip(draws, errors, strict=True)
    ]
    curve = learning_curve(SIZES, drawn, groups)
    assert curve is not None
    return curve


def test_intervals_hold_the_truth_and_images_of_one_group_count_once() -> None:
    random = np.random.default_rng(3)
    truth = 0.8 * 40**-0.5 + 0.05
    means = []
    for groups in (np.arange(300), np.repeat(np.arange(75), 4)):
        ends = np.array([simulated(random, groups).error(40)[1:] for _ in range(20)])
        inside = (ends[:, 0] <= truth) & (truth <= ends[:, 1])
        assert inside.sum() >= 15  # 18 are expected of 90 % intervals
        means.append(np.diff(ends).mean())
    # A quarter of the independent images: twice the width.
    assert means[1] / means[0] == pytest.approx(2, rel=0.2)
