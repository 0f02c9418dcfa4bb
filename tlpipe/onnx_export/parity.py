"""Hold exported graphs against the trained model in torch, on real images."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from tlpipe.data.chunks import Chunks
from tlpipe.data.images import Pixels, crop_middle
from tlpipe.data.manifest import evenly
from tlpipe.errors import ParityError
from tlpipe.features.backbone import Backbone
from tlpipe.features.weights import Weights
from tlpipe.learning.classifier import whole
from tlpipe.learning.model import Model
from tlpipe.onnx_export.bundle import IMAGES, LOGITS
from tlpipe.progress import track
from tlpipe.runtime import open_session

_BATCH = 4
Logits = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Compute = Callable[[Pixels], Logits]


@dataclass(frozen=True)
class Parity:
    """``max_difference`` is of the logits; ``same_top1`` counts images."""

    images: int
    max_difference: float
    same_top1: int
    logit_spread: float


def in_torch(model: Model, backbone: Backbone, weights: Weights) -> Compute:
    """Return what computes the trained model's logits, in torch."""
    import torch

    torch.set_num_threads(model.card.origin.threads)
    network = whole(backbone, weights, model)

    def compute(images: Pixels) -> Logits:
        with torch.inference_mode():
            logits: Logits = network(torch.from_numpy(images)).numpy()
        return logits

    return compute


def in_onnx(graph: bytes, threads: int) -> Compute:
    """Return what computes a graph's logits, in ONNX Runtime."""
    session = open_session(graph, threads=threads)

    def compute(images: Pixels) -> Logits:
        logits: Logits = session.run([LOGITS], {IMAGES: images})[0]
        return logits

    return compute


@dataclass(frozen=True)
class Sample:
    """Rows of the stored pixels, and what they are: class numbers (N,)."""

    pixels: Chunks
    crop_px: int
    rows: Sequence[int]
    truth: Labels

    def batches(self, size: int) -> Iterator[Pixels]:
        """Yield the images as the network sees them, (B, crop, crop, 3) uint8 RGB."""
        for start in range(0, len(self.rows), size):
            images = self.pixels[list(self.rows[start : start + size])]
            yield np.ascontiguousarray(crop_middle(images, self.crop_px))

    def first(self, count: int) -> "Sample":
        """Return at most so many of them, spread evenly."""
        chosen = evenly(range(len(self.rows)), count)
        return replace(self, rows=[self.rows[i] for i in chosen], truth=self.truth[chosen])


def logits(compute: Compute, sample: Sample, description: str) -> Logits:
    """Return the logits (N, C) of a sample."""
    batches = -(-len(sample.rows) // _BATCH)
    shown = track(sample.batches(_BATCH), total=batches, description=description)
    return np.concatenate([compute(images) for images in shown])


def compare(trained: Logits, exported: Logits) -> Parity:
    """Compare two arrays of logits (N, C)."""
    return Parity(
        images=len(trained),
        max_difference=float(np.abs(trained - exported).max()),
        same_top1=int((trained.argmax(axis=1) == exported.argmax(axis=1)).sum()),
        logit_spread=float(trained.std()),
    )


def check(parity: Parity, tolerance: float) -> None:
    """Refuse a graph that differs.

    Raises:
        ParityError: a logit differs by more than ``tolerance``, or a top label differs.
    """
    # Written so that a NaN is refused too.
    if not (parity.max_difference <= tolerance and parity.same_top1 == parity.images):
        raise ParityError(
            f"the exported graph differs from the trained model: logits by up to "
            f"{parity.max_difference:.2g}, the top label on {parity.images - parity.same_top1} of "
            f"{parity.images} images; expected at most {tolerance:g} and 0. Nothing was exported. "
            f"The logits spread by {parity.logit_spread:.2g}; far beyond 10, more is to be "
            f"expected: raise train.penalties, or export.parity_tolerance."
        )
