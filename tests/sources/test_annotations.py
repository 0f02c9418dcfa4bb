import csv
import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.conftest import Workspace
from tlpipe.data import pixels


def table(photos: Path, rows: Sequence[tuple[str, ...]], header: tuple[str, ...]) -> Path:
    path = photos / "labels.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


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
    manifest = empty.rows("artifacts/ingest/manifest.csv")
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
    expected = (empty.path / "artifacts/ingest/manifest.csv").read_bytes()
    (photos / "labels.csv").unlink()
    paths, labels = zip(*listed(photos), strict=True)
    parquet.write_table(pa.table({"label": labels, "path": paths}), photos / "labels.parquet")
    empty.ingest()
    assert (empty.path / "artifacts/ingest/manifest.csv").read_bytes() == expected


DIALECTS = [
    pytest.param("utf-8-sig", ",", "path,label", id="byte-order mark"),
    pytest.param("utf-8-sig", ",", '"path","label"', id="byte-order mark and quotes"),
    pytest.param("utf-8", ";", "path;label", id="semicolons"),
    pytest.param("utf-8", "\t", "path\tlabel", id="tabs"),
    pytest.param("utf-16", "\t", "path\tlabel", id="UTF-16, as Excel's Unicode text"),
    pytest.param("latin-1", ",", "path,label", id="Latin-1"),
    pytest.param("utf-8", ",", "path, label", id="spaces"),
    pytest.param("utf-8", ",", "Path,Label", id="upper case"),
]


@pytest.mark.fault("D40")
@pytest.mark.parametrize(("encoding", "separator", "header"), DIALECTS)
def test_a_table_of_another_dialect_still_names_the_labels(
    empty: Workspace, photos: Path, encoding: str, separator: str, header: str
) -> None:
    rows = [separator.join((path, f"é {label}")) for path, label in listed(photos)]
    content = "\r\n".join([header, *rows, ""])
    (photos / "labels.csv").write_bytes(content.encode(encoding))
    empty.set_source(photos)
    empty.ingest()
    assert {row["label"] for row in empty.rows("artifacts/ingest/manifest.csv")} == {
        "é dark",
        "é light",
    }


@pytest.mark.fault("D42")
def test_files_that_no_row_names_are_said(empty: Workspace, photos: Path) -> None:
    table(photos, listed(photos)[2:], ("path", "label"))
    empty.set_source(photos)
    said = empty.ingest()
    assert "dark/0.png" in said + str(empty.rejects())


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
def test_a_table_that_makes_no_sense_is_an_error(
    empty: Workspace, photos: Path, change: Callable[[Path], object], message: str
) -> None:
    change(photos)
    empty.set_source(photos)
    assert message in empty.ingest(code=4)


def test_a_kind_can_be_forced(empty: Workspace, photos: Path) -> None:
    table(photos, [(path, "x" + label) for path, label in listed(photos)], ("path", "label"))
    empty.set_source(photos, kind="folders")
    empty.ingest()
    assert {row["label"] for row in empty.rows("artifacts/ingest/manifest.csv")} == {
        "dark",
        "light",
    }
    assert empty.rejects() == {}
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
    manifest = empty.rows("artifacts/ingest/manifest.csv")
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


def short_side(box: str) -> int:
    left, upper, right, lower = map(int, box.split())
    return min(right - left, lower - upper)


def test_photos_without_boxes_or_room(empty: Workspace, tmp_path: Path) -> None:
    """They give a square of the size of another photo's box; where none fits, that is said."""
    root = tmp_path / "coco"
    content = coco(root, "all.json", 6)
    for number in (98, 99):
        scene(root / "images" / f"{number}.png", [])
        content["images"].append({"id": number, "file_name": f"{number}.png"})
    full = content["images"][0]["id"]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != full]
    content["annotations"] += [
        {"id": n, "image_id": full, "category_id": 1, "bbox": [0, 0, 160 + n, 200]} for n in (1, 2)
    ]
    (root / "annotations" / "all.json").write_text(json.dumps(content))
    empty.set_source(root, background="nothing", box_margin=0.0)
    empty.ingest()
    manifest = {row["path"]: row for row in empty.rows("artifacts/ingest/manifest.csv")}
    empty_ones = [manifest[f"images/{number}.png#nothing"]["box"] for number in (98, 99)]
    assert all(short_side(box) in (60, 80, 200) for box in empty_ones)
    assert empty.rejects()["images/000.png#nothing"] == "no_background"
    detail = {row["path"]: row["detail"] for row in empty.rows("artifacts/ingest/rejects.csv")}
    assert "no square of the side of a box (181 px) fits" in detail["images/000.png#nothing"]


def test_coco_boxes_become_images_with_their_margin(empty: Workspace, tmp_path: Path) -> None:
    root = tmp_path / "coco"
    coco(root, "all.json", 6)
    empty.set_source(root, box_margin=0.25, background="nothing")
    empty.ingest()
    manifest = {row["path"]: row for row in empty.rows("artifacts/ingest/manifest.csv")}
    assert len(manifest) == 18
    assert manifest["images/000.png#1"]["label"] == "red"
    # 60 x 60 pixels and a quarter on each side; 40 x 80 is widened to a square of 120.
    assert manifest["images/000.png#1"]["box"] == "5 15 95 105"
    assert manifest["images/000.png#2"]["box"] == "110 80 230 200"
    assert len({row["group"] for row in manifest.values()}) == 6
    stored = pixels.load(empty.path / "artifacts/ingest/pixels").array
    row = list(manifest).index("images/000.png#1")
    assert tuple(stored[row][128, 128]) == (255, 0, 0)
    assert tuple(stored[row][128, 60]) == (255, 0, 0)  # the box fills the middle two thirds
    assert abs(int(stored[row][128, 20, 0]) - 128) < 60
    for path, entry in manifest.items():
        if path.endswith("#nothing"):
            left, upper, right, lower = map(int, entry["box"].split())
            # As large as a box of that photo, or the class could be told by its sharpness.
            parts = [row["box"] for name, row in manifest.items() if name.startswith(path[:14])]
            sides = {short_side(box) for box in parts if box != entry["box"]}
            assert right - left == lower - upper and right - left in sides
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
    splits = Counter(row["split"] for row in empty.rows("artifacts/ingest/manifest.csv"))
    assert splits == {"train": 12, "test": 6}  # as with folders: none is called test
    (root / "annotations" / "instances_val2017.json").rename(root / "annotations" / "more.json")
    assert "the name of annotations/more.json says no split" in empty.ingest(code=4)


@pytest.mark.fault("D30")
def test_coco_annotations_that_cannot_be_used_are_named(empty: Workspace, tmp_path: Path) -> None:
    root = tmp_path / "coco"
    content = coco(root, "all.json", 6)
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
    found = empty.rejects()
    assert found == {
        "images/000.png#flat": "degenerate_box",
        "images/000.png#nan": "degenerate_box",
        "images/000.png#negative": "degenerate_box",
        "images/000.png#beyond": "box_outside",
        "images/000.png#elsewhere": "box_outside",
        "images/000.png#crowd": "crowd",
        "absent.png": "missing",
    }
    empty.replace("params.yaml", "max_rejected: 0.5", "max_rejected: 1.0")
    del content["annotations"][0]["image_id"], content["annotations"][1]["id"]
    content["annotations"][2]["image_id"] = 77
    content["annotations"][3]["bbox"] = [1, 2, 3]
    content["annotations"][4]["id"] = content["annotations"][5]["id"]
    del content["images"][3]["file_name"]
    recorded(root, content)
    empty.ingest()
    rejected = empty.rejects().items() - found.items()
    assert dict(rejected) == {
        "annotations/all.json, annotation 1": "bad_annotation",
        "annotations/all.json, annotation 2": "bad_annotation",
        "annotations/all.json#11": "missing",
        "images/001.png#12": "bad_annotation",
        "images/002.png#22": "bad_annotation",
        "annotations/all.json, image 4": "bad_annotation",
        "annotations/all.json#31": "missing",
        "annotations/all.json#32": "missing",
    }


def recorded(root: Path, content: dict[str, Any]) -> None:
    (root / "annotations" / "all.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    "segmentation",
    [
        [[20, 30, 80, 30, 80, 90, 20, 90]],
        # Lengths of runs down the columns of 200 pixels: 60 columns from the 20th on.
        {"size": [200, 300], "counts": [4030, *[60, 140] * 59, 60, 55910 - 59 * 200]},
    ],
    ids=["polygon", "mask"],
)
def test_a_polygon_or_mask_has_the_box_around_it(
    empty: Workspace, tmp_path: Path, segmentation: object
) -> None:
    content = coco(tmp_path / "coco", "all.json", 6)
    empty.set_source(tmp_path / "coco")
    empty.ingest()
    expected = empty.rows("artifacts/ingest/manifest.csv")
    assert content["annotations"][0].pop("bbox") == [20, 30, 60, 60]
    content["annotations"][0]["segmentation"] = segmentation
    recorded(tmp_path / "coco", content)
    empty.ingest()
    assert empty.rows("artifacts/ingest/manifest.csv") == expected


def test_of_equal_names_in_two_folders_the_stated_one_is_taken(
    empty: Workspace, tmp_path: Path
) -> None:
    root = tmp_path / "coco"
    content = coco(root, "all.json", 6)
    for image in content["images"]:
        image["file_name"] = f"images/{image['file_name']}"
    content["images"][0]["file_name"] = "elsewhere/001.png"
    recorded(root, content)
    empty.set_source(root)
    empty.ingest()
    assert empty.rejects() == {"elsewhere/001.png": "missing"}


def test_image_ids_may_be_text(empty: Workspace, tmp_path: Path) -> None:
    content = coco(tmp_path / "coco", "all.json", 6)
    for annotation in content["annotations"]:
        annotation["image_id"] = str(annotation["image_id"])
    recorded(tmp_path / "coco", content)
    empty.set_source(tmp_path / "coco")
    empty.ingest()
    assert len(empty.rows("artifacts/ingest/manifest.csv")) == 12


def test_an_unknown_category_is_one_reject(empty: Workspace, tmp_path: Path) -> None:
    content = coco(tmp_path / "coco", "all.json", 6)
    content["annotations"][0]["category_id"] = 91
    recorded(tmp_path / "coco", content)
    empty.set_source(tmp_path / "coco")
    empty.ingest()
    assert list(empty.rejects()) == ["images/000.png#1"]


def test_boxes_of_the_originals_are_not_cut_from_smaller_copies(
    empty: Workspace, tmp_path: Path
) -> None:
    content = coco(tmp_path / "coco", "all.json", 6)
    for image in content["images"]:
        image["width"], image["height"] = 600, 400
    for annotation in content["annotations"]:
        annotation["bbox"] = [2 * edge for edge in annotation["bbox"]]
    recorded(tmp_path / "coco", content)
    empty.set_source(tmp_path / "coco", box_margin=0)
    empty.replace("params.yaml", "max_rejected: 0.5", "max_rejected: 1.0")
    empty.ingest()
    rows = {row["path"]: row["box"] for row in empty.rows("artifacts/ingest/manifest.csv")}
    assert rows["images/000.png#1"] == "20 30 80 90"


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_boxes_of_an_upright_photo_are_cut_from_it_upright(
    empty: Workspace, tmp_path: Path, kind: str
) -> None:
    root = tmp_path / "coco"
    content = coco(root, "all.json", 6)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored as if the camera lay on its side
    for image in content["images"]:
        path = root / "images" / image["file_name"]
        with Image.open(path) as opened:
            stored = opened.transpose(Image.Transpose.ROTATE_90)
        path.unlink()
        image["file_name"] = f"{path.stem}.{kind.lower()}"
        stored.save(path.with_suffix(f".{kind.lower()}"), kind, exif=exif)
    recorded(root, content)
    empty.set_source(root, box_margin=0)
    empty.ingest()
    assert empty.rejects() == {}
    rows = {row["path"]: row["box"] for row in empty.rows("artifacts/ingest/manifest.csv")}
    name = f"images/000.{kind.lower()}#1"
    assert rows[name] == "20 30 80 90"
    squares = pixels.load(empty.path / "artifacts/ingest/pixels").array
    assert (squares[list(rows).index(name)] == (255, 0, 0)).all()


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
    manifest = empty.rows("artifacts/ingest/manifest.csv")
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
    manifest = {row["path"]: row for row in empty.rows("artifacts/ingest/manifest.csv")}
    assert len(manifest) == 12
    assert manifest["JPEGImages/000.png#1"]["box"] == "20 30 80 90"
    assert manifest["JPEGImages/000.png#1"]["label"] == "red"
    assert Counter(row["split"] for row in manifest.values()) == {"train": 8, "test": 4}
    row = list(manifest).index("JPEGImages/000.png#1")
    assert (pixels.load(empty.path / "artifacts/ingest/pixels").array[row] == (255, 0, 0)).all()


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


@pytest.mark.fault("D34")
def test_no_entity_is_resolved_in_any_encoding(empty: Workspace, tmp_path: Path) -> None:
    root = tmp_path / "voc"
    voc(root, 6)
    text = (root / "Annotations" / "001.xml").read_text().replace("<name>red", "<name>&e;", 1)
    declared = f'<?xml version="1.0" encoding="UTF-16"?><!DOCTYPE a [<!ENTITY e "red">]>{text}'
    (root / "Annotations" / "001.xml").write_bytes(declared.encode("utf-16"))
    empty.set_source(root)
    empty.ingest()
    assert empty.rejects() == {"Annotations/001.xml": "bad_annotation"}


def test_a_damaged_first_annotation_is_one_reject(empty: Workspace, tmp_path: Path) -> None:
    root = tmp_path / "voc"
    voc(root, 6)
    (root / "Annotations" / "000.xml").write_text("<annotation><object>")
    empty.set_source(root)
    empty.ingest()
    assert empty.rejects() == {"Annotations/000.xml": "bad_annotation"}
    assert {row["label"] for row in empty.rows("artifacts/ingest/manifest.csv")} == {"red", "blue"}


@pytest.mark.fault("D41")
def test_a_split_word_of_a_pattern_that_is_unknown_is_an_error(
    empty: Workspace, photos: Path
) -> None:
    (photos / "dark").rename(photos / "extra-dark")
    (photos / "light").rename(photos / "train-light")
    empty.set_source(photos, pattern=r"^(?P<split>[a-z]+)-(?P<label>[^/]+)/")
    assert "finds the split 'extra' in extra-dark/0.png" in empty.ingest(code=4)


@pytest.mark.fault("D44")
def test_labels_that_unicode_holds_equal_are_one_or_refused(empty: Workspace, photos: Path) -> None:
    names = {"dark": "caf\u00e9", "light": "cafe\u0301"}
    table(photos, [(path, names[label]) for path, label in listed(photos)], ("path", "label"))
    empty.set_source(photos)
    assert "normal form" in empty.ingest(code=4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "images", "classes", "floor"),
    [
        ("coco-tiny", {}, 804, 80, 0.3),
        ("voc-raccoon", {"background": "something else"}, 228, 2, 0.93),
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
    workspace.replace("params.yaml", "small_classes: error", "small_classes: train")
    workspace.reproduce("evaluate")
    data, found = (
        json.loads((workspace.path / "artifacts" / stage / "report.json").read_text())
        for stage in ("ingest", "evaluate")
    )
    assert (data["images"], len(found["labels"])) == (images, classes)
    assert found["precisions"]["fp32"]["accuracy"]["value"] >= floor
