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

from tests.labelling.asked import CLASSES, digest, issue, queues, session, table, useful
from tlpipe.errors import ArtifactError
from tlpipe.labelling.page import Session, create_app
from tlpipe.labelling.queues import DUPLICATES, ISSUES, USEFUL, Item
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
    return on(page, ISSUES, issue(number), action, label)


def on(page: TestClient, queue: str, item: Item, action: str, label: str = "") -> tuple[int, str]:
    return post(page, "decide", queue=queue, item=item.key, action=action, label=label)


def shown(page: TestClient, queue: str, place: int) -> str:
    """Return the decision that a page shows, as it is sent to be undone."""
    item = page.get(f"/{TOKEN}/queue/{queue}").json()["items"][place]
    return str(item["decision"]["id"])


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
    first = shown(page, ISSUES, 0)
    assert post(page, "undo", decision=first) == (200, "")
    assert rows(tmp_path) == {(digest(1), "ant"): ""}
    said = (409, "there is no decision to undo: its row is gone")
    assert post(page, "undo", decision=first) == said
    assert post(page, "undo", decision="none")[0] == 400


@pytest.mark.fault("D81")
def test_what_another_has_decided_since_is_not_undone(tmp_path: Path) -> None:
    ann, bob = client(session(tmp_path, "ann")), client(session(tmp_path, "bob"))
    decide(ann, 0, "class", "bee")
    first = shown(ann, ISSUES, 0)
    assert post(bob, "undo", decision=shown(bob, ISSUES, 0)) == (200, "")
    assert decide(bob, 0, "drop") == (200, "")
    code, said = post(ann, "undo", decision=first)
    assert code == 409 and said.startswith("bob has decided already: drop, ")
    assert rows(tmp_path) == {(digest(0), "ant"): ""}


@pytest.mark.fault("D81")
def test_of_a_pair_only_ones_own_decision_is_undone(tmp_path: Path) -> None:
    ann, bob = client(session(tmp_path, "ann")), client(session(tmp_path, "bob"))
    pair = queues()[1].items[0]
    decide(ann, 0, "keep")
    answer = bob.post(
        f"/{TOKEN}/decide",
        json={"queue": DUPLICATES, "item": pair.key, "action": "class", "label": "ant"},
    ).json()
    assert rows(tmp_path) == {(digest(0), "ant"): "ant", (digest(9), "bee"): "ant"}
    assert answer["decision"]["by"] == "bob"
    assert post(bob, "undo", decision=answer["decision"]["id"]) == (200, "")
    assert rows(tmp_path) == {(digest(0), "ant"): "ant"}


@pytest.mark.fault("D81")
@pytest.mark.parametrize(("action", "label"), [("class", "bee"), ("drop", "")])
def test_a_pair_is_not_decided_against_what_one_of_it_is(
    page: TestClient, tmp_path: Path, action: str, label: str
) -> None:
    decide(page, 0, "keep")
    code, said = on(page, DUPLICATES, queues()[1].items[0], action, label)
    assert code == 409
    assert said.startswith("ann has decided on ant/<i>0</i>.png already: keep ant, ")
    assert rows(tmp_path) == {(digest(0), "ant"): "ant"}
    assert on(page, DUPLICATES, queues()[1].items[0], "keep") == (200, "")
    assert rows(tmp_path) == {(digest(0), "ant"): "ant", (digest(9), "bee"): "bee"}


@pytest.mark.fault("D84")
def test_the_same_bytes_in_source_and_folder_are_one_image(tmp_path: Path) -> None:
    found = Session(table(tmp_path), [*queues(), useful(1, 2)], CLASSES, title="insects")
    page, new = client(found), useful(1, 2).items
    assert on(page, USEFUL, new[0], "class", "ant") == (200, "")
    assert decide(page, 1, "class", "bee") == (200, "")  # corrects both
    both = {(digest(1), "ant"): "bee", (digest(1), ""): "bee"}
    assert rows(tmp_path) == both
    assert post(page, "undo", decision=shown(page, ISSUES, 1)) == (200, "")
    assert rows(tmp_path) == {(digest(1), ""): "ant"}
    assert decide(page, 2, "drop") == (200, "")
    assert left(page)[USEFUL] == 0  # dropped from the source: the folder's is decided, too
    code, said = on(page, USEFUL, new[1], "class", "bee")
    assert code == 409 and said.startswith("ann has decided on ant/<i>2</i>.png already: drop, ")
    assert rows(tmp_path)[digest(2), "ant"] == ""


@pytest.mark.fault("D84")
def test_two_files_of_the_folder_that_are_the_same_both_follow_the_source(tmp_path: Path) -> None:
    twice = [
        decisions.Decision(digest(1), "", f"unlabelled://{n}.png", "", "ant", "bob", "2026-01-01")
        for n in range(2)
    ]
    decisions.save(tmp_path / "labels.csv", twice)
    page = client(session(tmp_path))
    assert decide(page, 1, "class", "bee") == (200, "")
    found = decisions.load(tmp_path / "labels.csv").rows
    assert sorted((row.path, row.was, row.label) for row in found) == [
        ("ant/<i>1</i>.png", "ant", "bee"),
        ("unlabelled://0.png", "", "bee"),
        ("unlabelled://1.png", "", "bee"),
    ]
    assert post(page, "undo", decision=shown(page, ISSUES, 1)) == (200, "")
    assert [*decisions.load(tmp_path / "labels.csv").rows] == twice


def test_an_image_without_a_label_cannot_keep_it(tmp_path: Path) -> None:
    page = client(Session(table(tmp_path), [useful(1)], CLASSES, title="insects"))
    assert on(page, USEFUL, useful(1).items[0], "keep")[0] == 400


def test_what_goes_wrong_after_a_decision_is_saved_is_said_so(tmp_path: Path) -> None:
    def fail() -> None:
        raise ArtifactError("the disk is full.")

    found = Session(table(tmp_path), queues(), CLASSES, title="insects", after=fail)
    assert decide(client(found), 0, "drop") == (500, "it was saved, and then: the disk is full.")
    assert rows(tmp_path) == {(digest(0), "ant"): ""}


def test_a_fault_of_the_program_is_not_blamed_on_the_page(tmp_path: Path) -> None:
    def fail() -> None:
        raise ValueError("shapes do not match")

    found = Session(table(tmp_path), queues(), CLASSES, title="insects", after=fail)
    with pytest.raises(ValueError, match="shapes do not match"):
        decide(client(found), 0, "drop")


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
    found.decide([(subject, "bee") for subject in item.subjects])
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


@pytest.mark.fault("D81")
def test_a_decision_on_another_label_that_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    page = client(session(tmp_path))
    new = decisions.Decision(digest(0), "", "x", "fly", "bee", "bob", "2026-01-01T00:00:00Z")
    decisions.save(tmp_path / "labels.csv", [new])
    code, said = decide(page, 0, "keep")
    assert code == 409 and said.startswith("bob has decided on x already: bee, ")
    assert rows(tmp_path) == {(digest(0), "fly"): "bee"}


def test_an_undo_puts_back_what_the_decision_had_replaced(tmp_path: Path) -> None:
    old = decisions.Decision(digest(0), "", "x", "fly", "bee", "bob", "2026-01-01T00:00:00Z")
    decisions.save(tmp_path / "labels.csv", [old])
    page = client(session(tmp_path))
    decide(page, 0, "keep")
    assert post(page, "undo", decision=shown(page, ISSUES, 0)) == (200, "")
    assert decisions.load(tmp_path / "labels.csv").rows == (old,)


def test_the_lock_lies_beside_the_table_for_all_who_share_it(tmp_path: Path) -> None:
    decide(client(session(tmp_path)), 0, "drop")
    assert [path.name for path in tmp_path.iterdir() if path.name[0] == "."] == [".labels.csv.lock"]


def test_a_table_that_cannot_be_written_is_shown_and_no_more(tmp_path: Path) -> None:
    found = session(tmp_path, read_only="it cannot be written")
    assert client(found).get(f"/{TOKEN}/state").json()["read_only"] == "it cannot be written"
    with pytest.raises(OSError, match="File exists"):
        (tmp_path / "file").touch()
        table(tmp_path / "file").check_writable()
