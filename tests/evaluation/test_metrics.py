import json
import math
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn_metrics
from sklearn.metrics import precision_recall_curve, roc_auc_score, roc_curve

from tlpipe import files
from tlpipe.evaluation import evaluate, metrics
from tlpipe.evaluation.answers import Answers
from tlpipe.resampling import group_numbers, resamples, share_interval

# All that lie in [0, 1] and are 1 at best.
SHARES = ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "top_2_accuracy")


def softmax(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    found: np.ndarray = (raised / raised.sum(axis=1, keepdims=True)).astype(np.float32)
    return found


def drawn(
    images: int, classes: int, *, skill: float = 1.5, seed: int = 0, decimals: int = 9
) -> tuple[np.ndarray, np.ndarray]:
    """Return probabilities (N, C) and labels (N,), classes less and less frequent."""
    random = np.random.default_rng(seed)
    share = 0.75 ** np.arange(classes)
    truth = random.choice(classes, images, p=share / share.sum())
    logits = random.normal(size=(images, classes)) + skill * np.eye(classes)[truth]
    return softmax(logits.round(decimals)), truth


def certain(answers: np.ndarray, classes: int) -> np.ndarray:
    """Return probabilities of answers that are sure of themselves, but not more than they may."""
    found: np.ndarray = (0.9 * np.eye(classes)[answers] + 0.1 / classes).astype(np.float32)
    return found


@pytest.mark.parametrize(("images", "classes", "decimals"), [(300, 4, 9), (80, 9, 0), (60, 2, 1)])
def test_the_numbers_are_scikit_learn_s(images: int, classes: int, decimals: int) -> None:
    """With ties too, and with one class more than is tested."""
    probabilities, truth = drawn(images, classes, decimals=decimals)
    unseen = np.full((images, 1), 0.01, np.float32)
    joined = np.concatenate([probabilities, unseen], axis=1) / np.float32(1.01)
    probabilities = joined.astype(np.float32)
    labels = range(classes + 1)
    tested = sorted(set(truth.tolist()))
    assert len(tested) == classes
    predicted = probabilities.argmax(axis=1)
    measured = metrics.measure(probabilities, truth, [""] * images, 0.95)

    def value(name: str) -> float:
        return float(measured[name]["value"])

    exact = probabilities.astype(np.float64)
    exact /= exact.sum(axis=1, keepdims=True)
    assert value("accuracy") == sklearn_metrics.accuracy_score(truth, predicted)
    assert value("balanced_accuracy") == pytest.approx(
        sklearn_metrics.balanced_accuracy_score(truth, predicted)
    )
    assert value("macro_f1") == pytest.approx(
        sklearn_metrics.f1_score(truth, predicted, labels=tested, average="macro", zero_division=0)
    )
    assert value("log_loss") == pytest.approx(
        sklearn_metrics.log_loss(truth, exact, labels=labels), rel=1e-5
    )
    areas = [sklearn_metrics.roc_auc_score(truth == c, probabilities[:, c]) for c in tested]
    assert value("auroc") == pytest.approx(np.mean(areas))
    if decimals == 9:
        for k in (2, 3):
            if k <= classes:
                known = sklearn_metrics.top_k_accuracy_score(truth, exact, k=k, labels=labels)
                assert value(f"top_{k}_accuracy") == pytest.approx(known)
    expected = sklearn_metrics.precision_recall_fscore_support(
        truth, predicted, labels=labels, zero_division=0
    )
    for i, row in enumerate(measured["per_class"]):
        found = (row["precision"], row["recall"], row["f1"], row["images"])
        assert found == pytest.approx(tuple(column[i] for column in expected))
    confusion = np.zeros((classes + 1, classes + 1), int)
    for true, answer, images in metrics.confusion_pairs(truth, predicted):
        confusion[true, answer] = images
    known = sklearn_metrics.confusion_matrix(truth, predicted, labels=labels)
    assert confusion.tolist() == known.tolist()


def test_auroc_is_the_one_against_the_rest_of_scikit_learn() -> None:
    probabilities, truth = drawn(200, 5)
    exact = probabilities / probabilities.astype(np.float64).sum(axis=1, keepdims=True)
    known = sklearn_metrics.roc_auc_score(truth, exact, multi_class="ovr", average="macro")
    found = metrics.auroc(probabilities, truth, np.arange(200), 0.95)
    assert found["value"] == pytest.approx(known)


@pytest.mark.parametrize("name", ["balanced_accuracy", "macro_f1"])
def test_means_over_classes_are_weighted_right_answers(name: str) -> None:
    probabilities, truth = drawn(150, 6)
    predicted = probabilities.argmax(axis=1)
    weights = metrics.class_weights(truth, predicted)[name]
    assert weights.sum() == pytest.approx(1)
    known = {
        "balanced_accuracy": sklearn_metrics.balanced_accuracy_score(truth, predicted),
        "macro_f1": sklearn_metrics.f1_score(truth, predicted, average="macro"),
    }
    assert weights[predicted == truth].sum() == pytest.approx(known[name])


def test_a_headline_of_one_class_and_of_one_image() -> None:
    measured = metrics.measure(np.array([[0.2, 0.8]], np.float32), np.array([0]), [""], 0.95)
    assert measured["accuracy"]["value"] == measured["macro_f1"]["value"] == 0
    assert measured["accuracy"]["high"] > 0.7
    assert "auroc" not in measured


@pytest.mark.parametrize("copies", [1, 5])
@pytest.mark.parametrize("name", SHARES)
@pytest.mark.parametrize("skill", [0.4, 1.2])
def test_intervals_hold_the_truth_as_often_as_they_say(
    name: str, skill: float, copies: int
) -> None:
    """Test sets drawn two hundred times from the same source; the truth is that of 40,000 images.

    Those that hold too seldom lie; those that hold always are too wide to say anything, but where
    the most that is known of the variance counts (AUROC).
    """
    many, their_truth = drawn(40_000, 4, skill=skill, seed=1)
    truth_of_all = value_of(name, many, their_truth)
    held, widths, times = 0, [], 200
    for seed in range(times):
        probabilities, truth = drawn(160, 4, skill=skill, seed=2 + seed)
        probabilities, truth = (np.repeat(a, copies, axis=0) for a in (probabilities, truth))
        groups = np.repeat(np.arange(160), copies)
        found = interval_of(name, probabilities, truth, groups)
        held += found["low"] <= truth_of_all <= found["high"]
        widths.append(found["high"] - found["low"])
    assert held / times >= 0.95 - 3 * (0.95 * 0.05 / times) ** 0.5
    assert np.mean(widths) < 0.25


def value_of(name: str, probabilities: np.ndarray, truth: np.ndarray) -> float:
    """The value as scikit-learn has it."""
    predicted = probabilities.argmax(axis=1)
    if name == "accuracy":
        return float(sklearn_metrics.accuracy_score(truth, predicted))
    if name == "balanced_accuracy":
        return float(sklearn_metrics.balanced_accuracy_score(truth, predicted))
    if name == "macro_f1":
        return float(sklearn_metrics.f1_score(truth, predicted, average="macro"))
    if name == "auroc":
        areas = [sklearn_metrics.roc_auc_score(truth == c, probabilities[:, c]) for c in range(4)]
        return float(np.mean(areas))
    return float(sklearn_metrics.top_k_accuracy_score(truth, probabilities, k=2, labels=range(4)))


def interval_of(
    name: str, probabilities: np.ndarray, truth: np.ndarray, groups: np.ndarray
) -> dict[str, float]:
    """The interval as ``measure`` has it, of one metric alone."""
    right = probabilities.argmax(axis=1) == truth
    if name == "auroc":
        return metrics.auroc(probabilities, truth, groups, 0.95)
    if name == "accuracy":
        return share_interval(right, groups, 0.95)
    if name == "top_2_accuracy":
        true = probabilities[np.arange(len(truth)), truth]
        among = (probabilities > true[:, None]).sum(axis=1) < 2
        return share_interval(among, groups, 0.95)
    weights = metrics.class_weights(truth, probabilities.argmax(axis=1))[name]
    return share_interval(right, groups, 0.95, weights=weights, classes=truth)


def test_measure_gives_each_headline_that_interval() -> None:
    probabilities, truth = drawn(160, 4)
    names = [str(number // 3) for number in range(160)]
    measured = metrics.measure(probabilities, truth, names, 0.95)
    for name in SHARES:
        assert measured[name] == interval_of(name, probabilities, truth, group_numbers(names))
        assert measured[name]["value"] == pytest.approx(value_of(name, probabilities, truth))


@pytest.mark.fault("M01")
@pytest.mark.parametrize("name", SHARES)
@pytest.mark.parametrize("is_right", [True, False])
def test_where_all_are_right_or_wrong_the_interval_has_an_honest_width(
    name: str, is_right: bool
) -> None:
    """Twenty photos of each of three classes, ten copies of each: as if there were twenty."""
    truth = np.repeat(np.arange(3), 200)
    groups = [str(number) for number in np.repeat(np.arange(60), 10)]
    probabilities = certain(truth, 3)
    if not is_right:
        # The true class comes last.
        probabilities = np.array([[0, 0.4, 0.6], [0.6, 0, 0.4], [0.4, 0.6, 0]], np.float32)[truth]
    found = metrics.measure(probabilities, truth, groups, 0.95)[name]
    # Sixty photos: every class of twenty shows its errors alike.
    known = stats.binomtest(60, 60).proportion_ci(0.95, method="wilson").low
    # A wrong answer counts for two classes: thirty.
    most = stats.binomtest(30, 30).proportion_ci(0.95, method="wilson").low
    if is_right:
        assert (found["value"], found["high"]) == pytest.approx((1, 1))
        assert found["low"] == pytest.approx(most if name == "auroc" else known)
    else:
        assert found["value"] == pytest.approx(0)
        assert found["low"] == pytest.approx(0)
        assert found["high"] == pytest.approx(1 - (most if name == "auroc" else known))


@pytest.mark.fault("M01")
@pytest.mark.parametrize("name", [*SHARES, "log_loss", "calibration_error"])
def test_copies_of_images_change_no_interval(name: str) -> None:
    probabilities, truth = drawn(90, 4)
    # Numbers with as many digits sort as they count, so that the bootstrap draws the same.
    names = [f"{number:03d}" for number in range(90)]
    once = metrics.measure(probabilities, truth, names, 0.95)[name]
    many = (np.repeat(probabilities, 7, axis=0), np.repeat(truth, 7), list(np.repeat(names, 7)))
    assert metrics.measure(*many, 0.95)[name] == pytest.approx(once, abs=1e-7)


def test_log_loss_has_the_interval_of_the_bootstrap() -> None:
    """Of a mean of many: normal, with the standard error of the losses."""
    probabilities, truth = drawn(2000, 4)
    losses = -np.log(probabilities[np.arange(2000), truth].astype(float))
    found = metrics.measure(probabilities, truth, [""] * 2000, 0.95)["log_loss"]
    half = 1.96 * losses.std() / 2000**0.5
    assert found["low"] == pytest.approx(losses.mean() - half, abs=0.1 * half)
    assert found["high"] == pytest.approx(losses.mean() + half, abs=0.1 * half)


def calibration_error(
    probabilities: np.ndarray, truth: np.ndarray, groups: list[str]
) -> dict[str, float]:
    """Return the calibration error with its interval; two groups at least have one."""
    found = metrics.calibration_error(probabilities, truth, groups, 0.95)
    assert found is not None
    return found


def binned(right: dict[float, tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return answers of a few confidences, of which so many are right, so many are wrong."""
    rows, truth = [], []
    for confidence, (hits, misses) in right.items():
        rows += [[confidence, 1 - confidence]] * (hits + misses)
        truth += [0] * hits + [1] * misses
    return np.array(rows, np.float32), np.array(truth)


@pytest.mark.fault("M02")
def test_calibration_error_is_the_published_estimator() -> None:
    """Kumar, Liang and Ma (2019), section 5: (gap)^2 - y (1 - y) / (n - 1), by images."""
    of_bins = {0.55: (12, 18), 0.75: (25, 15), 0.95: (28, 2)}
    square = sum(
        (hits + misses)
        / 100
        * (
            (confidence - hits / (hits + misses)) ** 2
            - (hits * misses / (hits + misses) ** 2) / (hits + misses - 1)
        )
        for confidence, (hits, misses) in of_bins.items()
    )
    assert square > 0
    found = calibration_error(*binned(of_bins), [""] * 100)
    assert found["value"] == pytest.approx(square**0.5, abs=1e-6)


@pytest.mark.fault("M02")
@pytest.mark.parametrize(("images", "bins"), [(5, 1), (90, 6), (900, 15), (3000, 15)])
def test_calibration_error_has_bins_of_equally_many_images(images: int, bins: int) -> None:
    """The number of images to the power of 2/5, at most 15."""
    random = np.random.default_rng(0)
    confidence = random.uniform(0.5, 1, images)
    right = random.random(images) < confidence - 0.3
    probabilities = np.stack([confidence, 1 - confidence], axis=1).astype(np.float32)
    chunks = np.array_split((confidence - right)[confidence.argsort()], bins)
    # The square of a mean less its variance, the usual unbiased estimates of both.
    square = np.mean([chunk.mean() ** 2 - chunk.var(ddof=1) / len(chunk) for chunk in chunks])
    found = calibration_error(probabilities, (~right).astype(int), [""] * images)
    assert square > 0
    assert found["value"] == pytest.approx(square**0.5, rel=1e-5)


def all_wrong(images: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return answers that are all wrong, at confidences that differ, 0.95 in the mean."""
    confidence = np.linspace(0.93, 0.97, images)
    np.random.default_rng(seed).shuffle(confidence)
    probabilities = np.stack([confidence, 1 - confidence], axis=1).astype(np.float32)
    return probabilities, np.ones(images, np.int64)


@pytest.mark.fault("M02")
@pytest.mark.parametrize("images", range(2, 31))
def test_few_images_that_are_all_wrong_have_their_calibration_error(images: int) -> None:
    """Were bins of one image taken for free of error, it would be 0."""
    found = calibration_error(*all_wrong(images), [""] * images)
    assert found["value"] == pytest.approx(0.95, abs=0.005)
    # One bin's error is the difference of mean confidence and accuracy: Wilson's interval of it.
    most = stats.binomtest(0, images).proportion_ci(0.95, method="wilson").high
    assert found["low"] == pytest.approx(0.95 - most, abs=0.03)
    assert found["value"] <= found["high"] <= 1


@pytest.mark.fault("M02")
def test_few_groups_that_are_all_wrong_have_their_calibration_error() -> None:
    """Twelve photos of 25 images: whether their confidences mix, or lie apart from each other."""
    probabilities, truth = all_wrong(300)
    photos = [str(number // 25) for number in range(300)]
    ranked = probabilities[probabilities[:, 0].argsort()]
    most = stats.binomtest(0, 12).proportion_ci(0.95, method="wilson").high
    for given in (probabilities, ranked):
        found = calibration_error(given, truth, photos)
        assert found["value"] == pytest.approx(0.95, abs=0.005)
        assert found["low"] == pytest.approx(0.95 - most, abs=0.03)
        assert found["value"] <= found["high"] <= 1
    # Of two photos whose confidences lie apart, one bin has both.
    halves = [str(number // 150) for number in range(300)]
    found = calibration_error(ranked, truth, halves)
    assert found["value"] == pytest.approx(0.95, abs=0.005)


@pytest.mark.fault("M02")
@pytest.mark.parametrize("groups", [2, 3, 7, 40])
def test_the_calibration_error_lies_in_its_interval(groups: int) -> None:
    """Whatever the images, also where the noise of few groups is all that there is."""
    for seed in range(25):
        random = np.random.default_rng(seed)
        images = int(random.integers(groups, 4 * groups + 1))
        probabilities, truth = drawn(images, 3, skill=random.uniform(0, 3), seed=seed)
        place = np.concatenate([np.arange(groups), random.integers(groups, size=images - groups)])
        found = calibration_error(probabilities, truth, [str(g) for g in place])
        assert 0 <= found["low"] <= found["value"] <= found["high"] <= 1
        assert found["low"] < found["high"]


@pytest.mark.fault("M02")
def test_no_bin_has_the_images_of_one_group() -> None:
    """Of 100 groups, one has half of the images, and the lowest confidences."""
    confidence = np.linspace(0.5, 1, 198)
    place = np.concatenate([np.zeros(99, np.int64), np.arange(1, 100)])
    numbers = metrics.calibration_bins(confidence, place)
    assert numbers is not None and np.bincount(numbers).tolist() == [198]
    # Six bins have their places where that group is spread among all.
    np.random.default_rng(0).shuffle(place)
    numbers = metrics.calibration_bins(confidence, place)
    assert numbers is not None and np.bincount(numbers).tolist() == [33] * 6
    assert all(len(np.unique(place[numbers == number])) > 1 for number in range(6))


@pytest.mark.fault("M02")
def test_one_group_has_no_calibration_error() -> None:
    for images, groups in ((1, [""]), (40, ["photo"] * 40)):
        assert metrics.calibration_error(*all_wrong(images), groups, 0.95) is None
        measured = metrics.measure(*all_wrong(images), groups, 0.95)
        assert measured["calibration_error"] is None
        assert measured["accuracy"]["value"] == 0


@pytest.mark.fault("M02")
def test_probabilities_that_hardly_differ_have_nearly_one_calibration_error() -> None:
    """As those of two precisions of one classifier do, on 201 images: bins trade a few images."""
    random = np.random.default_rng(0)
    changes = []
    for _ in range(100):
        logits = random.normal(3, 2, 201)
        found = []
        for shift in (np.zeros(201), random.normal(0, 0.1, 201)):
            sure = 1 / (1 + np.exp(-np.abs(logits + shift)))
            if not shift.any():
                truth = (random.random(201) > sure).astype(int)
            probabilities = np.stack([sure, 1 - sure], axis=1).astype(np.float32)
            found.append(calibration_error(probabilities, truth, [""] * 201)["value"])
        changes.append(abs(found[0] - found[1]))
    # Fifteen bins: 0.015 and 0.055.
    assert np.mean(changes) < 0.011
    assert np.quantile(changes, 0.95) < 0.045


def calibrated(images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn from the probabilities themselves: a perfectly calibrated classifier."""
    random = np.random.default_rng(seed)
    probabilities = softmax(2 * random.normal(size=(images, 3)))
    below = probabilities.cumsum(axis=1) < random.random((images, 1))
    return probabilities, below.sum(axis=1).clip(0, 2)


@pytest.mark.fault("M02")
@pytest.mark.parametrize("images", [100, 1000])
def test_a_calibrated_classifier_has_next_to_no_calibration_error(images: int) -> None:
    """The plain sum of Guo et al. (2017) has a mean of 0.09 and 0.03 there."""
    found = [calibration_error(*calibrated(images, seed), [""] * images) for seed in range(40)]
    assert sum(each["low"] == 0 for each in found) >= 38
    assert sum(each["value"] == 0 for each in found) >= 10, "noise is taken off whole"
    assert np.mean([each["value"] for each in found]) < 0.5 / images**0.5
    assert all(each["low"] <= each["value"] <= each["high"] for each in found)


@pytest.mark.fault("M02")
@pytest.mark.parametrize("copies", [1, 4])
def test_intervals_of_the_calibration_error_hold_the_truth(copies: int) -> None:
    """Answers are right more seldom than they say, by 0.08 everywhere: that is the error."""
    random = np.random.default_rng(0)
    held, values = 0, []
    for _ in range(60):
        confidence = random.choice([0.62, 0.75, 0.82, 0.95], 400).round(3)
        right = random.random(400) < confidence - 0.08
        probabilities = np.stack([confidence, 1 - confidence], axis=1).astype(np.float32)
        groups = [str(number) for number in np.repeat(np.arange(400), copies)]
        many = np.repeat(probabilities, copies, axis=0), np.repeat(~right, copies).astype(int)
        found = calibration_error(*many, groups)
        held += found["low"] <= 0.08 <= found["high"]
        values.append(found["value"])
        assert found["low"] <= found["value"] <= found["high"]
    assert held >= 53
    assert np.mean(values) == pytest.approx(0.08, abs=0.012)


@pytest.mark.fault("M02")
def test_a_calibration_error_of_zero_has_a_width() -> None:
    """All are right and fully sure: what the accuracy leaves open, the calibration leaves open."""
    sure = np.tile(np.array([[1, 0]], np.float32), (50, 1))
    found = calibration_error(sure, np.zeros(50, np.int64), [""] * 50)
    known = stats.binomtest(50, 50).proportion_ci(0.95, method="wilson")
    assert (found["value"], found["low"]) == (0, 0)
    assert found["high"] == pytest.approx(1 - known.low)


def test_auroc_has_the_variance_of_the_bootstrap() -> None:
    """DeLong's, over groups, against drawing groups anew: on images where neither is at its end."""
    probabilities, truth = drawn(400, 3, skill=0.8)
    place = np.arange(400) // 2
    areas = []
    for weights in list(resamples(200))[:4]:
        for weight in weights[:, place]:
            areas.append(
                np.mean(
                    [
                        sklearn_metrics.roc_auc_score(
                            truth == c, probabilities[:, c], sample_weight=weight
                        )
                        for c in range(3)
                    ]
                )
            )
    found = metrics.auroc(probabilities, truth, place, 0.95)
    half_width = (found["high"] - found["low"]) / 2
    assert np.std(areas) * 1.96 < half_width < np.std(areas) * 1.96 * 1.5


def test_many_classes_need_little_memory() -> None:
    """200 classes, 5,000 images: 4 MB of probabilities, and no array of their size in float64."""
    probabilities, truth = drawn(5000, 200, skill=3)
    truth[:200] = np.arange(200)
    groups = [""] * 5000
    tracemalloc.start()
    try:
        found = metrics.measure(probabilities, truth, groups, 0.95)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert probabilities.nbytes == 4_000_000
    assert most < 12e6
    areas = [sklearn_metrics.roc_auc_score(truth == c, probabilities[:, c]) for c in range(200)]
    assert found["auroc"]["value"] == pytest.approx(np.mean(areas))
    assert found["auroc"]["low"] < found["auroc"]["value"] < found["auroc"]["high"]


def test_metrics_reach_neither_torch_nor_scikit_learn() -> None:
    code = (
        "import sys, tlpipe.evaluation.evaluate, tlpipe.evaluation.metrics; "
        "print(sorted({'torch', 'sklearn', 'scipy'} & sys.modules.keys()))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "[]\n"


def drawn_binary(images: int = 400) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    truth = random.integers(0, 3, images)
    raw = random.random((images, 3)) + np.eye(3)[truth] * random.random((images, 1))
    return (raw / raw.sum(1, keepdims=True)).astype(np.float32).round(2), truth


def test_roc_and_precision_are_scikit_learn_s() -> None:
    probabilities, truth = drawn_binary()
    positive = truth == 1
    found = metrics.ranking(probabilities[:, 1], positive)
    false, true, _ = roc_curve(positive, probabilities[:, 1], drop_intermediate=False)
    assert np.allclose(found.false_positives, false[1:])
    assert np.allclose(found.recall, true[1:])
    precision, recall, _ = precision_recall_curve(positive, probabilities[:, 1])
    assert np.allclose(found.precision[::-1], precision[:-1])
    assert np.allclose(found.recall[::-1], recall[:-1])


@pytest.mark.parametrize("decimals", [0, 1, 8])
def test_separation_is_the_area_under_the_curve(decimals: int) -> None:
    random = np.random.default_rng(0)
    known = random.normal(1, 1, 300).round(decimals)
    unknown = random.normal(0, 1, 80).round(decimals)
    expected = roc_auc_score([1] * 300 + [0] * 80, np.concatenate([known, unknown]))
    assert metrics.ood_auroc(known, unknown) == pytest.approx(expected)


def test_separation_of_equal_and_of_separate_scores() -> None:
    same = np.full(5, 0.7)
    assert metrics.ood_auroc(same, same[:2]) == 0.5
    assert metrics.ood_auroc(same, same[:2] - 0.1) == 1
    assert metrics.ood_auroc(same, same[:2] + 0.1) == 0


def test_coverage_counts_who_is_surer() -> None:
    confidence = np.array([0.9, 0.8, 0.8, 0.5])
    hits = np.array([True, True, False, False])
    found = metrics.coverage(confidence, hits)
    assert found.threshold.tolist() == [0.9, 0.8, 0.5]
    assert found.coverage.tolist() == [0.25, 0.75, 1.0]
    assert found.accuracy == pytest.approx([1, 2 / 3, 0.5])
    assert metrics.observed_threshold(found, 0.4) == 0.8
    assert metrics.observed_threshold(found, 0.1) == 0.9


def test_reliability_bins_hold_every_image() -> None:
    probabilities, truth = drawn_binary()
    bins = metrics.reliability(probabilities, truth)
    assert sum(b.images for b in bins) == len(truth)
    hits = (probabilities.argmax(1) == truth).mean()
    assert sum(b.images * b.accuracy for b in bins) / len(truth) == pytest.approx(hits)
    assert [b.confidence for b in bins] == sorted(b.confidence for b in bins)


@pytest.mark.fault("M03")
def test_no_threshold_answers_nothing_even_at_full_confidence() -> None:
    """The softmax of float32 reaches 1.0: a threshold of 1 would answer these."""
    confidence, hits = np.ones(400), np.zeros(400, bool)
    assert metrics.observed_threshold(metrics.coverage(confidence, hits), 0.1) == math.inf
    assert metrics.threshold_for(confidence, hits, [""] * 400, 0.1, 0.95) == math.inf


def upper_bound(wrong: int, images: int, level: float) -> float:
    """Clopper and Pearson's, one-sided, from scipy's exact test."""
    test = stats.binomtest(wrong, images, alternative="less")
    return float(test.proportion_ci(level, method="exact").high)


@pytest.mark.fault("M03")
@pytest.mark.parametrize(("rate", "level"), [(0.02, 0.95), (0.1, 0.9), (0.05, 0.99)])
def test_where_all_are_right_so_many_images_are_enough(rate: float, level: float) -> None:
    least = metrics.images_needed(rate, level)
    assert upper_bound(0, least, level) <= rate < upper_bound(0, least - 1, level)
    confidence = np.linspace(1, 0.5, least)
    hits = np.ones(least, bool)
    found = metrics.threshold_for(confidence, hits, [""] * least, rate, level)
    assert found == 0.5
    fewer = metrics.threshold_for(confidence[1:], hits[1:], [""] * (least - 1), rate, level)
    assert fewer == math.inf
    copies = np.repeat(confidence[1:], 3), np.repeat(hits[1:], 3)
    groups = [str(number) for number in np.repeat(np.arange(least - 1), 3)]
    assert metrics.threshold_for(*copies, groups, rate, level) == math.inf, "copies are one"


@pytest.mark.fault("M03")
def test_the_threshold_is_the_last_whose_bound_holds() -> None:
    """Wrong are the 200th, 330th and every image from the 400th on."""
    confidence = np.linspace(1, 0.5, 600)
    hits = np.ones(600, bool)
    hits[[199, 329]] = False
    hits[399:] = False
    found = metrics.threshold_for(confidence, hits, [""] * 600, 0.02, 0.95)
    answered = int((confidence >= found).sum())
    assert 330 < answered < 400
    # The fewest of which three may be wrong; the next, of which four may be, has 58.
    assert upper_bound(3, answered, 0.95) <= 0.02 < upper_bound(3, answered - 1, 0.95)
    hits[148] = False
    assert metrics.threshold_for(confidence, hits, [""] * 600, 0.02, 0.95) == math.inf


@pytest.mark.fault("M03")
def test_equal_confidences_are_answered_together() -> None:
    """The first 149 of 300 are right; all share one confidence, and ten of them are wrong."""
    hits = np.arange(300) < 290
    assert metrics.threshold_for(np.full(300, 0.9), hits, [""] * 300, 0.02, 0.95) == math.inf
    assert metrics.threshold_for(np.full(300, 0.9), hits | True, [""] * 300, 0.02, 0.95) == 0.9


@pytest.mark.fault("M03")
@pytest.mark.parametrize(("images", "known"), [(300, 0.1), (1000, 0.5)])
def test_new_images_keep_the_error_rate_as_often_as_promised(images: int, known: float) -> None:
    """P(wrong) is (1 - confidence) / 2: of answers above t, the exact error rate is (1 - t) / 4."""
    random = np.random.default_rng(0)
    rate, level, times = 0.05, 0.9, 500
    exceeded, promised, observed_exceeded = 0, 0, 0
    for _ in range(times):
        confidence = random.random(images)
        hits = random.random(images) >= (1 - confidence) / 2
        found = metrics.threshold_for(confidence, hits, [""] * images, rate, level)
        promised += math.isfinite(found)
        exceeded += math.isfinite(found) and (1 - found) / 4 > rate
        observed = metrics.observed_threshold(metrics.coverage(confidence, hits), rate)
        observed_exceeded += (1 - observed) / 4 > rate
    allowed = times * (1 - level)
    assert exceeded <= allowed + 3 * (allowed * level) ** 0.5
    assert promised > known * times
    assert observed_exceeded > 0.4 * times, "what was observed promises nothing"


def answers(count: int, wrong: list[int], *, repeat: int = 1) -> Answers:
    """Return answers for so many images, more and more confident, some of them wrong."""
    confidence = np.repeat(np.linspace(0.6, 0.99, count), repeat).astype(np.float32)
    truth = np.zeros(count, np.int64)
    truth[wrong] = 1
    probabilities = np.stack([confidence, 1 - confidence], axis=1)
    return Answers(np.log(probabilities), probabilities, np.repeat(truth, repeat))


@pytest.mark.fault("M03")
def test_a_threshold_and_what_it_does_on_test_images() -> None:
    held_out, test = answers(400, list(range(60))), answers(100, [0, 1, 2, 3, 50])
    params = evaluate.Params(error_rate=0.02)
    found = evaluate.selective_prediction(test, [""] * 100, held_out, [""] * 400, params)
    assert (found["images"], found["images_needed"]) == (400, 149)
    for part in (found, found["observed"]):
        answered = test.confidence >= part["threshold"]
        assert part["coverage"] == answered.mean()
        assert part["accuracy"]["value"] == test.hits[answered].mean()
        known = stats.binomtest(int(test.hits[answered].sum()), int(answered.sum()))
        low, high = known.proportion_ci(0.95, method="wilson")
        assert part["accuracy"]["low"] == pytest.approx(low)
        assert part["accuracy"]["high"] == pytest.approx(high)
    assert found["observed"]["threshold"] < found["threshold"] < 0.8


@pytest.mark.fault("M03")
def test_no_threshold_is_null_in_the_report() -> None:
    few = answers(100, [])
    found = evaluate.selective_prediction(few, [""] * 100, few, [""] * 100, evaluate.Params())
    assert found["threshold"] is found["coverage"] is found["accuracy"] is None
    assert found["observed"]["threshold"] == pytest.approx(0.6)
    assert found["observed"]["accuracy"]["value"] == 1
    all_wrong = answers(100, list(range(100)))
    found = evaluate.selective_prediction(few, [""] * 100, all_wrong, [""] * 100, evaluate.Params())
    assert found["observed"] == {"threshold": None, "coverage": None, "accuracy": None}
    text = files.json_bytes(found).decode()
    assert json.loads(text)["threshold"] is None
    # A threshold above all test images: none of them is answered.
    sure = answers(200, [])
    halved = (few.probabilities / 2).astype(np.float32)
    low = Answers(few.logits, halved, few.truth)
    found = evaluate.selective_prediction(low, [""] * 100, sure, [""] * 200, evaluate.Params())
    assert (found["coverage"], found["accuracy"]) == (0, None)


@pytest.mark.fault("L04")
def test_images_that_training_has_seen_copies_of_give_no_threshold() -> None:
    right = answers(200, [])
    known = evaluate.selective_prediction(right, [""] * 200, right, [""] * 200, evaluate.Params())
    assert known["threshold"] == pytest.approx(0.6)
    found = evaluate.selective_prediction(
        right, [""] * 200, right, [""] * 200, evaluate.Params(), is_copied=True
    )
    assert found["threshold"] is found["observed"]["threshold"] is None
    assert metrics.why_no_threshold(found).startswith("training has seen copies of the images")


@pytest.mark.fault("M01")
def test_answers_above_a_threshold_count_groups() -> None:
    held_out = answers(200, [])
    once, many = answers(60, [3, 40]), answers(60, [3, 40], repeat=5)
    groups = [str(number) for number in np.repeat(np.arange(60), 5)]
    params = evaluate.Params()
    found = evaluate.selective_prediction(once, [""] * 60, held_out, [""] * 200, params)
    copied = evaluate.selective_prediction(many, groups, held_out, [""] * 200, params)
    assert copied["accuracy"] == pytest.approx(found["accuracy"])


@pytest.mark.parametrize(("error_rate", "likely"), [(0.02, 0.05), (0.1, 0.01), (0.3, 0.1)])
def test_so_many_wrong_answers_are_allowed_as_the_binomial_quantile_says(
    error_rate: float, likely: float
) -> None:
    expected = stats.binom.ppf(likely, np.arange(1500), error_rate) - 1
    assert (metrics._wrong_allowed(1499, error_rate, likely) == expected).all()
