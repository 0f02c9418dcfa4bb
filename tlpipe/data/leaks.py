"""Find training images that show the same picture as a held-out one: rotated, mirrored, sheared.

Such copies share no bytes and are no near duplicates to ``tlpipe.data.duplicates``, so a split by
chance puts them on both sides, and accuracy promises what new images do not keep. A sample of the
held-out images is compared with the training images in polar coordinates, where a rotation is a
shift: the best of all rotations of both mirror images costs one matrix product a frequency. Each
image's few best candidates are then aligned by an affine map and compared pixel by pixel.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tlpipe import files
from tlpipe.data.manifest import SPLITS, Assignment, evenly
from tlpipe.data.pixels import THUMBNAIL_PX

Thumbnails = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Spectra = npt.NDArray[np.complex64]
Rows = npt.NDArray[np.int64]

SAMPLE, TRAIN_SAMPLE = 48, 8192  # images a held-out split, and training images, at most
# Share of images with a neighbour that counts as a copy, in clean sets, and the probability of an
# alarm by chance at that share; benchmarks/leaks.py measures both.
CLEAN_SHARE, CHANCE = 0.05, 0.001
_CANDIDATES, _STRANGERS = 6, 3  # aligned for each image: the nearest, the nearest of other classes
# A copy closes so much of what strangers of other classes lack to 1. On photographs strangers reach
# 0.2 and copies 0.8 to 0.97; on handwritten digits 0.7 and 0.95 to 0.99, other digits 0.9.
_GAP, _LEAST = 0.8, 0.8
_RINGS, _ANGLES, _DISK = 14, 64, 0.92
_FLAT = 4.0  # gray levels of standard deviation, below which there is nothing to compare
_LEVELS = ((16, 6), (32, 4))  # size of the images in pixels, steps
_DAMPING, _MOST_STEP, _MOST_SHIFT = 0.02, 0.15, 0.3
_LEAST_STRETCH, _MOST_STRETCH, _LEAST_OVERLAP = 0.55, 1.8, 0.5
_BLOCK = 512


@dataclass(frozen=True)
class Pair:
    """A held-out image and the training image that is most like it, by their rows.

    ``similarity``: the lesser of the correlations of gray levels and of contours after alignment.
    """

    row: int
    other: int
    similarity: float


@dataclass(frozen=True)
class Found:
    """What was found in a sample.

    ``pairs``: of each held-out split, one for each image looked at, the most alike first;
    ``threshold``: the similarity from which on a pair counts as copies of one original.
    """

    pairs: dict[str, list[Pair]]
    threshold: float
    train_images: int

    def copies(self, split: str) -> list[Pair]:
        """Return the pairs of a held-out split that count as copies."""
        return [pair for pair in self.pairs[split] if pair.similarity >= self.threshold]

    def is_above_clean(self, split: str) -> bool:
        """Return whether more images have a copy in train than in clean sets, beyond chance."""
        count, copies = len(self.pairs[split]), len(self.copies(split))
        return copies > 0 and _tail(copies, count, CLEAN_SHARE) < CHANCE

    def content(self, assignments: Sequence[Assignment], examples: int = 12) -> dict[str, Any]:
        """Return it for a report, with the paths of some copies."""
        splits = {}
        for split, pairs in self.pairs.items():
            copies = self.copies(split)
            splits[split] = {
                "images": len(pairs),
                "copies": len(copies),
                "share": len(copies) / len(pairs) if pairs else None,
                "is_above_clean": self.is_above_clean(split),
                "examples": [
                    {
                        "path": assignments[pair.row].path,
                        "train": assignments[pair.other].path,
                        "similarity": round(pair.similarity, 4),
                    }
                    for pair in copies[:examples]
                ],
            }
        return {
            "splits": splits,
            "threshold": round(self.threshold, 4),
            "clean_share": CLEAN_SHARE,
            "train_images": self.train_images,
            "is_above_clean": any(self.is_above_clean(split) for split in splits),
        }


def find(thumbnails: Thumbnails, assignments: Sequence[Assignment]) -> Found:
    """Look for copies of validation and test images among the training images.

    ``thumbnails``: (N, 64, 64) gray; at most ``SAMPLE`` images of each held-out split and
    ``TRAIN_SAMPLE`` training images are looked at, taken evenly. Images without structure are
    left out.
    """
    from threadpoolctl import threadpool_limits

    rows: dict[str, list[int]] = {split: [] for split in SPLITS}
    for row, assignment in enumerate(assignments):
        if assignment.split in rows:
            rows[assignment.split].append(row)
    trains = _structured(thumbnails, evenly(rows["train"], TRAIN_SAMPLE))
    held = {
        split: _structured(thumbnails, evenly(rows[split], SAMPLE))
        for split in SPLITS
        if split != "train"
    }
    asked = np.concatenate(list(held.values()))
    best = [Pair(row, -1, 0.0) for row in asked.tolist()]
    strangers: list[float] = []
    if len(asked) and len(trains):
        # Threads of a BLAS that wait for one another burn more than these small products take.
        with threadpool_limits(1):
            best, strangers = _nearest(thumbnails, assignments, asked, trains)
    usual = float(np.quantile(strangers, 0.9)) if strangers else 0.0
    pairs, start = {}, 0
    for split, some in held.items():
        mine = best[start : start + len(some)]
        pairs[split] = sorted(mine, key=lambda pair: (-pair.similarity, pair.row))
        start += len(some)
    return Found(pairs, max(_LEAST, 1 - (1 - usual) * (1 - _GAP)), len(trains))


NOTHING_SEEN = "no held-out image has structure to compare"


def describe(content: Mapping[str, Any]) -> str:
    """Return in words what was found, from ``Found.content``."""
    shares = [
        f"{found['copies']} of {found['images']} {split} images"
        for split in SPLITS
        if (found := content["splits"].get(split)) and found["images"]
    ]
    if not shares:
        return NOTHING_SEEN + _pretrained(content)
    return (
        f"{' and '.join(shares)} looked at are rotated, mirrored or sheared copies of training "
        f"images{_pretrained(content)}"
    )


def count_pretrained(
    seen: npt.NDArray[np.bool_], assignments: Sequence[Assignment]
) -> dict[str, dict[str, int]]:
    """Return of each split how many images there are, and how many the weights have seen.

    ``seen``: (N,) whether the file of an image is one of those that the weights were trained on.
    """
    splits = np.array([assignment.split for assignment in assignments])
    return {
        split: {"images": int((splits == split).sum()), "seen": int(seen[splits == split].sum())}
        for split in SPLITS
    }


def held_out_pretrained(content: Mapping[str, Any]) -> int:
    """Return how many validation and test images the weights were pretrained on."""
    found = content.get("pretrained", {})
    return sum(counts["seen"] for split, counts in found.items() if split != "train")


def _pretrained(content: Mapping[str, Any]) -> str:
    """Return in words which held-out images the weights were pretrained on; nothing if unknown."""
    if "pretrained" not in content:
        return ""
    said = " and ".join(
        f"{counts['seen']} of {counts['images']} {split} images"
        for split, counts in content["pretrained"].items()
        if split != "train"
    )
    return f"; the weights were pretrained on {said}"


def found_by_audit(report: Path) -> str:
    """Return in words which copies ``audit`` found, where that were more than clean sets show.

    Nothing where it found none, or has not run.

    Raises:
        ArtifactError: its report is damaged.
    """
    if not report.is_file():
        return ""
    content = files.read_json(report)
    return describe(content) if content["is_above_clean"] else ""


def warning(content: Mapping[str, Any]) -> str:
    """Return what copies mean and what to do, from ``Found.content``."""
    if not content["is_above_clean"]:
        return (
            f"accuracy may promise too much: {describe(content)}. Pretrain anew without them, or "
            f"keep them in train: splits.csv says where each image is."
        )
    worst = max(content["splits"].values(), key=lambda found: found["share"] or 0)
    example = worst["examples"][0]
    return (
        f"accuracy promises too much: {describe(content)}, such as {example['path']} of "
        f"{example['train']}; clean sets show {content['clean_share']:.0%} at most. Keep the "
        f"copies of an original in one split: name it by (?P<group>...) in ingest.pattern or in a "
        f"table's column 'group'; or take the copies out."
    )


def _tail(least: int, count: int, share: float) -> float:
    """Return the probability of ``least`` or more of ``count``, each with that share."""
    return math.fsum(
        math.comb(count, k) * share**k * (1 - share) ** (count - k) for k in range(least, count + 1)
    )


def _structured(thumbnails: Thumbnails, rows: Sequence[int]) -> Rows:
    """Return the rows whose images are not of one gray level."""
    return np.array([row for row in rows if thumbnails[row].std() >= _FLAT], np.int64)


def _nearest(
    thumbnails: Thumbnails, assignments: Sequence[Assignment], asked: Rows, trains: Rows
) -> tuple[list[Pair], list[float]]:
    """Return the best training image for each one asked, and the similarity to other classes."""
    labels, others = (
        np.array([assignments[row].label for row in rows]) for rows in (asked, trains)
    )
    correlations, shifts = _correlate(thumbnails, asked, trains)
    strangers = np.where(labels[:, None] == others, -2, correlations)
    results = []
    for table, count in ((correlations, _CANDIDATES), (strangers, _STRANGERS)):
        columns = np.argsort(-table, axis=1, kind="stable")[:, :count]
        similarity = np.zeros(columns.shape, np.float32)
        places = np.argwhere(np.take_along_axis(table, columns, axis=1) > -2)
        for start in range(0, len(places), _BLOCK):
            i, k = places[start : start + _BLOCK].T
            column = columns[i, k]
            templates, images = thumbnails[asked[i]], thumbnails[trains[column]]
            similarity[i, k] = _similarity(templates, images, _linear_maps(shifts[i, column]))
        results.append((columns, similarity))
    (columns, similarity), (_, of_strangers) = results
    best = similarity.argmax(axis=1)
    pairs = [
        Pair(int(row), int(trains[columns[i, best[i]]]), float(similarity[i, best[i]]))
        for i, row in enumerate(asked)
    ]
    return pairs, of_strangers.max(axis=1).tolist()


def _correlate(
    thumbnails: Thumbnails, asked: Rows, trains: Rows
) -> tuple[Floats, npt.NDArray[np.int16]]:
    """Return (Q, N) the best correlation over all rotations and both mirror images, and which.

    The second is the shift of the best one in steps of the angle, ``~shift`` where mirrored.
    """
    mine = _spectra(thumbnails[asked])
    correlations = np.empty((len(asked), len(trains)), np.float32)
    shifts = np.empty(correlations.shape, np.int16)
    for start in range(0, len(trains), _BLOCK):
        block = slice(start, start + _BLOCK)
        theirs = _spectra(thumbnails[trains[block]]).conj().transpose(2, 1, 0)
        straight, turned = (
            np.fft.irfft(np.matmul(some.transpose(2, 0, 1), theirs), n=_ANGLES, axis=0)
            for some in (mine, mine.conj())
        )
        is_turned = turned.max(axis=0) > straight.max(axis=0)
        correlations[:, block] = np.where(is_turned, turned.max(axis=0), straight.max(axis=0))
        shifts[:, block] = np.where(is_turned, ~turned.argmax(axis=0), straight.argmax(axis=0))
    return correlations, shifts


def _spectra(images: Thumbnails) -> Spectra:
    """Return (N, rings, frequencies) of (N, 64, 64): Fourier transforms along rings."""
    radii = (np.arange(_RINGS) + 0.5) / _RINGS * _DISK
    angles = np.arange(_ANGLES) * 2 * np.pi / _ANGLES
    x = np.outer(radii, np.cos(angles)).ravel().astype(np.float32)
    y = np.outer(radii, np.sin(angles)).ravel().astype(np.float32)
    areas = np.repeat(radii, _ANGLES).astype(np.float32)
    x, y = (np.broadcast_to(part, (len(images), len(part))) for part in (x, y))
    rings, _ = _normalised(_sample(_shrink(images, 32), x, y), areas[None])
    rings *= np.sqrt(areas / areas.sum())
    return np.fft.rfft(rings.reshape(-1, _RINGS, _ANGLES), axis=2).astype(np.complex64)


def _linear_maps(shifts: npt.NDArray[np.int16]) -> Floats:
    """Return (P, 2, 2) the rotations, and mirrorings, of shifts from ``_correlate``."""
    is_turned = shifts < 0
    angles = np.where(is_turned, ~shifts, shifts) * 2 * np.pi / _ANGLES
    cosines, sines = np.cos(angles), np.sin(angles)
    flip = np.where(is_turned, -1, 1)
    maps = np.array([[cosines, sines * flip], [-sines, cosines * flip]], np.float32)
    return maps.transpose(2, 0, 1)


def _similarity(templates: Thumbnails, images: Thumbnails, maps: Floats) -> Floats:
    """Align each image to its template by an affine map; return how alike they are then.

    ``templates``, ``images``: (P, 64, 64) gray; ``maps``: (P, 2, 2) linear parts to start from.

    Returns: (P,) the lesser of the correlations of gray levels and of contours, over the disk that
    both have; 0 where the map stretches more than copies do.

    Source: Baker and Matthews (2004), Lucas-Kanade 20 years on, IJCV 56, equation 10, with gain and
    offset of the gray levels taken out.
    """
    affine = np.concatenate([maps, np.zeros((len(maps), 2, 1), np.float32)], axis=2)
    for size, steps in _LEVELS:
        places = ((np.arange(size) + 0.5) / size * 2 - 1).astype(np.float32)
        grid = np.stack([part.ravel() for part in np.meshgrid(places, places)] + [np.ones(size**2)])
        grid = grid.astype(np.float32)
        disk = ((grid[0] ** 2 + grid[1] ** 2) < _DISK**2).astype(np.float32)
        template, small = _shrink(templates, size).reshape(-1, size**2), _shrink(images, size)
        slopes = np.array(np.gradient(small, axis=(2, 1)), np.float32) * np.float32(size / 2)
        for step in range(steps + 1):
            x, y = (affine @ grid).transpose(1, 0, 2)
            overlap = ((x**2 + y**2) < _DISK**2) * disk
            warped = _sample(small, x, y)
            if step == steps:
                break
            wanted, _ = _normalised(template, overlap)
            seen, scale = _normalised(warped, overlap)
            columns = [
                _sample(slope, x, y) / scale * overlap * part for slope in slopes for part in grid
            ]
            jacobian = np.stack(columns, axis=1)
            hessian = jacobian @ jacobian.transpose(0, 2, 1)
            damping = _DAMPING * np.trace(hessian, axis1=1, axis2=2) / 6 + 1e-3
            hessian += damping[:, None, None] * np.eye(6, dtype=np.float32)
            residual = ((wanted - seen) * overlap)[:, :, None]
            change = np.linalg.solve(hessian, jacobian @ residual).reshape(-1, 2, 3)
            affine += np.clip(change, -_MOST_STEP, _MOST_STEP)
            affine[:, :, 2] = np.clip(affine[:, :, 2], -_MOST_SHIFT, _MOST_SHIFT)
    square = (len(affine), size, size)
    inner = overlap.reshape(square)
    inner = inner * np.minimum.reduce(
        [np.roll(inner, by, axis) for axis in (1, 2) for by in (1, -1)]
    )
    contours = [
        _contours(part.reshape(square)).reshape(len(part), -1) for part in (template, warped)
    ]
    similarity = np.minimum(
        _correlation(template, warped, overlap),
        _correlation(contours[0], contours[1], inner.reshape(overlap.shape)),
    )
    stretches = np.linalg.svd(affine[:, :, :2], compute_uv=False)
    is_copy = (stretches[:, 1] > _LEAST_STRETCH) & (stretches[:, 0] < _MOST_STRETCH)
    is_copy &= overlap.sum(axis=1) > _LEAST_OVERLAP * disk.sum()
    return np.where(is_copy, similarity, 0).astype(np.float32)


def _shrink(images: Thumbnails, size: int) -> Floats:
    factor = THUMBNAIL_PX // size
    parts = images.reshape(-1, size, factor, size, factor)
    mean: Floats = parts.mean(axis=(2, 4), dtype=np.float32)
    return mean


def _sample(images: Floats, x: Floats, y: Floats) -> Floats:
    """Return (P, n) bilinear values of (P, S, S) images at positions x, y: (P, n) in [-1, 1]."""
    size = images.shape[-1]
    across, down = (np.clip((part + 1) * size / 2 - 0.5, 0, size - 1.001) for part in (x, y))
    column, row = across.astype(np.int64), down.astype(np.int64)
    right, low = across - column, down - row
    flat, corner = images.reshape(len(images), -1), row * size + column

    def at(offset: int) -> Floats:
        return np.take_along_axis(flat, corner + offset, axis=1)

    upper = at(0) * (1 - right) + at(1) * right
    lower = at(size) * (1 - right) + at(size + 1) * right
    return np.asarray(upper * (1 - low) + lower * low, np.float32)


def _normalised(images: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Return (P, n) with weighted mean 0 and variance 1, and the deviation before."""
    share = weights / (weights.sum(axis=1, keepdims=True) + 1e-6)
    centred = images - (images * share).sum(axis=1, keepdims=True)
    scale = np.sqrt((centred**2 * share).sum(axis=1, keepdims=True)) + 1e-3
    return np.asarray(centred / scale, np.float32), np.asarray(scale, np.float32)


def _contours(images: Floats) -> Floats:
    """Return what is left of (P, S, S) images when their 3 x 3 mean is taken away."""
    size = images.shape[1]
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)), mode="edge")
    shifted = [padded[:, i : i + size, j : j + size] for i in range(3) for j in range(3)]
    return np.asarray(images - sum(shifted) / np.float32(9), np.float32)


def _correlation(images: Floats, others: Floats, weights: Floats) -> Floats:
    share = weights / (weights.sum(axis=1, keepdims=True) + 1e-6)
    product = _normalised(images, weights)[0] * _normalised(others, weights)[0]
    correlation: Floats = (product * share).sum(axis=1)
    return correlation
