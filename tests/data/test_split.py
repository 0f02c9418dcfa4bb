import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT, Workspace
from tlpipe.data import manifest
from tlpipe.data.manifest import UNUSED, Assignment, Entry, load_split, save_manifest
from tlpipe.data.split import HELD_OUT, Params, Result, _shares, assign, limited
from tlpipe.errors import DataError, ParamsError
from tlpipe.runtime import uniform

SPLIT = ("split",)
MANIFEST = "artifacts/ingest/manifest.csv"


def entries(count: int, split: str = "", labels: str = "ab", start: int = 0) -> list[Entry]:
    rows = []
    for number in range(start, start + count):
        label = labels[number % len(labels)]
        sha256 = hashlib.sha256(f"{split}{number}".encode()).hexdigest()
        rows.append(
            Entry(
                path=f"{label}/{number}",
                label=label,
                sha256=sha256,
                box="",
                file_bytes=1,
                width=1,
                height=1,
                mode="RGB",
                format="PNG",
                group=sha256[:16],
                split=split,
                data_version="",
            )
        )
    return rows


def splits(rows: list[Entry], **params: object) -> list[str]:
    return assign(rows, Params(**params)).splits  # type: ignore[arg-type]


def run(empty: Workspace, rows: list[Entry], code: int = 0) -> dict[str, str]:
    """Run the stage; return the split of each path."""
    save_manifest(empty.path / MANIFEST, sorted(rows, key=lambda row: row.path))
    empty.call(*SPLIT, code=code)
    return {row["path"]: row["split"] for row in empty.rows("artifacts/split/split.csv")}


def test_shares_are_those_asked_for_in_every_class() -> None:
    rows = entries(4000)
    counts = Counter(
        zip((r.label for r in rows), splits(rows, validation=0.1, test=0.3), strict=True)
    )
    for label in "ab":
        assert counts[label, "test"] == pytest.approx(600, rel=0.1)
        assert counts[label, "validation"] == pytest.approx(200, rel=0.15)


def test_images_added_later_move_no_old_one() -> None:
    old = entries(500)
    before = dict(zip((e.path for e in old), splits(old), strict=True))
    more = sorted(old + entries(500, start=500), key=lambda entry: entry.sha256)
    after = dict(zip((e.path for e in more), splits(more), strict=True))
    assert {path: after[path] for path in before} == before


def test_nor_do_those_that_join_a_group_or_fill_a_class(empty: Workspace) -> None:
    old = entries(100) + entries(4, labels="c", start=1000)
    before = run(empty, old)
    # Each new image is like an old one, and its group takes the new image's name.
    new = [
        row._replace(path=f"{row.label}/new-{i}", sha256=f"{i:064x}", group=f"{i:016x}")
        for i, row in enumerate(old)
    ]
    joined = [row._replace(group=f"{i:016x}") for i, row in enumerate(old)]
    more = entries(400, start=2000, labels="abc")
    after = run(empty, joined + new + more)
    assert {path: after[path] for path in before} == before
    for i, row in enumerate(old):
        assert after[f"{row.label}/new-{i}"] == before[row.path]
    renamed = [row._replace(path=f"{row.label}/renamed-{row.path[2:]}") for row in old]
    moved = run(empty, renamed)
    assert [moved[row.path] for row in renamed] == [before[row.path] for row in old]


@pytest.mark.fault("L01")
def test_a_grown_data_set_is_split_alike_in_a_fresh_clone(empty: Workspace) -> None:
    run(empty, entries(8))
    grown = run(empty, entries(400))
    report = (empty.path / "artifacts/split/report.json").read_bytes()
    shutil.rmtree(empty.path / "artifacts/split")  # in Git there is splits.csv alone
    assert run(empty, entries(400)) == grown
    assert (empty.path / "artifacts/split/report.json").read_bytes() == report
    for name in ("splits.csv", "artifacts/split/split.csv"):
        (empty.path / name).unlink()
    assert run(empty, entries(400)) != grown


@pytest.mark.fault("L06")
@pytest.mark.parametrize(
    ("one", "other"), [("train", "test"), ("validation", "test"), ("train", "validation")]
)
def test_an_image_like_two_old_ones_in_different_splits_tests(
    empty: Workspace, one: str, other: str
) -> None:
    """Of the three that are alike then, the held-out ones stay where they are."""
    old = entries(100)
    before = run(empty, old)
    a = next(row for row in old if before[row.path] == one)
    b = next(row for row in old if before[row.path] == other and row.label == a.label)
    bridge = a._replace(path=f"{a.label}/bridge", sha256="f" * 64, group="one")
    rows = [row._replace(group="one") if row in (a, b) else row for row in old]
    after = run(empty, [*rows, bridge])
    assert after == {**before, bridge.path: other, a.path: "unused"}
    report = (empty.path / "artifacts/split/report.json").read_text()
    assert json.loads(report)["leaks"] == 1
    # What was set aside is used again where its like is gone.
    assert run(empty, old) == before


@pytest.mark.fault("L06")
@pytest.mark.parametrize("folds", [None, 5])
def test_like_images_that_two_branches_placed_apart_measure_nothing_learned(
    empty: Workspace, folds: int | None
) -> None:
    """Both add the same pictures in different files, and neither knows of the other's."""
    if folds:
        empty.configure("split", folds=folds)
    old, ours = entries(60), entries(30, start=100)
    theirs = [row._replace(path=f"{row.path}-q70", sha256=row.sha256[::-1]) for row in ours]
    run(empty, old)
    first = [row._replace(group=row.sha256[:16]) for row in theirs]
    merged(empty, old + ours, old + first)
    known = manifest.load_placements(
        empty.path / "splits.csv", f"seed=0 folds={folds}" if folds else KNOWN
    ).places
    rows = sorted(old + ours + theirs, key=lambda row: row.path)
    save_manifest(empty.path / MANIFEST, rows)
    said = empty.call(*SPLIT).stderr
    table = empty.rows("artifacts/split/split.csv")
    apart = [
        pair for pair in zip(ours, theirs, strict=True) if len({known[r.sha256] for r in pair}) > 1
    ]
    assert len(apart) > 3
    after = {row["sha256"]: row["split"] for row in table}
    for pair in zip(ours, theirs, strict=True):
        places = {known[row.sha256] for row in pair}
        used = {after[row.sha256] for row in pair} - {"unused"}
        assert len(used) == 1
        if not folds:
            assert used == {next(s for s in ("test", "validation", "train") if s in places)}
    # Each image is where it was, or nowhere.
    if not folds:
        assert {known[row["sha256"]] for row in table if row["split"] == "train"} == {"train"}
        assert all(row["split"] in (known[row["sha256"]], "unused") for row in table)
    assert list(after.values()).count("unused") == len(apart)
    # So the gate's rule leaks, which asks for groups, has nothing to find.
    groups = {s: {row["group"] for row in table if row["split"] == s} for s in after.values()}
    assert groups["test"].isdisjoint(groups["train"] | groups["validation"])
    report = json.loads((empty.path / "artifacts/split/report.json").read_text())
    assert report["leaks"] == len(apart) == len(report["apart"])
    assert f"{len(apart)} images are left unused, since splits.csv places images like them" in said
    for path, was, like, place in report["apart"][:5]:
        assert f"{path} ({was}) is like {like} ({place})" in said
    # The same in a fresh clone, and from the run's own table, with which rebuild starts.
    written = (empty.path / "artifacts/split/split.csv").read_bytes()
    shutil.rmtree(empty.path / "artifacts/split")
    empty.call(*SPLIT)
    assert (empty.path / "artifacts/split/split.csv").read_bytes() == written
    drawn = f"seed=0 folds={folds}" if folds else KNOWN
    own = manifest.of_table(load_split(empty.path / "artifacts/split/split.csv"))
    manifest.save_placements(empty.path / "splits.csv", manifest.Placements(drawn, own))
    shutil.rmtree(empty.path / "artifacts/split")
    empty.call(*SPLIT)
    assert (empty.path / "artifacts/split/split.csv").read_bytes() == written


def test_another_seed_draws_anew_and_keeps_the_earlier_rows(empty: Workspace) -> None:
    rows = entries(100)
    before = run(empty, rows)
    empty.configure("split", seed=1)
    said = empty.call(*SPLIT).stderr
    assert (
        "no row of splits.csv was drawn by seed=1 validation=0.2 test=0.2, as params.yaml says "
        "now: all images are drawn anew, and the 100 rows of other drawings stay" in said
    )
    assert {row["path"]: row["split"] for row in empty.rows("artifacts/split/split.csv")} != before
    assert Counter(row["drawn_by"] for row in empty.rows("splits.csv")) == {
        "seed=0 validation=0.2 test=0.2": 100,
        "seed=1 validation=0.2 test=0.2": 100,
    }
    assert "drawn anew" not in empty.call(*SPLIT).stderr
    # An image of that time moves none where the seed is set back.
    run(empty, [*rows, *entries(3, start=190)])
    empty.configure("split", seed=0)
    assert run(empty, rows) == before


@pytest.mark.fault("D24", "D25")
def test_a_group_stays_in_one_split() -> None:
    twice = [entry for entry in entries(200) for _ in range(2)]
    result = splits(twice)
    assert result[::2] == result[1::2]


def test_another_seed_draws_other_splits() -> None:
    rows = entries(200)
    assert splits(rows, seed=0) != splits(rows, seed=1)


def test_given_splits_are_kept_and_completed() -> None:
    rows = entries(100, "train") + entries(50, "test", start=100)
    result = splits(rows)
    assert set(result[:100]) == {"train", "validation"}
    assert set(result[100:]) == {"test"}
    rows += entries(50, "validation", start=150)
    assert Counter(splits(rows)) == {"train": 100, "test": 50, "validation": 50}


@pytest.mark.fault("D24", "D25", "D31")
def test_given_splits_that_share_images_are_errors_or_mended() -> None:
    train, test = entries(60, "train"), entries(40, "test", start=60)
    copies = [row._replace(path=f"copy/{i}", split="train") for i, row in enumerate(test[:3])]
    with pytest.raises(
        DataError,
        match=r"3 images stand in two of the given splits.*copy/0 is in train, a/60 in test;",
    ):
        splits(train + test + copies)
    result = assign(train + test + copies, Params(leaks="drop"))
    assert result.splits[-3:] == ["unused"] * 3
    assert result.leaks == 3
    assert set(result.splits[60:100]) == {"test"}


def test_a_small_class_stands_in_every_split() -> None:
    for start in range(0, 300, 3):
        rows = entries(100) + entries(3, labels="c", start=1000 + start)
        assert set(splits(rows)[100:]) == {"train", "validation", "test"}


@pytest.mark.fault("D21")
def test_a_class_that_cannot_is_an_error_or_only_trains() -> None:
    row = entries(1, labels="c", start=1000)
    message = (
        r"class 'c' has 3 images, 1 of them distinct, and none for .*split.small_classes: train"
    )
    with pytest.raises(DataError, match=message):
        splits(entries(100) + row * 3)
    several = [row[0]._replace(label=label, path=label) for label in "cde"]
    with pytest.raises(DataError, match=r"class 'c' has 1 images.* 2 more lack one: d, e\."):
        splits(entries(100) + several)
    assert splits(entries(100) + row * 3, small_classes="train")[100:] == ["train"] * 3
    two = entries(2, labels="c", start=1000)
    assert splits(entries(100) + two, small_classes="train")[100:] == ["train"] * 2


@pytest.mark.fault("D21")
def test_photos_of_many_small_classes_each_train_somewhere() -> None:
    rows = []
    for photo in range(40):
        for label in (f"rare {photo // 2}", "common"):
            row = entries(1, start=photo)[0]
            rows.append(row._replace(label=label, box=label, path=f"{photo}#{label}"))
    result = splits(rows, small_classes="train")
    assert {row.label for row, split in zip(rows, result, strict=True) if split == "train"} == {
        row.label for row in rows
    }
    assert set(result) == {"train", "validation", "test"}
    place = dict(zip((row.group for row in rows), result, strict=True))
    assert [place[row.group] for row in rows] == result


def test_folds_test_every_image_once_and_are_even() -> None:
    rows = entries(97, labels="aab")
    tested: Counter[str] = Counter()
    validated: Counter[str] = Counter()
    for fold in range(5):
        result = assign(rows, Params(folds=5, fold=fold))
        counts = Counter(zip((r.label for r in rows), result.splits, strict=True))
        assert 12 <= counts["a", "test"] <= 14
        assert 6 <= counts["b", "test"] <= 7
        for row, split in zip(rows, result.splits, strict=True):
            tested[row.path] += split == "test"
            validated[row.path] += split == "validation"
    assert set(tested.values()) == set(validated.values()) == {1}
    assert {row.path for row in rows} == set(tested)


def test_folds_are_even_over_classes_together() -> None:
    """Each class has one image more than four folds share out: not always the same fold gets it."""
    rows = entries(40, labels="abcdefgh")
    result = assign(rows, Params(folds=4))
    assert Counter(result.folds) == {"0": 10, "1": 10, "2": 10, "3": 10}
    old = {row.sha256: fold for row, fold in zip(rows, result.folds, strict=True)}
    more = entries(80, labels="abcdefgh")
    grown = assign(more, Params(folds=4), old)
    assert grown.folds[:40] == result.folds
    assert Counter(grown.folds) == {"0": 20, "1": 20, "2": 20, "3": 20}


def test_what_is_left_out_is_said(empty: Workspace) -> None:
    train, test = entries(60, "train"), entries(40, "test", start=60)
    copies = [row._replace(path=f"copy/{i}", split="train") for i, row in enumerate(test[:3])]
    empty.replace("params.yaml", "leaks: error", "leaks: drop")
    for rows, said in ((train + test, False), (train + test + copies, True)):
        save_manifest(empty.path / MANIFEST, sorted(rows, key=lambda row: row.path))
        printed = empty.call(*SPLIT).stderr
        assert ("3 images left unused: their like stands in a held-out split" in printed) is said
        assert ("images left unused" in printed) is said


def test_folds_keep_groups_whole_and_old_images_in_place(empty: Workspace) -> None:
    empty.replace("params.yaml", "test: 0.2\n", "test: 0.2\n  folds: 4\n")
    rows = [row._replace(group=f"{i // 2:016x}") for i, row in enumerate(entries(80))]
    save_manifest(empty.path / MANIFEST, rows)
    empty.call(*SPLIT)
    before = {row["path"]: row["fold"] for row in empty.rows("artifacts/split/split.csv")}
    assert set(before.values()) == {"0", "1", "2", "3"}
    assert all(before[rows[i].path] == before[rows[i + 1].path] for i in range(0, 80, 2))
    run(empty, rows + entries(40, start=500))
    after = {row["path"]: row["fold"] for row in empty.rows("artifacts/split/split.csv")}
    assert {path: after[path] for path in before} == before


def test_folds_that_make_no_sense_are_errors(empty: Workspace) -> None:
    with pytest.raises(DataError, match=r"split.folds is 5, but the source gives splits"):
        splits(entries(50, "train") + entries(50, "test", start=50), folds=5)
    save_manifest(empty.path / MANIFEST, entries(50))
    empty.replace("params.yaml", "test: 0.2\n", "test: 0.2\n  folds: 4\n  fold: 4\n")
    error = empty.call(*SPLIT, code=ParamsError.exit_code).stderr
    assert "fold must be below split.folds; 4 is not" in error


@pytest.mark.slow
def test_leaks_between_given_folders_are_found(
    workspace: Workspace, shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    """A training photo, smaller and mirrored, planted into the held-out folder."""
    source = tmp_path / "insects"
    for split in ("train", "val"):
        for label in ("ants", "bees"):
            target = source / split / label
            target.mkdir(parents=True)
            found = sorted((shared_data("hymenoptera") / split / label).glob("*.jpg"))[:20]
            for path in found:
                (target / path.name).write_bytes(path.read_bytes())
    original = sorted((source / "train" / "ants").iterdir())[4]
    with Image.open(original) as image:
        small = image.resize((image.width // 2, image.height // 2))
        small.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(source / "val/ants/planted.jpg")
    workspace.set_source(source)
    workspace.call("ingest")
    error = workspace.call("split", code=4).stderr
    assert "1 images stand in two of the given splits, equal or nearly so: " in error
    assert f"train/ants/{original.name} is in train, val/ants/planted.jpg in test" in error
    workspace.replace("params.yaml", "leaks: error", "leaks: drop")
    workspace.call("split")
    rows = {row["path"]: row["split"] for row in workspace.rows("artifacts/split/split.csv")}
    assert rows[f"train/ants/{original.name}"] == "unused"
    assert rows["val/ants/planted.jpg"] == "test"
    workspace.reproduce("train")


def test_the_images_themselves_say_where_they_are(empty: Workspace) -> None:
    """Names of groups change when images join them; nothing but splits.csv is asked."""
    old = entries(40)
    before = run(empty, old)
    for name in ("split.csv", "report.json"):
        (empty.path / "artifacts/split" / name).unlink()
    renamed = [row._replace(group=f"renamed {row.group}") for row in old]
    after = run(empty, [*renamed, *entries(20, start=40)])
    assert {path: after[path] for path in before} == before
    for name in ("splits.csv", "artifacts/split/split.csv"):
        (empty.path / name).unlink()
    assert run(empty, renamed) != before


def test_rows_of_images_that_are_gone_stay_and_move_nothing(empty: Workspace) -> None:
    rows = [row._replace(box="1 2 30 40" if i % 3 else "") for i, row in enumerate(entries(200))]
    before = run(empty, rows)
    table = (empty.path / "splits.csv").read_bytes()
    some = run(empty, rows[:50])
    assert some == {row.path: before[row.path] for row in rows[:50]}
    assert (empty.path / "splits.csv").read_bytes() == table
    assert run(empty, rows) == before
    assert (empty.path / "splits.csv").read_bytes() == table


SHA = "ab" * 32
KNOWN = "seed=0 validation=0.2 test=0.2"


@pytest.mark.fault("L01")
@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("<<<<<<< HEAD", "'<<<<<<< HEAD'"),
        (f"{SHA},unused,{KNOWN}", "unused"),
        (f"{SHA},3,{KNOWN}", ",3,"),
        (f"{SHA},4,seed=0 folds=4", ",4,"),
        (f"{SHA},train,seed=0 folds=4", "folds=4"),
        (f"{SHA[:-1]},train,{KNOWN}", "abab"),
        (f"{SHA},train", "train'"),
    ],
)
def test_a_line_that_cannot_be_read_moves_no_image(empty: Workspace, line: str, found: str) -> None:
    run(empty, entries(40))
    placements, split = empty.path / "splits.csv", empty.path / "artifacts/split/split.csv"
    placements.write_text(placements.read_text() + line + "\n")
    content, table = placements.read_text(), split.read_bytes()
    save_manifest(empty.path / MANIFEST, sorted(entries(60), key=lambda row: row.path))
    said = empty.call(*SPLIT, code=6).stderr
    assert re.search(rf"line 42 of splits.csv is .*{re.escape(found)}.*; expected sha256,", said)
    assert "keep the rows of both sides" in said
    assert said.count("\n") == 1
    assert placements.read_text() == content
    assert split.read_bytes() == table


def merged(empty: Workspace, ours: list[Entry], theirs: list[Entry]) -> None:
    """Split one set in each of two branches, from the set on main, and merge them with Git."""
    commit = ("git", "-c", "user.name=t", "-c", "user.email=t@example.invalid")
    empty.run("git", "init", "-q", "-b", "main")
    (empty.path / ".gitattributes").write_text((ROOT / ".gitattributes").read_text())
    empty.run("git", "add", ".gitattributes", *(["splits.csv"] if ours and theirs else []))
    empty.run(*commit, "commit", "-qm", "main")
    for branch, rows in (("ours", ours), ("theirs", theirs)):
        empty.run("git", "checkout", "-q", "-b", branch, "main")
        shutil.rmtree(
            empty.path / "artifacts/split", ignore_errors=True
        )  # each in a clone of its own
        run(empty, rows)
        empty.run("git", "add", "splits.csv")
        empty.run(*commit, "commit", "-qm", branch)
    empty.run("git", "checkout", "-q", "ours")
    empty.run(*commit, "merge", "-q", "theirs", "-m", "both")
    shutil.rmtree(empty.path / "artifacts/split")


@pytest.mark.fault("L01")
def test_two_branches_that_added_images_are_merged_by_lines(empty: Workspace) -> None:
    run(empty, entries(40))
    first, second = entries(30, start=100), entries(30, start=200, labels="bc")
    merged(empty, entries(40) + first, entries(40) + second)
    before = (empty.path / "splits.csv").read_text()
    everything = run(empty, entries(40) + first + second)
    after = (empty.path / "splits.csv").read_text()
    assert set(before.splitlines()) == set(after.splitlines())  # Git may take a line twice
    assert len(after.splitlines()) == 1 + len(everything)


@pytest.mark.fault("L01")
def test_an_image_that_two_branches_placed_differently_is_an_error(empty: Workspace) -> None:
    old = entries(40)
    before = run(empty, old)
    a = next(row for row in old if before[row.path] == "train")
    b = next(row for row in old if before[row.path] == "test" and row.label == a.label)
    new = [row._replace(path=f"{a.label}/new", sha256=SHA) for row in (a, b)]
    # In one branch the new image is like an image that trains, in the other like one that tests.
    merged(empty, [*old, new[0]], [*old, new[1]])
    content = (empty.path / "splits.csv").read_text()
    save_manifest(empty.path / MANIFEST, sorted([*old, new[0]], key=lambda row: row.path))
    said = empty.call(*SPLIT, code=6).stderr
    assert re.search(
        rf"splits.csv has 1 images in two splits, the first is {SHA} in (train|test) \(line \d+\) "
        r"and in (train|test) \(line \d+\); expected one row of each: .*Delete one row of each",
        said,
    )
    (empty.path / "splits.csv").write_text(content.replace(f"{SHA},test,{KNOWN}\n", ""))
    assert run(empty, [*old, new[0]])[new[0].path] == "train"


@pytest.mark.fault("L07")
@pytest.mark.parametrize("folds", [None, 5])
def test_rows_that_were_lost_move_no_image(empty: Workspace, folds: int | None) -> None:
    """The file was cut off at the end of a line, which leaves nothing to stumble over."""
    drawn = KNOWN
    if folds:
        empty.configure("split", folds=folds)
        drawn = f"seed=0 folds={folds}"
    rows = entries(70)
    drawn_now = assign(rows, Params(folds=folds))
    given = drawn_now.folds if folds else drawn_now.splits
    # As if each had joined a group: none stands where its hash alone would place it.
    old = {r.sha256: p for r, p in zip(rows[::-1], given, strict=True)}
    manifest.save_placements(empty.path / "splits.csv", manifest.Placements(drawn, old))
    before = run(empty, rows)
    whole = (empty.path / "splits.csv").read_text()
    table = (empty.path / "artifacts/split/split.csv").read_bytes()
    header, *lines = whole.splitlines(keepends=True)
    (empty.path / "splits.csv").write_text(header + "".join(lines[-25:]))
    said = empty.call(*SPLIT, code=6).stderr
    assert re.search(
        r"splits.csv has no row of 45 images that artifacts/split/split.csv has placed, and \d+ "
        r"of them would move, the first is ./\d+ from \w+ to \w+; expected the rows of all.*"
        r"'git checkout -- splits.csv'.*on purpose, or after a change of branches, delete "
        r"artifacts/split/",
        said,
    )
    assert len((empty.path / "splits.csv").read_text().splitlines()) == 26
    assert (empty.path / "artifacts/split/split.csv").read_bytes() == table
    (empty.path / "splits.csv").write_text(whole)
    assert run(empty, rows) == before
    (empty.path / "splits.csv").unlink()
    empty.call(*SPLIT, code=6)
    (empty.path / "artifacts/split/split.csv").unlink()
    assert run(empty, rows) != before
    # Rows of images that are gone move none, nor do those of another drawing.
    run(empty, rows[:50])
    empty.configure("split", seed=1)
    run(empty, rows)


@pytest.mark.fault("L01")
@pytest.mark.parametrize(
    ("changed", "found"),
    [
        (lambda text: "\ufeff" + text, "line 1 of splits.csv begins with a byte order mark"),
        (lambda text: text.replace(",", ";"), "line 1 of splits.csv has semicolons for commas"),
        (
            lambda text: re.sub("([^,\n]+)", r'"\1"', text),
            "line 1 of splits.csv has quotes around its values",
        ),
        (lambda text: text.replace(",", "\t"), "line 1 of splits.csv has tabs for commas"),
    ],
)
def test_what_a_spreadsheet_made_of_the_file_is_named(
    empty: Workspace, changed: Callable[[str], str], found: str
) -> None:
    run(empty, entries(40))
    path = empty.path / "splits.csv"
    path.write_text(changed(path.read_text()), encoding="utf-8")
    said = empty.call(*SPLIT, code=6).stderr
    assert f"{found}, as a spreadsheet saves it: '" in said
    assert "Save it as plain UTF-8 with commas and without quotes, or take" in said


@pytest.mark.fault("D21")
def test_a_class_that_rows_keep_out_of_a_split_is_told_why(empty: Workspace) -> None:
    rows = entries(60)
    before = run(empty, rows)
    left = [row for row in rows if (row.label, before[row.path]) != ("b", "test")]
    save_manifest(empty.path / MANIFEST, sorted(left, key=lambda row: row.path))
    said = empty.call(*SPLIT, code=4).stderr
    count = sum(row.label == "b" for row in left)
    counts = Counter(before[row.path] for row in left if row.label == "b")
    assert f"the class 'b' has {count} images, {count} of them distinct, and none for test" in said
    assert (
        f"splits.csv places {count} of them (train {counts['train']}, validation "
        f"{counts['validation']}), where they stay. Add images that it does not know; or draw "
        f"all anew by another split.seed; or draw these anew: delete their rows there, and "
        f"the split table of the last run" in said
    )
    # Each of these helps.
    run(empty, left + entries(2, labels="b", start=900))
    empty.configure("split", seed=1)
    run(empty, left)
    empty.configure("split", seed=0)
    path, theirs = empty.path / "splits.csv", {row.sha256 for row in left if row.label == "b"}
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if line[:64] not in theirs))
    (empty.path / "artifacts/split/split.csv").unlink()
    run(empty, left)


def test_a_folder_that_cannot_be_written_is_one_line_and_found_by_check(empty: Workspace) -> None:
    save_manifest(empty.path / MANIFEST, sorted(entries(40), key=lambda row: row.path))
    unprivileged: tuple[str, ...] = ()
    if os.geteuid() == 0:  # root may write everywhere, unless it gives that up
        dropped = "-dac_override"
        unprivileged = ("setpriv", f"--bounding-set={dropped}", f"--inh-caps={dropped}")
    for folder, command in ((".", SPLIT), (".", ("check",)), ("artifacts", ("check",))):
        (empty.path / folder).mkdir(exist_ok=True)
        (empty.path / folder).chmod(0o500)
        said = empty.run(*unprivileged, "tlpipe", *command, code=6).stderr
        (empty.path / folder).chmod(0o700)
        *_, line = said.splitlines()
        assert line.startswith("tlpipe: ")
        assert "Permission denied; expected a folder that may be read and written" in line
        assert "Traceback" not in said


@pytest.mark.fault("L01")
def test_splits_that_the_source_gives_now_go_before_rows(empty: Workspace) -> None:
    """An image that was moved from test to train trains; a new val/ takes none from train."""
    rows = [*entries(60, "train"), *entries(20, "test", start=60)]
    before = run(empty, rows)
    assert "validation" in before.values()
    moved = rows[-1]._replace(split="train")
    later = [*rows[:-1], moved, *entries(20, "validation", start=100)]
    after = run(empty, later)
    assert all(after[row.path] == row.split for row in later)


@pytest.mark.fault("L01")
def test_boxes_with_another_margin_stay_with_their_photos(empty: Workspace) -> None:
    rows = entries(60)
    before = run(empty, rows)
    after = run(
        empty, [row._replace(box="0 0 9 9", group=f"{n:016x}") for n, row in enumerate(rows)]
    )
    assert after == before


def test_a_set_of_other_bytes_is_said_to_be_drawn_anew(empty: Workspace) -> None:
    rows = entries(60)
    run(empty, rows)
    other = [row._replace(sha256=row.sha256[::-1]) for row in rows]
    save_manifest(empty.path / MANIFEST, sorted(other, key=lambda row: row.path))
    said = empty.call(*SPLIT).stderr
    assert "splits.csv places 60 images, of which 0 are in the source; the other 60 of it" in said


def test_a_file_gives_a_table_or_does_not(tmp_path: Path) -> None:
    rows = entries(30)
    result = assign(rows, Params())
    table, path = assigned(rows, result), tmp_path / "splits.csv"
    places = manifest.of_table(table)
    manifest.save_placements(path, manifest.Placements(KNOWN, places))
    assert manifest.gives(path, KNOWN, table)
    assert manifest.gives(path, KNOWN, table[:-1])  # more rows than images do no harm
    assert not manifest.gives(path, "seed=1 validation=0.2 test=0.2", table)
    manifest.save_placements(path, manifest.Placements(KNOWN, dict(list(places.items())[1:])))
    assert not manifest.gives(path, KNOWN, table)


@pytest.mark.parametrize("folds", [None, 4])
def test_a_table_gives_itself(folds: int | None) -> None:
    """So a run's own split table is enough for what splits.csv is: whatever stood there before.

    Groups of up to six images, boxes, splits that the source gives, and images that join others.
    """
    for seed in range(30):
        random = np.random.default_rng(seed)
        rows = entries(150, labels="aaabbc")
        groups = random.integers(0, 60, len(rows))
        rows = [row._replace(group=f"{g:016x}") for row, g in zip(rows, groups, strict=True)]
        if folds is None and seed % 2:
            given = random.choice(["", "", "train", "test"], len(rows))
            rows = [row._replace(split=str(g)) for row, g in zip(rows, given, strict=True)]
        leaks: Literal["error", "drop"] = "error" if folds else "drop"
        params = Params(folds=folds, leaks=leaks, small_classes="train", seed=seed)
        alone = {row.path: row._replace(group=row.sha256[:16]) for row in rows[:100]}
        earlier = assign(list(alone.values()), params)
        table = assigned(list(alone.values()), earlier)
        grown = assign(rows, params, manifest.of_table(table))
        again = assign(rows, params, manifest.of_table(assigned(rows, grown)))
        assert (again.splits, again.folds) == (grown.splits, grown.folds)


def assigned(rows: list[Entry], result: Result) -> list[Assignment]:
    return [
        Assignment(e.path, e.label, split, fold, e.group, e.sha256, e.box)
        for e, split, fold in zip(rows, result.splits, result.folds, strict=True)
    ]


def shares(empty: Workspace) -> dict[str, dict[str, Any]]:
    found: dict[str, Any] = json.loads((empty.path / "artifacts/split/report.json").read_text())[
        "shares"
    ]
    return found


@pytest.mark.fault("L02")
def test_large_groups_that_move_a_share_are_said(empty: Workspace) -> None:
    rows = [row._replace(group=f"{i // 40:016x}") for i, row in enumerate(entries(800))]
    save_manifest(empty.path / MANIFEST, sorted(rows, key=lambda row: row.path))
    said = empty.call(*SPLIT).stderr
    counts = Counter(row["split"] for row in empty.rows("artifacts/split/split.csv"))
    for name in ("test", "validation"):
        share = counts[name] / 800
        found = shares(empty)[name]
        assert (found["asked"], found["realised"]) == (0.2, share)
        is_off = abs(share - 0.2) > 0.05
        line = (
            f"{name} has {share:.1%} of the images instead of 20.0%: groups stay whole, and the "
            f"largest has 40 images"
        )
        assert (line in said) is is_off
        assert (found["reason"] is not None) is is_off
    assert "instead of" in said  # one of the two at least, by these groups' names


@pytest.mark.fault("L02")
def test_images_placed_earlier_that_move_a_share_are_said(empty: Workspace) -> None:
    """Each that tests gets five near copies, which go where it is."""
    old = entries(100)
    before = run(empty, old)
    tested = [row for row in old if before[row.path] == "test"]
    new = [
        row._replace(path=f"{row.path}-{i}", sha256=f"{i}{row.sha256[1:]}")
        for row in tested
        for i in range(5)
    ]
    everything = sorted([*old, *new], key=lambda row: row.path)
    everything = [row._replace(group=f"like {row.group}") for row in everything]
    save_manifest(empty.path / MANIFEST, everything)
    said = empty.call(*SPLIT).stderr
    share = 6 * len(tested) / len(everything)
    reason = "images that were placed earlier stay where they are"
    found = shares(empty)["test"]
    assert (found["asked"], found["realised"], found["reason"]) == (0.2, share, reason)
    assert f"test has {share:.1%} of the images instead of 20.0%: {reason}" in said


@pytest.mark.fault("L02")
def test_small_classes_that_move_a_share_are_said(empty: Workspace) -> None:
    labels = [chr(ord("a") + i) + chr(ord("a") + j) for i in range(20) for j in range(10)]
    rows = [
        row._replace(label=labels[i // 3], path=f"{labels[i // 3]}/{i}")
        for i, row in enumerate(entries(600))
    ]
    run(empty, rows)
    reason = "classes of few images stand in every split, whatever the share"
    assert shares(empty)["test"] == {
        "asked": 0.2,
        "realised": 1 / 3,
        "reason": reason,
        "uneven_classes": 0,
        "classes": [],  # one of three images is as near as can be
    }


@pytest.mark.fault("L02")
def test_small_sets_are_no_lottery() -> None:
    """By hashes alone a fourth of these draws would be off by over a quarter of a share."""
    for seed in range(150):
        rows = entries(60, labels="ab" if seed % 2 else "aabc")
        result = assign(rows, Params(seed=seed))
        for share in _shares(rows, result, Params(seed=seed)).values():
            assert share["realised"] == pytest.approx(0.2, abs=0.0501)
            assert share["reason"] is None
        for label, images in Counter(row.label for row in rows).items():
            for split in ("validation", "test"):
                pairs = zip(rows, result.splits, strict=True)
                count = sum((row.label, s) == (label, split) for row, s in pairs)
                assert abs(count - 0.2 * images) <= max(0.1 * images, 1)


@pytest.mark.fault("L02")
def test_a_class_is_not_evened_out_at_the_cost_of_the_whole() -> None:
    for seed in range(300):
        rows = entries(120, labels="aaaaabbbbc")
        if abs([by_hash(row, seed) for row in rows].count("test") - 24) > 6:
            continue
        found = assign(rows, Params(seed=seed)).splits
        assert abs(found.count("test") - 24) <= 6, seed


@pytest.mark.fault("L01", "L02")
def test_a_set_drawn_evenly_keeps_its_rows_as_it_grows(empty: Workspace) -> None:
    """A seed whose hashes alone hold out too little: the table is what commit and data say."""
    empty.configure("split", seed=4)
    old, drawn = entries(60), "seed=4 validation=0.2 test=0.2"
    before = run(empty, old)
    assert list(before.values()) != [by_hash(row, seed=4) for row in sorted(old, key=by_path)]
    committed = (empty.path / "splits.csv").read_text()
    everything = sorted(old + entries(80, start=100, labels="abc"), key=by_path)
    after = run(empty, everything)
    assert {path: after[path] for path in before} == before
    shutil.rmtree(empty.path / "artifacts/split")
    (empty.path / "splits.csv").write_text(committed)  # what a fresh clone has
    assert run(empty, everything) == after
    table = load_split(empty.path / "artifacts/split/split.csv")
    again = assign(everything, Params(seed=4), manifest.of_table(table))
    assert again.splits == [row.split for row in table]
    assert manifest.gives(empty.path / "splits.csv", drawn, table)


def by_path(row: Entry) -> str:
    return row.path


def by_hash(row: Entry, seed: int) -> str:
    position = uniform(seed, row.group)
    return "test" if position < 0.2 else "validation" if position < 0.4 else "train"


def test_a_large_set_is_drawn_by_hashes_alone() -> None:
    """So an image that is added goes where it goes in every set."""
    rows = entries(2000)
    assert splits(rows) == [by_hash(row, seed=0) for row in rows]


@pytest.mark.fault("L02")
def test_classes_held_out_unevenly_are_said(empty: Workspace) -> None:
    """Seven classes in few large groups each: no draw can even them out; the worst are named."""
    rows = entries(700, labels="abcdefg")
    rows = [row._replace(group=f"{row.label}{i // 140}") for i, row in enumerate(rows)]
    save_manifest(empty.path / MANIFEST, sorted(rows, key=by_path))
    said = empty.call(*SPLIT).stderr
    table = empty.rows("artifacts/split/split.csv")
    found = shares(empty)["test"]
    count = Counter(row["label"] for row in table if row["split"] == "test")
    off = [label for label in "abcdefg" if abs(count[label] - 20) > 5]
    assert found["uneven_classes"] == len(off) == len(found["classes"])
    assert {c["label"] for c in found["classes"]} == set(off)
    lines = [line for line in said.splitlines() if "classes: it holds" in line]
    for name, line in zip(("test", "validation"), lines, strict=False):
        worst = shares(empty)[name]["classes"]
        start = f"{name} is off by over a quarter of 20.0% in {len(worst)} of 7 classes: it holds "
        assert line.startswith(start)
        assert all(f"{c['label']} {c['held_out']} of {c['images']}" in line for c in worst[:5])
        assert line.count(" of 100") <= 5


def table(**classes: int) -> list[Assignment]:
    rows = [
        Assignment(path, label, "train", "", "", hashlib.sha256(path.encode()).hexdigest(), "")
        for label, count in classes.items()
        for path in (f"{label}/{number}.png" for number in range(count))
    ]
    return rows + [row._replace(split=part) for part in HELD_OUT for row in rows[:3]]


def trains(rows: list[Assignment]) -> set[str]:
    return {row.path for row in rows if row.split == "train"}


def test_fewer_training_images_are_part_of_more_and_classes_keep_their_shares() -> None:
    whole = table(a=100, b=50, c=2)
    before: set[str] = set()
    for count in range(3, 153):
        rows = limited(whole, count, seed=1)
        found = trains(rows)
        assert (len(found), len(found - before)) == (count, 1 if before else 3)
        assert before <= found
        before = found
        shares = Counter(path[0] for path in found)
        assert shares["c"] >= 1
        assert abs(shares["a"] - 2 * shares["b"]) <= 3
        # All else is as it was; what is left out is unused.
        for row, other in zip(whole, rows, strict=True):
            assert row._replace(split="") == other._replace(split="")
            assert other.split in ({"train", UNUSED} if row.split == "train" else {row.split})


def test_another_seed_picks_other_images_and_the_order_of_rows_none() -> None:
    whole = table(a=40, b=40)
    assert trains(limited(whole, 20, seed=0)) != trains(limited(whole, 20, seed=1))
    assert trains(limited(whole[::-1], 20, seed=0)) == trains(limited(whole, 20, seed=0))


def test_fewer_images_than_classes_are_an_error() -> None:
    with pytest.raises(
        ParamsError, match=r"split\.images is 2; 3 classes train, and each needs an"
    ):
        limited(table(a=4, b=4, c=4), 2, seed=0)


def test_a_seed_of_images_without_a_number_of_them_has_no_effect() -> None:
    with pytest.raises(
        ParamsError, match=r"images_seed: 3 has no effect: split\.images is not set"
    ):
        Params(images_seed=3)
