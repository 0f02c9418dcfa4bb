"""The pixels of a data set, decoded once, and how arrays of one shape lie on disk: in chunks.

Both are folders with their index written last. A chunk holds some neighbouring rows, and is named
by the digest of its bytes. Where it ends depends on the images in it alone, so that a data set to
which images were added shares most of its chunks with the one before: they are linked, not written
again, and DVC keeps and sends each of them once. Names say whether a chunk is intact, and whoever
hashes the names has hashed the content.
"""

import hashlib
import io
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from tlpipe import files
from tlpipe.data.images import Pixels, Sampling
from tlpipe.errors import ArtifactError

Array = npt.NDArray[Any]
Names = Sequence[tuple[str, int]]
# A chunk ends after every 32nd row on average, and before it has more bytes than this.
_ENDS, _BYTES = 32, 2**24
_MOST_MAPPED = 16_384  # a quarter of what Linux allows a process
_UNFINISHED, _BUFFER = ".chunk", 2**18


class Chunks(Sequence[Array]):
    """(N, ...) in chunks, memory-mapped; indexed as an array is by its first axis."""

    def __init__(self, folder: Path, names: Names, row: tuple[int, ...], dtype: str) -> None:
        """Take the folder, its chunks' names and lengths in order, and what a row is."""
        self.folder = folder
        self.names = names
        self.dtype = np.dtype(dtype)
        self._starts = np.array([0, *accumulate(count for _, count in names)])
        self._open: dict[int, Array] = {}
        self.shape = (int(self._starts[-1]), *row)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: "int | slice | Sequence[int] | npt.NDArray[np.int64]") -> Array:  # type: ignore[override]
        if isinstance(rows, (int, np.integer)):
            if not -len(self) <= rows < len(self):
                raise IndexError(f"row {rows} of {len(self)}")
            return self._row(int(rows) % len(self))
        if isinstance(rows, slice):
            rows = range(*rows.indices(len(self)))
        picked = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for position, row in enumerate(rows):
            picked[position] = self._row(int(row))
        return picked

    def unmap(self) -> None:
        """Unmap the chunks; they are mapped again when they are read."""
        self._open.clear()

    def intact(self) -> npt.NDArray[np.bool_]:
        """Return (N,) which rows lie in chunks that are what their names say; reads every byte."""
        row = self.shape[1:]
        found = [
            name == _name(chunk_digest(self.folder / name, (count, *row), self.dtype))
            for name, count in self.names
        ]
        return np.repeat(np.array(found, bool), [count for _, count in self.names])

    def named(self, rows: Sequence[int]) -> str | None:
        """Return the name of the chunk that holds just these rows in this order, if one does."""
        number = int(np.searchsorted(self._starts, rows[0], side="right")) - 1
        start, end = self._starts[number : number + 2]
        return self.names[number][0] if list(rows) == list(range(start, end)) else None

    def _row(self, row: int) -> Array:
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        if number not in self._open:
            if len(self._open) == _MOST_MAPPED:
                self._open.pop(next(iter(self._open)))
            name, count = self.names[number]
            self._open[number] = chunk = load_mapped(self.folder / name)
            if (chunk.shape, chunk.dtype) != ((count, *self.shape[1:]), self.dtype):
                raise ArtifactError(f"{self.folder / name} is no chunk of it. Run 'tlpipe run'.")
        found: Array = self._open[number][row - int(self._starts[number])]
        return found


class ChunkWriter:
    """Appends rows to a folder; memory does not grow with their number."""

    def __init__(
        self, folder: Path, row: tuple[int, ...], dtype: str, known: Chunks | None = None
    ) -> None:
        """Write rows of this shape into ``folder``.

        ``known``: whose chunks may be taken over, unread; the rows asked for must be intact.
        """
        self.names: list[tuple[str, int]] = []
        self._folder = folder
        self._shape, self._dtype = row, np.dtype(dtype)
        self._known = known
        self._most = max(1, _BYTES // (int(np.prod(row)) * self._dtype.itemsize))
        self._keys: list[bytes] = []
        self._recalled: list[int] = []
        self._chunk: RowFile | None = None

    def append(self, key: bytes, row: Array | int) -> None:
        """Write one more row.

        ``key``: 8 bytes that say which image it is of; ``row``: the row, or its number among the
        known ones.
        """
        self._keys.append(key)
        # A chunk of known rows alone may be there already: that is seen when it ends.
        if isinstance(row, int):
            self._recalled.append(row)
            if self._chunk is not None:
                self._write_recalled(self._chunk)
        else:
            if self._chunk is None:
                self._chunk = self._begin()
            self._chunk.append(row)
        if int.from_bytes(key) % _ENDS == 0 or len(self._keys) == self._most:
            self._finish()

    def close(self) -> None:
        """Complete the files."""
        if self._keys:
            self._finish()

    def _begin(self) -> "RowFile":
        chunk = RowFile(self._folder / _UNFINISHED, self._shape, self._dtype.str)
        self._write_recalled(chunk)
        return chunk

    def _write_recalled(self, chunk: "RowFile") -> None:
        for row in self._recalled:
            assert self._known is not None
            chunk.append(self._known[row])
            if chunk.count % _ENDS == 0:
                self._known.unmap()  # what was read would count as memory until the chunk ends
        self._recalled = []

    def _finish(self) -> None:
        name = None
        if self._chunk is None and self._known is not None:
            name = self._known.named(self._recalled)
        if name is not None and self._known is not None:
            if not (self._folder / name).exists():  # equal images may have stood together before
                files.link_or_copy(self._known.folder / name, self._folder / name)
        else:
            name = _name((self._chunk or self._begin()).close())
            (self._folder / _UNFINISHED).replace(self._folder / name)
            if self._known is not None:
                self._known.unmap()
        self.names.append((name, len(self._keys)))
        self._keys, self._recalled, self._chunk = [], [], None


class RowFile:
    """A ``.npy`` file that grows row by row: written, not mapped, so as not to fill memory."""

    def __init__(self, path: Path, row: tuple[int, ...], dtype: str) -> None:
        """Begin a file of rows of this shape."""
        self.count = 0
        self._row, self._dtype = row, np.dtype(dtype)
        self._digest = hashlib.sha256()
        self._file: IO[bytes] = path.open("wb", buffering=_BUFFER)
        self._file.write(_header((0, *row), self._dtype))

    def append(self, row: Array) -> None:
        """Write one more row."""
        assert row.shape == self._row and row.dtype == self._dtype
        data = np.ascontiguousarray(row).data
        self._file.write(data)
        self._digest.update(data)
        self.count += 1

    def close(self) -> str:
        """Complete the file; return its digest, as ``digest`` does."""
        header = _header((self.count, *self._row), self._dtype)
        # NumPy leaves room in the header for the first axis to grow.
        self._file.seek(0)
        self._file.write(header)
        self._file.close()
        self._digest.update(header)
        return self._digest.hexdigest()


def chunk_digest(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> str:
    """Return the sha256 of a ``.npy`` file's rows and then its header, or nothing.

    In this order it is known without a second look when a file is complete that grew row by row.
    Nothing is returned for a file that is missing, of another shape or of another type.
    """
    header = _header(shape, dtype)
    try:
        with path.open("rb") as file:
            if file.read(len(header)) != header:
                return ""
            found = hashlib.file_digest(file, "sha256")
    except OSError:
        return ""
    found.update(header)
    return found.hexdigest()


def _header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    header = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(dtype)
    found = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, found)
    return header.getvalue()


def _name(sha256: str) -> str:
    return f"{sha256[:32]}.npy"


def load_mapped(path: Path) -> Array:
    """Map an array into memory.

    Raises:
        ArtifactError: it cannot be read.
    """
    try:
        # A plain view: rows of NumPy's own memory map take ten times as long to look up.
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}. Run 'tlpipe run'.") from None


THUMBNAIL_PX = 64
_THUMBNAILS, _INDEX = "thumbnails.npy", "index.json"


@dataclass(frozen=True)
class PackedPixels:
    """What ``ingest`` keeps of the images.

    ``array``: (N, S, S, 3) uint8 RGB; ``thumbnails``: (N, 64, 64) uint8 gray; both memory-mapped.
    ``decoder``: what turned files into pixels; ``data_sha256``: of the manifest; ``data_version``:
    DVC's hash of the source.
    """

    array: Chunks
    thumbnails: Pixels
    sampling: Sampling
    decoder: str
    data_sha256: str
    data_version: str

    def intact(self) -> npt.NDArray[np.bool_]:
        """Return (N,) which images are as they were written; reads every byte."""
        index = files.read_json(self.array.folder / _INDEX)
        path = self.array.folder / _THUMBNAILS
        if chunk_digest(path, self.thumbnails.shape, self.thumbnails.dtype) != index["thumbnails"]:
            return np.zeros(len(self.array), bool)
        return self.array.intact()


class Writer:
    """Appends images to a folder; memory does not grow with their number."""

    def __init__(self, folder: Path, sampling: Sampling, known: PackedPixels | None = None) -> None:
        """Write into ``folder``; ``known``: pixels whose chunks may be taken over."""
        side = sampling.short_side_px
        self.folder = folder
        self.sampling = sampling
        self.array = ChunkWriter(folder, (side, side, 3), "|u1", known.array if known else None)
        size = (THUMBNAIL_PX, THUMBNAIL_PX)
        self._thumbnails = RowFile(folder / _THUMBNAILS, size, "|u1")
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
        array=Chunks(folder, names, (side, side, 3), "|u1"),
        thumbnails=load_mapped(folder / _THUMBNAILS),
        sampling=sampling,
        decoder=index.get("decoder", ""),  # nothing where an older version wrote it
        data_sha256=index["data_sha256"],
        data_version=index["data_version"],
    )
