"""Predictions for images by classifiers that have not trained on them: a safetensors file.

``train`` writes it; the temperature (one number that all logits are divided by, so that
probabilities mean what they say), the abstention threshold and the check of lower precisions go by
it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tlpipe import files
from tlpipe.errors import ArtifactError

NAME = "held_out.safetensors"  # beside the model
_HEAD = "head."


@dataclass(frozen=True)
class HeldOut:
    """Out-of-fold predictions of a linear probe, or those of a fine-tuned model for validation.

    Attributes:
        rows: (M,) int64, of the split table.
        labels: (M,) int64 true label numbers.
        logits: (M, C) float32, of the image as it is.
        folds: (M,) int64, which of ``heads`` gave them; all 0 where there are none.
        heads: weight (C, D) and bias (C,), float32, of each fold's head on features as they are;
            empty where the model itself has not trained on these images.
    """

    rows: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    logits: npt.NDArray[np.float32]
    folds: npt.NDArray[np.int64]
    heads: Sequence[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]] = ()

    def only(self, rows: Sequence[int]) -> "HeldOut":
        """Return those of some rows of the split table."""
        kept = np.isin(self.rows, np.asarray(rows, np.int64))
        return HeldOut(
            self.rows[kept], self.labels[kept], self.logits[kept], self.folds[kept], self.heads
        )


def save(path: Path, held_out: HeldOut) -> None:
    """Write the file atomically; equal predictions give equal bytes."""
    from safetensors.numpy import save as to_bytes

    names = ("rows", "labels", "logits", "folds")
    tensors = {name: np.ascontiguousarray(getattr(held_out, name)) for name in names}
    for number, (weight, bias) in enumerate(held_out.heads):
        tensors[f"{_HEAD}{number}.weight"] = np.ascontiguousarray(weight)
        tensors[f"{_HEAD}{number}.bias"] = np.ascontiguousarray(bias)
    files.write_bytes(path, to_bytes(tensors))


def load(path: Path) -> HeldOut:
    """Read the file.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
        heads = [
            (tensors[f"{_HEAD}{number}.weight"], tensors[f"{_HEAD}{number}.bias"])
            for number in range(sum(name.startswith(_HEAD) for name in tensors) // 2)
        ]
        return HeldOut(
            tensors["rows"], tensors["labels"], tensors["logits"], tensors["folds"], heads
        )
    except (OSError, KeyError, SafetensorError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}. Run 'tlpipe run'.") from None


# How far the logarithm of the temperature is expected to lie from 0: a few images, all of them
# right, would else ask for certainty.
_TEMPERATURE_SPREAD = 1.0
_TEMPERATURE_BOUNDS = (-3.0, 3.0)


def fit_temperature(logits: npt.NDArray[np.float32], truth: npt.NDArray[np.int64]) -> float:
    """Return the temperature under which held-out labels are most likely.

    ``logits``: (N, C); ``truth``: (N,) class numbers.

    Source: Guo et al. (2017), On calibration of modern neural networks, section 4.2; with a normal
    prior on the logarithm.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import logsumexp

    exact = logits.astype(np.float64)

    def objective(log_temperature: float) -> float:
        scaled = exact / np.exp(log_temperature)
        losses = logsumexp(scaled, axis=1) - scaled[np.arange(len(truth)), truth]
        return float(losses.sum() + (log_temperature / _TEMPERATURE_SPREAD) ** 2 / 2)

    found = minimize_scalar(objective, bounds=_TEMPERATURE_BOUNDS, method="bounded")
    # Few digits: the file should not differ where the last bits of a logit do.
    return float(f"{np.exp(found.x):.3g}")
