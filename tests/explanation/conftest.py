"""A model to explain: trained and registered once, on pictures that are easily told apart."""

import numpy as np
import pytest
from PIL import Image

from tests.conftest import Workspace, copy_repository

LABELS = ("blue", "red")


@pytest.fixture(scope="session")
def explained_job(tmp_path_factory: pytest.TempPathFactory, cache_env: dict[str, str]) -> Workspace:
    """A workspace with a network whose last stages were trained; every eighth label is wrong."""
    path = tmp_path_factory.mktemp("explained")
    random = np.random.default_rng(0)
    for n in range(80):
        colour = n % 2
        wrong = n % 8 == 7
        square = random.integers(0, 90, (48, 48, 3), np.uint8)
        square[8 + n % 20 :, 10:30, 2 - 2 * colour] = 250
        file = path / "photos" / LABELS[colour ^ wrong] / f"{n}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(square).save(file)
    workspace = copy_repository(path / "copy", cache_env)
    workspace.set_source(path / "photos")
    workspace.use_small_network()
    workspace.configure("embed", freeze=3, views=2)
    # A head of hidden units is not solved before, so that an epoch is better than none.
    workspace.configure("train", epochs=2, hidden=[8])
    workspace.reproduce()
    return workspace
