"""What ``ingest`` makes of a table of decisions."""

import csv
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.conftest import Workspace
from tlpipe.data.reading import read_all
from tlpipe.params import check_effect
from tlpipe.sources import decisions
from tlpipe.sources.decisions import UNLABELLED, Decision

AT = "2026-11-29T02:05:00Z"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def row(path: Path, was: str, label: str, part: str = "", name: str = "") -> Decision:
    return Decision(sha256(path), part, name or path.name, was, label, "ann", AT)


def decide(where: Workspace, *rows: Decision) -> None:
    decisions.save(where.path / "labels.csv", rows)


def labels(where: Workspace) -> dict[str, str]:
    return {r["path"]: r["label"] for r in where.rows("artifacts/ingest/manifest.csv")}


def make_boxes(photos: Path) -> None:
    """Write six photos, each with a box of an ant and one of a bee."""
    photos.mkdir()
    pictures: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    for number in range(6):
        picture = Image.new("RGB", (200, 120), (20 * number, 60, 90))
        picture.save(photos / f"{number}.png")
        pictures.append({"id": number, "file_name": f"{number}.png", "width": 200, "height": 120})
        for left, category in ((10, 1), (110, 2)):
            box = {"id": len(boxes), "image_id": number, "category_id": category}
            boxes.append(box | {"bbox": [left, 10, 60, 60]})
    names = [{"id": 1, "name": "ant"}, {"id": 2, "name": "bee"}]
    content = {"images": pictures, "annotations": boxes, "categories": names}
    (photos / "instances.json").write_text(json.dumps(content))


@pytest.fixture
def decided(empty: Workspace, photos: Path) -> Workspace:
    """A project of two classes with a table, in which nobody has decided yet."""
    empty.set_source(photos, decisions="labels.csv")
    decide(empty)
    return empty


def test_images_are_corrected_dropped_and_kept(decided: Workspace, photos: Path) -> None:
    dark = photos / "dark"
    decide(
        decided,
        row(dark / "0.png", "dark", "light"),
        row(dark / "1.png", "dark", ""),
        row(dark / "2.png", "dark", "dark"),
    )
    said = decided.ingest()
    assert "labels.csv: 1 corrected, 1 dropped, 1 kept" in said
    found = labels(decided)
    assert (found["dark/0.png"], found["dark/2.png"]) == ("light", "dark")
    assert "dark/1.png" not in found
    (rejected,) = decided.rows("artifacts/ingest/rejects.csv")
    assert rejected == {
        "path": "dark/1.png",
        "reason": "dropped",
        "detail": f"taken out of dark by ann, at {AT}",
    }
    report = json.loads((decided.path / "artifacts/ingest/report.json").read_text())
    assert report["classes"] == {"dark": 10, "light": 13}
    assert report["decisions"] == {"corrected": 1, "dropped": 1, "kept": 1}


def test_a_deleted_row_is_undone_to_the_last_byte(decided: Workspace, photos: Path) -> None:
    decided.ingest()
    out = decided.path / "artifacts/ingest"
    before = {p.name: p.read_bytes() for p in out.glob("*.csv") if p.name[0] != "."}
    decide(
        decided, row(photos / "dark/0.png", "dark", "light"), row(photos / "dark/1.png", "dark", "")
    )
    decided.ingest()
    assert (out / "manifest.csv").read_bytes() != before["manifest.csv"]
    decide(decided)
    decided.ingest()
    assert {name: (out / name).read_bytes() for name in before} == before


def test_dropped_images_do_not_count_as_rejected(decided: Workspace, photos: Path) -> None:
    decided.configure("ingest", max_rejected=0.0)
    decide(decided, row(photos / "dark/1.png", "dark", ""))
    assert "1 dropped" in decided.ingest()


def test_a_class_that_was_decided_away_is_gone(decided: Workspace, photos: Path) -> None:
    shutil.copytree(photos / "dark", photos / "drak")
    for number, path in enumerate((photos / "drak").iterdir()):
        Image.new("RGB", (41, 50), (90 + number, 5, 9)).save(path)
    rows = [row(path, "drak", "dark") for path in sorted((photos / "drak").iterdir())]
    decide(decided, *rows[:6], *(one._replace(label="") for one in rows[6:]))
    decided.ingest()
    assert {*labels(decided).values()} == {"dark", "light"}


def test_one_content_under_two_labels_is_used_once_decided(
    decided: Workspace, photos: Path
) -> None:
    shutil.copy(photos / "dark/3.png", photos / "light/copy.png")
    decided.ingest()
    assert decided.rejects() == {"dark/3.png": "conflict", "light/copy.png": "conflict"}
    both = [row(photos / "dark/3.png", was, "light") for was in ("dark", "light")]
    decide(decided, *both)
    decided.ingest()
    assert decided.rejects() == {}
    found = labels(decided)
    assert found["dark/3.png"] == found["light/copy.png"] == "light"


def test_a_second_pass_over_deep_pictures_applies_them_once(
    decided: Workspace, photos: Path
) -> None:
    import numpy as np

    values = np.linspace(0, 40_000, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(values).save(photos / "dark/deep.png")
    decide(
        decided, row(photos / "dark/0.png", "dark", "light"), row(photos / "dark/1.png", "dark", "")
    )
    said = decided.ingest()
    assert "labels.csv: 1 corrected, 1 dropped" in said
    assert "not applied" not in said
    assert labels(decided)["dark/0.png"] == "light"


def test_decisions_on_a_box_are_on_that_box_alone(empty: Workspace, tmp_path: Path) -> None:
    photos = tmp_path / "boxes"
    make_boxes(photos)
    empty.set_source(photos, decisions="labels.csv")
    decide(empty)
    empty.ingest()
    first = empty.rows("artifacts/ingest/manifest.csv")[0]
    assert first["label"] == "ant" and first["box"]
    decide(empty, row(photos / "0.png", "ant", "bee", part=first["box"], name=first["path"]))
    assert "1 corrected" in empty.ingest()
    found = empty.rows("artifacts/ingest/manifest.csv")
    assert [r["label"] for r in found if r["sha256"] == first["sha256"]] == ["bee", "bee"]
    assert [r["label"] for r in found].count("ant") == 5


def test_a_box_that_was_dropped_counts_in_a_second_pass_too(
    empty: Workspace, tmp_path: Path
) -> None:
    import numpy as np

    photos = tmp_path / "boxes"
    make_boxes(photos)
    values = np.linspace(0, 4_000, 200 * 120).reshape(120, 200).astype(np.uint16)
    Image.fromarray(values).save(photos / "5.png")
    empty.set_source(photos, decisions="labels.csv")
    decide(empty)
    empty.ingest()
    first = empty.rows("artifacts/ingest/manifest.csv")[0]
    decide(empty, row(photos / "0.png", "ant", "", part=first["box"], name=first["path"]))
    Image.fromarray(values * 10).save(photos / "5.png")  # so that the range is another one
    said = empty.ingest()
    assert "labels.csv: 1 dropped" in said
    assert "not there" not in said


@pytest.mark.fault("D75")
def test_an_error_of_the_table_leaves_what_was_there(decided: Workspace, photos: Path) -> None:
    decided.ingest()
    before = (decided.path / "artifacts/ingest/manifest.csv").read_bytes()
    image = photos / "dark/0.png"
    decide(decided, row(image, "dark", "light"), row(image, "dark", ""))
    assert "decides differently on 1 image" in decided.ingest(code=6)
    assert "decides differently on 1 image" in decided.call("check", code=6).stderr
    assert (decided.path / "artifacts/ingest/manifest.csv").read_bytes() == before


def test_bad_values_of_the_two_keys(empty: Workspace, photos: Path) -> None:
    empty.set_source(photos, decisions="gone.csv")
    said = empty.ingest(code=6)
    assert "gone.csv, which ingest.decisions names, is missing; expected the table" in said
    empty.configure("ingest", decisions=None, unlabelled=str(photos))
    said = empty.ingest(code=3)
    assert "has no effect: ingest.decisions is null" in said
    decide(empty)
    empty.configure("ingest", decisions="labels.csv", unlabelled="nowhere")
    assert "ingest.unlabelled nowhere does not exist" in empty.ingest(code=4)


@pytest.mark.fault("D83")
def test_a_decision_while_ingest_runs_stops_it(
    decided: Workspace, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DVC takes the hash of the table when ingest has ended: it would count as applied."""
    first = row(photos / "dark/0.png", "dark", "light")
    second = row(photos / "dark/1.png", "dark", "")
    decide(decided, first)
    decided.ingest()
    before = (decided.path / "artifacts/ingest/manifest.csv").read_bytes()

    def meanwhile(*given: Any) -> Any:
        decide(decided, second)
        return read_all(*given)

    with monkeypatch.context() as patch:
        patch.setattr("tlpipe.data.ingest.read_all", meanwhile)
        said = decided.ingest(code=4)
    assert "labels.csv has changed since ingest read it; expected it to stay the same" in said
    assert (decided.path / "artifacts/ingest/manifest.csv").read_bytes() == before
    assert "1 dropped" in decided.ingest()
    assert labels(decided)["dark/0.png"] == "dark"


@pytest.mark.fault("D83")
def test_a_row_that_is_undone_between_listing_and_reading_stops_it(
    decided: Workspace, unlabelled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decided.configure("ingest", unlabelled=str(unlabelled))
    name = f"{UNLABELLED}day one/0.png"
    decide(decided, row(unlabelled / "day one/0.png", "", "light", name=name))

    def meanwhile(*given: Any) -> None:
        decide(decided)
        check_effect(*given)

    monkeypatch.setattr("tlpipe.data.ingest.check_effect", meanwhile)
    assert "labels.csv has changed since ingest read it" in decided.ingest(code=4)


def test_what_was_corrected_stands_in_the_report(decided: Workspace, photos: Path) -> None:
    shutil.copy(photos / "dark/3.png", photos / "light/copy.png")
    corrected = row(photos / "dark/0.png", "dark", "light")
    both = [row(photos / "dark/3.png", was, "light") for was in ("dark", "light")]
    decide(decided, corrected, *both, row(photos / "dark/1.png", "dark", ""))
    decided.ingest()
    report = json.loads((decided.path / "artifacts/ingest/report.json").read_text())
    found = [(c["path"], c["sha256"], c["part"], c["was"], c["label"]) for c in report["corrected"]]
    assert found == [
        ("dark/0.png", corrected.sha256, "", "dark", "light"),
        ("dark/3.png", both[0].sha256, "", "dark", "light"),
        ("light/copy.png", both[0].sha256, "", "light", "light"),  # of the same bytes
    ]


def test_a_folder_of_the_source_may_be_called_as_those_that_are_added(
    decided: Workspace, photos: Path
) -> None:
    folder = photos / UNLABELLED.rstrip("/") / "ants"
    folder.mkdir(parents=True)
    for number, path in enumerate(sorted((photos / "dark").iterdir())):
        shutil.move(path, folder / f"{number}.png")
    (photos / "dark").rmdir()
    decided.configure("ingest", pattern=r"(?P<label>[^/]+)/[^/]+$")
    decided.ingest()
    assert {*labels(decided).values()} == {"ants", "light"}


@pytest.fixture
def unlabelled(tmp_path: Path) -> Path:
    """A folder of three images that nothing is known of."""
    folder = tmp_path / "pool"
    (folder / "day one").mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (64, 48), (200 - 60 * number, 9, 70)).save(
            folder / f"day one/{number}.png"
        )
    return folder


def test_labelled_images_of_a_folder_become_part_of_the_source(
    decided: Workspace, unlabelled: Path
) -> None:
    decided.configure("ingest", unlabelled=str(unlabelled))
    names = [f"{UNLABELLED}day one/{number}.png" for number in range(3)]
    images = [unlabelled / f"day one/{number}.png" for number in range(3)]
    decide(
        decided,
        row(images[0], "", "light", name=names[0]),
        row(images[1], "", "fox", name=names[1]),
        row(images[2], "", "", name=names[2]),
    )
    said = decided.ingest()
    assert "labels.csv: 2 added" in said
    assert "not there" not in said
    found = labels(decided)
    assert (found[names[0]], found[names[1]]) == ("light", "fox")
    assert names[2] not in found
    assert list(found) == sorted(found)


@pytest.mark.fault("D80")
def test_an_image_of_a_folder_that_has_changed_since_is_rejected(
    decided: Workspace, unlabelled: Path
) -> None:
    decided.configure("ingest", unlabelled=str(unlabelled))
    name, image = f"{UNLABELLED}day one/0.png", unlabelled / "day one/0.png"
    decide(decided, row(image, "", "light", name=name))
    Image.new("RGB", (64, 48), (1, 2, 3)).save(image)
    decided.ingest()
    assert decided.rejects() == {name: "changed"}


def test_a_table_of_the_same_form_is_read_by_a_spreadsheet_s_reader(tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    decisions.save(table, [Decision("a" * 64, "", "x, y.png", "ant", 'bee "b"', "ann", AT)])
    with table.open(newline="") as file:
        assert [r["label"] for r in csv.DictReader(file)] == ['bee "b"']
