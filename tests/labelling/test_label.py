"""The command ``label``: from the command line to the table, and from the table to a run."""

import json
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.conftest import Workspace, wait_until
from tlpipe import versioning
from tlpipe.sources import decisions


class Page:
    """What a running command serves."""

    def __init__(self, address: str) -> None:
        self.address = address

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.address + path) as answer:
            return json.load(answer)

    def left(self) -> dict[str, int]:
        return {queue["name"]: queue["left"] for queue in self.get("state")["queues"]}

    def decide(self, queue: str, item: str, action: str, label: str = "") -> Any:
        body = {"queue": queue, "item": item, "action": action, "label": label}
        headers = {"Content-Type": "application/json", "Origin": self.address.rsplit("/", 2)[0]}
        request = urllib.request.Request(
            f"{self.address}decide", json.dumps(body).encode(), headers
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)


@contextmanager
def labelling(where: Workspace, *words: str) -> Iterator[tuple[Page, list[str]]]:
    """Run the command; yield its page, and the lines that it prints, all of them in the end."""
    command = [sys.executable, "-m", "tlpipe", "label", *words]
    lines: list[str] = []
    with subprocess.Popen(
        command,
        cwd=where.path,
        env=where.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                lines.append(line.rstrip())
                if found := re.match(r"open (http://127\.0\.0\.1:\d+/\S+/) ", line):
                    break
            else:
                raise AssertionError("\n".join(lines))
            yield Page(found[1]), lines
        finally:
            process.send_signal(signal.SIGINT)
            lines += process.stdout.read().splitlines()
    assert process.returncode == 0, "\n".join(lines)


def make_pool(folder: Path) -> Path:
    for number in range(12):
        shade = (40 + 9 * number, 90, 9) if number % 2 else (9, 60, 100 + 9 * number)
        path = folder / f"day {number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (48, 40), shade).save(path)
    return folder


@pytest.mark.slow
def test_a_project_s_labels_and_new_images_become_its_data(
    workspace: Workspace, photos: Path, tmp_path: Path
) -> None:
    workspace.set_source(photos)
    workspace.use_small_network()
    workspace.reproduce("embed")
    pool = make_pool(tmp_path / "pool")
    shutil.copy(photos / "dark/0.png", pool / "known.png")
    place = workspace.path / "artifacts/label"
    place.touch()
    said = workspace.call("label", str(pool), code=6).stderr
    assert "tlpipe: artifacts/label: File exists; " in said and "Traceback" not in said
    place.unlink()
    with labelling(workspace, str(pool), "--every", "3") as (page, lines):
        assert page.left()["useful"] == 12
        items = page.get("queue/useful")["items"]
        first = page.get("state")["queues"][-1]["order"]
        assert all(item["decision"] is None for item in items)
        page.decide("useful", items[0]["key"], "class", "light")
        page.decide("useful", items[1]["key"], "drop")
        page.decide("useful", items[2]["key"], "class", "dark")
        assert page.left()["useful"] == 9
        wait_until(lambda: page.get("state")["queues"][-1]["order"] != first)
        again = page.get("queue/useful")["items"]
        assert sum(item["decision"] is not None for item in again) == 3
    assert "labels.csv: 2 added, 1 dropped" in lines
    to_apply = f"to apply them: ingest.decisions: labels.csv, ingest.unlabelled: {pool}, in"
    assert any(line.startswith(to_apply) for line in lines), lines
    workspace.configure("ingest", decisions="labels.csv", unlabelled=str(pool))
    workspace.call("upgrade")
    workspace.ingest()
    manifest = workspace.rows("artifacts/ingest/manifest.csv")
    assert len(manifest) == 26
    added = [row["path"] for row in manifest if row["path"].startswith("unlabelled://")]
    assert len(added) == 2


@pytest.mark.slow
def test_a_folder_without_a_project_becomes_one(tmp_path: Path, cache_env: dict[str, str]) -> None:
    where = Workspace(tmp_path, cache_env)
    make_pool(tmp_path / "pool")
    with labelling(where, "pool", "--classes", "red, blue") as (page, lines):
        assert page.get("state")["classes"] == ["red", "blue"]
        for item in page.get("queue/useful")["items"]:
            name = item["images"][0]["path"]
            number = int(Path(name).stem)
            action = "drop" if number == 11 else "class"
            label = "" if number == 11 else ("red" if number % 2 else "blue")
            page.decide("useful", item["key"], action, label)
        assert page.left() == {"useful": 0}
    assert "pool/labels.csv: 11 added, 1 dropped" in lines
    assert "next: tlpipe init NAME --source pool, which reads pool/labels.csv" in lines
    said = where.call("init", "colours", "--source", "pool", "--no-git").stdout
    assert "labels.csv" in said
    colours = Workspace(tmp_path / "colours", cache_env)
    colours.ingest()
    report = json.loads((colours.path / "artifacts/ingest/report.json").read_text())
    assert report["classes"] == {"blue": 6, "red": 5}


@pytest.mark.slow
def test_dvc_sees_each_decision_and_a_fresh_clone_replays_them(
    workspace: Workspace, photos: Path, tmp_path: Path
) -> None:
    from tests.data.test_decisions import row

    workspace.set_source(photos, decisions="labels.csv")
    table = workspace.path / "labels.csv"
    decisions.save(table, [])
    workspace.call("upgrade")
    workspace.run("dvc", "repro", "split")
    before = (workspace.path / "artifacts/ingest/manifest.csv").read_bytes()
    undecided = versioning.data_version(workspace.path)
    assert {r["data_version"] for r in workspace.rows("artifacts/ingest/manifest.csv")} == {
        undecided
    }
    decisions.save(table, [row(photos / "dark/0.png", "dark", "light")])
    assert "labels.csv" in workspace.run("dvc", "status", "ingest").stdout
    workspace.run("dvc", "repro", "split")
    after = (workspace.path / "artifacts/ingest/manifest.csv").read_bytes()
    assert after != before
    assert versioning.data_version(workspace.path) != undecided
    who = ("-c", "user.name=t", "-c", "user.email=t@example.invalid")
    workspace.run("git", "add", "--all")
    workspace.run("git", *who, "commit", "-qm", "decided")
    workspace.run("git", "clone", "-q", str(workspace.path), str(tmp_path / "clone"))
    clone = Workspace(tmp_path / "clone", workspace.env)
    clone.run("dvc", "repro", "split")
    assert (clone.path / "artifacts/ingest/manifest.csv").read_bytes() == after
    table.unlink()
    said = workspace.call("ingest", code=6).stderr
    assert "labels.csv, which ingest.decisions names, is missing" in said
    decisions.save(table, [])
    workspace.run("dvc", "repro", "split")
    assert (workspace.path / "artifacts/ingest/manifest.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--classes", "ant,bee"), 3, "--classes names the classes of a folder that belongs to no"),
        (("pool", "--classes", "ant"), 3, "--classes is 'ant'; expected two or more names"),
        (("pool", "--classes", "ant,,bee"), 3, "--classes is 'ant,,bee'; expected two or more"),
        (("pool", "--classes", "a,b,a"), 3, "--classes is 'a,b,a'; .*'a' stands twice"),
        (("pool", "--classes", "a,b\x07"), 3, "is not printable"),
        (("nowhere", "--classes", "a,b"), 3, "nowhere is no folder; expected one of images"),
        (("pool", "--classes", "a,b", "--params", "params.yaml"), 3, "a project has the classes"),
        (("pool",), 3, "is in no project"),
        ((), 3, "is in no project"),
        (("--params", "nowhere/params.yaml"), 3, "nowhere/params.yaml is missing"),
        (("--every", "0"), 2, ""),
        (("--port", "70000"), 2, ""),
    ],
)
def test_bad_input(
    tmp_path: Path, cache_env: dict[str, str], words: tuple[str, ...], code: int, said: str
) -> None:
    (tmp_path / "pool").mkdir()
    error = Workspace(tmp_path, cache_env).call("label", *words, code=code).stderr
    assert re.search(said, error), error


def test_bad_input_in_a_project(empty: Workspace, photos: Path, tmp_path: Path) -> None:
    empty.set_source(photos)
    assert "is no folder" in empty.call("label", "nowhere", code=3).stderr
    said = empty.call("label", str(photos), "--classes", "a,b", code=3).stderr
    assert "--classes is 'a,b', and a project has the classes of its source" in said
    assert "artifacts/ingest/pixels" in empty.call("label", code=6).stderr
    empty.configure("ingest", decisions="labels.csv", unlabelled=str(photos))
    decisions.save(empty.path / "labels.csv", [])
    said = empty.call("label", str(make_pool(tmp_path / "pool")), code=3).stderr
    assert f"is not ingest.unlabelled, which is {photos}" in said
    empty.ingest()
    (empty.path / "labels.csv").write_text("<<<<<<< HEAD\n")
    assert "line 1 of labels.csv" in empty.call("label", code=6).stderr


def test_a_port_that_is_taken(tmp_path: Path, cache_env: dict[str, str]) -> None:
    import socket

    make_pool(tmp_path / "pool")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        words = ("label", "pool", "--classes", "a,b", "--port", port)
        said = Workspace(tmp_path, cache_env).call(*words, code=9).stderr
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in said
    assert "Name another port with --port, or 0 for a free one." in said
