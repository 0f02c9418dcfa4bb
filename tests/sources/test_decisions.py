"""The table of decisions: read, refused, written, merged, and what it does to a source."""

import hashlib
import subprocess
from pathlib import Path

import pytest

from tlpipe.errors import ArtifactError, DataError
from tlpipe.sources import decisions
from tlpipe.sources.decisions import Applied, Decision, Decisions

HEADER = "sha256,part,path,was,label,by,at"
AT = "2026-11-29T02:05:00Z"
CAT, DOG = "a" * 64, "b" * 64


def decision(sha256: str, was: str, label: str, by: str = "ann", path: str = "x.png") -> Decision:
    return Decision(sha256, "", path, was, label, by, AT)


def applied(*rows: Decision) -> Applied:
    return Applied(Decisions(Path("labels.csv"), rows, tuple(range(2, 2 + len(rows)))))


def test_what_is_saved_is_loaded_one_row_a_line_and_sorted(tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    odd = decision(DOG, "dog, big", 'the "cat"', path=decisions.written("a\nb,\udcff.png"))
    rows = [odd, decision(CAT, "cat", ""), decision("0" * 64, "cat", "cat")]
    decisions.save(table, rows)
    lines = table.read_text().splitlines()
    assert lines[0] == HEADER
    assert lines[1:] == sorted(lines[1:]) and len(lines) == 4
    assert set(decisions.load(table).rows) == {*rows}
    assert [row.what for row in decisions.load(table).rows] == ["keep cat", "drop", 'the "cat"']
    before = table.read_bytes()
    decisions.save(table, reversed(decisions.load(table).rows))
    assert table.read_bytes() == before


def test_a_byte_order_mark_of_a_spreadsheet_is_read(tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    decisions.save(table, [decision(CAT, "cat", "dog")])
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes().replace(b"\n", b"\r\n"))
    assert decisions.load(table).rows == (decision(CAT, "cat", "dog"),)


def test_a_missing_table_decides_nothing(tmp_path: Path) -> None:
    assert decisions.load(tmp_path / "labels.csv").rows == ()


@pytest.mark.parametrize(
    "line",
    [
        "<<<<<<< HEAD",
        f"{CAT};;x.png;cat;dog;ann;{AT}",
        f"{CAT[:-1]},,x.png,cat,dog,ann,{AT}",
        f"{CAT},1 2 3,x.png,cat,dog,ann,{AT}",
        f"{CAT},,,cat,dog,ann,{AT}",
        f'{CAT},,"x.png,cat,dog,ann,{AT}',
        f"{CAT},,x.png,cat,dog,ann",
    ],
)
@pytest.mark.fault("D76")
def test_a_line_that_is_no_decision_is_named(tmp_path: Path, line: str) -> None:
    table = tmp_path / "labels.csv"
    table.write_text(f"{HEADER}\n{line}\n")
    with pytest.raises(ArtifactError, match=r"line 2 of .*labels.csv is .*expected sha256,part"):
        decisions.load(table)


@pytest.mark.fault("D75")
def test_two_people_who_decide_differently_are_both_named(tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    decisions.save(table, [decision(CAT, "cat", "dog"), decision(CAT, "cat", "", by="bob")])
    with pytest.raises(
        ArtifactError,
        match=r"on 1 image, the first is 'x.png': drop \(line 2, by bob\) and dog \(line 3, by "
        r"ann\); expected one decision on each.*delete one of both rows",
    ):
        decisions.load(table)


def test_two_people_who_decide_alike_agree(tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    decisions.save(table, [decision(CAT, "cat", "dog"), decision(CAT, "cat", "dog", by="bob")])
    assert len(decisions.load(table).rows) == 2


def test_branches_merge_by_the_union_of_lines(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        who = ("-c", "user.name=t", "-c", "user.email=t@example.invalid")
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    table = tmp_path / "labels.csv"
    git("init", "-q", "-b", "main")
    (tmp_path / ".gitattributes").write_text("labels.csv merge=union\n")
    digests = [hashlib.sha256(bytes([n])).hexdigest() for n in range(6)]
    decisions.save(table, [])
    git("add", ".")
    git("commit", "-qm", "empty")
    for branch, mine in (("ann", digests[:4]), ("bob", digests[3:])):
        git("checkout", "-q", "-b", branch, "main")
        decisions.save(table, [decision(d, "cat", "dog", by=branch) for d in mine])
        git("commit", "-qam", branch)
    git("merge", "-q", "ann")
    found = decisions.load(table)
    assert {row.sha256 for row in found.rows} == {*digests}
    assert len(found.rows) == 7  # both have decided on one, and alike


def test_a_decision_is_applied_to_the_label_that_it_was_made_on() -> None:
    table = applied(decision(CAT, "cat", "dog"), decision(DOG, "dog", ""))
    found = table.decide("x.png", CAT, "", "cat")
    assert found is not None and found.label == "dog"
    found = table.decide("y.png", DOG, "", "dog")
    assert found is not None and found.label == ""
    assert table.counts == {"corrected": 1, "dropped": 1}
    assert table.taken == {"cat": 1, "dog": 1}
    assert table.warnings() == []


@pytest.mark.fault("D77")
def test_a_decision_on_another_label_than_the_source_gives_is_reported() -> None:
    table = applied(decision(CAT, "cat", "dog"))
    assert table.decide("x.png", CAT, "", "fox") is None
    assert table.warnings() == [
        "1 decisions of labels.csv are not applied, since the source gives another label now: "
        "'x.png' was 'cat' when dog (line 2, by ann) was decided, and is 'fox' now. Delete the "
        "row, or decide again"
    ]


def test_a_source_that_was_corrected_alike_is_no_case_for_a_report() -> None:
    table = applied(decision(CAT, "cat", "dog"))
    assert table.decide("x.png", CAT, "", "dog") is None
    assert table.warnings() == []


@pytest.mark.fault("D78")
def test_a_decision_on_an_image_that_is_gone_is_said() -> None:
    (said,) = applied(decision(CAT, "cat", "dog")).warnings()
    assert said.startswith(
        "1 decisions of labels.csv are on images that are not there: 'x.png': dog (line 2, by ann)."
    )


@pytest.mark.fault("D79")
def test_an_unknown_class_is_an_error_that_names_the_known_ones() -> None:
    table = Decisions(Path("labels.csv"), (decision(CAT, "cat", "dgo"),), (2,))
    with pytest.raises(
        DataError, match=r"line 2 of labels.csv gives 'x.png' the class 'dgo'.*are cat, dog"
    ):
        table.check_classes(["cat", "dog"])


def test_unlabelled_images_may_bring_a_class() -> None:
    rows = (decision(CAT, "", "fox"), decision(DOG, "dog", "fox"))
    Decisions(Path("labels.csv"), rows, (2, 3)).check_classes(["cat", "dog"])
