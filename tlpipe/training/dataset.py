"""What there is to learn from: the images of two splits, and what is stored of them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tlpipe import files
from tlpipe.backbones import activations as stored
from tlpipe.backbones.backbone import Backbone, describe
from tlpipe.data.manifest import load_split
from tlpipe.errors import ArtifactError


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


def load(activations: Path, split: Path) -> Dataset:
    """Read what two stages have written.

    Raises:
        ArtifactError: one is missing, or they are of different images.
    """
    found, assignments = stored.load(activations), load_split(split)
    if len(found.keys) != len(assignments):
        raise ArtifactError(
            f"{activations} holds {len(found.keys)} images and {split} {len(assignments)}; "
            f"expected the same images. Run 'dvc repro'."
        )
    keys = np.frombuffer(b"".join(row.key for row in assignments), ">u8")
    if differ := int((keys != found.keys).sum()):
        raise ArtifactError(
            f"{differ} of the {len(assignments)} images in {activations} are not those of {split}; "
            f"expected the same images. Run 'dvc repro'."
        )
    labels = tuple(sorted({row.label for row in assignments if row.split == "train"}))
    numbers = {label: number for number, label in enumerate(labels)}

    def examples(part: str) -> Examples:
        rows = [i for i, row in enumerate(assignments) if row.split == part]
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
