"""Command ``lr-find``: raise the learning rates from step to step and watch the loss.

Source: Smith (2017), Cyclical learning rates for training neural networks, section 3.3.
"""

from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tlpipe.data import charts
from tlpipe.errors import ParamsError, TrainingError
from tlpipe.progress import track
from tlpipe.training import model
from tlpipe.training.recipe import LearningRates, Recipe
from tlpipe.training.train import check_open

if TYPE_CHECKING:
    from tlpipe.training.trainer import Training

_STEPS = 100
_FACTORS = np.geomspace(1e-3, 1e3, _STEPS)  # of the learning rates that are set
_SMOOTHING, _DIVERGED = 0.9, 4.0


@dataclass(frozen=True)
class Found:
    """``factors`` of the learning rates that were tried, and the smoothed ``losses`` in nats.

    ``best``: the place in them where the loss fell fastest, and the ``learning_rates`` there; None
    where it never fell. ``open_stages``: how many stages have a learning rate of their own.
    """

    factors: npt.NDArray[np.float64]
    losses: npt.NDArray[np.float64]
    best: int | None
    learning_rates: LearningRates | None
    open_stages: int = 0


def run(*, activations: Path, pixels: Path, split: Path, plot: Path, params: Recipe) -> Found:
    """Try learning rates on the training images and plot the losses; nothing else is written.

    Raises:
        ArtifactError: activations and split table are of different data.
        ParamsError: nothing is trained step by step, or an option can have no effect.
    """
    data = model.load_dataset(activations, split)
    if not data.open_stages and not params.hidden:
        raise ParamsError(
            f"embed.freeze is {data.activations.origin.freeze} and train.hidden is empty; a linear "
            f"head is solved without a learning rate. Open a stage, then 'dvc repro embed'."
        )
    check_open(data, params)
    from tlpipe.training import trainer, tuning

    task, _ = tuning.prepare(data, pixels, params)
    training = trainer.Training(task, params, None)
    losses = try_learning_rates(training)
    found = choose(_FACTORS[: len(losses)], smoothed(losses), training.learning_rates)
    found = replace(found, open_stages=data.open_stages)
    _draw(plot, found)
    return found


def try_learning_rates(training: "Training") -> npt.NDArray[np.float64]:
    """Take a step at each of the factors, and return the losses until they explode.

    Raises:
        TrainingError: the first loss is no number.
    """
    from tlpipe.training.batches import batches

    task, recipe = training.task, training.recipe
    training.model.open_last(len(training.model.stages))
    order = (
        places
        for epoch in count()
        for places in batches(
            task.train,
            size=recipe.batch_size_for(len(task.train)),
            seed=recipe.seed,
            epoch=epoch,
            weights=training.sampling_probabilities,
        )
    )
    losses = np.empty(0)
    for step, factor in track(enumerate(_FACTORS), total=_STEPS, description="lr-find"):
        training.set_learning_rates(factor)
        try:
            losses = np.append(losses, training.take_step(next(order), step))
        except TrainingError:
            if step == 0:
                raise
            break
        if has_diverged(losses, task.classes):
            break
    return losses


def smoothed(losses: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the moving average of losses, without the bias of its start."""
    result, average = np.empty(len(losses)), 0.0
    for i, loss in enumerate(losses):
        average = _SMOOTHING * average + (1 - _SMOOTHING) * loss
        result[i] = average / (1 - _SMOOTHING ** (i + 1))
    return result


def has_diverged(losses: npt.NDArray[np.float64], classes: int) -> bool:
    """Return whether the smoothed loss is four times its least, and worse than guessing.

    A solved head may start at a loss near 0, of which single batches are many times as large.
    """
    smooth = smoothed(losses)
    return bool(smooth[-1] > max(_DIVERGED * smooth.min(), np.log(classes)))


def choose(
    factors: npt.NDArray[np.float64], losses: npt.NDArray[np.float64], learning_rates: LearningRates
) -> Found:
    """Pick the factor where the smoothed loss falls fastest over the logarithm of factors."""
    lowest = int(losses.argmin())
    if lowest < 2:
        return Found(factors, losses, None, None)
    slope = np.gradient(losses[: lowest + 1], np.log(factors[: lowest + 1]))
    best = int(slope.argmin())
    factor = float(factors[best])
    head, backbone, layer_decay = learning_rates
    chosen = LearningRates(head * factor, backbone * factor, layer_decay)
    return Found(factors, losses, best, chosen)


def _draw(path: Path, found: Found) -> None:
    figure = charts.new_figure(7, 4)
    axes = figure.subplots()
    axes.plot(found.factors, found.losses)
    charts.scale_by_logarithm(axes)
    axes.set_xlabel("learning rates, as multiples of those of params.yaml")
    axes.set_ylabel("training loss, smoothed (nats)")
    axes.set_ylim(top=2 * found.losses[0])
    axes.axvline(1.0, color="gray", linestyle=":", label="as set")
    axes.set_title("Where the loss falls fastest")
    if found.best is not None:
        axes.plot(found.factors[found.best], found.losses[found.best], "o", label="suggested")
    axes.legend()
    charts.save_figure(figure, path)
