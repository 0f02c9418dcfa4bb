"""Models to explain: each trained once, on pictures that are easily told apart."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import Workspace, copy_repository

LABELS = ("blue", "red")


def make_job(path: Path, env: dict[str, str]) -> Workspace:
    """Return a workspace with a network that computes next to nothing, before its first run.

    Every eighth picture is blue and labelled red.
    """
    random = np.random.default_rng(0)
    for n in range(80):
        colour = n % 2
        wrong = n % 8 == 6
        square = random.integers(0, 90, (48, 48, 3), np.uint8)
        square[8 + n % 20 :, 10:30, 2 - 2 * colour] = 250
        file = path / "photos" / LABELS[colour ^ wrong] / f"{n}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(square).save(file)
    workspace = copy_repository(path / "copy", env)
    workspace.set_source(path / "photos")
    workspace.use_small_network()
    return workspace


@pytest.fixture(scope="session")
def explained_job(tmp_path_factory: pytest.TempPathFactory, cache_env: dict[str, str]) -> Workspace:
    """A registered network whose last stage was trained on augmented views."""
    workspace = make_job(tmp_path_factory.mktemp("explained"), cache_env)
    workspace.configure("embed", freeze=3, views=2)
    # A head of hidden units is not solved before, so that an epoch is better than none.
    workspace.configure("train", epochs=2, hidden=[8])
    workspace.reproduce()
    return workspace


@pytest.fixture(scope="session")
def frozen_job(tmp_path_factory: pytest.TempPathFactory, cache_env: dict[str, str]) -> Workspace:
    """A linear probe on a network of which nothing was trained."""
    workspace = make_job(tmp_path_factory.mktemp("frozen"), cache_env)
    workspace.configure("embed", freeze="all")
    workspace.reproduce("evaluate")
    workspace.call("audit")
    return workspace
