import hashlib
from collections import Counter

import pytest

from tlpipe.data.manifest import Entry
from tlpipe.data.split import Params, assign
from tlpipe.errors import DataError


def entries(count: int, split: str = "", labels: str = "ab", start: int = 0) -> list[Entry]:
    rows = []
    for number in range(start, start + count):
        label = labels[number % len(labels)]
        sha256 = hashlib.sha256(f"{split}{number}".encode()).hexdigest()
        row = Entry(f"{label}/{number}", label, sha256, 1, 1, 1, "RGB", sha256[:16], split)
        rows.append(row)
    return rows


def test_shares_are_those_asked_for() -> None:
    counts = Counter(assign(entries(4000), Params(validation=0.1, test=0.3)))
    assert counts["test"] == pytest.approx(1200, rel=0.1)
    assert counts["validation"] == pytest.approx(400, rel=0.15)


def test_images_added_later_move_no_old_one() -> None:
    old = entries(500)
    before = dict(zip((e.path for e in old), assign(old, Params()), strict=True))
    more = sorted(old + entries(500, start=500), key=lambda entry: entry.sha256)
    after = dict(zip((e.path for e in more), assign(more, Params()), strict=True))
    assert {path: after[path] for path in before} == before


@pytest.mark.fault("D24")
def test_the_same_bytes_stay_in_one_split() -> None:
    twice = [entry for entry in entries(200) for _ in range(2)]
    splits = assign(twice, Params())
    assert splits[::2] == splits[1::2]


def test_another_seed_draws_other_splits() -> None:
    rows = entries(200)
    assert assign(rows, Params(seed=0)) != assign(rows, Params(seed=1))


def test_given_splits_are_kept_and_completed() -> None:
    rows = entries(100, "train") + entries(50, "test", start=100)
    splits = assign(rows, Params())
    assert set(splits[:100]) == {"train", "validation"}
    assert set(splits[100:]) == {"test"}
    rows += entries(50, "validation", start=150)
    assert Counter(assign(rows, Params())) == {"train": 100, "test": 50, "validation": 50}


def test_a_small_class_stands_in_every_split() -> None:
    for start in range(0, 300, 3):
        rows = entries(100) + entries(3, labels="c", start=1000 + start)
        assert set(assign(rows, Params())[100:]) == {"train", "validation", "test"}


def test_a_class_that_cannot_is_refused() -> None:
    row = entries(1, labels="c", start=1000)
    with pytest.raises(DataError, match=r"class 'c' has 3 images, and none for"):
        assign(entries(100) + row * 3, Params())
