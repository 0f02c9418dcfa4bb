"""Which folder commands mean, and whose code works there."""

import shutil
from pathlib import Path

import pytest

from tests.conftest import Workspace


@pytest.mark.parametrize(
    "command",
    [
        ("history",),
        pytest.param(
            ("check",),
            marks=pytest.mark.xfail(
                strict=True, reason="issue 16: the folder is where the command is run"
            ),
        ),
        pytest.param(
            ("predict", "--json", "artifacts/evaluate/examples/4.png"),
            marks=pytest.mark.xfail(
                strict=True, reason="issue 16: the folder is where the command is run"
            ),
        ),
    ],
    ids=lambda command: command[0],
)
def test_parameters_elsewhere_mean_their_folder(
    main_job: Workspace, tmp_path: Path, command: tuple[str, ...]
) -> None:
    """Said from another folder, a command does what it does in the project's own."""
    name, *arguments = command
    absolute = [str(main_job.path / word) if "/" in word else word for word in arguments]
    expected = main_job.call(name, *absolute).stdout
    other = Workspace(tmp_path, main_job.env)
    params = str(main_job.path / "params.yaml")
    assert other.call(name, *absolute, "--params", params).stdout == expected
    assert list(tmp_path.iterdir()) == []


@pytest.mark.xfail(strict=True, reason="issue 16: installed code works in a project of other code")
def test_other_code_than_that_here_is_an_error(main_job: Workspace, workspace: Workspace) -> None:
    """As in a container: what is installed is not what the project's commit holds."""
    shutil.copy(main_job.path / "dvc.lock", workspace.path)
    code = workspace.path / "tlpipe" / "data" / "split.py"
    code.write_text(code.read_text() + "\nIS_ANOTHER = True\n")
    manifest = str(main_job.path / "artifacts/ingest/manifest.csv")
    outputs = ("--split", "split.csv", "--report", "split.json", "--placements", "splits.csv")
    said = workspace.run("tlpipe", "split", "--manifest", manifest, *outputs, code=None)
    assert said.returncode != 0
    assert "code" in said.stderr
    assert not (workspace.path / "split.csv").exists()
