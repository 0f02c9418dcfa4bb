"""Many arrays of one shape on disk: a folder of chunks, each called by its content.

A chunk holds some neighbouring rows. Where it ends depends on the images in it alone, so that a
data set to which images were added shares most of its chunks with the one before: they are linked,
not written again, and DVC keeps and sends each of them once.
"""

import hashlib
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
        """Let go of the chunks; they are mapped again when they are read."""
        self._open.clear()

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
        """Write rows of this shape into ``folder``; ``known``: whose chunks may be taken over."""
        self.names: list[tuple[str, int]] = []
        self._folder = folder
        self._shape, self._dtype = row, np.dtype(dtype)
        self._known = known
        self._known_names = {name for name, _ in known.names} if known else set()
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
        name = f"{hashlib.sha256(b''.join(self._keys)).hexdigest()[:32]}.npy"
        self.names.append((name, len(self._keys)))
        path = self._folder / name
        if self._chunk is None and self._known is not None and name in self._known_names:
            path.unlink(missing_ok=True)  # the very same images may have stood together before
            files.link_or_copy(self._known.folder / name, path)
        elif self._chunk is not None or not path.exists():
            (self._chunk or self._begin()).close()
            (self._folder / _UNFINISHED).rename(path)
            if self._known is not None:
                self._known.unmap()
        self._keys, self._recalled, self._chunk = [], [], None


class RowFile:
    """A ``.npy`` file that grows row by row: written, not mapped, so as not to fill memory."""

    def __init__(self, path: Path, row: tuple[int, ...], dtype: str) -> None:
        """Begin a file of rows of this shape."""
        self.count = 0
        self._row, self._dtype = row, np.dtype(dtype)
        self._file: IO[bytes] = path.open("wb", buffering=_BUFFER)
        self._write_header()

    def append(self, row: Array) -> None:
        """Write one more row."""
        assert row.shape == self._row and row.dtype == self._dtype
        self._file.write(np.ascontiguousarray(row).data)
        self.count += 1

    def close(self) -> None:
        """Complete the file."""
        self._write_header()
        self._file.close()

    def _write_header(self) -> None:
        # NumPy leaves room in the header for the first axis to grow.
        self._file.seek(0)
        descr = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (self.count, *self._row)}
        np.lib.format.write_array_header_1_0(self._file, header)


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
