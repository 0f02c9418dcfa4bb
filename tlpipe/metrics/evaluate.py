"""Stage ``evaluate``: judge the bundle on the test split, through the predictor that serves it."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import Field

from tlpipe import files, pictures
from tlpipe.data import pixels as packed
from tlpipe.data.chunks import Chunks
from tlpipe.data.manifest import Assignment, load_split
from tlpipe.errors import ArtifactError
from tlpipe.inference.predictor import Prediction, Predictor
from tlpipe.metrics import plots as drawn
from tlpipe.metrics import scores
from tlpipe.onnx_export import bundle as bundles
from tlpipe.params import Section
from tlpipe.progress import track

_log = logging.getLogger(__name__)
_BATCH = 8
PREDICTIONS = ("path", "label", "predicted", "probability", "true_probability")


class Params(Section):
    """How the result is stated."""

    confidence: float = Field(
        default=0.95, gt=0.5, lt=1, description="Confidence level of the intervals."
    )
    mistakes: int = Field(
        default=18, ge=0, le=120, description="Most confident mistakes to show, at most."
    )


def run(
    *,
    bundle: Path,
    pixels: Path,
    split: Path,
    report: Path,
    predictions: Path,
    plots: Path,
    examples: Path,
    params: Params,
) -> None:
    """Write the report, the predictions, the plots and one example image per class.

    Raises:
        ArtifactError: the bundle is damaged, or knows other classes than the split table.
    """
    shipped = bundles.load(bundle)
    predictor = Predictor(shipped, threads=shipped.provenance["origin"]["threads"])
    assignments = load_split(split)
    test = [i for i, row in enumerate(assignments) if row.split == "test"]
    rows = [assignments[i] for i in test]
    truth = _class_numbers(rows, shipped.labels)
    squares = packed.load(pixels).array
    probabilities = _probabilities(predictor, squares, test)
    measured = scores.measure(probabilities, truth, params.confidence)
    measured["per_class"] = dict(zip(shipped.labels, measured["per_class"], strict=True))
    answers = [
        Answer(row, index, predictor.name(line), float(line[number]))
        for row, index, number, line in zip(rows, test, truth, probabilities, strict=True)
    ]
    _save_predictions(predictions, answers)
    _save_examples(examples, squares, answers)
    with files.replacing_folder(plots) as folder:
        drawn.confusion(folder / "confusion.png", measured["confusion"], shipped.labels)
        _draw_mistakes(folder / "mistakes.png", squares, answers, params.mistakes)
    content = {
        "bundle": shipped.digest,
        "images": len(test),
        "labels": list(shipped.labels),
        "precisions": {"fp32": measured},
    }
    files.write_json(report, content)
    _log.info("test accuracy %s on %s images", describe(measured["accuracy"]), len(test))


@dataclass(frozen=True)
class Answer:
    """What the bundle says of one test image; ``index`` is its row of the stored pixels."""

    row: Assignment
    index: int
    prediction: Prediction
    true_probability: float


def describe(accuracy: Mapping[str, float]) -> str:
    """Return an accuracy of the report with its interval, for people."""
    return (
        f"{accuracy['value']:.4f} ({accuracy['confidence']:.0%} interval "
        f"{accuracy['low']:.4f} to {accuracy['high']:.4f})"
    )


def _class_numbers(rows: Sequence[Assignment], labels: Sequence[str]) -> scores.Labels:
    numbers = {label: number for number, label in enumerate(labels)}
    if unknown := sorted({row.label for row in rows} - numbers.keys()):
        raise ArtifactError(
            f"the split table has the classes {', '.join(unknown)}, which the bundle does not "
            f"know; it knows {', '.join(labels)}. Run 'dvc repro'."
        )
    return np.array([numbers[row.label] for row in rows], dtype=np.int64)


def _probabilities(predictor: Predictor, squares: Chunks, rows: Sequence[int]) -> scores.Floats:
    """Return (N, C) probabilities for the given rows of the stored pixels."""
    starts = range(0, len(rows), _BATCH)
    batches = [
        predictor.scores(squares[rows[start : start + _BATCH]])[1]
        for start in track(starts, total=len(starts), description="evaluate")
    ]
    return np.concatenate(batches)


def _save_predictions(path: Path, answers: Sequence[Answer]) -> None:
    table = [
        (
            answer.row.path,
            answer.row.label,
            answer.prediction.label,
            f"{answer.prediction.probability:.6f}",
            f"{answer.true_probability:.6f}",
        )
        for answer in answers
    ]
    files.write_csv(path, PREDICTIONS, table)


def _save_examples(folder: Path, squares: Chunks, answers: Sequence[Answer]) -> None:
    """Write the first test image of each class as a file, to try the classifier on."""
    first: dict[str, Answer] = {}
    for answer in answers:
        first.setdefault(answer.row.label, answer)
    with files.replacing_folder(folder) as target:
        for label, answer in first.items():
            # A class may be called anything that a folder may, so its name is a safe file name.
            Image.fromarray(squares[answer.index]).save(target / f"{label}.png")


def _draw_mistakes(path: Path, squares: Chunks, answers: Sequence[Answer], most: int) -> None:
    wrong = [answer for answer in answers if answer.prediction.label != answer.row.label]
    worst = sorted(wrong, key=lambda answer: -answer.prediction.probability)[:most]
    captions = [
        f"{answer.row.label} as {answer.prediction.label} ({answer.prediction.probability:.2f})"
        for answer in worst
    ]
    pictures.gallery(
        path,
        [squares[answer.index] for answer in worst],
        captions,
        title=f"Most confident mistakes: {len(worst)} of {len(wrong)}",
    )
