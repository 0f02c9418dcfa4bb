"""What is trained, as a torch module: the open stages, and the head on standardised features."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tlpipe.backbones.backbone import Backbone, load_network
from tlpipe.backbones.frozen import from_pixels
from tlpipe.backbones.weights import Weights
from tlpipe.training import head as heads
from tlpipe.training.model import Array, Model


class Classifier(nn.Module):
    """From what the last frozen stage gives, (B, ...) float32, to logits (B, C) float32."""

    mean: Tensor
    scale: Tensor

    def __init__(self, stages: nn.Sequential, layers: Sequence[nn.Linear]) -> None:
        """Put together stages and the head's layers; features are not standardised as yet."""
        super().__init__()
        self.stages = stages
        self.register_buffer("mean", torch.zeros(layers[0].in_features))
        self.register_buffer("scale", torch.ones(layers[0].in_features))
        between = [module for layer in layers for module in (layer, nn.ReLU())]
        self.head = nn.Sequential(*between[:-1])
        self.uses_batch_stats = False
        for module in stages.modules():
            if isinstance(module, nn.Hardtanh):  # and ReLU6: in place, torch copies it all before
                module.inplace = False

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits."""
        features = self.stages(inputs)
        logits: Tensor = self.head((features - self.mean) / self.scale)
        return logits

    @property
    def layers(self) -> list[nn.Linear]:
        """The head's linear layers."""
        return [module for module in self.head if isinstance(module, nn.Linear)]

    def standardise(self, standard: heads.Standardisation) -> None:
        """Set what the head sees of features."""
        self.mean.copy_(torch.from_numpy(standard.mean))
        self.scale.copy_(torch.from_numpy(standard.scale))

    def solve(self, head: heads.Head) -> None:
        """Set the head of one layer to one for standardised features."""
        (layer,) = self.layers
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(head.weight))
            layer.bias.copy_(torch.from_numpy(head.bias))

    def adapt(self, inputs: Iterable[Tensor]) -> float:
        """Estimate the BatchNorm statistics anew, and train with batch statistics.

        Returns: by how much the logarithms of standard deviations differ from those before, on
        average over channels and layers.

        Source: Li et al. (2018), Adaptive batch normalization for practical domain adaptation,
        Pattern Recognition 80, algorithm 1.
        """
        self.uses_batch_stats = True
        layers = self.batch_norms
        momenta = [layer.momentum for layer in layers]
        before = [_log_variance(layer) for layer in layers]
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # a plain average over all batches
            layer.train()
        with torch.no_grad():
            for batch in inputs:
                self.stages(batch)
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
            layer.eval()
        shifts = [
            float((_log_variance(layer) - old).abs().mean() / 2)
            for layer, old in zip(layers, before, strict=True)
        ]
        return sum(shifts) / len(shifts)

    @property
    def batch_norms(self) -> list[_BatchNorm]:
        """The layers that normalise by statistics of images."""
        return [module for module in self.modules() if isinstance(module, _BatchNorm)]

    def open_last(self, count: int) -> None:
        """Train the head and the last ``count`` stages; others keep weights and statistics."""
        self.train()
        for number, stage in enumerate(self.stages):
            is_open = number >= len(self.stages) - count
            stage.train(is_open)
            stage.requires_grad_(is_open)
        if not self.uses_batch_stats:
            for layer in self.batch_norms:
                layer.eval()

    def parts_by_depth(self) -> Iterator[tuple[int, nn.Module]]:
        """Yield the head as depth 0, the last stage as 1, and so on."""
        yield 0, self.head
        yield from enumerate(reversed(self.stages), start=1)

    def folded_head(self) -> tuple[tuple[Array, Array], ...]:
        """Return weight and bias of each layer, for features as they are."""
        layers = [
            (layer.weight.detach().cpu().numpy(), layer.bias.detach().cpu().numpy())
            for layer in self.layers
        ]
        standard = heads.Standardisation(
            self.mean.cpu().double().numpy(), self.scale.cpu().double().numpy()
        )
        (weight, bias), *others = layers
        first = standard.fold(heads.Head(weight.astype(np.float64), bias.astype(np.float64)))
        return ((first.weight.astype(np.float32), first.bias.astype(np.float32)), *others)


def _log_variance(layer: _BatchNorm) -> Tensor:
    assert layer.running_var is not None
    return torch.log(layer.running_var + layer.eps)


def open_part(backbone: Backbone, weights: Weights, boundary: str) -> nn.Sequential:
    """Return the pretrained stages behind the boundary."""
    count = backbone.position(boundary)
    if count == len(backbone.stages):
        return nn.Sequential()
    network = load_network(backbone, weights)
    return nn.Sequential(OrderedDict(list(network.named_children())[count:]))


def build(
    stages: nn.Sequential, width: int, hidden: Sequence[int], classes: int, seed: int
) -> Classifier:
    """Return a classifier whose head's weights are drawn with a seed."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        sizes = [width, *hidden, classes]
        layers = [nn.Linear(*pair) for pair in pairwise(sizes)]
    return Classifier(stages, layers)


def restore(backbone: Backbone, weights: Weights, model: Model) -> Classifier:
    """Return a trained classifier, in evaluation mode."""
    stages = open_part(backbone, weights, model.card.origin.boundary)
    if len(stages):
        stages.load_state_dict({name: torch.from_numpy(t) for name, t in model.stages.items()})
    layers = []
    for weight, bias in model.head:
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)})
        layers.append(layer)
    return Classifier(stages, layers).eval()


def full_network(backbone: Backbone, weights: Weights, model: Model) -> nn.Module:
    """Return frozen and trained stages together: from images (N, H, W, 3) uint8 RGB to logits."""
    network = from_pixels(load_network(backbone, weights), backbone.preprocessing)
    frozen = list(network)[: 1 + backbone.position(model.card.origin.boundary)]
    return nn.Sequential(*frozen, restore(backbone, weights, model)).eval()
