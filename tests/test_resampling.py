from collections import Counter

import numpy as np
import pytest
from scipy import optimize, stats

from tlpipe import resampling
from tlpipe.resampling import deal, group_numbers, paired_difference, share_interval


def test_groups_that_have_a_place_keep_it_and_count() -> None:
    """What is new of a class goes where the fewest of it lie, not where the fewest of all lie."""
    classes = {"ant": [f"a{i}" for i in range(6)], "bee": [f"b{i}" for i in range(4)]}
    placed = {"a0": 0, "a1": 0, "b0": 1, "b1": 1, "b2": 1}
    for of_equal_size in (True, False):
        dealt = deal(classes, 2, seed=0, placed=placed, of_equal_size=of_equal_size)
        assert {group: dealt[group] for group in placed} == placed
        assert dealt["b3"] == 0
        assert Counter(dealt[group] for group in classes["ant"]) == {0: 3, 1: 3}


def test_a_group_of_several_classes_counts_for_each() -> None:
    classes = {"ant": ["both", "a"], "bee": ["both", "b"]}
    dealt = deal(classes, 2, seed=0, placed={}, of_equal_size=False)
    assert dealt["a"] == dealt["b"] == 1 - dealt["both"]


def alone(count: int) -> list[str]:
    return [""] * count


def interval(found: dict[str, float]) -> tuple[float, float]:
    return found["low"], found["high"]


def copies(count: int, times: int) -> list[str]:
    """The groups of so many images that each stand there so many times."""
    return [str(number) for number in np.repeat(np.arange(count), times)]


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Newcombe (1998), Two-sided confidence intervals for the single proportion, table I, method 3.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_s_interval_is_the_published_one(
    successes: int, trials: int, low: float, high: float
) -> None:
    found = resampling.wilson_interval(successes, trials, 0.95)
    assert found == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("successes", "trials"), [(0, 7), (1, 7), (4, 9), (180, 200), (60, 60)])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_without_groups_a_share_has_wilson_s_interval(
    successes: int, trials: int, confidence: float
) -> None:
    right = np.arange(trials) < successes
    known = stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    found = share_interval(right, alone(trials), confidence)
    assert found["value"] == successes / trials
    assert interval(found) == pytest.approx((known.low, known.high))


@pytest.mark.fault("M01")
@pytest.mark.parametrize("successes", [0, 1, 47, 60])
def test_copies_of_images_do_not_narrow_the_interval(successes: int) -> None:
    right = np.arange(60) < successes
    known = stats.binomtest(successes, 60).proportion_ci(0.95, method="wilson")
    found = share_interval(np.repeat(right, 10), copies(60, 10), 0.95)
    assert interval(found) == pytest.approx((known.low, known.high))


@pytest.mark.fault("M01")
def test_one_wrong_copy_among_many_does_not_narrow_it_either() -> None:
    right = np.ones(600, bool)
    right[0] = False
    found = share_interval(right, copies(60, 10), 0.95)
    assert found["low"] < 0.95


@pytest.mark.fault("M01")
@pytest.mark.parametrize("right", [[True] * 9, [False] * 9, [True, False, True] * 3])
def test_one_group_says_next_to_nothing(right: list[bool]) -> None:
    found = share_interval(np.array(right), ["photo"] * 9, 0.95)
    assert found["high"] - found["low"] > 0.7
    assert found["low"] <= found["value"] <= found["high"]


def test_two_groups_that_agree_by_chance_are_not_taken_for_many_images() -> None:
    right = np.tile([True, False], 100)
    found = share_interval(right, np.repeat(["one", "two"], 100).tolist(), 0.95)
    assert found["high"] - found["low"] > 0.5


def test_groups_that_always_disagree_count_no_more_than_their_images() -> None:
    """Each of a hundred pairs has one right, one wrong: their shares have no spread at all."""
    right = np.tile([True, False], 100)
    known = stats.binomtest(100, 200).proportion_ci(0.95, method="wilson")
    assert interval(share_interval(right, copies(100, 2), 0.95)) == pytest.approx(
        (known.low, known.high)
    )


@pytest.mark.parametrize("groups", [4, 12, 60])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.98])
@pytest.mark.parametrize("correlation", [0.1, 0.5, 0.9])
def test_intervals_of_grouped_images_hold_the_truth_as_often_as_they_say(
    groups: int, share: float, correlation: float
) -> None:
    """Groups of one to nine images, whose shares are beta distributed with that correlation."""
    random = np.random.default_rng(0)
    spread = (1 - correlation) / correlation
    held, times = 0, 400
    for _ in range(times):
        place = np.repeat(np.arange(groups), random.integers(1, 10, groups))
        of_group = random.beta(share * spread, (1 - share) * spread, groups)
        right = random.random(len(place)) < of_group[place]
        low, high = interval(share_interval(right, place, 0.95))
        held += low <= share <= high
    # Three standard deviations of a count of 400; Wilson's own coverage dips near 0 and 1.
    assert held / times >= 0.95 - 3 * (0.95 * 0.05 / times) ** 0.5 - 0.02


@pytest.mark.fault("M01")
def test_the_mean_over_classes_is_bounded_by_its_smallest_class() -> None:
    """All right: where errors are of the smallest class, they still show in 95 of 100 test sets."""
    classes = np.repeat([0, 1], [300, 12])
    weights = np.repeat([1 / 600, 1 / 24], [300, 12])
    right = np.ones(312, bool)
    found = share_interval(right, alone(312), 0.95, weights=weights, classes=classes)
    known = stats.binomtest(24, 24).proportion_ci(0.95, method="wilson")
    assert interval(found) == pytest.approx((known.low, 1))
    # The worst truth that shows no error in 12 images of the class with a chance of 5 %.
    assert found["low"] < (1 + 0.05 ** (1 / 12)) / 2


def newcombe(both: int, up: int, down: int, none: int) -> tuple[float, float]:
    """The paired interval of Newcombe (1998), method 10 without its continuity correction.

    It combines the intervals of both accuracies, with the phi of the table; independent of ours,
    which combines those of the two kinds of change.
    """
    count = both + up + down + none
    first, second = both + down, both + up
    one, two = (
        stats.binomtest(hits, count).proportion_ci(0.95, method="wilson")
        for hits in (second, first)
    )
    size = (first * (count - first) * second * (count - second)) ** 0.5
    phi = (both * none - up * down) / size if size else 0.0
    value = (second - first) / count
    a, b = second / count - one.low, two.high - first / count
    c, d = one.high - second / count, first / count - two.low
    return (
        value - (a * a + b * b - 2 * phi * a * b) ** 0.5,
        value + (c * c + d * d - 2 * phi * c * d) ** 0.5,
    )


def pair(both: int, up: int, down: int, none: int) -> tuple[np.ndarray, np.ndarray]:
    first = np.repeat([True, False, True, False], [both, up, down, none])
    second = np.repeat([True, True, False, False], [both, up, down, none])
    return first, second


@pytest.mark.parametrize(
    "table", [(150, 20, 12, 18), (80, 5, 9, 6), (40, 10, 10, 40), (20, 80, 60, 40)]
)
def test_a_difference_has_nearly_newcombe_s_interval(table: tuple[int, int, int, int]) -> None:
    found = paired_difference(*pair(*table), alone(sum(table)), 0.95)
    assert found["value"] == pytest.approx((table[1] - table[2]) / sum(table))
    assert interval(found) == pytest.approx(newcombe(*table), abs=0.01)


@pytest.mark.fault("M01")
@pytest.mark.parametrize("count", [1, 50, 200])
def test_where_nothing_changed_some_change_remains_possible(count: int) -> None:
    right = np.arange(count) % 5 > 0
    low, high = interval(paired_difference(right, right, alone(count), 0.95))
    none = stats.binomtest(0, count).proportion_ci(0.95, method="wilson")
    assert low == pytest.approx(-none.high)
    assert high == pytest.approx(none.high)
    # The rule of three: a change of more than so many images shows in 95 of 100 test sets.
    assert count < 50 or high >= 1 - 0.05 ** (1 / count)


@pytest.mark.parametrize("losses", range(1, 11))
def test_losses_alone_are_beyond_chance_where_mcnemar_s_test_says_so(losses: int) -> None:
    """Exact, two-sided: 2 x 0.5^n; the two may differ for one count."""
    found = paired_difference(*pair(80, 0, losses, 20 - losses), alone(100), 0.95)
    if losses <= 4:
        assert found["high"] >= 0, "at most 4 to 0 has p >= 0.125"
    if losses >= 6:
        assert found["high"] < 0, "6 to 0 has p = 0.03"


def test_all_changed_and_groups_of_copies() -> None:
    right = np.arange(40) % 4 > 0
    changed = np.zeros(40, bool)
    found = paired_difference(changed, ~changed, alone(40), 0.95)
    known = stats.binomtest(40, 40).proportion_ci(0.95, method="wilson")
    assert found["value"] == found["high"] == 1
    assert 0.8 < found["low"] <= known.low
    other = np.roll(right, 1)
    once = paired_difference(right, other, alone(40), 0.95)
    many = paired_difference(np.repeat(right, 5), np.repeat(other, 5), copies(40, 5), 0.95)
    assert many == pytest.approx(once)


def test_differences_hold_the_truth_as_often_as_they_say() -> None:
    random = np.random.default_rng(0)
    held, times = 0, 400
    for _ in range(times):
        kind = random.choice(3, 60, p=[0.86, 0.04, 0.10])
        place = np.repeat(np.arange(60), 3)
        first, second = (kind != 1)[place], (kind != 2)[place]
        low, high = interval(paired_difference(first, second, [str(i) for i in place], 0.95))
        held += low <= -0.06 <= high
    assert held / times >= 0.92


def test_images_without_a_group_are_alone() -> None:
    numbers = group_numbers(["a", "", "a", "b", "", "b", "b"]).tolist()
    assert sorted(set(numbers)) == [0, 1, 2, 3]
    assert numbers[0] == numbers[2]
    assert numbers[3] == numbers[5] == numbers[6]


def test_resamples_draw_as_many_groups_as_there_are() -> None:
    weights = np.concatenate(list(resampling.resamples(4)))
    assert weights.shape == (1000, 4)
    assert (weights.sum(axis=1) == 4).all()
    # Each is drawn once on average, with the variance of a binomial number: 4 x 1/4 x 3/4.
    assert weights[:, 1].mean() == pytest.approx(1, abs=0.1)
    assert weights[:, 1].var() == pytest.approx(0.75, abs=0.1)


def test_the_variance_is_the_bootstrap_s() -> None:
    """What stands for the spread of a share, against drawing groups anew a thousand times."""
    random = np.random.default_rng(0)
    place = np.repeat(np.arange(80), random.integers(1, 7, 80))
    right = random.random(len(place)) < random.beta(4, 2, 80)[place]
    groups = [str(number) for number in place]
    weights = np.concatenate(list(resampling.resamples(80)))[:, place]
    drawn = weights @ right / weights.sum(axis=1)
    low, high = interval(share_interval(right, groups, 0.95))
    # Of Wilson's interval the effective number of images, and from it the standard deviation.
    value = right.mean()

    def wider(trials: float) -> float:
        ends = resampling.wilson_interval(value * trials, trials, 0.95)
        return ends[1] - ends[0] - (high - low)

    trials = optimize.brentq(wider, 2, 1e5)
    assert (value * (1 - value) / trials) ** 0.5 == pytest.approx(drawn.std(), rel=0.1)
