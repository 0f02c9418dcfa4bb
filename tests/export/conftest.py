"""Graphs that several tests look at, made once."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml
from filelock import FileLock
from safetensors.torch import save_file
from torch.nn.modules.batchnorm import _BatchNorm

from tests.conftest import ROOT, Workspace, lock
from tests.training.test_trainer import build_network
from tlpipe import files
from tlpipe.backbones.activations import Origin
from tlpipe.backbones.augment import Augmentation
from tlpipe.backbones.backbone import Backbone, describe
from tlpipe.backbones.weights import Weights
from tlpipe.export import graph as graphs
from tlpipe.export.graph import Sample
from tlpipe.graph import LOCK, PARAMS, PATHS
from tlpipe.training.classifier import full_network, open_part
from tlpipe.training.model import Card, Model

CLASSES = 5
# With random weights these see no difference between images until BatchNorm knows some.
ALIKE = ("resnet18", "shufflenet_v2_x0_5", "timm/repvgg_a0", "timm/efficientvit_b0")


def run_export(artifacts: Path, folder: Path, env: dict[str, str], **params: object) -> Path:
    """Export the main job's model with other parameters; return where the outputs lie."""
    folder.mkdir(parents=True)
    given = yaml.safe_load((ROOT / "params.yaml").read_text())
    given["export"] |= params
    (folder / PARAMS).write_text(yaml.safe_dump(given))
    (folder / LOCK).write_text(lock())
    workspace = Workspace(folder, env)
    workspace.take(Workspace(artifacts.parent), "model", "pixels", "split")
    workspace.call("export")
    return (folder / PATHS["bundle"]).parent


@pytest.fixture(scope="session")
def every_precision(artifacts: Path, shared: Path, cache_env: dict[str, str]) -> Path:
    """The main job's model with int8 and fp16, whatever accuracy they lose: bundle, parity.json."""
    folder = shared / "every precision"
    made = (folder / PATHS["bundle"]).parent
    with FileLock(shared / "every precision.lock"):
        if not (made / "parity.json").exists():
            asked = {"precisions": ["fp16", "int8"], "max_accuracy_drop": 0.99, "parity_images": 32}
            run_export(artifacts, folder, cache_env, **asked)
    return made


@dataclass(frozen=True)
class Family:
    """A backbone with random weights, some images, and a classifier that tells them apart."""

    backbone: Backbone
    weights: Weights
    images: np.ndarray
    model: Model

    @property
    def graph(self) -> onnx.ModelProto:
        return graphs.classifier(self.backbone, self.weights, self.model)

    def sample(self, count: int | None = None) -> Sample:
        """The images, or the first of them, as the training images of an export."""
        n = len(self.images) if count is None else count
        side = self.backbone.preprocessing.crop_px
        return Sample(self.images, side, range(n), np.zeros(n, np.int64), [""] * n)  # type: ignore[arg-type]


def frozen_model(backbone: Backbone, *head: tuple[np.ndarray, np.ndarray]) -> Model:
    """A model whose backbone is frozen."""
    origin = Origin(
        backbone=backbone.name,
        weights="none",
        weights_sha256="",
        graph="",
        freeze="all",
        boundary=backbone.stages[-1].name,
        views=0,
        augmentation=Augmentation(),
        preprocessing=backbone.preprocessing,
        data_sha256="",
        data_version="",
        provider="CPUExecutionProvider",
        threads=2,
    )
    card = Card(
        labels=tuple("abcde"),
        origin=origin,
        split_sha256="",
        trainable_parameters=0,
        frozen_parameters=0,
        l2=None,
        epoch=0,
        validation_accuracy=0.0,
        validation_loss=0.0,
    )
    return Model(card, {}, head)


def opened(family: Family, count: int) -> Model:
    """The same classifier with its last ``count`` stages trained: each tensor changed a little."""
    boundary = ["", *(stage.name for stage in family.backbone.stages)][-1 - count]
    origin = family.model.card.origin.model_copy(update={"boundary": boundary})
    random = np.random.default_rng(1)
    tensors = {
        name: (
            tensor.numpy() * random.uniform(0.9, 1.1, tensor.shape).astype(np.float32)
            if tensor.is_floating_point()
            else tensor.numpy()
        )
        for name, tensor in open_part(family.backbone, family.weights, boundary)
        .state_dict()
        .items()
    }
    card = family.model.card.model_copy(update={"origin": origin})
    return replace(family.model, card=card, stages=tensors)


def _drawn_weights(name: str, folder: Path, images: np.ndarray) -> Weights:
    """Random weights in a file; BatchNorm knows some images, else all would look alike."""
    network = build_network(name)
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = None
    network.train()
    with torch.no_grad():
        network(torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1)
    path = folder / f"{name.replace('/', '--')}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in network.state_dict().items()}, path)
    return Weights(path, files.sha256(path))


def _telling_apart(
    backbone: Backbone, weights: Weights, images: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A random head whose logits have a spread of one on these images."""
    width = backbone.stages[-1].shape[0]
    # Features that all images share would drown what tells them apart.
    empty = np.zeros((1, width), np.float32), np.zeros(1, np.float32)
    with torch.inference_mode():
        frozen = full_network(backbone, weights, frozen_model(backbone, empty))[:-1]
        features = frozen(torch.from_numpy(images)).double().numpy()
    shared = features.mean(axis=0)
    weight = np.random.default_rng(0).normal(size=(CLASSES, width))
    weight -= np.outer(weight @ shared, shared) / (shared @ shared)
    weight /= (features @ weight.T).std()
    return weight.astype(np.float32), np.zeros(CLASSES, np.float32)


@pytest.fixture(scope="session")
def family(
    shared: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Family]]:
    """Return a family by the name of its backbone; its pretrained part is exported once.

    By whichever test process needs it first: the cache is one for all.
    """
    folder = tmp_path_factory.mktemp("families")

    @cache
    def make(name: str) -> Family:
        backbone = describe(name)
        side = backbone.preprocessing.crop_px
        random = np.random.default_rng(0)
        coarse = random.integers(0, 256, (32, 7, 7, 3), dtype=np.uint8)
        images = np.repeat(np.repeat(coarse, -(-side // 7), axis=1), -(-side // 7), axis=2)
        images = np.ascontiguousarray(images[:, :side, :side])
        weights = _drawn_weights(name, folder, images) if name in ALIKE else Weights(None, "")
        head = _telling_apart(backbone, weights, images)
        return Family(backbone, weights, images, frozen_model(backbone, head))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(shared / "families"))
        yield make


def verdicts(folder: Path) -> dict[str, Any]:
    report: dict[str, dict[str, Any]] = json.loads((folder / "parity.json").read_text())
    return report["precisions"]
