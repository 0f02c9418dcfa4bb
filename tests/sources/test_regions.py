"""Regions of annotations: what is rejected is no background, and damaged numbers are rejects."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Workspace
from tests.sources.test_annotations import coco as scenes
from tests.sources.test_annotations import recorded
from tests.sources.test_boxes import coco, pictures, read, voc, write
from tests.sources.test_cases import put

HUGE = 10**400
LEFT = {"bbox": [0, 0, 240, 200]}  # of a photo of 300 x 200 pixels
REJECTED: dict[str, dict[str, Any]] = {
    "crowd": {"iscrowd": 1, **LEFT},
    "crowd of polygons": {"iscrowd": 1, "segmentation": [[0, 0, 240, 0, 240, 200, 0, 200]]},
    "unknown category": {**LEFT, "category_id": 91},
    "no category": {**LEFT, "category_id": None},
    "no id": {**LEFT, "id": None},
    "negative": {"bbox": [240, 200, -240, -200]},
}
UNKNOWN: dict[str, dict[str, Any]] = {
    "no number": {"bbox": [10, 10, float("nan"), 20]},
    "three numbers": {"bbox": [1, 2, 3]},
    "huge": {"bbox": [1, 2, HUGE, 3]},
    "keypoints": {"keypoints": [1, 2, 3]},
    "crowd": {"iscrowd": 1},
    "no id": {"id": None, "bbox": [1, 2]},
    "whole photo": {},
}


def check_rejects(root: Path, cases: dict[str, dict[str, Any]]) -> None:
    """Write scenes with two boxes each, and one more annotation that is not used."""
    content = scenes(root, "all.json", len(cases))
    for number, (name, values) in enumerate(cases.items()):
        added = {"id": name, "image_id": number, "category_id": 1, **values}
        if added["id"] is None:
            del added["id"]
        content["annotations"].append(added)
    recorded(root, content)


@pytest.mark.fault("D30")
def test_no_background_is_taken_from_regions_of_refused_annotations(
    empty: Workspace, tmp_path: Path
) -> None:
    check_rejects(tmp_path / "coco", REJECTED)
    empty.set_source(tmp_path / "coco", background="nothing", box_margin=0)
    empty.ingest()
    rows = {row["path"]: row["box"] for row in empty.rows("artifacts/ingest/manifest.csv")}
    taken = {path: int(box.split()[0]) for path, box in rows.items() if path.endswith("#nothing")}
    assert len(taken) == len(REJECTED)
    assert min(taken.values()) >= 240
    assert len(rows) == 3 * len(REJECTED)
    assert set(empty.rejects().values()) == {
        "crowd", "no_label", "bad_annotation", "degenerate_box",
    }  # fmt: skip


@pytest.mark.fault("D30")
def test_a_photo_with_a_region_that_is_not_known_gives_no_background(
    empty: Workspace, tmp_path: Path
) -> None:
    check_rejects(tmp_path / "coco", UNKNOWN)
    empty.set_source(tmp_path / "coco", background="nothing", box_margin=0)
    empty.replace("params.yaml", "max_rejected: 0.5", "max_rejected: 1.0")
    assert "the class 'nothing'" not in empty.ingest()
    found = empty.rejects()
    for number in range(len(UNKNOWN)):
        assert found[f"images/{number:03}.png#nothing"] == "no_background"
    assert {row["label"] for row in empty.rows("artifacts/ingest/manifest.csv")} == {"red", "blue"}


def test_an_object_of_voc_that_is_an_error_is_no_background(tmp_path: Path) -> None:
    for i, name in enumerate(pictures(tmp_path, "images")):
        text = voc(name, name, ("ant", "")[i % 2])
        put(tmp_path / "images" / f"{name[:-4]}.xml", text)
    # A second annotation of the first photo.
    text = voc("000.jpg", "000.jpg").replace(">50<", ">70<")
    put(tmp_path / "more" / "000.xml", text.replace("000.jpg", "../images/000.jpg"))
    found, rejects, _ = read(tmp_path, background="nothing")
    assert rejects["more/000.xml"].startswith("repeated: ")
    squares = [candidate for candidate in found if candidate.label == "nothing"]
    unnamed = ((10, 8, 50, 48),)
    assert [one.occupied for one in squares] == [((10, 8, 70, 48),), unnamed, (), unnamed]


@pytest.mark.fault("D30")
@pytest.mark.parametrize("margin", [0, 0.1, 0.4])
def test_a_box_just_beside_the_photo_is_a_reject(
    empty: Workspace, tmp_path: Path, margin: float
) -> None:
    content = scenes(tmp_path / "coco", "all.json", 8)
    content["annotations"] = content["annotations"][4:]
    for number, box in enumerate(([-3, 100, 1.5, 3], [302, 100, 1.5, 3])):
        content["annotations"].append(
            {"id": f"out {number}", "image_id": number, "category_id": 1, "bbox": box}
        )
    # A pixel or two beyond the edge are no mistake.
    content["annotations"][0]["bbox"] = [-2, 100, 60, 60]
    recorded(tmp_path / "coco", content)
    empty.set_source(tmp_path / "coco", background="nothing", box_margin=margin)
    empty.replace("params.yaml", "max_rejected: 0.5", "max_rejected: 1.0")
    empty.ingest()
    outside = {path: why for path, why in empty.rejects().items() if "out" in path}
    assert outside == {f"images/00{i}.png#out {i}": "box_outside" for i in (0, 1)}
    assert empty.rejects()["images/000.png#nothing"] == "no_background"
    boxes = [[*map(int, row["box"].split())] for row in empty.rows("artifacts/ingest/manifest.csv")]
    assert all(right > left >= 0 and lower > upper >= 0 for left, upper, right, lower in boxes)


DAMAGED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "null": (lambda c: c["annotations"].insert(0, None), "it is None, no object"),
    "a number": (lambda c: c["annotations"].insert(1, 5), "it is 5, no object"),
    "a huge edge": (lambda c: c["annotations"][0].update(bbox=[1, HUGE, 2, 3]), "too large"),
    "a huge corner": (
        lambda c: c["annotations"][0].update(bbox=None, segmentation=[[1, 2, 3, 4, 5, HUGE]]),
        "too large",
    ),
    "a huge id": (lambda c: c["annotations"][0].update(image_id="9" * 5000), "is that of no image"),
    "an edge that is no number": (
        lambda c: c["annotations"][0].update(bbox=[1, None, 2, 3]), "bad_annotation: ant: ",
    ),
    "an image": (lambda c: c["images"].append(None), "an image has no id or no file_name"),
}  # fmt: skip


@pytest.mark.fault("D30")
@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_number_or_object_is_one_reject(tmp_path: Path, name: str) -> None:
    change, message = DAMAGED[name]
    content = coco(pictures(tmp_path, "images"))
    change(content)
    write(tmp_path / "all.json", content)
    _, rejects, _ = read(tmp_path)
    assert len(rejects) == 1
    assert message in next(iter(rejects.values()))


def test_boxes_in_shares_of_the_sides_are_said_to_be_that(tmp_path: Path) -> None:
    content = coco(pictures(tmp_path, "images"))
    content["annotations"][3]["bbox"] = [0.1, 0.1, 0.5, 0.4]
    write(tmp_path / "images" / "all.json", content)
    _, rejects, _ = read(tmp_path)
    assert list(rejects.values()) == [
        "degenerate_box: bee: 0.1, 0.1, 0.6, 0.5 has no area; if these are shares of the photo's "
        "sides, export them in pixels"
    ]


@pytest.mark.fault("D30")
@pytest.mark.parametrize(
    "size",
    ["<width>500</width>", "<width>inf</width><height>500</height>",
     "<width>nan</width><height>500</height>", "<width>500</width><height>1e300</height>"],
)  # fmt: skip
def test_a_size_of_voc_that_is_none_counts_for_nothing(tmp_path: Path, size: str) -> None:
    for i, name in enumerate(pictures(tmp_path, "images")):
        text = voc(name, name, ("ant", "bee")[i % 2], f"<size>{size}</size>")
        if i == 3:
            text = text.replace(">50<", ">inf<")
        put(tmp_path / "images" / f"{name[:-4]}.xml", text)
    found, rejects, _ = read(tmp_path)
    assert [candidate.drawn_in for candidate in found] == [None] * 3
    assert rejects == {"images/003.jpg#1": "degenerate_box: bee: 10, 8, inf, 48 has no area"}


@pytest.mark.fault("D47")
@pytest.mark.parametrize("is_first", [False, True])
@pytest.mark.parametrize("other", ["gone.jpg", "003.jpg"])
def test_an_id_of_two_images_is_a_conflict_in_any_order(
    tmp_path: Path, other: str, is_first: bool
) -> None:
    content = coco(pictures(tmp_path, "images", 6))
    content["images"].insert(0 if is_first else 4, {"id": 1, "file_name": other})
    write(tmp_path / "all.json", content)
    found, rejects, _ = read(tmp_path)
    files = {f"images/{i:03}.jpg" for i in range(6)} - {"images/001.jpg", f"images/{other}"}
    assert {candidate.file for candidate in found} == files
    assert rejects["images/001.jpg"].startswith("conflict: the id 1 stands for several images")
    expected = "conflict: " if other == "003.jpg" else "missing: "
    assert rejects["images/003.jpg" if other == "003.jpg" else other].startswith(expected)


def test_the_side_of_a_square_without_boxes_is_that_of_any_box(tmp_path: Path) -> None:
    names = pictures(tmp_path, "images", 20)
    content = coco(names)
    content["annotations"] = [
        {"id": i, "image_id": 0, "category_id": (3, 7)[i], "bbox": [1, 1, 10 + 10 * i, 5]}
        for i in (0, 1)
    ]
    write(tmp_path / "all.json", content)
    found, _, _ = read(tmp_path, background="nothing")
    assert {candidate.side_px for candidate in found} == {None, 10, 20}


def test_what_is_of_boxes_has_no_effect_on_folders(empty: Workspace, photos: Path) -> None:
    empty.set_source(photos, background="nothing", box_margin=0.2)
    said = "ingest.background: nothing, ingest.box_margin: 0.2 have no effect: "
    assert f"{said}{photos} holds no boxes." in empty.ingest(code=3)
    assert said in empty.call("check", code=3).stderr
    empty.replace("params.yaml", 'background: "nothing"', "background: null")
    empty.replace("params.yaml", "box_margin: 0.2", "box_margin: 0.1")
    empty.ingest()


@pytest.mark.parametrize("kind", ["table", "coco", "voc"])
def test_a_pattern_is_for_names_only(empty: Workspace, photos: Path, kind: str) -> None:
    empty.set_source(photos, kind=kind, pattern="(?P<label>[^/]+)/")
    said = empty.ingest(code=3)
    assert "pattern reads labels from the names of folders and files, and kind is" in said
    empty.replace("params.yaml", json.dumps(kind), '"folders"')
    empty.ingest()
