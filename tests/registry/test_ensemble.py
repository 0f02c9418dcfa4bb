"""tlpipe ensemble: several versions as one, in a registry and a project as they are used."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import yaml
from filelock import FileLock
from PIL import Image
from scipy.special import log_softmax, logsumexp, softmax

from tests.conftest import Workspace, copy_repository
from tlpipe import Predictor, bundle, files, graph, held_out
from tlpipe.data import pixels
from tlpipe.data.manifest import load_split, rows_of
from tlpipe.registry import local

# A linear probe, two that were fine-tuned alike but for the seed, and one of larger images, which
# are what the workspace stores last.
SLOWLY = {"epochs": 3, "head_lr": 3e-4, "backbone_lr": 3e-5}
VERSIONS: tuple[dict[str, dict[str, object]], ...] = (
    {"embed": {"backbone": "timm/test_resnet", "freeze": "all"}, "train": {}},
    {"embed": {"backbone": "timm/test_resnet", "freeze": 3}, "train": {**SLOWLY, "seed": 0}},
    {"embed": {"backbone": "timm/test_resnet", "freeze": 3}, "train": {**SLOWLY, "seed": 1}},
    {"embed": {"backbone": "shufflenet_v2_x0_5", "freeze": "all"}, "train": {}},
)


def section(workspace: Workspace, name: str, values: dict[str, object]) -> None:
    """Set a whole section of the parameters."""
    path = workspace.path / "params.yaml"
    params = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**params, name: values}, sort_keys=False))


@pytest.fixture(scope="session")
def members_made(kept: Path, cache_env: dict[str, str]) -> Workspace:
    """A project with four registered versions on random weights."""
    kept.mkdir(parents=True, exist_ok=True)
    target, made = kept / "members", kept / "members made"
    with FileLock(kept / "members lock"):
        if made.exists():
            return Workspace(target, cache_env)
        workspace = copy_repository(target, cache_env)
        workspace.replace("data/digits.yaml", "images_per_class: 100", "images_per_class: 24")
        workspace.configure("register", gate={"min_accuracy": 0.1, "min_recall": 0.0})
        workspace.configure("evaluate", ood=None)
        workspace.configure("embed", weights="none")
        for version in VERSIONS:
            workspace.configure("embed", **version["embed"])
            section(workspace, "train", version["train"])
            workspace.reproduce()
        made.touch()
    return workspace
