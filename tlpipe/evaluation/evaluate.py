"""Stage ``evaluate``: measure the bundle on the test split through the serving predictor."""

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import AfterValidator, Field, field_validator

from tlpipe import bundle as bundles
from tlpipe import files
from tlpipe.bundle import ANY_SIZE
from tlpipe.data import pixels as packed
from tlpipe.data.manifest import Entry
from tlpipe.data.pixels import Chunks
from tlpipe.evaluation import answers, metrics
from tlpipe.evaluation import plots as drawn
from tlpipe.evaluation.answers import Answers, Part, Shown
from tlpipe.params import Section, distinct
from tlpipe.predict import Predictor
from tlpipe.resampling import group_numbers, paired_difference, share_interval
from tlpipe.sources.listing import is_builtin

_log = logging.getLogger(__name__)
PREDICTIONS = ("path", "label", "predicted", "probability", "true_probability")
COVERAGE = ("coverage", "accuracy", "threshold")
# Of slices: parts of numbers, how many words have their own, and what the others are called.
_PARTS, _MOST_VALUES, _OTHERS = 4, 12, "others"
CONFUSION = ("true", "predicted", "images")
_MOST_CONFUSED = 20
RELIABILITY = ("confidence", "accuracy", "images")


class Params(Section):
    """What is measured beside accuracy, and how the result is stated."""

    confidence: float = Field(
        default=0.95, gt=0.5, lt=1, description="Confidence level of the intervals."
    )
    error_rate: float = Field(
        default=0.02,
        gt=0,
        lt=1,
        description="Selective prediction: share of wrong answers, at most, above the threshold "
        "below which the classifier abstains.",
    )
    columns: Annotated[tuple[str, ...], AfterValidator(distinct)] = Field(
        default=("format",),
        strict=False,
        description="Columns of the manifest to slice the test images by.",
    )
    corrupted_images: int = Field(
        default=32, ge=1, description="Test images to blur, darken and so on, at most."
    )
    ood: str | None = Field(
        default=None,
        min_length=1,
        description="Out-of-distribution (OOD) images, of none of the classes, as the classifier "
        "may meet them: a folder, archive or address of images, whose labels count for nothing. A "
        "built-in set is an example for built-in sets, and left out for others. null: none.",
    )
    ood_images: int = Field(default=64, ge=1, description="How many OOD images, at most.")
    mistakes: int = Field(default=18, ge=0, le=120, description="Images in each gallery, at most.")

    @field_validator("columns")
    @classmethod
    def _are_in_the_manifest(cls, columns: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := sorted(set(columns) - set(Entry._fields)):
            known = ", ".join(Entry._fields)
            raise ValueError(f"the manifest has no column {unknown[0]}; it has {known}")
        return columns


def with_ood_that_fits(params: Params, source: str) -> Params:
    """Leave out the built-in out-of-distribution images where the classes are not built-in ones.

    How often a classifier of tumours answers for brick says nothing about it.

    Args:
        params: as they stand in params.yaml.
        source: what ``ingest`` reads.
    """
    if params.ood is None or not is_builtin(params.ood) or is_builtin(source):
        return params
    _log.info(
        "evaluate.ood is %s, an example for built-in classes, and left out: name a folder of "
        "images that the classifier may meet but shall not know",
        params.ood,
    )
    return params.model_copy(update={"ood": None})


def run(
    *,
    bundle: Path,
    pixels: Path,
    manifest: Path,
    split: Path,
    held_out: Path,
    history: Path,
    leaks_report: Path | None,
    report: Path,
    speed: Path,
    predictions: Path,
    tables: Path,
    plots: Path,
    examples: Path,
    params: Params,
) -> None:
    """Write the report, how fast it is, the predictions, tables and plots, an example per class.

    ``held_out``: predictions for images that did not train, which the abstention threshold goes by
    and the test accuracy is compared with. ``leaks_report``: of ``audit``; where training has seen
    copies of such images, they give no threshold. None: nobody looked.

    Raises:
        ArtifactError: the bundle is damaged, or knows other classes than the split table.
        DataError: there are no out-of-distribution images where ``ood`` says.
    """
    shipped = bundles.load(bundle)
    squares = packed.load(pixels).array
    (test,) = answers.parts(("test",), shipped.labels, squares, manifest, split)
    threads = shipped.provenance["origin"]["threads"]
    predictors = {
        name: Predictor(shipped, precision=name, threads=threads)
        for name in shipped.graphs
        if name != ANY_SIZE
    }
    found = {name: test.ask(predictor, name) for name, predictor in predictors.items()}
    exact, answered = predictors["fp32"], found["fp32"]
    calibrated, groups = answers.of_held_out(held_out, shipped, split)
    is_copied = leaks_report is not None and files.read_json(leaks_report)["is_above_clean"]
    abstention = selective_prediction(
        answered, test.groups, calibrated, groups, params, is_copied=is_copied
    )
    threshold = abstention["threshold"]
    if threshold is None:
        _log.info(
            "no threshold is known to keep errors at %s: %s",
            f"{abstention['error_rate']:.1%}",
            metrics.why_no_threshold(abstention),
        )
    general = metrics.compare_validation(
        calibrated.hits, groups, answered.hits, test.groups, params.confidence
    )
    content = {
        "bundle": shipped.digest,
        "images": len(test.rows),
        "labels": list(shipped.labels),
        "precisions": {
            name: _measured(test, given, answered, shipped.labels, params.confidence)
            | {"megabytes": shipped.graphs[name].stat().st_size / 1e6}
            for name, given in found.items()
        },
        "generalisation": general,
        "temperature": shipped.provenance["temperature"],
        "abstention": abstention,
        "ood": _ood(exact, answered, threshold, params),
        "slices": measure_slices(
            test.entries, test.brightness(), answered.hits, params.columns, params.confidence
        ),
        "robustness": _robustness(exact, test.evenly(params.corrupted_images), params.confidence),
    }
    files.write_json(report, content)
    files.write_json(
        speed, {name: answers.measure_speed(p, squares) for name, p in predictors.items()}
    )
    shown = [
        Shown(entry, row, exact.name(line), float(line[number]))
        for entry, row, number, line in zip(
            test.entries, test.rows, test.truth, answered.probabilities, strict=True
        )
    ]
    _save_predictions(predictions, shown)
    _save_examples(examples, squares, shown, shipped.labels)
    _save_tables(tables, answered, shipped.labels)
    with files.replacing_folder(plots) as folder:
        drawn.draw(folder, content, answered, history)
        drawn.galleries(folder, squares, shown, params.mistakes)
    measured = content["precisions"]["fp32"]
    accuracy, per_class = measured["accuracy"], measured["per_class"]
    worst, *_ = metrics.by_recall(per_class)
    _log.info(
        "test accuracy %s on %s images; the lowest recall is %.3f, of %s",
        *(describe(accuracy), len(test.rows), per_class[worst]["recall"], worst),
    )
    if general["is_below"]:
        _log.warning(
            "test accuracy is below validation accuracy beyond chance: %s. Test images differ from "
            "those that training was tuned by, or validation was overfitted",
            metrics.describe_gap(general),
        )


def describe(accuracy: Mapping[str, float]) -> str:
    """Return an accuracy of the report with its interval, for people."""
    return (
        f"{accuracy['value']:.4f} ({accuracy['confidence']:.0%} interval "
        f"{accuracy['low']:.4f} to {accuracy['high']:.4f})"
    )


def _measured(
    part: Part, given: Answers, exact: Answers, labels: Sequence[str], confidence: float
) -> dict[str, Any]:
    """Return the numbers of one precision, compared with the exact one on the same images."""
    from scipy.special import softmax

    measured = metrics.measure(given.probabilities, part.truth, part.groups, confidence)
    measured["per_class"] = dict(zip(labels, measured["per_class"], strict=True))
    change = paired_difference(exact.hits, given.hits, part.groups, confidence)
    uncalibrated = metrics.calibration_error(
        softmax(given.logits, axis=1), part.truth, part.groups, confidence
    )
    pairs = metrics.confusion_pairs(given.truth, given.predicted)
    wrong = pairs[pairs[:, 0] != pairs[:, 1]][:_MOST_CONFUSED]
    return measured | {
        "most_confused": [
            {"true": labels[true], "predicted": labels[predicted], "images": images}
            for true, predicted, images in wrong.tolist()
        ],
        "accuracy_change": change,
        "calibration_error_before": uncalibrated["value"] if uncalibrated else None,
    }


def measure_slices(
    entries: Sequence[Entry],
    brightness: npt.NDArray[np.float64],
    hits: npt.NDArray[np.bool_],
    columns: Sequence[str],
    confidence: float,
) -> dict[str, list[dict[str, Any]]]:
    """Return accuracy by slices: by column, size of the file, brightness and near duplicates.

    For each way to part them: values, images, accuracy with its interval.

    ``brightness``: (N,) mean grey levels in [0, 255]; ``columns``: further ones of the manifest.
    """
    # Images are alone in a group where no other is (nearly) equal to them.
    shared = Counter(entry.group for entry in entries if entry.group)
    ways: dict[str, Sequence[str] | npt.NDArray[np.float64]] = {
        "pixels of the file": np.array([e.width * e.height for e in entries], np.float64),
        "brightness": brightness,
        "near duplicates": ["some" if shared[e.group] > 1 else "none" for e in entries],
    }
    for column in columns:
        values = [getattr(entry, column) for entry in entries]
        is_number = all(isinstance(value, int) for value in values)
        ways[column] = np.array(values, np.float64) if is_number else [str(v) for v in values]
    place = group_numbers([entry.group for entry in entries])
    return {
        name: _measure_parts(_named(values), hits, place, confidence)
        for name, values in ways.items()
    }


def _named(values: Sequence[str] | npt.NDArray[np.float64]) -> Mapping[str, npt.NDArray[np.bool_]]:
    """Return which images each value has: quarters of numbers, common words."""
    if isinstance(values, np.ndarray):
        ends = np.unique(np.quantile(values, np.linspace(0, 1, _PARTS + 1)))
        if len(ends) == 1:
            return {f"{ends[0]:g}": np.ones(len(values), bool)}
        places = np.searchsorted(ends[1:-1], values, side="right")
        return {
            f"{low:.0f} to {high:.0f}": places == number
            for number, (low, high) in enumerate(pairwise(ends))
        }
    common = [value for value, _ in Counter(values).most_common(_MOST_VALUES)]
    words = np.array([value if value in common else _OTHERS for value in values])
    return {value: words == value for value in sorted(set(words))}


def _measure_parts(
    parts: Mapping[str, npt.NDArray[np.bool_]],
    hits: npt.NDArray[np.bool_],
    place: npt.NDArray[np.int64],
    confidence: float,
) -> list[dict[str, Any]]:
    rows = []
    for value, inside in parts.items():
        if inside.any():
            found = share_interval(hits[inside], place[inside], confidence)
            row = {"value": value, "images": int(inside.sum()), "accuracy": found["value"]}
            rows.append({**row, "low": found["low"], "high": found["high"]})
    return rows


def selective_prediction(
    given: Answers,
    groups: Sequence[str],
    held_out: Answers,
    held_out_groups: Sequence[str],
    params: Params,
    *,
    is_copied: bool = False,
) -> dict[str, Any]:
    """Return the thresholds that ``held_out`` gives, and what they do on the images ``given``.

    ``threshold`` keeps errors at the error rate with the probability ``confidence``;
    ``observed`` kept them there on the images held out, which promises nothing. Either is None
    where there is none. ``images`` counts independent images held out: those of a group are one;
    ``images_needed`` is the least number of them that a threshold can be known from. There is none
    where training has seen copies of them (``is_copied``).
    """
    rate, confidence_level = params.error_rate, params.confidence
    confidence, hits, place = held_out.confidence, held_out.hits, group_numbers(groups)
    observed = metrics.observed_threshold(metrics.coverage(confidence, hits), rate)
    proven = metrics.threshold_for(confidence, hits, held_out_groups, rate, confidence_level)

    def applied(threshold: float) -> dict[str, Any]:
        if is_copied or math.isinf(threshold):
            return {"threshold": None, "coverage": None, "accuracy": None}
        answered = given.confidence >= threshold
        accuracy = None
        if answered.any():
            inside = place[answered]
            accuracy = share_interval(given.hits[answered], inside, confidence_level)
        return {
            "threshold": threshold,
            "coverage": float(answered.mean()),
            "accuracy": accuracy,
        }

    return {
        "error_rate": rate,
        "confidence": confidence_level,
        "images": int(group_numbers(held_out_groups).max()) + 1,
        "images_needed": metrics.images_needed(rate, confidence_level),
        "is_copied": is_copied,
        **applied(proven),
        "observed": applied(observed),
    }


def _ood(
    predictor: Predictor, given: Answers, threshold: float | None, params: Params
) -> dict[str, Any] | None:
    """Return how out-of-distribution images are answered; None where there are none."""
    if not params.ood:
        return None
    sampling = predictor.bundle.preprocessing
    found = answers.ood_confidence(predictor, params.ood, sampling, params.ood_images)
    return {
        "source": Path(params.ood).name,
        "images": len(found),
        "auroc": metrics.ood_auroc(given.confidence, found),
        "answered": None if threshold is None else float((found >= threshold).mean()),
    }


def _robustness(predictor: Predictor, part: Part, confidence: float) -> dict[str, Any]:
    """Return the accuracy on changed images, by kind, from mild to strong."""

    def measure(given: Answers) -> dict[str, float]:
        found = share_interval(given.hits, part.groups, confidence)
        return {"accuracy": found["value"], "low": found["low"], "high": found["high"]}

    kinds: dict[str, list[dict[str, float]]] = {}
    for kind, strengths in answers.STRENGTHS.items():
        for strength in strengths:
            change = partial(answers.corrupt, kind=kind, strength=strength)
            found = measure(part.ask(predictor, kind, change))
            kinds.setdefault(kind, []).append({"strength": strength} | found)
    return {"images": len(part.rows), "clean": measure(part.ask(predictor, "clean")), **kinds}


def _save_predictions(path: Path, shown: Sequence[Shown]) -> None:
    table = [
        (
            answer.entry.path,
            answer.entry.label,
            answer.prediction.label,
            f"{answer.prediction.probability:.6f}",
            f"{answer.true_probability:.6f}",
        )
        for answer in shown
    ]
    files.write_csv(path, PREDICTIONS, table)


def _save_examples(
    folder: Path, squares: Chunks, shown: Sequence[Shown], labels: Sequence[str]
) -> None:
    """Write the first test image of each class as a file, to try the classifier on.

    Files are named by the number of the class: a label may hold a slash, or be longer than a name.
    """
    first: dict[str, Shown] = {}
    for answer in shown:
        first.setdefault(answer.entry.label, answer)
    with files.replacing_folder(folder) as target:
        for number, label in enumerate(labels):
            if label in first:
                Image.fromarray(squares[first[label].row]).save(target / f"{number}.png")


def _save_tables(folder: Path, given: Answers, labels: Sequence[str]) -> None:
    """Write the curves that DVC draws and compares between versions, and the confusion.

    Of the confusion matrix the cells that are not zero: no more than there are images.
    """
    curve = metrics.coverage(given.confidence, given.hits)
    points = zip(curve.coverage, curve.accuracy, curve.threshold, strict=True)
    bins = metrics.reliability(given.probabilities, given.truth)
    with files.replacing_folder(folder) as target:
        rows = [tuple(f"{value:.6f}" for value in point) for point in points]
        files.write_csv(target / "coverage.csv", COVERAGE, rows)
        rows = [(f"{b.confidence:.6f}", f"{b.accuracy:.6f}", str(b.images)) for b in bins]
        files.write_csv(target / "reliability.csv", RELIABILITY, rows)
        pairs = metrics.confusion_pairs(given.truth, given.predicted).tolist()
        named = [(labels[true], labels[predicted], str(n)) for true, predicted, n in pairs]
        files.write_csv(target / "confusion.csv", CONFUSION, named)
