"""Predictions of a bundle: on splits of the stored images, corrupted ones, and OOD ones."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tlpipe import held_out
from tlpipe.data.chunks import Chunks
from tlpipe.data.images import Pixels, Sampling, read_square
from tlpipe.data.manifest import Entry, evenly, load_manifest, load_split
from tlpipe.errors import ArtifactError, DataError, ImageError
from tlpipe.evaluation.metrics import Floats, Labels, softmax
from tlpipe.export.bundle import Bundle
from tlpipe.inference.predictor import Prediction, Predictor
from tlpipe.progress import track
from tlpipe.sources import listing
from tlpipe.sources.storage import Storage

BATCH = 8


@dataclass(frozen=True)
class Answers:
    """Logits and probabilities (N, C), and the true class numbers (N,)."""

    logits: Floats
    probabilities: Floats
    truth: Labels

    @property
    def confidence(self) -> npt.NDArray[np.float64]:
        """The largest probability of each image."""
        return confidence(self.probabilities)

    @property
    def predicted(self) -> Labels:
        """The number of the class that each answer names, (N,)."""
        found: Labels = self.probabilities.argmax(axis=1)
        return found

    @property
    def hits(self) -> npt.NDArray[np.bool_]:
        """Which answers are right."""
        right: npt.NDArray[np.bool_] = self.predicted == self.truth
        return right


@dataclass(frozen=True)
class Shown:
    """What the bundle says of one test image; ``row``: of the stored pixels."""

    entry: Entry
    row: int
    prediction: Prediction
    true_probability: float


@dataclass(frozen=True)
class Part:
    """The images of one split: their rows of the stored pixels, and what is known of each."""

    squares: Chunks
    rows: Sequence[int]
    entries: Sequence[Entry]
    truth: Labels

    @property
    def groups(self) -> list[str]:
        """The group of each image, or an empty word."""
        return [entry.group for entry in self.entries]

    def ask(
        self,
        predictor: Predictor,
        description: str,
        change: Callable[[Pixels, Sequence[str]], Pixels] | None = None,
    ) -> Answers:
        """Return the answers for all of them, changed before where that is asked for.

        ``change``: gets images (N, H, W, 3) and what each is called, its path and box.
        """
        starts = range(0, len(self.rows), BATCH)
        keys = [f"{entry.path} {entry.box}" for entry in self.entries]
        found = []
        for start in track(starts, total=len(starts), description=description):
            images = self.squares[list(self.rows[start : start + BATCH])]
            if change is not None:
                images = change(images, keys[start : start + BATCH])
            found.append(predictor.scores(images))
        logits, probabilities = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return Answers(logits, probabilities, self.truth)

    def evenly(self, count: int) -> "Part":
        """Return at most so many of them."""
        return self.some(evenly(range(len(self.rows)), count))

    def some(self, chosen: Sequence[int]) -> "Part":
        """Return those of these numbers, counted from 0."""
        return Part(
            self.squares,
            [self.rows[i] for i in chosen],
            [self.entries[i] for i in chosen],
            self.truth[list(chosen)],
        )

    def brightness(self) -> npt.NDArray[np.float64]:
        """Return the mean grey level of each image, in [0, 255]."""
        return np.array([self.squares[row].mean() for row in self.rows], np.float64)


def parts(
    names: Sequence[str], labels: Sequence[str], squares: Chunks, manifest: Path, split: Path
) -> list[Part]:
    """Return the images of each of these splits.

    Raises:
        ArtifactError: its classes are not those of the bundle, or it is empty.
    """
    entries, assignments = list(load_manifest(manifest)), load_split(split)
    if len(entries) != len(assignments) or len(squares) != len(entries):
        raise ArtifactError(
            f"{manifest} has {len(entries)} images, {split} {len(assignments)} and the stored "
            f"pixels {len(squares)}; expected the same. Run 'dvc repro'."
        )
    numbers = {label: number for number, label in enumerate(labels)}

    def part(name: str) -> Part:
        rows = [row for row, assignment in enumerate(assignments) if assignment.split == name]
        if not rows:
            raise ArtifactError(
                f"{split} has no images for {name}; expected some. Run 'dvc repro'."
            )
        if unknown := sorted({assignments[row].label for row in rows} - numbers.keys()):
            raise ArtifactError(
                f"the split table has the classes {', '.join(unknown)}, which the bundle does not "
                f"know; it knows {', '.join(labels)}. Run 'dvc repro'."
            )
        truth = np.array([numbers[assignments[row].label] for row in rows], np.int64)
        return Part(squares, rows, [entries[row] for row in rows], truth)

    return [part(name) for name in names]


def of_held_out(path: Path, shipped: Bundle, split: Path) -> tuple[Answers, list[str]]:
    """Return the answers for images that did not train, and the group of each.

    Raises:
        ArtifactError: the predictions are missing, or of other images or classes.
    """
    held, assignments = held_out.load(path), load_split(split)
    if held.logits.shape[1] != len(shipped.labels) or held.rows.max(initial=0) >= len(assignments):
        raise ArtifactError(
            f"{path} has {held.logits.shape[1]} classes and rows up to {held.rows.max(initial=0)}; "
            f"expected {len(shipped.labels)} and at most {len(assignments) - 1}. Run 'dvc repro'."
        )
    probabilities = softmax(held.logits / np.float32(shipped.provenance["temperature"]))
    groups = [assignments[row].group for row in held.rows]
    return Answers(held.logits, probabilities, held.labels), groups


def ood_confidence(
    predictor: Predictor, source: str, sampling: Sampling, most: int
) -> npt.NDArray[np.float64]:
    """Return the confidence in answers for out-of-distribution (OOD) images, (N,).

    ``source``: as ``listing.unlabelled`` opens it.

    Raises:
        DataError: there is no such source, or no image in it can be read.
    """
    squares = []
    with opened(source) as (storage, names):
        for place in evenly(range(len(names)), most):
            with suppress(ImageError):
                data = storage.read(names[place])
                squares.append(read_square(data, sampling)[0])
    if not squares:
        raise DataError(
            f"evaluate.ood {source} has no image that can be read. Change it in params.yaml."
        )
    batches = [np.stack(squares[i : i + BATCH]) for i in range(0, len(squares), BATCH)]
    probabilities = np.concatenate([predictor.scores(batch)[1] for batch in batches])
    return confidence(probabilities)


@contextmanager
def opened(source: str) -> Iterator[tuple[Storage, list[str]]]:
    """Open the source of out-of-distribution images; yield it and the names of its images.

    Raises:
        DataError: as ``listing.unlabelled``, of ``evaluate.ood``.
    """
    try:
        with listing.unlabelled(source) as found:
            yield found
    except DataError as error:
        raise DataError(str(error).replace("ingest.source", "evaluate.ood")) from None


def confidence(probabilities: Floats) -> npt.NDArray[np.float64]:
    """Return the largest probability of each image."""
    largest: npt.NDArray[np.float64] = probabilities.max(axis=1).astype(np.float64)
    return largest
