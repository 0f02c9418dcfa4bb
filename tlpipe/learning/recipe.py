"""How a classifier is trained: what users may set, and what is good where they do not."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from tlpipe.learning.schedule import Rates, default_rates
from tlpipe.params import Section

_BATCH = 32  # where nothing is set


class Recipe(Section):
    """How the head is solved; then, where a stage is open or the head has hidden units, tuned."""

    penalties: tuple[PositiveFloat, ...] = Field(
        default=(0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
        min_length=1,
        strict=False,
        description="l2 of the linear probe to try; four-fold cross-validation picks one.",
    )
    max_iterations: int = Field(
        default=1000, ge=1, description="Upper bound on the solver's iterations for one l2."
    )
    epochs: int = Field(default=10, ge=1, description="Passes over the training images.")
    batch: int | None = Field(
        default=None,
        ge=1,
        description="Images in one step, over all processes together; by default 32 at most.",
    )
    seed: int = Field(default=0, ge=0, description="Of the order of images and all that is drawn.")
    hidden: tuple[PositiveInt, ...] = Field(
        default=(), strict=False, description="Units of the head's hidden layers."
    )
    reinitialise: int = Field(
        default=0, ge=0, description="How many of the last stages forget their weights."
    )
    optimiser: Literal["adamw", "sgd"] = Field(
        default="adamw", description="SGD goes with momentum 0.9."
    )
    head_rate: float | None = Field(
        default=None,
        gt=0,
        description="Largest learning rate of the head; by default the family's.",
    )
    stage_rate: float | None = Field(
        default=None, ge=0, description="Largest learning rate of the last stage."
    )
    stage_decay: float | None = Field(
        default=None, gt=0, le=1, description="Its share that each stage before gets, in turn."
    )
    batch_norm: Literal["auto", "pretrained", "batch"] = Field(
        default="auto",
        description="Statistics of open BatchNorm layers: kept, of batches, or as images differ.",
    )
    warmup: float = Field(
        default=0.1, ge=0, lt=1, description="Share of all steps in which rates rise."
    )
    weight_decay: float = Field(
        default=0.01, ge=0, description="Of weights; biases and normalisation have none."
    )
    clip: float = Field(
        default=1.0, gt=0, description="Longest gradient, over all parameters together."
    )
    label_smoothing: float = Field(
        default=0.1, ge=0, lt=1, description="Share of each label given to all classes."
    )
    mix: Literal["none", "mixup", "cutmix"] = Field(
        default="none", description="Train on pairs of images and their labels, mixed."
    )
    mix_alpha: float = Field(
        default=0.2, gt=0, description="How evenly pairs are mixed: both parameters of a Beta."
    )
    balance: Literal["none", "loss", "sampling"] = Field(
        default="none", description="Count rare classes as much as others: weigh, or draw more."
    )
    average: float = Field(
        default=0.0, ge=0, lt=1, description="Decay of the weights' moving average; 0: the last."
    )
    metric: Literal["loss", "accuracy", "balanced_accuracy", "macro_f1"] = Field(
        default="accuracy", description="On validation; picks the epoch that is kept."
    )
    patience: int | None = Field(
        default=None, ge=1, description="Stop after so many epochs without a better one."
    )
    unfreeze_epochs: int = Field(
        default=0, ge=0, description="Open one more stage after so many epochs; 0: all at once."
    )
    checkpoint_minutes: float = Field(
        default=10.0, gt=0, description="Save at least so often, beside every epoch's end."
    )

    def batch_size(self, images: int) -> int:
        """Return how many images one step has, of so many for training."""
        return self.batch or min(_BATCH, images)

    def rates(self, backbone: str) -> Rates:
        """Return what was set, and the family's rates for the rest."""
        default = default_rates(backbone, self.optimiser)
        given = Rates(self.head_rate, self.stage_rate, self.stage_decay)  # type: ignore[arg-type]
        chosen = (
            known if value is None else value for value, known in zip(given, default, strict=True)
        )
        return Rates(*chosen)
