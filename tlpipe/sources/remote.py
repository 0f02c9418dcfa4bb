"""Folders and archives at an address that ``fsspec`` knows, such as S3's."""

import errno
from contextlib import ExitStack
from typing import Any

from tlpipe.errors import DataError, ImageError
from tlpipe.sources import archives
from tlpipe.sources.storage import (
    Listed,
    Storage,
    attempt,
    check_collisions,
    check_inside,
    check_size,
    is_ignored,
)


class Remote(Listed):
    """A folder at an address that ``fsspec`` knows."""

    def __init__(self, filesystem: Any, root: str) -> None:
        """Take the file system and the folder in it, and list it."""
        self._filesystem = filesystem
        self._root = root.rstrip("/") + "/"
        filesystem.invalidate_cache()  # or an earlier listing of this process is taken
        # The size, where it is stated, and the tag that the server gives each content. S3's console
        # makes objects of no bytes for folders, whose names end with a slash.
        self._known = {
            path.removeprefix(self._root): (info.get("size"), str(info.get("ETag") or ""))
            for path, info in _listed(filesystem, root).items()
            if path.startswith(self._root) and not path.endswith("/")
        }
        kept = [name for name in self._known if not any(map(is_ignored, name.split("/")))]
        check_collisions(root, kept)
        super().__init__(kept)

    def read(self, name: str) -> bytes:
        """Fetch a file's bytes, as they were when the folder was listed.

        Raises:
            ImageError: it is not in the listing, or too large.
            DataError: it has changed since the folder was listed.
            StoreError: it cannot be fetched.
        """
        check_inside(name)
        if name not in self._known:
            raise ImageError("missing", "there is no such file")
        (size, tag), how = self._known[name], "changed"
        check_size(size or 0)
        address = self._filesystem.unstrip_protocol(self._root + name)
        try:
            data, found = attempt(
                lambda: self._fetch(name, tag), address, failures=(Exception,), but=_is_an_answer
            )
        except OSError as error:
            data, found = b"", None
            how = "is gone" if isinstance(error, FileNotFoundError) else "changed"
        if found != tag or (size is not None and len(data) != size):
            known = [f"{size} bytes"] if size is not None else []
            known += [f"the tag {tag}"] if tag else []
            before = f"had {' and '.join(known)}" if known else "was there"
            raise DataError(
                f"{address} {how} while the source was read: when it was listed it {before}. Let "
                f"the source be finished, then run again."
            )
        check_size(len(data))
        return data

    def stamp(self, name: str) -> str:
        """Return the tag that the server gives each content, where it gives one."""
        return self._known.get(name, (None, ""))[1]

    def _fetch(self, name: str, tag: str) -> tuple[bytes, str]:
        """Return a file's bytes and the tag of just these."""
        path = self._root + name
        if not tag:
            return bytes(self._filesystem.cat_file(path)), ""
        with self._filesystem.open(path, "rb") as file:
            data = bytes(file.read())
            # What opens a copy, such as simplecache, knows only of the file itself.
            details = getattr(file, "details", None) or self._filesystem.info(path)
        return data, str(details.get("ETag") or "")


def open_remote(address: str) -> Storage:
    """Open a folder or an archive at an address.

    Raises:
        DataError: there is nothing, or an archive that is not safe to read.
        StoreError: it cannot be reached.
    """
    import fsspec

    what = f"ingest.source {address}"
    try:
        filesystem, root = attempt(
            lambda: fsspec.core.url_to_fs(address),  # some kinds connect here already
            what,
            failures=(Exception,),
            but=lambda error: isinstance(error, ValueError | ImportError),
        )
    except (ValueError, ImportError) as error:
        raise DataError(
            f"{what} cannot be reached: {type(error).__name__}: {error}. Check the address, and "
            f"that the package for its kind is installed."
        ) from None

    def fetch_archive() -> Storage:
        with ExitStack() as opened:
            copy = opened.enter_context(archives.scratch_file())
            with filesystem.open(root, "rb") as remote:
                while chunk := remote.read(2**22):
                    copy.write(chunk)
            copy.seek(0)
            opened.pop_all()
        return archives.open_archive(copy, address)

    def list_folder() -> Storage:
        return Remote(filesystem, root)

    is_archive = address.lower().endswith(archives.SUFFIXES)
    read = fetch_archive if is_archive else list_folder
    try:
        storage = attempt(read, what, failures=(Exception,), but=_is_an_answer)
    except OSError as error:
        raise DataError(f"{what} does not exist, or changes: {error}. Check the address.") from None
    if not storage.folders() and next(storage.names(), None) is None:
        raise DataError(f"{what} holds no files. Check the address.")
    return storage


def _listed(filesystem: Any, root: str) -> dict[str, dict[str, Any]]:
    """Return what a store says of each file below a folder, by its path.

    fsspec walks folder by folder where a kind of store cannot list all files at once, and takes a
    folder whose listing fails for an empty one.

    Raises:
        FileNotFoundError: the store does not have the folder.
        StoreError: a folder cannot be listed, or one that is listed is not found.
    """
    from fsspec.asyn import AsyncFileSystem
    from fsspec.spec import AbstractFileSystem

    kind = type(filesystem)
    if issubclass(kind, AsyncFileSystem):
        is_walked = kind._find is AsyncFileSystem._find
    else:
        is_walked = kind.find is AbstractFileSystem.find
    if not is_walked:
        return dict(filesystem.find(root, detail=True))
    found, folders, seen = {}, [root], {root}

    def list_folder() -> list[dict[str, Any]]:
        try:
            return list(filesystem.ls(folder, detail=True))
        except FileNotFoundError:
            if folder == root:
                raise
            raise ConnectionError(f"it is listed in {root}, and not found") from None

    for folder in folders:
        address = filesystem.unstrip_protocol(folder)
        for info in attempt(list_folder, address, failures=(Exception,), but=_is_an_answer):
            path = info["name"]
            if info["type"] != "directory":
                found[path] = info
            elif path not in seen:
                seen.add(path)
                folders.append(path)
    return found


def _is_an_answer(error: Exception) -> bool:
    """Return whether a store says that a file, or the content of a tag, is not there any more."""
    # s3fs gives its own error for content of another tag the number of a busy server, whose errors
    # are of no class of their own.
    is_expired = isinstance(error, OSError) and error.errno == errno.EBUSY
    return (is_expired and type(error) is not OSError) or isinstance(error, FileNotFoundError)
