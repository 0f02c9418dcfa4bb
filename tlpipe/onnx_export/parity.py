"""Hold the exported graph against the trained model in torch, on real images."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tlpipe.data.chunks import Chunks
from tlpipe.data.images import crop_middle
from tlpipe.errors import ParityError
from tlpipe.features.backbone import Backbone
from tlpipe.features.weights import Weights
from tlpipe.learning.classifier import whole
from tlpipe.learning.model import Model
from tlpipe.onnx_export.bundle import IMAGES, LOGITS
from tlpipe.progress import track
from tlpipe.runtime import open_session

_BATCH = 4


@dataclass(frozen=True)
class Parity:
    """``max_difference`` is of the logits; ``same_top1`` counts images."""

    images: int
    max_difference: float
    same_top1: int
    logit_spread: float


def measure(
    graph: bytes,
    model: Model,
    backbone: Backbone,
    weights: Weights,
    pixels: Chunks,
    rows: Sequence[int],
) -> Parity:
    """Run both on the given rows of the stored pixels."""
    import torch

    torch.set_num_threads(model.card.origin.threads)
    network = whole(backbone, weights, model)
    session = open_session(graph, threads=model.card.origin.threads)
    trained: list[npt.NDArray[np.float32]] = []
    exported: list[npt.NDArray[np.float32]] = []
    starts = range(0, len(rows), _BATCH)
    for start in track(starts, total=len(starts), description="parity"):
        images = pixels[list(rows[start : start + _BATCH])]
        batch = np.ascontiguousarray(crop_middle(images, backbone.preprocessing.crop_px))
        with torch.inference_mode():
            trained.append(network(torch.from_numpy(batch)).numpy())
        exported.append(session.run([LOGITS], {IMAGES: batch})[0])
    return compare(np.concatenate(trained), np.concatenate(exported))


def compare(trained: npt.NDArray[np.float32], exported: npt.NDArray[np.float32]) -> Parity:
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
