import os
from pathlib import Path

import pytest

from tlpipe import files
from tlpipe.errors import ArtifactError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    files.write_json(target, {"old": 1})
    with pytest.raises(ValueError, match="disk"), files.replacing(target) as temporary:
        temporary.write_text("half")
        raise ValueError("disk full")
    assert files.read_json(target) == {"old": 1}
    assert names(tmp_path) == ["report.json"]


def test_a_failed_folder_keeps_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with files.replacing_folder(target) as folder:
        (folder / "a").write_text("old")
    with pytest.raises(ValueError, match="disk"), files.replacing_folder(target) as folder:
        (folder / "a").write_text("new")
        raise ValueError("disk full")
    assert (target / "a").read_text() == "old"
    with files.replacing_folder(target) as folder:
        (folder / "b").write_text("new")
    assert names(target) == ["b"]
    assert names(tmp_path) == ["bundle"]


def test_equal_content_gives_equal_bytes() -> None:
    assert files.json_bytes({"b": 1, "a": "é"}) == files.json_bytes({"a": "é", "b": 1})
    with pytest.raises(ValueError, match="Out of range"):
        files.json_bytes({"a": float("nan")})


@pytest.mark.fault("D18")
def test_any_file_name_survives_a_table(tmp_path: Path) -> None:
    names = ["a b", 'quo"te', "new\nline", "return\rhere", "comma,", "🙂", "x" * 250]
    names.append(os.fsdecode(b"\xff\xfe"))
    table = tmp_path / "t.csv"
    files.write_csv(table, ("path", "n"), [(name, 1) for name in names])
    assert [name for name, _ in files.read_csv(table, ("path", "n"))] == names


def test_what_is_missing_or_of_another_kind_is_said(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"none.json is missing.*Run 'dvc repro'"):
        files.read_json(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"a": ')
    with pytest.raises(ArtifactError, match=r"half.json cannot be read as JSON"):
        files.read_json(tmp_path / "half.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ArtifactError, match=r"holds a list; expected a JSON object"):
        files.read_json(tmp_path / "list.json")
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ArtifactError, match=r"has the columns \['a', 'b'\]; expected \['a'\]"):
        files.read_csv(tmp_path / "t.csv", ("a",))
    (tmp_path / "half.csv").write_text("a,b\n1,2\n3\n")
    with pytest.raises(ArtifactError, match=r"row 2 of .*half.csv has 1 columns; expected 2"):
        list(files.read_csv(tmp_path / "half.csv", ("a", "b")))
