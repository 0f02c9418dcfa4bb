"""What a run says of the commit it was made at."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tlpipe import versioning


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("splits.csv", "a,1\nb,2\n", "false"),
        ("splits.csv", "a,1\nb,2\nc,3\n", "false"),
        ("splits.csv", "a,1\n", "true"),
        ("splits.csv", "a,1\nb,3\n", "true"),
        ("dvc.lock", "stages: {train: {}}", "false"),
        ("params.yaml", "new", "true"),
        ("notes.txt", "nobody goes by these", "false"),
        ("mine.yaml", "", "true"),
        ("advice.json", "", "false"),  # no stage has read it
        ("dvc.yaml", "", "true"),
        ("data/raw.zip", "", "false"),  # DVC knows it
    ],
)
def test_appended_rows_of_the_split_table_are_no_changes_and_others_are(
    tmp_path: Path, path: str, text: str, expected: str
) -> None:
    names = ("mine.yaml", "data/raw.zip", "made.csv", "made/inside.csv", "s3://x/y", "/x")
    read, made = ([{"path": name} for name in part] for part in (names, ("made.csv", "made")))
    stages = {"ingest": {"deps": read, "outs": made}}
    for name, content in {
        "splits.csv": "a,1\nb,2\n",
        "dvc.lock": json.dumps({"stages": stages}),
        "params.yaml": "",
        "data/raw.zip.dvc": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    git = ("git", "-c", "user.name=x", "-c", "user.email=x@example.org")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    (tmp_path / path).write_text(text)
    (tmp_path / "made").mkdir()
    for name in ("made.csv", "made/inside.csv"):
        (tmp_path / name).write_text("")
    assert versioning.describe(tmp_path)["tlpipe.git_changed"] == expected


@pytest.mark.fault("E32")
def test_a_project_that_was_never_added_to_its_repository_is_at_no_commit(tmp_path: Path) -> None:
    git = ("git", "-c", "user.name=x", "-c", "user.email=x@example.org")
    (tmp_path / "README.md").write_text("of somebody else")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    (tmp_path / "flowers").mkdir()
    (tmp_path / "flowers" / "params.yaml").write_text("seed: 0")
    made_at = versioning.of_inputs(tmp_path / "flowers")["git_commit"]
    assert made_at.endswith(" with uncommitted changes")


def test_where_git_does_not_answer_nothing_is_as_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "git"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\n[ "$1" = rev-parse ] && echo 0123\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    assert versioning.of_inputs(tmp_path)["git_commit"].endswith(" with uncommitted changes")
