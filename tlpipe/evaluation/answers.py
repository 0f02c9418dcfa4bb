"""Predictions of a bundle: on splits of the stored images, corrupted ones, and OOD ones; how fast.

Corruptions measure robustness: blur, noise, JPEG, brightness.

Source of the idea and of the kinds: Hendrycks and Dietterich (2019), Benchmarking neural network
robustness to common corruptions and perturbations.
"""

import io
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance, ImageFilter

from tlpipe import held_out
from tlpipe.bundle import Bundle
from tlpipe.data.images import Pixels, Sampling, read_square
from tlpipe.data.manifest import Entry, evenly, load_manifest, load_split, rows_of
from tlpipe.data.pixels import Chunks
from tlpipe.errors import ArtifactError, DataError, ImageError
from tlpipe.evaluation.metrics import Floats, Labels
from tlpipe.predict import Prediction, Predictor
from tlpipe.progress import track
from tlpipe.runtime import generator
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
            f"pixels {len(squares)}; expected the same. Run 'tlpipe run'."
        )
    numbers = {label: number for number, label in enumerate(labels)}

    def part(name: str) -> Part:
        rows = rows_of(assignments, name)
        if not rows:
            raise ArtifactError(
                f"{split} has no images for {name}; expected some. Run 'tlpipe run'."
            )
        if unknown := sorted({assignments[row].label for row in rows} - numbers.keys()):
            raise ArtifactError(
                f"the split table has the classes {', '.join(unknown)}, which the bundle does not "
                f"know; it knows {', '.join(labels)}. Run 'tlpipe run'."
            )
        truth = np.array([numbers[assignments[row].label] for row in rows], np.int64)
        return Part(squares, rows, [entries[row] for row in rows], truth)

    return [part(name) for name in names]


def of_held_out(path: Path, shipped: Bundle, split: Path) -> tuple[Answers, list[str]]:
    """Return the answers for images that did not train, and the group of each.

    Raises:
        ArtifactError: the predictions are missing, or of other images or classes.
    """
    from scipy.special import softmax

    held, assignments = held_out.load(path), load_split(split)
    if held.logits.shape[1] != len(shipped.labels) or held.rows.max(initial=0) >= len(assignments):
        raise ArtifactError(
            f"{path} has {held.logits.shape[1]} classes and rows up to {held.rows.max(initial=0)}; "
            f"expected {len(shipped.labels)} and at most {len(assignments) - 1}. Run 'tlpipe run'."
        )
    probabilities = softmax(held.logits / np.float32(shipped.provenance["temperature"]), axis=1)
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


# Mild, medium and strong: blur, radius in pixels; noise, deviation in grey levels; JPEG, quality;
# brightness, factor.
STRENGTHS: dict[str, tuple[float, ...]] = {
    "blur": (1.0, 2.0, 4.0),
    "noise": (10.0, 25.0, 50.0),
    "jpeg": (50, 25, 10),
    "dark": (0.7, 0.45, 0.25),
    "bright": (1.3, 1.7, 2.2),
}


def corrupt(images: Pixels, keys: Sequence[str], kind: str, strength: float) -> Pixels:
    """Return images (N, H, W, 3) uint8 RGB, each changed in this way.

    ``keys``: (N,) what each is called. What becomes of an image depends on it, its key, the kind
    and the strength, not on the images beside it.
    """
    return np.stack(
        [
            _noisy(image, key, strength)
            if kind == "noise"
            else np.asarray(_change(Image.fromarray(image), kind, strength))
            for image, key in zip(images, keys, strict=True)
        ]
    )


def _noisy(image: Pixels, key: str, strength: float) -> Pixels:
    noise = generator(0, f"noise {strength} {key}").normal(0, strength, image.shape)
    noisy: Pixels = (image + noise).round().clip(0, 255).astype(np.uint8)
    return noisy


def _change(image: Image.Image, kind: str, strength: float) -> Image.Image:
    if kind == "blur":
        return image.filter(ImageFilter.GaussianBlur(strength))
    if kind == "jpeg":
        file = io.BytesIO()
        image.save(file, "JPEG", quality=int(strength))
        return Image.open(file)
    return ImageEnhance.Brightness(image).enhance(strength)


# How often an answer for so many images is timed.
TIMED = {1: 15, 8: 5}


def measure_speed(predictor: Predictor, squares: Chunks) -> dict[str, Any]:
    """Return what runs the graph, and the milliseconds for one image and for a batch."""
    milliseconds = {str(size): milliseconds_for(predictor, squares, size) for size in TIMED}
    return {"provider": predictor.provider, "milliseconds": milliseconds}


def milliseconds_for(predictor: Predictor, squares: Chunks, size: int) -> float:
    """Return the median time of an answer for so many images, one of ``TIMED``."""
    images = np.resize(squares[: min(size, len(squares))], (size, *squares.shape[1:]))
    predictor.scores(images)
    spent = []
    for _ in range(TIMED[size]):
        start = time.perf_counter()
        predictor.scores(images)
        spent.append(1000 * (time.perf_counter() - start))
    return median(spent)
