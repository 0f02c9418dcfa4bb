"""Many arrays of one shape on disk: a folder of chunks, each named by the digest of its bytes.

A chunk holds some neighbouring rows. Where it ends depends on the images in it alone, so that a
data set to which images were added shares most of its chunks with the one before: they are linked,
not written again, and DVC keeps and sends each of them once. Names say whether a chunk is intact,
and whoever hashes the names has hashed the content.
"""

import hashlib
import io
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from tlpipe import files
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
            name == _name(digest(self.folder / name, (count, *row), self.dtype))
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
                raise ArtifactError(f"{self.folder / name} is no chunk of it. Run 'dvc repro'.")
        found: Array = self._open[number][row - int(self._starts[number])]
        return found


class Writer:
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


def digest(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> str:
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


def _name(digest: str) -> str:
    return f"{digest[:32]}.npy"


def load_mapped(path: Path) -> Array:
    """Map an array into memory.

    Raises:
        ArtifactError: it cannot be read.
    """
    try:
        # A plain view: rows of NumPy's own memory map take ten times as long to look up.
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}. Run 'dvc repro'.") from None
