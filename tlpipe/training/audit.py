"""Stage ``audit``: show the data set, label issues, and held-out images with copies in train.

Out-of-fold predictions for each image come from a linear probe that has seen neither the image nor
its group; where they contradict the label, confident learning reports a label issue. Copies that
bytes cannot show are looked for by ``tlpipe.data.leaks``. Nothing is changed by either.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import Field

from tlpipe import files
from tlpipe.backbones import activations as stored
from tlpipe.data import charts, leaks
from tlpipe.data import pixels as packed
from tlpipe.data import shortcuts as told_by_files
from tlpipe.data.manifest import Assignment, Entry, evenly, load_manifest, load_split
from tlpipe.data.pixels import Chunks
from tlpipe.errors import ArtifactError
from tlpipe.params import Section
from tlpipe.resampling import ALWAYS_TRAINS, held_out_folds
from tlpipe.training import linear_probe
from tlpipe.training.linear_probe import Floats, Labels

_log = logging.getLogger(__name__)
LABEL_ISSUES = ("path", "label", "suggested", "label_probability", "suggested_probability")
_MOST_SHEETS = 100
_PAIRS = 12  # of a held-out and a training image, drawn


class Params(Section):
    """Folds and l2 of the linear probes, and how much to draw."""

    folds: int = Field(default=3, ge=2, le=20, description="Folds of the out-of-fold predictions.")
    l2: float = Field(
        default=0.01, gt=0, le=100, description="Strength of the linear probes' l2 penalty."
    )
    label_issues: int = Field(
        default=24, ge=0, le=240, description="Label issues to draw, at most, the worst first."
    )
    sheet_images: int = Field(
        default=24, ge=1, le=240, description="Images on each class's contact sheet, at most."
    )


def run(
    *,
    manifest: Path,
    pixels: Path,
    split: Path,
    activations: Path,
    data_report: Path,
    label_issues: Path,
    leaks_report: Path,
    shortcuts: Path,
    data_plots: Path,
    params: Params,
) -> None:
    """Write the table of label issues, reports of leaks and shortcuts, and pictures of the data.

    Raises:
        ArtifactError: manifest, pixels, split and activations are of different data.
    """
    entries = list(load_manifest(manifest))
    images = packed.load(pixels)
    squares = images.array
    embedded = stored.load(activations)
    features = embedded.features
    assignments = load_split(split)
    if not len(entries) == len(squares) == len(features) == len(assignments):
        raise ArtifactError(
            f"{manifest} holds {len(entries)} images, {pixels} {len(squares)}, {split} "
            f"{len(assignments)} and {activations} {len(features)}; expected the same. Run "
            f"'tlpipe run'."
        )
    found = find_label_issues(entries, features, params)
    files.write_csv(
        label_issues,
        LABEL_ISSUES,
        [
            (
                entries[s.row].path,
                entries[s.row].label,
                s.suggested,
                f"{s.label_probability:.6f}",
                f"{s.suggested_probability:.6f}",
            )
            for s in found
        ],
    )
    copies = leaks.find(images.thumbnails, assignments)
    content = copies.content(assignments)
    if embedded.seen is not None:
        content["pretrained"] = leaks.count_pretrained(embedded.seen, assignments)
    files.write_json(leaks_report, content)
    told = told_by_files.find(entries)
    files.write_json(shortcuts, {"told": told, "activations": stored.digest(activations)})
    report = files.read_json(data_report)
    with files.replacing_folder(data_plots) as folder:
        charts.classes(folder / "classes.png", assignments)
        charts.sizes(folder / "sizes.png", entries)
        charts.rejects(folder / "rejects.png", report["rejected"], report["duplicates"])
        _draw_label_issues(
            folder / "label_issues.png", entries, squares, found, params.label_issues
        )
        _draw_copies(folder / "copies.png", assignments, squares, copies)
        _draw_sheets(folder, entries, squares, params.sheet_images)
    _log.info("%s label issues in %s labels: %s", len(found), len(entries), label_issues)
    if content["is_above_clean"] or leaks.held_out_pretrained(content):
        _log.warning("%s See %s and %s.", leaks.warning(content), leaks_report, data_plots)
    else:
        _log.info("%s", leaks.describe(content))
    if told:
        _log.warning("%s See %s.", told_by_files.warning(told), shortcuts)


@dataclass(frozen=True)
class LabelIssue:
    """An image whose label the out-of-fold prediction contradicts, with both probabilities."""

    row: int
    suggested: str
    label_probability: float
    suggested_probability: float


def find_label_issues(
    entries: Sequence[Entry], features: Chunks, params: Params
) -> list[LabelIssue]:
    """Return the label issues, the worst first. ``features``: (N, D).

    A class of fewer groups than folds is left out: no head has seen enough of it.

    Source: Northcutt, Jiang and Chuang (2021), Confident learning, JAIR 70.
    """
    from cleanlab import filter as confident_learning

    groups: dict[str, set[str]] = {}
    for entry in entries:
        groups.setdefault(entry.label, set()).add(entry.group)
    labels = sorted(label for label, members in groups.items() if len(members) >= params.folds)
    rows = [row for row, entry in enumerate(entries) if entry.label in set(labels)]
    if len(labels) < 2:
        return []
    number = {label: position for position, label in enumerate(labels)}
    targets = np.array([number[entries[row].label] for row in rows], dtype=np.int64)
    chosen = [entries[row] for row in rows]
    folds = held_out_folds([e.label for e in chosen], [e.group for e in chosen], params.folds)
    held = folds != ALWAYS_TRAINS
    probabilities = _out_of_fold(features, np.array(rows), targets, folds, params.l2)[held]
    rows, targets = list(np.array(rows)[held]), targets[held]
    _log.info(
        "out-of-fold accuracy %.1f %% on %s images; where it is low, many label issues are correct "
        "labels of hard images",
        *(100 * (probabilities.argmax(axis=1) == targets).mean(), len(targets)),
    )
    issues = confident_learning.find_label_issues(
        targets, probabilities, return_indices_ranked_by="self_confidence", n_jobs=1
    )
    return [
        LabelIssue(
            row=rows[i],
            suggested=labels[int(probabilities[i].argmax())],
            label_probability=float(probabilities[i, targets[i]]),
            suggested_probability=float(probabilities[i].max()),
        )
        for i in issues
    ]


def _out_of_fold(
    features: Chunks, rows: Labels, targets: Labels, folds: Labels, l2: float
) -> Floats:
    """Return (N, C) probabilities of each image by a head that has not seen its fold."""
    from scipy.special import softmax

    known = features[rows].astype(np.float64)
    standard = linear_probe.standardisation([known])
    table = linear_probe.Table(iter([standard.apply(known)]), targets)
    weights, classes = np.ones(len(rows)), int(targets.max()) + 1
    found = linear_probe.cross_validate(table, weights, folds, classes, l2, max_iterations=100)
    probabilities: Floats = softmax(found.logits.astype(np.float64), axis=1)
    return probabilities


def _draw_label_issues(
    path: Path,
    entries: Sequence[Entry],
    squares: Chunks,
    found: Sequence[LabelIssue],
    most: int,
) -> None:
    shown = found[:most]
    captions = [f"{entries[s.row].label}, or {s.suggested}?" for s in shown]
    title = f"Label issues, the worst first: {len(shown)} of {len(found)}"
    charts.gallery(path, [squares[s.row] for s in shown], captions, title=title)


def _draw_copies(
    path: Path, assignments: Sequence[Assignment], squares: Chunks, found: leaks.Found
) -> None:
    """Draw the held-out images that are most like a training image, each beside it."""
    pairs = sorted(
        (pair for some in found.pairs.values() for pair in some if pair.similarity > 0),
        key=lambda pair: (-pair.similarity, pair.row),
    )[:_PAIRS]
    shown, captions = [], []
    for pair in pairs:
        verdict = "copy" if pair.similarity >= found.threshold else "no copy"
        shown += [squares[pair.row], squares[pair.other]]
        captions += [
            assignments[pair.row].split,
            f"train, similarity {pair.similarity:.2f}: {verdict}",
        ]
    title = "Held-out images and the training images most like them (1: the same)"
    charts.gallery(path, shown, captions, title=title)


def _draw_sheets(folder: Path, entries: Sequence[Entry], squares: Chunks, most: int) -> None:
    """Draw a sheet of each class, its images taken evenly from the whole class."""
    rows: dict[str, list[int]] = {}
    for row, entry in enumerate(entries):
        rows.setdefault(entry.label, []).append(row)
    for number, label in enumerate(sorted(rows)[:_MOST_SHEETS]):
        shown = evenly(rows[label], most)
        captions = [Path(entries[row].path).name[-24:] for row in shown]
        title = f"{label}: {len(shown)} of {len(rows[label])} images"
        path = folder / f"sheet-{number:03d}.png"
        charts.gallery(path, [squares[row] for row in shown], captions, title=title)
