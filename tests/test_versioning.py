"""What a run says of the commit it was made at."""

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
    ],
)
def test_appended_rows_of_the_split_table_are_no_changes_and_others_are(
    tmp_path: Path, path: str, text: str, expected: str
) -> None:
    for name, content in {
        "splits.csv": "a,1\nb,2\n",
        "dvc.lock": "stages: {}",
        "params.yaml": "",
    }.items():
        (tmp_path / name).write_text(content)
    git = ("git", "-c", "user.name=x", "-c", "user.email=x@example.org")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    (tmp_path / path).write_text(text)
    assert versioning.describe(tmp_path)["tlpipe.git_changed"] == expected
