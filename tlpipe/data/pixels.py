"""The pixels of a data set, decoded once: a folder of chunks and an index, written last.

A chunk holds some neighbouring images and is called by its content. Where a chunk begins depends on
the images in it alone, so that a data set to which images were added shares most of its chunks with
the one before: they are linked, not written again, and DVC keeps and sends each of them once.
"""

import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
from PIL import Image

from tlpipe import files
from tlpipe.data.images import Pixels, Sampling
from tlpipe.errors import ArtifactError

THUMBNAIL_PX = 64
_THUMBNAILS, _INDEX = "thumbnails.npy", "index.json"
# A chunk ends after every 32nd image on average, and before it has more bytes than this.
_CHUNK_ENDS, _CHUNK_BYTES = 32, 2**24
_MOST_MAPPED = 16_384  # a quarter of what Linux allows a process


class Squares(Sequence[Pixels]):
    """(N, S, S, 3) uint8 RGB in chunks, memory-mapped; indexed as an array is by its first axis."""

    def __init__(self, folder: Path, chunks: Sequence[tuple[str, int]], side: int) -> None:
        """Take the folder and its chunks' names and lengths, in order."""
        self._folder = folder
        self._chunks = chunks
        self._starts = np.array([0, *accumulate(count for _, count in chunks)])
        self._open: dict[int, Pixels] = {}
        self.shape = (int(self._starts[-1]), side, side, 3)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: "int | slice | Sequence[int] | npt.NDArray[np.int64]") -> Pixels:  # type: ignore[override]
        if isinstance(rows, (int, np.integer)):
            if not -len(self) <= rows < len(self):
                raise IndexError(f"row {rows} of {len(self)}")
            return self._row(int(rows) % len(self))
        if isinstance(rows, slice):
            rows = range(*rows.indices(len(self)))
        picked = np.empty((len(rows), *self.shape[1:]), np.uint8)
        for position, row in enumerate(rows):
            picked[position] = self._row(int(row))
        return picked

    def unmap(self) -> None:
        """Let go of the chunks; they are mapped again when they are read."""
        self._open.clear()

    def _row(self, row: int) -> Pixels:
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        if number not in self._open:
            if len(self._open) == _MOST_MAPPED:
                self._open.pop(next(iter(self._open)))
            name, count = self._chunks[number]
            self._open[number] = chunk = _map(self._folder / name)
            if chunk.shape != (count, *self.shape[1:]):
                raise ArtifactError(f"{self._folder / name} is no chunk of it. Run 'dvc repro'.")
        square: Pixels = self._open[number][row - int(self._starts[number])]
        return square


@dataclass(frozen=True)
class PackedPixels:
    """What ``ingest`` keeps of the images.

    ``array``: (N, S, S, 3) uint8 RGB; ``thumbnails``: (N, 64, 64) uint8 gray; both memory-mapped.
    ``data_sha256``: of the manifest; ``data_version``: DVC's hash of the source.
    """

    array: Squares
    thumbnails: Pixels
    sampling: Sampling
    data_sha256: str
    data_version: str
    folder: Path
    chunks: tuple[tuple[str, int], ...]


class Writer:
    """Appends images to a folder; memory does not grow with their number."""

    def __init__(self, folder: Path, sampling: Sampling, known: PackedPixels | None = None) -> None:
        """Write into ``folder``; ``known``: pixels whose chunks may be taken over."""
        side = sampling.short_side_px
        self.chunks: list[tuple[str, int]] = []
        self.folder = folder
        self.sampling = sampling
        self._known = known
        self._known_chunks = {name for name, _ in known.chunks} if known else set()
        self._most = max(1, _CHUNK_BYTES // (3 * side * side))
        self._keys: list[bytes] = []
        self._pending: list[Pixels | int] = []
        self._thumbnails = _Rows(folder / _THUMBNAILS, (THUMBNAIL_PX, THUMBNAIL_PX))

    def append(self, key: bytes, square: Pixels | int, thumbnail: Pixels) -> None:
        """Write one more image.

        ``key``: 8 bytes that say which image it is; ``square``: (S, S, 3) uint8, or the row of the
        known pixels that it is; ``thumbnail``: (64, 64) uint8.
        """
        self._keys.append(key)
        self._pending.append(square)
        self._thumbnails.append(thumbnail)
        if int.from_bytes(key) % _CHUNK_ENDS == 0 or len(self._keys) == self._most:
            self._write_chunk()

    def close(self) -> None:
        """Complete the files."""
        if self._keys:
            self._write_chunk()
        self._thumbnails.close()

    def finish(self, data_sha256: str, data_version: str) -> None:
        """Write the index, which says that the folder is complete."""
        index = {
            "chunks": self.chunks,
            "data_sha256": data_sha256,
            "data_version": data_version,
            "sampling": self.sampling.model_dump(),
        }
        files.write_json(self.folder / _INDEX, index)

    def _write_chunk(self) -> None:
        name = f"{hashlib.sha256(b''.join(self._keys)).hexdigest()[:32]}.npy"
        self.chunks.append((name, len(self._keys)))
        path = self.folder / name
        # The very same images may have stood together before.
        if not path.exists():
            if self._known is not None and name in self._known_chunks:
                _link(self._known.folder / name, path)
            else:
                rows = [s if isinstance(s, np.ndarray) else self._recall(s) for s in self._pending]
                np.save(path, np.stack(rows))
                if self._known is not None:
                    self._known.array.unmap()
        self._keys, self._pending = [], []

    def _recall(self, row: int) -> Pixels:
        assert self._known is not None
        return self._known.array[row]


def keep_rows(
    everything: Writer, keys: npt.NDArray[np.uint64], rows: npt.NDArray[np.int64]
) -> Writer:
    """Write a folder again, in place, with the given rows only; ``keys``: (N,) big-endian."""
    folder, sampling = everything.folder, everything.sampling
    old = folder / "everything"
    old.mkdir()
    for name in {name for name, _ in everything.chunks} | {_THUMBNAILS}:
        (folder / name).rename(old / name)
    everything.finish("", "")
    (folder / _INDEX).rename(old / _INDEX)
    thumbnails = Thumbnails(old, len(keys))
    kept = Writer(folder, sampling, load(old))
    for row in map(int, rows):
        kept.append(keys[row : row + 1].tobytes(), row, thumbnails.rows(row, row + 1)[0])
    kept.close()
    thumbnails.close()
    shutil.rmtree(old)
    return kept


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


class _Rows:
    """A ``.npy`` file that grows row by row: written, not mapped, so as not to fill memory."""

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self._shape = shape
        self._count = 0
        self._file: IO[bytes] = path.open("wb")
        self._write_header()

    def append(self, row: Pixels) -> None:
        assert row.shape == self._shape and row.dtype == np.uint8
        self._file.write(np.ascontiguousarray(row).data)
        self._count += 1

    def close(self) -> None:
        self._write_header()
        self._file.close()

    def _write_header(self) -> None:
        # NumPy leaves room in the header for the first axis to grow.
        self._file.seek(0)
        header = {"descr": "|u1", "fortran_order": False, "shape": (self._count, *self._shape)}
        np.lib.format.write_array_header_1_0(self._file, header)


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
    index = files.read_json(folder / _INDEX)
    sampling = Sampling(**index["sampling"])
    chunks = tuple((str(name), int(count)) for name, count in index["chunks"])
    return PackedPixels(
        array=Squares(folder, chunks, sampling.short_side_px),
        thumbnails=_map(folder / _THUMBNAILS),
        sampling=sampling,
        data_sha256=index["data_sha256"],
        data_version=index["data_version"],
        folder=folder,
        chunks=chunks,
    )


def _map(path: Path) -> Pixels:
    try:
        array: Pixels = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}. Run 'dvc repro'.") from None
    return array
