"""The trained model on disk: a folder with ``model.safetensors`` and ``model.json``, written last.

The tensors are those that were trained; what stayed as pretrained is named by its hash.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from tlpipe import files
from tlpipe.errors import ArtifactError
from tlpipe.features.activations import Origin

_TENSORS, _INDEX = "model.safetensors", "model.json"


class Card(BaseModel):
    """What a model is: the labels in the order of its outputs, its origin, how it was trained."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    labels: tuple[str, ...]
    origin: Origin
    split_sha256: str
    penalty: float
    validation_accuracy: float
    validation_loss: float


@dataclass(frozen=True)
class Model:
    """``weight``: (C, D) float32, ``bias``: (C,) float32, of the linear head."""

    card: Card
    weight: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]


def save(folder: Path, model: Model) -> None:
    """Write the model whole or not at all."""
    from safetensors.numpy import save as to_bytes

    with files.replacing_folder(folder) as target:
        tensors = {"head.weight": model.weight, "head.bias": model.bias}
        files.write_bytes(target / _TENSORS, to_bytes(tensors))
        files.write_json(target / _INDEX, model.card.model_dump())


def load(folder: Path) -> Model:
    """Read a model.

    Raises:
        ArtifactError: the folder is missing or incomplete.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    card = Card(**files.read_json(folder / _INDEX))
    try:
        tensors = load_file(folder / _TENSORS)
        return Model(card, tensors["head.weight"], tensors["head.bias"])
    except (OSError, SafetensorError, KeyError) as error:
        raise ArtifactError(
            f"{folder / _TENSORS} cannot be read: {error}. Run 'dvc repro'."
        ) from None
