"""DVC's experiments in temporary folders register in the project that they come from."""

from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, Workspace
from tests.registry.test_deleted import versions
from tests.registry.test_local import mentions
from tests.registry.test_promotion import aliases, client_of
from tlpipe.errors import RegistryError
from tlpipe.registry import local

pytestmark = pytest.mark.slow


def experiments_of(built: Workspace, top: Path) -> None:
    """Make of a built folder a project of DVC in which ``register`` alone is left to be done."""
    stage = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["register"]
    kept = {name: stage[name] for name in ("cmd", "params", "outs")}
    (built.path / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"register": kept}}))
    (built.path / ".gitignore").write_text("/mlartifacts/\n/mlflow.db*\n/.mlflow.db*\n")
    repository = Workspace(top, built.env)
    repository.run("git", "init", "-q")
    repository.run("dvc", "init", "-q")
    repository.run("git", "add", "--all")
    repository.run("git", "commit", "-qm", "built")


@pytest.mark.fault("R24")
@pytest.mark.parametrize(
    ("place", "commands"),
    [
        (".", ["run --temp"]),
        ("projects/flowers 1", ["run --queue", "run --run-all"]),
    ],
)
def test_an_experiment_in_a_temporary_folder_registers_in_the_project(
    built: Workspace, tmp_path: Path, place: str, commands: list[str]
) -> None:
    top = tmp_path / "top"
    folder = top / place
    folder.parent.mkdir(parents=True, exist_ok=True)
    built.path.rename(folder)
    who = {
        f"GIT_{role}_{what}": "t@t"
        for role in ("AUTHOR", "COMMITTER")
        for what in ("NAME", "EMAIL")
    }
    project = Workspace(folder, {**built.env, **who})
    experiments_of(project, top)
    setting = ("-S", "+register.purpose=to show it")
    first, *others = commands
    said = project.run("dvc", "exp", *first.split(), *setting)
    for command in others:
        said = project.run("dvc", "exp", *command.split())
    assert f"the registry is that of {folder}" in said.stdout + said.stderr
    assert len(versions(project)) == 1
    assert aliases(project) == {"challenger": 1, "champion": 1}
    client = client_of(project)
    version = client.get_model_version("digits", "1")
    assert version.tags["tlpipe.purpose"] == "to show it"
    assert mentions(folder, top / ".dvc/tmp/exps") == []
    assert not list(top.glob(".dvc/tmp/exps/**/mlflow.db"))
    project.call("predict", "artifacts/evaluate/examples/4.png")


def test_a_project_that_has_no_such_folder_is_named(tmp_path: Path) -> None:
    copy = tmp_path / ".dvc/tmp/exps/tmp1"
    (copy / ".dvc").mkdir(parents=True)
    (copy / "new").mkdir()
    with pytest.raises(RegistryError, match=r"and there is no .*/new in the project that it comes"):
        local.create(copy / "new")
