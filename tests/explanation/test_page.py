"""The page: names that are markup, no address but its own data, and in a real browser."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tlpipe.data import charts
from tlpipe.data import pixels as packed
from tlpipe.data.images import Sampling
from tlpipe.explanation import page
from tlpipe.explanation.figures import Figure, Picture, Row

ISSUE = "label issue"
EVIL = "<script>window.evil = 1</script> & \"'</script>"
COUNT = 9


def points(folder: Path, count: int = COUNT, labels: Sequence[str] = ("ants", EVIL)) -> page.Points:
    """Return images on a grid of three columns, the last of them a label issue."""
    folder.mkdir()
    sampling = Sampling(short_side_px=60, interpolation="bilinear")
    writer = packed.Writer(folder, sampling)
    for n in range(count):
        square = np.full((60, 60, 3), (20 * (n % 12), 0, 200), np.uint8)
        writer.append(n.to_bytes(8), square, np.zeros((64, 64), np.uint8))
    writer.close()
    writer.finish(decoder="", data_sha256="", data_version="")
    numbers = np.arange(count)
    return page.Points(
        labels=labels,
        places=np.stack([numbers % 3 / 2, numbers // 3 / 2], axis=1).astype(np.float32),
        paths=[f"a/{n}.png" for n in range(count - 1)] + [f"b/{EVIL}.png"],
        splits=["train", "test", "validation"] * (count // 3),
        is_fitted=[True, False, True] * (count // 3),
        label=[0] * (count - 1) + [1],
        answer=[0] * (count - 2) + [1, 0],
        probability=[0.5] * count,
        suggested=[-1] * (count - 1) + [0],
        squares=packed.load(folder).array,
        rows=numbers,
        total=2 * count,
        tested=4 * count // 3,
        accuracy=0.875,
        issues=5,
    )


FIGURES = [
    Figure(
        "mistakes",
        f"Title {EVIL}",
        "how to read it",
        [Row(EVIL, [Picture(np.zeros((50, 50, 3), np.uint8), EVIL)], EVIL)],
    ),
    Figure("neighbours", "Nothing", "There are none."),
    Figure(
        "stage-01",
        "A stage",
        "read",
        [Row("row", [Picture(np.zeros((5, 3, 3), np.uint8), "caption")])],
        is_folded=True,
    ),
]


class Read(HTMLParser):
    """Collects what elements there are, the text, and every address."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_names_that_are_markup_stay_text_and_nothing_is_fetched(tmp_path: Path) -> None:
    text = page.write(f"About {EVIL}", FIGURES, points(tmp_path / "pixels")).decode()
    found = Read(text)
    assert found.tags.count("script") == 2  # the data and the program
    assert "".join(found.words).count(EVIL) == 6  # about, link, title, heading, note, caption
    assert all(address.startswith(("data:image/jpeg", "#")) for address in found.addresses)
    assert "://" not in text
    assert not re.search("url\\(|@import|fetch\\(|XMLHttp", text)
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    content = json.loads(data)
    assert content["labels"] == ["ants", EVIL]
    assert content["path"][-1] == f"b/{EVIL}.png"
    assert content["x"][:3] == content["x"][3:6]
    assert content["x"][0] == 0
    assert content["x"][2] == 9999
    assert "There are none." in text


def test_paths_that_are_no_text_are_shown_escaped(tmp_path: Path) -> None:
    strange = Figure("a", "t", "r", [Row("caf\udce9.png", [])])
    text = page.write("", [strange], points(tmp_path / "pixels")).decode()
    assert "caf\\udce9.png" in text


def test_only_a_part_of_the_images_is_said_and_thumbnails_get_smaller(tmp_path: Path) -> None:
    few = points(tmp_path / "few")
    assert "3 of 12 test images, the explained mistakes first, and 6 of 6 others" in few.reading
    assert "87.5% of all test images are answered rightly" in few.reading
    assert "Rings are label issues: 1 of 5 that audit has found." in few.reading
    every = replace(few, total=9)
    assert every.reading.startswith("Each mark is one of all 9 images.")
    many = points(tmp_path / "many", 2_001)
    sizes = []
    for some in (few, many):
        data = json.loads(
            re.findall(r'id="data">(.*?)</script>', page.write("", [], some).decode())[0]
        )
        sizes.append(data["sprite"]["side"])
    assert sizes == [48, 32]


def test_48_classes_have_a_colour_and_a_shape_of_their_own() -> None:
    assert len({page.style(label) for label in range(48)}) == 48
    # Neighbours differ in both.
    assert all(
        a != b for n in range(47) for a, b in zip(page.style(n), page.style(n + 1), strict=True)
    )


def test_the_picture_of_the_map_is_drawn(tmp_path: Path) -> None:
    page.draw_map(tmp_path / "map.png", points(tmp_path / "pixels"), "Bundle 0123abcd.")
    with Image.open(tmp_path / "map.png") as picture:
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20


@pytest.mark.parametrize(("classes", "named"), [(2, ["_blue", "red", ISSUE]), (25, [ISSUE])])
def test_the_legend_names_classes_and_rings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classes: int, named: list[str]
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(charts, "save_figure", lambda figure, _: drawn.append(figure))
    labels = ("_blue", "red", *map(str, range(2, classes)))
    page.draw_map(tmp_path / "map.png", points(tmp_path / "pixels", 9, labels), "Bundle 01.")
    assert drawn[0].axes[0].get_xlabel().endswith("\nBundle 01.")
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == named


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """The page in a wide window; at the end it has said no error and asked for nothing else."""
    path = tmp_path / "index.html"
    path.write_bytes(page.write("About", FIGURES, points(tmp_path / "pixels")))
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    tab = context.new_page()
    said: list[str] = []
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("console", lambda message: said.append(message.text))
    tab.on("request", lambda request: said.append(request.url))
    tab.goto(path.as_uri())
    tab.wait_for_function("sprite.complete")
    yield tab
    assert [line for line in said if not line.startswith(("data:", path.as_uri()))] == []
    assert tab.evaluate("window.evil") is None
    context.close()


def hover(tab: Any, number: int) -> None:
    tab.locator("#map").evaluate("map => map.scrollIntoView()")
    x, y = tab.evaluate(f"place({number})")
    box = tab.locator("#points").bounding_box()
    tab.mouse.move(box["x"] + x + 3, box["y"] + y - 2)


@pytest.mark.slow
def test_pointing_at_an_image_shows_it(opened: Any) -> None:
    words = opened.locator("#words")
    assert "Point at an image" in words.inner_text()
    hover(opened, 8)
    shown = words.inner_text()
    assert EVIL in shown
    assert f"b/{EVIL}.png" in shown
    assert "ants (a mistake)" in shown
    assert "is it ants?" in shown
    assert "validation: the model was fitted on it" in shown
    middle = "document.getElementById('picture').getContext('2d').getImageData(72, 72, 1, 1).data"
    red, green, blue, _ = opened.evaluate(f"[...{middle}]")
    assert (abs(red - 160) < 12, green < 12, abs(blue - 200) < 12) == (True, True, True)
    hover(opened, 0)
    assert "a/0.png" in words.inner_text()
    hover(opened, 1)
    assert "fitted" not in words.inner_text()


@pytest.mark.slow
def test_filters_hide_images_of_classes_and_splits(opened: Any) -> None:
    def count() -> str:
        return str(opened.locator("#count").inner_text())

    assert count() == "9 of 9 images shown"
    opened.get_by_label("train", exact=True).uncheck()
    assert count() == "6 of 9 images shown"
    hover(opened, 0)  # which is hidden
    assert "a/0.png" not in opened.locator("#words").inner_text()
    opened.get_by_label("train", exact=True).check()
    opened.get_by_label("label issues").check()
    assert count() == "1 of 9 images shown"
    opened.get_by_label("label issues").uncheck()
    opened.get_by_label("mistakes", exact=True).check()
    assert count() == "2 of 9 images shown"
    opened.locator("#none").click()
    assert count() == "0 of 9 images shown: tick a class and a split"
    opened.locator("#every").click()
    assert count() == "2 of 9 images shown"


@pytest.mark.slow
def test_arrow_keys_go_from_image_to_image(opened: Any) -> None:
    opened.locator("#points").focus()
    paths = []
    for key in ("ArrowRight", "ArrowRight", "ArrowUp", "ArrowLeft"):
        opened.keyboard.press(key)
        paths.append(opened.locator("dd").last.inner_text())
    # It begins at the middle of the grid.
    assert paths == ["a/4.png", "a/5.png", "a/2.png", "a/1.png"]
    opened.keyboard.press("Escape")
    assert "Point at an image" in opened.locator("#words").inner_text()
    before = opened.evaluate("place(8)")
    opened.keyboard.press("+")
    assert opened.evaluate("place(8)") != before
    opened.locator("#whole").click()
    assert opened.evaluate("place(8)") == before


@pytest.mark.slow
def test_on_a_telephone_nothing_is_wider_than_the_screen_and_a_tap_shows_an_image(
    browser: Any, tmp_path: Path
) -> None:
    path = tmp_path / "index.html"
    path.write_bytes(page.write("About", FIGURES, points(tmp_path / "pixels")))
    with browser.new_context(
        viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True
    ) as context:
        tab = context.new_page()
        tab.goto(path.as_uri())
        tab.wait_for_function("sprite.complete")
        assert tab.evaluate("document.documentElement.scrollWidth") <= 360
        x, y = tab.evaluate("place(4)")
        tab.locator("#points").scroll_into_view_if_needed()
        tab.locator("#points").tap(position={"x": x + 6, "y": y})
        assert "a/4.png" in tab.locator("#words").inner_text()
