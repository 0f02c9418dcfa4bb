"""Optimisers with a learning rate and weight decay for each depth, and the EMA of the weights."""

import math
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_ema_multi_avg_fn

from tlpipe.training.batchnorm import ReplacedNorm
from tlpipe.training.classifier import Classifier
from tlpipe.training.recipe import Recipe
from tlpipe.training.schedule import LearningRates

_MOMENTUM = 0.9
_EMA_WARMUP_POWER = 2 / 3


def make_optimiser(
    model: Classifier, learning_rates: LearningRates, recipe: Recipe, device: torch.device
) -> torch.optim.Optimizer:
    """Return an optimiser with a group for each depth, once with and once without weight decay.

    Beside what torch knows, a group has ``depth`` (0 the head, 1 the last stage ...) and
    ``peak_lr``.
    """
    groups: list[dict[str, Any]] = []
    for depth, part in model.parts_by_depth():
        peak_lr = learning_rates.head
        if depth > 0:
            peak_lr = learning_rates.backbone * learning_rates.layer_decay ** (depth - 1)
        spared: frozenset[str] = getattr(part, "no_weight_decay", frozenset())
        split: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in part.named_parameters():
            is_weight = parameter.dim() > 1 and not name.endswith(".bias")
            split[is_weight and name not in spared].append(parameter)
        for decays, chosen in split.items():
            if chosen:
                decay = recipe.weight_decay if decays else 0.0
                group = {
                    "params": chosen,
                    "peak_lr": peak_lr,
                    "depth": depth,
                    "weight_decay": decay,
                }
                groups.append(group)
    if recipe.optimiser == "sgd":
        return torch.optim.SGD(groups, lr=1.0, momentum=_MOMENTUM, fused=device.type != "mps")
    return torch.optim.AdamW(groups, lr=1.0, fused=device.type != "mps")


def is_token_normalised(network: nn.Module) -> bool:
    """Return whether LayerNorm and its like, over one token or pixel, outweigh BatchNorm.

    GroupNorm counts as BatchNorm, since it too normalises over an image's places; with a single
    group it is the LayerNorm of MetaFormers. Where no layer normalises, linear layers speak for
    tokens (ResMLP) and convolutions for images (VGG, NFNet).
    """
    by_token = by_image = linear = convolutions = 0
    for module in network.modules():
        # A block such as Conv2dNormActivation is no layer, whatever its name says.
        named = type(module).__name__.lower() if not any(module.children()) else ""
        if isinstance(module, nn.GroupNorm):
            by_image += module.num_groups > 1
            by_token += module.num_groups == 1
        elif isinstance(module, (_BatchNorm, ReplacedNorm)) or "batchnorm" in named:
            by_image += 1
        elif isinstance(module, nn.LayerNorm) or "norm" in named:
            by_token += 1
        linear += isinstance(module, nn.Linear)
        convolutions += isinstance(module, nn.Conv2d)
    return by_token > by_image if by_token or by_image else linear > convolutions


def warmed_up_ema_decay(updates: int, decay: float) -> float:
    """Return the EMA's decay at one of the optimiser's updates, counted from 1.

    It grows from 0, so that a short training is not averaged with the weights it started from.

    Source: timm, ``ModelEmaV3`` with ``use_warmup=True``.
    """
    return min(1 - math.pow(updates, -_EMA_WARMUP_POWER), decay)


def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """Update the EMA weights in place; integer buffers (``num_batches_tracked``) are copied."""
    ours, theirs = ema.state_dict(), model.state_dict()
    averaged = [name for name, tensor in ours.items() if tensor.is_floating_point()]
    with torch.no_grad():
        for name in ours.keys() - set(averaged):
            ours[name].copy_(theirs[name])
        values = ([tensors[name] for name in averaged] for tensors in (ours, theirs))
        get_ema_multi_avg_fn(decay)(*values, 0)  # type: ignore[no-untyped-call]


def restore_optimiser(
    optimiser: torch.optim.Optimizer, state: dict[int, dict[str, torch.Tensor]]
) -> None:
    """Load the state of each parameter, by its number, in the memory layout of the parameter.

    ``load_state_dict`` keeps the layout of what it is given. The fused kernels walk a parameter and
    its statistics side by side in memory: of another layout, each weight would be moved by the
    statistics of another one.
    """
    groups = optimiser.state_dict()["param_groups"]
    optimiser.load_state_dict({"state": state, "param_groups": groups})
    for parameter, values in optimiser.state.items():
        for name, value in values.items():
            if value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
