"""The activations at the freeze boundary: a folder with one array and an index, written last."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from tlpipe import files
from tlpipe.data.images import Preprocessing
from tlpipe.errors import ArtifactError

_ARRAY, _INDEX = "activations.npy", "index.json"


class Origin(BaseModel):
    """What the activations were computed from; every later artifact carries it on.

    ``data_sha256`` is of the manifest, ``data_version`` DVC's hash of the source; ``threads`` is
    the number that ONNX Runtime, here and in every later stage, computes with, since another
    number may round differently.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    backbone: str
    weights: str
    weights_sha256: str
    freeze: str
    boundary: str
    preprocessing: Preprocessing
    data_sha256: str
    data_version: str
    provider: str
    threads: int


def create(folder: Path, count: int, width: int) -> "np.memmap[Any, np.dtype[np.float16]]":
    """Create the array inside ``folder`` on disk and return it, to be filled batch by batch."""
    return np.lib.format.open_memmap(
        folder / _ARRAY, mode="w+", dtype=np.float16, shape=(count, width)
    )


def finish(folder: Path, origin: Origin) -> None:
    """Write the index, which says that the folder is complete."""
    files.write_json(folder / _INDEX, origin.model_dump())


def load(folder: Path) -> tuple[npt.NDArray[np.float16], Origin]:
    """Map the activations (N, D) float16 into memory.

    Raises:
        ArtifactError: the folder is missing or incomplete.
    """
    origin = Origin(**files.read_json(folder / _INDEX))
    try:
        array = np.load(folder / _ARRAY, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{folder / _ARRAY} cannot be read: {error}. Run 'dvc repro'."
        ) from None
    return array, origin
