"""Files that tlpipe writes, and what a user changed in them, from version to version."""

import re
from importlib.metadata import version
from pathlib import Path

import pytest

from tlpipe import graph, upgrade
from tlpipe.errors import ArtifactError

OLD = "".join(f"line {number}\n" for number in range(20))
NEW = OLD.replace("line 3\n", "three\n").replace("line 15\n", "line 15\nfifteen\n")


def project(folder: Path, current: str | None, base: str | None, name: str = "file") -> Path:
    if current is not None:
        upgrade.write(folder / name, current)
    if base is not None:
        upgrade.write(folder / upgrade.base(name), base)
    return folder


@pytest.mark.parametrize(
    ("current", "base", "expected"),
    [
        pytest.param(None, None, NEW, id="a new file"),
        pytest.param(None, OLD, None, id="deleted by the user"),
        pytest.param(OLD, OLD, NEW, id="unchanged by the user"),
        pytest.param(NEW, OLD, NEW, id="changed alike"),
        pytest.param(OLD + "mine\n", NEW, OLD + "mine\n", id="unchanged by tlpipe"),
        pytest.param("mine\n" + OLD, OLD, "mine\n" + NEW, id="changed by both, elsewhere"),
        pytest.param(NEW + "mine\n", None, NEW + "mine\n", id="base lost, text there"),
        pytest.param("mine\n" + NEW, None, "mine\n" + NEW, id="base lost, text below"),
    ],
)
def test_both_sides_are_kept(
    tmp_path: Path, current: str | None, base: str | None, expected: str | None
) -> None:
    assert upgrade.merged(project(tmp_path, current, base), "file", NEW) == expected


def test_a_project_has_a_dvc_yaml(tmp_path: Path) -> None:
    """It comes back, whatever was written before."""
    assert upgrade.merged(tmp_path, "dvc.yaml", NEW) == NEW
    folder = project(tmp_path, None, OLD, "dvc.yaml")
    assert upgrade.merged(folder, "dvc.yaml", NEW) == NEW


def test_a_conflict_keeps_both_and_stops_the_next_upgrade(tmp_path: Path) -> None:
    folder = project(tmp_path, OLD.replace("line 3\n", "drei\n"), OLD)
    text = upgrade.merged(folder, "file", NEW)
    assert text is not None
    assert upgrade.conflicts(text) == [4]
    lines = text.splitlines()
    assert lines[3] == "<<<<<<< yours" and lines[9].startswith(">>>>>>> tlpipe ")
    assert lines[4:9] == ["drei", "||||||| written before", "line 3", "=======", "three"]
    assert "line 15\nfifteen\nline 16\n" in text  # what is no conflict is merged
    upgrade.write(folder / "file", text)
    with pytest.raises(ArtifactError, match=r"marks of a conflict in line 4\. Write there"):
        upgrade.merged(folder, "file", NEW)


@pytest.mark.fault("E14")
def test_without_what_was_written_before_only_what_differs_is_a_conflict(tmp_path: Path) -> None:
    text = upgrade.merged(project(tmp_path, NEW.replace("line 9", "mine"), None), "file", NEW)
    assert text is not None
    assert upgrade.conflicts(text) == [10]
    assert text.splitlines()[9:14] == [
        *("<<<<<<< yours", "mine", "=======", "line 9", f">>>>>>> tlpipe {version('tlpipe')}")
    ]
    assert text.count("\n") == NEW.count("\n") + 4


@pytest.mark.fault("E13")
def test_a_dvc_yaml_of_somebody_else_is_never_merged(tmp_path: Path) -> None:
    folder = project(tmp_path, "stages:\n  mine:\n    cmd: echo\n", None, "dvc.yaml")
    with pytest.raises(ArtifactError, match=r"dvc\.yaml is not written by tlpipe"):
        upgrade.merged(folder, "dvc.yaml", graph.generated())


@pytest.mark.fault("E12")
def test_marks_of_git_in_what_was_written_before_are_an_error(tmp_path: Path) -> None:
    """As after a merge of branches that were upgraded to two versions."""
    marks = "<<<<<<< HEAD\nline 3\n=======\ndrei\n>>>>>>> theirs\n"
    folder = project(tmp_path, OLD + "mine\n", OLD.replace("line 3\n", marks))
    with pytest.raises(ArtifactError, match=r"file\.base has marks of a conflict in line 4"):
        upgrade.merged(folder, "file", NEW)


@pytest.mark.fault("E15")
@pytest.mark.parametrize("of", ["killed", "failing"])
def test_a_git_that_does_not_merge_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of: str
) -> None:
    (tmp_path / "bin").mkdir()
    git = tmp_path / "bin" / "git"
    git.write_text("#!/bin/sh\n" + {"killed": "kill -9 $$", "failing": "exit 255"}[of])
    git.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    project(tmp_path, OLD + "mine\n", OLD)
    with pytest.raises(ArtifactError, match=r"file cannot be merged: .*exit code (-9|255)"):
        upgrade.merged(tmp_path, "file", NEW)


CRLF = OLD.replace("\n", "\r\n")


@pytest.mark.fault("E16")
@pytest.mark.parametrize("base", [OLD, CRLF])
@pytest.mark.parametrize("mine", ["", "mine\r\n"])
def test_line_ends_are_no_difference_and_stay(tmp_path: Path, base: str, mine: str) -> None:
    """Those of an editor, or of a clone with core.autocrlf."""
    for path, content in (("file", CRLF + mine), (upgrade.base("file"), base)):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(content.encode())
    text = upgrade.merged(tmp_path, "file", NEW)
    assert text is not None
    upgrade.write(tmp_path / "file", text)
    expected = NEW.replace("\n", "\r\n") + mine
    assert (tmp_path / "file").read_bytes() == expected.encode()
    assert upgrade.text(tmp_path / "file") == expected.replace("\r\n", "\n")
    there = (tmp_path / "file").stat()
    upgrade.write(tmp_path / "file", text)
    assert (tmp_path / "file").stat() == there


def test_a_link_stays_one(tmp_path: Path) -> None:
    project(tmp_path, OLD, None, "there")
    (tmp_path / "file").symlink_to("there")
    upgrade.write(tmp_path / "file", NEW)
    assert (tmp_path / "file").is_symlink() and (tmp_path / "there").read_text() == NEW


@pytest.mark.parametrize("before", [True, False])
def test_a_wrapped_command_has_no_conflict_with_what_changes_beside_it(
    tmp_path: Path, before: bool
) -> None:
    new = graph.generated()
    lines = new.splitlines(keepends=True)
    for stage in graph.STAGES:
        number = lines.index(f"    cmd: tlpipe {stage}\n")
        assert lines[number - 1] == f"  {stage}:\n" and lines[number + 1].startswith("    desc: ")
    old = re.sub(r"^    params: .*", "    params: [other]", new, flags=re.MULTILINE)
    if not before:
        new, old = old, new
    mine = re.sub(r"cmd: (tlpipe \w+)", r"cmd: srun \1", old)
    assert upgrade.merged(project(tmp_path, mine, old, "dvc.yaml"), "dvc.yaml", new) == (
        re.sub(r"cmd: (tlpipe \w+)", r"cmd: srun \1", new)
    )


def test_without_git_only_a_merge_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert upgrade.merged(project(tmp_path, OLD, OLD), "file", NEW) == NEW
    project(tmp_path, OLD + "mine\n", OLD)
    with pytest.raises(ArtifactError, match="Git merges the two, and is not installed"):
        upgrade.merged(tmp_path, "file", NEW)


def test_bytes_that_are_no_text_are_merged_as_they_are(tmp_path: Path) -> None:
    project(tmp_path, None, OLD)
    (tmp_path / "file").write_bytes(OLD.encode() + b"caf\xe9\r\n")
    text = upgrade.merged(tmp_path, "file", NEW)
    assert text is not None
    upgrade.write(tmp_path / "file", text)
    assert (tmp_path / "file").read_bytes() == NEW.encode() + b"caf\xe9\r\n"


def test_an_nvidia_gpu_s_requirements_have_no_conflict_with_a_version() -> None:
    texts = upgrade.texts()
    assert "==" not in texts["requirements.txt"]
    assert texts["constraints.txt"].startswith("tlpipe==")
