"""The page's server: what it shows, what it saves, and whom it does not answer."""

import io
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from tests.labelling.asked import digest, issue, queues, session, table
from tlpipe.labelling.page import Session, create_app
from tlpipe.labelling.queues import DUPLICATES, ISSUES
from tlpipe.sources import decisions

TOKEN, PORT = "t0ken", 8123
HERE = f"http://127.0.0.1:{PORT}"


def client(found: Session) -> TestClient:
    return TestClient(create_app(found, TOKEN, PORT), base_url=HERE, headers={"Origin": HERE})


@pytest.fixture
def page(tmp_path: Path) -> TestClient:
    return client(session(tmp_path))


def post(page: TestClient, what: str, **body: str) -> tuple[int, str]:
    answer = page.post(f"/{TOKEN}/{what}", json=body)
    return answer.status_code, answer.json().get("detail", "")


def decide(page: TestClient, number: int, action: str, label: str = "") -> tuple[int, str]:
    body = {"queue": ISSUES, "item": issue(number).key, "action": action, "label": label}
    return post(page, "decide", **body)


def rows(folder: Path) -> dict[tuple[str, str], str]:
    return {(r.sha256, r.was): r.label for r in decisions.load(folder / "labels.csv").rows}


def left(page: TestClient) -> dict[str, int]:
    state = page.get(f"/{TOKEN}/state").json()
    return {queue["name"]: queue["left"] for queue in state["queues"]}


def test_what_is_decided_is_on_disk_when_it_answers(page: TestClient, tmp_path: Path) -> None:
    assert left(page) == {ISSUES: 4, DUPLICATES: 2}
    assert decide(page, 0, "class", "bee") == (200, "")
    assert decide(page, 1, "drop") == (200, "")
    assert decide(page, 2, "keep") == (200, "")
    assert rows(tmp_path) == {
        (digest(0), "ant"): "bee",
        (digest(1), "ant"): "",
        (digest(2), "ant"): "ant",
    }
    # Both of the pair are bees now.
    assert left(page) == {ISSUES: 1, DUPLICATES: 1}
    items = page.get(f"/{TOKEN}/queue/{ISSUES}").json()["items"]
    assert [item["decision"] and item["decision"]["what"] for item in items] == [
        "bee",
        "drop",
        "keep ant",
        None,
    ]


def test_undo_deletes_the_row(page: TestClient, tmp_path: Path) -> None:
    decide(page, 0, "class", "bee")
    decide(page, 1, "drop")
    assert post(page, "undo", queue=ISSUES, item=issue(0).key) == (200, "")
    assert rows(tmp_path) == {(digest(1), "ant"): ""}
    said = (409, "there is no decision to undo: its row is gone")
    assert post(page, "undo", queue=ISSUES, item=issue(0).key) == said


def test_one_decision_is_on_both_of_a_pair(page: TestClient, tmp_path: Path) -> None:
    pair, same = queues()[1].items
    assert post(page, "decide", queue=DUPLICATES, item=pair.key, action="class", label="bee") == (
        200,
        "",
    )
    assert rows(tmp_path) == {(digest(0), "ant"): "bee", (digest(9), "bee"): "bee"}
    code, said = post(page, "decide", queue=DUPLICATES, item=same.key, action="keep")
    assert (code, said) == (400, "this cannot stay as it is: name its class, or drop it")
    post(page, "decide", queue=DUPLICATES, item=same.key, action="class", label="ant")
    assert (digest(7), "bee") in rows(tmp_path) and (digest(7), "ant") in rows(tmp_path)
    assert left(page)[DUPLICATES] == 0


@pytest.mark.fault("D81")
def test_of_two_people_who_decide_at_once_the_second_is_told(tmp_path: Path) -> None:
    ann, bob = client(session(tmp_path, "ann")), client(session(tmp_path, "bob"))
    assert decide(ann, 0, "class", "bee")[0] == 200
    code, said = decide(bob, 0, "drop")
    assert code == 409
    assert said.startswith("ann has decided already: bee, ")
    assert rows(tmp_path) == {(digest(0), "ant"): "bee"}


@pytest.mark.fault("D81")
def test_nothing_is_lost_where_many_decide_at_once(tmp_path: Path) -> None:
    pages = [client(session(tmp_path, f"p{n}", issues=40)) for n in range(4)]
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda n: decide(pages[n % 4], n, "class", "bee")[0], range(40)))
    assert done == [200] * 40
    assert len(rows(tmp_path)) == 40


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.labelling.asked import queues, table
from tlpipe import files
found, items = table(Path(sys.argv[1])), queues(40)[0].items
for number, item in enumerate(items):
    if number == 7:  # when the new table is written, and not yet in place
        Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    found.decide(item.subjects, lambda _: "bee")
    print(number, flush=True)
"""


@pytest.mark.fault("D82")
def test_a_kill_between_decisions_loses_none_that_was_said(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(done.stdout.split()) == 7
    assert len(rows(tmp_path)) == 7
    page = client(session(tmp_path, issues=40))
    assert left(page)[ISSUES] == 33
    assert decide(page, 7, "class", "bee") == (200, "")
    assert len(rows(tmp_path)) == 8


@pytest.mark.parametrize(
    ("action", "label", "said"),
    [
        ("class", "fly", "'fly' is no class here"),
        ("class", "", "the action is 'class'; expected"),
        ("drop", "bee", "the action is 'drop'; expected"),
        ("sell", "", "the action is 'sell'; expected class, drop or keep"),
    ],
)
def test_what_is_no_decision_is_not_saved(
    page: TestClient, tmp_path: Path, action: str, label: str, said: str
) -> None:
    code, detail = decide(page, 0, action, label)
    assert code == 400 and said in detail
    assert rows(tmp_path) == {}


def test_bodies_that_are_none(page: TestClient) -> None:
    json = {"Content-Type": "application/json"}
    for content in (b"{", b"[]", b'{"queue": 1, "item": "x"}'):
        assert page.post(f"/{TOKEN}/decide", content=content, headers=json).status_code == 400
    long = b'{"queue": "' + b"x" * 70_000
    assert page.post(f"/{TOKEN}/decide", content=long, headers=json).status_code == 413
    assert page.post(f"/{TOKEN}/decide", content=b"queue=x").status_code == 415
    assert post(page, "decide", queue="none", item="x", action="drop")[0] == 400
    assert page.get(f"/{TOKEN}/queue/none").status_code == 404


@pytest.mark.fault("S40")
def test_only_this_page_is_answered(page: TestClient, tmp_path: Path) -> None:
    assert page.get("/state").status_code == 403
    assert page.get("/other/state").status_code == 403
    assert page.get("/").status_code == 403
    assert page.get(f"/{TOKEN}/state", headers={"Host": "evil.example"}).status_code == 403
    assert page.get(f"/{TOKEN}/state", headers={"Host": f"localhost:{PORT}"}).status_code == 200
    body = {"queue": ISSUES, "item": issue(0).key, "action": "drop", "label": ""}
    for origin in ("http://evil.example", f"http://localhost:{PORT}", "null", ""):
        answer = page.post(f"/{TOKEN}/decide", json=body, headers={"Origin": origin})
        assert answer.status_code == 403, origin
    assert rows(tmp_path) == {}


@pytest.mark.fault("S40")
@pytest.mark.parametrize(
    "path", ["page.py", "../page.py", "..%2fpage.py", "image/..%2f..%2fpage.html", "docs"]
)
def test_no_path_of_a_request_is_opened(page: TestClient, path: str) -> None:
    assert page.get(f"/{TOKEN}/{path}").status_code in (403, 404)


def test_the_page_fetches_nothing_from_elsewhere(page: TestClient) -> None:
    for name, kind in (("", "text/html"), ("page.js", "text/javascript"), ("page.css", "text/css")):
        answer = page.get(f"/{TOKEN}/{name}")
        assert answer.headers["content-type"].startswith(kind)
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "//" not in answer.text.replace("// ", "")
        assert "innerHTML" not in answer.text


def test_an_image_is_what_is_stored(page: TestClient) -> None:
    answer = page.get(f"/{TOKEN}/image/{issue(3).images[0].key}")
    assert answer.headers["content-type"] == "image/png"
    pixels = np.asarray(Image.open(io.BytesIO(answer.content)))
    assert pixels.shape == (8, 8, 3) and (pixels == 60).all()
    assert page.get(f"/{TOKEN}/image/{digest(200)[:24]}").status_code == 404


@pytest.mark.fault("D75")
def test_a_table_that_was_spoiled_meanwhile_is_said_and_left(
    page: TestClient, tmp_path: Path
) -> None:
    decide(page, 0, "drop")
    spoiled = (tmp_path / "labels.csv").read_text() + "<<<<<<< HEAD\n"
    (tmp_path / "labels.csv").write_text(spoiled)
    code, said = decide(page, 1, "drop")
    assert code == 500 and "line 3 of" in said
    assert (tmp_path / "labels.csv").read_text() == spoiled


def test_a_decision_on_another_label_of_the_source_is_replaced(tmp_path: Path) -> None:
    old = decisions.Decision(digest(0), "", "x", "fly", "bee", "bob", "2026-01-01T00:00:00Z")
    decisions.save(tmp_path / "labels.csv", [old])
    page = client(session(tmp_path))
    assert left(page)[ISSUES] == 4
    assert decide(page, 0, "keep") == (200, "")
    assert rows(tmp_path) == {(digest(0), "ant"): "ant"}


def test_a_table_that_cannot_be_written_is_shown_and_no_more(tmp_path: Path) -> None:
    found = session(tmp_path, read_only="it cannot be written")
    assert client(found).get(f"/{TOKEN}/state").json()["read_only"] == "it cannot be written"
    with pytest.raises(OSError, match="File exists"):
        (tmp_path / "file").touch()
        table(tmp_path / "file").check_writable()
