"""Which folder commands mean, and whose code works there."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo

from tests.conftest import ROOT, Workspace
from tlpipe.graph import PATHS


@pytest.mark.parametrize(
    "command",
    [("history",), ("check",), ("predict", "--json", "artifacts/evaluate/examples/4.png")],
    ids=lambda command: command[0],
)
def test_parameters_elsewhere_mean_their_folder(
    main_job: Workspace, tmp_path: Path, command: tuple[str, ...]
) -> None:
    """Elsewhere, or in a folder of the project, a command does what it does at its top."""
    name, *arguments = command
    absolute = [str(main_job.path / word) if "/" in word else word for word in arguments]
    expected = main_job.call(name, *absolute).stdout
    other = Workspace(tmp_path, main_job.env)
    params = str(main_job.path / "params.yaml")
    assert other.call(name, *absolute, "--params", params).stdout == expected
    assert list(tmp_path.iterdir()) == []
    below = Workspace(main_job.path / "flows", main_job.env)
    assert below.call(name, *absolute).stdout == expected


def test_parameters_have_the_name_that_dvc_reads(empty: Workspace) -> None:
    (empty.path / "params.yaml").rename(empty.path / "other.yaml")
    said = empty.call("check", "--params", "other.yaml", code=3).stderr
    assert "--params is other.yaml; expected a file named params.yaml" in said


@pytest.mark.fault("E11")
def test_other_code_than_that_here_is_an_error(main_job: Workspace, workspace: Workspace) -> None:
    """As in a container: what is installed is not what the project's commit holds."""
    shutil.copytree(ROOT / "tlpipe", workspace.path / "installed" / "tlpipe")
    code = workspace.path / "installed" / "tlpipe" / "data" / "split.py"
    code.write_text(code.read_text() + "\nIS_ANOTHER = True\n")
    workspace.take(main_job, "manifest")
    other = Workspace(
        workspace.path, {**workspace.env, "PYTHONPATH": str(workspace.path / "installed")}
    )
    said = other.run("tlpipe", "split", code=6).stderr
    assert "split was not run: tlpipe.lock.yaml states code of tlpipe, " in said
    assert not (workspace.path / PATHS["split"]).exists()
    assert not (workspace.path / PATHS["placements"]).exists()
    other.run("tlpipe", "upgrade")
    other.run("tlpipe", "split")
    assert (workspace.path / PATHS["split"]).exists()
    # The project's own code is then the other one.
    assert "split was not run: " in workspace.run("tlpipe", "split", code=6).stderr


# What of a project's folder Python would import if that stood first on its path.
HIDING = ("random.py", "dvc/__init__.py", "tlpipe/__init__.py", "prefect/__init__.py")


def hide_packages(folder: Path) -> None:
    for name in HIDING:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("open('imported', 'w').write(__file__); raise SystemExit(0)\n")


@pytest.mark.fault("E24")
@pytest.mark.parametrize("command", ["run", "status", "flow"])
def test_nothing_is_imported_from_a_project_and_failures_are_passed_on(
    workspace: Workspace, command: str
) -> None:
    """Whatever the user's own files are named; the stage added here is none that DVC takes."""
    hide_packages(workspace.path)
    path = workspace.path / "dvc.yaml"
    path.write_text(path.read_text() + "  mine:\n    command: typo\n")
    flow = "import random, sys\nimport tlpipe.graph, dvc\n"
    (workspace.path / "flows/pipeline.py").write_text(f"{flow}sys.exit(255)\n")
    said = workspace.call(command, code=1 if command == "status" else 255).stdout
    assert "made last" not in said
    assert not (workspace.path / "imported").exists()


def test_status_says_what_has_changed_since(workspace: Workspace) -> None:
    workspace.run("dvc", "repro", "ingest")
    workspace.configure("ingest", max_rejected=0.5)
    said = workspace.call("status").stdout
    assert "what follows:\n  ingest: params.yaml ingest modified\n" in said
    # Of a stage whose outputs are not there, as in a fresh clone, no path is listed.
    assert "stages: not here: what split, embed, audit, train, export, evaluate, register" in said
    assert "deleted" not in said
    shutil.rmtree(workspace.path / "artifacts")
    assert "not here: what ingest, split, embed" in workspace.call("status").stdout


@pytest.mark.fault("E24")
def test_init_imports_nothing_from_its_folder(tmp_path: Path, photos: Path) -> None:
    hide_packages(tmp_path)
    Workspace(tmp_path).call("init", "--here", "--name", "mine", "--source", str(photos))
    assert (tmp_path / ".dvc" / "config").exists()
    assert not (tmp_path / "imported").exists()


@pytest.mark.fault("E25")
def test_images_that_dvc_does_not_watch_are_not_measured(
    workspace: Workspace, photos: Path
) -> None:
    """Of ``evaluate.ood``; null turns it off for DVC, too."""
    workspace.configure("evaluate", ood=None)
    for command in (("status", "evaluate"), ("dag",)):
        workspace.run("dvc", *command)
    said = workspace.call("status", code=6).stderr
    assert "has other dependencies than params.yaml names: evaluate.ood is null now" in said
    workspace.call("upgrade")
    assert "textures" not in (workspace.path / "dvc.yaml").read_text()
    odd = photos.parent / "odd ${x}: #1"
    photos.rename(odd)
    workspace.configure("evaluate", ood=str(odd))
    said = workspace.call("evaluate", code=6).stderr
    assert f"evaluate was not run: evaluate.ood is {odd}, and evaluate in dvc.yaml does not" in said
    assert f"names: evaluate.ood is {odd} now" in workspace.call("doctor", code=1).stdout
    workspace.call("upgrade")
    assert "evaluate was not run" not in workspace.call("evaluate", code=6).stderr
    with Repo(str(workspace.path)) as repo:
        stage = repo.stage.load_one(str(workspace.path / "dvc.yaml"), "evaluate")
        assert stage.deps[0].def_path == str(odd)
    # What a user writes for experiments with it.
    workspace.replace("dvc.yaml", json.dumps(str(odd)).replace("$", "\\\\$"), '"${evaluate.ood}"')
    assert "evaluate was not run" not in workspace.call("evaluate", code=6).stderr


@pytest.mark.fault("E25")
@pytest.mark.parametrize("name", ["2024", "1.5", "on", "null", "0x10"])
def test_a_folder_that_yaml_would_read_as_something_else_is_a_dependency(
    workspace: Workspace, name: str
) -> None:
    workspace.configure("evaluate", ood=name)
    workspace.call("upgrade")
    with Repo(str(workspace.path)) as repo:
        stage = repo.stage.load_one(str(workspace.path / "dvc.yaml"), "evaluate")
        assert stage.deps[0].def_path == name


@pytest.mark.fault("P29")
@pytest.mark.parametrize("key", ["audit", "embed.backbone"])
def test_names_that_dvc_compares_are_missed_before_it_runs(workspace: Workspace, key: str) -> None:
    path = workspace.path / "params.yaml"
    content = yaml.safe_load(path.read_text())
    section, _, field = key.partition(".")
    if field:
        del content[section][field]
    else:
        del content[section]
    path.write_text(yaml.safe_dump(content))
    for command in ("check", "run"):
        (line,) = workspace.call(command, code=3).stderr.splitlines()
        assert f"{key} is missing in params.yaml: it has its default, but DVC compares" in line
    written = ": efficientnet_lite0' in the section embed." if field else "audit: {}'."
    assert line.endswith(written)
    content[section] = None if not field else content[section] | {field: "efficientnet_lite0"}
    path.write_text(yaml.safe_dump(content))
    workspace.call("check")
    workspace.run("dvc", "status")


@pytest.mark.slow
def test_status_is_of_this_project_alone(
    tmp_path: Path, photos: Path, cache_env: dict[str, str]
) -> None:
    here = Workspace(tmp_path, cache_env)
    here.run("git", "init", "-q")
    here.run("dvc", "init", "-q")
    for name in ("a", "b"):
        here.call("init", name, "--source", str(photos))
        (tmp_path / name / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
    said = Workspace(tmp_path / "a", cache_env).call("status").stdout
    assert "stages: not here: what ingest, split" in said
    assert "b/" not in said


@pytest.mark.parametrize(
    ("command", "stage"),
    [("advise", "embed"), ("pretrain", "embed"), ("lr-find", "embed"), ("explain", "train")],
)
def test_commands_beside_the_graph_run_no_other_code_either(
    workspace: Workspace, command: str, stage: str
) -> None:
    path = workspace.path / "tlpipe.lock.yaml"
    content = yaml.safe_load(path.read_text())
    content["stages"][stage]["code"] = "another"
    path.write_text(yaml.safe_dump(content))
    assert (
        f"{stage} was not run: tlpipe.lock.yaml states code of tlpipe"
        in workspace.call(command, code=6).stderr
    )


def test_programs_find_the_tlpipe_that_started_them(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the environment is not activated."""
    program = "import pathlib, shutil\npathlib.Path('found').write_text(shutil.which('tlpipe'))\n"
    (workspace.path / "flows/pipeline.py").write_text(program)
    git = str(Path(shutil.which("git") or "").parent)
    monkeypatch.setenv("PATH", git)
    workspace.call("flow")
    assert Path((workspace.path / "found").read_text()).parent == Path(sys.executable).parent
