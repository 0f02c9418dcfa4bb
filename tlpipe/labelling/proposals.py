"""Which images of an unlabelled folder to label next."""

import logging
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tlpipe.backbones import activations as stored
from tlpipe.backbones import embed
from tlpipe.backbones.activations import ALL
from tlpipe.data import ingest
from tlpipe.data import pixels as packed
from tlpipe.data.manifest import evenly, load_manifest, load_split
from tlpipe.errors import ArtifactError, TlpipeError
from tlpipe.labelling.queues import USEFUL, Item, Queue, Shown
from tlpipe.labelling.table import Subject, Table, decided
from tlpipe.training import linear_probe, model

_log = logging.getLogger(__name__)
Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
_OPEN, _DROPPED = -1, -2  # in place of a label number
_L2, _MAX_ITERATIONS, _TOLERANCE = 0.01, 100, 1e-5  # as audit's, and no better than is needed
_WIDTH = 0.5  # of the Gaussian, in median distances
_MOST_COMPARED = 4000  # images of a folder, each with each: 64 MB
_BLOCK = 1024
_AHEAD = 5  # rounds that are listed, so that nobody waits while the next one is computed


@dataclass(frozen=True)
class Reading:
    """An unlabelled folder: how it is read and embedded, and where that is kept.

    Attributes:
        address: the folder.
        kept: where pixels and activations lie, for the next time.
        ingest: how images are resized, with nothing left to be decided.
        embed: the network; all of it is frozen.
    """

    address: str
    kept: Path
    ingest: ingest.Params
    embed: embed.Params


@dataclass(frozen=True)
class Known:
    """What is labelled already: features (N, D), label numbers (N,), the classes, the images.

    ``graph`` names what computed the features; nothing where there are none.
    """

    features: Floats
    labels: Labels
    classes: tuple[str, ...]
    images: frozenset[str] = frozenset()
    graph: str = ""

    @classmethod
    def nothing(cls, classes: tuple[str, ...]) -> "Known":
        """Return that nothing is labelled yet."""
        return cls(np.empty((0, 0)), np.empty(0, np.int64), classes)


def known_of(activations: Path, split: Path, classes: tuple[str, ...]) -> Known:
    """Return a project's images for training and validation; test images choose nothing.

    Raises:
        ArtifactError: ``embed`` or ``split`` has not run, or not on the same images.
    """
    data, table = model.load_dataset(activations, split), load_split(split)
    numbers = np.array([classes.index(name) if name in classes else -1 for name in data.labels])
    labels, rows = numbers[data.labelled.labels], data.labelled.rows
    is_class = labels >= 0  # a class may be gone since that split
    return Known(
        data.activations.features[rows[is_class]].astype(np.float64),
        labels[is_class].astype(np.int64),
        classes,
        frozenset(one.sha256 for one in table),
        data.activations.origin.graph,
    )


@dataclass(frozen=True)
class Images:
    """The images of a folder: what is asked of each, its features (N, D), and what made those."""

    items: tuple[Item, ...]
    features: Floats
    graph: str


def read(reading: Reading, prefix: str) -> Images:
    """Read and embed a folder; what was done before is not done again.

    ``prefix``: before its paths, in the table.

    Raises:
        DataError: it is missing, or has no image that can be read.
    """
    kept = reading.kept
    kept.mkdir(parents=True, exist_ok=True)
    paths = {
        name: kept / file
        for name, file in (
            ("manifest", "manifest.csv"),
            ("rejects", "rejects.csv"),
            ("duplicates", "duplicates.csv"),
            ("pixels", "pixels"),
            ("data_report", "report.json"),
        )
    }
    ingest.run_unlabelled(address=reading.address, **paths, params=reading.ingest)
    params = reading.embed.model_copy(update={"freeze": ALL, "views": 0, "advice": None})
    known = {name: paths[name] for name in ("manifest", "pixels")}
    embed.run(**known, activations=kept / "activations", params=params)
    squares = packed.load(paths["pixels"]).array
    found = stored.load(kept / "activations")
    rows: dict[str, int] = {}
    for row, entry in enumerate(entries := list(load_manifest(paths["manifest"]))):
        rows.setdefault(entry.sha256, row)  # of equal images one is asked for
    items = []
    for row in rows.values():
        entry = entries[row]
        subject = Subject(entry.sha256, "", prefix + entry.path, ("",))
        items.append(Item((_shown(subject, squares, row),), "", can_keep=False))
    chosen = np.array([*rows.values()], np.int64)
    return Images(tuple(items), found.features[chosen].astype(np.float64), found.origin.graph)


def _shown(subject: Subject, squares: packed.Chunks, row: int) -> Shown:
    return Shown(subject, "", lambda: squares[row])


def propose(features: Floats, labels: Labels, known: Known, count: int) -> list[int]:
    """Return the rows of at most so many images to label next, the most useful first.

    Uncertainty and coverage are one number: each image of the folder is as well covered as it is
    like the labelled image that is most like it, and weighs as much as a linear probe on all
    labelled images is unsure of it. Next is the image that raises the weighted sum most (facility
    location, greedily). Without labels of two classes all weigh the same, so coverage decides.

    Args:
        features: (N, D) of the unlabelled folder.
        labels: (N,) numbers of those that were labelled meanwhile, -1 where one is open, -2 where
            it was dropped.
        known: what else is labelled.
        count: how many are wanted.

    Sources: Wei, Iyer and Bilmes (2015), Submodularity in data subset selection and active
    learning, ICML; Scheffer, Decomain and Wrobel (2001), Active hidden Markov models for
    information extraction, IDA (margins).
    """
    is_labelled, is_open = labels >= 0, labels == _OPEN
    shown, targets = features[is_labelled], labels[is_labelled]
    if len(known.labels):
        shown = np.concatenate([known.features, shown])
        targets = np.concatenate([known.labels, targets])
    rows = np.array(evenly(np.flatnonzero(is_open).tolist(), _MOST_COMPARED), np.int64)
    if not len(rows):
        return []
    some = features[rows]
    weights = np.ones(len(rows))
    if len({*targets.tolist()}) > 1:
        weights = 1 - _margins(shown, targets, some, len(known.classes))
    chosen = _cover(_unit(some), _unit(shown), weights, min(count, len(rows)))
    return [int(rows[place]) for place in chosen]


def _margins(shown: Floats, targets: Labels, asked: Floats, classes: int) -> Floats:
    """Return by how much the most probable class of each image asked is so more than the second."""
    from scipy.special import softmax

    standard = linear_probe.standardisation([shown, asked])
    head = linear_probe.solve(
        [(standard.apply(shown), targets)],
        np.ones(len(targets)),
        classes=classes,
        l2=_L2,
        max_iterations=_MAX_ITERATIONS,
        tolerance=_TOLERANCE,
    ).head
    ordered = np.sort(softmax(head.logits(standard.apply(asked)), axis=1), axis=1)
    margins: Floats = ordered[:, -1] - ordered[:, -2]
    return margins


def _cover(asked: Floats, shown: Floats, weights: Floats, count: int) -> list[int]:
    """Return greedily which of those asked cover them best, beside what is shown; all unit vectors.

    Two images are alike by a Gaussian of their distance, half the median distance wide.
    """
    squares = _squares(asked, asked)
    width = _WIDTH**2 * float(np.median(squares)) or 1.0
    alike = np.exp(-squares / width)  # (N, N)
    covered = np.zeros(len(asked), np.float32)
    for start in range(0, len(shown), _BLOCK):
        block = np.exp(-_squares(asked, shown[start : start + _BLOCK]) / width)
        covered = np.maximum(covered, block.max(axis=1))
    weights = weights.astype(np.float32)
    chosen: list[int] = []
    for _ in range(count):
        gains = weights @ np.maximum(alike - covered[:, None], 0)
        gains[chosen] = -1
        best = int(gains.argmax())
        chosen.append(best)
        covered = np.maximum(covered, alike[:, best])
    return chosen


def _squares(a: Floats, b: Floats) -> npt.NDArray[np.float32]:
    """Return (N, M) squared distances of unit vectors."""
    squares: npt.NDArray[np.float32] = 2 - 2 * a.astype(np.float32) @ b.astype(np.float32).T
    return np.maximum(squares, 0)


def _unit(features: Floats) -> Floats:
    lengths = np.linalg.norm(features, axis=1, keepdims=True) if len(features) else 1.0
    unit: Floats = features / np.maximum(lengths, 1e-12)
    return unit


class Proposals:
    """The queue of the most useful images, and the thread that computes it anew.

    After so many labels the linear probe is solved again, on all that is labelled by then; people
    go on meanwhile with what is listed.
    """

    def __init__(self, images: Images, known: Known, table: Table, every: int) -> None:
        """Take the images, those that the project has left out, and compute the first round.

        Raises:
            ArtifactError: the table cannot be read, or the project's activations are of another
                network.
        """
        if known.graph not in ("", images.graph):
            raise ArtifactError(
                "the project's activations were computed by another network than those of the "
                "unlabelled images; expected the same. Run 'tlpipe run'."
            )
        new = [
            row
            for row, item in enumerate(images.items)
            if item.subjects[0].sha256 not in known.images
        ]
        self._items = [images.items[row] for row in new]
        self._features = images.features[np.array(new, np.int64)]
        self._known, self._table, self._every = known, table, every
        note = "There is nothing to label: each image of the folder is in the project already."
        self.queue = Queue(USEFUL, [], note, every=self._items)
        self._done, self._busy = 0, threading.Lock()
        if self._items:
            self._propose()

    def after(self) -> None:
        """Compute the next round, in a thread, if enough was decided since the last one."""
        if not self._items or abs(self._decided() - self._done) < self._every:
            return
        if self._busy.acquire(blocking=False):
            threading.Thread(target=self._propose_anew, daemon=True).start()

    def _propose_anew(self) -> None:
        try:
            self._propose()
        except TlpipeError as error:  # the page says the same of the next decision
            _log.warning("what is most useful was not computed anew: %s", error)
        finally:
            self._busy.release()

    def _decided(self) -> int:
        rows = decided(self._table.load().rows)
        return sum(bool(item.decision(rows)) for item in self._items)

    def _propose(self) -> None:
        """Solve the linear probe on what is labelled, and list the next rounds."""
        rows = decided(self._table.load().rows)
        numbers = {name: number for number, name in enumerate(self._known.classes)}
        found = [item.decision(rows) for item in self._items]
        labels = np.array(
            [numbers.get(own[0].label, _DROPPED) if own else _OPEN for own in found], np.int64
        )
        order = propose(self._features, labels, self._known, self._every * _AHEAD)
        done = [item for item, own in zip(self._items, found, strict=True) if own]
        self._done = len(done)
        self.queue.items = [*done, *(self._items[row] for row in order)]
