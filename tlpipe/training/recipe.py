"""Hyperparameters of training and their defaults; learning rates over depth and time.

Layer-wise decay, warm-up, cosine and gradual unfreezing are plain functions of the step. timm's
``param_groups_layer_decay`` has no effect on torchvision's networks, which have no
``group_matcher``, and decays by its own grouping, not by the stages that ``embed.freeze`` names.
"""

import math
from typing import Annotated, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt

from tlpipe.params import Section, distinct


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


_BATCH = 32  # where nothing is set


class Recipe(Section):
    """How the head is solved; then, where a stage is open or the head has hidden units, tuned."""

    l2: Annotated[tuple[PositiveFloat, ...], AfterValidator(distinct)] = Field(
        default=(0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
        min_length=1,
        strict=False,
        description="Strengths of the linear probe's l2 penalty to try; four-fold "
        "cross-validation picks one.",
    )
    max_iterations: int = Field(
        default=1000, ge=1, description="Upper bound on the solver's iterations for one l2."
    )
    fit_on: Literal["train_and_validation", "train"] = Field(
        default="train_and_validation",
        description="Where a linear probe is all that is trained: which splits its head is fitted "
        "on. 'train' leaves validation to choose by, as 'tlpipe sweep' does.",
    )
    epochs: int = Field(default=10, ge=1, description="Passes over the training images.")
    batch_size: int | None = Field(
        default=None,
        ge=1,
        description="Most images in one step, over all processes together; by default 32. An "
        "epoch is split evenly: 33 images are steps of 17 and 16.",
    )
    seed: int = Field(
        default=0,
        ge=0,
        description="Seed of the order of images, augmentation, mixup and dropout.",
    )
    hidden: tuple[PositiveInt, ...] = Field(
        default=(), strict=False, description="Units of the head's hidden layers."
    )
    reinitialise: int = Field(
        default=0, ge=0, description="How many of the last stages start from random weights."
    )
    optimiser: Literal["adamw", "sgd"] = Field(
        default="adamw", description="SGD goes with momentum 0.9."
    )
    head_lr: float | None = Field(
        default=None,
        gt=0,
        description="Peak learning rate of the head; by default what suits the network.",
    )
    backbone_lr: float | None = Field(
        default=None, ge=0, description="Peak learning rate of the last stage."
    )
    layer_decay: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Layer-wise learning-rate decay: the factor from each stage to the one before.",
    )
    batch_norm: Literal["auto", "pretrained", "batch"] = Field(
        default="auto",
        description="Statistics of open BatchNorm layers: pretrained, of batches, or, with auto, "
        "whichever suits how far the images differ from those of pretraining.",
    )
    warmup: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Linear warm-up of the learning rates, as a share of all steps.",
    )
    weight_decay: float = Field(
        default=0.01,
        ge=0,
        description="Weight decay; not on biases, normalisation layers and position embeddings.",
    )
    max_grad_norm: float = Field(
        default=1.0, gt=0, description="Gradient clipping: the largest global gradient norm."
    )
    label_smoothing: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Label smoothing: share of each label spread over all classes.",
    )
    mixup: Literal["none", "mixup", "cutmix"] = Field(
        default="none", description="Train on mixed pairs of images and labels: mixup or CutMix."
    )
    mixup_alpha: float = Field(
        default=0.2, gt=0, description="Both parameters of the Beta distribution of mixing shares."
    )
    balance: Literal["none", "loss", "sampling"] = Field(
        default="none", description="Class balancing: weight the loss, or oversample rare classes."
    )
    ema_decay: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Decay of the exponential moving average (EMA) of weights, reached after a "
        "warm-up; 0: no EMA.",
    )
    metric: Literal["auto", "loss", "accuracy", "balanced_accuracy", "macro_f1"] = Field(
        default="auto",
        description="On validation; picks the epoch that is kept. 'auto': balanced_accuracy where "
        "balance is set, else accuracy.",
    )
    patience: int | None = Field(
        default=None, ge=1, description="Early stopping: epochs without a better one."
    )
    unfreeze_epochs: int = Field(
        default=0,
        ge=0,
        description="Gradual unfreezing: open one more stage after so many epochs; 0: all at once.",
    )
    checkpoint_minutes: float = Field(
        default=10.0, gt=0, description="Save at least so often, beside every epoch's end."
    )

    def batch_size_for(self, images: int) -> int:
        """Return how many of ``images`` training images one step has at most."""
        return self.batch_size or min(_BATCH, images)

    @property
    def selection_metric(self) -> str:
        """The metric that picks the epoch: a field of ``Measured``.

        Where rare classes are to count as much as others, plain accuracy would keep an epoch that
        ignores them.
        """
        if self.metric != "auto":
            return self.metric
        return "accuracy" if self.balance == "none" else "balanced_accuracy"

    def learning_rates(self, *, is_token_normalised: bool) -> LearningRates:
        """Return the learning rates that were set, and what suits the network for the rest."""
        default = default_learning_rates(
            is_token_normalised=is_token_normalised, optimiser=self.optimiser
        )
        given = LearningRates(self.head_lr, self.backbone_lr, self.layer_decay)  # type: ignore[arg-type]
        chosen = (
            known if value is None else value for value, known in zip(given, default, strict=True)
        )
        return LearningRates(*chosen)


def class_weights(labels: npt.NDArray[np.int64], classes: int) -> npt.NDArray[np.float64]:
    """Return the weight of each class (C,) under which all classes count the same.

    N / (C * n_c) of n_c images: the mean over the N images is 1. ``labels``: (N,) in [0, C).

    Source: King and Zeng (2001), Logistic regression in rare events data, section 4.2; this is
    scikit-learn's ``class_weight="balanced"``.
    """
    counts = np.bincount(labels, minlength=classes)
    return len(labels) / (classes * np.maximum(counts, 1.0))
