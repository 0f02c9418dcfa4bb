"""A project from one version of tlpipe to the next, with wheels of both; experiments, worktrees."""

import json
import re
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.conftest import ROOT, Workspace, elsewhere, install, make_photos
from tlpipe.graph import PATHS

pytestmark = pytest.mark.slow

NEXT = "1000.0"
WHO = {
    f"GIT_{role}_{what}": "t@t" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
}
# What is in the source of the next version, by file: other learning rates, one key under another
# name, another default, another nightly schedule and a flow that tries again.
CHANGES = {
    "pyproject.toml": (f'version = "{version("tlpipe")}"', f'version = "{NEXT}"'),
    "tlpipe/training/recipe.py": ("0.5 * (1 + math.cos", "0.25 * (1 + math.cos"),
    "tlpipe/evaluation/evaluate.py": ("default=18,", "default=12,"),
    "tlpipe/upgrade.py": (
        "] = ()\n",
        f"""] = (
    ("{NEXT}", Renamed("export.parity_tolerance", "most_difference")),
    ("{NEXT}", NewDefault("evaluate.mistakes", 18)),
)
""",
    ),
    "flows/pipeline.py": ("retries: int = 0", "retries: int = 2"),
    "prefect.yaml": ('cron: "0 3 * * *"', 'cron: "0 4 * * *"'),
}


@pytest.fixture(scope="module")
def later(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands of an environment with the next version's wheel."""
    folder = tmp_path_factory.mktemp("later")
    source = Workspace(folder / "source")
    source.path.mkdir()
    for name in ("tlpipe", "flows", "data"):
        shutil.copytree(ROOT / name, source.path / name, ignore=shutil.ignore_patterns("*.pyc"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "constraints.txt", "prefect.yaml"):
        shutil.copy(ROOT / name, source.path)
    for name, (old, new) in CHANGES.items():
        source.replace(name, old, new)
    for path in (source.path / "tlpipe").rglob("*.*"):
        if path.suffix in (".py", ".yaml") and path.name != "upgrade.py":
            path.write_text(path.read_text().replace("parity_tolerance", "most_difference"))
    return install(source.path, folder / "installed")


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, installed: Path, cache_env: dict[str, str]
) -> Workspace:
    """A project after its first run by this version, all committed."""
    folder = tmp_path_factory.mktemp("finished")
    home = Workspace(folder, {**elsewhere(installed, cache_env), **WHO})
    home.run("tlpipe", "init", "mine", "--source", str(make_photos(folder / "photos")))
    made = Workspace(folder / "mine", home.env)
    made.replace("params.yaml", "backbone: efficientnet_lite0", "backbone: timm/test_resnet")
    made.replace("params.yaml", "weights: imagenet", "weights: none")
    made.replace("params.yaml", "freeze: all  ", "freeze: layer2  ")
    made.replace("params.yaml", "epochs: 10  ", "epochs: 1  ")
    made.replace("params.yaml", "export:\n", "export:\n  precisions: []\n")
    made.replace("params.yaml", "evaluate:\n", "evaluate:\n  corrupted_images: 8\n")
    made.replace("params.yaml", "parity_tolerance: 0.0001", "parity_tolerance: 1e-4   # enough")
    # Nothing is imported from a project, whatever is in it.
    (made.path / "tlpipe").mkdir()
    (made.path / "tlpipe/__init__.py").write_text("raise SystemExit('imported from the project')")
    assert "mine version 1" in made.run("tlpipe", "run").stdout
    assert (made.path / ".git").is_dir()
    commit(made, "run")
    return made


def commit(project: Workspace, message: str) -> None:
    project.run("git", "add", "--all")
    project.run("git", "commit", "-qm", message)


def copied(project: Workspace, folder: Path, env: Mapping[str, str]) -> Workspace:
    shutil.copytree(project.path, folder, symlinks=True)
    return Workspace(folder, {**project.env, **env})


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not {".git", ".dvc"} & set(path.relative_to(folder).parts)
    }


def ran(output: str) -> list[str]:
    return re.findall(r"Running stage '(\w+)'", output)


def test_experiments_and_worktrees_run_the_installed_code(
    finished: Workspace, tmp_path: Path
) -> None:
    project = copied(finished, tmp_path / "mine", {})
    project.run("dvc", "exp", "run", "--queue", "-n", "three", "-S", "train.epochs=3", "train")
    project.run("dvc", "exp", "run", "--run-all")
    project.run("dvc", "exp", "run", "--temp", "-n", "two", "-S", "train.epochs=2", "train")
    assert len(project.rows(PATHS["history"])) == 2  # the start, and one epoch
    for name, epochs in (("three", 3), ("two", 2)):
        project.run("dvc", "exp", "apply", name)
        assert len(project.rows(PATHS["history"])) == 1 + epochs
    project.run("git", "checkout", "-q", "--force", ".")
    tree = Workspace(tmp_path / "tree", project.env)
    project.run("git", "worktree", "add", "-q", str(tree.path))
    tree.run("dvc", "cache", "dir", "--local", str(project.path / ".dvc/cache"))
    output = tree.run("dvc", "repro", "train").stdout
    # The same code: of the stages whose runs DVC keeps, none runs.
    assert ran(output) == ["ingest", "split"]
    assert (tree.path / PATHS["history"]).read_bytes() == (
        finished.path / PATHS["history"]
    ).read_bytes()


@pytest.mark.fault("E11")
@pytest.mark.fault("P06")
def test_an_upgrade_runs_what_has_changed_and_keeps_what_is_the_user_s(
    finished: Workspace, later: Path, tmp_path: Path
) -> None:
    project = copied(finished, tmp_path / "mine", elsewhere(later, {}))
    before = Workspace(project.path, finished.env)
    own = "  mine:\n    cmd: echo mine > mine.txt\n    outs: [mine.txt]\n"
    (project.path / "dvc.yaml").write_text((project.path / "dvc.yaml").read_text() + own)
    project.replace("dvc.yaml", "cmd: tlpipe audit", "cmd: A=1 nice tlpipe audit")
    project.replace("flows/pipeline.py", "max_workers=8", "max_workers=2")
    project.replace("requirements.txt", "serve,cpu]", "serve,gpu]")
    before.run("tlpipe", "run")
    commit(project, "my own")

    # Installed, as in a container, but not accepted.
    there = content(project.path)
    assert "train was not run: tlpipe.lock.yaml states code" in (
        project.run("tlpipe", "train", code=6).stderr
    )
    assert "Accept that: 'tlpipe upgrade'" in project.run("tlpipe", "run", code=6).stderr
    tried = project.run("tlpipe", "upgrade", "--dry-run").stdout
    assert content(project.path) == there

    said = project.run("tlpipe", "upgrade").stdout.splitlines()
    tried = tried.replace("would be written", "written").replace("would", "will")
    assert said == tried.splitlines()
    assert said[:3] == [
        f"params.yaml: export.parity_tolerance is named export.most_difference (tlpipe {NEXT})",
        "params.yaml: evaluate.mistakes: 18 is written out: it was the default, and is no more "
        f"(tlpipe {NEXT})",
        "params.yaml, flows/pipeline.py, prefect.yaml, constraints.txt, tlpipe.lock.yaml written",
    ]
    again = [line.partition(" ")[0] for line in said if " will run again: " in line]
    assert again == ["audit", "train", "export", "evaluate"]  # not embed, and what is before it
    assert said[-1].endswith("run again where what it reads has changed: register")
    changed = {name: text for name, text in content(project.path).items() if there[name] != text}
    lines = there["params.yaml"].decode()
    assert changed["params.yaml"].decode() == lines.replace(
        "  parity_tolerance: 1e-4   # enough", "  most_difference: 1e-4   # enough"
    ).replace("evaluate:\n", "evaluate:\n  mistakes: 18\n")
    flow = changed["flows/pipeline.py"].decode()
    assert "max_workers=2" in flow and "retries: int = 2" in flow
    assert b'cron: "0 4 * * *"' in changed["prefect.yaml"]
    assert f"tlpipe=={NEXT}\n" in changed["constraints.txt"].decode()
    assert "dvc.yaml" not in changed and "requirements.txt" not in changed
    assert project.run("tlpipe", "upgrade").stdout == "nothing to change\n"

    assert {*ran(project.run("tlpipe", "run").stdout)} == {*again, "register"}
    report = json.loads((project.path / PATHS["receipt"]).read_text())
    assert report["version"] in (2, "2")
    commit(project, "upgraded")

    # The commit before is of the version before.
    tree = Workspace(tmp_path / "tree", project.env)
    project.run("git", "worktree", "add", "-q", str(tree.path), "HEAD~1")
    there = content(tree.path)
    assert "train was not run: " in tree.run("tlpipe", "train", code=6).stderr
    assert content(tree.path) == there
    assert "is of tlpipe 1000.0, and " in before.run("tlpipe", "upgrade", code=6).stderr
