"""Every family of backbones becomes a graph that answers as torch does; weights are random."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn.modules.batchnorm import _BatchNorm

from tests.features.test_stages import FAMILIES
from tests.learning.test_loop import build_network
from tlpipe import files
from tlpipe.features.activations import Origin
from tlpipe.features.augment import Augmentation
from tlpipe.features.backbone import Backbone, describe
from tlpipe.features.weights import Weights
from tlpipe.learning.classifier import whole
from tlpipe.learning.model import Card, Model
from tlpipe.onnx_export import graph, parity, precisions

CLASSES = 5
# With random weights these see no difference between images until BatchNorm knows some.
ALIKE = ("timm/repvgg_a0", "timm/efficientvit_b0")
# The same architectures, in timm, as those of torchvision above.
TWINS = (
    *("timm/convnext_atto", "timm/regnety_002", "timm/resnet18"),
    "timm/swin_tiny_patch4_window7_224",
)


def model(backbone: Backbone, weight: np.ndarray, bias: np.ndarray) -> Model:
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
        penalty=None,
        epoch=0,
        validation_accuracy=0.0,
        validation_loss=0.0,
    )
    return Model(card, {}, ((weight, bias),))


def drawn_weights(name: str, folder: Path, images: np.ndarray) -> Weights:
    """Random weights in a file; BatchNorm knows some images, else all would look alike."""
    network = build_network(name)
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = None
    network.train()
    with torch.no_grad():
        network(torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1)
    path = folder / "weights.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in network.state_dict().items()}, path)
    return Weights(path, files.sha256(path))


def told_apart(
    backbone: Backbone, weights: Weights, images: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A random head whose logits have a spread of one on these images."""
    width = backbone.stages[-1].shape[0]
    # Features that all images share would drown what tells them apart.
    with torch.inference_mode():
        frozen = whole(backbone, weights, model(backbone, np.zeros((1, width)), np.zeros(1)))[:-1]
        features = frozen(torch.from_numpy(images)).double().numpy()
    shared = features.mean(axis=0)
    weight = np.random.default_rng(0).normal(size=(CLASSES, width))
    weight -= np.outer(weight @ shared, shared) / (shared @ shared)
    weight /= (features @ weight.T).std()
    return weight.astype(np.float32), np.zeros(CLASSES, np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in TWINS])
def test_the_exported_graph_answers_as_torch_does(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits are scaled to a spread of one, so that a difference means something."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    backbone = describe(name)
    side = backbone.preprocessing.crop_px
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (4, side, side, 3), dtype=np.uint8)
    images[1] = images[1] // 8 + 100
    images[2] = np.linspace(0, 255, side, dtype=np.uint8)[:, None, None]
    weights = drawn_weights(name, tmp_path, images) if name in ALIKE else Weights(None, "")
    drawn = model(backbone, *told_apart(backbone, weights, images))
    expected = parity.in_torch(drawn, backbone, weights)(images)
    assert expected.std() == pytest.approx(1, abs=0.01)
    content = graph.finished(graph.classifier(backbone, weights, drawn), 1.0, {})
    found = parity.in_onnx(content, threads=2)(images)
    parity.check(parity.compare(expected, found), 1e-4)


def test_eight_bits_of_another_network_answer_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "resnet18"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    backbone = describe(name)
    side = backbone.preprocessing.crop_px
    coarse = np.random.default_rng(0).integers(0, 256, (32, 7, 7, 3), dtype=np.uint8)
    images = np.ascontiguousarray(
        np.repeat(np.repeat(coarse, side // 7, axis=1), side // 7, axis=2)
    )
    weights = drawn_weights(name, tmp_path, images)
    exact = graph.classifier(
        backbone, weights, model(backbone, *told_apart(backbone, weights, images))
    )
    sample = parity.Sample(images, side, range(24), np.zeros(24, np.int64))  # type: ignore[arg-type]
    rounded = precisions.to_int8(exact, sample, threads=2)
    assert rounded.ByteSize() < 0.4 * exact.ByteSize()
    expected, found = (
        parity.in_onnx(content.SerializeToString(), threads=2)(images[24:])
        for content in (exact, rounded)
    )
    assert np.corrcoef(expected.ravel(), found.ravel())[0, 1] > 0.9
