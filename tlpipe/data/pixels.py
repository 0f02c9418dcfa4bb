"""The pixels of a data set, decoded once: a folder of chunks and an index, written last."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from tlpipe import files
from tlpipe.data import chunks
from tlpipe.data.images import Pixels, Sampling

THUMBNAIL_PX = 64
_THUMBNAILS, _INDEX = "thumbnails.npy", "index.json"


@dataclass(frozen=True)
class PackedPixels:
    """What ``ingest`` keeps of the images.

    ``array``: (N, S, S, 3) uint8 RGB; ``thumbnails``: (N, 64, 64) uint8 gray; both memory-mapped.
    ``decoder``: what turned files into pixels; ``data_sha256``: of the manifest; ``data_version``:
    DVC's hash of the source.
    """

    array: chunks.Chunks
    thumbnails: Pixels
    sampling: Sampling
    decoder: str
    data_sha256: str
    data_version: str

    def intact(self) -> npt.NDArray[np.bool_]:
        """Return (N,) which images are as they were written; reads every byte."""
        index = files.read_json(self.array.folder / _INDEX)
        path = self.array.folder / _THUMBNAILS
        if chunks.digest(path, self.thumbnails.shape, self.thumbnails.dtype) != index["thumbnails"]:
            return np.zeros(len(self.array), bool)
        return self.array.intact()


class Writer:
    """Appends images to a folder; memory does not grow with their number."""

    def __init__(self, folder: Path, sampling: Sampling, known: PackedPixels | None = None) -> None:
        """Write into ``folder``; ``known``: pixels whose chunks may be taken over."""
        side = sampling.short_side_px
        self.folder = folder
        self.sampling = sampling
        self.array = chunks.Writer(folder, (side, side, 3), "|u1", known.array if known else None)
        size = (THUMBNAIL_PX, THUMBNAIL_PX)
        self._thumbnails = chunks.RowFile(folder / _THUMBNAILS, size, "|u1")
        self._thumbnails_digest = ""

    def append(self, key: bytes, square: Pixels | int, thumbnail: Pixels) -> None:
        """Write one more image.

        ``key``: 8 bytes that say which image it is; ``square``: (S, S, 3) uint8, or the row of the
        known pixels that it is; ``thumbnail``: (64, 64) uint8.
        """
        self.array.append(key, square)
        self._thumbnails.append(thumbnail)

    def close(self) -> None:
        """Complete the files."""
        self.array.close()
        self._thumbnails_digest = self._thumbnails.close()

    def finish(self, *, decoder: str, data_sha256: str, data_version: str) -> None:
        """Write the index, which says that the folder is complete."""
        index = {
            "chunks": self.array.names,
            "thumbnails": self._thumbnails_digest,
            "decoder": decoder,
            "data_sha256": data_sha256,
            "data_version": data_version,
            "sampling": self.sampling.model_dump(),
        }
        files.write_json(self.folder / _INDEX, index)


def keep_rows(
    everything: Writer, keys: npt.NDArray[np.uint64], rows: npt.NDArray[np.int64]
) -> Writer:
    """Write a folder again, in place, with the given rows only; ``keys``: (N,) big-endian."""
    folder, known = everything.folder, set_aside(everything, "everything")
    old = known.array.folder
    thumbnails = Thumbnails(old, len(keys))
    kept = Writer(folder, everything.sampling, known)
    for row in map(int, rows):
        kept.append(keys[row : row + 1].tobytes(), row, thumbnails.rows(row, row + 1)[0])
    kept.close()
    thumbnails.close()
    shutil.rmtree(old)
    return kept


def set_aside(written: Writer, name: str) -> PackedPixels:
    """Move what was written, which is complete, into a new folder of this name in its own."""
    folder, aside = written.folder, written.folder / name
    aside.mkdir()
    for file in {file for file, _ in written.array.names} | {_THUMBNAILS}:
        (folder / file).rename(aside / file)
    written.finish(decoder="", data_sha256="", data_version="")
    (folder / _INDEX).rename(aside / _INDEX)
    return load(aside)


def thumbnail(square: Image.Image) -> Pixels:
    """Return a square RGB image as (64, 64) uint8 gray, by which duplicates are found."""
    small = square.reduce(max(square.width // THUMBNAIL_PX, 1)).convert("L")
    return np.asarray(small.resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BOX))


class Thumbnails:
    """Thumbnails read from their file and not mapped: what is read does not stay in memory."""

    def __init__(self, folder: Path, count: int) -> None:
        """Take a folder, which may still be without its index, and the number of images in it."""
        self.count = count
        self._size = THUMBNAIL_PX * THUMBNAIL_PX
        self._descriptor = os.open(folder / _THUMBNAILS, os.O_RDONLY)
        self._start = os.fstat(self._descriptor).st_size - count * self._size

    def rows(self, start: int, stop: int) -> Pixels:
        """Return rows as (n, 64, 64) uint8."""
        data = os.pread(
            self._descriptor, (stop - start) * self._size, self._start + start * self._size
        )
        return np.frombuffer(data, np.uint8).reshape(-1, THUMBNAIL_PX, THUMBNAIL_PX)

    def pick(self, rows: Sequence[int]) -> Pixels:
        """Return the given rows as (n, 64, 64) uint8."""
        return np.concatenate([self.rows(row, row + 1) for row in rows])

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def load(folder: Path) -> PackedPixels:
    """Map the pixels into memory.

    Raises:
        ArtifactError: the folder is missing or incomplete.
    """
    files.finish_folder(folder)
    index = files.read_json(folder / _INDEX)
    sampling = Sampling(**index["sampling"])
    side = sampling.short_side_px
    names = tuple((str(name), int(count)) for name, count in index["chunks"])
    return PackedPixels(
        array=chunks.Chunks(folder, names, (side, side, 3), "|u1"),
        thumbnails=chunks.load_mapped(folder / _THUMBNAILS),
        sampling=sampling,
        decoder=index.get("decoder", ""),  # nothing where an older version wrote it
        data_sha256=index["data_sha256"],
        data_version=index["data_version"],
    )
