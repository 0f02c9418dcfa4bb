"""Hold exported graphs against the trained model in torch, on real images."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from tlpipe.backbones.backbone import Backbone
from tlpipe.backbones.weights import Weights
from tlpipe.data.chunks import Chunks
from tlpipe.data.images import Pixels, crop_middle
from tlpipe.data.manifest import evenly
from tlpipe.errors import ParityError
from tlpipe.export.bundle import IMAGES, LOGITS
from tlpipe.export.graph import last_layer
from tlpipe.progress import track
from tlpipe.runtime import open_session
from tlpipe.training.classifier import full_network
from tlpipe.training.model import Model

_BATCH = 4
_TIE = 1e-4
Logits = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Compute = Callable[[Pixels], Logits]


@dataclass(frozen=True)
class Parity:
    """``max_difference`` is of the logits, ``logit_spread`` their standard deviation.

    ``same_top1``: how many of the images get the same label, or another that was as good but for
    1e-4 of the spread.
    """

    images: int
    max_difference: float
    same_top1: int
    logit_spread: float


def in_torch(model: Model, backbone: Backbone, weights: Weights) -> Compute:
    """Return what computes the trained model's logits, in torch."""
    import torch

    torch.set_num_threads(model.card.origin.threads)
    network = full_network(backbone, weights, model)

    def compute(images: Pixels) -> Logits:
        with torch.inference_mode():
            logits: Logits = network(torch.from_numpy(images)).numpy()
        return logits

    return compute


def in_onnx(graph: bytes, threads: int) -> Compute:
    """Return what computes a graph's logits, in ONNX Runtime, on the CPU.

    What ships is decided by them, and must not depend on whether the exporting machine has a GPU.
    """
    session = open_session(graph, threads=threads, device="cpu")

    def compute(images: Pixels) -> Logits:
        logits: Logits = session.run([LOGITS], {IMAGES: images})[0]
        return logits

    return compute


@dataclass(frozen=True)
class Sample:
    """Rows of the stored pixels, and what they are: class numbers (N,), groups (N,)."""

    pixels: Chunks
    crop_px: int
    rows: Sequence[int]
    truth: Labels
    groups: Sequence[str]

    def batches(self, size: int) -> Iterator[Pixels]:
        """Yield the images as the network sees them, (B, crop, crop, 3) uint8 RGB."""
        for start in range(0, len(self.rows), size):
            images = self.pixels[list(self.rows[start : start + size])]
            yield np.ascontiguousarray(crop_middle(images, self.crop_px))

    def first(self, count: int) -> "Sample":
        """Return at most so many of them, spread evenly."""
        chosen = evenly(range(len(self.rows)), count)
        return replace(
            self,
            rows=[self.rows[i] for i in chosen],
            truth=self.truth[chosen],
            groups=[self.groups[i] for i in chosen],
        )


def logits(compute: Compute, sample: Sample, description: str) -> Logits:
    """Return the logits (N, C) of a sample."""
    batches = -(-len(sample.rows) // _BATCH)
    shown = track(sample.batches(_BATCH), total=batches, description=description)
    return np.concatenate([compute(images) for images in shown])


def features(model: onnx.ModelProto, sample: Sample, threads: int) -> Logits:
    """Return what a graph's last layer takes for a sample, (N, D) float32, on the CPU."""
    taken = last_layer(model).input[0]
    showing = onnx.ModelProto()
    showing.CopyFrom(model)
    showing.graph.output.append(helper.make_tensor_value_info(taken, TensorProto.FLOAT, None))
    session = open_session(showing.SerializeToString(), threads=threads, device="cpu")
    found = [session.run([taken], {IMAGES: images})[0] for images in sample.batches(_BATCH)]
    return np.concatenate(found)


def compare(trained: Logits, exported: Logits) -> Parity:
    """Compare two arrays of logits (N, C)."""
    spread = float(trained.std())
    named = trained[np.arange(len(trained)), exported.argmax(axis=1)]
    is_same = named >= trained.max(axis=1) - _TIE * _scale(spread)
    return Parity(
        images=len(trained),
        max_difference=float(np.abs(trained - exported).max()),
        same_top1=int(is_same.sum()),
        logit_spread=spread,
    )


def check(parity: Parity, tolerance: float, what: str = "the exported graph") -> None:
    """Raise an error for a graph that differs.

    ``tolerance``: largest difference of a logit, for logits whose spread is 1 or less; larger ones
    may differ by as much of their spread, since rounding errors grow with them.

    Raises:
        ParityError: a logit differs by more, or a top label differs.
    """
    allowed = tolerance * _scale(parity.logit_spread)
    # Written so that a NaN is an error too.
    if not (parity.max_difference <= allowed and parity.same_top1 == parity.images):
        raise ParityError(
            f"{what} differs from the trained model: logits, which spread by "
            f"{parity.logit_spread:.2g}, by up to {parity.max_difference:.2g}, the top label on "
            f"{parity.images - parity.same_top1} of {parity.images} images; expected at most "
            f"{allowed:.2g} and 0. Nothing was exported. Report it, or raise "
            f"export.parity_tolerance."
        )


def _scale(spread: float) -> float:
    return max(1.0, spread)
