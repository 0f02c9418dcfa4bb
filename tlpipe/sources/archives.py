"""Zip and tar archives as storage: read member by member, nothing is ever unpacked."""

import bz2
import copy
import errno
import gzip
import logging
import lzma
import os
import stat
import struct
import tarfile
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import IO

from tlpipe import files
from tlpipe.errors import DataError, ImageError, StoreError
from tlpipe.sources.storage import (
    Listed,
    Storage,
    attempt,
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
_PIECE_BYTES = 2**20
_LZMA_BYTES = 2**28  # of memory, for a dictionary of any size that is in use
# Others that are recognised, by their first bytes.
_UNKNOWN = {b"Rar!": "RAR", b"7z\xbc\xaf": "7-Zip", b"\x28\xb5\x2f\xfd": "Zstandard"}
_log = logging.getLogger(__name__)
_UTF8_FLAG = 0x800
_END64_BYTES = 76  # of the records that may stand between the directory and its end
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
            ImageError: it is missing, damaged or too large.
            StoreError: the disk or network that the archive lies on fails.
        """
        check_inside(name)
        member = self._members.get(name)
        if member is None:
            raise ImageError("missing", "the archive has no such member")
        size, read = member
        check_size(size)
        try:
            data: bytes = attempt(read, self._address, but=_is_damage)
        except StoreError:
            raise
        except (OSError, RuntimeError, NotImplementedError, zipfile.BadZipFile, EOFError) as error:
            raise ImageError("unreadable", f"{type(error).__name__}: {error}") from None
        except (zlib.error, lzma.LZMAError, ValueError, struct.error) as error:
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


_ZIP = b"PK\x03\x04"  # begins a zip archive, whose list of members stands at its end


def open_archive(file: IO[bytes], address: str) -> Archive:
    """Open a zip or tar file; ``file`` is closed with the archive, or where it is none.

    Raises:
        DataError: it is neither, damaged, encrypted, a part of one, too large when unpacked, or
            holds a member that would lead outside, a link or a device.
    """
    begins = b""
    try:
        with ExitStack() as opened:
            opened.enter_context(file)
            begins = file.read(len(_ZIP))
            file.seek(0)
            _check_known(file, address)
            if zipfile.is_zipfile(file):
                members = _zip_members(file, address)
            else:
                file.seek(0)
                members = _tar_members(file, address, opened)
            archive = Archive(file, address, members)
            archive.closing = opened.pop_all()
            return archive
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        if isinstance(error, OSError) and not _is_damage(error):
            raise StoreError(
                f"ingest.source {address} cannot be read: {error}. Nothing was rejected or "
                f"changed: check the disk and the room in {_scratch_folder()}, then run again."
            ) from None
        if begins == _ZIP:
            raise DataError(
                f"ingest.source {address} begins like a zip archive and is damaged or incomplete "
                f"({error}). Fetch it again."
            ) from None
        raise DataError(
            f"ingest.source {address} cannot be read as an archive ({error}); expected a folder, a "
            f"zip or tar archive, or the YAML file of a built-in data set. A table is read from "
            f"the folder that holds it with its images: name that folder."
        ) from None


def _check_known(file: IO[bytes], address: str) -> None:
    start = file.read(4)
    file.seek(0)
    if start in _UNKNOWN:
        raise DataError(
            f"{address} is an archive of the kind {_UNKNOWN[start]}, which is not known; expected "
            f"zip, or tar (plain, gz, bz2 or xz). Unpack it and name the folder, or pack it anew."
        )


def _zip_members(file: IO[bytes], address: str) -> dict[str, Member]:
    # zipfile would build an object for each member before anyone could count them.
    _check_count(_zip_count(file, address), address)
    archive = zipfile.ZipFile(file)
    if encrypted := sum(info.flag_bits & 1 for info in archive.infolist()):
        raise DataError(
            f"{address} is encrypted ({encrypted} of {len(archive.infolist())} members); expected "
            f"an archive without a password. Unpack it, and name the folder."
        )
    members: dict[str, Member] = {}
    total = 0
    names = _names(archive.infolist(), address)
    for info, name in zip(archive.infolist(), names, strict=True):
        kind = stat.S_IFMT(info.external_attr >> 16)
        _check_member(name, address, is_plain=kind in (0, stat.S_IFREG, stat.S_IFDIR))
        if name.endswith("/"):
            continue
        total += info.file_size
        _check_total(total, file, address)
        if name in members:
            raise DataError(f"{address} holds {name!r} twice; expected one of each name.")
        members[name] = (info.file_size, partial(_read_zipped, archive, info))
    return members


def _names(infos: Sequence[zipfile.ZipInfo], address: str) -> list[str]:
    r"""Return the members' names with ``/`` between folders, decoded as they were meant.

    Programs of Windows have written ``\`` between folders, which the format forbids. A name
    without the flag of UTF-8 is in code page 437 by the format; but most programs that are not of
    Windows write UTF-8 without the flag, and what is valid UTF-8 is hardly ever anything else.

    Source: APPNOTE.TXT 4.4.17 and appendix D.
    """
    names, others = [], []
    for info in infos:
        name = info.filename
        if not name.isascii() and not info.flag_bits & _UTF8_FLAG:
            try:
                name = name.encode("cp437").decode()
            except UnicodeError:
                others.append(name)
        names.append(name)
    if others:
        _log.warning(
            "%s: %s names are not in UTF-8 and read as code page 437, such as %r. If they look "
            "wrong, pack the images with a program that writes UTF-8",
            address,
            len(others),
            others[0],
        )
    if not any("/" in name for name in names):
        names = [name.replace("\\", "/") for name in names]
    return names


def _read_zipped(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """Return a member's bytes; never more are unpacked than its header states, and a piece.

    Raises:
        zipfile.BadZipFile: it unpacks to something else than its header states.
    """
    if info.compress_type not in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with archive.open(info) as member:
            return b"".join(iter(partial(member.read, _PIECE_BYTES), b""))
    # zipfile unpacks these in pieces of packed bytes, each without bound.
    packed = copy.copy(info)
    packed.compress_type, packed.file_size = zipfile.ZIP_STORED, info.compress_size
    packed.CRC = None  # type: ignore[assignment] # that of the unpacked bytes is compared below
    data, size = bytearray(), info.file_size
    with archive.open(packed) as member:
        decompressor = _decompressor(member, info)
        while len(data) <= size and not decompressor.eof:
            piece = member.read(2**16) if decompressor.needs_input else b""
            if decompressor.needs_input and not piece:
                break
            data += decompressor.decompress(piece, min(size + 1 - len(data), _PIECE_BYTES))
    if len(data) != size or zlib.crc32(data) != info.CRC:
        raise zipfile.BadZipFile(f"{info.filename!r} is not what its header states")
    return bytes(data)


def _decompressor(
    member: IO[bytes], info: zipfile.ZipInfo
) -> bz2.BZ2Decompressor | lzma.LZMADecompressor:
    """Return what unpacks a member from where it stands, and read what comes before.

    Source: APPNOTE.TXT 5.8; the header of the format "alone", which lzma reads, is the five bytes
    of properties and the size.
    """
    if info.compress_type == zipfile.ZIP_BZIP2:
        return bz2.BZ2Decompressor()
    properties = member.read(9)[4:]
    has_end = info.flag_bits & 0x02
    size = b"\xff" * 8 if has_end else struct.pack("<Q", info.file_size)
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=_LZMA_BYTES)
    decompressor.decompress(properties + size, 0)
    return decompressor


def _zip_count(file: IO[bytes], address: str) -> int:
    """Return how many members the archive states, or its directory holds: the larger number.

    zipfile makes an object of each that the directory holds, whatever number is stated.
    """
    end = zipfile._EndRecData(file)  # type: ignore[attr-defined] # the very record that it reads
    if end is None:
        return 0
    if end[1]:  # the number of this file
        raise DataError(
            f"{address} is the last of {int(end[1]) + 1} files of a split archive; expected one "
            f"file. Join them (zip -s 0), or unpack them and name the folder."
        )
    stated, listed_bytes, location = int(end[4]), int(end[5]), int(end[9])
    file.seek(max(location - listed_bytes - _END64_BYTES, 0))
    found = 0
    while part := file.read(min(2**24, max(location - file.tell(), 0))):
        found += part.count(b"PK\1\2")
    file.seek(0)
    return max(stated, found)


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
    start = file.read(6)
    file.seek(0)
    for magic, opener in ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ", lzma.open)):
        if not start.startswith(magic):
            continue
        # It lives as long as the archive.
        plain = opened.enter_context(scratch_file())
        written = 0
        try:
            with opener(file, "rb") as packed:
                while chunk := packed.read(2**22):
                    written += len(chunk)
                    _check_total(written, file, address)
                    plain.write(chunk)
        except (lzma.LZMAError, EOFError, OSError, ValueError) as error:
            if isinstance(error, OSError) and not _is_damage(error):
                raise
            raise DataError(f"{address} is damaged: {error}.") from None
        plain.seek(0)
        return plain
    return file


def scratch_file() -> IO[bytes]:
    """Return a nameless file in this user's cache: what is unpacked may not fit into ``/tmp``."""
    folder = _scratch_folder()
    with files.writing_cache(folder):
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=folder)


def _scratch_folder() -> Path:
    return files.cache_folder("tlpipe") / "unpacked"


def check_no_archives(storage: Storage, address: str) -> None:
    """Raise an error for a source that holds archives in place of class folders.

    Raises:
        DataError: it holds no folder, and archives on top.
    """
    if storage.folders():
        return
    inner = [name for name in storage.names() if name.lower().endswith(SUFFIXES)]
    if inner:
        shown = ", ".join(inner[:3]) + (" ..." if len(inner) > 3 else "")
        raise DataError(
            f"{address} holds {len(inner)} archives ({shown}) and no folders; expected images. "
            f"Archives inside a source are not opened: unpack each into a folder of its name."
        )


def _is_damage(error: Exception) -> bool:
    """Return whether an error tells of the archive's bytes: the system has no number for those."""
    return isinstance(error, OSError) and error.errno in (None, errno.EINVAL)


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
