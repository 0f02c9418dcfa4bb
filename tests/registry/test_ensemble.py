"""tlpipe ensemble: several versions as one, in a registry and a project as they are used."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from filelock import FileLock
from PIL import Image
from scipy.special import log_softmax, logsumexp, softmax

from tests.conftest import Workspace, copy_repository
from tlpipe import Predictor, bundle, files, graph, held_out
from tlpipe.data import pixels
from tlpipe.data.manifest import load_split, rows_of
from tlpipe.registry import local

# Two of one size, whose images are resized inside the graph, and one of a larger size. 3: the
# workspace stores what it wants.
BACKBONES = ("timm/test_resnet", "timm/test_byobnet", "shufflenet_v2_x0_5")


@pytest.fixture(scope="session")
def three_made(kept: Path, cache_env: dict[str, str]) -> Workspace:
    """A project with three registered versions of three backbones, with random weights."""
    kept.mkdir(parents=True, exist_ok=True)
    target, made = kept / "three", kept / "three made"
    with FileLock(kept / "three lock"):
        if made.exists():
            return Workspace(target, cache_env)
        workspace = copy_repository(target, cache_env)
        workspace.replace("data/digits.yaml", "images_per_class: 100", "images_per_class: 24")
        workspace.configure("register", gate={"min_accuracy": 0.1, "min_recall": 0.0})
        workspace.configure("evaluate", ood=None)
        for backbone in BACKBONES:
            workspace.configure("embed", backbone=backbone, weights="none")
            workspace.reproduce()
        made.touch()
    return workspace
