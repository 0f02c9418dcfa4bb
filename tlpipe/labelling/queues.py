"""What people are asked: queues of images, made of what the stages have found.

Label issues of ``audit``, the worst first; nearly equal images of different classes, and the same
bytes under two; the images whose answers are the least sure.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from tlpipe import files, held_out
from tlpipe.data import ingest
from tlpipe.data import pixels as packed
from tlpipe.data.images import Pixels
from tlpipe.data.journal import Usable
from tlpipe.data.manifest import Entry, load_duplicates, load_manifest, load_split
from tlpipe.errors import ArtifactError, TlpipeError
from tlpipe.evaluation.evaluate import PREDICTIONS
from tlpipe.labelling.table import Image, Subject
from tlpipe.sources import Reject
from tlpipe.sources.decisions import UNLABELLED, Decision, written
from tlpipe.training.audit import LABEL_ISSUES
from tlpipe.training.model import Card

_log = logging.getLogger(__name__)
# Confidence, row, what is said, classes that are suggested.
_Unsure = tuple[float, int, str, tuple[str, ...]]
_LEAST_SURE = 100  # images, at most: below these, answers are as sure as elsewhere
ISSUES, DUPLICATES, UNSURE, USEFUL = "issues", "duplicates", "unsure", "useful"
TITLES = {
    ISSUES: "Label issues",
    DUPLICATES: "Near duplicates across classes",
    UNSURE: "Least sure",
    USEFUL: "Most useful",
}


@dataclass(frozen=True)
class Shown:
    """An image on the page: what decisions know it as, the label it bears now, and its pixels."""

    subject: Subject
    label: str
    pixels: Callable[[], Pixels]

    @property
    def key(self) -> str:
        """What the page calls it; nobody can tell a file by it."""
        sha256, part = self.subject.image
        return sha256[:24] + part.replace(" ", "-")


@dataclass(frozen=True)
class Item:
    """One question: an image, or several side by side that one decision is on.

    ``why``: a sentence; ``suggested``: classes to think of first; ``can_keep``: whether all may
    stay as they are.
    """

    images: tuple[Shown, ...]
    why: str
    suggested: tuple[str, ...] = ()
    can_keep: bool = True

    @property
    def key(self) -> str:
        """What the page calls it."""
        return "+".join(image.key for image in self.images)

    @property
    def subjects(self) -> tuple[Subject, ...]:
        """What decisions are on."""
        return tuple(image.subject for image in self.images)

    def decision(self, rows: Mapping[Image, Sequence[Decision]]) -> list[Decision]:
        """Return the rows that settle it; none where it is open.

        Of several images it is settled by one, too, where no two classes are left.
        """
        found = [subject.decided(rows) for subject in self.subjects]
        if len(self.images) > 1 and any(found):
            labels = [
                own[0].label if own else image.label
                for own, image in zip(found, self.images, strict=True)
            ]
            if "" in labels or len({*labels}) == 1:
                return [row for own in found for row in own]
        return [row for own in found for row in own] if all(found) else []


@dataclass
class Queue:
    """Questions of one kind in their order.

    Attributes:
        name: one of ``TITLES``.
        items: those that are listed.
        note: what is to be known where there are none.
        every: all that may come to be listed; those that are, by default.
    """

    name: str
    items: list[Item]
    note: str = ""
    every: Sequence[Item] = ()

    def left(self, rows: Mapping[Image, Sequence[Decision]]) -> int:
        """Return how many questions are open."""
        return sum(not item.decision(rows) for item in self.every or self.items)


def of_project(
    paths: Mapping[str, Path], params: ingest.Params
) -> tuple[list[Queue], tuple[str, ...]]:
    """Return a project's queues and its classes.

    ``paths``: of what the stages wrote, by names of ``graph.PATHS``; ``params``: with nothing left
    to be decided, for what has to be read again.

    Raises:
        ArtifactError: ``ingest`` has not run, or what it wrote does not belong together.
    """
    images = _Images(paths)
    queues = [
        Queue(ISSUES, *_guarded(lambda: _issues(paths["label_issues"], images), "audit")),
        Queue(DUPLICATES, _pairs(paths["duplicates"], images)),
        Queue(UNSURE, *_guarded(lambda: _least_sure(paths, images), "evaluate")),
    ]
    queues[1].items[:0] = _conflicts(paths["rejects"], images, params)
    return queues, tuple(sorted({entry.label for entry in images.entries}))


def _guarded(make: Callable[[], list[Item]], stage: str) -> tuple[list[Item], str]:
    """Return what a stage has found, or why it has not."""
    try:
        return make(), ""
    except ArtifactError as error:
        _log.info("nothing of %s is shown: %s", stage, error)
        return [], f"{stage} has not run on these images: 'tlpipe run' first."


class _Images:
    """The images of a project, each with the labels that its source gives it."""

    def __init__(self, paths: Mapping[str, Path]) -> None:
        stored = packed.load(paths["pixels"])
        if stored.data_sha256 != files.sha256(paths["manifest"]):
            raise ArtifactError(
                f"{paths['pixels']} and {paths['manifest']} are of different runs; expected one. "
                f"Run 'tlpipe run'."
            )
        self.sampling = stored.sampling
        self.entries = list(load_manifest(paths["manifest"]))
        self._squares = stored.array
        self._was: dict[Image, list[str]] = {}  # of those whose label a decision gave
        for one in files.read_json(paths["data_report"]).get("corrected", []):
            self._was.setdefault((one["sha256"], one["part"]), []).append(one["was"])
        self.by_path = {entry.path: row for row, entry in enumerate(self.entries)}
        self.by_key = {entry.key: row for row, entry in enumerate(self.entries)}

    def shown(self, row: int) -> Shown:
        """Return an image by its row."""
        entry = self.entries[row]
        return Shown(self._subject(entry), entry.label, lambda: self._squares[row])

    def _subject(self, entry: Entry) -> Subject:
        is_added = entry.path.startswith(UNLABELLED)
        was = self._was.get((entry.sha256, entry.box), ["" if is_added else entry.label])
        return Subject(entry.sha256, entry.box, entry.path, tuple(dict.fromkeys(was)))


def _issues(table: Path, images: _Images) -> list[Item]:
    found = []
    for path, label, suggested, own, other in files.read_csv(table, LABEL_ISSUES):
        row = images.by_path.get(path)
        if row is not None and images.entries[row].label == label:
            why = (
                f"labelled {label} ({float(own):.0%}), looks like {suggested} ({float(other):.0%})"
            )
            found.append(Item((images.shown(row),), why, (suggested,)))
    return found


def _pairs(table: Path, images: _Images) -> list[Item]:
    found = []
    for pair in load_duplicates(table):
        rows = images.by_path.get(pair.path), images.by_path.get(pair.other)
        if pair.label != pair.other_label and None not in rows:
            both = tuple(images.shown(row) for row in rows if row is not None)
            why = "nearly the same picture under two labels: one decision is on both"
            found.append(Item(both, why, tuple(dict.fromkeys((pair.label, pair.other_label)))))
    return found


def _conflicts(table: Path, images: _Images, params: ingest.Params) -> list[Item]:
    """Return the images whose bytes stand under two labels; they are read again to be shown."""
    names = {
        path for path, reason, _ in files.read_csv(table, Reject._fields) if reason == "conflict"
    }
    if not names:
        return []
    found: dict[Image, list[Usable]] = {}
    try:
        for outcome in ingest.some(params, images.sampling, names):
            if isinstance(outcome, Usable):
                found.setdefault((outcome.entry.sha256, outcome.entry.box), []).append(outcome)
    except TlpipeError as error:
        _log.warning("images of one content under two labels are not shown: %s", error)
        return []
    return [_conflict(same) for same in found.values() if len({s.entry.label for s in same}) > 1]


def _conflict(same: Sequence[Usable]) -> Item:
    labels = tuple(sorted({one.entry.label for one in same}))
    first, square = same[0].entry, same[0].square
    assert not isinstance(square, int)
    # One of the unlabelled folder follows what is decided on the source's.
    was = {one.entry.label for one in same if not one.entry.path.startswith(UNLABELLED)}
    subject = Subject(first.sha256, first.box, first.path, tuple(sorted(was)))
    where = ", ".join(written(one.entry.path) for one in same)
    why = f"the same bytes under {' and '.join(labels)}, so it is left out: {where}"
    shown = Shown(subject, " / ".join(labels), lambda: square)
    return Item((shown,), why, labels, can_keep=False)


def _least_sure(paths: Mapping[str, Path], images: _Images) -> list[Item]:
    """Return the images that held-out predictions, or those for test images, are least sure of."""
    sure = sorted([*_of_training(paths, images), *_of_test(paths["predictions"], images)])
    return [
        Item((images.shown(row),), f"labelled {images.entries[row].label}; {said}", suggested)
        for _, row, said, suggested in sure[:_LEAST_SURE]
    ]


def _of_training(paths: Mapping[str, Path], images: _Images) -> Iterator[_Unsure]:
    from scipy.special import softmax

    try:
        card = Card(**files.read_json(paths["model"] / "model.json"))
    except ValidationError:
        raise ArtifactError("the model was written by another version of tlpipe") from None
    if card.split_sha256 != files.sha256(paths["split"]):
        raise ArtifactError(f"{paths['model']} was trained on other images than are there now")
    predictions, assignments = held_out.load(paths["held_out"]), load_split(paths["split"])
    temperature = held_out.fit_temperature(predictions.logits, predictions.labels)
    probabilities = softmax(predictions.logits.astype(np.float64) / temperature, axis=1)
    for place, own in zip(predictions.rows.tolist(), probabilities, strict=True):
        row = images.by_key.get(assignments[place].key)
        if row is not None:
            predicted, probability = card.labels[int(own.argmax())], float(own.max())
            yield probability, row, f"answered {predicted} ({probability:.0%})", (predicted,)


def _of_test(table: Path, images: _Images) -> Iterator[_Unsure]:
    # What is measured on their labels must not be what people saw when they gave them.
    said = "a test image: no answer is shown, so that its label does not follow it"
    for path, label, _, probability, _ in files.read_csv(table, PREDICTIONS):
        row = images.by_path.get(path)
        if row is not None and images.entries[row].label == label:
            yield float(probability), row, said, ()
