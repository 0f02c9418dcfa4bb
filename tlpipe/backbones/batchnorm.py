"""BatchNorm layers with pretrained statistics: a scale and a shift of the convolution before them.

Source: Jacob et al. (2018), Quantization and training of neural networks, eq. 14.
"""

import logging
from collections import Counter
from contextlib import ExitStack
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

_log = logging.getLogger(__name__)


def norms_after(module: nn.Module, inputs: Tensor) -> list[tuple[nn.Conv2d, _BatchNorm]]:
    """Return each BatchNorm layer that is called once, on what one convolution has just given."""
    given: dict[int, tuple[Tensor, nn.Conv2d]] = {}
    calls: Counter[nn.Module] = Counter()
    pairs = []

    def after_convolution(layer: nn.Module, _: Any, result: Tensor) -> None:
        calls[layer] += 1
        given[id(result)] = (result, layer)  # type: ignore[assignment]

    def before_norm(layer: nn.Module, arguments: tuple[Tensor]) -> None:
        calls[layer] += 1
        # What a norm has taken need not be held any longer.
        if (convolution := given.pop(id(arguments[0]), None)) is not None:
            pairs.append((convolution[1], layer))

    with ExitStack() as hooks:
        for layer in module.modules():
            if type(layer) is nn.Conv2d or pads_same(layer):
                hooks.enter_context(layer.register_forward_hook(after_convolution))
            elif isinstance(layer, _BatchNorm) and layer.affine and layer.track_running_stats:
                hooks.enter_context(layer.register_forward_pre_hook(before_norm))
        module(inputs)
    return [(c, n) for c, n in pairs if calls[c] == calls[n] == 1]  # type: ignore[misc]


def pads_same(layer: nn.Module) -> bool:
    """Return whether it is timm's convolution that pads as TensorFlow does."""
    return type(layer).__name__ == "Conv2dSame" and isinstance(layer, nn.Conv2d)


def steps_after(layer: Any) -> list[nn.Module]:
    """Return what a BatchNorm layer does after normalising: timm's also activate."""
    return [step for step in (getattr(layer, "drop", None), getattr(layer, "act", None)) if step]


def folded(module: nn.Module, inputs: Tensor) -> nn.Module:
    """Return a copy of a module in evaluation mode that normalises by its convolutions' weights.

    It gives the same, to rounding. Where it would not, as where something else takes what a
    convolution gives, and where there is nothing to fold, the module itself is returned.
    ``inputs``: some to look with.
    """
    with torch.no_grad():
        if not (pairs := norms_after(module, inputs)):
            return module
        merged = deepcopy(module)
        paths = {layer: path for path, layer in module.named_modules()}
        for convolution, norm in pairs:
            merged.set_submodule(paths[convolution], fuse_conv_bn_eval(convolution, norm))
            merged.set_submodule(paths[norm], nn.Sequential(*steps_after(norm)))
        is_same = all(map(is_close, _results(module, inputs), _results(merged, inputs)))
    if not is_same:
        _log.debug("BatchNorm is not folded: something else takes what is before it")
    return merged if is_same else module


def _results(module: nn.Module, inputs: Tensor) -> list[Tensor]:
    given = module(inputs)
    return [given] if isinstance(given, Tensor) else list(given)


def is_close(expected: Tensor, found: Tensor) -> bool:
    """Return whether two results differ by no more than other roundings on the way to them."""
    return torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.std()))
