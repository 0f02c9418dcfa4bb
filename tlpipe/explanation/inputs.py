"""What there is to be explained: the last trained model, its answers, and the images of both.

All of it is of one run of the pipeline, compared by digests: a picture of one model with the
answers of another would explain nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path

import numpy as np

from tlpipe import bundle as bundles
from tlpipe import files, graph, held_out
from tlpipe.backbones import activations as stored
from tlpipe.bundle import Bundle
from tlpipe.data import pixels as packed
from tlpipe.data.images import Pixels, crop_middle
from tlpipe.data.manifest import Assignment, load_split, rows_of
from tlpipe.errors import ArtifactError
from tlpipe.evaluation.evaluate import PREDICTIONS
from tlpipe.training import model as models
from tlpipe.training.audit import LABEL_ISSUES
from tlpipe.training.model import Dataset, Examples, Model

_ANEW = "Run 'tlpipe run'."


@dataclass(frozen=True)
class Paths:
    """Where it lies, by the names of ``graph.PATHS``."""

    activations: Path
    pixels: Path
    split: Path
    label_issues: Path
    shortcuts: Path
    model: Path
    bundle: Path
    report: Path
    predictions: Path

    @classmethod
    def of_project(cls) -> "Paths":
        """Return them from the folder of a project."""
        return cls(**{known.name: Path(graph.PATHS[known.name]) for known in fields(cls)})


@dataclass(frozen=True)
class Answer:
    """What the bundle said of a test image; ``label`` and ``predicted`` are numbers of classes."""

    row: int
    path: str
    label: int
    predicted: int
    probability: float

    @property
    def is_right(self) -> bool:
        """Whether it is the label."""
        return self.label == self.predicted

    def describe(self, labels: Sequence[str]) -> str:
        """Say what was answered, and how surely."""
        said = "" if self.is_right else f" as {labels[self.predicted]}"
        return f"{labels[self.label]}, answered{said} with probability {self.probability:.2f}"


@dataclass(frozen=True)
class Inputs:
    """What is explained.

    Attributes:
        data: the images as ``train`` read them.
        fitted: the images that the model was fitted on: also those of validation where its head was
            cross-validated.
        rows: the split table.
        squares: the images' pixels.
        model: as it was trained.
        bundle: as it was exported.
        accuracy: of all test images, by the report.
        measured: the day of the report, YYYY-MM-DD.
        answers: for all test images.
        issues: by row, the number of the class that ``audit`` suggests.
    """

    data: Dataset
    fitted: Examples
    rows: Sequence[Assignment]
    squares: packed.Chunks
    model: Model
    bundle: Bundle
    accuracy: float
    measured: str
    answers: Sequence[Answer]
    issues: dict[int, int]

    def images(self, rows: Sequence[int]) -> Pixels:
        """Return images as the network sees them, (N, S, S, 3)."""
        crop_px = self.data.backbone.preprocessing.crop_px
        return np.ascontiguousarray(crop_middle(self.squares[rows], crop_px))

    @property
    def stamp(self) -> str:
        """What model a picture is of, where it is seen alone."""
        return (
            f"Bundle {self.bundle.digest[:8]}, measured on {self.measured}, test accuracy "
            f"{self.accuracy:.3f}."
        )


def load(paths: Paths) -> Inputs:
    """Read what the stages have written.

    Raises:
        ArtifactError: something is missing, or was made from something else than is there now.
    """
    shipped, trained = bundles.load(paths.bundle), models.load(paths.model)
    data, squares = models.load_dataset(paths.activations, paths.split), packed.load(paths.pixels)
    stated = trained.card.model_dump(mode="json", exclude={"labels", "origin"})
    origin = shipped.provenance["origin"]
    known = {name: shipped.provenance.get(name) for name in stated}
    is_of_model = known == stated and shipped.labels == trained.card.labels
    report = files.read_json(paths.report)
    for is_right, what, of, other in (
        (
            squares.data_sha256 == data.activations.origin.data_sha256,
            f"{paths.activations} was computed from",
            "images",
            paths.pixels,
        ),
        (
            trained.card.split_sha256 == data.split_sha256,
            f"{paths.model} was trained with",
            "split table",
            paths.split,
        ),
        (
            trained.card.origin == data.activations.origin,
            f"{paths.model} was trained on",
            "activations",
            paths.activations,
        ),
        (
            is_of_model and origin["data_sha256"] == trained.card.origin.data_sha256,
            f"{paths.bundle} was exported from",
            "model",
            paths.model,
        ),
        (
            report.get("bundle") == shipped.digest,
            f"{paths.report} measures",
            "bundle",
            paths.bundle,
        ),
        (
            files.read_json(paths.shortcuts).get("activations") == stored.digest(paths.activations),
            f"{paths.label_issues} was found in",
            "activations",
            paths.activations,
        ),
    ):
        if not is_right:
            raise ArtifactError(f"{what} another {of} than {other}; expected the same. {_ANEW}")
    rows = load_split(paths.split)
    # Heads of folds are kept where the one that ships has been fitted on what they held out.
    is_cross_validated = bool(held_out.load(paths.model / held_out.NAME).heads)
    return Inputs(
        data=data,
        fitted=data.labelled if is_cross_validated else data.train,
        rows=rows,
        squares=squares.array,
        model=trained,
        bundle=shipped,
        accuracy=report["precisions"]["fp32"]["accuracy"]["value"],
        measured=date.fromtimestamp(paths.report.stat().st_mtime).isoformat(),
        answers=_answers(paths, rows, trained.card.labels),
        issues=_issues(paths, rows, trained.card.labels),
    )


def _answers(paths: Paths, rows: Sequence[Assignment], labels: Sequence[str]) -> list[Answer]:
    """Return the answers for the test images, which stand in the order of the split table."""
    numbers = {label: number for number, label in enumerate(labels)}
    test = rows_of(rows, "test")
    found = list(files.read_csv(paths.predictions, PREDICTIONS))
    if [row[:2] for row in found] != [[rows[n].path, rows[n].label] for n in test]:
        raise ArtifactError(
            f"{paths.predictions} holds answers for other images than the test images of "
            f"{paths.split}; expected the same. {_ANEW}"
        )
    return [
        Answer(number, path, numbers[label], numbers[predicted], float(probability))
        for number, (path, label, predicted, probability, _) in zip(test, found, strict=True)
    ]


def _issues(paths: Paths, rows: Sequence[Assignment], labels: Sequence[str]) -> dict[int, int]:
    """Return the class that is suggested in place of the label, by row.

    Regions of one photo share its path: all that have the label are marked.
    """
    numbers = {label: number for number, label in enumerate(labels)}
    places: dict[tuple[str, str], list[int]] = {}
    for number, row in enumerate(rows):
        places.setdefault((row.path, row.label), []).append(number)
    found: dict[int, int] = {}
    for path, label, suggested, *_ in files.read_csv(paths.label_issues, LABEL_ISSUES):
        if (path, label) not in places:
            raise ArtifactError(
                f"{paths.label_issues} names {path} as {label}, which {paths.split} does not have; "
                f"expected issues of the same images. {_ANEW}"
            )
        found |= dict.fromkeys(places[path, label], numbers.get(suggested, -1))
    return {row: number for row, number in found.items() if number >= 0}
