"""Learning rates over depth and time: layer-wise decay, warm-up, cosine, gradual unfreezing."""

import math
from typing import NamedTuple


class LearningRates(NamedTuple):
    """Peak learning rates of the head and of the last stage, and the layer-wise decay.

    ``layer_decay``: the factor from the learning rate of each stage to that of the one before it.
    """

    head: float
    backbone: float
    layer_decay: float


def default_learning_rates(*, is_token_normalised: bool, optimiser: str) -> LearningRates:
    """Return peak learning rates that suit a kind of network.

    Networks that normalise each token or pixel (LayerNorm: transformers, MLP-Mixers, ConvNeXt)
    forget what they were trained for at learning rates that networks with BatchNorm need.
    """
    backbone, layer_decay = (5e-5, 0.75) if is_token_normalised else (1e-3, 0.8)
    if optimiser == "sgd":  # it moves by the gradient itself, AdamW by its sign
        return LearningRates(0.05, backbone * 20, layer_decay)
    return LearningRates(1e-3, backbone, layer_decay)


def lr_factor(step: int, steps: int, warmup: float, opened: int = 0) -> float:
    """Return the factor on a part's peak learning rate at a step: warm-up, then cosine decay.

    Half a cosine from 1 to 0 behind the warm-up, times a linear rise from the step at which the
    part was opened: the first updates of an optimiser without statistics are of full size.

    ``step``: from 0 to ``steps`` - 1; ``warmup``: the share of all steps that a rise takes;
    ``opened``: the first step in which the part is trained.

    Source: Loshchilov and Hutter (2017), SGDR, eq. 5, without restarts; Goyal et al. (2017),
    Accurate, large minibatch SGD, section 2.2.
    """
    rise = max(round(warmup * steps), 1)
    cosine = 0.5 * (1 + math.cos(math.pi * max(step - rise, 0) / max(steps - rise, 1)))
    return cosine * min((step - opened + 1) / rise, 1.0)


def open_stages(epoch: int, stages: int, unfreeze_epochs: int) -> int:
    """Return how many of the last stages are trained in an epoch, counted from 0.

    ``unfreeze_epochs``: after how many epochs another stage is opened; 0 opens all at once.

    Source: Howard and Ruder (2018), Universal language model fine-tuning, section 3.3.
    """
    return min(epoch // unfreeze_epochs, stages) if unfreeze_epochs else stages


def opening_epoch(depth: int, unfreeze_epochs: int) -> int:
    """Return the first epoch in which a part is trained; ``depth``: 0 the head, 1 the last stage.

    The inverse of ``open_stages``.
    """
    return depth * unfreeze_epochs
