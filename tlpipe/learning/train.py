"""Stage ``train``: solve the head on the activations, its regularisation picked on validation."""

import logging
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import Field, PositiveFloat

from tlpipe import files
from tlpipe.data.manifest import Assignment, load_split
from tlpipe.errors import ArtifactError
from tlpipe.features import activations as stored
from tlpipe.learning import head as heads
from tlpipe.learning import model as models
from tlpipe.params import Section

_log = logging.getLogger(__name__)
HISTORY = ("step", "train_loss", "validation_loss", "validation_accuracy")


class Params(Section):
    """How the head is fitted."""

    penalties: tuple[PositiveFloat, ...] = Field(
        default=(0.0001, 0.001, 0.01, 0.1, 1.0),
        min_length=1,
        strict=False,
        description="Strengths of the L2 penalty to try; validation picks one.",
    )
    max_iterations: int = Field(
        default=300, ge=1, description="Upper bound on the solver's iterations for one penalty."
    )


def run(*, activations: Path, split: Path, model: Path, history: Path, params: Params) -> None:
    """Write the model and its history.

    Raises:
        ArtifactError: activations and split table are of different data.
    """
    features, origin = stored.load(activations)
    assignments = load_split(split)
    if len(features) != len(assignments):
        raise ArtifactError(
            f"{activations} holds {len(features)} images and {split} {len(assignments)}; "
            f"expected the same images. Run 'dvc repro'."
        )
    labels = tuple(sorted({row.label for row in assignments if row.split == "train"}))
    train = _select(features, assignments, labels, "train")
    validation = _select(features, assignments, labels, "validation")
    best = _fit(train, validation, len(labels), params)
    card = models.Card(
        labels=labels,
        origin=origin,
        split_sha256=files.sha256(split),
        penalty=best.penalty,
        validation_accuracy=best.last.validation_accuracy,
        validation_loss=best.last.validation_loss,
    )
    weight, bias = best.head.weight.astype(np.float32), best.head.bias.astype(np.float32)
    models.save(model, models.Model(card, weight, bias))
    rows = [
        (number, *(f"{value:.6f}" for value in astuple(step)))
        for number, step in enumerate(best.history, start=1)
    ]
    files.write_csv(history, HISTORY, rows)


def _select(
    features: npt.NDArray[np.float16],
    assignments: list[Assignment],
    labels: tuple[str, ...],
    split: str,
) -> tuple[heads.Floats, heads.Labels]:
    """Return the features (N, D) and label numbers (N,) of one split."""
    rows = [i for i, row in enumerate(assignments) if row.split == split]
    numbers = {label: number for number, label in enumerate(labels)}
    targets = np.array([numbers[assignments[i].label] for i in rows], dtype=np.int64)
    return features[rows].astype(np.float64), targets


def _fit(
    train: tuple[heads.Floats, heads.Labels],
    validation: tuple[heads.Floats, heads.Labels],
    classes: int,
    params: Params,
) -> heads.Solution:
    """Solve for each penalty on standardised features; return the best, for raw features."""
    mean, std = heads.standardisation(train[0])
    solutions = heads.solve_path(
        ((train[0] - mean) / std, train[1]),
        ((validation[0] - mean) / std, validation[1]),
        classes=classes,
        penalties=params.penalties,
        max_iterations=params.max_iterations,
    )
    best = min(solutions, key=lambda solution: solution.last.validation_loss)
    for solution in solutions:
        _log.info(
            "penalty %g: validation loss %.4f, accuracy %.3f after %s iterations%s%s",
            solution.penalty,
            solution.last.validation_loss,
            solution.last.validation_accuracy,
            len(solution.history),
            "" if solution.converged else " (not converged; raise train.max_iterations)",
            " <- chosen" if solution is best else "",
        )
    return replace(best, head=heads.fold_standardisation(best.head, mean, std))
