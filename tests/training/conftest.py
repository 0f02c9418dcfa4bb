"""What tests of training share."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.conftest import Workspace, copy_repository, lock
from tlpipe import graph


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny networks are computed fastest so, and sums do not depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, cache_env: dict[str, str]) -> Workspace:
    """A data set embedded up to the last two stages."""
    path = tmp_path_factory.mktemp("prepared")
    for number, label in enumerate(("dark", "light")):
        (path / "photos" / label).mkdir(parents=True)
        for i in range(14):
            shade = 40 + 150 * number + 3 * i
            picture = Image.new("RGB", (40 + i, 48), (shade, shade // 2, i))
            picture.save(path / "photos" / label / f"{i}.png")
    workspace = copy_repository(path / "copy", cache_env)
    workspace.set_source(path / "photos")
    workspace.configure("embed", freeze="blocks5")
    workspace.reproduce("embed")
    return workspace


def beside(prepared: Workspace, folder: Path) -> Workspace:
    """Make a project of its own that trains on what was prepared."""
    folder.mkdir(exist_ok=True)
    shutil.copyfile(prepared.path / graph.PARAMS, folder / graph.PARAMS)
    (folder / graph.LOCK).write_text(lock())
    workspace = Workspace(folder, prepared.env)
    workspace.take(prepared, "activations", "pixels", "split")
    return workspace
