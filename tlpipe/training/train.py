"""Stage ``train``: fit a linear probe on the features; where more is open, fine-tune from there."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tlpipe import files
from tlpipe.backbones.activations import AUTO
from tlpipe.errors import ParamsError
from tlpipe.params import check_effect, without_effect
from tlpipe.training import linear_probe
from tlpipe.training import model as models
from tlpipe.training.model import Dataset, Step
from tlpipe.training.recipe import Recipe, class_weights

if TYPE_CHECKING:
    from tlpipe.training.checkpoint import Checkpoints

_log = logging.getLogger(__name__)
HISTORY = ("step", "train_loss", "validation_loss", "validation_accuracy", "l2")
_CHECKPOINTS, _LOCK = ".checkpoints", ".lock"
_OF_SOLVER = ("l2", "max_iterations")
_OF_STAGES = ("backbone_lr", "layer_decay", "batch_norm", "unfreeze_epochs")
# What is not here counts where the head is solved, too.
_STEPWISE = (
    *("epochs", "batch_size", "optimiser", "head_lr", *_OF_STAGES, "warmup", "weight_decay"),
    *("max_grad_norm", "label_smoothing", "mixup", "mixup_alpha", "ema_decay", "metric"),
    *("patience", "checkpoint_minutes", "seed"),
)


class Params(Recipe):
    """How the head is solved, and how what is open is fine-tuned."""


def run(
    *,
    activations: Path,
    pixels: Path,
    split: Path,
    model: Path,
    history: Path,
    params: Params,
    train_metrics: Path | None = None,
    is_first: bool = True,
    live: Callable[[Sequence[Step]], None] | None = None,
) -> None:
    """Write the model and its history.

    Where a linear probe is all that is trained, it is fitted on the training and the validation
    split, or as ``fit_on`` says, and the history has a step for each l2, strongest first, with the
    losses of its cross-validation; elsewhere steps are epochs, 0 the start. ``is_first``: of
    processes that train together, this one writes. ``live`` is given all epochs so far after each
    of them; what it raises ends the training. ``train_metrics``: what DVC compares experiments by.

    Raises:
        ArtifactError: activations and split table are of different data.
        ParamsError: more is asked for than is open, or an option can have no effect.
        TrainingError: another training runs in this folder, or this one cannot go on.
        Interrupted: somebody asked to stop; the same command resumes from there.
    """
    data = models.load_dataset(activations, split)
    check_open(data, params)

    def record(steps: Sequence[Step]) -> None:
        _save_history(history, steps, first=0)
        if live is not None:
            live(steps)

    if not is_first:
        _learn(data, pixels, model.parent / _CHECKPOINTS, params, lambda _: None)
        return
    with files.locked(model.parent / _LOCK, "a training"):
        learned, checkpoints = _learn(data, pixels, model.parent / _CHECKPOINTS, params, record)
        card = _card(data, learned)
        models.save(model, models.Model(card, learned.stages, learned.head), learned.held_out)
        _save_history(history, learned.steps, first=learned.first)
        if train_metrics is not None:
            names = ("validation_accuracy", "validation_loss", "epoch", "l2")
            known = {name: getattr(card, name) for name in names}
            files.write_json(train_metrics, {"images": len(data.train), **known})
        if checkpoints is not None:
            checkpoints.clear()
    if data.open_stages and learned.epoch == 0:
        _log.warning(
            "no epoch of fine-tuning was better on validation than the linear probe it starts "
            "from, which is kept: %s open parameters stay as they were. Take smaller learning "
            "rates ('tlpipe lr-find' suggests some), freeze more, or add images",
            f"{card.trainable_parameters:,}",
        )
        return
    # That of the probe counts as it was fitted; epochs are measured plainly.
    is_balanced = params.balance != "none" and learned.epoch == 0
    _log.info(
        "trained %s parameters, left %s as they were; held-out %s %.4f",
        f"{card.trainable_parameters:,}",
        f"{card.frozen_parameters:,}",
        "balanced accuracy" if is_balanced else "accuracy",
        card.validation_accuracy,
    )


def check_open(data: Dataset, params: Recipe) -> None:
    """Check that every option that is set can have its effect on what is open.

    Raises:
        ParamsError: an option has none, frozen weights are to be re-initialised, parts of what is
            no image mixed, or a batch is larger than the data.
    """
    origin = data.activations.origin
    check_effects(params, origin.freeze, data.open_stages)
    if params.batch_size is not None and params.batch_size > len(data.train):
        raise ParamsError(
            f"train.batch_size is {params.batch_size}; there are {len(data.train)} training "
            f"images. Lower it in params.yaml."
        )
    if params.mixup == "cutmix" and origin.boundary:
        from tlpipe.training.batches import spatial_axes

        stored = data.activations.boundary
        if stored is None or spatial_axes(stored.shape[2:]) is None:
            raise ParamsError(
                f"train.mixup is cutmix; what {origin.boundary} gives has no height and width to "
                f"cut. Use mixup, or freeze less, in params.yaml."
            )


def check_effects(params: Recipe, freeze: str | int, open_stages: int) -> None:
    """Check that no option is set that can have no effect.

    Where ``embed.freeze`` is ``auto``, what depends on it is only said: more images may open a
    stage.

    Raises:
        ParamsError: one is, or frozen weights are to be re-initialised.
    """
    if params.reinitialise > open_stages:
        raise ParamsError(
            f"train.reinitialise is {params.reinitialise}; {open_stages} stages are open, since "
            f"embed.freeze is {freeze}; expected at most so many. Open more, or lower it."
        )
    for reason, names in without_effects(params, freeze, open_stages):
        if freeze != AUTO or not reason.startswith("embed.freeze is"):
            check_effect("train", params, names, reason)
        elif said := without_effect("train", params, names, reason):
            _log.warning("%s", said)


def without_effects(
    params: Recipe, freeze: str | int, open_stages: int
) -> list[tuple[str, tuple[str, ...]]]:
    """Return the options that can have no effect with so many open stages, and why, by reason."""
    is_solved = not open_stages and not params.hidden
    reasons: list[tuple[bool, str, tuple[str, ...]]] = [
        (
            is_solved,
            f"embed.freeze is {freeze}, which leaves no stage open, and train.hidden is empty, so "
            f"the head is solved at once",
            _STEPWISE,
        ),
        (
            open_stages == 0 and not is_solved,
            f"embed.freeze is {freeze}, which leaves no stage open",
            _OF_STAGES,
        ),
        (
            open_stages == 1,
            f"embed.freeze is {freeze}, which leaves a single stage open",
            ("layer_decay",),
        ),
        (
            open_stages > 0,
            f"embed.freeze is {freeze}, and what is open is trained on the training split alone",
            ("fit_on",),
        ),
        (
            bool(params.hidden),
            "a head with train.hidden units is not solved",
            (*_OF_SOLVER, *(("fit_on",) if not open_stages else ())),
        ),
        (params.backbone_lr == 0, "train.backbone_lr is 0", ("layer_decay", "unfreeze_epochs")),
        (params.mixup == "none", "train.mixup is none", ("mixup_alpha",)),
        (
            params.batch_size == 1,
            "train.batch_size is 1, so there are no pairs",
            ("mixup", "mixup_alpha"),
        ),
        (
            params.patience is not None and params.patience >= params.epochs,
            f"train.epochs is {params.epochs}, which ends training first",
            ("patience",),
        ),
        (
            params.unfreeze_epochs >= params.epochs,
            f"train.epochs is {params.epochs}, which ends training before a stage is opened",
            ("unfreeze_epochs",),
        ),
    ]
    return [(reason, names) for holds, reason, names in reasons if holds]


def _learn(
    data: Dataset,
    pixels: Path,
    checkpoints: Path,
    params: Params,
    record: Callable[[Sequence[Step]], None],
) -> "tuple[models.Learned, Checkpoints | None]":
    if data.open_stages or params.hidden:
        from tlpipe.training import tuning

        return tuning.tune(data, pixels, checkpoints, params, record)
    read = linear_probe.stored(data)
    kept, held_out = None, None
    if params.fit_on == "train":
        found = linear_probe.fit(read, data, data.train, params)
        held_out = found.answers(read, data.validation)
        weights = np.ones(len(data.validation))
        if params.balance != "none":
            weights = class_weights(held_out.labels, len(data.labels))[held_out.labels]
        measured = linear_probe.score(held_out.logits, held_out.labels, weights)
        kept = Step(found.best.step.train_loss, measured, found.best.l2)
    else:
        found = linear_probe.fit(read, data, data.labelled, params)
    learned = models.Learned(
        stages={},
        head=(found.raw(found.head),),
        l2=found.best.l2,
        epoch=0,
        first=1,
        steps=found.path,
        kept=kept or found.best.step,
        held_out=held_out or found.held_out(data.labelled),
    )
    return learned, None


def _card(data: Dataset, learned: models.Learned) -> models.Card:
    stages = data.backbone.stages
    open_parameters = sum(stage.parameters for stage in stages[len(stages) - data.open_stages :])
    head = sum(weight.size + bias.size for weight, bias in learned.head)
    return models.Card(
        labels=data.labels,
        origin=data.activations.origin,
        split_sha256=data.split_sha256,
        trainable_parameters=open_parameters + head,
        frozen_parameters=data.backbone.parameters - open_parameters,
        l2=learned.l2,
        epoch=learned.epoch,
        validation_accuracy=learned.kept.validation.accuracy,
        validation_loss=learned.kept.validation.loss,
    )


def _save_history(path: Path, steps: Sequence[Step], *, first: int) -> None:
    """Write the history; what nobody has computed stays empty."""
    rows = [
        (number, *("" if value is None else f"{value:.6f}" for value in step.columns().values()))
        for number, step in enumerate(steps, start=first)
    ]
    files.write_csv(path, HISTORY, rows)
