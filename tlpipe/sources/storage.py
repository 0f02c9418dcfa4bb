"""Files by name: what every place has in common where a source may lie; folders, and memory.

Each storage lists its files and reads them one by one, and no name leads outside.
"""

import errno
import os
import stat
import time
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Protocol

from tlpipe.errors import DataError, ImageError

MAX_FILE_BYTES = 512 * 2**20
_SURE_NS = 2_000_000_000
# What systems and programs leave behind.
_IGNORED = {
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "$recycle.bin"),
    *("system volume information", "lost+found", "@eadir"),
}


class Storage(Protocol):
    """Files by name; names are relative, with ``/``."""

    def names(self) -> Iterator[str]:
        """Yield the names of all files in the order of their characters."""

    def folders(self, under: str = "") -> list[str]:
        """Return the names of the folders that lie directly in the folder ``under``."""

    def has_files(self, under: str) -> bool:
        """Return whether any file lies in the folder ``under``, at any depth."""

    def read(self, name: str) -> bytes:
        """Return a file's bytes, or raise ``ImageError`` with the reason why not."""

    def stamp(self, name: str) -> str:
        """Return what changes when a file does, found without reading it; or nothing."""

    def close(self) -> None:
        """Let go of everything; refuse if what was read has changed meanwhile."""


class Listed:
    """Base of what knows all of its files' names from the start."""

    def __init__(self, names: Iterable[str]) -> None:
        """Take the names, in any order."""
        self._names = sorted(names)

    def names(self) -> Iterator[str]:
        """Yield the names in order."""
        return iter(self._names)

    def folders(self, under: str = "") -> list[str]:
        """Return the folders directly in ``under``."""
        rests = (name.removeprefix(under) for name in self._names if name.startswith(under))
        return sorted({rest.split("/")[0] for rest in rests if "/" in rest})

    def has_files(self, under: str) -> bool:
        """Return whether any file lies in ``under``."""
        return any(name.startswith(under) for name in self._names)

    def stamp(self, name: str) -> str:  # noqa: ARG002
        """Return nothing: reading again is quick, or nobody knows what has changed."""
        return ""

    def close(self) -> None:
        """Do nothing."""


class Memory(Listed):
    """Files that are made when they are read."""

    def __init__(self, files: Mapping[str, Callable[[], bytes]]) -> None:
        """Take the maker of each file's bytes, by name."""
        super().__init__(files)
        self._files = files

    def read(self, name: str) -> bytes:
        """Return a file's bytes."""
        return self._files[name]()


class Folder:
    """A folder of this machine. Links to files inside it are followed, links to folders never."""

    def __init__(self, root: Path) -> None:
        """Take the folder."""
        self._root = root
        self._start = os.path.join(root, "")  # noqa: PTH118
        self._real_root = os.path.realpath(root)
        self._is_inside = lru_cache(maxsize=4096)(self._leads_inside)

    def names(self) -> Iterator[str]:
        """Yield the names in order, one folder's listing in memory at a time."""
        return self._walk("")

    def folders(self, under: str = "") -> list[str]:
        """Return the folders directly in ``under``."""
        return [name[:-1] for name in self._listed(under) if name.endswith("/")]

    def has_files(self, under: str) -> bool:
        """Return whether any file lies in ``under``."""
        # Not by the walk, which would list the whole folder to sort it.
        names = self._unsorted(under)
        return any(not n.endswith("/") or self.has_files(under + n) for n in names)

    def read(self, name: str) -> bytes:
        """Return the bytes of a regular file that lies inside the folder.

        Raises:
            ImageError: it is missing, no regular file, leads outside or cannot be read.
            DataError: it changes while it is read.
        """
        check_inside(name)
        path = self._start + name
        try:
            if not self._is_inside(os.path.dirname(path)):  # noqa: PTH120
                raise ImageError("outside_root", "a folder that leads outside the source")
            if stat.S_ISLNK(os.lstat(path).st_mode):
                if not self._leads_inside(path):
                    raise ImageError("outside_root", "a link that leads outside the source")
                before = _stat_target(path)
            else:
                before = os.stat(path)  # noqa: PTH116
            if not stat.S_ISREG(before.st_mode):
                raise ImageError("not_a_file", "a folder, a pipe, a socket or a device")
            check_size(before.st_size)
            with open(path, "rb", buffering=0) as file:  # noqa: PTH123
                data = file.read(before.st_size + 1)
                after = os.fstat(file.fileno())
        except FileNotFoundError:
            raise ImageError("missing", "there is no such file") from None
        except OSError as error:
            raise ImageError("unreadable", str(error.strerror or error)) from None
        if identity(before) != identity(after) or len(data) != before.st_size:
            raise DataError(
                f"{path} changed while it was read. Let it be finished, then run again."
            )
        return data

    def stamp(self, name: str) -> str:
        """Return size, time and inode of a regular file that was not written just now."""
        try:
            found = os.lstat(self._start + name)
        except OSError:
            return ""
        # A second change within the clock's tick would leave the time as it is.
        is_old = time.time_ns() - found.st_mtime_ns > _SURE_NS
        return " ".join(map(str, identity(found))) if stat.S_ISREG(found.st_mode) and is_old else ""

    def close(self) -> None:
        """Do nothing: every file was checked when it was read."""

    def _walk(self, under: str) -> Iterator[str]:
        names = self._listed(under)
        check_collisions(under, [name.rstrip("/") for name in names])
        for name in names:
            if name.endswith("/"):
                yield from self._walk(under + name)
            else:
                yield under + name

    def _listed(self, under: str) -> list[str]:
        """Return what lies in a folder; with its slash a folder sorts as its files do."""
        return sorted(self._unsorted(under))

    def _unsorted(self, under: str) -> Iterator[str]:
        try:
            with os.scandir(self._root / under) as entries:
                for entry in entries:
                    if not is_ignored(entry.name):
                        is_folder = entry.is_dir(follow_symlinks=False)
                        yield entry.name + "/" if is_folder else entry.name
        except OSError as error:
            raise DataError(
                f"the folder {error.filename} cannot be read: {error.strerror}."
            ) from None

    def _leads_inside(self, path: str) -> bool:
        real = os.path.realpath(path)
        return real == self._real_root or real.startswith(self._real_root + os.sep)


def check_inside(name: str) -> None:
    """Refuse a name that leads out of where it is looked for.

    Raises:
        ImageError: it is absolute or goes upwards.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ImageError("outside_root", "a path that leads outside the source")


def check_size(file_bytes: int) -> None:
    """Refuse a file that is no image any more, before it is read.

    Raises:
        ImageError: it has more than ``MAX_FILE_BYTES``.
    """
    if file_bytes > MAX_FILE_BYTES:
        detail = f"{file_bytes:,} bytes; at most {MAX_FILE_BYTES:,} are read"
        raise ImageError("too_many_bytes", detail)


def check_collisions(where: str, names: Collection[str]) -> None:
    """Refuse names that some file systems hold equal.

    Raises:
        DataError: two names have the same normal form.
    """
    if all(map(str.isascii, names)):
        return
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(unicodedata.normalize("NFC", name), name)
        if other != name:
            raise DataError(
                f"{where or 'the source'} holds {other!r} and {name!r}, which are one name in "
                f"Unicode's normal form (NFC); expected one of them. Rename or remove the other."
            )


def is_ignored(name: str) -> bool:
    """Return whether nobody means such a file or folder to be data."""
    return name.startswith(".") or name.lower() in _IGNORED


def identity(status: os.stat_result) -> tuple[int, int, int]:
    """Return what changes when a file is written or replaced."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def _stat_target(path: str) -> os.stat_result:
    """Return what a link leads to; one that leads nowhere is there but cannot be read."""
    try:
        return os.stat(path)  # noqa: PTH116
    except FileNotFoundError as error:
        raise OSError(errno.EIO, "a link that leads nowhere") from error
