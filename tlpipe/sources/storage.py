"""Files by name: what every place has in common where a source may lie; folders, and memory.

Each storage lists its files and reads them one by one, and no name leads outside. What a disk, a
network or a store fails at is repeated (``attempt``); only then is it an error. With ``tenacity``
that loop would be as long: what counts as a failure and what is said of it is ours.
"""

import errno
import logging
import os
import re
import stat
import time
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import accumulate, islice, takewhile
from pathlib import Path, PurePosixPath
from typing import Protocol, TypeVar

from tlpipe.errors import DataError, ImageError, StoreError, TlpipeError

_log = logging.getLogger(__name__)
T = TypeVar("T")
PAUSES_S = (1.0, 2.0, 4.0)  # between the tries


def attempt(
    action: Callable[[], T],
    what: str,
    *,
    failures: tuple[type[Exception], ...] = (OSError, MemoryError),
    but: Callable[[Exception], bool] = lambda _: False,
) -> T:
    """Do what a disk, a network or a store may fail at; repeat it with growing pauses.

    ``what``: the subject of the message; ``failures``: the errors that are repeated; ``but``:
    whether one of them is an answer rather than a failure, and is passed on at once.

    Raises:
        StoreError: it fails every time.
    """
    for pause_s in (*PAUSES_S, None):
        try:
            return action()
        except TlpipeError:
            raise
        except failures as raised:
            error = _unmasked(raised)
            if but(error):
                raise error from None
            found = f"{type(error).__name__}: {error}"
            if pause_s is None:
                raise StoreError(
                    f"{what} cannot be reached: {found}. It was tried {len(PAUSES_S) + 1} times "
                    f"in {sum(PAUSES_S):g} s. Nothing was rejected or changed: check the "
                    f"connection, the credentials and the disk, then run again."
                ) from None
            _log.warning("%s: %s; trying again in %g s", what, found, pause_s)
        time.sleep(pause_s)
    raise AssertionError


def _unmasked(error: Exception) -> Exception:
    """Return what failed where fsspec says that a file is not there.

    It says so of a web server's file whatever fails while it asks for the size. What s3fs says so
    of has an answer of the server.
    """
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or not isinstance(cause, Exception):
        return error
    is_answer = hasattr(cause, "response") or getattr(cause, "status", None) in (404, 410)
    return error if is_answer else cause


MAX_FILE_BYTES = 512 * 2**20
_SURE_NS = 2_000_000_000
# What systems and programs leave behind.
_IGNORED = {
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "$recycle.bin"),
    *("system volume information", "lost+found", "@eadir"),
}

# A file of DVC's cache, named by its content: that is where DVC's own links lead.
_DVC_OBJECT = re.compile(r"/files/md5/[0-9a-f]{2}/[0-9a-f]{30}$")
_KEY = "ingest.follow_links: true reads what links lead to"

# What the system says of one file, and not of the disk or network that it lies on.
_MISSING = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG})
_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.ELOOP})


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
        """Close everything; raise an error if what was read has changed meanwhile."""


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
        rests = (name.removeprefix(under) for name in self._names_in(under))
        return sorted({rest.split("/")[0] for rest in rests if "/" in rest})

    def has_files(self, under: str) -> bool:
        """Return whether any file lies in ``under``."""
        return next(self._names_in(under), None) is not None

    def stamp(self, name: str) -> str:  # noqa: ARG002
        """Return nothing: reading again is quick, or nobody knows what has changed."""
        return ""

    def close(self) -> None:
        """Do nothing."""

    def _names_in(self, under: str) -> Iterator[str]:
        start = bisect_left(self._names, under)
        return takewhile(lambda name: name.startswith(under), islice(self._names, start, None))


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
    """A folder of this machine.

    Links to files are followed inside of it and into a cache of DVC; everywhere, and also those to
    folders, where ``follow_links`` is set.
    """

    def __init__(self, root: Path, *, follow_links: bool = False) -> None:
        """Take the folder."""
        self._root = root
        self._start = os.path.join(root, "")  # noqa: PTH118
        self._real_root = os.path.realpath(root)
        self._follow_links = follow_links
        self._is_inside = lru_cache(maxsize=4096)(self._leads_inside)

    def names(self) -> Iterator[str]:
        """Yield the names in order, one folder's listing in memory at a time.

        Raises:
            DataError: two names are one in Unicode's normal form, or a link to a folder leads
                outside and is not to be followed.
            StoreError: the disk or network that the folder lies on fails.
        """
        return self._walk("")

    def folders(self, under: str = "") -> list[str]:
        """Return the folders directly in ``under``."""
        return [name[:-1] for name in self._listed(under) if name.endswith("/")]

    def has_files(self, under: str) -> bool:
        """Return whether any file lies in ``under``."""
        return attempt(lambda: self._has_files(under), self._start + under)

    def links_outside(self) -> Iterator[tuple[str, str]]:
        """Yield the name and the target of each link to a file that will not be followed."""
        for name in self.names():
            path = self._start + name
            if os.path.islink(path) and not self._leads_inside(path):  # noqa: PTH114
                yield name, os.path.realpath(path)

    def read(self, name: str) -> bytes:
        """Return the bytes of a regular file that lies inside the folder.

        Raises:
            ImageError: it is missing, no regular file, leads outside or must not be read.
            DataError: it changes while it is read.
            StoreError: the disk or network that it lies on fails.
        """
        check_inside(name)
        path = self._start + name
        try:
            return attempt(lambda: self._read(path), path, but=_is_of_one_file)
        except OSError as error:
            if error.errno in _MISSING:
                raise ImageError("missing", "there is no such file") from None
            raise ImageError("unreadable", str(error.strerror or error)) from None

    def stamp(self, name: str) -> str:
        """Return size, times and inode of a regular file that was not written just now."""
        try:
            found = os.lstat(self._start + name)
        except OSError:
            return ""
        # Anybody can set the time of writing back, but not that of the last change. A second
        # change within the clock's tick would leave it as it is.
        is_old = time.time_ns() - found.st_ctime_ns > _SURE_NS
        known = (*identity(found), found.st_ctime_ns)
        return " ".join(map(str, known)) if stat.S_ISREG(found.st_mode) and is_old else ""

    def close(self) -> None:
        """Do nothing: every file was checked when it was read."""

    def _read(self, path: str) -> bytes:
        if not self._is_inside(os.path.dirname(path)):  # noqa: PTH120
            raise ImageError("outside_root", f"a folder that leads outside the source; {_KEY}")
        if stat.S_ISLNK(os.lstat(path).st_mode):
            if not self._leads_inside(path):
                raise ImageError("outside_root", f"a link that leads outside the source; {_KEY}")
            path = _target(path)
        before = os.stat(path, follow_symlinks=False)  # noqa: PTH116
        if not stat.S_ISREG(before.st_mode):
            raise ImageError("not_a_file", "a folder, a pipe, a socket or a device")
        check_size(before.st_size)
        with open(path, "rb", buffering=0, opener=_open_itself) as file:
            if identity(os.fstat(file.fileno())) != identity(before):
                raise _changed(path)
            # One call of the system returns 2 GiB at most, and a file on a network less.
            parts = [file.read(before.st_size + 1)]
            while parts[-1]:
                parts.append(file.read(2**20))
            data = b"".join(parts)
            after = os.fstat(file.fileno())
        if identity(after) != identity(before) or len(data) != before.st_size:
            raise _changed(path)
        return data

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
        return attempt(lambda: sorted(self._unsorted(under)), self._start + under)

    def _has_files(self, under: str) -> bool:
        # Not by the walk, which would list the whole folder to sort it.
        names = self._unsorted(under)
        return any(not n.endswith("/") or self._has_files(under + n) for n in names)

    def _unsorted(self, under: str) -> Iterator[str]:
        try:
            with os.scandir(self._root / under) as entries:
                for entry in entries:
                    if not is_ignored(entry.name):
                        is_folder = entry.is_dir(follow_symlinks=False) or (
                            _leads_to_folder(entry) and self._enters(under, entry)
                        )
                        yield entry.name + "/" if is_folder else entry.name
        except OSError as error:
            if _is_of_one_file(error):
                raise DataError(
                    f"the folder {error.filename} cannot be read: {error.strerror}."
                ) from None
            raise

    def _enters(self, under: str, link: "os.DirEntry[str]") -> bool:
        """Return whether to list what a link to a folder leads to: not what the link lies in.

        Raises:
            DataError: it leads outside, and links are not followed.
        """
        target = os.path.realpath(link.path)
        if not self._follow_links:
            if self._leads_inside(target):
                return False
            raise DataError(
                f"{link.path} is a link to the folder {target}, which lies outside of the source; "
                f"expected folders inside. To read what links lead to, set ingest.follow_links: "
                f"true; DVC then sees no change in {target}. Or remove the link."
            )
        inner = ["", *accumulate(under.split("/")[:-1], "{}/{}".format)]
        return target not in (os.path.realpath(self._start + name) for name in inner)

    def _leads_inside(self, path: str) -> bool:
        real = os.path.realpath(path)
        return (
            self._follow_links
            or real == self._real_root
            or real.startswith(self._real_root + os.sep)
            or _DVC_OBJECT.search(real) is not None
        )


def check_inside(name: str) -> None:
    """Raise an error for a name that leads out of where it is looked for.

    Raises:
        ImageError: it is absolute or goes upwards.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ImageError("outside_root", "a path that leads outside the source")


def check_size(file_bytes: int) -> None:
    """Raise an error for a file that is no image any more, before it is read.

    Raises:
        ImageError: it has more than ``MAX_FILE_BYTES``.
    """
    if file_bytes > MAX_FILE_BYTES:
        detail = f"{file_bytes:,} bytes; at most {MAX_FILE_BYTES:,} are read"
        raise ImageError("too_many_bytes", detail)


def check_collisions(where: str, names: Collection[str]) -> None:
    """Raise an error for names that some file systems hold equal.

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


def _is_of_one_file(error: Exception) -> bool:
    """Return whether the system says it of this file, and not of the disk that it lies on."""
    return isinstance(error, OSError) and error.errno in _MISSING | _FORBIDDEN


def _leads_to_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_symlink() and entry.is_dir()
    except OSError as error:
        if _is_of_one_file(error):
            return False  # a link that leads to itself
        raise


def _target(link: str) -> str:
    """Return what a link leads to; one that leads nowhere is there but cannot be read."""
    try:
        return os.path.realpath(link, strict=True)
    except FileNotFoundError:
        raise ImageError("unreadable", "a link that leads nowhere") from None


def _open_itself(path: str, flags: int) -> int:
    """Open a file, but no link in its place; a pipe in its place is not waited for."""
    try:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _changed(path) from None
        raise


def _changed(path: str) -> DataError:
    return DataError(f"{path} changed while it was read. Let it be finished, then run again.")
