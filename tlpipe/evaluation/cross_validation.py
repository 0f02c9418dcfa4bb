"""Command ``cross-validate``: train and test once for each fold, and put the folds together.

The stages come from the command line, since nothing in ``evaluation`` may reach training.
"""

import logging
import math
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from tlpipe import files, held_out
from tlpipe.data import charts, leaks
from tlpipe.data import split as splits
from tlpipe.data.manifest import SPLITS, load_manifest, load_split, rows_of
from tlpipe.errors import ArtifactError, Interrupted, ParamsError
from tlpipe.evaluation import evaluate
from tlpipe.evaluation.metrics import METRICS, title
from tlpipe.params import Section
from tlpipe.resampling import share_interval, wilson_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_log = logging.getLogger(__name__)
STAGES = ("split", "train", "export", "evaluate")
# Of what no metric needs, little or nothing is made in a fold.
_LESS: Mapping[str, Mapping[str, Any]] = {
    "export": {"precisions": ()},
    "evaluate": {"columns": (), "corrupted_images": 1, "ood": None, "mistakes": 0},
}
_SHARES, _LOSSES = (0.0, 1.0), (0.0, math.inf)
_ROUNDING = 1e-12  # of a share

Stage = Callable[..., None]


@dataclass(frozen=True)
class Fold:
    """``images`` in each split, metrics, and the rows (N,) that were tested and which are hits.

    A row is that of the manifest.
    """

    images: Mapping[str, int]
    metrics: Mapping[str, float]
    rows: npt.NDArray[np.int64]
    hits: npt.NDArray[np.bool_]


def run(
    *,
    manifest: Path,
    pixels: Path,
    activations: Path,
    placements: Path,
    leaks_report: Path,
    folder: Path,
    workspace: Path,
    stages: Mapping[str, Stage],
    params: Mapping[str, Section],
) -> dict[str, Any]:
    """Write the report and the picture of all folds into ``folder``; return the report.

    ``stages``: the ``run`` of each of ``STAGES``; ``params``: their sections. What they write is
    taken away again. ``placements``: where images are already, which stay in their folds; it is
    only read. ``leaks_report``: of ``audit``, if it has run: the report says of which copies it
    knows, which folds share as splits do.

    Raises:
        ParamsError: ``split.folds`` is not set.
        ArtifactError: nothing was embedded yet.
        TrainingError: another cross-validation runs here.
        Interrupted: somebody asked to stop; nothing is kept.
    """
    section = cast(splits.Params, params["split"])
    if section.folds is None:
        raise ParamsError(
            "split.folds is not set; expected a number of folds, such as 5. Set it in params.yaml, "
            "or give --folds."
        )
    for path in (manifest, pixels, activations):
        if not path.exists():
            raise ArtifactError(f"{path} is missing; run 'dvc repro embed' first.")
    known = {"manifest": manifest, "pixels": pixels, "activations": activations}
    confidence = cast(evaluate.Params, params["evaluate"]).confidence
    with (
        files.locked(folder.with_name(f".{folder.name}.lock"), "a cross-validation"),
        files.replacing_folder(folder) as target,
    ):
        known["placements"] = target / "splits.csv"
        if placements.exists():
            shutil.copyfile(placements, known["placements"])
        folds = []
        for number in range(section.folds):
            _log.info("fold %s of %s (split.fold: %s)", number + 1, section.folds, number)
            place = target / f"fold-{number}"
            place.mkdir()
            changes = {**_LESS, "split": {"folds": section.folds, "fold": number}}
            sections = {
                name: params[name].model_copy(update=changes.get(name, {})) for name in STAGES
            }
            try:
                _run_stages(place, known, workspace, stages, sections)
            except Interrupted:
                raise Interrupted(
                    f"stopped in fold {number + 1} of {section.folds}; nothing is kept. Run "
                    f"'tlpipe cross-validate' to begin again."
                ) from None
            folds.append(_read(place))
            shutil.rmtree(place)
        known["placements"].unlink()
        groups = [entry.group for entry in load_manifest(manifest)]
        report = summarise(folds, groups, confidence, leaks.found_by_audit(leaks_report))
        files.write_json(target / "report.json", report)
        charts.save_figure(draw(report), target / "folds.png")
    return report


def _run_stages(
    place: Path,
    known: Mapping[str, Path],
    workspace: Path,
    stages: Mapping[str, Stage],
    params: Mapping[str, Section],
) -> None:
    """Run the stages of one fold; what they write lies in ``place``, folds share placements."""
    manifest, pixels, activations = known["manifest"], known["pixels"], known["activations"]
    split, model, history = place / "split.csv", place / "model", place / "history.csv"
    bundle = place / "bundle"
    stages["split"](
        manifest=manifest,
        split=split,
        split_report=place / "split.json",
        placements=known["placements"],
        params=params["split"],
    )
    stages["train"](
        activations=activations,
        pixels=pixels,
        split=split,
        model=model,
        history=history,
        params=params["train"],
    )
    stages["export"](
        model=model,
        pixels=pixels,
        split=split,
        bundle=bundle,
        parity=place / "parity.json",
        workspace=workspace,
        params=params["export"],
    )
    stages["evaluate"](
        bundle=bundle,
        pixels=pixels,
        manifest=manifest,
        split=split,
        held_out=model / held_out.NAME,
        history=history,
        leaks_report=None,
        report=place / "report.json",
        speed=place / "speed.json",
        predictions=place / "predictions.csv",
        tables=place / "tables",
        plots=place / "plots",
        examples=place / "examples",
        params=params["evaluate"],
    )


def _read(place: Path) -> Fold:
    """Read what the stages of one fold wrote."""
    measured = files.read_json(place / "report.json")["precisions"]["fp32"]
    assignments = load_split(place / "split.csv")
    # In the order of the manifest, as the predictions are: boxes of one photo share its path.
    tested = rows_of(assignments, "test")
    hits = []
    predictions = files.read_csv(place / "predictions.csv", evaluate.PREDICTIONS)
    for row, (path, label, predicted, *_) in zip(tested, predictions, strict=True):
        assert path == assignments[row].path
        hits.append(label == predicted)
    return Fold(
        images={name: len(rows_of(assignments, name)) for name in SPLITS},
        metrics={name: measured[name]["value"] for name in METRICS if measured.get(name)},
        rows=np.array(tested, np.int64),
        hits=np.array(hits, bool),
    )


def summarise(
    folds: Sequence[Fold], groups: Sequence[str], confidence: float, copies: str = ""
) -> dict[str, Any]:
    """Return the report: each fold, the means over folds, and the accuracy over all images.

    ``groups``: of each row of the manifest. The pooled accuracy takes the trained classifiers as
    they are; its interval says what other test images would change, with whole groups.
    The interval of a mean says what other training images would change too. A metric that a
    fold does not have has no mean: AUROC where it tests one class, the calibration error where it
    tests one group. ``copies``: those of training images among held-out ones, in words.
    """
    tested = sum(fold.images["test"] for fold in folds)
    share = tested / sum(fold.images["train"] for fold in folds)
    means = {}
    for name in METRICS:
        if all(name in fold.metrics for fold in folds):
            bounds = _LOSSES if name == "log_loss" else _SHARES
            values = [fold.metrics[name] for fold in folds]
            means[name] = mean_with_interval(values, share, confidence, bounds)
            if bounds is _SHARES and not means[name]["deviation"]:
                # Folds that agree say nothing of what others would do; their images do.
                low, high = wilson_interval(means[name]["value"] * tested, tested, confidence)
                half_width = max(means[name]["value"] - low, high - means[name]["value"])
                means[name] |= {"low": low, "high": high, "half_width": half_width}
    return {
        "precision": "fp32",
        "folds": [
            {"fold": number, "images": dict(fold.images), "metrics": dict(fold.metrics)}
            for number, fold in enumerate(folds)
        ],
        "mean": means,
        "pooled": _pooled(folds, groups, confidence),
        "copies": copies,
    }


def mean_with_interval(
    values: Sequence[float],
    test_share: float,
    confidence: float,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> dict[str, float]:
    """Return the mean of one number over K folds, with its interval, cut to ``bounds``.

    ``test_share``: test images for each training image. Only those that weights are learned from
    count as training images, not those that validate; so the interval is rather too wide.

    Source: Nadeau and Bengio (2003), Inference for the generalization error, Machine Learning 52,
    section 4, the corrected resampled t-test: training sets of different folds overlap, so the
    variance of the mean is (1/K + n_test/n_train) S^2 instead of S^2/K, with K - 1 degrees of
    freedom. It is a good approximation, not exact: Bengio and Grandvalet (2004), No unbiased
    estimator of the variance of k-fold cross-validation, JMLR 5.
    """
    from scipy.special import stdtrit

    # Not NumPy's, whose rounding finds a spread in equal numbers.
    inside = [min(max(value, bounds[0]), bounds[1]) for value in values]
    mean, deviation = statistics.fmean(inside), statistics.stdev(inside)
    if deviation < _ROUNDING:  # weighted means of equal numbers differ by so much
        deviation = 0.0
    quantile = float(stdtrit(len(values) - 1, 0.5 + confidence / 2))
    half_width = quantile * deviation * math.sqrt(1 / len(values) + test_share)
    return {
        "value": mean,
        "deviation": deviation,
        "half_width": half_width,
        "low": max(mean - half_width, bounds[0]),
        "high": min(mean + half_width, bounds[1]),
        "confidence": confidence,
    }


def _pooled(folds: Sequence[Fold], groups: Sequence[str], confidence: float) -> dict[str, Any]:
    """Return the accuracy over all tested images, with its interval."""
    rows = np.concatenate([fold.rows for fold in folds])
    order = rows.argsort()
    hits = np.concatenate([fold.hits for fold in folds])[order]
    rows = rows[order]
    assert len(np.unique(rows)) == len(rows), "an image was tested twice"
    accuracy = share_interval(hits, [groups[row] for row in rows], confidence)
    return {"images": len(hits), "accuracy": accuracy}


def draw(report: Mapping[str, Any]) -> "Figure":
    """Draw each metric: its folds, their mean and the mean's interval."""
    folds, means = report["folds"], report["mean"]
    columns = 3
    rows = -(-len(means) // columns)
    figure = charts.new_figure(3.4 * columns, 2.5 * rows + 0.6)
    numbers = [fold["fold"] for fold in folds]
    for position, (name, mean) in enumerate(means.items(), start=1):
        axes = figure.add_subplot(rows, columns, position)
        axes.axhline(mean["value"], color="#4c72b0", label="mean")
        axes.axhspan(mean["low"], mean["high"], color="#4c72b0", alpha=0.15, label="its interval")
        values = [fold["metrics"][name] for fold in folds]
        axes.plot(numbers, values, "o", color="black", markersize=4, label="a fold")
        axes.set_xticks(numbers)
        axes.set_xlim(-0.5, len(folds) - 0.5)
        if not mean["deviation"]:  # else a scale of rounding errors
            axes.set_ylim(mean["value"] - 0.05, mean["value"] + 0.05)
        stated = f"{mean['value']:.3f} \N{PLUS-MINUS SIGN} {mean['half_width']:.3f}"
        axes.set_title(f"{title(name)} {stated}", fontsize=9)
        if position > len(means) - columns:
            axes.set_xlabel("split.fold")
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=8)
    pooled = report["pooled"]
    accuracy = evaluate.describe(pooled["accuracy"])
    heading = f"{len(folds)} folds; pooled accuracy {accuracy} on {pooled['images']} images"
    if report["copies"]:
        heading += f"\nToo good to be true: {report['copies']}"
    figure.suptitle(heading, fontsize=10)
    return figure
