"""What moves the weights: optimisers with rates by depth, and the moving average."""

from typing import Any

import torch
from torch import nn

from tlpipe.learning.classifier import Classifier
from tlpipe.learning.recipe import Recipe
from tlpipe.learning.schedule import Rates

_MOMENTUM = 0.9


def make_optimiser(
    model: Classifier, rates: Rates, recipe: Recipe, device: torch.device
) -> torch.optim.Optimizer:
    """Return an optimiser with a group for each depth, once with and once without weight decay."""
    groups: list[dict[str, Any]] = []
    for depth, parameters in model.parameters_by_depth():
        rate = rates.head if depth == 0 else rates.stages * rates.decay ** (depth - 1)
        for decays in (True, False):
            chosen = [p for p in parameters if (p.dim() > 1) == decays]
            if chosen:
                decay = recipe.weight_decay if decays else 0.0
                groups.append({"params": chosen, "rate": rate, "weight_decay": decay})
    if recipe.optimiser == "sgd":
        return torch.optim.SGD(groups, lr=1.0, momentum=_MOMENTUM, fused=device.type != "mps")
    return torch.optim.AdamW(groups, lr=1.0, fused=device.type != "mps")


def move_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the average towards the model; what counts is copied."""
    ours, theirs = average.state_dict(), model.state_dict()
    with torch.no_grad():
        for name, tensor in ours.items():
            if tensor.is_floating_point():
                tensor.lerp_(theirs[name], 1 - decay)
            else:
                tensor.copy_(theirs[name])
