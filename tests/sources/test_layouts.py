"""File names that share a prefix are pointed out, with the pattern that groups by it."""

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import Workspace
from tlpipe.sources import listing


def put(root: Path, names: list[str]) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def advice(root: Path) -> tuple[str, str]:
    """Return the note on prefixes, and the pattern it names; both empty where there is none."""
    with listing.opened(str(root)) as source:
        notes = [note for note in source.notes if "prefixes" in note]
    if not notes:
        return "", ""
    (note,) = notes
    found = re.search(r"ingest\.pattern: '(.*)'$", note)
    assert found is not None
    return note, found[1].replace("''", "'")


def grouped(root: Path, pattern: str) -> dict[str, tuple[str, str, str]]:
    """Return the label, split and group of each image when the pattern is set."""
    with listing.opened(str(root), pattern=pattern) as source:
        found = {c.name: (c.label, c.split, c.group) for c in source.candidates()}
        assert not source.rejects
    return found


SHARED = {
    # template of names, and the group that the first one belongs to
    "last separator": ("{label}/patient{group}_{number:03}.png", "patient0"),
    "frames": ("{label}/IMG_video{group}_frame{number:04}.jpg", "IMG_video0"),
    "number alone": ("{label}/clip{letter}{number:03}.jpg", "clipA"),
    "inner folders": ("{label}/patient{group}/{number}.png", "patient0"),
    "copies by Roboflow": ("{label}/p{group}_jpg.rf.{number:08x}a.jpg", "p0"),
    "sides": ("{label}/p{group}-{side}.png", "p0"),
    "wrapped": ("it's all/{label}/p{group}_{number}.png", "p0"),
}


@pytest.mark.fault("L05")
@pytest.mark.parametrize(("template", "first"), SHARED.values(), ids=SHARED)
def test_the_pattern_groups_and_still_reads_the_label(
    tmp_path: Path, template: str, first: str
) -> None:
    names = {}
    for group in range(12):
        for number in range(5):
            name = template.format(
                label="ab"[group % 2],
                group=group,
                letter=chr(65 + group),
                number=number,
                side=chr(65 + number),
            )
            names[name] = group
    put(tmp_path, list(names))
    note, pattern = advice(tmp_path)
    assert "60 images share 12 prefixes" in note
    example = re.findall(r"as (.*) and (.*) do, and no group is given", note)
    assert names[example[0][0]] == names[example[0][1]]
    found = grouped(tmp_path, pattern)
    assert found.keys() == names.keys()
    assert {label for label, _, _ in found.values()} == {"a", "b"}
    assert found[next(iter(names))][2] == first
    of_group = {(names[name], group) for name, (_, _, group) in found.items()}
    assert len(of_group) == len({group for _, group in of_group}) == 12


@pytest.mark.fault("L05")
def test_given_splits_are_still_read(tmp_path: Path) -> None:
    for start, (split, count) in enumerate({"train": 8, "val": 4, "test": 4}.items()):
        for group in range(count):
            where = f"{split}/{'ab'[group % 2]}/p{100 * start + group}"
            put(tmp_path, [f"{where}_{number}.png" for number in range(3)])
    note, pattern = advice(tmp_path)
    assert "48 images share 16 prefixes" in note
    found = grouped(tmp_path, pattern)
    counts = Counter(split for _, split, _ in found.values())
    assert counts == {"train": 24, "validation": 12, "test": 12}
    assert found["train/a/p0_0.png"] == ("a", "train", "p0")


@pytest.mark.fault("L05")
def test_names_that_the_pattern_finds_no_group_in_are_kept(tmp_path: Path) -> None:
    names = [f"{'ab'[g % 2]}/p{g}_{i}.png" for g in range(12) for i in range(5)]
    put(tmp_path, [*names, "a/portrait.png"])
    _, pattern = advice(tmp_path)
    assert grouped(tmp_path, pattern)["a/portrait.png"] == ("a", "", "")


NOTHING = {
    "one camera": ["{label}/IMG_{number:04}.jpg"],
    "class names": ["{label}/{label}_{number:03}.png"],
    "class names, no separator": ["{label}/{label}{number}.png"],
    "bare numbers": ["{label}/{number}.png"],
    "names of their own": ["{label}/{number:06}_{number:x}f.png"],
    "two cameras": ["{label}/IMG_{number}.jpg", "{label}/DSC_{number}.jpg"],
    "years": [f"{{label}}/{year}_{{number:06}}.jpg" for year in (2007, 2008, 2009)],
}


@pytest.mark.fault("L05")
@pytest.mark.parametrize("templates", NOTHING.values(), ids=NOTHING)
def test_plain_names_are_no_groups(tmp_path: Path, templates: list[str]) -> None:
    labels = [f"class{letter}" for letter in "abcdefgh"]
    for number in range(80):
        for template in templates:
            put(tmp_path, [template.format(label=labels[number % 8], number=number)])
    assert advice(tmp_path) == ("", "")


@pytest.mark.fault("L05")
def test_a_few_prefixes_and_one_that_nearly_all_have_are_no_groups(tmp_path: Path) -> None:
    names = [f"{'ab'[number % 2]}/IMG_{number:04}.jpg" for number in range(80)]
    strays = [f"{'ab'[g % 2]}/x{g}_{number}.jpg" for g in range(12) for number in range(2)]
    put(tmp_path / "camera", [*names, *strays])
    assert advice(tmp_path / "camera") == ("", "")
    years = [f"{'ab'[n % 2]}/{2007 + n // 2 % 3}_{n:06}.jpg" for n in range(90)]
    put(tmp_path / "years", years)
    assert advice(tmp_path / "years") == ("", "")


@pytest.mark.fault("L05")
def test_ingest_says_it_and_then_keeps_the_groups(empty: Workspace, photos: Path) -> None:
    for path in sorted(photos.rglob("*.png")):
        number = int(path.stem)
        path.rename(path.with_name(f"{path.parent.name}{number // 3}_{number % 3}.png"))
    empty.set_source(photos)
    said = "".join(empty.ingest().split())
    assert "24imagesshare8prefixes" in said
    pattern = advice(photos)[1]
    assert "".join(f"ingest.pattern: '{pattern}'".split()) in said
    empty.configure("ingest", pattern=pattern)
    said = "".join(empty.ingest().split())
    assert "prefixes" not in said
    rows = empty.rows("artifacts/ingest/manifest.csv")
    groups: dict[str, set[str]] = {}
    for row in rows:
        groups.setdefault(Path(row["path"]).name.partition("_")[0], set()).add(row["group"])
    assert len(groups) == 8
    assert all(len(found) == 1 for found in groups.values())
