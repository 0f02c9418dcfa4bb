"""The pixels of a data set, decoded once: a folder with one array and an index, written last."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tlpipe import files
from tlpipe.data.images import Pixels, Sampling
from tlpipe.errors import ArtifactError

_ARRAY, _INDEX = "pixels.npy", "index.json"


@dataclass(frozen=True)
class PackedPixels:
    """``array``: (N, S, S, 3) uint8 RGB, memory-mapped; ``data_sha256``: of the manifest."""

    array: Pixels
    sampling: Sampling
    data_sha256: str


def create(folder: Path, count: int, sampling: Sampling) -> Pixels:
    """Create the array inside ``folder`` on disk and return it, to be filled row by row."""
    side = sampling.short_side_px
    shape = (count, side, side, 3)
    return np.lib.format.open_memmap(folder / _ARRAY, mode="w+", dtype=np.uint8, shape=shape)


def keep_rows(folder: Path, rows: list[int]) -> None:
    """Write the array again with the given rows only, one row in memory at a time."""
    old = folder / f"all-{_ARRAY}"
    (folder / _ARRAY).rename(old)
    source = np.load(old, mmap_mode="r")
    shape = (len(rows), *source.shape[1:])
    target = np.lib.format.open_memmap(folder / _ARRAY, mode="w+", dtype=np.uint8, shape=shape)
    for position, row in enumerate(rows):
        target[position] = source[row]
    target.flush()
    old.unlink()


def finish(folder: Path, sampling: Sampling, data_sha256: str) -> None:
    """Write the index, which says that the folder is complete."""
    index = {"data_sha256": data_sha256, "sampling": sampling.model_dump()}
    files.write_json(folder / _INDEX, index)


def load(folder: Path) -> PackedPixels:
    """Map the pixels into memory.

    Raises:
        ArtifactError: the folder is missing or incomplete.
    """
    index = files.read_json(folder / _INDEX)
    try:
        array = np.load(folder / _ARRAY, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{folder / _ARRAY} cannot be read: {error}. Run 'dvc repro'."
        ) from None
    return PackedPixels(array, Sampling(**index["sampling"]), index["data_sha256"])
