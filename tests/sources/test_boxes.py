"""COCO and Pascal VOC as exporters write them: splits, kinds, ids, masks, names and sizes."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import Workspace
from tests.sources.test_cases import put
from tlpipe.data.images import frame_of
from tlpipe.data.reading import upright_box
from tlpipe.errors import DataError, ImageError
from tlpipe.sources import Candidate, listing, storage
from tlpipe.sources.coco import box_around

CATEGORIES = [{"id": 3, "name": "ant"}, {"id": 7, "name": "bee"}]


def coco(names: Sequence[str], *, first: int = 0, **more: Any) -> dict[str, Any]:
    """Return what COCO has of images with a box each, of ants and bees in turn."""
    numbers = range(first, first + len(names))
    return {
        "images": [{"id": i, "file_name": n} for i, n in zip(numbers, names, strict=True)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": (3, 7)[i % 2], "bbox": [10, 8, 40, 40]}
            for i in numbers
        ],
        "categories": CATEGORIES,
        **more,
    }


def pictures(root: Path, folder: str, images: int = 4) -> list[str]:
    names = [f"{i:03}.jpg" for i in range(images)]
    for name in names:
        put(root / folder / name)
    return names


def write(path: Path, content: object) -> None:
    put(path, json.dumps(content))


def read(root: Path, **options: Any) -> tuple[list[Candidate], dict[str, str], str]:
    """Return the candidates of a source, the reasons of its rejects and its notes."""
    with listing.opened(str(root), **options) as source:
        found = list(source.candidates())
    assert len({candidate.name for candidate in found}) == len(found)
    rejects = {reject.path: f"{reject.reason}: {reject.detail}" for reject in source.rejects}
    return found, rejects, "\n".join(source.notes)


def splits(found: Sequence[Candidate]) -> Counter[str]:
    assert all(candidate.file.startswith(candidate.split[:3]) for candidate in found)
    return Counter(candidate.split for candidate in found)


@pytest.mark.fault("D46")
def test_splits_are_those_of_the_folders_wherever_the_annotation_lies(tmp_path: Path) -> None:
    """Roboflow writes one file in each folder, with equal names of images; others one on top."""
    everywhere = []
    for folder in ("train", "valid", "test"):
        names = pictures(tmp_path / "each", folder)
        write(tmp_path / "each" / folder / "_annotations.coco.json", coco(names))
        pictures(tmp_path / "one", folder)
        everywhere += [f"{folder}/{name}" for name in names]
    write(tmp_path / "one" / "annotations.json", coco(everywhere))
    for root in ("each", "one"):
        found, rejects, _ = read(tmp_path / root)
        assert splits(found) == {"train": 4, "validation": 4, "test": 4}
        assert rejects == {}
    assert {candidate.label for candidate in found} == {"ant", "bee"}


@pytest.mark.fault("D46")
def test_splits_that_labels_state_count_and_not_the_folders(tmp_path: Path) -> None:
    rows = []
    for folder in ("train", "test"):
        for i, name in enumerate(pictures(tmp_path, folder)):
            split = ("test", "train")[folder == "test"]
            rows.append(f"{folder}/{name},{('ant', 'bee')[i % 2]},{split}\n")
    put(tmp_path / "labels.csv", "path,label,split\n" + "".join(rows))
    found, _, _ = read(tmp_path)
    assert {(c.file.split("/")[0], c.split) for c in found} == {
        ("train", "test"),
        ("test", "train"),
    }
    # Without any, the folders count, if each image lies in one.
    lines = [row.rsplit(",", 1)[0] + "\n" for row in ["path,label,split", *rows]]
    put(tmp_path / "labels.csv", "".join(lines))
    assert splits(read(tmp_path)[0]) == {"train": 4, "test": 4}
    put(tmp_path / "more.jpg")
    with (tmp_path / "labels.csv").open("a") as table:
        table.write("more.jpg,ant\n")
    found, _, notes = read(tmp_path)
    assert {candidate.split for candidate in found} == {""}
    assert "8 of 9 images lie in folders called like splits, and 1 do not" in notes


@pytest.mark.fault("D46")
def test_equal_names_in_two_folders_go_by_the_split_of_the_annotation(tmp_path: Path) -> None:
    names = {folder: pictures(tmp_path, folder) for folder in ("train2017", "val2017")}
    (tmp_path / "train2017" / "001.jpg").unlink()
    for folder, inside in names.items():
        write(tmp_path / "annotations" / f"instances_{folder}.json", coco(inside))
    found, rejects, notes = read(tmp_path)
    assert rejects == {"001.jpg": "missing: annotations/instances_train2017.json names it"}
    assert Counter(c.file.split("/")[0] for c in found) == {"train2017": 3, "val2017": 4}
    assert Counter(c.split for c in found) == {"train": 3, "test": 4}
    assert "the one called validation is taken for it" in notes


@pytest.mark.fault("D46")
def test_of_several_kinds_instances_are_read_and_no_box_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("train2017", "val2017"):
        names = pictures(tmp_path, folder)
        for kind in ("instances", "person_keypoints"):
            write(tmp_path / "annotations" / f"{kind}_{folder}.json", coco(names))
        captions = {"images": [], "annotations": [{"id": 1, "image_id": 1, "caption": "x"}]}
        write(tmp_path / "annotations" / f"captions_{folder}.json", captions)
    found, _, notes = read(tmp_path)
    assert len(found) == 8
    assert "several JSON files are there for one split: annotations/instances_train2017" in notes
    assert "captions_train2017.json, annotations/captions_val2017.json, annotations/per" in notes
    # The others may be as large: they are not read.
    opened: list[str] = []
    plain = storage.Folder.read

    def noted(self: storage.Folder, name: str) -> bytes:
        opened.append(name)
        return plain(self, name)

    with monkeypatch.context() as patched:
        patched.setattr(storage.Folder, "read", noted)
        read(tmp_path)
    assert [name.split("_")[0] for name in opened] == ["annotations/instances"] * 2
    chosen, _, notes = read(tmp_path, label_files="annotations/person_*.json")
    assert len(chosen) == 8 and "labels are read from annotations/person_keypoints_t" in notes
    for path in (tmp_path / "annotations").glob("instances*"):
        path.rename(path.with_name(path.name.replace("instances", "people")))
    with pytest.raises(DataError, match=r"several for one split: .* Name them: ingest.label_files"):
        read(tmp_path)


@pytest.mark.fault("D42", "D47")
def test_images_of_no_annotation_are_said_and_paths_may_lead_up(tmp_path: Path) -> None:
    names = pictures(tmp_path, "images", 6)
    content = coco([f"../images/{name}" for name in names[:4]])
    content["images"].append({"id": 9, "file_name": "..\\images\\004.jpg"})
    content["images"].append({"id": 10, "file_name": "../../images/005.jpg"})
    write(tmp_path / "annotations" / "all.json", content)
    found, rejects, notes = read(tmp_path)
    assert {candidate.file for candidate in found} == {f"images/{name}" for name in names[:4]}
    assert list(rejects) == ["../../images/005.jpg"]
    assert "from annotations/all.json, of 5 photos, 1 of them without a label" in notes
    assert "1 images are in no annotation and left out: images/005.jpg" in notes


def test_files_of_labels_have_no_effect_on_folders(empty: Workspace, photos: Path) -> None:
    empty.set_source(photos, kind="folders", label_files="*.json")
    assert "label_files has no effect where labels are read from folders" in empty.ingest(code=3)


def test_image_ids_that_differ_as_text_stay_two(tmp_path: Path) -> None:
    content = coco(pictures(tmp_path, "images"))
    content["images"][0]["id"], content["images"][1]["id"] = "007", 7.0
    content["annotations"][0]["image_id"], content["annotations"][1]["image_id"] = "007", "7"
    for annotation in content["annotations"]:
        annotation["category_id"] = str(annotation["category_id"])
    write(tmp_path / "all.json", content)
    found, rejects, _ = read(tmp_path)
    labels = {candidate.file: candidate.label for candidate in found}
    assert labels == {f"images/00{i}.jpg": ("ant", "bee")[i % 2] for i in range(4)}
    assert rejects == {}


@pytest.mark.fault("D47")
def test_images_that_are_listed_in_two_ways_are_in_conflict(tmp_path: Path) -> None:
    names = [f"images/{name}" for name in pictures(tmp_path, "images", 6)]
    write(tmp_path / "train.json", coco(names[:5]))
    content = coco(names[4:], first=4)
    content["images"].append({"id": 5, "file_name": names[3]})
    write(tmp_path / "test.json", content)
    found, rejects, _ = read(tmp_path)
    assert {candidate.file for candidate in found} == {*names[:3]}
    assert rejects[names[4]].startswith("conflict: train.json lists it in another split or size")
    assert "stands for several images" in rejects[names[5]]


@pytest.mark.fault("D47")
def test_two_files_that_a_name_may_mean_are_an_error(tmp_path: Path) -> None:
    names = pictures(tmp_path, "cam1")
    pictures(tmp_path, "cam2")
    write(tmp_path / "all.json", coco(names))
    with pytest.raises(DataError, match=r"'000.jpg', which may be cam1/000.jpg, cam2/000.jpg"):
        read(tmp_path)
    write(tmp_path / "all.json", coco([f"elsewhere/cam2/{name}" for name in names]))
    with pytest.raises(DataError, match=r"0 classes with files;.* rejected: missing 4"):
        read(tmp_path)
    (tmp_path / "photos").mkdir()
    for camera in ("cam1", "cam2"):
        (tmp_path / camera).rename(tmp_path / "photos" / camera)
    write(tmp_path / "all.json", coco([f"cam2/{name}" for name in names]))
    assert {c.file for c in read(tmp_path)[0]} == {f"photos/cam2/{name}" for name in names}


@pytest.mark.fault("D48")
def test_labels_of_several_kinds_are_an_error_unless_one_is_named(tmp_path: Path) -> None:
    names = pictures(tmp_path, "images")
    write(tmp_path / "all.json", coco(names))
    put(tmp_path / "labels.csv", "path,label\n" + "".join(f"images/{n},{n}\n" for n in names))
    with pytest.raises(DataError, match=r"all.json \(coco\) and labels.csv \(table\); expected"):
        read(tmp_path)
    assert {c.label for c in read(tmp_path, kind="coco")[0]} == {"ant", "bee"}
    assert {c.label for c in read(tmp_path, kind="table")[0]} == set(names)
    assert {c.label for c in read(tmp_path, label_files="*.csv")[0]} == set(names)
    # A table that is in error is none of coco's business.
    put(tmp_path / "labels.csv", "path,label,class\nimages/000.jpg,a,b\n")
    assert len(read(tmp_path, kind="coco")[0]) == 4


SEEN = {
    "CVAT": ("annotations.xml", "<annotations><image/></annotations>", "looks like CVAT's XML"),
    "other XML": ("notes.xml", "<note/>", "it holds <note>; Pascal VOC has <annotation>"),
    "cut JSON": ("annotations/all.json", '{"images": [', "it is no JSON"),
    "a list": ("labels.json", "[1]", "it holds a list and no COCO JSON"),
    "captions": ("annotations/captions.json", '{"images": [], "annotations": []}', "categories"),
    "panoptic": (
        "annotations/panoptic.json",
        '{"images": [], "categories": [], "annotations": [{"segments_info": []}]}',
        "panoptic kind, which is seen and not known",
    ),
    "JSON lines": ("metadata.jsonl", "{}", "JSON lines are seen and not known"),
    "YOLO": ("data.yaml", "names: [a, b]", "looks like YOLO's, which is seen and not known"),
}


@pytest.mark.fault("D48")
@pytest.mark.parametrize("name", SEEN)
def test_what_is_no_known_annotation_is_seen_and_said(name: str, tmp_path: Path) -> None:
    file, content, reason = SEEN[name]
    for label in ("ant", "bee"):
        pictures(tmp_path, label)
    put(tmp_path / file, content)
    message = rf"{file}, which may hold the labels but is not read: .*{reason}.*kind: folders"
    with pytest.raises(DataError, match=message):
        read(tmp_path)
    if "/" in file:
        with pytest.raises(DataError, match=r"annotations would be a class, .* move them away"):
            read(tmp_path, kind="folders")
    else:
        assert {c.label for c in read(tmp_path, kind="folders")[0]} == {"ant", "bee"}
    with pytest.raises(DataError, match=r"kind is voc, but .* no such annotations; .*annotation>"):
        read(tmp_path, kind="voc")


@pytest.mark.fault("D48")
def test_json_beside_images_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for label in ("ant", "bee"):
        for name in pictures(tmp_path, label, 60):
            put(tmp_path / label / name.replace("jpg", "json"), "{}")
        for i in range(60):
            put(tmp_path / label / f"made-{i}.json", "{}")
    names = []
    plain = storage.Folder.read

    def noted(self: storage.Folder, name: str) -> bytes:
        names.append(name)
        return plain(self, name)

    monkeypatch.setattr(storage.Folder, "read", noted)
    message = "the folder ant would be a class, and holds 60 images, 60 of them beside a file"
    with pytest.raises(DataError, match=message):
        read(tmp_path)
    assert names == []


def test_an_annotation_file_that_is_too_large_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for label in ("ant", "bee"):
        pictures(tmp_path, label)
    write(tmp_path / "all.json", coco(["ant/000.jpg"] * 50))
    monkeypatch.setattr(storage, "MAX_FILE_BYTES", 1000)
    with pytest.raises(DataError, match=r"all.json, .* not read: it cannot be read: .*at most"):
        read(tmp_path)


def compressed(runs: Sequence[int]) -> str:
    """Encode runs as pycocotools does, by its description in maskApi.c (rleToString)."""
    text = ""
    for i, run in enumerate(runs):
        value = run - (runs[i - 2] if i > 2 else 0)
        while True:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text += chr(48 + bits + 32 * more)
            if not more:
                break
    return text


@pytest.mark.parametrize("seed", range(20))
def test_the_box_around_a_mask_is_that_of_its_pixels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = np.zeros((37, 53), bool)
    for _ in range(rng.integers(1, 4)):
        y, x = rng.integers(0, 30), rng.integers(0, 45)
        mask[y : y + rng.integers(1, 20), x : x + rng.integers(1, 20)] = True
    if seed % 2:  # runs that go on in the next column
        mask[30:, 20:30] = mask[:4, 21:31] = True
    flat = mask.ravel(order="F")
    ends = [0, *np.flatnonzero(flat[1:] != flat[:-1]) + 1, flat.size]
    runs = [0] * bool(flat[0]) + [int(n) for n in np.diff(ends)]
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    expected = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    found = box_around({"size": [37, 53], "counts": runs})
    assert found == expected
    assert box_around({"size": [37, 53], "counts": compressed(runs)}) == found


@pytest.mark.fault("D30")
@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[1, 2, 3, 4]], "at least three pairs"),
        ([[1, 2, 3, 4, 5, float("nan")]], "finite numbers"),
        ({"counts": [4]}, r"has the size None; expected \[height, width\]"),
        ({"size": [2, 2], "counts": [1, 1]}, "do not add up to 2 x 2 pixels"),
        ({"size": [2, 2], "counts": [4]}, "covers no pixel"),
        ({"size": [2, 2], "counts": "a"}, "ends within a number"),
        ({"size": [2, 2], "counts": "\n"}, r"holds '\\n', which has no meaning there"),
    ],
)
def test_a_damaged_mask_is_one_reject(tmp_path: Path, segmentation: Any, message: str) -> None:
    content = coco(pictures(tmp_path, "images"))
    content["annotations"][0] |= {"bbox": [], "segmentation": segmentation}
    write(tmp_path / "all.json", content)
    found, rejects, _ = read(tmp_path)
    assert len(found) == 3 and list(rejects) == ["images/000.jpg#0"]
    with pytest.raises(ValueError, match=message):
        box_around(segmentation)


def test_a_mask_of_another_size_than_its_image_is_a_reject(tmp_path: Path) -> None:
    content = coco(pictures(tmp_path, "images"))
    content["images"][0] |= {"width": 30, "height": 20}
    mask = {"size": [30, 20], "counts": [0, 600]}
    content["annotations"][0] = {"id": 0, "image_id": 0, "category_id": 3, "segmentation": mask}
    write(tmp_path / "all.json", content)
    _, rejects, _ = read(tmp_path)
    assert rejects == {
        "images/000.jpg#0": "bad_annotation: ant: its mask is of (20, 30) pixels, its image of "
        "(30, 20)"
    }


def voc(name: str, stated: str, label: str = "ant", size: str = "", extra: str = "") -> str:
    box = "".join(f"<{edge}>{n}</{edge}>" for edge, n in zip(EDGES, (11, 9, 50, 48), strict=True))
    return (
        f"<annotation><filename>{stated}</filename>{size}<object><name>{label}</name>{extra}"
        f"<bndbox>{box}</bndbox></object></annotation>"
    )


EDGES = ("xmin", "ymin", "xmax", "ymax")


@pytest.mark.fault("D47")
def test_a_voc_file_that_states_another_photo_than_its_name_is_in_conflict(tmp_path: Path) -> None:
    """As copies of one annotation do, whose file name nobody has changed."""
    for i, name in enumerate(pictures(tmp_path, "JPEGImages")):
        stated = ("000.jpg", "000.jpg", "unknown.jpg", "")[i]
        label = ("ant", "bee")[i % 2]
        put(tmp_path / "Annotations" / f"{name[:-4]}.xml", voc(name, stated, label))
    found, rejects, _ = read(tmp_path)
    assert [candidate.file[-7:] for candidate in found] == ["000.jpg", "002.jpg", "003.jpg"]
    assert list(rejects) == ["Annotations/001.xml"]
    assert rejects["Annotations/001.xml"].startswith("conflict: it states JPEGImages/000.jpg, and")


def test_two_sets_of_voc_with_equal_names_keep_to_themselves(tmp_path: Path) -> None:
    for number, year in enumerate(("VOC2007", "VOC2012")):
        for name in pictures(tmp_path / year, "JPEGImages"):
            path = tmp_path / year / "Annotations" / f"{name[:-4]}.xml"
            put(path, voc(name, name, ("ant", "bee")[number]))
        main = tmp_path / year / "ImageSets" / "Main"
        put(main / ("train.txt", "test.txt")[number], "000\n001\n002\n003\n")
    (tmp_path / "VOC2007" / "JPEGImages" / "001.jpg").unlink()
    found, rejects, _ = read(tmp_path)
    assert all((c.label == "ant") == c.file.startswith("VOC2007/") for c in found)
    assert Counter(c.split for c in found) == {"train": 3, "test": 4}
    assert rejects == {"001.jpg": "missing: VOC2007/Annotations/001.xml names it"}
    put(tmp_path / "VOC2007" / "ImageSets" / "Main" / "val.txt", "002\n")
    with pytest.raises(DataError, match="has 002 in train and in validation; expected one split"):
        read(tmp_path)


@pytest.mark.fault("D34")
def test_xml_may_hold_text_that_looks_like_a_declaration(tmp_path: Path) -> None:
    for name in pictures(tmp_path, "images"):
        path = tmp_path / "images" / f"{name[:-4]}.xml"
        label = "<![CDATA[ant]]>" if name == "000.jpg" else "bee"
        put(path, voc(name, name, label, extra="<!-- <!ENTITY e 'x'> -->"))
    found, rejects, _ = read(tmp_path)
    assert Counter(c.label for c in found) == {"ant": 1, "bee": 3}
    assert rejects == {}


@pytest.mark.fault("D49")
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_in_stored_pixels_are_turned_with_the_photo(
    tmp_path: Path, orientation: int, kind: str
) -> None:
    from tlpipe.data.images import read_upright

    stored = np.zeros((60, 90, 3), np.uint8)
    stored[10:25, 40:70] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo"
    Image.fromarray(stored).save(path, kind, exif=exif)
    frame = frame_of(path.read_bytes())
    upright = np.asarray(read_upright(path.read_bytes())[0])[..., 0]
    assert (frame.stored, frame.upright) == ((90, 60), upright.shape[::-1])
    left, upper, right, lower = map(round, upright_box((40, 10, 70, 25), (90, 60), frame))
    if orientation < 5:  # both have one size: boxes are those of the picture as people see it
        assert (left, upper, right, lower) == (40, 10, 70, 25)
        return
    assert (upright[upper:lower, left:right] == 255).all()
    assert upright.sum() == 255 * (right - left) * (lower - upper)
    # The same boxes in pixels of an original of twice the size.
    assert upright_box((80, 20, 140, 50), (180, 120), frame) == (left, upper, right, lower)
    assert upright_box((1, 2, 3, 4), frame.upright, frame) == (1, 2, 3, 4)
    with pytest.raises(ImageError, match=r"90 x 30 pixels, this one has 60 x 90 \(stored as 90 x"):
        upright_box((1, 2, 3, 4), (90, 30), frame)


@pytest.mark.fault("D49")
@pytest.mark.parametrize(
    ("drawn_in", "is_known"),
    [
        ((4000, 3000), True),
        ((333, 250), True),  # rounded
        ((150, 112), True),  # enlarged since
        ((300, 301), False),
        ((3000, 4000), False),
        ((400, 300), False),
    ],
)
def test_boxes_are_scaled_by_one_factor_or_rejected(
    drawn_in: tuple[int, int], is_known: bool, tmp_path: Path
) -> None:
    size = (1000, 700) if drawn_in == (400, 300) else (1000, 750)
    Image.new("L", size).save(tmp_path / "photo.png")
    frame = frame_of((tmp_path / "photo.png").read_bytes())
    box = (0.0, 0.0, float(drawn_in[0]), float(drawn_in[1]))
    if is_known:
        assert upright_box(box, drawn_in, frame) == pytest.approx((0, 0, *size))
    else:
        expected = rf"{drawn_in[0]} x {drawn_in[1]} pixels, this one has {size[0]} x {size[1]};"
        with pytest.raises(ImageError, match=expected):
            upright_box(box, drawn_in, frame)


@pytest.mark.fault("D49")
@pytest.mark.parametrize("is_voc", [False, True])
def test_the_size_that_an_annotation_states_reaches_the_pixels(
    empty: Workspace, tmp_path: Path, is_voc: bool
) -> None:
    root, names = tmp_path / "set", [f"{i}.png" for i in range(6)]
    (root / "images").mkdir(parents=True)
    for i, name in enumerate(names):
        photo = np.full((100, 160, 3), 10 * i, np.uint8)
        photo[20:60, 40:80] = (255, 0, 0) if i % 2 else (0, 0, 255)
        Image.fromarray(photo).save(root / "images" / name)
    bad = (names[4], (160, 200))
    if is_voc:
        for i, name in enumerate(names):
            width, height = bad[1] if name == bad[0] else (320, 200)
            size = f"<size><width>{width}</width><height>{height}</height></size>"
            text = voc(name, name, ("ant", "bee")[i % 2], size)
            for was, now in zip((11, 9, 50, 48), (81, 41, 160, 120), strict=True):
                text = text.replace(f">{was}<", f">{now}<")
            put(root / "Annotations" / f"{name[:-4]}.xml", text)
    else:
        content = coco(names)
        for image, annotation in zip(content["images"], content["annotations"], strict=True):
            image["width"], image["height"] = bad[1] if image["file_name"] == bad[0] else (320, 200)
            annotation["bbox"] = [80, 40, 80, 80]
        write(root / "all.json", content)
    empty.set_source(root, box_margin=0)
    empty.ingest()
    assert {row["box"] for row in empty.rows("artifacts/ingest/manifest.csv")} == {"40 20 80 60"}
    reasons = {path.split("#")[0]: reason for path, reason in empty.rejects().items()}
    assert reasons == {f"images/{bad[0]}": "size_differs"}
