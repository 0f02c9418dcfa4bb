"""Tables and folders as Kaggle, Roboflow, Hugging Face, spreadsheets and systems write them."""

import csv
import io
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from tests.conftest import ROOT, Workspace
from tlpipe.errors import DataError
from tlpipe.sources import listing
from tlpipe.sources.tables import Role

CLASSES = ("ant", "bee")
Rows = list[tuple[str, str]]


def put(path: Path, data: bytes | str = b"a picture") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def folders(
    root: Path, classes: tuple[str, ...] = CLASSES, images: int = 4, start: int = 0
) -> Path:
    for label in classes:
        for i in range(start, start + images):
            put(root / label / f"{label}_{i:03}.jpg", f"{label} {i}")
    return root


def flat(root: Path, images: int = 8, start: int = 0) -> Rows:
    """Write images of two classes in turn into one folder; return their names and labels."""
    rows = [(f"img_{i:03}.jpg", CLASSES[i % 2]) for i in range(start, start + images)]
    for name, label in rows:
        put(root / name, f"{name} {label}")
    return rows


def table(rows: Rows, *, header: str = "path,label", line: str = "images/{},{}") -> str:
    return "".join(f"{text}\n" for text in [header, *(line.format(*row) for row in rows)])


def three_splits(root: Path, write: Callable[[Path, str, Rows], object]) -> None:
    for split, images, start in (("train", 8, 0), ("valid", 4, 100), ("test", 4, 200)):
        write(root, split, flat(root / split, images, start))


def kaggle_training_set(root: Path) -> None:
    for split, images, start in (("training_set", 8, 0), ("test_set", 4, 100)):
        folders(root / split / split, images=images // 2, start=start)


def kaggle_id_label(root: Path) -> None:
    rows = flat(root / "train")
    put(root / "train.csv", table(rows, header="id,label", line="{:.7},{}"))
    put(root / "test" / "t0.jpg")
    put(root / "test.csv", "id\nt0\n")
    put(root / "sample_submission.csv", "id,label\nt0,ant\n")


def chest(root: Path) -> None:
    for split, images, start in (("train", 4, 0), ("val", 2, 100), ("test", 2, 200)):
        folders(root / split, images=images, start=start)
        folders(root / "chest" / split, images=images, start=start)
    put(root / "__MACOSX" / "train" / "._x.jpg", b"\0")


def with_systems_files(root: Path) -> None:
    folders(root)
    for label in CLASSES:
        put(root / label / "desktop.ini")
        put(root / label / "Thumbs.db")
    put(root / "$RECYCLE.BIN" / "desktop.ini")
    put(root / "System Volume Information" / "IndexerVolumeGuid")


def one_hot(root: Path, split: str, rows: Rows) -> None:
    cells = [f"{name}, {int(label == 'ant')}, {int(label == 'bee')}" for name, label in rows]
    put(root / split / "_classes.csv", "\n".join(["filename, ant, bee", *cells]))


def hugging_face(root: Path) -> None:
    put(root / "metadata.csv", table(flat(root), header="file_name,label", line="{},{}"))


def roboflow_folders(root: Path) -> Path:
    for split, images, start in (("train", 4, 0), ("valid", 2, 100), ("test", 2, 200)):
        folders(root / split, images=images, start=start)
    put(root / "README.roboflow.txt")
    return root


def two_spellings(root: Path) -> None:
    rows = [(name, {"ant": "007", "bee": "07"}[label]) for name, label in flat(root / "images")]
    put(root / "labels.csv", table(rows))


def with_slashes(root: Path) -> None:
    rows = [(name, f"tomato/{label}") for name, label in flat(root / "images")]
    put(root / "labels.csv", table(rows))


def of(text: Callable[[Path, Rows], str]) -> Callable[[Path], Path]:
    return lambda root: put(root / "labels.csv", text(root, flat(root / "images")))


NONE = {"": 8}
THREE = {"train": 8, "validation": 4, "test": 4}


def encoded(encoding: str, *, first: str = "", line_end: str = "\n") -> Callable[[Path], None]:
    def write(root: Path) -> None:
        text = first + table(flat(root / "images"))
        put(root / "labels.csv", text.replace("\n", line_end).encode(encoding))

    return write


READ = {
    "old Macintosh": (encoded("utf-8", line_end="\r"), CLASSES, NONE, "8 rows"),
    "UTF-16, no byte-order mark": (encoded("utf-16-le"), CLASSES, NONE, "in UTF-16-LE without a"),
    "UTF-16, big end first": (encoded("utf-16-be"), CLASSES, NONE, "in UTF-16-BE without a"),
    "Excel's first line": (encoded("utf-8", first="sep=,\n"), CLASSES, NONE, "separated by commas"),
    "columns that are not used": (
        of(lambda _, rows: table(rows, header="path,label,width,camera", line="images/{},{},9,b")),
        CLASSES, NONE, "paths from 'path'; not used: 'width', 'camera'",
    ),
    "filename, class": (
        of(lambda _, rows: table(rows, header="filename,class")), CLASSES, NONE,
        "labels from 'class', paths from 'filename'",
    ),
    "backslashes": (of(lambda _, rows: table(rows, line="images\\{},{}")), CLASSES, NONE, "8 rows"),
    "absolute": (
        of(lambda root, rows: table(rows, line=f"{root.resolve()}/images/{{}},{{}}")),
        CLASSES, NONE, "8 rows",
    ),
    "absolute, of another machine": (
        of(lambda _, rows: table(rows, line="C:\\Users\\ann\\set\\images\\{},{}")),
        CLASSES, NONE, "8 rows",
    ),
    "no extension": (
        of(lambda _, rows: table(rows, line="images/{:.7},{}")), CLASSES, NONE, "8 rows",
    ),
    "bare names": (of(lambda _, rows: table(rows, line="{},{}")), CLASSES, NONE, "8 rows"),
    "no header": (
        of(lambda _, rows: table(rows).removeprefix("path,label\n")), CLASSES, NONE,
        "without a header",
    ),
    "no header, labels first": (
        of(lambda _, rows: "".join(f"{label},images/{name}\n" for name, label in rows)),
        CLASSES, NONE, "without a header",
    ),
    "one-hot": (
        of(lambda _, rows: "filename,ant,bee\n" + "".join(
            f"images/{name},{int(label == 'ant')},{int(label == 'bee')}\n" for name, label in rows
        )),
        CLASSES, NONE, "labels from columns of 0 and 1",
    ),
    "id beside file name": (
        of(lambda _, rows: "id,filename,label\n" + "".join(
            f"{i},images/{name},{label}\n" for i, (name, label) in enumerate(rows)
        )),
        CLASSES, NONE, "paths from 'filename'",
    ),
    "leading zeros": (two_spellings, ("007", "07"), NONE, "8 rows"),
    "slashes in labels": (with_slashes, ("tomato/ant", "tomato/bee"), NONE, "8 rows"),
    "Hugging Face": (hugging_face, CLASSES, NONE, "paths from 'file_name'"),
    "Kaggle, id and label": (
        kaggle_id_label, CLASSES, NONE,
        "1 images are in no row of train.csv and left out: test/t0.jpg",
    ),
    "a table for each split": (
        lambda root: three_splits(
            root, lambda r, split, rows: put(r / f"{split}.csv", table(rows, line=split + "/{},{}"))
        ),
        CLASSES, THREE, "valid.csv: 4 rows",
    ),
    "Roboflow, one-hot": (
        lambda root: three_splits(root, one_hot), CLASSES, THREE, "train/_classes.csv: 8 rows",
    ),
    "Roboflow, folders": (
        roboflow_folders, CLASSES, THREE, "1 files beside the classes are no images",
    ),
    "Kaggle, training_set": (
        kaggle_training_set, CLASSES, {"train": 8, "test": 4},
        "classes of training_set are the folders inside of training_set/training_set/",
    ),
    "one folder around": (
        lambda root: folders(root / "flowers"), CLASSES, NONE, "the folders inside of flowers/",
    ),
    "a copy inside": (chest, CLASSES, THREE, "chest/ repeats what lies beside it"),
    "folders of systems": (with_systems_files, CLASSES, NONE, ""),
    "train and eval": (
        lambda root: [folders(root / "train"), folders(root / "eval", start=50)],
        CLASSES, {"train": 8, "test": 8},
        "no split is called test: the one called validation is taken for it",
    ),
    "train and hold-out": (
        lambda root: [folders(root / "Train"), folders(root / "hold-out", start=50)],
        CLASSES, {"train": 8, "test": 8}, "",
    ),
    "a class called train": (
        lambda root: folders(root, ("train", "tram")), ("train", "tram"), NONE, "",
    ),
}  # fmt: skip


@pytest.mark.fault("D40")
@pytest.mark.parametrize("name", READ)
def test_what_others_write_is_read_and_said(name: str, tmp_path: Path) -> None:
    write, labels, splits, note = READ[name]
    write(tmp_path / "data")
    with listing.opened(str(tmp_path / "data")) as source:
        found = list(source.candidates())
    assert source.rejects == []
    total = sum(splits.values())
    assert Counter(candidate.label for candidate in found) == dict.fromkeys(labels, total / 2)
    assert Counter(candidate.split for candidate in found) == splits
    assert all((tmp_path / "data" / candidate.file).is_file() for candidate in found)
    assert len({candidate.file for candidate in found}) == total
    # The label that each image was written with.
    for candidate in found:
        if labels == CLASSES:
            written = (tmp_path / "data" / candidate.file).read_text()
            assert candidate.label in written
    assert note in " ".join(source.notes)


ERRORS = {
    "boxes": (
        of(lambda _, rows: table(
            rows, header="filename,class,xmin,ymin,xmax,ymax", line="{},{},1,1,9,9"
        )),
        r"its columns xmin and ymin say that it is a table of boxes; export it as COCO or Pascal "
        r"VOC. .* ingest.columns: {label: COLUMN}",
    ),
    "boxes of another program": (
        of(lambda _, rows: table(rows, header="image_id,label,bbox", line='{},{},"[1, 2, 3, 4]"')),
        r"its columns bbox say that it is a table of boxes",
    ),
    "a comment": (
        of(lambda _, rows: "# by X\n" + table(rows)),
        r"its first line is a comment \(# by X\); expected the header",
    ),
    "Cyrillic": (
        lambda root: put(
            root / "labels.csv",
            table([(n, "стекло") for n, _ in flat(root / "images")]).encode("cp1251"),
        ),
        r"line 2 is no UTF-8, and would read 'ñòå' in Windows-1252; save it as UTF-8",
    ),
    "one damaged letter": (
        lambda root: put(
            root / "labels.csv",
            table([(n, "Käfer") for n, _ in flat(root / "images")]).encode() + b"a.jpg,\xff\n",
        ),
        r"line 10 is no UTF-8, and other lines are; save it as UTF-8",
    ),
    "a column twice": (
        of(lambda _, rows: table(rows, header="path,label,Label", line="images/{0},{1},{1}")),
        r"has the columns 'label' and 'Label', of which each may be the label; expected one. "
        r"Rename one.",
    ),
    "unknown columns": (
        of(lambda _, rows: table(rows, header="photo,species")),
        r"labels.csv, .* not read: its columns are 'photo', 'species', and none is known to hold "
        r"paths. Name them: ingest.columns: {path: COLUMN, label: COLUMN}. To take the names of "
        r"folders for labels, set ingest.kind: folders",
    ),
    "no labels": (
        of(lambda _, rows: table(rows, header="path,width")),
        r"none is known to hold labels. Name it: ingest.columns: {label: COLUMN}",
    ),
    "two columns of labels": (
        of(lambda _, rows: table(rows, header="path,label,class", line="images/{},{},x")),
        r"labels.csv has the columns 'label' and 'class', of which each may be the label; .* "
        r"ingest.columns: {label: label}",
    ),
    "two columns of paths": (
        of(lambda _, rows: table(rows, header="path,label,file", line="images/{0},{1},{0}")),
        r"has the columns 'path' and 'file', of which each may be the path",
    ),
    "two files": (
        lambda root: [
            put(root / "labels.csv", table(flat(root / "a"), line="{},{}")), flat(root / "b"),
        ],
        r"row 1 of labels.csv names 'img_000.jpg', which may be a/img_000.jpg, b/img_000.jpg; "
        r"expected one file",
    ),
    "several labels an image": (
        of(lambda _, rows: table(rows, header="path,ant,bee", line="images/{},1,1")),
        r"row 1 of labels.csv marks 2 classes \(ant, bee\); expected a single 1 in each row",
    ),
    "too many cells": (
        of(lambda _, rows: table(rows, line="images/{},{},more")),
        r"row 1 has 3 cells, its header 2; cells that hold the separator must stand in quotes",
    ),
    "an empty table": (of(lambda _, __: ""), r"labels.csv, .* not read: it is empty"),
    "no Parquet": (
        lambda root: [folders(root), put(root / "labels.parquet", "PAR1")],
        r"labels.parquet, .* not read: it is no Parquet file",
    ),
    "another annotation": (
        lambda root: [folders(root), put(root / "annotations.xml", "<annotations/>")],
        r"annotations.xml, .* not read: .* set ingest.kind: folders",
    ),
    "splits without classes": (
        lambda root: [flat(root / "train"), flat(root / "val", start=50)],
        r"holds the folders train, val, which are called like splits, and some hold no class "
        r"folders; .* ingest.pattern",
    ),
    "splits without training": (
        lambda root: [folders(root / "val"), folders(root / "test", start=50)],
        r"holds the folders test, val, which are called like splits, and none is for training",
    ),
    "splits by another word": (
        lambda root: [folders(root / "train"), folders(root / "batch2")],
        r"holds the split folders train, and beside them batch2; expected splits only",
    ),
    "a folder beside splits": (
        lambda root: [roboflow_folders(root), folders(root / "extra")],
        r"holds the split folders test, train, valid, and beside them extra",
    ),
}  # fmt: skip


@pytest.mark.fault("D40", "D41")
@pytest.mark.parametrize("name", ERRORS)
def test_what_is_not_plain_is_an_error_that_names_the_key(name: str, tmp_path: Path) -> None:
    write, message = ERRORS[name]
    write(tmp_path / "data")
    with pytest.raises(DataError, match=message), listing.opened(str(tmp_path / "data")):
        pass


def batches(root: Path) -> Rows:
    """Write images of both classes into two folders that are plainly no classes."""
    rows = [(f"batch{1 + i % 2}/img_{i:03}.jpg", CLASSES[i // 2 % 2]) for i in range(12)]
    for name, label in rows:
        put(root / name, f"{name} {label}")
    return rows


UNREAD = [
    *("labels.xlsx", "labels.xls", "labels.ods", "imagelabels.mat", "labels.csv.gz", "set.feather"),
    *("set.arrow", "labels.npy", "labels.pkl", "labels.db", "set.tfrecord", "annotations.zip"),
    *("annotations.json.zip", "annotations/x.mat", "labels/train.sqlite3"),
]


@pytest.mark.fault("D69")
@pytest.mark.parametrize("name", UNREAD)
def test_folders_are_no_classes_beside_a_file_that_may_hold_labels(
    name: str, tmp_path: Path
) -> None:
    batches(tmp_path)
    put(tmp_path / name, b"\0")
    with (
        pytest.raises(DataError, match=rf"holds {name}, which may hold .* CSV.* ingest.kind: fold"),
        listing.opened(str(tmp_path)),
    ):
        pass


TEXTS = {
    "labels.txt": "{} {}",
    "_annotations.txt": "{}\t{}",
    "train.lst": "0 {1} {0}",
    "labels": "{0},1,2,{1}",
    "set.yaml": "{}: {}",
    "annotations/list.txt": "{0:.14} {1}",
}


@pytest.mark.fault("D69")
@pytest.mark.parametrize("name", TEXTS)
def test_folders_are_no_classes_beside_a_text_that_names_the_images(
    name: str, tmp_path: Path
) -> None:
    lines = [TEXTS[name].format(path, label) for path, label in batches(tmp_path)]
    put(tmp_path / name, "# of the set\n" + "\n".join(lines))
    with (
        pytest.raises(
            DataError, match=rf"holds {name}, .* it names images \(.*img_000.*; write it"
        ),
        listing.opened(str(tmp_path)),
    ):
        pass
    if "/" not in name:
        with listing.opened(str(tmp_path), kind="folders") as source:
            assert source.counts == {"batch1": 6, "batch2": 6}


@pytest.mark.fault("D69")
def test_what_names_no_images_beside_class_folders_is_harmless(tmp_path: Path) -> None:
    """Nor do numbers of classes that are names of images too, or checksums."""
    for label in CLASSES:
        for i in range(6):
            put(tmp_path / label / f"{i}.jpg", f"{label} {i}")
    put(tmp_path / "README.txt", "Ants and bees.\nSee ant/1.jpg and bee/1.jpg.\nTaken\nby\nus.\n")
    put(tmp_path / "LICENSE", "Do what you want.")
    put(tmp_path / "README.md", "ant/1.jpg\nbee/1.jpg")
    put(tmp_path / "classes.txt", "0 ant\n1 bee\n")
    put(tmp_path / "names.txt", "ant\nbee\n")
    put(tmp_path / "sums.txt", "".join(f"{i:032x} ant/{i}.jpg\n" for i in range(6)))
    put(tmp_path / "old.zip", b"PK")
    put(tmp_path / "notes.dat", b"\0\xff")
    with listing.opened(str(tmp_path)) as source:
        assert source.counts == {"ant": 6, "bee": 6}


@pytest.mark.fault("D69")
def test_a_table_that_lies_beside_wrapped_class_folders_is_not_passed_over(tmp_path: Path) -> None:
    rows = batches(tmp_path / "data" / "set" / "images")
    put(tmp_path / "data" / "set" / "labels.csv", table(rows))
    with (
        pytest.raises(DataError, match=r"set/labels.csv, .*ingest.label_files: set/labels.csv re"),
        listing.opened(str(tmp_path / "data")),
    ):
        pass
    with listing.opened(str(tmp_path / "data"), label_files="set/labels.csv") as source:
        assert source.counts == {"ant": 6, "bee": 6}


LAYERS = {
    "dates": ["2023-01-02", "2023-01-03"],
    "folds": ["fold1", "fold2"],
    "splits by other words": ["Lernen", "Test"],
    "patients": [f"patient {number}" for number in range(8)],
    "dates of splits": ["train/mon", "train/tue", "test/mon", "test/tue"],
    "two layers": ["2023/01", "2023/02", "2024/01", "2024/02"],
}


@pytest.mark.fault("D41")
@pytest.mark.parametrize("name", LAYERS)
def test_folders_that_all_hold_the_same_folders_are_no_classes(name: str, tmp_path: Path) -> None:
    """The pattern that is named reads the folders inside, the other one those on top."""
    for number, folder in enumerate(LAYERS[name]):
        inside = (*CLASSES, "wasp") if number == 1 else CLASSES  # nearly the same
        folders(tmp_path / folder, inside, start=10 * number)
    with (
        pytest.raises(DataError, match=r"in place of classes .* same folders \(ant, bee") as found,
        listing.opened(str(tmp_path)),
    ):
        pass
    said = str(found.value)
    assert ("as Test, call the others so too" in said) == (name == "splits by other words")
    inner, outer = re.findall(r"ingest\.pattern: '(.*?)'", said)
    with listing.opened(str(tmp_path), pattern=inner) as source:
        assert set(source.counts) == {*CLASSES, "wasp"}
        read = list(source.candidates())
    assert len({candidate.group for candidate in read}) == (8 if name == "patients" else 1)
    assert len({candidate.split for candidate in read}) == (2 if "splits" in name[-9:] else 1)
    with listing.opened(str(tmp_path), pattern=outer) as source:
        assert not set(source.counts) & {*CLASSES}


def test_folders_inside_of_classes_with_images_are_left_to_them(tmp_path: Path) -> None:
    for label in CLASSES:
        folders(tmp_path / label, ("near", "far"))
        folders(tmp_path, (label,))
    with listing.opened(str(tmp_path)) as source:
        assert source.counts == {"ant": 12, "bee": 12}


@pytest.mark.fault("D69")
@pytest.mark.parametrize("suffix", ["txt", "json", "xml"])
def test_a_file_beside_each_image_is_not_passed_over(suffix: str, tmp_path: Path) -> None:
    folders(tmp_path)
    with listing.opened(str(tmp_path)):
        pass
    for path in list(tmp_path.rglob("*.jpg")):
        put(path.with_suffix(f".{suffix}"), "<x/>" if suffix == "xml" else "a brown ant")
    message = rf"the folder ant would be a class, and holds 4 images, 4 .* ant/ant_000.{suffix};"
    if suffix != "xml":
        with pytest.raises(DataError, match=message), listing.opened(str(tmp_path)):
            pass
    with listing.opened(str(tmp_path), kind="folders") as source:
        assert set(source.counts) == {"ant", "bee"}


def test_images_of_other_endings_are_images(tmp_path: Path) -> None:
    """Nor are unknown endings an error where somebody has said that folders are classes."""
    for i in range(4):
        put(tmp_path / "ant" / f"{i}.jfif")
        put(tmp_path / "bee" / f"{i}")
    with listing.opened(str(tmp_path)) as source:
        assert source.counts == {"ant": 4, "bee": 4}
    for i in range(4):
        put(tmp_path / "fly" / f"{i}.img")
    message = "the folder fly would be a class, and holds 0 images and 4 other files, such as fly/0"
    with pytest.raises(DataError, match=message), listing.opened(str(tmp_path)):
        pass
    with listing.opened(str(tmp_path), kind="folders") as source:
        assert source.counts == {"ant": 4, "bee": 4, "fly": 4}


@pytest.mark.fault("D69")
@pytest.mark.parametrize("kind", ["auto", "folders"])
def test_a_folder_without_images_is_no_class(kind: listing.Kind, tmp_path: Path) -> None:
    """As YOLO's, where no file says that it is."""
    for name, _ in flat(tmp_path / "images"):
        put(tmp_path / "labels" / name.replace("jpg", "txt"), "0 .5 .5 .3 .3")
    message = r"the folder labels would be a class, and holds 0 images and 8 other files, such as"
    with pytest.raises(DataError, match=message), listing.opened(str(tmp_path), kind=kind):
        pass


@pytest.mark.fault("D40")
def test_columns_can_be_named(tmp_path: Path) -> None:
    rows = flat(tmp_path / "images")
    lines = table(rows, header="photo,species,label,part", line="images/{},{},x,val")
    put(tmp_path / "labels.csv", lines)
    columns: dict[Role, str] = {
        "path": "photo",
        "label": "Species ",
        "split": "part",
    }
    with listing.opened(str(tmp_path), columns=columns) as source:
        found = list(source.candidates())
    assert Counter(candidate.label for candidate in found) == {"ant": 4, "bee": 4}
    assert {candidate.split for candidate in found} == {"validation"}
    with (
        pytest.raises(
            DataError, match=r"no column 'kind', which ingest\.columns\.label names; it has"
        ),
        listing.opened(str(tmp_path), columns={"path": "photo", "label": "kind"}),
    ):
        pass


MAY_BE = {
    "is_valid": ("split", ["True", "False"]),
    "Is Test": ("split", ["0", "1"]),
    "fold": ("split", ["0", "1", "2"]),
    "patient_id": ("group", ["p1", "p2", "p3"]),
    "Subject": ("group", ["a", "b"]),
    "lesion_id": ("group", ["1", "2", "3", "4"]),
    "series": ("group", ["x", "y"]),
}


@pytest.mark.fault("D70")
@pytest.mark.parametrize("form", ["csv", "parquet"])
@pytest.mark.parametrize("column", MAY_BE)
def test_a_column_that_may_hold_splits_or_groups_is_asked_for(
    column: str, form: str, tmp_path: Path
) -> None:
    import pandas as pd

    role, values = MAY_BE[column]
    content = [(f"images/{n}", label) for n, label in flat(tmp_path / "images")]
    frame = pd.DataFrame(content, columns=["path", "label"])
    frame[column] = [values[i // 2 % len(values)] for i in range(8)]
    frame.to_csv(tmp_path / "labels.csv", index=False)
    if form == "parquet":
        frame.to_parquet(tmp_path / "labels.parquet")
        (tmp_path / "labels.csv").unlink()
    named, none = (re.escape(f"ingest.columns: {{{role}: {name}}}") for name in (column, "null"))
    message = rf"'{column}', which is called as if it held {role}s .*{named}.*, or .*{none}"
    with (
        pytest.raises(DataError, match=message),
        listing.opened(str(tmp_path)),
    ):
        pass
    given = cast(Role, role)
    with listing.opened(str(tmp_path), columns={given: None}) as source:
        assert source.counts == {"ant": 4, "bee": 4}
        assert f"not used: '{column}'" in " ".join(source.notes)
    if column == "fold":
        return
    with listing.opened(str(tmp_path), columns={given: column}) as source:
        found = [getattr(candidate, role) for candidate in source.candidates()]
    if role == "group":
        assert len(set(found)) == len(values)
    else:
        is_held_out = {"True", "1"}
        held_out = [values[i // 2 % 2] in is_held_out for i in range(8)]
        assert [split == "test" for split in found] == held_out  # there is one kind of these


@pytest.mark.fault("D70")
def test_true_and_false_say_the_split_that_their_column_is_called(tmp_path: Path) -> None:
    lines = table(flat(tmp_path / "images"), header="path,label,is_train", line="images/{},{},1")
    put(tmp_path / "labels.csv", lines)
    with (
        pytest.raises(DataError, match=r"'is_train' of labels.csv says which images train,"),
        listing.opened(str(tmp_path), columns={"split": "is_train"}),
    ):
        pass


NEAR = {
    "upper and lower case": "images/IMG_000.JPG",
    "quotes or spaces": "'images/img_000.jpg'",
    "Unicode's normal form (NFC and NFD)": "images/K\u00e4fer.jpg",
    "quotes or spaces and upper and lower case": "`images/Img_000.jpg`",
}


@pytest.mark.fault("D40")
@pytest.mark.parametrize("head", ["", "/data/set/"])
@pytest.mark.parametrize("what", NEAR)
def test_a_missing_file_that_is_called_nearly_so_is_named(
    what: str, head: str, tmp_path: Path
) -> None:
    rows = flat(tmp_path / "images")
    put(tmp_path / "images" / "Ka\u0308fer.jpg")
    lines = table(rows[1:]) + f"{head}{NEAR[what]},ant\n"
    put(tmp_path / "labels.csv", lines)
    with listing.opened(str(tmp_path)) as source:
        (reject,) = source.rejects
    assert reject.reason == "missing"
    assert reject.detail.endswith(f"jpg differs only in {what}")
    assert reject.detail.startswith("row 8 of labels.csv names it; images/")


def test_an_address_in_a_table_is_not_fetched_and_said_to_be_one(tmp_path: Path) -> None:
    rows = flat(tmp_path / "images")
    put(tmp_path / "labels.csv", table(rows[1:]) + "https://example.org/IMG_000.jpg,ant\n")
    with listing.opened(str(tmp_path)) as source:
        (reject,) = source.rejects
    assert reject.detail.endswith(
        "that is an address, nothing is fetched from it: download the image"
    )


def test_a_file_of_another_folder_is_not_called_nearly_so(tmp_path: Path) -> None:
    rows = flat(tmp_path / "images")
    put(tmp_path / "labels.csv", table(rows[1:]) + "photos/IMG_000.jpg,ant\n")
    with listing.opened(str(tmp_path)) as source:
        assert [reject.detail for reject in source.rejects] == ["row 8 of labels.csv names it"]


def test_whole_numbers_with_gaps_are_whole_labels_and_images_are_not_loaded(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    names = [name for name, _ in flat(tmp_path / "images")]
    column = [7.0, 12.0, None, 7.0, 12.0, 7.0, 12.0, 7.0]
    content = {
        "path": [f"images/{name}" for name in names],
        "label": column,
        "image": [{"bytes": b"x", "path": name} for name in names],
    }
    parquet.write_table(pa.table(content), tmp_path / "labels.parquet")
    with listing.opened(str(tmp_path)) as source:
        assert source.counts == {"7": 4, "12": 3}
    assert [reject.reason for reject in source.rejects] == ["no_label"]


def test_cells_in_quotes_may_hold_separators_and_lines(tmp_path: Path) -> None:
    rows = flat(tmp_path / "images")
    text = io.StringIO()
    written = csv.writer(text, delimiter=";")
    written.writerow(["path", "note", "label"])
    written.writerows([f"images/{name}", "one; two,\nthree", label] for name, label in rows)
    put(tmp_path / "labels.csv", text.getvalue())
    with listing.opened(str(tmp_path)) as source:
        assert source.counts == {"ant": 4, "bee": 4}


@pytest.mark.fault("D40")
def test_a_path_never_means_a_file_of_another_folder(tmp_path: Path) -> None:
    rows = flat(tmp_path / "train")
    lines = [f"/data/test/{rows[0][0]},ant", f"test/{rows[1][0]},bee"]
    lines += [f"/old/place/train/{name},{label}" for name, label in rows[2:]]
    put(tmp_path / "labels.csv", "\n".join(["path,label", *lines]))
    with listing.opened(str(tmp_path)) as source:
        assert source.counts == {"ant": 3, "bee": 3}
    assert {reject.path: reject.reason for reject in source.rejects} == {
        f"/data/test/{rows[0][0]}": "outside_root",
        f"test/{rows[1][0]}": "missing",
    }


@pytest.mark.fault("D40")
def test_a_column_that_is_there_twice_cannot_be_named(tmp_path: Path) -> None:
    rows = flat(tmp_path / "images")
    put(tmp_path / "labels.csv", table(rows, header="path,kind,Kind", line="images/{},{},x"))
    with (
        pytest.raises(DataError, match="several columns 'kind'; expected one"),
        listing.opened(str(tmp_path), columns={"label": "kind"}),
    ):
        pass


def test_a_column_of_parquet_is_named_as_one_of_csv(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    names, labels = zip(*flat(tmp_path / "images"), strict=True)
    content = {"path": [f"images/{name}" for name in names], "Breed": labels}
    parquet.write_table(pa.table(content), tmp_path / "labels.parquet")
    with listing.opened(str(tmp_path), columns={"label": "breed"}) as source:
        assert source.counts == {"ant": 4, "bee": 4}


def test_a_name_with_words_of_several_splits_says_none(tmp_path: Path) -> None:
    put(tmp_path / "train_test_split.csv", table(flat(tmp_path / "images")))
    put(tmp_path / "test.csv", table(flat(tmp_path / "images", start=50)))
    with (
        pytest.raises(DataError, match="holds 2 tables with path and label"),
        listing.opened(str(tmp_path)),
    ):
        pass


@pytest.mark.fault("D43")
@pytest.mark.parametrize("place", ["photos", "photos/small", "photos/2024/small.zip"])
def test_a_folder_that_dvc_has_is_said_to_be_pulled(tmp_path: Path, place: str) -> None:
    put(tmp_path / "photos.dvc", "outs:\n- path: photos\n")
    with (
        pytest.raises(DataError, match=rf"{place} is not here, but .* 'dvc pull .*/photos.dvc'"),
        listing.opened(str(tmp_path / place)),
    ):
        pass


@pytest.mark.fault("D45")
def test_unequal_classes_are_said_by_check(empty: Workspace, photos: Path) -> None:
    for i in range(800):
        put(photos / "dark" / f"more_{i}.png")
    empty.set_source(photos)
    (empty.path / "data").symlink_to(ROOT / "data")
    said = empty.call("check").stdout
    assert "classes are unequal: dark has 812 images, light 12." in said
    assert "is right on 98.5% of them" in said


@pytest.mark.fault("D61")
@pytest.mark.parametrize("path", ["~/photos", "$HOME/photos", "${HOME}/photos"])
def test_the_home_folder_is_expanded_and_check_says_what_dvc_needs(
    empty: Workspace, photos: Path, path: str
) -> None:
    home = Workspace(empty.path, {**empty.env, "HOME": str(photos.parent)})
    home.configure("ingest", source=path)
    home.ingest()
    assert len(home.rows("artifacts/ingest/manifest.csv")) == 24
    said = home.call("check", code=4).stderr
    assert f"ingest.source is {path}, which DVC would look for as it stands" in said
    assert f"Write {photos} into params.yaml" in said
    home.configure("ingest", source=str(photos))
    home.configure("evaluate", ood=path)
    assert f"evaluate.ood is {path}, which" in home.call("check", code=4).stderr


@pytest.mark.fault("D32")
def test_check_says_what_will_be_rejected_before_any_image_is_read(
    empty: Workspace, photos: Path
) -> None:
    names = sorted(f"{p.parent.name}/{p.name}" for p in photos.rglob("*.png"))
    rows = [f"{name},{name.split('/')[0]}\n" for name in [*names, "dark/gone.png"]]
    put(photos / "labels.csv", "path,label\n" + "".join(rows))
    empty.configure("ingest", source=str(photos), max_rejected=0.1)
    empty.configure("evaluate", ood=str(photos))
    said = empty.call("check").stdout
    assert "1 will be rejected (missing 1), the first is dark/gone.png: row 25 of labels" in said
    empty.configure("ingest", max_rejected=0.02)
    assert "1 of 25 images were rejected (missing 1)" in empty.call("check", code=4).stderr
