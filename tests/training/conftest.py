"""What tests of training share."""

from collections.abc import Iterator

import pytest
import torch
from PIL import Image

from tests.conftest import Workspace, copy_repository


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
    workspace.run("dvc", "repro", "--quiet", "split", "embed")
    return workspace
