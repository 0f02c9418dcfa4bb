"""Zip and tar archives as storage: read member by member, nothing is ever unpacked."""

import os
import stat
import struct
import tarfile
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import takewhile
from pathlib import PurePosixPath
from typing import IO

from tlpipe.errors import DataError, ImageError
from tlpipe.sources.storage import (
    Listed,
    check_collisions,
    check_inside,
    check_size,
    identity,
    is_ignored,
)

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MAX_MEMBERS = 500_000
MAX_EXPANSION = 100
_SPARE_BYTES = 2**30
Member = tuple[int, Callable[[], bytes]]  # its size, and what reads it


class Archive(Listed):
    """The members of a zip or tar file, read from where they lie in it."""

    def __init__(self, file: IO[bytes], address: str, members: Mapping[str, Member]) -> None:
        """Take the open file, its name for messages, and what reads each member."""
        self.closing = ExitStack()  # what ends with the archive
        self._file = file
        self._address = address
        self._state = identity(os.fstat(file.fileno()))
        self._top = _common_folder(members)
        self._members = {
            name.removeprefix(self._top): member
            for name, member in members.items()
            if not any(is_ignored(part) for part in name.split("/"))
        }
        check_collisions(address, self._members)
        super().__init__(self._members)

    def read(self, name: str) -> bytes:
        """Return a member's bytes, never more than its header states.

        Raises:
            ImageError: it is missing, encrypted, damaged or too large.
        """
        check_inside(name)
        member = self._members.get(name)
        if member is None:
            raise ImageError("missing", "the archive has no such member")
        size, read = member
        check_size(size)
        try:
            data: bytes = read()
        except (OSError, RuntimeError, NotImplementedError, zipfile.BadZipFile, EOFError) as error:
            raise ImageError("unreadable", f"{type(error).__name__}: {error}") from None
        except Exception as error:
            # zlib, bz2 and lzma raise errors of their own.
            raise ImageError("corrupt", f"{type(error).__name__}: {error}") from None
        return data

    def close(self) -> None:
        """Close the file.

        Raises:
            DataError: it has changed since it was opened.
        """
        after = identity(os.fstat(self._file.fileno()))
        self.closing.close()
        if after != self._state:
            raise DataError(f"{self._address} changed while it was read. Run again.")


def open_archive(file: IO[bytes], address: str) -> Archive:
    """Open a zip or tar file; ``file`` is closed with the archive, or where it is none.

    Raises:
        DataError: it is neither, damaged, too large when unpacked, or holds a member that would
            lead outside, a link or a device.
    """
    try:
        with ExitStack() as opened:
            opened.enter_context(file)
            if zipfile.is_zipfile(file):
                members = _zip_members(file, address)
            else:
                file.seek(0)
                members = _tar_members(file, address, opened)
            archive = Archive(file, address, members)
            archive.closing = opened.pop_all()
            return archive
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise DataError(
            f"ingest.source {address} cannot be read as an archive ({error}); expected a folder, a "
            f"zip or tar archive, or the YAML file of a built-in data set. A table is read from "
            f"the folder that holds it with its images: name that folder."
        ) from None


def _zip_members(file: IO[bytes], address: str) -> dict[str, Member]:
    # zipfile would build an object for each member before anyone could count them.
    _check_count(_zip_count(file), address)
    archive = zipfile.ZipFile(file)
    members: dict[str, Member] = {}
    total = 0
    for info in archive.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16)
        _check_member(info.filename, address, is_plain=kind in (0, stat.S_IFREG, stat.S_IFDIR))
        if info.is_dir():
            continue
        total += info.file_size
        _check_total(total, file, address)
        if info.filename in members:
            raise DataError(f"{address} holds {info.filename!r} twice; expected one of each name.")
        members[info.filename] = (info.file_size, partial(archive.read, info))
    return members


def _zip_count(file: IO[bytes]) -> int:
    """Return the number of members that the archive's end states (APPNOTE.TXT 4.3.14, 4.3.16)."""
    size = file.seek(0, os.SEEK_END)
    start = max(size - 2**16 - 22 - 76, 0)
    file.seek(start)
    tail = file.read()
    count = 0
    if (end := tail.rfind(b"PK\5\6")) >= 0 and len(tail) >= end + 12:
        count = struct.unpack_from("<H", tail, end + 10)[0]
    if (end := tail.rfind(b"PK\6\6")) >= 0 and len(tail) >= end + 40:
        count = max(count, struct.unpack_from("<Q", tail, end + 32)[0])
    file.seek(0)
    return count


def _tar_members(file: IO[bytes], address: str, opened: ExitStack) -> dict[str, Member]:
    plain = _decompressed(file, address, opened)
    members: dict[str, Member] = {}
    archive = tarfile.open(fileobj=plain, mode="r:")  # noqa: SIM115  shares the file
    lock = threading.Lock()

    def read(offset: int, size: int) -> bytes:
        with lock:
            plain.seek(offset)
            return plain.read(size)

    number = 0
    while (info := archive.next()) is not None:
        archive.members = []  # type: ignore[attr-defined] # it keeps every header otherwise
        number += 1
        _check_count(number, address)
        is_plain = info.isdir() or (info.isreg() and not info.issparse())
        _check_member(info.name, address, is_plain=is_plain)
        if info.isdir():
            continue
        name = info.name.removeprefix("./")
        if name in members:
            raise DataError(f"{address} holds {name!r} twice; expected one of each name.")
        members[name] = (info.size, partial(read, info.offset_data, info.size))
    return members


def _decompressed(file: IO[bytes], address: str, opened: ExitStack) -> IO[bytes]:
    """Return the plain tar: a compressed one is read once, since nobody can seek in it."""
    import bz2
    import gzip
    import lzma

    start = file.read(6)
    file.seek(0)
    for magic, opener in ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ", lzma.open)):
        if not start.startswith(magic):
            continue
        # It lives as long as the archive.
        plain = opened.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        written = 0
        try:
            with opener(file, "rb") as packed:
                while chunk := packed.read(2**22):
                    written += len(chunk)
                    _check_total(written, file, address)
                    plain.write(chunk)
        except (lzma.LZMAError, EOFError, OSError, ValueError) as error:
            raise DataError(f"{address} is damaged: {error}.") from None
        plain.seek(0)
        return plain
    return file


def _check_member(name: str, address: str, *, is_plain: bool) -> None:
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not is_plain:
        kind = "a link, a pipe or a device"
    elif name.startswith(("/", "\\")) or ".." in parts or (parts and ":" in parts[0]):
        kind = "a path that leads outside"
    else:
        return
    raise DataError(
        f"{address} holds {name!r}, {kind}; expected plain files below one folder. "
        f"Nothing was unpacked. Pack the images anew."
    )


def _check_count(count: int, address: str) -> None:
    if count > MAX_MEMBERS:
        raise DataError(
            f"{address} holds {count:,} members or more; at most {MAX_MEMBERS:,} are read. "
            f"Unpack it, and name the folder."
        )


def _check_total(total: int, file: IO[bytes], address: str) -> None:
    packed = os.fstat(file.fileno()).st_size
    if total > MAX_EXPANSION * packed + _SPARE_BYTES:
        raise DataError(
            f"{address} has {packed:,} bytes and unpacks to more than {total - 1:,}; at most "
            f"{MAX_EXPANSION} times as many are read. Unpack it and name the folder."
        )


def _common_folder(names: Iterable[str]) -> str:
    """Return the folders that hold everything, with their slash, or nothing."""
    common: tuple[str, ...] | None = None
    for name in names:
        parts = tuple(name.split("/")[:-1])
        if any(is_ignored(part) for part in name.split("/")):
            continue
        pairs = zip(common or (), parts, strict=False)
        same = takewhile(lambda pair: pair[0] == pair[1], pairs)
        common = parts if common is None else tuple(part for part, _ in same)
    return "".join(f"{part}/" for part in common or ())
