"""A network of three stages with 3x3 convolutions and BatchNorm, and what trains it in a moment."""

from collections import OrderedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tlpipe.training.classifier import Classifier, build
from tlpipe.training.model import Examples
from tlpipe.training.trainer import Task

CPU = torch.device("cpu")


def gradient(parameter: nn.Parameter) -> Tensor:
    """Return a copy of the gradient, which has been computed."""
    assert parameter.grad is not None
    return parameter.grad.clone()


def statistics(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the running mean and variance of a BatchNorm."""
    assert isinstance(layer, _BatchNorm)
    assert layer.running_mean is not None and layer.running_var is not None
    return layer.running_mean, layer.running_var


class Rows:
    """Feeds the rows of a tensor as they are, and remembers which were asked for in training."""

    def __init__(self, inputs: Tensor) -> None:
        self.inputs = inputs
        self.trained: list[npt.NDArray[np.int64]] = []

    def augmented(self, rows: npt.NDArray[np.int64], uniforms: npt.NDArray[np.float64]) -> Tensor:
        self.trained.append(rows)
        return self.plain(rows)

    def plain(self, rows: npt.NDArray[np.int64]) -> Tensor:
        return self.inputs[torch.from_numpy(rows)]


def stages(dropout: float = 0.0) -> nn.Sequential:
    """As in ResNet: k x k convolutions, whose memory layout differs between formats."""

    def block(inner: int, outer: int, stride: int) -> nn.Module:
        layers = (nn.Conv2d(inner, outer, 3, stride, padding=1), nn.BatchNorm2d(outer), nn.ReLU())
        return nn.Sequential(*layers, nn.Dropout(dropout))

    torch.manual_seed(0)
    end = nn.Sequential(block(6, 8, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(OrderedDict(one=block(3, 4, 1), two=block(4, 6, 2), three=end))


def task(
    labels: list[int],
    *,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
    batch_stats: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> Task:
    """Train the network on pictures of noise, those of higher classes brighter."""
    targets = np.array(labels)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(len(labels), 3, 8, 8, generator=generator, dtype=dtype)
    images += torch.from_numpy(targets).reshape(-1, 1, 1, 1)
    classes = int(targets.max()) + 1
    classifier = build(stages(dropout), 8, (), classes, seed=0).to(dtype).eval()
    classifier.to(memory_format=torch.channels_last)
    classifier.uses_batch_stats = batch_stats
    examples = Examples(np.arange(len(labels)), targets)
    feed = Rows(images.contiguous(memory_format=torch.channels_last))
    return Task(classifier, feed, examples, examples, classes, CPU, rank, world_size)


def linear_task(features: Tensor, labels: list[int]) -> Task:
    """Train a linear head, from zero, on features (N, D) as they are."""
    targets = np.array(labels)
    classes = int(targets.max()) + 1
    layer = nn.Linear(features.shape[1], classes)
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    classifier = Classifier(nn.Sequential(), [layer]).to(features.dtype)
    examples = Examples(np.arange(len(labels)), targets)
    return Task(classifier, Rows(features), examples, examples, classes, CPU)
