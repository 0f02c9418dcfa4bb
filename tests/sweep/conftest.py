"""What tests of sweeps share."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import Workspace, copy_repository

IMAGES = 24  # of each of two classes


@pytest.fixture(scope="session")
def split_once(tmp_path_factory: pytest.TempPathFactory, cache_env: dict[str, str]) -> Workspace:
    """A small project after 'dvc repro split', committed."""
    path = tmp_path_factory.mktemp("sweeps")
    for number, label in enumerate(("dark", "light")):
        (path / "photos" / label).mkdir(parents=True)
        for i in range(IMAGES):
            shade = 60 + 70 * number + 5 * i
            picture = Image.new("RGB", (40 + i, 48), (shade, shade // 2, 7 * i))
            picture.save(path / "photos" / label / f"{i}.png")
    workspace = copy_repository(path / "copy", cache_env)
    workspace.set_source(path / "photos")
    workspace.use_small_network()
    workspace.run("dvc", "repro", "split")
    workspace.run("git", "add", "--all")
    who = ("-c", "user.name=t", "-c", "user.email=t@example.invalid")
    workspace.run("git", *who, "commit", "-qm", "split")
    return workspace


@pytest.fixture
def project(split_once: Workspace, tmp_path: Path) -> Workspace:
    """A copy of that project of the test's own."""
    shutil.copytree(split_once.path, tmp_path / "copy", symlinks=True)
    return Workspace(tmp_path / "copy", split_once.env)


@pytest.fixture
def here(project: Workspace, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """That project as the current folder, with its environment."""
    monkeypatch.chdir(project.path)
    for name, value in project.env.items():
        monkeypatch.setenv(name, value)
    return project
