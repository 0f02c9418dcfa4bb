"""Which questions a project asks, and which of them are settled."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import Workspace
from tlpipe import files, graph
from tlpipe.backbones import sampling
from tlpipe.data import ingest
from tlpipe.data.manifest import load_manifest, load_split
from tlpipe.labelling import queues
from tlpipe.labelling.queues import DUPLICATES, ISSUES, UNSURE, Item, Queue
from tlpipe.labelling.table import Table, decided
from tlpipe.params import read_yaml
from tlpipe.sources import decisions
from tlpipe.sources.decisions import UNLABELLED, Decision
from tlpipe.training.audit import LABEL_ISSUES

AT = "2026-11-29T02:05:00Z"


@pytest.fixture
def insects(empty: Workspace, tmp_path: Path) -> Workspace:
    """Two classes of six pictures with structure; after ``ingest``, ``audit`` doubts three."""
    random = np.random.default_rng(0)
    for label in ("ant", "bee"):
        folder = tmp_path / "photos" / label
        folder.mkdir(parents=True)
        for number in range(6):
            blocks = random.integers(0, 256, (8, 8, 3)).astype(np.uint8)
            picture = Image.fromarray(blocks).resize((128, 128), Image.Resampling.BICUBIC)
            picture.save(folder / f"{number}.png")
    empty.set_source(tmp_path / "photos", decisions="labels.csv")
    decisions.save(empty.path / "labels.csv", [])
    return empty


def issues(where: Workspace) -> None:
    rows = [
        ("ant/3.png", "ant", "bee", "0.02", "0.98"),
        ("bee/1.png", "bee", "ant", "0.1", "0.9"),
        ("gone.png", "bee", "ant", "0.1", "0.9"),
        ("ant/0.png", "ant", "bee", "0.2", "0.8"),
    ]
    files.write_csv(where.path / graph.PATHS["label_issues"], LABEL_ISSUES, rows)


def asked(where: Workspace, monkeypatch: pytest.MonkeyPatch) -> dict[str, Queue]:
    monkeypatch.chdir(where.path)
    params = ingest.Params(**read_yaml(where.path / "params.yaml")["ingest"])
    found, classes = queues.of_project(
        {name: Path(path) for name, path in graph.PATHS.items()},
        sampling.resolve(params, "efficientnet_lite0"),
    )
    assert classes == ("ant", "bee")
    return {queue.name: queue for queue in found}


def paths(queue: Queue) -> list[list[str]]:
    return [[image.subject.path for image in item.images] for item in queue.items]


def settled(where: Workspace, item: Item) -> list[str]:
    rows = decided(decisions.load(where.path / "labels.csv").rows)
    return [row.what for row in item.decision(rows)]


def decide(where: Workspace, path: str, was: str, label: str) -> None:
    sha256 = hashlib.sha256((where.path / "photos" / path).read_bytes()).hexdigest()
    table = where.path / "labels.csv"
    row = Decision(sha256, "", path, was, label, "ann", AT)
    decisions.save(table, [*decisions.load(table).rows, row])


def test_label_issues_in_the_order_of_audit(
    insects: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    insects.ingest()
    (insects.path / "artifacts/audit").mkdir()
    issues(insects)
    queue = asked(insects, monkeypatch)[ISSUES]
    assert paths(queue) == [["ant/3.png"], ["bee/1.png"], ["ant/0.png"]]
    assert queue.items[0].why == "labelled ant (2%), looks like bee (98%)"
    assert queue.items[0].suggested == ("bee",)
    stored = queue.items[0].images[0].pixels()
    source = Image.open(insects.path / "photos/ant/3.png").resize((256, 256))
    assert np.abs(stored.astype(float) - np.asarray(source, float)).mean() < 3


def test_what_was_decided_is_settled_before_and_after_it_is_applied(
    insects: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    insects.ingest()
    (insects.path / "artifacts/audit").mkdir()
    issues(insects)
    decide(insects, "ant/0.png", "ant", "ant")
    decide(insects, "bee/1.png", "bee", "ant")
    queue = asked(insects, monkeypatch)[ISSUES]
    assert [settled(insects, item) for item in queue.items] == [[], ["ant"], ["keep ant"]]
    insects.ingest()  # bee/1.png is an ant now
    row = ("bee/1.png", "ant", "bee", "0.1", "0.9")
    files.write_csv(insects.path / graph.PATHS["label_issues"], LABEL_ISSUES, [row])
    (item,) = asked(insects, monkeypatch)[ISSUES].items
    assert settled(insects, item) == ["ant"]
    assert item.subjects[0].was == ("bee",)  # as the source says


def test_what_was_undone_is_decided_anew_on_the_label_of_the_source(
    insects: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``ingest`` has applied a decision that is undone then: its label is not the source's."""

    def label() -> str:
        rows = insects.rows("artifacts/ingest/manifest.csv")
        return next(row["label"] for row in rows if row["path"] == "bee/1.png")

    decide(insects, "bee/1.png", "bee", "ant")
    insects.ingest()
    (insects.path / "artifacts/audit").mkdir()
    row = ("bee/1.png", "ant", "bee", "0.1", "0.9")
    files.write_csv(insects.path / graph.PATHS["label_issues"], LABEL_ISSUES, [row])
    assert label() == "ant"
    decisions.save(insects.path / "labels.csv", [])
    (item,) = asked(insects, monkeypatch)[ISSUES].items
    assert settled(insects, item) == []
    Table(insects.path / "labels.csv", "bob").decide([(item.subjects[0], "")])
    (row_made,) = decisions.load(insects.path / "labels.csv").rows
    assert (row_made.was, row_made.label) == ("bee", "")
    insects.ingest()
    paths_now = [row["path"] for row in insects.rows("artifacts/ingest/manifest.csv")]
    assert "bee/1.png" not in paths_now and len(paths_now) == 11


def test_pairs_under_two_labels_and_one_content_under_two(
    insects: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = insects.path / "photos"
    Image.open(photos / "ant/2.png").save(photos / "bee/again.jpg", quality=95)
    shutil.copy(photos / "bee/4.png", photos / "ant/same.png")
    insects.ingest()
    queue = asked(insects, monkeypatch)[DUPLICATES]
    assert [len(names) for names in paths(queue)] == [1, 2]
    same, pair = queue.items
    assert same.subjects[0].was == ("ant", "bee") and not same.can_keep
    assert same.why.endswith("so it is left out: ant/same.png, bee/4.png")
    assert paths(queue)[1] == ["ant/2.png", "bee/again.jpg"]
    decide(insects, "bee/again.jpg", "bee", "ant")
    assert settled(insects, pair) == ["ant"]  # both are ants


@pytest.mark.fault("D84")
def test_a_conflict_with_the_unlabelled_folder_is_about_the_source_s_label(
    insects: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = insects.path / "pool"
    pool.mkdir()
    shutil.copy(insects.path / "photos/bee/4.png", pool / "new.png")
    sha256 = hashlib.sha256((pool / "new.png").read_bytes()).hexdigest()
    row = Decision(sha256, "", f"{UNLABELLED}new.png", "", "ant", "ann", AT)
    decisions.save(insects.path / "labels.csv", [row])
    insects.configure("ingest", unlabelled=str(pool))
    insects.ingest()
    (item,) = asked(insects, monkeypatch)[DUPLICATES].items
    assert item.subjects[0].was == ("bee",) and settled(insects, item) == []
    Table(insects.path / "labels.csv", "bob").decide([(item.subjects[0], "bee")])
    found = decisions.load(insects.path / "labels.csv").rows
    assert {(one.was, one.label) for one in found} == {("", "bee"), ("bee", "bee")}


def test_no_answer_is_shown_for_images_of_the_test_split(artifacts: Path) -> None:
    paths = {name: artifacts.parent / path for name, path in graph.PATHS.items()}
    params = ingest.Params(**read_yaml(artifacts.parent / "params.yaml")["ingest"])
    found, classes = queues.of_project(paths, params)
    items = next(queue for queue in found if queue.name == UNSURE).items
    entries, split = load_manifest(paths["manifest"]), load_split(paths["split"])
    of = {entry.key: entry.path for entry in entries}
    tested = {of[row.key] for row in split if row.split == "test"}
    kinds = set()
    for item in items:
        is_tested = item.subjects[0].path in tested
        kinds.add(is_tested)
        label = item.images[0].label
        if is_tested:
            said = "a test image: no answer is shown, so that its label does not follow it"
            assert (item.why, item.suggested) == (f"labelled {label}; {said}", ())
        else:
            (answer,) = item.suggested
            assert answer in classes
            assert item.why.startswith(f"labelled {label}; answered {answer} (")
    assert kinds == {True, False}


def test_what_has_not_run_is_a_note_and_no_error(
    insects: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    insects.ingest()
    found = asked(insects, monkeypatch)
    assert found[ISSUES].note == "audit has not run on these images: 'tlpipe run' first."
    assert found[UNSURE].note == "evaluate has not run on these images: 'tlpipe run' first."
