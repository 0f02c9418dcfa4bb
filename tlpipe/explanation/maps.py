"""What a network makes of an image, place by place: its maps, Grad-CAM, receptive fields.

A map is what an operation gives for each place of a grid laid over the image. Convolutional
networks give it as (B, C, S, S), Swin and others that keep channels last as (B, S, S, C), vision
transformers as tokens (B, T, C), with those of no place, such as the class token, first.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn

from tlpipe.backbones.backbone import Backbone, load_network
from tlpipe.backbones.frozen import from_pixels
from tlpipe.backbones.weights import Weights
from tlpipe.data.images import Pixels
from tlpipe.training import classifier
from tlpipe.training.model import Array, Model

# More tokens than this of no place would be no class token, distillation token and registers.
_MOST_PREFIX = 8
_LEAST_PLACES = 0.5  # share of a map's places that an answer has to depend on
_PROBES = 2  # images of noise


@dataclass(frozen=True)
class Network:
    """A classifier in parts: what normalises pixels (B, S, S, 3) uint8, its stages, its head.

    Each stage is a traced module; all parts are in evaluation mode, and none has gradients.
    """

    normalise: nn.Module
    stages: Mapping[str, fx.GraphModule]
    head: nn.Module

    def stage_results(self, images: Pixels) -> Iterator[tuple[str, Tensor]]:
        """Yield what each stage gives for images (B, S, S, 3) uint8, in order."""
        with torch.inference_mode():
            current = self.normalise(torch.from_numpy(images))
            for name, stage in self.stages.items():
                current = stage(current)
                yield name, current


def trained(backbone: Backbone, weights: Weights, model: Model) -> Network:
    """Return a trained network."""
    whole = from_pixels(load_network(backbone, weights), backbone.preprocessing)
    normalise, *stages = whole
    restored = classifier.restore(backbone, weights, model)
    frozen = stages[: len(stages) - len(restored.stages)]
    return _network(backbone, normalise, [*frozen, *restored.stages], restored.head)


def pretrained(
    backbone: Backbone, weights: Weights, head: Sequence[tuple[Array, Array]]
) -> Network:
    """Return the network before fine-tuning: pretrained stages, and a head for their features.

    ``head``: (weight (out, in), bias (out,)) of each layer.
    """
    whole = from_pixels(load_network(backbone, weights), backbone.preprocessing)
    normalise, *stages = whole
    layers = []
    for weight, bias in head:
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)})
        layers += [layer, nn.ReLU()]
    return _network(backbone, normalise, stages, nn.Sequential(*layers[:-1]))


def _network(
    backbone: Backbone, normalise: nn.Module, stages: Sequence[nn.Module], head: nn.Module
) -> Network:
    named = dict(zip((stage.name for stage in backbone.stages), stages, strict=True))
    for module in (*stages, head):
        module.eval().requires_grad_(False)
        for layer in module.modules():
            if getattr(layer, "inplace", False):
                layer.inplace = False  # type: ignore[assignment]
    return Network(normalise, cast("Mapping[str, fx.GraphModule]", named), head)


def as_map(given: Tensor) -> Tensor | None:
    """Return a map as (B, C, S, S), or None for what is no map.

    Tokens are those of a square grid, row by row, behind at most ``_MOST_PREFIX`` of no place.
    """
    if given.dim() == 4 and given.shape[2] == given.shape[3] > 1:
        return given
    if given.dim() == 4 and given.shape[1] == given.shape[2] > 1:
        return given.permute(0, 3, 1, 2)
    if given.dim() == 3:
        side = math.isqrt(given.shape[1])
        prefix = given.shape[1] - side**2
        if side > 1 and prefix <= _MOST_PREFIX:
            grid: Tensor = given[:, prefix:].transpose(1, 2).unflatten(2, (side, side))
            return grid
    return None


class _Noting(fx.Interpreter):
    """Runs a stage, and keeps what its operations give."""

    def __init__(self, stage: fx.GraphModule, wanted: str | None = None) -> None:
        super().__init__(stage)
        self._wanted = wanted
        self.noted: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        is_wanted = self._wanted in (None, n.name) and n.op != "placeholder"
        if is_wanted and isinstance(result, Tensor):
            self.noted[n.name] = result
        return result


@dataclass(frozen=True)
class Target:
    """The operation whose map Grad-CAM weighs: its stage, and its name in there."""

    stage: str
    node: str


def last_map(network: Network, images: Pixels) -> Target | None:
    """Return the last operation that gives a map on all of which the answer depends, or None.

    In a convolutional network that is the one before pooling. Where the answer is read off a class
    token, what the last block gives for all other tokens counts for nothing: there it is what the
    block before it gives.

    ``images``: (B, S, S, 3) uint8 RGB, which are run where noise finds none: a head's hidden units
    may all be off on noise.
    """
    seen = network.normalise(torch.from_numpy(images))
    # At least two, since their number tells the first axis of a result from others.
    seen = seen.repeat(-(-_PROBES // len(seen)), 1, 1, 1)
    shape = (_PROBES, *seen.shape[1:])
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(0)) - 0.5
    return _last_map(network, noise) or _last_map(network, seen)


def _last_map(network: Network, current: Tensor) -> Target | None:
    count = len(current)
    with torch.enable_grad():
        current = current.detach().requires_grad_()
        noted: list[tuple[Target, Tensor]] = []
        for name, stage in network.stages.items():
            runner = _Noting(stage)
            current = runner.run(current)
            noted += [(Target(name, node), tensor) for node, tensor in runner.noted.items()]
        score = network.head(current).square().sum()
        for target, tensor in reversed(noted):
            if tensor.shape[0] != count or not tensor.requires_grad or as_map(tensor) is None:
                continue
            (gradient,) = torch.autograd.grad(score, tensor, retain_graph=True, allow_unused=True)
            if gradient is None:
                continue
            places = cast(Tensor, as_map(gradient)).abs().sum(dim=(0, 1))
            if float((places > 0).float().mean()) >= _LEAST_PLACES:
                return target
    return None


def grad_cam(
    network: Network, target: Target, images: Pixels, classes: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Return where each image speaks for its class: (B, S, S) float32, not negative.

    The map's channels are weighed by the mean gradient of the class's logit and added up; what
    speaks against the class is cut off. Of tokens the mean is over those of places.

    Args:
        network: what is looked into.
        target: whose map is weighed, as ``last_map`` finds it.
        images: (B, H, H, 3) uint8 RGB.
        classes: (B,) the number of the class that is asked for.

    Source: Selvaraju et al. (2017), Grad-CAM: visual explanations from deep networks via
    gradient-based localization, ICCV, eq. 1 and 2.
    """
    with torch.enable_grad():
        current = network.normalise(torch.from_numpy(images))
        weighed: Tensor | None = None
        for name, stage in network.stages.items():
            if weighed is None and name != target.stage:
                with torch.no_grad():
                    current = stage(current)
                continue
            if name == target.stage:
                runner = _Noting(stage, target.node)
                current = runner.run(current.detach().requires_grad_() + 0)
                weighed = runner.noted[target.node]
            else:
                current = stage(current)
        assert weighed is not None
        logits = network.head(current)
        score = logits.gather(1, torch.from_numpy(classes)[:, None]).sum()
        (gradient,) = torch.autograd.grad(score, weighed)
    found, slope = as_map(weighed), as_map(gradient)
    assert found is not None and slope is not None
    weights = slope.mean(dim=(2, 3), keepdim=True)
    cam: npt.NDArray[np.float32] = (weights * found).sum(1).relu().detach().numpy()
    return cam


@dataclass(frozen=True)
class Field:
    """What of the image the places of a map can see, along one side, in pixels.

    Place ``n`` sees ``start + n * stride`` to ``start + n * stride + size``, as far as the image
    reaches. Images are squares, and so are maps: rows and columns are alike.
    """

    start: int
    stride: int
    size: int

    def seen(self, place: int, side_px: int) -> tuple[int, int]:
        """Return the first pixel that a place sees, and the one behind the last."""
        low = self.start + place * self.stride
        return max(low, 0), min(low + self.size, side_px)


def receptive_fields(network: Network, side_px: int) -> dict[str, Field | None]:
    """Return for each stage what its places see; None where they see all, or no window that moves.

    A pixel is seen where any channel's gradient by it is not zero. The first two places and the
    last one say all: how far the first ones see forwards, the last one back.

    Source: Luo et al. (2016), Understanding the effective receptive field in deep convolutional
    neural networks, NeurIPS, section 2, for the gradient as what is seen.
    """
    found: dict[str, Field | None] = {}
    noise = torch.rand(3, 3, side_px, side_px, generator=torch.Generator().manual_seed(0))
    with torch.enable_grad():
        images = (noise - 0.5).requires_grad_()
        current = images + 0
        is_whole = False
        for name, stage in network.stages.items():
            found[name] = None
            if is_whole:  # what comes behind sees no less
                continue
            current = stage(current)
            grid = as_map(current)
            is_whole = grid is None or grid.shape[2] < 3
            if grid is None or is_whole:
                continue
            places = torch.tensor([0, 1, grid.shape[2] - 1])
            picked = grid[torch.arange(3), :, places, places].sum()
            (gradient,) = torch.autograd.grad(picked, images, retain_graph=True)
            is_seen = (gradient != 0).any(dim=1).any(dim=1)  # (3, W): by columns
            found[name] = _field(is_seen, grid.shape[2])
            is_whole = found[name] is None
    return found


def _field(is_seen: Tensor, places: int) -> Field | None:
    """Return the field of a map; ``is_seen``: (3, W) by its first, second and last place."""
    if not bool(is_seen.any(dim=1).all()):
        return None
    width = is_seen.shape[1]
    ends = [int(row.nonzero().max()) + 1 for row in is_seen]
    back = int(is_seen[2].nonzero().min())
    stride = ends[1] - ends[0]
    if ends[1] == width or back == 0 or stride < 1:
        return None
    start = back - stride * (places - 1)
    return Field(start, stride, ends[0] - start)
