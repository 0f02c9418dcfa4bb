"""A file of another folder never stands in for a missing one of its name."""

import sys
from pathlib import Path

import pytest

from tests.sources.test_boxes import coco, pictures, read, voc, write
from tests.sources.test_cases import flat, put, table
from tlpipe.errors import DataError
from tlpipe.sources import listing


@pytest.mark.fault("D47")
def test_a_photo_of_another_folder_does_not_stand_in_for_a_missing_one(tmp_path: Path) -> None:
    write(tmp_path / "all.json", coco(pictures(tmp_path, "cam1")))
    (tmp_path / "cam2").mkdir()
    (tmp_path / "cam1" / "000.jpg").rename(tmp_path / "cam2" / "000.jpg")
    message = r"all.json names images .* folders: cam1/ \(cam1/001.jpg\), cam2/ \(cam2/000.jpg\);"
    with pytest.raises(DataError, match=message):
        read(tmp_path)
    # What is not there is missing, and no more.
    (tmp_path / "cam2" / "000.jpg").unlink()
    found, rejects, _ = read(tmp_path)
    assert {candidate.file for candidate in found} == {f"cam1/00{i}.jpg" for i in (1, 2, 3)}
    assert rejects == {"000.jpg": "missing: all.json names it"}


@pytest.mark.fault("D47")
@pytest.mark.parametrize("place", ["train/masks", "."])
def test_beside_paths_that_are_found_as_they_stand_no_other_folder_counts(
    tmp_path: Path, place: str
) -> None:
    """As Roboflow writes them: below the annotation's folder nothing else, nor in the source."""
    write(tmp_path / "train" / "all.json", coco(pictures(tmp_path, "train")))
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / "train" / "000.jpg").rename(tmp_path / place / "000.jpg")
    found, rejects, _ = read(tmp_path)
    assert {candidate.file for candidate in found} == {f"train/00{i}.jpg" for i in (1, 2, 3)}
    other = (Path(place) / "000.jpg").as_posix()
    assert rejects == {
        "000.jpg": f"missing: train/all.json names it; {other} lies elsewhere than its other images"
    }


@pytest.mark.fault("D40")
def test_a_mask_does_not_stand_in_for_a_missing_photo_of_a_table(tmp_path: Path) -> None:
    put(tmp_path / "labels.csv", table(flat(tmp_path / "photos"), line="{},{}"))
    (tmp_path / "masks").mkdir()
    (tmp_path / "photos" / "img_000.jpg").rename(tmp_path / "masks" / "img_000.jpg")
    message = r"labels.csv names images that lie in several folders: masks/ .*, photos/ .*; expect"
    with pytest.raises(DataError, match=message):
        read(tmp_path)


@pytest.mark.fault("D40")
@pytest.mark.parametrize("others", [".", "masks", "train"])
def test_bare_names_in_folders_of_classes_are_found_in_them(tmp_path: Path, others: str) -> None:
    """In those of one folder, or of folders of splits; a copy of one class elsewhere is none."""
    rows = [(f"img_{i:03}.jpg", ("ant", "bee")[i % 2]) for i in range(9)]
    root = "test" if others == "train" else "."
    folders = [Path(others if i < 2 else root) / f"{rows[i][1]}s" for i in range(8)]
    for folder, (name, _) in zip(folders, rows, strict=False):
        put(tmp_path / folder / name)
    put(tmp_path / "labels.csv", table(rows, line="{},{}"))
    if others == "masks":
        with pytest.raises(DataError, match=r"several folders: ants/ .*, bees/ .*, masks/ants/ "):
            read(tmp_path)
        return
    found, rejects, _ = read(tmp_path)
    assert {(c.file, c.label) for c in found} == {
        ((folder / name).as_posix(), label)
        for folder, (name, label) in zip(folders, rows, strict=False)
    }
    assert rejects == {"img_008.jpg": "missing: row 9 of labels.csv names it"}


@pytest.mark.fault("D40")
def test_of_absolute_paths_the_same_head_is_cut_off(tmp_path: Path) -> None:
    rows = flat(tmp_path / "photos")
    put(tmp_path / "labels.csv", table(rows, line="/old/place/photos/{},{}"))
    (tmp_path / "photos" / "img_000.jpg").rename(tmp_path / "img_000.jpg")
    found, rejects, _ = read(tmp_path)
    assert {candidate.file for candidate in found} == {f"photos/{name}" for name, _ in rows[1:]}
    assert [reject.split(":")[0] for reject in rejects.values()] == ["outside_root"]


@pytest.mark.fault("D47")
def test_the_photos_of_a_folder_of_voc_lie_in_one_folder(tmp_path: Path) -> None:
    for i, name in enumerate(pictures(tmp_path, "JPEGImages")):
        stated = f"JPEGImages/{name}" if i == 3 else name
        text = voc(name, stated, ("ant", "bee")[i % 2])
        put(tmp_path / "Annotations" / f"{name[:-4]}.xml", text)
    assert len(read(tmp_path)[0]) == 4
    (tmp_path / "masks").mkdir()
    (tmp_path / "JPEGImages" / "000.jpg").rename(tmp_path / "masks" / "000.jpg")
    with pytest.raises(DataError, match=r"Annotations/\*.xml names images .*JPEGImages/ .*masks/"):
        read(tmp_path)
    (tmp_path / "masks" / "000.jpg").rename(tmp_path / "Annotations" / "000.jpg")
    for name in ("001", "002", "003"):
        (tmp_path / "JPEGImages" / f"{name}.jpg").rename(tmp_path / "Annotations" / f"{name}.jpg")
    (tmp_path / "Annotations" / "000.jpg").rename(tmp_path / "000.jpg")
    found, rejects, _ = read(tmp_path)
    assert {c.file for c in found} == {f"Annotations/00{i}.jpg" for i in (1, 2, 3)}
    assert "000.jpg lies elsewhere" in rejects["000.jpg"]


def test_the_search_takes_no_square_of_the_number_of_equal_names(tmp_path: Path) -> None:
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    taken = []
    for images in (100, 400):
        root = tmp_path / str(images)
        rows = [(f"v{i}/image.jpg", ("ant", "bee")[i % 2]) for i in range(images)]
        for name, _ in rows:
            put(root / "data" / name)
        put(root / "labels.csv", table(rows, line="{},{}"))
        calls, before = 0, sys.getprofile()
        sys.setprofile(count)
        try:
            with listing.opened(str(root)) as source:
                assert source.counts.total() == images
        finally:
            sys.setprofile(before)
        taken.append(calls)
    assert taken[1] < 6 * taken[0]
