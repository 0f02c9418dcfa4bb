"""The trained model on disk: a folder with ``model.safetensors`` and ``model.json``, written last.

Beside them lies ``held_out.safetensors``, the predictions for images it has not trained on.

The tensors are those that were trained: ``stages.NAME...`` of the open stages, ``head.I.weight``
and ``head.I.bias`` of the head's layers, between which stand ReLUs. What stayed as pretrained is
named by its hash.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from tlpipe import files
from tlpipe import held_out as held_outs
from tlpipe.backbones.activations import Origin
from tlpipe.errors import ArtifactError
from tlpipe.held_out import HeldOut
from tlpipe.training.head import Step

_TENSORS, _INDEX = "model.safetensors", "model.json"
_STAGES, _HEAD = "stages.", "head."
Array = npt.NDArray[np.float32]


class Card(BaseModel):
    """What a model is: the labels in the order of its outputs, its origin, how it was trained.

    ``epoch`` is the one that was kept, 0 the solved head. ``validation_accuracy`` and
    ``validation_loss`` (nats) are of the predictions held out: those of cross-validation where a
    linear probe is all that was trained, since it has then trained on the validation split too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    labels: tuple[str, ...]
    origin: Origin
    split_sha256: str
    trainable_parameters: int
    frozen_parameters: int
    l2: float | None
    epoch: int
    validation_accuracy: float
    validation_loss: float


@dataclass(frozen=True)
class Model:
    """``stages``: tensors of the open stages by their names in the network.

    ``head``: (weight (out, in), bias (out,)) of each layer; the last has one output for each label.
    """

    card: Card
    stages: Mapping[str, npt.NDArray[np.generic]]
    head: tuple[tuple[Array, Array], ...]


@dataclass(frozen=True)
class Learned:
    """What training came to: tensors as a model has them, and the way there.

    ``epoch``: the one that was kept, 0 the solved head. ``steps``, numbered from ``first``: one
    for each l2 where a linear probe is all that was trained, else the start and every epoch.
    ``kept``: the one that the tensors are of. ``held_out``: what is to be calibrated on.
    """

    stages: Mapping[str, npt.NDArray[np.generic]]
    head: tuple[tuple[Array, Array], ...]
    l2: float | None
    epoch: int
    first: int
    steps: Sequence[Step]
    kept: Step
    held_out: HeldOut


def save(folder: Path, model: Model, held_out: HeldOut) -> None:
    """Write the model and its held-out predictions atomically."""
    from safetensors.numpy import save as to_bytes

    tensors = {_STAGES + name: np.asarray(t, order="C") for name, t in model.stages.items()}
    for number, (weight, bias) in enumerate(model.head):
        tensors[f"{_HEAD}{number}.weight"] = weight
        tensors[f"{_HEAD}{number}.bias"] = bias
    with files.replacing_folder(folder) as target:
        files.write_bytes(target / _TENSORS, to_bytes(tensors))
        held_outs.save(target / held_outs.NAME, held_out)
        files.write_json(target / _INDEX, model.card.model_dump())


def load(folder: Path) -> Model:
    """Read a model.

    Raises:
        ArtifactError: the folder is missing, incomplete or of another version.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        card = Card(**files.read_json(folder / _INDEX))
    except ValidationError as error:
        raise ArtifactError(
            f"{folder / _INDEX} was written by another version of tlpipe: "
            f"{error.errors()[0]['msg']}: {'.'.join(map(str, error.errors()[0]['loc']))}. Train it "
            f"anew with this version."
        ) from None
    try:
        tensors = load_file(folder / _TENSORS)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"{folder / _TENSORS} cannot be read: {error}. Run 'dvc repro'."
        ) from None
    layers = sum(name.startswith(_HEAD) for name in tensors) // 2
    return Model(
        card=card,
        stages={n.removeprefix(_STAGES): t for n, t in tensors.items() if n.startswith(_STAGES)},
        head=tuple(
            (tensors[f"{_HEAD}{number}.weight"], tensors[f"{_HEAD}{number}.bias"])
            for number in range(layers)
        ),
    )
