"""What is trained, as a torch module: the open stages, and the head on standardised features.

BatchNorm layers are computed otherwise, under the same names of tensors. Over the batches of
several processes on CPUs they are our own, since torch's ``SyncBatchNorm`` needs a GPU. With
pretrained statistics, a normalisation behind a convolution is a scale of its weights, and need not
be computed on images.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from tlpipe.backbones.backbone import Backbone, load_network
from tlpipe.backbones.batchnorm import is_close, norms_after, pads_same, steps_after
from tlpipe.backbones.frozen import from_pixels
from tlpipe.backbones.weights import Weights
from tlpipe.training import linear_probe
from tlpipe.training.distributed import all_reduce_with_gradient
from tlpipe.training.model import Array, Model


def synchronise_batch_norms(module: nn.Module, device: torch.device) -> None:
    """Let the BatchNorm layers inside a module normalise by the whole batch of all processes."""
    if device.type == "cuda":
        from timm.layers import convert_sync_batchnorm  # torch's loses timm's activations

        convert_sync_batchnorm(module)
        return
    for path, layer in list(module.named_modules()):
        if isinstance(layer, _BatchNorm):
            module.set_submodule(path, _SharedNorm(layer))


def fold_batch_norms(module: nn.Module, inputs: Tensor) -> int:
    """Fold BatchNorm layers with pretrained statistics into the convolutions before them.

    TensorFlow's padding has its odd row at the end, torch's at the beginning; so networks that came
    from there pad in a step of its own, which costs as much as the convolution. Where a network
    sees pictures upside down, and its kernels are turned with them, torch's own padding is right.

    Gradients are those of the layer: they flow through the scale. ``inputs``: some to look with.
    Returns: how many were folded; none where the result would differ.

    Source: Jacob et al. (2018), Quantization and training of neural networks, eq. 14.
    """
    # Tensor cores would round away what is compared.
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expected = module(inputs)
        pairs = norms_after(module, inputs)
        turns = any(pads_same(convolution) for convolution, _ in pairs)
        for is_turned in (True, False) if turns else (False,):
            undo = _replace(module, pairs, is_turned=is_turned)
            if is_close(expected, module(inputs)):
                return len(pairs)
            undo()
    return 0


def _replace(
    module: nn.Module, pairs: list[tuple[nn.Conv2d, _BatchNorm]], *, is_turned: bool
) -> Callable[[], None]:
    """Replace the layers by folded ones; return what puts them back."""
    paths = {layer: path for path, layer in module.named_modules()}
    for convolution, norm in pairs:
        folded = _FoldedNorm(norm)
        module.set_submodule(paths[norm], folded)
        replaced = _FoldedConvolution(convolution, folded, is_turned=is_turned)
        module.set_submodule(paths[convolution], replaced)
    turning = module.register_forward_pre_hook(_turn) if is_turned else None

    def undo() -> None:
        for convolution, norm in pairs:
            module.set_submodule(paths[norm], norm)
            module.set_submodule(paths[convolution], convolution)
        if turning is not None:
            turning.remove()

    return undo


def _turn(_: nn.Module, arguments: tuple[Tensor]) -> Tensor:
    """Turn inputs (B, C, H, W) upside down and left to right."""
    return arguments[0].flip(2, 3)


class ReplacedNorm(nn.Module):
    """The tensors of a BatchNorm layer, and what comes after normalising."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.register_parameter("weight", layer.weight)
        self.register_parameter("bias", layer.bias)
        for name, buffer in layer.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        self.eps, self.momentum = layer.eps, layer.momentum
        self._after = steps_after(layer)
        self.train(layer.training)

    def finish(self, x: Tensor) -> Tensor:
        """Do what comes after the normalisation."""
        for module in self._after:
            x = module(x)
        return x


class _FoldedNorm(ReplacedNorm):
    """A layer whose normalisation the convolution before it has done."""

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(x)


class _FoldedConvolution(nn.Module):
    """A convolution that also normalises, with pretrained statistics."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, layer: Any, norm: _FoldedNorm, *, is_turned: bool) -> None:
        super().__init__()
        self.register_parameter("weight", layer.weight)
        self.register_parameter("bias", layer.bias)
        self._norm = [norm]  # in a list: its tensors have their own place in the network
        self._settings = (layer.stride, layer.padding, layer.dilation, layer.groups)
        self._pads_same, self._is_turned = pads_same(layer), is_turned

    def forward(self, x: Tensor) -> Tensor:
        (norm,) = self._norm
        stride, padding, dilation, groups = self._settings
        kernel = self.weight.shape[-2:]
        if self._pads_same and self._is_turned:
            padding = _half_of_same(x.shape[-2:], kernel, stride, dilation)
        elif self._pads_same:
            from timm.layers.padding import pad_same

            x = pad_same(x, kernel, stride, dilation)
        assert norm.weight is not None and norm.bias is not None
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        shift = norm.bias - norm.running_mean * scale
        if self.bias is not None:
            shift = shift + self.bias * scale
        weight = self.weight * scale.reshape(-1, 1, 1, 1)
        if self._is_turned and max(kernel) > 1:
            weight = weight.flip(2, 3)
        x = functional.conv2d(x, weight, None, stride, padding, dilation, groups)
        return x.add_(shift.reshape(-1, 1, 1))  # faster than the bias of the convolution


def _half_of_same(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """Return how much each side of height and width is padded, the larger half where it is odd."""
    from timm.layers.padding import get_same_padding

    sides = zip(size, kernel, stride, dilation, strict=True)
    return [-(-int(get_same_padding(*side)) // 2) for side in sides]


class _SharedNorm(ReplacedNorm):
    """A BatchNorm layer over the batches of all processes; torch's SyncBatchNorm needs a GPU.

    Counts and statistics are float32 at least: bfloat16 has no 97,216, it would count 97,280.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            running = (self.running_mean, self.running_var)
            x = functional.batch_norm(x, *running, self.weight, self.bias, eps=self.eps)
            return self.finish(x)
        over = [axis for axis in range(x.dim()) if axis != 1]
        shape = [-1 if axis == 1 else 1 for axis in range(x.dim())]
        given, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))
        count = all_reduce_with_gradient(x.new_tensor(float(x.numel() // x.shape[1])))
        mean = all_reduce_with_gradient(x.sum(over)) / count
        centred = x - mean.view(shape)
        var = all_reduce_with_gradient((centred**2).sum(over)) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
            self.num_batches_tracked.add_(1)
        scale = torch.rsqrt(var + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        x = centred * scale.view(shape)
        x = x if self.bias is None else x + self.bias.view(shape)
        return self.finish(x.to(given))


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

    def standardise(self, standard: linear_probe.Standardisation) -> None:
        """Set what the head sees of features."""
        self.mean.copy_(torch.from_numpy(standard.mean))
        self.scale.copy_(torch.from_numpy(standard.scale))

    def solve(self, head: linear_probe.Head) -> None:
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
        before = [_log_variance(layer) for layer in self.batch_norms]
        estimate_statistics(self.stages, inputs)
        shifts = [
            float((_log_variance(layer) - old).abs().mean() / 2)
            for layer, old in zip(self.batch_norms, before, strict=True)
        ]
        return sum(shifts) / len(shifts)

    @property
    def batch_norms(self) -> list[_BatchNorm]:
        """The layers that normalise by statistics of images."""
        return batch_norms(self)

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
        standard = linear_probe.Standardisation(
            self.mean.cpu().double().numpy(), self.scale.cpu().double().numpy()
        )
        (weight, bias), *others = layers
        first = standard.fold(linear_probe.Head(weight.astype(np.float64), bias.astype(np.float64)))
        return ((first.weight.astype(np.float32), first.bias.astype(np.float32)), *others)


def batch_norms(network: nn.Module) -> list[_BatchNorm]:
    """Return the layers that normalise by statistics of images."""
    return [module for module in network.modules() if isinstance(module, _BatchNorm)]


def estimate_statistics(network: nn.Module, inputs: Iterable[Tensor]) -> None:
    """Estimate the statistics of all BatchNorm layers anew, as plain averages over all batches."""
    layers = batch_norms(network)
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
        layer.train()
    with torch.no_grad():
        for batch in inputs:
            network(batch)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        layer.eval()


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


def full_network(backbone: Backbone, weights: Weights, model: Model) -> nn.Sequential:
    """Return frozen and trained stages together: from images (N, H, W, 3) uint8 RGB to logits."""
    network = from_pixels(load_network(backbone, weights), backbone.preprocessing)
    frozen = list(network)[: 1 + backbone.position(model.card.origin.boundary)]
    return nn.Sequential(*frozen, restore(backbone, weights, model)).eval()
