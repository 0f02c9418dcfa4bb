"""What ``train`` reads and what it writes: activations of two splits, and the trained model.

A model is a folder with ``model.safetensors`` and ``model.json``, written last. Beside them lies
``held_out.safetensors``, the predictions for images it has not trained on.

The tensors are those that were trained: ``stages.NAME...`` of the open stages, ``head.I.weight``
and ``head.I.bias`` of the head's layers, between which stand ReLUs. What stayed as pretrained is
named by its hash. A registered model to begin from is put together with that into one file of
weights in the user's cache.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tlpipe import files
from tlpipe import held_out as held_outs
from tlpipe.backbones import activations as stored
from tlpipe.backbones.activations import Origin
from tlpipe.backbones.backbone import Backbone, describe, load_network
from tlpipe.backbones.weights import (
    REGISTERED,
    images_of,
    keep_images_of,
    registered_file,
    stating,
)
from tlpipe.data.manifest import file_keys, load_split, rows_of
from tlpipe.errors import ArtifactError, WeightsError
from tlpipe.held_out import HeldOut

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Examples:
    """The images of one split: their rows, and their label numbers, both (N,)."""

    rows: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Dataset:
    """What ``train`` reads.

    ``groups``: of every row of the split table; images of one group are not independent.
    ``digest`` names the activations and the split table by their content.
    """

    activations: stored.Activations
    backbone: Backbone
    labels: tuple[str, ...]
    train: Examples
    validation: Examples
    groups: tuple[str, ...]
    split_sha256: str
    digest: str

    @property
    def labelled(self) -> Examples:
        """The images that training may see: those of the training split, then of validation."""
        parts = (self.train, self.validation)
        return Examples(
            np.concatenate([part.rows for part in parts]),
            np.concatenate([part.labels for part in parts]),
        )

    @property
    def open_stages(self) -> int:
        """How many of the last stages are not frozen."""
        return len(self.backbone.stages) - self.backbone.position(self.activations.origin.boundary)


def load_dataset(activations: Path, split: Path) -> Dataset:
    """Read what two stages have written.

    Raises:
        ArtifactError: one is missing, or they are of different images.
    """
    found, assignments = stored.load(activations), load_split(split)
    if len(found.keys) != len(assignments):
        raise ArtifactError(
            f"{activations} holds {len(found.keys)} images and {split} {len(assignments)}; "
            f"expected the same images. Run 'tlpipe run'."
        )
    keys = np.frombuffer(b"".join(row.key for row in assignments), ">u8")
    if differ := int((keys != found.keys).sum()):
        raise ArtifactError(
            f"{differ} of the {len(assignments)} images in {activations} are not those of {split}; "
            f"expected the same images. Run 'tlpipe run'."
        )
    labels = tuple(sorted({row.label for row in assignments if row.split == "train"}))
    numbers = {label: number for number, label in enumerate(labels)}

    def examples(part: str) -> Examples:
        rows = rows_of(assignments, part)
        targets = [numbers[assignments[i].label] for i in rows]
        return Examples(np.array(rows, np.int64), np.array(targets, np.int64))

    return Dataset(
        activations=found,
        backbone=describe(found.origin.backbone),
        labels=labels,
        train=examples("train"),
        validation=examples("validation"),
        groups=tuple(row.group for row in assignments),
        split_sha256=files.sha256(split),
        digest=f"{files.sha256(split)} {stored.digest(activations)}",
    )


_TENSORS, _INDEX = "model.safetensors", "model.json"
_SHOWN = 5  # classes
_STAGES, _HEAD = "stages.", "head."
Array = npt.NDArray[np.float32]


class Card(BaseModel):
    """What a model is: the labels in the order of its outputs, its origin, how it was trained.

    ``epoch`` is the one that was kept, 0 the solved head. ``validation_accuracy`` and
    ``validation_loss`` (nats) are of the predictions held out: those of cross-validation where a
    linear probe is all that was trained, since it has then trained on the validation split too.
    ``soup``: the versions whose weights were averaged, where they were.
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
    soup: tuple[str, ...] = Field(default=(), exclude_if=lambda names: not names)


@dataclass(frozen=True)
class Model:
    """``stages``: tensors of the open stages by their names in the network.

    ``head``: (weight (out, in), bias (out,)) of each layer; the last has one output for each label.
    """

    card: Card
    stages: Mapping[str, npt.NDArray[np.generic]]
    head: tuple[tuple[Array, Array], ...]


@dataclass(frozen=True)
class Measured:
    """Of one split: the mean loss in nats, and metrics in [0, 1]; only of an epoch all of them."""

    loss: float
    accuracy: float
    balanced_accuracy: float | None = None
    macro_f1: float | None = None


@dataclass(frozen=True)
class Step:
    """One l2 of the linear probe's path, or an epoch, 0 the state before the first.

    Before the first epoch nobody has computed a training loss (nats). The linear probe's
    "validation" is cross-validation; an epoch has no ``l2``.
    """

    train_loss: float | None
    validation: Measured
    l2: float | None = None

    def columns(self) -> dict[str, float | None]:
        """Return what the history shows of it."""
        return {
            "train_loss": self.train_loss,
            "validation_loss": self.validation.loss,
            "validation_accuracy": self.validation.accuracy,
            "l2": self.l2,
        }


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
            f"{folder / _TENSORS} cannot be read: {error}. Run 'tlpipe run'."
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


def network_tensors(model: Model) -> dict[str, "Tensor"]:
    """Return the tensors of the whole network but for its head, named as its own code names them.

    What was frozen comes from the pretrained weights that it was trained on.

    Raises:
        WeightsError: those are not here, or this version cuts the backbone into other stages.
    """
    import torch

    origin = model.card.origin
    known = describe(origin.backbone)
    network = load_network(known, known.find_weights(origin.weights, origin.weights_sha256))
    trained = {name: torch.from_numpy(tensor) for name, tensor in model.stages.items()}
    if unknown := network.load_state_dict(trained, strict=False).unexpected_keys:
        raise WeightsError(
            f"the registered model has tensors that {known.name} has not, such as {unknown[0]}: "
            f"this version of tlpipe cuts it into other stages. Train and register it anew."
        )
    return own_names(network.state_dict())


def own_names(staged: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """Return the tensors of a network in stages as its own code names them, sorted.

    That is the name behind the stage's.
    """
    tensors = {name.partition(".")[2]: tensor for name, tensor in staged.items()}
    return {name: tensors[name].contiguous() for name in sorted(tensors)}


def with_earlier(origin: Origin, images: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Add the images that the weights it was trained from say they were trained on.

    Raises:
        WeightsError: those weights are not here.
    """
    weights = describe(origin.backbone).find_weights(origin.weights, origin.weights_sha256)
    earlier = images_of(weights.path)
    return images if earlier is None else np.union1d(images, earlier)


def began_from(origin: Origin) -> str:
    """Return in words which weights were begun from, and what these were trained on before."""
    is_registered = origin.weights.startswith(REGISTERED)
    began = origin.weights if is_registered else PurePath(origin.weights).name
    return f"{began} ({origin.pretrained_on})" if origin.pretrained_on else began


def _trained_on(card: Card) -> str:
    """Return in a few words what a model was trained on, and from which weights."""
    shown = ", ".join(card.labels[:_SHOWN]) + ", ..." * (len(card.labels) > _SHOWN)
    data = (card.origin.data_version or card.origin.data_sha256)[:10]
    return f"{len(card.labels)} classes ({shown}), data {data}, from {began_from(card.origin)}"


def keep_weights(folder: Path, backbone: str, split: Path | None) -> str:
    """Put the network of a trained model into the user's cache; return the hash of its file.

    What was frozen in it comes from its own pretrained weights; its head is left out. The file says
    what it was trained on; beside it stands on which images, those of its own weights among them.
    ``split``: the table of the model, None where nobody has it.

    Raises:
        ArtifactError: the model is incomplete.
        WeightsError: it is built on another backbone, or its own weights are not here.
    """
    import hashlib

    from safetensors.torch import save

    model = load(folder)
    origin = model.card.origin
    if origin.backbone != backbone:
        raise WeightsError(
            f"the registered model is built on {origin.backbone}; expected {backbone}. Change "
            f"embed.backbone or embed.weights in params.yaml."
        )
    content = save(network_tensors(model), stating(_trained_on(model.card)))
    digest = hashlib.sha256(content).hexdigest()
    with files.writing_cache(registered_file(digest).parent):
        files.write_bytes(registered_file(digest), content)
        if split is not None:
            rows = [row for row in load_split(split) if row.split == "train"]
            keep_images_of(registered_file(digest), with_earlier(origin, file_keys(rows)))
    return digest
