import csv
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.conftest import Workspace
from tlpipe.data import pixels as packed


def table(photos: Path, rows: list[tuple[str, ...]], header: tuple[str, ...]) -> None:
    with (photos / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def listed(photos: Path) -> list[tuple[str, str]]:
    return [(f"{p.parent.name}/{p.name}", p.parent.name) for p in sorted(photos.rglob("*.png"))]


def test_a_table_names_labels_splits_and_groups(empty: Workspace, photos: Path) -> None:
    header = ("path", "label", "split", "group", "camera")
    given = ["train"] * 6 + ["val"] * 3 + ["TEST"] * 3
    rows = [
        (path, f"is {label}", given[i % 12], f"patient {i // 3}", "one")
        for i, (path, label) in enumerate(listed(photos))
    ]
    table(photos, rows, header)
    empty.set_source(photos)
    empty.ingest()
    manifest = empty.rows("out/manifest.csv")
    assert {row["label"] for row in manifest} == {"is dark", "is light"}
    assert Counter(row["split"] for row in manifest) == {"train": 12, "validation": 6, "test": 6}
    groups = {row["path"]: row["group"] for row in manifest}
    assert len(set(groups.values())) == 8
    assert len({groups[path] for path, *_ in rows[:3]}) == 1


def test_a_parquet_table_is_read_alike(empty: Workspace, photos: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    table(photos, listed(photos), ("path", "label"))
    empty.set_source(photos)
    empty.ingest()
    expected = (empty.path / "out/manifest.csv").read_bytes()
    (photos / "labels.csv").unlink()
    paths, labels = zip(*listed(photos), strict=True)
    parquet.write_table(pa.table({"label": labels, "path": paths}), photos / "labels.parquet")
    empty.ingest()
    assert (empty.path / "out/manifest.csv").read_bytes() == expected


def test_rows_that_cannot_be_used_are_named(empty: Workspace, photos: Path) -> None:
    rows = [
        *listed(photos),
        ("dark/none.png", "dark"),
        ("../photos/dark/1.png", "dark"),
        ("/etc/passwd", "dark"),
        ("dark/2.png", "light"),
        ("dark/3.png", "dark"),
        ("dark/4.png", ""),
    ]
    table(photos, rows, ("path", "label"))
    empty.set_source(photos)
    empty.ingest()
    assert empty.rejects() == {
        "dark/none.png": "missing",
        "../photos/dark/1.png": "outside_root",
        "/etc/passwd": "outside_root",
        "dark/2.png": "conflict",
        "dark/3.png": "repeated",
        "dark/4.png": "no_label",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: table(root, [("a", "b", "later")], ("path", "label", "split")),
         "row 1 of labels.csv has the split 'later'; expected train, validation, test or nothing"),
        (lambda root: [table(root, [], ("path", "label")),
                       shutil.copy(root / "labels.csv", root / "more.csv")],
         "the source holds 2 tables with path and label: labels.csv, more.csv; expected one"),
    ],
)  # fmt: skip
def test_a_table_that_makes_no_sense_is_refused(
    empty: Workspace, photos: Path, change: Callable[[Path], object], message: str
) -> None:
    change(photos)
    empty.set_source(photos)
    assert message in empty.ingest(code=4)


def test_a_kind_can_be_forced(empty: Workspace, photos: Path) -> None:
    table(photos, [(path, "x" + label) for path, label in listed(photos)], ("path", "label"))
    empty.set_source(photos, kind="folders")
    empty.ingest()
    assert {row["label"] for row in empty.rows("out/manifest.csv")} == {"dark", "light"}
    assert empty.rejects() == {"labels.csv": "no_label"}
    empty.replace("params.yaml", 'kind: "folders"', 'kind: "coco"')
    assert "ingest.kind is coco, but" in empty.ingest(code=4)
    empty.replace("params.yaml", 'kind: "coco"', "kind: yaml")
    assert "ingest.kind is 'yaml'; it must be 'auto', 'folders'" in empty.ingest(code=3)


def test_a_pattern_says_what_folders_mean(empty: Workspace, photos: Path) -> None:
    root = photos.parent / "deep"
    for i, (path, label) in enumerate(listed(photos)):
        target = root / f"patient-{i // 2}" / f"{'train' if i % 4 < 2 else 'test'}-{label}"
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(photos / path, target / f"{i}.png")
    (root / "notes.txt").write_text("x")
    pattern = r"^(?P<group>[^/]+)/(?P<split>[a-z]+)-(?P<label>[^/]+)/"
    empty.set_source(root, pattern=pattern)
    empty.ingest()
    manifest = empty.rows("out/manifest.csv")
    assert Counter(row["label"] for row in manifest) == {"dark": 12, "light": 12}
    assert Counter(row["split"] for row in manifest) == {"train": 12, "test": 12}
    assert len({row["group"] for row in manifest}) == 12
    assert empty.rejects() == {"notes.txt": "no_label"}
    for bad, message in (
        (r"(?P<name>x)", "it must have a group (?P<label>...)"),
        ("(", "it is no"),
    ):
        empty.replace("params.yaml", json.dumps(pattern), json.dumps(bad))
        pattern = bad
        assert message in empty.ingest(code=3)


def scene(path: Path, boxes: list[tuple[tuple[int, int, int, int], str]]) -> None:
    """Draw coloured boxes on noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(path.name.encode())
    noise = np.random.default_rng(seed).integers(90, 160, (20, 30, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((300, 200), Image.Resampling.BICUBIC)
    for box, colour in boxes:
        ImageDraw.Draw(image).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=colour)
    image.save(path)


def coco(root: Path, name: str, photos: int, start: int = 0) -> dict[str, Any]:
    """Write scenes with a red and a blue box each, and their annotations."""
    content: dict[str, Any] = {"images": [], "annotations": []}
    content["categories"] = [{"id": 1, "name": "red"}, {"id": 2, "name": "blue"}]
    for i in range(start, start + photos):
        file = f"{i:03d}.png"
        red, blue = (20 + i, 30, 80 + i, 90), (150 + i, 100, 190 + i, 180)
        scene(root / "images" / file, [(red, "red"), (blue, "blue")])
        content["images"].append({"id": i, "file_name": file, "width": 300, "height": 200})
        for category, (left, upper, right, lower) in ((1, red), (2, blue)):
            content["annotations"].append(
                {
                    "id": 10 * i + category,
                    "image_id": i,
                    "category_id": category,
                    "bbox": [left, upper, right - left, lower - upper],
                }
            )
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / name).write_text(json.dumps(content))
    return content


def test_coco_boxes_become_images_with_their_margin(empty: Workspace, tmp_path: Path) -> None:
    root = tmp_path / "coco"
    coco(root, "all.json", 6)
    empty.set_source(root, box_margin=0.25, background="nothing")
    empty.ingest()
    manifest = {row["path"]: row for row in empty.rows("out/manifest.csv")}
    assert len(manifest) == 18
    assert manifest["images/000.png#1"]["label"] == "red"
    # 60 x 60 pixels and a quarter on each side; 40 x 80 is widened to a square of 120.
    assert manifest["images/000.png#1"]["box"] == "5 15 95 105"
    assert manifest["images/000.png#2"]["box"] == "110 80 230 200"
    assert len({row["group"] for row in manifest.values()}) == 6
    stored = packed.load(empty.path / "out/pixels").array
    row = list(manifest).index("images/000.png#1")
    assert tuple(stored[row][128, 128]) == (255, 0, 0)
    assert tuple(stored[row][128, 60]) == (255, 0, 0)  # the box fills the middle two thirds
    assert abs(int(stored[row][128, 20, 0]) - 128) < 60
    for path, entry in manifest.items():
        if path.endswith("#nothing"):
            left, upper, right, lower = map(int, entry["box"].split())
            photo = np.asarray(Image.open(root / entry["path"].split("#")[0]))
            part = photo[upper:lower, left:right]
            assert not ((part == (255, 0, 0)) | (part == (0, 0, 255))).all(axis=2).any()
    assert "0 decoded" in empty.ingest()


def test_several_coco_files_are_splits(empty: Workspace, tmp_path: Path) -> None:
    root = tmp_path / "coco"
    coco(root, "instances_train2017.json", 6)
    coco(root, "instances_val2017.json", 3, start=6)
    empty.set_source(root)
    empty.ingest()
    splits = Counter(row["split"] for row in empty.rows("out/manifest.csv"))
    assert splits == {"train": 12, "validation": 6}
    (root / "annotations" / "instances_val2017.json").rename(root / "annotations" / "more.json")
    assert "the name of annotations/more.json says no split" in empty.ingest(code=4)


@pytest.mark.fault("D30")
def test_coco_annotations_that_cannot_be_used_are_named(empty: Workspace, tmp_path: Path) -> None:
    root = tmp_path / "coco"
    content = coco(root, "all.json", 4)
    extra: dict[str, dict[str, Any]] = {
        "flat": {"bbox": [10, 10, 0, 20]},
        "nan": {"bbox": [10, 10, float("nan"), 20]},
        "negative": {"bbox": [50, 50, -20, 20]},
        "beyond": {"bbox": [250, 10, 100, 50]},
        "elsewhere": {"bbox": [1000, 1000, 50, 50]},
        "crowd": {"bbox": [10, 10, 50, 50], "iscrowd": 1},
    }
    for name, values in extra.items():
        content["annotations"].append({"id": name, "image_id": 0, "category_id": 1, **values})
    content["images"].append({"id": 99, "file_name": "absent.png"})
    (root / "annotations" / "all.json").write_text(json.dumps(content))
    empty.set_source(root)
    empty.ingest()
    assert empty.rejects() == {
        "images/000.png#flat": "degenerate_box",
        "images/000.png#nan": "degenerate_box",
        "images/000.png#negative": "degenerate_box",
        "images/000.png#beyond": "box_outside",
        "images/000.png#elsewhere": "box_outside",
        "images/000.png#crowd": "crowd",
        "absent.png": "missing",
    }
    del content["annotations"][0]["image_id"]
    (root / "annotations" / "all.json").write_text(json.dumps(content))
    assert "annotations/all.json is no COCO JSON: KeyError 'image_id'" in empty.ingest(code=4)


def test_coco_labels_of_whole_images(empty: Workspace, tmp_path: Path) -> None:
    root = tmp_path / "coco"
    content = coco(root, "all.json", 8)
    content["annotations"] = [
        {"id": i, "image_id": i, "category_id": 1 + i % 2} for i in range(8)
    ] + [{"id": 9, "image_id": 0, "category_id": 2}]
    (root / "annotations" / "all.json").write_text(json.dumps(content))
    empty.set_source(root)
    empty.ingest()
    assert empty.rejects() == {"images/000.png": "conflict"}
    manifest = empty.rows("out/manifest.csv")
    assert [row["label"] for row in manifest] == ["blue", "red"] * 3 + ["blue"]
    assert {row["box"] for row in manifest} == {""}


def voc(root: Path, photos: int) -> None:
    for i in range(photos):
        red, blue = (20 + i, 30, 80 + i, 90), (150 + i, 100, 190 + i, 180)
        scene(root / "JPEGImages" / f"{i:03d}.png", [(red, "red"), (blue, "blue")])
        objects = "".join(
            f"<object><name>{name}</name><bndbox><xmin>{box[0] + 1}</xmin><ymin>{box[1] + 1}</ymin>"
            f"<xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"
            for name, box in (("red", red), ("blue", blue))
        )
        (root / "Annotations").mkdir(exist_ok=True)
        (root / "Annotations" / f"{i:03d}.xml").write_text(
            f"<annotation><filename>{i:03d}.jpg</filename>{objects}</annotation>"
        )


def test_voc_boxes_become_images(empty: Workspace, tmp_path: Path) -> None:
    """The stated file name is wrong, as it often is; the annotation's own name is right."""
    root = tmp_path / "voc"
    voc(root, 6)
    main = root / "ImageSets" / "Main"
    main.mkdir(parents=True)
    (main / "train.txt").write_text("000\n001\n002 1\n003\n")
    (main / "test.txt").write_text("004\n005\n")
    (main / "red_train.txt").write_text("000 1\n")
    empty.set_source(root, box_margin=0)
    empty.ingest()
    manifest = {row["path"]: row for row in empty.rows("out/manifest.csv")}
    assert len(manifest) == 12
    assert manifest["JPEGImages/000.png#1"]["box"] == "20 30 80 90"
    assert manifest["JPEGImages/000.png#1"]["label"] == "red"
    assert Counter(row["split"] for row in manifest.values()) == {"train": 8, "test": 4}
    row = list(manifest).index("JPEGImages/000.png#1")
    assert (packed.load(empty.path / "out/pixels").array[row] == (255, 0, 0)).all()


@pytest.mark.fault("D30", "D34")
def test_voc_annotations_that_cannot_be_used_are_named(empty: Workspace, tmp_path: Path) -> None:
    root = tmp_path / "voc"
    voc(root, 6)
    folder = root / "Annotations"
    entity = '<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/passwd">]>'
    (folder / "001.xml").write_text(entity + (folder / "001.xml").read_text())
    (folder / "002.xml").write_text("<annotation><object>")
    (root / "JPEGImages" / "003.png").unlink()
    flat = (folder / "004.xml").read_text().replace("<xmax>84<", "<xmax>24<")
    (folder / "004.xml").write_text(flat.replace("<ymax>180<", "<ymax><"))
    empty.set_source(root)
    empty.replace("params.yaml", "max_rejected: 0.5", "max_rejected: 0.6")
    empty.ingest()
    assert empty.rejects() == {
        "Annotations/001.xml": "bad_annotation",
        "Annotations/002.xml": "bad_annotation",
        "003.jpg": "missing",
        "JPEGImages/004.png#1": "degenerate_box",
        "JPEGImages/004.png#2": "degenerate_box",
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "images", "classes", "floor"),
    [
        ("coco-tiny", {}, 804, 80, 0.3),
        ("voc-raccoon", {"background": "something else"}, 374, 2, 0.93),
    ],
)
def test_real_boxes_become_a_classifier(
    workspace: Workspace,
    shared_data: Callable[[str], Path],
    name: str,
    options: dict[str, object],
    images: int,
    classes: int,
    floor: float,
) -> None:
    workspace.set_source(shared_data(name), **options)
    workspace.replace("params.yaml", "small_classes: refuse", "small_classes: train")
    workspace.run("dvc", "repro", "evaluate")
    data, found = (
        json.loads((workspace.path / "artifacts" / stage / "report.json").read_text())
        for stage in ("ingest", "evaluate")
    )
    assert (data["images"], len(found["labels"])) == (images, classes)
    assert found["precisions"]["fp32"]["accuracy"]["value"] >= floor
