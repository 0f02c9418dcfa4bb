"""The page in a real browser: what keys do, what is shown, on a wide and on a narrow screen."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from tests.conftest import wait_until
from tests.labelling.asked import session
from tlpipe.labelling.page import Session, create_app
from tlpipe.sources import decisions

TOKEN = "t0ken"
MANY = tuple(f"class number {n:02d}" for n in range(60))


@contextmanager
def served(found: Session) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        config = uvicorn.Config(create_app(found, TOKEN, port), log_level="error")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield f"http://127.0.0.1:{port}/{TOKEN}/"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[..., Any]]:
    """Open a page; whatever it complains of, or fetches from elsewhere, fails the test."""
    said: list[str] = []
    contexts = []

    def open_page(address: str, *, width: int = 1280, height: int = 800) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height})
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("console", lambda line: said.append(line.text) if line.type == "error" else None)
        home = address.rsplit("/", 2)[0]
        page.on(
            "request",
            lambda request: (
                None if request.url.startswith((home, "data:")) else said.append(request.url)
            ),
        )
        page.goto(address)
        page.wait_for_selector("#images img, #why:not(:empty)")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [text for text in said if "409" not in text] == []


def place(page: Any) -> str:
    return str(page.inner_text("#place"))


def comes_to(page: Any, text: str) -> None:
    wait_until(lambda: place(page).startswith(text))


def labels(folder: Path) -> list[str]:
    return sorted(row.label for row in decisions.load(folder / "labels.csv").rows)


@pytest.mark.slow
def test_keys_decide_and_undo(opened: Callable[..., Any], tmp_path: Path) -> None:
    with served(session(tmp_path)) as address:
        page = opened(address)
        assert place(page) == "1 of 4, 4 left"
        page.keyboard.press("2")
        comes_to(page, "2 of")
        assert labels(tmp_path) == ["bee"]
        page.keyboard.press("d")
        comes_to(page, "3 of")
        page.keyboard.press("k")
        comes_to(page, "4 of")
        assert place(page) == "4 of 4, 1 left"
        assert labels(tmp_path) == ["", "ant", "bee"]
        page.keyboard.press("z")
        comes_to(page, "3 of")
        assert labels(tmp_path) == ["", "bee"]
        page.keyboard.press("ArrowLeft")
        assert "Decided: drop, by ann" in page.inner_text("#decision")
        page.keyboard.press("1")  # it is decided: nothing happens
        page.keyboard.press("z")
        wait_until(lambda: page.locator("#decision").is_hidden())
        assert labels(tmp_path) == ["bee"]
        assert page.inner_text("nav button >> nth=0") == "Label issues: 3 left"


@pytest.mark.slow
def test_names_are_text_and_never_markup(opened: Callable[..., Any], tmp_path: Path) -> None:
    evil = ("ant", "bee", "<img src=x onerror=alert(1)>")
    with served(session(tmp_path, classes=evil)) as address:
        page = opened(address)
        assert page.locator("#classes img, figcaption i").count() == 0
        assert "<img src=x onerror=alert(1)>" in page.inner_text("#classes")
        assert "<i>0</i>.png" in page.inner_text("figcaption")


@pytest.mark.slow
def test_a_pair_is_side_by_side_and_one_decision(
    opened: Callable[..., Any], tmp_path: Path
) -> None:
    with served(session(tmp_path)) as address:
        page = opened(address)
        page.click("nav button >> nth=1")
        wait_until(lambda: page.locator("#images img").count() == 2)
        left, right = (page.locator("figure").nth(n).bounding_box() for n in (0, 1))
        assert left["y"] == right["y"] and left["x"] < right["x"]
        page.keyboard.press("2")
        wait_until(lambda: page.locator("#images img").count() == 1)
        assert labels(tmp_path) == ["bee", "bee"]
        assert page.locator("#keep").is_disabled()
        page.keyboard.press("d")
        wait_until(lambda: page.locator("#decision").is_visible())
        assert page.inner_text("nav button >> nth=1").endswith("0 left")


@pytest.mark.slow
def test_of_many_classes_one_is_typed(opened: Callable[..., Any], tmp_path: Path) -> None:
    with served(session(tmp_path, classes=MANY)) as address:
        page = opened(address)
        page.keyboard.type("number 42")
        assert page.locator("#classes button").count() == 1
        page.keyboard.press("Enter")
        comes_to(page, "2 of")
        assert labels(tmp_path) == ["class number 42"]
        assert page.input_value("#filter") == ""
        page.keyboard.press("Escape")
        page.keyboard.press("d")
        comes_to(page, "3 of")
        assert labels(tmp_path) == ["", "class number 42"]


@pytest.mark.slow
@pytest.mark.fault("D81")
def test_a_second_tab_is_told_what_the_first_decided(
    opened: Callable[..., Any], tmp_path: Path
) -> None:
    with served(session(tmp_path)) as address:
        first, second = opened(address), opened(address)
        first.keyboard.press("2")
        comes_to(first, "2 of")
        second.keyboard.press("d")
        second.wait_for_selector("#message:not([hidden])")
        assert "ann has decided already: bee" in second.inner_text("#message")
        assert "Decided: bee" in second.inner_text("#decision")
        assert labels(tmp_path) == ["bee"]


@pytest.mark.slow
def test_it_fits_a_phone(opened: Callable[..., Any], tmp_path: Path) -> None:
    long = ("ant", "bee", "a class of a very long name " * 6)
    with served(session(tmp_path, classes=long)) as address:
        page = opened(address, width=375, height=667)
        assert page.evaluate("document.documentElement.scrollWidth") <= 375
        page.click("#classes button >> nth=1")
        comes_to(page, "2 of")
        assert labels(tmp_path) == ["bee"]


@pytest.mark.slow
def test_a_page_that_can_only_be_read_says_so(opened: Callable[..., Any], tmp_path: Path) -> None:
    with served(session(tmp_path, read_only="labels.csv cannot be written")) as address:
        page = opened(address)
        assert page.inner_text("#message") == "labels.csv cannot be written"
        assert page.locator("#answers button:enabled").count() == 1  # next
        page.keyboard.press("d")
        time.sleep(0.3)
        assert labels(tmp_path) == []
