from collections import Counter

from tlpipe.data.folds import deal


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
