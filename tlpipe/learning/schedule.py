"""How fast each part of the network learns, and when: pure functions of depth and step."""

import math
import re
from typing import NamedTuple


class Rates(NamedTuple):
    """Largest learning rates of the head and of the last stage, and how they fall with depth.

    ``decay``: the share of its rate that each stage hands to the one before it.
    """

    head: float
    stages: float
    decay: float


# Networks that normalise by tokens forget at rates that those with BatchNorm need.
_DELICATE = re.compile(r"vit|swin|deit|beit|eva|cait|xcit|mixer|convnext|coat|former|clip|dino")


def default_rates(backbone: str, optimiser: str) -> Rates:
    """Return rates that suit a family of networks."""
    rates = Rates(1e-3, 5e-5, 0.75) if _DELICATE.search(backbone) else Rates(1e-3, 1e-3, 0.8)
    # SGD moves by the gradient itself, AdamW by its sign.
    return rates._replace(head=0.05, stages=rates.stages * 20) if optimiser == "sgd" else rates


def progress_factor(step: int, steps: int, warmup: float) -> float:
    """Return what share of its rate is used at a step: a linear rise, then half a cosine to zero.

    ``step``: from 0 to ``steps`` - 1; ``warmup``: the share of all steps that the rise takes.

    Source: Loshchilov and Hutter (2017), SGDR, eq. 5, without restarts.
    """
    rise = max(round(warmup * steps), 1)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1)))


def open_stages(epoch: int, stages: int, unfreeze_epochs: int) -> int:
    """Return how many of the last stages are trained in an epoch, counted from 0.

    ``unfreeze_epochs``: after how many epochs another stage is opened; 0 opens all at once.

    Source: Howard and Ruder (2018), Universal language model fine-tuning, section 3.3.
    """
    return min(epoch // unfreeze_epochs, stages) if unfreeze_epochs else stages
