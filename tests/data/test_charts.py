"""Pictures of a data set: what their axes say. How a source was understood, in words."""

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib import font_manager
from PIL import Image, ImageFont

from tests.conftest import Workspace
from tlpipe.data import charts
from tlpipe.data.charts import describe_source
from tlpipe.data.manifest import Entry
from tlpipe.sources import Candidate


@pytest.mark.parametrize("least", [1, 28, 100, 4000])
@pytest.mark.parametrize("ratio", [1.0, 1.02, 1.5, 7.0, 900.0])
def test_axes_have_numbers_whatever_the_range(least: int, ratio: float, tmp_path: Path) -> None:
    most = round(least * ratio)
    ticks = charts.size_ticks(least, most)
    assert 1 <= len(ticks) <= 6
    assert len(ticks) > 1 or most == least
    assert ticks == sorted(set(ticks)) and ticks[0] > 0
    # Two digits are exact to a twentieth; what is closer together has all of its digits.
    assert math.isclose(ticks[0], least, rel_tol=0.05)
    assert math.isclose(ticks[-1], most, rel_tol=0.05)
    entries = [
        Entry("", "", "", "", 0, side, side, "L", "PNG", "", "", "") for side in (least, most)
    ]
    charts.sizes(tmp_path / "sizes.png", entries)
    with Image.open(tmp_path / "sizes.png") as picture:
        assert picture.size[0] > 500


def test_a_gallery_shows_each_image_above_its_caption(tmp_path: Path) -> None:
    """In rows, and no caption gets in the way of another one's image, however long it is."""
    shades = [(40 * i, 255 - 40 * i, 10 * i) for i in range(1, 6)]
    squares = [np.full((32, 32, 3), shade, np.uint8) for shade in shades]
    captions = ["W" * 300, "", "two words " * 40, "a\nb\t$x$", "Früchte"]
    charts.gallery(tmp_path / "g.png", squares, captions, title="five", columns=2)
    with Image.open(tmp_path / "g.png") as picture:
        found = np.asarray(picture.convert("RGB")).astype(int)
    boxes = []
    for shade in shades:
        inside = (found == shade).all(axis=2)
        rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
        top, bottom, left, right = rows[0], rows[-1], columns[0], columns[-1]
        assert inside[top : bottom + 1, left : right + 1].all()
        boxes.append((top, bottom, left, right))
    assert [(top, left) for top, _, left, _ in boxes] == sorted(
        (top, left) for top, _, left, _ in boxes
    )
    assert len({left for _, _, left, _ in boxes}) == 2
    below = [
        (found[bottom + 1 : bottom + 30, left : right + 1] < 128).any()
        for _, bottom, left, right in boxes
    ]
    assert below == [True, False, True, True, True]
    between = found[:, boxes[0][3] + 1 : boxes[1][2]]
    assert (between[boxes[0][0] :] == 255).all()

    charts.gallery(tmp_path / "none.png", [], [], title="none")
    with Image.open(tmp_path / "none.png") as picture:
        assert np.asarray(picture.convert("L")).min() < 128


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
    assert list(describe_source(labelled(glass=12, metal=1200, paper=3))) == [
        "1,215 images in 3 classes: glass 12, metal 1,200, paper 3"
    ]
    given = [
        candidate._replace(split="train" if number % 3 else "test", group=f"p{number // 5}")
        for number, candidate in enumerate(labelled(a=10, b=20))
    ]
    assert list(describe_source(given)) == [
        "30 images in 2 classes: a 10, b 20",
        "given splits: train 20, test 10",
        "6 given groups, the largest is p0 with 5 images",
    ]
    half = given[:15] + labelled(c=4)
    assert list(describe_source(half))[1:] == [
        "given splits: train 10, test 5, none 4",
        "3 given groups, the largest is p0 with 5 images; 4 images have none",
    ]


@pytest.mark.fault("D73")
def test_many_classes_take_one_short_line() -> None:
    (line,) = describe_source(of({f"c{number:04}": 5 + number for number in range(1000)}))
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
    _, *said = describe_source(of({"glass": 12, "metal": 12, label: 5}))
    if what is None:
        assert said == []
    else:
        (line,) = said
        assert line.startswith(f"look at the classes: {label!r} (5) ")
        assert what in line


@pytest.mark.fault("D73")
def test_labels_that_are_nearly_all_different_are_pointed_out() -> None:
    _, line = describe_source(of({f"id{number}": 1 + number % 2 for number in range(24)}))
    assert "36 images have 24 different labels, such as 'id0'" in line
    assert len(list(describe_source(labelled(a=1, b=2)))) == 1
    _, *said = describe_source(of({f"{number / 7:.3f}": 1 for number in range(24)}))
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


@pytest.mark.fault("M26")
def test_letters_that_no_font_has_are_said_once_and_by_us(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where no font of Chinese is installed."""
    only = {"DejaVu Sans": charts.fonts()["DejaVu Sans"]}
    monkeypatch.setattr(charts, "fonts", lambda: only)
    charts._letters.cache_clear()
    charts._say_missing.cache_clear()
    square = np.zeros((8, 8, 3), np.uint8)
    with warnings.catch_warnings(action="error"):
        for name in ("猫", "猫"):
            figure = charts.new_figure(2, 2)
            figure.subplots().set_title(name)
            charts.save_figure(figure, tmp_path / "figure.png")
            charts.gallery(tmp_path / "gallery.png", [square], [name], title="é")
    charts._letters.cache_clear()
    (said,) = [record.message for record in caplog.records]
    assert "no installed font has the letters 猫: pictures show boxes" in said


@pytest.mark.fault("M26")
def test_letters_come_from_the_next_font_that_has_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A font of formulas stands for one of Chinese: it has letters that the first one lacks."""
    known = {font.name: Path(font.fname) for font in font_manager.fontManager.ttflist}
    both = {name: known[name] for name in ("cmr10", "DejaVu Sans")}
    monkeypatch.setattr(charts, "fonts", lambda: both)
    charts._letters.cache_clear()
    face, alone = charts._Face(11), ImageFont.truetype(both["DejaVu Sans"], 11)
    assert face.length("aЖ") == face.length("a") + alone.getlength("Ж")
    charts.gallery(tmp_path / "a.png", [np.zeros((8, 8, 3), np.uint8)], ["aЖ"], title="Ж")
    charts._letters.cache_clear()
    assert not caplog.records
