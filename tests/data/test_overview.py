"""What ``check`` says of how a source was understood."""

from pathlib import Path

import pytest

from tests.conftest import Workspace
from tlpipe.data.overview import describe
from tlpipe.sources.candidates import Candidate


def labelled(**classes: int) -> list[Candidate]:
    return of(classes)


def of(classes: dict[str, int]) -> list[Candidate]:
    return [
        Candidate(f"{label}/{number}.png", f"{label}/{number}.png", label)
        for label, count in classes.items()
        for number in range(count)
    ]


@pytest.mark.fault("D73")
def test_classes_splits_and_groups_are_said() -> None:
    assert list(describe(labelled(glass=12, metal=1200, paper=3))) == [
        "1,215 images in 3 classes: glass 12, metal 1,200, paper 3"
    ]
    given = [
        candidate._replace(split="train" if number % 3 else "test", group=f"p{number // 5}")
        for number, candidate in enumerate(labelled(a=10, b=20))
    ]
    assert list(describe(given)) == [
        "30 images in 2 classes: a 10, b 20",
        "given splits: train 20, test 10",
        "6 given groups, the largest is p0 with 5 images",
    ]
    half = given[:15] + labelled(c=4)
    assert list(describe(half))[1:] == [
        "given splits: train 10, test 5, none 4",
        "3 given groups, the largest is p0 with 5 images; 4 images have none",
    ]


@pytest.mark.fault("D73")
def test_many_classes_take_one_short_line() -> None:
    (line,) = describe(of({f"c{number:04}": 5 + number for number in range(1000)}))
    assert line == (
        "504,500 images in 1,000 classes: the largest are c0999 1,004, c0998 1,003, c0997 1,002; "
        "the smallest c0002 7, c0001 6, c0000 5"
    )


@pytest.mark.fault("D73")
@pytest.mark.parametrize(
    ("label", "what"),
    [
        ("nan", "stand for no label"),
        ("None", "stand for no label"),
        ("N/A", "stand for no label"),
        ("_rejected", "no classes, take them out"),
        (".cache", "no classes, take them out"),
        ("thumbnails", "no classes, take them out"),
        ("glass thumbs", "no classes, take them out"),
        ("glass,metal", "hold several labels"),
        ("metal; wood", "hold several labels"),
        ("0.37", "numbers with decimals"),
        ("1e3", None),
        ("1,5", "numbers with decimals"),
        ("MÃ¼ll", "UTF-8 that was read in another encoding"),
        ("Müll €".encode().decode("cp1252"), "UTF-8 that was read in another encoding"),
        ("M\ufffdll", "UTF-8 that was read in another encoding"),
        ("Müll", None),
        ("茶", None),
        ("7", None),
        ("Nantes", None),
        ("rosa, alba", None),
        ("thumbergia", None),
        ("trash", None),
        ("high temp", None),
        ("not_ripe", None),
    ],
)
def test_a_class_that_is_plainly_none_is_pointed_out(label: str, what: str | None) -> None:
    _, *said = describe(of({"glass": 12, "metal": 12, label: 5}))
    if what is None:
        assert said == []
    else:
        (line,) = said
        assert line.startswith(f"look at the classes: {label!r} (5) ")
        assert what in line


@pytest.mark.fault("D73")
def test_labels_that_are_nearly_all_different_are_pointed_out() -> None:
    _, line = describe(of({f"id{number}": 1 + number % 2 for number in range(24)}))
    assert "36 images have 24 different labels, such as 'id0'" in line
    assert len(list(describe(labelled(a=1, b=2)))) == 1
    _, *said = describe(of({f"{number / 7:.3f}": 1 for number in range(24)}))
    assert len(said) == 2
    assert len(said[0]) < 250


@pytest.mark.fault("D73")
def test_check_shows_them(empty: Workspace, photos: Path) -> None:
    (photos / "thumbnails").mkdir()
    for path in (photos / "dark").iterdir():
        (photos / "thumbnails" / path.name).write_bytes(path.read_bytes())
    empty.set_source(photos)
    empty.configure("evaluate", ood=str(photos))
    said = empty.call("check").stdout
    assert "36 images in 3 classes: dark 12, light 12, thumbnails 12\n" in said
    assert "look at the classes: 'thumbnails' (12) are called like what is kept beside" in said
